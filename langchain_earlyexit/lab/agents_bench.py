"""What budgeting step by step is worth: problems of several steps, planned and solved by graphs, under five regimes.

Every regime sees the same held-out problems with the same seeds, so differences are paired by problem. Tokens are net
reasoning: all that is computed beyond prompts and answers, trials and dropped tokens included. The flat budget is one
cap on every call, set so that its tokens come out as those of the per-step confidence. Where rules and probes come
from: `agents_rules`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Final, Self

from langgraph.graph.state import CompiledStateGraph
from tqdm import tqdm

from langchain_earlyexit.answers import BOXED
from langchain_earlyexit.cascade import create_cascade
from langchain_earlyexit.chat_models import ChatEarlyExit
from langchain_earlyexit.fingerprint import refuse_mismatch
from langchain_earlyexit.lab.agents_rules import Sizes, StepRules, prepare
from langchain_earlyexit.lab.learn_then_test import upper_bound
from langchain_earlyexit.lab.lines import mended
from langchain_earlyexit.lab.node_rules import Rule
from langchain_earlyexit.lab.statistics import paired_bootstrap
from langchain_earlyexit.lab.table import saved
from langchain_earlyexit.plan_and_solve import create_plan_and_solve
from langchain_earlyexit.pocket.plans import MAX_STEPS, PlanProblem, right_plan, sample_plans
from langchain_earlyexit.policies import Never, Policy
from langchain_earlyexit.record import KEY

NO_CONTROL: Final = "no control"
FLAT: Final = "flat budget"
PER_STEP: Final = "per-step confidence"
ESCALATING: Final = "per-step confidence, escalating"
CERTIFIED: Final = "per-step confidence, certified"

_CHUNK: Final = 50
"""Problems after which the next regime has its turn: a machine that slows down slows all but the flat budget alike,
whose cap is known last."""

_AGAIN: Final = 1_000_003
"""Added to the seed of a step that is thought through again: with the same one it would think the same."""


@dataclass(frozen=True)
class Models:
    """One model, with the probe for plans and the one for steps where policies read one."""

    planner: ChatEarlyExit
    solver: ChatEarlyExit


@dataclass(frozen=True)
class Solved:
    """One problem under one regime."""

    answer: str | None
    right: bool
    right_plan: bool
    calls: tuple[tuple[int, int], ...]
    """Thinking tokens and net reasoning tokens of each call."""
    error: str | None = None
    """Why it could not be finished: results so long that the model's context does not hold them. It counts as wrong."""

    @property
    def reasoning(self) -> int:
        """Net reasoning tokens of the run."""
        return sum(reasoning for _, reasoning in self.calls)

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `asdict`, from JSON."""
        return cls(**{**data, "calls": tuple((thinking, reasoning) for thinking, reasoning in data["calls"])})


@dataclass(frozen=True)
class Bench:
    """All regimes on the same problems, in the same order; seconds are wall-clock for all of a regime's problems."""

    model: str
    problems: tuple[PlanProblem, ...]
    solved: Mapping[str, tuple[Solved, ...]]
    seconds: Mapping[str, float]
    cap: int
    rules: StepRules


def regimes_of(rules: StepRules) -> tuple[str, ...]:
    """What there are rules for."""
    return (NO_CONTROL, FLAT, PER_STEP, ESCALATING, *(() if rules.certified is None else (CERTIFIED,)))


def graph_of(
    regime: str, models: Models, seed: int, rules: StepRules, *, cap: int | None = None
) -> CompiledStateGraph[Any, Any, Any, Any]:
    """The graph of a regime, whose calls have this seed.

    Args:
        regime: one of `regimes_of(rules)`.
        models: that plan and solve.
        seed: of every call, second tries aside.
        rules: of the per-step regimes.
        cap: thinking tokens of each call, for the flat budget.
    """

    def asked(llm: ChatEarlyExit, policy: Policy, **more: Any) -> Any:
        # Many problems share each forward pass, so a chain that waits for its trial answer idles nothing; one that
        # thinks on meanwhile throws those tokens away when it leaves.
        return llm.bind(**{"exit_policy": policy, "seed": seed, "look": "wait", **more})

    if regime == FLAT:
        return create_plan_and_solve(asked(models.solver, Never(), thinking_budget=cap), max_steps=MAX_STEPS)
    certified: Rule = {} if rules.certified is None else rules.certified.rule
    rule = {NO_CONTROL: {}, CERTIFIED: certified}.get(regime, rules.rule)
    solver = asked(models.solver, rule.get("step", Never()))
    if regime == ESCALATING:
        first = asked(models.solver, rules.quick, include_checks=True)
        second = asked(models.solver, Never(), seed=seed + _AGAIN)
        solver = create_cascade(first, second, threshold=rules.doubt)
    return create_plan_and_solve(
        asked(models.solver, Never()),
        planner=asked(models.planner, rule.get("plan", Never())),
        solver=solver,
        max_steps=MAX_STEPS,
    )


