"""Losses that are formulas on the counts of each class."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from segmentation_models_pytorch import losses as smp
from torch import Tensor

import references
from detseg_losses import (
    build_loss,
    dice_loss,
    f1_loss,
    focal_tversky_loss,
    generalised_dice_loss,
    jaccard_loss,
    log_cosh_dice_loss,
    mcc_loss,
    squared_dice_loss,
    tversky_loss,
)
from detseg_losses._core.batch import segmentation_batch
from detseg_losses._engine.statistics import measure
from references import value_and_grad

WEIGHTS = [0.5, 1.0, 4.0]
LOSSES: dict[str, tuple[Any, dict[str, float], Any]] = {
    "dice": (dice_loss, {}, references.dice()),
    "smooth dice": (dice_loss, {"smooth": 1.0}, references.dice(1.0)),
    "jaccard": (jaccard_loss, {}, references.jaccard()),
    "smooth jaccard": (jaccard_loss, {"smooth": 1.0}, references.jaccard(1.0)),
    "tversky": (tversky_loss, {"alpha": 0.3, "beta": 0.7}, references.tversky(0.3, 0.7)),
    "unequal sum": (tversky_loss, {"alpha": 1.5, "beta": 0.25}, references.tversky(1.5, 0.25)),
    "focal_tversky": (focal_tversky_loss, {}, references.tversky(0.3, 0.7, 0.75)),
    "focusing": (focal_tversky_loss, {"gamma": 2.0}, references.tversky(0.3, 0.7, 2.0)),
    "squared_dice": (squared_dice_loss, {}, references.squared_dice()),
    "smooth squared_dice": (squared_dice_loss, {"smooth": 1.0}, references.squared_dice(1.0)),
    "log_cosh_dice": (log_cosh_dice_loss, {}, references.log_cosh_dice()),
    "f1": (f1_loss, {}, references.f1()),
    "f2": (f1_loss, {"beta": 2.0}, references.f1(2.0)),
    "mcc": (mcc_loss, {}, references.mcc()),
    "smooth mcc": (mcc_loss, {"smooth": 1.0}, references.mcc(1.0)),
}


def sample(mode: str, *places: int, ignore_index: int | None = None) -> tuple[Tensor, Tensor]:
    """Logits and labels; class 2 is absent from image 0."""
    generator = torch.Generator().manual_seed(3)
    channels = 1 if mode == "binary" else 3
    x = torch.randn(2, channels, *places, dtype=torch.float64, generator=generator) * 2
    if mode == "multiclass":
        y = torch.randint(0, 3, (2, *places), generator=generator)
        y[0] %= 2
    else:
        y = torch.randint(0, 2, (2, channels, *places), generator=generator)
        y[0, -1] = 0
    if ignore_index is not None:
        y[..., -1] = ignore_index
    return x, y


def assert_same(actual: Any, expected: Any, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("ignore_index", [None, 255])
@pytest.mark.parametrize("mode", ["multiclass", "binary", "multilabel"])
@pytest.mark.parametrize("name", LOSSES)
def test_modes(name: str, mode: str, ignore_index: int | None) -> None:
    loss, own, formula = LOSSES[name]
    x, y = sample(mode, 4, 5, ignore_index=ignore_index)
    options: dict[str, Any] = {"mode": mode, "ignore_index": ignore_index}
    assert_same(
        value_and_grad(loss, x, y, **own, **options),
        value_and_grad(lambda x: references.region(formula, x, y, **options), x),
    )


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("absent", ["skip", "penalise"])
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ["dice", "smooth jaccard", "focal_tversky", "squared_dice", "mcc"])
def test_options(name: str, weighted: bool, per_image: bool, absent: str, reduction: str) -> None:
    loss, own, formula = LOSSES[name]
    x, y = sample("multiclass", 3, 4, ignore_index=255)
    options: dict[str, Any] = {
        "ignore_index": 255,
        "per_image": per_image,
        "absent": absent,
        "reduction": reduction,
    }
    if weighted:
        options["pixel_weight"] = torch.linspace(0, 1, 24, dtype=x.dtype).reshape(2, 3, 4)
        options["class_weights"] = WEIGHTS
    assert_same(
        value_and_grad(loss, x, y, **own, **options),
        value_and_grad(lambda x: references.region(formula, x, y, **options), x),
    )


@pytest.mark.parametrize("mode", ["multiclass", "multilabel"])
@pytest.mark.parametrize("name", LOSSES)
def test_soft_targets(name: str, mode: str) -> None:
    """Mixed-up masks; a one-hot mask is worth its labels."""
    loss, own, formula = LOSSES[name]
    x, labels = sample("multiclass", 4, 5)
    y = torch.rand(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(4))
    y = y.softmax(1) if mode == "multiclass" else y
    weight = torch.linspace(0, 1, 40, dtype=x.dtype).reshape(2, 4, 5)
    assert_same(
        value_and_grad(loss, x, y, mode=mode, pixel_weight=weight, **own),
        value_and_grad(
            lambda x: references.region(formula, x, y, mode=mode, pixel_weight=weight), x
        ),
    )
    hard, _ = references.one_hot(x, labels)
    for dense in (hard, hard.bool(), hard.byte(), hard.long()):
        assert_same(
            value_and_grad(loss, x, dense, mode="multiclass", **own),
            value_and_grad(loss, x, labels, **own),
        )


@pytest.mark.parametrize("places", [(), (6,), (4, 5), (2, 3, 4)])
@pytest.mark.parametrize("mode", ["multiclass", "binary", "multilabel"])
def test_layouts(mode: str, places: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(5)
    x, y = sample(mode, *(places or (1,)))
    if not places:
        x, y = x[..., 0], y[..., 0]
    options: dict[str, Any] = {"mode": mode}
    expected = references.region(references.dice(), x, y, **options)
    assert_same(dice_loss(x, y, **options), expected)
    if mode == "multiclass":
        assert_same(dice_loss(x, y.unsqueeze(1)), expected)
    if mode == "binary" and places:
        assert_same(dice_loss(x[:, 0], y[:, 0], **options), expected)
        assert_same(dice_loss(x, y[:, 0]), expected)
    order = torch.randperm(x.shape[1], generator=generator)
    if mode == "multilabel":
        assert_same(dice_loss(x[:, order], y[:, order], **options), expected)


def test_identities() -> None:
    x, y = sample("multiclass", 4, 5)
    for smooth in (0.0, 2.0):
        assert_same(
            value_and_grad(tversky_loss, x, y, alpha=0.5, beta=0.5, smooth=smooth),
            value_and_grad(dice_loss, x, y, smooth=2 * smooth),
        )
        assert_same(
            value_and_grad(tversky_loss, x, y, alpha=1, beta=1, smooth=smooth),
            value_and_grad(jaccard_loss, x, y, smooth=smooth),
        )
    assert_same(
        value_and_grad(focal_tversky_loss, x, y, gamma=1),
        value_and_grad(tversky_loss, x, y, alpha=0.3, beta=0.7),
    )
    d = dice_loss(x, y, reduction="none")
    assert_same(jaccard_loss(x, y, reduction="none"), 2 * d / (1 + d))

    assert_same(
        value_and_grad(f1_loss, x, y, smooth=1.0), value_and_grad(dice_loss, x, y, smooth=1.0)
    )
    assert_same(
        value_and_grad(f1_loss, x, y, beta=3),
        value_and_grad(tversky_loss, x, y, alpha=0.1, beta=0.9),
    )
    assert_same(log_cosh_dice_loss(x, y, reduction="none"), d.cosh().log())
    hard = torch.nn.functional.one_hot(y, 3).movedim(-1, 1) * 2e4 - 1e4
    assert_same(squared_dice_loss(-hard.double(), y), dice_loss(-hard.double(), y))


@pytest.mark.parametrize("ignore_index", [None, 255])
@pytest.mark.parametrize("mode", ["multiclass", "binary", "multilabel"])
def test_generalised_dice(mode: str, ignore_index: int | None) -> None:
    x, y = sample(mode, 4, 5, ignore_index=ignore_index)
    options: dict[str, Any] = {"mode": mode, "ignore_index": ignore_index}
    for more in ({}, {"class_weights": WEIGHTS[: x.shape[1]]}):
        options |= more
        assert_same(
            value_and_grad(generalised_dice_loss, x, y, **options),
            value_and_grad(lambda x: references.generalised_dice(x, y, **options), x),  # noqa: B023
        )
    if mode == "binary":
        assert_same(generalised_dice_loss(x, y, **options), dice_loss(x, y, **options))


def test_generalised_dice_of_absent_classes() -> None:
    """The lack of a class changes nothing, or costs what it costs the other losses."""
    x, y = sample("multiclass", 4, 5)
    y %= 2
    expected = references.generalised_dice(x, y)
    assert_same(generalised_dice_loss(x, y), expected)
    each = generalised_dice_loss(x, y, absent="penalise", reduction="none")
    assert_same(each, torch.stack((expected, expected, x.softmax(1)[:, 2].mean())))
    assert_same(generalised_dice_loss(x, y, absent="penalise"), each.mean())
    assert generalised_dice_loss(x, torch.full_like(y, 255), ignore_index=255) == 0


def test_generalised_dice_of_extreme_sizes() -> None:
    """One pixel in a million, or a class worth next to nothing: finite, and it counts."""
    x = torch.zeros(1, 2, 1000, 1000)
    y = torch.zeros(1, 1000, 1000, dtype=torch.long)
    y[0, 5, 5] = 1
    value, grad = value_and_grad(generalised_dice_loss, x, y)
    expected = references.generalised_dice(x.double(), y)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    value, grad = value_and_grad(
        generalised_dice_loss, x, y, pixel_weight=torch.full((1, 1000, 1000), 1e-25)
    )
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=0)
    assert grad.isfinite().all()
    for scale in (40.0, 1e4):
        x = (torch.stack((1 - y, y), 1) * 2 - 1) * scale
        for sign in (1, -1):
            value, grad = value_and_grad(generalised_dice_loss, sign * x, y)
            torch.testing.assert_close(value, torch.tensor(float(sign < 0)))
            assert grad.isfinite().all()


def test_equal_to_monai_generalised_dice() -> None:
    monai = pytest.importorskip("monai.losses")
    x, y = sample("multiclass", 6, 7)
    peer = monai.GeneralizedDiceLoss(
        softmax=True, to_onehot_y=True, batch=True, smooth_nr=0, smooth_dr=0
    )
    assert_same(
        value_and_grad(generalised_dice_loss, x, y),
        value_and_grad(lambda x: peer(x, y.unsqueeze(1)), x),
        rtol=1e-5,
    )


def test_squared_dice_is_equal_to_monai() -> None:
    monai = pytest.importorskip("monai.losses")
    x, y = sample("multiclass", 6, 7)
    peer = monai.DiceLoss(
        softmax=True, to_onehot_y=True, batch=True, squared_pred=True, smooth_nr=1, smooth_dr=1
    )
    torch.testing.assert_close(  # MONAI's one-hot masks are float32
        value_and_grad(squared_dice_loss, x, y, smooth=1),
        value_and_grad(lambda x: peer(x, y.unsqueeze(1)), x),
        rtol=1e-5,
        atol=1e-8,
    )


def test_squared_dice_of_a_soft_target_is_0_where_it_is_met() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    y = x.softmax(1)
    value, grad = value_and_grad(squared_dice_loss, x, y, mode="multiclass")
    torch.testing.assert_close(value, torch.zeros_like(value))
    torch.testing.assert_close(grad, torch.zeros_like(grad))
    assert dice_loss(x, y, mode="multiclass") > 0.1


def test_mcc_is_equal_to_smp() -> None:
    """Which takes probabilities, of one class."""
    x, y = sample("binary", 6, 7)
    assert_same(
        value_and_grad(mcc_loss, x, y),
        value_and_grad(lambda x: smp.MCCLoss()(x.sigmoid(), y), x),
    )


def test_mcc_by_hand() -> None:
    """tp = 3, fp = 1, fn = 2, tn = 4; a guess; a class and its complement; a class everywhere."""
    y = torch.tensor([[1, 1, 1, 0, 1, 1, 0, 0, 0, 0]])
    x = torch.tensor([[[1, 1, 1, 1, -1, -1, -1, -1, -1, -1]]]) * 40.0
    expected = 1 - (3 * 4 - 1 * 2) / math.sqrt(4 * 5 * 5 * 6)
    assert_same(mcc_loss(x, y).item(), expected, 1e-5)
    assert_same(mcc_loss(-x, 1 - y).item(), expected, 1e-5)
    assert_same(mcc_loss(-x, y).item(), 2 - expected, 1e-5)
    assert_same(mcc_loss(torch.zeros(1, 1, 10), y).item(), 1.0, 1e-5)
    assert_same(mcc_loss(x.abs(), torch.ones_like(y)).item(), 0.5, 1e-5)


def test_mcc_of_large_images() -> None:
    """Of saturated logits: what rounding leaves of a count is never below 0."""
    y = torch.zeros(1, 1024, 1024, dtype=torch.long)
    y[0, :, :3] = 1
    for scale in (5.0, 20.0, 1e4):
        for sign in (1, -1):
            x = (y.unsqueeze(1) * 2 - 1) * scale * sign
            value, grad = value_and_grad(mcc_loss, x, y)
            expected = references.region(references.mcc(), x.double(), y, mode="binary")
            torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-5)
            assert grad.isfinite().all()


@pytest.mark.parametrize("classes", [1, 2, 3, 6])
@pytest.mark.parametrize("name", [*LOSSES, "generalised_dice"])
def test_a_class_that_covers_nearly_everything_keeps_its_digits(name: str, classes: int) -> None:
    """And so does the class of the few pixels that are empty, in value and gradient."""
    places = 1 << 20
    loss, options, _ = LOSSES.get(name, (generalised_dice_loss, {}, None))
    x = torch.randn(1, classes, places, generator=torch.Generator().manual_seed(0))
    x[:, 0] += 4
    y = torch.zeros(1, places, dtype=torch.long)
    y[0, :5] = 1
    y = 1 - y if classes == 1 else y
    value, grad = value_and_grad(loss, x, y, **options)
    expected, slope = value_and_grad(loss, x.double(), y, **options)
    # sums of squares have no other form than with a difference
    torch.testing.assert_close(
        value.double(), expected, rtol=1e-3 if "squared" in name else 1e-6, atol=0
    )
    for few in (slice(5), slice(5, None)):
        error = (grad[..., few] - slope[..., few]).norm() / slope[..., few].norm()
        assert error < 1e-4


def test_mcc_of_a_volume_with_five_empty_pixels() -> None:
    """2^24 pixels, beyond which float32 does not count by ones."""
    places = 1 << 24
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, places, generator=generator).add_(2)
    y = torch.ones(1, places, dtype=torch.uint8)
    y[0, :5] = 0
    value, grad = value_and_grad(mcc_loss, x, y)
    p = x[0, 0].double().sigmoid()
    tp, fp = p[5:].sum(), p[:5].sum()
    fn, tn = places - 5 - tp, 5 - fp
    expected = 1 - (tp * tn - fp * fn) / ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)).sqrt()
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)
    few = x[..., :5].double().requires_grad_()
    fp = few.sigmoid().sum()
    tn = 5 - fp
    (1 - (tp * tn - fp * fn) / ((tp + fp) * (tp + fn) * 5 * (tn + fn)).sqrt()).backward()
    torch.testing.assert_close(grad[..., :5].double(), few.grad, rtol=1e-4, atol=0)


def test_alpha_is_of_false_positives() -> None:
    """By hand: tp = 4, fp = 12, fn = 0 (all predicted, a quarter true) and the reverse."""
    y = torch.tensor([[1] * 4 + [0] * 12])
    everything = torch.full((1, 1, 16), 40.0)
    assert_same(
        tversky_loss(everything, y, alpha=0.3, beta=0.7).item(), 1 - 4 / (4 + 0.3 * 12), 1e-6
    )
    quarter = torch.where(y == 1, 40.0, -40.0).unsqueeze(1)
    all_true = torch.ones_like(y)
    assert_same(
        tversky_loss(quarter, all_true, alpha=0.3, beta=0.7).item(), 1 - 4 / (4 + 0.7 * 12), 1e-6
    )


@pytest.mark.parametrize("name", ["dice", "jaccard", "tversky"])
@pytest.mark.parametrize("mode", ["multiclass", "binary", "multilabel"])
@pytest.mark.parametrize("smooth", [0.0, 1.0])
def test_equal_to_smp(name: str, mode: str, smooth: float) -> None:
    """Where all classes are present. SMP's Dice counts its smooth twice, MONAI's and ours once."""
    x, y = sample(mode, 6, 7)
    loss, peer, own = {
        "dice": (dice_loss, smp.DiceLoss(mode, smooth=smooth), {"smooth": 2 * smooth}),
        "jaccard": (jaccard_loss, smp.JaccardLoss(mode, smooth=smooth), {"smooth": smooth}),
        "tversky": (
            tversky_loss,
            smp.TverskyLoss(mode, smooth=smooth, alpha=0.3, beta=0.7),
            {"smooth": smooth, "alpha": 0.3, "beta": 0.7},
        ),
    }[name]
    assert_same(
        value_and_grad(loss, x, y, mode=mode, **own),
        value_and_grad(lambda x: peer(x, y), x),
        rtol=1e-6,
    )


def test_focal_tversky_of_one_class_is_equal_to_smp() -> None:
    """Of several classes SMP takes the power after the mean, the paper before."""
    x, y = sample("binary", 6, 7)
    peer = smp.TverskyLoss("binary", alpha=0.3, beta=0.7, gamma=0.75)
    assert_same(
        value_and_grad(focal_tversky_loss, x, y),
        value_and_grad(lambda x: peer(x, y), x),
        rtol=1e-6,
    )


@pytest.mark.parametrize("smooth", [1.0, 0.5])
def test_equal_to_monai(smooth: float) -> None:
    monai = pytest.importorskip("monai.losses")
    x, y = sample("multiclass", 6, 7)
    peer = monai.DiceLoss(
        softmax=True, to_onehot_y=True, batch=True, smooth_nr=smooth, smooth_dr=smooth
    )
    assert_same(
        value_and_grad(dice_loss, x, y, smooth=smooth),
        value_and_grad(lambda x: peer(x, y.unsqueeze(1)), x),
        rtol=1e-6,
    )


@pytest.mark.parametrize("name", LOSSES)
def test_absent_classes(name: str) -> None:
    """Skipped, they dilute no mean; penalised, confident false positives get a real gradient."""
    loss, own, _ = LOSSES[name]
    x = torch.full((1, 1, 8, 8), 6.0)
    y = torch.zeros(1, 8, 8, dtype=torch.long)
    value, grad = value_and_grad(loss, x, y, **own)
    assert value == 0
    assert (grad == 0).all()
    value, grad = value_and_grad(loss, x, y, absent="penalise", **own)
    p = x.sigmoid()
    torch.testing.assert_close(value, p.mean())
    torch.testing.assert_close(grad, p * (1 - p) / 64)
    present, absent = torch.randn(2, 2, 4, 4).double(), torch.full((2, 3, 4, 4), -30.0).double()
    y = (torch.arange(16).reshape(1, 4, 4) % 2).expand(2, 4, 4)
    alone = loss(present, y, **own)
    torch.testing.assert_close(loss(torch.cat((present, absent), 1), y, **own), alone)


@pytest.mark.parametrize("name", LOSSES)
def test_perfect_and_worst_predictions(name: str) -> None:
    """0 with a finite gradient, and 1, at logits of any size."""
    loss, own, _ = LOSSES[name]
    y = torch.arange(16).reshape(1, 4, 4) % 2
    for scale in (40.0, 1e4):
        x = (torch.stack((1 - y, y), 1).float() * 2 - 1) * scale
        for sign in (1, -1):
            value, grad = value_and_grad(loss, sign * x, y, **own)
            assert grad.isfinite().all()
            if "smooth" not in name:
                worst = {"mcc": 2.0, "log_cosh_dice": math.log(math.cosh(1))}.get(name, 1.0)
                torch.testing.assert_close(value, torch.tensor(worst * (sign < 0)))


@pytest.mark.parametrize("name", LOSSES)
def test_ignored_pixels(name: str) -> None:
    loss, own, _ = LOSSES[name]
    for mode in ("multiclass", "binary"):
        x, y = sample(mode, 4, 5, ignore_index=255)
        options: dict[str, Any] = {"mode": mode, "ignore_index": 255, **own}
        clean = value_and_grad(loss, x, y, **options)
        assert_same(clean[0], loss(x[..., :-1], y[..., :-1], **options))
        x[..., -1] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30])
        assert_same(value_and_grad(loss, x, y, **options), clean)
        assert (clean[1][..., -1] == 0).all()


def test_counts_of_large_images_keep_their_digits() -> None:
    """A long chain of float32 additions of 0.1 would be half a percent off."""
    places = 1 << 20
    y = (torch.arange(places) % 2).to(torch.uint8).unsqueeze(0)
    weight = torch.full((1, places), 0.1)
    batch = segmentation_batch(torch.zeros(1, 2, places), y, pixel_weight=weight)
    fp, tp, fn, true = measure(batch, ["regions"]).counts
    for found, share in ((true, 0.5), (fp, 0.25), (tp, 0.25), (fn, 0.25)):
        expected = torch.full((1, 2), 0.1 * share * places)
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=0)


def test_errors() -> None:
    x, y = torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="absent must be one of"):
        dice_loss(x, y, absent="ignore")
    with pytest.raises(ValueError, match=r"\(4,\) for 3 classes"):
        dice_loss(x, y, class_weights=[1.0] * 4)
    with pytest.raises(ValueError, match="do not fit together in mode 'multilabel'"):
        dice_loss(x, y, mode="multilabel")
    with pytest.raises(ValueError, match="pixel_weight requires grad"):
        dice_loss(x, y, pixel_weight=torch.ones(2, 4, requires_grad=True))
    with pytest.raises(ValueError, match="beta must be positive and finite: 0"):
        f1_loss(x, y, beta=0)
    with pytest.raises(ValueError, match="smooth must be positive and finite: 0"):
        mcc_loss(x, y, smooth=0)
    with pytest.raises(ValueError, match="is label 7,"):
        dice_loss(x, y + 7)


def test_class_weights_of_generalised_dice() -> None:
    """They are in its ratio, and count again only for a class that is absent and penalised."""
    x = torch.randn(2, 3, 6, 6)
    y = torch.randint(0, 2, (2, 6, 6))
    one = generalised_dice_loss(x, y, class_weights=[1, 3, 1], reduction="sum")
    each = generalised_dice_loss(x, y, class_weights=[1, 3, 1])
    torch.testing.assert_close(one, 2 * each)  # of two classes that are there
    free = generalised_dice_loss(x, y, class_weights=[1, 1, 0], absent="penalise")
    torch.testing.assert_close(free, generalised_dice_loss(x, y))


@pytest.mark.parametrize("classes", [2, 3, 5, 21])
def test_a_class_that_fills_the_images_has_no_false_positives(classes):
    for seed in range(50):
        logits = 3 * torch.randn(1, classes, 1, 3, generator=torch.Generator().manual_seed(seed))
        target = torch.full((1, 1, 3), seed % classes)
        loss = tversky_loss(logits, target, alpha=1, beta=0)
        assert loss == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gap", [60, 100, 120])
def test_a_pixel_that_is_quite_wrong_has_a_finite_gradient(dtype: torch.dtype, gap: int) -> None:
    """Its likelihood underflows, also where backward computes it again."""
    x = torch.zeros(1, 3, 4, 4, dtype=dtype)
    x[0, 1, 0, 0] = gap
    x.requires_grad_()
    loss = build_loss("ce+dice")(x, torch.zeros(1, 4, 4, dtype=torch.long))
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert first[0, 1, 0, 0].item() == pytest.approx(1 / 16)
    torch.testing.assert_close(first, second, rtol=1e-6, atol=0)


def test_a_backward_pass_under_autocast_keeps_the_digits() -> None:
    x = torch.randn(2, 4, 32, 32, requires_grad=True)
    y, loss = torch.randint(4, (2, 32, 32)), build_loss("dice+jaccard")
    (expected,) = torch.autograd.grad(loss(x, y), x)
    with torch.autocast("cpu", torch.bfloat16):
        (got,) = torch.autograd.grad(loss(x, y), x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-9)
