"""What an evaluation finds, as plain data: rows (one for each way to answer), curves, and how far signals are right."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, Self

from langchain_earlyexit.lab.judge import Judge
from langchain_earlyexit.lab.outcomes import Outcome
from langchain_earlyexit.lab.statistics import paired_bootstrap
from langchain_earlyexit.record import COUNTS

_FORMAT = 1


class Interval(NamedTuple):
    """A mean, and its 95 % interval when questions are drawn again."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One way to answer, on the same questions as all others. Token counts are means per question.

    Attributes:
        name: of the arm.
        policy: the settings that ran.
        how: "live", "replayed" or "oracle".
        questions: how many.
        accuracy: share of right answers (of answers that are those of full thinking, where no gold is known).
        gap: accuracy against full thinking, paired by question.
        same: share of answers that are those of full thinking.
        helped, harmed: questions that full thinking answers wrong and this one right, and the other way round.
        tokens: by the five counts of an exit record.
        saved: share of the output tokens of full thinking; negative where it costs more.
        over_budgets: accuracy above that of fixed budgets which cost the same (interpolated between the two nearest
            that ran); None where none ran.
        reasons: how often thinking ended for which reason.
        seconds, cpu_seconds: wall-clock and processor time per 1,000 questions, where it ran live. The first depends on
            what else ran.
    """

    name: str
    policy: str
    how: str
    questions: int
    accuracy: float
    gap: Interval
    same: float
    helped: int
    harmed: int
    tokens: Mapping[str, float]
    saved: Interval
    over_budgets: Interval | None
    reasons: Mapping[str, int]
    seconds: float | None = None
    cpu_seconds: float | None = None

    @property
    def output_tokens(self) -> float:
        """All tokens that were computed for a question beyond its prompt, on average."""
        return sum(self.tokens.values())


class Point(NamedTuple):
    """Mean output tokens, accuracy, and what gives them."""

    tokens: float
    accuracy: float
    label: str


@dataclass(frozen=True)
class Curve:
    """Accuracy over tokens as one knob turns. `role`: "budget", "oracle" or "policy"."""

    name: str
    role: str
    points: tuple[Point, ...]


class Bin(NamedTuple):
    """Checks with a signal of about the same value: its mean, the share that hold what it claims, their number."""

    signal: float
    share: float
    checks: int


@dataclass(frozen=True)
class Reliability:
    """How often a signal's claim holds. `claim`: "right" or "same as full"."""

    signal: str
    claim: str
    bins: tuple[Bin, ...]


class Aside(NamedTuple):
    """Another table of a report, as text."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Evaluation:
    """All of it, as one JSON file holds it.

    `about` is told in the head of a report, `remarks` and then `asides` below its tables.
    """

    about: Mapping[str, str]
    rows: tuple[Row, ...]
    curves: tuple[Curve, ...] = ()
    reliability: tuple[Reliability, ...] = ()
    remarks: tuple[str, ...] = field(default=())
    asides: tuple[Aside, ...] = field(default=())

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        text = json.dumps({"format": _FORMAT, **asdict(self)}, ensure_ascii=False, allow_nan=False, indent=1)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            ValueError: another kind of file, or another version's.
        """
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.get("format") != _FORMAT or "rows" not in data:
            raise ValueError(f"{path} is no evaluation of this version; write one with `earlyexit evaluate`")
        return cls(
            about=data["about"],
            rows=tuple(_row_from(row) for row in data["rows"]),
            curves=tuple(
                Curve(curve["name"], curve["role"], tuple(Point(*point) for point in curve["points"]))
                for curve in data["curves"]
            ),
            reliability=tuple(
                Reliability(one["signal"], one["claim"], tuple(Bin(*entry) for entry in one["bins"]))
                for one in data["reliability"]
            ),
            remarks=tuple(data["remarks"]),
            asides=tuple(Aside(one[0], tuple(one[1]), tuple(tuple(row) for row in one[2])) for one in data["asides"]),
        )


def _row_from(data: Mapping[str, Any]) -> Row:
    over = data["over_budgets"]
    return Row(
        **{
            **data,
            "gap": Interval(*data["gap"]),
            "saved": Interval(*data["saved"]),
            "over_budgets": None if over is None else Interval(*over),
        }
    )


class Tally(NamedTuple):
    """Per question, in one order: whether it was answered right, and its output tokens."""

    right: list[bool]
    tokens: list[int]

    @property
    def point(self) -> tuple[float, float]:
        """Mean tokens and accuracy."""
        return fmean(self.tokens), fmean(self.right)


