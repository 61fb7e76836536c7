"""Arithmetic problems in English: families, number ranges, and a split by numbers. Needs no torch.

Every problem belongs to the split that the checksum of its order-free key names, so a combination of numbers met in
training is never asked in development or test, in any wording and any order of its operands.
"""

# ruff: noqa: S311

import random
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

Split = Literal["train", "dev", "test"]
Level = Literal["easy", "medium", "hard", "beyond"]


@dataclass(frozen=True)
class Problem:
    """A question with its answer, and the numbers that a written solution works on."""

    question: str
    answer: str
    family: str
    level: str
    restated: str = field(default="", repr=False)
    form: str = field(default="", repr=False)
    numbers: tuple[int, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Task:
    """The numbers of a problem before it is put in words."""

    family: str
    form: str
    numbers: tuple[int, ...]
    answer: int
    restated: str
    key: str


@dataclass(frozen=True)
class Mix:
    """Number ranges (both ends included) and the share of each family. Frozen before the training run."""

    two_digits: tuple[int, int] = (11, 99)
    three_digits: tuple[int, int] = (101, 499)
    one_digit: tuple[int, int] = (1, 10)
    small: tuple[int, int] = (1, 20)
    any_three_digits: tuple[int, int] = (101, 999)
    factor: tuple[int, int] = (2, 9)
    small_factor: tuple[int, int] = (11, 39)
    divisor: tuple[int, int] = (3, 9)
    small_product: tuple[int, int] = (12, 49)
    start: tuple[int, int] = (2, 40)
    step: tuple[int, int] = (3, 15)
    term: tuple[int, int] = (6, 25)
    three_digit_addend: float = 0.2
    three_digit_in_triple: float = 0.1
    three_digit_minuend: float = 0.3
    three_digit_dividend: float = 0.3
    shares: Mapping[str, float] = field(
        default_factory=lambda: MappingProxyType(
            {
                "add2": 0.13,
                "sub": 0.10,
                "mul21": 0.12,
                "mul31": 0.10,
                "add3": 0.08,
                "lin": 0.14,
                "rem": 0.07,
                "cmp": 0.05,
                "mul22": 0.09,
                "two": 0.06,
                "seq": 0.06,
            }
        )
    )


MIX = Mix()

SMALL_SHARES: Mapping[str, float] = MappingProxyType({"small": 1.0})
"""Operands below 11: too easy to be asked in the card's mix, and read wrongly when they were never taught."""

DOUBT_SHARES: Mapping[str, float] = MappingProxyType({"mul33": 0.4, "mul222": 0.25, "mix3": 0.35})
"""Families beyond the model's capacity, on which its chains grow long and waver."""

LEVELS: Mapping[str, Level] = MappingProxyType(
    {
        "add2": "easy",
        "sub": "easy",
        "mul21": "easy",
        "mul31": "medium",
        "add3": "medium",
        "lin": "medium",
        "rem": "medium",
        "cmp": "medium",
        "mul22": "hard",
        "two": "hard",
        "seq": "hard",
        "small": "easy",
        "mul33": "beyond",
        "mul222": "beyond",
        "mix3": "beyond",
    }
)

NAMES = [
    "Ada",
    "Ben",
    "Carla",
    "Dan",
    "Eva",
    "Finn",
    "Grace",
    "Hugo",
    "Ida",
    "Jack",
    "Kim",
    "Leo",
    "Mia",
    "Noah",
    "Olga",
    "Paul",
    "Rosa",
    "Sam",
    "Tina",
    "Tom",
    "Vera",
    "Will",
]
ITEMS = [
    "apples",
    "books",
    "cards",
    "coins",
    "eggs",
    "flowers",
    "marbles",
    "pencils",
    "shells",
    "stamps",
    "stickers",
    "tickets",
    "toys",
    "nuts",
    "beads",
    "bottles",
]


def _draw(rng: random.Random, bounds: tuple[int, int]) -> int:
    return rng.randint(*bounds)


def _ordered(*numbers: int) -> str:
    return ",".join(map(str, sorted(numbers)))


def _add2(rng: random.Random) -> Task:
    a, b = (_draw(rng, MIX.three_digits if rng.random() < MIX.three_digit_addend else MIX.two_digits) for _ in range(2))
    return Task("add2", "a+b", (a, b), a + b, f"{a} + {b}", f"add:{_ordered(a, b)}")


def _add3(rng: random.Random) -> Task:
    a, b, c = (
        _draw(rng, MIX.three_digits if rng.random() < MIX.three_digit_in_triple else MIX.two_digits) for _ in range(3)
    )
    return Task("add3", "a+b+c", (a, b, c), a + b + c, f"{a} + {b} + {c}", f"add:{_ordered(a, b, c)}")


def _sub(rng: random.Random) -> Task:
    a = _draw(rng, MIX.three_digits if rng.random() < MIX.three_digit_minuend else MIX.two_digits)
    b = _draw(rng, (MIX.two_digits[0], min(a, 999) - 2)) if a > MIX.two_digits[0] + 4 else a - 2
    return Task("sub", "a-b", (a, b), a - b, f"{a} - {b}", f"sub:{a},{b}")


def _product(rng: random.Random, family: str, first: tuple[int, int], second: tuple[int, int]) -> Task:
    a, b = _draw(rng, first), _draw(rng, second)
    x, y = (b, a) if rng.random() < 0.25 else (a, b)
    return Task(family, "a*b", (a, b), a * b, f"{x} * {y}", f"mul:{_ordered(a, b)}")


def _lin(rng: random.Random) -> Task:
    form = rng.choice(["a*b+c", "c+a*b", "a*b-c", "c+a*b-d", "c+a*b-d"])
    while True:
        a, b = _draw(rng, MIX.two_digits), _draw(rng, MIX.factor)
        c, d = _draw(rng, MIX.two_digits), _draw(rng, MIX.two_digits)
        if form == "a*b-c" and a * b - c < 2:
            continue
        if form == "c+a*b-d" and (c + a * b - d < 2):
            continue
        break
    product = f"{a} * {b}" if rng.random() < 0.75 else f"{b} * {a}"
    if form == "a*b-c":
        return Task("lin", form, (a, b, c), a * b - c, f"{product} - {c}", f"lin:{_ordered(a, b)}-{c}")
    if form == "c+a*b-d":
        return Task("lin", form, (a, b, c, d), c + a * b - d, f"{c} + {product} - {d}", f"lin:{_ordered(a, b)}+{c}-{d}")
    restated = f"{product} + {c}" if form == "a*b+c" else f"{c} + {product}"
    return Task("lin", form, (a, b, c), a * b + c, restated, f"lin:{_ordered(a, b)}+{c}")


def _rem(rng: random.Random) -> Task:
    a = _draw(rng, MIX.three_digits if rng.random() < MIX.three_digit_dividend else MIX.two_digits)
    b = _draw(rng, MIX.divisor)
    return Task("rem", "a%b", (a, b), a % b, f"the remainder of {a} by {b}", f"rem:{a},{b}")


def _cmp(rng: random.Random) -> Task:
    form = rng.choice(["larger", "smaller"])
    while True:
        a, b = _draw(rng, MIX.two_digits), _draw(rng, MIX.factor)
        product = a * b
        c = _draw(rng, MIX.two_digits)
        d = product + rng.choice([-1, 1]) * rng.randint(1, 40) - c
        if d >= MIX.two_digits[0]:
            break
    answer = max(product, c + d) if form == "larger" else min(product, c + d)
    left, right = f"{a} * {b}", f"{c} + {d}"
    if rng.random() < 0.5:
        left, right = right, left
    key = f"cmp:{_ordered(a, b)}|{_ordered(c, d)}"
    return Task("cmp", form, (a, b, c, d), answer, f"the {form} of {left} and {right}", key)


def _two(rng: random.Random) -> Task:
    a, b, c, d = (_draw(rng, MIX.small_product if i % 2 == 0 else MIX.factor) for i in range(4))
    pairs = sorted([_ordered(a, b), _ordered(c, d)])
    return Task("two", "a*b+c*d", (a, b, c, d), a * b + c * d, f"{a} * {b} + {c} * {d}", f"two:{pairs[0]}|{pairs[1]}")


def _seq(rng: random.Random) -> Task:
    start, step, term = _draw(rng, MIX.start), _draw(rng, MIX.step), _draw(rng, MIX.term)
    restated = f"term {term} with start {start} and step {step}"
    return Task("seq", "nth", (start, step, term), start + (term - 1) * step, restated, f"seq:{start},{step},{term}")


def _small(rng: random.Random) -> Task:
    a, b = _draw(rng, MIX.small), _draw(rng, MIX.one_digit)
    form = rng.choice(["a+b", "a-b", "a*b"])
    if form == "a+b":
        a, b = (a, b) if rng.random() < 0.5 else (b, a)
        return Task("small", form, (a, b), a + b, f"{a} + {b}", f"add:{_ordered(a, b)}")
    if form == "a-b":
        a, b = (a, b) if a > b else (a + b, b)
        return Task("small", form, (a, b), a - b, f"{a} - {b}", f"sub:{a},{b}")
    return Task("small", form, (a, b), a * b, f"{a} * {b}", f"mul:{_ordered(a, b)}")


def _mul222(rng: random.Random) -> Task:
    a, b, c = (_draw(rng, MIX.two_digits) for _ in range(3))
    return Task("mul222", "a*b*c", (a, b, c), a * b * c, f"{a} * {b} * {c}", f"mul:{_ordered(a, b, c)}")


def _mix3(rng: random.Random) -> Task:
    while True:
        a, b, c, d, e, f = (_draw(rng, MIX.two_digits) for _ in range(6))
        answer = a * b + c * d - e * f
        if answer > 1:
            break
    key = f"mix:{'|'.join(sorted([_ordered(a, b), _ordered(c, d)]))}-{_ordered(e, f)}"
    return Task("mix3", "a*b+c*d-e*f", (a, b, c, d, e, f), answer, f"{a} * {b} + {c} * {d} - {e} * {f}", key)


_TASKS: Mapping[str, Callable[[random.Random], Task]] = MappingProxyType(
    {
        "add2": _add2,
        "sub": _sub,
        "mul21": lambda rng: _product(rng, "mul21", MIX.two_digits, MIX.factor),
        "mul31": lambda rng: _product(rng, "mul31", MIX.three_digits, MIX.factor),
        "add3": _add3,
        "lin": _lin,
        "rem": _rem,
        "cmp": _cmp,
        "mul22": lambda rng: _product(rng, "mul22", MIX.two_digits, MIX.small_factor),
        "two": _two,
        "seq": _seq,
        "small": _small,
        "mul33": lambda rng: _product(rng, "mul33", MIX.any_three_digits, MIX.any_three_digits),
        "mul222": _mul222,
        "mix3": _mix3,
    }
)

_ASK = (
    "What is {e}?",
    "What is {e}?",
    "What is {e}?",
    "Compute {e}.",
    "Calculate {e}.",
    "Work out {e}.",
    "Please work out {e}.",
    "How much is {e}?",
    "Find {e}.",
    "Can you tell me what {e} is?",
    "Evaluate {e}.",
)
_ASK_BARE = ("{e}", "{e} = ?", "{e} =")

_STORIES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "a+b": (
            "{N} has {a} {i} and buys {b} more. How many {i} does {N} have now?",
            "There are {a} {i} in one box and {b} in another. How many {i} are there in all?",
            "{N} found {a} {i} and {M} found {b}. How many {i} did they find together?",
        ),
        "a+b+c": (
            "{N} sold {a} {i} on Monday, {b} on Tuesday and {c} on Friday. How many {i} is that in all?",
            "Three boxes hold {a}, {b} and {c} {i}. How many {i} are there in all?",
        ),
        "a-b": (
            "{N} has {a} {i} and gives away {b}. How many {i} are left?",
            "A shop had {a} {i} and sold {b}. How many {i} are left?",
            "{N} has {a} {i} and {M} has {b}. How many more {i} does {N} have?",
        ),
        "a*b": (
            "{N} buys {b} boxes with {a} {i} each. How many {i} is that?",
            "There are {a} rows with {b} {i} each. How many {i} are there in all?",
            "A box holds {a} {i}. How many {i} are in {b} boxes?",
        ),
        "a*b+c": (
            "{N} buys {b} boxes with {a} {i} each and finds {c} more. How many {i} does {N} have now?",
            "There are {a} rows with {b} {i} each, and {c} more. How many {i} are there in all?",
        ),
        "c+a*b": (
            "{N} has {c} {i} and buys {b} boxes with {a} {i} each. How many {i} does {N} have now?",
            "{N} has {c} {i} and gets {b} more each day. How many {i} does {N} have after {a} days?",
        ),
        "a*b-c": (
            "{N} buys {b} boxes with {a} {i} each and gives away {c}. How many {i} are left?",
            "There are {a} rows with {b} {i} each. {N} sold {c}. How many {i} are left?",
        ),
        "c+a*b-d": (
            "{N} has {c} {i}, buys {b} boxes with {a} {i} each and gives away {d}. How many {i} are left?",
            "A shop had {c} {i}, got {b} boxes with {a} {i} each and sold {d}. How many {i} are left?",
        ),
        "a%b": (
            "What is the remainder when {a} is divided by {b}?",
            "What is left when {a} is divided by {b}?",
            "{a} {i} are shared among {b} friends. How many {i} are left over?",
            "{N} puts {a} {i} in boxes of {b}. How many {i} are left over?",
        ),
        "larger": ("Which is larger, {l} or {r}?", "What is the larger of {l} and {r}?"),
        "smaller": ("Which is smaller, {l} or {r}?", "What is the smaller of {l} and {r}?"),
        "a*b+c*d": (
            "{N} buys {b} boxes with {a} {i} each and {d} bags with {c} {i} each. How many {i} is that in all?",
            "There are {a} rows with {b} {i} each and {c} rows with {d} {i} each. How many {i} are there in all?",
        ),
        "nth": (
            "A list of numbers starts with {a} and goes up by {b} each time. What is number {c} in the list?",
            "A sequence starts at {a} and each term is {b} more than the one before. What is term {c}?",
            "{N} has {a} {i} on day 1 and gets {b} more each day. How many {i} does {N} have on day {c}?",
            "What is term {c} of the sequence {a}, {s}, {t}, and so on?",
        ),
    }
)


