"""What there is to learn in a data set, said before training: how much of each class, and void."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from common.config import DetectionConfig, SegmentationConfig, height_width
from common.data import Data, Part, Say, find_format, read_sample

import numpy as np

from detseg_losses.integrations.samples import (
    VOID,
    DataError,
    DetectionData,
    Fault,
    Faulty,
    summarize_faults,
)
from detseg_losses.integrations.voc import VocSegmentation

MASKS = 200
"""So many masks, evenly spaced, are looked at; more only where these hold a single class."""


def say_model(config: DetectionConfig | SegmentationConfig, say: Say) -> None:
    """Say what is trained; and where it is the small model for shapes, what suits other data."""
    model = config.model
    default: DetectionConfig | SegmentationConfig
    if isinstance(config, DetectionConfig):
        kind, default = "det", DetectionConfig()
        part = f" with backbone {config.model.backbone}" if model.name == "retinanet" else ""
    else:
        kind, default = "seg", SegmentationConfig()
        part = f" with encoder {config.model.encoder}"
    height, width = height_width(config.data.size if config.data.crop is None else config.data.crop)
    said = f"model: {model.name}{part}, weights {model.weights}, {height} x {width} px"
    layout = find_format(config.data, config.task)
    if layout != "shapes" and model == default.model:
        said += (
            f"; this is the model for the synthetic shapes: --config configs/{kind}/{layout}.yaml "
            "is where to start from with real data"
        )
    say(said)


def say_objects(data: DetectionData, part: Part, say: Say) -> None:
    """Say how many objects and images each class has.

    Raises:
        DataError: if this is training data, and no object in it can be learned.
    """
    truth = data.ground_truth()["annotations"]
    names = dict(zip(data.category_ids, data.classes, strict=True))
    counted = [a for a in truth if not (a["iscrowd"] or a.get("difficult"))]
    ignored = len(truth) - len(counted)
    objects = Counter(names[a["category_id"]] for a in counted)
    pairs = {(names[a["category_id"]], a["image_id"]) for a in counted}
    images = Counter(name for name, _ in pairs)
    if not counted:
        found = f"all {ignored} objects are crowds or difficult, and ignored" if ignored else "none"
        if part == "train":
            raise DataError(
                f"{part}: there is no object to learn from in {len(data)} images: {found}"
            )
        say(f"{part}: warning: there is no object to judge by, and AP will be None: {found}")
        return
    said = _ranked([f"{name} {n} ({images[name]})" for name, n in objects.most_common()])
    say(f"{part}: objects (images) of each class: {said}; {ignored} objects are ignored")
    _warn_of_absent([name for name in data.classes if not objects[name]], part, "", say)


def say_pixels(data: Data, part: Part, faulty: Faulty, say: Say) -> None:
    """Say which share of the pixels each class has, in a sample of the masks.

    Raises:
        DataError: if this is training data and its masks hold a single class, or no mask can be
            read.
    """
    counts, looked, faults = np.zeros(VOID + 1, np.int64), 0, list[Fault]()
    sample = np.unique(np.linspace(0, len(data) - 1, MASKS).round().astype(int)).tolist()
    others = sorted(set(range(len(data))) - set(sample))
    for index in (*sample, *others):
        if looked >= len(sample) and np.count_nonzero(counts[:VOID]) > 1:
            break
        if (read := read_sample(data, index, faulty, faults)) is not None:
            counts += np.bincount(read.mask.ravel(), minlength=VOID + 1)
            looked += 1
    if not looked:
        raise DataError(f"{part}: no usable image is left: {summarize_faults(faults)}")
    present = [name for name, n in zip(data.classes, counts, strict=False) if n]
    absent = [name for name in data.classes if name not in present]
    if len(present) < 2:
        alone = f"no class but {present[0]!r}" if present else "void alone"
        found = f"the {looked} masks hold {alone}"
        if counts[VOID] and absent:
            label = data.classes.index(absent[-1])
            found += f": value {VOID} is void; the class {absent[-1]} ({label}) never occurs; "
            if isinstance(data, VocSegmentation):
                found += f"masks of 0 and {VOID} must be divided by {VOID}"
            else:
                found += "all objects are crowds, to be ignored, or cannot be drawn"
        if part == "train":
            raise DataError(f"{part}: {found}; there is nothing to learn")
        say(f"{part}: warning: {found}")
        return
    shares = counts / counts.sum()
    ranked = sorted(zip(shares, data.classes, strict=False), reverse=True)
    said = _ranked([f"{name} {share:.2%}" for share, name in ranked if share])
    of = f"in {looked} of {len(data)} masks"
    say(f"{part}: pixels {of}: {said}; void {shares[VOID]:.2%}")
    _warn_of_absent(absent, part, f" {of}", say)


def _warn_of_absent(names: Sequence[str], part: Part, where: str, say: Say) -> None:
    if names:
        say(f"{part}: warning: {len(names)} classes never occur{where}: {_ranked(names)}")


def _ranked(entries: Sequence[str], ends: int = 10) -> str:
    """The entries in one line; of many the first and the last."""
    if len(entries) > 2 * ends:
        left = f"... {len(entries) - 2 * ends} more ..."
        entries = [*entries[:ends], left, *entries[-ends:]]
    return ", ".join(entries)
