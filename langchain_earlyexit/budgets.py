"""How much each step of a run may think, and how much risk it may take: pure arithmetic, decided before a step runs.

Thinking tokens are split by weights in whole numbers that add up exactly. Risk is spent like tokens: what the steps
take adds up to at most what the run was given, which bounds the chance that any step's early exit changed the run
(a union bound). That bound is sound only for shares that are FIXED before the run, as `spread_risk` and `endless_risk`
give them. `adaptive_risk` looks at what the run has done so far; what it gives is heuristic, and promises nothing.

Knows nothing of models, messages or graphs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Final

SCHEDULES: Final = ("even", "linear", "polynomial", "exponential", "cosine")
"""How weights fall from the first step to the last (Plan-and-Budget, arXiv 2505.16122): see `decay`."""

TOKEN_WEIGHTS: Final[Mapping[str, float]] = {
    "planning": 2.0,
    "routine": 1.0,
    "recovery": 2.0,
    "final": 1.0,
    "irreversible": 1.0,
}
"""Share of the thinking by kind of step. Plans and repairs of errors are worth more thought than routine: starved
early steps spoil the later ones (arXiv 2508.00890). The numbers are this package's."""

RISK_WEIGHTS: Final[Mapping[str, float]] = {
    "planning": 1.0,
    "routine": 1.0,
    "recovery": 1.0,
    "final": 1.0,
    "irreversible": 0.0,
}
"""Share of the risk by kind of step. What cannot be undone, such as a tool call that sends or deletes, is never cut."""


def split(total: int, weights: Sequence[float]) -> tuple[int, ...]:
    """`total` in whole parts in proportion to `weights`, adding up to it exactly (largest remainder).

    Each part is its exact share rounded down or up; of equal claims on the last tokens the earlier comes first. All
    weights zero counts as all equal.

    Args:
        total: at least 0.
        weights: finite and at least 0, one per part; at least one of them.

    Raises:
        ValueError: a negative total or a bad weight.
    """
    if total < 0:
        raise ValueError(f"there are {total} tokens to split, but a budget is at least 0")
    exact = _shares(weights)
    parts = [math.floor(total * share) for share in exact]
    rest = total - sum(parts)
    by_claim = sorted(range(len(parts)), key=lambda i: (parts[i] - total * exact[i], i))
    for i in by_claim[:rest]:
        parts[i] += 1
    return tuple(parts)


def decay(steps: int, schedule: str = "linear") -> tuple[float, ...]:
    """Weights of `steps` steps that fall from the first to the last (Plan-and-Budget, arXiv 2505.16122).

    With N steps and i from 0: even 1; linear N - i; polynomial (N - i)^2; exponential 0.9^i; cosine
    (1 + cos(pi i / (N - 1))) / 2 + 0.1. Times the steps' complexities they are that paper's shares:
    `split(total, [c * s for c, s in zip(complexities, decay(n))])`, but for the remainder, which goes to the largest
    shares there and to the largest remainders here.

    Raises:
        ValueError: fewer than one step, or an unknown schedule.
    """
    if steps < 1:
        raise ValueError(f"a schedule needs at least one step, got {steps}")
    n = steps
    if schedule == "even":
        return (1.0,) * n
    if schedule == "linear":
        return tuple(float(n - i) for i in range(n))
    if schedule == "polynomial":
        return tuple(float((n - i) ** 2) for i in range(n))
    if schedule == "exponential":
        return tuple(0.9**i for i in range(n))
    if schedule == "cosine":
        return tuple((1 + math.cos(math.pi * i / max(n - 1, 1))) / 2 + 0.1 for i in range(n))
    raise ValueError(f"unknown schedule {schedule!r}; known are {', '.join(SCHEDULES)}")


def next_share(remaining: int, weight: float, later: Sequence[float]) -> int:
    """What the next step may take of the tokens that remain: its weight against those of the steps after it.

    Steps that spend less leave more to those after them, and no order of spending can overspend.

    Args:
        remaining: tokens left, at least 0.
        weight: of the next step.
        later: weights of the steps that come after it; none: it may take all that remains.

    Raises:
        ValueError: a negative remainder or a bad weight.
    """
    if remaining < 0:
        raise ValueError(f"{remaining} tokens remain, but what is spent cannot be more than the budget")
    return math.floor(remaining * _shares([weight, *later])[0])


