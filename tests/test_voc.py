"""The VOC readers on hand-made and real files, VOC's AP and the confusion matrix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from detseg_losses.integrations.coco import coco_metrics
from detseg_losses.integrations.samples import DataError, select_listed, split, subset
from detseg_losses.integrations.voc import (
    VOC_CLASSES,
    ConfusionMatrix,
    VocDetection,
    VocSegmentation,
    voc_metrics,
    voc_splits,
)

Json = dict[str, Any]


def xml_object(name: str, box: tuple[Any, ...], extra: str = "") -> str:
    keys = ("xmin", "ymin", "xmax", "ymax")
    corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(keys, box, strict=True))
    return f"<object><name>{name}</name>{extra}<bndbox>{corners}</bndbox></object>"


def xml(*objects: str, size: tuple[int, int] = (40, 30)) -> str:
    width, height = size
    return (
        f"<annotation><size><width>{width}</width><height>{height}</height></size>"
        f"{''.join(objects)}</annotation>"
    )


DIFFICULT = "<difficult>1</difficult>"
HEAD = "<part><name>head</name><bndbox><xmin>3</xmin></bndbox></part>"


def write_detection(root: Path, split_name: str = "train") -> Path:
    """Three images of 40 x 30 pixels in VOC's layout."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "ImageSets/Main" / f"{split_name}.txt").write_text("b\na 1\nc\n")
    for name in ("a 1", "b", "c"):
        Image.new("RGB", (40, 30), "red").save(root / "JPEGImages" / f"{name}.jpg")
    objects = xml_object("person", (1, 1, 10, 20), HEAD), xml_object("dog", (5, 5, 8, 8), DIFFICULT)
    (root / "Annotations/a 1.xml").write_text(xml(*objects))
    (root / "Annotations/b.xml").write_text(xml(xml_object("dog", (30.0, 20.0, 40.0, 30.0))))
    (root / "Annotations/c.xml").write_text(xml())
    return root


def test_detection_sample(tmp_path: Path) -> None:
    data = VocDetection(write_detection(tmp_path), "train")
    assert data.names == ["b.jpg", "a 1.jpg", "c.jpg"]
    assert data.classes == VOC_CLASSES
    assert data.category_ids == list(range(1, 21))
    assert data.faults == []
    sample = data[1]
    assert sample.image.shape == (30, 40, 3)
    # pixels 1 to 10 across and 1 to 20 down
    np.testing.assert_array_equal(sample.boxes, [[0, 0, 10, 20], [4, 4, 8, 8]])
    assert [VOC_CLASSES[label] for label in sample.labels] == ["person", "dog"]
    np.testing.assert_array_equal(sample.ignored, [False, True])
    np.testing.assert_array_equal(data[0].boxes, [[29, 19, 40, 30]])
    assert data[2].boxes.shape == (0, 4)
    person, dog = data.select([1]).ground_truth()["annotations"]
    assert (person["bbox"], person["area"]) == ([0, 0, 10, 20], 200)
    assert (person["category_id"], person["iscrowd"]) == (15, 0)
    assert "difficult" not in person
    assert (dog["difficult"], dog["iscrowd"]) == (1, 0)


def test_classes(tmp_path: Path) -> None:
    root = write_detection(tmp_path)
    people = VocDetection(root, "train", classes=["person"])
    assert people.names == ["a 1.jpg"]
    assert (people.classes, people.category_ids) == (["person"], [15])
    np.testing.assert_array_equal(people[0].labels, [0])
    with pytest.raises(DataError, match="no class 'persons'; did you mean 'person'"):
        VocDetection(root, "train", classes=["persons"])
    # a name that is none of VOC's anywhere below makes it another data set, for every split
    (root / "Annotations/other.xml").write_text(xml(xml_object("zebra", (1, 1, 5, 5))))
    assert VocDetection(root, "train").classes == ["dog", "person", "zebra"]
    (root / "classes.txt").write_text("person\ndog\n")
    listed = VocDetection(root, "train")
    assert listed.classes == ["person", "dog"]
    np.testing.assert_array_equal(listed[1].labels, [0, 1])
    (root / "classes.txt").write_text("dog\n")
    (fault,) = VocDetection(root, "train").faults
    assert (fault.file.name, fault.index) == ("a 1.xml", 0)
    assert (fault.reason, fault.value) == ("unknown class", "person")


