"""Write a data set in COCO's layout as Ultralytics reads it: label files, images and data.yaml."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import parse
from common.errors import UsageError, usage_errors
from common.evaluate import check_folder

import yaml

from detseg_losses.integrations.coco import CocoDetection, find_coco
from detseg_losses.integrations.samples import (
    DataError,
    Fault,
    ImageFile,
    report_faults,
    summarize_faults,
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
    """One split, with what is usable of it; images and categories are numbered from 1.

    Crowds and objects with ``ignore: 1`` are no objects to learn, and go without a label:
    Ultralytics cannot ignore a part of an image.
    """

    def __init__(self, file: Path, directory: Path, segments: bool, faults: list[Fault]) -> None:
        data = CocoDetection(file, directory, extra="masks" if segments else None)
        faults += data.faults
        self.directory = directory
        self.names = data.classes
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        label_files = set()
        for image, objects in zip(data.images, data.objects, strict=True):
            label_file = image.path.with_suffix(".txt")
            if label_file in label_files:
                reason = "image would share the label file of an image before it"
                faults.append(Fault(image.path, None, reason))
                continue
            label_files.add(label_file)
            number = len(images) + 1
            name = str(image.path.relative_to(directory))
            size = {"width": image.width, "height": image.height}
            images.append({"id": number, "file_name": name, **size})
            for index in (~(objects.crowd | objects.difficult)).nonzero()[0].tolist():
                annotation = {
                    "image_id": number,
                    "category_id": int(objects.labels[index]) + 1,
                    "bbox": objects.boxes[index].tolist(),
                }
                if objects.segmentations is not None:
                    annotation["segmentation"] = _outline(objects.segmentations[index], image)
                annotations.append(annotation)
        if not annotations:
            found = f": {summarize_faults(faults)}" if faults else ""
            raise DataError(f"{file}: no usable object in an image of {directory}{found}")
        self.content = {"images": images, "annotations": annotations}


def _outline(segmentation: Any, image: ImageFile) -> Any:
    """An outline for JSON, within its image: Ultralytics drops images with anything beyond."""
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        return {**segmentation, "counts": counts if isinstance(counts, str) else counts.decode()}
    limits = image.width, image.height
    return [
        [min(max(value, 0), limits[index % 2]) for index, value in enumerate(polygon)]
        for polygon in segmentation
    ]


if __name__ == "__main__":
    main()
