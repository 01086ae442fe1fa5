"""Judge a segmentation model by its mean IoU, and save its masks.

The data is that of the training run, unless data options say otherwise.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from common.checkpoint import load_state
from common.config import (
    EvalSegmentationConfig,
    SegmentationConfig,
    check_memory,
    from_dict,
    parse_evaluation,
)
from common.data import load_data
from common.errors import usage_errors, writing
from common.evaluate import (
    add_note,
    check_classes,
    check_folder,
    confusion_of,
    judge_masks,
    make_folder,
    mask_files,
    segment,
    without_faulty,
)
from common.per_image import write_per_image
from common.report import draw_masks, handful, print_metrics, write_metrics
from common.segmenters import build_segmenter

from lightning_fabric import Fabric
from PIL import Image

from detseg_losses.integrations import use_losses
from detseg_losses.integrations.samples import VOID, Fault, report_faults


@usage_errors()
def main() -> None:
    """Run the tool."""
    config, checkpoint = parse_evaluation(EvalSegmentationConfig, __doc__)
    check_folder("--output", config.output)
    check_folder("--save_masks", config.save_masks)
    run = from_dict(SegmentationConfig, checkpoint["config"])
    fabric = Fabric(devices=1, precision=run.train.precision)
    data = load_data(config.data, "segmentation", "val", run.seed, print)
    check_classes(data, checkpoint["classes"])
    check_memory(config.data, min(config.batch_size, len(data)))
    if config.save_masks is not None:
        root = Path(config.data.root or "data").expanduser()
        files = mask_files(Path(config.save_masks), data, root)
    segmenter = build_segmenter(
        replace(run.model, weights="none"), config.data, data.classes, run.seed
    )
    use_losses(segmenter, run.loss, mode=run.model.mode, ignore_index=VOID)
    load_state(segmenter, checkpoint["model"], f"the model of {config.checkpoint}")
    segmenter.to(fabric.device)

    make_folder(config.output)
    make_folder(config.save_masks)
    found = []
    faults: list[Fault] = []
    batches = config.data, config.batch_size
    for index, mask, truth in segment(fabric, segmenter, data, *batches, faults):
        found.append((data.names[index], confusion_of(mask, truth, len(data.classes))))
        if config.save_masks is not None:
            _save(Image.fromarray(mask.numpy()), files[index])
    judged = without_faulty(data, faults)
    if faults:
        print(report_faults(faults))
    metrics, counts = judge_masks(found, data.classes)
    add_note(metrics, faults)
    print_metrics(metrics)
    if config.output is not None:
        output = Path(config.output)
        with writing(output):
            write_per_image(output, counts)
            write_metrics(output, metrics)
            shown = handful(judged)
            masks = segment(fabric, segmenter, shown, *batches, [])
            draw_masks(shown, [mask.numpy() for _, mask, _ in masks], output / "predictions.png")
        print(f"results: {output}")


def _save(mask: Image.Image, file: Path) -> None:
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        mask.save(file)


if __name__ == "__main__":
    main()
