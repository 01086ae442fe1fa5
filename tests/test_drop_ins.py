"""The tables of ``docs/drop_ins.md`` are what the installed libraries give.

``WRITE_TABLES=1 pytest tests/test_drop_ins.py`` writes them anew.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import detseg_losses as own
from detseg_losses.integrations import smp as our_smp
from detseg_losses.integrations import torchvision_ops

PAGE = Path(__file__).parent.parent / "docs" / "drop_ins.md"

Loss = Callable[..., Tensor]


# --- cells ---


def number(value: Tensor | float) -> str:
    value = torch.as_tensor(value).detach()
    if value.numel() != 1:
        return f"a tensor {tuple(value.shape)}"
    value = value.double().item()
    return "NaN" if value != value else f"{value + 0.0:.3g}"  # the sum makes -0 a 0


def value(loss: Loss, *args: Any, **options: Any) -> str:
    """The loss."""
    return number(loss(*args, **options))


def slope(loss: Loss, x: Tensor, *args: Any, **options: Any) -> str:
    """The loss and the largest entry of its gradient."""
    x = x.clone().requires_grad_()
    result = loss(x, *args, **options).sum()
    (grad,) = torch.autograd.grad(result, x)
    return f"{number(result)}, gradient {number(grad.abs().max())}"


def rows(cases: Sequence[tuple[Any, ...]]) -> list[str]:
    """Lines of a table, from what a row is called, a cell's function, losses and arguments."""
    lines = []
    for text, show, losses, *args in cases:
        options = args.pop() if args and isinstance(args[-1], dict) else {}
        cells = []
        for loss in losses:
            try:
                cells.append("" if loss is None else show(loss, *args, **options))
            except Exception as error:
                cells.append(f"`{type(error).__name__}`")
        lines.append("| " + " | ".join([text, *cells]) + " |")
    return lines


def given(loss: Loss, **options: Any) -> Loss:
    """A loss with some options set, whatever the call says."""
    return lambda *args, **_: loss(*args, **options)


# --- what the libraries are asked ---


def of_torchvision() -> list[str]:
    from torchvision import ops

    def each(name: str) -> list[Loss]:
        return [getattr(module, name) for module in (ops, torchvision_ops, own)]

    def square(side: float) -> Tensor:
        return torch.tensor([[0, 0, side, side]])

    def of_target(loss: Loss, target: Tensor) -> str:
        return slope(lambda y: loss(torch.ones(2), y), target)

    giou, ciou = each("generalized_box_iou_loss"), each("complete_box_iou_loss")
    focal = each("sigmoid_focal_loss")
    line, point = torch.tensor([[0.0, 0, 10, 0]]), torch.tensor([[5.0, 5, 5, 5]])
    ones, anchors = torch.ones(2), torch.zeros(200_000, 4, dtype=torch.float16)
    total = {"reduction": "sum"}
    return rows(
        [
            ("GIoU, equal boxes of side 0.001", value, giou, square(1e-3), square(1e-3)),
            ("GIoU, equal boxes of side 0.0001", value, giou, square(1e-4), square(1e-4)),
            ("GIoU, equal boxes of side 1e20", value, giou, square(1e20), square(1e20)),
            ("GIoU, equal points", value, giou, point, point),
            ("GIoU, an inverted box on its target", value, giou, square(10).flip(1), square(10)),
            ("CIoU, equal points", slope, ciou, point, point),
            ("CIoU, a line of 10 on a square of side 10", slope, ciou, line, square(10.0)),
            (
                "CIoU, `eps=1`, which torchvision adds to one of three denominators",
                value,
                ciou,
                square(4.0),
                torch.tensor([[1.0, 1, 5, 6]]),
                {"eps": 1.0},
            ),
            (
                "focal, `gamma=0.5`, right logits of 50",
                slope,
                focal,
                ones * 50,
                ones,
                {"gamma": 0.5},
            ),
            ("focal, float16, the sum of 800,000 logits", value, focal, anchors, anchors, total),
            ("focal, the mean of nothing", value, focal, ones[:0], ones[:0], {"reduction": "mean"}),
            ("focal, integer targets", value, focal, ones, ones.long(), total),
            ("focal, targets of 255", value, focal, ones, ones * 255, total),
            ("focal, targets that require grad", of_target, focal, ones),
        ]
    )


