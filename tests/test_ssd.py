"""The SSD adapter: torchvision's own numbers at its own options, and any losses else."""

import copy
import io
import pickle
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD

import detseg_losses
from detseg_losses import SpecError, build_loss
from detseg_losses.integrations import restore_losses, use_losses
from detseg_losses.integrations.detection import softmax_terms
from detseg_losses.integrations.torchvision_ssd import sum_with_hardest
from detseg_losses.spec import names_of_kind
from processes import run_in_processes

CLASSES = 7
SOFTMAX = ["ce", "ohem", "poly", "softmax_focal", "symmetric_ce"]


class Backbone(nn.Module):
    """Maps of 8 and 4 pixels of a 64-pixel image."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, 4, 1), nn.GroupNorm(4, 16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, 2, 1), nn.GroupNorm(4, 32), nn.ReLU()),
        )
        self.coarse = nn.Sequential(nn.Conv2d(32, 32, 3, 2, 1), nn.GroupNorm(4, 32), nn.ReLU())
        self.out_channels = [32, 32]

    def forward(self, x):
        fine = self.stem(x)
        return OrderedDict([("0", fine), ("1", self.coarse(fine))])


def small_ssd(**options):
    """An SSD without batch statistics, that takes 64-pixel images."""
    torch.manual_seed(0)
    anchors = DefaultBoxGenerator([[2], [2]], scales=[0.2, 0.5, 0.9])
    return SSD(Backbone(), anchors, (64, 64), CLASSES, **options).train()


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
    return losses, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(first, second):
    (losses, gradients), (other_losses, other_gradients) = first, second
    torch.testing.assert_close(losses, other_losses)
    assert gradients.keys() == other_gradients.keys()
    scale = max(g.abs().max() for g in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("positive_fraction", [0.25, 0.1])
def test_torchvisions_own_options_give_its_values_and_gradients(positive_fraction, images, targets):
    model = small_ssd(positive_fraction=positive_fraction)
    stock = run(model, images, targets)
    use_losses(model, "smooth_l1+ce")
    ours = run(model, images, targets)
    assert list(ours[0]) == list(stock[0])
    assert_equal(stock, ours)


def test_an_official_model_too(images, targets):
    torch.manual_seed(0)
    model = ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=CLASSES
    ).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    stock = run(model, images[:2], targets[:2])
    use_losses(model, "smooth_l1+ce")
    assert_equal(stock, run(model, images[:2], targets[:2]))


@pytest.mark.parametrize("spec", ["smooth_l1+ce", "giou+l1+poly"])
def test_a_batch_without_any_object(spec, images, targets):
    """Without a positive there is no negative either."""
    model = use_losses(small_ssd(), spec)
    losses, gradients = run(model, images, [targets[1]] * 3)
    assert all(value == 0 for value in losses.values())
    assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("ratio", [3.0, 1e6])
def test_each_term_is_what_its_name_says(ratio, targets):
    """Of logits and boxes that are known, by the formulas of the functions themselves."""
    model = use_losses(small_ssd(), "2*diou + 0.5*l1 + poly(epsilon=2)")
    model.neg_to_pos_ratio = ratio
    generator = torch.Generator().manual_seed(2)
    outputs = {
        "cls_logits": torch.randn(1, 40, CLASSES, generator=generator),
        "bbox_regression": torch.randn(1, 40, 4, generator=generator),
    }
    corner = torch.rand(40, 2, generator=generator) * 40
    anchors = torch.cat((corner, corner + 20), 1)
    matched = torch.full((40,), -1)
    matched[3:5] = 1
    losses = model.compute_loss(targets[:1], outputs, [anchors], [matched])

    labels = torch.zeros(40, dtype=torch.int64)
    labels[3:5] = 3
    each = detseg_losses.poly_cross_entropy_loss(
        outputs["cls_logits"][0], labels, epsilon=2, reduction="none"
    )
    negatives = 6 if ratio == 3 else 38
    poly = each[3:5].sum() + each[labels == 0].topk(negatives).values.sum()
    deltas, boxes = outputs["bbox_regression"][0, 3:5], targets[0]["boxes"][[1, 1]]
    decoded = model.box_coder.decode_single(deltas, anchors[3:5])
    diou = detseg_losses.distance_box_iou_loss(decoded, boxes, reduction="sum")
    l1 = (deltas - model.box_coder.encode_single(boxes, anchors[3:5])).abs().sum()
    values = model.loss.values
    for name, value in {"poly": poly, "diou": 2 * diou, "l1": l1 / 2}.items():
        torch.testing.assert_close(values[name], value / 2)
    torch.testing.assert_close(losses["classification"], values["poly"])
    torch.testing.assert_close(losses["bbox_regression"], values["diou"] + values["l1"])


def test_the_hardest_negatives_by_hand():
    losses = torch.tensor([[1.0, 5, 2, 3, 4], [7, 1, 2, 3, 4], [6, 5, 4, 3, 2]], requires_grad=True)
    objects = torch.tensor([[1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 0, 0]]).bool()
    sums = sum_with_hardest(losses, objects, 2.0)
    assert sums.tolist() == [[10], [0], [20]]  # of the third there are but two negatives
    sums.sum().backward()
    assert losses.grad.tolist() == [[1, 1, 0, 0, 1], [0] * 5, [1] * 5]


@pytest.mark.parametrize(
    "spec", [*SOFTMAX, *names_of_kind("boxes"), *names_of_kind("deltas")], ids=str
)
def test_every_loss_makes_a_step(spec, images, targets):
    """Its gradient reaches its head, and a small step along it lowers it."""
    classes = spec in SOFTMAX
    model = use_losses(small_ssd(), f"l1+{spec}" if classes else f"{spec}+ce")
    losses, gradients = run(model, images, targets)
    assert all(value.isfinite() for value in losses.values())
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    torch.testing.assert_close(sum(model.loss.values.values()), sum(losses.values()).detach())
    role = "classification" if classes else "bbox_regression"
    head = model.head.classification_head if classes else model.head.regression_head
    assert any(parameter.grad.any() for parameter in head.parameters())
    with torch.no_grad():
        for parameter in head.parameters():
            parameter -= 1e-3 * parameter.grad / parameter.grad.norm().clamp(min=1e-9)
    assert model(images, targets)[role] < losses[role]


@pytest.mark.parametrize(
    ("spec", "same"),
    [
        ("giou+focal", "giou+softmax_focal"),
        ("giou + 2*focal(gamma=1.5)", "giou + 2*softmax_focal(gamma=1.5)"),
        (
            "l1+bce(class_weights=[1, 2, 3, 4, 5, 6, 7])",
            "l1+ce(class_weights=[1, 2, 3, 4, 5, 6, 7])",
        ),
        (
            "l1 + learned*bce + focal(gamma=ramp(0, 2, steps=9))",
            "l1 + learned*ce + softmax_focal(gamma=ramp(0, 2, steps=9))",
        ),
    ],
)
def test_losses_of_sigmoids_are_taken_as_those_of_a_softmax(spec, same, images, targets):
    with pytest.warns(UserWarning, match="of SSD exclude each other: '.*' is taken as '"):
        model = use_losses(small_ssd(), spec)
    named = use_losses(small_ssd(), same)
    assert repr(model.loss) == repr(named.loss)
    first, second = model(images, targets), named(images, targets)
    assert all(torch.equal(first[key], second[key]) for key in first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        use_losses(model, repr(model.loss))


@pytest.mark.parametrize("owner", ["SSD", "the boxes of Faster R-CNN"])
def test_the_rule_names_the_head(owner):
    with pytest.raises(SpecError, match=f"classes of {owner} exclude each other.*'varifocal'"):
        softmax_terms(build_loss("ce+varifocal"), owner)


def test_undo_is_exact(images, targets):
    model = small_ssd()
    keys, attributes = list(model.state_dict()), model.__dict__.keys() | {*model._modules}
    stock = run(model, images, targets)
    use_losses(model, "giou+ce(label_smoothing=0.1)")
    use_losses(model, "iou+poly", normalizer="image")
    assert list(model.state_dict()) == keys
    restore_losses(model)
    assert type(model) is SSD
    assert model.__dict__.keys() | {*model._modules} == attributes
    again = run(model, images, targets)
    assert all(torch.equal(stock[0][key], again[0][key]) for key in stock[0])
    assert all(torch.equal(stock[1][key], again[1][key]) for key in stock[1])


def test_copies_keep_the_losses(images, targets):
    model = use_losses(
        small_ssd(), "giou+0.5*l1+softmax_focal(alpha=[.1,.2,.3,.4,.5,.6,.7])", normalizer="image"
    )
    expected = run(model, images, targets)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    fresh = use_losses(small_ssd(), repr(model.loss), normalizer="image")
    fresh.load_state_dict(model.state_dict())
    for each in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
        fresh,
    ):
        assert_equal(expected, run(each, images, targets))
        assert type(restore_losses(each)) is SSD


@pytest.mark.parametrize(("spec", "kept"), [("l1", "classification"), ("poly", "bbox_regression")])
def test_a_role_without_a_term_stays_and_says_so(spec, kept, images, targets):
    model = small_ssd()
    stock = model(images, targets)
    with pytest.warns(UserWarning, match=f"'{kept}' stays as it is"):
        use_losses(model, spec)
    ours = model(images, targets)
    assert torch.equal(ours[kept], stock[kept])
    assert sum(torch.equal(ours[key], stock[key]) for key in stock) == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("giou+dice", "no use for 'dice', it has for ce, ohem, poly"),
        ("giou+varifocal", "exclude each other: it has no use for 'varifocal'"),
        ("ce+dfl", "SSD has no use for 'dfl', it has for losses such as ce"),
        ("giou+focal(alpha=0.25)", "'alpha' has no meaning or another; write 'softmax_focal'"),
        ("giou+bce(pos_weight=2)", "'pos_weight' has no meaning or another; write 'ce'"),
        ("giou+ce(reduction='mean')", "itself decides 'reduction'"),
        ("giou+ce(class_weights=[1, 2])", "2 class_weights, and the model 7 classes"),
        ("giou+cee", "column 6.*did you mean 'ce'"),
    ],
)
def test_an_unsuitable_loss_is_one_clear_line_and_changes_nothing(spec, message):
    model = small_ssd()
    with pytest.raises(SpecError, match=message) as error:
        use_losses(model, spec)
    assert "\n" not in str(error.value)
    assert type(model) is SSD


class OwnSSD(SSD):
    pass


def test_a_subclass_is_refused():
    model = small_ssd()
    model.__class__ = OwnSSD
    with pytest.raises(TypeError, match="no adapter for OwnSSD: "):
        use_losses(model, "giou+ce")


def test_bf16_autocast(images, targets):
    model = use_losses(small_ssd(), "giou+l1+ce")
    full = model(images, targets)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(images, targets)
    for key, value in half.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, full[key], rtol=0.05, atol=0.02)


def test_meta_device_finds_no_wait_for_the_device():
    """A copy to the host, or a tensor of another device, raises on meta."""
    model = use_losses(small_ssd(), "giou+smooth_l1+ce+softmax_focal")
    with torch.device("meta"):
        targets = [{"boxes": torch.rand(3, 4), "labels": torch.zeros(3, dtype=torch.long)}] * 2
        shapes = {"cls_logits": CLASSES, "bbox_regression": 4}
        outputs = {k: torch.randn(2, 50, n, requires_grad=True) for k, n in shapes.items()}
        matched = [torch.zeros(50, dtype=torch.long)] * 2
        losses = model.compute_loss(targets, outputs, [torch.rand(50, 4)] * 2, matched)
        sum(losses.values()).backward()
    assert all(output.grad.shape == output.shape for output in outputs.values())


def test_all_rows_with_weights_of_0_give_what_the_chosen_rows_give(images, targets, monkeypatch):
    """As a device computes it that would have to wait for the number of positives."""
    model = use_losses(small_ssd(), "giou+l1+ce")
    chosen = run(model, images, targets)
    monkeypatch.setattr("detseg_losses.integrations.detection.rows_where", lambda mask: slice(None))
    assert_equal(chosen, run(model, images, targets))


def test_a_few_steps_lower_the_loss(images, targets):
    model = use_losses(small_ssd(), "ciou+softmax_focal")
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
    model = use_losses(small_ssd(), "giou+l1+ce", normalizer=normalizer)
    _, expected = run(model, images, targets)
    for gradients in run_in_processes(_gradients_of_rank, images, targets, normalizer):
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)


def _gradients_of_rank(rank, images, targets, normalizer):
    model = use_losses(small_ssd(), "giou+l1+ce", normalizer=normalizer)
    wrapped = DistributedDataParallel(model)
    sum(wrapped(images[rank : rank + 1], targets[rank : rank + 1]).values()).backward()
    return {name: p.grad for name, p in model.named_parameters()}
