"""Whole agent runs: every call of a graph thought to its end, and answered from each of its checks as well.

A collection of runs is a folder. `runs.jsonl` has a line per finished run: its answer and its calls, in the order in
which they began. Each node of the graph has a collection of its own, such as `step.jsonl`, made as `lab.collect` makes
one (traces, how they were made, hidden states), so a probe can be trained on it. Calls of one run are not drawn
independently, so nothing is certified on them one by one: `lab.node_rules` judges a rule for all nodes by whole runs.

A run is written when it is done; an interrupted collection goes on with the rest.
"""

from __future__ import annotations

import asyncio
import json
import os
import runpy
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Self

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import LLMResult
from langchain_core.runnables import Runnable
from pydantic import PrivateAttr
from tqdm import tqdm

from langchain_earlyexit.asks import Asks
from langchain_earlyexit.chat_models import ChatEarlyExit
from langchain_earlyexit.engines.program import Event, Program
from langchain_earlyexit.lab.collect import Asked, Summary, Writer, measured, meta_of, read_traces, seed_of, write_meta
from langchain_earlyexit.lab.exits import Collected, answering_everywhere, watching
from langchain_earlyexit.lab.lines import RUNS, mended, note_done, note_planned, read_lines
from langchain_earlyexit.policies import Never
from langchain_earlyexit.replies import Call
from langchain_earlyexit.request import Request
from langchain_earlyexit.self_consistency import answer_in
from langchain_earlyexit.trace import Trace

Model = Runnable[LanguageModelInput, AIMessage]
GraphOf = Callable[[Model], Runnable[Any, Any]]
"""Makes a graph over `messages` whose calls all go to the given model."""

AT_ONCE: Final = 24
"""Runs in flight. What comes out does not depend on it."""

_FLUSH_SECONDS: Final = 20.0


@dataclass(frozen=True)
class CallTrace:
    """One call of a run: the graph's node that made it, and its trace, whose `question` is the prompt's last turn."""

    node: str
    trace: Trace


@dataclass(frozen=True)
class Trajectory:
    """One run of full thinking.

    Attributes:
        id: of the question.
        question: its text.
        answer: of the run, as `answer_of` read it.
        gold: the right answer, or None.
        calls: in the order in which they began.
    """

    id: str
    question: str
    answer: str | None
    gold: str | None
    calls: tuple[CallTrace, ...]


# --- collecting -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kept:
    """A finished call, and how it was asked."""

    collected: Collected
    question: str
    meta: Mapping[str, Any]


class WatchedModel(ChatEarlyExit):
    """A model whose every call thinks to its end and answers from each of its checks as well. For `collect_runs`."""

    _depths: tuple[float, ...] = PrivateAttr(default=())
    _kinds: frozenset[str] | None = PrivateAttr(default=None)
    _kept: dict[str, _Kept] = PrivateAttr(default_factory=dict)

    @classmethod
    def like(cls, llm: ChatEarlyExit, depths: Sequence[float], kinds: Collection[str] | None) -> Self:
        """A twin of `llm` with its settings; it shares its weights.

        Args:
            llm: any model; its exit policy is not used.
            depths: layers whose hidden states are kept, as shares of their number; none when empty.
            kinds: kinds of checks; the model's own decision points when None.
        """
        given = {name: getattr(llm, name) for name in llm.model_fields_set if name != "exit_policy"}
        twin = cls(**given)
        twin._depths = tuple(depths)
        twin._kinds = None if kinds is None else frozenset(kinds)
        return twin

    def taken(self, message_id: str) -> _Kept:
        """What was kept of a call, once."""
        return self._kept.pop(message_id)

    def _start(self, messages: list[BaseMessage], stop: Sequence[str] | None, kwargs: Mapping[str, Any]) -> Call:
        asked = {name: value for name, value in kwargs.items() if name not in {"exit_policy", "confidence"}}
        settings = replace(self._settings_of(stop, asked), exit_policy=Never(), confidence=None, shadow=False)
        asks, bound = Asks.of(kwargs), self._bind()
        kinds = bound.cues.primary if self._kinds is None else self._kinds
        plain = bound.request(messages, settings, asks)
        request = replace(plain, policy=watching(measured(bound), kinds))
        binds = bound.call_fingerprint(messages, settings, request, asks)
        meta = meta_of(self.model, binds, request, kinds, self._depths)
        name = f"earlyexit-{uuid.uuid4()}"
        question = messages[-1].text

        def keep(collected: Collected) -> None:
            self._kept[name] = _Kept(collected, question, meta)

        stream = bound.engine.submit(_told_as_usual(request, self._depths, keep), timeout=self.timeout)
        with self._lock:
            self._calls[name] = stream
        return Call(request, stream, name, self.model, bound.engine.name, include_checks=False)


