"""Attention of one packed pass: every row reads its own pages, and pages that rows share are read once.

Rows that decode one token are attended together: queries meet each page in one matrix product, and what a row finds
in its pages is merged by the log of the sum of exponentials. Rows that bring several tokens are attended one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from langchain_earlyexit.engines.memory import Memory
from langchain_earlyexit.engines.pages import PAGE, Table

_WIDENS = hasattr(torch.ops.aten.bmm, "dtype")
"""Whether this PyTorch gives products of half precision in float32, which it does on CUDA."""

_SHARED = 2
"""Rows of one page up to which its queries are padded to the same number as those of other pages."""


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens `start` to `end` of the pass are the last of the `total` that `table` then holds."""

    start: int
    end: int
    table: Table
    total: int


_Shape = tuple[int | None, int, int]
"""Sliding window, heads, kv heads."""

Kept = dict[_Shape, tuple[tuple[tuple[int, ...], ...], "_Plan"]]
"""The last plans and the pages they are for: mostly a pass reads the pages that the one before read."""


class Pass:
    """One forward pass over `spans`, which `memory` has been prepared for.

    Attributes:
        calls: how often attention ran: a family that bypasses it is not packable.
    """

    def __init__(self, memory: Memory, spans: Sequence[Span], device: torch.device, kept: Kept) -> None:
        self.calls = 0
        self._kept = kept
        self._memory = memory
        self._device = device
        self._ones = [span for span in spans if span.end - span.start == 1]
        self._long = [span for span in spans if span.end - span.start > 1]
        self._width = spans[-1].end
        self._at = None if not self._long else self._index([span.start for span in self._ones])
        pages, offsets = list[int](), list[int]()
        for span in spans:
            for i in range(span.total - span.end + span.start, span.total):
                pages.append(span.table.pages[i // PAGE])
                offsets.append(i % PAGE)
        self._pages = np.array(pages)
        self._offsets = np.array(offsets)
        self._slots: dict[int, Tensor] = {}
        self._seen: dict[tuple[int, int | None], tuple[slice | Tensor, Tensor]] = {}
        self._plans: dict[_Shape, tuple[_Plan, Tensor]] = {}

    def _index(self, numbers: Sequence[int] | NDArray[np.int64]) -> Tensor:
        return torch.as_tensor(np.asarray(numbers, dtype=np.int64), device=self._device)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """`query` [N, heads, size], `key` and `value` [N, kv heads, size] of one layer to [N, heads, value size]."""
        self.calls += 1
        heads = key.shape[1]
        if heads not in self._slots:
            rows = (self._pages[:, None] * heads + np.arange(heads)) * PAGE + self._offsets[:, None]
            self._slots[heads] = self._index(rows)
        keys, values = self._memory.write(layer, self._slots[heads], key, value)
        if not self._long:
            return self._decode(query, keys, values, scale, window, softcap, sinks)
        out = query.new_empty(self._width, query.shape[1], value.shape[-1])
        if self._ones:
            out[self._at] = self._decode(query[self._at], keys, values, scale, window, softcap, sinks)
        for span in self._long:
            known = self._seen.get((span.start, window))
            if known is None:  # the same in all layers
                known = self._seen[span.start, window] = _seen_by(span, window, self._device)
            out[span.start : span.end] = _attend_long(span, query, keys, values, scale, *known, softcap, sinks)
        return out

    def _decode(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        shape = window, query.shape[1], keys.shape[1]
        if shape not in self._plans:
            firsts = [_first(span.total, 1, window) for span in self._ones]
            owned = [
                tuple(span.table.pages[first // PAGE : -(-span.total // PAGE)])
                for span, first in zip(self._ones, firsts, strict=True)
            ]
            key = tuple(owned)
            was = self._kept.get(shape)
            if was is None or was[0] != key:
                was = self._kept[shape] = (key, _Plan.of(owned, query.shape[1], keys.shape[1], self._device))
            totals = [span.total - first // PAGE * PAGE for span, first in zip(self._ones, firsts, strict=True)]
            self._plans[shape] = was[1], was[1].hidden([first % PAGE for first in firsts], totals)
        plan, hidden = self._plans[shape]
        return plan.attend(query, keys, values, scale, hidden, softcap, sinks)


def _first(total: int, new: int, window: int | None) -> int:
    """The first token that any of the last `new` of `total` tokens sees."""
    return 0 if window is None else max(0, total - new + 1 - window)


def _read(held: Tensor, where: slice | Tensor) -> Tensor:
    """These pages out of all [n, heads, PAGE, size]."""
    return held[where] if isinstance(where, slice) else held.index_select(0, where)


def _where(pages: Sequence[int], device: torch.device) -> slice | Tensor:
    """How to read these pages out of all: without a copy where they lie side by side."""
    if pages[-1] - pages[0] == len(pages) - 1 and all(b - a == 1 for a, b in pairwise(pages)):
        return slice(pages[0], pages[-1] + 1)
    return torch.tensor(pages, device=device)


def _seen_by(span: Span, window: int | None, device: torch.device) -> tuple[slice | Tensor, Tensor]:
    """The pages that a row of several tokens reads, and which of their tokens each of its own sees [new, total]."""
    new = span.end - span.start
    first = _first(span.total, new, window) // PAGE
    where = _where(span.table.pages[first : -(-span.total // PAGE)], device)
    total = span.total - first * PAGE
    place = torch.arange(total - new, total, device=device).unsqueeze(1)
    at = torch.arange(total, device=device).unsqueeze(0)
    seen = at <= place
    if window is not None:
        seen &= at > place - window
    return where, seen


def _attend_long(
    span: Span,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    where: slice | Tensor,
    seen: Tensor,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """One row that brings several tokens, cut out of the whole pass's `query`; see `_seen_by`."""
    new, total = seen.shape
    key = _read(keys, where).transpose(0, 1).flatten(1, 2)[:, :total]
    value = _read(values, where).transpose(0, 1).flatten(1, 2)[:, :total]
    ours = query[span.start : span.end].transpose(0, 1)  # [heads, new, size]
    heads, _, size = ours.shape
    kv = key.shape[0]
    if softcap is None and sinks is None and size == value.shape[-1]:
        # Query heads that share keys stand one after the other: fused kernels take a mask, but no such heads with it.
        ours, mask = ours.reshape(1, kv, -1, size), seen.repeat(heads // kv, 1)
        found = functional.scaled_dot_product_attention(ours, key.unsqueeze(0), value.unsqueeze(0), mask, scale=scale)
        return found.view(heads, new, size).transpose(0, 1)
    scores = _products(ours.reshape(kv, -1, size) * scale, key).view(heads, new, total)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is None:
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32)
    else:
        sink = sinks.view(heads, 1, 1).expand(heads, new, 1).to(scores.dtype)
        weights = torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1, dtype=torch.float32)[..., :-1]
    mixed = torch.bmm(weights.to(value.dtype).view(kv, -1, total), value)
    return mixed.view(heads, new, -1).transpose(0, 1)


def _products(ours: Tensor, keys: Tensor) -> Tensor:
    """Scores [n, queries, keys] in float32.

    In half precision a score of some hundreds, as Qwen2's biased keys bring, would be rounded by whole units, and may
    be more than float16 holds.
    """
    if ours.dtype == torch.float32:
        return torch.bmm(ours, keys.transpose(1, 2))
    if ours.device.type == "cuda" and _WIDENS:
        return torch.bmm(ours, keys.transpose(1, 2), out_dtype=torch.float32)
    return torch.bmm(ours.float(), keys.transpose(1, 2).float())


@dataclass(slots=True)
class _Group:
    """Pages that are attended in one product, each by equally many queries.

    Attributes:
        pages: a slice of all pages, or an index that picks some of them.
        asked: which query of all [rows * heads] stands at each place [pages * kv heads * queries].
        count: pages * kv heads.
    """

    pages: slice | Tensor
    asked: Tensor
    count: int

    def scores(self, query: Tensor, keys: Tensor) -> Tensor:
        size = query.shape[-1]
        ours = query.index_select(0, self.asked).view(self.count, -1, size)
        met = _read(keys, self.pages).view(self.count, PAGE, size)
        return _products(ours, met).view(-1, PAGE)

    def found(self, weights: Tensor, values: Tensor) -> Tensor:
        met = _read(values, self.pages).view(self.count, PAGE, -1)
        return torch.bmm(weights.view(self.count, -1, PAGE), met).view(-1, met.shape[-1])


@dataclass(slots=True)
class _Plan:
    """How the rows that decode one token meet their pages.

    A *place* is one query at one page. Places stand as pages lie.

    Attributes:
        groups: pages met by few rows, and pages met by many.
        places: the place of each of a row's pages [rows * heads * most pages].
        back: which of these stands at each place.
        summed: `places` without those that a row does not have, and where each query's begin.
    """

    groups: list[_Group]
    most: int
    places: Tensor
    back: Tensor
    summed: Tensor
    begins: Tensor

    @classmethod
    def of(cls, owned: Sequence[Sequence[int]], heads: int, kv: int, device: torch.device) -> _Plan:
        rows, each = len(owned), heads // kv
        counts = np.array([len(pages) for pages in owned])
        most = int(counts.max())
        page = np.array([number for pages in owned for number in pages])
        row = np.repeat(np.arange(rows), counts)
        inside = np.arange(most) < counts[:, None]
        slot = np.nonzero(inside)[1]
        lowest = int(page.min())
        users = np.bincount(page - lowest)
        met = users[page - lowest]
        head = np.arange(heads)
        spread = head // each  # then times the places of a page and kv head
        groups, place, offset = [], np.empty((len(page), heads), dtype=np.int64), 0
        for few in (True, False):
            mine = (met <= _SHARED) == few
            if not mine.any():
                continue
            ours = np.flatnonzero((users > 0) & ((users <= _SHARED) == few)) + lowest
            width = int(users[ours - lowest].max())
            begin, end = int(ours[0]), int(ours[-1]) + 1
            taken: slice | Tensor
            if end - begin <= 2 * len(ours):  # dense enough to be read where they lie
                taken, count, at = slice(begin, end), end - begin, page[mine] - begin
            else:
                taken, count, at = torch.as_tensor(ours, device=device), len(ours), np.searchsorted(ours, page[mine])
            if width > 1:
                order = np.argsort(at, kind="stable")
                ranked = at[order]
                rank = np.empty_like(at)
                rank[order] = np.arange(len(at)) - np.searchsorted(ranked, ranked)
                inner = rank[:, None] * each + head % each
            else:
                inner = head % each
            local = (at[:, None] * kv + spread) * (width * each) + inner
            asked = np.zeros(count * kv * width * each, dtype=np.int64)
            asked[local] = row[mine][:, None] * heads + head
            place[mine] = offset + local
            groups.append(_Group(taken, torch.as_tensor(asked, device=device), count * kv))
            offset += len(asked)
        places = np.zeros((rows, heads, most), dtype=np.int64)
        places[row, :, slot] = place
        # A slot that a row does not have stands for its own first page: hidden, but no other row's odd numbers come in.
        places = np.where(inside[:, None], places, places[:, :, :1])
        back = np.zeros(offset, dtype=np.int64)
        back[place] = (row[:, None] * heads + head) * most + slot[:, None]
        summed = places[np.broadcast_to(inside[:, None], places.shape)]
        ends = np.cumsum(np.repeat(counts, heads))
        begins = np.zeros_like(ends)
        begins[1:] = ends[:-1]
        told = [torch.as_tensor(a, device=device) for a in (places.reshape(-1), back, summed, begins)]
        return cls(groups, most, *told)

    def hidden(self, firsts: Sequence[int], totals: Sequence[int]) -> Tensor:
        """0 or -inf [rows, 1, most pages * PAGE]: the tokens that rows do not see."""
        place = np.arange(self.most * PAGE)
        out = np.where(place < np.array(totals)[:, None], np.float32(0), np.float32(-np.inf))
        if any(firsts):
            out[place < np.array(firsts)[:, None]] = -np.inf
        return torch.as_tensor(out, device=self.places.device).unsqueeze(1)

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float,
        hidden: Tensor,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """`query` [rows, heads, size] to [rows, heads, value size]."""
        rows, heads, size = query.shape
        query = query.reshape(-1, size)
        parts = [group.scores(query, keys) for group in self.groups]
        scores = parts[0] if len(parts) == 1 else torch.cat(parts)
        scores = scores.index_select(0, self.places).view(rows, heads, -1).float()
        if softcap is None:
            scores = torch.add(hidden, scores, alpha=scale)
        else:
            scores = torch.tanh(scores * (scale / softcap)) * softcap + hidden
        if sinks is None:
            weights = torch.softmax(scores, dim=-1)
        else:
            sink = sinks.float().view(1, -1, 1).expand(rows, -1, 1)
            weights = torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1]
        weights = weights.to(values.dtype).reshape(-1, PAGE).index_select(0, self.back)
        if len(parts) == 1:
            found = self.groups[0].found(weights, values)
        else:
            split = torch.split(weights, [len(group.asked) for group in self.groups])
            found = torch.cat([group.found(w, values) for group, w in zip(self.groups, split, strict=True)])
        mixed = torch.embedding_bag(found, self.summed, self.begins)[0]
        return mixed.view(rows, heads, -1)
