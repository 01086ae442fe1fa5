"""Train a segmentation model with the losses of your choice; judge it by its mean IoU.

Without further options it learns synthetic shapes, drawn on first use: no data is needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.census import say_model, say_pixels
from common.checkpoint import load_checkpoint, load_state
from common.config import SegmentationConfig, check_memory, parse_training
from common.data import Batch, TrainingImages, load_data
from common.engine import fit
from common.errors import usage_errors, writing
from common.evaluate import check_classes, drawable, evaluate_segmenter, normalize, segment
from common.launch import start
from common.per_image import PerImage
from common.report import draw_masks, handful, plot_curves, print_metrics, write_metrics
from common.segmenters import build_segmenter, load_segmenter_weights
from common.signals import Signals

from lightning_fabric import Fabric
from torch import Tensor, nn

from detseg_losses.integrations import model_losses, use_losses
from detseg_losses.integrations.samples import VOID


@usage_errors()
def main() -> None:
    """Run the tool."""
    config = parse_training(SegmentationConfig, __doc__)
    with start(config) as (fabric, output, signals):
        train_and_show(config, fabric, output, signals)


def train_and_show(
    config: SegmentationConfig, fabric: Fabric, output: Path, signals: Signals
) -> None:
    """Train, and leave the metrics and pictures of the best epoch."""
    say_model(config, fabric.print)
    train = load_data(config.data, "segmentation", "train", config.seed, fabric.print)
    val = load_data(config.data, "segmentation", "val", config.seed, fabric.print)
    check_classes(val, train.classes)
    check_memory(
        config.data, config.train.batch_size // (config.train.accumulate * fabric.world_size)
    )
    say_pixels(train, "train", config.data.faults, fabric.print)
    say_pixels(val, "val", config.data.faults, fabric.print)

    segmenter = build_segmenter(config.model, config.data, train.classes, config.seed)
    if not config.resume:
        fabric.print(load_segmenter_weights(segmenter, config.model, train.classes))
    with usage_errors(ValueError):
        use_losses(
            segmenter,
            config.loss,
            mode=config.model.mode,
            ignore_index=VOID,
            sync=fabric.world_size > 1,  # means and ratios over the batch of all processes
        )

    terms = model_losses(segmenter)

    def losses(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        output = model(normalize(batch["image"], config.data), batch["mask"])
        # Transformers' models return the sum, beside their logits; the others the terms.
        loss = output["loss"] if "loss" in output else sum(output.values())
        return loss, terms.values

    def evaluate() -> tuple[dict[str, Any], PerImage]:
        return evaluate_segmenter(fabric, segmenter, val, config.data, config.train.batch_size)

    images = TrainingImages(train, config.data, config.seed)
    fit(fabric, signals, segmenter, images, config, output, "mIoU", losses, evaluate)

    if fabric.is_global_zero:
        with writing(output):
            file = output / "best.ckpt"
            best = load_checkpoint(file, config.task)
            load_state(segmenter, best["model"], f"the model of {file}")
            write_metrics(output, best["metrics"])
            print_metrics(best["metrics"])
            plot_curves(output, "mIoU")
            if shown := drawable(handful(val)):
                masks = segment(fabric, segmenter, shown, config.data, config.train.batch_size, [])
                draw_masks(
                    shown, [mask.numpy() for _, mask, _ in masks], output / "predictions.png"
                )
            print(f"results: {output}")


if __name__ == "__main__":
    main()