def _told_as_usual(request: Request, depths: tuple[float, ...], keep: Callable[[Collected], None]) -> Program:
    """`answering_everywhere` for readers who expect the events of a call: they get them all at the end."""
    running = answering_everywhere(request, depths)
    step = next(running)
    while True:
        events: list[Event] = []
        for event in step.events:
            if not isinstance(event, Collected):
                raise TypeError(f"a collecting program ends with Collected, not {type(event).__name__}")
            keep(event)
            events += [*event.said, event.done]
        inbox = yield replace(step, events=tuple(events))
        try:
            step = running.send(inbox)
        except StopIteration:
            return


class _Calls(BaseCallbackHandler):
    """The calls of one run in the order in which they began: node and message id."""

    run_inline = True

    def __init__(self) -> None:
        self.nodes: dict[Any, str] = {}
        self.ids: dict[Any, str] = {}

    def on_chat_model_start(self, serialized: Any, messages: Any, *, run_id: Any, **more: Any) -> None:
        self.nodes[run_id] = str((more.get("metadata") or {}).get("langgraph_node", "model"))

    def on_llm_end(self, response: LLMResult, *, run_id: Any, **more: Any) -> None:
        message: Any = response.generations[0][0]
        self.ids[run_id] = message.message.id

    @property
    def ended(self) -> list[tuple[str, str]]:
        return [(node, self.ids[run]) for run, node in self.nodes.items() if run in self.ids]


def graph_maker(where: str) -> GraphOf:
    """A function of one's own, as `my_agent.py:make_graph`; the file is run.

    Raises:
        ValueError: no such file, or no function of that name in it.
    """
    path, _, name = where.rpartition(":")
    if not path or not Path(path).is_file():
        raise ValueError(f"a graph is named by a file and a function in it, my_agent.py:make_graph; got {where!r}")
    made = runpy.run_path(path).get(name)
    if not callable(made):
        raise ValueError(f"{path} has no function {name!r} that makes a graph of a model")
    found: GraphOf = made
    return found


def collect_runs(
    llm: ChatEarlyExit,
    graph_of: GraphOf,
    questions: Sequence[Asked],
    out: str | os.PathLike[str],
    *,
    depths: Sequence[float] = (),
    kinds: Collection[str] | None = None,
    answer_of: Callable[[AIMessage], str] = answer_in,
    seed: int = 0,
    at_once: int = AT_ONCE,
    progress: bool = True,
) -> Summary:
    """Run a graph on every question with full thinking, and keep its calls as traces.

    Every call of a run has the seed `collect.seed_of(seed, question id)`, so that a live run with this seed and a rule
    that never leaves is the collected one, token for token.

    Args:
        llm: the model.
        graph_of: makes the graph; it must not bind seeds or policies of its own.
        questions: each with an id of its own; asked as the human's message.
        out: a folder. Questions whose run is in it already are not asked again.
        depths: layers whose hidden states are kept, as shares of their number; none when empty.
        kinds: kinds of checks; the model's own decision points when None.
        answer_of: reads the answer of a run off its last message.
        seed: of the collection.
        at_once: runs in flight.
        progress: show a bar with the time left.

    Returns:
        Runs done now, done before, and those that came to an error (a prompt too long, say), by id.

    Raises:
        ValueError: a folder that was collected in another way, naming what differs; calls of one node that are asked
            in different ways.
    """
    files = _Files(Path(out), seed)
    left = [question for question in questions if question.id not in files.done]
    refused: dict[str, str] = {}
    if left:
        note_planned(Path(out) / RUNS, {question.id for question in questions})
    with (
        WatchedModel.like(llm, depths, kinds) as model,
        tqdm(total=len(questions), initial=len(questions) - len(left), unit="run", disable=not progress) as bar,
    ):

        async def one(question: Asked, turns: asyncio.Semaphore) -> None:
            async with turns:
                calls = _Calls()
                graph = graph_of(model.bind(seed=seed_of(seed, question.id)))
                try:
                    state = await graph.ainvoke({"messages": [("user", question.question)]}, {"callbacks": [calls]})
                except ValueError as error:  # this run cannot be finished; the others can
                    refused[question.id] = str(error)
                    for _, name in calls.ended:
                        model.taken(name)
                    bar.write(f"{question.id} is left out: {error}")
                else:
                    kept = [(node, model.taken(name)) for node, name in calls.ended]
                    files.add(question, answer_of(state["messages"][-1]), kept)
                bar.update()

        async def everything() -> None:
            turns = asyncio.Semaphore(at_once)
            await asyncio.gather(*(one(question, turns) for question in left))

        try:
            asyncio.run(everything())
        finally:
            files.flush()
    note_done(Path(out) / RUNS, {*files.done, *(question.id for question in questions)})
    return Summary(len(left) - len(refused), len(questions) - len(left), refused)


