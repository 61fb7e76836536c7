"""Runs many programs over one model: each pass feeds the pending tokens of every live branch at once.

The scheduler knows ops and branches; a `Model` knows tensors. Feeding is lazy: `Open`, `Feed`, `Fork` and `Rewind`
only edit lists of ids, and a branch meets the model when somebody samples from it or reads its hidden state. One
worker thread per engine; it ends when there is nothing to do.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from langchain_earlyexit.engines.program import (
    Close,
    Event,
    Feed,
    Fork,
    Hidden,
    Inbox,
    Op,
    Open,
    Program,
    Rewind,
    Sample,
)
from langchain_earlyexit.sampling import pick, uniform

STREAM_BOUND = 256
"""Events a caller may leave unread before its program is paused: a slow reader costs memory, never the model."""

_PREFILL = 512
"""Tokens of one branch per pass, so that a long prompt does not stall the others for its whole length."""

_IDLE_SECONDS = 5.0

Logits = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Row:
    """The work of one branch in one pass: append `ids` to `cache`, then give the logits after the last of them."""

    cache: Any
    ids: Sequence[int]
    layers: tuple[float, ...] = ()


class Model(Protocol):
    """A language model with caches that can be forked and rewound. Called from one thread at a time."""

    def new(self) -> Any:
        """An empty cache."""

    def fork(self, cache: Any, length: int) -> Any:
        """An independent cache holding the first `length` tokens of `cache`."""

    def rewind(self, cache: Any, length: int) -> None:
        """Drop all but the first `length` tokens."""

    def forward(self, rows: Sequence[Row]) -> Sequence[Logits]:
        """Run all rows; per row the logits after its last id, shape [vocabulary]."""

    def hidden(self, cache: Any, position: int) -> NDArray[np.float32]:
        """Hidden states at a token index, shape [layers, width]; KeyError when they are no longer kept."""

    def close(self) -> None:
        """Free the weights."""


@dataclass(slots=True, eq=False)
class _Branch:
    number: int
    seed: int
    layers: tuple[float, ...]
    ids: list[int]
    cache: Any
    cached: int = 0
    logits: Logits | None = None


class _Channel:
    """What a worker and a reader share: a bounded queue of events with a beginning and an end."""

    def __init__(self, deadline: float | None) -> None:
        self.lock = threading.Condition()
        self.events: deque[Event] = deque()
        self.done = False
        self.error: BaseException | None = None
        self.cancelled = False
        self.answer_now = False
        self.patience = 1
        self.deadline = deadline
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None

    @property
    def full(self) -> bool:
        return len(self.events) >= STREAM_BOUND

    def put(self, events: Sequence[Event]) -> None:
        with self.lock:
            self.events.extend(events)
            if len(self.events) >= self.patience:
                self._notify()

    def finish(self, error: BaseException | None = None) -> None:
        with self.lock:
            if not self.done:
                self.done, self.error = True, error
            self._notify()

    def _notify(self) -> None:
        self.lock.notify_all()
        if self._waiter is not None:
            loop, future = self._waiter
            self._waiter = None
            try:
                loop.call_soon_threadsafe(_resolve, future)
            except RuntimeError:  # the reader's event loop is closed: nobody will ever read this stream again
                self.cancelled = True

    def next_nowait(self) -> Event | None:
        """The next event, None when there is none yet; StopIteration's stand-in is `done` with no events left."""
        if self.events:
            return self.events.popleft()
        if self.done and self.error is not None:
            raise self.error
        return None

    def wait_async(self, loop: asyncio.AbstractEventLoop) -> asyncio.Future[None]:
        future: asyncio.Future[None] = loop.create_future()
        self._waiter = (loop, future)
        return future


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _abandon(channel: _Channel, wake: threading.Condition) -> None:
    channel.cancelled = True
    with wake:
        wake.notify_all()


