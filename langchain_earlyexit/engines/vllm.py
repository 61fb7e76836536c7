"""The remote engine: the same programs on servers elsewhere, vLLM first; SGLang and llama.cpp as far as they go.

A program's `branches` are lists of token ids kept here, and streamed requests, in whatever words the server understands
(`dialects`), on the server whose cache holds the prompt (`fleet`), over connections that fail and come back (`wire`).

What a server has drawn and nobody has read when a request is closed counts as speculated tokens of the exit record:
a few for each trial and exit, as many as come within one round trip. So on this engine that count is not the same each
time.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from langchain_earlyexit.engines.branches import Branches
from langchain_earlyexit.engines.checkpoints import described, tokenizer_of
from langchain_earlyexit.engines.dialects import DIALECTS, Dialect
from langchain_earlyexit.engines.fleet import Fleet
from langchain_earlyexit.engines.lines import Source
from langchain_earlyexit.engines.loops import Bell, LoopThread
from langchain_earlyexit.engines.program import Done, Event, Inbox, Program, Sample, Step, Told
from langchain_earlyexit.engines.servers import Known, meet
from langchain_earlyexit.engines.streams import Channel, EventStream, told
from langchain_earlyexit.engines.wire import Circuit, Fault, Patience, Server, Wire
from langchain_earlyexit.sampling import Sampling

_CONNECTIONS = 256
"""That are open at once; a program takes one for its trunk and one for each trial."""

_BREATH = 32
"""Steps of a program after which others have their turn, where its tokens have all come already."""


@dataclass(slots=True, eq=False)
class _Run:
    """A program, its reader and its branches.

    Attributes:
        awake: set when the reader has taken something.
        error: what its reader is told at the end.
        task: runs it.
        placed: it has one of the places of programs that run.
    """

    program: Program
    channel: Channel
    branches: Branches
    awake: asyncio.Event = field(default_factory=asyncio.Event)
    error: BaseException | None = None
    task: asyncio.Task[None] | None = None
    placed: bool = False

    def ring(self) -> None:
        """Its reader has taken something, or wants no more."""
        if self.task is not None and self.channel.cancelled:
            self.task.cancel()
        self.awake.set()

    def end(self) -> None:
        """Nothing of it goes on, and its reader is told."""
        self.branches.end()
        try:
            with contextlib.suppress(Exception):  # what fails while it is being closed has nobody left to tell
                self.program.close()
        finally:
            self.channel.finish(self.error)


class VLLMEngine:
    """An engine over one or more servers of the same model: see `engines.program.Engine` for what it offers.

    It connects when it is made: what a server cannot do is known, and its tokenizer checked, before anything runs.
    Blocking. Of several servers, one must answer; the others are met when they are first used.

    Args:
        base_url: address of the server, with or without `/v1`; or of several, or of a router in front of them.
        model: hub id or directory that the tokenizer is loaded from, as for the local engine.
        api_key: sent to the servers as a bearer token.
        patience: how long a failing server is borne with.
        kind: "vllm", "sglang" or "llama.cpp" where a proxy hides it; None to ask.
        max_running: programs that run at once; more wait in line, first come first served.
        tokenizer: a Hugging Face tokenizer, where it is not to be loaded.
        revision: of `model` on the hub.
        trust_remote_code: passed on to `from_pretrained`.

    Attributes:
        lacks: what these servers cannot do, and why: names of signals, "seed", "grammar". See `dialects`.
        sentry: digest of the probe that the servers' plugin has, "" for a plugin without, None for no plugin.

    Raises:
        ConnectionError: no server answers.
        ValueError: a server that is of no known kind, serves another model, or has another tokenizer.
    """

    def __init__(
        self,
        base_url: str | Sequence[str],
        model: str,
        *,
        api_key: str | None = None,
        patience: Patience | None = None,
        kind: str | None = None,
        max_running: int = 64,
        tokenizer: Any = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        urls = [base_url] if isinstance(base_url, str) else list(base_url)
        if not urls:
            raise ValueError("base_url names no server")
        if kind is not None and kind not in DIALECTS:
            raise ValueError(f"unknown kind of server {kind!r}; known are {', '.join(DIALECTS)}")
        patience = patience or Patience()
        hints, defaults = described(model, revision, trust_remote_code) if tokenizer is None else ((), {})
        self.tokenizer = tokenizer or tokenizer_of(model, revision, trust_remote_code)
        self.family_hints: tuple[str, ...] = (model, *hints)
        self.generation_defaults: dict[str, Any] = defaults
        self._model, self._kind = model, kind
        self._fleet = Fleet([Server(_root(url), Circuit(patience)) for url in urls])
        self._known: dict[Server, Known] = {}
        self._runs: set[_Run] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._thread = LoopThread("earlyexit-vllm")
        try:
            self._wire, self._places = self._thread.call(_plumbing(patience, api_key, max_running))
            known = self._thread.call(self._connect())
        except BaseException:
            self._thread.stop()
            raise
        self._dialect: Dialect = known.dialect
        self.name = known.dialect.kind
        self.context_length = known.context
        self.lacks = dict(known.dialect.lacks)
        self.sentry = known.sentry
        self.identity = {"weights": f"{known.dialect.kind}:{known.dialect.model}", "dtype": "unknown"}
        weakref.finalize(self, self._thread.stop)

    @property
    def running(self) -> int:
        """Programs that have begun and are not over."""
        return len(self._runs)

    def watches(self, sampling: Sampling) -> bool:
        """Whether tokens that are drawn so can come with the log-probabilities of ids that are watched."""
        return self._dialect.watches(sampling)

    def submit(self, program: Program, *, timeout: float | None = None) -> EventStream:
        """Start a program; see `Engine.submit`."""
        run = _Run(program, Channel(timeout), Branches(self._dialect, self._source))
        with self._lock:
            if self._closed:
                raise RuntimeError(f"this {self.name} engine is closed; build a new model to go on")
            self._runs.add(run)
            self._thread.soon(partial(self._start, run))
        return EventStream(run.channel, Bell(self._thread, run.ring))

    def close(self) -> None:
        """Cancel what runs, and close the connections. Further submits raise RuntimeError."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._thread.call(self._end_all())
        self._thread.stop()

    # --- in the loop ------------------------------------------------------------------------------------------------

    async def _connect(self) -> Known:
        """Meet the first server that answers."""
        fault: Exception | None = None
        for server in self._fleet.servers:
            try:
                return await self._wire.patience.retrying()(self._meet, server)
            except ConnectionError as error:
                fault = error
        raise ConnectionError(f"no server answers: {fault}") from fault

    async def _meet(self, server: Server) -> Known:
        """What is known of a server; asked once, when it is first used."""
        if server in self._known:
            return self._known[server]
        failed = server.circuit.failed
        async with server.meeting:
            if server not in self._known:
                if server.circuit.failed > failed:  # while this one waited: not all are to wait for the same, in turn
                    raise Fault(f"{server.url} has just failed to answer")
                self._known[server] = await self._introduced(server)
        return self._known[server]

    async def _introduced(self, server: Server) -> Known:
        known = await meet(self._wire, server, self.tokenizer, self._model, self._kind)
        first = next(iter(self._known.values()), known)
        alike = (known.dialect.kind, known.dialect.model, known.sentry) == (
            first.dialect.kind,
            first.dialect.model,
            first.sentry,
        )
        if not alike or set(known.dialect.lacks) - set(first.dialect.lacks):
            raise ValueError(
                f"{server.url} ({known.dialect.kind}, model {known.dialect.model!r}, without "
                f"{sorted(known.dialect.lacks)}) is not the equal of {next(iter(self._known)).url} "
                f"({first.dialect.kind}, {first.dialect.model!r}, without {sorted(first.dialect.lacks)}); start "
                "all servers of a fleet alike"
            )
        return known

    async def _end_all(self) -> None:
        for run in self._runs:
            run.error = RuntimeError("the engine was closed while this request ran")
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._wire.close()

    def _start(self, run: _Run) -> None:
        run.task = asyncio.ensure_future(self._serve(run))
        run.task.add_done_callback(lambda _: self._end(run))
        run.ring()

    def _end(self, run: _Run) -> None:
        run.end()
        self._runs.discard(run)

    async def _serve(self, run: _Run) -> None:
        """One program from its first step to its end."""
        try:
            # The loop's clock is the monotonic one, as the channel's.
            async with asyncio.timeout_at(run.channel.deadline) as limit:
                await self._places.acquire()
                run.placed = True
                await self._walk(run)
        except asyncio.CancelledError:
            pass  # by its reader, or by `close`
        except TimeoutError as caught:
            late = TimeoutError("the request ran past its timeout and was cancelled")
            run.error = late if limit.expired() else caught
        except BaseException as caught:  # noqa: BLE001 - a failing program takes down itself only
            run.error = caught
        finally:
            if run.placed:
                self._places.release()

    async def _walk(self, run: _Run) -> None:
        inbox: Inbox | None = None
        steps = 0
        while True:
            if run.channel.full:
                await self._pause(run)
            if run.channel.cancelled:
                return
            step = _advance(run.program, inbox)
            if step is None:
                return
            if step.events:
                run.channel.put([_counted(event, run.branches) for event in step.events])
            for op in step.ops:
                run.branches.edit(op)
            samples = [(slot, op) for slot, op in enumerate(step.ops) if isinstance(op, Sample)]
            run.branches.draw([op for _, op in samples])
            results: list[Any] = [None] * len(step.ops)
            for slot, asked in enumerate(step.ops):
                if isinstance(asked, Told):
                    results[slot] = await run.branches.told(asked)
            for slot, op in samples:
                results[slot] = await run.branches.take(op)
            inbox = Inbox(tuple(results), run.channel.answer_now)
            steps += 1
            if steps % _BREATH == 0:
                await asyncio.sleep(0)

    async def _pause(self, run: _Run) -> None:
        """The reader is behind: its program waits, and lets another have its place."""
        self._places.release()
        run.placed = False
        while run.channel.full:
            run.awake.clear()
            if run.channel.full:
                await run.awake.wait()
        await self._places.acquire()
        run.placed = True

    def _source(self, ids: Sequence[int]) -> Source:
        return Source(self._wire, self._dialect, self._fleet.seat(ids), self._meet, self.context_length)


def _advance(program: Program, inbox: Inbox | None) -> Step | None:
    """The program's next step, None at its end. A cancellation that it raises is an error of its own."""
    try:
        return next(program) if inbox is None else program.send(inbox)
    except StopIteration:
        return None
    except asyncio.CancelledError as error:
        raise told(error) from None


def _counted(event: Event, branches: Branches) -> Event:
    """With the tokens that servers have drawn for nothing among those that were speculated."""
    if not isinstance(event, Done):
        return event
    return replace(event, speculated_tokens=event.speculated_tokens + branches.wasted)


async def _plumbing(patience: Patience, api_key: str | None, places: int) -> tuple[Wire, asyncio.Semaphore]:
    """What belongs to an event loop is made in it."""
    return Wire(patience, api_key, _CONNECTIONS), asyncio.Semaphore(places)


def _root(url: str) -> str:
    """The address without the `/v1` that OpenAI clients are given."""
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"base_url must begin with http:// or https://, not {url!r}")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")
