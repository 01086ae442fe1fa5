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
from torchvision.ops import roi_align

import detseg_losses
from detseg_losses import SpecError
from detseg_losses.integrations import (
    detection,
    model_losses,
    restore_losses,
    torchvision_rcnn,
    use_losses,
)
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


def test_the_order_and_the_number_of_random_numbers_are_torchvisions(images, targets):
    """So that a stage that is changed leaves the samples of the others as they were."""
    model = small_rcnn()
    run(model, images, targets)
    expected = torch.get_rng_state()
    for spec in (OTHER[FasterRCNN], "rpn: bce"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            use_losses(model, spec)
        run(model, images, targets)
        assert torch.equal(torch.get_rng_state(), expected)


@pytest.mark.parametrize("cls", MODELS)
def test_copies_keep_the_losses(cls, images, targets):
    model = use_losses(small_rcnn(cls), OTHER[cls])
    expected = run(model, images, targets)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    fresh = use_losses(small_rcnn(cls), OTHER[cls])
    fresh.load_state_dict(model.state_dict())
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
        fresh,
    ]
    for each in copies:
        assert_equal(expected, run(each, images, targets))
        restore_losses(each)
        assert type(each.rpn) is RegionProposalNetwork
        assert type(each.roi_heads) is RoIHeads


SINGLE = [
    ("rpn: 3*bce", "loss_objectness", 3),
    (f"rpn: 3*{BOXES}", "loss_rpn_box_reg", 3),
    ("roi: 3*ce", "loss_classifier", 3),
    (f"roi: 3*{BOXES}", "loss_box_reg", 3),
    ("mask: 3*bce", "loss_mask", 3),
]


@pytest.mark.filterwarnings("ignore:.*stays as it is")
@pytest.mark.parametrize(("spec", "entry", "factor"), SINGLE)
def test_one_role_leaves_the_others_as_they_are(spec, entry, factor, images, targets):
    model = small_rcnn(MaskRCNN)
    stock, _ = run(model, images, targets)
    ours, _ = run(use_losses(model, spec), images, targets)
    assert list(ours) == list(stock)
    for key, value in stock.items():
        if key == entry:
            torch.testing.assert_close(ours[key], factor * value)
        else:
            assert torch.equal(ours[key], value)


def test_the_terms_are_those_of_the_functions(images, targets):
    """Computed here from what the stages are given."""
    model = use_losses(small_rcnn(MaskRCNN), OTHER[MaskRCNN] + "+0.5*focal")
    seen = {}

    def keep(name):
        return lambda module, args, output: seen.__setitem__(name, output)

    model.roi_heads.box_predictor.register_forward_hook(keep("boxes"))
    model.roi_heads.mask_predictor.register_forward_hook(keep("masks"))
    model.rpn.head.register_forward_hook(keep("rpn"))
    sample = model.roi_heads.select_training_samples

    def kept_sample(proposals, targets):
        seen["sample"] = sample(proposals, targets)
        seen["targets"] = targets
        return seen["sample"]

    model.roi_heads.select_training_samples = kept_sample
    losses, _ = run(model, images, targets)
    proposals, matched, labels, _ = seen["sample"]

    logits, deltas = seen["boxes"]
    classes = torch.cat(labels)
    picked = logits.softmax(1)[torch.arange(len(classes)), classes]
    focal = -((1 - picked) ** 2 * picked.log()).mean()
    torch.testing.assert_close(losses["loss_classifier"], focal)

    decoded = model.roi_heads.box_coder.decode(deltas, proposals)
    ciou, masks = [], []
    row = 0
    for image, target in enumerate(seen["targets"]):
        for box, match, label in zip(proposals[image], matched[image], labels[image], strict=True):
            if label:
                loss = detseg_losses.complete_box_iou_loss(
                    decoded[row, label], target["boxes"][match]
                )
                ciou.append(loss)
                masks.append((box, target["masks"][match], label))
            row += 1
    torch.testing.assert_close(losses["loss_box_reg"], 2 * sum(ciou) / len(classes))

    assert len(masks) == len(seen["masks"])
    values = []
    for logits, (box, mask, label) in zip(seen["masks"], masks, strict=True):
        target = roi_align(mask[None, None].float(), [box[None]], logits.shape[-1])
        prediction = logits[None, None, label]
        values.append(
            detseg_losses.binary_cross_entropy_loss(prediction, target, mode="binary")
            + detseg_losses.dice_loss(prediction, target, mode="binary")
            + 0.5 * detseg_losses.sigmoid_focal_loss(prediction, target, reduction="mean")
        )
    torch.testing.assert_close(losses["loss_mask"], sum(values) / len(values))
    assert set(model.roi_heads.losses["mask"].values) == {"bce", "dice", "focal"}
    assert set(model.roi_heads.losses["roi"].values) == {"ciou", "softmax_focal"}


