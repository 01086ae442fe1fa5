"""Losses of differences, and of distributions over bins."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import references
from detseg_losses import (
    LOSSES,
    balanced_l1_loss,
    distribution_focal_loss,
    huber_loss,
    l1_loss,
    log_cosh_loss,
    mse_loss,
    smooth_l1_loss,
)
from references import value_and_grad

FAMILY: dict[str, Any] = {n: cls.function for n, cls in LOSSES.items() if cls.kinds == ("deltas",)}

X = torch.tensor([[-3.0, -1.0, -0.5, 0.0], [0.05, 0.5, 1.0, 4.0]], dtype=torch.float64)
Y = torch.zeros_like(X)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_equal_to_torch(reduction: str) -> None:
    torch.testing.assert_close(
        value_and_grad(l1_loss, X, Y, reduction),
        value_and_grad(F.l1_loss, X, Y, reduction=reduction),
    )
    torch.testing.assert_close(
        value_and_grad(mse_loss, X, Y, reduction),
        value_and_grad(F.mse_loss, X, Y, reduction=reduction),
    )
    for delta in (0.25, 1.0, 3.0):
        torch.testing.assert_close(
            value_and_grad(huber_loss, X, Y, reduction, delta),
            value_and_grad(F.huber_loss, X, Y, reduction=reduction, delta=delta),
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
    for loss in FAMILY.values():
        value = loss(empty, empty.detach())
        value.backward()
        assert value == 0
        with pytest.raises(ValueError, match=r"shapes differ: \(3, 4\) and \(3,\)"):
            loss(torch.zeros(3, 4), torch.zeros(3))
        with pytest.raises(ValueError, match="reduction must be one of"):
            loss(X, Y, "avg")
    with pytest.raises(ValueError, match="beta must be a finite number"):
        smooth_l1_loss(X, Y, beta=-1)
    with pytest.raises(ValueError, match="delta must be positive and finite: 0"):
        huber_loss(X, Y, delta=0)
    with pytest.raises(ValueError, match="gamma must be positive and finite: -1"):
        balanced_l1_loss(X, Y, gamma=-1)
    with pytest.raises(ValueError, match="at most 80 alpha"):
        balanced_l1_loss(X, Y, alpha=0.01)


def test_huber_is_smooth_l1_times_delta() -> None:
    torch.testing.assert_close(
        value_and_grad(huber_loss, X, Y, "none", 0.5),
        value_and_grad(lambda x: 0.5 * smooth_l1_loss(x, Y, "none", 0.5), X),
    )


@pytest.mark.parametrize("options", [{}, {"alpha": 0.25, "gamma": 1.0}, {"alpha": 2.0}])
def test_balanced_l1(options: dict[str, float]) -> None:
    value, grad = value_and_grad(lambda x: balanced_l1_loss(x, Y, "none", **options), X)
    torch.testing.assert_close(value, references.balanced_l1(X, Y, **options))
    alpha, gamma = options.get("alpha", 0.5), options.get("gamma", 1.5)
    slope = alpha * (X.abs().clamp(max=1) * math.expm1(gamma / alpha) + 1).log()
    torch.testing.assert_close(grad, slope * X.sign())


def test_balanced_l1_by_hand() -> None:
    """With the paper's numbers: 1.5 ln 20.09 = 4.5, and b = 19.09."""
    got = balanced_l1_loss(torch.tensor([1.0, 3.0, 0.0]), torch.zeros(3), "none")
    one = 1.5 + 1.5 / math.expm1(3) - 0.5
    torch.testing.assert_close(got, torch.tensor([one, one + 3, 0.0]))