@pytest.mark.parametrize(
    ("box", "reason", "kept"),
    [
        ((12, 9, 12, 9), "box has no area", None),
        ((12, 9, 11, 20), "box has no area", None),
        ((50, 1, 60, 10), "box is outside the image", None),
        ((31, 21, 50, 30), "box is partly outside the image, clipped", [30, 20, 40, 30]),
        (("nan", 1, 5, 5), "box is not finite", None),
        (("left", 1, 5, 5), "box is not four numbers", None),
    ],
)
def test_faulty_box(
    tmp_path: Path, box: tuple[Any, ...], reason: str, kept: list[float] | None
) -> None:
    root = write_detection(tmp_path)
    file = root / "Annotations/b.xml"
    file.write_text(xml(xml_object("dog", (1, 1, 4, 4)), xml_object("cat", box)))
    data = VocDetection(root, "train")
    assert [(f.file, f.index, f.reason) for f in data.faults] == [(file, 1, reason)]
    np.testing.assert_array_equal(data[0].boxes, [[0, 0, 4, 4]] + ([kept] if kept else []))
    with pytest.raises(DataError, match=r"b\.xml, entry 1: box"):
        VocDetection(root, "train", faulty="refuse")


@pytest.mark.parametrize(
    ("file", "damage", "reason"),
    [
        ("JPEGImages/b.jpg", Path.unlink, "image is missing"),
        ("JPEGImages/b.jpg", lambda f: f.write_bytes(f.read_bytes()[:400]), "image is broken"),
        ("Annotations/b.xml", Path.unlink, "annotation is missing"),
        ("Annotations/b.xml", lambda f: f.write_text("<a>"), "annotation is not valid XML"),
        (
            "Annotations/b.xml",
            lambda f: f.write_text(xml(size=(30, 40))),
            "image is not of the size that the annotation states",
        ),
    ],
)
def test_faulty_file(
    tmp_path: Path, file: str, damage: Callable[[Path], object], reason: str
) -> None:
    root = write_detection(tmp_path)
    damage(root / file)
    data = VocDetection(root, "train")
    assert [(f.file, f.index, f.reason) for f in data.faults] == [(root / file, None, reason)]
    assert data.names == ["a 1.jpg", "c.jpg"]


def test_other_image_formats_and_a_size_left_at_zero(tmp_path: Path) -> None:
    root = write_detection(tmp_path)
    (root / "JPEGImages/b.jpg").unlink()
    Image.new("L", (40, 30)).save(root / "JPEGImages/b.png")
    (root / "Annotations/b.xml").write_text(xml(size=(0, 0)))
    data = VocDetection(root, "train", faulty="refuse")
    assert data.names[0] == "b.png"
    assert data[0].image.shape == (30, 40, 3)


def test_root_is_found_below_and_ambiguity_is_named(tmp_path: Path) -> None:
    write_detection(tmp_path / "VOCdevkit/VOC2007", "train")
    write_detection(tmp_path / "VOCdevkit/VOC2012", "val")
    (tmp_path / "VOCdevkit/VOC2012/ImageSets/Main/dog_val.txt").touch()
    for root in (tmp_path, tmp_path / "VOCdevkit"):
        assert voc_splits(root, "detection") == ["train", "val"]
        assert voc_splits(root, "segmentation") == []
        assert "VOC2012" in str(VocDetection(root, "val").images[0].path)
    with pytest.raises(DataError, match=r"Main/test\.txt .* splits found: train, val"):
        VocDetection(tmp_path, "test")
    write_detection(tmp_path / "VOCdevkit/VOC2012", "train")
    with pytest.raises(DataError, match=r"name one as root: \S*VOC2007, \S*VOC2012"):
        VocDetection(tmp_path, "train")