def test_the_sampled_anchors_alone_count_in_the_rpn(images, targets):
    model = use_losses(small_rcnn(), OTHER[FasterRCNN])
    rpn = model.rpn
    anchors = [torch.tensor([[0.0, 0, 8, 8]]).repeat(6, 1)]
    truths = [torch.tensor([[1.0, 1, 9, 9]]).repeat(6, 1)]
    labels = torch.tensor([1.0, 1, 0, 0, -1, -1])
    rpn.assign_targets_to_anchors(anchors, [{"boxes": truths[0][:1]}])
    rpn._matched = torch.cat(anchors), torch.cat(truths), True
    rpn.fg_bg_sampler = lambda labels: ([torch.tensor([1, 0, 0, 0, 0, 0])], [(labels[0] == 0) * 1])
    logits = torch.randn(6, 1, requires_grad=True)
    deltas = torch.randn(6, 4, requires_grad=True)
    objectness, boxes = rpn.compute_loss(logits, deltas, [labels], truths)
    rows = logits[[0, 2, 3]]
    focal = detseg_losses.sigmoid_focal_loss(rows, torch.tensor([[1.0], [0], [0]]))
    torch.testing.assert_close(objectness, focal.mean())
    decoded = rpn.box_coder.decode_single(deltas[:1], anchors[0][:1])
    giou = detseg_losses.generalized_box_iou_loss(decoded, truths[0][:1])
    torch.testing.assert_close(boxes, giou.sum() / 3)
    (objectness + boxes).backward()
    assert logits.grad[[0, 2, 3]].all()
    assert not logits.grad[[1, 4, 5]].any()
    assert not deltas.grad[1:].any()


@pytest.mark.parametrize("boxes", ["giou", "ciou", "l1"])
def test_all_rows_give_what_the_few_that_count_give(boxes, images, targets, monkeypatch):
    """On a GPU the rows that count are not looked up, which would make the device wait."""
    model = use_losses(small_rcnn(), f"rpn: {boxes}+focal; roi: {boxes}+ce")
    few = run(model, images, targets)
    for module in (torchvision_rcnn, detection):
        monkeypatch.setattr(module, "rows_where", lambda mask: slice(None))
    assert_equal(few, run(model, images, targets), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*exclude each other")
def test_a_string_without_stages_is_for_both(images, targets):
    model = small_rcnn(MaskRCNN)
    stock, _ = run(model, images, targets)
    plain, _ = run(use_losses(model, "giou+focal"), images, targets)
    addressed = "rpn: giou+focal; roi: giou+softmax_focal"
    stated, _ = run(use_losses(model, addressed), images, targets)
    assert all(torch.equal(plain[key], stated[key]) for key in plain)
    assert torch.equal(plain["loss_mask"], stock["loss_mask"])


def test_sigmoid_losses_in_a_softmax_are_taken_for_their_counterparts(images, targets):
    model = small_rcnn(KeypointRCNN)
    with pytest.warns(
        UserWarning, match="stage 'roi' of KeypointRCNN.*'bce' is taken as 'ce'"
    ) as caught:
        use_losses(model, f"{BOXES}+bce")
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="stage 'keypoint'.*'focal' is taken as 'softmax_focal'"):
        use_losses(model, "keypoint: focal")


def test_a_role_without_a_term_stays_and_says_so():
    with pytest.warns(UserWarning, match="stays as it is") as caught:
        use_losses(small_rcnn(), "rpn: giou; roi: ce")
    messages = [str(each.message) for each in caught]
    assert "'loss_objectness' stays as it is" in messages[0]
    assert "'loss_box_reg' stays as it is" in messages[1]
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rpn: giou+bce; rio: giou+ce", "column 16: FasterRCNN has no stage 'rio'; .*'roi'"),
        ("mask: bce", "column 1: FasterRCNN has no stage 'mask'; there are roi, rpn"),
        ("rpn: giou+bce; rpn: giou", "column 16: stage 'rpn' is given twice"),
        ("rpn: giou+bce; giou+ce", "column 16: expected a stage, as in 'roi: giou.ce'"),
        ("rpn: ", "is empty; write for example 'giou . focal'"),
        ("rpn: giou+focl", "column 6.*did you mean 'focal'"),
        ("giou+poly", "stage 'rpn' of FasterRCNN has no use for 'poly'"),
        ("roi: giou+dice", "stage 'roi' of FasterRCNN.*'dice', it has for ce"),
        ("rpn: giou+bce(reduction='sum')", "itself decides 'reduction'"),
        ("rpn: giou+bce(class_weights=[1, 2])", "2 class_weights, and the model 1 classes"),
        ("roi: giou+ce(class_weights=[1, 2])", "2 class_weights, and the model 5 classes"),
    ],
)
def test_an_unsuitable_loss_is_one_clear_line_and_changes_nothing(spec, message):
    model = small_rcnn()
    with pytest.raises(SpecError, match=message) as error:
        use_losses(model, spec)
    assert "\n" not in str(error.value)
    assert type(model.rpn) is RegionProposalNetwork
    assert type(model.roi_heads) is RoIHeads


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mask: poly", "a softmax over classes has no meaning"),
        ("mask: giou", "stage 'mask' of MaskRCNN has no use for 'giou'"),
        ("mask: dice(mode='multiclass')", "'dice': stage 'mask' of MaskRCNN itself decides 'mode'"),
        ("mask: dice(reduction='sum')", "itself decides 'reduction'"),
    ],
)
def test_an_unsuitable_loss_of_masks(spec, message):
    with pytest.raises(SpecError, match=message):
        use_losses(small_rcnn(MaskRCNN), spec)


