"""Write a data set in COCO's layout as Ultralytics reads it: label files, images and data.yaml."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from common.config import parse
from common.errors import UsageError, usage_errors
from common.evaluate import check_folder
from detseg_losses.integrations.coco import find_coco, find_image, load_annotations
from detseg_losses.integrations.samples import (
    DataError,
    Fault,
    Id,
    category_names,
    check_box,
    report_faults,
    to_flag,
    to_number,
)


@dataclass
class Config:
    """What to convert.

    Args:
        data: The folder of the data set, with annotations/instances_<split>.json or
            <split>/_annotations.coco.json.
        output: The folder to write, which must not exist yet.
        train: The split to train on.
        val: The split to validate on; by default that of train, good for a try only.
        segments: Write outlines for segmentation models in place of boxes.
        copy: Copy the images; by default they are linked to.
    """

    data: str
    output: str
    train: str = "train"
    val: str | None = None
    segments: bool = False
    copy: bool = False


@usage_errors()
def main() -> None:
    """Run the tool."""
    config = parse(Config, __doc__)
    output = Path(config.output)
    if os.path.lexists(output):
        raise UsageError(f"{output} exists already; name a new folder as output")
    check_folder("output", str(output.parent))
    try:
        from ultralytics.data.converter import convert_coco
    except ModuleNotFoundError:
        raise UsageError(
            'Ultralytics is missing: pip install "detseg_losses[ultralytics]"'
        ) from None

    faults: list[Fault] = []
    splits = {
        name: Split(*find_coco(Path(config.data), name), config.segments, faults)
        for name in dict.fromkeys((config.train, config.val or config.train))
    }
    names = [split.names for split in splits.values()]
    if any(each != names[0] for each in names):
        raise DataError(f"{config.data}: the splits have other categories")

    with tempfile.TemporaryDirectory() as folder:
        for name, split in splits.items():
            file = Path(folder, f"instances_{name}.json")
            file.write_text(json.dumps(split.content), encoding="utf-8")
        with usage_errors(ImportError):  # of what it decodes RLE with
            convert_coco(folder, str(output), use_segments=config.segments, cls91to80=False)
    for name, split in splits.items():
        for image in split.content["images"]:
            target = output / "images" / name / image["file_name"]
            target.parent.mkdir(parents=True, exist_ok=True)
            source = (split.directory / image["file_name"]).resolve()
            try:
                (shutil.copyfile if config.copy else os.symlink)(source, target)
            except OSError as error:
                raise UsageError(f"{target} cannot be written ({error.strerror})") from error
    description = {
        "path": str(output.resolve()),
        "train": f"images/{config.train}",
        "val": f"images/{config.val or config.train}",
        "names": dict(enumerate(names[0])),
    }
    file = output / "data.yaml"
    file.write_text(yaml.safe_dump(description, sort_keys=False), encoding="utf-8")
    if faults:
        print(report_faults(faults))
    print(f"data: {file}")


class Split:
    """One split, with what is usable of it, and the categories numbered from 1 without gaps.

    Crowds and objects with ``ignore: 1`` are no objects to learn, and go without a label:
    Ultralytics cannot ignore a part of an image.
    """

    def __init__(self, file: Path, directory: Path, segments: bool, faults: list[Fault]) -> None:
        content = load_annotations(file)
        by_id = category_names(content["categories"])
        self.directory = directory
        self.names = list(by_id.values())
        numbers = {key: number for number, key in enumerate(by_id, 1)}
        known = {image["id"] for image in content["images"]}
        images = _usable_images(file, directory, content["images"], faults)
        annotations = []
        for index, annotation in enumerate(content["annotations"]):
            image, category = annotation.get("image_id"), annotation.get("category_id")
            if not isinstance(image, int) or image not in known:
                reason = "image id is not among the file's images"
                faults.append(Fault(file, index, reason, image))
            elif image not in images:
                continue
            elif (ignored := _is_ignored(annotation)) is None:
                faults.append(Fault(file, index, "iscrowd or ignore is neither 0 nor 1"))
            elif ignored:
                continue
            elif not isinstance(category, int) or category not in numbers:
                reason = "category id is not among the file's categories"
                faults.append(Fault(file, index, reason, category))
            else:
                usable, fault = _inside(annotation, images[image], segments)
                if fault:
                    faults.append(Fault(file, index, fault, annotation.get("bbox")))
                if usable is not None:
                    annotations.append(usable | {"category_id": numbers[category]})
        if not annotations:
            found = f": {report_faults(faults)}" if faults else ""
            raise DataError(f"{file}: no usable object in an image of {directory}{found}")
        self.content = {"images": list(images.values()), "annotations": annotations}


def _usable_images(
    file: Path, directory: Path, entries: list[dict[str, Any]], faults: list[Fault]
) -> dict[Id, dict[str, Any]]:
    """By id, the images that are there, as large as stated, and with a label file of their own."""
    images = {}
    label_files = set()
    for index, entry in enumerate(entries):
        image = find_image(entry, index, file, directory, faults)
        if image is None:
            continue
        path = image.path
        label_file = path.with_suffix(".txt")
        if label_file in label_files:
            reason = "image would share the label file of an image before it"
            faults.append(Fault(file, index, reason, path))
        else:
            label_files.add(label_file)
            size = {"width": image.width, "height": image.height}
            images[image.id] = entry | size | {"file_name": str(path.relative_to(directory))}
    return images


def _inside(
    annotation: dict[str, Any], image: dict[str, Any], segments: bool
) -> tuple[dict[str, Any] | None, str | None]:
    """An annotation clipped to its image, for Ultralytics drops images with anything beyond; and
    the fault, as in :func:`check_box`.
    """
    width, height = image["width"], image["height"]
    bbox = annotation.get("bbox")
    numbers = [to_number(value) for value in bbox] if isinstance(bbox, list) else []
    if len(numbers) != 4 or None in numbers:
        return None, "bbox is not four numbers"
    x, y, w, h = (number for number in numbers if number is not None)
    box, fault = check_box((x, y, x + w, y + h), width, height)
    if box is None:
        return None, fault
    usable = {
        "image_id": annotation["image_id"],
        "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
    }
    if segments:
        outline = annotation.get("segmentation")
        if not outline:
            return None, "object has no segmentation"
        if isinstance(outline, dict):
            if outline.get("size") != [height, width] or "counts" not in outline:
                return None, "RLE is not of the image's size"
        elif isinstance(outline, list) and all(map(_is_polygon, outline)):
            outline = [_clip(polygon, width, height) for polygon in outline]
        else:
            return None, "polygon is not a list of three or more points x, y"
        usable["segmentation"] = outline
    return usable, fault


def _is_ignored(annotation: dict[str, Any]) -> bool | None:
    """Whether an object is a crowd or to be ignored; None where that cannot be told."""
    flags = [to_flag(annotation.get(key)) for key in ("iscrowd", "ignore")]
    return None if None in flags else any(flags)


def _is_polygon(values: object) -> bool:
    return (
        isinstance(values, list)
        and len(values) >= 6
        and len(values) % 2 == 0
        and all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)
    )


def _clip(polygon: Sequence[float], width: int, height: int) -> list[float]:
    limits = width, height
    return [min(max(value, 0), limits[index % 2]) for index, value in enumerate(polygon)]


if __name__ == "__main__":
    main()
