"""The boundary loss and its distance maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import references
from detseg_losses import boundary_loss, build_loss, signed_distance
from detseg_losses.losses import boundary
from references import value_and_grad

MODES = ["multiclass", "binary", "multilabel"]


def sample(mode: str, *places: int) -> tuple[Tensor, Tensor]:
    """Logits and patchy labels, some of them 255; class 2 is absent from image 0."""
    generator = torch.Generator().manual_seed(1)
    channels = 1 if mode == "binary" else 3
    x = torch.randn(2, channels, *places, dtype=torch.float64, generator=generator)
    y = torch.randint(0, 2, (2, channels, *places), generator=generator)
    if mode == "multiclass":
        y = torch.randint(0, 3, (2, *places), generator=generator)
        y[0] %= 2
        y[:, : places[0] // 2] = 0
    y[..., 0] = 255
    return x, y


def distances(x: Tensor, y: Tensor, mode: str, kept: Tensor) -> Tensor:
    one, _ = references.targets_of(x, y, mode, 255)
    one, kept = one.bool(), kept.expand(x.shape)
    maps = [
        references.signed_distance(one[b, c] & kept[b, c], ~one[b, c] & kept[b, c])
        for b in range(x.shape[0])
        for c in range(x.shape[1])
    ]
    return torch.stack(maps).reshape(x.shape)


def reference(x: Tensor, target: Tensor, mode: str, per_image: bool, weight: Tensor) -> Tensor:
    y, w = references.targets_of(x, target, mode, 255)
    w = w * weight.unsqueeze(1)
    phi = distances(x, target, mode, w > 0)
    p = x.softmax(1) if mode == "multiclass" else x.sigmoid()
    means = []
    for images in [[0], [1]] if per_image else [[0, 1]]:
        losses = [
            (w * phi * p)[images, c].sum() / w[images, c].sum()
            for c in range(x.shape[1])
            if (w * y)[images, c].any()
        ]
        means.append(torch.stack(losses).mean())
    return torch.stack(means).mean()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_against_the_reference(mode: str, per_image: bool, weighted: bool) -> None:
    x, y = sample(mode, 4, 5)
    weight = torch.ones(2, 4, 5, dtype=x.dtype)
    if weighted:
        weight = torch.linspace(0, 2, 40, dtype=x.dtype).reshape(2, 4, 5)
    options: dict[str, Any] = {"mode": mode, "ignore_index": 255, "per_image": per_image}
    torch.testing.assert_close(
        value_and_grad(boundary_loss, x, y, pixel_weight=weight, **options),
        value_and_grad(lambda x: reference(x, y, mode, per_image, weight), x),
    )


@pytest.mark.parametrize("places", [(7,), (5, 6), (3, 4, 5)])
def test_signed_distance(places: tuple[int, ...]) -> None:
    """Of labels in 1, 2 and 3 dimensions; of masks; without what is ignored."""
    x, y = sample("multiclass", *places)
    expected = distances(x, y, "multiclass", (y != 255).unsqueeze(1)).float()
    torch.testing.assert_close(signed_distance(y, 3, ignore_index=255), expected)
    torch.testing.assert_close(signed_distance(y.byte(), 3, ignore_index=255), expected)
    masks, _ = references.one_hot(x, y)
    every = signed_distance(y % 255, 3)
    for dense in (masks, masks.bool(), masks.byte()):
        dense[..., 0] = every.new_tensor([1, 0, 0]).reshape(3, *[1] * (len(places) - 1))
        torch.testing.assert_close(signed_distance(dense), every)


def test_signed_distance_by_hand() -> None:
    y = torch.tensor([[[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1]]])
    root = 2**0.5
    expected = torch.tensor([[root, 1, 1, 1], [1, 0, 0, 0], [1, 0, -1, -1], [1, 0, -1, -2]])
    torch.testing.assert_close(signed_distance(y, 2)[0, 1], expected)
    one = signed_distance(torch.zeros(1, 3, 3, dtype=torch.long), 2)
    assert not one.any()  # no boundary: of neither the class that fills it nor the one it lacks


def test_signed_distance_is_equal_to_scipy() -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(1, 60, 70, generator=generator).cumsum(1).cumsum(2) > 0
    found = signed_distance(y.long(), 2)
    for c in range(2):
        mask = (y[0] == c).numpy()
        outside, inside = (ndimage.distance_transform_edt(m) for m in (~mask, mask))
        expected = torch.as_tensor(outside + (1 - inside) * mask)
        torch.testing.assert_close(found[0, c].double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("spacing", [2.0, [5.0, 1.0], [0.25, 0.5]])
def test_spacing_is_equal_to_scipy(spacing: Any) -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(1, 40, 30, generator=generator).cumsum(1).cumsum(2) > 0
    least = min(spacing) if isinstance(spacing, list) else spacing
    expected = []
    for c in range(2):
        mask = (y[0] == c).numpy()
        outside, inside = (ndimage.distance_transform_edt(m, spacing) for m in (~mask, mask))
        expected.append(torch.as_tensor(outside + (least - inside) * mask).float())
    found = signed_distance(y.long(), 2, spacing=spacing)
    torch.testing.assert_close(found[0], torch.stack(expected), rtol=1e-5, atol=1e-5)
    x = torch.randn(1, 2, 40, 30, generator=generator)
    torch.testing.assert_close(
        boundary_loss(x, y.long(), spacing=spacing), boundary_loss(x, y.long(), distance=found)
    )
    spec = f"boundary(spacing={spacing})"
    torch.testing.assert_close(build_loss(spec)(x, y.long()), boundary_loss(x, y, spacing=spacing))


def test_few_large_steps_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are taken where no value is looked at."""
    _, y = sample("multiclass", 6, 7, 5)
    options: dict[str, Any] = {"ignore_index": 255, "spacing": [3.0, 1.0, 0.5]}
    expected = signed_distance(y, 3, **options)
    monkeypatch.setattr("detseg_losses.losses.boundary.in_blocks", lambda tensor: False)
    torch.testing.assert_close(signed_distance(y, 3, **options), expected)


