"""The COCO readers on hand-made and real files, and the metric against pycocotools itself."""

from __future__ import annotations

import contextlib
import copy
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detseg_losses.integrations import coco
from detseg_losses.integrations.coco import (
    CocoDetection,
    CocoSegmentation,
    coco_metrics,
    coco_splits,
    find_coco,
    load_annotations,
    load_results,
    to_results,
)
from detseg_losses.integrations.samples import (
    DataError,
    report_faults,
    select_listed,
    split,
    subset,
)
from detseg_losses.integrations.voc import voc_metrics

NUMBERS = ["AP", "AP50", "AP75", "APs", "APm", "APl"]
NUMBERS += ["AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
Json = dict[str, Any]


def rectangle(x: float, y: float, w: float, h: float) -> list[list[float]]:
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def entry(image: int, category: int, box: list[float], **more: Any) -> Json:
    x, y, w, h = box
    polygon = rectangle(x, y, w, h)
    whole = {"image_id": image, "category_id": category, "bbox": box, "area": w * h}
    return {**whole, "iscrowd": 0, "segmentation": polygon, **more}


def tiny() -> Json:
    """Four images of 40 x 30 pixels; two categories whose ids have a gap and are not sorted."""
    crowd = rle.encode(np.asfortranarray(np.pad(np.ones((10, 10), np.uint8), ((20, 0), (30, 0)))))
    counts = [20 + 30 * 30]
    for _ in range(9):
        counts += [10, 20]
    counts += [10]
    assert rle.area(crowd) == sum(counts[1::2]) == 100
    return {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": 40, "height": 30} for i in (11, 7, 9, 4)
        ],
        "categories": [{"id": 90, "name": "dog"}, {"id": 3, "name": "car"}],
        "annotations": [
            entry(7, 90, [1, 2, 10, 5]),
            entry(7, 3, [0, 0, 20, 20]),
            entry(
                7, 3, [30, 20, 10, 10], iscrowd=1, segmentation={"size": [30, 40], "counts": counts}
            ),
            entry(11, 3, [5, 5, 8, 8]),
            entry(9, 90, [4, 6, 10, 10]),
        ],
    }


def write(root: Path, content: Json) -> tuple[Path, Path]:
    images = root / "images"
    images.mkdir(exist_ok=True)
    for index, image in enumerate(content["images"]):
        picture = np.random.default_rng(index).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(picture).save(images / image["file_name"])
    file = root / "instances.json"
    file.write_text(json.dumps(content))
    return file, images


def test_detection_sample(tmp_path: Path) -> None:
    data = CocoDetection(*write(tmp_path, tiny()))
    assert len(data) == 4
    assert data.names == ["11.png", "7.png", "9.png", "4.png"]
    assert data.classes == ["car", "dog"]
    assert data.category_ids == [3, 90]
    assert data.faults == []
    sample = data[1]
    assert sample.image_id == 7
    expected = np.random.default_rng(1).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    np.testing.assert_array_equal(sample.image, expected)
    np.testing.assert_array_equal(sample.boxes, [[1, 2, 11, 7], [0, 0, 20, 20], [30, 20, 40, 30]])
    np.testing.assert_array_equal(sample.labels, [1, 0, 0])
    np.testing.assert_array_equal(sample.ignored, [False, False, True])
    assert sample.boxes.dtype == np.float32
    assert sample.labels.dtype == np.int64
    assert data[3].boxes.shape == (0, 4)


def test_ground_truth_is_the_file(tmp_path: Path) -> None:
    content = tiny()
    content["annotations"][0]["area"] = 17.5  # a mask's area, not the box's
    truth = CocoDetection(*write(tmp_path, content)).ground_truth()
    assert truth["images"] == content["images"]
    assert truth["categories"] == sorted(content["categories"], key=lambda c: c["id"])

    def facts(annotations: list[Json]) -> list[tuple[Any, ...]]:
        keys = ("image_id", "category_id", "bbox", "area", "iscrowd")
        return sorted(tuple(a[key] for key in keys) for a in annotations)

    assert facts(truth["annotations"]) == facts(content["annotations"])
    assert min(a["id"] for a in truth["annotations"]) == 1


def test_classes_select_images_and_order_labels(tmp_path: Path) -> None:
    place = write(tmp_path, tiny())
    dogs = CocoDetection(*place, classes=["dog"])
    assert dogs.names == ["7.png", "9.png"]
    assert dogs.category_ids == [90]
    np.testing.assert_array_equal(dogs[0].labels, [0])
    assert {a["category_id"] for a in dogs.ground_truth()["annotations"]} == {90}
    assert CocoDetection(*place, classes=["dog", "car"]).category_ids == [90, 3]
    with pytest.raises(DataError, match="no class 'Dogs'; did you mean 'dog'"):
        CocoDetection(*place, classes=["Dogs"])
    with pytest.raises(DataError, match="'dog' is listed twice"):
        CocoDetection(*place, classes=["dog", "dog"])
    with pytest.raises(DataError, match="empty"):
        CocoDetection(*place, classes=[])


@pytest.mark.parametrize(
    ("change", "reason", "kept"),
    [
        ({"bbox": [3, 3, 0, 5]}, "box has no area", False),
        ({"bbox": [3, 3, 4, -1]}, "box has no area", False),
        ({"bbox": [50, 3, 4, 4]}, "box is outside the image", False),
        ({"bbox": [35, 25, 10, 10]}, "box is partly outside the image, clipped", True),
        ({"bbox": [3, 3, float("nan"), 5]}, "bbox is not four finite numbers", False),
        ({"bbox": [3, 3, float("inf"), 5]}, "bbox is not four finite numbers", False),
        ({"bbox": [1e308, 3, 1e308, 5]}, "box is not finite", False),
        ({"bbox": [3, 3, 10**400, 5]}, "bbox is not four finite numbers", False),
        ({"bbox": [3, 3, True, 5]}, "bbox is not four finite numbers", False),
        ({"bbox": [3, 3, "4px", 5]}, "bbox is not four finite numbers", False),
        ({"bbox": [3, 3, 4]}, "bbox is not four finite numbers", False),
        ({"bbox": {"x": 3}}, "bbox is not four finite numbers", False),
        ({"bbox": None}, "bbox is not four finite numbers", False),
        ({"area": float("nan")}, "area is not a number from 0 up, that of the box is taken", True),
        ({"area": -1}, "area is not a number from 0 up, that of the box is taken", True),
        ({"area": "big"}, "area is not a number from 0 up, that of the box is taken", True),
        ({"iscrowd": "maybe"}, "iscrowd is neither 0 nor 1", False),
        ({"iscrowd": float("nan")}, "iscrowd is neither 0 nor 1", False),
        ({"iscrowd": -1}, "iscrowd is neither 0 nor 1", False),
        ({"iscrowd": [0]}, "iscrowd is neither 0 nor 1", False),
        ({"ignore": 2}, "ignore is neither 0 nor 1", False),
        ({"category_id": "3"}, "category id is not among the file's categories", False),
        ({"category_id": True}, "category id is not among the file's categories", False),
        ({"category_id": [3]}, "category id is not among the file's categories", False),
        ({"image_id": "9"}, "image id is not among the file's images", False),
        ({"image_id": {"id": 9}}, "image id is not among the file's images", False),
        ({"image_id": None}, "image id is not among the file's images", False),
        ({"image_id": 10**400}, "image id is not among the file's images", False),
        ({"category_id": 4}, "category id is not among the file's categories", False),
        ({"image_id": 99}, "image id is not among the file's images", False),
    ],
)
def test_faulty_annotation(tmp_path: Path, change: Json, reason: str, kept: bool) -> None:
    content = tiny()
    content["annotations"].insert(2, {**entry(9, 3, [3, 3, 5, 5]), **change})
    place = write(tmp_path, content)
    data = CocoDetection(*place)
    (fault,) = data.faults
    assert (fault.file, fault.index, fault.reason) == (place[0], 2, reason)
    assert f"{place[0]}, entry 2: {reason}" in report_faults(data.faults)
    assert f"1 x {reason}" in report_faults(data.faults)
    assert len(data[2].boxes) == 1 + kept
    with pytest.raises(DataError, match="entry 2: "):
        CocoDetection(*place, faulty="refuse")


