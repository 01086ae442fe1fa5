"""Train a detector with the losses of your choice; judge it by COCO's average precision.

Without further options it learns synthetic shapes, drawn on first use: no data is needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.census import say_model, say_objects
from common.checkpoint import load_checkpoint, load_state
from common.config import DetectionConfig, check_memory, parse_training
from common.data import Batch, TrainingImages, load_data
from common.detectors import (
    build_detector,
    check_keypoints,
    check_losses,
    extra_of,
    load_detector_weights,
)
from common.engine import fit
from common.errors import usage_errors, writing
from common.evaluate import check_classes, detect, drawable, evaluate_detector
from common.launch import start
from common.per_image import PerImage
from common.report import draw_detections, handful, plot_curves, print_metrics, write_metrics
from common.signals import Signals

from lightning_fabric import Fabric
from torch import Tensor, nn

from detseg_losses.integrations import model_losses, use_losses


@usage_errors()
def main() -> None:
    """Run the tool."""
    config = parse_training(DetectionConfig, __doc__, check_losses)
    with start(config) as (fabric, output, signals):
        train_and_show(config, fabric, output, signals)


def train_and_show(config: DetectionConfig, fabric: Fabric, output: Path, signals: Signals) -> None:
    """Train, and leave the metrics and pictures of the best epoch."""
    say_model(config, fabric.print)
    extra = extra_of(config.model)
    train = load_data(config.data, "detection", "train", config.seed, fabric.print, extra)
    val = load_data(config.data, "detection", "val", config.seed, fabric.print, extra)
    check_classes(val, train.classes)
    check_keypoints(config.model, train)
    check_memory(
        config.data, config.train.batch_size // (config.train.accumulate * fabric.world_size)
    )
    say_objects(train, "train", fabric.print)
    say_objects(val, "val", fabric.print)

    detector = build_detector(config.model, config.data, train.classes, config.seed)
    if not config.resume:
        fabric.print(load_detector_weights(detector, config.model, train.classes))
    with usage_errors(ValueError):
        use_losses(detector, config.loss)
    terms = model_losses(detector)

    def losses(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        by_head = model(list(batch["image"] / 255), batch["target"])
        return sum(by_head.values()), terms.values

    def evaluate() -> tuple[dict[str, Any], PerImage | None]:
        return evaluate_detector(fabric, detector, val, config.data, config.train.batch_size)

    images = TrainingImages(train, config.data, config.seed)
    fit(fabric, signals, detector, images, config, output, "AP", losses, evaluate)

    if fabric.is_global_zero:
        with writing(output):
            file = output / "best.ckpt"
            best = load_checkpoint(file, config.task)
            load_state(detector, best["model"], f"the model of {file}")
            write_metrics(output, best["metrics"])
            print_metrics(best["metrics"])
            plot_curves(output, "AP")
            if shown := drawable(handful(val)):
                results = detect(fabric, detector, shown, config.data, config.train.batch_size, [])
                draw_detections(shown, results, output / "predictions.png")
            print(f"results: {output}")


if __name__ == "__main__":
    main()
