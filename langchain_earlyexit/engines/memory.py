"""The tensors of the key/value memory; whose page is whose, `pages` knows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from langchain_earlyexit.engines.pages import PAGE, Growth


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

    def prepare(self, growths: Sequence[Growth], top: int, most: int | None) -> None:
        """Make room for pages below `top`, copy the shared pages that will be written into, clear the fresh ones.

        Args:
            growths: what is to be copied and cleared.
            top: pages there are by now.
            most: pages there may ever be; None for no bound.
        """
        if top > self.capacity:
            ahead = self.capacity + self.capacity // 2
            self.resize(max(top, ahead if most is None else min(most, ahead)))
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

    def resize(self, capacity: int, kept: Sequence[int] | None = None) -> None:
        """Hold `capacity` pages, of which the first are those of `kept`, or else all that there were.

        One tensor at a time is copied, and untouched memory costs nothing until it is written.
        """
        order = None if kept is None else torch.tensor(kept, dtype=torch.int64, device=self._device)
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                if old is None:
                    continue
                new = old.new_empty(capacity, *old.shape[1:])
                if order is None:
                    new[: self.capacity] = old
                else:
                    torch.index_select(old, 0, order, out=new[: len(order)])
                tensors[layer] = new
        self.capacity = capacity

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens of a pass [N, heads, size] at `slots` [N * heads]; all pages of the layer."""
        keys, values = self.keys[layer], self.values[layer]
        if keys is None or values is None:
            keys = self.keys[layer] = key.new_zeros(self.capacity, key.shape[1], PAGE, key.shape[2])
            values = self.values[layer] = value.new_zeros(self.capacity, value.shape[1], PAGE, value.shape[2])
            self.page_bytes += (keys[0].numel() + values[0].numel()) * keys.element_size()
        keys.view(-1, keys.shape[-1]).index_copy_(0, slots, key.reshape(-1, keys.shape[-1]))
        values.view(-1, values.shape[-1]).index_copy_(0, slots, value.reshape(-1, values.shape[-1]))
        return keys, values
