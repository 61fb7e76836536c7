"""How many threads a pass computes with: one, where waiting for each other costs threads more than they share.

Of a small model every operation takes microseconds, and PyTorch's threads meet at the end of each. That is quick where
they spin, but they sleep instead as soon as a process has more of them than there are cores: any other thread that has
computed, such as the one that loaded the weights, has its own. On two cores the pocket reasoner then writes half as
many tokens with two threads as with one; a larger model may lose by one row, and win by many. So both are timed once,
when the weights are loaded, in a thread as the engine's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")

FEW = 8
"""Rows up to which a pass counts as small."""

_CLEARLY = 0.9
"""Share of the time of all threads that one must keep below: what is about equal stays as PyTorch has it."""

_LARGE = 0.05
"""Seconds of a pass from which on threads pay, and timing would not."""

_ROUNDS = 3


@dataclass(frozen=True)
class Threads:
    """Numbers of threads.

    Attributes:
        few: for passes of up to `FEW` rows.
        many: for larger ones.
    """

    few: int
    many: int

    def use(self, rows: int) -> None:
        """Let this thread compute with as many as a pass of so many rows does best with."""
        _set(self.few if rows <= FEW else self.many)


def timed(few: Callable[[], object], many: Callable[[], object]) -> Threads | None:
    """What suits two kinds of passes, which this runs some times; None where PyTorch has but one thread anyway.

    Args:
        few: a pass of one row.
        many: a pass of more than `FEW`.
    """
    every = torch.get_num_threads()
    if every == 1:
        return None
    try:
        return _elsewhere(lambda: Threads(_better(few, every), _better(many, every)))
    finally:
        torch.set_num_threads(every)  # what threads that are yet to begin get


def _better(run: Callable[[], object], every: int) -> int:
    best = dict.fromkeys((every, 1), float("inf"))
    for _ in range(_ROUNDS):  # in turn: a machine that grows slow for a while slows both
        for count in best:
            torch.set_num_threads(count)
            run()
            start = time.perf_counter()
            run()
            best[count] = min(best[count], time.perf_counter() - start)
            if best[every] > _LARGE:
                return every
    return 1 if best[1] < _CLEARLY * best[every] else every


def _set(count: int) -> None:
    """`torch.set_num_threads` for the thread that calls alone.

    PyTorch gives the number to threads that are yet to begin, too: these get back what they would have had.
    """
    if torch.get_num_threads() == count:
        return
    others = _elsewhere(torch.get_num_threads)
    torch.set_num_threads(count)
    _elsewhere(lambda: torch.set_num_threads(others))


def _elsewhere(run: Callable[[], T]) -> T:
    """`run` in a thread that is new."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(run).result()
