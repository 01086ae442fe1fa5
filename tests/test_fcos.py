"""The FCOS adapter: torchvision's own numbers at its own options, and any losses else."""

import copy
import io
import pickle

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import resnet18
from torchvision.models.detection import FCOS, fcos_resnet50_fpn
from torchvision.models.detection._utils import BoxLinearCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN

import detseg_losses
from detseg_losses import SpecError
from detseg_losses.integrations import restore_losses, use_losses
from detseg_losses.integrations.torchvision_fcos import centerness_of
from processes import run_in_processes

CLASSES = 7
KEYS = ("classification", "bbox_regression", "bbox_ctrness")


def small_fcos():
    """An FCOS of resnet18, without batch statistics, that takes 64-pixel images."""
    torch.manual_seed(0)
    body = resnet18(weights=None, norm_layer=lambda width: torch.nn.GroupNorm(8, width))
    backbone = BackboneWithFPN(body, {"layer2": "0", "layer3": "1"}, [128, 256], 32)
    anchors = AnchorGenerator(((8,), (16,), (32,)), ((1.0,),) * 3)
    return FCOS(backbone, CLASSES, 64, 96, anchor_generator=anchors).train()


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    sizes = (64, 64), (64, 64), (72, 80)
    return [torch.rand(3, *size, generator=generator) for size in sizes]


@pytest.fixture
def targets():
    """Two objects, none, one."""
    return [
        {
            "boxes": torch.tensor([[4.0, 4, 30, 36], [20, 16, 60, 50]]),
            "labels": torch.tensor([1, 3]),
        },
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
        {"boxes": torch.tensor([[10.0, 10, 40, 40]]), "labels": torch.tensor([6])},
    ]


def run(model, images, targets):
    """The losses and the gradients of all parameters."""
    model.zero_grad()
    losses = model(images, targets)
    sum(losses.values()).backward()
    return losses, {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_equal(first, second):
    (losses, gradients), (other_losses, other_gradients) = first, second
    torch.testing.assert_close(losses, other_losses)
    scale = max(g.abs().max() for g in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-4, atol=1e-5 * scale)


def outputs_of_head(size, device="cpu"):
    """Outputs of a head, anchors of a grid of 8 pixels, and matches: an object, none."""
    generator = torch.Generator().manual_seed(2)
    outputs = {
        "cls_logits": torch.randn(2, size, CLASSES, generator=generator),
        "bbox_regression": torch.rand(2, size, 4, generator=generator),
        "bbox_ctrness": torch.randn(2, size, 1, generator=generator),
    }
    outputs = {key: value.to(device).requires_grad_() for key, value in outputs.items()}
    corner = 8.0 * torch.arange(size, device=device).unsqueeze(-1)
    anchor = torch.cat((corner, torch.zeros_like(corner), corner + 8, 8 + corner * 0), 1)
    boxes = torch.tensor([[0.0, 0, 8 * size, 12]], device=device)
    targets = [{"boxes": boxes, "labels": torch.tensor([3], device=device)}] * 2
    matched = [torch.zeros(size, dtype=torch.int64, device=device)] * 2
    matched[1] = matched[1] - 1
    return targets, outputs, [anchor] * 2, matched


def test_torchvisions_own_options_give_its_values_and_gradients(images, targets):
    model = small_fcos()
    stock = run(model, images, targets)
    use_losses(model, "giou+focal")
    ours = run(model, images, targets)
    assert list(ours[0]) == list(stock[0]) == list(KEYS)
    assert_equal(stock, ours)


def test_an_official_model_too(images, targets):
    model = fcos_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=CLASSES, min_size=64, max_size=96
    ).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    stock = run(model, images, targets)
    use_losses(model, "giou+focal")
    assert_equal(stock, run(model, images, targets))


@pytest.mark.parametrize("spec", ["giou+focal", "iou+l1+quality_focal"])
def test_a_batch_without_any_object(spec, images, targets):
    model = small_fcos()
    nothing = [targets[1]] * 3
    stock = run(model, images, nothing)
    ours = run(use_losses(model, spec), images, nothing)
    assert ours[0]["bbox_regression"] == ours[0]["bbox_ctrness"] == 0
    assert all(gradient.isfinite().all() for gradient in ours[1].values())
    if spec == "giou+focal":
        assert_equal(stock, ours)


