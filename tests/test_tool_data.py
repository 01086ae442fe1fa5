"""What the tools make of a user's data: its format, its faults, and what there is to learn."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from PIL import Image
from torch import Tensor, nn

import coco_to_yolo
from common import census
from common.census import say_model, say_objects, say_pixels
from common.config import (
    DataConfig,
    DetectionConfig,
    DetectorConfig,
    SegmentationConfig,
    SegmenterConfig,
)
from common.data import TrainingImages, collate, find_format, load_data
from common.errors import UsageError
from common.evaluate import evaluate_detector, evaluate_segmenter, mask_files
from common.shapes import CLASSES, make_shapes
from detseg_losses.integrations.coco import CocoDetection, find_coco
from detseg_losses.integrations.samples import DataError, ImageData, ImageFile
from detseg_losses.integrations.voc import VocSegmentation


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shapes(tmp_path_factory.mktemp("data"), number=6, validation=4, size=48)


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Shapes of whose images two of each split have a sound header and a damaged body."""
    root = make_shapes(tmp_path, number=6, validation=4, size=48)
    for name in ("train/000002", "train/000003", "val/000001", "val/000003"):
        damage(root / f"{name}.png")
    return root


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 60] = bytes(60)
    file.write_bytes(content)


def config_of(root: Path, **options: Any) -> DataConfig:
    return DataConfig(root=str(root), **{"size": 64, **options})


def write_voc(root: Path, masks: Iterable[Any], classes: Iterable[str]) -> Path:
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join(classes))
    names = []
    for number, mask in enumerate(masks):
        names.append(str(number))
        pixels = np.array(mask, np.uint8)
        Image.fromarray(pixels).save(root / f"SegmentationClass/{number}.png")
        grey = Image.fromarray(np.zeros((*pixels.shape, 3), np.uint8))
        grey.save(root / f"JPEGImages/{number}.png")
    for split in ("train", "val"):
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names))
    return root


class Blind(nn.Module):
    """A model that sees nothing, whether boxes or classes are asked for."""

    def forward(self, images: Any) -> Any:
        if isinstance(images, Tensor):
            return torch.zeros(len(images), len(CLASSES) + 1, *images.shape[-2:])
        nothing = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0)}
        return [nothing | {"labels": torch.zeros(0, dtype=torch.int64)} for _ in images]


# The format.


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_the_format_is_recognised_in_root(task: Any, shapes: Path, tmp_path: Path) -> None:
    assert find_format(config_of(shapes), task) == "coco"
    write_voc(tmp_path / "VOCdevkit/VOC2012", [np.eye(8)], ["background", "cat"])
    (tmp_path / "VOCdevkit/VOC2012/ImageSets/Main").mkdir()
    (tmp_path / "VOCdevkit/VOC2012/ImageSets/Main/train.txt").touch()
    for root in (tmp_path, tmp_path / "VOCdevkit", tmp_path / "VOCdevkit/VOC2012"):
        assert find_format(config_of(root), task) == "voc"
    assert find_format(DataConfig(), task) == "shapes"


def test_root_without_format_is_read_and_left_as_it_is(shapes: Path) -> None:
    before = sorted(shapes.rglob("*"))
    data = load_data(config_of(shapes), "detection", "train", 0, print)
    assert len(data) == 6
    assert data.classes == list(CLASSES)
    assert sorted(shapes.rglob("*")) == before


