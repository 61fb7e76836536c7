"""One question answered once, and what it cost: run live, or replayed from a trace of full thinking.

Both give the same `Outcome`, so tables and plots do not care which. A replay knows the answer (the trace's
`exit_answer` there), every trial that was looked at on the way, and what closing and answering cost. It counts the
thoughts that a live run throws away from how far the trunk had been read and how long each trial took; what it cannot
know is time. Not counted alike: a cue inside what may be an end tag of several tokens, where a live run keeps a token
or two less.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from langchain_earlyexit.lab.lines import read_lines
from langchain_earlyexit.policies import Policy, needs_at
from langchain_earlyexit.record import sum_of_counts
from langchain_earlyexit.trace import REASONS, Trace
from langchain_earlyexit.trunk import AHEAD


@dataclass(frozen=True, slots=True)
class Outcome:
    """One question answered once. A line of the file that a live run writes.

    Attributes:
        question_id: of the question, for pairing.
        answer: normalised by its answer form; None for none.
        gold: the right answer, where it is known.
        reason: why thinking ended, as in the exit record; `oracle` for an exit that no policy could have chosen.
        thinking_tokens, forced_tokens, answer_tokens, trial_tokens, speculated_tokens: as in the exit record.
        seed: of the sampling.
    """

    question_id: str
    answer: str | None
    gold: str | None
    reason: str
    thinking_tokens: int
    forced_tokens: int
    answer_tokens: int
    trial_tokens: int = 0
    speculated_tokens: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.reason not in (*REASONS, ORACLE):
            raise ValueError(f"reason must be one of {', '.join(REASONS)} or {ORACLE}; got {self.reason!r}")

    @property
    def output_tokens(self) -> int:
        """All that was computed beyond the prompt: the sum of the five counts."""
        return sum_of_counts(self)

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Self:
        """The inverse of `to_json`. Raises ValueError for a line that is none."""
        try:
            return cls(**json.loads(line))
        except TypeError as error:
            raise ValueError(f"this is no outcome: {error}") from error


ORACLE = "oracle"


def read_outcomes(path: str | os.PathLike[str]) -> list[Outcome]:
    """The lines of a live run.

    Raises:
        ValueError: a line that is no outcome, naming it.
    """
    return read_lines(path, Outcome.from_json)


@dataclass(frozen=True, slots=True)
class Closing:
    """Tokens that close the thinking: `full` with what induces an answer (for exits and trials), `bare` without.

    Attributes:
        margin: tokens that a margin takes: 1 where the engine draws it aside, 0 where it is read off the trunk's own.
    """

    full: int
    bare: int
    margin: int = 0

    @classmethod
    def of(cls, meta: Mapping[str, Any]) -> Self:
        """Of a collection, by its `read_meta`."""
        if "closing" not in meta:
            raise ValueError("this collection does not tell how long its closings are; collect anew")
        return cls(**meta["closing"])


def ended(trace: Trace, closing: Closing) -> Outcome:
    """The run that a trace is of, without any looking: full thinking.

    Args:
        trace: of full thinking.
        closing: of the collection.

    Raises:
        ValueError: a trace that lacks a count or its question's id.
    """
    thinking, forced, answered = (_known(trace, f"{name}_tokens") for name in ("thinking", "forced", "answer"))
    # An end of turn inside the thinking is dropped, and an answer induced.
    dropped = int(trace.reason == "natural" and forced == closing.full)
    return _outcome(trace, trace.answer, _known(trace, "reason"), thinking, forced, answered, dropped)


def left_at(trace: Trace, at: int, closing: Closing, reason: str) -> Outcome:
    """What leaving at check `at` gives, without any looking."""
    check = trace.checks[at]
    forced = closing.full
    return _outcome(
        trace, check.exit_answer, reason, check.position, forced, _per_check(trace, "exit_tokens")[at] - forced
    )


def replayed(policy: Policy, trace: Trace, at: int | None, closing: Closing, look: str = "parallel") -> Outcome:
    """What a live run with `policy` and the trace's seed gives.

    Args:
        policy: what ran.
        trace: of full thinking, from a collection at the kinds of checks that `policy` looks at and no others.
        at: the check it leaves at, `replay(policy, trace)`; None for the end.
        closing: of the collection.
        look: as in `ChatEarlyExit`.
    """
    looked = [
        (i, needs_at(policy, check.kind, check.signals))
        for i, check in enumerate(trace.checks[: None if at is None else at + 1])
        if check.kind in policy.looks
    ]
    costs = [_trial(trace, i, needs, closing) for i, needs in looked]
    trials = sum(tokens for tokens, _ in costs)
    end = ended(trace, closing)
    if at is None:
        return replace(end, trial_tokens=trials)
    sampled = 0
    for (i, needs), (_, passes) in zip(looked, costs, strict=True):
        read = _per_check(trace, "read_tokens")[i]
        sampled = max(sampled, read)
        if "end_margin" in needs and not closing.margin and trace.checks[i].position >= sampled:
            sampled += 1  # the margin is that of the next token, drawn a step early
        if look == "parallel":
            most = min(end.thinking_tokens + end.speculated_tokens, read + AHEAD)
            sampled = max(sampled, min(sampled + passes, most))
    here = left_at(trace, at, closing, policy.decide(Trace(trace.checks[: at + 1])).reason)
    return replace(here, trial_tokens=trials, speculated_tokens=sampled - here.thinking_tokens)


def _trial(trace: Trace, i: int, needs: frozenset[str], closing: Closing) -> tuple[int, int]:
    """Tokens that measuring `needs` at check `i` takes beside the trunk, and the steps in which it samples them."""
    entropy, known = closing.bare + 1, trace.checks[i].signals
    tokens = steps = closing.margin if "end_margin" in needs else 0
    if "end_entropy" in needs:
        tokens, steps = tokens + entropy, steps + 1
    if "trial_confidence" in needs:
        trial = _per_check(trace, "trial_tokens")[i] - (entropy if "end_entropy" in known else 0)
        trial -= closing.margin if "end_margin" in known else 0
        tokens, steps = tokens + trial, steps + trial - closing.full
    return tokens, steps


def _outcome(
    trace: Trace,
    answer: str | None,
    reason: str,
    thinking: int,
    forced: int,
    answered: int,
    speculated: int = 0,
) -> Outcome:
    name: str = _known(trace, "question_id")
    return Outcome(name, answer, trace.gold, reason, thinking, forced, answered, 0, speculated, trace.seed)


def _known(trace: Trace, name: str) -> Any:
    value = getattr(trace, name)
    if value is None:
        raise ValueError(
            f"the trace of question {trace.question_id!r} has no {name}; collect traces with `earlyexit collect`"
        )
    return value


def _per_check(trace: Trace, name: str) -> tuple[int, ...]:
    counts: tuple[int, ...] = getattr(trace, name)
    if not counts:
        raise ValueError(
            f"the trace of question {trace.question_id!r} has no {name}; collect traces with `earlyexit collect`"
        )
    return counts