def test_the_parts_of_a_string():
    stages = ("rpn", "roi")
    parts = read_stages("giou+focal(gamma=2)", stages, "it", stages)
    assert parts == dict.fromkeys(stages, "giou+focal(gamma=2)")
    parts = read_stages(" roi :ce ;\n rpn: 2*giou + bce;\n", stages, "it", stages)
    assert parts == {"roi": "ce", "rpn": "2*giou + bce"}
    assert read_stages("giou; rpn: ce", stages, "it", ["roi"]) == {"roi": "giou", "rpn": "ce"}


def test_heads_of_ones_own_are_refused():
    class Own(RoIHeads):
        pass

    model = small_rcnn()
    model.roi_heads.__class__ = Own
    with pytest.raises(TypeError, match=r"stage 'roi'.* is a Own, not torchvision's RoIHeads"):
        use_losses(model, STOCK[FasterRCNN])
    assert type(model.rpn) is RegionProposalNetwork
    use_losses(model, f"rpn: {BOXES}+bce")


def test_a_predictor_put_in_later_is_the_one_that_trains(images, targets):
    model = use_losses(small_rcnn(), OTHER[FasterRCNN])
    model.roi_heads.box_predictor = FastRCNNPredictor(32, CLASSES)
    losses, gradients = run(model, images, targets)
    assert gradients["roi_heads.box_predictor.cls_score.weight"].any()
    assert not model.roi_heads.box_predictor._forward_hooks
    assert all(value.isfinite() for value in losses.values())


def test_evaluation_is_torchvisions(images):
    model = small_rcnn(MaskRCNN).eval()
    expected = model(images)
    found = use_losses(model, OTHER[MaskRCNN])(images)
    for one, other in zip(expected, found, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("boxes", names_of_kind("boxes") + names_of_kind("deltas"))
def test_every_box_loss_gives_finite_losses(boxes, images, targets):
    spec = f"rpn: {boxes}+bce; roi: {boxes}+ce"
    losses, gradients = run(use_losses(small_rcnn(), spec), images, targets)
    assert losses["loss_rpn_box_reg"] > 0
    assert losses["loss_box_reg"] > 0
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert gradients["rpn.head.bbox_pred.weight"].any()
    assert gradients["roi_heads.box_predictor.bbox_pred.weight"].any()


SOFTMAX = ["ce", "softmax_focal", "poly", "symmetric_ce", "ohem"]
NOT_OF_MASKS = [*SOFTMAX, "cldice"]  # the masks of a new model are flat: they have no skeletons
PAIRS = [
    *(f"rpn: giou+{name}" for name in names_of_kind("classification")),
    *(f"roi: giou+{name}" for name in SOFTMAX),
    *(f"mask: {name}" for name in names_of_kind("segmentation") if name not in NOT_OF_MASKS),
    "mask: bce+cldice",
    *(f"keypoint: {name}" for name in SOFTMAX),
]


@pytest.mark.parametrize("spec", PAIRS)
def test_every_other_loss_trains_its_stage(spec, images, targets):
    cls = KeypointRCNN if spec.startswith("keypoint") else MaskRCNN
    entry, weight = {
        "rpn": ("loss_objectness", "rpn.head.cls_logits.weight"),
        "roi": ("loss_classifier", "roi_heads.box_predictor.cls_score.weight"),
        "mask": ("loss_mask", "roi_heads.mask_predictor.mask_fcn_logits.weight"),
        "keypoint": ("loss_keypoint", "roi_heads.keypoint_predictor.kps_score_lowres.weight"),
    }[spec.split(":")[0]]
    losses, gradients = run(use_losses(small_rcnn(cls), spec), images, targets)
    assert losses[entry].isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert gradients[weight].any()


@pytest.mark.parametrize("cls", MODELS)
def test_bf16_autocast(cls, images, targets):
    model = use_losses(small_rcnn(cls), OTHER[cls])
    full, _ = run(model, images, targets)
    with torch.autocast("cpu", torch.bfloat16):
        half, _ = run(model, images, targets)
    for key, value in half.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, full[key], rtol=0.1, atol=0.05)


