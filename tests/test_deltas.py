"""L1 and smooth L1."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from detseg_losses import l1_loss, smooth_l1_loss
from references import value_and_grad

X = torch.tensor([[-3.0, -1.0, -0.5, 0.0], [0.05, 0.5, 1.0, 4.0]], dtype=torch.float64)
Y = torch.zeros_like(X)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_equal_to_torch(reduction: str) -> None:
    torch.testing.assert_close(
        value_and_grad(l1_loss, X, Y, reduction),
        value_and_grad(F.l1_loss, X, Y, reduction=reduction),
    )
    for beta in (0.0, 1 / 9, 0.5, 1.0, 3.0):
        torch.testing.assert_close(
            value_and_grad(smooth_l1_loss, X, Y, reduction, beta),
            value_and_grad(F.smooth_l1_loss, X, Y, reduction=reduction, beta=beta),
        )


def test_by_hand() -> None:
    got = smooth_l1_loss(torch.tensor([0.5, 3.0]), torch.zeros(2), "none", beta=2.0)
    torch.testing.assert_close(got, torch.tensor([0.0625, 2.0]))
    torch.testing.assert_close(
        l1_loss(torch.tensor([1.0, 5.0]), torch.tensor([2.0, 2.0])).item(), 2.0
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    """The difference of two numbers is not rounded, and sums do not overflow."""
    x = torch.full((100_000,), 300.0, dtype=dtype)
    value, grad = value_and_grad(l1_loss, x, torch.zeros_like(x), "sum")
    assert value == 3e7
    assert grad.dtype == dtype
    x, y = torch.tensor([1.0], dtype=dtype), torch.tensor([1.0 + 2**-20])
    assert l1_loss(x, y) == 2**-20


def test_empty_and_errors() -> None:
    empty = torch.zeros(0, 4, requires_grad=True)
    for loss in (l1_loss, smooth_l1_loss):
        value = loss(empty, empty.detach())
        value.backward()
        assert value == 0
        with pytest.raises(ValueError, match=r"shapes differ: \(3, 4\) and \(3,\)"):
            loss(torch.zeros(3, 4), torch.zeros(3))
        with pytest.raises(ValueError, match="reduction must be one of"):
            loss(X, Y, "avg")
    with pytest.raises(ValueError, match="beta must not be negative"):
        smooth_l1_loss(X, Y, beta=-1)