def test_each_term_is_what_its_name_says():
    """Of logits and boxes that are known, by the formulas of the functions themselves."""
    model = use_losses(
        small_fcos(), "2*diou + 0.5*l1 + focal(gamma=1)", centerness="quality_focal(beta=1)"
    )
    targets, outputs, anchors, matched = outputs_of_head(6)
    losses = model.head.compute_loss(targets, outputs, anchors, matched)

    anchor, boxes = anchors[0], targets[0]["boxes"].expand(6, 4)
    classes = torch.zeros(2, 6, CLASSES)
    classes[0, :, 3] = 1
    focal = detseg_losses.sigmoid_focal_loss(
        outputs["cls_logits"], classes, gamma=1, reduction="sum"
    )
    coder = BoxLinearCoder(normalize_by_size=True)
    deltas = outputs["bbox_regression"][0]
    diou = detseg_losses.distance_box_iou_loss(coder.decode(deltas, anchor), boxes, reduction="sum")
    distances = coder.encode(anchor, boxes)
    left, top, right, bottom = distances.unbind(-1)
    horizontal = torch.minimum(left, right) / torch.maximum(left, right)
    vertical = torch.minimum(top, bottom) / torch.maximum(top, bottom)
    aim = (horizontal * vertical).sqrt().unsqueeze(-1)
    quality = detseg_losses.quality_focal_loss(
        outputs["bbox_ctrness"][0], aim, beta=1, reduction="sum"
    )
    expected = {"diou": 2 * diou, "l1": (deltas - distances).abs().sum() / 2, "focal": focal}
    values = model.head.loss.values
    assert list(values) == ["focal", "diou", "l1"]
    for name, value in expected.items():
        torch.testing.assert_close(values[name], value.detach() / 6)
    torch.testing.assert_close(model.head.centerness.values["quality_focal"], quality.detach() / 6)
    torch.testing.assert_close(losses["bbox_regression"].detach(), values["diou"] + values["l1"])
    torch.testing.assert_close(losses["bbox_ctrness"], quality / 6)


def test_the_normalizer_of_images_averages_them(images, targets):
    model = use_losses(small_fcos(), "giou+focal", normalizer="image")
    images, targets = images[:2], [targets[0], targets[2]]
    losses = model(images, targets)
    first, second = (model([image], [one]) for image, one in zip(images, targets, strict=True))
    for key, value in losses.items():
        torch.testing.assert_close(value, (first[key] + second[key]) / 2)


def test_undo_is_exact(images, targets):
    model = small_fcos()
    head, keys = model.head, list(model.state_dict())
    stock = run(model, images, targets)
    use_losses(model, "giou+focal(gamma=1)")
    use_losses(model, "iou+bce", centerness="2*bce")
    assert list(model.state_dict()) == keys
    restore_losses(model)
    assert model.head is head
    again = run(model, images, targets)
    assert all(torch.equal(stock[0][key], again[0][key]) for key in stock[0])
    assert all(torch.equal(stock[1][key], again[1][key]) for key in stock[1])


def test_copies_keep_the_losses(images, targets):
    options = {"centerness": "0.5*bce", "normalizer": "image"}
    model = use_losses(small_fcos(), "giou+0.5*l1+focal(alpha=[.1,.2,.3,.4,.5,.6,.7])", **options)
    expected = run(model, images, targets)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    fresh = use_losses(small_fcos(), repr(model.head.loss), **options)
    fresh.load_state_dict(model.state_dict())
    for each in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
        fresh,
    ):
        assert_equal(expected, run(each, images, targets))
        parameters = {id(p) for p in each.parameters()}
        assert {id(p) for p in restore_losses(each).parameters()} == parameters


@pytest.mark.parametrize(("spec", "kept"), [("l1", KEYS[0]), ("bce", KEYS[1])])
def test_a_role_without_a_term_stays_and_says_so(spec, kept, images, targets):
    model = small_fcos()
    stock = model(images, targets)
    with pytest.warns(UserWarning, match=f"'{kept}' stays as it is"):
        use_losses(model, spec)
    ours = model(images, targets)
    assert torch.equal(ours[kept], stock[kept])
    assert sum(torch.equal(ours[key], stock[key]) for key in KEYS[:2]) == 1
    torch.testing.assert_close(ours["bbox_ctrness"], stock["bbox_ctrness"])


@pytest.mark.parametrize(
    ("spec", "centerness", "message"),
    [
        ("giou+dice", "bce", "FCOS has no use for 'dice'"),
        ("giou+poly", "bce", "FCOS has no use for 'poly'"),
        ("giou+ghm", "bce", "'ghm' is a mean by nature"),
        ("giou+focal(reduction='mean')", "bce", "itself decides 'reduction'"),
        ("giou+focal(class_weights=[1, 2])", "bce", "2 class_weights, and the model 7 classes"),
        ("giou+focl", "bce", "column 6.*did you mean 'focal'"),
        ("giou+focal", "giou", "the centerness of FCOS has no use for 'giou'"),
        ("giou+focal", "bce(pos_weight=[1, 2])", "2 pos_weight, and the model 1 classes"),
    ],
)
def test_an_unsuitable_loss_is_one_clear_line_and_changes_nothing(spec, centerness, message):
    model = small_fcos()
    head = model.head
    with pytest.raises(SpecError, match=message) as error:
        use_losses(model, spec, centerness=centerness)
    assert "\n" not in str(error.value)
    assert model.head is head


