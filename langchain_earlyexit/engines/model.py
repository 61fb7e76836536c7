"""What the scheduler asks of a language model: caches that fork and rewind, and one forward pass over many of them."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

KEPT = 64
"""Positions per branch whose hidden states are kept: a check reads its cue, which lies a few tokens back."""


@dataclass(frozen=True, slots=True)
class Row:
    """The work of one branch in one pass: append `ids` to `cache`, then give the logits after the last of them."""

    cache: Any
    ids: Sequence[int]
    layers: tuple[float, ...] = ()


class Model(ABC):
    """A language model. Called from one thread at a time.

    The memory of a cache is free again when the last reference to it goes. A model without a bound on its memory
    leaves the methods about it as they are.
    """

    @abstractmethod
    def new(self) -> Any:
        """An empty cache."""

    @abstractmethod
    def fork(self, cache: Any, length: int) -> Any:
        """An independent cache holding the first `length` tokens of `cache`."""

    @abstractmethod
    def rewind(self, cache: Any, length: int) -> None:
        """Drop all but the first `length` tokens."""

    @abstractmethod
    def forward(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        """Run all rows: the logits after the last id of each, shape [rows, vocabulary].

        A pass that raises leaves every cache as it was.
        """

    @abstractmethod
    def hidden(self, cache: Any, position: int) -> NDArray[np.float32]:
        """Hidden states at a token index, shape [layers, width]; KeyError when they are no longer kept."""

    @abstractmethod
    def close(self) -> None:
        """Free the weights."""

    # --- memory -----------------------------------------------------------------------------------------------------

    @property
    def limit(self) -> int:
        """Most bytes that all caches may take together."""
        return sys.maxsize

    def left(self) -> int:
        """Bytes that caches can still grow by."""
        return sys.maxsize

    def need(self, cache: Any, tokens: int) -> int:
        """Bytes it takes to append `tokens` to `cache`."""
        return 0

    def adopt(self, cache: Any, ids: Sequence[int]) -> int:
        """Fill an empty cache with the longest known beginning of `ids`; how many tokens that is."""
        return 0

    def remember(self, cache: Any, ids: Sequence[int]) -> None:  # noqa: B027 - most models keep nothing
        """Keep what `cache` holds of `ids`, its beginning, for others that begin alike."""

    def trim(self) -> None:  # noqa: B027 - nor hold any in reserve
        """Nothing has run for a while: give back memory that is held in reserve."""