def test_log_cosh() -> None:
    """Every digit of the smallest and the largest numbers, which cosh itself has not."""
    torch.testing.assert_close(
        value_and_grad(lambda x: log_cosh_loss(x, Y, "none"), X), (X.cosh().log(), X.tanh())
    )
    x = torch.tensor([1e-18, 1e-6, 1e-3, 1e4, 1e30, -1e-3])
    value, grad = value_and_grad(log_cosh_loss, x, torch.zeros(6), "none")
    expected = torch.tensor([0.0, 5e-13, 5e-7, 1e4 - math.log(2), 1e30, 5e-7])
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(grad, x.tanh())
    for side in (1 - 1e-7, 1.0, 1 + 1e-7):  # where the formula changes
        x = torch.tensor(side, dtype=torch.float64)
        torch.testing.assert_close(log_cosh_loss(x, torch.zeros(())), x.cosh().log())


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes(name: str, dtype: torch.dtype) -> None:
    """Finite, even, 0 only where equal, as in float64."""
    x = torch.tensor([0.0, 1e-12, 1e-4, 0.5, 1.0, 30.0, 1e4, 1e15], dtype=dtype)
    zeros = torch.zeros_like(x)
    value, grad = value_and_grad(FAMILY[name], x, zeros, "none")
    torch.testing.assert_close(
        (value.double(), grad.double()),
        value_and_grad(FAMILY[name], x.double(), zeros.double(), "none"),
        rtol=1e-4,
        atol=1e-7,
    )
    assert value[0] == grad[0] == 0
    assert (value[2:] > 0).all()
    assert (value >= 0).all()
    mirrored = value_and_grad(FAMILY[name], -x, zeros, "none")
    torch.testing.assert_close(mirrored, (value, -grad))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mse", 2.0),
        ("smooth_l1", 1.0),
        ("huber", 1.0),
        ("log_cosh", 1.0),
        ("balanced_l1", 0.5 * math.expm1(3)),
    ],
)
def test_second_derivatives_at_0(name: str, expected: float) -> None:
    """Where that of abs would be 0."""
    x = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(FAMILY[name](x, torch.zeros_like(x)), x, create_graph=True)
    (second,) = torch.autograd.grad(grad, x)
    assert grad == 0
    assert second.item() == pytest.approx(expected)


def bins() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(30, 8, dtype=torch.float64, generator=generator) * 3
    targets = torch.rand(30, dtype=torch.float64, generator=generator) * 7
    targets[:8] = torch.arange(8)
    return logits, targets


def test_dfl() -> None:
    x, y = bins()
    torch.testing.assert_close(
        value_and_grad(distribution_focal_loss, x, y, "none"),
        value_and_grad(references.distribution_focal, x, y),
    )
    torch.testing.assert_close(
        distribution_focal_loss(x[:8], y[:8]), F.cross_entropy(x[:8], y[:8].long())
    )
    torch.testing.assert_close(
        distribution_focal_loss(x.reshape(5, 6, 8), y.reshape(5, 6)), distribution_focal_loss(x, y)
    )
    even = distribution_focal_loss(torch.zeros(4), torch.tensor(1.5))
    assert even.item() == pytest.approx(math.log(4))


def test_dfl_is_least_where_the_mean_is_the_target() -> None:
    y = torch.tensor([2.25])
    best = torch.tensor([[0.0, 0.0, 0.75, 0.25]]).clamp(min=1e-30).log()
    value, grad = value_and_grad(distribution_focal_loss, best, y)
    assert value.item() == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert grad.abs().max() < 1e-6


def test_dfl_takes_what_is_out_of_reach_for_the_nearest_bin() -> None:
    """In a copy: the targets stay as they are."""
    x, _ = bins()
    y = torch.tensor([-3.0, -0.0, 7.0, 7.5, 100.0, torch.inf], dtype=torch.float64)
    kept = y.clone()
    got = distribution_focal_loss(x[:6], y, "none")
    torch.testing.assert_close(
        got, distribution_focal_loss(x[:6], torch.tensor([0, 0, 7, 7, 7, 7]), "none")
    )
    assert torch.equal(y, kept)


def test_dfl_extremes_and_errors() -> None:
    x = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]])
    value, grad = value_and_grad(distribution_focal_loss, x, torch.tensor([1.5, 0.0]), "none")
    torch.testing.assert_close(value, torch.tensor([1.5e4, 2e4 + math.log(2)]))
    assert grad.isfinite().all()
    half = x.half() / 100
    value, grad = value_and_grad(distribution_focal_loss, half, torch.tensor([1.5, 0.0]))
    assert (value.dtype, grad.dtype) == (torch.float32, torch.float16)
    empty = torch.zeros(0, 4, 8, requires_grad=True)
    nothing = distribution_focal_loss(empty, torch.zeros(0, 4))
    nothing.backward()
    assert nothing == 0
    for logits, target in (((3, 4, 8), (3, 8)), ((3, 8), (3, 1)), ((3, 0), (3,)), ((), ())):
        with pytest.raises(ValueError, match=r"logits must be \(\*, bins\)"):
            distribution_focal_loss(torch.zeros(logits), torch.zeros(target))
    with pytest.raises(ValueError, match="reduction must be one of"):
        distribution_focal_loss(x, torch.zeros(2), "avg")
