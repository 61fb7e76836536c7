"""Training texts: chains of thought with a guess and checks, forced exits, direct answers, and what carries loss.

A chain restates the question, states a guess, and then checks it by one method after another, each check opening with
a cue word. The form of the chain, the odds of stopping and the odds of the cue words are designed here. What is not
designed is whether a guess is right: guesses are sampled from the model being trained (see `train`), wrong tokens carry
no loss, and after every forced exit the text goes on with the true answer. So a trained model's confidence at an exit
is its own estimate.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

from langchain_earlyexit.pocket.methods import Segment, far_miss, methods_of, near_miss, worked
from langchain_earlyexit.pocket.problems import Problem, draw
from langchain_earlyexit.pocket.small_talk import SHORT_THOUGHT, small_talk

T = TypeVar("T")

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

OPENERS = ("I need {r}.", "So this is {r}.", "The task is {r}.")
GUESSES = (" My first guess is ", " Quickly, it should be ", " That looks like ")

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
    return OPEN_THINKING + rng.choice(OPENERS).format(r=problem.restated) + rng.choice(GUESSES)


def checked(
    start: Sequence[Segment],
    guess: T,
    answer: T,
    names: Sequence[str],
    check: Callable[[str, str, T], tuple[list[Segment], T]],
    stop: Callable[[int, int], float],
    max_checks: int,
    rng: random.Random,
) -> Chain:
    """A chain that has guessed, and goes on checking until it stops on the right answer.

    Args:
        start: what is written, the guess included.
        guess: a value of any kind.
        answer: what the guess is when it is right.
        names: methods, of which the same is seldom taken twice running; may be empty.
        check: (method, cue, value before) to what one check writes and the value it finds.
        stop: (checks so far, agreements in a row) to the odds of ending on a right value.
        max_checks: after these a right value always ends it.
        rng: decides all.
    """
    segments = [*start]
    cue_cuts: list[int] = []
    sentence_cuts: list[int] = []
    value, last, agreed, checks = guess, "", 0, 0
    while checks < max_checks or value != answer:
        right = value == answer
        odds = stop(checks, agreed)
        if right and odds and rng.random() < odds:
            break
        cues = CUES_WHEN_RIGHT if right else CUES_WHEN_WRONG
        cue = rng.choices(list(cues), list(cues.values()))[0]
        if names:
            others = [name for name in names if name != last] or list(names)
            last = last if last and rng.random() < SAME_METHOD_ODDS else rng.choice(others)
        written, found = check(last, cue, value)
        cue_cuts.append(len(segments))
        sentence_cuts += [len(segments) + i + 1 for i, segment in enumerate(written[:-1]) if segment.text.endswith(".")]
        segments += written
        agreed = agreed + 1 if found == value else 0
        value = found
        checks += 1
    cue_cuts.append(len(segments))
    return Chain(segments, cue_cuts, sentence_cuts)


def stopping(at_guess: float, at_agreement: Sequence[float]) -> Callable[[int, int], float]:
    """Odds of stopping at a guess, and at the first, second, ... agreement in a row."""

    def odds(checks: int, agreed: int) -> float:
        if not checks:
            return at_guess
        return at_agreement[min(agreed, len(at_agreement)) - 1] if agreed else 0.0

    return odds


def chain(problem: Problem, guess: str, start: str, rng: random.Random, max_checks: int = MAX_CHECKS) -> Chain:
    """A whole chain of thought that begins with `start` and the given guess, and ends on the right answer."""
    beyond = problem.level == "beyond"
    methods = methods_of(problem)

    def check(name: str, cue: str, before: str) -> tuple[list[Segment], str]:
        steps, value = worked(methods[name], problem.numbers, DOUBT_SLIP_ODDS if beyond else SLIP_ODDS, rng)
        return concluded(cue, name, steps, before, str(value)), str(value)

    return checked(
        [Segment(start), Segment(guess, guess == problem.answer), Segment(".\n\n")],
        guess,
        problem.answer,
        list(methods),
        check,
        stopping(STOP_AT_GUESS_ODDS, DOUBT_STOP_ODDS if beyond else STOP_ODDS),
        max_checks,
        rng,
    )


def concluded(cue: str, method: str, steps: Sequence[Segment], before: str, found: str) -> list[Segment]:
    """A check: its cue and method, its steps, what it found, and whether that is what was there before."""
    verdict = "match" if found == before else "differ"
    return [
        Segment(_CUE_TEXTS[cue].format(m=method)),
        *steps,
        Segment(f" So it is {found}."),
        Segment(f" I had {before}, so they {verdict}.\n\n"),
    ]


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
        asked, reply = small_talk(rng)
        messages += [("user", asked), ("assistant", reply)]
    elif roll < 0.12:
        messages.append(("user", small_talk(rng)[0]))
    elif roll < 0.13:
        question = f"{small_talk(rng)[0]} {question}"
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
        asked, reply = small_talk(rng)
        start = Segment(prompt(conversation(asked, rng)), loss=False)
        if rng.random() < 0.3:
            return Text((start, Segment(NO_THINKING, loss=False), Segment(reply + END)))
        thought = OPEN_THINKING + SHORT_THOUGHT + "\n\n" + CLOSE_THINKING
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