def _spelled(rng: random.Random, expression: str) -> str:
    """The expression as people also write it: other signs, words, or no spaces."""
    roll = rng.random()
    if roll < 0.06:
        return expression.replace("*", "×")
    if roll < 0.09:
        return expression.replace("*", "x")
    if roll < 0.15:
        return expression.replace("*", "times").replace("+", "plus").replace("-", "minus")
    if roll < 0.20:
        return expression.replace(" ", "")
    return expression


def _question(rng: random.Random, task: Task) -> str:
    letters = dict(zip("abcd", task.numbers, strict=False))
    if task.family == "cmp":
        left, right = task.restated.split(" of ")[1].split(" and ")
        left, right = _spelled(rng, left), _spelled(rng, right)
        return rng.choice(_STORIES[task.form]).format(l=left, r=right)
    in_words = task.family in {"rem", "seq"} or (task.form in _STORIES and rng.random() < 0.4)
    if not in_words:
        expression = _spelled(rng, task.restated)
        return rng.choice(_ASK_BARE if rng.random() < 0.12 else _ASK).format(e=expression)
    name, other = rng.sample(NAMES, 2)
    extra: dict[str, int] = {}
    if task.form == "nth":
        start, step, _ = task.numbers
        extra = {"s": start + step, "t": start + 2 * step}
    return rng.choice(_STORIES[task.form]).format(N=name, M=other, i=rng.choice(ITEMS), **letters, **extra)


def split_of(key: str) -> Split:
    """The split that a problem's key belongs to: one in sixteen is test, one in sixteen development."""
    bucket = zlib.crc32(key.encode()) % 16
    return "test" if bucket == 0 else "dev" if bucket == 1 else "train"


def draw(split: Split, rng: random.Random, shares: Mapping[str, float] = MIX.shares) -> Problem:
    """One random problem of a split."""
    make = _TASKS[rng.choices(list(shares), list(shares.values()))[0]]
    task = make(rng)
    while split_of(task.key) != split:
        task = make(rng)
    return Problem(
        question=_question(rng, task),
        answer=str(task.answer),
        family=task.family,
        level=LEVELS[task.family],
        restated=task.restated,
        form=task.form,
        numbers=task.numbers,
    )


def sample(split: Split, n: int, seed: int, shares: Mapping[str, float] = MIX.shares) -> list[Problem]:
    """`n` problems of a split with different questions, the same for the same seed."""
    rng = random.Random(f"{split}-{seed}")
    found: dict[str, Problem] = {}
    while len(found) < n:
        problem = draw(split, rng, shares)
        found.setdefault(problem.question, problem)
    return list(found.values())
