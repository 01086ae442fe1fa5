"""The tools as people run them: what they leave behind, and what they say when they cannot run."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
import yaml
from PIL import Image

import eval_det
import eval_seg
import train_det
import train_seg
from common.config import DataConfig, DetectorConfig, SegmenterConfig
from common.detectors import build_detector, load_detector_weights
from common.errors import UsageError
from common.per_image import judge, read_per_image
from common.segmenters import build_segmenter, load_segmenter_weights
from common.shapes import make_shapes
from detseg_losses.integrations.coco import CocoSegmentation, find_coco

TOOLS = Path(train_det.__file__).parent
MAINS = {"train_det": train_det, "eval_det": eval_det, "train_seg": train_seg, "eval_seg": eval_seg}
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
LEFT_BEHIND = {
    "config.yaml",
    "metrics.json",
    "metrics.csv",
    "per_image.npz",
    "cost.json",
    "last.ckpt",
    "best.ckpt",
    "curves.png",
    "predictions.png",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 + 4 small images with shapes, in COCO's format."""
    return make_shapes(tmp_path_factory.mktemp("data"), number=16, validation=4, size=64)


@pytest.fixture(scope="module")
def small(data: Path) -> list[str]:
    """Options of a training run of a few seconds."""
    return [
        *("--data.format=coco", f"--data.root={data}", "--data.size=64", "--train.epochs=1"),
        *("--train.batch_size=4", "--train.log_every=1"),
    ]


