"""Hidden states of chosen decoder layers at the newest tokens of a branch, read by hooks on just those layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

KEPT = 64
"""Positions per branch whose states are kept: a check reads its cue, which lies a few tokens back."""

States = dict[int, NDArray[np.float32]]
"""Token index -> float32 array [layers, width]."""


class Taps:
    """The decoder blocks of a causal LM, found as its one module list of the configured length."""

    def __init__(self, model: Any) -> None:
        self.layers = int(model.config.get_text_config().num_hidden_layers)
        found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == self.layers]
        self._blocks: Sequence[nn.Module] = list(found[0]) if found else ()

    def close(self) -> None:
        """Let go of the weights."""
        self._blocks = ()

    def block(self, depth: float) -> int:
        """The block whose output stands for a relative depth: 0.5 of 32 layers is the output of the 16th."""
        if not self._blocks:
            raise NotImplementedError("hidden states were asked for, but this model has no list of decoder layers")
        return min(self.layers - 1, max(0, round(depth * self.layers) - 1))

    @contextmanager
    def watch(self, depths: Iterable[float]) -> Iterator[dict[int, Tensor]]:
        """While open, every forward pass leaves the output [1, N, width] of the wanted blocks in the dict."""
        seen: dict[int, Tensor] = {}

        def hook(index: int) -> Any:
            def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
                seen[index] = output[0] if isinstance(output, tuple) else output

            return keep

        handles = [self._blocks[i].register_forward_hook(hook(i)) for i in {self.block(depth) for depth in depths}]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def keep(
        self, states: States, depths: Sequence[float], seen: dict[int, Tensor], start: int, end: int, length: int
    ) -> None:
        """Add the states of a row: `start` to `end` of the pass, and up to token `length` of its branch.

        `states` then holds at most the last `KEPT` positions.
        """
        if not depths:
            return
        first = max(start, end - KEPT)
        taken = torch.stack([seen[self.block(depth)][0, first:end] for depth in depths]).float().cpu().numpy()
        for back in range(1, taken.shape[1] + 1):
            states[length - back] = taken[:, -back]
        forget(states, below=length - KEPT)


def forget(states: States, *, below: int = 0, from_: int | None = None) -> None:
    """Drop the states of positions below `below`, and from `from_` on."""
    for position in [p for p in states if p < below or (from_ is not None and p >= from_)]:
        del states[position]


def read(states: States, position: int) -> NDArray[np.float32]:
    """The states at `position`.

    Raises:
        KeyError: when they are not kept.
    """
    if position not in states:
        raise KeyError(
            f"no hidden state is kept for token {position}: the branch was opened without layers, or more than {KEPT} "
            "tokens have come since"
        )
    return states[position]
