"""All ways to stop, side by side and live, on held-out questions of the bundled model's problem maker.

Chains of the train split teach LYNX's probe, the dev split chooses every setting, and the test split is only reported
on. Two processes share the work. What is done is kept under `runs/`: an interrupted run goes on where it was.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Final

from langchain_earlyexit.chat_models import ChatEarlyExit
from langchain_earlyexit.cues import CueSpec
from langchain_earlyexit.lab.collect import collect, read_meta
from langchain_earlyexit.lab.datasets import Question, load
from langchain_earlyexit.lab.evaluate import TOLERANCE, codestop_curves, evaluate, told_agreement
from langchain_earlyexit.lab.live import FULL, NO_THINKING, Arm, Live, answer, arm_of, capped
from langchain_earlyexit.lab.paths import path_of
from langchain_earlyexit.lab.replays import Collection, choose, curve
from langchain_earlyexit.lab.table import Evaluation
from langchain_earlyexit.policies import (
    DEER,
    EAT,
    LYNX,
    AnswerConvergence,
    CoDEStop,
    Never,
    Policy,
    ThinkBrake,
    wanted_kinds,
)
from langchain_earlyexit.probe import Probe

BUDGETS: Final = (16, 32, 48, 64, 96, 128, 160, 200, 250)
"""Caps on thinking tokens, set beforehand: about 0.1 to 1 times the length of the bundled model's chains."""

SEEDS: Final = {"train": 5, "dev": 6, "test": 7}
"""Of the questions, and of their sampling. Others than the card's."""

_TAUS: Final = (1.0, 2.0, 3.5, 6.0, 12.0, 1000.0)


def candidates() -> dict[str, tuple[Policy, ...]]:
    """What the dev split chooses from, by policy; fixed before any question was asked."""
    together = path_of(CoDEStop())
    apart = (replace(policy, tau=tau) for policy in together for tau in _TAUS if isinstance(policy, CoDEStop))
    settled = (path_of(EAT(alpha=alpha, min_checks=least)) for alpha in (0.1, 0.3) for least in (2, 3, 4))
    return {
        "DEER": path_of(DEER()),
        "CoDE-Stop": (*together, *apart),
        "LYNX": path_of(LYNX()),
        "AnswerConvergence": path_of(AnswerConvergence()),
        "ThinkBrake": path_of(ThinkBrake()),
        "EAT": tuple(policy for path in settled for policy in path),
    }


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        questions: of the test split.
        dev: of the dev split.
        chains: of the train split, for the probe.
        model: as for `ChatEarlyExit`.
        budgets: fixed caps to run.
        tolerance: accuracy on dev that a setting may cost.
        search: try many heads for the probe, not the paper's alone.
        draft: also Chain-of-Draft's prompt, for a model that can follow it. The bundled one cannot.
        runs: where what is done is kept.
    """

    questions: int = 2000
    dev: int = 2000
    chains: int = 5000
    model: str = "pocket"
    budgets: tuple[int, ...] = BUDGETS
    tolerance: float = TOLERANCE
    search: bool = False
    draft: bool = False
    runs: Path = Path("runs/headline")

    def of(self, split: str) -> list[Question]:
        """The questions of a split."""
        count = {"train": self.chains, "dev": self.dev, "test": self.questions}[split]
        return load("pocket", split, count, SEEDS[split])


@dataclass(frozen=True)
class _Task:
    """A pass over the questions of a split, as a process of its own can run it."""

    plan: Plan
    split: str
    out: Path
    probe: Path | None = None

    def llm(self) -> ChatEarlyExit:
        return ChatEarlyExit(model=self.plan.model, probe=None if self.probe is None else str(self.probe))

    def collect(self, kinds: frozenset[str] | None, depths: tuple[float, ...] | None) -> Path:
        with self.llm() as llm:
            collect(llm, self.plan.of(self.split), self.out, kinds=kinds, depths=depths, seed=SEEDS[self.split])
        return self.out

    def answer(self, arm: Arm) -> Live:
        with self.llm() as llm:
            return answer(llm, self.plan.of(self.split), arm, self.out, seed=SEEDS[self.split])


def headline(plan: Plan) -> Evaluation:
    """Run it all, or what of it is not done yet."""
    start = time.monotonic()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one busy thread per process is faster than two that wait
    with ChatEarlyExit(model=plan.model) as llm:
        bound = llm.load()
        cues, weights = bound.cues, bound.fingerprint["weights"]
    folder = plan.runs / f"{_slug(weights)[:16]}-{plan.chains}-{plan.dev}-{plan.questions}"
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        run = _Runner(plan, folder, pool)
        chains = run.collect("train", "train", None, None)
        arms = _fixed(plan)
        live = [run.live(arm) for arm in arms]
        dev = {kinds: run.collect("dev", "-".join(["dev", *sorted(kinds)]), kinds, ()) for kinds in _kinds_apart(cues)}
        probe, about_probe = _probe(plan, chains.result(), folder)
        dev[cues.primary] = run.collect("dev", f"dev-{probe.name}", None, (), probe)
        on_test = run.collect("test", f"test-{probe.name}", None, (), probe)
        chosen = _choose(plan, cues, {kinds: future.result() for kinds, future in dev.items()})
        arms += [Arm(f"{name}, chosen", policy) for name, policy in chosen.items()]
        live += [run.live(arm, probe) for arm in arms[len(live) :]]
        done = [future.result() for future in live]
        test = Collection.read(on_test.result())
    replayable = [(found, arm.policy) for arm, found in zip(arms, done, strict=True) if _replays(arm, cues)]
    policies = [curve(test, name, path_of(policy), f"{name} on test") for name, policy in _drawn().items()]
    remarks = [
        f"{name}: no setting that leaves early is cheaper on dev at that accuracy, so it thinks to the end."
        for name, policy in chosen.items()
        if policy == Never()
    ]
    remarks += [*told_agreement(test, replayable), *about_probe]
    if not plan.draft:
        remarks.append(
            "Chain-of-Draft is not in the table: the bundled model was not taught to follow a prompt about style, and "
            "would show nothing. `--draft` runs it, alone and with CoDE-Stop, on a model that can."
        )
    return evaluate(
        test,
        {},
        done,
        [*policies, *codestop_curves(test, "CoDE-Stop on test")],
        about={
            "settings": f"chosen on {plan.dev} dev questions: fewest tokens at an accuracy at most "
            f"{100 * plan.tolerance:g} points below full thinking",
            "probe": f"trained on {plan.chains} chains of the train split",
            "time": "of 1,000 questions, 64 at once, in one of two processes that share the machine; "
            f"{(time.monotonic() - start) / 60:.0f} minutes for this run",
        },
        remarks=remarks,
    )


@dataclass(frozen=True)
class _Runner:
    plan: Plan
    folder: Path
    pool: ProcessPoolExecutor

    def collect(
        self,
        split: str,
        name: str,
        kinds: frozenset[str] | None,
        depths: tuple[float, ...] | None,
        probe: Path | None = None,
    ) -> Future[Path]:
        out = self.folder / f"{name}.jsonl"
        return self.pool.submit(_Task(self.plan, split, out, probe).collect, kinds, depths)

    def live(self, arm: Arm, probe: Path | None = None) -> Future[Live]:
        out = self.folder / "live" / f"{_slug(f'{arm.name} {arm.told}')}.jsonl"
        reads = "p_safe" in arm.policy.needs
        return self.pool.submit(_Task(self.plan, "test", out, probe if reads else None).answer, arm)


def _fixed(plan: Plan) -> list[Arm]:
    """Arms that nothing is chosen for."""
    arms = [FULL, NO_THINKING, *map(capped, plan.budgets)]
    arms += [Arm("DEER, paper's default", DEER()), Arm("CoDE-Stop, paper's defaults", CoDEStop())]
    return arms + ([arm_of(draft=True), arm_of(CoDEStop(), draft=True)] if plan.draft else [])


def _replays(arm: Arm, cues: CueSpec) -> bool:
    """Whether the test collection, made at the model's own decision points, replays this arm."""
    within = wanted_kinds(arm.policy, cues.primary, cues.offered) <= cues.primary
    return arm.budget is None and arm.system is None and within


