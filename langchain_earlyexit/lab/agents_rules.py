"""From the bundled model's own plans to the rules of its benchmark: probes, settings, and a certificate for whole runs.

Three sets of problems, none of them the benchmark's: runs on the train split teach a probe for each kind of call, a
part of those on the dev split chooses settings, and the rest certifies. What is done is kept in a folder, and an
interrupted preparation goes on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from langchain_core.runnables import Runnable

from langchain_earlyexit.answers import BOXED, TEXT
from langchain_earlyexit.chat_models import ChatEarlyExit
from langchain_earlyexit.lab.collect import DEPTHS
from langchain_earlyexit.lab.datasets import Question
from langchain_earlyexit.lab.examples import PARTS, examples
from langchain_earlyexit.lab.learn_then_test import questions_needed
from langchain_earlyexit.lab.node_rules import CertifiedRule, Rule, Runs, certify_rule
from langchain_earlyexit.lab.rule_choice import Candidates, Judged, Right, bolder_and_bolder, cheapest, judge_rules
from langchain_earlyexit.lab.trajectories import Model, collect_runs, node_path
from langchain_earlyexit.plan_and_solve import create_plan_and_solve
from langchain_earlyexit.pocket.plans import MAX_STEPS, PlanProblem, evaluate_plan, plan_text, sample_plans
from langchain_earlyexit.pocket.problems import Split
from langchain_earlyexit.policies import DEER, LYNX, FirstOf, GiveUp, Policy, ProbeThenTrial
from langchain_earlyexit.probe import Probe
from langchain_earlyexit.trace import Trace

NODES: Final = ("plan", "step")
"""Kinds of calls that may be cut. The answer repeats the last result, in fewer tokens than an exit saves."""

_DOUBTS: Final = (0.002, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0)
"""1 - threshold of LYNX's settings to choose from: from careful to leaving at the first check."""

_TRIAL_DOUBTS: Final = (0.0005, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.05, 0.1)
"""The same of DEER's: trial answers are surer of themselves."""

_SURE_DOUBTS, _ASK_DOUBTS = (0.0, 0.01, 0.02), (0.1, 0.2)
"""Where the probe of ProbeThenTrial decides alone."""


@dataclass(frozen=True)
class Sizes:
    """Problems for each purpose, and what may be lost.

    Attributes:
        train: that teach probes.
        choose: that choose settings.
        certify: that certify.
        tolerance: share of right runs that the chosen rule may lose: see `rule_choice.cheapest`.
        epsilon: share of runs that the certified rule may change.
        delta: chance that it changes more.
    """

    train: int = 500
    choose: int = 600
    certify: int = 500
    tolerance: float = 0.015
    epsilon: float = 0.1
    delta: float = 0.1

    def __post_init__(self) -> None:
        needed = questions_needed(self.epsilon, self.delta)
        if self.certify < needed:
            raise ValueError(
                f"{self.certify} problems cannot certify epsilon={self.epsilon:g} at delta={self.delta:g}: it takes at "
                f"least {needed}"
            )


@dataclass(frozen=True)
class StepRules:
    """When each kind of call stops thinking.

    Attributes:
        rule: by node, of the regime with a confidence for each step.
        quick: of the first try of a step that may be escalated.
        doubt: confidence below which it is.
        certified: by node, for the regime with a bound on changed runs; None leaves that out.
        probes: by node, for policies that read `p_safe`.
        told: how all this was found, in lines.
    """

    rule: Rule
    quick: Policy
    doubt: float
    certified: CertifiedRule | None = None
    probes: Mapping[str, Probe] | None = None
    told: tuple[str, ...] = ()


def plan_questions(split: Split, count: int, seed: int = 0) -> list[Question]:
    """Problems of three to six dependent steps of one split of the bundled model's."""
    problems = sample_plans(split, count, seed)
    return [
        Question(f"plans-{split}-{seed}-{i}", problem.story, problem.answer, "boxed", "plans")
        for i, problem in enumerate(problems)
    ]


def right_calls(problems: Sequence[PlanProblem]) -> Right:
    """Judges calls of runs on these problems: a plan is that of its story, a step is its sum."""
    plans = {problem.story: plan_text(problem.steps) for problem in problems}

    def right(node: str, trace: Trace, answer: str | None) -> bool:
        asked = trace.question or ""
        if node == "plan":
            return asked in plans and TEXT.same(answer, plans[asked])
        if node != "step":
            return True
        value = evaluate_plan([asked.removeprefix("What is ").removesuffix("?")])
        return value is not None and BOXED.same(answer, str(value))

    return right


