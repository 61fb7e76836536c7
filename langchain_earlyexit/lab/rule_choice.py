"""Which rule for a graph's nodes to run: chosen on runs that nothing is reported on, and ordered for a certificate.

Every node has candidate settings of its own; a rule is one setting for each. All of their products are judged from one
replay per node and setting, as a run's tokens are the sum of its calls' and it is right or unchanged where all are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product

import numpy as np
from numpy.typing import NDArray

from langchain_earlyexit.lab.node_rules import Rule, Runs
from langchain_earlyexit.policies import Never, Policy
from langchain_earlyexit.trace import Trace

Right = Callable[[str, Trace, str | None], bool]
"""Whether an answer to a call of a node (its name, its trace) is right."""

Candidates = Mapping[str, Sequence[Policy]]
"""Settings to choose from, by node; `Never()` need not be among them."""


@dataclass(frozen=True)
class Judged:
    """What one rule does to runs.

    Attributes:
        rule: policies by node, those aside that never leave.
        tokens: net reasoning tokens, the mean of all runs.
        right: share of runs whose calls all are right. Where a call changes, those after it are judged as they were in
            full thinking, which a live run would not have asked alike: good for choosing, not for reporting.
        changed: share of runs with a call that is answered otherwise.
        error: standard error of the difference in `right` to full thinking, paired by run.
    """

    rule: Rule
    tokens: float
    right: float
    changed: float
    error: float = 0.0


def judge_rules(runs: Runs, candidates: Candidates, right: Right) -> list[Judged]:
    """Every product of the nodes' settings; the first thinks to the end everywhere.

    Args:
        runs: of full thinking.
        candidates: by node.
        right: judges one call's answer.
    """
    settings = {node: (Never(), *found) for node, found in candidates.items()}
    columns = {node: [_column(runs, node, policy, right) for policy in found] for node, found in settings.items()}
    rest = _columns_of_others(runs, settings, right)
    rules = []
    full = reduce(np.logical_and, (rest.right, *(found[0].right for found in columns.values())))
    for chosen in product(*(range(len(found)) for found in settings.values())):
        rule = {node: settings[node][i] for node, i in zip(settings, chosen, strict=True)}
        parts = [rest, *(columns[node][i] for node, i in zip(settings, chosen, strict=True))]
        tokens = sum(part.tokens.mean() for part in parts)
        all_right = reduce(np.logical_and, (part.right for part in parts))
        changed = reduce(np.logical_or, (part.changed for part in parts))
        leaving = {node: policy for node, policy in rule.items() if policy.looks}
        error = (all_right.astype(float) - full).std() / np.sqrt(len(full))
        rules.append(Judged(leaving, float(tokens), float(all_right.mean()), float(changed.mean()), float(error)))
    return rules


def cheapest(rules: Sequence[Judged], tolerance: float) -> Judged:
    """The rule of the fewest tokens that surely loses little: one standard error more than it lost is tolerated too.

    Of many rules that do about as well, the fewest tokens would else be those of the luckiest. A little luck is left:
    report what the rule does elsewhere.

    Args:
        rules: the first thinks to the end, and is chosen where no other will do.
        tolerance: share of right runs.
    """
    fit = [rule for rule in rules[1:] if rules[0].right - rule.right + rule.error <= tolerance]
    return min([rules[0], *fit], key=lambda rule: rule.tokens)


def bolder_and_bolder(rules: Sequence[Judged], steps: int = 24) -> tuple[Rule, ...]:
    """A path for `node_rules.certify_rule`, from never leaving to bold: one knob in place of one for each node.

    Each rule changes more runs than the one before and takes fewer tokens than any that changes so few. Certify it on
    other runs than these.

    Args:
        rules: as `judge_rules` gives them.
        steps: at most so many rules, spread over the share of changed runs.
    """
    frontier: list[Judged] = [rules[0]]
    for rule in sorted(rules, key=lambda rule: (rule.changed, rule.tokens)):
        if rule.tokens < frontier[-1].tokens:
            frontier.append(rule)
    picked = np.unique(np.linspace(0, len(frontier) - 1, min(steps, len(frontier))).round().astype(int))
    return tuple(frontier[i].rule for i in picked)


@dataclass(frozen=True)
class _Column:
    """Over runs: tokens of one node's calls, whether all of them are right, whether any is answered otherwise."""

    tokens: NDArray[np.int64]
    right: NDArray[np.bool_]
    changed: NDArray[np.bool_]


def _column(runs: Runs, node: str, policy: Policy, right: Right) -> _Column:
    found = runs.calls_of(node, policy)
    return _Column(
        np.array([sum(call.reasoning for call in one) for one in found], dtype=np.int64),
        np.array([all(right(node, call.trace, call.answer) for call in one) for one in found], dtype=bool),
        np.array([any(call.changed for call in one) for one in found], dtype=bool),
    )


def _columns_of_others(runs: Runs, settings: Candidates, right: Right) -> _Column:
    """Of the nodes that no candidate is for."""
    others = [_column(runs, node, Never(), right) for node in runs.metas if node not in settings]
    count = len(runs.trajectories)
    none = _Column(np.zeros(count, dtype=np.int64), np.ones(count, dtype=bool), np.zeros(count, dtype=bool))
    return reduce(lambda a, b: _Column(a.tokens + b.tokens, a.right & b.right, a.changed | b.changed), [none, *others])