def _drawn() -> Mapping[str, Policy]:
    """Policies whose curve is drawn, CoDE-Stop's own aside."""
    return {"DEER": DEER(), "LYNX": LYNX()}


def _kinds_apart(cues: CueSpec) -> list[frozenset[str]]:
    """Kinds of checks that some candidates look at and the model's own decision points are not."""
    wanted = {wanted_kinds(path[-1], cues.primary, cues.offered) for path in candidates().values()}
    return sorted(wanted - {cues.primary}, key=sorted)


def _choose(plan: Plan, cues: CueSpec, dev: Mapping[frozenset[str], Path]) -> dict[str, Policy]:
    read = {kinds: Collection.read(path) for kinds, path in dev.items()}
    found = {}
    for name, path in candidates().items():
        kinds = wanted_kinds(path[-1], cues.primary, cues.offered)
        found[name] = choose(read[kinds], path, plan.tolerance, f"choosing {name}")
    return found


def _probe(plan: Plan, chains: Path, folder: Path) -> tuple[Path, Sequence[str]]:
    """The probe's directory, trained if it is not there, and what is told of it."""
    from langchain_earlyexit.lab.train import search, train

    where = folder / ("probe-searched" if plan.search else "probe")
    if not where.exists():
        heads = search(len(read_meta(chains)["depths"])) if plan.search else None
        found, _ = train(chains, heads=heads, told=print)
        found.save(folder / "probe.part").rename(where)
    told = Probe.load(where).about["report"]
    areas = [told[name]["all_checks"] for name in ("probe", "trial_confidence")]
    head = told["chosen"]
    return where, [
        f"LYNX's probe: layers {head['layers']} of those collected, at the {head['position']} token, hidden widths "
        f"{head['hidden']}. On train-split questions kept from it, its AUROC for the answer of full thinking is "
        f"{areas[0]:.3f}, that of trial confidence {areas[1]:.3f}."
    ]


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-").lower()
