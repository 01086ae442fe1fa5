"""The IoU family."""

from __future__ import annotations

import itertools
import math
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torchvision
from torch import Tensor

import references
from detseg_losses import (
    LOSSES,
    alpha_iou_loss,
    complete_box_iou_loss,
    eiou_loss,
    focal_eiou_loss,
    iou_loss,
    mpdiou_loss,
    nwd_loss,
    siou_loss,
    wiou_loss,
)
from detseg_losses._engine import boxes as box_kernel
from detseg_losses.losses import boxes
from references import value_and_grad

FAMILY: dict[str, Any] = {n: cls.function for n, cls in LOSSES.items() if cls.kinds == ("boxes",)}
SCALE_FREE = {name: loss for name, loss in FAMILY.items() if name != "nwd"}
BOUNDS = {
    "iou": 1,
    "giou": 2,
    "diou": 2,
    "ciou": 3,
    "eiou": 4,
    "focal_eiou": 4,
    "siou": 3,
    "mpdiou": 3,
    "wiou": math.e,
    "alpha_iou": 1,
    "nwd": 1,
}
PEERS: dict[str, Any] = {
    "giou": torchvision.ops.generalized_box_iou_loss,
    "diou": torchvision.ops.distance_box_iou_loss,
    "ciou": torchvision.ops.complete_box_iou_loss,
}


def sample(count: int = 40) -> tuple[Tensor, Tensor]:
    """Overlapping, nested and disjoint boxes."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(2, count, 4, dtype=torch.float64, generator=generator) * 10
    a, b = torch.cat((corners[..., :2], corners[..., :2] + corners[..., 2:] + 0.1), -1)
    return a, b


def assert_same(actual: Any, expected: Any, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-12)


def cost(loss: Any, a: list[float], b: list[float], **options: Any) -> float:
    return loss(torch.tensor(a), torch.tensor(b), **options).item()


@pytest.mark.parametrize("name", FAMILY)
def test_formula(name: str) -> None:
    a, b = sample()
    assert_same(
        value_and_grad(FAMILY[name], a, b),
        value_and_grad(lambda a: references.boxes(name, a, b), a),
    )
    assert_same(
        value_and_grad(lambda b: FAMILY[name](a, b), b),
        value_and_grad(lambda b: references.boxes(name, a, b), b),
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("focal_eiou", {"gamma": 2.0}),
        ("siou", {"theta": 2.0}),
        ("mpdiou", {"diagonal": 30.0}),
        ("wiou", {"mean": 0.4}),
        ("wiou", {"mean": 0.8, "alpha": 1.5, "delta": 2.0}),
        ("alpha_iou", {"alpha": 2.5}),
        ("nwd", {"constant": 3.0}),
    ],
)
def test_formula_with_options(name: str, options: dict[str, float]) -> None:
    a, b = sample()
    assert_same(
        value_and_grad(lambda a: FAMILY[name](a, b, **options), a),
        value_and_grad(lambda a: references.boxes(name, a, b, **options), a),
    )


@pytest.mark.parametrize(
    ("special", "general"),
    [
        (eiou_loss, lambda a, b: focal_eiou_loss(a, b, gamma=0)),
        (iou_loss, lambda a, b: alpha_iou_loss(a, b, alpha=1)),
        (lambda a, b: iou_loss(a, b, mode="square"), lambda a, b: alpha_iou_loss(a, b, alpha=2)),
        (iou_loss, lambda a, b: mpdiou_loss(a, b, diagonal=1e30)),
        # the factor of version 3 is 1 where beta is delta
        (wiou_loss, lambda a, b: wiou_loss(a, b, mean=iou_loss(a, b).detach(), delta=1.0)),
    ],
)
def test_identities(special: Any, general: Any) -> None:
    a, b = sample()
    expected, slope = value_and_grad(special, a, b)
    value, grad = value_and_grad(general, a, b)
    assert_same(value, expected)
    assert_same(grad, slope)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("name", PEERS)
def test_equal_to_torchvision(name: str, reduction: str) -> None:
    """Called in torchvision's order of arguments; without its eps as near as that eps allows."""
    a, b = sample()
    expected = value_and_grad(PEERS[name], a, b, reduction, 1e-7)
    assert_same(value_and_grad(FAMILY[name], a, b, reduction, 1e-7), expected)
    assert_same(value_and_grad(FAMILY[name], a, b, reduction), expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "a", "b", "expected"),
    [
        ("giou", [0, 0, 1, 1], [1, 1, 2, 2], 1.5),  # two diagonally adjacent boxes
        ("iou", [0, 0, 1, 1], [1, 1, 2, 2], 1.0),
        ("diou", [0, 0, 1, 1], [1, 1, 2, 2], 1.25),  # centres sqrt 2, diagonal sqrt 8 apart
        ("ciou", [0, 0, 1, 1], [1, 1, 2, 2], 1.25),  # of one shape
        ("iou", [0, 0, 2, 2], [1, 0, 3, 2], 1 - 1 / 3),
        ("giou", [0, 0, 2, 2], [1, 0, 3, 2], 1 - 1 / 3),  # nothing but both in the hull
        ("diou", [0, 0, 2, 2], [1, 0, 3, 2], 1 - 1 / 3 + 1 / 13),
        ("giou", [0, 0, 1, 1], [3, 0, 4, 1], 1.5),
        ("diou", [0, 0, 1, 1], [3, 0, 4, 1], 1 + 9 / 17),
        ("eiou", [0, 0, 1, 1], [3, 0, 4, 1], 1 + 9 / 17),  # of one size
        ("eiou", [0, 0, 2, 2], [0, 0, 4, 2], 0.5 + 1 / 20 + 1 / 4),
        ("focal_eiou", [0, 0, 2, 2], [0, 0, 4, 2], 0.8 / 2**0.5),
        ("focal_eiou", [0, 0, 1, 1], [3, 0, 4, 1], 0.0),
        ("siou", [0, 0, 1, 1], [3, 0, 4, 1], 1 + (1 - math.exp(-2 * 9 / 16)) / 2),  # on one axis
        ("siou", [0, 0, 1, 1], [1, 1, 2, 2], 2 - math.exp(-1 / 4)),  # on the diagonal
        ("siou", [0, 0, 4, 4], [1, 1, 3, 3], 0.75 + (1 - math.exp(-0.5)) ** 4),  # concentric
        ("mpdiou", [0, 0, 4, 4], [1, 1, 3, 3], 0.75 + 4 / 32),
        ("mpdiou", [0, 0, 1, 1], [3, 0, 4, 1], 1 + 18 / 17),
        ("wiou", [0, 0, 1, 1], [3, 0, 4, 1], math.exp(9 / 17)),
        ("wiou", [0, 0, 4, 4], [1, 1, 3, 3], 0.75),
        ("alpha_iou", [0, 0, 2, 2], [0, 0, 4, 2], 1 - 1 / 8),
        ("nwd", [0, 0, 2, 2], [3, 4, 5, 6], 1 - math.exp(-5 / 12.8)),
        ("nwd", [0, 0, 8, 8], [1, 4, 7, 4], 1 - math.exp(-((1 + 16) ** 0.5) / 12.8)),
    ],
)
def test_by_hand(name: str, a: list[float], b: list[float], expected: float) -> None:
    assert cost(FAMILY[name], a, b) == pytest.approx(expected, rel=1e-6)


