"""The tools with each of torchvision's detectors, and what these learn beside boxes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, KeypointRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.ssd import SSD

import common.detectors
import eval_det
import train_det
from common.config import DataConfig, DetectorConfig
from common.data import TrainingImages, load_data
from common.detectors import NormalizeOnly, build_detector, extra_of, load_detector_weights
from common.shapes import make_shapes

MAINS = {"train_det": train_det, "eval_det": eval_det}
POINTS = ["left_side", "right_side", "middle"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight small images with shapes, whose sides and middle are keypoints."""
    root = make_shapes(tmp_path_factory.mktemp("data"), number=4, validation=4, size=64)
    for split in ("train", "val"):
        content = json.loads((root / f"annotations/instances_{split}.json").read_text())
        for category in content["categories"]:
            category["keypoints"] = POINTS
        for annotation in content["annotations"]:
            x, y, width, height = annotation["bbox"]
            y += height / 2
            points = [x, y, 2, x + width, y, 1, x + width / 2, y, 2]
            annotation |= {"keypoints": points, "num_keypoints": 3}
        (root / f"annotations/person_keypoints_{split}.json").write_text(json.dumps(content))
    return root


def options(data: Path, name: str, output: Path) -> list[str]:
    """Those of a run of two steps."""
    return [
        *("--data.format=coco", f"--data.root={data}", "--data.size=64", f"--model.name={name}"),
        *("--train.batch_size=2", "--train.epochs=1", "--train.log_every=1", "--model.keypoints=3"),
        f"--output={output}",
    ]


def run(tool: str, *arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{tool}.py", *arguments])
        MAINS[tool].main()


@pytest.mark.parametrize(
    ("name", "terms"),
    [
        ("ssdlite320_mobilenet_v3_large", "softmax_focal,giou"),
        (
            "fasterrcnn_mobilenet_v3_large_320_fpn",
            "rpn.focal,rpn.giou,roi.softmax_focal,roi.giou",
        ),
    ],
)
def test_an_official_model_trains_and_is_judged(
    name: str, terms: str, data: Path, tmp_path: Path
) -> None:
    tool = str(Path(train_det.__file__))
    subprocess.run(
        [sys.executable, tool, *options(data, name, tmp_path)],
        check=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    header, *steps = (tmp_path / "metrics.csv").read_text().splitlines()
    assert header.startswith(f"step,epoch,lr,loss,{terms},AP,")
    assert len(steps) == 3  # two steps and the evaluation
    assert "AP50" in json.loads((tmp_path / "metrics.json").read_text())


class Backbone(nn.Module):
    """Maps of 8 and 4 pixels of a 64-pixel image."""

    def __init__(self, channels: Any) -> None:
        super().__init__()
        self.fine = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, 4, 1), nn.GroupNorm(4, 16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, 2, 1), nn.GroupNorm(4, 32), nn.ReLU()),
        )
        self.coarse = nn.Sequential(nn.Conv2d(32, 32, 3, 2, 1), nn.GroupNorm(4, 32), nn.ReLU())
        self.out_channels = channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        fine = self.fine(x)
        return OrderedDict([("0", fine), ("1", self.coarse(fine))])


