"""The adapter of Faster, Mask and Keypoint R-CNN: torchvision's own numbers at its own options, and
any losses else.
"""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import resnet18
from torchvision.models.detection import FasterRCNN, KeypointRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork

import detseg_losses
from detseg_losses import SpecError
from detseg_losses.integrations import restore_losses, use_losses
from detseg_losses.spec import names_of_kind, read_stages
from processes import run_in_processes

CLASSES = 5  # the background is one
POINTS = 3
MODELS = [FasterRCNN, MaskRCNN, KeypointRCNN]
BOXES = "smooth_l1(beta=0.1111111111111111)"
STOCK = {
    FasterRCNN: f"rpn: {BOXES}+bce; roi: {BOXES}+ce",
    MaskRCNN: f"rpn: {BOXES}+bce; roi: {BOXES}+ce; mask: bce",
    KeypointRCNN: f"rpn: {BOXES}+bce; roi: {BOXES}+ce; keypoint: ce",
}
OTHER = {
    FasterRCNN: "rpn: giou+focal; roi: 2*ciou+softmax_focal",
    MaskRCNN: "rpn: giou+focal; roi: 2*ciou+softmax_focal; mask: bce+dice",
    KeypointRCNN: "rpn: giou+focal; roi: 2*ciou+softmax_focal; keypoint: softmax_focal",
}


def small_rcnn(cls=FasterRCNN, **options):
    """A model of resnet18, without batch statistics, that takes 64-pixel images."""
    torch.manual_seed(0)
    body = resnet18(weights=None, norm_layer=lambda width: torch.nn.GroupNorm(8, width))
    backbone = BackboneWithFPN(body, {"layer2": "0", "layer3": "1"}, [128, 256], 32)
    heads = {
        FasterRCNN: {},
        MaskRCNN: {
            "mask_head": MaskRCNNHeads(32, (16,), 1),
            "mask_predictor": MaskRCNNPredictor(16, 16, CLASSES),
        },
        KeypointRCNN: {
            "keypoint_head": KeypointRCNNHeads(32, (16,)),
            "keypoint_predictor": KeypointRCNNPredictor(16, POINTS),
        },
    }
    return cls(
        backbone,
        min_size=64,
        max_size=96,
        rpn_anchor_generator=AnchorGenerator(((8,), (16,), (32,)), ((0.5, 1.0, 2.0),) * 3),
        rpn_batch_size_per_image=64,
        box_head=TwoMLPHead(32 * 7 * 7, 32),
        box_predictor=FastRCNNPredictor(32, CLASSES),
        box_batch_size_per_image=32,
        **heads[cls],
        **options,
    ).train()


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    sizes = (64, 64), (64, 64), (72, 80)
    return [torch.rand(3, *size, generator=generator) for size in sizes]


def objects(boxes, labels, height, width):
    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for mask, box in zip(masks, boxes, strict=True):
        x1, y1, x2, y2 = (int(side) for side in box)
        mask[y1 : (y1 + y2) // 2, x1:x2] = 1
    points = torch.zeros(len(boxes), POINTS, 3)
    for index in range(POINTS):
        share = (index + 1) / (POINTS + 1)
        for point, box in zip(points, boxes, strict=True):
            point[index, :2] = box[:2] + share * (box[2:] - box[:2])
            point[index, 2] = index != 1  # the second one is hidden
    return {"boxes": boxes, "labels": torch.tensor(labels), "masks": masks, "keypoints": points}


@pytest.fixture
def targets():
    """Two objects, none, one."""
    nothing = objects(torch.zeros(0, 4), [], 64, 64)
    return [
        objects(torch.tensor([[4.0, 4, 30, 36], [20, 16, 60, 50]]), [1, 3], 64, 64),
        nothing | {"labels": nothing["labels"].long()},
        objects(torch.tensor([[10.0, 10, 40, 40]]), [4], 72, 80),
    ]


def run(model, images, targets):
    """The losses and the gradients of all parameters, for the same samples each time."""
    model.zero_grad()
    torch.manual_seed(0)
    losses = model(images, targets)
    sum(losses.values()).backward()
    return losses, {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_equal(first, second, **tolerance):
    (losses, gradients), (other_losses, other_gradients) = first, second
    torch.testing.assert_close(losses, other_losses, **tolerance)
    scale = max(g.abs().max() for g in gradients.values())
    for name, gradient in gradients.items():
        bound = tolerance.get("atol", 1e-5) * scale.item()
        torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-4, atol=bound)


@pytest.mark.parametrize("cls", MODELS)
def test_torchvisions_own_losses_give_its_values_and_gradients(cls, images, targets):
    model = small_rcnn(cls)
    stock = run(model, images, targets)
    assert all(value > 0 for value in stock[0].values())
    use_losses(model, STOCK[cls])
    assert_equal(stock, run(model, images, targets), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cls", MODELS)
def test_a_batch_without_any_object(cls, images, targets):
    model = small_rcnn(cls)
    nothing = [targets[1]] * 2
    stock = run(model, images[:2], nothing)
    use_losses(model, STOCK[cls])
    assert_equal(stock, run(model, images[:2], nothing))
    use_losses(model, OTHER[cls])
    losses, gradients = run(model, images[:2], nothing)
    assert losses["loss_box_reg"] == losses["loss_rpn_box_reg"] == 0
    assert all(value.isfinite() for value in losses.values())
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("cls", MODELS)
def test_undo_is_exact(cls, images, targets):
    model = small_rcnn(cls)
    keys, parts = list(model.state_dict()), {n: type(m) for n, m in model.named_modules()}
    stock = run(model, images, targets)
    use_losses(model, OTHER[cls].replace("giou", "learned*giou"))
    use_losses(model, OTHER[cls])
    changed = run(model, images, targets)
    assert all(changed[0][key] != stock[0][key] for key in stock[0])
    assert list(model.state_dict()) == keys
    restore_losses(model)
    assert {n: type(m) for n, m in model.named_modules()} == parts
    again = run(model, images, targets)
    assert all(torch.equal(stock[0][key], again[0][key]) for key in stock[0])
    assert all(torch.equal(stock[1][key], again[1][key]) for key in stock[1])
    assert restore_losses(model) is model
