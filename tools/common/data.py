"""From readers to batches: choosing the data, augmentation, and an order that needs no state.

Everything random is a function of numbers that are known without history: the order of the images
of (seed, epoch), the augmentation of an image of (seed, epoch, index), the position of the step.
A resumed run therefore sees exactly the batches that it would have seen.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, overload

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # no look-up of the newest version at import

from common.config import DataConfig, Task, height_width
from common.errors import UsageError
from common.shapes import make_shapes

import albumentations as A
import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler, default_collate

from detseg_losses.integrations.coco import (
    CocoDetection,
    CocoSegmentation,
    coco_splits,
    find_coco,
)
from detseg_losses.integrations.samples import (
    VOID,
    DataError,
    DataT,
    DetectionData,
    DetectionSample,
    Extra,
    Fault,
    Faulty,
    ImageData,
    SegmentationSample,
    report_faults,
    select_listed,
    split,
    subset,
    summarize_faults,
)
from detseg_losses.integrations.voc import VocDetection, VocSegmentation, voc_splits

Data = ImageData[Any, Any]
Batch = dict[str, Any]
Part = Literal["train", "val"]
Say = Callable[[str], None]
VALIDATION_FRACTION = 0.2


@overload
def load_data(
    config: DataConfig,
    task: Literal["detection"],
    part: Part,
    seed: int,
    say: Say,
    extra: Extra | None = None,
) -> DetectionData: ...
@overload
def load_data(
    config: DataConfig, task: Literal["segmentation"], part: Part, seed: int, say: Say
) -> Data: ...
def load_data(
    config: DataConfig,
    task: Task,
    part: Part,
    seed: int,
    say: Say,
    extra: Extra | None = None,
) -> Data:
    """Return the training or the validation data; ``say`` what was found and done.

    ``extra`` is what a detector learns beside boxes; the validation data goes without, for it is
    the boxes that are judged.

    Raises:
        UsageError, DataError: if the data cannot be had as configured.
    """
    config = replace(config, format=find_format(config, task, extra))
    root = Path(config.root or "data").expanduser()
    if config.format == "shapes":
        try:
            root = make_shapes(root)
        except OSError as error:
            raise UsageError(
                f"{root}: shapes cannot be written there ({error.strerror})"
            ) from error
    if extra and config.format == "voc":
        raise UsageError(f"data.format voc has no {extra}, which this model learns; take coco")
    wanted = extra if part == "train" else None
    if _lacks_validation(config, task, root, extra):
        data = _read(config, task, root, config.train_split, extra, wanted)
        parts = split(data, VALIDATION_FRACTION, seed)
        chosen = parts[0] if part == "train" else parts[1]
        say(
            f"{root} has no split {config.val_split}: {len(parts[1])} of the {len(data)} images of "
            f"{config.train_split}, chosen by seed {seed}, are set aside for validation"
        )
    else:
        name = config.train_split if part == "train" else config.val_split
        chosen = data = _read(config, task, root, name, extra, wanted)
    listed = config.train_list if part == "train" else config.val_list
    if listed is not None:
        chosen = select_listed(chosen, Path(listed).expanduser())
    if config.subset is not None:
        chosen = subset(chosen, config.subset, seed)
    chosen = _without_thin(chosen, config)
    say(f"{part}: {len(chosen)} images of {root}, {len(chosen.classes)} classes")
    if chosen.faults:
        say(f"{part}: {report_faults(chosen.faults)}")
    return chosen


def find_format(
    config: DataConfig, task: Task, extra: Extra | None = None
) -> Literal["shapes", "coco", "voc"]:
    """Return the format of the data: the one that is named, or the one whose files are in root.

    Raises:
        UsageError: if there is no such folder, or it tells nothing or too much.
    """
    if config.root is None:
        if config.format in ("coco", "voc"):
            raise UsageError(f"data.format {config.format} needs data.root, the folder of the data")
        return "shapes"
    if config.format == "shapes":
        return "shapes"
    root = Path(config.root).expanduser()
    if not config.root or not os.path.isdir(root):  # a Path raises on a name that is too long
        raise UsageError(f"data.root {config.root!r} is not a folder")
    if config.format != "auto":
        return config.format
    coco, voc = coco_splits(root, extra), voc_splits(root, task)
    if coco and voc:
        raise UsageError(f"data.root {root} is in the layouts of COCO and VOC: name data.format")
    if not coco and not voc:
        lists = "Main" if task == "detection" else "Segmentation"
        raise UsageError(
            f"data.root {root} has neither COCO's annotations/instances_*.json or "
            f"*/_annotations.coco.json nor VOC's ImageSets/{lists}/*.txt; name the folder that "
            "has, or data.format"
        )
    return "coco" if coco else "voc"


def has_split(config: DataConfig, task: Task, name: str) -> bool:
    """Whether the data has a split of this name."""
    kind = find_format(config, task)
    root = Path(config.root or "data").expanduser()
    return name in (voc_splits(root, task) if kind == "voc" else coco_splits(root))


def _without_thin(data: DataT, config: DataConfig) -> DataT:
    """The images that keep two pixels a side when they are fitted: less cannot be scaled further.

    Raises:
        DataError: if there are others and faults are refused, or nothing is left.
    """
    height, width = height_width(config.size)
    kept, faults = [], []
    for index, image in enumerate(data.images):
        scale = min(height / image.height, width / image.width)
        if scale * min(image.height, image.width) < 1.5:
            found = f"{image.width}x{image.height} in {width}x{height}"
            faults.append(Fault(image.path, None, "image is too thin for data.size", found))
        else:
            kept.append(index)
    if faults and config.faults == "refuse":
        raise DataError(f"{summarize_faults(faults)}; data.faults=skip goes without them")
    if not kept:
        raise DataError(f"no usable image is left: {summarize_faults(faults)}")
    chosen = data.select(kept)
    chosen.faults = data.faults + faults
    return chosen


def _lacks_validation(config: DataConfig, task: Task, root: Path, extra: Extra | None) -> bool:
    """Whether the training split is the only one."""
    splits = voc_splits(root, task) if config.format == "voc" else coco_splits(root, extra)
    return len(splits) == 1 and not re.fullmatch(rf"{re.escape(config.val_split)}\d*", splits[0])


def _read(
    config: DataConfig,
    task: Task,
    root: Path,
    name: str,
    extra: Extra | None,
    wanted: Extra | None,
) -> Data:
    """Read a split, from the files that hold ``extra``; with what is ``wanted`` of it."""
    if config.format == "voc" and task == "detection":
        return VocDetection(root, name, classes=config.classes, faulty=config.faults)
    if config.format == "voc":
        if config.classes is not None:
            raise UsageError("data.classes does not apply to VOC masks, which show every class")
        return VocSegmentation(root, name, faulty=config.faults)
    files = find_coco(root, name, extra)
    if task == "detection":
        return CocoDetection(*files, classes=config.classes, faulty=config.faults, extra=wanted)
    return CocoSegmentation(*files, classes=config.classes, faulty=config.faults)


class TrainingImages(Dataset[Batch]):
    """Augmented images with their targets, addressed by ``(epoch, index)``.

    A detection item has ``image`` (3, H, W) uint8 and ``target``, torchvision's dict of ``boxes``
    (N, 4) XYXY in pixels and ``labels`` (N,) from 1, and where the data has them ``masks``
    (N, H, W) of 0 and 1 or ``keypoints`` (N, K, 3) of x, y and visibility; a segmentation item has
    ``image`` and ``mask`` (H, W), whose padding is void.

    An image or mask that turns out to be faulty when it is decoded is replaced by the next one, so
    that epochs keep their length; the item then has ``faults``, too. With ``data.faults=refuse`` it
    is a DataError, and so it is where no image is left.

    Args:
        data: what a reader gives.
        config: sizes and augmentation.
        seed: of the augmentation.
    """

    def __init__(self, data: Data, config: DataConfig, seed: int) -> None:
        self.data = data
        self.faulty = config.faults
        self.seed = seed
        self.transform = _training_transform(config)
        self.mirrored = list(data.mirrored) if isinstance(data, DetectionData) else []

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        epoch, index = key
        generator = np.random.default_rng([self.seed, epoch, index])
        self.transform.set_random_state(generator, random.Random(int(generator.integers(2**63))))
        faults: list[Fault] = []
        for position in (*range(index, len(self)), *range(index)):
            sample = read_sample(self.data, position, self.faulty, faults)
            if sample is not None:
                item = self._augmented(sample)
                return item | {"faults": faults} if faults else item
        raise DataError(f"no usable image is left: {summarize_faults(faults)}")

    def _augmented(self, sample: DetectionSample | SegmentationSample) -> Batch:
        if isinstance(sample, SegmentationSample):
            out = self.transform(image=sample.image, mask=sample.mask, bboxes=[], rows=[])
            return {"image": _to_tensor(out["image"]), "mask": torch.from_numpy(out["mask"])}
        kept = np.flatnonzero(~sample.ignored)
        given: dict[str, Any] = {"bboxes": sample.boxes[kept], "rows": kept}
        if sample.masks is not None:
            # At least one, or albumentations has nothing to stack.
            given["masks"] = np.pad(sample.masks, ((0, not len(sample.masks)), (0, 0), (0, 0)))
        if sample.keypoints is not None:
            points = sample.keypoints[..., :2].reshape(-1, 2)
            given["keypoints"] = np.concatenate((points, [(0, 0), (1, 0)]))
        out = self.transform(image=sample.image, **given)
        rows = np.asarray(out["rows"], np.int64)
        boxes = np.asarray(out["bboxes"], np.float32).reshape(-1, 4)
        labels = sample.labels[rows] + 1
        target = {"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(labels)}
        if sample.masks is not None:
            masks = np.asarray(out["masks"])[rows] == 1  # the padding is void
            target["masks"] = torch.from_numpy(masks.astype(np.uint8))
        if sample.keypoints is not None:
            points = self._keypoints(sample.keypoints, out["keypoints"], out["image"].shape[:2])
            target["keypoints"] = torch.from_numpy(points[rows])
        return {"image": _to_tensor(out["image"]), "target": target}

    def _keypoints(
        self, old: NDArray[np.float32], moved: NDArray[np.float32], size: tuple[int, int]
    ) -> NDArray[np.float32]:
        """Keypoints ``(N, K, 3)`` where they are now; in a mirror left and right change places."""
        moved = np.asarray(moved, np.float32)[:, :2]
        new = np.concatenate((moved[:-2].reshape(old[..., :2].shape), old[..., 2:]), -1)
        origin, right = moved[-2:, 0]
        if right < origin:
            new = new[:, self.mirrored]
            new[..., 0] += 1  # albumentations mirrors the centres of pixels, not their borders
        outside = ((new[..., :2] < 0) | (new[..., :2] >= size[::-1])).any(-1)
        new[outside, 2] = 0
        return new


def read_sample(data: Data, index: int, faulty: Faulty, faults: list[Fault]) -> Any:
    """Return a sample; None, and a fault of its image more, where it cannot be decoded.

    Raises:
        DataError: in place of a fault, if ``faulty`` is ``"refuse"``.
    """
    try:
        return data[index]
    except DataError as error:
        if faulty == "refuse":
            raise
        file = data.images[index].path
        found = str(error).removeprefix(f"{file}: ")
        faults.append(Fault(file, None, "image or mask cannot be used", found))
        return None


def _training_transform(config: DataConfig) -> A.Compose:
    height, width = height_width(config.size if config.crop is None else config.crop)
    fit = A.LongestMaxSize(max_size_hw=height_width(config.size), area_for_downscale="image")
    placed = [
        A.PadIfNeeded(height, width, position="random", fill=_padding(config), fill_mask=VOID),
        A.RandomCrop(height, width),
    ]
    random_size = [A.RandomScale((-0.25, 0.25), p=0.5)]
    looks = [A.HorizontalFlip(), A.ColorJitter(0.2, 0.2, 0.2, 0.02)]
    boxes = A.BboxParams(
        "pascal_voc",
        label_fields=["rows"],
        clip=True,
        filter_invalid_bboxes=True,  # what has no area left in its float32 would be an error
        min_width=1,
        min_height=1,
        min_visibility=0.25,  # an object mostly cut off is no longer recognisable
    )
    steps = [fit, *random_size, *placed, *looks] if config.augment else [fit, *placed]
    # cv2's plain nearest neighbour shifts masks by up to half a pixel.
    return A.Compose(
        steps,
        bbox_params=boxes,
        keypoint_params=A.KeypointParams("xy", remove_invisible=False),
        mask_interpolation=cv2.INTER_NEAREST_EXACT,
    )


def _padding(config: DataConfig) -> tuple[int, ...]:
    """The colour that normalisation turns into about zero."""
    return tuple(round(255 * channel) for channel in config.mean)


def _to_tensor(image: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


class EvaluationImages(Dataset[Batch]):
    """Images fitted into one size, padded at the right and at the bottom.

    An item has ``image`` (3, H, W) uint8 with H and W multiples of 32, ``index`` in the data,
    ``fitted`` (height and width of the image in the padded one), ``original`` (height and width in
    the file) and for segmentation ``truth``, the mask as it is in the file. Of an image or mask
    that is faulty an item has ``faults`` alone; with ``data.faults=refuse`` it is a DataError.

    Args:
        data: what a reader gives.
        config: size and padding.
    """

    def __init__(self, data: Data, config: DataConfig) -> None:
        self.data = data
        self.faulty = config.faults
        size = height_width(config.size)
        height, width = (-(-side // 32) * 32 for side in size)
        self.fit = A.LongestMaxSize(max_size_hw=size, area_for_downscale="image")
        self.pad = A.PadIfNeeded(height, width, position="top_left", fill=_padding(config))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Batch:
        faults: list[Fault] = []
        sample = read_sample(self.data, index, self.faulty, faults)
        if sample is None:
            return {"faults": faults}
        fitted = self.fit(image=sample.image)["image"]
        item = {
            "image": _to_tensor(self.pad(image=fitted)["image"]),
            "index": index,
            "fitted": fitted.shape[:2],
            "original": sample.image.shape[:2],
        }
        if isinstance(sample, SegmentationSample):
            item["truth"] = sample.mask
        return item


def collate(items: list[Batch]) -> Batch:
    """Stack what has one shape; keep everything else as lists.

    ``faults`` are those of all items, and absent where there are none; an item that is nothing but
    faults is no part of the batch.
    """
    faults = [fault for item in items for fault in item.get("faults", [])]
    whole = [item for item in items if "image" in item]
    batch = {
        key: default_collate([item[key] for item in whole])
        if isinstance(value, Tensor)
        else [item[key] for item in whole]
        for key, value in (whole[0] if whole else {}).items()
        if key != "faults"
    }
    return batch | {"faults": faults} if faults else batch


class TrainingOrder(Sampler[list[tuple[int, int]]]):
    """The batches of one process from one step to another, as lists of ``(epoch, index)``.

    Each step takes the next ``batch_size`` images of the epoch's shuffle, which depends on seed and
    epoch alone; the processes and the accumulated parts share them out. What is left at the end of
    an epoch and does not fill a batch is left out.

    Args:
        length: number of training images.
        batch_size: images per step, over all processes and parts.
        start: first step.
        stop: step after the last.
        seed: of the shuffle.
        rank: number of this process.
        world_size: number of processes.
        accumulate: parts into which the share of a process is divided.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        start: int,
        stop: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
    ) -> None:
        if batch_size > length:
            raise UsageError(
                f"train.batch_size {batch_size} is more than the {length} images; lower it to "
                f"{length} or less"
            )
        if batch_size % (world_size * accumulate):
            raise UsageError(
                f"train.batch_size {batch_size} is not a multiple of {world_size} processes x "
                f"train.accumulate {accumulate}"
            )
        self.length, self.batch_size = length, batch_size
        self.start, self.stop = start, stop
        self.seed, self.rank = seed, rank
        self.world_size, self.accumulate = world_size, accumulate

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return self.length // self.batch_size

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.stop):
            epoch, position = divmod(step, self.steps_per_epoch)
            if step == self.start or position == 0:
                order = np.random.default_rng([self.seed, epoch]).permutation(self.length).tolist()
            batch = order[position * self.batch_size : (position + 1) * self.batch_size]
            mine = batch[self.rank :: self.world_size]
            for part in range(self.accumulate):
                yield [(epoch, index) for index in mine[part :: self.accumulate]]