class EventStream:
    """The reader's end of one running program. Leaving it unread pauses the program; dropping it cancels it."""

    def __init__(self, channel: _Channel, wake: threading.Condition) -> None:
        self._channel = channel
        self._wake = wake
        self._finalizer = weakref.finalize(self, _abandon, channel, wake)

    def cancel(self) -> None:
        """Stop the program within one step. Reading on ends without an error."""
        _abandon(self._channel, self._wake)
        self._channel.finish()

    def answer_now(self) -> None:
        """Ask the program to close its thinking at the next token and answer."""
        self._channel.answer_now = True

    def gather(self, events: int) -> None:
        """Wake the reader only when so many events wait for it, or the end: for readers who want the whole."""
        self._channel.patience = min(events, STREAM_BOUND)

    def _left(self) -> None:
        """An iteration is over: at the end, by a break, an error in its body, or a task that was cancelled."""
        if not self._channel.done:
            self.cancel()

    def _took(self, was_full: bool) -> None:
        if was_full:  # the worker may be asleep, paused by this very stream
            with self._wake:
                self._wake.notify_all()

    def __iter__(self) -> Iterator[Event]:
        """Events as they come; raises what the program raised, or TimeoutError. Breaking out of it cancels."""
        channel = self._channel
        try:
            while True:
                with channel.lock:
                    while not channel.events and not channel.done:
                        channel.lock.wait()
                    was_full = channel.full
                    event = channel.next_nowait()
                if event is None:
                    return
                self._took(was_full)
                yield event
        finally:
            self._left()

    async def __aiter__(self) -> AsyncIterator[Event]:
        """As `__iter__`, on the running event loop, without a thread per stream."""
        channel = self._channel
        loop = asyncio.get_running_loop()
        try:
            while True:
                future = None
                with channel.lock:
                    was_full = channel.full
                    event = channel.next_nowait()
                    if event is None:
                        if channel.done:
                            return
                        future = channel.wait_async(loop)
                if future is not None:
                    await future
                    continue
                assert event is not None  # noqa: S101 - narrowed for the type checker
                self._took(was_full)
                yield event
        finally:
            self._left()


@dataclass(slots=True, eq=False)
class _Running:
    program: Program
    channel: _Channel
    branches: dict[int, _Branch] = field(default_factory=dict)
    ops: tuple[Op, ...] = ()
    results: list[Any] = field(default_factory=list)
    waiting: list[tuple[int, Sample | Hidden]] = field(default_factory=list)
    started: bool = False


