"""One cache and one forward pass per branch: the plain way, right for every causal LM that `transformers` runs."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from langchain_earlyexit.engines.model import Model, Row
from langchain_earlyexit.engines.taps import States, Tapped, Taps, forget, read


class _Branch:
    __slots__ = ("__weakref__", "cache", "ids", "states")

    def __init__(self) -> None:
        self.cache: Any = None
        self.ids: list[int] = []
        self.states: States = {}

    def cut(self, length: int) -> None:
        """Keep `length` tokens. Where the cache cannot be cut, it is dropped, and the ids are fed again."""
        removed = len(self.ids) - length
        del self.ids[length:]
        forget(self.states, from_=length)
        if not removed or self.cache is None:
            return
        # A recurrent layer cannot be cut back, and `crop` on one fails without an error: `is_croppable` must be asked.
        if length and getattr(self.cache, "is_croppable", False):
            try:
                self.cache.crop(-removed)
                return
            except RuntimeError:  # a sliding window that has already dropped what the cut would need
                pass
        self.cache = None


class SeparateModel(Model):
    """A model that packs nothing: for models whose layers keep a state that rows cannot share.

    Args:
        model: the causal LM, in eval mode.
        one_by_one: feed single tokens to a cache that holds some already: there are recurrent layers that go on from
            their state by one token only.
    """

    def __init__(self, model: Any, *, one_by_one: bool = False) -> None:
        self._model: Any = model
        self._one_by_one = one_by_one
        self._cache_name = "past_key_values"
        self._device = model.device
        self._taps = Taps(model)
        self._branches: weakref.WeakSet[_Branch] = weakref.WeakSet()
        self._limit: int | None = None
        self._token_bytes = self._branch_bytes = 0
        self._measured = (0, 0)  # tokens of the longest cache whose bytes were counted, and these

    def new(self) -> _Branch:
        branch = _Branch()
        self._branches.add(branch)
        return branch

    def fork(self, cache: _Branch, length: int) -> _Branch:
        child = self.new()
        child.ids, child.states = cache.ids[:], dict(cache.states)
        child.cache = copy.deepcopy(cache.cache)  # exact for every kind of cache
        child.cut(length)
        return child

    def rewind(self, cache: _Branch, length: int) -> None:
        cache.cut(length)

    @torch.inference_mode()
    def forward(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        before = [len(row.cache.ids) for row in rows]
        try:
            return np.stack([self._go_on(row) for row in rows])
        except BaseException:
            for row, length in zip(rows, before, strict=True):
                # A cache that a pass has broken off in is of no use: it is built anew from the ids.
                row.cache.cache = None
                row.cache.cut(length)
            raise

    def _go_on(self, row: Row) -> NDArray[np.float32]:
        if self._one_by_one and row.cache.cache is not None:
            for i in row.ids[:-1]:
                self._forward(Row(row.cache, [i], row.layers))
            row = Row(row.cache, row.ids[-1:], row.layers)
        return self._forward(row)

    def _forward(self, row: Row) -> NDArray[np.float32]:
        branch: _Branch = row.cache
        ids = [*branch.ids, *row.ids] if branch.cache is None else list(row.ids)
        with self._taps.watch(set(self._taps.blocks(row.layers))) as seen:
            out = self._model(
                input_ids=torch.tensor([ids], device=self._device),
                use_cache=True,
                logits_to_keep=1,
                **({} if branch.cache is None else {self._cache_name: branch.cache}),
            )
        if "past_key_values" not in out:  # Mamba has a name of its own for it
            self._cache_name = "cache_params"
        branch.cache = out[self._cache_name]
        branch.ids.extend(row.ids)
        self._taps.keep([Tapped(branch.states, row.layers, 0, len(ids), len(branch.ids))], seen)
        self._measure(branch)
        logits: NDArray[np.float32] = out.logits[0, -1].float().cpu().numpy()
        return logits

    # --- memory -----------------------------------------------------------------------------------------------------

    def bound(self, limit: int) -> None:
        """Let all caches together take at most `limit` bytes, at what tokens and branches took so far."""
        self._limit = limit

    @property
    def limit(self) -> int:
        return super().limit if self._limit is None else self._limit

    def left(self) -> int:
        held = [len(branch.ids) for branch in list(self._branches) if branch.ids]
        return self.limit - self._token_bytes * sum(held) - self._branch_bytes * len(held)

    def need(self, cache: _Branch, tokens: int) -> int:
        return self._token_bytes * tokens + (0 if cache.ids else self._branch_bytes)

    def _measure(self, branch: _Branch) -> None:
        """What a token takes, and a branch whatever its length: a recurrent state is as large after the first token."""
        before, was = self._measured
        length = len(branch.ids)
        if length < 2 * before:
            return
        held, growing = _bytes_of(branch.cache, length)
        if not before:  # one point only: the tensors that are as long as the branch are told from the others
            self._token_bytes = max(1, growing // length)
        else:
            self._token_bytes = max(1, (held - was) // (length - before))
        self._branch_bytes = max(0, held - self._token_bytes * length)
        self._measured = length, held

    def hidden(self, cache: _Branch, position: int) -> NDArray[np.float32]:
        return read(cache.states, position)

    def close(self) -> None:
        self._model = None
        self._taps.close()


def _bytes_of(cache: Any, length: int) -> tuple[int, int]:
    """Bytes of all tensors that a cache holds, however it names them, and of those with an axis of `length`."""
    total, growing, pending, seen = 0, 0, [cache], set[int]()
    while pending:
        held = pending.pop()
        if id(held) in seen:
            continue
        seen.add(id(held))
        if isinstance(held, torch.Tensor):
            size = held.numel() * held.element_size()
            total += size
            growing += size if length in held.shape else 0
        elif isinstance(held, dict):
            pending.extend(held.values())
        elif isinstance(held, list | tuple):
            pending.extend(held)
        elif hasattr(held, "__dict__"):
            pending.extend(vars(held).values())
    return total, growing
