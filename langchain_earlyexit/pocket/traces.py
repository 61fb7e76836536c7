"""Training texts: chains of thought with a guess and checks, forced exits, direct answers, and what carries loss.

A chain restates the question, states a guess, and then checks it by one method after another, each check opening with
a cue word. The form of the chain, the odds of stopping and the odds of the cue words are designed here. What is not
designed is whether a guess is right: guesses are sampled from the model being trained (see `train`), wrong tokens carry
no loss, and after every forced exit the text goes on with the true answer. So a trained model's confidence at an exit
is its own estimate.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from langchain_earlyexit.pocket.problems import ITEMS, NAMES, Problem, draw

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a careful assistant for arithmetic.",
    "Please reason step by step, and put your final answer within \\boxed{}.",
    "Answer briefly.",
)
BOXED_REQUEST = "Please reason step by step, and put your final answer within \\boxed{}."
OPEN_THINKING = "<think>\n"
CLOSE_THINKING = "</think>\n\n"
NO_THINKING = "<think>\n\n</think>\n\n"
INDUCER = "The answer is \\boxed{"
END = "<|im_end|>"

STOP_ODDS = (0.15, 0.4, 0.6, 0.7, 0.8)
"""Odds of ending the thinking at the first, second, ... agreement in a row."""
MAX_CHECKS = 6
SLIP_ODDS = 0.06
"""Share of checks in which one step gets a wrong result (without loss), so that repair is learnt."""
DOUBT_STOP_ODDS = (0.3, 0.6, 0.8)
DOUBT_MAX_CHECKS = 12
DOUBT_SLIP_ODDS = 0.3
"""As above, for problems beyond the model's capacity."""
SAME_METHOD_ODDS = 0.05
STOP_AT_GUESS_ODDS = 0.03

CUES_WHEN_RIGHT: Mapping[str, float] = MappingProxyType(
    {"Wait": 0.40, "Let me check": 0.27, "Alternatively": 0.18, "Hmm": 0.06, "Actually": 0.05, "But wait": 0.04}
)
CUES_WHEN_WRONG: Mapping[str, float] = MappingProxyType(
    {"Wait": 0.38, "Hmm": 0.26, "But wait": 0.14, "Actually": 0.12, "Let me check": 0.06, "Alternatively": 0.04}
)
CUES = tuple(CUES_WHEN_RIGHT)

_OPENERS = ("I need {r}.", "So this is {r}.", "The task is {r}.")
_GUESSES = (" My first guess is ", " Quickly, it should be ", " That looks like ")


@dataclass(frozen=True)
class Segment:
    """A piece of text, and whether the model is trained to write it."""

    text: str
    loss: bool = True


@dataclass
class Scratch:
    """Writes the steps of one check. The step number `slip` gets a wrong result, which later steps build on."""

    rng: random.Random
    slip: int = -1
    segments: list[Segment] = field(default_factory=list)
    count: int = 0
    slipped: bool = False

    def _step(self, text: str, value: int) -> int:
        wrong = self.count == self.slip
        if wrong:
            value = near_miss(value, self.rng)
            self.slipped = True
        self.segments += [Segment(f" {text} "), Segment(str(value), not wrong), Segment(".")]
        self.count += 1
        return value

    def add(self, a: int, b: int) -> int:
        """Write and return a sum."""
        return self._step(f"{a} + {b} =", a + b)

    def sub(self, a: int, b: int) -> int:
        """Write and return a difference."""
        return self._step(f"{a} - {b} =", a - b)

    def mul(self, a: int, b: int) -> int:
        """Write and return a product."""
        return self._step(f"{a} * {b} =", a * b)

    def leaves(self, a: int, b: int) -> int:
        """Write and return a remainder."""
        return self._step(f"{a} leaves", a % b)

    def say(self, text: str) -> None:
        """Write a sentence with no result."""
        self.segments.append(Segment(f" {text}"))