class ScheduledEngine:
    """An engine over a `Model`: see `engines.program.Engine` for what it offers.

    Args:
        model: the tensors.
        tokenizer: a Hugging Face tokenizer with a chat template.
        name: what the exit record says of the engine.
        context_length: most tokens one branch can hold, or None.
        family_hints: names that identify the model's family.
        generation_defaults: the checkpoint's generation config, as plain values.
        max_running: programs that run at once; more wait in line, first come first served.
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
        max_running: int = 64,
    ) -> None:
        self.tokenizer = tokenizer
        self.name = name
        self.context_length = context_length
        self.family_hints = family_hints
        self.generation_defaults = generation_defaults or {}
        self._model = model
        self._max_running = max_running
        self._wake = threading.Condition()
        self._queue: deque[_Running] = deque()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._running = 0
        # A daemon thread inside a tensor operation while the interpreter is torn down can abort the process.
        atexit.register(_at_exit, weakref.ref(self))

    @property
    def running(self) -> int:
        """Programs that hold branches now."""
        return self._running

    def submit(self, program: Program, *, timeout: float | None = None) -> EventStream:
        """Start a program; see `Engine.submit`."""
        channel = _Channel(None if timeout is None else time.monotonic() + timeout)
        with self._wake:
            if self._closed:
                raise RuntimeError(f"this {self.name} engine is closed; build a new model to go on")
            self._queue.append(_Running(program, channel))
            if self._thread is None:
                self._thread = threading.Thread(target=_work, args=(self,), name=f"earlyexit-{self.name}", daemon=True)
                self._thread.start()
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
        live: list[_Running] = []
        try:
            if not self._serve(live):
                return
            error: Exception = RuntimeError("the engine was closed while this request ran")
        except BaseException as caught:  # noqa: BLE001 - whatever it is, readers must not wait for a worker that is gone
            error = _told(caught)
        with self._wake:
            stopped = [*live, *self._queue]
            self._queue.clear()
            self._thread = None
            self._running = 0
        for run in stopped:
            self._end(run, error)

    def _serve(self, live: list[_Running]) -> bool:
        """Run programs until the engine is closed (True) or has long had nothing to do (False)."""
        while True:
            with self._wake:
                idle_at = time.monotonic() + _IDLE_SECONDS
                while not self._closed and not self._movable(live):
                    if not live and time.monotonic() >= idle_at:
                        self._thread = None
                        return False
                    self._wake.wait(
                        _seconds_until([run.channel.deadline for run in (*live, *self._queue)] or [idle_at])
                    )
                if self._closed:
                    return True
                gone = [run for run in self._queue if _stopped(run.channel)]
                self._queue = deque(run for run in self._queue if run not in gone)
                while self._queue and len(live) < self._max_running:
                    live.append(self._queue.popleft())
                self._running = len(live)
            # Not with `_wake` held: an end takes the lock of a channel, whose holder may be waiting for `_wake`.
            while gone:
                self._keep(gone.pop())
            self._advance([run for run in live if not run.channel.full])
            live[:] = [run for run in live if self._keep(run)]
            self._running = len(live)

    def _movable(self, live: Sequence[_Running]) -> bool:
        """Whether any program can go on, begin, or must end."""
        return (
            bool(self._queue and len(live) < self._max_running)
            or any(not run.channel.full for run in live)
            or any(_stopped(run.channel) for run in (*live, *self._queue))
        )

    def _keep(self, run: _Running) -> bool:
        if run.channel.cancelled:
            self._end(run, None)
        if run.channel.done:
            return False
        if _overdue(run.channel):
            self._end(run, TimeoutError("the request ran past its timeout and was cancelled"))
            return False
        return True

    def _advance(self, live: Sequence[_Running]) -> None:
        """One pass: bring every program to where it needs the model, then run the model once for all of them."""
        rows: list[Row] = []
        owners: list[tuple[_Running, _Branch, int]] = []
        for run in live:
            if _stopped(run.channel):
                continue
            try:
                self._until_model(run)
                for branch in {id(b): b for b in (run.branches[op.branch] for _, op in run.waiting)}.values():
                    row = self._row(branch)
                    if row is not None:
                        rows.append(row)
                        owners.append((run, branch, len(row.ids)))
            except BaseException as error:  # noqa: BLE001 - a failing program takes down itself only
                self._end(run, _told(error))
        rows, owners = _of_living(rows, owners)
        if not rows:
            return
        try:
            for (_, branch, fed), after in zip(owners, self._model.forward(rows), strict=True):
                branch.cached += fed
                branch.logits = after if branch.cached == len(branch.ids) else None
        except BaseException as error:  # noqa: BLE001 - handed to every request of the pass; the worker lives on
            for run in {id(owner[0]): owner[0] for owner in owners}.values():
                self._end(run, _told(error))

    def _until_model(self, run: _Running) -> None:
        """Let the program run until it waits for a pass of the model, or its reader is behind."""
        while True:
            still = [(slot, op) for slot, op in run.waiting if not self._resolve_waiting(run, slot, op)]
            run.waiting = still
            if still or run.channel.full or _stopped(run.channel):
                return
            if run.started:
                inbox = Inbox(tuple(run.results), run.channel.answer_now)
                run.results = []
                try:
                    step = run.program.send(inbox)
                except StopIteration:
                    self._end(run, None)
                    return
            else:
                run.started = True
                try:
                    step = next(run.program)
                except StopIteration:
                    self._end(run, None)
                    return
            if step.events:
                run.channel.put(step.events)
            run.results = [None] * len(step.ops)
            for slot, op in enumerate(step.ops):
                if isinstance(op, Sample | Hidden):
                    run.waiting.append((slot, op))
                else:
                    self._edit(run, op)

    def _edit(self, run: _Running, op: Op) -> None:
        """Ops that need no pass of the model."""
        branches = run.branches
        if isinstance(op, Open):
            if not op.ids:
                raise ValueError("a branch must be opened with at least one token")
            branches[op.branch] = _Branch(op.branch, op.seed, op.layers, list(op.ids), self._model.new())
        elif isinstance(op, Feed):
            branches[op.branch].ids.extend(op.ids)
            branches[op.branch].logits = None
        elif isinstance(op, Fork):
            parent = branches[op.parent]
            if not 0 < op.length <= len(parent.ids):
                raise ValueError(f"cannot fork {op.length} tokens of a branch that has {len(parent.ids)}")
            cached = min(parent.cached, op.length)
            cache = self._model.fork(parent.cache, cached)
            branches[op.child] = _Branch(op.child, parent.seed, parent.layers, parent.ids[: op.length], cache, cached)
        elif isinstance(op, Rewind):
            branch = branches[op.branch]
            if not 0 < op.length <= len(branch.ids):
                raise ValueError(f"cannot rewind to {op.length} tokens a branch that has {len(branch.ids)}")
            del branch.ids[op.length :]
            branch.logits = None
            self._drop_cache(branch, op.length)
        elif isinstance(op, Close):
            branches.pop(op.branch)

    def _drop_cache(self, branch: _Branch, length: int) -> None:
        if branch.cached > length:
            self._model.rewind(branch.cache, length)
            branch.cached = length

    def _row(self, branch: _Branch) -> Row | None:
        """What `branch` must feed before it can be sampled from, at most one prefill chunk of it."""
        if branch.logits is not None:
            return None
        if branch.cached == len(branch.ids):  # rewound onto tokens already fed: the last one must be fed again
            self._drop_cache(branch, len(branch.ids) - 1)
        return Row(branch.cache, branch.ids[branch.cached : branch.cached + _PREFILL], branch.layers)

    def _resolve_waiting(self, run: _Running, slot: int, op: Sample | Hidden) -> bool:
        branch = run.branches[op.branch]
        if isinstance(op, Hidden):
            if not 0 <= op.position < len(branch.ids):
                raise ValueError(f"no token {op.position} on a branch that has {len(branch.ids)}")
            if branch.cached <= op.position:
                return False
            run.results[slot] = self._model.hidden(branch.cache, op.position)
            return True
        if branch.logits is None:
            return False
        u = 0.0 if op.sampling.temperature == 0.0 else uniform(branch.seed, branch.number, len(branch.ids))
        token = pick(branch.logits, op.sampling, u, forbid=op.forbid, watch=op.watch, entropy=op.entropy)
        branch.ids.append(token.id)
        branch.logits = None
        run.results[slot] = token
        return True

    def _end(self, run: _Running, error: BaseException | None) -> None:
        run.branches.clear()
        run.waiting = []
        with contextlib.suppress(Exception):  # a program that fails while it is being closed has nobody left to tell
            run.program.close()
        run.channel.finish(error)


def _of_living(
    rows: list[Row], owners: list[tuple[_Running, _Branch, int]]
) -> tuple[list[Row], list[tuple[_Running, _Branch, int]]]:
    """Drop the rows of programs that ended after they were collected."""
    if not any(owner[0].channel.done for owner in owners):
        return rows, owners
    kept = [(row, owner) for row, owner in zip(rows, owners, strict=True) if not owner[0].channel.done]
    return [row for row, _ in kept], [owner for _, owner in kept]


def _overdue(channel: _Channel) -> bool:
    return channel.deadline is not None and time.monotonic() > channel.deadline


def _stopped(channel: _Channel) -> bool:
    return channel.cancelled or channel.done or _overdue(channel)


def _seconds_until(deadlines: Sequence[float | None]) -> float | None:
    """Until the first of them; None if there is none: then only a notification ends the wait."""
    first = min((deadline for deadline in deadlines if deadline is not None), default=None)
    return None if first is None else max(0.0, first - time.monotonic()) + 0.001


def _told(error: BaseException) -> Exception:
    """`error` for a reader, without the scheduler's own frame: that would keep the caches of a whole pass alive."""
    if not isinstance(error, Exception):  # an exit or a cancellation is not the reader's
        told = RuntimeError(f"the request was ended by {type(error).__name__}: {error}")
        told.__cause__ = error
        return told
    if error.__traceback__ is not None and error.__traceback__.tb_next is not None:
        error.__traceback__ = error.__traceback__.tb_next
    return error


def _work(engine: ScheduledEngine) -> None:
    engine._loop()


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