def of_smp() -> list[str]:
    from segmentation_models_pytorch import losses as smp

    def each(name: str, loss: Loss | None, *args: Any, **options: Any) -> list[Loss | None]:
        """SMP's, ours by its name, and our own."""
        by_name = (
            lambda *call, module=module: getattr(module, name)(*args, **options)(*call)
            for module in (smp, our_smp)
        )
        return [*by_name, loss]

    def probabilities(loss: Loss, logits: Tensor, target: Tensor) -> str:
        return value(loss, logits.sigmoid(), target)

    ce, bce, dice = own.cross_entropy_loss, own.binary_cross_entropy_loss, own.dice_loss
    lovasz, mcc = own.lovasz_loss, own.mcc_loss
    focal_tversky = own.focal_tversky_loss
    # Sixteen pixels of six classes; of one class; half of them void.
    logits = torch.linspace(-2, 2, 96).view(1, 6, 4, 4)
    labels = (torch.arange(16) % 6).view(1, 4, 4)
    one_class, void = labels * 0, torch.full_like(labels, 255)
    half = torch.where(torch.arange(4) < 2, void, labels)
    several = (labels.unsqueeze(1) == torch.arange(6).view(6, 1, 1)).long()
    # Two classes.
    single, mask = logits[:, 2:3], labels.unsqueeze(1) % 2
    empty, wrong, right = mask * 0, single * 0 + 5, torch.full_like(single, 200)
    large = torch.zeros(1, 1, 512, 512, dtype=torch.float16)
    ignore, half_of_two = {"ignore_index": 255}, torch.where(half == 255, 255.0, 1).unsqueeze(1)

    softmax_focal = given(own.softmax_focal_loss, gamma=0.0)
    weights: dict[str, Any] = {"class_weights": [1, 2, 3, 4, 5, 6]}
    soft_ce, soft_bce = "SoftCrossEntropyLoss", "SoftBCEWithLogitsLoss"
    of_pixels = {"mode": "multilabel", "alpha": None, "reduction": "mean"}
    return rows(
        [
            (
                "SoftCrossEntropy, half of the pixels ignored",
                value,
                each(soft_ce, given(ce, **ignore), smooth_factor=0.0, **ignore),
                logits,
                half,
            ),
            ("SoftCrossEntropy with its defaults", value, each(soft_ce, ce), logits, labels),
            (
                "SoftCrossEntropy of one channel",
                value,
                each(soft_ce, ce, smooth_factor=0.0),
                single,
                one_class,
            ),
            (
                "SoftBCE, half of the pixels ignored",
                value,
                each(soft_bce, given(bce, mode="binary", **ignore), **ignore),
                single,
                half_of_two,
            ),
            (
                "Dice, five of six classes absent",
                value,
                each("DiceLoss", dice, "multiclass"),
                logits,
                one_class,
            ),
            (
                'Dice, all pixels false positives; ours with `absent="penalise"`',
                slope,
                each("DiceLoss", given(dice, absent="penalise"), "binary"),
                wrong,
                empty,
            ),
            (
                "Dice, float16, 512 x 512",
                value,
                each("DiceLoss", dice, "binary"),
                large,
                large + 1,
            ),
            (
                "Dice, uint8 masks",
                value,
                each("DiceLoss", dice, "multiclass"),
                logits,
                labels.byte(),
            ),
            (
                "Dice, void in the masks and no `ignore_index`",
                value,
                each("DiceLoss", dice, "multiclass"),
                logits,
                half,
            ),
            (
                "Dice, soft targets: TP is the sum of minima, or of products",
                value,
                each("DiceLoss", dice, "binary"),
                single,
                torch.linspace(0, 1, 16).view_as(single),
            ),
            (
                "Tversky, `gamma=2` of the mean, or of each class",
                value,
                each("TverskyLoss", given(focal_tversky, gamma=2.0), "multiclass", gamma=2.0),
                logits,
                labels,
            ),
            (
                "Tversky, `gamma=0.5`, all pixels right",
                slope,
                each("TverskyLoss", given(focal_tversky, gamma=0.5), "binary", gamma=0.5),
                right,
                empty + 1,
            ),
            (
                f"Focal, multiclass, `gamma=0`, where cross entropy is {value(ce, logits, labels)};"
                " ours `softmax_focal`",
                value,
                each("FocalLoss", softmax_focal, "multiclass", gamma=0.0),
                logits,
                labels,
            ),
            ("Focal, multiclass", value, each("FocalLoss", None, "multiclass"), logits, labels),
            (
                "Focal, multiclass, of the probabilities",
                probabilities,
                each("FocalLoss", None, "multiclass", from_logits=False),
                logits,
                labels,
            ),
            (
                "Focal, `gamma=0.5`, all pixels right",
                slope,
                each(
                    "FocalLoss",
                    given(own.sigmoid_focal_loss, gamma=0.5, mode="binary", reduction="mean"),
                    "binary",
                    gamma=0.5,
                ),
                right,
                empty + 1,
            ),
            (
                "Focal, everything ignored",
                value,
                each("FocalLoss", given(own.softmax_focal_loss, **ignore), "multiclass", **ignore),
                logits,
                void,
            ),
            (
                "Focal, multilabel, with an `ignore_index`",
                value,
                each(
                    "FocalLoss",
                    given(own.sigmoid_focal_loss, **of_pixels, **ignore),
                    "multilabel",
                    **ignore,
                ),
                logits,
                several,
            ),
            (
                'Focal, `class_weights` and `reduction="none"`',
                value,
                each("FocalLoss", None, "multiclass", reduction="none", **weights),
                logits,
                labels,
            ),
            (
                "Lovasz, multilabel: all classes as one, or each",
                value,
                each("LovaszLoss", given(lovasz, mode="multilabel"), "multilabel"),
                logits,
                several,
            ),
            (
                "Lovasz, an empty mask",
                value,
                each("LovaszLoss", lovasz, "binary"),
                single,
                empty,
            ),
            (
                "Lovasz, everything ignored",
                value,
                each("LovaszLoss", given(lovasz, **ignore), "multiclass", **ignore),
                logits,
                void,
            ),
            (
                "MCC of logits, where SMP takes probabilities",
                value,
                each("MCCLoss", mcc),
                single,
                mask,
            ),
            ("MCC of probabilities", probabilities, each("MCCLoss", None), single, mask),
            (
                "MCC of probabilities, float16, 512 x 512",
                probabilities,
                each("MCCLoss", None),
                large,
                large + 1,
            ),
        ]
    )


