"""All ways to stop, side by side and live, on held-out questions of the bundled model's problem maker.

Chains of the train split teach LYNX's probe, the dev split chooses every setting, and the test split is only reported
on. Two processes share the work. What is done is kept under `runs/`: an interrupted run goes on where it was, also with
fewer questions.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Final

from langchain_earlyexit.chat_models import ChatEarlyExit
from langchain_earlyexit.cues import CueSpec
from langchain_earlyexit.lab.collect import read_meta
from langchain_earlyexit.lab.crew import Asking, Crew, Pass, slug
from langchain_earlyexit.lab.datasets import Question
from langchain_earlyexit.lab.evaluate import TOLERANCE, codestop_curves, evaluate, told_agreement
from langchain_earlyexit.lab.live import FULL, NO_THINKING, Arm, Live, arm_of, capped
from langchain_earlyexit.lab.overhead import overhead
from langchain_earlyexit.lab.paths import path_of
from langchain_earlyexit.lab.replays import Collection, choose, curve, ranks
from langchain_earlyexit.lab.table import Aside, Evaluation
from langchain_earlyexit.pocket.problems import Split, sample
from langchain_earlyexit.policies import (
    DEER,
    EAT,
    LYNX,
    AnswerConvergence,
    CoDEStop,
    FirstOf,
    GiveUp,
    Never,
    Policy,
    ProbeThenTrial,
    ThinkBrake,
    wanted_kinds,
)
from langchain_earlyexit.probe import Probe

if TYPE_CHECKING:
    from langchain_earlyexit.lab.train import Head

BUDGETS: Final = (16, 32, 64, 96, 128, 160)
"""Caps on thinking tokens, set beforehand: about 0.1 to 0.8 times the length of the bundled model's chains."""

SEEDS: Final = {"train": 5, "dev": 6, "test": 7}
"""Of the questions, and of their sampling. Others than the card's."""

TEMPERATURES: Final = (0.0, 1.0)
"""Of chains that judge the probe where it was not trained; they are of the dev split."""

GROUPS: Final[Mapping[str, str]] = {
    **dict.fromkeys(("add2", "add3", "sub", "small"), "sums"),
    **dict.fromkeys(("mul21", "mul31", "mul22"), "products"),
    **dict.fromkeys(("lin", "two"), "several operations"),
    **dict.fromkeys(("rem", "cmp", "seq"), "remainders, comparisons, sequences"),
}
"""Families of problems by what is left out together when the probe's transfer is measured."""

_TAUS: Final = (1.0, 2.0, 3.5, 6.0, 12.0, 1000.0)
_OWN_SIGNALS: Final = ("trial_confidence", "p_safe")
"""What the candidates at the model's own decision points read."""

_WIDEST: Final = 256
"""Hidden units times layers of the largest head that is tried: about 250 kB for the bundled model."""

_COLLECTING, _ANSWERING, _FORCED = 0.16, 0.08, 0.01
"""Seconds of a processor for one question: thought to the end and answered everywhere; answered; not thought at all.
Only the bar's reckoning hangs on them."""


