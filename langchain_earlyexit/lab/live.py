"""Questions answered as a user would have them answered: what replay cannot know, such as time and fixed budgets.

A run is resumable: a line of JSON (an `Outcome`) per question in `x.jsonl`, and `x.meta.json` with what ran and how
long it took. Question i has the seed that `collect` gives it, so runs, replays and each other's answers pair up.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from langchain_core.messages import AIMessage
from tqdm import tqdm

from langchain_earlyexit.chat_models import ChatEarlyExit
from langchain_earlyexit.fingerprint import refuse_mismatch
from langchain_earlyexit.lab.collect import AT_ONCE, Asked, in_form, messages_of, seed_of
from langchain_earlyexit.lab.lines import mended, meta_path
from langchain_earlyexit.lab.outcomes import Outcome, read_outcomes
from langchain_earlyexit.policies import Never, Policy
from langchain_earlyexit.record import COUNTS, KEY

_FORMAT = 1

DRAFT_PROMPT: Final = (
    "Think step by step, but write only a short draft of each step, five words at most. Then give the answer."
)
"""Chain-of-Draft (arXiv 2502.18600), in words of our own. Only for models that follow a prompt about style."""


@dataclass(frozen=True)
class Arm:
    """One way to answer.

    Attributes:
        name: for people, and for the file it is kept in.
        policy: when thinking ends.
        budget: cap on thinking tokens; None for none, 0 for no thinking.
        system: a system prompt, or None.
    """

    name: str
    policy: Policy = field(default_factory=Never)
    budget: int | None = None
    system: str | None = None

    @property
    def told(self) -> str:
        """Its settings, in short."""
        parts = [] if self.budget is None else [f"thinking_budget={self.budget}"]
        parts += ["system prompt"] if self.system is not None else []
        return " + ".join([repr(self.policy), *parts] if self.policy != Never() or not parts else parts)


FULL: Final = Arm("full thinking")
NO_THINKING: Final = Arm("no thinking", budget=0)


def capped(budget: int) -> Arm:
    """Thinking cut at a fixed number of tokens."""
    return Arm(f"budget of {budget}", budget=budget)


def arm_of(policy: Policy | None = None, budget: int | None = None, draft: bool = False) -> Arm:
    """The arm of these settings, with a name for them."""
    known = FULL if budget is None else NO_THINKING if budget == 0 else capped(budget)
    if policy is not None:
        known = Arm(repr(policy) if budget is None else f"{policy!r}, {known.name}", policy, budget)
    if draft:
        named = "Chain-of-Draft" if known == FULL else f"Chain-of-Draft, {known.name}"
        known = replace(known, name=named, system=DRAFT_PROMPT)
    return known


@dataclass(frozen=True)
class Live:
    """A run that is done.

    Attributes:
        arm: its name.
        policy: its settings.
        budget: its cap, None for none.
        outcomes: one per question asked for, those aside that cannot be asked.
        seconds, cpu_seconds: wall-clock and processor time of the process per 1,000 questions, loading aside; None
            where the run was killed and nothing timed.
    """

    arm: str
    policy: str
    budget: int | None
    outcomes: tuple[Outcome, ...]
    seconds: float | None
    cpu_seconds: float | None = None


def answer(
    llm: ChatEarlyExit,
    questions: Sequence[Asked],
    arm: Arm,
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    at_once: int = AT_ONCE,
    progress: bool = True,
    **settings: Any,
) -> Live:
    """Answer every question once, and append its outcome to `out`. Questions that are in it already are not asked.

    Args:
        llm: the model.
        questions: each with an id of its own.
        arm: how.
        out: a file ending in ".jsonl".
        seed: question i is sampled with a seed made of this one and its id, as `collect` does.
        at_once: questions in flight.
        progress: show a bar with the time left.
        **settings: more of a call of `llm`, such as temperature, alike for all arms that are compared.

    Raises:
        ValueError: a file that was written with other settings; no question that can be asked so.
    """
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = _meta(llm, arm, seed, settings)
    before = _meta_of(path)
    if before is not None:
        refuse_mismatch(f"the run {path}", before["made"], meta["made"])
        meta = before
    known = {outcome.question_id for outcome in mended(path, Outcome.from_json)}
    left = [question for question in questions if question.id not in known]
    meta_path(path).write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    if left:
        start, cpu, done = time.monotonic(), time.process_time(), 0
        try:
            with path.open("a", encoding="utf-8") as file:

                def write(outcome: Outcome) -> None:
                    nonlocal done
                    file.write(outcome.to_json() + "\n")
                    file.flush()
                    done += 1

                asyncio.run(_answer_all(llm, left, arm, seed, at_once, progress, settings, write))
        finally:
            meta["seconds"] += time.monotonic() - start
            meta["cpu_seconds"] += time.process_time() - cpu
            meta["timed"] += done
            meta_path(path).write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    return read_live(path, {question.id for question in questions})


def read_live(path: str | os.PathLike[str], only: set[str] | None = None) -> Live:
    """A run from its files. `only`: outcomes of these questions.

    Raises:
        FileNotFoundError: no such run.
        ValueError: files of another kind.
    """
    meta = _meta_of(Path(path))
    if meta is None:
        raise FileNotFoundError(f"{meta_path(Path(path))} is missing: {path} is no live run")
    outcomes = tuple(o for o in read_outcomes(path) if only is None or o.question_id in only)
    wall, cpu = (1000 * meta[name] / meta["timed"] if meta["timed"] else None for name in ("seconds", "cpu_seconds"))
    return Live(meta["arm"], meta["made"]["policy"], meta["budget"], outcomes, wall, cpu)


async def _answer_all(
    llm: ChatEarlyExit,
    questions: Sequence[Asked],
    arm: Arm,
    seed: int,
    at_once: int,
    progress: bool,
    settings: Mapping[str, Any],
    write: Any,
) -> None:
    slots = asyncio.Semaphore(at_once)
    call = {**settings, "exit_policy": arm.policy, "thinking_budget": arm.budget}
    chosen = llm.call_settings(**call)
    bound = llm._bind(chosen)
    refused: list[ValueError] = []
    with tqdm(total=len(questions), desc=arm.name, unit="q", disable=not progress) as bar:

        async def one(question: Asked) -> None:
            messages = messages_of(question, arm.system)
            try:
                asked = in_form(chosen, question)
                form = bound.request(messages, asked).form
            except ValueError as error:  # this question cannot be asked; the others can
                refused.append(error)
                bar.write(f"{question.id} is left out: {error}", file=sys.stderr)
                bar.update()
                return
            async with slots:
                how = {**call, "answer_form": asked.answer_form, "seed": seed_of(seed, question.id)}
                message = await llm.ainvoke(messages, **how)
            write(_outcome(question, form.extract(message.text), message, seed_of(seed, question.id)))
            bar.update()

        await asyncio.gather(*(one(question) for question in questions))
    if len(refused) == len(questions):  # not the questions are at fault then
        raise refused[0]


def _outcome(question: Asked, found: str | None, message: AIMessage, seed: int) -> Outcome:
    record = message.response_metadata[KEY]
    return Outcome(
        question_id=question.id,
        answer=found,
        gold=question.answer,
        reason=record["reason"],
        **{count: record[count] for count in COUNTS},
        seed=seed,
    )


def _meta(llm: ChatEarlyExit, arm: Arm, seed: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    bound = llm.load()
    made = {
        **bound.fingerprint,
        "probe": "none" if bound.probe is None or "p_safe" not in arm.policy.needs else bound.probe.digest,
        "policy": arm.told,
        "system": str(arm.system),
        "seed": str(seed),
        "settings": repr(sorted(settings.items())),
    }
    return {
        "format": _FORMAT, "arm": arm.name, "budget": arm.budget, "model": llm.model, "made": made,
        "seconds": 0.0, "cpu_seconds": 0.0, "timed": 0,
    }  # fmt: skip


def _meta_of(path: Path) -> dict[str, Any] | None:
    where = meta_path(path)
    if not where.exists():
        return None
    meta: dict[str, Any] = json.loads(where.read_text(encoding="utf-8"))
    if meta.get("format") != _FORMAT or "arm" not in meta:
        raise ValueError(f"{where} is not of a live run of this version")
    return meta