def test_boxes_are_clipped_and_rounding_is_no_fault(tmp_path: Path) -> None:
    content = tiny()
    content["annotations"] = [
        entry(9, 3, [-5, 20, 15, 20], area=77.0),
        entry(9, 3, [30.5, 0, 10, 30.4]),
    ]
    data = CocoDetection(*write(tmp_path, content))
    assert [fault.index for fault in data.faults] == [0]
    np.testing.assert_array_equal(data[2].boxes, [[0, 20, 10, 30], [30.5, 0, 40, 30]])
    assert [a["bbox"] for a in data.ground_truth()["annotations"]] == [
        [0, 20, 10, 10],
        [30.5, 0, 9.5, 30],
    ]
    assert data.ground_truth()["annotations"][0]["area"] == 77.0


def save_grey16(file: Path) -> None:
    Image.fromarray(np.zeros((30, 40), np.uint16)).save(file)


@pytest.mark.parametrize("reader", [CocoDetection, CocoSegmentation])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (Path.unlink, "image is missing"),
        (lambda f: f.write_text("this is no image"), "image is broken"),
        (lambda f: f.write_bytes(b""), "image is broken"),
        (lambda f: f.write_bytes(f.read_bytes()[:2000]), "image is broken"),
        (lambda f: Image.new("RGB", (41, 30)).save(f), "image is not of the size that"),
    ],
    ids=["missing", "text", "empty", "truncated", "size"],
)
def test_faulty_image(
    tmp_path: Path, reader: Any, damage: Callable[[Path], object], reason: str
) -> None:
    file, images = write(tmp_path, tiny())
    damage(images / "9.png")
    data = reader(file, images)
    (fault,) = data.faults
    assert fault.reason.startswith(reason)
    assert "9.png" in str(fault)
    assert data.names == ["11.png", "7.png", "4.png"]
    with pytest.raises(DataError, match=r"9\.png"):
        reader(file, images, faulty="refuse")


def test_truncated_jpeg_is_found_and_trailing_bytes_are_fine(tmp_path: Path) -> None:
    content = tiny()
    for image in content["images"]:
        image["file_name"] = f"{image['id']}.jpg"
    file, images = write(tmp_path, content)
    whole = (images / "9.jpg").read_bytes()
    (images / "9.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    (images / "7.jpg").write_bytes((images / "7.jpg").read_bytes() + b"\0" * 16)
    data = CocoDetection(file, images)
    assert [fault.reason for fault in data.faults] == ["image is broken"]
    assert data.names == ["11.jpg", "7.jpg", "4.jpg"]


def test_damage_inside_an_image_is_named_when_it_is_read(tmp_path: Path) -> None:
    file, images = write(tmp_path, tiny())
    data = CocoDetection(file, images)
    content = bytearray((images / "9.png").read_bytes())
    content[200:260] = bytes(60)
    (images / "9.png").write_bytes(content)
    with pytest.raises(DataError, match=r"9\.png: cannot be decoded"):
        data[2]
    save_grey16(images / "9.png")
    with pytest.raises(DataError, match=r"9\.png: has more than 8 bits"):
        data[2]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1"])
def test_other_colour_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    file, images = write(tmp_path, tiny())
    picture = Image.open(images / "9.png").convert(mode)
    picture.save(images / "9.png")
    image = CocoDetection(file, images)[2].image
    assert image.shape == (30, 40, 3)
    np.testing.assert_array_equal(image, np.array(picture.convert("RGB")))


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    file, images = write(tmp_path, tiny())
    for image in images.iterdir():
        image.unlink()
    with pytest.raises(DataError, match="no usable image is left: 4 faults: 4 x image is missing"):
        CocoDetection(file, images)


def test_faulty_must_be_skip_or_refuse(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'refues'"):
        CocoDetection(*write(tmp_path, tiny()), faulty="refues")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "is a list, as results files are"),
        ('{"images": []}', "no list of categories"),
        ("null", "is None; an annotation file has images"),
        ("7", "is 7; an annotation file has images"),
        ("[" * 100_000, "nested too deeply"),
        (
            '{"images": [{"id": null}]}',
            r"images\[0\] has id = None; make it an integer or a string",
        ),
        ('{"images": [{"id": true}]}', r"images\[0\] has id = True; make it"),
        ('{"images": [{"id": [1]}]}', r"images\[0\] has id = \[1\]; make it"),
        ('{"images": [{"id": 1.5}]}', r"images\[0\] has id = 1.5; make it"),
        ('{"images": [{"id": NaN}]}', r"images\[0\] has id = nan; make it"),
        ('{"images": [{"id": 1}, {"id": 1.0}]}', r"images\[1\] repeats the id 1"),
        ('{"images": [], "categories": [{"id": 1, "name": 5}]}', r"categories\[0\] has name = 5"),
        (
            '{"images": [], "categories": [{"id": 1, "name": "\\ud800"}]}',
            r"categories\[0\] has name = '\\ud800'; make it a string",
        ),
        (
            '{"images": [], "categories": [], "annotations": [[]]}',
            r"annotations\[0\] is \[\] and not an object",
        ),
        ('{"images": [3]}', r"images\[0\] is 3 and not an object"),
        (
            '{"images": [], "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}',
            r"categories\[1\] repeats the id 1",
        ),
    ],
)
def test_wrong_annotation_file(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "wrong.json"
    file.write_text(text)
    with pytest.raises(DataError, match=rf"wrong\.json: .*{message}"):
        load_annotations(file)
    with pytest.raises(DataError, match=r"absent\.json: cannot be read \(No such"):
        load_annotations(tmp_path / "absent.json")
    with pytest.raises(DataError) as folder:
        load_results(tmp_path)
    assert str(folder.value) == f"{tmp_path}: cannot be read (is a folder, not a file)"


def test_repeated_category_names_are_told_apart(tmp_path: Path) -> None:
    content = tiny()
    content["categories"].append({"id": 91, "name": "dog"})
    data = CocoDetection(*write(tmp_path, content))
    assert data.classes == ["car", "dog#90", "dog#91"]
    assert len(coco_metrics(content, [])["per_class"]) == 3


def test_masks_show_the_smaller_instance_and_crowds_as_void(tmp_path: Path) -> None:
    content = tiny()
    content["annotations"].append(entry(7, 90, [35, 25, 5, 5]))  # in the crowd
    content["annotations"].reverse()  # the order in the file must not matter
    data = CocoSegmentation(*write(tmp_path, content))
    assert data.classes == ["background", "car", "dog"]
    expected = np.zeros((30, 40), np.uint8)
    expected[:20, :20] = 1
    expected[2:7, 1:11] = 2
    expected[20:, 30:] = 255
    expected[25:, 35:] = 2
    sample = data[1]
    assert (sample.name, sample.image_id) == ("7.png", 7)
    np.testing.assert_array_equal(sample.mask, expected)
    assert sample.mask.dtype == np.uint8
    assert not data[3].mask.any()

    cars = CocoSegmentation(*write(tmp_path, content), classes=["car"])
    assert cars.names == ["11.png", "7.png"]
    expected[expected == 2] = 0
    expected[:20, :20] = 1
    expected[20:, 30:] = 255
    np.testing.assert_array_equal(cars[1].mask, expected)


NO_POLYGON = "part of a polygon is not three or more points x, y of finite numbers, dropped"


def runs(*counts: Any) -> Json:
    return {"size": [30, 40], "counts": list(counts)}


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ([], "object has no segmentation"),
        (None, "object has no segmentation"),
        (7, "object has no segmentation"),
        ("polygon", "object has no segmentation"),
        ([[1, 2, 3, 4]], NO_POLYGON),
        ([[1, 2, 3, 4, 5, 6, 7]], NO_POLYGON),
        ([[5, 5, 9, 5, 9, float("nan")]], NO_POLYGON),
        ([[5, 5, 9, 5, 9, float("inf")]], NO_POLYGON),
        ([[5, 5, 9, 5, 9, None]], NO_POLYGON),
        ([5, 5, 9, 5, 9, 9], "polygon is a flat list of numbers; put it into a list"),
        ([5, "5", 9, 5, float("nan"), 9], "polygon is a flat list of numbers; put it into a list"),
        ([[[5, 5], [9, 5], [9, 9]]], NO_POLYGON),
        ([[5, 5, 1e7, 5, 9, 9]], "part of a polygon reaches far beyond the image, dropped"),
        ([[5, 5, 9, 5, 9, -1e300]], "part of a polygon reaches far beyond the image, dropped"),
        (
            [[0, 0, 400, 0] * 5000],
            "part of a polygon is longer than any outline in the image, dropped",
        ),
        ([[5, 5, 9, 9, 12, 12]], "part of a polygon draws nothing, dropped"),
        ([[50, 5, 60, 5, 60, 15]], "part of a polygon draws nothing, dropped"),
        ({}, "RLE is not of the image's size"),
        ({"size": [40, 30], "counts": [1200]}, "RLE is not of the image's size"),
        ({"size": None, "counts": [1200]}, "RLE is not of the image's size"),
        (runs(10, 10), "RLE ends before the image does"),
        (runs(10, 10, 10), "RLE ends before the image does"),
        (runs(10, 1191), "RLE is longer than the image"),
        (runs(10, 2**70), "RLE is longer than the image"),
        (runs(1200), "RLE draws nothing"),
        (runs(10, -10, 1200), "RLE has no valid counts"),
        (runs(), "RLE has no valid counts"),
        (runs(10.0, 10, 1180), "RLE has no valid counts"),
        (runs("10", 10, 1180), "RLE has no valid counts"),
        (runs(True, 10, 1189), "RLE has no valid counts"),
        (runs(None), "RLE has no valid counts"),
        ({"size": [30, 40], "counts": None}, "RLE has no valid counts"),
        ({"size": [30, 40], "counts": 1200}, "RLE has no valid counts"),
        ({"size": [30, 40]}, "RLE has no valid counts"),
        ({"size": [30, 40], "counts": ""}, "RLE has no valid counts"),
        ({"size": [30, 40], "counts": "not a string of counts"}, "RLE has no valid counts"),
        ({"size": [30, 40], "counts": "\u20ac"}, "RLE has no valid counts"),
        ({"size": [30, 40], "counts": "o" * 50 + "0"}, "RLE has no valid counts"),
        ({"size": [30, 40], "counts": "`"}, "RLE has no valid counts"),
        ({"size": [30, 40], "counts": "::"}, "RLE ends before the image does"),
    ],
)
def test_faulty_segmentation_is_dropped_and_its_box_is_void(
    tmp_path: Path, segmentation: Any, reason: str
) -> None:
    content = tiny()
    content["annotations"][3]["segmentation"] = segmentation
    place = write(tmp_path, content)
    data = CocoSegmentation(*place)
    assert [(fault.index, fault.reason) for fault in data.faults] == [(3, reason)]
    expected = np.zeros((30, 40), np.uint8)
    expected[5:13, 5:13] = 255
    np.testing.assert_array_equal(data[0].mask, expected)
    masks = CocoDetection(*place, extra="masks")
    assert [(fault.index, fault.reason) for fault in masks.faults] == [(3, reason)]
    assert len(masks[0].boxes) == 0
    with pytest.raises(DataError, match="entry 3: "):
        CocoSegmentation(*place, faulty="refuse")


