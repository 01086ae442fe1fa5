"""The result of a comparison, from the files of its runs: in words, as a table, CSV and JSON.

All numbers are points, hundredths of AP or IoU.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from common.config import CompareConfig, TrainingConfig
from common.errors import UsageError
from common.per_image import PerImage, judge, read_per_image
from common.statistics import (
    LEVEL,
    Interval,
    bootstrap_interval,
    holm,
    multiplicities,
    paired_t,
    seeds_to_tell,
    wider,
)

import numpy as np

RESAMPLES = 1000
FEW_IMAGES = 30
MOST_CLASSES = 20
"""Of more classes the table shows none: they are in comparison.csv."""


@dataclass(frozen=True)
class Cell:
    """A run of a comparison.

    Attributes:
        number: its number, from 0.
        folder: its folder.
        loss: the candidate.
        seed: its seed.
        lr: its learning rate, None for that of all.
        scale: the factor of the first weight of the loss.
    """

    number: int
    folder: Path
    loss: str
    seed: int
    lr: float | None
    scale: float | None

    @property
    def spec(self) -> str:
        """The loss string that is trained."""
        return self.loss if self.scale is None else scaled(self.loss, self.scale)

    @property
    def name(self) -> str:
        """The loss string with the learning rate, where that is chosen."""
        return self.spec if self.lr is None else f"{self.spec} at lr {self.lr:g}"

    @property
    def is_trained(self) -> bool:
        """Whether its metrics.json is there."""
        return _read_json(self.folder / "metrics.json") is not None

    @property
    def is_tested(self) -> bool:
        """Whether the metrics of the test split are there."""
        return _read_json(self.folder / "test" / "metrics.json") is not None


_FIRST = re.compile(r"(\s*(?:\w+\s*:)?\s*)(?:([\d.]+(?:[eE][-+]?\d+)?)\s*\*\s*)?(.*)")
"""The name of a stage, the first weight, and the rest of a loss string."""


def scaled(loss: str, factor: float) -> str:
    """A loss string with another weight of its first term, in each stage.

    Raises:
        UsageError: if that weight is no number.
    """
    stages = []
    for stage in loss.split(";"):
        found = _FIRST.fullmatch(stage)
        if found is None or re.match(r"\(|(learned|ramp)\b", found[3]):
            raise UsageError(f"--scales: the first weight in {loss!r} is no number")
        stages.append(f"{found[1]}{float(found[2] or 1) * factor:g}*{found[3]}")
    return ";".join(stages)


def cells_of(compared: CompareConfig) -> list[Cell]:
    """The runs, whose folders do not depend on which others there are.

    Raises:
        UsageError: if a loss cannot be scaled.
    """
    seeds = range(compared.seeds)
    lrs: Sequence[float | None] = compared.lrs or [None]
    scales: Sequence[float | None] = compared.scales or [None]
    cells: list[Cell] = []
    for seed, loss, lr, scale in product(seeds, compared.losses, lrs, scales):
        cell = Cell(len(cells), Path(), loss, seed, lr, scale)
        folder = Path(compared.output, "cells", _slug(cell.name), f"seed-{seed}")
        cells.append(replace(cell, folder=folder))
    return cells


def _slug(name: str) -> str:
    """A name of a folder on every system, another one for each name."""
    plain = re.sub(r"[^\w.+=-]+", "_", name, flags=re.ASCII).strip("_.")[:80]
    return plain if plain == name else f"{plain}-{hashlib.sha1(name.encode()).hexdigest()[:6]}"


def _read_json(file: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def compare(compared: CompareConfig, training: TrainingConfig, cells: list[Cell]) -> dict[str, Any]:
    """The result of the runs that are done.

    Raises:
        UsageError: if no run is done.
    """
    metric = "AP" if training.task == "detection" else "mIoU"
    tested = compared.test_split is not None
    done = [cell for cell in cells if cell.is_trained and (cell.is_tested or not tested)]
    if not done:
        raise UsageError(f"{compared.output}: no run is done, so there is nothing to compare")
    chosen = {loss: _choose(loss, done, metric) for loss in compared.losses}
    metrics = {
        cell: _metrics(cell.folder / "test" if tested else cell.folder)
        for own in chosen.values()
        for cell in own
    }
    resampled, images, notes = _resample(chosen, tested)
    reference = compared.losses[0]
    candidates = [
        _candidate(loss, chosen[loss], chosen[reference], metrics, resampled, images)
        for loss in compared.losses
    ]
    rows = [each["metrics"].get(metric, {}) for each in candidates[1:]]
    tests = [row for row in rows if row.get("p") is not None]
    for row, p in zip(tests, holm([row["p"] for row in tests]), strict=True):
        row["holm_p"] = p
    result: dict[str, Any] = {
        "task": compared.task,
        "metric": metric,
        "split": compared.test_split or training.data.val_split,
        "images": images,
        "reference": reference,
        "threshold": compared.threshold,
        "level": LEVEL,
        "sentences": [],
        "notes": _remarks(compared, training, cells, done, images) + notes,
        "candidates": candidates,
        "runs": [
            asdict(cell) | {"folder": cell.folder.relative_to(compared.output).as_posix()}
            for cell in done
        ],
    }
    ranked = sorted(candidates[1:], key=lambda c: -(c["metrics"].get(metric, {}).get("mean") or 0))
    result["sentences"] = [_sentence(each, result, len(tests)) for each in ranked]
    return result


def _choose(loss: str, done: list[Cell], metric: str) -> list[Cell]:
    """The runs of a candidate at the setting that is best on the validation split."""
    settings: dict[tuple[float | None, float | None], list[Cell]] = {}
    for cell in done:
        if cell.loss == loss:
            settings.setdefault((cell.lr, cell.scale), []).append(cell)

    def value(own: list[Cell]) -> tuple[int, float]:
        scores = [_metrics(cell.folder).get(metric, 0.0) for cell in own]
        return len(own), float(np.mean(scores))

    return max(settings.values(), key=value, default=[])


def _metrics(folder: Path) -> dict[str, float]:
    """The numbers in metrics.json, in points, by the names that :func:`judge` gives them."""
    found = _read_json(folder / "metrics.json") or {}
    numbers = {name: value for name, value in found.items() if isinstance(value, float)}
    for key, kind in (("per_class", "AP"), ("per_class_iou", "IoU")):
        numbers |= {f"{kind} of {n}": v for n, v in found.get(key, {}).items() if v is not None}
    return {name: 100 * value for name, value in numbers.items()}


def _resample(
    chosen: dict[str, list[Cell]], tested: bool
) -> tuple[dict[Cell, dict[str, Any]], int, list[str]]:
    """The metrics of each run on the same resamples of the images; how many images; notes."""
    found: dict[Cell, PerImage] = {}
    notes = []
    for own in chosen.values():
        for cell in own:
            try:
                found[cell] = read_per_image(cell.folder / "test" if tested else cell.folder)
            except UsageError as error:
                notes.append(f"{error}: this run has no part in the interval over images.")
    # Runs may have other images, where a part of the training split is set aside by seed.
    names = sorted({name for each in found.values() for name in each.images})
    position = {name: number for number, name in enumerate(names)}
    weights = multiplicities(len(names), RESAMPLES) if names else np.zeros((0, 0), np.int64)
    resampled = {
        cell: judge(each, weights[:, [position[name] for name in each.images]])
        for cell, each in found.items()
    }
    return resampled, len(names), notes


def _candidate(
    loss: str,
    own: list[Cell],
    base: list[Cell],
    metrics: dict[Cell, dict[str, float]],
    resampled: dict[Cell, dict[str, Any]],
    images: int,
) -> dict[str, Any]:
    """What is known of a candidate, and of its difference to the reference."""
    of_seed = {cell.seed: cell for cell in base}
    pairs = [(cell, of_seed[cell.seed]) for cell in own if cell.seed in of_seed]
    rows: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for cell in own for name in metrics[cell]):
        values = [metrics[cell][name] for cell in own if name in metrics[cell]]
        row: dict[str, Any] = {"mean": float(np.mean(values)), "spread": None, "runs": len(values)}
        if len(values) > 1:
            row["spread"] = float(np.std(values, ddof=1))
        both = [(a, b) for a, b in pairs if name in metrics[a] and name in metrics[b]]
        if both and own != base:
            differences = [metrics[a][name] - metrics[b][name] for a, b in both]
            seeds = paired_t(differences)
            over_images = None
            if all(name in resampled.get(cell, {}) for pair in both for cell in pair):
                drawn = [resampled[a][name] - resampled[b][name] for a, b in both]
                over_images = bootstrap_interval(100 * np.mean(drawn, axis=0), images)
            row |= {
                "difference": seeds.mean,
                "difference_spread": float(np.std(differences, ddof=1)) if len(both) > 1 else None,
                "pairs": len(both),
                "over_seeds": seeds.interval,
                "over_images": over_images,
                "interval": wider(seeds.interval, over_images),
                "p": seeds.p,
            }
        rows[name] = row
    costs = [_read_json(cell.folder / "cost.json") or {} for cell in own]
    cost = {
        key: float(np.mean([each[key] for each in costs if key in each]))
        for key in ("seconds_per_step", "gpu_gigabytes")
        if any(key in each for each in costs)
    }
    first = own[0] if own else None
    return {
        "loss": loss,
        "spec": first.spec if first else loss,
        "lr": first.lr if first else None,
        "scale": first.scale if first else None,
        "seeds": [cell.seed for cell in own],
        "metrics": rows,
        **cost,
    }


def _remarks(
    compared: CompareConfig,
    training: TrainingConfig,
    cells: list[Cell],
    done: list[Cell],
    images: int,
) -> list[str]:
    """How the numbers came about, and what is to be said against them."""
    chosen = "epochs"
    if compared.lrs or compared.scales:
        chosen = "epochs and settings"
        settings = len(compared.lrs or [1]) * len(compared.scales or [1])
        notes = [
            f"Each candidate was trained at {settings} settings with {compared.seeds} seeds, and "
            f"takes the setting that is best on the split {training.data.val_split}."
        ]
    else:
        notes = [f"One learning rate, {training.train.lr:g}, was used for all candidates."]
    if compared.test_split is None:
        notes.append(
            f"The data has no other test split: {chosen} were chosen on the split "
            f"{training.data.val_split}, too, which flatters every candidate a little."
        )
    if len(done) < len(cells):
        notes.append(f"{len(cells) - len(done)} of {len(cells)} runs are missing.")
    if 0 < images < FEW_IMAGES:
        notes.append(f"{images} images are few: the interval over them is somewhat too narrow.")
    return notes


def _sentence(candidate: dict[str, Any], result: dict[str, Any], comparisons: int) -> str:
    """What the comparison with the reference comes to."""
    metric, threshold = result["metric"], result["threshold"]
    names = f"{candidate['loss']} and {result['reference']}"
    row = candidate["metrics"].get(metric, {})
    if "difference" not in row:
        return f"{names} cannot be compared: they have no seed in common that both are done with."
    difference, seeds = row["difference"], row["pairs"]
    verb = "leads" if difference >= 0 else "trails"
    size = f"{abs(difference):.1f}"
    claim = f"{candidate['loss']} {verb} {result['reference']} by {size} {metric}"
    over_seeds, over_images = row["over_seeds"], row["over_images"]
    if over_seeds is None:
        return (
            f"{claim} with one seed, which says nothing of what another seed would give: not told "
            "apart; take at least 3 seeds."
        )
    interval: Interval = _signed(row["interval"], difference)
    claim += f" (95 % interval {interval.low:.1f} to {interval.high:.1f} over {seeds} seeds)"
    images_tell = over_images is None or 0 not in over_images
    if row["holm_p"] < 1 - LEVEL and images_tell:
        if abs(difference) < threshold:
            return f"{claim}: told apart, though by less than the {threshold:g} that would matter."
        sure = interval.low > threshold
        return f"{claim}: told apart{f', and by more than {threshold:g}' * sure}."
    if max(abs(interval.low), abs(interval.high)) < threshold:
        return f"{claim}: not told apart, and what is left is less than {threshold:g} either way."
    needed = seeds_to_tell(difference, row["difference_spread"], max(1, comparisons))
    number = "more than 1000" if needed is None else f"about {max(needed, seeds + 1)}"
    more = f"{number} seeds would tell {size}"
    if not images_tell:
        more += f", on more than these {result['images']} images"
    if 0 not in over_seeds and images_tell:
        claim += f", which is not enough for one of {comparisons} comparisons"
    return f"{claim}: not told apart; {more}."


def _signed(interval: Interval, difference: float) -> Interval:
    """The interval of the lead: of a candidate that trails, turned round."""
    return interval if difference >= 0 else Interval(-interval.high, -interval.low)


def write_results(folder: Path, result: dict[str, Any]) -> None:
    """Write comparison.json and comparison.csv."""
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    (folder / "comparison.json").write_text(text, encoding="utf-8")
    columns = ["loss", "lr", "scale", "metric", "runs", "mean", "spread", "difference"]
    columns += ["over_seeds_low", "over_seeds_high", "over_images_low", "over_images_high", "p"]
    with (folder / "comparison.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, extrasaction="ignore")
        writer.writeheader()
        for candidate in result["candidates"]:
            for metric, row in candidate["metrics"].items():
                ends = {
                    f"{key}_{end}": value
                    for key in ("over_seeds", "over_images")
                    if row.get(key)
                    for end, value in zip(("low", "high"), row[key], strict=True)
                }
                writer.writerow({**candidate, "metric": metric, **row, **ends})


def print_comparison(result: dict[str, Any]) -> None:
    """Print the sentences, the notes and the table."""
    for sentence in result["sentences"]:
        print(sentence)
    print()
    width = max(len(each["loss"]) for each in result["candidates"])
    head = f"{'':{width}}    mean  spread  difference  over seeds       over images      s/step"
    names = list(dict.fromkeys(n for each in result["candidates"] for n in each["metrics"]))
    classes = [name for name in names if " of " in name]
    shown = [name for name in names if name not in classes or len(classes) <= MOST_CLASSES]
    print(f"points on the split {result['split']} ({result['images']} images)\n{head}")
    for name in shown:
        print(name)
        for each in result["candidates"]:
            if name in each["metrics"]:
                row = each["metrics"][name]
                time = f"  {_number(each.get('seconds_per_step'), 6, digits=3)}"
                print(
                    f"  {each['loss']:{width}} {row['mean']:6.1f} {_number(row['spread'], 7)}"
                    f"  {_number(row.get('difference'), 10, '+')}  {_ends(row.get('over_seeds'))}"
                    f"  {_ends(row.get('over_images'))}{time if name == result['metric'] else ''}"
                )
    if shown != names:
        print(f"the {len(classes)} classes are in comparison.csv")
    for note in result["notes"]:
        print(f"note: {note}")


def _number(value: float | None, width: int, sign: str = "", digits: int = 1) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{sign}{width}.{digits}f}"


def _ends(interval: Interval | None) -> str:
    return f"{'-' if interval is None else f'{interval[0]:+.1f} to {interval[1]:+.1f}':<15}"