@pytest.fixture(scope="module")
def detector_run(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "det"
    run_apart("train_det", *small, f"--output={output}")
    return output


@pytest.fixture(scope="module")
def segmenter_run(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "seg"
    run("train_seg", *small, "--data.crop=32", f"--output={output}")
    return output


def run(tool: str, *options: str) -> None:
    """Run a tool in this process, which saves the imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{tool}.py", *options])
        MAINS[tool].main()


def command(tool: str, *options: str) -> list[str]:
    return [sys.executable, str(TOOLS / f"{tool}.py"), *options]


def run_apart(tool: str, *options: str) -> None:
    subprocess.run(command(tool, *options), check=True, capture_output=True, env=ONE_THREAD)


def rows(output: Path) -> list[dict[str, str]]:
    with (output / "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def load(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(file, weights_only=True)
    return content


def test_training_a_detector_leaves_its_results(detector_run: Path) -> None:
    assert {f.name for f in detector_run.iterdir()} >= LEFT_BEHIND
    metrics = json.loads((detector_run / "metrics.json").read_text())
    assert {"AP", "AP50", "AP75", "APs", "APm", "APl", "AR100", "per_class"} <= metrics.keys()
    assert list(metrics["per_class"]) == ["circle", "square", "triangle", "star"]
    logged = rows(detector_run)
    assert [row["step"] for row in logged if row["loss"]] == ["1", "2", "3", "4"]
    for row in logged[:4]:
        assert float(row["giou"]) + float(row["focal"]) == pytest.approx(float(row["loss"]))
    with Image.open(detector_run / "predictions.png") as picture:
        assert len(picture.convert("RGB").getcolors(2**24)) > 100
    assert list((detector_run / "tensorboard").iterdir())
    assert not list(detector_run.glob("*.unfinished"))


def test_training_a_segmenter_leaves_its_results(segmenter_run: Path) -> None:
    assert {f.name for f in segmenter_run.iterdir()} >= LEFT_BEHIND
    metrics = json.loads((segmenter_run / "metrics.json").read_text())
    assert {"mIoU", "per_class_iou", "mean_dice", "pixel_accuracy"} <= metrics.keys()
    expect_per_image(segmenter_run, "mIoU")
    assert json.loads((segmenter_run / "cost.json").read_text())["seconds_per_step"] > 0
    row = rows(segmenter_run)[0]
    assert float(row["ce"]) + float(row["dice"]) == pytest.approx(float(row["loss"]))


def test_evaluating_a_detector_gives_the_numbers_of_its_run(
    detector_run: Path, tmp_path: Path
) -> None:
    run("eval_det", f"--checkpoint={detector_run / 'best.ckpt'}", f"--output={tmp_path}")
    there = json.loads((detector_run / "metrics.json").read_text())
    here = json.loads((tmp_path / "metrics.json").read_text())
    assert here == {key: value for key, value in there.items() if key != "epoch"}
    for folder in (detector_run, tmp_path):
        expect_per_image(folder, "AP")


def expect_per_image(folder: Path, metric: str) -> None:
    """What is kept of the images gives the metric of the run."""
    found = read_per_image(folder)
    assert len(found.images) == 4
    (value,) = judge(found, np.ones((1, 4), np.int64))[metric]
    assert value == pytest.approx(json.loads((folder / "metrics.json").read_text())[metric])


def test_saved_masks_have_the_miou_of_the_run(
    segmenter_run: Path, data: Path, tmp_path: Path
) -> None:
    run("eval_seg", f"--checkpoint={segmenter_run / 'best.ckpt'}", f"--save_masks={tmp_path}")
    truth = CocoSegmentation(*find_coco(data, "val"))
    saved = [np.array(Image.open((tmp_path / name).with_suffix(".png"))) for name in truth.names]
    overlap, union = np.zeros(5), np.zeros(5)
    for index, mask in enumerate(saved):
        for label in range(5):
            predicted, true = mask == label, truth[index].mask == label
            overlap[label] += (predicted & true).sum()
            union[label] += (predicted | true).sum()
    miou = np.mean([o / u for o, u in zip(overlap, union, strict=True) if u])
    metrics = json.loads((segmenter_run / "metrics.json").read_text())
    assert metrics["mIoU"] == pytest.approx(miou, abs=1e-12)


def with_images(data: Path, place: Path, entries: dict[str, str]) -> Path:
    """A copy of ``data`` whose validation images have other names: by name, the file they are."""
    root = place / "copy"
    shutil.copytree(data, root)
    file = root / "annotations/instances_val.json"
    content = json.loads(file.read_text())
    content["images"] = [
        {**content["images"][number], "file_name": name} for number, name in enumerate(entries)
    ]
    known = [image["id"] for image in content["images"]]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in known]
    file.write_text(json.dumps(content))
    for name, source in entries.items():
        if not (root / "val" / name).exists():
            Image.open(data / "val" / source).save(root / "val" / name)
    return root


def test_images_of_one_stem_have_masks_of_their_own(
    segmenter_run: Path, data: Path, tmp_path: Path
) -> None:
    entries = {"1.png": "000001.png", "1.bmp": "000002.png", "a.bmp": "000003.png"}
    root = with_images(data, tmp_path, entries)
    checkpoint = f"--checkpoint={segmenter_run / 'best.ckpt'}"
    masks = tmp_path / "masks"
    run("eval_seg", checkpoint, f"--save_masks={masks}", f"--data.root={root}")
    assert {f.name for f in masks.iterdir()} == {"1.png.png", "1.bmp.png", "a.png"}
    plain = tmp_path / "plain"
    run("eval_seg", checkpoint, f"--save_masks={plain}", f"--data.root={data}")
    for new, old in (("1.png.png", "000001.png"), ("1.bmp.png", "000002.png")):
        assert (masks / new).read_bytes() == (plain / old).read_bytes()


@pytest.mark.parametrize("name", ["../../photo.png", "{place}/photo.png", "../val/../../photo.png"])
def test_no_mask_replaces_a_file_that_a_name_points_to(
    name: str, segmenter_run: Path, data: Path, tmp_path: Path
) -> None:
    photo = tmp_path / "photo.png"
    shutil.copy(data / "val/000001.png", photo)
    before = photo.read_bytes()
    root = with_images(data, tmp_path, {name.format(place=tmp_path): "", "000002.png": ""})
    there = sorted(tmp_path.rglob("*"))
    options = [f"--data.root={root}", f"--save_masks={tmp_path / 'a/b/masks'}"]
    with contextlib.suppress(SystemExit):  # refused, or evaluated without that image
        run("eval_seg", f"--checkpoint={segmenter_run / 'best.ckpt'}", *options)
    assert photo.read_bytes() == before
    masks = {tmp_path / "a", *(tmp_path / "a").rglob("*")}
    assert set(tmp_path.rglob("*")) - masks == set(there)
    assert {f.name for f in masks if f.is_file()} <= {"000002.png"}


@pytest.mark.parametrize("name", ["metrics.json", "predictions.png"])
@pytest.mark.parametrize("tool", ["eval_det", "eval_seg"])
def test_results_that_cannot_be_written_are_one_line(
    tool: str,
    name: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs = {"eval_det": "detector_run", "eval_seg": "segmenter_run"}
    checkpoint = request.getfixturevalue(runs[tool]) / "best.ckpt"
    (tmp_path / name).symlink_to("/dev/full")
    for output, reason in ((str(tmp_path), "No space left"), ("/proc/x", "/proc/x cannot be")):
        with pytest.raises(SystemExit) as end:
            run(tool, f"--checkpoint={checkpoint}", f"--output={output}")
        assert end.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert reason in error


def test_damaged_images_are_listed_and_do_not_count(
    detector_run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data"
    shutil.copytree(data, root)
    file = root / "val/000001.png"
    content = bytearray(file.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 60] = bytes(60)
    file.write_bytes(content)
    options = [f"--checkpoint={detector_run / 'best.ckpt'}", f"--data.root={root}"]
    run("eval_det", *options, f"--output={tmp_path / 'out'}")
    assert "1 faults: 1 x image or mask cannot be used" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert any("1 images were skipped" in note for note in metrics["notes"])
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert 1 not in {result["image_id"] for result in results}


def test_training_says_what_it_trains_on_what(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("train_seg", *small, "--data.subset=4", f"--output={tmp_path / 'run'}")
    said = capsys.readouterr().out
    assert "model: unet with encoder resnet18, weights none, 64 x 64 px; this is the model" in said
    assert "--config configs/seg/coco.yaml" in said
    assert "train: pixels in 4 of 4 masks: background " in said
    assert "val: pixels in 4 of 4 masks: " in said


def test_stored_configuration_starts_the_same_run(
    detector_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        run("train_det", f"--config={detector_run / 'config.yaml'}", "--print_config")
    assert end.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    stored = yaml.safe_load((detector_run / "config.yaml").read_text())
    assert {key: printed[key] for key in stored} == stored


def test_printed_configuration_has_the_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("train_seg", "--train.lr=1e-4", "--data.classes=[no,yes,on]", "--print_config")
    printed = yaml.load(capsys.readouterr().out, yaml.BaseLoader)
    assert printed["train"]["lr"] == "0.0001"
    assert printed["data"]["classes"] == ["no", "yes", "on"]


@pytest.mark.parametrize("task", ["det", "seg"])
def test_shipped_configurations_are_valid(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted((TOOLS.parent / "configs" / task).glob("*.yaml"))
    assert len(files) == 4
    for file in files:
        with pytest.raises(SystemExit) as end:
            run(f"train_{task}", f"--config={file}", "--print_config")
        assert end.value.code == 0, file
        printed = yaml.safe_load(capsys.readouterr().out)
        for key, stated in yaml.safe_load(file.read_text()).items():
            if isinstance(stated, dict):
                assert {option: printed[key][option] for option in stated} == stated
            else:
                assert printed[key] == stated


@pytest.mark.parametrize(
    ("tool", "options", "said"),
    [
        ("train_det", ["--train.bach_size=4"], "train.bach_size"),
        ("train_det", ["--train.lr=fast"], "train.lr"),
        ("train_det", ["--data.format=cocoo"], "data.format"),
        ("train_det", ["--config=missing.yaml"], "missing.yaml"),
        ("train_det", ["--loss=giuo+focal"], "giou"),
        ("train_det", ["--loss=giou+"], "giou+"),
        ("train_det", ["--loss=dice+focal"], "dice"),
        ("train_det", ["--data.root=null"], "data.root"),
        ("train_det", ["--data.root=nowhere"], "nowhere"),
        ("train_det", ["--data.train_split=trian"], "trian"),
        ("train_det", ["--data.classes=[circel]"], "circle"),
        ("train_det", ["--data.size=[1,2,3]"], "[1, 2, 3]"),
        ("train_det", ["--train.batch_size=17"], "17"),
        ("train_det", ["--train.accumulate=3"], "accumulate"),
        ("train_det", ["--model.weights=missing.pth"], "missing.pth"),
        ("train_det", ["--model.anchors=[16]"], "anchors"),
        ("train_det", ["--output=/dev/null"], "/dev/null"),
        ("train_det", ["--resume"], "--output"),
        ("train_det", ["--resume", "--output=nowhere"], "nowhere"),
        ("train_seg", ["--loss=giou+dice"], "giou"),
        ("train_seg", ["--model.name=unett"], "unett"),
        ("train_seg", ["--model.encoder=resnet19"], "resnet19"),
        ("train_seg", ["--model.options={depth: 3}"], "depth"),
        ("train_seg", ["--model.mode=binary"], "binary"),
        ("eval_det", [], "--checkpoint"),
        ("eval_det", ["--checkpoint=missing.ckpt"], "missing.ckpt"),
        ("eval_det", ["--predictions=missing.json", "--annotations=missing.json"], "missing.json"),
        ("eval_seg", [], "checkpoint"),
    ],
)
def test_user_errors_are_one_line(
    tool: str,
    options: list[str],
    said: str,
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        run(tool, *(small if tool.startswith("train") else []), *options)
    error = capfd.readouterr().err
    assert end.value.code == 2
    assert error.startswith(f"{tool}.py: error: ")
    assert error.count("\n") == 1
    assert said in error
    assert not (tmp_path / "runs").exists()


def test_an_earlier_run_is_not_overwritten(
    small: list[str], detector_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (detector_run / "last.ckpt").read_bytes()
    with pytest.raises(SystemExit) as end:
        run("train_det", *small, f"--output={detector_run}")
    assert end.value.code == 2
    assert "--resume" in capsys.readouterr().err
    assert (detector_run / "last.ckpt").read_bytes() == before


def test_checkpoint_of_the_other_task_is_refused(
    detector_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        run("eval_seg", f"--checkpoint={detector_run / 'best.ckpt'}")
    assert end.value.code == 2
    assert "detection" in capsys.readouterr().err


def test_ground_truth_as_predictions_has_ap_1(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotations = data_root / "coco128/annotations/instances_train2017.json"
    content = json.loads(annotations.read_text())
    results = [
        {**{key: a[key] for key in ("image_id", "category_id", "bbox")}, "score": 1.0}
        for a in content["annotations"]
        if not a["iscrowd"]
    ]
    file = tmp_path / "results.json"
    file.write_text(json.dumps(results))
    run(
        "eval_det",
        *(f"--predictions={file}", f"--annotations={annotations}", f"--output={tmp_path}"),
        "--voc=2010",
    )
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["AP"] == pytest.approx(1)
    assert metrics["voc"]["mAP"] == pytest.approx(1)
    assert "no object of" in capsys.readouterr().out  # nine of COCO's classes are not in coco128


def test_coco_photos_train_and_evaluate(data_root: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    run(
        "train_det",
        *("--data.format=coco", f"--data.root={data_root / 'coco128'}", "--data.size=64"),
        *("--data.subset=8", "--data.classes=[person,car,dog]", "--train.epochs=1"),
        *("--loss=ciou+bce", f"--output={output}"),
    )
    metrics = json.loads((output / "metrics.json").read_text())
    assert list(metrics["per_class"]) == ["person", "car", "dog"]
    run("eval_det", f"--checkpoint={output / 'last.ckpt'}", f"--output={tmp_path}")
    again = json.loads((tmp_path / "metrics.json").read_text())
    assert again["AP"] == metrics["AP"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert {result["category_id"] for result in results} <= {1, 3, 18}


def test_a_killed_run_resumes_exactly(small: list[str], tmp_path: Path) -> None:
    options = [*small, "--train.epochs=2", "--train.batch_size=2", "--train.checkpoint_every=3"]
    # FPN has dropout.
    options += ["--model.name=fpn", "--model.encoder=mobilenet_v2", "--data.workers=1"]
    options += [
        "--loss=learned*ce(label_smoothing=ramp(0, 0.1, steps=9)) + ramp(0, 1, steps=9)*dice"
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_apart("train_seg", *options, f"--output={whole}")

    process = subprocess.Popen(
        command("train_seg", *options, f"--output={killed}"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=ONE_THREAD,
    )
    deadline = time.monotonic() + 120
    while not ((killed / "metrics.csv").exists() and len(rows(killed)) >= 4):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert load(killed / "last.ckpt")["step"] in (3, 6), "to be killed within the first epoch"

    run_apart("train_seg", f"--output={killed}", "--resume")
    first, second = load(whole / "last.ckpt"), load(killed / "last.ckpt")
    assert second["step"] == 16
    assert first["config"] == second["config"]
    for part in ("model", "loss"):
        for name, tensor in first[part].items():
            assert torch.equal(tensor, second[part][name]), name
    assert first["loss"]["step"] == 16
    assert first["loss"]["log_variance_ce"] != 0
    logged = [row for row in rows(whole) if row["loss"]]
    assert [float(row["weight_dice"]) for row in logged[:10]] == pytest.approx(
        [min(step / 9, 1) for step in range(10)]
    )
    assert rows(whole) == rows(killed)


@pytest.fixture(scope="module")
def one_step(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """A run of a single step of plain gradient descent: the weights show the gradient."""
    options = [*small, "--data.subset=8", "--train.batch_size=8", "--train.optimizer=sgd"]
    options += ["--train.schedule=constant", "--train.lr=0.1", "--train.weight_decay=0"]
    options += ["--train.clip=0"]
    output = tmp_path_factory.mktemp("runs") / "one"
    run("train_det", *options, f"--output={output}")
    return options, output


def assert_same_step(one: Path, other: Path) -> None:
    for name in rows(one)[0].keys() & {"loss", "giou", "focal", "ce", "dice"}:
        assert float(rows(other)[0][name]) == pytest.approx(float(rows(one)[0][name]), rel=1e-5)
    first, second = load(one / "last.ckpt")["model"], load(other / "last.ckpt")["model"]
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def test_learned_weights_are_not_resumed_with_another_loss(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loss = "--loss=learned*ce + dice"
    run("train_seg", *small, "--data.subset=4", loss, f"--output={tmp_path}")
    with pytest.raises(SystemExit) as end:
        run("train_seg", "--loss=ce + learned*dice", f"--output={tmp_path}", "--resume")
    assert end.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("train_seg.py: error: ")
    assert "has the state of 'learned*ce + dice'" in error


@pytest.mark.parametrize("option", ["train.optimizer=adamw", "model.fpn_channels=16"])
def test_a_resumed_run_keeps_its_model_and_its_optimizer(
    one_step: tuple[list[str], Path], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, output = one_step
    before = (output / "last.ckpt").read_bytes()
    with pytest.raises(SystemExit) as end:
        run("train_det", f"--{option}", f"--output={output}", "--resume")
    assert end.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("train_det.py: error: ")
    assert f"has {option.split('=')[0]}=" in error
    assert (output / "last.ckpt").read_bytes() == before


def test_accumulated_gradients_are_those_of_the_batch(
    one_step: tuple[list[str], Path], tmp_path: Path
) -> None:
    options, output = one_step
    run("train_det", *options, "--train.accumulate=4", f"--output={tmp_path / 'run'}")
    assert_same_step(output, tmp_path / "run")


def run_in_two_processes(tool: str, *options: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"),
            f"--master_port={port}",
            *command(tool, *options)[1:],
        ],
        check=True,
        capture_output=True,
        env=ONE_THREAD,
    )


def test_two_processes_make_the_step_of_one(
    one_step: tuple[list[str], Path], tmp_path: Path
) -> None:
    options, one = one_step
    output = tmp_path / "two"
    run_in_two_processes("train_det", *options, f"--output={output}")
    assert {f.name for f in output.iterdir()} == {f.name for f in one.iterdir()}
    assert len(rows(output)) == len(rows(one))
    assert_same_step(one, output)


def test_two_processes_make_the_step_of_one_in_segmentation(
    one_step: tuple[list[str], Path], tmp_path: Path
) -> None:
    """Of a model without batch norm, which would see half of the batch."""
    options = [*one_step[0], "--data.crop=32", "--model.encoder=vgg11"]
    options.append(
        "--model.options={encoder_depth: 3, decoder_channels: [16, 8, 8], decoder_use_norm: false}"
    )
    run("train_seg", *options, f"--output={tmp_path / 'one'}")
    run_in_two_processes("train_seg", *options, f"--output={tmp_path / 'two'}")
    assert {f.name for f in (tmp_path / "two").iterdir()} >= LEFT_BEHIND
    assert_same_step(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("name", ["retinanet", "retinanet_resnet50_fpn"])
def test_weights_none_downloads_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a download was tried")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    model = DetectorConfig(name=name, backbone="resnet18", anchors=None)
    detector = build_detector(model, DataConfig(), ["a"], seed=0)
    assert load_detector_weights(detector, model, ["a"]) == "weights: random"
    segmenter = build_segmenter(SegmenterConfig(), DataConfig(size=32), ["a", "b"], seed=0)
    assert segmenter.training


def test_weights_are_recognised_by_their_keys(tmp_path: Path) -> None:
    file = tmp_path / "resnet18.pth"
    state = torchvision.models.resnet18(weights=None).state_dict()
    torch.save(state, file)
    conv = state["layer2.0.conv1.weight"]

    model = DetectorConfig(backbone="resnet18", weights=str(file))
    detector = build_detector(model, DataConfig(), ["a"], seed=0)
    assert "100 of its 102 tensors" in load_detector_weights(detector, model, ["a"])
    assert torch.equal(detector.backbone.body["layer2"][0].conv1.weight, conv)

    segmenter_model = SegmenterConfig(weights=str(file))
    segmenter = build_segmenter(segmenter_model, DataConfig(size=32), ["a", "b"], seed=0)
    load_segmenter_weights(segmenter, segmenter_model, ["a", "b"])
    assert torch.equal(segmenter.encoder.layer2[0].conv1.weight, conv)

    other = DetectorConfig(backbone="mobilenet_v3", weights=str(file))
    with pytest.raises(UsageError, match="of its 102 tensors"):
        load_detector_weights(build_detector(other, DataConfig(), ["a"], seed=0), other, ["a"])


def test_outputs_of_a_coco_detector_are_chosen_by_class_name(tmp_path: Path) -> None:
    model = DetectorConfig(name="retinanet_resnet50_fpn", weights=str(tmp_path / "coco.pth"))
    coco = build_detector(model, DataConfig(), ["?"] * 90, seed=0)
    bias = coco.head.classification_head.cls_logits.bias.detach()
    bias.copy_(torch.arange(91.0).repeat(9))
    torch.save(coco.state_dict(), model.weights)
    detector = build_detector(model, DataConfig(), ["dog", "person"], seed=1)
    load_detector_weights(detector, model, ["dog", "person"])
    chosen = detector.head.classification_head.cls_logits.bias.view(9, 3)
    assert chosen.tolist() == [[0, 18, 1]] * 9  # COCO's ids of dog and person


def test_an_interrupted_import_is_one_line() -> None:
    code = f"import sys; sys.path.insert(0, {str(TOOLS)!r}); import common; raise KeyboardInterrupt"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (130, "interrupted\n")