NO_PLACE = "object has neither outline nor box in the image; none of its pixels are void"


@pytest.mark.parametrize("bbox", [None, [], [5, 5, float("nan"), 8], [5, 5, 0, 0]])
@pytest.mark.parametrize(
    ("segmentation", "box"),
    [
        ([[5, 5, 13, 5, 13, 13, float("nan"), 9]], (5, 5, 13, 13)),
        ([[5, 5], [13, 13]], (5, 5, 13, 13)),
        ([5, 5, 13, 5, 13, 13], (5, 5, 13, 13)),
        ([[35, 25, 1e9, 25, 1e9, 1e9]], (35, 25, 40, 30)),
        ([[None, 5, "a", 5]], None),
        ([[50, 5, 60, 5, 60, 15]], None),
        (runs(10, 10), None),
        (None, None),
    ],
)
def test_without_a_box_that_of_the_finite_points_is_void(
    tmp_path: Path, bbox: Any, segmentation: Any, box: tuple[int, int, int, int] | None
) -> None:
    content = tiny()
    content["annotations"][3] |= {"bbox": bbox, "area": None, "segmentation": segmentation}
    data = CocoSegmentation(*write(tmp_path, content))
    expected = np.zeros((30, 40), np.uint8)
    if box:
        expected[box[1] : box[3], box[0] : box[2]] = 255
    np.testing.assert_array_equal(data[0].mask, expected)
    assert [fault.index for fault in data.faults] == [3] * len(data.faults)
    assert (NO_PLACE in [fault.reason for fault in data.faults]) == (box is None)


def test_bad_parts_of_a_polygon_leave_the_others(tmp_path: Path) -> None:
    content = tiny()
    good = [["5", "5", "13", "5", "13", "13", "5", "13"]]  # text, as some converters write it
    bad = [[1, 2, 3, 4], [1, 2, float("nan"), 4, 5, 6], [0, 0, 1e9, 0, 1e9, 1e9]]
    content["annotations"][3]["segmentation"] = bad[:2] + good + bad[2:]
    place = write(tmp_path, content)
    data = CocoSegmentation(*place)
    assert [fault.index for fault in data.faults] == [3, 3, 3]
    expected = np.zeros((30, 40), np.uint8)
    expected[5:13, 5:13] = 1
    np.testing.assert_array_equal(data[0].mask, expected)
    masks = CocoDetection(*place, extra="masks")[0].masks
    assert masks is not None
    np.testing.assert_array_equal(masks[0], expected)


@pytest.mark.parametrize("category", [4, "3", None, [3], True, 3.5])
@pytest.mark.parametrize("classes", [None, ["car"], ["dog"]])
def test_an_object_of_unknown_category_is_void(
    tmp_path: Path, classes: list[str] | None, category: Any
) -> None:
    content = tiny()
    content["annotations"] += [
        entry(7, category, [20, 2, 10, 5]),
        entry(7, category, [0, 22, 10, 5], segmentation=None),
        entry(7, category, [5, 5, 10, 5]),  # lies under a known object
        entry(4, category, [5, 5, 10, 5]),  # alone in its image
    ]
    place = write(tmp_path, content)
    data = CocoSegmentation(*place, classes=classes)
    reason = "category id is not among the file's categories"
    found = [fault.index for fault in data.faults if fault.reason == reason]
    assert found == [5, 6, 7, 8]
    car, dog = {None: (1, 2), "car": (1, None), "dog": (None, 1)}[classes and classes[0]]
    expected = np.zeros((30, 40), np.uint8)
    expected[2:7, 20:30] = expected[22:27, :10] = expected[5:10, 5:15] = 255
    if car:
        expected[20:, 30:] = 255
        expected[:20, :20] = car
    if dog:
        expected[2:7, 1:11] = dog
    np.testing.assert_array_equal(data[data.names.index("7.png")].mask, expected)
    assert ("4.png" in data.names) == (classes is None)
    assert len(CocoDetection(*place, classes=classes).faults) == 4


