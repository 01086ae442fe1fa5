"""The Lovász losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from segmentation_models_pytorch import losses as smp
from torch import Tensor

import references
from detseg_losses import lovasz_loss
from references import value_and_grad

MODES = ["multiclass", "binary", "multilabel"]


def sample(mode: str, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Logits and labels, some of them 255; every class is in every image."""
    generator = torch.Generator().manual_seed(1)
    channels = 1 if mode == "binary" else 3
    x = torch.randn(2, channels, 4, 5, dtype=dtype, generator=generator)
    if mode == "multiclass":
        y = torch.randint(0, 3, (2, 4, 5), generator=generator)
    else:
        y = torch.randint(0, 2, (2, channels, 4, 5), generator=generator)
    y[..., 0] = 255
    return x, y


def reference(
    x: Tensor, target: Tensor, mode: str, per_image: bool, pixel_weight: Tensor | None = None
) -> Tensor:
    y, w = references.targets_of(x, target, mode, 255)
    if pixel_weight is not None:
        w = w * pixel_weight.unsqueeze(1)
    errors = (y - x.softmax(1)).abs() if mode == "multiclass" else (1 - x * (2 * y - 1)).relu()
    groups = [[0], [1]] if per_image else [[0, 1]]
    losses = []
    for images in groups:
        for c in range(x.shape[1]):
            kept = w[images, c] > 0
            each = (values[images, c][kept] for values in (errors, y, w))
            losses.append(references.lovasz(*each))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_against_the_integral(mode: str, per_image: bool, weighted: bool) -> None:
    x, y = sample(mode)
    weight = torch.linspace(0, 2, 40, dtype=x.dtype).reshape(2, 4, 5) if weighted else None
    torch.testing.assert_close(
        value_and_grad(
            lovasz_loss,
            x,
            y,
            mode=mode,
            ignore_index=255,
            per_image=per_image,
            pixel_weight=weight,
        ),
        value_and_grad(lambda x: reference(x, y, mode, per_image, weight), x),
    )


@pytest.mark.parametrize("ignore_index", [None, 255])
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_equal_to_smp(mode: str, per_image: bool, ignore_index: int | None) -> None:
    """Which computes in float32 only, and takes all channels of multilabel masks for one class."""
    x, y = sample(mode, dtype=torch.float32)
    y = y if ignore_index else y % 2
    peer = smp.LovaszLoss(mode, per_image=per_image, ignore_index=ignore_index)
    options: dict[str, Any] = {"mode": mode, "per_image": per_image, "ignore_index": ignore_index}

    def each(x: Tensor) -> Tensor:
        if mode == "multilabel":
            return sum(peer(x[:, c], y[:, c]) for c in range(3)) / 3
        return peer(x, y)

    torch.testing.assert_close(
        value_and_grad(lovasz_loss, x, y, **options), value_and_grad(each, x), rtol=1e-4, atol=1e-6
    )


def test_two_pixels_by_hand() -> None:
    """Errors 0.8 of a hit and 0.4 of a miss, and the other way round; the hinge of x = 0.5."""
    p = torch.tensor([[0.2, 0.4]], dtype=torch.float64)
    x = p.logit().unsqueeze(1)
    two = torch.cat((torch.zeros_like(x), x), 1)
    y = torch.tensor([[1, 0]])
    value = lovasz_loss(two, y, class_weights=[0, 1])
    assert value.item() == pytest.approx(0.8)  # J = 1 once the only hit is wrong
    value = lovasz_loss(two, 1 - y, class_weights=[0, 1])
    assert value.item() == pytest.approx(0.6 * 1 + (0.2 - 0.0) * 0)
    x = torch.tensor([[[0.5, -3.0, -0.25]]], dtype=torch.float64)
    y = torch.tensor([[1, 0, 0]])
    # errors 0.5 (hit), 0 (miss) and 0.75 (miss): first J = 1 - 1/2, then 1
    assert lovasz_loss(x, y).item() == pytest.approx(0.75 * 0.5 + 0.5 * 0.5)


@pytest.mark.parametrize("mode", ["multiclass", "binary"])
def test_perfect_and_worst_predictions(mode: str) -> None:
    y = torch.arange(16).reshape(1, 4, 4) % 2
    for scale in (40.0, 1e4):
        x = (y.unsqueeze(1).float() * 2 - 1) * scale
        x = torch.cat((-x, x), 1) if mode == "multiclass" else x
        value, grad = value_and_grad(lovasz_loss, x, y)
        assert value == 0
        torch.testing.assert_close(grad, torch.zeros_like(grad))
        value, grad = value_and_grad(lovasz_loss, -x, y)
        torch.testing.assert_close(value, torch.tensor(1.0 if mode == "multiclass" else 1 + scale))
        assert grad.isfinite().all()


@pytest.mark.parametrize("mode", MODES)
def test_absent_classes(mode: str) -> None:
    x, y = sample(mode)
    y = torch.zeros_like(y)
    present = 1 if mode == "multiclass" else 0
    each = lovasz_loss(x, y, mode=mode, reduction="none", absent="penalise")
    p = x.softmax(1) if mode == "multiclass" else x.sigmoid()
    torch.testing.assert_close(each[present:], p.mean((0, 2, 3))[present:])
    if mode != "multiclass":
        value, grad = value_and_grad(lovasz_loss, x, y, mode=mode)
        assert value == 0
        assert not grad.any()


def test_factors_of_large_images_keep_their_digits() -> None:
    """As differences of Jaccard indices in float32 they would be 0 or twice what they are."""
    places = 1 << 20
    y = (torch.arange(places) % 2).unsqueeze(0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, places, generator=generator)
    value, grad = value_and_grad(lovasz_loss, x, y)
    expected, slope = value_and_grad(lovasz_loss, x.double(), y)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), slope, rtol=1e-4, atol=0)


def test_rounded_targets() -> None:
    x, y = sample("multiclass")
    y[..., 0] = 0
    dense = references.one_hot(x, y)[0] * 0.6 + 0.1
    torch.testing.assert_close(
        value_and_grad(lovasz_loss, x, dense, mode="multiclass"), value_and_grad(lovasz_loss, x, y)
    )


def test_errors() -> None:
    x, y = sample("multiclass")
    y[..., 0] = 0
    with pytest.raises(ValueError, match="is label 7,"):
        lovasz_loss(x, y + 7)
    with pytest.raises(ValueError, match="absent must be one of"):
        lovasz_loss(x, y, absent="no")