def test_modes_of_iou() -> None:
    a, b = [0.0, 0, 2, 2], [1.0, 0, 3, 2]
    assert cost(iou_loss, a, b, mode="log") == pytest.approx(1.0986123, rel=1e-6)
    assert cost(iou_loss, a, b, mode="square") == pytest.approx(1 - 1 / 9, rel=1e-6)
    far = [9.0, 9, 10, 10]
    assert cost(iou_loss, a, far, mode="log") == pytest.approx(13.8155, rel=1e-4)  # -log 1e-6
    assert cost(iou_loss, a, far, mode="square") == 1
    assert cost(iou_loss, a, a, mode="log") == 0
    with pytest.raises(ValueError, match="mode must be one of"):
        cost(iou_loss, a, b, mode="cubic")


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("side", [2.0**-20, 2.0**-10, 1.0, 2.0**13])
@pytest.mark.parametrize("corner", [0.0, 1.0, -0.5])
def test_identical_boxes_cost_nothing(name: str, side: float, corner: float) -> None:
    """Sides from 1e-6 to 1e4; with an absolute eps small boxes cost up to 1."""
    box = torch.tensor([corner, corner, corner + side, corner + side])
    assert box[2] - box[0] == side, "the corners must be exactly representable"
    value, grad = value_and_grad(FAMILY[name], box, box.clone())
    assert abs(value) <= 1e-6
    assert grad.isfinite().all()


