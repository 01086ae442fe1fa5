"""The Ultralytics adapter: its own numbers at its own losses, any losses else, in whole runs."""

import contextlib
import copy
import csv
import io
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch.nn.parallel import DistributedDataParallel

# Before the import: no network, and settings that are not the user's.
os.environ |= {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false", "NO_ALBUMENTATIONS_UPDATE": "1"}
os.environ["YOLO_CONFIG_DIR"] = (SETTINGS := tempfile.TemporaryDirectory()).name
pytest.importorskip("ultralytics")

from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import DetectionModel, OBBModel, SegmentationModel
from ultralytics.utils import LOGGER
from ultralytics.utils.dist import ddp_cleanup, generate_ddp_file
from ultralytics.utils.torch_utils import ModelEMA

import coco_to_yolo
import detseg_losses
from detseg_losses import SpecError
from detseg_losses.integrations import model_losses, restore_losses, use_losses, yolo
from detseg_losses.integrations.coco import CocoDetection
from detseg_losses.integrations.samples import report_faults
from processes import run_in_processes

ROOT = Path(__file__).parent.parent
CLASSES = 5

STOCK = {
    "yolo11n.yaml": "bce+ciou+dfl",
    "yolov8n.yaml": "bce+ciou",
    "yolo26n.yaml": "bce+ciou+l1",
    "yolo11n-seg.yaml": "bce+ciou+dfl; mask: bce",
    "yolo26n-seg.yaml": "bce+ciou+l1; mask: bce",
}
"""What each model trains with by itself."""


def small_model(name="yolo11n.yaml"):
    """A model without batch statistics, which would make gradients of rounding errors large."""
    torch.manual_seed(0)
    cls = SegmentationModel if "seg" in name else DetectionModel
    model = cls(name, nc=CLASSES, verbose=False).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    model.args = get_cfg()
    return model


@pytest.fixture
def batch():
    """Two objects, one, none."""
    masks = torch.zeros(3, 16, 16, dtype=torch.uint8)
    masks[0, 4:12, 4:12] = 1
    masks[0, 2:7, 2:7] = 2
    masks[1, 3:10, 2:14] = 1
    return {
        "img": torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1)),
        "batch_idx": torch.tensor([0.0, 0, 1]),
        "cls": torch.tensor([[0.0], [2], [4]]),
        "bboxes": torch.tensor(
            [[0.5, 0.5, 0.5, 0.5], [0.28, 0.28, 0.3, 0.3], [0.5, 0.4, 0.8, 0.4]]
        ),
        "masks": masks,
        "sem_masks": torch.zeros(3, 16, 16),
    }


@pytest.fixture
def nothing(batch):
    empty = {"batch_idx": torch.zeros(0), "cls": torch.zeros(0, 1), "bboxes": torch.zeros(0, 4)}
    return batch | empty | {"masks": torch.zeros(3, 16, 16, dtype=torch.uint8)}


def run(model, batch):
    """The losses and the gradients of all parameters."""
    model.zero_grad()
    loss, items = model.loss(dict(batch))
    loss.sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"sum": loss.detach(), **items}, gradients


def assert_equal(first, second, tolerance=1e-5):
    """Torch's own BCE is exact to some 6e-8 an entry, and most entries are hardly more than 0."""
    (losses, gradients), (other_losses, other_gradients) = first, second
    torch.testing.assert_close(losses, other_losses, rtol=tolerance, atol=30 * tolerance)
    assert gradients.keys() == other_gradients.keys()
    scale = max(gradient.abs().max().item() for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            other_gradients[name], gradient, rtol=1e-3, atol=tolerance * max(scale, 1)
        )


@pytest.mark.parametrize("name", STOCK)
def test_the_stock_losses_give_the_stock_values_and_gradients(name, batch, nothing):
    model = small_model(name)
    keys = list(model.state_dict())
    for inputs in (batch, nothing):
        expected = run(restore_losses(model), inputs)
        use_losses(model, STOCK[name])
        assert_equal(expected, run(model, inputs))
    assert list(model.state_dict()) == keys


def test_weights_of_classes_too(batch):
    model = small_model()
    model.class_weights = torch.tensor([0.5, 1, 2, 1, 0.5])
    expected = run(model, batch)
    assert_equal(expected, run(use_losses(model, "bce+ciou"), batch))
    assert use_losses(model, "bce+ciou").criterion.class_weights is not None


