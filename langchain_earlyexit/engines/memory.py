"""The tensors of the key/value memory; whose page is whose, `pages` knows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from langchain_earlyexit.engines.pages import PAGE, Growth

_AHEAD = 128 << 20
"""Bytes that are made room for at once: to move what is held costs a pass in the middle of a batch its time, and on a
processor untouched memory costs nothing."""


class Memory:
    """Keys and values: per layer two tensors [pages, heads, `PAGE`, size], made when a layer first writes.

    Attributes:
        capacity: pages there is room for.
        page_bytes: bytes of one page in all layers; 0 before the first pass.
    """

    def __init__(self, layers: int, device: torch.device) -> None:
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers
        self._device = device
        self.capacity = 0
        self.page_bytes = 0

    def reserve(self, top: int, most: int | None) -> None:
        """Make room for pages below `top`; where that fails, everything is as it was.

        One tensor at a time is copied, and untouched memory costs nothing until it is written.

        Args:
            top: pages there are about to be.
            most: pages there may ever be; None for no bound.
        """
        if top <= self.capacity:
            return
        ahead = self.capacity + self.capacity // 2
        if self.page_bytes:
            ahead = max(ahead, _AHEAD // self.page_bytes)
        capacity = max(top, ahead if most is None else min(most, ahead))
        for wanted in dict.fromkeys((capacity, top)):
            try:
                self._grow(wanted)
            except (RuntimeError, MemoryError):
                if wanted == top:
                    raise  # else there may be room for what is needed now, and no more
            else:
                return

    def _grow(self, capacity: int) -> None:
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                if old is not None and len(old) < capacity:  # a layer may have grown before another failed to
                    new = old.new_empty(capacity, *old.shape[1:])
                    new[: len(old)] = old
                    tensors[layer] = new
        self.capacity = capacity

    def prepare(self, growths: Sequence[Growth]) -> None:
        """Copy the shared pages that will be written into, and clear the fresh ones."""
        copies = [copy for growth in growths for copy in growth.copies]
        fresh = [page for growth in growths for page in growth.fresh]
        if not copies and not fresh:
            return
        source, target = torch.tensor(copies, device=self._device).view(-1, 2).unbind(1)
        cleared = torch.tensor(fresh, device=self._device)
        for held in (*self.keys, *self.values):
            if held is None:
                continue
            # What an earlier owner left is masked, but no mask stops a value that is not a number.
            if len(fresh) == 1:
                held[fresh[0]].zero_()
            elif fresh:
                held[cleared] = 0.0
            if copies:
                held[target] = held[source]

    def shift(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy pages, each to another that is free."""
        if moves:
            source, target = torch.tensor(moves, device=self._device).unbind(1)
            for held in (*self.keys, *self.values):
                if held is not None:
                    held[target] = held[source]

    def shrink(self, used: int) -> None:
        """Hold the first `used` pages and room for half as many more; where that fails, everything is as it was."""
        capacity = used + used // 2
        # All are made before any is written: that is what can fail.
        spare = [None if old is None else old.new_empty(capacity, *old.shape[1:]) for old in (*self.keys, *self.values)]
        layers = len(self.keys)
        for i, new in enumerate(spare):
            tensors, layer = (self.keys, i) if i < layers else (self.values, i - layers)
            old = tensors[layer]
            if old is not None and new is not None:
                new[:used] = old[:used]
                tensors[layer] = new  # one by one: the old one's memory goes before the next is written
        self.capacity = capacity

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens of a pass [N, heads, size] at `slots` [N * heads]; all pages of the layer."""
        keys, values = self.keys[layer], self.values[layer]
        if keys is None or values is None:
            keys = self.keys[layer] = key.new_zeros(self.capacity, key.shape[1], PAGE, key.shape[2])
            values = self.values[layer] = value.new_zeros(self.capacity, value.shape[1], PAGE, value.shape[2])
            self.page_bytes += (keys[0].numel() + values[0].numel()) * keys.element_size()
        keys.view(-1, keys.shape[-1]).index_put_((slots,), key)
        values.view(-1, values.shape[-1]).index_put_((slots,), value)
        return keys, values
