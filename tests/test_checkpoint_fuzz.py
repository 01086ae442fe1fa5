"""A checkpoint that holds anything at all: a run goes on from it, or ends with one line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import train_seg
from common.checkpoint import load_checkpoint
from common.engine import _Training
from common.errors import UsageError
from common.shapes import make_shapes


def few(examples: int) -> settings:
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


def start(*options: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_seg.py", *options])
        train_seg.main()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a run of a small model."""
    root = tmp_path_factory.mktemp("fuzz")
    data = make_shapes(root / "data", number=8, validation=2, size=48)
    start(
        *("--data.format=coco", f"--data.root={data}", "--data.size=64"),
        *("--train.epochs=1", "--train.batch_size=4", "--model.encoder=tu-test_resnet"),
        f"--output={root / 'run'}",
    )
    (root / "run/best.ckpt").unlink()
    return root / "run/last.ckpt"


class Ready(Exception):
    """The run could go on."""


@pytest.fixture
def resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[[Path], bool]:
    """Whether a run goes on from a checkpoint, with its optimizer; otherwise it ended well."""

    def ready(self: _Training) -> None:
        assert self.best == self.best
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        raise Ready

    def resume(file: Path) -> bool:
        capfd.readouterr()
        with pytest.raises((Ready, SystemExit)) as end:
            start("--resume", f"--output={file.parent}")
        if end.type is Ready:
            return True
        error = capfd.readouterr().err
        assert isinstance(end.value, SystemExit)
        assert end.value.code == 2
        assert error.startswith("train_seg.py: error: ")
        assert error.count("\n") == 1
        assert len(error) < 2000
        return False

    monkeypatch.setattr(_Training, "_progress", ready)
    monkeypatch.chdir(tmp_path)
    return resume


tensors = st.builds(
    torch.full,
    st.sampled_from([(), (0,), (1,), (3,), (2, 3), (1, 3, 7, 7)]),
    st.sampled_from([0, 1, -1, 255, float("nan")]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.complex64]),
)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | tensors,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5) | st.integers(0, 3), inner, max_size=3)
    ),
    max_leaves=4,
)


def mutate(node: Any, draw: Callable[[Any], Any], depth: int = 0) -> Any:
    """The same with one value replaced by anything, or one key or entry dropped."""
    keys: list[Any] = []
    if isinstance(node, dict):
        keys = [*node]
    elif isinstance(node, list):
        keys = [*range(len(node))]
    if depth and (not keys or draw(st.integers(0, 3)) == 0):
        if isinstance(node, Tensor) and draw(st.booleans()):
            return draw(st.sampled_from([node[None], node.reshape(-1)[:1], node.double()]))
        return draw(plain)
    if not keys:
        return node
    key = draw(st.sampled_from(keys))
    changed = node.copy()
    if draw(st.integers(0, 4)) == 0:
        del changed[key]
    else:
        changed[key] = mutate(node[key], draw, depth + 1)
    return changed


@few(25)
@given(data=st.data())
def test_a_checkpoint_of_other_values_goes_on_or_is_one_line(
    data: st.DataObject, checkpoint: Path, resumed: Callable[[Path], bool], tmp_path: Path
) -> None:
    content = mutate(torch.load(checkpoint, weights_only=True), data.draw)
    torch.save(content, tmp_path / "last.ckpt")
    resumed(tmp_path / "last.ckpt")


@few(100)
@given(data=st.data())
def test_a_checkpoint_of_other_bytes_is_loaded_or_refused(
    data: st.DataObject, checkpoint: Path, tmp_path: Path
) -> None:
    content = bytearray(checkpoint.read_bytes())
    start = content.index(b"PK\x03\x04", 4)  # the pickle lies before it
    for _ in range(data.draw(st.integers(0, 3))):
        places = st.integers(0, start) | st.integers(0, len(content) - 1)
        content[data.draw(places | st.integers(len(content) - 2000, len(content) - 1))] = data.draw(
            st.integers(0, 255)
        )
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    file = tmp_path / "last.ckpt"
    file.write_bytes(content)
    try:
        found = load_checkpoint(file, "segmentation")
    except UsageError:
        return
    assert all(isinstance(value, Tensor) for value in found["model"].values())