def candidates() -> dict[str, tuple[Policy, ...]]:
    """What the dev split chooses from, by policy; fixed before any question was asked."""
    together = path_of(CoDEStop())
    apart = (replace(policy, tau=tau) for policy in together for tau in _TAUS if isinstance(policy, CoDEStop))
    settled = (path_of(EAT(alpha=alpha, min_checks=least)) for alpha in (0.1, 0.3) for least in (2, 3, 4))
    hopeless = [GiveUp(patience=patience, min_checks=patience) for patience in (1, 2, 3)]
    pairs = product(path_of(DEER())[1::4], (one for policy in hopeless for one in path_of(policy)[8::8]))
    staged = product((0.001, 0.003, 0.01, 0.03), (0.03, 0.1, 0.3, 0.6), (0.001, 0.003, 0.01, 0.03, 0.1))
    return {
        "DEER": path_of(DEER()),
        "CoDE-Stop": (*together, *apart),
        "LYNX": path_of(LYNX()),
        "ProbeThenTrial": (
            Never(),
            *(ProbeThenTrial(1 - sure, 1 - ask, 1 - doubt) for sure, ask, doubt in staged if sure <= ask),
        ),
        "AnswerConvergence": path_of(AnswerConvergence()),
        "ThinkBrake": path_of(ThinkBrake()),
        "EAT": tuple(policy for path in settled for policy in path),
        "GiveUp": tuple(policy for one in hopeless for policy in path_of(one)),
        "DEER or GiveUp": (Never(), *(FirstOf(sure, hopeless_one) for sure, hopeless_one in pairs)),
    }


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        questions: of the test split.
        dev: of the dev split. Policies that look elsewhere than at the model's own decision points are chosen on half
            of them: they are dear to collect for.
        chains: of the train split, for the probe.
        transfer: of the dev split, at each other temperature.
        rounds: in which the probe's price is measured.
        model: as for `ChatEarlyExit`.
        budgets: fixed caps to run.
        tolerance: accuracy on dev that a setting may cost.
        search: try many heads for the probe, not the paper's alone.
        runs: where what is done is kept.
    """

    questions: int = 2000
    dev: int = 2000
    chains: int = 5000
    transfer: int = 250
    rounds: int = 7
    model: str = "pocket"
    budgets: tuple[int, ...] = BUDGETS
    tolerance: float = TOLERANCE
    search: bool = False
    runs: Path = Path("runs/headline")

    def asking(self, split: Split, count: int | None = None) -> Asking:
        """The questions of a split; `count` of them, or all that are planned."""
        planned = {"train": self.chains, "dev": self.dev, "test": self.questions}[split]
        return Asking(self.model, split, planned if count is None else count, SEEDS[split])

    def of(self, split: Split) -> list[Question]:
        """The questions of a split."""
        return self.asking(split).questions


@dataclass(frozen=True)
class Headline:
    """What came of it.

    Attributes:
        evaluation: the table and its curves.
        probe: directory of LYNX's probe.
        dev: the collection that settings were chosen on, at the model's own decision points.
        chosen: the settings, by policy.
    """

    evaluation: Evaluation
    probe: Path
    dev: Path
    chosen: Mapping[str, Policy]


def headline(plan: Plan) -> Headline:
    """Run it all, or what of it is not done yet."""
    start = time.monotonic()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one busy thread per process is faster than two that wait
    with ChatEarlyExit(model=plan.model) as llm:
        bound = llm.load()
        cues, weights = bound.cues, bound.fingerprint["weights"]
    folder = plan.runs / slug(weights)[:16]
    folder.mkdir(parents=True, exist_ok=True)
    apart = _kinds_apart(cues)
    arms = _fixed(plan)
    with Crew.at_work(_work(plan, arms, len(apart))) as crew:
        run = _Runner(plan, folder, crew)
        chains = run.collect("train", "train", None, None, ("trial_confidence",))
        live = [run.live(arm) for arm in arms]
        dev = {
            kinds: run.collect("dev", "-".join(["dev", *sorted(kinds)]), kinds, (), needs, plan.dev // 2)
            for kinds, needs in apart.items()
        }
        hot = {
            t: run.collect("dev", f"temperature-{t:g}", None, None, ("trial_confidence",), plan.transfer, at=t)
            for t in TEMPERATURES
        }
        probe = _probe(plan, chains.result(), folder, crew)
        dev[cues.primary] = run.collect("dev", f"dev-{probe.name}", None, (), _OWN_SIGNALS, probe=probe)
        on_test = run.collect("test", f"test-{probe.name}", None, (), _OWN_SIGNALS, probe=probe)
        moved = _transfer(plan, probe, chains.result(), {t: done.result() for t, done in hot.items()}, crew)
        chosen = _choose(plan, cues, {kinds: done.result() for kinds, done in dev.items()}, crew)
        picked = [Arm(f"{name}, chosen", policy) for name, policy in chosen.items()]
        crew.spare(sum(arm.policy == Never() for arm in picked) * _price(FULL) * plan.questions)
        # What never leaves is full thinking, which has run.
        live += [run.live(arm, probe) if arm.policy != Never() else live[0] for arm in picked]
        done = [future.result() for future in live]
        test = _read(on_test.result(), plan.of("test"))
    arms += picked
    done = [replace(found, arm=arm.name) for arm, found in zip(arms, done, strict=True)]
    replayable = [(found, arm.policy) for arm, found in zip(arms, done, strict=True) if _replays(arm, cues)]
    policies = [curve(test, name, path_of(policy), f"{name} on test") for name, policy in _drawn().items()]
    evaluation = evaluate(
        test,
        {},
        done,
        [*policies, *codestop_curves(test, "CoDE-Stop on test")],
        about={
            "settings": f"chosen on {plan.dev} dev questions ({plan.dev // 2} for ThinkBrake and EAT, which look at "
            f"sentences and paragraphs): fewest tokens at an accuracy at most {100 * plan.tolerance:g} points below "
            "full thinking",
            "probe": f"trained on {Probe.load(probe).about['report']['questions']} chains of the train split",
            "time": "of 1,000 questions, 64 at once, in one of two processes that share the machine; "
            f"{(time.monotonic() - start) / 60:.0f} minutes for this run",
        },
        remarks=[
            *(
                f"{name}: no setting that leaves early is cheaper on dev at that accuracy, so it thinks to the end, "
                "and its row is that of full thinking."
                for name, policy in chosen.items()
                if policy == Never()
            ),
            "Chain-of-Draft is a system prompt. It is for models that follow a prompt about style; the bundled one was "
            "not taught to.",
            *_about_probe(probe, test),
            _overhead(plan, probe),
            *told_agreement(test, replayable),
        ],
        asides=[moved],
    )
    return Headline(evaluation, probe, dev[cues.primary].result(), chosen)


@dataclass(frozen=True)
class _Runner:
    plan: Plan
    folder: Path
    crew: Crew

    def collect(
        self,
        split: Split,
        name: str,
        kinds: frozenset[str] | None,
        depths: tuple[float, ...] | None,
        signals: Sequence[str] | None,
        count: int | None = None,
        *,
        probe: Path | None = None,
        at: float | None = None,
    ) -> Future[Path]:
        one = Pass(self.plan.asking(split, count), self.folder / f"{name}.jsonl", probe, at)
        return self.crew.collect(one, _COLLECTING, kinds, depths, signals)

    def live(self, arm: Arm, probe: Path | None = None) -> Future[Live]:
        reads = probe if "p_safe" in arm.policy.needs else None
        named = " ".join([arm.name, arm.told, *([] if reads is None else [reads.name])])
        one = Pass(self.plan.asking("test"), self.folder / "live" / f"{slug(named)}.jsonl", reads)
        return self.crew.answer(one, _price(arm), arm)


def _price(arm: Arm) -> float:
    """Seconds of a processor for one question, roughly."""
    share = 1.0 if arm.budget is None else min(1.0, arm.budget / 200)
    return _FORCED + (_ANSWERING - _FORCED) * share


def _work(plan: Plan, arms: Sequence[Arm], apart: int) -> float:
    """Seconds of a processor that all passes take, roughly."""
    collected = plan.chains + plan.dev + plan.questions + apart * (plan.dev // 2) + len(TEMPERATURES) * plan.transfer
    chosen = len(candidates()) * _price(FULL)
    return _COLLECTING * collected + plan.questions * (chosen + sum(map(_price, arms)))


def _fixed(plan: Plan) -> list[Arm]:
    """Arms that nothing is chosen for; full thinking is the first."""
    return [
        FULL,
        NO_THINKING,
        *map(capped, plan.budgets),
        arm_of(draft=True),
        replace(arm_of(CoDEStop(), draft=True), name="Chain-of-Draft, CoDE-Stop"),
        Arm("DEER, paper's default", DEER()),
        Arm("CoDE-Stop, paper's defaults", CoDEStop()),
    ]


def _replays(arm: Arm, cues: CueSpec) -> bool:
    """Whether the test collection, made at the model's own decision points, replays this arm."""
    within = wanted_kinds(arm.policy, cues.primary, cues.offered) <= cues.primary
    return arm.budget is None and arm.system is None and within


