"""The RetinaNet adapter: torchvision's own numbers at its own options, and any losses else."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import resnet18
from torchvision.models.detection import RetinaNet, retinanet_resnet50_fpn_v2
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.retinanet import RetinaNetHead

import detseg_losses
from detseg_losses import SpecError
from detseg_losses.integrations import restore_losses, use_losses
from detseg_losses.spec import names_of_kind
from processes import run_in_processes

CLASSES = 7


def small_retinanet(box_loss="l1"):
    """A RetinaNet of resnet18, without batch statistics, that takes 64-pixel images."""
    torch.manual_seed(0)
    body = resnet18(weights=None, norm_layer=lambda width: torch.nn.GroupNorm(8, width))
    layers = {"layer2": "0", "layer3": "1"}
    backbone = BackboneWithFPN(body, layers, [128, 256], 32)
    anchors = AnchorGenerator(((8,), (16,), (32,)), ((0.5, 1.0, 2.0),) * 3)
    head = RetinaNetHead(32, 3, CLASSES)
    head.regression_head._loss_type = box_loss
    return RetinaNet(
        backbone,
        CLASSES,
        min_size=64,
        max_size=96,
        anchor_generator=anchors,
        head=head,
        fg_iou_thresh=0.4,
        bg_iou_thresh=0.3,
    ).train()


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


def assert_equal(first, second, **tolerance):
    (losses, gradients), (other_losses, other_gradients) = first, second
    torch.testing.assert_close(losses, other_losses, **tolerance)
    scale = max(g.abs().max() for g in gradients.values())
    for name, gradient in gradients.items():
        bound = tolerance.get("atol", 1e-5) * scale.item()
        torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-4, atol=bound)


@pytest.mark.parametrize("box_loss", ["l1", "smooth_l1", "giou", "diou", "ciou"])
def test_torchvisions_own_options_give_its_values_and_gradients(box_loss, images, targets):
    model = small_retinanet(box_loss)
    stock = run(model, images, targets)
    use_losses(model, f"{box_loss}+focal")
    assert_equal(stock, run(model, images, targets), rtol=1e-5, atol=1e-5)


def test_an_official_model_too(images, targets):
    model = retinanet_resnet50_fpn_v2(
        weights=None, weights_backbone=None, num_classes=CLASSES, min_size=64, max_size=96
    ).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    stock = run(model, images, targets)
    use_losses(model, "giou+focal")
    assert_equal(stock, run(model, images, targets), rtol=1e-5, atol=1e-5)


def test_a_batch_without_any_object(images, targets):
    model = small_retinanet()
    nothing = [targets[1]] * 3
    stock = run(model, images, nothing)
    use_losses(model, "l1+focal")
    ours = run(model, images, nothing)
    assert ours[0]["bbox_regression"] == 0
    assert_equal(stock, ours)


def test_a_sub_head_that_is_put_in_later_is_used(images, targets):
    model = use_losses(small_retinanet(), "l1+focal")
    other = RetinaNetHead(32, 3, CLASSES + 2).classification_head
    model.head.classification_head = other
    targets[0]["labels"][0] = CLASSES + 1
    sum(model(images, targets).values()).backward()
    assert all(parameter.grad is not None for parameter in other.parameters())
    assert restore_losses(model).head.classification_head is other


class OwnHead(RetinaNetHead):
    pass


class OwnLoss(RetinaNet):
    def compute_loss(self, targets, head_outputs, anchors):
        return {}


def test_a_wrapped_model_is_refused():
    for wrap in (torch.nn.DataParallel, torch.compile):
        with pytest.raises(TypeError, match="wraps a model: call use_losses on the model"):
            use_losses(wrap(small_retinanet()), "giou+focal")


def test_what_computes_its_loss_by_itself_is_refused():
    model = small_retinanet()
    model.head.__class__ = OwnHead
    with pytest.raises(TypeError, match="is a OwnHead, not torchvision's RetinaNetHead"):
        use_losses(model, "giou+focal")
    model = small_retinanet()
    model.__class__ = OwnLoss
    with pytest.raises(TypeError, match="OwnLoss has a compute_loss of its own"):
        use_losses(model, "giou+focal")


def test_undo_is_exact(images, targets):
    model = small_retinanet()
    head, keys = model.head, list(model.state_dict())
    stock = run(model, images, targets)
    use_losses(model, "giou+focal(gamma=1)")
    use_losses(model, "iou+bce")
    assert list(model.state_dict()) == keys
    restore_losses(model)
    assert model.head is head
    again = run(model, images, targets)
    assert all(torch.equal(stock[0][key], again[0][key]) for key in stock[0])
    assert all(torch.equal(stock[1][key], again[1][key]) for key in stock[1])


def test_copies_keep_the_losses(images, targets):
    model = use_losses(small_retinanet(), "giou+0.5*l1+focal(alpha=[.1,.2,.3,.4,.5,.6,.7])")
    expected = run(model, images, targets)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    fresh = use_losses(small_retinanet(), repr(model.head.loss))
    fresh.load_state_dict(model.state_dict())
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
        fresh,
    ]
    for each in copies:
        assert_equal(expected, run(each, images, targets))
        parameters = {id(p) for p in each.parameters()}
        assert {id(p) for p in restore_losses(each).parameters()} == parameters


@pytest.mark.parametrize(
    ("spec", "function"),
    [("giou+focal", "generalized_box_iou_loss"), ("l1+focal", "sigmoid_focal_loss")],
)
def test_the_changed_term_is_the_one_called(spec, function, images, targets, monkeypatch):
    model = small_retinanet()
    stock = {key: value.item() for key, value in model(images, targets).items()}
    use_losses(model, spec)
    loss = next(t for t in model.head.loss.terms if type(t).function.__name__ == function)
    calls = []

    def doubled(*inputs, **options):
        calls.append(options["reduction"])
        return 2 * getattr(detseg_losses, function)(*inputs, **options)

    before = {name: value.item() for name, value in model(images, targets).items()}
    monkeypatch.setattr(type(loss), "function", staticmethod(doubled))
    after = {name: value.item() for name, value in model(images, targets).items()}
    changed = "bbox_regression" if function.startswith("generalized") else "classification"
    kept = ({*stock} - {changed}).pop()
    assert len(calls) == 1
    assert after[changed] == pytest.approx(2 * before[changed])
    assert after[kept] == before[kept]


BOX_SUMS = [
    "+".join(names)
    for size in (1, 2)
    for names in itertools.combinations(["iou", "giou", "diou", "ciou", "l1", "smooth_l1"], size)
]


OTHERS = [name for kind in ("boxes", "deltas") for name in names_of_kind(kind)]


@pytest.mark.parametrize("loss", [name for name in OTHERS if name not in BOX_SUMS])
def test_every_other_loss_makes_a_step(loss, images, targets):
    """Its gradient reaches the regression head, and a small step along it lowers it."""
    model = use_losses(small_retinanet(), f"{loss}+focal")
    losses, gradients = run(model, images, targets)
    assert losses["bbox_regression"].isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    last = model.head.regression_head.bbox_reg
    assert last.weight.grad.any()
    with torch.no_grad():
        for parameter in last.parameters():
            parameter -= 1e-3 * parameter.grad / parameter.grad.norm()
    assert model(images, targets)["bbox_regression"] < losses["bbox_regression"]


@pytest.mark.parametrize("classification", ["focal", "bce"])
@pytest.mark.parametrize("boxes", BOX_SUMS)
def test_every_pairing_gives_finite_losses(boxes, classification, images, targets):
    model = use_losses(small_retinanet(), f"{boxes}+{classification}")
    losses, gradients = run(model, images, targets)
    assert all(value.isfinite() and value > 0 for value in losses.values())
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    values = model.head.loss.values
    assert set(values) == {*boxes.split("+"), classification}
    torch.testing.assert_close(sum(values.values()), sum(losses.values()).detach())


def test_weights_scale_their_term(images, targets):
    model = use_losses(small_retinanet(), "giou+2*focal")
    model(images, targets)
    doubled = model.head.loss.values
    use_losses(model, "giou+focal")
    model(images, targets)
    torch.testing.assert_close(doubled["focal"], 2 * model.head.loss.values["focal"])
    torch.testing.assert_close(doubled["giou"], model.head.loss.values["giou"])


def test_a_role_without_a_term_stays_and_says_so(images, targets):
    model = small_retinanet()
    stock = model(images, targets)
    with pytest.warns(UserWarning, match="'classification' stays as it is"):
        use_losses(model, "giou")
    ours = model(images, targets)
    assert torch.equal(ours["classification"], stock["classification"])
    assert ours["bbox_regression"] != stock["bbox_regression"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("giou+dice", "RetinaNet has no use for 'dice'"),
        ("giou+poly", "RetinaNet has no use for 'poly'"),
        ("giou+ghm", "'ghm' is a mean by nature"),
        ("giou+focal(reduction='mean')", "itself decides 'reduction'"),
        ("giou+focal(ignore_index=255)", "itself decides 'ignore_index'"),
        ("giou+focal(class_weights=[1, 2])", "2 class_weights, and the model 7 classes"),
        ("giou+focl", "column 6.*did you mean 'focal'"),
    ],
)
def test_an_unsuitable_loss_is_one_clear_line_and_changes_nothing(spec, message):
    model = small_retinanet()
    head = model.head
    with pytest.raises(SpecError, match=message) as error:
        use_losses(model, spec)
    assert "\n" not in str(error.value)
    assert model.head is head


def test_a_model_without_an_adapter_is_named():
    with pytest.raises(TypeError, match="no adapter for Linear"):
        use_losses(torch.nn.Linear(1, 1), "ce")


def test_the_ignored_anchors_matter_to_nothing(images, targets):
    """Anchors between the thresholds may have any logits."""
    model = use_losses(small_retinanet(), "giou+focal")
    logits = torch.randn(1, 4, CLASSES, requires_grad=True)
    deltas = torch.randn(1, 4, 4, requires_grad=True)
    anchors = [torch.tensor([[0.0, 0, 8, 8]]).repeat(4, 1)]
    matched = [torch.tensor([0, -1, -2, -2])]
    outputs = {"cls_logits": logits, "bbox_regression": deltas}
    first = model.head.compute_loss(targets[:1], outputs, anchors, matched)
    sum(first.values()).backward()
    assert not logits.grad[0, 2:].any()
    assert not deltas.grad[0, 1:].any()
    assert logits.grad[0, :2].all()
    wild = logits.detach().index_fill(1, torch.tensor([2, 3]), torch.inf)
    second = model.head.compute_loss(targets[:1], outputs | {"cls_logits": wild}, anchors, matched)
    assert torch.equal(first["classification"], second["classification"])


def test_bf16_autocast(images, targets):
    model = use_losses(small_retinanet(), "giou+l1+focal")
    full = model(images, targets)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(images, targets)
    for key, value in half.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, full[key], rtol=0.05, atol=0.02)


def test_meta_device_finds_no_wait_for_the_device(images, targets):
    """A copy to the host, or a tensor of another device, raises on meta."""
    model = use_losses(small_retinanet(), "giou+smooth_l1+focal+bce")
    with torch.device("meta"):
        outputs = {
            "cls_logits": torch.randn(2, 50, CLASSES, requires_grad=True),
            "bbox_regression": torch.randn(2, 50, 4, requires_grad=True),
        }
        targets = [{"boxes": torch.rand(3, 4), "labels": torch.zeros(3, dtype=torch.long)}] * 2
        losses = model.head.compute_loss(
            targets, outputs, [torch.rand(50, 4)] * 2, [torch.zeros(50, dtype=torch.long)] * 2
        )
        sum(losses.values()).backward()
    assert outputs["cls_logits"].grad.shape == (2, 50, CLASSES)
    assert outputs["bbox_regression"].grad.shape == (2, 50, 4)


@pytest.mark.parametrize("normalizer", ["image", "batch"])
def test_two_processes_equal_one(normalizer, images, targets):
    """DistributedDataParallel averages; the result is that of one process with both images."""
    images, targets = images[:2], [targets[0], targets[2]]
    model = use_losses(small_retinanet(), "giou+l1+focal", normalizer=normalizer)
    _, expected = run(model, images, targets)
    for gradients in run_in_processes(_gradients_of_rank, images, targets, normalizer):
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)


def _gradients_of_rank(rank, images, targets, normalizer):
    model = use_losses(small_retinanet(), "giou+l1+focal", normalizer=normalizer)
    wrapped = DistributedDataParallel(model)
    sum(wrapped(images[rank : rank + 1], targets[rank : rank + 1]).values()).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_accumulated_batches_equal_the_big_one(images, targets):
    model = use_losses(small_retinanet(), "giou+focal")
    images, targets = images[:2], targets[:2]
    _, expected = run(model, images, targets)
    model.zero_grad()
    for index in range(2):
        losses = model(images[index : index + 1], targets[index : index + 1])
        (sum(losses.values()) / 2).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


def test_a_negative_label_is_named(images, targets):
    targets[2]["labels"][0] = -1
    with pytest.raises(ValueError, match="image 2: label -1, but num_classes=7"):
        use_losses(small_retinanet(), "giou + focal")(images, targets)
