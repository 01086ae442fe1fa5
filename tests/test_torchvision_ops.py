"""The functions with the names of torchvision's, against torchvision's own."""

import inspect
import itertools

import pytest
import torch
import torchvision
from torchvision.ops.diou_loss import _diou_iou_loss

from detseg_losses.integrations import torchvision_ops as ours
from references import value_and_grad

BOXES = ["generalized_box_iou_loss", "distance_box_iou_loss", "complete_box_iou_loss"]
REDUCTIONS = ["none", "mean", "sum"]


def both(name):
    return getattr(torchvision.ops, name), getattr(ours, name)


def pairs(size=100.0, dtype=torch.float64):
    """Overlapping, nested, equal and disjoint boxes."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 60, 4, dtype=torch.float64, generator=generator)
    a[:, 2:] += a[:, :2] + 0.05
    b[:, 2:] += b[:, :2] + 0.05
    b[:10] = a[:10] + 0.01
    b[10:20] += 5
    return (a * size).to(dtype), (b * size).to(dtype)


def assert_equal_to_torchvision(name, first, second, *args, rtol=1e-9, atol=1e-12):
    """Value, and gradient of either argument that has one."""
    peer, own = both(name)
    expected = value_and_grad(peer, first, second, *args)
    assert all(value.isfinite().all() for value in expected)
    torch.testing.assert_close(
        value_and_grad(own, first, second, *args), expected, rtol=rtol, atol=atol
    )


@pytest.mark.parametrize("name", [*BOXES, "sigmoid_focal_loss"])
def test_arguments_are_those_of_torchvision(name):
    peer, own = (
        [(p.name, p.default) for p in inspect.signature(function).parameters.values()]
        for function in both(name)
    )
    assert own == peer


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("size", [0.1, 1.0, 100.0, 1e4])
@pytest.mark.parametrize("name", BOXES)
def test_boxes(name, size, reduction):
    """Of every size, for the eps is torchvision's too."""
    a, b = pairs(size)
    assert_equal_to_torchvision(name, a, b, reduction)
    peer, own = both(name)
    expected = value_and_grad(lambda b: peer(a, b, reduction), b)
    torch.testing.assert_close(value_and_grad(lambda b: own(a, b, reduction), b), expected)


@pytest.mark.parametrize("eps", [0.0, 1e-9, 1e-3, 1.0])
@pytest.mark.parametrize("name", BOXES)
def test_eps(name, eps):
    a, b = pairs()
    if name != "complete_box_iou_loss":
        assert_equal_to_torchvision(name, a, b, "none", eps)
        return

    def corrected(a, b):
        """torchvision's formula with the eps that it was given."""
        distance, iou = _diou_iou_loss(a, b, eps)
        first, second = (torch.atan2(*(c[:, 2:] - c[:, :2]).unbind(1)) for c in (a, b))
        v = 4 / torch.pi**2 * (first - second) ** 2
        return distance + v * (v / (1 - iou + v + eps)).detach()

    found = value_and_grad(lambda a, b: ours.complete_box_iou_loss(a, b, eps=eps), a, b)
    torch.testing.assert_close(found, value_and_grad(corrected, a, b))


@pytest.mark.parametrize("name", BOXES)
def test_shapes_and_dtypes(name):
    a, b = pairs(dtype=torch.float32)
    peer, own = both(name)
    whole = (a.round().int(), b.round().int() + 1)
    for first, second in [
        (a[0], b[0]),
        (a, b[0]),
        (a[:0], b[:0]),
        (a.half(), b.half()),
        (a.bfloat16(), b.bfloat16()),
        (a.double(), b),
        whole,
    ]:
        for reduction in REDUCTIONS:
            torch.testing.assert_close(
                own(first, second, reduction), peer(first, second, reduction), rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("soft", [False, True])
def test_focal(soft, reduction):
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(40, 5, dtype=torch.float64, generator=generator)
    y = torch.rand(40, 5, dtype=torch.float64, generator=generator)
    y = y if soft else (y > 0.8).double()
    # torchvision's 1 - p_t cancels
    close = {"rtol": 1e-6, "atol": 1e-9}
    assert_equal_to_torchvision("sigmoid_focal_loss", x, y, **close)
    for alpha, gamma in itertools.product([-1, 0, 0.25, 0.6, 1], [0, 0.5, 1, 1.5, 2, 5]):
        args = (alpha, gamma, reduction)
        assert_equal_to_torchvision("sigmoid_focal_loss", x, y, *args, **close)


@pytest.mark.parametrize("shape", [(), (7,), (3, 1), (2, 3, 4, 5)])
def test_focal_of_any_shape(shape):
    x, y = torch.randn(shape).double(), torch.rand(shape).double().round()
    for reduction in REDUCTIONS:
        args = (0.25, 2, reduction)
        assert_equal_to_torchvision("sigmoid_focal_loss", x, y, *args, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "call",
    [
        lambda: ours.sigmoid_focal_loss(torch.zeros(2), torch.zeros(2), alpha=2),
        lambda: ours.sigmoid_focal_loss(torch.zeros(2), torch.zeros(2), reduction="avg"),
        lambda: ours.sigmoid_focal_loss(torch.zeros(2, 3), torch.zeros(3, 2)),
        lambda: ours.generalized_box_iou_loss(torch.zeros(2, 4), torch.zeros(3, 4)),
        lambda: ours.complete_box_iou_loss(torch.zeros(2, 4), torch.zeros(2, 4), "avg"),
    ],
)
def test_errors(call):
    with pytest.raises(ValueError, match=r"alpha|reduction|inputs|boxes"):
        call()