def _drawn() -> Mapping[str, Policy]:
    """Policies whose curve is drawn, CoDE-Stop's own aside."""
    return {"DEER": DEER(), "LYNX": LYNX()}


def _kinds_apart(cues: CueSpec) -> dict[frozenset[str], tuple[str, ...]]:
    """Kinds of checks that some candidates look at and the model's own decision points are not; what they read there.

    In one order, whatever the order of sets.
    """
    reads: dict[frozenset[str], set[str]] = {}
    for path in candidates().values():
        reads.setdefault(wanted_kinds(path[-1], cues.primary, cues.offered), set()).update(path[-1].needs)
    return {kinds: tuple(sorted(reads[kinds])) for kinds in sorted(reads, key=sorted) if kinds != cues.primary}


def _choose(plan: Plan, cues: CueSpec, dev: Mapping[frozenset[str], Path], crew: Crew) -> dict[str, Policy]:
    read = {kinds: _read(path, plan.of("dev")) for kinds, path in dev.items()}
    found = {}
    for name, path in candidates().items():
        kinds = wanted_kinds(path[-1], cues.primary, cues.offered)
        found[name] = choose(read[kinds], path, plan.tolerance)
        crew.say(f"{name}: {found[name]!r}")
    return found


def _read(path: Path, questions: Sequence[Question]) -> Collection:
    """What was collected of these questions: an earlier run may have asked for more."""
    wanted = {question.id for question in questions}
    found = Collection.read(path)
    return replace(found, traces=tuple(trace for trace in found.traces if trace.question_id in wanted))


