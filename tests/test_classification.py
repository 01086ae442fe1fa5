"""Sigmoid losses: focal and bce in detection heads and on masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

import references
from detseg_losses import binary_cross_entropy_loss, sigmoid_focal_loss
from references import value_and_grad

GAMMAS = (0, 0.5, 1, 1.5, 2, 3)
LOSSES = {"focal": (sigmoid_focal_loss, references.focal)}
LOSSES["bce"] = (binary_cross_entropy_loss, references.bce)


def logits(*shape: int, seed: int = 0, spread: float = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator) * spread


def values(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def indices(low: int, high: int, *shape: int, seed: int = 2) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def assert_same(actual: Any, expected: Any, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * 1e-3)


def test_published_values() -> None:
    """RetinaNet's defaults at the points of the published table."""
    x, y = torch.tensor([2.0, 2.0, 0.0]), torch.tensor([1.0, 0.0, 0.5])
    expected = torch.tensor([4.5089e-4, 1.237559, 0.08664])
    torch.testing.assert_close(sigmoid_focal_loss(x, y), expected, rtol=5e-4, atol=0)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize(
    ("labels", "y"),
    [("dense", 0.0), ("dense", 1.0), ("dense", 0.3), ("index", 0.0), ("index", 1.0)],
)
def test_float32_is_accurate_relative_to_itself(labels: str, y: float, gamma: float) -> None:
    """Also where the loss is 1e-20: softplus and 1 - p must not cancel."""
    x = torch.linspace(-20, 20, 4001)
    if labels == "dense":
        value, grad = value_and_grad(sigmoid_focal_loss, x, torch.full_like(x, y), gamma=gamma)
    else:
        target = torch.full(x.shape, -1 if y == 0 else 0)
        value, grad = value_and_grad(sigmoid_focal_loss, x[:, None], target, gamma=gamma)
        value, grad = value[:, 0], grad[:, 0]
    expected, slope = value_and_grad(references.focal, x.double(), y, gamma=gamma)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    # the slope passes through 0 at y = 0.3: there relative to its two parts
    torch.testing.assert_close(grad.double(), slope, rtol=1e-5, atol=1e-7 if y == 0.3 else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bce_is_accurate_relative_to_itself(dtype: torch.dtype) -> None:
    x = torch.linspace(-20, 20, 4001, dtype=dtype)
    y = (torch.arange(len(x)) % 2).to(dtype)
    got = value_and_grad(binary_cross_entropy_loss, x, y, reduction="none")
    expected = value_and_grad(references.bce, x.double(), y.double())
    rtol = 1e-5 if dtype == torch.float32 else 1e-12
    for actual, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(actual.double(), reference, rtol=rtol, atol=0)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("dense", [True, False])
def test_saturated_logits(gamma: float, dense: bool) -> None:
    """Finite, with the right limits, as far as 1e4; torchvision's gradient is NaN for gamma < 1."""
    x = torch.tensor([[-1e4], [-50.0], [50.0], [1e4]]).repeat(2, 1)
    index = torch.tensor([-1, -1, -1, -1, 0, 0, 0, 0])
    target = (index == 0).float()[:, None] if dense else index
    value, grad = value_and_grad(sigmoid_focal_loss, x, target, alpha=None, gamma=gamma)
    expected = torch.tensor([0.0, 0.0, 50.0, 1e4, 1e4, 50.0, 0.0, 0.0])
    torch.testing.assert_close(value[:, 0], expected, rtol=1e-6, atol=1e-9)
    slope = torch.tensor([0.0, 0.0, 1.0, 1.0, -1.0, -1.0, 0.0, 0.0])
    torch.testing.assert_close(grad[:, 0], slope, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", [(6, 1), (7, 5), (2, 7, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_class_indices(name: str, shape: tuple[int, ...], reduction: str) -> None:
    """-1 is background, -2 is left out; the same as the one-hot target, value and gradient."""
    loss, reference = LOSSES[name]
    x, index = logits(*shape), indices(-2, shape[-1], *shape[:-1])
    y = torch.stack([index == c for c in range(shape[-1])], -1).double()
    keep = (index != -2).double().unsqueeze(-1)

    def expected(x: Tensor) -> Tensor:
        each = reference(x, y) * keep
        if reduction == "none":
            return each
        return each.sum() / (1 if reduction == "sum" else keep.sum() * shape[-1])

    assert_same(value_and_grad(loss, x, index, reduction=reduction), value_and_grad(expected, x))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", [(), (6,), (7, 5), (2, 7, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("soft", [True, False])
def test_dense_targets(name: str, shape: tuple[int, ...], soft: bool) -> None:
    loss, reference = LOSSES[name]
    x, y = logits(*shape), values(*shape)
    y = y if soft else y.round()
    value, grad = value_and_grad(loss, x, y, reduction="none")
    assert value.shape == x.shape
    assert_same((value, grad), value_and_grad(reference, x, y))
    assert_same(loss(x, y, reduction="mean"), reference(x, y).mean())


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("alpha", [None, -1, 0.0, 0.25, 0.9])
def test_focal_options(gamma: float, alpha: float | None) -> None:
    x, y = logits(7, 5), values(7, 5)
    plain = None if alpha in (None, -1) else alpha
    assert_same(
        value_and_grad(sigmoid_focal_loss, x, y, alpha=alpha, gamma=gamma),
        value_and_grad(references.focal, x, y, plain, gamma),
    )


@pytest.mark.parametrize("target", ["dense", "index"])
def test_numbers_for_each_class(target: str) -> None:
    numbers = [0.5, 0.25, 0.125]  # exact in float32, as the options are kept
    each = torch.tensor(numbers, dtype=torch.float64)
    x, index = logits(9, 3), indices(-1, 3, 9)
    y = torch.stack([index == c for c in range(3)], -1).double()
    given = y if target == "dense" else index
    assert_same(
        value_and_grad(sigmoid_focal_loss, x, given, alpha=numbers),
        value_and_grad(references.focal, x, y, each),
    )
    assert_same(
        value_and_grad(binary_cross_entropy_loss, x, given, pos_weight=numbers, reduction="none"),
        value_and_grad(references.bce, x, y, each),
    )
    assert_same(
        value_and_grad(binary_cross_entropy_loss, x, given, class_weights=numbers),
        value_and_grad(lambda x: (references.bce(x, y) * each).sum() / (each.sum() * 9), x),
    )


@pytest.mark.parametrize("name", LOSSES)
def test_gamma_0_is_bce_and_the_sum_ignores_easy_anchors(name: str) -> None:
    x, index = logits(7, 5), indices(-1, 5, 7)
    assert_same(
        value_and_grad(sigmoid_focal_loss, x, index, alpha=None, gamma=0, reduction="sum"),
        value_and_grad(binary_cross_entropy_loss, x, index, reduction="sum"),
    )
    loss = LOSSES[name][0]
    more = torch.cat((x, torch.full((1000, 5), -60.0, dtype=x.dtype)))
    background = torch.cat((index, torch.full((1000,), -1)))
    assert_same(loss(more, background, reduction="sum"), loss(x, index, reduction="sum"))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2), (-1, 2), (0.6, 1.5), (0.25, 0)])