class _Files:
    """The folder of a collection. Calls are written before the run they belong to."""

    def __init__(self, folder: Path, seed: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.seed = seed
        self.done = {line["id"] for line in mended(folder / RUNS, json.loads)}
        for path in folder.glob("*.jsonl"):
            if path.name != RUNS:
                _drop_unfinished(path, self.done)
        self.metas: dict[str, Mapping[str, Any]] = {}
        self.writers: dict[str, Writer] = {}
        self.lines: list[str] = []
        self.since = time.monotonic()

    def add(self, question: Asked, answer: str | None, kept: Sequence[tuple[str, _Kept]]) -> None:
        calls = []
        for place, (node, one) in enumerate(kept):
            name = f"{question.id}/{place}"
            trace = replace(one.collected.done.trace, question_id=name, question=one.question)
            self._writer(node, one.meta).add(trace, one.collected.states)
            calls.append({"node": node, "id": name})
        run = {"id": question.id, "question": question.question, "answer": answer, "gold": question.answer}
        self.lines.append(json.dumps({**run, "calls": calls}, ensure_ascii=False) + "\n")
        if time.monotonic() - self.since >= _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        for writer in self.writers.values():
            writer.flush()
        with (self.folder / RUNS).open("a", encoding="utf-8") as file:
            file.writelines(self.lines)
            file.flush()
            os.fsync(file.fileno())
        self.lines, self.since = [], time.monotonic()

    def _writer(self, node: str, meta: Mapping[str, Any]) -> Writer:
        if node not in self.writers:
            path = self.folder / f"{node}.jsonl"
            write_meta(path, {**meta, "seed": self.seed, "of_runs": True}, known=path.exists())
            self.metas[node], self.writers[node] = meta, Writer(path)
        if meta != self.metas[node]:
            other = sorted(name for name in meta if meta[name] != self.metas[node].get(name))
            raise ValueError(
                f"calls of the node {node!r} are not asked alike ({', '.join(other)} differ), so no one rule is for "
                "all of them: give the graph a node for each kind of call"
            )
        return self.writers[node]


def _drop_unfinished(path: Path, done: set[str]) -> None:
    """Take away the calls of runs that never came to their end: they are run anew."""
    traces = mended(path, Trace.from_json)
    whole = [trace for trace in traces if str(trace.question_id).rpartition("/")[0] in done]
    if len(whole) < len(traces):
        part = path.with_suffix(".part")
        part.write_text("".join(trace.to_json() + "\n" for trace in whole), encoding="utf-8")
        os.replace(part, path)


# --- reading --------------------------------------------------------------------------------------------------------


def node_path(out: str | os.PathLike[str], node: str) -> Path:
    """The collection of one node: for `collect.read_meta`, `train.train`; for `certify.certify` where each run has one
    call of it, and with its answer ends what the run takes from the call.
    """
    return Path(out) / f"{node}.jsonl"


def read_runs(out: str | os.PathLike[str]) -> list[Trajectory]:
    """The runs of a collection, in the order in which they were done.

    Raises:
        FileNotFoundError: no such collection.
        ValueError: a line that is none.
    """
    lines = read_lines(Path(out) / RUNS, json.loads)
    nodes = sorted({call["node"] for line in lines for call in line["calls"]})
    traces = {trace.question_id: trace for node in nodes for trace in read_traces(node_path(out, node))}
    return [
        Trajectory(
            line["id"],
            line["question"],
            line["answer"],
            line["gold"],
            tuple(CallTrace(call["node"], traces[call["id"]]) for call in line["calls"]),
        )
        for line in lines
    ]
