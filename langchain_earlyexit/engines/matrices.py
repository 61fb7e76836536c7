"""The matrices of a model, in memory as products read them fastest.

PyTorch's product of several rows copies a matrix into blocks before it multiplies, at every call. oneDNN, which comes
with PyTorch, reads blocks that were laid out once.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_ALIAS, _PAD = 4096, 16
"""Rows so many bytes apart fall into the same places of a processor's cache: these get so many numbers more."""

_SMALL = 1 << 20
"""Bytes up to which calling oneDNN for a single row takes longer than reading the matrix as it was."""

_ROWS = 16
"""Rows that blocks are laid out for. They are as quick for other numbers; those laid out for one row are not."""

_STEP = 32
"""Most by which numbers of rows differ: prompts come in passes of some hundreds."""

_OPERATIONS = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported")
"""What PyTorch's own compiler uses of oneDNN for frozen weights. They are not documented, so that they may be gone."""


class Matrix:
    """One matrix [in, out] for all projections of the same input, whose own weights become views of it.

    A product of one to three rows with a float32 matrix that is no taller than wide takes half to three quarters of the
    time when the matrix lies in memory row by row of [in, out]; one of many rows takes as long either way (one thread
    of MKL on AVX-512; 192 and 576 wide, vocabularies of 1,312 and 49,152).

    Args:
        parts: projections with the same input.
    """

    __slots__ = ("_bias", "_blocks", "_dense", "_parts", "_rows", "_width")

    def __init__(self, *parts: nn.Linear) -> None:
        with torch.no_grad():
            weight = parts[0].weight.data if len(parts) == 1 else torch.cat([part.weight for part in parts])
            bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
            if bias is not None:
                owns = torch.split(bias, [part.out_features for part in parts])
                for part, own in zip(parts, owns, strict=True):
                    part.bias.data = own
        self._width = len(weight)
        # Weakly: a projection may hold what multiplies in its place.
        self._parts = [weakref.ref(part) for part in parts]
        self._bias = bias
        self._dense: Tensor | None = _laid_out(weight)
        self._share()
        self._blocks: Tensor | None = None
        self._rows = 0  # from how many on the blocks are used

    def _share(self) -> None:
        """Let the projections' weights be views of the matrix."""
        dense: Any = self._dense
        start = 0
        for part in self._parts:
            if (module := part()) is not None:
                module.weight.data = dense[:, start : start + module.out_features].t()
                start += module.out_features

    def padded(self, rows: int) -> int:
        """How many rows a product of so many is computed with.

        oneDNN compiles 0.6 MB of code for every matrix and number of rows that it meets, in half a millisecond, and
        keeps a thousand of them. So numbers are rounded up: by at most a quarter, and by less than 32.
        """
        if self._blocks is None:
            return rows
        step = min(_STEP, max(1, 1 << (rows.bit_length() - 3))) if rows > 4 else 1
        return -(-rows // step) * step

    def after(self, x: Tensor) -> Tensor:
        """`x` [rows, in] to [rows, out]."""
        rows = len(x)
        if self._blocks is not None and rows >= self._rows:
            more = self.padded(rows) - rows
            given = functional.pad(x, (0, 0, 0, more)) if more else x
            found: Tensor = torch.ops.mkldnn._linear_pointwise.default(given, self._blocks, self._bias, "none", [], "")
            return found[:rows] if more else found
        dense: Any = self._dense
        return torch.mm(x, dense) if self._bias is None else torch.addmm(self._bias, x, dense)

    def pack(self, embedding: Tensor) -> None:
        """Lay the matrix out in blocks, where this processor has products that read them.

        What was there goes, and with it the projections' own weights. It stays beside the blocks if it is small, or is
        the `embedding`, which is read by rows; then a single row is still multiplied by it where that is quicker.

        Raises:
            RuntimeError: oneDNN does not take the matrix, or does not hold what it was given.
        """
        dense: Any = self._dense
        if not _has_blocks(dense):
            return
        blocks = torch.ops.mkldnn._reorder_linear_weight(dense.t().contiguous(), _ROWS)
        if not torch.equal(blocks.to_dense(), dense.t()):  # what was there can be had back from it
            raise RuntimeError(f"blocks of a matrix {list(dense.shape)} do not hold its numbers")
        self._blocks = blocks
        if dense.data_ptr() == embedding.data_ptr() or dense.numel() * dense.element_size() <= _SMALL:
            self._rows = 2 if dense.dtype == torch.float32 else 1
            return
        self._dense = None
        for part in self._parts:
            if (module := part()) is not None:
                module.weight.data = dense.new_empty(0)

    def unpack(self) -> None:
        """As it was before `pack`, number by number."""
        if self._blocks is not None and self._dense is None:
            self._dense = _laid_out(self._blocks.to_dense())
            self._share()
        self._blocks = None

    def _instead(self, x: Tensor) -> Tensor:
        """As a projection's forward pass: `x` [..., in] to [..., out]."""
        out = (*x.shape[:-1], self._width)
        return self.after(x.reshape(-1, x.shape[-1])).view(out) if x.numel() else x.new_empty(out)


def _laid_out(weight: Tensor) -> Tensor:
    """A matrix [in, out] of a weight [out, in], a view of it where that is as good."""
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or weight.shape[0] < weight.shape[1]:
        return weight.t()
    width = weight.shape[0]
    padded = width + _PAD if width * weight.element_size() % _ALIAS == 0 else width
    return weight.new_empty(weight.shape[1], padded)[:, :width].copy_(weight.t())


def stand_ins(model: nn.Module, embedding: Tensor, run: Callable[[], object]) -> list[Matrix]:
    """A matrix for each plain projection of a stock model, which from now on multiplies by it.

    Projections with hooks, or with a forward pass of their own, are left alone; so are weights that others hold too,
    but for the `embedding`, and those that `run` computes without: their weights may be read past the projection.
    """
    owners = Counter(parameter.data_ptr() for _, parameter in model.named_parameters(remove_duplicate=False))
    owners[embedding.data_ptr()] -= 1
    called = set[nn.Module]()
    plain = [module for module in model.modules() if type(module) is nn.Linear]
    hooks = [module.register_forward_pre_hook(lambda module, _: called.add(module)) for module in plain]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for module in plain:
        if module not in called or is_changed(module):
            continue
        if owners[module.weight.data_ptr()] == 1 and _has_blocks(module.weight):
            matrix = Matrix(module)
            module.forward = matrix._instead  # type: ignore[method-assign, assignment]
            found.append(matrix)
    return found


def is_changed(module: nn.Module) -> bool:
    """Whether a module does other than its class says: it has hooks, or a forward pass of its own."""
    hooked = module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook")
    return bool(hooked) or "forward" in vars(module)


def _has_blocks(matrix: Tensor) -> bool:
    """Whether this PyTorch and this processor multiply such a matrix by blocks."""
    ops: Any = torch.ops.mkldnn
    library: Any = torch.backends.mkldnn
    if matrix.device.type != "cpu" or not library.is_available() or not library.enabled:
        return False
    if not all(hasattr(ops, name) for name in _OPERATIONS):
        return False
    if matrix.dtype == torch.bfloat16:
        return bool(ops._is_mkldnn_bf16_supported())
    if matrix.dtype == torch.float16:
        return bool(ops._is_mkldnn_fp16_supported())
    return matrix.dtype == torch.float32
