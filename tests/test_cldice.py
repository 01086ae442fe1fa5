"""The centreline Dice loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import references
from detseg_losses import cldice_loss
from references import value_and_grad

MODES = ["multiclass", "binary", "multilabel"]


def sample(mode: str, *places: int) -> tuple[Tensor, Tensor]:
    """Logits and labels, some of them 255; every class is in every image."""
    generator = torch.Generator().manual_seed(1)
    channels = 1 if mode == "binary" else 3
    x = torch.randn(2, channels, *places, dtype=torch.float64, generator=generator) * 2
    if mode == "multiclass":
        y = torch.randint(0, 3, (2, *places), generator=generator)
    else:
        y = torch.randint(0, 2, (2, channels, *places), generator=generator)
    y[..., 0] = 255
    return x, y


def reference(
    x: Tensor,
    target: Tensor,
    *,
    mode: str = "multiclass",
    iterations: int = 3,
    smooth: float = 0.0,
    per_image: bool = False,
    weight: Any = 1.0,
) -> Tensor:
    y, w = references.targets_of(x, target, mode, 255)
    w = w * weight
    p = (x.softmax(1) if mode == "multiclass" else x.sigmoid()) * (w > 0)
    y = y * (w > 0)
    lines, truth = references.skeleton(p, iterations), references.skeleton(y, iterations)
    losses = []
    for images in [[0], [1]] if per_image else [[0, 1]]:
        for c in range(x.shape[1]):
            mine = [value[images, c] for value in (w, p, y, lines, truth)]
            wc, pc, yc, lc, tc = mine
            precision = ((wc * lc * yc).sum() + smooth) / ((wc * lc).sum() + smooth)
            recall = ((wc * tc * pc).sum() + smooth) / ((wc * tc).sum() + smooth)
            losses.append(1 - 2 / (1 / precision + 1 / recall))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("places", [(6, 7), (4, 5, 4)])
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_against_the_reference(mode: str, per_image: bool, places: tuple[int, ...]) -> None:
    x, y = sample(mode, *places)
    for own in ({}, {"iterations": 0}, {"iterations": 2, "smooth": 1.0}):
        own |= {"mode": mode, "per_image": per_image}
        torch.testing.assert_close(
            value_and_grad(cldice_loss, x, y, ignore_index=255, **own),
            value_and_grad(lambda x: reference(x, y, **own), x),  # noqa: B023
        )


def test_pixel_weights() -> None:
    x, y = sample("multiclass", 6, 7)
    weight = torch.linspace(0, 2, 84, dtype=x.dtype).reshape(2, 6, 7)
    torch.testing.assert_close(
        value_and_grad(cldice_loss, x, y, ignore_index=255, pixel_weight=weight),
        value_and_grad(lambda x: reference(x, y, weight=weight.unsqueeze(1)), x),
    )


def test_equal_to_monai() -> None:
    """Which averages the images, and counts all classes as one."""
    monai = pytest.importorskip("monai.losses")
    x, y = sample("binary", 12, 13)
    y = (y % 255).to(x.dtype)
    peer = monai.SoftclDiceLoss(iter_=3, smooth=1e-12, smooth_nr=1.0, smooth_dr=1.0)
    torch.testing.assert_close(
        value_and_grad(cldice_loss, x, y, smooth=1.0, per_image=True),
        value_and_grad(lambda x: peer(x.sigmoid(), y), x),
    )


def test_a_gap_costs_more_than_a_width() -> None:
    """A road of five rows: half as wide, and with a gap of as many pixels."""
    y = torch.zeros(1, 15, 40, dtype=torch.long)
    y[0, 5:10] = 1
    thin, gap = y.clone(), y.clone()
    thin[0, [5, 9]] = 0
    gap[0, :, 12:28] = 0
    assert thin.sum() == gap.sum()

    def loss(mask: Tensor) -> float:
        return cldice_loss(mask.unsqueeze(1) * 80.0 - 40, y).item()

    assert loss(y) < 1e-6
    assert loss(thin) < 0.1
    assert loss(gap) > 0.2


def test_extremes() -> None:
    """0 and 1, with finite gradients, at logits of any size."""
    y = (torch.arange(48).reshape(1, 6, 8) // 4) % 2
    for scale in (40.0, 1e4):
        x = (y.unsqueeze(1) * 2 - 1) * scale
        for sign in (1, -1):
            value, grad = value_and_grad(cldice_loss, sign * x, y)
            torch.testing.assert_close(value, torch.tensor(float(sign < 0)))
            assert grad.isfinite().all()


def test_absent_classes() -> None:
    x, y = sample("multiclass", 6, 7)
    y = y % 255 % 2
    each = cldice_loss(x, y, absent="penalise", reduction="none")
    torch.testing.assert_close(each[2], x.softmax(1)[:, 2].mean())
    torch.testing.assert_close(cldice_loss(x, y), each[:2].mean())


def test_more_iterations_than_the_image_has_pixels() -> None:
    """They find nothing more, and take no time."""
    x, y = sample("multiclass", 6, 7)
    expected = cldice_loss(x, y, ignore_index=255, iterations=100)
    assert torch.equal(cldice_loss(x, y, ignore_index=255, iterations=10**9), expected)


def test_errors() -> None:
    x, y = sample("multiclass", 6, 7)
    with pytest.raises(ValueError, match=r"iterations must not be negative.*: -1"):
        cldice_loss(x, y, ignore_index=255, iterations=-1)