class Table:
    """Rows on the questions that full thinking has answered.

    Args:
        full: full thinking, one outcome per question.
        judge: grades answers.
        budgets: runs with a fixed cap on thinking (none at all among them), of the same questions.

    Raises:
        ValueError: a question twice, or gold answers for some questions only.
    """

    def __init__(self, full: Sequence[Outcome], judge: Judge, budgets: Sequence[Sequence[Outcome]] = ()) -> None:
        self.full = {outcome.question_id: outcome for outcome in full}
        if not full or len(self.full) != len(full):
            raise ValueError(f"{len(full)} outcomes of full thinking, but {len(self.full)} questions")
        known = sum(outcome.gold is not None for outcome in full)
        if known not in (0, len(full)):
            raise ValueError(f"{known} of {len(full)} questions have a gold answer; give it for all, or for none")
        self.judge = judge
        self.gold = known > 0
        judge.learn((outcome.answer, outcome.gold) for outcome in full if outcome.gold is not None)
        self._full = self.tally(full)
        capped = [self.tally(outcomes) for outcomes in budgets]
        self._budgets = sorted([*capped, self._full], key=lambda tally: tally.point) if capped else []

    def tally(self, outcomes: Sequence[Outcome]) -> Tally:
        """Right or not, and tokens, in the order of the full outcomes."""
        found = self._paired(outcomes)
        return Tally([self.right(outcome) for outcome in found], [outcome.output_tokens for outcome in found])

    def right(self, outcome: Outcome) -> bool:
        """Against the gold answer; against that of full thinking where there is none."""
        full = self.full[outcome.question_id]
        if full.gold is not None:
            return self.judge.right(outcome.answer, full.gold)
        return self.judge.same(outcome.answer, full.answer)

    def row(
        self,
        name: str,
        outcomes: Sequence[Outcome],
        *,
        policy: str,
        how: str = "live",
        seconds: float | None = None,
        cpu_seconds: float | None = None,
    ) -> Row:
        """One row; see `Row` for what is not computed.

        Raises:
            ValueError: outcomes of other questions than those of full thinking.
        """
        found = self._paired(outcomes)
        self.judge.learn((o.answer, gold) for o in found if (gold := self.full[o.question_id].gold) is not None)
        mine, full = self.tally(found), self._full
        return Row(
            name=name,
            policy=policy,
            how=how,
            questions=len(found),
            accuracy=fmean(mine.right),
            gap=Interval(*paired_bootstrap(mine.right, full.right)),
            same=fmean(self.judge.same(o.answer, self.full[o.question_id].answer) for o in found),
            helped=sum(now and not before for now, before in zip(mine.right, full.right, strict=True)),
            harmed=sum(before and not now for now, before in zip(mine.right, full.right, strict=True)),
            tokens={count: fmean(getattr(o, count) for o in found) for count in COUNTS},
            saved=saved(mine.tokens, full.tokens),
            over_budgets=self._over(mine),
            reasons=dict(sorted(Counter(o.reason for o in found).items())),
            seconds=seconds,
            cpu_seconds=cpu_seconds,
        )

    def _paired(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        by_id = {outcome.question_id: outcome for outcome in outcomes}
        if len(by_id) != len(outcomes) or by_id.keys() != self.full.keys():
            odd = sorted(by_id.keys() ^ self.full.keys())[:3]
            raise ValueError(
                f"{len(outcomes)} outcomes cannot be paired with the {len(self.full)} questions of full thinking"
                + (f"; only one side has {', '.join(odd)}" if odd else "")
            )
        return [by_id[name] for name in self.full]

    def _over(self, mine: Tally) -> Interval | None:
        """Accuracy above the line between the dearest budget that costs no more and the next one, on this line.

        Beyond either end of the curve it is held against that end.
        """
        if not self._budgets:
            return None
        spent = mine.point[0]
        after = next((i for i, tally in enumerate(self._budgets) if tally.point[0] >= spent), len(self._budgets) - 1)
        low, high = self._budgets[max(0, after - 1)], self._budgets[after]
        start, end = low.point[0], high.point[0]
        share = 1.0 if end <= start or spent >= end else max(0.0, (spent - start) / (end - start))
        line = [(1 - share) * a + share * b for a, b in zip(low.right, high.right, strict=True)]
        return Interval(*paired_bootstrap(mine.right, line))


def saved(mine: Sequence[int], full: Sequence[int]) -> Interval:
    """One minus the ratio of the means; its interval from the ratio's linear part, resampled by question."""
    mean = fmean(full)
    ratio = fmean(mine) / mean
    _, low, high = paired_bootstrap([tokens / mean for tokens in mine], [ratio * tokens / mean for tokens in full])
    return Interval(1 - ratio, 1 - ratio - high, 1 - ratio - low)