def small_model(name: str, *, num_classes: int, num_keypoints: int = 0, **_: Any) -> nn.Module:
    """A small relative of the model that torchvision has by this name."""
    kind = name.partition("_")[0]
    if kind == "ssd300":
        boxes = DefaultBoxGenerator([[2], [2]], scales=[0.2, 0.5, 0.9])
        return SSD(Backbone([32, 32]), boxes, (64, 64), num_classes)
    anchors = AnchorGenerator(((8,), (16,)), ((1.0,),) * 2)
    if kind == "fcos":
        return FCOS(Backbone(32), num_classes, anchor_generator=anchors)
    heads: dict[str, Any] = {}
    if kind == "maskrcnn":
        heads["mask_head"] = MaskRCNNHeads(32, (16,), 1)
        heads["mask_predictor"] = MaskRCNNPredictor(16, 16, num_classes)
    if kind == "keypointrcnn":
        heads["keypoint_head"] = KeypointRCNNHeads(32, (16,))
        heads["keypoint_predictor"] = KeypointRCNNPredictor(16, num_keypoints)
    classes = {"fasterrcnn": FasterRCNN, "maskrcnn": MaskRCNN, "keypointrcnn": KeypointRCNN}
    return classes[kind](
        Backbone(32),
        rpn_anchor_generator=anchors,
        box_head=TwoMLPHead(32 * 7 * 7, 32),
        box_predictor=FastRCNNPredictor(32, num_classes),
        **heads,
    )


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models, and no pictures, which take longer than to train these."""
    monkeypatch.setattr(common.detectors.tv, "get_model", small_model)
    for tool in MAINS.values():
        for name in {"plot_curves", "draw_detections"} & vars(tool).keys():
            monkeypatch.setattr(tool, name, lambda *_: None)


@pytest.mark.usefixtures("small")
@pytest.mark.filterwarnings("ignore:.*exclude each other")
@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("fcos_resnet50_fpn", "learned*giou + focal"),
        ("ssd300_vgg16", "giou+ce"),
        ("fasterrcnn_resnet50_fpn_v2", "giou+focal"),
        ("maskrcnn_resnet50_fpn", "rpn: giou+bce; roi: giou+ce; mask: bce+learned*dice"),
        ("keypointrcnn_resnet50_fpn", "keypoint: ce; rpn: giou+ramp(0, 1, steps=4)*bce"),
    ],
)
def test_a_run_can_go_on_and_be_judged_again(
    name: str, loss: str, data: Path, tmp_path: Path
) -> None:
    given = [*options(data, name, tmp_path), f"--loss={loss}"]
    run("train_det", *given)
    steps = (tmp_path / "metrics.csv").read_text().count("\n")
    run("train_det", f"--output={tmp_path}", "--resume", "--train.epochs=2")
    assert (tmp_path / "metrics.csv").read_text().count("\n") > steps
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["step"] == 4
    moving = "learned" in loss or "ramp" in loss
    assert bool(checkpoint["loss"]) == moving
    run("eval_det", f"--checkpoint={tmp_path / 'best.ckpt'}", f"--output={tmp_path / 'again'}")
    there = json.loads((tmp_path / "metrics.json").read_text())
    here = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert here == {key: value for key, value in there.items() if key != "epoch"}


@pytest.mark.usefixtures("small")
def test_the_size_is_the_pipelines_but_for_ssd300() -> None:
    config = DataConfig(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    names = ["ssd300_vgg16", "fcos_resnet50_fpn", "keypointrcnn_resnet50_fpn"]
    for name in names:
        transform: Any = build_detector(DetectorConfig(name=name), config, ["a"], 0).transform
        assert (transform.image_mean, transform.image_std) == (config.mean, config.std)
        assert isinstance(transform, NormalizeOnly) == (name != "ssd300_vgg16")
        found, _ = transform([torch.rand(3, 96, 64)])
        assert found.image_sizes == [(64, 64) if name == "ssd300_vgg16" else (96, 64)]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--model.keypoints=17"], "model.keypoints is 17, and the objects have 3"),
        (["--model.anchors=[8,16,32]"], "model.anchors does not apply to keypointrcnn"),
        (["--data.format=voc"], "data.format voc has no keypoints, which this model learns"),
        (["--data.root=plain"], "instances_train.json: there is no object with keypoints"),
        (["--loss=mask: bce"], "KeypointRCNN has no stage 'mask'"),
    ],
)
def test_user_errors_are_one_line(
    given: list[str],
    said: str,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    make_shapes(tmp_path, number=4, validation=4, size=64).rename(tmp_path / "plain")
    with pytest.raises(SystemExit) as end:
        run("train_det", *options(data, "keypointrcnn_resnet50_fpn", tmp_path / "run"), *given)
    error = capfd.readouterr().err
    assert end.value.code == 2
    assert error.count("\n") == 1
    assert said in error


def training_images(data: Path, name: str, **config: Any) -> TrainingImages:
    options = DataConfig(format="coco", root=str(data), size=64, **config)
    extra = extra_of(DetectorConfig(name=name))
    return TrainingImages(load_data(options, "detection", "train", 0, print, extra), options, 0)


def test_masks_go_where_their_boxes_go(data: Path) -> None:
    images = training_images(data, "maskrcnn_resnet50_fpn")
    plain = training_images(data, "fasterrcnn_resnet50_fpn")
    whole = 0
    for key in [(epoch, index) for epoch in range(6) for index in range(len(images))]:
        item, other = images[key], plain[key]
        target = item["target"]
        assert torch.equal(item["image"], other["image"])
        assert all(torch.equal(target[name], other["target"][name]) for name in other["target"])
        assert target["masks"].shape == (len(target["boxes"]), 64, 64)
        assert target["masks"].dtype == torch.uint8
        for mask, box in zip(target["masks"], target["boxes"], strict=True):
            if box.min() > 1 and box.max() < 63:
                rows, columns = mask.nonzero().unbind(1)
                found = torch.stack((columns.min(), rows.min(), columns.max(), rows.max())).float()
                found[2:] += 1
                assert (found - box).abs().max() < 2
                whole += 1
    assert whole > 10


def test_keypoints_go_where_their_boxes_go(data: Path) -> None:
    """The left side stays on the left in a mirror, for it then is what was the right one."""
    images = training_images(data, "keypointrcnn_resnet50_fpn")
    mirrored = whole = 0
    for key in [(epoch, index) for epoch in range(6) for index in range(len(images))]:
        target = images[key]["target"]
        points, boxes = target["keypoints"], target["boxes"]
        assert points.shape == (len(boxes), 3, 3)
        for (left, right, middle), box in zip(points, boxes, strict=True):
            if box.min() > 1 and box.max() < 62:
                assert (left[:2] - torch.tensor([box[0], (box[1] + box[3]) / 2])).abs().max() < 1.5
                assert abs(right[0] - box[2]) < 1.5
                assert middle[2] == 2
                assert {left[2].item(), right[2].item()} == {1, 2}
                mirrored += left[2].item() == 1
                whole += 1
        outside = ((points[..., :2] < 0) | (points[..., :2] >= 64)).any(-1)
        assert (points[..., 2] == 0).equal(outside)
    assert 0 < mirrored < whole


def test_an_image_without_objects_has_no_masks_and_no_keypoints(data: Path, tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / split).symlink_to(data / split)
        content = json.loads((data / f"annotations/person_keypoints_{split}.json").read_text())
        first = content["images"][0]["id"]
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != first]
        (tmp_path / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    masks = training_images(tmp_path, "maskrcnn_resnet50_fpn")[0, 0]["target"]["masks"]
    points = training_images(tmp_path, "keypointrcnn_resnet50_fpn")[0, 0]["target"]["keypoints"]
    assert masks.shape == (0, 64, 64)
    assert points.shape == (0, 3, 3)
    assert points.dtype == torch.float32
    assert masks.dtype == torch.uint8


def test_what_models_learn_beside_boxes() -> None:
    names = ["maskrcnn_resnet50_fpn_v2", "keypointrcnn_resnet50_fpn", "ssd300_vgg16", "retinanet"]
    found = [extra_of(DetectorConfig(name=name)) for name in names]  # type: ignore[arg-type]
    assert found == ["masks", "keypoints", None, None]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["ssd300_vgg16", "maskrcnn_resnet50_fpn"])
def test_outputs_of_a_coco_detector_are_chosen_by_class_name(name: str, tmp_path: Path) -> None:
    model = DetectorConfig(name=name, weights=str(tmp_path / "coco.pth"))  # type: ignore[arg-type]
    state = build_detector(model, DataConfig(), ["?"] * 90, seed=0).state_dict()
    outputs = {key for key, value in state.items() if len(value) % 91 == 0 and "bias" in key}
    of_boxes = {"roi_heads.box_predictor.bbox_pred.bias"}
    for key in outputs:
        value = state[key]
        index = torch.arange(len(value))
        value.copy_(index // 4 if key in of_boxes else index % 91)
    torch.save(state, model.weights)
    detector = build_detector(model, DataConfig(), ["dog", "person"], seed=1)
    assert f"{len(state)} of its {len(state)}" in load_detector_weights(
        detector, model, ["dog", "person"]
    )
    assert len(outputs) == (2 if name == "ssd300_vgg16" else 3)
    for key in outputs:
        chosen = detector.state_dict()[key]
        expected = [0] * 4 + [18] * 4 + [1] * 4 if key in of_boxes else [0, 18, 1]
        assert chosen.tolist() == expected * (len(chosen) // len(expected))