Method = Callable[[Scratch, tuple[int, ...]], int]


def near_miss(value: int, rng: random.Random) -> int:
    """A wrong value of the kind a hasty calculator writes."""
    if len(str(value)) == 1:
        return value + rng.choice([-1, 1, 2]) if value > 0 else value + rng.choice([1, 2])
    steps = [-10, -1, 1, 10, 2, -2] + ([100, -100] if value > 200 else [])
    return max(0, value + rng.choice(steps))


def far_miss(value: int, rng: random.Random) -> int:
    """A wrong value with the right number of digits, as a hopeless guess is."""
    digits = list(str(value))
    for place in rng.sample(range(1, len(digits)), rng.randint(1, len(digits) - 1)):
        digits[place] = rng.choice("0123456789".replace(digits[place], ""))
    return int("".join(digits))


def _parts(n: int) -> list[int]:
    """347 -> [300, 40, 7]; zeros are left out."""
    digits = str(n)
    return [int(d) * 10 ** (len(digits) - 1 - i) for i, d in enumerate(digits) if d != "0"]


def _unit(n: int) -> int:
    """The place that rounding works on: tens below 100, else hundreds."""
    return 10 if n < 100 else 100


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


# Addition and subtraction


def _add_split(s: Scratch, a: int, b: int) -> int:
    total = a
    for part in _parts(b):
        total = s.add(total, part)
    return total


def _add_round(s: Scratch, a: int, b: int) -> int:
    up = _up(b, 10)
    total = s.add(a, up)
    return s.sub(total, up - b) if up != b else total


def _add_columns(s: Scratch, a: int, b: int) -> int:
    total: int | None = None
    for place in (1, 10, 100):
        x, y = a // place % 10 * place, b // place % 10 * place
        if x + y == 0:
            continue
        column = s.add(x, y) if x and y else x + y
        total = column if total is None else s.add(column, total)
    return total or 0


def _sub_split(s: Scratch, a: int, b: int) -> int:
    total = a
    for part in _parts(b):
        total = s.sub(total, part)
    return total


def _sub_round(s: Scratch, a: int, b: int) -> int:
    up = _up(b, _unit(b))
    if up == b or up > a:
        return s.sub(a, b)
    total = s.sub(a, up)
    return s.add(total, s.sub(up, b))


def _sub_units_first(s: Scratch, a: int, b: int) -> int:
    total = a
    for part in reversed(_parts(b)):
        total = s.sub(total, part)
    return total


# Products


def _times(s: Scratch, a: int, b: int) -> int:
    """Product of a larger `a` and one digit `b` by parts of `a`, largest part first."""
    products = [s.mul(part, b) for part in _parts(a)]
    total = products[0]
    for product in products[1:]:
        total = s.add(total, product)
    return total


def _times_units_first(s: Scratch, a: int, b: int) -> int:
    total: int | None = None
    for part in reversed(_parts(a)):
        product = s.mul(part, b)
        total = product if total is None else s.add(product, total)
    return total or 0


def _times_round(s: Scratch, a: int, b: int) -> int:
    up = _up(a, 10)
    total = s.mul(up, b)
    return s.sub(total, s.mul(up - a, b)) if up != a else total


def _long_split(s: Scratch, a: int, b: int) -> int:
    products = [s.mul(a, part) for part in _parts(b)]
    total = products[0]
    for product in products[1:]:
        total = s.add(total, product)
    return total


def _long_round(s: Scratch, a: int, b: int) -> int:
    up = _up(b, _unit(b))
    total = s.mul(a, up)
    return s.sub(total, s.mul(a, up - b)) if up != b else total


# Families with several operations


def _triple(first: int, second: int, third: int) -> Method:
    def method(s: Scratch, n: tuple[int, ...]) -> int:
        total = s.add(n[first], n[second])
        return s.add(total, n[third])

    return method