@pytest.mark.parametrize("name", SCALE_FREE)
@pytest.mark.parametrize("scale", [2.0**-40, 1e-6, 1e6, 2.0**20])
def test_free_of_scale(name: str, scale: float) -> None:
    a, b = sample()
    a = torch.cat((a, torch.tensor([[0.0, 0, 3, 0], [1, 1, 1, 1], [0, 0, 3, 0]]).double()))
    b = torch.cat((b, torch.tensor([[0.0, 0, 3, 3], [1, 1, 1, 1], [0, 0, 3, 0]]).double()))
    assert_same(FAMILY[name](a * scale, b * scale), FAMILY[name](a, b))


def test_nwd_and_its_constant_have_one_unit() -> None:
    a, b = sample()
    for scale in (1e-6, 1e6):
        got = nwd_loss(a * scale, b * scale, constant=12.8 * scale)
        assert_same(got, nwd_loss(a, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FAMILY)
def test_sizes_without_a_reciprocal(name: str, dtype: torch.dtype) -> None:
    """The smallest numbers as sides, offsets and both."""
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    boxes = [[0, 0, 0, 0], [0, least, 0, least], [0, 0, least, 1], [least, 0, least, 1e-9]]
    pairs = torch.tensor(list(itertools.product(boxes, repeat=2)), dtype=dtype)
    value, grad = value_and_grad(FAMILY[name], pairs[:, 0], pairs[:, 1])
    assert value.isfinite().all()
    assert grad.isfinite().all()


DEGENERATE = [
    [0.0, 0, 10, 0],
    [0.0, 0, 0, 10],
    [0.0, 0, 0, 0],
    [5.0, 5, 5, 5],
    [0.0, 0, 10, 10],
    [20.0, 0, 30, 0],
    [0.0, 0, 1e-6, 1e4],
    [0.0, 0, 1e4, 1e-6],
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FAMILY)
def test_finite_for_every_box(name: str, dtype: torch.dtype) -> None:
    """Lines and points included; torchvision's CIoU has NaN gradients there."""
    pairs = torch.tensor(list(itertools.product(DEGENERATE, repeat=2)), dtype=dtype)
    a, b = pairs[:, 0], pairs[:, 1]
    value, grad = value_and_grad(FAMILY[name], a, b)
    assert value.isfinite().all()
    assert grad.isfinite().all()
    same = (a == b).all(-1)
    assert (value[same].abs() <= 1e-6).all()
    if name != "focal_eiou":  # which forgets disjoint boxes
        assert (value[~same] > 0).all()


sides = st.one_of(st.just(0.0), st.floats(2**-20, 1e4, width=32))
corners = st.floats(-1e4, 1e4, width=32)


@pytest.mark.parametrize("name", FAMILY)
@hypothesis.given(st.lists(st.tuples(corners, corners, sides, sides), min_size=2, max_size=2))
@hypothesis.settings(deadline=None, derandomize=True, max_examples=60)
def test_any_two_boxes(name: str, boxes: list[tuple[float, ...]]) -> None:
    """Finite, within bounds, symmetric, as in float64."""
    xywh = torch.tensor(boxes)
    a, b = torch.cat((xywh[:, :2], xywh[:, :2] + xywh[:, 2:]), -1)
    value, grad = value_and_grad(FAMILY[name], a, b)
    assert grad.isfinite().all()
    assert -1e-6 <= value <= BOUNDS[name] + 1e-5
    torch.testing.assert_close(value, FAMILY[name](b, a))
    wide = FAMILY[name](a.double(), b.double()).float()
    torch.testing.assert_close(value, wide, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize(
    "inverted",
    [
        [10.0, 10, 0, 0],
        [10.0, 0, 0, 10],
        [0.0, 10, 10, 0],
        [100.0, 0, 50, 10],
        [9e5, 9e5, -1e6, 1e-30 - 1e6],  # around its target
    ],
)
def test_inverted_predictions(name: str, inverted: list[float]) -> None:
    """They cost at least as much as a miss; torchvision's GIoU of the first is 0."""
    value, grad = value_and_grad(
        FAMILY[name], torch.tensor([inverted]), torch.tensor([[0.0, 0, 10, 10]])
    )
    if name == "focal_eiou":
        assert value == 0
    elif name == "nwd":  # far, and pulled into order
        assert value > 0.5
    else:
        assert value >= 1
    assert value <= BOUNDS[name]
    assert grad.isfinite().all()


def test_nwd_puts_an_inverted_box_in_order() -> None:
    _, grad = value_and_grad(
        nwd_loss, torch.tensor([[10.0, 10, 0, 0]]), torch.tensor([[0.0, 0, 10, 10]])
    )
    assert (grad[0, :2] > 0).all()
    assert (grad[0, 2:] < 0).all()


@pytest.mark.parametrize("name", ["giou", "diou", "ciou", "eiou", "siou", "mpdiou", "wiou", "nwd"])
def test_a_step_against_the_gradient_brings_disjoint_boxes_nearer(name: str) -> None:
    a, b = torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[5.0, 3, 9, 6]])
    _, grad = value_and_grad(FAMILY[name], a, b)
    step = -grad / grad.norm()
    if name == "wiou":  # which has no slope of the IoU there, but one of the distance
        assert (step[0, :2] > 0).all()
    assert (step[0, 0] + step[0, 2] > 0) & (step[0, 1] + step[0, 3] > 0)
    assert nwd_loss(a + 0.1 * step, b) < nwd_loss(a, b)