def test_soft_masks_are_rounded_as_the_loss_rounds_them() -> None:
    y = torch.rand(1, 3, 6, 7, generator=torch.Generator().manual_seed(0))
    y[0, 0, 0, :2] = torch.tensor([0.9, 0.5])
    torch.testing.assert_close(signed_distance(y), signed_distance((y > 0.5).long()))
    x = torch.randn(1, 3, 6, 7)
    found = boundary_loss(x, y, mode="multilabel", distance=signed_distance(y))
    torch.testing.assert_close(found, boundary_loss(x, y, mode="multilabel"))


@pytest.mark.parametrize(
    ("target", "classes", "message"),
    [
        (torch.full((1, 3, 3), 255), 2, "label 255, but there are 2 classes"),
        (torch.full((1, 1, 3, 3), 255), None, "divided by 255"),
        (torch.full((1, 3, 3), 3), 3, "label 3, but there are 3 classes, 0 to 2"),
        (torch.full((1, 3, 3), 0.5), 3, "whole numbers"),
    ],
)
def test_distances_of_bad_labels(target: Tensor, classes: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        signed_distance(target, classes)


def test_absent_classes_cost_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 150 classes those of which a boundary is seen are measured, inside and outside."""
    y = torch.zeros(2, 32, 32, dtype=torch.long)
    y[0, 3:9, 3:9], y[0, 20:, 20:] = 7, 149
    counted: list[torch.Size] = []
    measure = boundary._distance
    monkeypatch.setattr(
        boundary, "_distance", lambda mask, by: counted.append(mask.shape) or measure(mask, by)
    )
    found = signed_distance(y, 150)
    assert len(counted) == 2 * 3
    assert found.flatten(2).any(-1).nonzero().tolist() == [[0, 0], [0, 7], [0, 149]]


def test_volumes_need_little_memory() -> None:
    """A few maps of the volume at a time, not one for each step."""
    y = torch.zeros(1, 1, 48, 48, 48, dtype=torch.bool)
    y[..., 10:20, 10:30, 5:9] = True
    with torch.profiler.profile(profile_memory=True) as profile:
        signed_distance(y)
    held = peak = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 0 < peak < 12 * 4 * y.numel()


def test_distance_of_a_data_loader() -> None:
    """Alone, and in a sum whose other terms know nothing of it."""
    x, y = sample("multiclass", 4, 5)
    distance = signed_distance(y, 3, ignore_index=255)
    expected = value_and_grad(boundary_loss, x, y, ignore_index=255)
    found = value_and_grad(boundary_loss, x, y, ignore_index=255, distance=distance)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    total = build_loss("ce + dice + 0.5*boundary", ignore_index=255)
    torch.testing.assert_close(total(x, y, distance=distance), total(x, y), rtol=1e-6, atol=0)
    doubled = build_loss("boundary", ignore_index=255)(x, y, distance=2 * distance)
    torch.testing.assert_close(doubled, 2 * found[0])
    assert "distance" not in build_loss("boundary").terms[0].options
    with pytest.raises(ValueError, match=r"distance \(2, 1, 4, 5\) does not fit logits"):
        boundary_loss(x, y, ignore_index=255, distance=distance[:, :1])
    with pytest.raises(ValueError, match="distance requires grad"):
        boundary_loss(x, y, ignore_index=255, distance=distance.requires_grad_())


def test_binary_masks_without_a_channel() -> None:
    x, y = sample("binary", 4, 5)
    options: dict[str, Any] = {"mode": "binary", "ignore_index": 255}
    torch.testing.assert_close(
        boundary_loss(x[:, 0], y[:, 0], **options), boundary_loss(x, y, **options)
    )


def test_extremes() -> None:
    """The best prediction is the mean of what is inside; logits of any size are finite."""
    _, y = sample("multiclass", 6, 7)
    y = y % 255
    phi = signed_distance(y, 3)
    hard = references.one_hot(phi, y)[0] * 2e4 - 1e4
    for x in (hard, -hard):
        value, grad = value_and_grad(boundary_loss, x, y)
        torch.testing.assert_close(value, (x.softmax(1) * phi).mean((0, 2, 3)).mean())
        assert grad.isfinite().all()
    assert boundary_loss(hard, y) < 0


def test_absent_classes() -> None:
    x, y = sample("multiclass", 4, 5)
    y = y % 255 % 2
    each = boundary_loss(x, y, absent="penalise", reduction="none")
    torch.testing.assert_close(each[2], x.softmax(1)[:, 2].mean())
    torch.testing.assert_close(boundary_loss(x, y), each[:2].mean())
