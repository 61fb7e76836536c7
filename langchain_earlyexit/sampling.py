"""From rows of logits to one token each: sampling settings, keyed randomness, and what is read on the way.

Randomness is a pure function of (seed, branch, position), never a running generator: a request draws the same
tokens whatever shares its batch, however often it looked, and however much it speculated and threw away.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

_Real = TypeVar("_Real", np.float32, np.float64)
_HEADS = (64, 1024)
"""Candidates sorted at first when `top_p` cuts: sorting a whole 150k vocabulary would cost more than the model."""

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


class Wanted(Protocol):
    """What to do with one row of logits: `engines.program.Sample` is one."""

    @property
    def sampling(self) -> Sampling:
        """How to draw."""

    @property
    def forbid(self) -> Collection[int]:
        """Ids that may not be drawn."""

    @property
    def watch(self) -> Sequence[int]:
        """Ids whose log-probability is wanted."""

    @property
    def entropy(self) -> bool:
        """Whether that of the whole distribution is wanted."""

    @property
    def allow(self) -> bytes | None:
        """One bit per id, the lowest first, set for those that may be drawn; ids past its end may not."""


def stream_key(seed: int, branch: int) -> int:
    """The randomness of one branch of one request: what its positions are drawn with."""
    return _mix(_mix(0, seed), branch)


def draw(key: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but a `stream_key` and a position."""
    return (_mix(key, position) >> 11) / (1 << 53)


def _mix(state: int, key: int) -> int:
    """One step of SplitMix64. Keys are mixed one after the other: seed 1, branch 0 is not seed 0, branch 1."""
    state = (state + 0x9E3779B97F4A7C15 + key) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


def pick_all(logits: NDArray[np.float32], wanted: Sequence[Wanted], draws: Sequence[float]) -> list[Token]:
    """Draw one token from each row. A row's token does not depend on the other rows.

    Args:
        logits: as the model gives them, shape [rows, vocabulary].
        wanted: what to do with each row.
        draws: a uniform number in [0, 1) for each row; greedy rows ignore theirs.

    Raises:
        ValueError: when every token of a row is forbidden, or a row holds no finite maximum.
    """
    best = logits.argmax(axis=1)
    rows = np.arange(len(wanted))
    top = logits[rows, best]
    peak = top.astype(np.float64)
    if not np.isfinite(peak).all():
        raise ValueError("the model returned logits without a finite maximum; its weights or dtype are broken")
    spread = logits - top[:, None]
    norm = peak + np.log(np.exp(spread, out=spread).sum(axis=1, dtype=np.float64))
    chosen = best
    masked = [i for i, want in enumerate(wanted) if want.forbid or want.allow is not None]
    if masked:
        logits, plain = logits.copy(), logits
        for i in masked:
            _mask(logits[i], wanted[i])
        chosen = logits.argmax(axis=1)
        if not np.isfinite(logits[masked, chosen[masked]]).all():
            raise ValueError("no token is left to sample: all of them are forbidden here")
    else:
        plain = logits
    by_sampling: dict[Sampling, list[int]] = {}
    for i, want in enumerate(wanted):
        if want.sampling.temperature != 0.0:
            by_sampling.setdefault(want.sampling, []).append(i)
    if by_sampling:
        chosen = chosen.copy()
        for sampling, members in by_sampling.items():
            whole = len(members) == len(wanted)
            chosen[members] = _draw(
                logits if whole else logits[members], sampling, np.array([draws[i] for i in members])
            )
    bests, norms = (peak - norm).tolist(), norm.tolist()
    logprobs = bests if chosen is best else (plain[rows, chosen] - norm).tolist()
    return [
        Token(
            id_,
            logprob,
            highest,
            tuple(float(plain[i, w]) - norms[i] for w in want.watch) if want.watch else (),
            _entropy(plain[i], norms[i]) if want.entropy else None,
        )
        for i, (want, id_, logprob, highest) in enumerate(zip(wanted, chosen.tolist(), logprobs, bests, strict=True))
    ]


def _mask(logits: NDArray[np.float32], want: Wanted) -> None:
    if want.allow is not None:
        logits[~unpacked(want.allow, len(logits))] = -np.inf
    if want.forbid:
        logits[list(want.forbid)] = -np.inf


