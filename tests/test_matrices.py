"""Matrices in blocks: the same products, nothing large held twice, and the plain product where blocks do not serve."""

import logging

import pytest
import torch
from torch import nn

from langchain_earlyexit.engines import matrices
from langchain_earlyexit.engines.matrices import Matrix

NOWHERE = torch.empty(1)


def projections(width, heights, dtype=torch.float32, bias=False):
    torch.manual_seed(0)
    return [nn.Linear(width, height, bias=bias).to(dtype).requires_grad_(False) for height in heights]


def served(dtype=torch.float32):
    if not matrices._has_blocks(torch.empty(2, 2, dtype=dtype)):
        pytest.skip(f"this processor multiplies {dtype} by no blocks")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("width", "heights"), [(40, (24, 8)), (24, (100,)), (600, (700, 20)), (700, (600,))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_packed_matrix_multiplies_as_the_projections_did(dtype, width, heights, bias):
    served(dtype)
    parts = projections(width, heights, dtype, bias)
    rows = [torch.randn(count, width).to(dtype) for count in (1, 2, 3, 16, 70)]
    expected = [torch.cat([part(x) for part in parts], dim=-1).float() for x in rows]
    matrix = Matrix(*parts)
    matrix.pack(NOWHERE)
    assert matrix._blocks is not None
    for x, wanted in zip(rows, expected, strict=True):
        found = matrix.after(x).float()
        assert (found - wanted).norm() <= matrices._OFF[dtype] * wanted.norm()


def test_rows_that_lie_apart_in_memory_are_multiplied_too():
    served()
    (part,) = projections(64, (48,))
    wide = torch.randn(5, 200)
    expected = part(wide[:, 7:71])
    matrix = Matrix(part)
    matrix.pack(NOWHERE)
    assert torch.allclose(matrix.after(wide[:, 7:71]), expected, atol=1e-5)


def test_nothing_large_is_held_twice_but_the_embedding():
    served()
    parts = projections(600, (400, 100))
    matrix = Matrix(*parts)
    matrix.pack(NOWHERE)
    assert [part.weight.numel() for part in parts] == [0, 0]
    assert matrix._dense is None

    (head,) = projections(600, (500,))
    before = head.weight.clone()
    tied = Matrix(head)
    embedding = head.weight
    tied.pack(embedding)
    assert tied._blocks is not None
    assert torch.equal(embedding, before)


def wrong(x, blocks, bias):
    return torch.ones(len(x), 48)


def refusing(x, blocks, bias):
    raise RuntimeError("could not create a primitive")


@pytest.mark.parametrize(("by_blocks", "told"), [(wrong, "off by"), (refusing, "could not create a primitive")])
def test_a_matrix_whose_product_by_blocks_is_not_right_stays_as_it_is_and_the_log_says_so(
    by_blocks, told, monkeypatch, caplog
):
    served()
    (part,) = projections(64, (48,))
    x = torch.randn(5, 64)
    expected = part(x)
    matrix = Matrix(part)
    monkeypatch.setattr(matrices, "_by_blocks", by_blocks)
    with caplog.at_level(logging.WARNING):
        matrix.pack(NOWHERE)
    assert told in caplog.text
    assert torch.allclose(matrix.after(x), expected, atol=1e-5)
    assert torch.allclose(part(x), expected, atol=1e-5)


@pytest.mark.parametrize("missing", ["the library", "an operation", "the type"])
def test_where_there_are_no_blocks_nothing_changes(missing, monkeypatch):
    dtype = torch.float64 if missing == "the type" else torch.float32
    (part,) = projections(64, (48,), dtype)
    x = torch.randn(5, 64).to(dtype)
    expected = part(x)
    if missing == "the library":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    elif missing == "an operation":
        monkeypatch.setattr(matrices, "_OPERATIONS", ("_reorder_linear_weight", "_no_such_operation"))
    matrix = Matrix(part)
    matrix.pack(NOWHERE)
    assert matrix._blocks is None
    assert torch.allclose(matrix.after(x), expected, atol=1e-5)