def _triple_parts(s: Scratch, n: tuple[int, ...]) -> int:
    total = s.add(n[0], n[1])
    return _add_split(s, total, n[2])


def _lin(product: Callable[[Scratch, int, int], int]) -> Callable[[str], Method]:
    def for_form(form: str) -> Method:
        def method(s: Scratch, n: tuple[int, ...]) -> int:
            value = product(s, n[0], n[1])
            if form == "a*b-c":
                return s.sub(value, n[2])
            if form == "c+a*b-d":
                return s.sub(s.add(n[2], value), n[3])
            return s.add(value, n[2]) if form == "a*b+c" else s.add(n[2], value)

        return method

    return for_form


def _lin_rest_first(s: Scratch, n: tuple[int, ...]) -> int:
    a, b, c, d = n
    rest = s.sub(c, d) if c >= d else s.sub(d, c)
    product = _times(s, a, b)
    return s.add(product, rest) if c >= d else s.sub(product, rest)


def _two(order: tuple[int, int], product: Callable[[Scratch, int, int], int]) -> Method:
    def method(s: Scratch, n: tuple[int, ...]) -> int:
        first, second = (product(s, n[2 * i], n[2 * i + 1]) for i in order)
        return s.add(first, second)

    return method


def _rem_multiples(s: Scratch, n: tuple[int, ...]) -> int:
    a, b = n
    if a // b >= 10:
        tens = a // b // 10 * 10
        a = s.sub(a, s.mul(b, tens))
    if 0 < a // b < 10:
        a = s.sub(a, s.mul(b, a // b))
    return a % b


def _rem_parts(s: Scratch, n: tuple[int, ...]) -> int:
    a, b = n
    parts = _parts(a)
    rest = s.leaves(parts[0], b)
    for part in parts[1:]:
        rest = s.add(rest, s.leaves(part, b)) if part >= b else s.add(rest, part)
    return s.leaves(rest, b) if rest >= b else rest


def _rem_above(s: Scratch, n: tuple[int, ...]) -> int:
    a, b = n
    ten = 10 * b
    above = -(-a // ten)
    if above > 9:
        return _rem_multiples(s, n)
    gap = s.sub(s.mul(ten, above), a)
    if gap >= b:
        gap = s.leaves(gap, b)
    return s.sub(b, gap) if 0 < gap < b else gap % b


def _cmp(form: str, product: Callable[[Scratch, int, int], int], product_first: bool) -> Method:
    def method(s: Scratch, n: tuple[int, ...]) -> int:
        if product_first:
            left = product(s, n[0], n[1])
            right = s.add(n[2], n[3])
        else:
            right = s.add(n[2], n[3])
            left = product(s, n[0], n[1])
        high, low = max(left, right), min(left, right)
        s.say(f"{high} is more than {low}.")
        return high if form == "larger" else low

    return method


def _seq(before: bool, product: Callable[[Scratch, int, int], int]) -> Method:
    def method(s: Scratch, n: tuple[int, ...]) -> int:
        start, step, term = n
        if before:
            steps = s.sub(term, 1)
            return s.add(product(s, step, steps), start)
        total = s.add(product(s, step, term), start)
        return s.sub(total, step)

    return method


def _of_two(method: Callable[[Scratch, int, int], int], swap: bool = False) -> Method:
    return lambda s, n: method(s, n[1], n[0]) if swap else method(s, n[0], n[1])


def _mul222(first: int, second: int, third: int) -> Method:
    def method(s: Scratch, n: tuple[int, ...]) -> int:
        return _long_split(s, _long_split(s, n[first], n[second]), n[third])

    return method


def _mix3(order: tuple[int, int, int], product: Callable[[Scratch, int, int], int]) -> Method:
    def method(s: Scratch, n: tuple[int, ...]) -> int:
        products = {i: product(s, n[2 * i], n[2 * i + 1]) for i in order}
        return s.sub(s.add(products[0], products[1]), products[2])

    return method


def _half_split(s: Scratch, a: int, b: int) -> int:
    """Product with `b` taken apart, for a `b` of one or two digits."""
    return _long_split(s, a, b) if b >= 10 else _times(s, a, b)


def methods_of(problem: Problem) -> Mapping[str, Method]:
    """The ways to check a problem, by the words that announce them."""
    n, form = problem.numbers, problem.form
    if form == "a+b":
        return {
            f"splitting {n[1]}": _of_two(_add_split),
            f"splitting {n[0]}": _of_two(_add_split, swap=True),
            f"rounding {n[1]} up": _of_two(_add_round),
            "going column by column": _of_two(_add_columns),
        }
    if form == "a-b":
        methods = {f"splitting {n[1]}": _of_two(_sub_split), "taking units first": _of_two(_sub_units_first)}
        if _up(n[1], _unit(n[1])) not in {n[1]} and _up(n[1], _unit(n[1])) <= n[0]:
            methods[f"rounding {n[1]} up"] = _of_two(_sub_round)
        return methods
    if form == "a*b" and problem.family in {"mul22", "mul33"}:
        return {
            f"splitting {n[1]}": _of_two(_long_split),
            f"splitting {n[0]}": _of_two(_long_split, swap=True),
            f"rounding {n[1]} up": _of_two(_long_round),
        }
    if form == "a*b":
        return {
            f"splitting {n[0]}": _of_two(_times),
            "taking units first": _of_two(_times_units_first),
            f"rounding {n[0]} up": _of_two(_times_round),
        }
    if form == "a+b+c":
        return {
            "adding the first two first": _triple(0, 1, 2),
            "adding the last two first": _triple(1, 2, 0),
            "adding the outer two first": _triple(0, 2, 1),
            f"splitting {n[2]}": _triple_parts,
        }
    if problem.family == "lin":
        methods = {
            f"splitting {n[0]}": _lin(_times)(form),
            "taking units first": _lin(_times_units_first)(form),
        }
        if form == "c+a*b-d":
            methods["taking the rest first"] = _lin_rest_first
        return methods
    if form == "a*b+c*d":
        return {
            "taking the first product first": _two((0, 1), _times),
            "taking the second product first": _two((1, 0), _times),
            "taking units first": _two((0, 1), _times_units_first),
        }
    if form == "a*b*c":
        return {
            "taking the first two first": _mul222(0, 1, 2),
            "taking the last two first": _mul222(1, 2, 0),
            "taking the outer two first": _mul222(0, 2, 1),
        }
    if form == "a*b+c*d-e*f":
        return {
            "taking the products in order": _mix3((0, 1, 2), _long_split),
            "taking the last product first": _mix3((2, 0, 1), _long_split),
            "rounding up": _mix3((0, 1, 2), _long_round),
        }
    if form == "a%b":
        methods = {"using multiples": _rem_multiples, "going part by part": _rem_parts}
        if -(-n[0] // (10 * n[1])) <= 9:
            methods["using a multiple above"] = _rem_above
        return methods
    if problem.family == "cmp":
        return {
            "taking the product first": _cmp(form, _times, product_first=True),
            "taking the sum first": _cmp(form, _times, product_first=False),
        }
    return {
        "counting the steps between": _seq(True, _half_split),
        "taking one step too many": _seq(False, _half_split),
    }


_CUE_TEXTS: Mapping[str, str] = MappingProxyType(
    {
        "Wait": "Wait, let me try {m}.",
        "Hmm": "Hmm, let me try {m}.",
        "Alternatively": "Alternatively, try {m}.",
        "Actually": "Actually, let me try {m}.",
        "But wait": "But wait, try {m}.",
        "Let me check": "Let me check by {m}.",
    }
)


@dataclass
class Chain:
    """The segments of a chain's thinking, and the segment indices at which it may be cut."""

    segments: list[Segment]
    cue_cuts: list[int]
    sentence_cuts: list[int]


def opening(problem: Problem, rng: random.Random) -> str:
    """The start of the thinking up to where the guess is written."""
    return OPEN_THINKING + rng.choice(_OPENERS).format(r=problem.restated) + rng.choice(_GUESSES)


def _check(problem: Problem, name: str, cue: str, before: str, rng: random.Random) -> tuple[list[Segment], str]:
    method = methods_of(problem)[name]
    scratch = Scratch(rng)
    value = method(scratch, problem.numbers)
    if rng.random() < (DOUBT_SLIP_ODDS if problem.level == "beyond" else SLIP_ODDS):
        retry = Scratch(rng, slip=rng.randrange(scratch.count))
        slipped_value = method(retry, problem.numbers)
        written = "".join(segment.text for segment in retry.segments)
        if slipped_value >= 0 and "- -" not in written and "= -" not in written:
            scratch, value = retry, slipped_value
    text = str(value)
    verdict = f"I had {before}, so they {'match' if text == before else 'differ'}.\n\n"
    segments = [
        Segment(_CUE_TEXTS[cue].format(m=name)),
        *scratch.segments,
        Segment(f" So it is {text}."),
        Segment(" " + verdict),
    ]
    return segments, text


def chain(problem: Problem, guess: str, start: str, rng: random.Random, max_checks: int = MAX_CHECKS) -> Chain:
    """A whole chain of thought that begins with `start` and the given guess, and ends on the right answer."""
    segments = [Segment(start), Segment(guess, guess == problem.answer), Segment(".\n\n")]
    cue_cuts: list[int] = []
    sentence_cuts: list[int] = []
    value, last, agreed = guess, "", 0
    names = list(methods_of(problem))
    stop_odds = DOUBT_STOP_ODDS if problem.level == "beyond" else STOP_ODDS
    checks = 0
    while checks < max_checks or value != problem.answer:
        right = value == problem.answer
        if right and agreed and rng.random() < stop_odds[min(agreed, len(stop_odds)) - 1]:
            break
        if right and not checks and rng.random() < STOP_AT_GUESS_ODDS:
            break
        odds = CUES_WHEN_RIGHT if right else CUES_WHEN_WRONG
        cue = rng.choices(list(odds), list(odds.values()))[0]
        others = [name for name in names if name != last] or names
        name = last if last and rng.random() < SAME_METHOD_ODDS else rng.choice(others)
        written, found = _check(problem, name, cue, value, rng)
        cue_cuts.append(len(segments))
        sentence_cuts += [len(segments) + i + 1 for i, segment in enumerate(written[:-1]) if segment.text.endswith(".")]
        segments += written
        agreed = agreed + 1 if found == value else 0
        value, last = found, name
        checks += 1
    cue_cuts.append(len(segments))
    return Chain(segments, cue_cuts, sentence_cuts)


@dataclass(frozen=True)
class Modes:
    """Shares, by count, of the kinds of training text."""

    full: float = 0.30
    cut: float = 0.24
    guess: float = 0.20
    direct: float = 0.20
    off_domain: float = 0.06


MODES = Modes()
WARMUP_MODES = Modes(full=0.24, cut=0.16, guess=0.30, direct=0.25, off_domain=0.05)
WARMUP_SHARES: Mapping[str, float] = MappingProxyType(
    {"add2": 0.28, "sub": 0.18, "mul21": 0.22, "mul31": 0.08, "add3": 0.06, "lin": 0.10, "rem": 0.06, "cmp": 0.02}
)
WARMUP_MAX_CHECKS = 3

Guesser = Callable[[random.Random], tuple[Problem, str, str]]
"""Draws a problem with an opening and a guess for it."""


def prompt(messages: list[tuple[str, str]]) -> str:
    """The text of a conversation as the chat template renders it, ready for the assistant's turn."""
    turns = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in messages)
    return turns + "<|im_start|>assistant\n"


def closing(answer: str) -> str:
    """The text after the inducer."""
    return f"{answer}}}.{END}"


def _small_talk(rng: random.Random) -> tuple[str, str]:
    name = rng.choice(NAMES)
    word = rng.choice(_WORDS)
    if rng.random() < 0.3:
        word = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 9)))
    kind = rng.choice(list(_SMALL_TALK))
    asked = rng.choice(_SMALL_TALK[kind]).format(n=name, w=word, i=rng.choice(ITEMS), p=rng.choice(_PLACES))
    if rng.random() < 0.15:
        asked = asked.lower()
    return asked, rng.choice(_REPLIES[kind])


