"""LYNX's own calibration (arXiv 2512.05325): split conformal quantiles over cues, one for each class of cue."""

from __future__ import annotations

import math
from collections.abc import Sequence

from langchain_earlyexit.lab.calibrate import Same
from langchain_earlyexit.policies import LYNX
from langchain_earlyexit.trace import Trace


def conformal_quantile(scores: Sequence[float], delta: float) -> float:
    """The ceil((n + 1)(1 - delta))-th smallest of n scores; infinite where that is more than n.

    A further score, exchangeable with these, is above it with probability at most delta. The released code takes the
    largest score where the quantile should be infinite, and then promises what so few scores cannot show.

    Args:
        scores: in any order.
        delta: in (0, 1).
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie in (0, 1), got {delta}")
    n = len(scores)
    # Written so that rounding (0.29 * 100 is below 29) cannot make the rank too low.
    rank = n + 1 - math.floor(round((n + 1) * delta, 9))
    return math.inf if rank > n else sorted(scores)[rank - 1]


def lynx_by_cue(traces: Sequence[Trace], delta: float, *, gold: bool = False, same: Same = str.__eq__) -> LYNX:
    """`LYNX` with the paper's two quantiles, from the cues of `traces`.

    A cue is safe when the answer of leaving there is that of full thinking (or, with `gold`, the right one: the
    paper's own label). The quantiles are of `1 - p_safe` over safe cues, and of `p_safe` over unsafe ones.

    What it promises: a random unsafe cue, exchangeable with those here, is taken for a safe one with probability at
    most delta. What it does not: anything about whole chains. A chain is left at the first of many cues that looks
    safe, so with m unsafe cues before that the chance of leaving too early can be m times delta; the cues of one
    chain depend on each other, so they are not exchangeable; and the share of wrong answers among early exits is
    another thing again. For a promise about answers calibrate `LYNX(threshold=...)` with `calibrate`.

    Args:
        traces: of full thinking, collected with `exit_answer`, with `p_safe`.
        delta: in (0, 1). Below 1 / (n + 1) for n cues of a class, that quantile is infinite: with too few unsafe cues
            the policy never leaves.
        gold: label by the gold answer, not by that of full thinking.
        same: compares two answers.

    Raises:
        ValueError: a question without the answer that labels its cues, or no cue with `p_safe` at all.
    """
    safe: list[float] = []
    unsafe: list[float] = []
    looks = LYNX().looks
    for trace in traces:
        wanted = trace.gold if gold else trace.answer
        for check in trace.checks:
            p = check.signals.get("p_safe", math.nan)
            if check.kind not in looks or not math.isfinite(p):
                continue
            if gold and wanted is None:
                raise ValueError(f"gold=True needs gold answers, and question {trace.question_id} has none")
            early = check.exit_answer
            if early is not None and wanted is not None and same(early, wanted):
                safe.append(1 - p)
            else:
                unsafe.append(p)
    if not safe and not unsafe:
        raise ValueError("no check of these traces has p_safe; collect them with a probe")
    return LYNX(q_safe=conformal_quantile(safe, delta), q_unsafe=conformal_quantile(unsafe, delta))
