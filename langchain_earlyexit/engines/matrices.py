"""The matrices of a model, in memory as products read them fastest.

PyTorch's product of several rows copies a matrix into blocks before it multiplies, at every call. oneDNN, which comes
with PyTorch, reads blocks that were laid out once.
"""

from __future__ import annotations

import logging
from typing import Any, Final

import torch
from torch import Tensor, nn

_log = logging.getLogger(__name__)

_ALIAS, _PAD = 4096, 16
"""Rows so many bytes apart fall into the same places of a processor's cache: these get so many numbers more."""

_SMALL = 1 << 20
"""Bytes up to which calling oneDNN for a single row takes longer than reading the matrix as it was."""

_ROWS = 16
"""Rows that blocks are laid out for. They are as quick for other numbers; those laid out for one row are not."""

_OFF: Final = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""How far a product by blocks may be from the plain one, as a share of it. A wrong one is off by about its whole."""

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

    __slots__ = ("_bias", "_blocks", "_dense", "_parts", "_rows")

    def __init__(self, *parts: nn.Linear) -> None:
        with torch.no_grad():
            weight = parts[0].weight.data if len(parts) == 1 else torch.cat([part.weight for part in parts])
            bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
            matrix = weight.t()
            if weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.shape[0] >= weight.shape[1]:
                width = weight.shape[0]
                padded = width + _PAD if width * weight.element_size() % _ALIAS == 0 else width
                matrix = weight.new_empty(weight.shape[1], padded)[:, :width].copy_(matrix)
            start = 0
            for part in parts:
                end = start + part.out_features
                part.weight.data = matrix[:, start:end].t()
                if bias is not None:
                    part.bias.data = bias[start:end]
                start = end
        self._parts = parts
        self._bias = bias
        self._dense: Tensor | None = matrix
        self._blocks: Tensor | None = None
        self._rows = 0  # from how many on the blocks are used

    def after(self, x: Tensor) -> Tensor:
        """`x` [rows, in] to [rows, out]."""
        if self._blocks is not None and len(x) >= self._rows:
            return _by_blocks(x, self._blocks, self._bias)
        dense: Any = self._dense
        return torch.mm(x, dense) if self._bias is None else torch.addmm(self._bias, x, dense)

    def pack(self, embedding: Tensor) -> None:
        """Lay the matrix out in blocks, where this processor has products that read them.

        What was there goes, and with it the projections' own weights. It stays beside the blocks if it is small, or is
        the `embedding`, which is read by rows; then a single row is still multiplied by it where that is quicker.
        """
        dense: Any = self._dense
        if not _has_blocks(dense):
            return
        try:
            blocks = torch.ops.mkldnn._reorder_linear_weight(dense.t().contiguous(), _ROWS)
            some = torch.linspace(-1, 1, 3 * len(dense)).view(3, -1).sin().to(dense.dtype)
            plain = torch.mm(some, dense).float()
            off = (_by_blocks(some, blocks, None).float() - plain).norm() / plain.norm().clamp(min=1e-30)
        except RuntimeError:
            _log.warning("a matrix %s stays as it is", list(dense.shape), exc_info=True)
            return
        if not off <= _OFF[dense.dtype]:
            _log.warning("a matrix %s stays as it is: by blocks its product is off by %.2g", list(dense.shape), off)
            return
        self._blocks = blocks
        if dense.data_ptr() == embedding.data_ptr() or dense.numel() * dense.element_size() <= _SMALL:
            self._rows = 2 if dense.dtype == torch.float32 else 1
            return
        self._dense = None
        for part in self._parts:
            part.weight.data = dense.new_empty(0)


def _by_blocks(x: Tensor, blocks: Tensor, bias: Tensor | None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, blocks, bias, "none", [], "")
    return found


def _has_blocks(matrix: Tensor) -> bool:
    """Whether this PyTorch and this processor multiply such a matrix by blocks."""
    ops: Any = torch.ops.mkldnn
    if matrix.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if not all(hasattr(ops, name) for name in _OPERATIONS):
        return False
    if matrix.dtype == torch.bfloat16:
        return bool(ops._is_mkldnn_bf16_supported())
    if matrix.dtype == torch.float16:
        return bool(ops._is_mkldnn_fp16_supported())
    return matrix.dtype == torch.float32