@pytest.mark.parametrize("name", ["photo.jpg", "annotations"])
def test_shapes_are_drawn_into_no_folder_of_other_things(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(UsageError, match=name):
        make_shapes(tmp_path, number=1, validation=1, size=48)
    assert [f.name for f in tmp_path.iterdir()] == [name]


def test_shapes_that_are_there_are_used_beside_other_things(shapes: Path) -> None:
    other = shapes.parent / "mine.txt"
    other.touch()
    assert make_shapes(shapes.parent, number=6, validation=4, size=48) == shapes
    other.unlink()


@pytest.mark.parametrize(
    ("given", "classes"),
    [
        ("cat", ["cat"]),
        ("cat,dog", ["cat", "dog"]),
        ("traffic light, dog", ["traffic light", "dog"]),
        (["a, b"], ["a, b"]),
        (None, None),
    ],
)
def test_classes_are_one_or_several(given: Any, classes: list[str] | None) -> None:
    assert DataConfig(classes=given).classes == classes


def test_what_is_trained_is_said(shapes: Path, tmp_path: Path) -> None:
    said: list[str] = []
    data = config_of(shapes)
    say_model(DetectionConfig(data=data), said.append)
    assert said[-1].startswith("model: retinanet with backbone small, weights none, 64 x 64 px; ")
    assert "configs/det/coco.yaml" in said[-1]
    say_model(SegmentationConfig(data=replace(data, crop=[32, 48])), said.append)
    assert said[-1].startswith("model: unet with encoder resnet18, weights none, 32 x 48 px; ")
    assert "configs/seg/coco.yaml" in said[-1]
    real = DetectionConfig(data=data, model=DetectorConfig(backbone="resnet50", weights="DEFAULT"))
    say_model(real, said.append)
    assert said[-1] == "model: retinanet with backbone resnet50, weights DEFAULT, 64 x 64 px"
    say_model(SegmentationConfig(model=SegmenterConfig()), said.append)
    assert "configs" not in said[-1]


# What there is to learn.


def test_objects_and_images_of_each_class_are_counted(tmp_path: Path) -> None:
    root = make_shapes(tmp_path, number=6, validation=1, size=48)
    file = root / "annotations/instances_train.json"
    content = json.loads(file.read_text())
    kinds = [(1, 1, 0), (1, 1, 0), (2, 1, 0), (2, 2, 0), (1, 2, 1)]  # image, category, crowd
    content["annotations"] = [
        {"image_id": i, "category_id": c, "iscrowd": crowd, "bbox": [1, 1, 9, 9], "area": 81}
        for i, c, crowd in kinds
    ]
    file.write_text(json.dumps(content))
    said: list[str] = []
    say_objects(CocoDetection(*find_coco(root, "train")), "train", said.append)
    assert said == [
        "train: objects (images) of each class: circle 3 (2), square 1 (1); 1 objects are ignored",
        "train: warning: 2 classes never occur: triangle, star",
    ]


def test_pixels_of_each_class_are_counted(tmp_path: Path) -> None:
    masks = np.zeros((3, 10, 10))
    masks[0, :5], masks[1, :, :2], masks[2, 0, 0] = 1, 255, 2
    names = ["background", "cat", "dog", "cow"]
    data = VocSegmentation(write_voc(tmp_path, masks, names), "train")
    said: list[str] = []
    say_pixels(data, "train", "skip", said.append)
    assert said == [
        "train: pixels in 3 of 3 masks: background 76.33%, cat 16.67%, dog 0.33%; void 6.67%",
        "train: warning: 1 classes never occur in 3 of 3 masks: cow",
    ]


def test_a_rare_class_is_looked_for_beyond_the_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(census, "MASKS", 2)
    masks = np.zeros((9, 4, 4))
    masks[3] = 1
    data = VocSegmentation(write_voc(tmp_path, masks, ["background", "crack"]), "train")
    said: list[str] = []
    say_pixels(data, "train", "skip", said.append)
    assert "in 5 of 9 masks: background 80.00%, crack 20.00%" in said[0]
    masks = np.zeros((9, 4, 4))
    masks[:, 0] = 1
    data = VocSegmentation(write_voc(tmp_path / "b", masks, ["background", "crack"]), "train")
    say_pixels(data, "train", "skip", said.append)
    assert "in 2 of 9 masks" in said[-1]


@pytest.mark.parametrize(
    ("value", "classes", "words"),
    [
        (255, ["background", "lesion"], ["lesion (1) never occurs", "divided by 255"]),
        (0, ["background", "lesion"], ["no class but 'background'", "nothing to learn"]),
        (1, ["background", "lesion"], ["no class but 'lesion'"]),
    ],
)
def test_masks_of_a_single_class_are_refused(
    value: int, classes: list[str], words: list[str], tmp_path: Path
) -> None:
    mask = np.full((8, 8), value)
    if value == 255:
        mask[:4] = 0
    data = VocSegmentation(write_voc(tmp_path, [mask], classes), "train")
    with pytest.raises(DataError) as refused:
        say_pixels(data, "train", "skip", print)
    for word in words:
        assert word in str(refused.value)
    said: list[str] = []
    say_pixels(data, "val", "skip", said.append)
    assert said[0].startswith("val: warning: ")


# Faults that only decoding shows.


def test_a_damaged_image_is_replaced_by_the_next_one(damaged: Path) -> None:
    config = config_of(damaged, augment=False)
    images = TrainingImages(load_data(config, "detection", "train", 0, print), config, 0)
    assert len(images) == 6
    items = [images[0, index] for index in range(6)]
    assert [len(item.get("faults", [])) for item in items] == [0, 2, 1, 0, 0, 0]
    for index in (1, 2):
        assert torch.equal(items[index]["image"], items[3]["image"])
    batch = collate(items)
    assert batch["image"].shape == (6, 3, 64, 64)
    listed = [fault.file.name for fault in batch["faults"]]
    assert listed == ["000002.png", "000003.png", "000003.png"]
    assert "faults" not in collate([items[0], items[3]])


def test_a_replaced_image_is_the_same_when_it_is_read_again(damaged: Path) -> None:
    config = config_of(damaged)
    images = TrainingImages(load_data(config, "segmentation", "train", 0, print), config, 0)
    for key in ((0, 1), (3, 2)):
        first, second = images[key], images[key]
        assert torch.equal(first["image"], second["image"])
        assert torch.equal(first["mask"], second["mask"])


def test_damage_is_an_error_where_faults_are_refused(damaged: Path) -> None:
    config = config_of(damaged, faults="refuse")
    images = TrainingImages(load_data(config, "detection", "train", 0, print), config, 0)
    with pytest.raises(DataError, match=r"000002\.png"):
        images[0, 1]


def test_a_split_of_damaged_images_ends(damaged: Path) -> None:
    for file in (damaged / "train").iterdir():
        damage(file)
    config = config_of(damaged)
    data = load_data(config, "segmentation", "train", 0, print)
    with pytest.raises(DataError, match="no usable image is left: 6 faults"):
        TrainingImages(data, config, 0)[0, 4]
    with pytest.raises(DataError, match="no usable image is left: 6 faults"):
        say_pixels(data, "train", "skip", print)
    with pytest.raises(DataError, match="no usable image is left to judge: 6 faults"):
        evaluate_segmenter(Fabric(accelerator="cpu", devices=1), Blind(), data, config, 4)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_damaged_images_do_not_count_in_evaluation(damaged: Path, batch_size: int) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    config = config_of(damaged)
    data = load_data(config, "detection", "val", 0, print)
    whole = data.select([1, 3])
    metrics, _ = evaluate_detector(fabric, Blind(), data, config, batch_size)
    notes = [note for note in metrics.pop("notes") if "skipped" in note]
    expected, _ = evaluate_detector(fabric, Blind(), whole, config, batch_size)
    assert expected.pop("notes")
    assert metrics == expected
    assert len(notes) == 1
    assert "2 images were skipped" in notes[0]
    assert "000001.png, 000003.png" in notes[0]

    masks = load_data(config, "segmentation", "val", 0, print)
    metrics, _ = evaluate_segmenter(fabric, Blind(), masks, config, batch_size)
    assert "2 images were skipped" in metrics.pop("notes")[0]
    judged = masks.select([1, 3])
    assert metrics == evaluate_segmenter(fabric, Blind(), judged, config, batch_size)[0]
    with pytest.raises(DataError, match="000001"):
        evaluate_segmenter(fabric, Blind(), masks, replace(config, faults="refuse"), batch_size)


def test_mask_values_that_are_no_class_are_replaced_in_training(tmp_path: Path) -> None:
    masks = np.zeros((3, 8, 8))
    masks[:, 0], masks[1, 1] = 1, 7
    root = write_voc(tmp_path, masks, ["background", "cat"])
    config = config_of(root)
    data = load_data(config, "segmentation", "train", 0, print)
    items = [TrainingImages(data, config, 0)[0, index] for index in range(len(data))]
    faults = [fault for item in items for fault in item.get("faults", [])] + data.faults
    assert any("holds the value 7" in str(fault) for fault in faults)
    assert all(set(item["mask"].unique().tolist()) <= {0, 1, 255} for item in items)


# Images and boxes that leave nothing to see.


@pytest.mark.parametrize(
    ("width", "height", "size", "usable"),
    [(30000, 4, 64, False), (4, 3000, 64, False), (3000, 70, 64, False), (3000, 71, 64, True)],
)
@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_thin_images_are_listed_or_survive(
    width: int, height: int, size: int, usable: bool, task: Any, tmp_path: Path
) -> None:
    root = make_shapes(tmp_path, number=1, validation=1, size=48)
    file = root / "annotations/instances_train.json"
    content = json.loads(file.read_text())
    thin = {"id": 2, "file_name": "thin.png", "width": width, "height": height}
    Image.new("RGB", (width, height)).save(root / "train/thin.png")
    file.write_text(json.dumps(content | {"images": [*content["images"], thin]}))
    config = config_of(root, size=size)
    data = load_data(config, task, "train", 0, print)
    assert len(data) == 1 + usable
    assert [fault.file.name for fault in data.faults] == ([] if usable else ["thin.png"])
    images = TrainingImages(data, config, 0)
    for epoch in range(6):
        assert images[epoch, len(data) - 1]["image"].shape == (3, 64, 64)
    if not usable:
        with pytest.raises(DataError, match=r"thin\.png.*too thin"):
            load_data(replace(config, faults="refuse"), task, "train", 0, print)


@pytest.mark.parametrize("side", [48, 1333])
@pytest.mark.parametrize("augment", [False, True])
def test_boxes_that_vanish_in_float32_do_not_stop_training(
    side: int, augment: bool, shapes: Path
) -> None:
    config = config_of(shapes, augment=augment)
    data = load_data(config, "detection", "train", 0, print)
    record = data._records[0]
    corners = np.linspace(0, side * 0.999, 300)
    widths = 10.0 ** np.linspace(-9, -2, 300)
    boxes = np.stack([corners, corners, widths, widths[::-1]], 1)
    objects = replace(
        record.objects,
        boxes=np.concatenate([boxes, [[1, 1, side / 2, side / 2]]]),
        labels=np.zeros(301, np.int64),
        crowd=np.zeros(301, np.bool_),
        difficult=np.zeros(301, np.bool_),
    )
    data._records[0] = replace(record, objects=objects)
    data.__class__ = type("Large", (type(data),), {"__getitem__": _of_side(side)})
    images = TrainingImages(data, config, 0)
    for epoch in range(4):
        boxes = images[epoch, 0]["target"]["boxes"]
        assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert len(images[0, 0]["target"]["boxes"]) <= 1


def _of_side(side: int) -> Any:
    def getitem(self: Any, index: int) -> Any:
        sample = CocoDetection.__getitem__(self, index)
        return replace(sample, image=np.zeros((side, side, 3), np.uint8))

    return getitem


# Where masks go.


def named(*names: str) -> ImageData[Any, Any]:
    images = [ImageFile(i, name, Path(name), 4, 4) for i, name in enumerate(names, start=1)]

    class Record:
        def __init__(self, image: ImageFile) -> None:
            self.image = image

    return ImageData([Record(image) for image in images], ["a"], [], "skip")


@pytest.mark.parametrize(
    ("names", "files"),
    [
        (["1.jpg", "2.png"], ["1.png", "2.png"]),
        (["1.jpg", "1.png", "2.jpg"], ["1.jpg.png", "1.png.png", "2.png"]),
        (["a/1.jpg", "b/1.jpg"], ["a/1.png", "b/1.png"]),
        (["a\\1.jpg", "b\\1.jpg"], ["a/1.png", "b/1.png"]),
        (["1.jpg", "1.jpg"], ["1.jpg.1.png", "1.jpg.2.png"]),
        (["A.jpg", "a.jpg"], ["A.jpg.1.png", "a.jpg.2.png"]),
        (["1.jpg", "1.png", "1.jpg.png"], ["1.jpg.1.png", "1.png.png", "1.jpg.png.png"]),
        (["a", "a.png/b"], ["a.1.png", "a.png/b.png"]),
        (["./1.jpg", "x"], ["1.png", "x.png"]),
    ],
)
def test_masks_of_different_images_are_different_files(
    names: list[str], files: list[str], tmp_path: Path
) -> None:
    found = mask_files(tmp_path, named(*names), tmp_path / "data")
    assert [str(file.relative_to(tmp_path)) for file in found] == files


@pytest.mark.parametrize(
    "name", ["/etc/x.png", "../x.png", "a/../../x.png", "..\\x.png", "C:\\x.png", "", "a\0b", ".."]
)
def test_no_mask_leaves_its_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="outside"):
        mask_files(tmp_path, named("1.jpg", name), tmp_path / "data")


