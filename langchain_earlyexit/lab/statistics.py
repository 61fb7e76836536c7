"""Small statistics on paired outcomes: intervals by resampling questions, and how well a score ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_FEW = 32
_AT_ONCE = 1_000_000
"""Draws that are held in memory together."""


def paired_bootstrap(
    ours: Sequence[float], theirs: Sequence[float], *, draws: int = 10_000, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of `ours - theirs` over questions, and its percentile interval when questions are drawn again.

    Args:
        ours: one number per question.
        theirs: the same questions in the same order.
        draws: bootstrap samples.
        level: coverage of the interval.
        seed: of the resampling.

    Raises:
        ValueError: when the two differ in length, or are empty.
    """
    if len(ours) != len(theirs) or not len(ours):
        raise ValueError(f"paired samples of one question each are needed, got {len(ours)} and {len(theirs)}")
    gaps = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    rng = np.random.default_rng(seed)
    values, counts = np.unique(gaps, return_counts=True)
    if len(values) <= _FEW:  # how often each is drawn is multinomial: the same law, and much faster
        means = rng.multinomial(len(gaps), counts / len(gaps), size=draws) @ values / len(gaps)
    else:
        each = max(1, _AT_ONCE // len(gaps))
        sizes = [each] * (draws // each) + [draws % each]
        means = np.concatenate([gaps[rng.integers(0, len(gaps), (size, len(gaps)))].mean(axis=1) for size in sizes])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(gaps.mean()), float(low), float(high)


def auroc(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """Chance that a positive scores above a negative, ties counting half; NaN when one of the two is missing."""
    values = np.asarray(scores, dtype=np.float64)
    truth = np.asarray(labels, dtype=bool)
    positives, negatives = int(truth.sum()), int((~truth).sum())
    if not positives or not negatives:
        return float("nan")
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(counts) - (counts - 1) / 2
    return float((mean_rank[inverse][truth].sum() - positives * (positives + 1) / 2) / (positives * negatives))
