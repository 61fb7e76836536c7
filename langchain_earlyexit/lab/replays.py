"""Policies and thresholds on collected traces, without a model: what each would have answered, and at what cost.

Replay is exact for answers and tokens (see `outcomes`); time it cannot know. Settings are chosen on one split and told
of another. Fixed budgets and runs without thinking are not on a trace of full thinking: they are run live
(`earlyexit answer`) and put beside.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from langchain_earlyexit.lab.calibrate import first_exits
from langchain_earlyexit.lab.collect import live_kinds, read_meta, read_traces, refuse_other_kinds, subjects
from langchain_earlyexit.lab.judge import Judge
from langchain_earlyexit.lab.outcomes import ORACLE, Closing, Outcome, ended, left_at, replayed
from langchain_earlyexit.lab.statistics import auroc
from langchain_earlyexit.lab.table import Bin, Curve, Point, Reliability
from langchain_earlyexit.policies import Never, Policy, needs_at, replay
from langchain_earlyexit.policy_json import kind_of
from langchain_earlyexit.trace import Trace


@dataclass(frozen=True)
class Collection:
    """Traces of full thinking, and what is needed to replay on them.

    Attributes:
        traces: one per question.
        meta: how they were collected.
        judge: of their form.
        look: how the live runs they stand for look.
        about: texts of what they are about, see `collect.subjects`.
    """

    traces: tuple[Trace, ...]
    meta: Mapping[str, Any]
    judge: Judge
    look: str = "parallel"
    about: frozenset[str] = frozenset()

    @classmethod
    def read(cls, path: str | Path, look: str = "parallel") -> Self:
        """A collection from its file.

        Raises:
            ValueError: one whose exits took their trial answers: what those cost cannot be told apart.
        """
        meta = read_meta(path)
        if json.loads(meta["binds"]["answer_form"])["reuse"]:
            raise ValueError(f"{path} was collected with reuse_trial_answer, which replay cannot price; leave it out")
        judge = Judge(meta["form"])
        traces = tuple(read_traces(path))
        judge.learn_traces(traces)
        return cls(traces, meta, judge, look, frozenset(subjects(path, traces).values()))

    @property
    def closing(self) -> Closing:
        """How long the closings are."""
        return Closing.of(self.meta)

    def refuse_unfit(self, policy: Policy) -> None:
        """Refuse a policy that would look elsewhere on this model, or at what was not measured.

        Raises:
            ValueError: naming both sides.
        """
        if live_kinds(policy, self.meta):  # one that looks nowhere replays on anything
            refuse_other_kinds(policy, self.meta, "the collection")
        if missing := policy.needs - set(self.meta["signals"]):
            raise ValueError(
                f"{policy!r} reads {_list(missing)}, but the collection measured {_list(self.meta['signals'])}; "
                "collect again, with a probe where it is p_safe"
            )

    def refuse_shared(self, other: Collection) -> None:
        """Refuse two collections with questions in common: what is chosen on one would be told of the same.

        Raises:
            ValueError: naming one such question.
        """
        shared = {trace.question_id for trace in self.traces} & {trace.question_id for trace in other.traces}
        if shared:
            raise ValueError(
                f"{len(shared)} questions, {min(map(str, shared))} among them, are in both collections: settings must "
                "be chosen on other questions than they are reported on"
            )

    def full(self) -> list[Outcome]:
        """Full thinking, as it ran."""
        return [ended(trace, self.closing) for trace in self.traces]

    def run(self, policy: Policy) -> list[Outcome]:
        """What live runs with `policy` would give.

        Raises:
            ValueError: a policy that cannot be replayed on these traces.
        """
        self.refuse_unfit(policy)
        return [replayed(policy, trace, replay(policy, trace), self.closing, self.look) for trace in self.traces]

    def right(self, trace: Trace, answer: str | None) -> bool:
        """Against gold; against the answer of full thinking where no gold is known."""
        if trace.gold is not None:
            return self.judge.right(answer, trace.gold)
        return self.judge.same(answer, trace.answer)

    def tallies(self, path: Sequence[Policy], title: str = "") -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Output tokens and right answers of every setting on every question, both of shape (settings, questions).

        Raises:
            ValueError: as `run`.
        """
        for policy in {(kind_of(policy), policy.needs): policy for policy in path}.values():
            self.refuse_unfit(policy)
        kinds = [kind_of(policy) for policy in path]
        tokens = np.zeros((len(path), len(self.traces)))
        right = np.zeros_like(tokens, dtype=bool)
        for column, trace in enumerate(tqdm(self.traces, desc=title, unit="q", disable=not title)):
            # Settings of one kind that leave at one check, having read the same, differ in nothing that is counted.
            known: dict[Any, tuple[int, bool]] = {}
            for row, (policy, at) in enumerate(zip(path, first_exits(path, trace), strict=True)):
                seen = trace.checks[: None if at is None else at + 1]
                key = (kinds[row], at, tuple(needs_at(policy, check.kind, check.signals) for check in seen))
                if key not in known:
                    found = replayed(policy, trace, at, self.closing, self.look)
                    known[key] = found.output_tokens, self.right(trace, found.answer)
                tokens[row, column], right[row, column] = known[key]
        return tokens, right


