"""Learn-then-Test (arXiv 2110.01052): which settings of a path keep a risk below epsilon, with probability 1 - delta.

The settings are tested in one order that was fixed before any loss was seen, each with the exact binomial test of
"its risk is above epsilon" at the full delta, until one fails. This needs no correction for how many there are, and
no risk that grows along the path: a true null must be rejected before anything beyond it can be chosen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

try:
    from scipy.stats import beta, binom
except ImportError as missing:
    raise ImportError("exact binomial tests need scipy: pip install 'langchain-earlyexit[lab]'") from missing


def p_values(losses: Sequence[int] | NDArray[np.integer], n: int, epsilon: float) -> NDArray[np.float64]:
    """Chance of at most so many losses in `n` questions if the risk were exactly `epsilon`.

    Args:
        losses: questions at a loss, per setting (any shape).
        n: questions.
        epsilon: in (0, 1).

    Returns:
        Of the shape of `losses`.
    """
    return np.asarray(binom.cdf(np.asarray(losses), n, epsilon), dtype=np.float64)


def certified(losses: Sequence[int] | NDArray[np.integer], n: int, epsilon: float, delta: float) -> int:
    """Index of the last setting before the first that fails its test; -1 where the first one fails.

    Args:
        losses: questions at a loss, per setting, in the order of the path.
        n: questions.
        epsilon: the risk to keep, in (0, 1).
        delta: chance that the risk of the setting returned is above epsilon, at most; in (0, 1).
    """
    passed = p_values(losses, n, epsilon) <= delta
    return len(passed) - 1 if passed.all() else int(np.argmin(passed)) - 1


def certified_together(
    losses: Sequence[int] | NDArray[np.integer], n: int, levels: Sequence[float], delta: float
) -> list[int]:
    """`certified` for several levels that share `delta` evenly: all of them hold with probability 1 - delta."""
    return [certified(losses, n, epsilon, delta / len(levels)) for epsilon in levels]


def questions_needed(epsilon: float, delta: float, losses: int = 0) -> int:
    """The fewest questions of which `losses` may be at a loss for `epsilon` to be certified at `delta`."""
    low, high = losses, max(1, losses)
    while binom.cdf(losses, high, epsilon) > delta:
        low, high = high, 2 * high
    while high - low > 1:  # the tail falls as questions are added
        middle = (low + high) // 2
        low, high = (middle, high) if binom.cdf(losses, middle, epsilon) > delta else (low, middle)
    return high


def strictest(n: int, delta: float) -> float:
    """The smallest epsilon that `n` questions can certify at `delta`, when none of them is at a loss."""
    return 1 - math.exp(math.log(delta) / n)


def upper_bound(losses: int, n: int, delta: float) -> float:
    """Clopper-Pearson: the risk is below this with probability at least 1 - delta. 1 for no questions."""
    return 1.0 if losses >= n else float(beta.ppf(1 - delta, losses + 1, n - losses))