def listened(module, batch, model):
    """The inputs of a part of the criterion in a run, and the values of that run."""
    heard = []
    handle = module.register_forward_pre_hook(lambda _, inputs: heard.append(inputs))
    losses, _ = run(model, batch)
    handle.remove()
    return heard, losses


def test_losses_of_a_softmax_are_taken_as_those_of_sigmoids(batch):
    model = small_model("yolo11n-seg.yaml")
    expected = run(use_losses(model, "giou+2*focal; mask: bce+dice"), batch)
    with pytest.warns(UserWarning, match="of YOLO's masks are independent .*: 'ce' is taken as"):
        use_losses(model, "giou+2*softmax_focal; mask: ce+dice")
    assert_equal(expected, run(model, batch))


def test_the_changed_terms_are_the_ones_called(batch):
    model = use_losses(small_model(), "giou+2*focal(gamma=1.5)+dfl")
    ((logits, scores),), losses = listened(model.criterion.bce, batch, model)
    focal = detseg_losses.sigmoid_focal_loss(logits, scores, gamma=1.5, reduction="sum")
    args = model.args
    expected = 2 * focal / max(scores.sum(), 1)
    torch.testing.assert_close(losses["cls_loss"], args.cls * expected.detach())
    torch.testing.assert_close(model_losses(model).values["focal"], expected)

    (inputs,), losses = listened(model.criterion.bbox_loss, batch, model)
    _, boxes, _, true_boxes, scores, count, kept = inputs[:7]
    giou = detseg_losses.generalized_box_iou_loss(boxes[kept], true_boxes[kept])
    expected = (giou * scores.sum(-1)[kept]).sum() / count
    torch.testing.assert_close(losses["box_loss"], args.box * expected.detach())
    assert set(model.criterion.losses["detection"].values) == {"giou", "focal", "dfl"}


def test_masks(batch):
    model = use_losses(small_model("yolo11n-seg.yaml"), "giou+focal; mask: 0.5*bce+3*dice")
    heard, losses = listened(model.criterion.single_mask_loss, batch, model)
    pixels = regions = count = 0
    for masks, coefficients, prototypes, boxes, area in heard:
        for mask, coefficient, (x1, y1, x2, y2), share in zip(
            masks, coefficients, boxes, area, strict=True
        ):
            logits = (coefficient[:, None, None] * prototypes).sum(0)
            places = torch.arange(16)
            rows = (places >= y1) & (places < y2)
            columns = (places >= x1) & (places < x2)
            x, y = logits[rows][:, columns], mask[rows][:, columns]
            bce = torch.nn.functional.binary_cross_entropy_with_logits(x, y, reduction="sum")
            pixels += bce / (16 * 16 * share)
            regions += 1 - 2 * (x.sigmoid() * y).sum() / (x.sigmoid() + y).sum()
            count += 1
    found = model_losses(model).values
    assert set(found) == {"giou", "focal", "mask.bce", "mask.dice"}
    values = {name: found[f"mask.{name}"] for name in ("bce", "dice")}
    torch.testing.assert_close(values["bce"], 0.5 * (pixels / count).detach())
    torch.testing.assert_close(values["dice"], 3 * (regions / count).detach())
    torch.testing.assert_close(losses["seg_loss"], model.args.box * sum(values.values()))


@pytest.mark.parametrize("name", ["yolo11n.yaml", "yolo26n-seg.yaml"])
def test_undo_is_exact(name, batch):
    model = small_model(name)
    before = run(model, batch)
    contents = [dict(vars(branch)) for branch in yolo._branches(model.criterion)]
    spec = "giou+focal; mask: dice" if "seg" in name else "giou+focal"
    use_losses(use_losses(model, "siou+bce"), spec)
    changed = run(model, batch)
    assert changed[0]["cls_loss"] != before[0]["cls_loss"]
    assert changed[0]["box_loss"] != before[0]["box_loss"]
    again = run(restore_losses(model), batch)
    assert [vars(branch) for branch in yolo._branches(model.criterion)] == contents
    assert all(torch.equal(before[0][key], again[0][key]) for key in before[0])
    assert all(torch.equal(before[1][key], again[1][key]) for key in before[1])
    restore_losses(model)


@pytest.mark.parametrize("name", ["yolo11n.yaml", "yolo26n.yaml"])
def test_undo_leaves_no_criterion_where_none_was(name, batch):
    model = small_model(name)
    use_losses(use_losses(model, "giou+bce"), "giou+focal")
    assert restore_losses(model).criterion is None