def test_masks_replace_no_file_of_the_data_and_follow_no_link(tmp_path: Path) -> None:
    data, masks = tmp_path / "data", tmp_path / "masks"
    for folder in (data, masks):
        folder.mkdir()
        (folder / "1.png").touch()
    with pytest.raises(UsageError, match="holds images, beside which no mask is written"):
        mask_files(data, named("1.png"), data)
    assert mask_files(masks, named("1.png"), data) == [masks / "1.png"]
    for folder, name in ((data, "2.jpg"), (data, "new/2.jpg"), (tmp_path, "data/2.jpg")):
        with pytest.raises(UsageError, match="holds images, beside which no mask is written"):
            mask_files(folder, named(name), data)
    assert mask_files(data / "new", named("1.png"), data) == [data / "new/1.png"]
    (masks / "1.png").unlink()
    (masks / "1.png").symlink_to(data / "1.png")
    with pytest.raises(UsageError, match="is a link"):
        mask_files(masks, named("1.png"), data)
    (masks / "train").symlink_to(data)
    with pytest.raises(UsageError, match="is a link"):
        mask_files(masks, named("train/2.png"), data)


# Conversion for Ultralytics.


@pytest.fixture
def strange(tmp_path: Path) -> Path:
    """Images of strange names, and objects whose flags are text; one image is not of the data."""
    root = tmp_path / "data"
    (root / "train/a").mkdir(parents=True)
    (root / "annotations").mkdir()
    photo = Image.new("RGB", (64, 64))
    photo.save(tmp_path / "photo.png")
    names = ["1.png", "a\\2.png", "../../photo.png", str(tmp_path / "photo.png")]
    for name in ("1.png", "a/2.png"):
        photo.save(root / "train" / name)
    sound = {"category_id": 1, "bbox": [2, 2, 8, 8], "iscrowd": "0"}
    changes: list[dict[str, Any]] = [
        {},
        {"bbox": ["4", "4", "8", "8"]},
        {"iscrowd": "1"},
        {"ignore": 1},
        {"iscrowd": "maybe"},
        {"bbox": "1234"},
        {"bbox": [True, True, 8, 8]},
    ]
    annotations: list[dict[str, Any]] = [{**sound, **change, "image_id": 1} for change in changes]
    annotations += [{**sound, "image_id": number} for number in (2, 3, 4)]
    images = [
        {"id": number, "file_name": name, "width": 64, "height": 64}
        for number, name in enumerate(names, start=1)
    ]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}
    (root / "annotations/instances_train.json").write_text(json.dumps(content))
    return root


def test_the_converter_stays_in_its_folder_and_reads_flags_as_text(
    strange: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ultralytics")
    place = strange.parent
    before = {file: file.read_bytes() for file in place.rglob("*") if file.is_file()}
    output = place / "output"
    options = [f"--data={strange}", f"--output={output}", "--copy=true"]
    monkeypatch.setattr("sys.argv", ["coco_to_yolo.py", *options])
    coco_to_yolo.main()
    said = capsys.readouterr().out
    assert "2 x file_name is not a path inside of the folder of the images" in said
    assert "1 x iscrowd is neither 0 nor 1" in said
    assert "2 x bbox is not four finite numbers" in said
    there = {str(file.relative_to(output)) for file in output.rglob("*") if file.is_file()}
    assert {name for name in there if not name.endswith(".cache")} == {
        "data.yaml",
        *("images/train/1.png", "images/train/a/2.png"),
        *("labels/train/1.txt", "labels/train/a/2.txt"),
    }
    assert len((output / "labels/train/1.txt").read_text().splitlines()) == 2
    outside = [file for file in place.rglob("*") if file.is_file() and output not in file.parents]
    assert {file: file.read_bytes() for file in outside} == before