def measure(
    models: Models,
    rules: StepRules,
    questions: int = 500,
    *,
    width: int = 32,
    seed: int = 0,
    kept: Path | None = None,
    progress: bool = True,
) -> Bench:
    """Run all regimes.

    Args:
        models: of the pocket's kind: they must plan as `create_plan_and_solve` asks.
        rules: of the per-step regimes.
        questions: held-out problems of three to six dependent steps.
        width: problems in flight.
        seed: draws the problems; problem i runs with seed + i.
        kept: a folder in which what is done is kept, for a measurement that goes on where it was interrupted.
        progress: show a bar.

    Raises:
        ValueError: the folder holds another measurement.
    """
    problems = tuple(sample_plans("test", questions, seed))
    regimes = regimes_of(rules)
    done = _Done(kept, regimes, _measured(models, rules, questions, seed))
    models.planner.load()  # its time is no regime's
    models.solver.load()

    async def run(regime: str, start: int, cap: int | None) -> list[Solved]:
        turns = asyncio.Semaphore(width)

        async def one(index: int) -> Solved:
            async with turns:
                problem = problems[index]
                graph = graph_of(regime, models, seed + index, rules, cap=cap)
                last: dict[str, Any] = {}
                error = None
                try:
                    async for state in graph.astream({"messages": [("user", problem.story)]}, stream_mode="values"):
                        last = state
                except ValueError as told:
                    error = str(told)
                return judged(problem, last, error)

        return await asyncio.gather(*(one(i) for i in range(start, min(start + _CHUNK, questions))))

    def turn(regime: str, start: int, cap: int | None = None) -> None:
        if start >= len(done.solved[regime]):
            begun = time.perf_counter()
            found = asyncio.run(run(regime, start, cap))
            done.add(regime, found, time.perf_counter() - begun)
        bar.update(min(_CHUNK, questions - start))

    with tqdm(total=len(regimes) * questions, disable=not progress, desc="problems") as bar:
        for place, start in enumerate(range(0, questions, _CHUNK)):
            others = [regime for regime in regimes if regime != FLAT]
            turned = place % len(others)
            for regime in others[turned:] + others[:turned]:
                turn(regime, start)
        tokens = sum(one.reasoning for one in done.solved[PER_STEP])
        cap = equal_cap(done.solved[NO_CONTROL], tokens, _closing_cost(models.solver))
        for start in range(0, questions, _CHUNK):
            turn(FLAT, start, cap)
    rows = {regime: tuple(found) for regime, found in done.solved.items()}
    return Bench(models.solver.model, problems, rows, done.seconds, cap, rules)


def _measured(models: Models, rules: StepRules, questions: int, seed: int) -> dict[str, str]:
    certified: Rule = {} if rules.certified is None else rules.certified.rule
    facts: dict[str, Any] = {"rule": rules.rule, "quick": rules.quick, "doubt": rules.doubt, "certified": certified}
    facts["probes"] = {node: probe.digest for node, probe in sorted((rules.probes or {}).items())}
    more = {"questions": questions, "seed": seed, "weights": models.solver.load().fingerprint["weights"]}
    return {name: repr(value) for name, value in {**facts, **more}.items()}


class _Done:
    """What has been measured, by regime; in a folder too, a line for each chunk of problems."""

    def __init__(self, folder: Path | None, regimes: Sequence[str], measured: Mapping[str, str]) -> None:
        self.folder = folder
        self.solved: dict[str, list[Solved]] = {regime: [] for regime in regimes}
        self.seconds = dict.fromkeys(regimes, 0.0)
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        meta = folder / "measured.json"
        if meta.exists():
            refuse_mismatch(f"the measurement in {folder}", json.loads(meta.read_text(encoding="utf-8")), measured)
        else:
            meta.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
        for regime in regimes:
            for line in mended(self._path(folder, regime), json.loads):
                self.solved[regime] += map(Solved.of, line["solved"])
                self.seconds[regime] += line["seconds"]

    def add(self, regime: str, found: Sequence[Solved], seconds: float) -> None:
        self.solved[regime] += found
        self.seconds[regime] += seconds
        if self.folder is not None:
            line = json.dumps({"seconds": seconds, "solved": [asdict(one) for one in found]}, ensure_ascii=False)
            with self._path(self.folder, regime).open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    @staticmethod
    def _path(folder: Path, regime: str) -> Path:
        return folder / f"{regime.replace(', ', '-').replace(' ', '-')}.jsonl"


def judged(problem: PlanProblem, done: Mapping[str, Any], error: str | None = None) -> Solved:
    """What a finished run is worth, or one that came to an error."""
    answer = None if error else BOXED.extract(done["messages"][-1].text)
    work = done.get("work", [])
    return Solved(
        answer=answer,
        right=BOXED.same(answer, problem.answer),
        right_plan=bool(work) and right_plan(problem, work[0].text),
        calls=tuple((spend["thinking"], spend["reasoning"]) for spend in done.get("ledger", {}).values()),
        error=error,
    )


