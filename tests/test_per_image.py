"""Metrics from what is kept of each image, against pycocotools and the metrics themselves."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from common.errors import UsageError
from common.per_image import PerImage, judge, pixel_counts, read_per_image, write_per_image
from common.statistics import multiplicities
from detseg_losses.integrations.coco import (
    CocoDetection,
    coco_evaluation,
    coco_metrics,
    find_coco,
)
from detseg_losses.integrations.voc import ConfusionMatrix, VocDetection

NUMBERS = ["AP", "AP50", "AP75", "APs", "APm", "APl"]
Json = dict[str, Any]


def scene(seed: int, images: int = 12, classes: int = 4) -> tuple[Json, list[Json]]:
    """Objects of all sizes, and detections near them and elsewhere; many scores are equal."""
    draw = np.random.default_rng(seed)
    truth: Json = {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in draw.permutation(images).tolist()],
        "categories": [{"id": 10 + k, "name": f"class {k}"} for k in range(classes)],
        "annotations": [],
    }
    for number in range(6 * images):
        box = [*draw.uniform(0, 200, 2), *(draw.uniform(5, 40, 2) * draw.choice([1, 2, 4]))]
        truth["annotations"].append(
            {
                "id": number + 1,
                "image_id": int(draw.integers(images)),
                "category_id": 10 + int(draw.integers(classes - 1)),  # the last one has no object
                "bbox": [float(x) for x in box],
                "iscrowd": int(draw.random() < 0.1),
                "difficult": int(draw.random() < 0.1),
            }
        )
    return truth, near(truth, draw)


def near(truth: Json, draw: np.random.Generator) -> list[Json]:
    results = []
    for each in truth["annotations"]:
        for _ in range(int(draw.integers(4))):
            moved = np.array(each["bbox"]) * draw.uniform(0.8, 1.2, 4)
            other = truth["categories"][-1]["id"]
            results.append(
                {
                    "image_id": each["image_id"],
                    "category_id": other if draw.random() < 0.1 else each["category_id"],
                    "bbox": moved.tolist(),
                    "score": float(draw.integers(1, 20)) / 20,
                }
            )
    return results


def whole(found: PerImage) -> dict[str, float]:
    ones = np.ones((1, len(found.images)), np.int64)
    return {name: float(value[0]) for name, value in judge(found, ones).items()}


def expect_equal(found: dict[str, float], metrics: Json, numbers: list[str], classes: str) -> None:
    """To the last digit."""
    expected = {name: metrics[name] for name in numbers}
    expected |= {f"{classes[-3:].strip()} of {k}": v for k, v in metrics["per_class"].items()}
    for name, value in expected.items():
        assert (None if np.isnan(found[name]) else found[name]) == value, name


@pytest.mark.parametrize("seed", range(6))
def test_once_each_image_is_pycocotools(seed: int, tmp_path: Path) -> None:
    metrics, matches = coco_evaluation(*scene(seed))
    write_per_image(tmp_path, matches)
    expect_equal(whole(read_per_image(tmp_path)), metrics, NUMBERS, "AP")


def test_once_each_image_is_pycocotools_on_real_data(data_root: Path) -> None:
    for data in (
        CocoDetection(*find_coco(data_root / "coco128", "train2017")),
        VocDetection(data_root / "bccd/BCCD", "test"),
    ):
        truth = data.ground_truth()
        metrics, matches = coco_evaluation(truth, near(truth, np.random.default_rng(0)))
        assert matches.images == data.names
        assert metrics["AP"] > 0.05
        expect_equal(whole(matches), metrics, NUMBERS, "AP")


def copied(truth: Json, results: list[Json], counts: NDArray[Any], names: list[str]) -> Any:
    """The images as often as ``counts`` say, under other ids."""
    ids = {image["file_name"]: image["id"] for image in truth["images"]}
    more: Json = {**truth, "images": [], "annotations": []}
    found = []
    for name, count in zip(names, counts, strict=True):
        for number in range(count):
            new = f"{name} {number}"
            more["images"].append({"id": new, "file_name": new})
            for group, target in ((truth["annotations"], more["annotations"]), (results, found)):
                for each in group:
                    if each["image_id"] == ids[name]:
                        target.append(copy.deepcopy(each) | {"image_id": new})
    for number, each in enumerate(more["annotations"]):
        each["id"] = number + 1
    return more, found


def test_multiplicities_are_copies_of_the_images() -> None:
    truth, results = scene(7)
    for number, each in enumerate(results):
        each["score"] = 1 / (2 + number)  # of equal ones the order of the images would decide
    _, matches = coco_evaluation(truth, results)
    weights = multiplicities(12, 20)
    found = judge(matches, weights)
    for row, counts in enumerate(weights):
        metrics = coco_metrics(*copied(truth, results, counts, matches.images))
        expect_equal({name: v[row] for name, v in found.items()}, metrics, NUMBERS, "AP")


def test_nothing_found_and_nothing_there(tmp_path: Path) -> None:
    truth, _ = scene(0)
    metrics, matches = coco_evaluation(truth, [])
    write_per_image(tmp_path, matches)
    assert whole(read_per_image(tmp_path))["AP"] == metrics["AP"] == 0
    metrics, matches = coco_evaluation({**truth, "annotations": []}, [])
    assert metrics["AP"] is None
    assert np.isnan(whole(matches)["AP"])


def test_masks(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    total, matrices = ConfusionMatrix(4), []
    for _ in range(5):
        one = ConfusionMatrix(4)
        truth = torch.randint(0, 3, (20, 30), generator=draw)
        guess = torch.where(torch.rand(20, 30, generator=draw) < 0.7, truth, 2)
        truth[:2] = 255
        one.update(guess, truth)
        total.matrix += one.matrix
        matrices.append(one.matrix.numpy())
    classes = ["a", "b", "c", "nowhere"]
    write_per_image(tmp_path, pixel_counts(list("vwxyz"), classes, matrices))
    stored = read_per_image(tmp_path)
    found, metrics = whole(stored), total.metrics(classes)
    for name in ("mIoU", "mean_dice", "pixel_accuracy"):
        assert found[name] == pytest.approx(metrics[name], rel=1e-14)
    assert found["IoU of a"] == metrics["per_class_iou"]["a"]
    assert np.isnan(found["IoU of nowhere"])
    twice = ConfusionMatrix(4)
    twice.matrix = torch.from_numpy(2 * matrices[0] + 3 * matrices[4])
    assert judge(stored, np.array([[2, 0, 0, 0, 3]]))["mIoU"][0] == pytest.approx(
        twice.metrics(classes)["mIoU"], rel=1e-14
    )


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_per_image(tmp_path)
    (tmp_path / "per_image.npz").write_bytes(b"no zip")
    with pytest.raises(UsageError, match="damaged"):
        read_per_image(tmp_path)