def test_an_object_without_outline_lies_under_the_others(tmp_path: Path) -> None:
    content = tiny()
    content["annotations"][1]["segmentation"] = [[1, 2]]
    mask = CocoSegmentation(*write(tmp_path, content))[1].mask
    expected = np.zeros((30, 40), np.uint8)
    expected[:20, :20] = 255
    expected[2:7, 1:11] = 2
    expected[20:, 30:] = 255
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_missing_last_run_of_background_is_added(tmp_path: Path, compressed: bool) -> None:
    counts = [5 * 30 + 5, *[8, 22] * 7, 8]
    segmentation: Json = runs(*counts)
    if compressed:
        segmentation = dict(rle.frPyObjects({"size": [30, 40], "counts": counts}, 30, 40))
        segmentation["counts"] = segmentation["counts"].decode()
    content = tiny()
    content["annotations"][3]["segmentation"] = segmentation
    place = write(tmp_path, content)
    data = CocoSegmentation(*place)
    assert data.faults == []
    expected = np.zeros((30, 40), np.uint8)
    expected[5:13, 5:13] = 1
    np.testing.assert_array_equal(data[0].mask, expected)
    # the box tells such a file from one that has lost runs
    content["annotations"][3]["segmentation"] = runs(*counts[:6])
    assert len(CocoSegmentation(*write(tmp_path, content)).faults) == 1


@pytest.mark.parametrize(
    ("stated", "lost"),
    [
        ({"bbox": [10, 10, 4, 4], "area": 16}, True),
        ({"bbox": [10, 10, 4, 4], "area": None}, True),
        ({"bbox": [10, 10, 2, 4], "area": 16}, True),
        ({"bbox": None, "area": 16}, True),
        ({"bbox": None, "area": None}, True),
        ({"bbox": [10, 10, 2, 4], "area": 8}, False),
        ({"bbox": [10, 10, 1, 3], "area": 8}, False),  # from the first to the last pixel
        ({"bbox": [10, 10, 2, 4], "area": None}, False),
        ({"bbox": None, "area": 8}, False),
    ],
)
def test_lost_runs_of_a_small_object_are_a_fault(tmp_path: Path, stated: Json, lost: bool) -> None:
    content = tiny()
    counts = [10 * 30 + 10, 4, 26, 4]  # columns 10 and 11
    content["annotations"][3] |= {"segmentation": runs(*counts), **stated}
    faults = CocoSegmentation(*write(tmp_path, content)).faults
    assert ("RLE ends before the image does" in [fault.reason for fault in faults]) == lost


def test_compressed_runs_are_those_of_pycocotools() -> None:
    random = np.random.default_rng(0)
    for size in (3, 30, 300):
        for share in (0.01, 0.5, 0.99):
            mask = np.asfortranarray(random.random((size, size + 1)) < share, np.uint8)
            mask[0, 0] = size == 3
            flat = mask.ravel(order="F")
            changes = np.flatnonzero(np.diff(flat, prepend=0, append=2))
            expected = np.diff(changes, prepend=0).tolist()
            assert coco._decompress(rle.encode(mask)["counts"]) == expected


@pytest.mark.parametrize("value", ["0", 0.0, False, None, "false", ""])
@pytest.mark.parametrize("key", ["iscrowd", "ignore", "difficult"])
def test_flags_as_text_or_null_are_read(tmp_path: Path, key: str, value: Any) -> None:
    content = tiny()
    content["annotations"][3][key] = value
    place = write(tmp_path, content)
    assert CocoDetection(*place)[0].ignored.tolist() == [False]
    assert CocoSegmentation(*place)[0].mask[6, 6] == 1
    content["annotations"][3][key] = "1"
    place = write(tmp_path, content)
    assert CocoDetection(*place)[0].ignored.tolist() == [True]
    assert CocoSegmentation(*place)[0].mask[6, 6] == 255


def test_numbers_as_text_and_ids_as_text_are_read(tmp_path: Path) -> None:
    content = tiny()
    expected = CocoDetection(*write(tmp_path, content)).ground_truth()
    for image in content["images"]:
        image |= {"id": str(image["id"]), "width": "40", "height": "30.0"}
    for annotation in content["annotations"]:
        annotation["image_id"] = str(annotation["image_id"])
        annotation["category_id"] = float(annotation["category_id"])
        annotation["bbox"] = [str(value) for value in annotation["bbox"]]
        annotation["area"] = str(annotation["area"])
    data = CocoDetection(*write(tmp_path, content), faulty="refuse")
    truth = data.ground_truth()
    assert [image["id"] for image in truth["images"]] == ["11", "7", "9", "4"]
    for mine, other in zip(truth["annotations"], expected["annotations"], strict=True):
        assert mine == {**other, "image_id": str(other["image_id"])}
    results = [{**a, "score": "0.5"} for a in truth["annotations"]]
    assert coco_metrics(truth, results)["AP"] == pytest.approx(1)


def test_paths_may_be_text(tmp_path: Path) -> None:
    file, images = map(str, write(tmp_path, tiny()))
    assert CocoDetection(file, images).names == CocoSegmentation(file, images).names


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_annotations_with_a_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    file, images = write(tmp_path, tiny())
    file.write_text(json.dumps(tiny(), ensure_ascii=False), encoding=encoding)
    assert len(CocoDetection(file, images)) == 4


@pytest.mark.parametrize(
    "name",
    ["../9.png", "/etc/passwd", "a/../../9.png", "..\\9.png", "C:\\9.png", "\\\\host\\9.png",
     "", ".", "9.png\0", "\ud800.png", None, 9, ["9.png"]],
)  # fmt: skip
@pytest.mark.parametrize("reader", [CocoDetection, CocoSegmentation])
def test_names_that_lead_outside_are_faults(tmp_path: Path, reader: Any, name: Any) -> None:
    content = tiny()
    file, images = write(tmp_path, content)
    Image.new("RGB", (40, 30)).save(tmp_path / "9.png")
    content["images"][2]["file_name"] = name
    file.write_text(json.dumps(content))
    data = reader(file, images)
    (fault,) = data.faults
    reason = "file_name is not a path inside of the folder of the images"
    assert (fault.file, fault.index, fault.reason) == (file, 2, reason)
    str(fault).encode()
    assert data.names == ["11.png", "7.png", "4.png"]