# --- the probe ----------------------------------------------------------------------------------------------------


def _probe(plan: Plan, chains: Path, folder: Path, crew: Crew) -> Path:
    """The probe's directory, trained if it is not there."""
    from langchain_earlyexit.lab.train import train

    where = folder / f"probe-{plan.chains}{'-searched' if plan.search else ''}"
    if not where.exists():
        found, _ = train(chains, heads=_heads(chains) if plan.search else None, told=crew.say)
        found.save(folder / "probe.part").rename(where)
    return where


def _heads(chains: Path) -> list[Head]:
    """Heads worth trying, those aside that are too large to be bundled with the weights."""
    from langchain_earlyexit.lab.train import search

    heads = search(len(read_meta(chains)["depths"]))
    return [head for head in heads if not head.hidden or len(head.layers) * head.hidden[0] <= _WIDEST]


def _transfer(plan: Plan, probe: Path, chains: Path, hot: Mapping[float, Path], crew: Crew) -> Aside:
    """The head on families and temperatures it never saw."""
    from langchain_earlyexit.lab import unseen
    from langchain_earlyexit.lab.train import Head

    made = Probe.load(probe)
    chosen = made.about["report"]["chosen"]
    head = Head(tuple(chosen["layers"]), chosen["position"], tuple(chosen["hidden"]))
    problems = sample("train", plan.chains, SEEDS["train"])
    ids = [question.id for question in plan.of("train")]
    groups = {name: GROUPS[problem.family] for name, problem in zip(ids, problems, strict=True)}
    rows = unseen.families(chains, head, groups, told=crew.say)
    rows += unseen.temperatures(made, {f"temperature {t:g}": path for t, path in hot.items()})
    return unseen.aside(rows)


def _about_probe(where: Path, test: Collection) -> list[str]:
    told = Probe.load(where).about["report"]
    areas = [told[name]["all_checks"] for name in ("probe", "trial_confidence")]
    head = told["chosen"]
    lines = [
        f"LYNX's probe: layers {head['layers']} of those collected, at the {head['position']} token, hidden widths "
        f"{head['hidden']}, the best of {len(told['tried'])} heads. On train-split questions kept from it, its AUROC "
        f"for the answer of full thinking is {areas[0]:.3f}, that of trial confidence {areas[1]:.3f}."
    ]
    signals = ("p_safe", "trial_confidence")
    claims = {"the answer of full thinking": "same as full", "the right answer": "right"}
    found = {said: [ranks(test, signal, claim) for signal in signals] for said, claim in claims.items()}
    told_areas = "; ".join(f"for {said} {one:.3f} and {other:.3f}" for said, (one, other) in found.items())
    return [*lines, f"AUROC of the probe and of trial confidence on the checks of the test questions: {told_areas}."]


def _overhead(plan: Plan, probe: Path) -> str:
    """The probe's price, told. Nothing else of this run is at work any more."""
    questions = [question.question for question in plan.of("dev")[:64]]
    with ChatEarlyExit(model=plan.model, probe=str(probe)) as llm:
        found = [overhead(llm, questions[:n], plan.rounds, at_once=at_once) for n, at_once in ((64, 64), (6, 1))]
    return "LYNX that never leaves, against not looking: " + "; ".join(map(str, found)) + "."
