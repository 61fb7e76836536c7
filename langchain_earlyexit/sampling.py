"""From a row of logits to one token: sampling settings, keyed randomness, and what is read on the way.

Randomness is a pure function of (seed, branch, position), never a running generator: a request draws the same
tokens whatever shares its batch, however often it looked, and however much it speculated and threw away.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_HEAD = 1024
"""Candidates sorted first when only `top_p` cuts: sorting a whole 150k vocabulary would cost more than the model."""

_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one token is drawn. `temperature` 0 is greedy; filters apply in the order top-k, top-p, min-p."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0.0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be a finite number >= 0, not {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must lie in (0, 1], not {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0 (0 keeps every token), not {self.top_k}")
        if not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p must lie in [0, 1], not {self.min_p}")


GREEDY = Sampling()


@dataclass(frozen=True, slots=True)
class Token:
    """One sampled token.

    Attributes:
        id: token id.
        logprob: its natural log-probability under the model itself (temperature 1, nothing masked).
        best: log-probability of the likeliest token.
        watched: log-probabilities of the ids the caller asked to watch, in that order.
        entropy: entropy of the distribution in nats, where it was asked for.
    """

    id: int
    logprob: float
    best: float
    watched: tuple[float, ...] = ()
    entropy: float | None = None


def uniform(seed: int, branch: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but its three keys (SplitMix64 over their mix)."""
    state = 0
    for key in (seed, branch, position):  # each mixed before the next: seed 1, branch 0 is not seed 0, branch 1
        state = (state + 0x9E3779B97F4A7C15 + key) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return (state >> 11) / (1 << 53)


def pick(
    logits: NDArray[np.float32],
    sampling: Sampling,
    u: float,
    *,
    forbid: Collection[int] = (),
    watch: Sequence[int] = (),
    entropy: bool = False,
) -> Token:
    """Draw one token from `logits` (shape [vocabulary]) with the uniform number `u`.

    Raises:
        ValueError: when every token is forbidden, or the logits hold no finite number.
    """
    peak = float(logits.max())
    if not math.isfinite(peak):
        raise ValueError("the model returned logits without a finite maximum; its weights or dtype are broken")
    norm = peak + math.log(float(np.exp(logits - peak).sum(dtype=np.float64)))
    allowed = logits
    if forbid:
        allowed = logits.copy()
        allowed[list(forbid)] = -np.inf
        if not math.isfinite(float(allowed.max())):
            raise ValueError("no token is left to sample: all of them are forbidden here")
    chosen = int(allowed.argmax()) if sampling.temperature == 0.0 else _draw(allowed, sampling, u)
    spread = None
    if entropy:
        logp = logits.astype(np.float64) - norm
        p = np.exp(logp)
        spread = float(-(p * np.where(p > 0, logp, 0.0)).sum())
    return Token(
        id=chosen,
        logprob=float(logits[chosen]) - norm,
        best=peak - norm,
        watched=tuple(float(logits[i]) - norm for i in watch),
        entropy=spread,
    )


def _draw(logits: NDArray[np.float32], sampling: Sampling, u: float) -> int:
    scaled = logits.astype(np.float64)
    weights = np.exp((scaled - scaled.max()) / sampling.temperature)  # the likeliest weighs 1
    if not sampling.top_k and sampling.top_p == 1.0:  # nothing to sort for
        return _inverse(weights, np.flatnonzero(weights >= sampling.min_p), u)
    width = min(len(weights), sampling.top_k or len(weights))
    head = _descending(weights, width if sampling.top_k else min(width, _HEAD))
    total = float(weights[head].sum() if sampling.top_k else weights.sum())
    if sampling.top_p < 1.0:
        if len(head) < width and float(weights[head].sum()) < sampling.top_p * total:
            head = _descending(weights, width)
        # Keep the smallest set that reaches top_p: each token whose predecessors do not reach it yet.
        before = np.cumsum(weights[head]) - weights[head]
        head = head[before < sampling.top_p * total]
    return _inverse(weights, head[weights[head] >= sampling.min_p], u)


def _inverse(weights: NDArray[np.float64], head: NDArray[np.intp], u: float) -> int:
    """The index of `head` at which the cumulative weight passes the share `u`."""
    cumulative = np.cumsum(weights[head])
    return int(head[min(int(np.searchsorted(cumulative, u * cumulative[-1], side="right")), len(head) - 1)])


def _descending(weights: NDArray[np.float64], width: int) -> NDArray[np.intp]:
    """Indices of the `width` largest weights, largest first; ties go to the lower id, so order never drifts."""
    whole = width >= len(weights)
    head = np.arange(len(weights)) if whole else np.sort(np.argpartition(weights, -width)[-width:])
    return head[np.argsort(-weights[head], kind="stable")]
