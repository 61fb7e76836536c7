"""The card for people: the figures of `card.measure` as tables, and their place beside the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from langchain_earlyexit.lab.marks import between
from langchain_earlyexit.pocket import weights_dir
from langchain_earlyexit.pocket.abilities import ABILITIES
from langchain_earlyexit.pocket.examination import TOLERANCE

_POINTS = 100 * TOLERANCE
_FEW = 10
"""Problems of a group below which nothing is said about what it cannot do."""


def markdown(card: Mapping[str, Any]) -> str:
    """The measured part of the card."""
    parts = (_head, _asked, _arms, _abilities, _groups, _weak, _signals, _foot)
    return "\n\n".join(part(card) for part in parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    lines.insert(1, "|" + "---|" * len(head))
    return "\n".join(lines)


def _head(card: Mapping[str, Any]) -> str:
    counts = card["questions"]
    told = ", ".join(f"{counts[name]} of {ability.title}" for name, ability in ABILITIES.items())
    return (
        f"Held-out problems: {told}; {card['sampling']}. DEER's threshold chosen on {counts['dev']} dev questions of "
        f"small arithmetic, the fewest tokens at most {_POINTS:g} points below full thinking there; every trial, "
        "forced and thrown-away token counted."
    )


def _asked(card: Mapping[str, Any]) -> str:
    rows = [
        [row["what"], f"{row['at_least']:g}", _figure(row["measured"], ".3f"), _met(row)]
        for row in card["asked"].values()
    ]
    return _table(["asked of it", "at least", "measured", "met"], rows)


def _met(row: Mapping[str, Any]) -> str:
    if row["measured"] is None:
        return "unknown"
    return "yes" if row["measured"] >= row["at_least"] else "no"


def _arms(card: Mapping[str, Any]) -> str:
    head = "|accuracy|against full thinking (95 % interval)|output tokens|saved|thinking tokens|exits"
    rows = []
    for name, arm in card["arms"].items():
        mean, low, high = arm["gap"]
        reasons = ", ".join(f"{reason} {count}" for reason, count in arm["reasons"].items())
        rows.append(
            [name, f"{arm['accuracy']:.3f}", f"{mean:+.3f} ({low:+.3f} to {high:+.3f})", f"{arm['output_tokens']:.1f}",
             _share(arm["saved"][0]), f"{arm['tokens']['thinking_tokens']:.1f}", reasons]
        )  # fmt: skip
    return "Small arithmetic:\n\n" + _table(head.split("|"), rows)


def _abilities(card: Mapping[str, Any]) -> str:
    head = (
        "ability|problems|full|no thinking|DEER|CoDE-Stop|DEER saves|CoDE-Stop saves|thinking tokens, right|wrong|"
        "longest|exits `degenerate`"
    )
    rows = []
    for name, row in card["abilities"].items():
        lengths, saved = row["thinking_tokens"], row["saved"]
        rows.append(
            [ABILITIES[name].title, str(row["questions"]), *_accuracies(row, ".3f"), _share(saved["deer"]),
             _share(saved["codestop"]), _figure(lengths["right"], ".0f"), _figure(lengths["wrong"], ".0f"),
             str(lengths["longest"]), f"{100 * row['degenerate']:.1f} %"]
        )  # fmt: skip
    return (
        "Share answered right, thinking to the end, not at all, and under both policies (CoDE-Stop with the paper's "
        "defaults); what these save; lengths of whole chains:\n\n" + _table(head.split("|"), rows)
    )


def _groups(card: Mapping[str, Any]) -> str:
    rows = [
        [ABILITIES[name].title, group, row["level"], str(row["questions"]), *_accuracies(row, ".2f"),
         f"{row['thinking_tokens']:.0f}"]
        for name, ability in card["abilities"].items()
        for group, row in ability["groups"].items()
    ]  # fmt: skip
    head = "ability|group|level|problems|full|no thinking|DEER|CoDE-Stop|thinking tokens"
    return _table(head.split("|"), rows)


def _accuracies(row: Mapping[str, Any], form: str) -> list[str]:
    return [format(row["accuracy"][name], form) for name in ("full", "none", "deer", "codestop")]


def _weak(card: Mapping[str, Any]) -> str:
    """What it cannot do: groups that are wrong more often than right with full thinking."""
    weak = [
        f"{group} ({ABILITIES[name].title}, {row['accuracy']['full']:.2f})"
        for name, ability in card["abilities"].items()
        for group, row in ability["groups"].items()
        if row["questions"] >= _FEW and row["accuracy"]["full"] < 0.5
    ]
    return f"Wrong more often than right even with full thinking: {', '.join(weak) or 'no group'}."


def _signals(card: Mapping[str, Any]) -> str:
    told = []
    for name, title in (("arithmetic", "Small arithmetic"), ("arithmetic_and_beyond", "With the problems beyond it")):
        tokens, areas = card["thinking_tokens"][name], card["auroc"][name]
        told.append(
            f"{title}: thinking tokens of right chains {_figure(tokens['right'], '.1f')}, of wrong ones "
            f"{_figure(tokens['wrong'], '.1f')}. AUROC of trial confidence "
            f"{_figure(areas['all_checks_same_as_full'], '.3f')} for the answer of full thinking and "
            f"{_figure(areas['all_checks_right'], '.3f')} for the right answer, over all checks; at the first check "
            f"{_figure(areas['first_check_same_as_full'], '.3f')} and {_figure(areas['first_check_right'], '.3f')}."
        )
    return "\n\n".join(told)


def _foot(card: Mapping[str, Any]) -> str:
    replayed = card["replayed"]
    return (
        f"{card['checks']:.2f} checks a chain of small arithmetic. On numbers DEER and CoDE-Stop are replayed on whole "
        f"chains; the live run that reuses trial answers left where its replay does in {replayed['left_alike']} of "
        f"{replayed['questions']} questions. All else ran live.\n\nMeasured in {card['minutes']} minutes by "
        "`earlyexit pocket eval`."
    )


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _share(value: float) -> str:
    return f"{100 * value:.0f} %"


def summary(card: Mapping[str, Any]) -> str:
    """The part of the card that the project's README tells."""
    return "\n\n".join(part(card) for part in (_head, _arms, _abilities))


_CARD = ("<!-- figures -->\n", "<!-- end of figures -->")
_SUMMARY = ("<!-- card -->\n", "<!-- end of card -->")
"""Between which marks the figures stand, beside the weights and in the project's README."""


def places(folder: Path | None = None, readme: Path | None = None) -> tuple[Path, Path]:
    """The folder of the card, and the project's README. Ask before minutes of measuring.

    Args:
        folder: of the weights; that of the bundled ones when None.
        readme: the project's; that of the checkout which holds the bundled weights when None.

    Raises:
        ValueError: a README without the marks between which figures stand.
        FileNotFoundError: no such README: an installed package is no checkout.
    """
    folder, readme = folder or weights_dir(), readme or weights_dir().parents[2] / "README.md"
    between(folder / "README.md", _CARD, "")
    between(readme, _SUMMARY, "")
    return folder, readme


def write(card: Mapping[str, Any], folder: Path | None = None, readme: Path | None = None) -> None:
    """Put the figures where they are told: `card.json` and the README beside the weights, and the project's README.

    Args and errors as for `places`; where it raises, nothing is written.
    """
    folder, readme = places(folder, readme)
    texts = {
        folder / "README.md": between(folder / "README.md", _CARD, markdown(card) + "\n"),
        readme: between(readme, _SUMMARY, summary(card) + "\n"),
        folder / "card.json": json.dumps(card, indent=1, allow_nan=False) + "\n",
    }
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
