"""Cross entropy and softmax focal loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import references
from detseg_losses import cross_entropy_loss, softmax_focal_loss, statistics
from references import value_and_grad

WEIGHTS = [0.5, 1.0, 4.0]  # exact in float32


def sample(*places: int, batch: int = 2, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(places))
    x = torch.randn(batch, classes, *places, dtype=torch.float64, generator=generator) * 3
    return x, torch.randint(0, classes, (batch, *places), generator=generator)


def probabilities(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.rand(x.shape, dtype=x.dtype, generator=generator).softmax(1)


def assert_same(actual: Any, expected: Any, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("class_weights", [None, WEIGHTS])
@pytest.mark.parametrize("target", ["index", "ignored", "probabilities", "one-hot"])
def test_equal_to_torch(
    target: str, class_weights: list[float] | None, label_smoothing: float, reduction: str
) -> None:
    """torch is right here: half of the pixels ignored does not halve the mean."""
    x, y = sample(4, 5)
    ignore_index = -100
    if target == "ignored":
        y[:, :2] = ignore_index
    elif target == "probabilities":
        y = probabilities(x)
    elif target == "one-hot":
        y = references.one_hot(x, y)[0]
    weight = None if class_weights is None else torch.tensor(class_weights, dtype=x.dtype)
    ours = (
        {"ignore_index": ignore_index} if target in ("index", "ignored") else {"mode": "multiclass"}
    )
    assert_same(
        value_and_grad(
            cross_entropy_loss,
            x,
            y,
            class_weights=class_weights,
            label_smoothing=label_smoothing,
            reduction=reduction,
            **ours,
        ),
        value_and_grad(
            F.cross_entropy,
            x,
            y,
            weight=weight,
            label_smoothing=label_smoothing,
            reduction=reduction,
            ignore_index=ignore_index,
        ),
    )


@pytest.mark.parametrize("places", [(), (6,), (3, 4), (2, 3, 2)])
def test_layouts(places: tuple[int, ...]) -> None:
    """From class scores (N, C) to volumes; a mask may have a channel of 1."""
    x, y = sample(*places)
    for loss in (cross_entropy_loss, softmax_focal_loss):
        assert_same(loss(x, y.unsqueeze(1)), loss(x, y))
        assert loss(x, y, reduction="none").shape == y.shape
    assert_same(cross_entropy_loss(x, y), F.cross_entropy(x, y))
    assert_same(
        value_and_grad(softmax_focal_loss, x, y),
        value_and_grad(references.cross_entropy, x, y, gamma=2.0),
    )


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("class_weights", [None, WEIGHTS])
@pytest.mark.parametrize("ignore_index", [None, 255, -1])
@pytest.mark.parametrize("loss", ["ce", "smooth ce", "softmax_focal"])
def test_options(
    loss: str,
    ignore_index: int | None,
    class_weights: list[float] | None,
    weighted: bool,
    per_image: bool,
) -> None:
    x, y = sample(2, 3)
    if ignore_index is not None:
        y[0, 0] = ignore_index
    pixel_weight = torch.linspace(0, 1, 12, dtype=x.dtype).reshape(2, 2, 3) if weighted else None
    own: dict[str, float] = {"smooth ce": {"label_smoothing": 0.25}}.get(loss, {})
    if loss == "softmax_focal":
        own = {"gamma": 1.5}
    options: dict[str, Any] = {
        "ignore_index": ignore_index,
        "class_weights": class_weights,
        "pixel_weight": pixel_weight,
        "per_image": per_image,
        **own,
    }
    function = softmax_focal_loss if loss == "softmax_focal" else cross_entropy_loss
    assert_same(
        value_and_grad(function, x, y, **options),
        value_and_grad(references.cross_entropy, x, y, **options),
    )


@pytest.mark.parametrize("label_smoothing", [0.0, 0.25])
def test_weighted_probabilities(label_smoothing: float) -> None:
    x, _ = sample(2, 3)
    options: dict[str, Any] = {
        "class_weights": WEIGHTS,
        "pixel_weight": torch.linspace(0, 1, 12, dtype=x.dtype).reshape(2, 2, 3),
        "label_smoothing": label_smoothing,
    }
    y = probabilities(x)
    assert_same(
        value_and_grad(cross_entropy_loss, x, y, mode="multiclass", **options),
        value_and_grad(references.cross_entropy, x, y, **options),
    )


@pytest.mark.parametrize("gamma", [0, 0.5, 1, 1.5, 2, 3])
def test_softmax_focal(gamma: float) -> None:
    """gamma = 0 is the cross entropy; the focusing is of the softmax's p_t."""
    x, y = sample(2, 3)
    got = value_and_grad(softmax_focal_loss, x, y, gamma=gamma)
    assert_same(got, value_and_grad(references.cross_entropy, x, y, gamma=gamma))
    if gamma == 0:
        assert_same(got, value_and_grad(F.cross_entropy, x, y))


