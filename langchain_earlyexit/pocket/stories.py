"""Word problems of three to six dependent steps, told sentence by sentence. Needs no torch.

A story is a sequence of sentence kinds. The split goes by that sequence (its skeleton), so development and test ask for
compositions of sentences never met in training; the numbers are free.
"""

# ruff: noqa: S311

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from langchain_earlyexit.pocket.problems import ITEMS, NAMES, Split, split_of

MAX_VALUE = 999


@dataclass(frozen=True)
class PlanProblem:
    """A story with the steps that solve it; `#k` in a step is the result of step k. The last step is the answer."""

    story: str
    steps: tuple[str, ...]
    results: tuple[int, ...]
    answer: str
    level: str
    skeleton: str = field(default="", repr=False)
    notes: tuple[str, ...] = field(default=(), repr=False)
    """What each sentence says; `<k>` stands for the expression of step k, counted from 0."""


# Stories

Numbers = dict[str, int]


def _one(rng: random.Random, value: int) -> Numbers:
    return {"a": rng.randint(3, 99) if rng.random() < 0.85 else rng.randint(100, 400)}


def _pair(rng: random.Random, value: int) -> Numbers:
    return {"a": rng.randint(3, 99), "b": rng.randint(3, 99)}


def _groups(rng: random.Random, value: int) -> Numbers:
    return {"k": rng.randint(2, 9), "n": rng.randint(2, 12) if rng.random() < 0.5 else rng.randint(11, 60)}


def _some_less(rng: random.Random, value: int) -> Numbers:
    return {"a": rng.randint(2, max(2, min(value - 1, 99 if rng.random() < 0.8 else 600)))}


