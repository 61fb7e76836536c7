"""The trunk: the one branch that thinks and answers. All that a request asks of its engine goes through here."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from typing import Any

from langchain_earlyexit.engines.program import TRUNK, Event, Feed, Inbox, Op, Open, Rewind, Sample, Step
from langchain_earlyexit.request import Request
from langchain_earlyexit.sampling import Token
from langchain_earlyexit.signals import Ask, T

AHEAD = 32
"""Tokens that the trunk may be ahead of what has been read of it: hidden states are kept for 64."""


class Trunk:
    """What the engine holds of the trunk, and what it is told with the next step.

    The trunk may be ahead of its reader: it thinks on while a trial runs beside it. A cut drops what is too much.

    Attributes:
        request: what runs.
        start: tokens of the prompt.
        length: tokens on the branch, with the prompt's, and with those that nobody has read yet.
        ahead: the ones that nobody has read yet.
        speculated: tokens that were sampled and dropped again.
        due: ops for the next step, before its own.
        events: to deliver with the next step.
        answer_now: whether the caller has asked for the answer.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.start = self.length = len(request.prompt)
        self.ahead: deque[Token] = deque()
        self.speculated = 0
        self.due: list[Op] = []
        self.events: list[Event] = []
        self.answer_now = False
        self._thinks = Sample(TRUNK, request.sampling, watch=request.watch)

    def step(self, *ops: Op) -> Generator[Step, Inbox, tuple[Any, ...]]:
        """Carry out what is due, then `ops`; the results of `ops`."""
        due = self.due
        step = Step((*due, *ops), tuple(self.events))
        self.due, self.events = [], []
        inbox = yield step
        self.answer_now = self.answer_now or inbox.answer_now
        return inbox.results[len(due) :]

    # --- writing ----------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Start the branch with the prompt."""
        request = self.request
        self.due.append(Open(TRUNK, request.prompt, request.seed, request.layers, request.orders))

    def feed(self, ids: Sequence[int]) -> None:
        """Append tokens that are not sampled."""
        if ids:
            self.due.append(Feed(TRUNK, tuple(ids)))
            self.length += len(ids)

    def sample(
        self, forbid: frozenset[int] = frozenset(), watch: tuple[int, ...] = (), allow: bytes | None = None
    ) -> Generator[Step, Inbox, Token]:
        """Append one sampled token."""
        return (yield from self._drawn(Sample(TRUNK, self.request.sampling, forbid, watch, allow=allow)))

    def _drawn(self, op: Sample) -> Generator[Step, Inbox, Token]:
        results = yield from self.step(op)
        self.length += 1
        token: Token = results[0]
        return token

    def back_to(self, length: int) -> None:
        """Drop all but the first `length` tokens, read or not."""
        if length < self.length:
            self.due.append(Rewind(TRUNK, length))
            self.speculated += self.length - length
            self.length = length
            self.ahead.clear()

    # --- thinking, and looking beside it ----------------------------------------------------------------------------

    def read(self) -> Generator[Step, Inbox, Token]:
        """The next token of the thinking."""
        if self.ahead:
            return self.ahead.popleft()
        return (yield from self._drawn(self._thinks))

    def peek(self) -> Generator[Step, Inbox, Token]:
        """The token that `read` gives next. It may not be drawn yet: then it is, a step early."""
        if not self.ahead:
            self.ahead.append((yield from self.read()))
        return self.ahead[0]

    def measure(self, asking: Ask[T]) -> Generator[Step, Inbox, T]:
        """Carry out a measurement; what the trunk samples beside it is read later."""
        ops = next(asking)
        while True:
            results = yield from self.step(*ops)
            if isinstance(ops[-1], Sample) and ops[-1].branch == TRUNK:
                self.ahead.append(results[-1])
                self.length += 1
            try:
                ops = asking.send(results)
            except StopIteration as stop:
                found: T = stop.value
                return found

    def beside(self) -> Sample | None:
        """The next sample, to share a pass with a trial: none if the trunk waits, or has come to where it must stop."""
        request = self.request
        if request.look == "wait" or len(self.ahead) >= AHEAD:
            return None
        if self.ahead and self.ahead[-1].id in request.ends:
            return None
        if request.cap is not None and self.length - self.start >= request.cap:
            return None
        return Sample(TRUNK, request.sampling, watch=request.watch)
