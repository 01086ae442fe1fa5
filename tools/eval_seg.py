"""Judge a segmentation model by its mean IoU, and save its masks.

The data is that of the training run, unless data options say otherwise.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from lightning_fabric import Fabric
from PIL import Image

from common.config import EvalSegmentationConfig, SegmentationConfig, from_dict, parse_evaluation
from common.data import load_data
from common.errors import usage_errors
from common.evaluate import check_classes, segment
from common.report import draw_masks, handful, print_metrics, write_metrics
from common.segmenters import build_segmenter
from detseg_losses.integrations import use_losses
from detseg_losses.integrations.samples import VOID
from detseg_losses.integrations.voc import ConfusionMatrix


@usage_errors()
def main() -> None:
    """Run the tool."""
    config, checkpoint = parse_evaluation(EvalSegmentationConfig, __doc__)
    run = from_dict(SegmentationConfig, checkpoint["config"])
    fabric = Fabric(devices=1, precision=run.train.precision)
    data = load_data(config.data, "segmentation", "val", run.seed, print)
    check_classes(data, checkpoint["classes"])
    segmenter = build_segmenter(
        replace(run.model, weights="none"), config.data, data.classes, run.seed
    )
    use_losses(segmenter, run.loss, mode=run.model.mode, ignore_index=VOID)
    segmenter.load_state_dict(checkpoint["model"])
    segmenter.to(fabric.device)

    names = data.names
    confusion = ConfusionMatrix(len(data.classes))
    for index, mask, truth in segment(fabric, segmenter, data, config.data, config.batch_size):
        confusion.update(mask, torch.from_numpy(truth))
        if config.save_masks is not None:
            file = (Path(config.save_masks) / names[index]).with_suffix(".png")
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask.numpy()).save(file)
    metrics = confusion.metrics(data.classes)
    print_metrics(metrics)
    if config.output is not None:
        output = Path(config.output)
        write_metrics(output, metrics)
        shown = handful(data)
        masks = segment(fabric, segmenter, shown, config.data, config.batch_size)
        draw_masks(shown, [mask.numpy() for _, mask, _ in masks], output / "predictions.png")
        print(f"results: {output}")


if __name__ == "__main__":
    main()