def test_equal_to_torchvision(alpha: float, gamma: float, reduction: str) -> None:
    """Called in torchvision's order of arguments."""
    x, y = logits(30, 4), values(30, 4)
    assert_same(
        value_and_grad(sigmoid_focal_loss, x, y, alpha, gamma, reduction),
        value_and_grad(torchvision.ops.sigmoid_focal_loss, x, y, alpha, gamma, reduction),
        rtol=1e-7,  # torchvision's 1 - p_t cancels
    )


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_equal_to_torch(reduction: str) -> None:
    x, y = logits(30, 4), values(30, 4)
    each = torch.tensor([0.5, 1, 2, 4], dtype=torch.float64)
    assert_same(
        value_and_grad(binary_cross_entropy_loss, x, y, pos_weight=each, reduction=reduction),
        value_and_grad(
            F.binary_cross_entropy_with_logits, x, y, pos_weight=each, reduction=reduction
        ),
    )


def test_large_sums_in_half_precision() -> None:
    """torchvision's sum over these anchors overflows float16."""
    x = torch.zeros(200_000, 4, dtype=torch.float16)
    y = torch.zeros(200_000, dtype=torch.long)
    got = sigmoid_focal_loss(x, y, reduction="sum")
    assert got.dtype == torch.float32
    expected = 200_000 * (0.25 + 3 * 0.75) * 0.25 * torch.tensor(2.0).log()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_weights_of_rows_and_entries(name: str) -> None:
    loss, reference = LOSSES[name]
    x, index = logits(2, 7, 5), indices(-1, 5, 2, 7)
    y = torch.stack([index == c for c in range(5)], -1).double()
    for weight in (values(2, 1), values(2, 7), values(2, 7, 1), values(2, 7, 5)):
        full = weight if weight.dim() == 3 else weight.unsqueeze(-1)
        full = full.expand(2, 7, 5)

        def expected(x: Tensor, full: Tensor = full) -> Tensor:
            return (reference(x, y) * full).sum() / full.sum()

        for target in (index, y):
            assert_same(
                value_and_grad(loss, x, target, weight=weight, reduction="mean"),
                value_and_grad(expected, x),
            )


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_weight_0_leaves_out(name: str, reduction: str) -> None:
    loss = LOSSES[name][0]
    x, index = logits(9, 3), indices(-1, 3, 9)
    ignored = torch.where(torch.arange(9) % 3 == 0, -2, index)
    weight = (ignored != -2).double()
    x[::3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    value, grad = value_and_grad(loss, x, ignored, reduction=reduction)
    assert_same((value, grad), value_and_grad(loss, x, index, weight=weight, reduction=reduction))
    assert value.isfinite()
    assert (grad[::3] == 0).all()
    kept = weight > 0
    assert_same(value, loss(x[kept], index[kept], reduction=reduction))
    assert_same(
        loss(x[kept], index[kept], ignore_index=1),
        loss(x[kept], torch.where(index == 1, -2, index)[kept]),
    )


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3), (0, 5, 3), (0, 2, 2, 3)])
@pytest.mark.parametrize("dense", [True, False])
def test_nothing_costs_nothing(name: str, shape: tuple[int, ...], dense: bool) -> None:
    loss = LOSSES[name][0]
    x = torch.zeros(shape, requires_grad=True)
    target = torch.zeros(shape) if dense else torch.zeros(shape[:-1], dtype=torch.long)
    assert loss(x, target, reduction="none").shape == shape
    for reduction in ("mean", "sum"):
        value = loss(x, target, reduction=reduction)
        value.backward()
        assert value == 0
        assert x.grad is not None
        assert x.grad.shape == shape


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("mode", ["multiclass", "binary", "multilabel"])
@pytest.mark.parametrize("ignore_index", [None, 255])
def test_masks(name: str, mode: str, ignore_index: int | None) -> None:
    """With a mode: logits (B, C, *), labels or masks, pixel weights."""
    loss, reference = LOSSES[name]
    channels = 1 if mode == "binary" else 3
    x = logits(2, channels, 4, 5)
    target = {
        "multiclass": indices(0, 3, 2, 4, 5),
        "binary": indices(0, 2, 2, 4, 5),
        "multilabel": indices(0, 2, 2, 3, 4, 5),
    }[mode]
    if ignore_index is not None:
        target[..., :2, :2] = ignore_index
    weight = values(2, 4, 5)
    y, keep = references.targets_of(x, target, mode, ignore_index)
    keep = keep * weight.unsqueeze(1)

    def expected(x: Tensor) -> Tensor:
        return (reference(x, y) * keep).sum() / keep.sum()

    options: dict[str, Any] = {"mode": mode, "ignore_index": ignore_index, "weight": weight}
    assert_same(
        value_and_grad(loss, x, target, reduction="mean", **options), value_and_grad(expected, x)
    )
    none = loss(x, target, reduction="none", **options)
    assert_same(none, reference(x, y) * keep)
    each = [
        loss(x[b : b + 1], target[b : b + 1], reduction="mean", **options | {"weight": weight[b]})
        for b in range(2)
    ]
    assert_same(loss(x, target, reduction="mean", per_image=True, **options), sum(each) / 2)


