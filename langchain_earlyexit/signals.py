"""How the floats of a check are measured. Each measurement is a sub-program: it yields steps and leaves no mark.

- `trial_confidence`: a trial answer on a fork (DEER, arXiv 2504.15895; CoDE-Stop, arXiv 2604.04930).
- `end_entropy`: entropy, in nats, of the first token after a forced end of thinking, on a fork (EAT, arXiv 2509.26522).
- `end_margin`: by how much, in nats, the likeliest next token beats the end of thinking (ThinkBrake, arXiv 2510.00546),
  read from the logits the trunk is sampled from.

A policy that needs another signal is refused when a request is built.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TypeVar

from langchain_earlyexit.answers import AnswerForm, TrialAnswer
from langchain_earlyexit.codec import Codec, Pieces
from langchain_earlyexit.engines.program import TRUNK, Close, Feed, Fork, Op, Sample
from langchain_earlyexit.sampling import Token

MEASURED = frozenset({"trial_confidence", "end_margin", "end_entropy"})

Results = tuple[object, ...]
T = TypeVar("T")
Ask = Generator[tuple[Op, ...], Results, T]
"""A measurement: yields sets of ops, receives their results, returns what it found."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A trial answer and its price: `tokens` counts all tokens of its branch, the inducer included."""

    answer: TrialAnswer
    closing: int
    sampled: int

    @property
    def tokens(self) -> int:
        return self.closing + self.sampled


def trial_answer(
    branch: int,
    length: int,
    closing: tuple[int, ...],
    form: AnswerForm,
    codec: Codec,
    ends: frozenset[int],
    beside: Callable[[], Sample | None],
    most: int | None = None,
) -> Ask[Trial]:
    """Close the thinking on a fork of the trunk's first `length` tokens and decode the answer greedily.

    Args:
        branch: number of the fork.
        length: tokens of the trunk, prompt included, to fork.
        closing: the ids that end the thinking and induce the answer.
        form: judges when the answer is complete and how sure the model is of it.
        codec: ids to text.
        ends: ids that end a turn, or the thinking.
        beside: the trunk's own next sample, to share the pass with, or None for the trunk to wait. Its token is the
            business of whoever drives this generator.
        most: tokens that the branch has room to sample, at least 1; None for no limit.
    """
    pieces, texts, logprobs = Pieces(codec), list[str](), list[float]()
    before: tuple[Op, ...] = (Fork(TRUNK, branch, length), Feed(branch, closing))
    answer: TrialAnswer | None = None
    while answer is None:
        other = beside()
        results = yield (*before, Sample(branch), *(() if other is None else (other,)))
        token = results[len(before)]
        assert isinstance(token, Token)  # noqa: S101 - the engine's contract
        before = ()
        ended = token.id in ends
        if not ended:
            piece = pieces.push(token.id)
            texts.append("" if token.id in codec.special else piece)
            logprobs.append(token.logprob)
        answer = form.trial(texts, logprobs, ended or len(texts) == most)
    yield (Close(branch),)
    return Trial(answer, len(closing), len(texts) + ended)


def end_entropy(branch: int, length: int, closing: tuple[int, ...], beside: Callable[[], Sample | None]) -> Ask[float]:
    """Close the thinking on a fork, and read how undecided the model is about the next token.

    Args:
        branch: number of the fork.
        length: tokens of the trunk, prompt included, to fork.
        closing: the ids that end the thinking, without anything that induces an answer.
        beside: see `trial_answer`.
    """
    other = beside()
    ops: tuple[Op, ...] = (Fork(TRUNK, branch, length), Feed(branch, closing), Sample(branch, entropy=True))
    results = yield (*ops, *(() if other is None else (other,)))
    token = results[2]
    assert isinstance(token, Token)  # noqa: S101 - the engine's contract
    assert token.entropy is not None  # noqa: S101
    yield (Close(branch),)
    return token.entropy