def write_segmentation(root: Path) -> Path:
    for folder in ("SegmentationClass", "JPEGImages", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "ImageSets/Segmentation/val.txt").write_text("a\nb\n")
    for name in ("a", "b"):
        Image.new("RGB", (40, 30), "red").save(root / f"JPEGImages/{name}.jpg")
        save_mask(root / f"SegmentationClass/{name}.png", np.full((30, 40), 255, np.uint8))
    return root


def save_mask(file: Path, mask: NDArray[np.uint8]) -> None:
    image = Image.fromarray(mask, "P")
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    image.save(file)


def test_segmentation_sample(tmp_path: Path) -> None:
    root = write_segmentation(tmp_path)
    mask = np.random.default_rng(0).integers(0, 21, (30, 40), dtype=np.uint8)
    mask[:3] = 255
    save_mask(root / "SegmentationClass/b.png", mask)
    data = VocSegmentation(root, "val")
    assert data.classes == ["background", *VOC_CLASSES]
    sample = data[1]
    np.testing.assert_array_equal(sample.mask, mask)
    assert sample.mask.dtype == np.uint8
    assert (sample.name, sample.image.shape) == ("b.jpg", (30, 40, 3))

    (root / "classes.txt").write_text("sky\nroad\n")
    data = VocSegmentation(root, "val")
    assert data.classes == ["sky", "road"]
    assert (data[0].mask == 255).all()
    message = r"b\.png: holds the value 2, but there are 2 classes"
    with pytest.raises(DataError, match=message):
        data[1]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (Path.unlink, "image is missing"),
        (lambda f: f.write_bytes(f.read_bytes()[:-40]), "image is broken"),
        (lambda f: save_mask(f, np.zeros((40, 30), np.uint8)), "mask is not of the image's size"),
        (lambda f: Image.new("RGB", (40, 30)).save(f), "mask is not an image of class indices"),
    ],
    ids=["missing", "truncated", "size", "colours"],
)
def test_faulty_mask(tmp_path: Path, damage: Callable[[Path], object], reason: str) -> None:
    root = write_segmentation(tmp_path)
    damage(root / "SegmentationClass/a.png")
    data = VocSegmentation(root, "val")
    (fault,) = data.faults
    assert fault.reason.startswith(reason)
    assert fault.file == root / "SegmentationClass/a.png"
    assert data.names == ["b.jpg"]
    with pytest.raises(DataError, match=r"a\.png"):
        VocSegmentation(root, "val", faulty="refuse")


def test_segmentation_data_can_be_divided(tmp_path: Path) -> None:
    data = VocSegmentation(write_segmentation(tmp_path), "val")
    assert len(subset(data, 1, seed=0)) == 1
    train, val = split(data, 0.5, seed=0)
    assert sorted(train.names + val.names) == ["a.jpg", "b.jpg"]
    (tmp_path / "list.txt").write_text("b\n")
    chosen = select_listed(data, tmp_path / "list.txt")
    assert isinstance(chosen, VocSegmentation)
    assert chosen[0].name == "b.jpg"


@pytest.mark.parametrize(("name", "images"), [("train", 200), ("val", 80), ("test", 133)])
def test_real_voc2007(data_root: Path, name: str, images: int) -> None:
    data = VocDetection(data_root / "VOCdevkit", name, faulty="refuse")
    assert len(data) == images
    assert data.classes == VOC_CLASSES
    truth = data.ground_truth()
    found = as_results(truth)
    for eleven_point in (False, True):
        metrics = voc_metrics(truth, found, eleven_point=eleven_point)
        assert metrics["mAP"] == 1
        present = {a["category_id"] for a in truth["annotations"] if "difficult" not in a}
        for category, value in zip(data.category_ids, metrics["per_class"].values(), strict=True):
            assert value == (1 if category in present else None)
    # what is difficult may as well not have been found
    easy = [r for r, a in zip(found, truth["annotations"], strict=True) if "difficult" not in a]
    assert len(easy) < len(found)
    assert voc_metrics(truth, easy)["mAP"] == 1
    assert coco_metrics(truth, easy)["AP"] == pytest.approx(1)
    assert coco_metrics(truth, found)["AP"] == pytest.approx(1)