def test_binary_masks_without_a_channel() -> None:
    x, y = logits(2, 4, 5), indices(0, 2, 2, 4, 5)
    got = binary_cross_entropy_loss(x, y, mode="binary", reduction="none")
    assert got.shape == x.shape
    assert_same(got, references.bce(x, y.double()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": -1}, "gamma must not be negative"),
        ({"alpha": 1.5}, "alpha must be in"),
        ({"alpha": [0.1, 0.2]}, r"\(2,\) for 5 classes"),
        ({"class_weights": [1.0] * 6}, r"\(6,\) for 5 classes"),
        ({"reduction": "avg"}, "reduction must be one of"),
        ({"weight": torch.ones(7, requires_grad=True)}, "weight requires grad"),
        ({"alpha": torch.full((5,), 0.5, requires_grad=True)}, "requires grad"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sigmoid_focal_loss(logits(7, 5), indices(0, 5, 7), **options)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.full((7,), 5), "target holds 5,"),
        (torch.full((7,), -3), "target holds -3,"),
        (torch.full((7, 5), 1.5), "target holds 1.5,"),
        (torch.full((7, 5), torch.nan), "target holds nan,"),
        (torch.zeros(7), "must be integers"),
        (torch.zeros(6, dtype=torch.long), r"\(7, 5\) and targets \(6,\) do not fit"),
        (torch.zeros(7, 5, requires_grad=True), "the target requires grad"),
    ],
)
def test_bad_targets(target: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sigmoid_focal_loss(logits(7, 5), target)
