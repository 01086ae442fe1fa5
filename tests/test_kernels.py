"""The counter of kernels, and how many the losses may run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.kernels import Kernels, kernels_of
from detseg_losses import LOSSES, build_loss

N = 100
Run = Callable[[Tensor, Tensor], object]


@pytest.mark.parametrize(
    ("run", "kernels", "traffic"),
    [
        (lambda x, y: x + y, 1, 3),
        (lambda x, y: x.add_(y), 1, 3),
        (lambda x, y: torch.add(x, y, out=y), 1, 3),
        (lambda x, y: torch.add(x, x, out=torch.empty_like(x)), 1, 3),
        (lambda x, y: x.view(10, 10).T[2:].unsqueeze(0).expand(5, 8, 10), 0, 0),
        (lambda x, y: x.copy_(y), 1, 2),
        (lambda x, y: torch.zeros_like(x), 1, 1),
        (lambda x, y: x * 2 + 1, 2, 4),
        (lambda x, y: x.double(), 1, 3),
        (lambda x, y: torch.stack((x, y)), 1, 4),
        (lambda x, y: x.gather(0, torch.empty(N, dtype=torch.int64, device=x.device)), 1, 4),
        (lambda x, y: x[:1].expand(N) + y, 1, 2 + 1 / N),
        # ones - y, times x, the logarithm of the sigmoid, less it
        (lambda x, y: F.binary_cross_entropy_with_logits(x, y, reduction="none"), 5, 12),
    ],
)
def test_known_sequences(run: Run, kernels: int, traffic: float) -> None:
    with Kernels() as found:
        run(*torch.empty(2, N, device="meta"))
    assert len(found) == kernels
    assert found.bytes / (4 * N) == pytest.approx(traffic)


def test_a_mask_is_searched_first() -> None:
    x, mask = torch.zeros(N), torch.arange(N) < 10
    with Kernels() as found:
        x[mask] = 1.0
        x[mask]
    assert [kernel.name for kernel in found.found] == ["nonzero", "index_put_", "nonzero", "index"]
    assert found.bytes == 2 * (N + 10 * 8) + (N + 4 + 10 * 4) + (N + 2 * 10 * 4)


def test_backward_is_counted_and_its_composites_are_expanded() -> None:
    x = torch.empty(N, device="meta", requires_grad=True)
    names = [kernel.name for kernel in kernels_of(lambda: x[3:].sum()).found]
    assert names == ["sum", "ones_like", "new_zeros", "copy_"]


def test_an_operator_of_unknown_kernels_fails() -> None:
    """Not overlooked: it runs three kernels that no dispatch mode sees."""
    x = torch.empty(N, device="meta")
    with (
        pytest.raises(
            NotImplementedError, match=r"soft_margin_loss.default may run several kernels"
        ),
        Kernels(),
    ):
        torch.ops.aten.soft_margin_loss(x, x)


@pytest.mark.parametrize(
    ("name", "budget"), [("iou", 55), ("giou", 60), ("diou", 70), ("ciou", 80)]
)
def test_kernels_of_boxes(name: str, budget: int) -> None:
    """Where the gradient of the predictions is wanted."""
    a = torch.empty(N, 4, device="meta", requires_grad=True)
    b = torch.empty(N, 4, device="meta")
    loss = LOSSES[name](reduction="sum")
    assert len(kernels_of(lambda: loss(a, b))) <= budget
    with Kernels() as found:
        loss(a.detach(), b)
    assert len(found) <= budget * 0.6, "no gradient is wanted"


def masks(spec: str, *shape: int, **options: object) -> tuple[int, float]:
    """Kernels, and bytes for a byte of logits, of a loss of class indices and its gradient."""
    x = torch.empty(shape, device="meta", requires_grad=True)
    y = torch.empty(shape[0], *shape[2:], dtype=torch.long, device="meta")
    loss = build_loss(spec, kind="segmentation", **options)
    found = kernels_of(lambda: loss(x, y))
    return len(found), found.bytes / x.nbytes


def test_kernels_of_cross_entropy_and_dice() -> None:
    """A softmax and its gradient alone read or write the logits seven times."""
    kernels, traffic = masks("ce+dice", 4, 21, 512, 512)
    assert kernels <= 50
    assert traffic <= 12
    more, _ = masks("ce+dice+tversky+jaccard", 4, 21, 512, 512)
    assert more <= kernels + 2 * 3
    kernels, traffic = masks("ce+dice", 2, 150, 512, 512)
    assert kernels <= 50
    assert traffic <= 10
    kernels, traffic = masks("ce+dice", 4, 21, 512, 512, ignore_index=255)
    assert kernels <= 58
    assert traffic <= 15


def heads(name: str, target: Tensor) -> tuple[int, float]:
    """The same of a loss of a detection head."""
    x = torch.empty(20_000, 91, device="meta", requires_grad=True)
    found = kernels_of(lambda: LOSSES[name](reduction="sum")(x, target))
    return len(found), found.bytes / x.nbytes


@pytest.mark.parametrize(
    ("name", "dtype", "budget", "limit"),
    [
        ("focal", None, 40, 21),
        ("focal", torch.bool, 18, 32),
        ("focal", torch.uint8, 20, 32),
        ("focal", torch.float32, 28, 48),
        ("bce", None, 28, 8.5),
        ("bce", torch.bool, 12, 13),
        ("bce", torch.float32, 12, 14.1),
    ],
)
def test_kernels_of_heads(name: str, dtype: torch.dtype | None, budget: int, limit: float) -> None:
    """By class index, and of dense targets."""
    target = torch.empty(20_000, dtype=torch.long, device="meta")
    if dtype is not None:
        target = torch.empty(20_000, 91, dtype=dtype, device="meta")
    kernels, traffic = heads(name, target)
    assert kernels <= budget
    assert traffic <= limit


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_kernels_of_binary_cross_entropy_and_dice(dtype: torch.dtype) -> None:
    """Counts without cancellation take most of it: lean sums would take half as much."""
    x = torch.empty(8, 1, 512, 512, device="meta", requires_grad=True)
    y = torch.empty(8, 1, 512, 512, dtype=dtype, device="meta")
    loss = build_loss("bce+dice", kind="segmentation")
    found = kernels_of(lambda: loss(x, y))
    assert len(found) <= 55
    assert found.bytes / x.nbytes <= 41.1
