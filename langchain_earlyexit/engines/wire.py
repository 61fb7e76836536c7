"""HTTP to one server: streams of events and single answers, what of a failure may pass, and when to stop trying.

A failure that may pass is a `Fault`; `Patience.retrying` is tenacity around the calls that raise them. A server that
fails again and again is left alone for a while: its `Circuit` is open.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import math
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import tenacity

_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses that may be another when the same is asked again."""

_BUSY = frozenset({425, 429})
"""Of these, what a server says that is well and has too much to do."""

_TOLD = 500
"""Characters of a server's own message that an error repeats."""


class Fault(ConnectionError):
    """A failure that may pass.

    Attributes:
        after: seconds that the server asks to be left alone for, or None.
        moved: another server is asked next: there is nothing to wait for.
    """

    def __init__(self, told: str, *, after: float | None = None) -> None:
        super().__init__(told)
        self.after = after
        self.moved = False


@dataclass(frozen=True)
class Patience:
    """How long a failing server is borne with.

    Attributes:
        retries: failures after the first that are borne with, in a row without a single token; a stream that breaks
            off later starts anew, and one after which another server is asked counts nothing.
        first, longest: seconds before the first retry, and at most; they double, with jitter.
        silence: seconds without a byte after which a connection counts as broken: a server that is waited for in line
            says nothing.
        connect: seconds to connect within.
        obeyed: most seconds of a `Retry-After` that are waited for; a server that wants more has failed.
        failures: of one server in a row, after which it is left alone.
        rest: for so many seconds.
    """

    retries: int = 2
    first: float = 0.5
    longest: float = 8.0
    silence: float = 300.0
    connect: float = 5.0
    obeyed: float = 60.0
    failures: int = 8
    rest: float = 5.0

    def retrying(self) -> tenacity.AsyncRetrying:
        """Tries again what raises a `Fault`, after at most `retries` waits."""
        waits = 0

        def bearable(error: BaseException) -> bool:
            nonlocal waits
            if not isinstance(error, Fault):
                return False
            waits += not error.moved
            return error.moved or (waits <= self.retries and (error.after or 0.0) <= self.obeyed)

        def pause(state: tenacity.RetryCallState) -> float:
            fault = None if state.outcome is None else state.outcome.exception()
            if isinstance(fault, Fault):
                if fault.moved:
                    return 0.0
                if fault.after is not None:
                    return fault.after
            doubled = min(self.longest, self.first * 2.0 ** (waits - 1))
            return doubled * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, so that streams do not come back together

        return tenacity.AsyncRetrying(wait=pause, retry=tenacity.retry_if_exception(bearable), reraise=True)


@dataclass(slots=True)
class Circuit:
    """Whether a server is worth asking."""

    patience: Patience
    failed: int = 0
    until: float = 0.0
    well: float = 0.0

    @property
    def rest(self) -> float:
        """Seconds for which it is to be left alone; 0 if it may be asked."""
        return max(0.0, self.until - time.monotonic())

    def worked(self) -> None:
        self.failed, self.until, self.well = 0, 0.0, time.monotonic()

    def broke(self, began: float = math.inf) -> None:
        """A failure of a request that `began` then: of a server that has worked for others since, it says little."""
        if began < self.well:
            return
        self.failed += 1
        if self.failed >= self.patience.failures:
            self.until = time.monotonic() + self.patience.rest


@dataclass(eq=False)
class Server:
    """One address. `load` counts the programs that have their place there; `meeting` is held while it is met."""

    url: str
    circuit: Circuit
    load: int = 0
    meeting: asyncio.Lock = field(default_factory=asyncio.Lock)