def of_monai() -> list[str]:
    from monai import losses as monai

    logits = torch.linspace(-2, 2, 96).view(1, 6, 4, 4)
    labels = (torch.arange(16) % 6).view(1, 1, 4, 4)
    wrong, large = torch.full((1, 1, 4, 4), 5.0), torch.zeros(1, 1, 512, 512, dtype=torch.float16)
    ce = value(own.cross_entropy_loss, logits, labels)
    dice = monai.DiceLoss(sigmoid=True)
    return rows(
        [
            (
                'Dice, all pixels false positives; ours with `absent="penalise"`',
                slope,
                [dice, given(own.dice_loss, absent="penalise")],
                wrong,
                wrong.long() * 0,
            ),
            ("Dice, float16, 512 x 512", value, [dice, own.dice_loss], large, large + 1),
            (
                f"Focal, multiclass, `gamma=0`, where cross entropy is {ce}; ours `softmax_focal`",
                value,
                [
                    monai.FocalLoss(gamma=0.0, to_onehot_y=True),
                    given(own.softmax_focal_loss, gamma=0.0),
                ],
                logits,
                labels,
            ),
        ]
    )


def of_ultralytics() -> list[str]:
    from ultralytics.utils import loss as ultralytics

    def target_after(loss: Loss) -> str:
        target = torch.tensor([[3.5, 15.0, 0.5, 0.5]])
        before = target.clone()
        loss(torch.zeros(4, 16), target)
        return "unchanged" if torch.equal(target, before) else "changed"

    def of_anchors(loss: Loss, count: int) -> str:
        """One positive, found poorly; all negatives found well."""
        logits, target = torch.full((1, count, 1), -8.0), torch.zeros(1, count, 1)
        target[:, 0] = 1
        return value(loss, logits, target)

    large = torch.zeros(1, 1, 512, 512, dtype=torch.float16)
    focal = [ultralytics.FocalLoss(2.0, 0.25), given(own.sigmoid_focal_loss, reduction="sum")]
    dfl = [
        ultralytics.DFLoss(16),
        lambda x, y: own.distribution_focal_loss(x.view(*y.shape, 16), y),
    ]
    return rows(
        [
            ("DFL, its target after the call", target_after, dfl),
            ("focal, 1 positive among 10 anchors; ours summed", of_anchors, focal, 10),
            ("focal, 1 positive among 1000 anchors; ours summed", of_anchors, focal, 1000),
            (
                "Dice of masks, float16, 512 x 512",
                value,
                [ultralytics.MultiChannelDiceLoss(), own.dice_loss],
                large,
                large + 1,
            ),
        ]
    )


# --- the page ---

PEERS: dict[str, tuple[Callable[[], list[str]], list[str]]] = {
    "torchvision": (of_torchvision, ["`torchvision_ops`", "`detseg_losses`"]),
    "segmentation-models-pytorch": (of_smp, ["`integrations.smp`", "`detseg_losses`"]),
    "monai": (of_monai, ["`detseg_losses`"]),
    "ultralytics": (of_ultralytics, ["`detseg_losses`"]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("peer", PEERS)
def test_table(peer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, setting in {
        "YOLO_OFFLINE": "true",
        "YOLO_AUTOINSTALL": "false",
        "YOLO_CONFIG_DIR": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, setting)
    try:
        installed = f"{version(peer)} under torch {version('torch').split('+')[0]}"
    except PackageNotFoundError:
        pytest.skip(f"{peer} is not installed")
    found = re.search(rf"<!-- {peer} ([^\n]*) -->\n(.*?)<!-- end -->", PAGE.read_text(), re.DOTALL)
    assert found
    writing = "WRITE_TABLES" in os.environ
    if installed != found[1] and not writing:
        pytest.skip(f"the table is of {peer} {found[1]}, here is {installed}")
    make, columns = PEERS[peer]
    header = ["", f"{peer} {version(peer)}", *columns]
    table = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|", *make()]
    if writing:
        text = "\n".join([f"<!-- {peer} {installed} -->", "", *table, "", "<!-- end -->"])
        PAGE.write_text(PAGE.read_text().replace(found[0], text))
    else:
        assert found[2].strip().splitlines() == table
