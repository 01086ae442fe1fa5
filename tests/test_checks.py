"""What losses refuse, what they accept, and what they say: one table for all of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from detseg_losses import LOSSES, Loss, boundary_loss, build_loss, signed_distance
from test_contract import CASES, DENSE, SEGMENTATION, make, sample, value_and_grad

NUMBERS = [
    (name, option)
    for name, cls in LOSSES.items()
    for option, value in cls.defaults.items()
    if isinstance(value, (int, float)) and not isinstance(value, bool)
]
FLAGS = [
    (name, option)
    for name, cls in LOSSES.items()
    for option, value in cls.defaults.items()
    if isinstance(value, bool)
]
WEIGHTS = [
    (name, option)
    for name, cls in LOSSES.items()
    for option in ("class_weights", "pos_weight", "alpha")
    if option in cls.defaults and (option != "alpha" or "focal" in name)
    if (name, option) not in [("focal_tversky", "alpha"), ("varifocal", "alpha")]
]
SIGMOIDS = [name for name in SEGMENTATION if "classification" in LOSSES[name].kinds]


def refused(name: str, error: type[Exception], match: str, **options: Any) -> None:
    """By the module when it is made, and by the function when it is called."""
    with pytest.raises(error, match=match):
        LOSSES[name](**options)
    kind = LOSSES[name].kinds[-1]
    x, y = sample(kind)
    given = {"mode": "multiclass"} if name in SIGMOIDS else {}
    with pytest.raises(error, match=match):
        LOSSES[name].function(x, y, **given | options)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -7.0, "1", True, 2 + 1j])
@pytest.mark.parametrize(("name", "option"), NUMBERS)
def test_numbers_that_make_nonsense(name: str, option: str, value: Any) -> None:
    refused(name, ValueError, f"^{option} must", **{option: value})


@pytest.mark.parametrize("value", [1, None, "yes"])
@pytest.mark.parametrize(("name", "option"), FLAGS)
def test_flags(name: str, option: str, value: Any) -> None:
    refused(name, TypeError, f"'{option}' .*is True or False", **{option: value})


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, None, "2"])
@pytest.mark.parametrize("many", [list, tuple, torch.tensor, np.array])
@pytest.mark.parametrize(("name", "option"), WEIGHTS)
def test_weights_of_classes(name: str, option: str, many: Any, value: Any) -> None:
    if many in (torch.tensor, np.array) and not isinstance(value, float):
        pytest.skip("it holds numbers alone")
    refused(name, ValueError, f"{option} must .* for class 1", **{option: many([1.0, value, 0.5])})


@pytest.mark.parametrize(("name", "option"), WEIGHTS)
def test_weights_of_classes_that_are_right(name: str, option: str) -> None:
    x, y = sample("segmentation")
    weights = [0.5, 1.0, 0.0]
    expected = make(name, "segmentation", **{option: weights})(x, y)
    for given in (tuple(weights), torch.tensor(weights), np.array(weights, dtype=np.float32)):
        assert torch.equal(make(name, "segmentation", **{option: given})(x, y), expected)


@pytest.mark.parametrize("value", [[], 0.5, "1", torch.tensor(1.0), [[1.0, 1.0, 1.0]]])
@pytest.mark.parametrize("name", SEGMENTATION)
def test_class_weights_are_one_for_each_class(name: str, value: Any) -> None:
    refused(name, ValueError, "class_weights must", class_weights=value)


@pytest.mark.parametrize("value", [True, "a"])
@pytest.mark.parametrize(("name", "option"), WEIGHTS)
def test_weights_that_are_no_numbers(name: str, option: str, value: Any) -> None:
    words = (
        "be in .0, 1." if option == "alpha" and "softmax" not in name else "be (a )?finite number"
    )
    refused(name, ValueError, f"^{option} must {words}.*: {value!r}$", **{option: value})


@pytest.mark.parametrize(("name", "option"), WEIGHTS)
def test_weights_of_another_number_of_classes_name_the_option(name: str, option: str) -> None:
    x, y = sample("segmentation")
    loss = make(name, "segmentation", **{option: [1.0, 0.5]})
    with pytest.raises(ValueError, match=rf"^{option} has the shape \(2,\) for 3 classes"):
        loss(x, y)


def test_weights_by_inverse_frequency_name_the_absent_class() -> None:
    """And what to take instead."""
    counts = torch.tensor([4, 0, 2])
    refused("ce", ValueError, "inf for class 1; class_balanced_weights", class_weights=1 / counts)


@pytest.mark.parametrize("value", [1.5, 255.0, "255", [0, 255], True])
@pytest.mark.parametrize("name", SEGMENTATION)
def test_ignore_index_is_a_whole_number(name: str, value: Any) -> None:
    refused(name, ValueError, "ignore_index must be a whole number or None", ignore_index=value)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("focal", {"alpha": None}),
        ("focal", {"alpha": -1}),
        ("focal", {"alpha": np.float32(0.5), "gamma": np.int64(2)}),
        ("poly_focal", {"epsilon": -1}),
        ("ohem", {"thresh": None}),
        ("mpdiou", {"diagonal": None}),
        ("wiou", {"mean": torch.tensor(1.0)}),
        ("smooth_l1", {"beta": 0}),
        ("ce", {"ignore_index": np.int64(255)}),
        ("boundary", {"spacing": [2, 1.5]}),
    ],
)
def test_options_at_the_edge(name: str, options: dict[str, Any]) -> None:
    kind = LOSSES[name].kinds[-1]
    assert make(name, kind, **options)(*sample(kind)).isfinite()


@pytest.mark.parametrize("name", SEGMENTATION)
@pytest.mark.parametrize("shape", [(2, 5, 4), (4, 10), (40,), (4, 5), (2, 3, 4, 5), (1, 4, 5)])
def test_pixel_weights_of_another_shape(name: str, shape: tuple[int, ...]) -> None:
    """Even where their number is right: they would be applied scrambled."""
    x, y = sample("segmentation")
    with pytest.raises(ValueError, match=r"pixel_weight .* does not fit .* \(2, 4, 5\)"):
        make(name, "segmentation")(x, y, pixel_weight=torch.ones(shape))


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.5])
@pytest.mark.parametrize(("name", "kind"), DENSE)
def test_weights_of_places(name: str, kind: str, value: float) -> None:
    x, y = sample(kind)
    weight = torch.ones(y.shape)
    weight[1, 2] = value
    option = "weight" if kind == "classification" else "pixel_weight"
    with pytest.raises(ValueError, match=rf"weight\[1, 2.*\] is {value}; it must be finite"):
        make(name, kind)(x, y, **{option: weight})


@pytest.mark.parametrize("mode", ["multiclass", "multilabel"])
@pytest.mark.parametrize("name", [name for name in SIGMOIDS if name != "ghm"])
def test_weights_of_the_entries_of_masks(name: str, mode: Any) -> None:
    x, y = sample("segmentation")
    y = torch.nn.functional.one_hot(y, 3).movedim(-1, 1) if mode == "multilabel" else y
    weight = torch.rand(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    weight[0, 1, 2] = 0
    loss = LOSSES[name](mode=mode)
    each = LOSSES[name](mode=mode, reduction="none")(x, y)
    torch.testing.assert_close(loss(x, y, weight=weight), (each * weight).sum() / weight.sum())
    with pytest.raises(ValueError, match=r"weight \(2, 2, 4, 5\) .* one an entry \(2, 3, 4, 5\)"):
        loss(x, y, weight=weight[:, :2])
    for other in (loss, LOSSES[name]()):  # which reads the same as a head
        with pytest.raises(ValueError, match=r"weight and pixel_weight .* pass one of them"):
            other(x, y, weight=weight, pixel_weight=weight[:, 0])


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_what_is_not_a_tensor(name: str, kind: str) -> None:
    x, y = sample(kind)
    loss = make(name, kind)
    for given, message in [
        ({"out": x, "aux": x}, r"must be a tensor, not a dict .*output\['out'\]"),
        ({"logits": x}, r"output\['logits'\]"),
        ([x, x], r"not a list of 2; pass one of them, such as output\[0\]"),
        ((x,), r"not a tuple of 1; .*output\[0\]"),
        (x.detach().numpy(), r"numpy.ndarray|ndarray; convert it with torch.from_numpy"),
        (x.tolist(), r"convert it with torch.tensor"),
        (None, "missing"),
    ]:
        with pytest.raises(TypeError, match=message):
            loss(given, y)
    for given, message in [(y.numpy(), r"torch.from_numpy\("), (None, "missing")]:
        with pytest.raises(TypeError, match=message):
            loss(x, given)


@pytest.mark.parametrize(
    ("dtype", "remedy"),
    [(torch.complex64, "real or .*abs"), (torch.float8_e4m3fn, "float"), (torch.quint8, "deq")],
)
@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.filterwarnings("ignore:.*quantized tensor")
def test_what_is_not_of_real_numbers(name: str, kind: str, dtype: torch.dtype, remedy: str) -> None:
    x, y = sample(kind)
    loss = make(name, kind)

    def cast(values: Tensor) -> Tensor:
        if dtype == torch.quint8:
            return torch.quantize_per_tensor(values.detach().float(), 1.0, 0, dtype)
        return values.to(dtype)

    message = rf"must hold real numbers, and its dtype is {str(dtype)[6:]}; pass \w+\.{remedy}"
    for given in ((cast(x), y), (x, cast(y))):
        with pytest.raises(TypeError, match=message):
            loss(*given)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.float32, torch.float16])
@pytest.mark.parametrize(("name", "kind"), DENSE)
def test_dtypes_of_class_indices(name: str, kind: str, dtype: torch.dtype) -> None:
    """Whole numbers in any dtype, as readers of images and other libraries give them."""
    x, y = sample(kind)
    y = y.clamp(min=0)
    y[0, 1] = 255
    loss = make(name, kind, ignore_index=255)
    expected = value_and_grad(loss, x, y)
    torch.testing.assert_close(value_and_grad(loss, x, y.to(dtype)), expected)
    if kind == "segmentation":
        torch.testing.assert_close(value_and_grad(loss, x, y.to(dtype).unsqueeze(1)), expected)


@pytest.mark.parametrize("value", [0.5, math.nan])
@pytest.mark.parametrize(("name", "kind"), DENSE)
def test_fractions_are_no_class_indices(name: str, kind: str, value: float) -> None:
    x, y = sample(kind)
    y = y.clamp(min=0).double()
    y[1, 2] = value
    with pytest.raises(ValueError, match=rf"target\[1, 2.*\] is {value}: class indices are whole"):
        make(name, kind)(x, y)


def test_targets_of_a_head_of_one_class_are_not_taken_for_indices() -> None:
    """Of 0 and 1 as floating point numbers, 0 would be the class itself."""
    with pytest.raises(ValueError, match=r"may be values or class indices: .*unsqueeze"):
        make("bce", "classification")(torch.zeros(7, 1), torch.zeros(7))


SOFT = [case for case in DENSE if case[0] not in ("softmax_focal", "poly", "symmetric_ce")]


@pytest.mark.parametrize(("name", "kind"), SOFT)
def test_soft_targets_that_miss_the_range_by_rounding(name: str, kind: str) -> None:
    x, _ = sample(kind, dtype=torch.float32)
    y = torch.rand(x.shape, generator=torch.Generator().manual_seed(3))
    y.view(-1)[:2] = torch.tensor([0.0, 1.0])
    loss = LOSSES[name](**({"mode": "multiclass"} if kind == "segmentation" else {}))
    expected = value_and_grad(loss, x, y)
    missed = y.clone()
    missed.view(-1)[:2] = torch.tensor([-1e-7, 1.0000001])
    torch.testing.assert_close(value_and_grad(loss, x, missed), expected, rtol=0, atol=0)
    for value in (1.01, -0.01):
        missed.view(-1)[1] = value
        with pytest.raises(ValueError, match=f"is {value}, but .* from 0 to 1; clamp it"):
            loss(x, missed)


def mask(*values: int) -> Tensor:
    return torch.tensor(values * 4).reshape(1, 2, -1)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
@pytest.mark.parametrize(
    ("classes", "target", "message"),
    [
        (2, mask(0, 255), "label 255, but there are 2 classes, 0 to 1; .*divided by 255"),
        (1, mask(0, 255), "is 255.*divided by 255"),
        (1, mask(0, 1, 128, 255), "divided by 255"),
        (3, mask(0, 255), "divided by 255; if 255 marks pixels that are to be ignored"),
        (3, mask(0, 1, 255), "label 255, .*; if 255 marks pixels .* pass ignore_index=255"),
        (1, mask(0, 1, 255), "; if 255 marks pixels .* pass ignore_index=255"),
        (2, mask(0, 1, 2), "label 2, but there are 2 classes, 0 to 1; labels count from 0"),
        (3, mask(0, 200), "label 200, but there are 3 classes, 0 to 2; relabel it"),
        (1, mask(0, 1, 2), "is 2.*one of several classes, each needs a channel"),
    ],
)
def test_advice_on_labels(classes: int, target: Tensor, message: str, dtype: torch.dtype) -> None:
    """It never drops the foreground: what may be that is not to be ignored."""
    x = torch.zeros(1, classes, *target.shape[1:])
    with pytest.raises(ValueError, match=message) as caught:
        build_loss("dice")(x, target.to(dtype))
    if "if 255" not in message:
        assert "ignore_index" not in str(caught.value)
    assert str(caught.value).startswith("target[0, 0")


def test_a_negative_label_and_the_one_that_is_ignored() -> None:
    with pytest.raises(ValueError, match=r"label -1, .*\(and 255, which is ignored\); if -1 marks"):
        build_loss("ce", ignore_index=255)(torch.zeros(1, 2, 2, 3), mask(0, -1, 255)[..., :3])


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_a_negative_label_of_a_binary_mask(dtype: torch.dtype) -> None:
    x, y = torch.zeros(1, 1, 2, 3), mask(0, 1, -1)[:, :, :3].to(dtype)
    with pytest.raises(ValueError, match=r"; if -1 marks .* pass ignore_index=-1; else relabel it"):
        build_loss("dice")(x, y)
    assert build_loss("dice", ignore_index=-1)(x, y).isfinite()


def test_targets_of_nan_are_not_to_be_clamped() -> None:
    y = torch.tensor([[[0.0, math.nan, 1.0]]])
    with pytest.raises(ValueError, match=r"target\[0, 0, 1\] is nan, .* the target holds NaN: "):
        build_loss("dice")(torch.zeros(1, 1, 1, 3), y)


def test_a_ramp_is_checked_at_both_ends() -> None:
    for ramp in ("ramp(-1, 1, steps=9)", "ramp(1, -1, steps=9)"):
        with pytest.raises(ValueError, match="smooth must be a finite number from 0 up"):
            build_loss(f"dice(smooth={ramp})")


def test_a_loss_of_ones_own_checks_for_itself() -> None:
    class Own(Loss):
        name = "own"
        function = staticmethod(lambda x, y, *, alpha=-1.0, reduction="mean": x.sum() * alpha)

    assert Own(alpha=-3.0)(torch.ones(2), None) == -6


@pytest.mark.parametrize("value", [-1.0, 0.0, math.nan, [1.0, 0.0], [1.0, 2.0, 3.0], "1"])
def test_spacings(value: Any) -> None:
    x, y = torch.zeros(1, 2, 3, 4), torch.zeros(1, 3, 4).long()
    for call in (
        lambda: signed_distance(y, 2, spacing=value),
        lambda: boundary_loss(x, y, spacing=value),
    ):
        with pytest.raises(ValueError, match="spacing"):
            call()


@pytest.mark.parametrize("name", ["boundary", "cldice", "dice", "lovasz"])
def test_an_unknown_option_is_refused(name: str) -> None:
    logits, target = torch.randn(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long)
    with pytest.raises(TypeError, match="ignore_indx"):
        LOSSES[name].function(logits, target, ignore_indx=0)


@pytest.mark.parametrize("option", ["smooth", "ignore_index"])
@pytest.mark.parametrize("value", [10**400, -(10**400)])
def test_integers_that_no_number_of_torch_holds(option: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{option} must be"):
        build_loss("dice", **{option: value})


def test_distances_that_are_no_tensor() -> None:
    logits, target = torch.randn(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long)
    with pytest.raises(TypeError, match="distance must be a tensor, not a str"):
        boundary_loss(logits, target, distance="near")  # type: ignore[arg-type]