@lru_cache(maxsize=64)
def unpacked(allow: bytes, size: int) -> NDArray[np.bool_]:
    """The mask of `Sample.allow` as booleans of shape [size]; ids past its end may not be drawn. Read-only."""
    bits = np.unpackbits(np.frombuffer(allow, dtype=np.uint8), count=size, bitorder="little")
    bits.flags.writeable = False
    return bits.view(np.bool_)


def _entropy(logits: NDArray[np.float32], norm: float) -> float:
    logp = logits.astype(np.float64) - norm
    p = np.exp(logp)
    return float(-(p * np.where(p > 0, logp, 0.0)).sum())


def _draw(logits: NDArray[np.float32], sampling: Sampling, draws: NDArray[np.float64]) -> NDArray[np.intp]:
    """One id per row of [rows, vocabulary], by where each uniform number falls among the weights that are left."""
    if 0 < sampling.top_k < logits.shape[1]:
        # Only what is left is exponentiated: of a vocabulary of 150,000 the rest would cost more than a small model.
        ids, logits = _descending(logits, sampling.top_k)
        among = _draw(logits, replace(sampling, top_k=0), draws)
        found: NDArray[np.intp] = np.take_along_axis(ids, among[:, None], axis=1)[:, 0]
        return found
    # Scaled before the exponential, so that a tiny temperature sends all but the likeliest to zero.
    weights = np.exp((logits - logits.max(axis=1, keepdims=True)).astype(np.float64) / sampling.temperature)
    size = weights.shape[1]
    if sampling.top_p == 1.0:  # nothing to sort for
        if sampling.min_p:
            weights[weights < sampling.min_p] = 0.0
        return _inverse(weights, draws)
    out = np.empty(len(weights), dtype=np.intp)
    # Few tokens hold most of the weight: a row whose head does not reach `top_p` goes on to a longer one.
    left = np.arange(len(weights))
    for head in [h for h in _HEADS if h < size] + [size]:
        those = weights if len(left) == len(weights) else weights[left]
        ids, sorted_ = _descending(those, head)
        before = np.cumsum(sorted_, axis=1) - sorted_
        keep = before < sampling.top_p * those.sum(axis=1)[:, None]
        # Among equal weights at its end, a head holds some and not others: what is kept must lie above them.
        least = np.take_along_axis(sorted_, keep.sum(axis=1, keepdims=True) - 1, axis=1)[:, 0]
        done = least > sorted_[:, -1] if head < size else np.ones(len(left), dtype=bool)
        kept = np.where(keep & (sorted_ >= sampling.min_p), sorted_, 0.0)[done]
        at = left[done]
        out[at] = np.take_along_axis(ids[done], _inverse(kept, draws[at])[:, None], axis=1)[:, 0]
        left = left[~done]
        if not len(left):
            break
    return out


def _inverse(weights: NDArray[np.float64], draws: NDArray[np.float64]) -> NDArray[np.intp]:
    """Per row the first index at which the cumulative weight passes the share of its uniform number."""
    cumulative = np.cumsum(weights, axis=1)
    reached = (cumulative <= (draws * cumulative[:, -1])[:, None]).sum(axis=1)
    # Rounding may leave a number at the very end: it takes the last token that has any weight.
    last = weights.shape[1] - 1 - (weights[:, ::-1] > 0.0).argmax(axis=1)
    found: NDArray[np.intp] = np.minimum(reached, last)
    return found


def _descending(weights: NDArray[_Real], width: int) -> tuple[NDArray[np.intp], NDArray[_Real]]:
    """Ids and values of the `width` largest weights per row, largest first; ties go to the lower id: order never
    drifts.
    """
    size = weights.shape[1]
    if width >= size:
        ids = np.broadcast_to(np.arange(size), weights.shape)
    else:
        ids = np.sort(np.argpartition(weights, size - width, axis=1)[:, size - width :], axis=1)
    taken = np.take_along_axis(weights, ids, axis=1)
    order = np.argsort(-taken, axis=1, kind="stable")
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(taken, order, axis=1)