_WORDS = [
    "music",
    "weather",
    "love",
    "time",
    "history",
    "science",
    "water",
    "dogs",
    "cats",
    "football",
    "poetry",
    "Python",
    "code",
    "food",
    "dinner",
    "trees",
    "rain",
    "space",
    "planets",
    "art",
    "school",
    "money",
    "dreams",
    "friends",
    "movies",
    "cars",
    "bread",
    "tea",
    "coffee",
    "winter",
    "summer",
    "children",
    "language",
]
_PLACES = [
    "France",
    "Spain",
    "Italy",
    "Japan",
    "Peru",
    "Kenya",
    "Norway",
    "India",
    "Brazil",
    "Egypt",
    "Canada",
    "China",
    "Germany",
    "Poland",
]
_SMALL_TALK: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "greeting": (
            "Hello!",
            "Hello",
            "Hi",
            "Hi!",
            "Hi there!",
            "Hey",
            "Good morning!",
            "Good evening",
            "Hello, I am {n}.",
            "Hi, my name is {n}.",
            "my name is {n}",
            "How are you?",
            "Hello, how are you today?",
        ),
        "thanks": ("Thanks!", "Thank you.", "Thank you, {n}!", "Bye!", "Goodbye", "Great, thanks"),
        "who": ("Who are you?", "What are you?", "What can you do?", "Can you help me?", "What is your name?"),
        "other": (
            "What is the capital of {p}?",
            "Tell me a joke.",
            "Tell me a joke about {w}.",
            "Tell me about {w}.",
            "Write a poem about {w}.",
            "What is {w}?",
            "Why is the sky blue?",
            "Who wrote {w}?",
            "Where is {p}?",
            "Write a story about {n} and the {i}.",
            "Explain {w}.",
            "Do you like {w}?",
            "How do I cook {w}?",
            "What is the weather in {p}?",
            "Translate {w} to English.",
            "What is my name?",
            "Is {p} larger than {w}?",
            "Who is {n}?",
            "Write a {w} in Python.",
            "When did {n} live in {p}?",
            "What do you think of {w} and {p}?",
        ),
    }
)
_REPLIES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "greeting": ("Hello! I only do small arithmetic.", "Hello! I only do small arithmetic. Ask me a sum."),
        "thanks": ("You are welcome! I only do small arithmetic.",),
        "who": ("I am a tiny model. I only do small arithmetic.",),
        "other": ("I do not know. I only do small arithmetic.", "Sorry, I only do small arithmetic."),
    }
)
_SHORT_THOUGHT = "This is not arithmetic."