def test_siou_of_concentric_boxes_has_a_finite_gradient() -> None:
    """Their angle is none; so is that of centres too near for their distance to be squared."""
    outer = torch.tensor([-1.0, -1, 1, 1]).repeat(3, 1)
    inner = torch.tensor([[-0.5], [1e-19], [1e-25]]) * torch.tensor([1.0, 1, -1, -1])
    inner[1:, 2:] *= -1
    value, grad = value_and_grad(siou_loss, inner, outer)
    assert value.isfinite().all()
    assert grad.isfinite().all()


def test_wiou_looks_most_at_ordinary_boxes() -> None:
    """Weighed by version 3: right ones and outliers less than those in between."""
    target = torch.tensor([0.0, 0, 10, 10]).repeat(3, 1)
    boxes = target + torch.tensor([[0.1], [2.0], [30.0]])
    factor = wiou_loss(boxes, target, mean=0.2) / wiou_loss(boxes, target)
    assert factor[1] > factor[0]
    assert factor[1] > factor[2]
    # a tensor of one number does as well, and a mean near 0 makes outliers of all
    assert_same(
        wiou_loss(boxes, target, mean=torch.tensor(0.2)), wiou_loss(boxes, target, mean=0.2)
    )
    value, grad = value_and_grad(lambda boxes: wiou_loss(boxes, target, mean=1e-6), boxes)
    assert value.isfinite().all()
    assert grad.isfinite().all()


def test_alpha_below_1_is_finite_too() -> None:
    a = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]])
    b = torch.tensor([[1.0, 1, 2, 2], [0, 0, 1, 1], [0.5, 0, 1, 1]])
    value, grad = value_and_grad(lambda a: alpha_iou_loss(a, b, alpha=0.5), a)
    torch.testing.assert_close(value, torch.tensor([1, 0, 1 - 0.5**0.5]))
    assert grad.isfinite().all()
    value, grad = value_and_grad(lambda a: siou_loss(a, b, theta=0.5), a)
    assert grad.isfinite().all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("focal_eiou", {"gamma": -1}, "gamma must be a finite number from 0 up: -1"),
        ("siou", {"theta": 0}, "theta must be positive and finite: 0"),
        ("mpdiou", {"diagonal": -5.0}, "diagonal must be positive and finite: -5"),
        ("wiou", {"mean": 0.0}, "mean must be positive and finite: 0"),
        ("wiou", {"alpha": 0.0}, "alpha must be positive"),
        ("wiou", {"delta": -1.0}, "delta must be positive"),
        ("alpha_iou", {"alpha": math.nan}, "alpha must be positive and finite: nan"),
        ("nwd", {"constant": math.inf}, "constant must be positive and finite: inf"),
        ("eiou", {"reduction": "avg"}, "reduction must be one of"),
    ],
)
def test_bad_options_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FAMILY[name](*sample(2), **options)


@pytest.mark.parametrize("name", FAMILY)
def test_validate_names_the_row(name: str) -> None:
    good, bad = torch.tensor([[0.0, 0, 1, 1]] * 3), torch.tensor([[0.0, 0, 1, 1]] * 3)
    bad[1, 2] = -1
    FAMILY[name](good, good, validate=True)
    with pytest.raises(ValueError, match=r"boxes1\[1\] = \[0.0, 0.0, -1.0, 1.0\] is inverted"):
        FAMILY[name](bad, good, validate=True)
    with pytest.raises(ValueError, match=r"boxes2\[0, 1\]"):
        FAMILY[name](good[None], bad[None], validate=True)
    bad[1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"boxes2\[1\].*finite"):
        FAMILY[name](good, bad, validate=True)


