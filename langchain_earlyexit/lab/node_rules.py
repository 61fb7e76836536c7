"""A rule for all nodes of a graph, judged and certified by whole runs.

A rule says for each node of a graph by which policy its calls leave early; nodes it does not name think to the end. It
is replayed on runs of full thinking (`lab.trajectories`): a run counts as changed if any of its calls would have been
answered otherwise, which bounds the chance that the run's answer changes. That holds for graphs whose nodes hand on the
answer of a call alone, as `create_plan_and_solve` does: up to the first such call the replayed run and the live one are
in the same state, so an unchanged run replays exactly, answers and tokens. Behind it they part, and the tokens are what
the steps of full thinking would have taken. Where a graph hands on whole messages, an early exit changes the words that
the next call reads, whether or not it changes the answer, and nothing here is promised for it.

The steps of one run depend on each other, and a rule that cuts where it is sure takes its risk where it likes. Both
are no matter here: the unit is the run, the rule has one knob, and its settings are tested along one path fixed
beforehand (Learn-then-Test, arXiv 2110.01052).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from langchain_earlyexit.answers import graded_form
from langchain_earlyexit.chat_models import ChatEarlyExit
from langchain_earlyexit.guarantee import with_policy
from langchain_earlyexit.lab.collect import live_kinds, read_meta, read_states, refuse_learned, refuse_other_kinds
from langchain_earlyexit.lab.learn_then_test import certified, questions_needed, upper_bound
from langchain_earlyexit.lab.lines import RUNS, refuse_unfinished
from langchain_earlyexit.lab.outcomes import Closing, replayed
from langchain_earlyexit.lab.paths import path_of
from langchain_earlyexit.lab.trajectories import CallTrace, Trajectory, node_path, read_runs
from langchain_earlyexit.policies import Never, Policy, replay
from langchain_earlyexit.policy_json import policy_from_dict, policy_to_dict
from langchain_earlyexit.probe import POSITIONS, Probe
from langchain_earlyexit.promises import refuse_other_model
from langchain_earlyexit.trace import Trace

Rule = Mapping[str, Policy]
"""Policies by node."""

FORMAT: Final = "earlyexit-node-rule"
VERSION: Final = 1


@dataclass(frozen=True)
class ReplayedCall:
    """One call under a policy.

    Attributes:
        trace: of full thinking.
        answer: where the policy leaves it, or at its end.
        reasoning: net reasoning tokens: all but prompt and answer.
        left: whether the policy ended it.
        changed: whether it did, and the answer is another one. One that cannot be read is never known to be the same.
    """

    trace: Trace
    answer: str | None
    reasoning: int
    left: bool
    changed: bool


@dataclass(frozen=True)
class Replayed:
    """One run under a rule.

    Attributes:
        reasoning: net reasoning tokens of its calls: all but prompts and answers.
        exits: calls left early.
        changed: whether any call would have been answered otherwise.
    """

    reasoning: int
    exits: int
    changed: bool


@dataclass(frozen=True)
class Runs:
    """Collected runs, and what it takes to replay rules on them.

    Attributes:
        trajectories: the runs.
        metas: how the calls of each node were asked.
        look: how the live runs they stand for look.
        file: where they come from; None where nobody can tell whether they are all.
    """

    trajectories: tuple[Trajectory, ...]
    metas: Mapping[str, Mapping[str, Any]]
    look: str = "wait"
    file: Path | None = None

    @classmethod
    def read(
        cls, out: str | os.PathLike[str], probes: Mapping[str, Probe] | None = None, *, look: str = "wait"
    ) -> Self:
        """The runs of a collection.

        Args:
            out: its folder.
            probes: by node: measure `p_safe` there, from the hidden states that were kept.
            look: "wait" or "parallel", as the live calls look.

        Raises:
            FileNotFoundError: no such collection.
            ValueError: a probe, and no states of the layers that it reads.
        """
        trajectories = tuple(read_runs(out))
        nodes = sorted({call.node for one in trajectories for call in one.calls})
        metas = {node: read_meta(node_path(out, node)) for node in nodes}
        for node, probe in (probes or {}).items():
            metas[node] = _probed_meta(metas[node], probe)
            states = read_states(node_path(out, node))
            depths: list[float] = metas[node]["depths"]
            if missing := [depth for depth in probe.layers if depth not in depths]:
                raise ValueError(f"the probe of {node!r} reads the depths {missing}, but {depths} were collected")
            layers = [depths.index(depth) for depth in probe.layers]
            place = POSITIONS.index(probe.position)

            def measured(call: CallTrace, node: str = node, probe: Probe = probe, states: Any = states,
                         place: int = place, layers: list[int] = layers) -> CallTrace:  # fmt: skip
                if call.node != node or not call.trace.checks:
                    return call
                rows = states[str(call.trace.question_id)][:, place][:, layers]
                checks = tuple(
                    replace(check, signals={**check.signals, "p_safe": probe.p_safe(row)})
                    for check, row in zip(call.trace.checks, rows, strict=True)
                )
                return replace(call, trace=replace(call.trace, checks=checks))

            trajectories = tuple(replace(one, calls=tuple(map(measured, one.calls))) for one in trajectories)
        return cls(trajectories, metas, look, Path(out) / RUNS)

    def replay(self, rule: Rule) -> list[Replayed]:
        """Every run under `rule`.

        Raises:
            ValueError: a node that no run comes to, or a signal that was not measured at its checks.
        """
        self.refuse_unfit(rule)
        return [self._run(run, rule) for run in self.trajectories]

    def refuse_unfit(self, rule: Rule) -> None:
        """Refuse a rule that these runs do not replay: without exits it would look harmless."""
        for node, policy in rule.items():
            if node not in self.metas:
                raise ValueError(f"the rule names the node {node!r}, but the runs have {', '.join(sorted(self.metas))}")
            if policy.looks:
                graded_form(self.metas[node]["form"])
            if live_kinds(policy, self.metas[node]):
                refuse_other_kinds(policy, self.metas[node], f"the collection of {node!r}")
            if missing := policy.needs - set(self.metas[node]["signals"]):
                raise ValueError(
                    f"{policy!r} reads {', '.join(sorted(missing))} at {node!r}, but the runs have "
                    f"{', '.join(self.metas[node]['signals'])}; a probe measures p_safe"
                )

    def calls_of(self, node: str, policy: Policy) -> list[list[ReplayedCall]]:
        """For each run the calls of one node, under `policy`.

        Raises:
            ValueError: as `replay`.
        """
        self.refuse_unfit({node: policy})
        return [[self._call(call, policy) for call in run.calls if call.node == node] for run in self.trajectories]

    def _run(self, run: Trajectory, rule: Rule) -> Replayed:
        calls = [self._call(call, rule.get(call.node, Never())) for call in run.calls]
        return Replayed(
            sum(call.reasoning for call in calls),
            sum(call.left for call in calls),
            any(call.changed for call in calls),
        )

    def _call(self, call: CallTrace, policy: Policy) -> ReplayedCall:
        meta, trace = self.metas[call.node], call.trace
        at = replay(policy, trace)
        found = replayed(policy, trace, at, Closing.of(meta), self.look)
        changed = at is not None and not graded_form(meta["form"]).same(found.answer, trace.answer)
        return ReplayedCall(trace, found.answer, found.output_tokens - found.answer_tokens, at is not None, changed)


def _probed_meta(meta: Mapping[str, Any], probe: Probe) -> dict[str, Any]:
    signals = sorted({*meta["signals"], "p_safe"})
    return {**meta, "signals": signals, "learned": probe.learned, "binds": {**meta["binds"], "probe": probe.digest}}


def rule_path(rule: Rule) -> tuple[Rule, ...]:
    """Rules from never leaving to bold: the nodes' own paths (`paths.path_of`) side by side, turned by one knob.

    Raises:
        ValueError: no node that may leave early.
    """
    paths = {node: path_of(policy) for node, policy in rule.items() if policy.looks}
    if not paths:
        raise ValueError("a rule without a node that may leave early has nothing to certify")
    steps = max(map(len, paths.values())) - 1
    return tuple(
        {node: path[round(i * (len(path) - 1) / steps)] for node, path in paths.items()} for i in range(steps + 1)
    )


# --- certifying -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CertifiedRule:
    """A rule, and what whole runs say of it.

    With probability at least 1 - delta over the runs it was calibrated on, at most a share epsilon of new runs, on
    questions of the same kind, has any call answered otherwise than full thinking would have. For graphs that hand on
    answers alone (see above), with the same model, prompts and settings: `binds` tells them. `policy` refuses another
    model; prompts and settings nothing checks when the rule runs.

    Attributes:
        rule: policies by node; empty where none that leaves early could be certified.
        epsilon: tolerated share of changed runs, in (0, 1).
        delta: chance that it does not hold, in (0, 1).
        runs: how many it was calibrated on.
        changed: of those, how many changed.
        settings: of the path, and the place of the rule on it.
        binds: how the calls of each node were asked; see `guarantee.BOUND`.
    """

    rule: Rule
    epsilon: float
    delta: float
    runs: int
    changed: int
    settings: tuple[int, int]
    binds: Mapping[str, Mapping[str, str]]

    @property
    def bound(self) -> float:
        """Upper confidence bound on the share of changed runs, for this setting alone."""
        return upper_bound(self.changed, self.runs, self.delta)

    def policy(self, node: str, llm: ChatEarlyExit) -> Policy:
        """The policy for the calls of a node; one that never leaves where the rule has none.

        Args:
            node: of the graph.
            llm: the model that makes the calls.

        Raises:
            ValueError: the rule was certified on another model or probe, naming what differs.
        """
        if node not in self.rule:
            return Never()
        refuse_other_model(f"the rule for {node!r}", self.binds[node], llm.load(), "choose a policy of your own")
        return self.rule[node]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON."""
        data = {
            "format": FORMAT, "version": VERSION, "epsilon": self.epsilon, "delta": self.delta, "runs": self.runs,
            "changed": self.changed, "settings": list(self.settings),
            "rule": {node: policy_to_dict(policy) for node, policy in self.rule.items()},
            "binds": {node: dict(binds) for node, binds in self.binds.items()},
        }  # fmt: skip
        Path(path).write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote.

        Raises:
            ValueError: it is something else.
        """
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(data, dict) or (data.get("format"), data.get("version")) != (FORMAT, VERSION):
            raise ValueError(f"{os.fspath(path)} is no {FORMAT} of version {VERSION}")
        rule = {node: policy_from_dict(policy) for node, policy in data["rule"].items()}
        counts = (data["epsilon"], data["delta"], data["runs"], data["changed"], tuple(data["settings"]))
        return cls(rule, *counts, data["binds"])


def certify_rule(runs: Runs, path: Sequence[Rule], epsilon: float, delta: float = 0.1) -> CertifiedRule:
    """The boldest rule of `path` that changes at most a share `epsilon` of the runs.

    Args:
        runs: none of which was used to choose the path or to train a probe.
        path: rules from never leaving to bold, fixed beforehand, such as `rule_path` makes.
        epsilon: in (0, 1).
        delta: in (0, 1).

    Raises:
        ValueError: too few runs, naming how many it takes; an unfinished collection; a path whose first rule leaves
            early; a rule that the runs do not replay; runs that a probe of theirs has learned from.
    """
    if not (0 < epsilon < 1 and 0 < delta < 1):
        raise ValueError(f"epsilon and delta lie in (0, 1), got {epsilon} and {delta}")
    if runs.file is not None:
        refuse_unfinished(runs.file)
    n, needed = len(runs.trajectories), questions_needed(epsilon, delta)
    if n < needed:
        raise ValueError(
            f"{n} runs cannot certify epsilon={epsilon:g} at delta={delta:g}: it takes at least {needed}, and more if "
            "some change; collect more runs"
        )
    runs.refuse_unfit(path[-1])
    for node, policy in path[-1].items():
        refuse_learned(policy, runs.metas[node], [run.question for run in runs.trajectories])
    found = [runs.replay(rule) for rule in path]
    if any(one.exits for one in found[0]):
        raise ValueError("a path begins with a rule that never leaves")
    losses: NDArray[np.int64] = np.array([sum(one.changed for one in setting) for setting in found])
    at = certified(losses.tolist(), n, epsilon, delta)
    rule = {node: policy for node, policy in path[at].items() if policy.looks}
    binds = {node: with_policy(runs.metas[node]["binds"], policy) for node, policy in rule.items()}
    return CertifiedRule(rule, epsilon, delta, n, int(losses[at]), (len(path), at), binds)
