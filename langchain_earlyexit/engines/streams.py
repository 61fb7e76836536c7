"""What a worker and a reader share of one running program: a bounded queue of events with a beginning and an end."""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence

from langchain_earlyexit.engines.program import Event

STREAM_BOUND = 256
"""Events a caller may leave unread before its program is paused: a slow reader costs memory, never the model."""


class Channel:
    """The queue itself. `lock` guards it; `cancelled` and `answer_now` are wishes that the worker looks at.

    Args:
        timeout: seconds for the whole program, from now; None for no limit.
    """

    def __init__(self, timeout: float | None) -> None:
        self.lock = threading.Condition()
        self.events: deque[Event] = deque()
        self.done = False
        self.error: BaseException | None = None
        self.cancelled = False
        self.answer_now = False
        # Whether its program waits for the reader: from `STREAM_BOUND` events until half of them are read. A program
        # that went on for each event that is read would take its memory back from others as often.
        self.full = False
        self.patience = 1
        self.deadline = None if timeout is None else time.monotonic() + timeout
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None

    @property
    def overdue(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    @property
    def stopped(self) -> bool:
        """Whether its program must not go on."""
        return self.cancelled or self.done or self.overdue

    def put(self, events: Sequence[Event]) -> None:
        with self.lock:
            self.events.extend(events)
            self.full = self.full or len(self.events) >= STREAM_BOUND
            if len(self.events) >= self.patience:
                self._notify()

    def finish(self, error: BaseException | None = None) -> None:
        with self.lock:
            if not self.done:
                self.done, self.error = True, None if error is None else told(error)
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
            event = self.events.popleft()
            self.full = self.full and len(self.events) > STREAM_BOUND // 2
            return event
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


def _abandon(channel: Channel, wake: threading.Condition) -> None:
    channel.cancelled = True
    with wake:
        wake.notify_all()


class EventStream:
    """The reader's end of one running program. Leaving it unread pauses the program; dropping it cancels it."""

    def __init__(self, channel: Channel, wake: threading.Condition) -> None:
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
        if was_full and not self._channel.full:  # the worker may be asleep, paused by this very stream
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


def told(error: BaseException) -> Exception:
    """`error` for a reader, its traceback as a note: frames, and those that called them, keep a whole pass's caches."""
    if error.__traceback__ is not None:
        error.add_note("in the engine's thread:\n" + "".join(traceback.format_exception(error)))
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    if isinstance(error, Exception):
        return error
    ended = RuntimeError(f"the request was ended by {type(error).__name__}: {error}")  # that is not the reader's
    ended.__cause__ = error
    return ended
