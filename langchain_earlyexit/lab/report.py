"""An evaluation to read: Markdown, and one HTML file that holds its plots and asks for nothing from anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from langchain_earlyexit.lab.live import FULL, NO_THINKING
from langchain_earlyexit.lab.plot import accuracy_over_tokens, reliability_plot, standalone
from langchain_earlyexit.lab.table import Evaluation, Interval, Row
from langchain_earlyexit.record import COUNTS

_CLOSE = 0.06
"""Accuracy below full thinking that the close plot shows."""

_Table = tuple[tuple[str, ...], list[tuple[str, ...]]]

_READING = (
    "Accuracy gaps, savings and distances to the budget curve are means over questions with 95 % intervals, paired by "
    "question and resampled by question. Output tokens count all that was computed beyond the prompt: thinking, tokens "
    "fed to close it, the answer, trial answers, and thoughts thrown away.",
    "`over budgets` is the accuracy above that of fixed caps on thinking that cost the same, between the two nearest "
    "that ran. `helped` and `harmed` count questions that only this one answers right, and only full thinking does.",
    "`oracle` leaves at the first check that is right (or the same as full thinking): it looks for free and knows what "
    "no policy knows. `replayed` rows were computed from traces of full thinking, all others ran live.",
)


def plots(evaluation: Evaluation) -> dict[str, str]:
    """SVG texts by name: `accuracy`, its upper part as `close`, and `calibration` where signals were judged."""
    rows = _beside_budgets(evaluation)
    found = {
        "accuracy": accuracy_over_tokens(rows, evaluation.curves, _accuracy(evaluation)),
        "close": accuracy_over_tokens(rows, evaluation.curves, _accuracy(evaluation), _CLOSE),
    }
    if evaluation.reliability:
        found["calibration"] = reliability_plot(evaluation.reliability)
    return found


def markdown(evaluation: Evaluation, plot: str | None = None) -> str:
    """Tables and remarks. `plot`: address of the accuracy plot, to be shown first."""
    lines = [*(f"- {name}: {value}" for name, value in evaluation.about.items()), ""]
    if plot is not None:
        lines += [f"![{_accuracy(evaluation)} over output tokens]({plot})", ""]
    for table in _tables(evaluation):
        lines += [*_markdown_table(table), ""]
    for remark in (*evaluation.remarks, *_READING):
        lines += [remark, ""]
    for aside in evaluation.asides:
        lines += [f"{aside.caption}:", "", *_markdown_table((aside.header, list(aside.rows))), ""]
    return "\n".join(lines).rstrip() + "\n"


def brief(evaluation: Evaluation, plot: str, whole: str) -> str:
    """One table of all ways, fixed budgets aside, under the plot: for a page that tells other things too.

    Without seconds: the ways ran one after another, each beside whatever else the machine did then.

    Args:
        evaluation: what was found.
        plot: address of the accuracy plot, which shows the budgets.
        whole: address of the whole report.
    """
    header = (
        "", _accuracy(evaluation), "against full thinking", "output tokens", "saved", "over budgets", "thinking",
        "trial", "helped / harmed", "thinking ended",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = [
        (
            *_first_cells(row),
            f"{row.tokens['thinking_tokens']:.1f}",
            f"{row.tokens['trial_tokens']:.1f}",
            f"{row.helped} / {row.harmed}",
            _reasons(row.reasons),
        )
        for row in _beside_budgets(evaluation)
    ]
    lines = [
        f"![{_accuracy(evaluation)} over output tokens]({plot})",
        "",
        *_markdown_table((header, rows)),
        "",
        *(f"- {name}: {value}" for name, value in evaluation.about.items() if name != "time"),
        "",
        f"{_READING[0]} The settings that ran, fixed budgets one by one, the probe, its transfer and its price are in "
        f"[the whole report]({whole}).",
    ]
    return "\n".join(lines) + "\n"


def html(evaluation: Evaluation, title: str = "Early exit, measured") -> str:
    """One self-contained file."""
    about = "".join(f"<li>{escape(name)}: {escape(value)}</li>" for name, value in evaluation.about.items())
    figures = "".join(f"<figure>{svg}</figure>" for svg in plots(evaluation).values())
    tables = "".join(_html_table(table) for table in _tables(evaluation))
    told = "".join(f"<p>{_code(escape(remark))}</p>" for remark in (*evaluation.remarks, *_READING))
    told += "".join(
        f"<p>{escape(one.caption)}:</p>\n{_html_table((one.header, list(one.rows)))}" for one in evaluation.asides
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n<ul>{about}</ul>\n"
        f"{figures}\n{tables}\n{told}\n</body></html>\n"
    )


def write(evaluation: Evaluation, out: str | Path) -> list[Path]:
    """Write `out`.md, `out`.html, and the accuracy plots as `out`.svg and `out`-close.svg; the files."""
    base = Path(out)
    base.parent.mkdir(parents=True, exist_ok=True)
    drawn = plots(evaluation)
    files = {
        base.with_suffix(".md"): markdown(evaluation, f"{base.stem}.svg"),
        base.with_suffix(".html"): html(evaluation),
        base.with_suffix(".svg"): standalone(drawn["accuracy"]),
        base.with_name(f"{base.name}-close.svg"): standalone(drawn["close"]),
    }
    for path, text in files.items():
        path.write_text(text, encoding="utf-8")
    return list(files)


# --- tables -------------------------------------------------------------------------------------------------------


def _beside_budgets(evaluation: Evaluation) -> list[Row]:
    """Rows that the curve of fixed budgets does not stand for."""
    in_curve = {point.label for curve in evaluation.curves if curve.role == "budget" for point in curve.points}
    in_curve -= {FULL.name, NO_THINKING.name}
    return [row for row in evaluation.rows if row.name not in in_curve]


def _tables(evaluation: Evaluation) -> list[_Table]:
    return [_main(evaluation), _parts(evaluation.rows)]


def _main(evaluation: Evaluation) -> _Table:
    header = (
        "", _accuracy(evaluation), "against full thinking", "output tokens", "saved", "over budgets",
        "same as full", "helped / harmed", "s per 1,000", "CPU s",
    )  # fmt: skip
    return header, [
        (
            *_first_cells(row),
            f"{row.same:.3f}",
            f"{row.helped} / {row.harmed}",
            *("" if time is None else f"{time:.0f}" for time in (row.seconds, row.cpu_seconds)),
        )
        for row in evaluation.rows
    ]


def _parts(rows: Sequence[Row]) -> _Table:
    """What the tokens are, and why thinking ended."""
    words = {"forced_tokens": "forced", "speculated_tokens": "thrown away"}
    header = ("", *(words.get(count, count.removesuffix("_tokens")) for count in COUNTS), "thinking ended", "settings")
    return header, [
        (
            _named(row),
            *(f"{row.tokens[count]:.1f}" for count in COUNTS),
            _reasons(row.reasons),
            f"`{row.policy}`",
        )
        for row in rows
    ]


def _accuracy(evaluation: Evaluation) -> str:
    return evaluation.about.get("accuracy is", "accuracy")


def _first_cells(row: Row) -> tuple[str, ...]:
    """What both tables of ways begin with: up to the distance from fixed budgets."""
    return (
        _named(row),
        f"{row.accuracy:.3f}",
        _points(row.gap),
        f"{row.output_tokens:.1f}",
        _percent(row.saved),
        "" if row.over_budgets is None else _points(row.over_budgets),
    )


def _named(row: Row) -> str:
    return row.name if row.how != "replayed" else f"{row.name} (replayed)"


def _points(interval: Interval) -> str:
    """In points of 100."""
    mean, low, high = (100 * value for value in interval)
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def _percent(interval: Interval) -> str:
    mean, low, high = (100 * value for value in interval)
    return f"{mean:.0f} % ({low:.0f} to {high:.0f})"


def _reasons(reasons: Mapping[str, int]) -> str:
    ordered = sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0]))
    return ", ".join(f"{reason} {count}" for reason, count in ordered)


def _markdown_table(table: _Table) -> list[str]:
    header, rows = table
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return lines + [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]


def _html_table(table: _Table) -> str:
    header, rows = table
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{_code(escape(cell))}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f"<div class=wide><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n"


def _code(text: str) -> str:
    """Back quotes as code."""
    parts = text.split("`")
    return "".join(f"<code>{part}</code>" if i % 2 and i < len(parts) - 1 else part for i, part in enumerate(parts))


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222;background:#fff}"
    "table{border-collapse:collapse;margin:1em 0;font-variant-numeric:tabular-nums}"
    "th,td{border-bottom:1px solid #ddd;padding:.3em .6em;text-align:left;white-space:nowrap}"
    ".wide{overflow-x:auto}figure{margin:1em 0;overflow-x:auto}code{font-size:.9em}"
)