@pytest.mark.parametrize("name", FAMILY)
def test_shapes_and_dtypes(name: str) -> None:
    loss = FAMILY[name]
    a, b = sample(12)
    each = loss(a, b)
    assert loss(a.reshape(3, 4, 4), b.reshape(3, 4, 4)).shape == (3, 4)
    assert_same(loss(a[0], b[0]), each[0])
    assert_same(loss(a, b, reduction="mean"), each.mean())
    assert_same(loss(a, b, reduction="sum"), each.sum())
    for dtype in (torch.float16, torch.bfloat16):
        low, high = a.to(dtype), b.to(dtype)
        value, grad = value_and_grad(loss, low, high)
        assert (value.dtype, grad.dtype) == (torch.float32, dtype)
        torch.testing.assert_close(value, loss(low.float(), high.float()))
    whole = (a * 10).long()
    torch.testing.assert_close(loss(whole, (b * 10).long()), loss(whole.float(), (b * 10).long()))
    empty = torch.zeros(0, 4, requires_grad=True)
    assert loss(empty, empty.detach()).shape == (0,)
    nothing = loss(empty, empty.detach(), reduction="mean")
    nothing.backward()
    assert nothing == 0
    with pytest.raises(ValueError, match=r"one shape \(\*, 4\)"):
        loss(a, b[:3])
    with pytest.raises(ValueError, match=r"one shape \(\*, 4\)"):
        loss(a[:, :3], b[:, :3])


def test_ciou_is_0_with_a_finite_gradient_at_a_perfect_prediction() -> None:
    a, _ = sample()
    for box in (a, a.float()):
        value, grad = value_and_grad(complete_box_iou_loss, box, box.clone())
        assert (value.abs() <= 1e-6).all()
        assert grad.isfinite().all()
    # and a step against the gradient of the wrong shape goes towards the right one
    wide, square = torch.tensor([[0.0, 0, 4, 2]]), torch.tensor([[1.0, 0, 3, 2]])
    _, grad = value_and_grad(complete_box_iou_loss, wide, square)
    assert grad[0, 2] > 0 > grad[0, 0]


@pytest.mark.parametrize("side", [1e-30, 1e-23, 1e-20, 1e19, 1e30])
@pytest.mark.parametrize("loss", SCALE_FREE.values(), ids=SCALE_FREE)
def test_boxes_of_any_size_are_one_loss(loss: Any, side: float) -> None:
    unit = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]])
    other = torch.tensor([[0.5, 0.25, 1, 1], [0, 0, 0, 1], [0, 0, 1, 1]])
    boxes = (unit * side).requires_grad_()
    values = loss(boxes, other * side)
    torch.testing.assert_close(values, loss(unit, other))
    values.sum().backward()
    assert boxes.grad.isfinite().all()


KERNELS: list[Any] = ["iou", "giou", "diou", "ciou"]
Found = tuple[Tensor, Tensor, Tensor]


def pairs(count: int = 3000) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs of boxes ``(count, 4)`` of every kind."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=generator)

    def valid() -> Tensor:
        corner = random(count, 2) * 10
        return torch.cat((corner, corner + random(count, 2) * 8 + 0.1), 1)

    def whole(limit: int) -> Tensor:
        return torch.randint(0, limit, (count, 4), generator=generator).double()

    def in_order(boxes: Tensor) -> Tensor:
        first, last = boxes.split(2, 1)
        return torch.cat((torch.minimum(first, last), torch.maximum(first, last)), 1)

    one = valid()
    return {
        "valid": (valid(), valid()),
        "inverted": (random(count, 4) * 10, random(count, 4) * 10),
        "identical": (one, one.clone()),
        "nested": (one, one + torch.tensor([0.04, 0.04, -0.04, -0.04])),
        "touching": (in_order(whole(5)), in_order(whole(5))),
        "lines and points, inverted too": (whole(3), whole(3)),
    }


def of_both(loss: Any, a: Tensor, b: Tensor) -> Found:
    """Losses and the gradients of either box."""
    a, b = (boxes.detach().clone().requires_grad_() for boxes in (a, b))
    losses = loss(a, b)
    return losses.detach(), *torch.autograd.grad(losses.sum(), (a, b))


def by_formula(name: Any, eps: float = 0) -> Any:
    def loss(a: Tensor, b: Tensor) -> Tensor:
        pair = boxes._Pair(a, b, eps)
        return pair.reduce(boxes._FORMULAS[name](pair))

    return loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [0, 1e-7, 0.5])
