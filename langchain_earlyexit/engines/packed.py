"""Packed attention: one forward pass over the pending tokens of every branch, each with its own keys and values.

All rows stand side by side in one sequence `[1, N]` with their own position ids. The model's layers see nothing
unusual; only attention knows where each row starts and which store it belongs to.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from langchain_earlyexit.engines.scheduler import Row
from langchain_earlyexit.engines.taps import States, Taps, forget, read

NAME = "earlyexit_packed"
_GROW = 64
_IGNORED = frozenset(
    {
        "dropout",
        "is_causal",
        "position_ids",
        "cache_position",
        "position_embeddings",
        "use_cache",
        "output_router_logits",
    }
)
"""Attention keywords that change nothing here: inference has no dropout, and order follows from the store."""

_pass = threading.local()


class Store:
    """Keys and values of one branch: per layer two tensors [heads, capacity, size], `length` tokens filled."""

    __slots__ = ("__weakref__", "keys", "length", "states", "values")

    def __init__(self, layers: int) -> None:
        self.length = 0
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers
        self.states: States = {}

    def fork(self, length: int) -> Store:
        """An independent store with the first `length` tokens."""
        child = Store(len(self.keys))
        child.length = length
        child.states = {position: state for position, state in self.states.items() if position < length}
        for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            if key is not None and value is not None:
                child.keys[layer] = _grown(key[:, :length], length + _GROW)
                child.values[layer] = _grown(value[:, :length], length + _GROW)
        return child

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values [heads, n, size] of one layer; everything stored in it is returned as views."""
        end = self.length + key.shape[1]
        old_key, old_value = self.keys[layer], self.values[layer]
        if old_key is None or old_value is None or old_key.shape[1] < end:
            capacity = end + max(_GROW, end // 2)
            old_key = _grown(key[:, :0] if old_key is None else old_key[:, : self.length], capacity)
            old_value = _grown(value[:, :0] if old_value is None else old_value[:, : self.length], capacity)
            self.keys[layer], self.values[layer] = old_key, old_value
        old_key[:, self.length : end] = key
        old_value[:, self.length : end] = value
        return old_key[:, :end], old_value[:, :end]


def _grown(tensor: Tensor, capacity: int) -> Tensor:
    grown = tensor.new_empty(tensor.shape[0], capacity, tensor.shape[2])
    grown[:, : tensor.shape[1]] = tensor
    return grown


@dataclass(slots=True)
class _Pass:
    """One forward pass: where each row lies, and how often attention ran: a family that bypasses it is not packable."""

    spans: list[tuple[int, int, Store]]
    calls: int = 0


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Attention per row: `query` [1, heads, N, size], `key` and `value` [1, kv heads, N, size] to [1, N, heads, size].

    Raises:
        NotImplementedError: for a keyword with a value that it does not know: ignoring one would give wrong numbers.
    """
    unknown = [name for name, given in keywords.items() if given is not None and name not in _IGNORED]
    if unknown:
        raise NotImplementedError(f"packed attention does not know {unknown}")
    run: _Pass = _pass.current
    run.calls += 1
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = query.new_empty(query.shape[2], query.shape[1], value.shape[-1])
    layer: int = module.layer_idx  # type: ignore[assignment]
    for start, end, store in run.spans:
        keys, values = store.append(layer, key[0, :, start:end], value[0, :, start:end])
        out[start:end] = _attend(query[0, :, start:end], keys, values, scale, sliding_window, softcap, s_aux)
    return out.unsqueeze(0), None


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """`query` [heads, n, size] are the last n of the T tokens in `keys` and `values` [kv heads, T, size]."""
    heads, new, size = query.shape
    total = keys.shape[1]
    if window is not None and new == 1 and total > window:
        keys, values = keys[:, -window:], values[:, -window:]
        total, window = window, None
    if new == 1 and window is None and softcap is None and sinks is None and heads == keys.shape[0]:
        # Decoding as most models do it: one fused operation instead of five.
        fused = functional.scaled_dot_product_attention(query[None], keys[None], values[None], scale=scale)
        return fused[0].transpose(0, 1)
    grouped = query.reshape(keys.shape[0], -1, size)  # [kv heads, group * n, size]
    scores = torch.bmm(grouped * scale, keys.transpose(1, 2))
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.view(heads, new, total)
    if new > 1:
        place = torch.arange(total - new, total, device=query.device).unsqueeze(1)
        seen = torch.arange(total, device=query.device).unsqueeze(0)
        hidden = seen > place
        if window is not None:
            hidden = hidden | (seen <= place - window)
        scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is None:
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32)
    else:
        sink = sinks.view(heads, 1, 1).expand(heads, new, 1).to(scores.dtype)
        weights = torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1, dtype=torch.float32)[..., :-1]
    mixed = torch.bmm(weights.to(values.dtype).view(keys.shape[0], -1, total), values)
    return mixed.view(heads, new, -1).transpose(0, 1)


class PackedModel:
    """A `scheduler.Model` over a `transformers` causal LM whose attention goes through `AttentionInterface`.

    Args:
        model: the causal LM, in eval mode; its attention implementation is switched to the packed one.
    """

    def __init__(self, model: Any) -> None:
        from transformers import AttentionInterface

        # No mask function is registered with it: transformers then builds no mask at all, which is what rows need.
        AttentionInterface.register(NAME, attention)
        model.set_attn_implementation(NAME)
        self._model: Any = model
        self._device = model.device
        self._taps = Taps(model)
        self.layers = self._taps.layers
        self.calls = self.passes = 0  # of attention, and of the model: a layer that bypasses it makes a difference

    def new(self) -> Store:
        return Store(self.layers)

    def fork(self, cache: Store, length: int) -> Store:
        return cache.fork(length)

    def rewind(self, cache: Store, length: int) -> None:
        cache.length = length
        forget(cache.states, from_=length)

    @torch.inference_mode()
    def forward(self, rows: Sequence[Row]) -> list[NDArray[np.float32]]:
        ids: list[int] = []
        positions: list[int] = []
        spans: list[tuple[int, int, Store]] = []
        for row in rows:
            start = len(ids)
            ids.extend(row.ids)
            positions.extend(range(row.cache.length, row.cache.length + len(row.ids)))
            spans.append((start, len(ids), row.cache))
        _pass.current = run = _Pass(spans)
        last = [end - 1 for _, end, _ in spans]
        try:
            with self._taps.watch(depth for row in rows for depth in row.layers) as seen:
                logits = self._model(
                    input_ids=torch.tensor([ids], device=self._device),
                    position_ids=torch.tensor([positions], device=self._device),
                    use_cache=False,
                    logits_to_keep=torch.tensor(last, device=self._device) if len(last) < len(ids) else 0,
                ).logits
        finally:
            _pass.current = None
        self.calls += run.calls
        self.passes += 1
        for row, (start, end, store) in zip(rows, spans, strict=True):
            store.length += end - start
            self._taps.keep(store.states, row.layers, seen, start, end, store.length)
        found: NDArray[np.float32] = logits[0].float().cpu().numpy()
        return list(found)

    def hidden(self, cache: Store, position: int) -> NDArray[np.float32]:
        return read(cache.states, position)

    def close(self) -> None:
        self._model = None
        self._taps.close()
