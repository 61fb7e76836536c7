"""From questions to traces: each thought to the end, measured and answered at every check, a line of JSON each.

What is written is enough to try any policy and any threshold without a model, to train a probe, and to calibrate. A
collection is resumable: lines are appended as questions are done, and a second run goes on with the rest. It is three
things side by side: `x.jsonl` (a `Trace` per line), `x.meta.json` (how it was made) and, where hidden states were
asked for, `x.features/` (safetensors with question ids).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from langchain_core.messages import BaseMessage, HumanMessage, SystemMessage
from numpy.typing import NDArray
from tqdm import tqdm

from langchain_earlyexit.binding import Binding
from langchain_earlyexit.chat_models import ChatEarlyExit
from langchain_earlyexit.cues import CueSpec
from langchain_earlyexit.engines.program import Stream
from langchain_earlyexit.fingerprint import digest, refuse_mismatch
from langchain_earlyexit.lab.exits import Collected, answering_everywhere, watching
from langchain_earlyexit.lab.lines import (
    RUNS,
    mended,
    meta_path,
    note_done,
    note_planned,
    read_lines,
    refuse_unfinished,
)
from langchain_earlyexit.policies import Never, Policy, wanted_kinds
from langchain_earlyexit.probe import mark
from langchain_earlyexit.request import Request
from langchain_earlyexit.settings import Settings
from langchain_earlyexit.signals import MEASURED
from langchain_earlyexit.trace import Trace

AT_ONCE: Final = 64
"""Questions in flight: as many as the local engine runs at once. What comes out does not depend on it."""

DEPTHS: Final = (0.25, 0.5, 0.75, 1.0)
"""Layers whose states are kept where the model's family has no published choice."""

FORMAT: Final = 1
_FLUSH_QUESTIONS: Final = 64
_FLUSH_SECONDS: Final = 20.0

States = NDArray[np.float32]
"""Of one question: [checks, positions, layers, width]."""


class Asked(Protocol):
    """A question with an id that stays the same from run to run, and its answer where it is known."""

    @property
    def id(self) -> str: ...
    @property
    def question(self) -> str: ...
    @property
    def answer(self) -> str | None: ...


@dataclass(frozen=True)
class Summary:
    """What one run of `collect` did: questions done now, done before, and refused, with the reason by id."""

    done: int
    before: int
    refused: Mapping[str, str]


# --- writing ------------------------------------------------------------------------------------------------------


def collect(
    llm: ChatEarlyExit,
    questions: Sequence[Asked],
    out: str | os.PathLike[str],
    *,
    kinds: Collection[str] | None = None,
    depths: Sequence[float] | None = None,
    signals: Collection[str] | None = None,
    system: str | None = None,
    seed: int = 0,
    at_once: int = AT_ONCE,
    progress: bool = True,
    **settings: Any,
) -> Summary:
    """Think every question to the end, and answer it from each of its checks as well; append the traces to `out`.

    The trace replays exactly as the model runs: a policy that leaves at a check gets its `exit_answer`, with the
    trace's seed. That holds for policies that look at `kinds` and no others, so collect once for those that look at
    cue words, and into another file for those that look at sentences.

    Args:
        llm: the model. Its own exit policy is not used; its probe, where it has one, measures `p_safe`.
        questions: each with an id of its own.
        out: the file of traces, ending in ".jsonl". Questions whose id is in it already are not asked again.
        kinds: kinds of checks; the model's own decision points when None.
        depths: layers whose hidden states are kept, as shares of their number; those published for the model's
            family, else `DEPTHS`, when None; none when empty.
        signals: what is measured at each check; all that can be on this model when None. Trial answers are most of the
            price of a collection beside the exits.
        system: a system prompt for all questions.
        seed: question i is sampled with a seed made of this one and its id.
        at_once: questions in flight.
        progress: show a bar with the time left.
        **settings: as a call of `llm` takes them, such as temperature or thinking_budget.

    Raises:
        ValueError: a file that was collected with other settings, naming what differs; two questions with one id; a
            model that does not think; a signal that cannot be measured on it.
    """
    path = _traces_path(out)
    _one_id_each(questions)
    bound = llm.load()
    chosen = llm.call_settings(**settings)
    plan = _Plan(
        bound,
        replace(chosen, exit_policy=Never(), shadow=False),
        frozenset(kinds) if kinds is not None else bound.cues.primary,
        tuple(depths if depths is not None else bound.family.probe_layers or DEPTHS),
        measured(bound, signals),
        system,
        seed,
        llm.timeout,
    )
    known = {trace.question_id for trace in mended(path, Trace.from_json)}
    left = [question for question in questions if question.id not in known]
    refused: dict[str, str] = {}
    if questions:
        # Also where nothing is left to ask: what is there may have been asked in another way.
        first = plan.first(questions, read_meta(path)["form"] if meta_path(path).exists() else None)
        meta = plan.meta(llm.model, first)
        write_meta(path, meta, known=bool(known))
    if left:
        note_planned(path, {question.id for question in questions})
        with (
            Writer(path) as writer,
            tqdm(total=len(questions), initial=len(questions) - len(left), unit="q", disable=not progress) as bar,
            closing(plan.run(left, at_once, meta["form"])) as runs,
        ):
            for question, found in runs:
                if isinstance(found, ValueError):
                    refused[question.id] = str(found)
                    bar.write(f"{question.id} is left out: {found}", file=sys.stderr)
                else:
                    writer.add(_told(found.done.trace, question), found.states)
                bar.update()
    note_done(path, {*(str(id_) for id_ in known), *(question.id for question in questions)})
    return Summary(len(left) - len(refused), len(questions) - len(left), refused)


