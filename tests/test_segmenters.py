"""train_seg.py and eval_seg.py with the models of torchvision and transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

import eval_seg
import train_seg
from common.config import DataConfig, SegmenterConfig
from common.segmenters import SEGFORMERS, build_segmenter, load_segmenter_weights
from common.shapes import make_shapes

SMALL_SEGFORMER = [
    "--model.name=segformer_b0",
    "--model.options={hidden_sizes: [8, 8, 16, 16], num_attention_heads: [1, 1, 2, 2], "
    "depths: [1, 1, 1, 1], decoder_hidden_size: 16}",
]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of a run of two steps on 8 + 4 images of 64 pixels."""
    data = make_shapes(tmp_path_factory.mktemp("data"), number=8, validation=4, size=64)
    return [
        *("--data.format=coco", f"--data.root={data}", "--data.size=64", "--train.epochs=1"),
        *("--train.batch_size=4", "--train.log_every=1", "--train.devices=1"),
    ]


def run(tool: ModuleType, *options: str) -> None:
    """Run a tool in this process, which saves the imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{tool.__name__}.py", *options])
        tool.main()


def run_apart(tool: ModuleType, *options: str) -> None:
    ended = subprocess.run(
        [sys.executable, str(tool.__file__), *options],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    ("train", "model", "columns"),
    [
        (run, ["--model.name=lraspp_mobilenet_v3_large"], {"ce", "dice"}),
        (
            run,
            ["--model.name=deeplabv3_mobilenet_v3_large", "--model.options={aux_loss: true}"],
            {"ce", "dice", "aux"},
        ),
        (run_apart, SMALL_SEGFORMER, {"ce", "dice"}),
    ],
    ids=["lraspp", "deeplabv3", "segformer"],
)
def test_a_run_and_its_evaluation_agree(
    train: Callable[..., None],
    model: list[str],
    columns: set[str],
    small: list[str],
    tmp_path: Path,
) -> None:
    if model is SMALL_SEGFORMER:
        pytest.importorskip("transformers")
    train(train_seg, *small, *model, f"--output={tmp_path / 'run'}")
    header = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert columns <= set(header)
    checkpoint = tmp_path / "run" / "best.ckpt"
    run(eval_seg, f"--checkpoint={checkpoint}", f"--output={tmp_path / 'again'}")
    stored, again = (
        json.loads((tmp_path / folder / "metrics.json").read_text()) for folder in ("run", "again")
    )
    del stored["epoch"]
    assert again == stored


@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_resnet50"])
def test_models_of_torchvision(name: str, tmp_path: Path) -> None:
    config = SegmenterConfig(name=name, options={"aux_loss": True})
    model = build_segmenter(config, DataConfig(size=64), ["a", "b", "c"], 0)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.training
    out = model(torch.zeros(2, 3, 64, 64))
    assert {key: logits.shape[1] for key, logits in out.items()} == {"out": 3, "aux": 3}

    from torchvision.models import resnet50

    torch.save(resnet50(weights=None).state_dict(), tmp_path / "resnet50.pth")
    said = load_segmenter_weights(
        model, SegmenterConfig(name=name, weights=str(tmp_path / "resnet50.pth")), ["a", "b", "c"]
    )
    assert "265 of its 267 tensors" in said


def test_sizes_of_segformer() -> None:
    """Parameters in millions, of table 1 of the paper and with the decoder for 150 classes."""
    transformers = pytest.importorskip("transformers")
    millions = []
    for options in SEGFORMERS.values():
        config = transformers.SegformerConfig(**options, num_labels=150)
        with torch.device("meta"):
            model = transformers.SegformerForSemanticSegmentation(config)
        millions.append(sum(p.numel() for p in model.parameters()) / 1e6)
    assert millions == pytest.approx([3.8, 13.7, 27.5, 47.3, 64.1, 84.7], rel=0.02)


def test_one_channel() -> None:
    pytest.importorskip("transformers")
    for name in ("segformer_b0", "lraspp_mobilenet_v3_large"):
        config = SegmenterConfig(name=name, mode="binary")
        model = build_segmenter(config, DataConfig(size=64), ["nothing", "thing"], 0).eval()
        output = model(torch.zeros(1, 3, 64, 64))
        logits = output["logits"] if "logits" in output else output["out"]
        assert logits.shape[1] == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model.name=fcn_resnet51"], "fcn_resnet51"),
        (["--model.name=fcn_resnet50", "--model.options={depth: 3}"], "depth"),
        (
            ["--model.name=lraspp_mobilenet_v3_large", "--model.options={aux_loss: true}"],
            "aux_loss",
        ),
        (["--model.name=segformer_b0", "--model.options={depht: 3}"], "'depht'"),
        (["--model.name=segformer_b0", "--loss=giou"], "giou"),
    ],
)
def test_user_errors_are_one_line(
    options: list[str],
    said: str,
    small: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if "segformer" in options[0]:
        pytest.importorskip("transformers")
    assert said in _error(capfd, *small, *options, f"--output={tmp_path}")


def test_missing_transformers_is_one_line(
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    error = _error(capfd, *small, *SMALL_SEGFORMER, f"--output={tmp_path}")
    assert 'pip install "detseg_losses[transformers]"' in error


def _error(capfd: pytest.CaptureFixture[str], *options: str) -> str:
    with pytest.raises(SystemExit) as end:
        run(train_seg, *options)
    error = capfd.readouterr().err
    assert end.value.code == 2
    assert error.startswith("train_seg.py: error: ")
    assert error.count("\n") == 1
    return error