def test_changed_options_count_after_use_losses(batch):
    """And an end-to-end head goes on in its schedule."""
    model = use_losses(small_model("yolo26n.yaml"), "giou+bce")
    model.criterion.update()
    share = model.criterion.o2m
    before, _ = run(model, batch)
    model.args = get_cfg(overrides={"box": 2 * model.args.box})
    after, _ = run(use_losses(model, "giou+bce"), batch)
    torch.testing.assert_close(after["box_loss"], 2 * before["box_loss"])
    assert (model.criterion.updates, model.criterion.o2m) == (1, share)


def test_copies_keep_the_losses(batch):
    spec = "giou+focal(alpha=[.1,.2,.3,.4,.5]); mask: bce+dice"
    model = use_losses(small_model("yolo26n-seg.yaml"), spec)
    expected = run(model, batch)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    fresh = use_losses(small_model("yolo26n-seg.yaml"), spec)
    fresh.load_state_dict(model.state_dict())
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
        fresh,
    ]
    for each in copies:
        assert_equal(expected, run(each, batch))
        assert each.criterion.losses["mask"] is not model.criterion.losses["mask"]


def test_two_processes(batch):
    """Each normalises by what it has, as in Ultralytics, and the gradients are averaged."""
    parts = [of_image(batch, 0), of_image(batch, 1)]
    model = use_losses(small_model(), "giou+focal+dfl")
    first, second = (run(model, part)[1] for part in parts)
    for gradients in run_in_processes(_gradients_of_rank, parts):
        for name, gradient in gradients.items():
            expected = (first[name] + second[name]) / 2
            torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)


def of_image(batch, index):
    mine = batch["batch_idx"] == index
    objects = {key: batch[key][mine] for key in ("cls", "bboxes")}
    return {"img": batch["img"][index : index + 1], "batch_idx": torch.zeros(mine.sum())} | objects


def _gradients_of_rank(rank, parts):
    model = use_losses(small_model(), "giou+focal+dfl")
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    wrapped(dict(parts[rank]))[0].sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("yolo11n.yaml", "giou+focal"),
        ("yolo26n.yaml", "siou+quality_focal+smooth_l1"),
        ("yolo11n-seg.yaml", "nwd+varifocal; mask: lovasz+focal_tversky"),
    ],
)
def test_a_model_learns(name, spec, batch):
    model = use_losses(small_model(name), spec).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    history = []
    for _ in range(8):
        loss = model.loss(dict(batch))[0].sum()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < history[0], history


def test_bf16_autocast(batch):
    model = use_losses(small_model("yolo11n-seg.yaml"), "giou+focal+dfl; mask: bce+dice")
    full = run(model, batch)[0]
    with torch.autocast("cpu", torch.bfloat16):
        half = run(model, batch)[0]
    for key, value in half.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, full[key], rtol=0.1, atol=0.05)


@pytest.fixture
def messages(caplog):
    LOGGER.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, LOGGER.name)
    yield caplog
    LOGGER.removeHandler(caplog.handler)


def test_another_scale_is_told_once(batch, nothing, messages):
    model = use_losses(small_model(), "0.2*giou+focal+5*dfl")
    for inputs in (nothing, batch, batch):
        run(model, inputs)
    told = [line for line in messages.messages if "first batch" in line]
    assert len(told) == 3
    assert re.search(r"cls_loss is 0\.0\d+ times .* larger weight .*: write '20\*focal'", told[0])
    assert re.search(r"box_loss is 0\.2 times .* larger weight .*: write '1\*giou'", told[1])
    assert re.search(r"dfl_loss is 5 times .* smaller weight .*: write '1\*dfl'", told[2])
    messages.clear()
    run(use_losses(model, "ciou+bce"), batch)
    assert not messages.messages
    model = use_losses(small_model("yolo11n-seg.yaml"), "ciou+bce; mask: 0.1*bce+0.1*bce")
    for inputs in (nothing, batch):
        run(model, inputs)
    (told,) = (line for line in messages.messages if "first batch" in line)
    assert re.search(r"seg_loss is 0\.2 times .*: write 'mask: 0\.5\*bce \+ 0\.5\*bce'", told)