def prepare(llm: ChatEarlyExit, folder: Path, sizes: Sizes, *, seed: int = 0, progress: bool = True) -> StepRules:
    """Collect runs, train probes, choose and certify rules.

    Args:
        llm: the model, without a probe; it must plan as `create_plan_and_solve` asks.
        folder: what is done is kept there; made for one model.
        sizes: how many problems.
        seed: of the draws of problems and of the sampling.
        progress: show bars.

    Raises:
        ValueError: the folder holds what was made in another way; a probe that cannot be learned from so few problems.
    """
    collected = {"train": sizes.train, "dev": sizes.choose + sizes.certify}
    splits: dict[str, Split] = {"train": "train", "dev": "dev"}
    fresh = {}
    for name, count in collected.items():
        questions = plan_questions(splits[name], count, seed)
        found = collect_runs(llm, plans_of, questions, folder / name, depths=DEPTHS, seed=seed, progress=progress)
        fresh[name] = found.done
    taught = {node: _probe(folder, node, seed, anew=bool(fresh["train"])) for node in NODES}
    probes = {node: probe for node, probe in taught.items() if probe is not None}
    runs = Runs.read(folder / "dev", probes)
    asked = [question.id for question in plan_questions("dev", sizes.choose + sizes.certify, seed)]
    chosen_on, rest = (
        replace(runs, trajectories=tuple(one for one in runs.trajectories if one.id in part))
        for part in (set(asked[: sizes.choose]), set(asked[sizes.choose :]))
    )
    rules = judge_rules(chosen_on, _candidates(probes), right_calls(sample_plans("dev", sizes.choose, seed)))
    best = cheapest(rules, sizes.tolerance)
    certified = certify_rule(rest, bolder_and_bolder(rules), sizes.epsilon, sizes.delta)
    certified.save(folder / "certified.json")
    quick, doubt = quick_try(best.rule.get("step"))
    return StepRules(best.rule, quick, doubt, certified, probes, _told(sizes, rules[0], best, certified, list(probes)))


def quick_try(step: Policy | None, doubt: float = 0.3) -> tuple[Policy, float]:
    """A first try that leaves as `step` does, or where it shows no promise; and below which confidence it is unsure.

    Args:
        step: the policy for steps; None for one that never leaves.
        doubt: probability below which a chain has no promise.
    """
    signal = "p_safe" if step is None or "p_safe" in step.needs else "trial_confidence"
    give_up = GiveUp(threshold=doubt, patience=3, min_checks=3, signal=signal)
    return (give_up if step is None else FirstOf(step, give_up)), doubt


def plans_of(model: Model) -> Runnable[Any, Any]:
    """The benchmark's graph, whose calls all go to `model`."""
    return create_plan_and_solve(model, max_steps=MAX_STEPS)


def _candidates(probes: Collection[str]) -> Candidates:
    """DEER; and, where there is a probe, LYNX, which looks for nothing, and both in turn."""
    lynx = [LYNX(threshold=round(1 - doubt, 4)) for doubt in _DOUBTS]
    deer = [DEER(threshold=round(1 - doubt, 4)) for doubt in _TRIAL_DOUBTS]
    both = [
        ProbeThenTrial(sure=1 - sure, ask=1 - ask, threshold=round(1 - doubt, 4))
        for sure in _SURE_DOUBTS
        for ask in _ASK_DOUBTS
        for doubt in _TRIAL_DOUBTS[1::2]
    ]
    return {node: [*(lynx + both if node in probes else ()), *deer] for node in NODES}


def _probe(folder: Path, node: str, seed: int, *, anew: bool) -> Probe | None:
    """The probe of a node; None where leaving is always safe, or never, in a part of its checks: nothing to learn."""
    where, runs = folder / "probes" / node, node_path(folder / "train", node)
    if where.exists() and not anew:
        return Probe.load(where)
    data = examples(runs, seed=seed)
    if any(len(set(data.safe[data.part == part].tolist())) < 2 for part in PARTS):
        return None
    # Only here does torch come in.
    from langchain_earlyexit.lab.train import Head, train

    heads = [
        Head(layers, position, hidden)
        for layers in ((1,), (2,), (3,), tuple(range(len(DEPTHS))))
        for position in ("cue", "before")
        for hidden in ((64,), (256, 64))
    ]
    probe, _ = train(runs, heads=heads, seed=seed)
    probe.save(where)
    return probe


def _told(sizes: Sizes, full: Judged, best: Judged, certified: CertifiedRule, probes: Sequence[str]) -> tuple[str, ...]:
    saved = 1 - best.tokens / full.tokens
    place = f"setting {certified.settings[1]} of {certified.settings[0] - 1}"
    return (
        f"Probes ({', '.join(probes) or 'none'}) learned from {sizes.train} runs on the train split. "
        f"Chosen on {sizes.choose} dev problems for the "
        f"fewest tokens at a loss of at most {100 * sizes.tolerance:g} points, a standard error added: "
        f"{_shown(best.rule)}; by replay there, "
        f"{100 * saved:.0f} % fewer reasoning tokens, all calls right in {100 * best.right:.1f} % of the runs, without "
        f"control {100 * full.right:.1f} %.",
        f"Certified on {certified.runs} other dev problems: {_shown(certified.rule)} ({place} on a path from never "
        f"leaving to bold) changed {certified.changed} of them; so with confidence {100 * (1 - certified.delta):g} % "
        f"it changes a call in at most {100 * certified.epsilon:g} % of new runs.",
    )


def _shown(rule: Rule) -> str:
    return ", ".join(f"{node} {policy!r}" for node, policy in rule.items()) or "no early exit"