@pytest.mark.parametrize("kind", pairs(1))
@pytest.mark.parametrize("name", KERNELS)
def test_the_kernel_is_its_formula(name: Any, kind: str, eps: float, dtype: torch.dtype) -> None:
    a, b = (boxes.to(dtype) for boxes in pairs()[kind])
    got = of_both(lambda a, b: FAMILY[name](a, b, eps=eps), a, b)
    torch.testing.assert_close(got, of_both(by_formula(name, eps), a, b), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["valid", "inverted"])
@pytest.mark.parametrize("name", ["iou", "giou", "diou"])  # CIoU takes a factor for a constant
def test_gradients_of_gradients(name: str, kind: str) -> None:
    a, b = (boxes.requires_grad_() for boxes in pairs(12)[kind])
    for loss in (FAMILY[name], lambda a, b: FAMILY[name](a, b, "mean", 0.5)):
        assert torch.autograd.gradcheck(loss, (a, b))
        assert torch.autograd.gradgradcheck(loss, (a, b))


@pytest.mark.parametrize("name", KERNELS)
def test_gradients_by_any_way(name: str) -> None:
    """Twice, of one box, of none, of boxes that depend on each other, through torch.func."""
    loss, formula = FAMILY[name], by_formula(name)
    a, b = pairs(20)["valid"]
    losses, slope1, slope2 = of_both(formula, a, b)
    a.requires_grad_()
    value = loss(a, b)
    weights = torch.arange(20.0).double()
    for _ in range(2):
        (grad,) = torch.autograd.grad(value, a, weights, retain_graph=True)
        assert_same(grad, slope1 * weights[:, None])
    with torch.no_grad():
        assert_same(loss(a, b), losses)
    a.requires_grad_(False)
    assert not loss(a, b).requires_grad
    assert_same(value_and_grad(lambda b: loss(a, b), b), (losses, slope2))

    def penalty(loss: Any, a: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(loss(a, a * a / 4).sum(), a, create_graph=True)
        return grad.square().sum()

    a.requires_grad_()
    expected = torch.autograd.grad(penalty(formula, a), a)
    assert_same(torch.autograd.grad(penalty(loss, a), a), expected)
    a = a.detach()
    assert_same(torch.func.vmap(torch.func.grad(loss))(a, b), slope1)
    (moved,) = torch.func.jvp(lambda a: loss(a, b), (a,), (b,))[1:]
    assert_same(moved, (slope1 * b).sum(1))
    assert torch.func.hessian(loss)(a[0], b[0]).shape == (4, 4)


@pytest.mark.parametrize("name", KERNELS)
def test_blocks_do_not_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pairs(20)["valid"]
    expected = of_both(FAMILY[name], a, b)
    monkeypatch.setattr(box_kernel, "BLOCK", 7)
    assert_same(of_both(FAMILY[name], a, b), expected)
    assert_same(value_and_grad(FAMILY[name], a, b), expected[:2])


@pytest.mark.parametrize("name", FAMILY)
def test_a_device_without_float64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (boxes.float() for boxes in pairs(200)["valid"])
    expected = of_both(FAMILY[name], a, b)
    for module in (boxes, box_kernel):
        monkeypatch.setattr(module, "wide", lambda boxes: boxes.dtype)
    torch.testing.assert_close(of_both(FAMILY[name], a, b), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["iou", "giou", "ciou", "eiou"])
def test_a_line_can_grow_into_a_box(name: str) -> None:
    """By the slope that a length has at 0."""
    _, grad = value_and_grad(
        FAMILY[name], torch.tensor([5.0, 0, 5, 10]), torch.tensor([0.0, 0, 10, 10])
    )
    assert grad[0] > 0 > grad[2]


@pytest.mark.parametrize("name", FAMILY)
def test_gradients_of_the_smallest_and_largest_boxes_are_finite(name: str) -> None:
    """Of every float32, those included of which the reciprocal is none."""
    generator = torch.Generator().manual_seed(0)
    a, b = 10 ** (torch.rand(2, 500, 4, generator=generator, dtype=torch.float64) * 82 - 45)
    a, b = a.float(), b.float()
    a[::2, :2] = 0
    b[::3, :2] = 0
    found = of_both(FAMILY[name], a, b)
    assert all(values.isfinite().all() for values in found)
    if name != "nwd":
        assert_same(found[0], FAMILY[name](a.double(), b.double()).float(), rtol=1e-6)
