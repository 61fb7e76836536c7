"""How many threads a pass computes with: no more than pay.

Of a small model every operation takes microseconds, and PyTorch's threads meet at the end of each. That is quick where
they spin, but they sleep instead as soon as a process has more of them than there are cores: any thread that has
computed keeps a team of its own until it ends. So weights are loaded `apart`, in a thread that ends, and both a pass of
one row and one of many are timed once, in a thread as the engine's own.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")

FEW = 8
"""Rows up to which a pass counts as small."""

_EQUAL = 1.1
"""How many times as long as with the best number a pass may take with fewer threads: a core that spins for less than
that is better left to others."""

_LARGE = 0.05
"""Seconds of a pass from which on threads pay, and timing would not."""

_ROUNDS = 3

_LOOK, _PATIENCE = 1.0, 5.0
"""Seconds between looks for an interruption, and that an interrupted thread gets to end."""

_setting = threading.Lock()
"""Held while the number that threads to come get is another than it should be."""


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
    with _setting:
        every = torch.get_num_threads()
        if every == 1:
            return None
        try:
            return apart(lambda: Threads(_best(few, every), _best(many, every)))
        finally:
            torch.set_num_threads(every)  # what threads that are yet to begin get


def _best(run: Callable[[], object], every: int) -> int:
    """The fewest of 1, 2, 4 ... threads that are about as quick as the quickest number."""
    seconds = {every: float("inf")} | {1 << i: float("inf") for i in range((every - 1).bit_length())}
    for _ in range(_ROUNDS):  # in turn: a machine that grows slow for a while slows all
        for count in seconds:
            torch.set_num_threads(count)
            run()
            start = time.perf_counter()
            run()
            seconds[count] = min(seconds[count], time.perf_counter() - start)
            if seconds[every] > _LARGE:
                return every
    return min(count for count, took in seconds.items() if took <= _EQUAL * min(seconds.values()))


def _set(count: int) -> None:
    """`torch.set_num_threads` for the thread that calls alone.

    PyTorch gives the number to threads that are yet to begin, too: these get back what they would have had.
    """
    if torch.get_num_threads() == count:
        return
    with _setting:
        others = apart(torch.get_num_threads)
        torch.set_num_threads(count)
        apart(lambda: torch.set_num_threads(others))


def apart(run: Callable[[], T]) -> T:
    """`run` in a new thread that has ended, and its team with it, when this returns.

    What interrupts the caller (Ctrl-C) is raised in that thread, which gets some seconds to end.
    """
    future, over = Future[T](), threading.Event()

    def work() -> None:
        try:
            future.set_result(run())
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            future.set_exception(error)
        finally:
            over.set()

    thread = threading.Thread(target=work, name="earlyexit-apart", daemon=True)
    thread.start()
    try:
        while not over.wait(_LOOK):  # without a time, nothing interrupts it on Windows
            pass
    except BaseException as stop:
        told = ctypes.py_object(type(stop))
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), told)
        over.wait(_PATIENCE)  # not `join`: Python 3.11 takes a thread for ended once that was interrupted
        raise
    thread.join()
    return future.result()