def seed_of(seed: int, question_id: str) -> int:
    """The seed a question is sampled with: it depends on nothing else, so questions may come in any order."""
    return int(digest([seed, question_id])[:12], 16)


def in_form(settings: Settings, question: Asked) -> Settings:
    """Settings with the form that a question of a data set says it is answered in, where they leave that open."""
    form = getattr(question, "form", None)
    return settings if form is None or settings.answer_form != "auto" else replace(settings, answer_form=form)


def messages_of(question: Asked, system: str | None) -> list[BaseMessage]:
    """How it is asked."""
    before = [] if system is None else [SystemMessage(system)]
    return [*before, HumanMessage(question.question)]


@dataclass(frozen=True)
class _Plan:
    """How every question is asked."""

    bound: Binding
    settings: Settings
    kinds: frozenset[str]
    depths: tuple[float, ...]
    signals: frozenset[str]
    system: str | None
    seed: int
    timeout: float | None

    def request(self, question: Asked) -> Request:
        settings = replace(in_form(self.settings, question), seed=seed_of(self.seed, question.id))
        plain = self.bound.request(messages_of(question, self.system), settings)
        if not plain.thinking:
            raise ValueError("the model does not think here, so there is nothing to collect")
        return replace(plain, policy=watching(self.signals, self.kinds))

    def first(self, questions: Sequence[Asked], form: str | None) -> Asked:
        """The first question that can be asked, if one can, of this answer form: it stands for all.

        Raises:
            ValueError: none can; the reason is that of the first.
        """
        askable: Asked | None = None
        refused: ValueError | None = None
        for question in questions:
            try:
                found = self.request(question).form.name
            except ValueError as error:
                refused = refused or error
                continue
            if form in (None, found):
                return question
            askable = askable or question
        if askable is None:
            raise refused or ValueError("there are no questions")
        return askable

    def meta(self, model: str, question: Asked) -> dict[str, Any]:
        """How this collection is made, as JSON data. Whoever goes on with it must make it in the same way."""
        request = self.request(question)
        settings = in_form(self.settings, question)
        binds = self.bound.call_fingerprint(messages_of(question, self.system), settings, request)
        return {**meta_of(model, binds, request, self.kinds, self.depths), "seed": self.seed}

    def run(
        self, questions: Sequence[Asked], at_once: int, form: str
    ) -> Generator[tuple[Asked, Collected | ValueError]]:
        """Each question with what came of it, in the order in which they are done."""
        running: set[Stream] = set()

        def one(question: Asked) -> Collected | ValueError:
            try:
                request = self.request(question)
                if request.form.name != form:
                    raise ValueError(
                        f"its answer form is {request.form.name}, but that of this collection is {form}: collect one "
                        "form per file, or give answer_form"
                    )
            except ValueError as error:  # this question cannot be asked; the others can
                return error
            stream = self.bound.engine.submit(answering_everywhere(request, self.depths), timeout=self.timeout)
            running.add(stream)
            try:
                [found] = stream
            finally:
                running.discard(stream)
            if not isinstance(found, Collected):
                raise TypeError(f"a collecting program ends with Collected, not {type(found).__name__}")
            return found

        waiting = iter(questions)
        with ThreadPoolExecutor(at_once, thread_name_prefix="collect") as threads, _cancelled_at_last(running):
            asked: dict[Future[Collected | ValueError], Asked] = {}
            while True:
                for question in _take(waiting, at_once - len(asked)):
                    asked[threads.submit(one, question)] = question
                if not asked:
                    return
                for future in wait(asked, return_when=FIRST_COMPLETED).done:
                    yield asked.pop(future), future.result()


