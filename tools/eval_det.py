"""Judge detections by COCO's average precision: those of a checkpoint, or those in a results file.

With --checkpoint the data is that of the training run, unless data options say otherwise.
With --predictions and --annotations two files are compared; no model is needed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.checkpoint import load_state
from common.config import (
    DetectionConfig,
    EvalDetectionConfig,
    check_memory,
    from_dict,
    parse_evaluation,
)
from common.data import load_data
from common.detectors import build_detector, extra_of
from common.errors import UsageError, usage_errors, writing
from common.evaluate import (
    add_note,
    check_classes,
    check_folder,
    detect,
    make_folder,
    without_faulty,
)
from common.per_image import write_per_image
from common.report import draw_detections, handful, print_metrics, print_table, write_metrics

from lightning_fabric import Fabric

from detseg_losses.integrations import use_losses
from detseg_losses.integrations.coco import coco_evaluation, load_annotations, load_results
from detseg_losses.integrations.samples import Fault, report_faults
from detseg_losses.integrations.voc import voc_metrics


@usage_errors()
def main() -> None:
    """Run the tool."""
    config, checkpoint = parse_evaluation(EvalDetectionConfig, __doc__)
    check_folder("--output", config.output)
    faults: list[Fault] = []
    if checkpoint:
        if config.predictions is not None or config.annotations is not None:
            raise UsageError("--checkpoint has its own data: give no --predictions, --annotations")
        truth, results = _detect(config, checkpoint, faults)
    elif config.predictions is not None and config.annotations is not None:
        truth = load_annotations(Path(config.annotations))
        results = load_results(Path(config.predictions))
    else:
        raise UsageError("give --checkpoint, or --predictions together with --annotations")

    make_folder(config.output)
    metrics, matches = coco_evaluation(truth, results, max_dets=config.max_dets)
    add_note(metrics, faults)
    print_metrics(metrics)
    if config.voc is not None:
        voc = voc_metrics(truth, results, eleven_point=config.voc == 2007)
        metrics["voc"] = voc
        print_table(f"VOC {config.voc} AP", {"mean": voc["mAP"], **voc["per_class"]})
    if config.output is not None:
        output = Path(config.output)
        with writing(output):
            write_per_image(output, matches)
            write_metrics(output, metrics)
        print(f"results: {config.output}")


def _detect(
    config: EvalDetectionConfig, checkpoint: dict[str, Any], faults: list[Fault]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The ground truth and what the detector of the checkpoint finds."""
    run = from_dict(DetectionConfig, checkpoint["config"])
    fabric = Fabric(devices=1, precision=run.train.precision)
    data = load_data(config.data, "detection", "val", run.seed, print, extra_of(run.model))
    check_classes(data, checkpoint["classes"])
    check_memory(config.data, min(config.batch_size, len(data)))
    detector = build_detector(run.model, config.data, data.classes, run.seed)
    use_losses(detector, run.loss)
    load_state(detector, checkpoint["model"], f"the model of {config.checkpoint}")
    detector.to(fabric.device)
    make_folder(config.output)
    results = detect(fabric, detector, data, config.data, config.batch_size, faults)
    data = without_faulty(data, faults)
    if faults:
        print(report_faults(faults))
    if config.output is not None:
        output = Path(config.output)
        with writing(output):
            (output / "results.json").write_text(json.dumps(results), encoding="utf-8")
            draw_detections(handful(data), results, output / "predictions.png")
    return data.ground_truth(), results


if __name__ == "__main__":
    main()
