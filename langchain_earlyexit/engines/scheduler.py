"""Runs many programs over one model: each pass feeds the pending tokens of every live branch at once.

The scheduler knows programs and branches; a `Model` knows tensors. One worker thread per engine; it ends when there is
nothing to do.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from langchain_earlyexit.engines.model import Model
from langchain_earlyexit.engines.passes import Fed, collect
from langchain_earlyexit.engines.program import Program, Sample
from langchain_earlyexit.engines.runs import Run
from langchain_earlyexit.engines.streams import Channel, EventStream
from langchain_earlyexit.sampling import Token, draw, pick_all

_log = logging.getLogger(__name__)

_IDLE_SECONDS = 1.0
"""Until the worker ends, and PyTorch's threads with it: those of two make each other sleep instead of spin."""


class ScheduledEngine:
    """An engine over a `Model`: see `engines.program.Engine` for what it offers.

    Args:
        model: the tensors.
        tokenizer: a Hugging Face tokenizer with a chat template.
        name: what the exit record says of the engine.
        context_length: most tokens one branch can hold, or None.
        family_hints: names that identify the model's family.
        generation_defaults: the checkpoint's generation config, as plain values.
        identity: digest of the weights and their dtype, for artifacts that are bound to them.
        max_running: programs that share a pass; more wait in line, first come first served. A program whose reader is
            behind takes no place, and gives its memory up to others that need it.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Any,
        *,
        name: str,
        context_length: int | None = None,
        family_hints: tuple[str, ...] = (),
        generation_defaults: dict[str, Any] | None = None,
        identity: dict[str, str] | None = None,
        max_running: int = 64,
    ) -> None:
        self.tokenizer = tokenizer
        self.name = name
        self.context_length = context_length
        self.family_hints = family_hints
        self.generation_defaults = generation_defaults or {}
        self.identity = identity or {}
        self._model = model
        self._max_running = max_running
        self._wake = threading.Condition()
        self._queue: deque[Run] = deque()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._running = 0
        self._warned = False
        # A daemon thread inside a tensor operation while the interpreter is torn down can abort the process.
        atexit.register(_at_exit, weakref.ref(self))

    @property
    def running(self) -> int:
        """Programs that have begun and are not over."""
        return self._running

    def submit(self, program: Program, *, timeout: float | None = None) -> EventStream:
        """Start a program; see `Engine.submit`."""
        channel = Channel(timeout)
        with self._wake:
            if self._closed:
                raise RuntimeError(f"this {self.name} engine is closed; build a new model to go on")
            if self._thread is None:
                thread = threading.Thread(target=self._loop, name=f"earlyexit-{self.name}", daemon=True)
                thread.start()  # it may not: then nobody waits for it
                self._thread = thread
            self._queue.append(Run(program, channel))
            self._wake.notify_all()
        return EventStream(channel, self._wake)

    def close(self) -> None:
        """Cancel what runs, wait for the worker and free the weights."""
        with self._wake:
            if self._closed:
                return
            self._closed = True
            thread = self._thread
            self._wake.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._model.close()

    # --- the worker ---------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        live: list[Run] = []
        try:
            if not self._serve(live):
                return
            error: BaseException = RuntimeError("the engine was closed while this request ran")
        except BaseException as caught:  # noqa: BLE001 - whatever it is, readers must not wait for a worker that is gone
            error = caught
        with self._wake:
            stopped = [*live, *self._queue]
            self._queue.clear()
            self._thread = None
            self._running = 0
        for run in stopped:
            run.end(error)

    def _serve(self, live: list[Run]) -> bool:
        """Run programs until the engine is closed (True) or has long had nothing to do (False)."""
        while True:
            with self._wake:
                idle_at = time.monotonic() + _IDLE_SECONDS
                while not self._closed and not self._movable(live):
                    if not live and time.monotonic() >= idle_at:
                        self._model.trim()
                        self._thread = None
                        return False
                    self._wake.wait(
                        _seconds_until([run.channel.deadline for run in (*live, *self._queue)] or [idle_at])
                    )
                if self._closed:
                    return True
                gone = [run for run in self._queue if run.channel.stopped]
                if gone:
                    self._queue = deque(run for run in self._queue if run not in gone)
                active = sum(not run.channel.full for run in live)
                while self._queue and active < self._max_running:
                    live.append(self._queue.popleft())
                    active += 1
                self._running = len(live)
            # Not with `_wake` held: an end takes the lock of a channel, whose holder may be waiting for `_wake`.
            while gone:
                _keep(gone.pop())
            self._advance(live)
            live[:] = [run for run in live if _keep(run)]
            self._running = len(live)

    def _movable(self, live: Sequence[Run]) -> bool:
        """Whether any program can go on, begin, or must end."""
        return (
            any(not run.channel.full for run in live)
            or bool(self._queue)
            or any(run.channel.stopped for run in (*live, *self._queue))
        )

    def _advance(self, live: Sequence[Run]) -> None:
        """One pass: bring every program to where it needs the model, then run the model once for all of them."""
        for run in live:
            if not run.channel.full:
                try:
                    run.go_on(self._model)
                except BaseException as error:  # noqa: BLE001 - a failing program takes down itself only
                    run.end(error)
        fed = collect(self._model, live, self._max_running)
        if fed:
            for part, logits in self._forward(fed):
                self._settle(part, logits)

    def _forward(self, fed: Sequence[Fed]) -> list[tuple[Sequence[Fed], NDArray[np.float32]]]:
        """The pass. Where it fails, each half is tried by itself: one row is at fault, or all are too many together."""
        logits = None
        try:
            logits = self._model.forward([one.row for one in fed])
        except BaseException as error:  # noqa: BLE001 - handed to the requests that cause it; the worker lives on
            if len(fed) == 1:
                fed[0].run.end(error)
                return []
            if not self._warned:
                self._warned = True
                # Its words alone: whoever keeps the record would keep the caches of the whole pass.
                _log.warning("a pass of %d rows failed (%s: %s)", len(fed), type(error).__name__, str(error))
        if logits is None:  # not within `except`: what is raised in there would hold on to all rows of this pass
            halves = fed[: len(fed) // 2], fed[len(fed) // 2 :]
            left = ([one for one in half if not one.run.channel.done] for half in halves)
            return [part for half in left if half for part in self._forward(half)]
        for one in fed:
            branch = one.branch
            branch.cached += len(one.row.ids)
            if branch.cached >= branch.prompt > 0:
                self._model.remember(branch.cache, branch.ids[: branch.prompt])
                branch.prompt = 0
        return [(fed, logits)]

    def _settle(self, fed: Sequence[Fed], logits: NDArray[np.float32]) -> None:
        """Give the programs what they waited for: hidden states, and one sampled token per branch that asked."""
        for run in {id(one.run): one.run for one in fed}.values():
            try:
                run.read_hidden(self._model)
            except BaseException as error:  # noqa: BLE001 - a failing program takes down itself only
                run.end(error)
        asked = [
            (i, one.run, one.branch, slot, op)
            for i, one in enumerate(fed)
            if one.branch.cached == len(one.branch.ids)
            for slot, op in one.run.waiting
            if isinstance(op, Sample) and one.run.branches[op.branch] is one.branch
        ]
        if not asked:
            return
        if len(asked) < len(fed):
            logits = logits[[i for i, *_ in asked]]
        draws = [
            0.0 if op.sampling.temperature == 0.0 else draw(branch.key, len(branch.ids))
            for _, _, branch, _, op in asked
        ]
        ops = [op for *_, op in asked]
        try:
            tokens: list[Token | Exception] = [*pick_all(logits, ops, draws)]
        except Exception:  # noqa: BLE001 - a row that cannot be sampled from takes down its own program only
            tokens = [_alone(*one) for one in zip(logits, ops, draws, strict=True)]
        for (_, run, branch, slot, op), token in zip(asked, tokens, strict=True):
            if run.channel.done:  # another branch of it could not be sampled from
                continue
            if isinstance(token, Exception):
                run.end(token)
                continue
            branch.ids.append(token.id)
            run.results[slot] = token
            run.waiting.remove((slot, op))


def _alone(logits: NDArray[np.float32], op: Sample, u: float) -> Token | Exception:
    """One row by itself, where sampling all at once failed for one of them."""
    try:
        return pick_all(logits[None], [op], [u])[0]
    except Exception as error:  # noqa: BLE001 - handed to the request that causes it
        return error


def _keep(run: Run) -> bool:
    """Whether a program is to go on; it is ended where its reader wants that, or its time is up."""
    if run.channel.cancelled:
        run.end(None)
    if run.channel.done:
        return False
    if run.channel.overdue:
        run.end(TimeoutError("the request ran past its timeout and was cancelled"))
        return False
    return True


def _seconds_until(deadlines: Iterable[float | None]) -> float | None:
    """Until the first of them; None if there is none: then only a notification ends the wait."""
    first = min((deadline for deadline in deadlines if deadline is not None), default=None)
    return None if first is None else max(0.0, first - time.monotonic()) + 0.001


def _at_exit(reference: weakref.ref[ScheduledEngine]) -> None:
    engine = reference()
    if engine is None:
        return
    with engine._wake:
        engine._closed = True
        thread = engine._thread
        engine._wake.notify_all()
    if thread is not None:
        thread.join(timeout=10)