def test_anchors_without_an_object_have_no_box_and_no_centerness():
    model = use_losses(small_fcos(), "giou+l1+focal")
    targets, outputs, anchors, _ = outputs_of_head(4)
    matched = [torch.tensor([0, -1, -1, 0]), torch.tensor([-1, -1, -1, -1])]
    sum(model.head.compute_loss(targets, outputs, anchors, matched).values()).backward()
    for key in ("bbox_regression", "bbox_ctrness"):
        used = outputs[key].grad.any(-1)
        assert used.tolist() == [[True, False, False, True], [False] * 4]
    assert outputs["cls_logits"].grad.all()


def test_meta_device_finds_no_wait_for_the_device():
    """A copy to the host, or a tensor of another device, raises on meta."""
    model = use_losses(small_fcos(), "giou+smooth_l1+focal+bce", centerness="bce+focal")
    with torch.device("meta"):
        targets = [{"boxes": torch.rand(3, 4), "labels": torch.zeros(3, dtype=torch.long)}] * 2
        shapes = {"cls_logits": CLASSES, "bbox_regression": 4, "bbox_ctrness": 1}
        outputs = {k: torch.randn(2, 50, n, requires_grad=True) for k, n in shapes.items()}
        matched = [torch.zeros(50, dtype=torch.long)] * 2
        losses = model.head.compute_loss(targets, outputs, [torch.rand(50, 4)] * 2, matched)
        sum(losses.values()).backward()
    assert all(output.grad.shape == output.shape for output in outputs.values())


def test_all_rows_with_weights_of_0_give_what_the_chosen_rows_give(monkeypatch):
    """As a device computes it that would have to wait for the number of positives."""
    model = use_losses(small_fcos(), "giou+l1+focal")
    targets, outputs, anchors, matched = outputs_of_head(5)
    losses = model.head.compute_loss(targets, outputs, anchors, matched)
    sum(losses.values()).backward()
    gradients = [output.grad.clone() for output in outputs.values()]
    for output in outputs.values():
        output.grad = None
    monkeypatch.setattr("detseg_losses.integrations.detection.rows_where", lambda mask: slice(None))
    dense = model.head.compute_loss(targets, outputs, anchors, matched)
    sum(dense.values()).backward()
    torch.testing.assert_close(dense, losses)
    torch.testing.assert_close([output.grad for output in outputs.values()], gradients)


def test_bf16_autocast(images, targets):
    model = use_losses(small_fcos(), "giou+l1+focal")
    full = model(images, targets)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(images, targets)
    for key, value in half.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, full[key], rtol=0.05, atol=0.02)


def test_centerness_by_hand():
    middle, border, quarter = [4.0, 4, 4, 4], [0.0, 4, 8, 4], [2.0, 4, 8, 4]
    values = centerness_of(torch.tensor([middle, border, quarter, [-1, 2, 3, 4]]))
    assert values.tolist() == [1, 0, 0.5, 0]
    assert centerness_of(torch.zeros(0, 4)).shape == (0,)


def test_a_few_steps_lower_the_loss(images, targets):
    model = use_losses(small_fcos(), "ciou+focal")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    values = []
    for _ in range(6):
        losses, _ = run(model, images, targets)
        optimizer.step()
        values.append(sum(losses.values()).item())
    assert values[-1] < 0.9 * values[0]


@pytest.mark.parametrize("normalizer", ["image", "batch"])
def test_two_processes_equal_one(normalizer, images, targets):
    """DistributedDataParallel averages; the result is that of one process with both images."""
    images, targets = images[:2], [targets[0], targets[2]]
    model = use_losses(small_fcos(), "giou+l1+focal", normalizer=normalizer)
    _, expected = run(model, images, targets)
    for gradients in run_in_processes(_gradients_of_rank, images, targets, normalizer):
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)


def _gradients_of_rank(rank, images, targets, normalizer):
    model = use_losses(small_fcos(), "giou+l1+focal", normalizer=normalizer)
    wrapped = DistributedDataParallel(model)
    sum(wrapped(images[rank : rank + 1], targets[rank : rank + 1]).values()).backward()
    return {name: p.grad for name, p in model.named_parameters()}
