"""Matrices in blocks: the same products, nothing large held twice, and the plain product where blocks do not serve."""

import gc
import weakref
from functools import partial

import pytest
import torch
from torch import nn

from langchain_earlyexit.engines import matrices
from langchain_earlyexit.engines.matrices import Matrix

NOWHERE = torch.empty(1)
OFF = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}


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
        assert (found - wanted).norm() <= OFF[dtype] * wanted.norm()


def test_products_are_computed_for_few_numbers_of_rows_and_at_most_a_quarter_more_than_asked():
    served()
    matrix = Matrix(*projections(40, (24,)))
    assert matrix.padded(37) == 37  # as it is, any number will do
    matrix.pack(NOWHERE)
    padded = [matrix.padded(rows) for rows in range(1, 641)]  # prompts come in 512 tokens, beside rows that decode
    assert all(rows <= more < min(1.25 * rows, rows + 32) + 0.1 for rows, more in enumerate(padded, 1))
    assert padded[:4] == [1, 2, 3, 4]
    assert len(set(padded)) <= 40
    assert [matrix.padded(more) for more in padded] == padded


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


@pytest.mark.parametrize("heights", [(400, 100), (1000,), (7, 5)])
def test_what_was_packed_comes_back_number_by_number(heights):
    served()
    parts = projections(600, heights, bias=True)
    before = [part.weight.clone() for part in parts]
    matrix = Matrix(*parts)
    matrix.pack(NOWHERE)
    matrix.unpack()
    assert all(torch.equal(part.weight, was) for part, was in zip(parts, before, strict=True))
    x = torch.randn(5, 600)
    assert torch.allclose(matrix.after(x), torch.cat([part(x) for part in parts], dim=-1), atol=1e-5)


@pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 3, 40), (1, 0, 40), (0, 40)])
def test_a_projection_may_have_any_leading_axes_and_no_rows_at_all(shape):
    served()
    model = nn.Sequential(*projections(40, (24,), bias=True))
    x = torch.randn(shape)
    expected = model(x)
    for matrix in matrices.stand_ins(model, NOWHERE, lambda: model(x)):
        matrix.pack(NOWHERE)
    found = model(x)
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_model_that_nobody_holds_is_gone_at_once_though_its_projections_were_replaced():
    model = nn.Sequential(*projections(40, (24,)))
    assert matrices.stand_ins(model, NOWHERE, partial(model, torch.ones(1, 40)))
    gone = weakref.ref(model[0])
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_what_does_not_come_back_from_its_blocks_is_not_given_up(monkeypatch):
    served()
    (part,) = projections(600, (700,))
    before = part.weight.clone()
    matrix = Matrix(part)
    monkeypatch.setattr(torch, "equal", lambda *a: False)
    with pytest.raises(RuntimeError, match=r"\[600, 700\] do not hold its numbers"):
        matrix.pack(NOWHERE)
    monkeypatch.undo()
    assert torch.equal(part.weight, before)


class Reading(nn.Module):
    """Two of its projections share a weight, and of another it reads the weight alone."""

    def __init__(self):
        super().__init__()
        self.plain, self.one, self.same, self.read = projections(40, (40, 40, 40, 40))
        self.same.weight = self.one.weight

    def forward(self, x):
        return self.same(self.one(self.plain(x))) @ self.read.weight


def test_weights_that_are_shared_or_read_past_their_projection_are_left_alone():
    served()
    model, x = Reading(), torch.randn(3, 40)
    expected = model(x)
    found = matrices.stand_ins(model, NOWHERE, lambda: model(x))
    for matrix in found:
        matrix.pack(NOWHERE)
    assert [name for name, module in model.named_modules() if "forward" in vars(module)] == ["plain"]
    assert len(found) == 1
    assert torch.allclose(model(x), expected, atol=1e-4)


@pytest.mark.parametrize("missing", ["the library", "its switch", "an operation", "the type"])
def test_where_there_are_no_blocks_nothing_changes(missing, monkeypatch):
    dtype = torch.float64 if missing == "the type" else torch.float32
    (part,) = projections(64, (48,), dtype)
    x = torch.randn(5, 64).to(dtype)
    expected = part(x)
    if missing == "the library":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    elif missing == "its switch":
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    elif missing == "an operation":
        monkeypatch.setattr(matrices, "_OPERATIONS", ("_reorder_linear_weight", "_no_such_operation"))
    matrix = Matrix(part)
    matrix.pack(NOWHERE)
    assert matrix._blocks is None
    assert torch.allclose(matrix.after(x), expected, atol=1e-5)