@pytest.mark.parametrize(
    ("name", "spec", "message"),
    [
        ("yolo11n.yaml", "giou+focl", "did you mean 'focal'"),
        ("yolo11n.yaml", "giou+dice", "write 'giou; mask: dice'"),
        ("yolo11n.yaml", "giou+poly", "YOLO has no use for 'poly', it has for losses such as bce"),
        ("yolo11n.yaml", "giou+ghm", "'ghm' is a mean by nature"),
        ("yolo11n.yaml", "giou+focal(reduction='sum')", "itself decides 'reduction'"),
        ("yolo11n.yaml", "giou+focal(class_weights=[1, 2])", "and the model 5 classes"),
        ("yolo11n.yaml", "giou+learned*focal", "does not know learned weights"),
        ("yolo11n.yaml", "giou+focal; mask: dice", "DetectionModel has no masks"),
        ("yolo11n.yaml", "giou+focal+l1", "has no l1_loss, and so no use for 'l1'"),
        ("yolo26n.yaml", "giou+focal+dfl", "has no dfl_loss, and so no use for 'dfl'"),
        ("yolo11n-seg.yaml", "giou+focal; mask: giou", "'giou' is a loss of boxes"),
        ("yolo11n-seg.yaml", "giou+focal; mask: poly", "no use for 'poly'.*bce"),
        ("yolo11n-seg.yaml", "giou+focal; mask: ghm", "'ghm' is a mean by nature"),
        ("yolo11n-seg.yaml", "giou+focal; masks: dice", "column 13.*did you mean 'mask'"),
        ("yolo11n-seg.yaml", "giou+focal; dice", "column 13.*as in 'mask: dice'"),
        ("yolo11n-seg.yaml", "mask: dice; giou", "column 13.*as in 'detection: giou'"),
        ("yolo11n-seg.yaml", "giou; mask: bce; mask: dice", "'mask' is given twice"),
    ],
)
def test_an_unsuitable_loss_is_one_clear_line_and_changes_nothing(name, spec, message):
    model = small_model(name)
    with pytest.raises(SpecError, match=message) as error:
        use_losses(model, spec)
    assert "\n" not in str(error.value)
    assert getattr(model, "criterion", None) is None


def test_meta_device_finds_no_wait_for_the_device():
    """A copy to the host, or a tensor of another device, raises on meta."""
    model = small_model()
    for spec in ("giou+siou+focal+bce+dfl", "giou+focal+l1"):
        model = small_model("yolo26n.yaml" if "l1" in spec else "yolo11n.yaml")
        branch = yolo._branches(use_losses(model, spec).criterion)[0]
        for part in (branch.bce, branch.bbox_loss):
            part.compare = False
            part.to("meta")
        bins = 4 * (16 if branch.use_dfl else 1)
        with torch.device("meta"):
            raw = torch.randn(2, 50, bins, requires_grad=True)
            boxes = torch.randn(2, 50, 4, requires_grad=True)
            logits = torch.randn(2, 50, CLASSES, requires_grad=True)
            scores = torch.rand(2, 50, CLASSES)
            box, side = branch.bbox_loss(
                raw,
                boxes,
                torch.rand(50, 2),
                torch.rand(2, 50, 4),
                scores,
                scores.sum(),
                torch.ones(2, 50, dtype=torch.bool),
                torch.ones(2),
                torch.ones(50, 1),
            )
            (branch.bce(logits, scores).sum() + box + side).backward()
        assert all(each.grad is not None for each in (raw, boxes, logits))


def test_a_role_without_a_term_stays_and_says_so(batch):
    model = small_model()
    stock, _ = run(model, batch)
    with pytest.warns(UserWarning, match="'cls_loss' stays as it is"):
        use_losses(model, "giou")
    ours, _ = run(model, batch)
    assert torch.equal(ours["cls_loss"], stock["cls_loss"])
    assert ours["box_loss"] != stock["box_loss"]
    with pytest.warns(UserWarning, match="'box_loss' stays as it is"):
        use_losses(model, "focal")
    run(model, batch)
    assert not model.criterion.bbox_loss.compare  # which would wait for the device in each step


def test_models_of_other_tasks():
    model = OBBModel("yolo11n-obb.yaml", nc=2, verbose=False)
    with pytest.raises(ValueError, match="no options yet"):
        use_losses(model, "giou+focal")
    model.args = get_cfg()
    with pytest.raises(TypeError, match="OBBModel has the criterion v8OBBLoss"):
        use_losses(model, "giou+focal")
    with pytest.raises(ValueError, match="not of pose"):
        yolo.trainer("giou+focal")(overrides={"task": "pose"})
    with pytest.raises(SpecError, match="did you mean 'giou'"):
        yolo.trainer("gious+focal")


