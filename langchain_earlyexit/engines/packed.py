"""The packed model: one forward pass over the pending tokens of every branch, each with its own keys and values.

All rows stand side by side in one sequence `[1, N]` with their own position ids. The model's layers see nothing
unusual; only attention knows where each row starts and which pages it reads.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from langchain_earlyexit.engines.attention import Kept, Pass, Span
from langchain_earlyexit.engines.lean import Lean
from langchain_earlyexit.engines.matrices import Matrix
from langchain_earlyexit.engines.memory import Memory
from langchain_earlyexit.engines.model import Model, Row
from langchain_earlyexit.engines.pages import PAGE, Book, Table
from langchain_earlyexit.engines.taps import States, Tapped, Taps, forget, read
from langchain_earlyexit.engines.threads import Threads

NAME = "earlyexit_packed"
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
"""Attention keywords that change nothing here: inference has no dropout, and order follows from the pages."""

_REMEMBERED = 0.25
"""Share of the memory that beginnings of prompts may keep when nobody uses them."""

_SPARE = 64
"""Pages held in reserve when nothing runs."""

_pass = threading.local()


class Cache:
    """Keys, values and hidden states of one branch."""

    __slots__ = ("__weakref__", "states", "table")

    def __init__(self, table: Table, states: States) -> None:
        self.table = table
        self.states = states


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
    run: Pass = _pass.current
    out = run.attend(
        module.layer_idx,  # type: ignore[arg-type]
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window,
        softcap,
        s_aux,
    )
    return out.unsqueeze(0), None


class PackedModel(Model):
    """A model over a `transformers` causal LM whose attention goes through `AttentionInterface`.

    Args:
        model: the causal LM, in eval mode; its attention implementation is switched to the packed one.
        lean: use the lean form of the forward pass where the model has one.
    """

    def __init__(self, model: Any, *, lean: bool = True) -> None:
        from transformers import AttentionInterface

        # No mask function is registered with it: transformers then builds no mask at all, which is what rows need.
        AttentionInterface.register(NAME, attention)
        model.set_attn_implementation(NAME)
        self._model: Any = model
        self._lean = Lean.of(model) if lean else None
        self._device = model.device
        self._taps = Taps(model)
        self.layers = self._taps.layers
        self._memory = Memory(self.layers, self._device)
        self._book = Book()
        self._limit: int | None = None
        self._kept: Kept = {}
        self._reuse = False
        self.threads: Threads | None = None  # as PyTorch has it
        self.calls = self.passes = 0  # of attention, and of the model: a layer that bypasses it makes a difference

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        found: torch.device = self._device
        return found

    @property
    def lean(self) -> bool:
        """Whether the lean form of the forward pass is used."""
        return self._lean is not None

    @property
    def matrices(self) -> list[Matrix] | None:
        """What the lean form multiplies by; None where it is not used."""
        return None if self._lean is None else self._lean.matrices

    # --- caches -----------------------------------------------------------------------------------------------------

    def new(self) -> Cache:
        return Cache(self._book.new(), {})

    def fork(self, cache: Cache, length: int) -> Cache:
        states = {position: state for position, state in cache.states.items() if position < length}
        return Cache(self._book.fork(cache.table, length), states)

    def rewind(self, cache: Cache, length: int) -> None:
        self._book.rewind(cache.table, length)
        forget(cache.states, from_=length)

    def hidden(self, cache: Cache, position: int) -> NDArray[np.float32]:
        return read(cache.states, position)

    # --- memory -----------------------------------------------------------------------------------------------------

    def bound(self, limit: int, *, reuse: bool = True) -> None:
        """Let keys and values take at most `limit` bytes, and, with `reuse`, keep the beginnings of prompts.

        Raises:
            ValueError: when not even one page fits.
        """
        self._limit, self._reuse = limit, reuse
        if self._memory.page_bytes:
            self._set_pages(limit)

    @property
    def limit(self) -> int:
        return super().limit if self._limit is None else self._limit

    def left(self) -> int:
        return super().left() if self._book.most is None else self._book.left() * self._memory.page_bytes

    def need(self, cache: Cache, tokens: int) -> int:
        return self._book.need(cache.table, tokens) * self._memory.page_bytes

    def adopt(self, cache: Cache, ids: Sequence[int]) -> int:
        return self._book.adopt(cache.table, ids)

    def remember(self, cache: Cache, ids: Sequence[int]) -> None:
        self._book.remember(cache.table, ids)

    @torch.inference_mode()  # what passes made can be written into nowhere else
    def trim(self) -> None:
        if self._memory.capacity > 2 * self._book.used + _SPARE:
            self._book.fill(self._memory.shift)
            self._memory.shrink(self._book.size)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of keys and values in all layers; 0 before the first pass."""
        return self._memory.page_bytes

    @property
    def held_pages(self) -> int:
        """Pages that have an owner."""
        return self._book.used

    @property
    def remembered_pages(self) -> int:
        """Of these, those kept for prompts that begin alike."""
        return self._book.known

    # --- the pass ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def forward(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        if self.threads is not None:
            self.threads.use(len(rows))
        if self._book.gaps:
            self._book.fill(self._memory.shift)
        # Before any page changes hands: it may fail.
        top = self._book.size_after([(row.cache.table, len(row.ids)) for row in rows])
        self._memory.reserve(top, self._book.most)
        ids: list[int] = []
        positions: list[int] = []
        spans: list[Span] = []
        growths = []
        for row in rows:
            start, table = len(ids), row.cache.table
            growths.append(self._book.grow(table, len(row.ids)))
            ids.extend(row.ids)
            total = table.length + len(row.ids)
            positions.extend(range(table.length, total))
            spans.append(Span(start, len(ids), table, total))
        try:
            self._memory.prepare(growths)
        except BaseException:
            for row, growth in zip(reversed(rows), reversed(growths), strict=True):
                self._book.undo(row.cache.table, growth)
            raise
        run = Pass(self._memory, spans, self._device, self._kept)
        last = None
        if len(spans) < len(ids):
            last = torch.tensor([span.end - 1 for span in spans], device=self._device)
        wanted = {block for row in rows if row.layers for block in self._taps.blocks(row.layers)}
        given = torch.tensor([ids, positions], device=self._device)
        if self._lean is not None:
            longest = max(span.total for span in spans)
            logits, seen = self._lean.run(given[0], given[1], longest, last, run, wanted)
        else:
            logits, seen = self._stock(given, last, run, wanted)
        found: NDArray[np.float32] = logits.float().cpu().numpy()
        self.calls += run.calls
        self.passes += 1
        if self._book.most is None and self._limit is not None:
            self._set_pages(self._limit)
        if wanted:
            self._taps.keep(
                [
                    Tapped(row.cache.states, row.layers, span.start, span.end, span.total)
                    for row, span in zip(rows, spans, strict=True)
                ],
                seen,
            )
        for span in spans:  # last: nothing can fail any more, and a pass that fails leaves every cache as it was
            span.table.length = span.total
        return found

    def _stock(
        self, given: Tensor, last: Tensor | None, run: Pass, wanted: set[int]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        _pass.current = run
        try:
            with self._taps.watch(wanted) as seen:
                logits = self._model(
                    input_ids=given[:1],
                    position_ids=given[1:],
                    use_cache=False,
                    logits_to_keep=0 if last is None else last,
                ).logits[0]
        finally:
            _pass.current = None
        return logits, seen

    def _set_pages(self, limit: int) -> None:
        """Turn the bound into pages: what a page takes is known once a pass has been."""
        most = limit // self._memory.page_bytes
        if most < 1:
            raise ValueError(
                f"a limit of {limit:,} bytes for keys and values holds not one page of {PAGE} tokens, which takes "
                f"{self._memory.page_bytes:,} bytes with this model; raise the limit"
            )
        self._book.most = most
        self._book.remembered = int(most * _REMEMBERED) if self._reuse else 0

    def close(self) -> None:
        self._model = self._lean = None
        self._memory = Memory(0, self._device)
        self._taps.close()