def test_real_bccd(data_root: Path) -> None:
    faults = []
    objects: dict[int, int] = {}
    for name, images in (("train", 205), ("val", 87), ("test", 72)):
        data = VocDetection(data_root / "bccd", name)
        assert len(data) == images
        assert data.classes == ["Platelets", "RBC", "WBC"]
        faults += data.faults
        for annotation in data.ground_truth()["annotations"]:
            category = annotation["category_id"]
            objects[category] = objects.get(category, 0) + 1
    assert [(f.file.name, f.index, f.reason) for f in faults] == [
        ("BloodImage_00343.xml", 3, "box has no area"),
        ("BloodImage_00338.xml", 12, "box has no area"),
    ]
    assert sum(objects.values()) == 4155 + 372 + 361 - 2
    assert objects[3] == 372


def test_real_masks(data_root: Path) -> None:
    data = VocSegmentation(data_root / "VOCdevkit", "val", faulty="refuse")
    assert len(data) == 4
    found = {sample.name: set(np.unique(sample.mask).tolist()) for sample in data}
    assert found["2008_002536.jpg"] == {0, 12, 17, 255}
    camvid = {name: VocSegmentation(data_root / "camvid", name) for name in ("train", "val")}
    assert [len(part) for part in camvid.values()] == [60, 16]
    for part in camvid.values():
        assert part.faults == []
        assert part.classes[0] == "sky"
        assert len(part.classes) == 11
        void = np.mean([(sample.mask == 255).mean() for sample in part])
        assert 0.015 < void < 0.045


def as_results(truth: Json) -> list[Json]:
    keys = ("image_id", "category_id", "bbox")
    return [{key: a[key] for key in keys} | {"score": 0.5} for a in truth["annotations"]]


def annotation(image: int, box: list[float], **more: int) -> Json:
    return {"image_id": image, "category_id": 1, "bbox": box, **more}


