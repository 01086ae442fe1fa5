"""Sigmoid losses in detection heads and on masks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

import references
from detseg_losses import (
    asymmetric_loss,
    binary_cross_entropy_loss,
    class_balanced_weights,
    ghm_loss,
    poly_focal_loss,
    quality_focal_loss,
    sigmoid_focal_loss,
    varifocal_loss,
)
from references import value_and_grad

GAMMAS = (0, 0.5, 1, 1.5, 2, 3)
LOSSES: dict[str, tuple[Any, Any]] = {
    "focal": (sigmoid_focal_loss, references.focal),
    "bce": (binary_cross_entropy_loss, references.bce),
    "quality_focal": (quality_focal_loss, references.quality_focal),
    "varifocal": (varifocal_loss, references.varifocal),
    "asymmetric": (asymmetric_loss, references.asymmetric),
    "poly_focal": (poly_focal_loss, references.poly_focal),
}
OPTIONS: list[tuple[str, dict[str, float]]] = [
    *(("quality_focal", {"beta": beta}) for beta in GAMMAS),
    *(("varifocal", {"alpha": 0.3, "gamma": gamma}) for gamma in GAMMAS),
    *(("asymmetric", {"gamma_neg": gamma}) for gamma in GAMMAS),
    *(("asymmetric", {"gamma_pos": gamma, "margin": 0.0}) for gamma in GAMMAS),
    *(("asymmetric", {"gamma_neg": gamma, "margin": 0.0}) for gamma in GAMMAS),
    ("asymmetric", {"gamma_neg": 0.5, "margin": 1e-3}),
    ("asymmetric", {"margin": 1.0}),
    *(("poly_focal", {"epsilon": -0.5, "alpha": 0.6, "gamma": gamma}) for gamma in GAMMAS),
    ("poly_focal", {"epsilon": -1.0}),
]


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
        value_and_grad(poly_focal_loss, x, given, alpha=numbers, reduction="none"),
        value_and_grad(references.poly_focal, x, y, alpha=each),
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


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_options_of_each(name: str, options: dict[str, float]) -> None:
    """On soft and hard targets, and on class indices."""
    loss, reference = LOSSES[name]
    x, index = logits(40, 5), indices(-1, 5, 40)
    y = torch.stack([index == c for c in range(5)], -1).double()
    soft = y * values(40, 5)
    for target, dense in ((index, y), (y, y), (soft, soft)):
        assert_same(
            value_and_grad(loss, x, target, reduction="none", **options),
            value_and_grad(reference, x, dense, **options),
            rtol=1e-8,  # the reference's 1 - p cancels
        )


@pytest.mark.parametrize(("name", "options"), OPTIONS)
@pytest.mark.parametrize("y", [0.0, 1e-3, 0.5, 1.0, "background", "class"])
def test_extreme_logits(name: str, options: dict[str, float], y: Any) -> None:
    """Finite, as in float64, with the right limits."""
    loss, reference = LOSSES[name]
    x = torch.tensor([-1e4, -100, -90, -50, -17, 0, 17, 50, 90, 100, 1e4])[:, None]
    target = (
        torch.full_like(x, y) if isinstance(y, float) else torch.full((11,), int(y[0] == "c") - 1)
    )
    value, grad = value_and_grad(loss, x, target, reduction="none", **options)
    assert value.isfinite().all()
    assert grad.isfinite().all()
    assert (value >= -1e-6).all()  # at an epsilon of -1 two terms cancel
    expected, slope = value_and_grad(loss, x.double(), target, reduction="none", **options)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), slope, rtol=1e-5, atol=1e-6)
    number = y if isinstance(y, float) else float(y == "class")
    inner = slice(4, 7)  # where 1 - p does not cancel in the reference
    plain = reference(x.double()[inner], torch.full((3, 1), number).double(), **options)
    torch.testing.assert_close(expected[inner], plain, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["quality_focal", "varifocal", "poly_focal"])
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("positive", [True, False])
def test_each_is_accurate_relative_to_itself(name: str, dense: bool, positive: bool) -> None:
    loss, reference = LOSSES[name]
    x = torch.linspace(-20, 20, 4001)[:, None]
    y = torch.full_like(x, float(positive))
    target = y if dense else torch.full((4001,), int(positive) - 1)
    value, grad = value_and_grad(loss, x, target, reduction="none")
    exact, slope = value_and_grad(loss, x.double(), target, reduction="none")
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), slope, rtol=1e-5, atol=0)
    assert_same(exact, reference(x.double(), y.double()), rtol=1e-6)


def test_values_by_hand() -> None:
    """At p = 1/2, where every cross entropy is log 2."""
    x, ln2 = torch.zeros(1, dtype=torch.float64), math.log(2)

    def at(loss: Any, y: float, **options: Any) -> float:
        return float(loss(x, torch.full_like(x, y), **options))

    assert at(quality_focal_loss, 0.25) == pytest.approx(ln2 / 16)
    assert at(varifocal_loss, 0.25) == pytest.approx(0.25 * ln2)
    assert at(varifocal_loss, 0) == pytest.approx(0.75 / 4 * ln2)
    assert at(asymmetric_loss, 1) == pytest.approx(ln2)
    assert at(asymmetric_loss, 0) == pytest.approx(-(0.45**4) * math.log(0.55))
    assert at(poly_focal_loss, 1) == pytest.approx(0.25 * (ln2 / 4 + 1 / 8))
    assert at(poly_focal_loss, 0, epsilon=2) == pytest.approx(0.75 * (ln2 / 4 + 2 / 8))


def test_identities() -> None:
    """What each loss is at special values of its options."""
    x, index = logits(20, 5), indices(-1, 5, 20)
    y = torch.stack([index == c for c in range(5)], -1).double()
    soft = values(20, 5)
    bce, focal = binary_cross_entropy_loss, sigmoid_focal_loss
    plain: dict[str, Any] = {"alpha": None, "gamma": 1.5}
    equal: list[tuple[Any, dict[str, Any], Any, dict[str, Any], tuple[Tensor, ...]]] = [
        (quality_focal_loss, {"beta": 0}, bce, {}, (index, y, soft)),
        (quality_focal_loss, {"beta": 1.5}, focal, plain, (index, y)),
        (varifocal_loss, {"alpha": 1, "gamma": 0}, bce, {}, (index, y)),
        (asymmetric_loss, {"gamma_neg": 0, "margin": 0}, bce, {}, (index, y, soft)),
        (
            asymmetric_loss,
            {"gamma_neg": 1.5, "gamma_pos": 1.5, "margin": 0},
            focal,
            plain,
            (index, y),
        ),
        (poly_focal_loss, {"epsilon": 0}, focal, {}, (index, y, soft)),
        (ghm_loss, {"bins": 1}, bce, {}, (index, y, soft)),
    ]
    for loss, options, other, others, targets in equal:
        for target in targets:
            assert_same(
                value_and_grad(loss, x, target, reduction="mean", **options),
                value_and_grad(other, x, target, reduction="mean", **others),
            )


def test_quality_is_met_at_the_target() -> None:
    """A soft target is where the loss is least: its slope is 0 there."""
    y = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    for loss in (quality_focal_loss, varifocal_loss):
        _, grad = value_and_grad(loss, y.logit(), y, reduction="sum")
        torch.testing.assert_close(grad, torch.zeros_like(y), rtol=0, atol=1e-12)


def test_asymmetric_margin() -> None:
    """Negatives below it cost nothing and get no gradient, whatever gamma."""
    x = torch.tensor([0.01, 0.05, 0.06]).logit()
    for gamma in GAMMAS:
        value, grad = value_and_grad(
            asymmetric_loss, x, torch.zeros(3), gamma_neg=gamma, margin=0.055, reduction="none"
        )
        assert (value[:2] == 0).all()
        assert (grad[:2] == 0).all()
        assert value[2] > 0
        assert grad[2] > 0


@pytest.mark.parametrize(("gamma_neg", "gamma_pos", "margin"), [(4, 1, 0.05), (2, 0, 0.2)])
def test_equal_to_timm(gamma_neg: int, gamma_pos: int, margin: float) -> None:
    timm_loss = pytest.importorskip("timm.loss")
    peer = timm_loss.AsymmetricLossMultiLabel(gamma_neg, gamma_pos, margin)
    x, y = logits(30, 4).float(), values(30, 4).round().float()
    options: dict[str, Any] = {"gamma_neg": gamma_neg, "gamma_pos": gamma_pos, "margin": margin}

    def rows(x: Tensor) -> Tensor:
        """timm's reduction: the sum over the classes, the mean over the rows."""
        return asymmetric_loss(x, y, reduction="sum", **options) / 30

    torch.testing.assert_close(
        value_and_grad(rows, x), value_and_grad(peer, x, y), rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("bins", [1, 4, 30])
@pytest.mark.parametrize("target", ["index", "dense", "soft"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_ghm(target: str, bins: int, reduction: str) -> None:
    """Rows left out are not counted, weights are."""
    x, index = logits(40, 5), indices(-2, 5, 40)
    y = torch.stack([index == c for c in range(5)], -1).double()
    y = y * values(40, 5) if target == "soft" else y
    rows = values(40, seed=5).round(decimals=1)
    weight = torch.where(index == -2, 0, rows).unsqueeze(-1).expand(40, 5)
    x[index == -2] = torch.nan

    def expected(x: Tensor) -> Tensor:
        each = references.ghm(torch.where(weight > 0, x, 0), y, weight, bins)
        if reduction == "none":
            return each
        return each.sum() / (weight.sum() if reduction == "mean" else 1)

    given, given_weight = (index, rows) if target == "index" else (y, weight)
    got = value_and_grad(ghm_loss, x, given, weight=given_weight, bins=bins, reduction=reduction)
    assert_same(got, value_and_grad(expected, x), rtol=1e-7)


def test_ghm_by_hand() -> None:
    """Three easy entries share the weight that one hard entry has alone; the mean weight is 1."""
    x = torch.tensor([-4.0, -4.0, -4.0, 4.0], dtype=torch.float64)
    y = torch.zeros_like(x)
    got = ghm_loss(x, y, bins=10, reduction="none")
    each = torch.tensor([4 / 6, 4 / 6, 4 / 6, 4 / 2], dtype=torch.float64)
    assert_same(got, F.softplus(x) * each)
    assert each.mean() == 1
    assert_same(ghm_loss(x[:3], y[:3], bins=10), F.softplus(x[0]))  # all in one bin: bce
    assert ghm_loss(torch.full((3,), torch.nan), y[:3].float()).isnan()
    with torch.no_grad():
        assert_same(ghm_loss(x, y, bins=10, reduction="none"), got)


def test_class_balanced_weights() -> None:
    """The formula of the paper, normalised; rare classes weigh more, absent ones nothing."""
    counts = [1, 10, 1000, 10**9]
    for beta in (0.0, 0.9, 0.999, 1 - 1e-9):
        plain = [(1 - beta) / (1 - beta**n) for n in counts]
        expected = torch.tensor([w * 4 / sum(plain) for w in plain])
        got = class_balanced_weights(counts, beta)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-9)
        assert got.sum().item() == pytest.approx(4)
        assert (got.diff() <= 0).all()
    assert class_balanced_weights(counts, 0.0).tolist() == [1, 1, 1, 1]
    nearly = class_balanced_weights([1, 2, 4], 1 - 1e-12)
    torch.testing.assert_close(nearly, torch.tensor([4.0, 2, 1]) * 3 / 7, rtol=1e-4, atol=0)
    assert class_balanced_weights(torch.tensor([5, 0, 5])).tolist() == [1.5, 0, 1.5]
    weights = class_balanced_weights([5, 50, 500])
    x, index = logits(9, 3), indices(-1, 3, 9)
    assert binary_cross_entropy_loss(x, index, class_weights=weights).isfinite()
    with pytest.raises(ValueError, match="beta must be in"):
        class_balanced_weights(counts, 1.0)
    with pytest.raises(ValueError, match="counts must be"):
        class_balanced_weights([1, -1])
    with pytest.raises(ValueError, match="counts must be"):
        class_balanced_weights(torch.ones(2, 2))


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
@pytest.mark.parametrize("count", [1, 25])
@pytest.mark.parametrize("left_out", ["rows", "entries"])
@pytest.mark.parametrize("weighted", [True, False])
def test_what_is_left_out_may_hold_anything(
    name: str, count: int, left_out: str, weighted: bool
) -> None:
    """Little that is looked up, and much; among rows and entries of which others have weights."""
    loss = LOSSES[name][0]
    x, index, y = logits(2, 40, 3), indices(-1, 3, 2, 40), values(2, 40, 3)
    kept = torch.ones(2, 40, 3, dtype=torch.bool)
    if left_out == "rows":
        kept[1, :count] = False
    else:
        kept[1, :count, 1] = False
    weight = values(2, 40, 3, seed=5) if weighted else torch.ones(2, 40, 3, dtype=torch.float64)
    weight = (weight if left_out == "entries" else weight[:, :, :1].expand(2, 40, 3)) * kept
    broken = x.masked_fill(~kept, torch.nan)
    broken[1, 0, 1] = -torch.inf
    for target in (index, y):
        given = weight[:, :, 0] if left_out == "rows" else weight
        value, grad = value_and_grad(loss, broken, target, weight=given, reduction="sum")

        def expected(x: Tensor, target: Tensor = target) -> Tensor:
            return (loss(x, target, reduction="none") * weight).sum()

        assert_same((value, grad), value_and_grad(expected, x))
        assert (grad[~kept] == 0).all()
    if left_out == "rows" and not weighted:
        marked = index.masked_fill(~kept[:, :, 0], -2)
        assert_same(
            value_and_grad(loss, broken, marked, reduction="mean"),
            value_and_grad(loss, broken, index, weight=given, reduction="mean"),
        )


@pytest.mark.parametrize("name", [*LOSSES, "ghm"])
@pytest.mark.parametrize("target", ["index", "dense"])
@pytest.mark.parametrize("options", [{"reduction": "none"}, {"reduction": "sum"}, {}])
def test_weights_of_images(name: str, target: str, options: dict[str, Any]) -> None:
    """One weight for an image is the same as that weight for each of its rows; 0 leaves out."""
    loss = ghm_loss if name == "ghm" else LOSSES[name][0]
    x, index = logits(3, 20, 4), indices(-2, 4, 3, 20)
    y = index if target == "index" else values(3, 20, 4)
    x[1] = torch.inf
    weight = torch.tensor([[0.5], [0.0], [2.0]], dtype=torch.float64)
    assert_same(
        value_and_grad(loss, x, y, weight=weight, **options),
        value_and_grad(loss, x, y, weight=weight.repeat(1, 20), **options),
    )
    assert loss(x[:, :0], y[:, :0], weight=weight, **options).sum() == 0
    assert loss(x[:0], y[:0], weight=weight[:1], **options).sum() == 0


@pytest.mark.parametrize("weighted", [True, False])
def test_another_backward_gives_the_same_digits(weighted: bool) -> None:
    x = logits(400, 8).float().requires_grad_()
    weight = values(400).float() if weighted else None
    loss = sigmoid_focal_loss(x, values(400, 8).float(), weight=weight, reduction="mean")
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


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


def test_no_classes_cost_nothing() -> None:
    x = torch.zeros(5, 0)
    for weights in (None, torch.zeros(0)):
        assert sigmoid_focal_loss(x, x, class_weights=weights, reduction="sum") == 0


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
        loss(
            x[b : b + 1],
            target[b : b + 1],
            reduction="mean",
            **options | {"weight": weight[b : b + 1]},
        )
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
        ({"gamma": -1}, "gamma must be a finite number"),
        ({"alpha": 1.5}, "alpha must be in"),
        ({"alpha": [0.1, 0.2]}, r"\(2,\) for 5 classes"),
        ({"class_weights": [1.0] * 6}, r"\(6,\) for 5 classes"),
        ({"reduction": "avg"}, "reduction must be one of"),
        ({"weight": torch.ones(7, requires_grad=True)}, "weight requires grad"),
        ({"weight": torch.ones(6)}, r"weight \(6,\) does not fit inputs \(7, 5\)"),
        ({"pixel_weight": torch.ones(1, 7, 5)}, r"weight \(1, 7, 5\) does not fit"),
        ({"alpha": torch.full((5,), 0.5, requires_grad=True)}, "requires grad"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sigmoid_focal_loss(logits(7, 5), indices(0, 5, 7), **options)


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (quality_focal_loss, {"beta": -1}, "beta must be a finite number"),
        (varifocal_loss, {"alpha": -1}, "alpha must be a finite number"),
        (varifocal_loss, {"gamma": math.inf}, "gamma must be a finite number from 0 up"),
        (asymmetric_loss, {"gamma_neg": -1}, "gamma_neg must be a finite number"),
        (asymmetric_loss, {"gamma_pos": math.nan}, "gamma_pos must be a finite number"),
        (asymmetric_loss, {"margin": 1.5}, "margin must be in"),
        (poly_focal_loss, {"epsilon": -1.5}, "epsilon must not be below -1"),
        (poly_focal_loss, {"alpha": 2}, "alpha must be in"),
        (poly_focal_loss, {"gamma": -1}, "gamma must be a finite number"),
        (ghm_loss, {"bins": 0}, "bins must be 1 or more, and no more than 65536: 0"),
    ],
)
def test_bad_options_of_each(loss: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss(logits(7, 5), indices(0, 5, 7), **options)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.full((7,), 5), r"target\[0\] is label 5, but there are 5 classes, 0 to 4, or -1"),
        (torch.full((7,), -3), "is label -3, but"),
        (torch.full((7, 5), 1.5), r"target\[0, 0\] is 1.5, but .* from 0 to 1"),
        (torch.full((7, 5), torch.nan), "is nan, but"),
        (torch.full((7,), 0.5), r"target\[0\] is 0.5: class indices are whole numbers"),
        (torch.zeros(6, dtype=torch.long), r"\(7, 5\) and targets \(6,\) do not fit"),
        (torch.zeros(7, 5, requires_grad=True), "the target requires grad"),
    ],
)
def test_bad_targets(target: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sigmoid_focal_loss(logits(7, 5), target)


def test_slope_of_the_slope_where_a_probability_underflows() -> None:
    """A root there would make it NaN."""
    x = torch.tensor([[-200.0, 1.0]], requires_grad=True)
    value = sigmoid_focal_loss(x, torch.tensor([-1]), gamma=1.5, reduction="sum")
    (slope,) = torch.autograd.grad(value, x, create_graph=True)
    (second,) = torch.autograd.grad(slope.sum(), x)
    assert second.isfinite().all()
    assert second[0, 0] == 0


@pytest.mark.parametrize("prior", [0.1, 0.4])
def test_ghm_of_equal_logits_on_the_edge_of_a_bin(prior):
    """As a new head has them: each entry has the weight of the bin that it is counted in."""
    x = torch.full((1000, 20), -math.log((1 - prior) / prior))
    y = torch.full((1000,), -1)
    y[:10] = 3
    _, grad = value_and_grad(ghm_loss, x, y)
    _, expected = value_and_grad(ghm_loss, x.double(), y)
    torch.testing.assert_close(grad[100:].sum(), expected[100:].sum().float())


def test_alpha_of_classes_is_checked():
    for alpha in ([0.25, 1.5], torch.tensor(1.5)):
        with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\]"):
            sigmoid_focal_loss(torch.zeros(3, 2), torch.zeros(3, 2), alpha=alpha)


@pytest.mark.parametrize("target", ["index", "dense"])
@pytest.mark.parametrize("loss", [sigmoid_focal_loss, binary_cross_entropy_loss])
def test_threads_may_change_before_backward(loss: Any, target: str) -> None:
    """The blocks depend on their number."""
    x = logits(2500, 80).float().requires_grad_()
    y = indices(-2, 80, 2500) if target == "index" else values(2500, 80).round().float()
    (expected,) = torch.autograd.grad(loss(x, y, reduction="sum"), x)
    threads = torch.get_num_threads()
    try:
        for before, after in ((1, 2), (2, 1)):
            torch.set_num_threads(before)
            total = loss(x, y, reduction="sum")
            torch.set_num_threads(after)
            (got,) = torch.autograd.grad(total, x)
            torch.testing.assert_close(got, expected)
    finally:
        torch.set_num_threads(threads)


def test_logits_of_inference_mode_have_a_loss() -> None:
    with torch.inference_mode():
        x = torch.zeros(3, 2)
    soft = torch.full((3, 2), 0.5)
    value = binary_cross_entropy_loss(x, soft, pos_weight=2.0)
    assert value.item() == pytest.approx(1.5 * math.log(2))