def meta_of(
    model: str, binds: Mapping[str, str], request: Request, kinds: Collection[str], depths: Sequence[float]
) -> dict[str, Any]:
    """How calls like `request`, whose policy watches, are collected, as JSON data: see `read_meta`."""
    signals = request.policy.needs
    return {
        "format": FORMAT,
        "model": model,
        "binds": binds,
        "form": request.form.name,
        "kinds": sorted(kinds),
        "signals": sorted(signals),
        "depths": list(depths),
        "closing": {
            "full": len(request.closing),
            "bare": len(request.bare_closing),
            **({"margin": 1} if request.aside and "end_margin" in signals - request.reported else {}),
        },
        "learned": [] if request.probe is None else request.probe.learned,
    }


def measured(bound: Binding, wanted: Collection[str] | None = None) -> frozenset[str]:
    """The signals that are wanted; all that can be measured on this model when None."""
    one_token = bound.tags is not None and bound.codec.single(bound.tags.end) is not None
    lacking = set(getattr(bound.engine, "lacks", ())) | (set() if one_token else {"end_margin"})
    offered = (MEASURED - lacking) | ({"p_safe"} if bound.probe is not None else frozenset())
    if wanted is None:
        return offered
    if unknown := sorted(set(wanted) - offered):
        raise ValueError(f"{', '.join(unknown)} cannot be measured here, but {', '.join(sorted(offered))} can")
    return frozenset(wanted)


@contextmanager
def _cancelled_at_last(running: set[Stream]) -> Iterator[None]:
    """Whatever ends the loop, an interrupt say, no stream goes on and no thread waits for it."""
    try:
        yield
    finally:
        for stream in list(running):
            stream.cancel()


def _take(waiting: Iterator[Asked], count: int) -> list[Asked]:
    return [question for _, question in zip(range(count), waiting, strict=False)]


def _told(trace: Trace, question: Asked) -> Trace:
    return replace(trace, question_id=question.id, question=question.question, gold=question.answer)


def _one_id_each(questions: Sequence[Asked]) -> None:
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise ValueError(f"two questions have the id {question.id!r}; every question needs one of its own")
        seen.add(question.id)


