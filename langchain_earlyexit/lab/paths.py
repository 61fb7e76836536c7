"""For each policy one path of settings, from never leaving to bold: what calibration walks along.

A path is fixed before any trace is seen: that is what makes walking along it valid. So its grids are absolute and
wide, not fitted to data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

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
)

STEPS: Final = 49
"""Settings on a log grid, `Never()` aside: eight a decade for doubts of 1e-6 to 1."""

Path = tuple[Policy, ...]


def path_of(policy: Policy) -> Path:
    """Settings from `Never()` to the boldest, for policies like `policy`.

    Where it leaves is on the path; what else it has (`looks`, EAT's `alpha`) stays as in `policy`.

    - DEER, LYNX: 1 - threshold from 1e-6 to 1, in equal ratios. Confidences crowd near 1: there settings differ.
    - CoDE-Stop: one factor u, in equal ratios, multiplies 1 - r_min and 1 - r_max and divides tau: both ways of
      leaving grow bolder together, for with either alone the other could be past what is safe from the start. At
      u = 1 this is `policy` itself.
    - ProbeThenTrial: one factor u, in equal ratios, multiplies 1 - sure, 1 - ask and 1 - threshold, up to 1 each.
    - EAT: threshold from 1e-9 to 1, in equal ratios.
    - ThinkBrake: margin 0, then from 0.001 to 20 nats in equal ratios.
    - AnswerConvergence: k from 40 down to 2.
    - GiveUp: threshold from 0.001 to 1, in equal ratios.
    - FirstOf: its members' paths side by side, each from its start to its end.

    Raises:
        TypeError: a policy without a path here. Any sequence of policies that begins with `Never()` and was fixed
            before the traces were seen is a path: write one.
        ValueError: a CoDE-Stop with r_min = 1, which has no room for a factor; LYNX by quantiles, which are no knob.
    """
    if isinstance(policy, FirstOf):
        return _side_by_side([path_of(member) for member in policy.policies])
    if isinstance(policy, Never):
        return (policy,)
    found = next((settings for kind, settings in _SETTINGS.items() if isinstance(policy, kind)), None)
    if found is None:
        raise TypeError(
            f"no path is known for {policy!r}; give a sequence of policies that begins with Never() and goes from "
            "careful to bold"
        )
    return (Never(), *found(policy))


def _ratios(first: float, last: float, steps: int = STEPS) -> list[float]:
    factor = (last / first) ** (1 / (steps - 1))
    return [float(f"{first * factor**i:.6g}") for i in range(steps)]


def _thresholds(policy: Any) -> list[Policy]:
    return [replace(policy, threshold=round(1 - doubt, 12)) for doubt in _ratios(1e-6, 1.0)]


def _codestop(policy: CoDEStop) -> list[Policy]:
    doubt = 1 - (policy.r_max if policy.r_max < 1 else policy.r_min)
    if doubt == 0:
        raise ValueError("CoDEStop(r_min=1) is never confident, whatever its doubt is multiplied with; lower r_min")
    path: list[Policy] = []
    for u in _ratios(1e-6 / doubt, 1 / doubt):
        r_min, r_max = (max(0.0, round(1 - u * (1 - r), 12)) for r in (policy.r_min, policy.r_max))
        path.append(replace(policy, r_min=r_min, r_max=r_max, tau=policy.tau / u))
    return path


def _lynx(policy: LYNX) -> list[Policy]:
    if policy.threshold is None:
        raise ValueError(f"the quantiles of {policy!r} are no knob from careful to bold; take LYNX(threshold=...)")
    return _thresholds(policy)


def _probe_then_trial(policy: ProbeThenTrial) -> list[Policy]:
    fields = {name: 1 - getattr(policy, name) for name in ("sure", "ask", "threshold")}
    least, most = min(fields.values()), max(fields.values())
    if least == 0:
        raise ValueError(f"{policy!r} has a field of 1, which is never passed, whatever its doubt is multiplied with")
    return [
        replace(policy, **{name: max(0.0, round(1 - u * doubt, 12)) for name, doubt in fields.items()})
        for u in _ratios(1e-6 / most, 1 / least)
    ]


def _eat(policy: EAT) -> list[Policy]:
    return [replace(policy, threshold=threshold) for threshold in _ratios(1e-9, 1.0)]


def _thinkbrake(policy: ThinkBrake) -> list[Policy]:
    return [replace(policy, margin=margin) for margin in (0.0, *_ratios(1e-3, 20.0))]


def _convergence(policy: AnswerConvergence) -> list[Policy]:
    return [replace(policy, k=k) for k in range(40, 1, -1)]


def _giveup(policy: GiveUp) -> list[Policy]:
    return [replace(policy, threshold=threshold) for threshold in _ratios(1e-3, 1.0)]


_SETTINGS: Final[dict[type[Any], Callable[[Any], list[Policy]]]] = {
    DEER: _thresholds,
    LYNX: _lynx,
    CoDEStop: _codestop,
    EAT: _eat,
    ThinkBrake: _thinkbrake,
    AnswerConvergence: _convergence,
    GiveUp: _giveup,
    ProbeThenTrial: _probe_then_trial,
}


def _side_by_side(paths: list[Path]) -> Path:
    steps = max(map(len, paths)) - 1
    if steps == 0:
        return (Never(),)
    rows = [[path[round(i * (len(path) - 1) / steps)] for path in paths] for i in range(1, steps + 1)]
    return (Never(), *(FirstOf(*row) for row in rows))
