"""CoDE-Stop's tau from one task to another by the number of steps (arXiv 2604.04930, its calibration)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from langchain_earlyexit.policies import CoDEStop
from langchain_earlyexit.trace import Trace


def transfer_tau(policy: CoDEStop, source: Sequence[Trace], target: Sequence[Trace]) -> CoDEStop:
    """`policy`, tuned on `source`, for questions like `target`: tau grows with the mean number of steps.

    tau_target = tau_source * (mean steps of target) / (mean steps of source). Steps are the checks of full thinking
    at which the policy measures a confidence, not tokens. No answers are needed. It is a rule of thumb and promises
    nothing: the longer chains of harder questions sum to a larger degeneration score by their length alone, and that
    is all it makes up for.

    Args:
        policy: tuned on questions like `source`.
        source: traces of full thinking, of the questions tuned on.
        target: traces of full thinking, of the questions to come.

    Raises:
        ValueError: either side without a step.
    """
    steps = {"source": _mean_steps(policy, source), "target": _mean_steps(policy, target)}
    for side, mean in steps.items():
        if not mean:
            raise ValueError(
                f"no check of the {side} traces is of a kind that {policy!r} looks at and has a confidence"
            )
    return replace(policy, tau=policy.tau * steps["target"] / steps["source"])


def _mean_steps(policy: CoDEStop, traces: Sequence[Trace]) -> float:
    if not traces:
        return 0.0
    return fmean(
        sum(
            check.kind in policy.looks and math.isfinite(check.signals.get("trial_confidence", math.nan))
            for check in trace.checks
        )
        for trace in traces
    )