@pytest.mark.parametrize(
    "name", ["part\\9.png", "./part/9.png", "images/part/9.png", "root/images/part/9.png"]
)
def test_names_of_other_systems_and_with_the_folder_in_front(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    content = tiny()
    file, images = write(root, content)
    (images / "part").mkdir()
    (images / "9.png").rename(images / "part" / "9.png")
    content["images"][2]["file_name"] = name
    file.write_text(json.dumps(content))
    data = CocoDetection(file, images, faulty="refuse")
    assert data.images[2].path == images / "part" / "9.png"
    assert not {"..", ".", "\\"} & set(data.names[2].split("/"))


@pytest.mark.parametrize(
    "stated", [{"width": 0}, {"width": "wide"}, {"height": None}, {"height": True}]
)
def test_image_entries_without_a_size(tmp_path: Path, stated: Json) -> None:
    content = tiny()
    content["images"][2] |= stated
    data = CocoDetection(*write(tmp_path, content))
    (fault,) = data.faults
    assert (fault.index, fault.reason) == (
        2,
        "width and height of the image are not positive numbers",
    )
    del content["images"][2]["width"], content["images"][2]["height"]
    data = CocoDetection(*write(tmp_path, content), faulty="refuse")
    assert (data.images[2].width, data.images[2].height) == (40, 30)


@pytest.mark.parametrize("name", ["../../x", "..", "", "/etc", "a\0b", "\ud800"])
def test_odd_names_of_splits(tmp_path: Path, name: str) -> None:
    (tmp_path / "root" / "annotations").mkdir(parents=True)
    (tmp_path / "root" / "annotations" / "instances_...json").touch()
    with pytest.raises(DataError, match="splits found: none"):
        find_coco(tmp_path / "root", name)
    assert coco_splits(tmp_path / "root") == []


def test_find_coco_knows_the_usual_layouts(tmp_path: Path) -> None:
    annotations = tmp_path / "annotations"
    annotations.mkdir()
    for name in ("train2017", "val2017", "minival"):
        (annotations / f"instances_{name}.json").touch()
    (tmp_path / "train2017").mkdir()
    (tmp_path / "images" / "val2017").mkdir(parents=True)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "_annotations.coco.json").touch()
    train = (annotations / "instances_train2017.json", tmp_path / "train2017")
    assert find_coco(tmp_path, "train2017") == train
    assert find_coco(tmp_path, "train") == train
    assert find_coco(tmp_path, "val")[1] == tmp_path / "images" / "val2017"
    assert find_coco(tmp_path, "minival")[1] == tmp_path / "images"
    assert find_coco(tmp_path, "test")[1] == tmp_path / "test"
    assert coco_splits(tmp_path) == ["minival", "test", "train2017", "val2017"]
    with pytest.raises(DataError, match="splits found: minival, test, train2017, val2017"):
        find_coco(tmp_path, "valid")
    (tmp_path / "images" / "val2017").rmdir()
    (tmp_path / "images").rmdir()
    with pytest.raises(DataError, match="none of these directories exists"):
        find_coco(tmp_path, "val2017")
    (annotations / "instances_train2014.json").touch()
    with pytest.raises(DataError, match="splits found"):
        find_coco(tmp_path, "train")


@pytest.fixture
def many(tmp_path: Path) -> CocoDetection:
    content: Json = {
        "images": [
            {"id": i, "file_name": f"part/{i:03d}.png", "width": 8, "height": 8} for i in range(50)
        ],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [],
    }
    (tmp_path / "part").mkdir()
    for image in content["images"]:
        Image.new("RGB", (8, 8)).save(tmp_path / image["file_name"])
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(content))
    return CocoDetection(file, tmp_path)


def test_subset_and_split(many: CocoDetection) -> None:
    ten, twenty = subset(many, 10, seed=3), subset(many, 20, seed=3)
    assert isinstance(ten, CocoDetection)
    assert len(ten) == 10
    assert ten.names == sorted(ten.names)
    assert set(ten.names) < set(twenty.names)
    assert ten.names == subset(many, 10, seed=3).names != subset(many, 10, seed=4).names
    assert len(ten.ground_truth()["images"]) == 10
    assert len(subset(many, 1000, seed=0)) == 50
    train, val = split(many, 0.2, seed=1)
    assert (len(train), len(val)) == (40, 10)
    assert sorted(train.names + val.names) == many.names
    assert val.names == sorted(val.names) == split(many, 0.2, seed=1)[1].names
    assert len(split(ten.select([0, 1]), 0.01, seed=0)[1]) == 1
    assert len(split(ten.select([0, 1]), 0.99, seed=0)[0]) == 1
    for fraction in (0.0, 1.0):
        with pytest.raises(DataError, match="not between 0 and 1"):
            split(many, fraction, seed=0)
    with pytest.raises(DataError, match="single image"):
        split(many.select([0]), 0.5, seed=0)
    with pytest.raises(DataError, match="subset of 0 images"):
        subset(many, 0, seed=0)