def pace(total: int, remaining: int, weights: Sequence[float], to_come: Sequence[float]) -> float | None:
    """The part of the tokens that is left, over the part of the weight that is to come: below 1, the run overspends.

    Args:
        total: tokens of the run, at least 0.
        remaining: tokens left of it.
        weights: of all steps.
        to_come: weights of the next step and those after it.

    Returns:
        None where there were no tokens, or nothing that weighs anything is to come.

    Raises:
        ValueError: a bad weight.
    """
    whole, ahead = sum(_weighed(weights)), sum(_weighed(to_come))
    return float(Fraction(remaining, total) * whole / ahead) if total and ahead else None


def spread_risk(epsilon: float, weights: Mapping[str, float]) -> dict[str, float]:
    """Risk of each step, in proportion to its weight, fixed before the run; exactly 0 where the weight is 0.

    The shares add up to at most `epsilon`, in exact arithmetic, so by the union bound the chance that any of the
    steps' early exits changes what full thinking would have done is at most `epsilon`.

    Args:
        epsilon: of the whole run, in [0, 1).
        weights: by step; every step that may be cut must be there beforehand, whether or not the run comes to it.

    Raises:
        ValueError: a bad epsilon or weight.
    """
    _risk(epsilon)
    if not weights:
        return {}
    if not any(weights.values()):
        return dict.fromkeys(weights, 0.0)
    shares = _shares(list(weights.values()))
    return {name: _no_more_than(Fraction(epsilon) * share) for name, share in zip(weights, shares, strict=True)}


def endless_risk(epsilon: float, step: int) -> float:
    """Risk of step 0, 1, 2, ... of a run of unknown length: epsilon / ((step + 1) (step + 2)), fixed beforehand.

    However many steps there are, they add up to less than `epsilon`.

    Raises:
        ValueError: a bad epsilon, or a negative step.
    """
    _risk(epsilon)
    if step < 0:
        raise ValueError(f"steps are counted from 0, got {step}")
    return _no_more_than(Fraction(epsilon) / ((step + 1) * (step + 2)))


def adaptive_risk(epsilon: float, spent: float, weight: float, later: Sequence[float]) -> float:
    """HEURISTIC: the next step's share of the risk that is left, where `spent` depends on what the run has done.

    It never takes more than is left, but whoever chooses the risk by what was seen may take most where it is most
    dangerous. Report what comes of it as heuristic, unless the whole rule was calibrated on whole runs.

    Args:
        epsilon: of the whole run, in [0, 1).
        spent: risk taken so far.
        weight: of the next step.
        later: weights of the steps after it.

    Raises:
        ValueError: a bad number.
    """
    _risk(epsilon)
    if spent < 0:
        raise ValueError(f"risk spent must be at least 0, got {spent}")
    if weight == 0:
        _shares([weight, *later])
        return 0.0
    left = max(Fraction(0), Fraction(epsilon) - Fraction(spent))
    return _no_more_than(left * _shares([weight, *later])[0])


def _shares(weights: Sequence[float]) -> list[Fraction]:
    """Exact shares that add up to 1."""
    if not weights:
        raise ValueError("there is no step to give anything to")
    exact = _weighed(weights)
    total = sum(exact)
    return [weight / total for weight in exact] if total else [Fraction(1, len(exact))] * len(exact)


def _weighed(weights: Sequence[float]) -> list[Fraction]:
    bad = [weight for weight in weights if not (math.isfinite(weight) and weight >= 0)]
    if bad:
        raise ValueError(f"weights must be finite and at least 0, got {bad[0]}")
    return [Fraction(weight) for weight in weights]


def _risk(epsilon: float) -> None:
    if not 0 <= epsilon < 1:
        raise ValueError(f"epsilon, the risk of the whole run, must lie in [0, 1), got {epsilon}")


def _no_more_than(exact: Fraction) -> float:
    """The nearest float that is not above `exact`: shares rounded up could add up to more than the whole."""
    near = float(exact)
    return math.nextafter(near, 0.0) if Fraction(near) > exact else near
