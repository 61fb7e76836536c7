"""The tokens of one branch, as a server draws them ahead of the program that reads them.

A run of samples is one streamed request after the other, of at most `CHUNK` tokens each: so a server never runs far
ahead of a program that has stopped reading, and where requests begin does not depend on when anybody read. The seed of
a request is keyed by the position at which it begins: with equal seeds a branch draws the same tokens again, as far as
the server's own arithmetic does not depend on what else it has in its batch.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from langchain_earlyexit.engines.dialects import Dialect, Draw, Unreadable, Wish
from langchain_earlyexit.engines.fleet import Seat
from langchain_earlyexit.engines.program import Sample
from langchain_earlyexit.engines.wire import Fault, Server, Wire, rested
from langchain_earlyexit.sampling import Token, draw

CHUNK = 256
"""Tokens of one request. The next costs a round trip, and the server at most one block that it has not cached."""

WATCHED_CHUNK = 4096
"""The same where a server's sentry follows the chain: to go on from an earlier request, all before is computed anew."""

_LOW = 32
"""Unread tokens at which the next request is made."""

_SEEDS = 1 << 31
"""Seeds are below this: servers hold them in 32 or 64 bits, some with a sign."""


@dataclass(frozen=True)
class Source:
    """Where the tokens of a program come from.

    Attributes:
        wire: how servers are reached.
        dialect: how they are asked.
        seat: which of them it is now.
        meet: checks a server that was never asked before, and does nothing for others.
        context: most tokens that prompt and answer can have together, or None.
    """

    wire: Wire
    dialect: Dialect
    seat: Seat
    meet: Callable[[Server], Awaitable[object]]
    context: int | None


class Line:
    """Tokens that go on from `ids`, drawn alike.

    Args:
        source: who draws them.
        ids: of the branch, prompt included; at least one.
        key: of the branch's randomness.
        wish: how they are drawn.
        most: tokens to draw; None for as many as are read.
    """

    def __init__(self, source: Source, ids: Sequence[int], key: int, wish: Wish, most: int | None = None) -> None:
        self.wish = wish
        self._source = source
        self._ids = list(ids)
        self._began = len(self._ids)
        self._key = key
        self._most = most
        self._ready: deque[Token] = deque()
        self._over = False
        self._error: BaseException | None = None
        self._arrived = asyncio.Event()
        self._read = asyncio.Event()
        self._task = asyncio.create_task(self._fill())

    @property
    def unread(self) -> int:
        """Tokens that have come and were not taken."""
        return len(self._ready)

    def serves(self, op: Sample) -> bool:
        """Whether its next token can be that of `op`: drawn the same way, and bound by no more than `op` is."""
        wish = self.wish
        return (
            wish.sampling == op.sampling
            and wish.entropy == op.entropy
            and not wish.bound
            and set(op.watch) <= set(wish.watch)
        )

    async def next(self) -> Token | None:
        """The next token; None where there are no more: a turn has ended, or all were drawn.

        Raises:
            ConnectionError: the server failed more often than is borne with.
            ValueError: it refuses the request, or answers with something else.
        """
        if await self.peek() is None:
            return None
        self._read.set()
        return self._ready.popleft()

    async def peek(self) -> Token | None:
        """As `next`, but the token stays where it is."""
        while not self._ready:
            if self._error is not None:
                raise self._error
            if self._over:
                return None
            self._arrived.clear()
            await self._arrived.wait()
        return self._ready[0]

    def close(self) -> None:
        """Close the request: the server stops."""
        self._task.cancel()

    async def _fill(self) -> None:
        try:
            if self._most is not None:
                await self._draw(self._most)
                return
            while await self._draw(CHUNK if self.wish.orders is None else WATCHED_CHUNK):
                while len(self._ready) > _LOW:
                    self._read.clear()
                    await self._read.wait()
        except Exception as error:  # noqa: BLE001 - handed to who reads
            self._error = error
        finally:
            self._over = True
            self._arrived.set()

    async def _draw(self, most: int) -> bool:
        """So many tokens, however often the server fails meanwhile. Whether the turn goes on."""
        left = most
        while left:
            before = len(self._ids)
            end: str = await self._source.wire.patience.retrying()(self._request, left)
            left -= len(self._ids) - before
            if end == "stop":
                return False
        return True

    async def _request(self, most: int) -> str:
        """One request: why it ended, "" where it broke off after some tokens. What came is kept."""
        source = self._source
        server, dialect = source.seat.server, source.dialect
        start = len(self._ids)
        if source.context is not None:
            most = min(most, source.context - start)
            if most < 1:
                raise ValueError(f"{start} tokens fill the context of {source.context} that {server.url} has")
        # A bound token takes the place of one that was drawn and thrown away: it needs randomness of its own.
        seed = int(draw(self._key + self.wish.bound, start) * _SEEDS)
        anew = self.wish.orders is not None and start > self._began
        asked = Draw(tuple(self._ids), most, seed, self.wish, anew)
        end = ""
        try:
            await rested(server)
            await source.meet(server)
            async with aclosing(source.wire.events(server, dialect.path, dialect.body(asked))) as events:
                async for data in events:
                    piece = dialect.read(data, asked, len(self._ids) - start)
                    self._take(piece.tokens, server)
                    end = piece.end or end
            if end not in ("stop", "length"):
                raise Fault(f"{server.url}: the stream ended before the turn did {end and f'({end})'}")
        except Fault as fault:
            if end not in ("stop", "length"):
                source.seat.move(server, fault)
                if len(self._ids) == start:
                    raise
                return ""
        if len(self._ids) == start:
            raise Unreadable(
                f"{server.url} ended the turn ({end}) without telling a token: its context may be full, or it keeps "
                "the token that ends a turn to itself"
            )
        return end

    def _take(self, tokens: Sequence[Token], server: Server) -> None:
        self._ids.extend(token.id for token in tokens)
        self._ready.extend(tokens)
        if tokens:
            self._source.seat.worked(server)
            self._arrived.set()