def test_select_listed(many: CocoDetection, tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_text("part/007.png\n\npart/003\n")
    assert select_listed(many, file).names == ["part/003.png", "part/007.png"]
    file.write_text("part/003\npart/99\n")
    with pytest.raises(DataError, match=r"list\.txt, line 2: no usable image is called 'part/99'"):
        select_listed(many, file)
    with pytest.raises(DataError, match=r"absent\.txt"):
        select_listed(many, tmp_path / "absent.txt")


def by_pycocotools(truth: Json, results: list[Json], folder: Path) -> COCOeval:
    """The official way: files on disk, no code of ours."""
    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "results.json").write_text(json.dumps(results))
    official = COCO(str(folder / "truth.json"))
    evaluation = COCOeval(official, official.loadRes(str(folder / "results.json")), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


def imperfect(truth: Json, seed: int) -> list[Json]:
    """Predictions with shifted boxes, wrong classes, misses, duplicates and inventions."""
    random = np.random.default_rng(seed)
    categories = [category["id"] for category in truth["categories"]]
    results = []
    for annotation in truth["annotations"]:
        for _ in range(random.integers(0, 3)):
            box = np.array(annotation["bbox"], float)
            box[:2] += random.normal(0, 0.05, 2) * box[2:]
            box[2:] *= np.exp(random.normal(0, 0.08, 2))
            wrong = random.random() < 0.1
            results.append(
                {
                    "image_id": annotation["image_id"],
                    "category_id": random.choice(categories).item()
                    if wrong
                    else annotation["category_id"],
                    "bbox": box.tolist(),
                    "score": random.random(),
                }
            )
    return results


def real(data_root: Path) -> tuple[Path, Path]:
    return find_coco(data_root / "coco128", "train")


@pytest.mark.parametrize("seed", [0, 1])
def test_metrics_equal_pycocotools(data_root: Path, tmp_path: Path, seed: int) -> None:
    truth = load_annotations(real(data_root)[0])
    results = imperfect(truth, seed)
    before = copy.deepcopy((truth, results))
    metrics = coco_metrics(truth, results)
    assert (truth, results) == before
    expected = by_pycocotools(truth, results, tmp_path)
    assert 0.2 < expected.stats[0] < 0.9
    assert [metrics[name] for name in NUMBERS] == expected.stats.tolist()
    precision = expected.eval["precision"][..., 0, 2]
    for k, category in enumerate(sorted(truth["categories"], key=lambda c: c["id"])):
        mine = metrics["per_class"][category["name"]]
        valid = precision[:, :, k][precision[:, :, k] > -1]
        assert mine == (pytest.approx(valid.mean(), abs=1e-12) if valid.size else None)
    json.dumps(metrics, allow_nan=False)
    # and through the reader, which goes by way of XYXY, labels and selections
    assert coco_metrics(CocoDetection(*real(data_root)).ground_truth(), results) == metrics


def test_real_data(data_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = load_annotations(real(data_root)[0])
    data = CocoDetection(*real(data_root), faulty="refuse")
    truth = data.ground_truth()
    assert len(data) == 128
    assert len(data.classes) == 80
    assert data.category_ids[-1] == 90
    assert len(truth["annotations"]) == 939
    assert sum(a["iscrowd"] for a in truth["annotations"]) == 10
    assert len({a["category_id"] for a in truth["annotations"]}) == 71
    raw: dict[int, list[Json]] = {i["id"]: [] for i in content["images"]}
    for a in content["annotations"]:
        raw[a["image_id"]].append(a)
    results = []
    for sample in data:
        height, width = sample.image.shape[:2]
        assert (sample.boxes >= 0).all()
        assert (sample.boxes <= [width, height, width, height]).all()
        back = to_results(
            sample.image_id,
            torch.from_numpy(sample.boxes),
            torch.ones(len(sample.boxes)),
            torch.from_numpy(sample.labels),
            data.category_ids,
        )
        expected = raw[sample.image_id]
        assert [r["category_id"] for r in back] == [a["category_id"] for a in expected]
        for result, annotation in zip(back, expected, strict=True):
            assert result["bbox"] == pytest.approx(annotation["bbox"], abs=1e-4)
        results += [r for r, crowd in zip(back, sample.ignored, strict=True) if not crowd]
    empty = {sample_id for sample_id, annotations in raw.items() if not annotations}
    assert empty == {250, 508}
    metrics = coco_metrics(truth, results)
    assert metrics["AP"] == pytest.approx(1)
    assert sum(value is None for value in metrics["per_class"].values()) == 9
    assert capsys.readouterr().out == ""


def test_real_masks(data_root: Path) -> None:
    file, images = real(data_root)
    data = CocoSegmentation(file, images, faulty="refuse")
    official = COCO(str(file))
    label = {category: index for index, category in enumerate(sorted(official.cats), start=1)}
    for index in range(0, len(data), 4):
        sample = data[index]
        height, width = sample.mask.shape
        # per pixel the smallest instance that covers it; a crowd counts as larger than any
        smallest = np.full((height, width), np.inf)
        expected = np.zeros((height, width), np.uint8)
        for annotation in official.imgToAnns[sample.image_id]:
            covered = official.annToMask(annotation).astype(bool)
            size = 1e12 if annotation["iscrowd"] else covered.sum()
            wins = covered & (size < smallest)
            smallest[wins] = size
            expected[wins] = 255 if annotation["iscrowd"] else label[annotation["category_id"]]
        np.testing.assert_array_equal(sample.mask, expected)


def test_what_cannot_be_computed_says_why() -> None:
    truth = tiny()
    perfect = [
        {key: a[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9}
        for a in truth["annotations"]
        if not a["iscrowd"]
    ]
    metrics = coco_metrics(truth, perfect)
    assert metrics["AP"] == metrics["APs"] == metrics["per_class"]["dog"] == pytest.approx(1)
    assert metrics["APm"] is metrics["ARl"] is None
    assert any("no medium object" in note for note in metrics["notes"])

    nothing = coco_metrics(truth, [])
    assert nothing["AP"] == 0
    assert any("no prediction" in note for note in nothing["notes"])

    stray = [{**perfect[0], "category_id": 2}, {**perfect[0], "image_id": 1}]
    metrics = coco_metrics(truth, perfect + stray)
    assert metrics["AP"] == pytest.approx(1)
    assert any("category_id (2)" in note for note in metrics["notes"])
    assert any("image_id (1)" in note for note in metrics["notes"])

    truth["categories"].append({"id": 5, "name": "cat"})
    metrics = coco_metrics(truth, perfect)
    assert metrics["AP"] == pytest.approx(1)
    assert metrics["per_class"]["cat"] is None
    assert any("1 classes" in note and "cat" in note for note in metrics["notes"])

    empty = coco_metrics({**truth, "annotations": []}, perfect)
    assert all(empty[name] is None for name in NUMBERS)
    assert any("no ground truth" in note for note in empty["notes"])


def test_ground_truth_without_boxes_is_refused_and_areas_may_be_absent() -> None:
    truth = tiny()
    results = [{**a, "score": 1.0} for a in truth["annotations"] if not a["iscrowd"]]
    del truth["annotations"][0]["area"], truth["annotations"][0]["iscrowd"]
    assert coco_metrics(truth, results)["AP"] == pytest.approx(1)
    del truth["annotations"][3]["bbox"]
    with pytest.raises(DataError, match=r"annotations\[3\] has the bbox None"):
        coco_metrics(truth, results)


@pytest.mark.parametrize("max_dets", [11, 30, 100, 300])
def test_more_or_fewer_detections_equal_pycocotools(max_dets: int) -> None:
    truth, results = crowded(0)
    metrics = coco_metrics(truth, results, max_dets=max_dets)
    official = COCO()
    official.dataset = copy.deepcopy(truth)
    official.createIndex()
    evaluation = COCOeval(official, official.loadRes(copy.deepcopy(results)), "bbox")
    evaluation.params.maxDets = [1, 10, max_dets]
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    precision = evaluation.eval["precision"][..., 0, 2]
    names = [*NUMBERS[:8], f"AR{max_dets}", *NUMBERS[9:]]
    expected = dict(zip(names, evaluation.stats.tolist(), strict=True))
    expected["AP"] = precision[precision > -1].mean()  # pycocotools takes it at 100 or not at all
    assert {name: metrics[name] for name in expected} == expected
    places = Counter((r["image_id"], r["category_id"]) for r in results)
    cut = sum(max(0, number - max_dets) for number in places.values())
    assert any(f"{cut} predictions were left out" in note for note in metrics["notes"]) == (cut > 0)


def crowded(seed: int) -> tuple[Json, list[Json]]:
    """Objects and predictions that overlap in many ways, with equal scores and crowds."""
    random = np.random.default_rng(seed)
    truth: Json = {
        "images": [{"id": image} for image in (3, 1, 2)],
        "categories": [{"id": category, "name": str(category)} for category in (2, 1)],
        "annotations": [],
    }
    results = []
    for number in range(1, 91):
        box = [*random.uniform(0, 300, 2), *random.uniform(10, 150, 2)]
        place = {"image_id": int(random.integers(1, 4)), "category_id": int(random.integers(1, 3))}
        area, crowd = box[2] * box[3], int(random.random() < 0.1)
        truth["annotations"].append(
            {"id": number, **place, "bbox": box, "area": area, "iscrowd": crowd}
        )
        for score in random.random(12):
            near = (np.array(box) * random.normal(1, 0.1, 4)).tolist()
            results.append({**place, "bbox": near, "score": round(float(score), 1)})
    return truth, results


@pytest.mark.parametrize("max_dets", [0, 9, 10.5, True, None, "100"])
def test_max_dets_must_be_an_integer_from_10_up(max_dets: Any) -> None:
    with pytest.raises(DataError, match="take an integer from 10 up"):
        coco_metrics(tiny(), [], max_dets=max_dets)


def perfect_results(truth: Json) -> list[Json]:
    keys = ("image_id", "category_id", "bbox")
    return [{key: a[key] for key in keys} | {"score": 1.0} for a in truth["annotations"]]


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("annotations", {"image_id": [7]}, r"annotations\[1\] has image_id = \[7\]; make it"),
        ("annotations", {"image_id": None}, r"annotations\[1\] has image_id = None; make it"),
        ("annotations", {"category_id": {}}, r"annotations\[1\] has category_id = {}; make it"),
        ("annotations", {"category_id": True}, r"annotations\[1\] has category_id = True; make"),
        ("annotations", {"bbox": None}, r"annotations\[1\] has the bbox None"),
        ("annotations", {"bbox": [0, 0, 5, float("nan")]}, r"annotations\[1\] has the bbox"),
        ("annotations", {"bbox": [0, 0, 5, 10**400]}, r"annotations\[1\] has the bbox"),
        ("annotations", {"bbox": [0, 0, 5, 10**5000]}, r"annotations\[1\] has the bbox"),
        ("annotations", {"iscrowd": "maybe"}, r"annotations\[1\] has iscrowd = 'maybe'; make"),
        ("annotations", {"iscrowd": float("nan")}, r"annotations\[1\] has iscrowd = nan; make"),
        ("annotations", {"ignore": [1]}, r"annotations\[1\] has ignore = \[1\]; make it 0 or 1"),
        ("annotations", {"difficult": -1}, r"annotations\[1\] has difficult = -1; make it"),
        ("images", {"id": None}, r"images\[1\] has id = None; make it"),
        ("images", {"id": 11}, r"images\[1\] repeats the id 11"),
        ("categories", {"id": [3]}, r"categories\[1\] has id = \[3\]; make it"),
        ("categories", {"name": None}, r"categories\[1\] has name = None; make it a string"),
    ],
)
def test_faulty_ground_truth_is_named(section: str, change: Json, message: str) -> None:
    truth = tiny()
    truth[section][1] |= change
    with pytest.raises(DataError, match=f"ground truth: {message}"):
        coco_metrics(truth, perfect_results(tiny()))


@pytest.mark.parametrize("section", ["images", "categories"])
@pytest.mark.parametrize("metrics", [coco_metrics, voc_metrics])
def test_ground_truth_without_images_or_categories(
    section: str, metrics: Callable[[Json, list[Json]], Json]
) -> None:
    with pytest.raises(DataError, match=f"ground truth: there are no {section}"):
        metrics(tiny() | {section: []}, perfect_results(tiny()))


@pytest.mark.parametrize("truth", [None, [], 7, "truth", {}, {"images": 3}])
def test_what_is_no_ground_truth_or_no_results(truth: Any) -> None:
    with pytest.raises(DataError, match="ground truth: "):
        coco_metrics(truth, [])
    with pytest.raises(DataError, match="results: "):
        coco_metrics(tiny(), truth if truth != [] else [truth])


@pytest.mark.parametrize("area", [None, "big", float("nan"), -1, [1], True])
def test_an_area_that_is_none_is_that_of_the_box(tmp_path: Path, area: Any) -> None:
    truth = tiny()
    expected = coco_metrics(truth, perfect_results(truth))
    truth["annotations"][1]["area"] = area
    metrics = coco_metrics(truth, perfect_results(truth))
    notes = metrics.pop("notes")
    assert any("annotations[1]" in note for note in notes) == (area is not None)
    assert metrics == {key: expected[key] for key in metrics}
    data = CocoDetection(*write(tmp_path, truth))
    assert data.ground_truth()["annotations"][2]["area"] == 400
    assert len(data.faults) == (area is not None)


@pytest.mark.parametrize("key", ["ignore", "difficult"])
def test_ignored_objects_count_neither_as_found_nor_as_missed(key: str) -> None:
    truth = tiny()
    truth["annotations"][1][key] = "1"
    results = perfect_results(truth)
    assert coco_metrics(truth, results)["AP"] == pytest.approx(1)
    assert coco_metrics(truth, results[:1] + results[2:])["AP"] == pytest.approx(1)


def test_the_metric_takes_crowds_written_as_text() -> None:
    truth = tiny()
    expected = coco_metrics(truth, perfect_results(truth))
    for annotation in truth["annotations"]:
        annotation["iscrowd"] = str(annotation["iscrowd"])
        annotation["area"] = str(annotation["area"])
        annotation["bbox"] = [str(value) for value in annotation["bbox"]]
    assert coco_metrics(truth, perfect_results(truth)) == expected


def test_what_vanishes_is_noted() -> None:
    truth = tiny()
    results = perfect_results(truth)
    stray = [{**truth["annotations"][0], "image_id": 8}, {**truth["annotations"][0]}]
    stray[1]["category_id"] = "90"
    metrics = coco_metrics({**truth, "annotations": truth["annotations"] + stray}, results)
    assert metrics["AP"] == pytest.approx(1)
    objects = "1 objects of the ground truth were left out: their "
    assert any(note.startswith(objects + "image_id (8)") for note in metrics["notes"])
    assert any(
        note.startswith(objects + "category_id ('90')") and "integers, not text" in note
        for note in metrics["notes"]
    )
    for result in results:
        result["image_id"] = str(result["image_id"])
    (note, _) = coco_metrics(truth, results)["notes"][:2]
    assert "image_id ('7', '11', '9')" in note
    assert "whose ids are integers, not text" in note


def test_ground_truth_needs_no_sizes_and_no_names() -> None:
    truth = tiny()
    truth["images"] = [{"id": image["id"]} for image in truth["images"]]
    assert coco_metrics(truth, perfect_results(truth))["AP"] == pytest.approx(1)


def test_only_pairs_that_overlap_cost_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 80 classes in 300 images, an image has one or two: nothing is done for the others."""
    calls = []
    compare = coco._compare
    monkeypatch.setattr(coco, "_compare", lambda *a: calls.append(1) or compare(*a))
    truth = tiny()
    truth["images"] = [{"id": image} for image in range(300)]
    truth["categories"] = [{"id": category, "name": str(category)} for category in range(80)]
    truth["annotations"] = [entry(i, i % 80, [1, 1, 9, 9]) for i in range(300)]
    assert coco_metrics(truth, perfect_results(truth))["AP"] == pytest.approx(1)
    assert len(calls) == 300


def test_object_with_id_zero_can_be_found() -> None:
    truth = tiny()
    for index, annotation in enumerate(truth["annotations"]):
        annotation["id"] = index
    results = [{**a, "score": 1.0} for a in truth["annotations"] if not a["iscrowd"]]
    assert coco_metrics(truth, results)["AP"] == pytest.approx(1)


def test_difficult_objects_count_neither_as_found_nor_as_missed() -> None:
    truth = {
        "images": [{"id": 1, "file_name": "1.png", "width": 100, "height": 100}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [entry(1, 1, [0, 0, 40, 40]), entry(1, 1, [50, 50, 40, 40], difficult=1)],
    }
    found = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 40, 40], "score": 0.5}
    on_difficult = {**found, "bbox": [50, 50, 40, 40], "score": 0.9}
    assert coco_metrics(truth, [found])["AP"] == pytest.approx(1)
    assert coco_metrics(truth, [found, on_difficult])["AP"] == pytest.approx(1)
    # unlike in a crowd, a small box somewhere inside is a false alarm
    inside = {**on_difficult, "bbox": [55, 55, 10, 10]}
    assert coco_metrics(truth, [found, inside])["AP"] == pytest.approx(0.5)


def test_results_file(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    good = {"image_id": 1, "category_id": 2, "bbox": [0, 1, 2, 3], "score": 0.5}
    file.write_text(json.dumps([good]))
    assert load_results(file) == [good]
    for content, message in (
        ("{", "not valid JSON"),
        (json.dumps(tiny()), "is no list"),
        (json.dumps([good, {"image_id": 1}]), "entry 1 has no 'category_id'"),
        (json.dumps([good, 7]), "entry 1 has no 'image_id'"),
        (json.dumps([{**good, "bbox": [0, 1, 2]}]), r"entry 0 has the bbox \[0, 1, 2\]"),
        (json.dumps([{**good, "score": float("nan")}]), "the score nan"),
        (json.dumps([{**good, "score": "high"}]), "the score 'high'"),
        (json.dumps([{**good, "score": None}]), "the score None"),
        (json.dumps([{**good, "score": True}]), "the score True"),
        (
            json.dumps([{**good, "bbox": [0, 1, 2, None]}]),
            r"entry 0 has the bbox \[0, 1, 2, None\]",
        ),
        (json.dumps([{**good, "bbox": "0 1 2 3"}]), "entry 0 has the bbox '0 1 2 3'"),
        (json.dumps([good, {**good, "image_id": [1]}]), r"entry 1 has image_id = \[1\]; make it"),
        (json.dumps([good, {**good, "category_id": None}]), "entry 1 has category_id = None; make"),
        (json.dumps([{**good, "image_id": True}]), "entry 0 has image_id = True; make it"),
        ("null", "is no list"),
        ("[" * 100_000, "nested too deeply"),
    ):
        file.write_text(content)
        with pytest.raises(DataError, match=rf"results\.json: .*{message}"):
            load_results(file)


def test_a_label_without_category_is_refused() -> None:
    with pytest.raises(ValueError, match="label -1 is outside"):
        to_results(1, torch.zeros(1, 4), torch.ones(1), torch.tensor([-1]), [3, 90])


def test_masks_are_the_polygons_and_the_rle_of_the_file(tmp_path: Path) -> None:
    data = CocoDetection(*write(tmp_path, tiny()), extra="masks")
    sample = data[1]
    assert sample.masks is not None
    assert sample.masks.shape == (3, 30, 40)
    assert sample.masks.dtype == np.uint8
    for mask, (x1, y1, x2, y2) in zip(sample.masks, sample.boxes.astype(int), strict=True):
        expected = np.zeros((30, 40), np.uint8)
        expected[y1:y2, x1:x2] = 1
        np.testing.assert_array_equal(mask, expected)
    empty = data[3].masks
    assert empty is not None
    assert empty.shape == (0, 30, 40)
    assert CocoDetection(*write(tmp_path, tiny()))[1].masks is None


def pointed() -> Json:
    """The same, with two keypoints for each object."""
    content = tiny()
    for number, annotation in enumerate(content["annotations"]):
        annotation["keypoints"] = [number, 1.5, 2, 3, 4, 0]
    for category in content["categories"]:
        category["keypoints"] = ["left_ear", "right_ear"]
    return content


def test_keypoints_are_those_of_the_file(tmp_path: Path) -> None:
    data = CocoDetection(*write(tmp_path, pointed()), extra="keypoints")
    expected = [[[number, 1.5, 2], [3, 4, 0]] for number in range(3)]
    np.testing.assert_array_equal(data[1].keypoints, expected)
    assert data[1].keypoints.dtype == np.float32
    assert data[3].keypoints.shape == (0, 2, 3)
    assert data[1].masks is None
    assert data.mirrored == [1, 0]


@pytest.mark.parametrize(
    ("names", "mirrored"),
    [
        (["nose", "left_eye", "right_eye"], [0, 2, 1]),
        (["left", "middle", "top"], [0, 1, 2]),
        (["left", "right"], [0, 1, 2]),  # not one for each
        (None, [0, 1, 2]),
    ],
)
def test_keypoints_in_a_mirror(
    names: list[str] | None, mirrored: list[int], tmp_path: Path
) -> None:
    content = pointed()
    for annotation in content["annotations"]:
        annotation["keypoints"] += [0, 0, 0]
    for category in content["categories"]:
        category.pop("keypoints")
        category |= {"keypoints": names} if names else {}
    assert CocoDetection(*write(tmp_path, content), extra="keypoints").mirrored == mirrored


def test_objects_without_what_is_to_be_learned_are_faults(tmp_path: Path) -> None:
    content = pointed()
    del content["annotations"][0]["keypoints"], content["annotations"][1]["segmentation"]
    content["annotations"][3]["keypoints"] = [1, 2]
    masks = CocoDetection(*write(tmp_path, content), extra="masks")
    assert [fault.reason for fault in masks.faults] == ["object has no segmentation"]
    assert len(masks[1].boxes) == 2
    points = CocoDetection(*write(tmp_path, content), extra="keypoints")
    assert sorted(fault.reason for fault in points.faults) == [
        "keypoints are not finite numbers x, y, v of each",
        "object has no keypoints",
    ]
    with pytest.raises(DataError, match="there is no object with keypoints"):
        CocoDetection(*write(tmp_path, tiny()), extra="keypoints")
    content["annotations"][3]["keypoints"] = [1, 2, 2]
    with pytest.raises(DataError, match="objects have 1 or 2 keypoints; choose classes"):
        CocoDetection(*write(tmp_path, content), extra="keypoints")


def test_keypoints_have_files_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    (tmp_path / "annotations").mkdir()
    for name in ("instances_val", "person_keypoints_val", "person_keypoints_train"):
        (tmp_path / f"annotations/{name}.json").touch()
    assert find_coco(tmp_path, "val")[0].name == "instances_val.json"
    assert find_coco(tmp_path, "val", "masks")[0].name == "instances_val.json"
    assert find_coco(tmp_path, "val", "keypoints")[0].name == "person_keypoints_val.json"
    assert coco_splits(tmp_path) == ["val"]
    assert coco_splits(tmp_path, "keypoints") == ["train", "val"]


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 100)
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.text(max_size=5)
    | st.sampled_from(["0", "1", "7", "3.0", "1e9", "../7.png", "images/7.png", "nan", "\ud800"])
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=7) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=12,
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container and key below a JSON value."""
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    found = []
    for key in keys:
        found += [(value, key), *places(value[key])]
    return found


@st.composite
def mutated(draw: st.DrawFn, whole: Callable[[], Any]) -> Any:
    """A valid content in which one to three things have been replaced, dropped or doubled."""
    content = whole()
    for _ in range(draw(st.integers(1, 3))):
        container, key = draw(st.sampled_from(places(content)))
        action = draw(st.sampled_from(["replace", "drop", "double"]))
        if action == "replace":
            container[key] = draw(ANYTHING)
        elif action == "drop":
            del container[key]
        elif isinstance(container, list):
            container.insert(key, copy.deepcopy(container[key]))
        if not places(content):
            break
    return content


FUZZ = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("fuzz")
    return write(root, tiny())


@FUZZ
@given(mutated(pointed), st.data())
def test_a_mutated_file_is_refused_or_gives_valid_samples(
    pictures: tuple[Path, Path], content: Any, data: st.DataObject
) -> None:
    file, images = pictures
    text = json.dumps(content)
    if data.draw(st.integers(0, 9)) == 0:
        text = text[: data.draw(st.integers(0, len(text)))]
    file.write_text(text)
    for extra in (None, "masks", "keypoints"):
        with contextlib.suppress(DataError):
            detection = CocoDetection(file, images, extra=extra)  # type: ignore[arg-type]
            report_faults(detection.faults).encode()  # it can be printed
            for sample in detection:
                height, width = sample.image.shape[:2]
                assert (sample.boxes >= 0).all()
                assert (sample.boxes <= [width, height, width, height]).all()
                assert (sample.boxes[:, :2] < sample.boxes[:, 2:]).all()
                assert ((sample.labels >= 0) & (sample.labels < len(detection.classes))).all()
                if sample.masks is not None:
                    assert sample.masks.shape == (len(sample.boxes), height, width)
                    assert sample.masks.max(initial=0) <= 1
                if sample.keypoints is not None:
                    assert np.isfinite(sample.keypoints).all()
            json.dumps(coco_metrics(detection.ground_truth(), []), allow_nan=False)
    with contextlib.suppress(DataError):
        segmentation = CocoSegmentation(file, images)
        for mask in (sample.mask for sample in segmentation):
            assert mask.shape == (30, 40)
            assert ((mask < len(segmentation.classes)) | (mask == 255)).all()


def judged() -> Json:
    return {"truth": tiny(), "results": perfect_results(tiny())}


@FUZZ
@given(mutated(judged))
@example({"truth": None, "results": None})
def test_a_mutated_truth_or_result_is_refused_or_judged(tmp_path: Path, content: Any) -> None:
    truth, results = content.get("truth"), content.get("results")
    with contextlib.suppress(DataError):
        json.dumps(coco_metrics(truth, results), allow_nan=False)
    file = tmp_path / "content.json"
    with contextlib.suppress(DataError):
        file.write_text(json.dumps(results))
        loaded = load_results(file)
        file.write_text(json.dumps(truth))
        json.dumps(coco_metrics(load_annotations(file), loaded), allow_nan=False)