def equal_cap(uncapped: Sequence[Solved], tokens: int, closing: int) -> int:
    """The highest cap on every call at which `uncapped` would have cost at most `tokens`; 1 where none does.

    Args:
        uncapped: runs without control.
        tokens: net reasoning tokens, in all.
        closing: forced tokens of a call that a cap ends.
    """
    lengths = [thinking for one in uncapped for thinking, _ in one.calls]

    def cost(cap: int) -> int:
        return sum(length if length <= cap else cap + closing for length in lengths)

    # Closing a call has a price too, so a higher cap can cost less.
    return max((cap for cap in range(1, max([1, *lengths]) + 1) if cost(cap) <= tokens), default=1)


def _closing_cost(llm: ChatEarlyExit) -> int:
    record = llm.invoke("What is 86 * 7?", thinking_budget=1, exit_policy=Never()).response_metadata[KEY]
    return int(record["forced_tokens"])


def markdown(bench: Bench) -> str:
    """The table, with 95 % intervals of differences paired by problem, and what it was measured on."""
    base, flat = bench.solved[NO_CONTROL], bench.solved[FLAT]
    count = len(bench.problems)
    lines = [
        "By `make bench-agents`; differences in points, with 95 % intervals, paired by problem.",
        "",
        f"{bench.model}, {count} held-out problems of 3 to 6 dependent steps; flat budget: {bench.cap} thinking tokens "
        "a call.",
        "",
        "| regime | solved | against no control | against flat | right plans | reasoning tokens | saved | other answer "
        "| calls | s per 100 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for regime in bench.solved:
        rows = bench.solved[regime]
        tokens = [one.reasoning for one in rows]
        cells = [
            regime,
            f"{100 * fmean(one.right for one in rows):.1f} %",
            _gap(rows, base, lambda one: one.right),
            _gap(rows, flat, lambda one: one.right),
            f"{100 * fmean(one.right_plan for one in rows):.1f} %",
            f"{fmean(tokens):.0f}",
            _saved(tokens, [one.reasoning for one in base]),
            f"{100 * fmean(not BOXED.same(a.answer, b.answer) for a, b in zip(rows, base, strict=True)):.1f} %",
            f"{fmean(len(one.calls) for one in rows):.2f}",
            f"{100 * bench.seconds[regime] / count:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for regime, rows in bench.solved.items():
        errors = [one.error for one in rows if one.error]
        if errors:
            lines += [
                "",
                f"{regime}: {len(errors)} runs came to an error and count as not solved, such as: {errors[0]}",
            ]
    if CERTIFIED in bench.solved:
        lines += ["", _risk(bench.solved[CERTIFIED], base)]
    for told in bench.rules.told:
        lines += ["", told]
    return "\n".join(lines)


def _gap(ours: Sequence[Solved], theirs: Sequence[Solved], value: Callable[[Solved], float]) -> str:
    if ours is theirs:
        return "-"
    mean, low, high = paired_bootstrap([value(one) for one in ours], [value(one) for one in theirs])
    return f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def _saved(ours: Sequence[int], theirs: Sequence[int]) -> str:
    if list(ours) == list(theirs):
        return "-"
    found = saved(ours, theirs)
    return f"{100 * found.mean:.1f} % [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def _risk(rows: Sequence[Solved], base: Sequence[Solved]) -> str:
    """What became of the certified regime's promise on problems it was not certified on."""
    changed = sum(not BOXED.same(a.answer, b.answer) for a, b in zip(rows, base, strict=True))
    count = len(rows)
    whole = sum(one.reasoning for one in base)
    saved = 1 - sum(one.reasoning for one in rows) / whole if whole else 0.0
    return (
        f"Certified: {changed} of {count} runs came to another answer ({100 * changed / count:.1f} %, below "
        f"{100 * upper_bound(changed, count, 0.05):.1f} % with confidence 95 %), with {100 * saved:.1f} % fewer "
        "reasoning tokens."
    )


def main(
    questions: int = 500,
    *,
    model: str = "pocket",
    sizes: Sizes | None = None,
    width: int = 32,
    seed: int = 0,
    runs: Path = Path("runs/agents"),
    out: Path | None = None,
) -> None:
    """Prepare the rules, measure, print the table, and write it to `out` if given. An interrupted run goes on.

    Args:
        questions: how many problems to report on.
        model: as for `ChatEarlyExit`.
        sizes: of the preparation.
        width: problems in flight.
        seed: draws the problems and the chains of thought.
        runs: a folder in which what is done is kept; for one model.
        out: a Markdown file.
    """
    with ExitStack() as stack:
        llm = stack.enter_context(ChatEarlyExit(model=model))
        rules = prepare(llm, runs, sizes or Sizes(), seed=seed)
        probes = rules.probes or {}
        planner, solver = (
            stack.enter_context(ChatEarlyExit(model=model, probe=probes.get(node))) for node in ("plan", "step")
        )
        found = measure(Models(planner, solver), rules, questions, width=width, seed=seed, kept=runs / "test")
        table = markdown(found)
    print(table)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(table + "\n", encoding="utf-8")
