"""The synthetic data set: deterministic, in COCO's format, and drawn where it says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from common.shapes import CLASSES, make_shapes
from detseg_losses.integrations.coco import (
    CocoDetection,
    CocoSegmentation,
    coco_splits,
    find_coco,
    load_annotations,
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    return make_shapes(root, number=40, validation=10, size=96, seed=1)


def files(directory: Path) -> dict[str, bytes]:
    return {
        str(f.relative_to(directory)): f.read_bytes() for f in directory.rglob("*") if f.is_file()
    }


def test_it_reads_as_coco_without_fault(directory: Path) -> None:
    assert coco_splits(directory) == ["train", "val"]
    for split, number in (("train", 40), ("val", 10)):
        data = CocoDetection(*find_coco(directory, split), faulty="refuse")
        assert len(data) == number
        assert tuple(data.classes) == CLASSES
        masks = CocoSegmentation(*find_coco(directory, split), faulty="refuse")
        assert masks[0].mask.shape == data[0].image.shape[:2] == (96, 96)
    truth = data.ground_truth()["annotations"]
    assert min(min(a["bbox"][2:]) for a in truth) > 12
    assert {a["category_id"] for a in truth} == {1, 2, 3, 4}


def test_boxes_and_areas_belong_to_the_polygons(directory: Path) -> None:
    file, images = find_coco(directory, "train")
    masks = CocoSegmentation(file, images)
    content = load_annotations(file)
    for index in range(10):
        image = masks.images[index].id
        own = [a for a in content["annotations"] if a["image_id"] == image]
        mask = masks[index].mask
        for annotation in own:
            x, y, w, h = annotation["bbox"]
            points = np.array(annotation["segmentation"][0]).reshape(-1, 2)
            np.testing.assert_allclose(points.min(0), [x, y], atol=0.01)
            np.testing.assert_allclose(points.max(0), [x + w, y + h], atol=0.02)
        # little is hidden, so the drawn pixels are nearly the sum of the areas
        assert (mask > 0).sum() == pytest.approx(sum(a["area"] for a in own), rel=0.12)


def test_shapes_are_drawn_where_the_masks_are(directory: Path) -> None:
    """Within a shape the picture has one colour and noise; all around it another."""
    masks = CocoSegmentation(*find_coco(directory, "train"))
    detection = CocoDetection(*find_coco(directory, "train"))
    spreads, differences = [], []
    for index in range(10):
        for box, label in zip(detection[index].boxes, detection[index].labels, strict=True):
            x1, y1, x2, y2 = box.round().astype(int)
            inside = masks[index].mask[y1:y2, x1:x2] == label + 1
            pixels = detection[index].image[y1:y2, x1:x2].astype(float)
            assert inside.mean() > 0.2
            spreads.append(pixels[inside].std(axis=0).max())
            differences.append(np.abs(pixels[inside].mean(0) - pixels[~inside].mean(0)).max())
    # typically: a neighbour of the same class may reach into the box, and colours may be alike
    assert np.median(spreads) < 15
    assert np.median(differences) > 40


def test_equal_parameters_give_equal_bytes(directory: Path, tmp_path: Path) -> None:
    again = make_shapes(tmp_path, number=40, validation=10, size=96, seed=1)
    assert again.name == directory.name
    assert files(again) == files(directory)
    assert [p.name for p in tmp_path.iterdir()] == [again.name]
    before = {f: f.stat().st_mtime_ns for f in again.rglob("*")}
    assert make_shapes(tmp_path, number=40, validation=10, size=96, seed=1) == again
    assert {f: f.stat().st_mtime_ns for f in again.rglob("*")} == before


def test_other_parameters_give_other_directories(directory: Path) -> None:
    root = directory.parent
    less = make_shapes(root, number=5, validation=2, size=96, seed=1)
    other = make_shapes(root, number=5, validation=2, size=96, seed=2)
    small = make_shapes(root, number=5, validation=2, size=48, seed=1)
    assert len({directory, less, other, small}) == 4
    image = "train/000001.png"
    assert (less / image).read_bytes() == (directory / image).read_bytes()
    assert (less / image).read_bytes() != (other / image).read_bytes()
    assert (less / image).read_bytes() != (less / "val/000001.png").read_bytes()
    one = json.loads((small / "annotations/instances_train.json").read_text())["images"][0]
    assert (one["width"], one["height"]) == (48, 48)


def test_a_failed_drawing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("PIL.Image.Image.save", full)
    with pytest.raises(OSError, match="No space left"):
        make_shapes(tmp_path, number=2, validation=1, size=48)
    assert list(tmp_path.iterdir()) == []


def test_impossible_parameters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="smallest size is 48"):
        make_shapes(tmp_path, size=16)
    with pytest.raises(ValueError, match="each part needs one"):
        make_shapes(tmp_path, number=0)
