"""Programs that put a known load on an engine: thinking with trials at fixed places, trials by fork and anew."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from langchain_earlyexit.engines.program import Close, Feed, Fork, Op, Open, Program, Rewind, Sample, Step
from langchain_earlyexit.engines.scheduler import ScheduledEngine

INDUCER, TRIAL = 12, 10
"""Tokens that a trial feeds, and tokens that it samples."""


def prompt_of(length: int, seed: int) -> tuple[int, ...]:
    """Ids that no other seed begins with; text means nothing to the time a model takes."""
    rng = random.Random(seed)  # noqa: S311 - not for secrets
    return tuple(rng.randrange(20, 500) for _ in range(length))


@dataclass
class Clock:
    """When the parts of a load began and ended, in seconds."""

    begun: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """From when all had begun to when all had ended."""
        return max(self.ended) - max(self.begun)


def thinking(prompt: Sequence[int], tokens: int, clock: Clock, *, look: str | None, every: int = 100) -> Program:
    """Sample `tokens` greedily; with `look`, a trial every so many, "parallel" to the trunk or while it waits."""
    yield Step((Open(0, tuple(prompt)), Sample(0)))
    clock.begun.append(time.perf_counter())
    drawn, branch = 1, 0
    while drawn < tokens:
        if look is None or drawn % every != every // 2:  # so that as many checks fall within as there are `every`
            yield Step((Sample(0),))
            drawn += 1
            continue
        branch += 1
        before: tuple[Op, ...] = (Fork(0, branch, len(prompt) + drawn), Feed(branch, tuple(prompt[:INDUCER])))
        for _ in range(TRIAL):
            beside = look == "parallel" and drawn < tokens
            yield Step((*before, Sample(branch), *((Sample(0),) if beside else ())))
            drawn += beside
            before = ()
        yield Step((Close(branch), *(() if look == "parallel" else (Sample(0),))))
        drawn += look != "parallel"
    clock.ended.append(time.perf_counter())


def trial(prompt: Sequence[int], clock: Clock, *, fork: bool) -> Program:
    """One trial answer after `prompt`, on a fork of a branch that has read it, or on a branch that reads it anew."""
    if fork:
        yield Step((Open(0, tuple(prompt)), Sample(0)))
        before: tuple[Op, ...] = (Fork(0, 1, len(prompt)), Feed(1, tuple(prompt[:INDUCER])))
    else:
        before = (Open(1, (*prompt, *prompt[:INDUCER])),)
    clock.begun.append(time.perf_counter())
    for _ in range(TRIAL):
        yield Step((*before, Sample(1)))
        before = ()
    clock.ended.append(time.perf_counter())


def holding(prompt: Sequence[int], reached: set[int], number: int, everyone: int) -> Program:
    """Open, fork a trial, and hold both until `everyone` does."""
    yield Step((Open(0, tuple(prompt)), Sample(0)))
    yield Step((Fork(0, 1, len(prompt)), Feed(1, tuple(prompt[:INDUCER])), Sample(1)))
    for _ in range(TRIAL - 1):
        yield Step((Sample(1),))
    reached.add(number)
    length = len(prompt) + INDUCER + TRIAL
    while len(reached) < everyone:  # the last token again and again: what is held must not grow meanwhile
        yield Step((Rewind(1, length - 1), Sample(1)))


def short(prompt: Sequence[int], tokens: int) -> Program:
    """Sample so many tokens after the prompt."""
    yield Step((Open(0, tuple(prompt)),))
    for _ in range(tokens):
        yield Step((Sample(0),))


def run_all(engine: ScheduledEngine, programs: Sequence[Program]) -> None:
    """Run them together, to their ends."""
    for stream in [engine.submit(program) for program in programs]:
        for _ in stream:
            pass
