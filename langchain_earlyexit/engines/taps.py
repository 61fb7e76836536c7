"""Hidden states of chosen decoder layers at the newest tokens of a branch, read by hooks on just those layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from langchain_earlyexit.engines.model import KEPT

States = dict[int, tuple[tuple[NDArray[np.float32], ...], int]]
"""Token index -> what the wanted layers put out in a pass, each [tokens, width], and the token's place in it: most
states are never read, so none is made up before somebody does."""


class Tapped(NamedTuple):
    """A row of a pass: tokens `start` to `end` of it, up to token `length` of its branch; read at `depths`."""

    states: States
    depths: tuple[float, ...]
    start: int
    end: int
    length: int


def decoder_blocks(model: nn.Module, count: int) -> Sequence[nn.Module]:
    """A causal LM's decoder blocks: its first module list of `count`, its configured layers. Empty if it has none."""
    return next((list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count), [])


def block_at(depth: float, count: int) -> int:
    """The block whose output stands for a relative depth: 0.5 of 32 layers is the output of the 16th."""
    return min(count - 1, max(0, round(depth * count) - 1))


class Taps:
    """The decoder blocks of a causal LM, see `decoder_blocks`."""

    def __init__(self, model: Any) -> None:
        self.layers = int(model.config.get_text_config().num_hidden_layers)
        self._blocks: Sequence[nn.Module] = decoder_blocks(model, self.layers)
        self._known: dict[tuple[float, ...], tuple[int, ...]] = {}

    def close(self) -> None:
        """Let go of the weights."""
        self._blocks = ()

    def block(self, depth: float) -> int:
        """See `block_at`."""
        if not self._blocks:
            raise NotImplementedError("hidden states were asked for, but this model has no list of decoder layers")
        return block_at(depth, self.layers)

    @contextmanager
    def watch(self, blocks: Iterable[int]) -> Iterator[dict[int, Tensor]]:
        """While open, every forward pass leaves the output [1, N, width] of the wanted blocks in the dict."""
        seen: dict[int, Tensor] = {}

        def hook(index: int) -> Any:
            def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
                seen[index] = output[0] if isinstance(output, tuple) else output

            return keep

        handles = [self._blocks[i].register_forward_hook(hook(i)) for i in blocks]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def blocks(self, depths: tuple[float, ...]) -> tuple[int, ...]:
        """`block` of each."""
        found = self._known.get(depths)
        if found is None:
            found = self._known[depths] = tuple(self.block(depth) for depth in depths)
        return found

    def keep(self, rows: Sequence[Tapped], seen: Mapping[int, Tensor]) -> None:
        """Add the states that a pass has brought to those of its rows, which then hold their last `KEPT` positions."""
        rows = [row for row in rows if row.depths]
        if not rows:
            return
        size = next(iter(seen.values())).shape[1]
        index = None
        if size > len(rows):  # one copy per layer for all rows; a pass of one token each is taken as it is
            kept = [i for row in rows for i in range(max(row.start, row.end - KEPT), row.end)]
            index = torch.tensor(kept)  # on the processor: blocks may lie on several devices
        taken = {
            block: (out[0] if index is None else out[0, index]).float().cpu().numpy() for block, out in seen.items()
        }
        at = 0
        outputs: dict[tuple[float, ...], tuple[NDArray[np.float32], ...]] = {}
        for states, depths, start, end, length in rows:
            found = outputs.get(depths)
            if found is None:
                found = outputs[depths] = tuple(taken[block] for block in self.blocks(depths))
            if end - start == 1:
                states[length - 1] = (found, at)
                states.pop(length - 1 - KEPT, None)
                at += 1
                continue
            for position in range(length - min(end - start, KEPT), length):
                states[position] = (found, at)
                at += 1
            for position in [p for p in states if p < length - KEPT]:
                del states[position]


def forget(states: States, *, from_: int) -> None:
    """Drop the states of positions from `from_` on."""
    for position in [p for p in states if p >= from_]:
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
    outputs, place = states[position]
    return np.stack([output[place] for output in outputs])
