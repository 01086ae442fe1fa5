"""Losses of the likelihood of each pixel."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import references
from detseg_losses import (
    cross_entropy_loss,
    ohem_cross_entropy_loss,
    poly_cross_entropy_loss,
    softmax_focal_loss,
    symmetric_cross_entropy_loss,
)
from detseg_losses._core.batch import segmentation_batch
from detseg_losses._engine.statistics import measure
from references import value_and_grad

WEIGHTS = [0.5, 1.0, 4.0]  # exact in float32
LIKELIHOOD: list[tuple[Any, dict[str, Any], Callable[[Tensor], Tensor]]] = [
    (softmax_focal_loss, {}, lambda p: -((1 - p) ** 2) * p.log()),
    (softmax_focal_loss, {"alpha": 0.25, "gamma": 0.5}, lambda p: -((1 - p) ** 0.5) * p.log() / 4),
    (poly_cross_entropy_loss, {}, lambda p: -p.log() + 1 - p),
    (poly_cross_entropy_loss, {"epsilon": -0.5}, lambda p: -p.log() - (1 - p) / 2),
    (symmetric_cross_entropy_loss, {}, lambda p: -0.1 * p.log() + 4 * (1 - p)),
    (symmetric_cross_entropy_loss, {"alpha": 6, "beta": 0.5}, lambda p: -6 * p.log() + 2 - 2 * p),
]
OF_LIKELIHOOD = [softmax_focal_loss, poly_cross_entropy_loss, symmetric_cross_entropy_loss]


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


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("class_weights", [None, WEIGHTS])
@pytest.mark.parametrize("ignore_index", [None, 255])
@pytest.mark.parametrize(("loss", "own", "formula"), LIKELIHOOD)
def test_formulas_of_the_likelihood(
    loss: Any,
    own: dict[str, Any],
    formula: Any,
    ignore_index: int | None,
    class_weights: list[float] | None,
    weighted: bool,
    per_image: bool,
) -> None:
    x, y = sample(2, 3)
    if ignore_index is not None:
        y[0, 0] = ignore_index
    options: dict[str, Any] = {
        "ignore_index": ignore_index,
        "class_weights": class_weights,
        "pixel_weight": torch.linspace(0, 1, 12, dtype=x.dtype).reshape(2, 2, 3)
        if weighted
        else None,
        "per_image": per_image,
    }
    assert_same(
        value_and_grad(loss, x, y, **own, **options),
        value_and_grad(lambda x: references.likelihood(formula, x, y, **options), x),
    )


@pytest.mark.parametrize("class_weights", [None, WEIGHTS])
def test_alpha_of_each_class(class_weights: list[float] | None) -> None:
    """Unlike class weights it is not divided by in a mean; in a sum they are the same."""
    x, y = sample(2, 3)
    y[0, 0] = 255
    alpha = [0.25, 0.5, 2.0]
    options: dict[str, Any] = {"ignore_index": 255, "class_weights": class_weights}

    def expected(x: Tensor) -> Tensor:
        def formula(p: Tensor) -> Tensor:
            return -((1 - p) ** 2) * p.log()

        return references.likelihood(formula, x, y, alpha=alpha, **options)

    got = value_and_grad(softmax_focal_loss, x, y, alpha=alpha, **options)
    assert_same(got, value_and_grad(expected, x))
    tensor = torch.tensor(alpha)
    assert_same(value_and_grad(softmax_focal_loss, x, y, alpha=tensor, **options), got)
    assert_same(
        softmax_focal_loss(x, y, alpha=torch.tensor(0.5), **options),
        softmax_focal_loss(x, y, alpha=0.5, **options),
    )
    for reduction in ("none", "sum"):
        assert_same(
            softmax_focal_loss(x, y, alpha=WEIGHTS, ignore_index=255, reduction=reduction),
            softmax_focal_loss(x, y, class_weights=WEIGHTS, ignore_index=255, reduction=reduction),
        )


def test_equal_to_kornia() -> None:
    """In its sums; its mean is over the entries of the one-hot target."""
    kornia = pytest.importorskip("kornia")
    x, y = sample(4, 5)
    for gamma in (0.5, 2.0):
        assert_same(
            value_and_grad(softmax_focal_loss, x, y, gamma=gamma, reduction="sum"),
            value_and_grad(
                kornia.losses.focal_loss, x, y, alpha=None, gamma=gamma, reduction="sum"
            ),
        )


def test_identities() -> None:
    """What each loss is at special values of its options."""
    x, y = sample(4, 5)
    expected = value_and_grad(cross_entropy_loss, x, y)
    assert_same(value_and_grad(poly_cross_entropy_loss, x, y, epsilon=0), expected)
    assert_same(value_and_grad(symmetric_cross_entropy_loss, x, y, alpha=1, beta=0), expected)
    assert_same(value_and_grad(ohem_cross_entropy_loss, x, y, fraction=1), expected)
    assert_same(value_and_grad(ohem_cross_entropy_loss, x, y, thresh=1), expected)
    value, grad = value_and_grad(poly_cross_entropy_loss, x, y, epsilon=8)
    assert_same(
        value_and_grad(symmetric_cross_entropy_loss, x, y, alpha=0.5, beta=1),
        (value / 2, grad / 2),
    )


def test_values_by_hand() -> None:
    """At p_t = 1/2 and 1/4."""
    x = torch.tensor([[0.0, 0.0], [0.0, math.log(3)]], dtype=torch.float64).T[:, :, None]
    x, y = x.transpose(0, 2), torch.zeros(1, 2, dtype=torch.long)
    ln2 = math.log(2)
    assert poly_cross_entropy_loss(x, y).item() == pytest.approx((ln2 + 0.5 + 2 * ln2 + 0.75) / 2)
    got = symmetric_cross_entropy_loss(x, y, reduction="none")
    assert got.tolist()[0] == pytest.approx([0.1 * ln2 + 2, 0.2 * ln2 + 3])
    got = ohem_cross_entropy_loss(x, y, reduction="none", thresh=0.3)
    assert got.tolist()[0] == pytest.approx([0, 2 * ln2])
    assert ohem_cross_entropy_loss(x, y, thresh=0.3).item() == pytest.approx(2 * ln2)
    assert ohem_cross_entropy_loss(x, y, thresh=0.6).item() == pytest.approx(1.5 * ln2)


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("class_weights", [None, WEIGHTS])
@pytest.mark.parametrize("ignore_index", [None, 255])
@pytest.mark.parametrize("thresh", [None, 0.2, 0.7])
@pytest.mark.parametrize("fraction", [1e-6, 0.3, 0.9])
def test_ohem(
    fraction: float,
    thresh: float | None,
    ignore_index: int | None,
    class_weights: list[float] | None,
    weighted: bool,
    per_image: bool,
) -> None:
    """The hardest pixels are chosen by likelihood, among those that count."""
    x, y = sample(4, 5)
    if ignore_index is not None:
        y[0, :3] = ignore_index
    weight = torch.linspace(0, 1, 40, dtype=x.dtype).reshape(2, 4, 5)
    options: dict[str, Any] = {
        "fraction": fraction,
        "thresh": thresh,
        "ignore_index": ignore_index,
        "class_weights": class_weights,
        "pixel_weight": weight if weighted else None,
        "per_image": per_image,
    }
    assert_same(
        value_and_grad(ohem_cross_entropy_loss, x, y, **options),
        value_and_grad(lambda x: references.likelihood(lambda p: -p.log(), x, y, **options), x),
    )


def test_ohem_of_probabilities() -> None:
    """A soft target has a cross entropy, too."""
    x, _ = sample(4, 5)
    y = probabilities(x)
    each = F.cross_entropy(x, y, reduction="none").flatten()
    got = ohem_cross_entropy_loss(x, y, mode="multiclass", fraction=0.25, thresh=None)
    assert_same(got, each.sort(descending=True).values[:10].mean())


def test_ohem_keeps_ties_and_never_what_is_left_out() -> None:
    x, y = torch.zeros(1, 2, 6), torch.zeros(1, 6, dtype=torch.long)
    y[0, :4] = 255
    got = ohem_cross_entropy_loss(
        x, y, ignore_index=255, fraction=1 / 6, thresh=None, reduction="none"
    )
    assert (got[0, :4] == 0).all()
    assert (got[0, 4:] > 0).all()


@pytest.mark.parametrize("scale", [50.0, 100.0, 1e4])
@pytest.mark.parametrize("loss", OF_LIKELIHOOD)
def test_formulas_of_logits_far_apart(loss: Any, scale: float) -> None:
    """Finite gradients, and gradients of gradients, where the class is sure or impossible."""
    x = torch.tensor([[0.0, scale, -scale], [scale, 0.0, -scale]], requires_grad=True)
    value = loss(
        x,
        torch.tensor([2, 0]),
        reduction="none",
        **({"gamma": 0.5} if loss is softmax_focal_loss else {}),
    )
    each = {softmax_focal_loss: (1, 0), poly_cross_entropy_loss: (1, 1)}.get(loss, (0.1, 4))
    assert_same(value, torch.tensor([each[0] * 2 * scale + each[1], 0.0]), rtol=1e-6)
    (grad,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    slope = each[0] * torch.tensor([[0.0, 1, -1], [0, 0, 0]])
    torch.testing.assert_close(grad, slope, rtol=1e-6, atol=1e-9)
    (second,) = torch.autograd.grad(grad.pow(2).sum(), x)
    assert second.isfinite().all()


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


@pytest.mark.parametrize("function", [cross_entropy_loss, *OF_LIKELIHOOD])
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
        batch = segmentation_batch(x, target, mode="multiclass", pixel_weight=weight)
        s = measure(batch, ["nll", "smooth", "regions", "squares"], WEIGHTS)
        return s.nll, s.smooth, s.counts

    assert torch.autograd.gradcheck(maps, (x.requires_grad_(),))
    assert torch.autograd.gradgradcheck(maps, (x,))


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        ((2, 3, 4), torch.full((2, 4), 3), {}, "is label 3, but there are 3 classes, 0 to 2"),
        ((2, 3, 4), torch.full((2, 4), 255, dtype=torch.uint8), {"ignore_index": -1}, "label 255"),
        ((2, 3, 4), torch.full((2, 4), 0.5), {}, "whole numbers"),
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


@pytest.mark.parametrize("loss", OF_LIKELIHOOD)
def test_formulas_of_the_likelihood_need_labels(loss: Any) -> None:
    x = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match="class indices"):
        loss(x, x.softmax(1), mode="multiclass")


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (softmax_focal_loss, {"gamma": -1}, "gamma must be a finite number"),
        (softmax_focal_loss, {"alpha": -1}, "alpha must be a finite number"),
        (softmax_focal_loss, {"alpha": [1.0, 2.0]}, r"\(2,\) for 3 classes"),
        (poly_cross_entropy_loss, {"epsilon": -1.5}, "epsilon must not be below -1"),
        (poly_cross_entropy_loss, {"epsilon": math.inf}, "epsilon must not be below -1"),
        (symmetric_cross_entropy_loss, {"alpha": -1}, "alpha must be a finite number"),
        (symmetric_cross_entropy_loss, {"beta": math.nan}, "beta must be a finite number"),
        (ohem_cross_entropy_loss, {"fraction": 0}, r"fraction must be in \(0, 1\]"),
        (ohem_cross_entropy_loss, {"thresh": 1.5}, r"thresh must be in \(0, 1\]"),
    ],
)
def test_bad_options_of_each(loss: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss(torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.long), **options)


@pytest.mark.parametrize("classes", [2, 3, 6])
def test_a_class_that_is_ruled_out_by_minus_infinity(classes: int) -> None:
    x = torch.randn(2, classes, 5, 4)
    x[:, 0] = -torch.inf
    y = torch.randint(1, classes, (2, 5, 4))
    got = value_and_grad(cross_entropy_loss, x, y)
    torch.testing.assert_close(got, value_and_grad(F.cross_entropy, x, y))
    y[0, 0, 0] = 0
    value, grad = value_and_grad(cross_entropy_loss, x, y)
    assert value.isposinf()
    torch.testing.assert_close(grad, value_and_grad(F.cross_entropy, x, y)[1])


@pytest.mark.parametrize("classes", [2, 3])
def test_a_compiled_loss_stops_at_a_label_out_of_range(classes: int) -> None:
    """Where labels are not looked at beforehand."""
    x, y = torch.randn(2, classes, 5, 4), torch.zeros(2, 5, 4, dtype=torch.long)
    y[0, 0] = 255
    compiled = torch.compile(cross_entropy_loss, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="out of bounds"):
        compiled(x, y)