def choose(dev: Collection, path: Sequence[Policy], tolerance: float, title: str = "") -> Policy:
    """The setting that takes the fewest tokens of those whose accuracy is at most `tolerance` below full thinking.

    Where none is, `Never()`. Accuracy is that on `dev` itself, so a little of it is luck: tell what it does elsewhere.

    Args:
        dev: questions that nothing is reported on.
        path: settings to choose from, in any order.
        tolerance: of accuracy, as a share: 0.005 is half a point.
        title: of a progress bar; none when empty.
    """
    tokens, right = dev.tallies(path, title)
    goal = np.mean([dev.right(trace, trace.answer) for trace in dev.traces]) - tolerance
    fit = [
        (float(spent.mean()), i)
        for i, (spent, hits) in enumerate(zip(tokens, right, strict=True))
        if hits.mean() >= goal
    ]
    return path[min(fit)[1]] if fit else Never()


def curve(traces: Collection, name: str, path: Sequence[Policy], title: str = "") -> Curve:
    """Accuracy over tokens along a path; settings that do the same are one point."""
    tokens, right = traces.tallies(path, title)
    points: dict[tuple[float, float], Point] = {}
    for policy, spent, hits in zip(path, tokens, right, strict=True):
        at = float(spent.mean()), float(hits.mean())
        points.setdefault(at, Point(*at, repr(policy)))
    return Curve(name, "policy", tuple(points.values()))


# --- what no policy can beat ----------------------------------------------------------------------------------------


def oracle(traces: Collection, wanted: str = "right") -> list[Outcome]:
    """Each question left at the first check whose answer is the wanted one; thought to the end where none is.

    Args:
        traces: with exit answers.
        wanted: "right", or "same": that of full thinking.
    """
    found = []
    for trace in traces.traces:
        at = next((i for i in range(len(trace.checks)) if _wanted(traces, trace, i, wanted)), None)
        found.append(ended(trace, traces.closing) if at is None else left_at(trace, at, traces.closing, ORACLE))
    return found


def oracle_curve(traces: Collection) -> Curve:
    """The most that leaving at these checks can reach for its tokens, were it known which answers are right.

    Every question is left at its cheapest point at first. Then, question by question, the cheapest right answer is
    bought where it costs least.
    """
    spent: list[int] = []
    hits = 0
    dearer: list[int] = []  # per question that is wrong at its cheapest: what its cheapest right answer costs more
    for trace in traces.traces:
        ways = [left_at(trace, i, traces.closing, ORACLE) for i in range(len(trace.checks))] + [
            ended(trace, traces.closing)
        ]
        costs = [(way.output_tokens, not traces.right(trace, way.answer)) for way in ways]
        cheapest, wrong = min(costs)
        spent.append(cheapest)
        hits += not wrong
        right = [tokens for tokens, missed in costs if not missed]
        if wrong and right:
            dearer.append(min(right) - cheapest)
    n = len(spent)
    bought = np.concatenate([[0], np.cumsum(sorted(dearer))])
    steps = np.unique(np.linspace(0, len(dearer), min(len(dearer), 60) + 1).round().astype(int))
    points = [Point((sum(spent) + float(bought[k])) / n, (hits + int(k)) / n, f"{k} bought") for k in steps]
    return Curve("oracle", "oracle", tuple(points))


def _wanted(traces: Collection, trace: Trace, at: int, wanted: str) -> bool:
    answer = trace.checks[at].exit_answer
    return traces.right(trace, answer) if wanted == "right" else traces.judge.same(answer, trace.answer)


# --- signals --------------------------------------------------------------------------------------------------------


def reliability(traces: Collection, signal: str, claim: str, bins: int = 10) -> Reliability:
    """How often leaving at a check holds what the signal claims, in bins of equally many checks.

    Args:
        traces: with exit answers.
        signal: one that is a probability.
        claim: "right" or "same as full".
        bins: at most; checks with equal signals stay together.

    Raises:
        ValueError: no check has the signal.
    """
    values, holds = _claims(traces, signal, claim)
    edges = np.unique(np.quantile(values, np.linspace(0, 1, bins + 1)[1:-1]))
    place = np.searchsorted(edges, values, side="left")
    found = [
        Bin(float(values[place == k].mean()), float(holds[place == k].mean()), int((place == k).sum()))
        for k in np.unique(place)
    ]
    return Reliability(signal, claim, tuple(found))


def ranks(traces: Collection, signal: str, claim: str) -> float:
    """Area under the ROC curve of a signal for what it claims, over all checks that have it: see `reliability`."""
    values, holds = _claims(traces, signal, claim)
    return auroc(values.tolist(), (holds > 0).tolist())


def _claims(traces: Collection, signal: str, claim: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The signal at every check that has it, in ascending order, and 1 where what it claims holds, else 0."""
    pairs = sorted(
        (value, _wanted(traces, trace, i, "right" if claim == "right" else "same"))
        for trace in traces.traces
        for i, check in enumerate(trace.checks)
        if np.isfinite(value := check.signals.get(signal, np.nan))
    )
    if not pairs:
        raise ValueError(f"no check of these traces has {signal}")
    values, holds = (np.array(side, dtype=np.float64) for side in zip(*pairs, strict=True))
    return values, holds


def agreement(live: Sequence[Outcome], replays: Sequence[Outcome]) -> tuple[int, int]:
    """Questions in both, and in how many of them live and replay agree on answer, reason and all five counts."""
    by_id = {outcome.question_id: outcome for outcome in replays}
    both = [(one, by_id[one.question_id]) for one in live if one.question_id in by_id]
    return len(both), sum(one == other for one, other in both)


def _list(names: Any) -> str:
    return ", ".join(sorted(names)) or "no"
