"""How the floats of a check are measured. Each measurement is a sub-program: it yields steps and leaves no mark.

- `trial_confidence`: a trial answer on a fork (DEER, arXiv 2504.15895; CoDE-Stop, arXiv 2604.04930).
- `end_entropy`: entropy, in nats, of the first token after a forced end of thinking, on a fork (EAT, arXiv 2509.26522).
- `end_margin`: by how much, in nats, the likeliest next token beats the end of thinking (ThinkBrake, arXiv 2510.00546),
  read from the logits the trunk is sampled from.
- `p_safe`: a probe on the hidden states that the trunk's own pass has computed (LYNX, arXiv 2512.05325).

A policy that needs another signal, or a probe that nobody gave, is refused when a request is built.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from langchain_earlyexit.answers import AnswerForm, TrialAnswer
from langchain_earlyexit.codec import Codec, Pieces
from langchain_earlyexit.cues import Hit
from langchain_earlyexit.engines.program import TRUNK, Close, Engine, Feed, Fork, Hidden, Op, Sample, Told
from langchain_earlyexit.guide import Bounds, Guide
from langchain_earlyexit.policies import Policy
from langchain_earlyexit.probe import Probe
from langchain_earlyexit.sampling import Token

MEASURED = frozenset({"trial_confidence", "end_margin", "end_entropy"})
"""What is measured on any model; `p_safe` is where there is a probe."""

Results = tuple[object, ...]
T = TypeVar("T")
Ask = Generator[tuple[Op, ...], Results, T]
"""A measurement: yields sets of ops, receives their results, returns what it found."""


def require(policy: Policy, probe: Probe | None, sentry: str | None = None) -> None:
    """Refuse a policy that needs a signal which cannot be measured.

    Args:
        policy: any.
        probe: that measures `p_safe` here.
        sentry: digest of the probe that the engine's own sentry has, see `Request.sentry`.

    Raises:
        ValueError: naming the policy and what is missing.
    """
    missing = policy.needs - MEASURED
    if missing == {"p_safe"}:
        if probe is None and not sentry:
            raise ValueError(
                f"{policy!r} needs p_safe, which a probe measures, and no probe is given, nor does one lie beside the "
                "weights: pass probe=, a directory or hub id (`earlyexit collect` and `earlyexit train` make one), or "
                "take a policy that needs none, such as DEER"
            )
    elif missing:
        raise ValueError(
            f"{policy!r} needs the signals {sorted(missing)}, but this version measures {sorted(MEASURED | {'p_safe'})}"
        )


def refuse_lacking(policy: Policy, engine: Engine) -> None:
    """Refuse a policy that needs a signal which this engine cannot tell.

    Raises:
        ValueError: naming both, and the way out.
    """
    lacks: Mapping[str, str] = getattr(engine, "lacks", {})
    for signal in sorted(policy.needs & lacks.keys()):
        raise ValueError(f"{policy!r} needs {signal}, which the engine {engine.name!r} does not tell: {lacks[signal]}")


def p_safe(probe: Probe, start: int, hit: Hit) -> Ask[float]:
    """What `probe` makes of the hidden states at a cue. They are there already, or come a step early; nothing is added.

    Args:
        probe: of the layers that the trunk was opened with, and no others.
        start: tokens of the prompt.
        hit: the cue.
    """
    results = yield (Hidden(TRUNK, start + probe.reads(hit.position, hit.end) - 1),)
    states: NDArray[np.float32] = results[0]  # type: ignore[assignment]
    return probe.p_safe(states)


def told(position: int, signal: str) -> Ask[float]:
    """What the engine's own sentry has measured at the check that token index `position` of the trunk completes."""
    results = yield (Told(TRUNK, position, signal),)
    found = results[0]
    assert isinstance(found, float)  # noqa: S101 - the engine's contract
    return found


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
    bounds: Bounds | None = None,
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
        bounds: what the answer must be; the trial keeps to it as the answer will.
    """
    guide = Guide(bounds, codec)
    pieces, texts, logprobs = Pieces(codec), list[str](), list[float]()
    before: tuple[Op, ...] = (Fork(TRUNK, branch, length), Feed(branch, closing))
    answer: TrialAnswer | None = None
    while answer is None:
        other = beside()
        forbid = ends - codec.eos if guide.bound else frozenset[int]()  # in JSON, an end of thinking is not one
        sample = Sample(branch, forbid=forbid, allow=guide.allowed())
        results = yield (*before, sample, *(() if other is None else (other,)))
        token = results[len(before)]
        assert isinstance(token, Token)  # noqa: S101 - the engine's contract
        before = ()
        ended = token.id in ends
        if not ended:
            piece = pieces.push(token.id)
            guide.push(token.id, piece)
            texts.append("" if token.id in codec.special and guide.reader is None else piece)
            logprobs.append(token.logprob)
        answer = form.trial(texts, logprobs, ended or guide.over or len(texts) == most)
    yield (Close(branch),)
    return Trial(answer, len(closing), len(texts) + ended)


def end_margin(branch: int, length: int, end: int, beside: Callable[[], Sample | None]) -> Ask[float]:
    """By how much the likeliest next token beats the end of thinking, read on a fork: for engines that cannot tell it
    of the trunk's own tokens.

    Args:
        branch: number of the fork.
        length: tokens of the trunk, prompt included, to fork.
        end: the id that ends the thinking.
        beside: see `trial_answer`.
    """
    other = beside()
    results = yield (Fork(TRUNK, branch, length), Sample(branch, watch=(end,)), *(() if other is None else (other,)))
    token = results[1]
    assert isinstance(token, Token)  # noqa: S101 - the engine's contract
    yield (Close(branch),)
    return token.best - token.watched[0]


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