def test_a_loss_string_may_name_its_parts():
    def terms(spec):
        return {stage: loss.names for stage, loss in yolo._read(spec).items()}

    both = {"detection": ["giou", "focal"], "mask": ["dice"]}
    assert terms("giou+focal; mask: dice;") == both
    assert terms("detection: giou+focal; mask: dice") == both
    assert terms("giou+focal;") == {"detection": ["giou", "focal"]}
    assert terms("mask: dice") == {"mask": ["dice"]}


def test_detectors_with_heads_of_another_kind():
    """They say that their task is one of YOLO's."""
    for name, head in (("rtdetr-l", "RTDETRDecoder"), ("yolov8s-worldv2", "WorldDetect")):
        with pytest.raises(TypeError, match=f"has the head {head}; losses are put into those of"):
            yolo._trainer_class("detect", "giou+focal").get_model(None, f"{name}.yaml")


def test_a_yolo_is_trained_by_a_trainer():
    """What it holds is not the model that its train() trains."""
    wrapper = YOLO("yolo11n.yaml")
    for verb in (lambda model: use_losses(model, "giou+focal"), restore_losses):
        with pytest.raises(TypeError, match=r"train\(trainer=detseg_losses.integrations.yolo"):
            verb(wrapper)
    with pytest.raises(ValueError, match=r"get_cfg\(\) for .* takes trainer=yolo.trainer"):
        use_losses(wrapper.model, "giou+focal")


def test_trainers_are_found_by_name():
    cls = yolo._trainer_class("segment", "giou+0.5*focal; mask: dice")
    assert pickle.loads(pickle.dumps(cls)) is cls
    assert cls.__name__.isidentifier()
    for name in ("detect", "detect_trainer_", "detect_trainer_xy", "other_trainer_61", "__path__"):
        assert not hasattr(yolo, name)


# --- the converter ---


def tool(*arguments):
    """The converter within this process, for a new one imports for seconds."""
    said = SimpleNamespace(returncode=0)
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()) as stdout,
        contextlib.redirect_stderr(io.StringIO()) as stderr,
    ):
        patch.setattr(sys, "argv", ["coco_to_yolo.py", *map(str, arguments)])
        try:
            coco_to_yolo.main()
        except SystemExit as end:
            said.returncode = end.code
    said.stdout, said.stderr = stdout.getvalue(), stderr.getvalue()
    return said