def _pair_less(rng: random.Random, value: int) -> Numbers:
    return {"a": rng.randint(2, max(2, min(value // 2, 90))), "b": rng.randint(2, max(2, min(value // 2 - 1, 90)))}


def _groups_less(rng: random.Random, value: int) -> Numbers:
    k = rng.randint(2, 9)
    return {"k": k, "n": rng.randint(2, max(2, min((value - 1) // k, 60)))}


def _factor(rng: random.Random, value: int) -> Numbers:
    return {"k": rng.randint(2, max(2, min(9, MAX_VALUE // value)))}


def _goal(rng: random.Random, value: int) -> Numbers:
    return {"a": min(MAX_VALUE, value + rng.randint(2, 99))}


@dataclass(frozen=True)
class _Kind:
    """A kind of sentence: wordings, what it says, its numbers, and its steps.

    A step names its operands by letter, or `now` (the quantity before the sentence) or `last` (the step before).
    """

    wordings: tuple[str, ...]
    note: str
    numbers: Callable[[random.Random, int], Numbers]
    steps: tuple[str, ...] = ()


_STARTS: Mapping[str, _Kind] = MappingProxyType(
    {
        "has": _Kind(("{N} has {a} {i}.", "{N} starts with {a} {i}.", "{N} owns {a} {i}."), "{N} has {a}.", _one),
        "has boxes": _Kind(
            (
                "{N} has {k} boxes with {n} {i} each.",
                "{N} has {k} bags of {n} {i}.",
                "{N} fills {k} jars with {n} {i} each.",
                "{N} buys {k} boxes with {n} {i} each.",
            ),
            "{k} of {n} make <0>.",
            _groups,
            ("k * n",),
        ),
        "lays rows": _Kind(
            (
                "{N} lays out {k} rows of {n} {i}.",
                "There are {k} rows with {n} {i} each for {N}.",
                "{N} has {k} shelves and puts {n} {i} on each.",
            ),
            "{k} rows of {n} make <0>.",
            _groups,
            ("k * n",),
        ),
        "two colors": _Kind(
            ("{N} has {a} red and {b} blue {i}.", "{N} has {a} large {i} and {b} small ones."),
            "{a} and {b} make <0>.",
            _pair,
            ("a + b",),
        ),
        "two days": _Kind(
            ("{N} found {a} {i} on Monday and {b} on Tuesday.", "{N} made {a} {i} in May and {b} in June."),
            "{a} and {b} make <0>.",
            _pair,
            ("a + b",),
        ),
        "more than": _Kind(
            ("{M} has {a} {i} and {N} has {b} more than {M}.", "{N} has {b} {i} more than {M}, who has {a}."),
            "{b} more than {a} is <0>.",
            _pair,
            ("a + b",),
        ),
        "times as many": _Kind(
            ("{M} has {n} {i} and {N} has {k} times as many.", "{N} has {k} times as many {i} as {M}, who has {n}."),
            "{k} times {n} is <0>.",
            _groups,
            ("k * n",),
        ),
    }
)

_MIDDLES: Mapping[str, _Kind] = MappingProxyType(
    {
        "buys": _Kind(("{N} buys {a} more.", "{N} buys {a} {i}."), "Buying {a} makes <0>.", _one, ("now + a",)),
        "finds": _Kind(("{N} finds {a} {i}.", "{N} finds another {a}."), "Finding {a} makes <0>.", _one, ("now + a",)),
        "gets": _Kind(
            ("{M} gives {N} {a} {i}.", "{N} gets {a} {i} from {M}."), "Getting {a} makes <0>.", _one, ("now + a",)
        ),
        "gives": _Kind(
            ("{N} gives away {a}.", "{N} gives {a} {i} to {M}."), "Giving {a} leaves <0>.", _some_less, ("now - a",)
        ),
        "loses": _Kind(("{N} loses {a} {i}.", "{N} loses {a}."), "Losing {a} leaves <0>.", _some_less, ("now - a",)),
        "sells": _Kind(
            ("{N} sells {a} {i}.", "{M} buys {a} {i} from {N}."), "Selling {a} leaves <0>.", _some_less, ("now - a",)
        ),
        "doubles": _Kind(
            ("{N} doubles the number of {i}.", "{N} works until there are twice as many."),
            "Twice as many is <0>.",
            lambda rng, value: {},
            ("2 * now",),
        ),
        "grows": _Kind(
            ("{N} works until there are {k} times as many.", "In a month {N} has {k} times as many {i}."),
            "{k} times as many is <0>.",
            _factor,
            ("k * now",),
        ),
        "buys boxes": _Kind(
            ("{N} buys {k} boxes with {n} {i} each.", "{N} buys {k} packs of {n} {i}.", "{N} gets {k} bags of {n}."),
            "{k} of {n} make <0>, in all <1>.",
            _groups,
            ("k * n", "now + last"),
        ),
        "friends give": _Kind(
            ("Each of {k} friends gives {N} {n} {i}.", "{k} friends give {N} {n} {i} each."),
            "{k} gifts of {n} make <0>, in all <1>.",
            _groups,
            ("k * n", "now + last"),
        ),
        "gets daily": _Kind(
            ("{N} gets {n} {i} a day for {k} days.", "For {k} days {N} makes {n} {i} each day."),
            "{k} days of {n} make <0>, in all <1>.",
            _groups,
            ("k * n", "now + last"),
        ),
        "shares": _Kind(
            ("{N} gives {n} {i} to each of {k} friends.", "{k} friends get {n} {i} each from {N}."),
            "{k} shares of {n} make <0>, which leaves <1>.",
            _groups_less,
            ("k * n", "now - last"),
        ),
        "sells packs": _Kind(
            ("{N} sells {k} packs of {n} {i}.", "{N} sold {k} bags with {n} {i} each."),
            "{k} packs of {n} make <0>, which leaves <1>.",
            _groups_less,
            ("k * n", "now - last"),
        ),
        "uses daily": _Kind(
            ("{N} uses {n} {i} a day for {k} days.", "For {k} days {N} gives away {n} {i} each day."),
            "{k} days of {n} make <0>, which leaves <1>.",
            _groups_less,
            ("k * n", "now - last"),
        ),
        "gets two": _Kind(
            ("{N} gets {a} {i} from {M} and {b} from a friend.", "{N} buys {a} new and {b} old {i}."),
            "{a} and {b} make <0>, in all <1>.",
            _pair,
            ("a + b", "now + last"),
        ),
        "loses two": _Kind(
            ("{N} breaks {a} {i} and loses {b}.", "{N} sells {a} {i} in the morning and {b} in the evening."),
            "{a} and {b} make <0>, which leaves <1>.",
            _pair_less,
            ("a + b", "now - last"),
        ),
        "trades": _Kind(
            ("{N} trades {a} {i} for {b} others.", "{N} sends back {a} and gets {b} new {i}."),
            "Without {a} it is <0>, with {b} it is <1>.",
            _pair_less,
            ("now - a", "last + b"),
        ),
        "matches": _Kind(
            ("{M} has {a} {i} more than {N} and gives them all to {N}.", "{M} brings {a} more {i} than {N} has."),
            "{M} has <0>, in all <1>.",
            _one,
            ("now + a", "now + last"),
        ),
    }
)

_ENDS: Mapping[str, _Kind] = MappingProxyType(
    {
        "now": _Kind(
            (
                "How many {i} does {N} have now?",
                "How many {i} does {N} have in the end?",
                "How many {i} is that?",
                "How many {i} are left?",
                "How many {i} are there in all?",
            ),
            "That is asked.",
            lambda rng, value: {},
        ),
        "worth": _Kind(
            (
                "One of them costs {k} coins. How many coins are they worth?",
                "{N} sells all for {k} coins each. How many coins is that?",
            ),
            "At {k} each it is <0>.",
            _factor,
            ("k * now",),
        ),
        "goal": _Kind(
            ("{N} wants {a} {i}. How many more does {N} need?", "How many {i} are missing to make {a}?"),
            "To {a} it needs <0>.",
            _goal,
            ("a - now",),
        ),
        "versus": _Kind(
            (
                "{M} has {a} {i}. How many more does {N} have?",
                "How many more {i} than {M} does {N} have, if {M} has {a}?",
            ),
            "Over {a} it is <0>.",
            _some_less,
            ("now - a",),
        ),
        "together": _Kind(
            ("{M} has {a} {i}. How many do they have together?", "How many {i} are there with the {a} of {M}?"),
            "With {a} it is <0>.",
            _one,
            ("now + a",),
        ),
        "each": _Kind(
            (
                "Each of {k} friends has as many. How many {i} do the friends have in all?",
                "{M} has {k} times as many. How many {i} does {M} have?",
            ),
            "{k} times that is <0>.",
            _factor,
            ("k * now",),
        ),
    }
)
_STEP_COUNT_ODDS: Mapping[int, float] = MappingProxyType({3: 0.3, 4: 0.35, 5: 0.22, 6: 0.13})


def _draw_kinds(rng: random.Random, steps: int) -> list[tuple[str, _Kind]]:
    """A random sequence of sentence kinds that takes the given number of steps."""
    while True:
        kinds = [rng.choice(list(_STARTS.items()))]
        end = rng.choice(list(_ENDS.items()))
        left = steps - len(kinds[0][1].steps) - len(end[1].steps)
        while left > 0:
            middle = rng.choice(list(_MIDDLES.items()))
            kinds.append(middle)
            left -= len(middle[1].steps)
        if left == 0 and len(kinds) > 1:
            return [*kinds, end]


def apply(left: int, sign: str, right: int) -> int:
    """The value of one operation: `+`, `-` or `*`."""
    return left + right if sign == "+" else left - right if sign == "-" else left * right


def _fits(left: int, sign: str, right: int) -> bool:
    """Whether the arithmetic families of the model cover the operation."""
    return 1 <= apply(left, sign, right) <= MAX_VALUE and (sign != "*" or 2 <= min(left, right) <= 9)


def _tell(kinds: Sequence[tuple[str, _Kind]], rng: random.Random) -> PlanProblem | None:
    """The story of a sequence of sentence kinds, or None if the numbers drawn leave the range."""
    name, *others = rng.sample(NAMES, len(kinds) + 1)
    item = rng.choice(ITEMS)
    sentences: list[str] = []
    notes: list[str] = []
    steps: list[str] = []
    results: list[int] = []
    now, value = "", 0
    for (_, kind), other in zip(kinds, others, strict=True):
        numbers = kind.numbers(rng, value)
        words = {"N": name, "M": other, "i": item, **numbers}
        first = len(steps)
        known = {letter: (str(number), number) for letter, number in numbers.items()} | {"now": (now, value)}
        known["2"] = ("2", 2)
        for step in kind.steps:
            left, sign, right = step.split()
            (a, x), (b, y) = known[left], known[right]
            if not _fits(x, sign, y):
                return None
            steps.append(f"{a} {sign} {b}")
            results.append(apply(x, sign, y))
            known["last"] = (f"#{len(steps)}", results[-1])
        now, value = known["last"] if kind.steps else known["a"] if "a" in numbers else (now, value)
        sentence = rng.choice(kind.wordings).format(**words)
        later = sentences and sentence.startswith(name) and kind is not kinds[-1][1] and rng.random() < 0.15
        sentences.append(f"Then {sentence}" if later else sentence)
        notes.append(_renumbered(kind.note.format(**words), first))
    level = {3: "easy", 4: "medium"}.get(len(steps), "hard")
    skeleton = _skeleton(kinds)
    return PlanProblem(
        _joined(sentences, name, rng), tuple(steps), tuple(results), str(value), level, skeleton, tuple(notes)
    )


def _renumbered(note: str, first: int) -> str:
    return re.sub(r"<(\d)>", lambda found: f"<{int(found[1]) + first}>", note)


def _simple(sentence: str, name: str) -> bool:
    return sentence.startswith(f"{name} ") and " and " not in sentence and "," not in sentence


def _joined(sentences: Sequence[str], name: str, rng: random.Random) -> str:
    """The sentences as one text; neighbours with the same subject at times become one sentence."""
    written: list[str] = []
    rest = list(sentences)
    while rest:
        run = 1
        most = rng.choice([2, 3]) if rng.random() < 0.3 else 1
        while run < min(most, len(rest) - 1) and all(_simple(part, name) for part in rest[: run + 1]):
            run += 1
        first, *others = (part.removesuffix(".") if run > 1 else part for part in rest[:run])
        others = [part.removeprefix(f"{name} ") for part in others]
        written.append(f"{', '.join([first, *others[:-1]])} and {others[-1]}." if others else first)
        rest = rest[run:]
    return " ".join(written)


def _skeleton(kinds: Sequence[tuple[str, _Kind]]) -> str:
    return "|".join(name for name, _ in kinds)


def draw_plan(split: Split, rng: random.Random) -> PlanProblem:
    """One random story of a split."""
    while True:
        steps = rng.choices(list(_STEP_COUNT_ODDS), list(_STEP_COUNT_ODDS.values()))[0]
        kinds = _draw_kinds(rng, steps)
        while split_of(f"plan:{_skeleton(kinds)}") != split:
            kinds = _draw_kinds(rng, steps)
        for _ in range(8):
            problem = _tell(kinds, rng)
            if problem:
                return problem


def sample_plans(split: Split, n: int, seed: int) -> list[PlanProblem]:
    """`n` problems of a split with different stories, the same for the same seed."""
    rng = random.Random(f"plans-{split}-{seed}")
    found: dict[str, PlanProblem] = {}
    while len(found) < n:
        problem = draw_plan(split, rng)
        found.setdefault(problem.story, problem)
    return list(found.values())