@pytest.mark.parametrize("gamma", [0, 0.5, 1, 2])
@pytest.mark.parametrize("scale", [50.0, 100.0, 1e4])
@pytest.mark.parametrize("loss", ["ce", "softmax_focal"])
def test_logits_far_apart(loss: str, scale: float, gamma: float) -> None:
    """The likelihood underflows, its logarithm and the gradient do not."""
    x = torch.tensor([[0.0, scale, -scale], [scale, 0.0, -scale]])
    y = torch.tensor([2, 0])
    value, grad = value_and_grad(
        *((cross_entropy_loss, x, y) if loss == "ce" else (softmax_focal_loss, x, y)),
        reduction="none",
        **({} if loss == "ce" else {"gamma": gamma}),
    )
    assert_same(value, torch.tensor([2 * scale, 0.0]), rtol=1e-6)
    assert_same(grad, torch.tensor([[0.0, 1, -1], [0, 0, 0]]), rtol=1e-6)


def test_softmax_focal_in_float32_where_the_class_is_nearly_sure() -> None:
    """Relative to the rounding of log p, 1e-7, the best that a softmax in float32 can know."""
    x = torch.linspace(-20, 8, 561)
    x, y = torch.stack((x, torch.zeros_like(x)), 1), torch.ones(561, dtype=torch.long)
    value, grad = value_and_grad(softmax_focal_loss, x, y, gamma=0.5, reduction="sum")
    expected, slope = value_and_grad(softmax_focal_loss, x.double(), y, gamma=0.5, reduction="sum")
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double(), slope, rtol=1e-4, atol=2e-3)
    assert grad.isfinite().all()


@pytest.mark.parametrize("function", [cross_entropy_loss, softmax_focal_loss])
def test_ignored_pixels(function: Any) -> None:
    """They change nothing, get no gradient, and may hold anything."""
    x, y = sample(4, 5)
    y[:, :2] = 255
    clean = value_and_grad(function, x, y, ignore_index=255)
    assert_same(clean[0], function(x[:, :, 2:], y[:, 2:]))
    x[:, :, 0], x[:, 0, 1], x[:, 1, 1] = torch.nan, torch.inf, -torch.inf
    value, grad = value_and_grad(function, x, y, ignore_index=255)
    assert_same((value, grad), clean)
    assert (grad[:, :, :2] == 0).all()


@pytest.mark.parametrize("dense", [True, False])
def test_statistics_by_themselves(dense: bool) -> None:
    """Each of the small tensors has its own gradient, 0 where a pixel is left out."""
    x, y = sample(2, 2, batch=1)
    weight = torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=x.dtype).reshape(1, 2, 2)
    target = probabilities(x) if dense else y

    def maps(x: Tensor) -> tuple[Tensor, ...]:
        s = statistics(
            x,
            target,
            ["nll", "smooth", "regions"],
            mode="multiclass",
            pixel_weight=weight,
            class_weights=WEIGHTS,
        )
        return s.nll, s.smooth, s.tp, s.pred

    assert torch.autograd.gradcheck(maps, (x.requires_grad_(),))
    assert torch.autograd.gradgradcheck(maps, (x,))


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        ((2, 3, 4), torch.full((2, 4), 3), {}, r"target holds 3,.*\[0, 2\]"),
        ((2, 3, 4), torch.full((2, 4), 255, dtype=torch.uint8), {"ignore_index": -1}, "holds 255"),
        ((2, 3, 4), torch.zeros(2, 4), {}, "must be integers"),
        ((2, 1, 4), torch.zeros(2, 4, dtype=torch.long), {}, "use 'bce'"),
        ((2, 3, 4), torch.zeros(2, 5, dtype=torch.long), {}, "do not fit"),
        ((2, 3, 4), torch.zeros(2, 3, 4), {}, "state mode="),
        ((2, 3, 4), torch.zeros(2, 3, 4), {"mode": "multilabel"}, "no meaning in mode"),
        ((2, 3, 4), torch.zeros(2, 3, 4), {"mode": "multi"}, "mode must be one of"),
        (
            (2, 3, 4),
            torch.zeros(2, 3, 4),
            {"mode": "multiclass", "ignore_index": 255},
            "needs class indices",
        ),
        ((3,), torch.zeros(3, dtype=torch.long), {}, r"must be \(B, C, \*\)"),
        ((2, 3, 4), torch.zeros(2, 4, dtype=torch.long), {"label_smoothing": 1.5}, "in \\[0, 1\\]"),
        ((2, 3, 4), torch.zeros(2, 4, dtype=torch.long), {"reduction": "avg"}, "reduction must"),
        ((2, 3, 4), torch.zeros(2, 4, dtype=torch.long), {"class_weights": [1.0] * 4}, "3 classes"),
        (
            (2, 3, 4),
            torch.zeros(2, 4, dtype=torch.long),
            {"pixel_weight": torch.ones(2, 3)},
            "one weight a pixel",
        ),
        (
            (2, 3, 4),
            torch.zeros(2, 4, dtype=torch.long),
            {"pixel_weight": torch.ones(2, 4, requires_grad=True)},
            "pixel_weight requires grad",
        ),
    ],
)
def test_errors(x: tuple[int, ...], y: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cross_entropy_loss(torch.zeros(x), y, **options)


def test_softmax_focal_needs_labels() -> None:
    x = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match="class indices"):
        softmax_focal_loss(x, x.softmax(1), mode="multiclass")
    with pytest.raises(ValueError, match="gamma"):
        softmax_focal_loss(x, torch.zeros(2, 4, dtype=torch.long), gamma=-1)
    with pytest.raises(TypeError, match="target is missing"):
        cross_entropy_loss(x)