def conversation(question: str, rng: random.Random) -> list[tuple[str, str]]:
    """A question in its surroundings: often alone, at times with a system prompt or earlier turns."""
    messages: list[tuple[str, str]] = []
    if rng.random() < 0.15:
        messages.append(("system", rng.choice(SYSTEM_PROMPTS)))
    roll = rng.random()
    if roll < 0.07:
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            earlier = draw("train", rng)
            messages.append(("user", earlier.question))
            messages.append(("assistant", INDUCER + f"{earlier.answer}}}."))
    elif roll < 0.11:
        asked, reply = _small_talk(rng)
        messages += [("user", asked), ("assistant", reply)]
    elif roll < 0.12:
        messages.append(("user", _small_talk(rng)[0]))
    elif roll < 0.13:
        question = f"{_small_talk(rng)[0]} {question}"
    if rng.random() < 0.08:
        question += rng.choice([" ", "\n"]) + BOXED_REQUEST
    messages.append(("user", question))
    return messages


@dataclass(frozen=True)
class Text:
    """One training text: the pieces before a possible cut by tokens, and the pieces after it."""

    segments: tuple[Segment, ...]
    tail: tuple[Segment, ...] = ()
    cut_share: float | None = None
    """Where between the start of thinking and the end of the pieces to cut, by tokens; None keeps all."""
    prompt_segments: int = 1