def one_class(*annotations: Json) -> Json:
    return {
        "images": [{"id": 1}, {"id": 2}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": list(annotations),
    }


def test_average_precision_by_hand() -> None:
    truth = one_class(
        annotation(1, [0, 0, 10, 10]),
        annotation(1, [50, 0, 10, 10]),
        annotation(2, [0, 0, 10, 10]),
        annotation(2, [50, 0, 10, 10], difficult=1),
    )
    found = [
        {**annotation(1, [0, 0, 10, 10]), "score": 0.9},  # true: precision 1, recall 1/3
        {**annotation(1, [1, 0, 10, 10]), "score": 0.8},  # a duplicate: false
        {**annotation(2, [50, 0, 10, 10]), "score": 0.75},  # difficult: neither
        {**annotation(2, [50, 0, 10, 10]), "score": 0.74},  # difficult again: neither
        {**annotation(2, [0, 0, 10, 5]), "score": 0.7},  # IoU 1/2: true: 2/3 at recall 2/3
        {**annotation(1, [50, 0, 10, 4.9]), "score": 0.6},  # IoU below 1/2: false
    ]
    assert voc_metrics(truth, found)["mAP"] == pytest.approx((1 + 2 / 3) / 3)
    # recalls 0 to .3 have precision 1, .4 to .6 have 2/3, .7 to 1 have none
    eleven = voc_metrics(truth, found, eleven_point=True)
    assert eleven["mAP"] == pytest.approx((4 * 1 + 3 * 2 / 3) / 11)
    assert eleven["per_class"] == {"a": eleven["mAP"]}
    assert eleven["notes"] == []
    assert voc_metrics(truth, found, iou_threshold=0.51)["mAP"] == pytest.approx(1 / 3)


def test_eleven_points_count_a_recall_that_is_met_exactly() -> None:
    truth = one_class(*(annotation(1, [20.0 * i, 0, 10, 10]) for i in range(10)))
    found = as_results(truth)[:3]
    assert voc_metrics(truth, found, eleven_point=True)["mAP"] == pytest.approx(4 / 11)


def test_what_cannot_be_computed_says_why() -> None:
    hidden = annotation(1, [0, 0, 10, 10], difficult=1)
    metrics = voc_metrics(one_class(hidden), as_results(one_class(hidden)))
    assert (metrics["mAP"], metrics["per_class"]) == (None, {"a": None})
    assert "no ground truth object" in metrics["notes"][0]

    truth = one_class(annotation(1, [0, 0, 10, 10]))
    truth["categories"].append({"id": 2, "name": "b"})
    metrics = voc_metrics(truth, [])
    assert (metrics["mAP"], metrics["per_class"]) == (0, {"a": 0, "b": None})
    assert any("no prediction" in note for note in metrics["notes"])
    assert any(note.endswith("left out of the mean: b.") for note in metrics["notes"])
    stray = [{**annotation(9, [0, 0, 1, 1]), "score": 1.0}]
    assert "image_id (9)" in voc_metrics(truth, stray)["notes"][0]


def reference_average_precision(
    truth: Json, results: list[Json], category: int, eleven_point: bool
) -> float:
    """One prediction after the other, with the development kit's inclusive pixels."""

    def corners(box: list[float]) -> tuple[float, float, float, float]:
        x, y, w, h = box
        return x + 1, y + 1, x + w, y + h

    objects = [a for a in truth["annotations"] if a["category_id"] == category]
    positives = sum(not a.get("difficult") for a in objects)
    taken: set[int] = set()
    recalls, precisions = [0.0], [0.0]
    true = false = 0
    for result in sorted(
        (r for r in results if r["category_id"] == category), key=lambda r: r["score"], reverse=True
    ):
        best, best_index = -1.0, -1
        a = corners(result["bbox"])
        for index, candidate in enumerate(objects):
            if candidate["image_id"] != result["image_id"]:
                continue
            b = corners(candidate["bbox"])
            width = min(a[2], b[2]) - max(a[0], b[0]) + 1
            height = min(a[3], b[3]) - max(a[1], b[1]) + 1
            if width <= 0 or height <= 0:
                continue
            shared = width * height
            area_a = (a[2] - a[0] + 1) * (a[3] - a[1] + 1)
            area_b = (b[2] - b[0] + 1) * (b[3] - b[1] + 1)
            if (iou := shared / (area_a + area_b - shared)) > best:
                best, best_index = iou, index
        if best >= 0.5:
            if objects[best_index].get("difficult"):
                continue
            if best_index in taken:
                false += 1
            else:
                taken.add(best_index)
                true += 1
        else:
            false += 1
        recalls.append(true / positives)
        precisions.append(true / (true + false))
    if eleven_point:
        heights = []
        for k in range(11):
            reached = [p for r, p in zip(recalls, precisions, strict=True) if r >= k / 10 - 1e-9]
            heights.append(max(reached, default=0.0))
        return sum(heights) / 11
    area = 0.0
    for i in range(1, len(recalls)):
        area += (recalls[i] - recalls[i - 1]) * max(precisions[i:])
    return area


@pytest.mark.parametrize("eleven_point", [False, True])
def test_average_precision_equals_the_reference(data_root: Path, eleven_point: bool) -> None:
    data = VocDetection(data_root / "VOCdevkit", "train")
    truth = data.ground_truth()
    random = np.random.default_rng(0)
    results = []
    for a in truth["annotations"]:
        for _ in range(random.integers(0, 4)):
            box = np.array(a["bbox"])
            box[:2] += (random.normal(0, 0.12, 2) * box[2:]).round()
            box[2:] = (box[2:] * np.exp(random.normal(0, 0.2, 2))).round().clip(1)
            wrong = random.random() < 0.1
            category = int(random.integers(1, 21)) if wrong else a["category_id"]
            results.append(
                {
                    "image_id": a["image_id"],
                    "category_id": category,
                    "bbox": box.tolist(),
                    "score": random.random(),
                }
            )
    metrics = voc_metrics(truth, results, eleven_point=eleven_point)
    values = []
    for category, name in zip(data.category_ids, data.classes, strict=True):
        if metrics["per_class"][name] is not None:
            expected = reference_average_precision(truth, results, category, eleven_point)
            assert metrics["per_class"][name] == pytest.approx(expected, abs=1e-12)
            values.append(expected)
    assert metrics["mAP"] == pytest.approx(np.mean(values))
    assert 0.2 < metrics["mAP"] < 0.9


def by_sets(prediction: NDArray[Any], target: NDArray[Any], classes: int) -> Json:
    """Per class the sets of pixels, all images joined."""
    valid = target != 255
    iou: list[float | None] = []
    dice: list[float] = []
    for k in range(classes):
        predicted = set(np.flatnonzero((prediction == k) & valid).tolist())
        true = set(np.flatnonzero((target == k) & valid).tolist())
        if predicted | true:
            iou.append(len(predicted & true) / len(predicted | true))
            dice.append(2 * len(predicted & true) / (len(predicted) + len(true)))
        else:
            iou.append(None)
    known = [value for value in iou if value is not None]
    return {
        "mIoU": pytest.approx(sum(known) / len(known)),
        "per_class_iou": {f"c{k}": value and pytest.approx(value) for k, value in enumerate(iou)},
        "mean_dice": pytest.approx(sum(dice) / len(dice)),
        "pixel_accuracy": pytest.approx((prediction == target)[valid].mean()),
    }


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_confusion_matrix(dtype: torch.dtype) -> None:
    random = np.random.default_rng(0)
    target = random.choice([0, 1, 2, 3, 255], (4, 9, 11))
    prediction = np.where(random.random(target.shape) < 0.6, target % 255, 0)
    names = [f"c{k}" for k in range(6)]  # 4 and 5 occur nowhere
    parts = [ConfusionMatrix(6), ConfusionMatrix(6)]
    for index in range(4):
        parts[index % 2].update(
            torch.from_numpy(prediction[index]).to(dtype), torch.from_numpy(target[index]).to(dtype)
        )
    whole = ConfusionMatrix(6)
    whole.matrix = parts[0].matrix + parts[1].matrix
    assert whole.matrix.dtype == torch.int64
    assert whole.matrix.sum() == (target != 255).sum()
    metrics = whole.metrics(names)
    assert metrics == by_sets(prediction.ravel(), target.ravel(), 6)
    assert metrics["per_class_iou"]["c5"] is None


def test_confusion_matrix_has_the_true_classes_in_its_rows() -> None:
    counts = ConfusionMatrix(3, ignore_index=0)
    counts.update(torch.tensor([[0, 2, 2], [1, 1, 1]]), torch.tensor([[1, 1, 2], [2, 0, 1]]))
    assert counts.matrix.tolist() == [[0, 0, 0], [1, 1, 1], [0, 1, 1]]


def test_confusion_matrix_refuses_what_it_cannot_count() -> None:
    counts = ConfusionMatrix(3)
    assert counts.metrics(["a", "b", "c"])["mIoU"] is None
    with pytest.raises(ValueError, match=r"the target holds 3, outside \[0, 3\)"):
        counts.update(torch.tensor([0, 1]), torch.tensor([3, 255]))
    with pytest.raises(ValueError, match="the prediction holds -1"):
        counts.update(torch.tensor([0, -1]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"prediction is \(2,\), the target \(3,\)"):
        counts.update(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="2 names for 3 classes"):
        counts.metrics(["a", "b"])
    assert counts.matrix.sum() == 0
    counts.update(torch.tensor([9, 1]), torch.tensor([255, 1]))
    assert counts.metrics(["a", "b", "c"])["pixel_accuracy"] == 1