class Wire:
    """A bounded pool of connections. Used from one event loop.

    Args:
        patience: see there.
        api_key: sent as a bearer token.
        connections: most that are open at once, over all servers; a request beyond them waits.
    """

    def __init__(self, patience: Patience, api_key: str | None, connections: int) -> None:
        self.patience = patience
        self._closing: set[asyncio.Future[None]] = set()
        self._client = httpx.AsyncClient(
            headers={"Accept-Encoding": "identity", **({"Authorization": f"Bearer {api_key}"} if api_key else {})},
            timeout=httpx.Timeout(patience.silence, connect=patience.connect, pool=None),
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def ask(self, server: Server, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """One answer, as JSON: of a POST where there is a body, else of a GET.

        Raises:
            Fault: what may pass.
            ValueError: what the server refuses, in its own words.
            LookupError: it knows no such path.
        """
        began = time.monotonic()
        try:
            if body is None:
                response = await self._client.get(server.url + path)
            else:
                response = await self._client.post(server.url + path, json=body)
        except httpx.TransportError as error:
            raise self._lost(server, error, began) from error
        self._judge(server, path, response)
        try:
            told = response.json()
        except json.JSONDecodeError as error:
            raise ValueError(f"{server.url}{path} answers with something else than JSON") from error
        server.circuit.worked()
        return told

    async def events(self, server: Server, path: str, body: Mapping[str, Any]) -> AsyncGenerator[Any, None]:
        """The server-sent events of a request, as JSON, to their end. Leaving it closes the connection.

        Raises:
            Fault: what may pass; also where the stream breaks off, or tells of an error.
            ValueError: what the server refuses, in its own words.
        """
        began = time.monotonic()
        try:
            response = await self._opened(server.url + path, body)
            try:
                self._judge(server, path, response)
                async for line in _lines(response.stream):
                    if not line.startswith(b"data:"):
                        continue
                    data = line[5:].strip()
                    if data != b"[DONE]":  # after it comes the end: read up to there, the connection is of use again
                        event = _event(server, data)
                        server.circuit.worked()
                        yield event
            finally:
                await asyncio.shield(self._closed(response))
        except httpx.TransportError as error:
            raise self._lost(server, error, began) from error

    # A cancellation in the middle of opening or of closing a response would take its connection from the client's pool
    # for good, and once all are lost every request waits for ever. So neither is ever cut off.

    async def _opened(self, url: str, body: Mapping[str, Any]) -> httpx.Response:
        """A response; its body has been read where it is an error's."""
        opening = asyncio.ensure_future(self._open(url, body))
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(self._unwanted)
            raise

    async def _open(self, url: str, body: Mapping[str, Any]) -> httpx.Response:
        response = await self._client.send(self._client.build_request("POST", url, json=body), stream=True)
        if response.status_code != httpx.codes.OK:
            await response.aread()
        return response

    def _unwanted(self, opening: asyncio.Future[httpx.Response]) -> None:
        if not opening.cancelled() and opening.exception() is None:
            self._closed(opening.result())

    def _closed(self, response: httpx.Response) -> asyncio.Future[None]:
        closing = asyncio.ensure_future(response.aclose())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        return closing

    def _lost(self, server: Server, error: httpx.TransportError, began: float) -> Fault:
        server.circuit.broke(began)
        return Fault(f"{server.url}: {type(error).__name__}{f' ({error})' if str(error) else ''}")

    def _judge(self, server: Server, path: str, response: httpx.Response) -> None:
        status = response.status_code
        if status in _PASSING:
            if status not in _BUSY:  # one that is busy is well
                server.circuit.broke()
            told = f"{server.url}{path} answers {status}: {_message(response)}"
            raise Fault(told, after=_after(response))
        if status == httpx.codes.OK:
            return  # that it works is yet to be seen: one that hangs says this much
        server.circuit.worked()
        if status in (401, 403):
            raise PermissionError(f"{server.url} answers {status}: api_key is missing or not the one it was given")
        if status in (404, 405, 501):
            raise LookupError(f"{server.url}{path} answers {status}: {_message(response)}")
        raise ValueError(f"{server.url}{path} refuses the request ({status}): {_message(response)}")


async def rested(server: Server) -> None:
    """Leave a server alone for as long as its circuit is open."""
    while rest := server.circuit.rest:
        await asyncio.sleep(rest)


async def _lines(stream: Any) -> AsyncIterator[bytes]:
    """Lines, ended by line feeds alone: a text may hold other characters that end lines elsewhere."""
    held = b""
    async for chunk in stream:
        *whole, held = (held + chunk).split(b"\n")
        for line in whole:
            yield line
    if held:
        yield held


def _event(server: Server, data: bytes) -> Any:
    try:
        event = json.loads(data)
    except json.JSONDecodeError as error:
        raise Fault(f"{server.url}: an event broke off") from error
    if isinstance(event, dict) and event.get("error"):
        told = event["error"]
        text = str(told.get("message", told) if isinstance(told, dict) else told)[:_TOLD]
        server.circuit.broke()  # whatever code it gives: older servers call all that goes wrong by now a bad request
        raise Fault(f"{server.url} failed: {text}")
    return event


def _message(response: httpx.Response) -> str:
    try:
        told = response.json()
    except ValueError:
        return response.text[:_TOLD]
    for name in ("error", "message", "detail"):
        if isinstance(told, dict) and name in told:
            told = told[name]
    return str(told)[:_TOLD]


def _after(response: httpx.Response) -> float | None:
    """Seconds of a `Retry-After`, which may be a date."""
    told = response.headers.get("retry-after")
    if told is None:
        return None
    if told.strip().isdigit():
        return float(told)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(told).timestamp() - time.time())
    except ValueError:
        return None