def square(x, y, side):
    return [x, y, x + side, y, x + side, y + side, x, y + side]


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """Twelve images of 64 pixels, of two categories whose ids have gaps; faults in the first."""
    root = tmp_path_factory.mktemp("coco")
    (root / "annotations").mkdir()
    (root / "train" / "more").mkdir(parents=True)
    generator = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(12):
        name = f"more/{number}.png" if number == 11 else f"{number}.png"
        image = Image.fromarray(generator.integers(0, 90, (64, 64, 3), np.uint8))
        if number != 10:
            x, y, side = (int(value) for value in generator.integers((0, 0, 16), (32, 32, 32)))
            colour = [(255, 0, 0), (0, 0, 255)][number % 2]
            ImageDraw.Draw(image).rectangle((x, y, x + side, y + side), fill=colour)
            annotations.append(
                {
                    "image_id": number,
                    "category_id": [3, 7][number % 2],
                    "bbox": [x, y, side, side],
                    "segmentation": [square(x, y, side)],
                }
            )
        image.save(root / "train" / name)
        images.append({"id": number, "file_name": name, "width": 64, "height": 64})
    first = annotations[0] | {"category_id": 3, "bbox": [2, 2, 8, 8]}
    crowd = {"size": [64, 64], "counts": [0, 4096]}
    annotations += [
        first | {"bbox": [60, 60, 20, 20], "segmentation": [square(60, 60, 20)]},
        first | {"bbox": [70, 70, 5, 5]},
        first | {"bbox": [5, 5, 0, 5]},
        first | {"category_id": 4},
        first | {"iscrowd": 1, "segmentation": crowd},
        first | {"segmentation": [square(2, 2, 3), square(7, 7, 3)]},
    ]
    categories = [{"id": 7, "name": "blue"}, {"id": 3, "name": "red"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / "instances_train.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def data(coco, tmp_path_factory):
    """The same for Ultralytics, with boxes and with outlines."""
    root = tmp_path_factory.mktemp("yolo")
    said = tool("--data", coco, "--output", root / "detect")
    assert said.returncode == 0, said.stderr
    assert "4 faults" in said.stdout
    again = tool("--data", coco, "--output", root / "segment", "--segments=true", "--copy=true")
    assert again.returncode == 0, again.stderr
    return root


def labels(file):
    return [[float(value) for value in line.split()] for line in file.read_text().splitlines()]


def test_converted_labels(data):
    first, second, third = labels(data / "detect/labels/train/0.txt")
    assert first[0] == second[0] == third[0] == 0
    assert second[1:] == [62 / 64, 62 / 64, 4 / 64, 4 / 64]
    assert third[1:] == [6 / 64, 6 / 64, 8 / 64, 8 / 64]
    assert [row[0] for row in labels(data / "detect/labels/train/more/11.txt")] == [1]
    assert not (data / "detect/labels/train/10.txt").exists()
    assert (data / "detect/images/train/10.png").is_symlink()
    text = (data / "detect/data.yaml").read_text()
    assert "0: red\n  1: blue" in text

    *_, outside, parts = labels(data / "segment/labels/train/0.txt")
    assert max(outside) == 1
    assert len(parts) > 2 * 8
    assert not (data / "segment/images/train/more/11.png").is_symlink()


@pytest.fixture
def faulty(tmp_path):
    """A data set of which a single object is sound, and two if outlines do not matter."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "train").mkdir()
    names = ["0.png", "0.jpg", "1.png"]  # two for one label file, and one of another size
    for name in names:
        Image.new("RGB", (64, 64)).save(tmp_path / "train" / name)
    images = [
        {"id": index, "file_name": name, "width": 64 << (index == 2), "height": 64}
        for index, name in enumerate(names)
    ]
    sound = {
        "image_id": 0,
        "category_id": 1,
        "bbox": [2, 2, 8, 8],
        "segmentation": [square(2, 2, 8)],
    }
    outlines = [
        square(9, 9, 9),
        [None],
        [["1", "2"] * 4],
        None,
        [[1, 2, 3, 4]],
        [[float("nan")] * 6],
    ]
    annotations = [
        sound,
        sound | {"image_id": 1},
        sound | {"image_id": 2},
        sound | {"image_id": [0]},
        sound | {"category_id": [1]},
        sound | {"bbox": [2, 2, "wide", 8]},
        *(sound | {"bbox": [9, 9, 9, 9], "segmentation": outline} for outline in outlines),
        sound | {"bbox": [9, 9, 9, 9], "segmentation": {"size": [9, 9], "counts": [81]}},
    ]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "annotations" / "instances_train.json").write_text(json.dumps(content))
    return tmp_path


def test_faulty_data_is_left_out_and_listed(faulty):
    for segments, count in (("false", 5), ("true", 12)):
        output = faulty / segments
        said = tool("--data", faulty, "--output", output, f"--segments={segments}")
        assert said.returncode == 0, said.stderr
        assert f"{count} faults" in said.stdout
        assert "1 x image is not of the size that its annotation states" in said.stdout
        assert "1 x image would share the label file of an image before it" in said.stdout
        assert [file.name for file in (output / "images/train").iterdir()] == ["0.png"]
        (file,) = (output / "labels/train").iterdir()
        assert len(labels(file)) == (1 if segments == "true" else 2)


PART = "part of a polygon"


def runs(*counts):
    return {"size": [64, 64], "counts": list(counts)}


@pytest.mark.parametrize(
    ("segmentation", "fault"),
    [
        ([[1, 2, 3, 4], square(9, 9, 9)], f"{PART} is not three or more points"),
        ([square(9, 9, 9), [9, 9, 18, float("nan"), 9, 18]], f"{PART} is not three or more points"),
        ([square(9, 9, 9), [9, 9, 1e7, 9, 9, 18]], f"{PART} reaches far beyond the image"),
        ([square(9, 9, 9), square(80, 80, 9)], f"{PART} draws nothing"),
        ([[str(value) for value in square(9, 9, 9)]], None),
        ([[1, 2, 3, 4]], f"{PART} is not three or more points"),
        ([[9, 9, 1e7, 9, 9, 18]], f"{PART} reaches far beyond the image"),
        (runs(10, 10), "RLE ends before the image does"),
        (runs(10, 5000), "RLE is longer than the image"),
        (runs(10, -10, 4096), "RLE has no valid counts"),
        (runs(10.5, 10, 4075.5), "RLE has no valid counts"),
        (runs(None), "RLE has no valid counts"),
        ({"size": [64, 64], "counts": "a broken string"}, "RLE has no valid counts"),
        ({"size": [64, 32], "counts": [2048]}, "RLE is not of the image's size"),
        ("polygon", "object has no segmentation"),
    ],
)
def test_outlines_are_judged_as_the_reader_does(segmentation, fault, faulty):
    file = faulty / "annotations/instances_train.json"
    content = json.loads(file.read_text())
    content["images"] = content["images"][:1]
    sound = content["annotations"][0]
    content["annotations"] = [sound, sound | {"bbox": [9, 9, 9, 9], "segmentation": segmentation}]
    file.write_text(json.dumps(content))
    said = tool("--data", faulty, "--output", faulty / "output", "--segments=true")
    assert said.returncode == 0, said.stderr
    found = CocoDetection(file, faulty / "train", extra="masks")
    assert (report_faults(found.faults) in said.stdout) == bool(found.faults) == bool(fault)
    assert fault is None or fault in said.stdout
    rows = labels(faulty / "output/labels/train/0.txt")
    assert len(rows) == len(found[0].boxes)
    if len(rows) == 2:
        np.testing.assert_allclose(rows[1][1:], np.array(square(9, 9, 9)) / 64, atol=1e-5)


@pytest.mark.parametrize("kind", [float, str, lambda number: f"image {number}"])
def test_ids_may_be_text_or_whole_numbers_of_any_type(kind, coco, data, tmp_path):
    file = coco / "annotations/instances_train.json"
    content = json.loads(file.read_text())
    for image in content["images"]:
        image["id"] = kind(image["id"])
    for annotation in content["annotations"]:
        annotation["image_id"] = kind(annotation["image_id"])
        annotation["category_id"] = float(annotation["category_id"])
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_train.json").write_text(json.dumps(content))
    (tmp_path / "train").symlink_to(coco / "train")
    said = tool("--data", tmp_path, "--output", tmp_path / "output")
    assert said.returncode == 0, said.stderr
    for expected in (data / "detect/labels").rglob("*.txt"):
        written = tmp_path / "output/labels" / expected.relative_to(data / "detect/labels")
        assert written.read_text() == expected.read_text()


def test_errors_of_the_converter_are_one_line(coco, tmp_path):
    said = tool("--data", coco, "--output", tmp_path / "new", "--train", "test")
    assert said.returncode == 2
    assert "splits found: train" in said.stderr
    assert said.stderr.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_real_data_converted(data_root, tmp_path):
    """Each object of coco128 but the crowds."""
    output = tmp_path / "coco128"
    said = tool("--data", data_root / "coco128", "--output", output)
    assert said.returncode == 0, said.stderr
    files = list((output / "labels/train").glob("*.txt"))
    assert len(files) == 126
    assert sum(len(labels(file)) for file in files) == 929
    assert len(list((output / "images/train").iterdir())) == 128


# --- whole runs ---


def train(data, folder, name="yolo11n.yaml", spec=None, callbacks=None, **options):
    """An epoch on the small data set, its results by column, and its trainer."""
    model = YOLO(name)
    for event, callback in (callbacks or {}).items():
        model.add_callback(event, callback)
    model.train(
        data=str(data / ("segment" if "seg" in name else "detect") / "data.yaml"),
        imgsz=64,
        batch=4,
        workers=0,
        device="cpu",
        plots=False,
        verbose=False,
        project=str(folder),
        name="run",
        epochs=1,
        trainer=yolo.trainer(spec) if spec else None,
        **options,
    )
    with open(folder / "run" / "results.csv") as file:
        rows = list(csv.DictReader(file))
    results = {key.strip(): [float(row[key]) for row in rows] for key in rows[0]}
    return results, model.trainer


def losses_of(results):
    return {key: results[key] for key in results if "loss" in key}


@pytest.mark.parametrize(
    ("name", "options"), [("yolo11n.yaml", {"cls_pw": 0.5}), ("yolo26n.yaml", {})]
)
def test_a_run_with_the_stock_losses_is_the_stock_run(name, options, data, tmp_path):
    stock, _ = train(data, tmp_path / "stock", name, **options)
    ours, trainer = train(data, tmp_path / "ours", name, spec=STOCK[name], **options)
    assert set(losses_of(ours)) >= {"train/box_loss", "val/cls_loss"}
    for key, values in losses_of(stock).items():
        assert ours[key] == pytest.approx(values, rel=1e-3, abs=1e-3), key
    assert set(trainer.losses["detection"].values) == set(STOCK[name].split("+"))


def test_a_run_with_other_losses(data, tmp_path, messages):
    """It trains, validates with its own losses, and leaves a stock checkpoint."""

    def renew(trainer):  # as Ultralytics does when it recovers from a NaN
        trainer.ema = ModelEMA(trainer.model, updates=trainer.ema.updates)

    spec = "giou+ramp(1, 2, steps=4)*focal; mask: bce+dice"
    callbacks = {"on_train_epoch_end": renew}
    results, trainer = train(data, tmp_path, "yolo11n-seg.yaml", spec, callbacks)
    assert trainer.ema.ema.criterion is trainer.model.criterion
    assert any("box_loss giou, seg_loss bce+dice, cls_loss focal" in m for m in messages.messages)
    assert results["val/cls_loss"][0] < 1
    assert np.isfinite(sum(results["train/seg_loss"]))
    assert trainer.losses["detection"].step == trainer.ema.updates > 0
    loading = (
        "import sys; sys.modules['detseg_losses'] = None\n"
        "from ultralytics import YOLO\n"
        f"model = YOLO({str(tmp_path / 'run/weights/best.pt')!r})\n"
        f"print(type(model.model).__module__, model({str(data / 'segment/images/train/1.png')!r}, "
        "imgsz=64, verbose=False)[0].orig_shape)"
    )
    said = subprocess.run(
        [sys.executable, "-c", loading], env=os.environ, capture_output=True, text=True
    )
    assert "ultralytics.nn.tasks (64, 64)" in said.stdout, said.stderr


class Interrupted(Exception):
    pass


def test_a_resumed_run_has_the_losses_again(data, tmp_path):
    """An end-to-end head, for which Ultralytics makes a new criterion there."""

    def interrupt(trainer):
        if trainer.epoch == 0:
            raise Interrupted

    spec = "giou+ramp(1, 2, steps=10)*focal"
    model = YOLO("yolo26n.yaml")
    model.add_callback("on_fit_epoch_end", interrupt)
    options = {"imgsz": 64, "batch": 4, "workers": 0, "device": "cpu", "plots": False, "val": False}
    source = str(data / "detect" / "data.yaml")
    with pytest.raises(Interrupted):
        model.train(
            trainer=yolo.trainer(spec),
            data=source,
            epochs=2,
            project=str(tmp_path),
            name="run",
            **options,
        )
    steps = model.trainer.losses["detection"].step
    assert steps > 0
    again = YOLO(str(tmp_path / "run/weights/last.pt"))
    started = []
    again.add_callback(
        "on_train_start",
        lambda t: started.append((t.start_epoch, t.losses["detection"].step, t.model.criterion)),
    )
    again.train(resume=True, trainer=yolo.trainer(spec))
    ((epoch, step, criterion),) = started
    assert (epoch, step) == (1, steps)
    assert isinstance(criterion.one2one.bce, yolo.ClassTerms)
    assert again.trainer.ema.ema.criterion is criterion


def test_the_processes_of_several_gpus_get_the_losses(data, tmp_path, monkeypatch):
    """What Ultralytics writes for them runs by itself, with the losses; here on a single CPU."""
    # Ultralytics pickles by cloudpickle, which can do more, and is wanted only with several GPUs.
    monkeypatch.setitem(sys.modules, "cloudpickle", pickle)
    monkeypatch.setattr("ultralytics.utils.checks.check_requirements", lambda *_: True)
    trainer = yolo.trainer("giou+0.5*focal")(
        overrides={
            "model": "yolo11n.yaml",
            "data": str(data / "detect" / "data.yaml"),
            "epochs": 1,
            "imgsz": 64,
            "batch": 4,
            "device": "cpu",
            "plots": False,
            "val": False,
            "project": str(tmp_path),
            "name": "run",
        }
    )
    file = generate_ddp_file(trainer)
    said = subprocess.run(
        [sys.executable, file],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    ddp_cleanup(trainer, file)
    assert said.returncode == 0, said.stderr
    assert "Losses: box_loss giou, cls_loss focal" in said.stdout + said.stderr


def test_ultralytics_is_optional():
    code = (
        "import sys, detseg_losses.integrations\n"
        "print('imported:', 'ultralytics' in sys.modules)\n"
        "sys.modules['ultralytics'] = None\n"
        "from detseg_losses.integrations import yolo"
    )
    said = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert said.stdout == "imported: False\n"
    assert 'pip install "detseg_losses[ultralytics]"' in said.stderr.splitlines()[-1]