def write_meta(path: Path, meta: dict[str, Any], *, known: bool) -> None:
    """Tell beside the lines of `path` how they are made; where it is told already, it must be the same.

    Raises:
        ValueError: it is not, naming what differs.
    """
    where = meta_path(path)
    if known or where.exists():
        try:
            refuse_mismatch(f"the collection {path}", _flat(read_meta(path)), _flat(meta))
        except ValueError as error:
            raise ValueError(f"{error}. Go on with the same settings, or collect into another file") from None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    where.write_text(json.dumps(meta, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


_APART: Final = frozenset({"binds", "model", "learned"})
"""What two parts of a collection need not have in common: names of the model, and what hangs on the probe's digest."""


def _flat(meta: Mapping[str, Any]) -> dict[str, str]:
    plain = {name: json.dumps(value) for name, value in meta.items() if name not in _APART}
    return {**plain, **meta["binds"]}


@dataclass
class Writer:
    """Appends traces, and their states in shards. A shard is written before the lines it belongs to: after a crash in
    between, the questions are asked again, and the later shard counts.
    """

    path: Path
    _lines: list[str] = field(default_factory=list)
    _states: dict[str, States] = field(default_factory=dict)
    _since: float = field(default_factory=time.monotonic)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()

    def add(self, trace: Trace, states: States | None) -> None:
        self._lines.append(trace.to_json() + "\n")
        if states is not None and trace.question_id is not None:
            self._states[trace.question_id] = states
        if len(self._lines) >= _FLUSH_QUESTIONS or time.monotonic() - self._since >= _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self._states:
            _write_shard(_features_path(self.path), self._states)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(self._lines)
            file.flush()
            os.fsync(file.fileno())
        self._lines, self._states, self._since = [], {}, time.monotonic()


def _write_shard(folder: Path, states: Mapping[str, States]) -> None:
    from safetensors.numpy import save_file

    folder.mkdir(exist_ok=True)
    ids = list(states)
    tensors = {
        "states": np.concatenate([states[name] for name in ids]),
        "checks": np.array([len(states[name]) for name in ids], dtype=np.int64),
    }
    whole = folder / f"{len(_shards(folder)):05}.safetensors"
    part = whole.with_suffix(".part")
    save_file(tensors, part, metadata={"question_ids": json.dumps(ids, ensure_ascii=False)})
    os.replace(part, whole)


# --- reading ------------------------------------------------------------------------------------------------------


def read_traces(out: str | os.PathLike[str]) -> list[Trace]:
    """The traces of a collection, one per question, in the order in which they were done.

    Raises:
        FileNotFoundError: no such collection.
        ValueError: a line that is no trace, naming it.
    """
    return read_lines(_traces_path(out), Trace.from_json)


def read_meta(out: str | os.PathLike[str]) -> dict[str, Any]:
    """How a collection was made: `binds` is the fingerprint of its calls, `form`, `kinds`, `signals`, `depths`, `seed`,
    `closing`: the tokens that close the thinking, with and without what induces an answer, and those that a margin
    takes; `learned`: `Probe.learned` of the probe that measured.

    Raises:
        FileNotFoundError: the file beside the traces is missing.
        ValueError: it is of another format.
    """
    where = meta_path(_traces_path(out))
    meta: dict[str, Any] = json.loads(where.read_text(encoding="utf-8"))
    if meta.get("format") != FORMAT:
        raise ValueError(f"{where} has format {meta.get('format')!r}, but this version reads {FORMAT}; collect anew")
    return meta


def read_finished(out: str | os.PathLike[str]) -> dict[str, Any]:
    """`read_meta` of a collection that is whole; ValueError where it is not finished."""
    meta = read_meta(out)
    refuse_unfinished(Path(out).with_name(RUNS) if meta.get("of_runs") else Path(out))
    return meta


def live_kinds(policy: Policy, meta: Mapping[str, Any]) -> frozenset[str]:
    """Kinds of checks that `policy` looks at on the model of a collection."""
    cues = CueSpec(**json.loads(meta["binds"]["cues"]))
    return wanted_kinds(policy, cues.primary, cues.offered)


def refuse_other_kinds(policy: Policy, meta: Mapping[str, Any], what: str) -> None:
    """Checks of one kind move those of another (they keep a distance), so the kinds must be the very same.

    Raises:
        ValueError: the policy looks at other kinds than were collected, naming both.
    """
    live = live_kinds(policy, meta)
    if live != set(meta["kinds"]):
        raise ValueError(
            f"{policy!r} looks at {', '.join(sorted(live)) or 'no'} checks of this model, but {what} holds "
            f"{', '.join(sorted(meta['kinds']))} checks, which do not replay it: collect those kinds into another file"
        )


def subjects(out: str | os.PathLike[str], traces: Sequence[Trace]) -> dict[str, str]:
    """By the question id of a collection's traces, what they are about: their question, or that of the run whose call
    they are.
    """
    runs: dict[str, str] = {}
    told = Path(out).with_name(RUNS)
    if read_meta(out).get("of_runs") and told.exists():
        runs = {line["id"]: line["question"] for line in read_lines(told, json.loads)}
    found = {}
    for trace in traces:
        name = str(trace.question_id)
        found[name] = runs.get(name.rpartition("/")[0]) or trace.question or name
    return found


def refuse_learned(policy: Policy, meta: Mapping[str, Any], questions: Collection[str]) -> None:
    """Refuse to judge a policy that reads a probe on questions that the probe has learned from.

    Args:
        policy: to be judged.
        meta: of the collection, see `read_meta`.
        questions: texts of its questions, see `subjects`.

    Raises:
        ValueError: some are, so that the policy would look better than it is.
    """
    learned = frozenset(meta.get("learned", ())) if "p_safe" in policy.needs else frozenset()
    known = {question for question in questions if mark(question) in learned}
    if known:
        raise ValueError(
            f"the probe has learned from {len(known)} of these questions ({min(known)[:60]!r}, say), so on them "
            f"{policy!r} looks better than it is: collect others, or train the probe on others"
        )


def read_states(out: str | os.PathLike[str]) -> dict[str, States]:
    """Hidden states by question id, each [checks, positions, layers, width]: `probe.POSITIONS`, and the meta's depths.

    Questions without a check have none.
    """
    from safetensors import safe_open

    found: dict[str, States] = {}
    for shard in _shards(_features_path(_traces_path(out))):
        with safe_open(shard, framework="numpy") as file:
            ids: list[str] = json.loads(file.metadata()["question_ids"])
            parts = np.split(file.get_tensor("states"), np.cumsum(file.get_tensor("checks"))[:-1])
        found |= dict(zip(ids, parts, strict=True))
    return found


def _traces_path(out: str | os.PathLike[str]) -> Path:
    path = Path(out)
    if path.suffix != ".jsonl":
        raise ValueError(f"a collection is named by its traces, a file ending in .jsonl; got {os.fspath(out)!r}")
    return path


def _features_path(path: Path) -> Path:
    return path.with_suffix(".features")


def _shards(folder: Path) -> Sequence[Path]:
    return sorted(folder.glob("*.safetensors"))
