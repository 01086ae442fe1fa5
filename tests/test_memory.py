"""The memory of large gradients is used again, and never while anything still refers to it."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from detseg_losses import build_loss, memory
from detseg_losses._core import blocks

KEPT = pytest.mark.parametrize(
    ("spec", "shape", "target"),
    [
        ("focal(mode='multilabel')", (2, 3, 16, 16), torch.rand(2, 3, 16, 16)),
        ("ce + dice", (2, 5, 16, 16), torch.randint(0, 5, (2, 16, 16))),
        ("ce", (2, 5, 16, 16), torch.randint(0, 5, (2, 16, 16))),  # which keeps nothing
    ],
)


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(memory, "LARGE", 1024)
    monkeypatch.setattr(blocks, "BLOCK", 1024)
    memory.reuse(True)
    yield
    memory.reuse(True)


def gradient(spec: str, logits: Tensor, target: Tensor) -> Tensor:
    logits.grad = None
    build_loss(spec)(logits, target).backward()
    assert logits.grad is not None
    return logits.grad


@KEPT
def test_a_step_takes_the_memory_of_the_step_before(
    spec: str, shape: tuple[int, ...], target: Tensor
) -> None:
    logits = torch.randn(shape, requires_grad=True)
    first = gradient(spec, logits, target)
    place, values = first.data_ptr(), first.clone()
    del first
    second = gradient(spec, logits, target)
    assert second.data_ptr() == place
    torch.testing.assert_close(second, values, rtol=0, atol=0)


@KEPT
@pytest.mark.parametrize("hold", [Tensor.detach, lambda g: g[1:, :, 3], Tensor.numpy])
def test_what_is_still_held_is_not_written_over(
    spec: str, shape: tuple[int, ...], target: Tensor, hold: Callable[[Tensor], Any]
) -> None:
    logits = torch.randn(shape, requires_grad=True)
    held = hold(gradient(spec, logits, target))
    before = copy.deepcopy(held)
    with torch.no_grad():
        logits.mul_(-3)
    gradient(spec, logits, target)
    assert (held == before).all()


def test_one_call_switches_it_off() -> None:
    logits, target = torch.randn(2, 5, 16, 16, requires_grad=True), torch.zeros(2, 16, 16).long()
    values = gradient("ce + dice", logits, target).clone()
    logits.grad = None
    assert memory.spare
    memory.reuse(False)
    torch.testing.assert_close(gradient("ce + dice", logits, target), values)
    logits.grad = None
    assert not memory.spare


def test_large_is_measured_in_bytes() -> None:
    memory.empty_like(torch.empty(100), torch.float64)
    assert not memory.spare
    memory.empty_like(torch.empty(200), torch.float64)
    assert memory.spare


def test_the_import_computes_and_allocates_nothing() -> None:
    code = """
from torch.utils._python_dispatch import TorchDispatchMode
class Nothing(TorchDispatchMode):
    def __torch_dispatch__(self, function, *_):
        raise AssertionError(function)
with Nothing():
    import detseg_losses
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_accumulated_gradients_are_sums() -> None:
    logits = torch.randn(2, 5, 16, 16, requires_grad=True)
    target = torch.randint(0, 5, (2, 16, 16))
    single = gradient("ce + dice", logits, target).clone()
    for _ in range(2):
        build_loss("ce + dice")(logits, target).backward()
    torch.testing.assert_close(logits.grad, 3 * single)


def test_threads_do_not_share() -> None:
    target = torch.randint(0, 5, (2, 16, 16))
    batches = [torch.randn(2, 5, 16, 16) for _ in range(4)]

    def steps(logits: Tensor) -> list[Tensor]:
        logits = logits.clone().requires_grad_()
        return [gradient("ce + dice", logits, target).clone() for _ in range(20)]

    alone = [steps(logits)[0] for logits in batches]
    with ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(pool.map(steps, batches), alone, strict=True):
            for each in found:
                torch.testing.assert_close(each, wanted)


def test_memory_of_another_size_is_let_go() -> None:
    for size in (24, 16, 16, 4):
        logits = torch.randn(1, 9, size, size, requires_grad=True)
        gradient("ce + dice", logits, torch.randint(0, 9, (1, size, size)))
    del logits
    (last,) = memory.spare
    assert len(last) == 9 * 16 * 16 * 4  # the smallest is not large


def test_too_much_memory_is_the_error_that_torch_raises() -> None:
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        memory.empty_like(torch.empty(1).expand(1 << 60), torch.float32)


def test_the_order_of_memory_and_the_dtype_are_those_asked_for() -> None:
    like = torch.empty(2, 8, 16, 16).to(memory_format=torch.channels_last)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        made = memory.empty_like(like, dtype)
        assert (made.shape, made.stride(), made.dtype) == (like.shape, like.stride(), dtype)
    transposed = torch.empty(512, 30).T
    assert memory.empty_like(transposed, torch.float32).stride() == transposed.stride()


def test_a_gradient_can_be_shared_and_clipped() -> None:
    logits = torch.randn(2, 5, 16, 16, requires_grad=True)
    found = gradient("ce + dice", logits, torch.randint(0, 5, (2, 16, 16)))
    values = copy.deepcopy(found)
    found.share_memory_()
    torch.testing.assert_close(found, values)
    torch.nn.utils.clip_grad_norm_([logits], 1e-3)
    assert found.norm() <= 1.001e-3