def test_the_losses_of_all_stages_go_on_together(images, targets):
    spec = (
        "rpn: giou+learned*bce; roi: ramp(0, 1, steps=4)*giou+ce; mask: bce+learned*dice(smooth=1)"
    )
    model = use_losses(small_rcnn(MaskRCNN), spec)
    keys = list(restore_losses(copy.deepcopy(model)).state_dict())
    assert list(model.state_dict()) == keys
    losses = model_losses(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run(model, images, targets)
    assert losses.values["roi.giou"] == 0
    optimizer.step()
    losses.advance()
    values, _ = run(model, images, targets)
    torch.testing.assert_close(sum(values.values()), sum(losses.values.values()))
    assert losses.factors["roi.giou"] == 0.25
    state = losses.state_dict()
    assert set(state) == {
        "rpn.log_variance_bce",
        "roi.step",
        "mask.log_variance_dice",
    }
    assert all(value != 0 for value in state.values())
    fresh = model_losses(use_losses(small_rcnn(MaskRCNN), spec))
    fresh.load_state_dict(state)
    assert fresh.factors == losses.factors
    with pytest.raises(RuntimeError, match=r"no loss has the state mask"):
        model_losses(use_losses(small_rcnn(), STOCK[FasterRCNN])).load_state_dict(state)


@pytest.mark.parametrize("cls", MODELS)
def test_the_model_learns(cls, images, targets):
    model = use_losses(small_rcnn(cls), OTHER[cls].replace("2*ciou", "learned*ciou"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    totals = []
    for _ in range(12):
        losses, _ = run(model, images, targets)
        totals.append(sum(losses.values()).item())
        optimizer.step()
    assert totals[-1] < 0.8 * totals[0]


class FirstOnes:
    """Samples without chance, and as many in each image."""

    def __init__(self, positives, negatives):
        self.counts = positives, negatives

    def __call__(self, labels):
        masks = [[], []]
        for each in labels:
            for found, hit, count in zip(masks, (each >= 1, each == 0), self.counts, strict=True):
                found.append((hit & (hit.cumsum(0) <= count)).to(torch.uint8))
        return masks


def deterministic(model):
    model.rpn.fg_bg_sampler = FirstOnes(2, 6)
    model.roi_heads.fg_bg_sampler = FirstOnes(1, 4)
    return model


def test_meta_device_finds_no_wait_for_the_device():
    """A copy to the host, or a tensor of another device, raises on meta."""
    model = deterministic(use_losses(small_rcnn(), "rpn: giou+l1+focal; roi: ciou+l1+ce+ohem"))
    with torch.device("meta"):
        anchors, truths = [torch.rand(50, 4)] * 2, [torch.rand(50, 4)] * 2
        logits = torch.randn(100, 1, requires_grad=True)
        deltas = torch.randn(100, 4, requires_grad=True)
        model.rpn._matched = torch.cat(anchors), torch.cat(truths), True
        labels = [torch.zeros(50)] * 2
        sum(model.rpn.compute_loss(logits, deltas, labels, truths)).backward()
        classes = [torch.zeros(50, dtype=torch.long)] * 2
        scores = torch.randn(100, CLASSES, requires_grad=True)
        offsets = torch.randn(100, 4 * CLASSES, requires_grad=True)
        losses = model.roi_heads._roi_losses(scores, offsets, anchors, classes, truths)
        sum(value for terms in losses.values() for value in terms.values()).backward()
    assert deltas.grad.shape == (100, 4)
    assert offsets.grad.shape == (100, 4 * CLASSES)


def test_two_processes_equal_one(images, targets):
    """DistributedDataParallel averages; the result is that of one process with both images."""
    images, targets = images[:2], [targets[0], targets[0]]
    expected = {}
    for cls in MODELS:
        model = deterministic(use_losses(small_rcnn(cls), OTHER[cls]))
        _, expected[cls] = run(model, images, targets)
    for found in run_in_processes(_gradients_of_rank, images, targets):
        for cls, gradients in zip(MODELS, found, strict=True):
            for name, gradient in expected[cls].items():
                torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)


def _gradients_of_rank(rank, images, targets):
    found = []
    for cls in MODELS:
        model = deterministic(use_losses(small_rcnn(cls), OTHER[cls]))
        wrapped = DistributedDataParallel(model)
        sum(wrapped(images[rank : rank + 1], targets[rank : rank + 1]).values()).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    return found