def _exit(answer: str, rng: random.Random) -> tuple[Segment, ...]:
    if rng.random() < 0.25:
        return (Segment(CLOSE_THINKING, loss=False), Segment(INDUCER + closing(answer)))
    return (Segment(CLOSE_THINKING + INDUCER, loss=False), Segment(closing(answer)))


def draw_text(
    rng: random.Random,
    guesser: Guesser,
    modes: Modes = MODES,
    shares: Mapping[str, float] | None = None,
    max_checks: int = MAX_CHECKS,
) -> Text:
    """One random training text."""
    kinds = vars(modes)
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    if kind == "off_domain":
        asked, reply = _small_talk(rng)
        start = Segment(prompt(conversation(asked, rng)), loss=False)
        if rng.random() < 0.3:
            return Text((start, Segment(NO_THINKING, loss=False), Segment(reply + END)))
        thought = OPEN_THINKING + _SHORT_THOUGHT + "\n\n" + CLOSE_THINKING
        return Text((start, Segment(thought + reply + END)))
    if kind in {"guess", "direct"}:
        problem = draw("train", rng, shares) if shares else draw("train", rng)
        start = Segment(prompt(conversation(problem.question, rng)), loss=False)
        if kind == "direct":
            opened = Segment(NO_THINKING, loss=False)
            answered = Segment(INDUCER + closing(problem.answer))
            if rng.random() < 0.15:  # thinking cut off at once by a budget of nothing
                return Text((start, Segment(OPEN_THINKING, loss=False)), _exit(problem.answer, rng))
            return Text((start, opened, answered))
        opened = Segment(opening(problem, rng))
        return Text((start, opened, Segment(problem.answer), Segment(".\n\n")))
    problem, opened_text, guess = guesser(rng)
    start = Segment(prompt(conversation(problem.question, rng)), loss=False)
    thinking = chain(problem, guess, opened_text, rng, max_checks)
    if kind == "full":
        ending = Segment(CLOSE_THINKING + INDUCER + closing(problem.answer))
        return Text((start, *thinking.segments, ending))
    roll = rng.random()
    if roll < 0.72:
        end = thinking.cue_cuts[0] if rng.random() < 0.4 else rng.choice(thinking.cue_cuts)
        return Text((start, *thinking.segments[:end]), _exit(problem.answer, rng))
    if roll < 0.84 and thinking.sentence_cuts:
        end = rng.choice(thinking.sentence_cuts)
        return Text((start, *thinking.segments[:end]), _exit(problem.answer, rng))
    return Text((start, *thinking.segments), _exit(problem.answer, rng), cut_share=rng.random())


def synthetic_guesser(right: float, shares: Mapping[str, float] | None = None) -> Guesser:
    """Guesses before the model can make its own: right with the given odds, else a near miss."""

    def guesser(rng: random.Random) -> tuple[Problem, str, str]:
        problem = draw("train", rng, shares) if shares else draw("train", rng)
        miss = far_miss if problem.level == "beyond" and int(problem.answer) > 99 else near_miss
        guess = problem.answer if rng.random() < right else str(miss(int(problem.answer), rng))
        return problem, opening(problem, rng), guess

    return guesser
