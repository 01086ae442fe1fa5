"""The adapter of FCN, DeepLabV3 and LRASPP: the reference script's numbers, and any losses else."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import resnet18, segmentation
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation.fcn import FCN, FCNHead

from detseg_losses import SpecError, build_loss
from detseg_losses.integrations import model_losses, restore_losses, use_losses
from processes import run_in_processes

CLASSES = 4
MODELS = ["fcn", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"]


def small(name="fcn", classes=CLASSES, aux=True):
    """A model without batch statistics or dropout: its gradients are sums over the images."""
    torch.manual_seed(0)
    if name == "fcn":
        layers = {"layer3": "aux", "layer4": "out"}
        backbone = IntermediateLayerGetter(resnet18(weights=None), layers)
        model = FCN(backbone, FCNHead(512, classes), FCNHead(256, classes) if aux else None)
    else:
        options = {} if name.startswith("lraspp") else {"aux_loss": aux}
        model = getattr(segmentation, name)(
            weights=None, weights_backbone=None, num_classes=classes, **options
        )
    for module in list(model.modules()):
        for key, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, key, nn.GroupNorm(1, child.num_features))
            elif isinstance(child, nn.Dropout):
                child.p = 0.0
    return model.train()


@pytest.fixture
def masks():
    """Squares of four classes, and a line that is void in the first image."""
    squares = torch.randint(CLASSES, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    squares = squares.repeat_interleave(16, 1).repeat_interleave(16, 2)
    squares[0, :, 20:30] = 255
    return squares


@pytest.fixture
def images(masks):
    """Each class has a colour."""
    noise = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    colours = torch.eye(4)[:, :3].repeat(64, 1)
    return colours[masks].movedim(-1, 1) + noise / 4


def gradients(model, losses):
    model.zero_grad()
    sum(losses.values()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(
            found[key], value, msg=lambda text, key=key: f"{key}: {text}", **tolerance
        )


def reference(model, images, masks):
    """What torchvision's reference script trains on."""
    outputs = model(images)
    losses = {key: F.cross_entropy(x, masks, ignore_index=255) for key, x in outputs.items()}
    return {"ce": losses["out"]} | ({"aux": 0.5 * losses["aux"]} if "aux" in losses else {})


@pytest.mark.parametrize("aux", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_cross_entropy_is_the_reference_script(name, aux, images, masks):
    model = small(name, aux=aux)
    keys = list(model.state_dict())
    expected = reference(model, images, masks)
    wanted = gradients(model, expected)
    use_losses(model, "ce", ignore_index=255)
    assert list(model.state_dict()) == keys
    losses = model(images, masks)
    assert_same(losses, expected)
    assert_same(gradients(model, losses), wanted, rtol=1e-4, atol=1e-6)
    values = {key: value.detach() for key, value in losses.items()}
    assert_same(model_losses(model).values, values)


@pytest.mark.parametrize("training", [True, False])
def test_the_loss_of_what_the_model_returned(training, images, masks):
    """As in validation: the model returns logits, and the criterion takes them."""
    model = use_losses(small().train(training), "ce+dice", ignore_index=255, aux_weight=0.3)
    losses = model_losses(model)
    ours = losses(model(images), masks)
    torch.testing.assert_close(ours, sum(model.train()(images, masks).values()))
    torch.testing.assert_close(sum(losses.values.values()), ours.detach())
    assert list(losses.values) == ["ce", "dice", "aux"]


@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_resnet50"])
def test_official_models(name, images, masks):
    model = getattr(segmentation, name)(
        weights=None, weights_backbone=None, num_classes=CLASSES, aux_loss=True
    )
    losses = use_losses(model, "ce+dice", ignore_index=255).train()(images, masks)
    assert list(losses) == ["ce", "dice", "aux"]
    assert all(gradient.isfinite().all() for gradient in gradients(model, losses).values())


def test_the_changed_term_is_the_one_called(images, masks):
    model = use_losses(small(), "tversky(alpha=0.9, beta=0.1)", aux_weight=0.25, ignore_index=255)
    losses = model(images, masks)
    valid = (masks != 255).unsqueeze(1)
    y = F.one_hot(masks % 255, CLASSES).movedim(-1, 1) * valid
    values = {}
    for key, logits in model(images).items():
        p = logits.softmax(1) * valid
        tp, fp, fn = ((a * b).sum((0, 2, 3)) for a, b in ((p, y), (p, 1 - y), (1 - p, y)))
        values[key] = (1 - tp / (tp + 0.9 * fp + 0.1 * fn)).mean()
    expected = {"tversky": values["out"], "aux": 0.25 * values["aux"]}
    assert_same(losses, expected)


@pytest.mark.parametrize("spec", ["ce+dice", "softmax_focal+tversky", "bce+jaccard", "lovasz"])
def test_models_learn(spec, images, masks):
    model = use_losses(small(), spec, ignore_index=255)
    optimizer = torch.optim.Adam(model.parameters(), 3e-4)
    history = []
    for _ in range(6):
        total = sum(model(images, masks).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        history.append(total.item())
    assert history[-1] < 0.95 * history[0], history


def test_modes(images, masks):
    one = use_losses(small(classes=1), "bce+dice", ignore_index=255)
    binary = torch.where(masks == 255, masks, (masks == 1).long()).to(torch.uint8)
    expected = build_loss("bce+dice", "segmentation", ignore_index=255)
    expected = expected.compute(one(images)["out"], binary)
    for each in (binary, binary.unsqueeze(1)):
        losses = one(images, each)
        del losses["aux"]
        assert_same(losses, expected)
    many = use_losses(small(), "bce+dice", mode="multilabel")
    target = F.one_hot(masks % 255, CLASSES).movedim(-1, 1).float()
    assert list(many(images, target)) == ["bce", "dice", "aux"]


def test_learned_and_moving_weights(images, masks):
    model = small()
    plain = use_losses(model, "ce+dice", ignore_index=255)(images, masks)
    spec = "learned*ce + ramp(1, 3, steps=1)*dice"
    losses = use_losses(model, spec, ignore_index=255)(images, masks)
    assert_same(losses, plain)
    assert gradients(model, losses)["loss.log_variance_ce"] != 0
    model.loss.advance()
    torch.testing.assert_close(model(images, masks)["dice"], 3 * plain["dice"])


@pytest.mark.parametrize(
    ("name", "keyword"), [("fcn", "x"), ("lraspp_mobilenet_v3_large", "input")]
)
def test_evaluation_and_calls_without_masks_are_as_before(name, keyword, images, masks):
    model = small(name)
    expected = model(images)
    use_losses(model, "ce+dice", ignore_index=255)
    losses = model(images, masks)
    for found in (model(images), model(**{keyword: images}), model.eval()(images, masks)):
        assert_same(found, expected)
    assert_same(model.train()(**{keyword: images, "masks": masks}), losses)
    with pytest.raises(TypeError):
        model(images, masks, masks)


def test_undo_is_exact(images, masks):
    model = small()
    before, text = set(vars(model)), repr(model)
    use_losses(model, "ce+dice", ignore_index=255)
    use_losses(model, "lovasz", ignore_index=255)
    assert list(model(images, masks)) == ["lovasz", "aux"]
    assert restore_losses(model) is model
    assert set(vars(model)) == before
    assert repr(model) == text
    assert not any(value for key, value in vars(model).items() if "_hooks" in key)
    with pytest.raises(TypeError):
        model(images, masks)
    restore_losses(model)


@pytest.mark.parametrize("copier", ["deepcopy", "pickle", "torch.save", "state_dict"])
def test_copies_are_whole_and_apart(copier, images, masks):
    model = use_losses(small(), "ce+dice(smooth=1)", aux_weight=0.3, ignore_index=255)
    expected = model(images, masks)
    if copier == "deepcopy":
        other = copy.deepcopy(model)
    elif copier == "pickle":
        other = pickle.loads(pickle.dumps(model))
    elif copier == "torch.save":
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    else:
        other = use_losses(small(), repr(model.loss), aux_weight=0.3)
        other.load_state_dict(model.state_dict())
    assert_same(other(images, masks), expected)
    assert list(restore_losses(other)(images)) == ["out", "aux"]
    assert not other._forward_hooks
    assert not other._forward_pre_hooks
    assert_same(model(images, masks), expected)


def test_bf16_autocast(images, masks):
    model = use_losses(small(), "ce+dice", ignore_index=255)
    full = model(images, masks)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(images, masks)
    assert all(value.dtype == torch.float32 for value in half.values())
    assert_same(half, full, rtol=0.05, atol=0.02)


def test_torch_compile(images, masks):
    model = use_losses(small(), "ce+dice", ignore_index=255)
    expected = gradients(model, model(images, masks))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_same(gradients(model, compiled(images, masks)), expected)


def test_two_processes_equal_one(images, masks):
    model = _synchronised()
    expected = gradients(model, model(images, masks))
    for found in run_in_processes(_gradients_of_rank, images, masks):
        assert_same(found, expected, rtol=1e-4, atol=1e-6)


def _synchronised():
    return use_losses(small(), "ce+dice", ignore_index=255, sync=True)


def _gradients_of_rank(rank, images, masks):
    model = _synchronised()
    wrapped = DistributedDataParallel(model)
    return gradients(model, wrapped(images[rank : rank + 1], masks[rank : rank + 1]))


@pytest.mark.parametrize(
    ("classes", "spec", "options", "message"),
    [
        (1, "ce+dice", {}, "'bce'"),
        (4, "ce", {"mode": "multilabel"}, "'bce'"),
        (4, "dice", {"mode": "binary"}, "4 class"),
        (4, "ce+giou", {}, "giou"),
        (4, "ce+dise", {}, "did you mean 'dice'"),
        (4, "ce(class_weights=[1, 2])", {}, "2 class_weights"),
        (4, "ce", {"alpha": 0.3}, "alpha"),
    ],
)
def test_a_spec_that_does_not_fit_is_one_clear_line_and_changes_nothing(
    classes, spec, options, message, images
):
    model = small(classes=classes)
    with pytest.raises(SpecError, match=message) as error:
        use_losses(model, spec, **options)
    assert "\n" not in str(error.value)
    assert not model._forward_hooks


def test_a_model_without_an_adapter_is_named():
    with pytest.raises(TypeError, match="no adapter for Linear"):
        use_losses(nn.Linear(1, 1), "ce")


def test_a_batch_of_nothing_but_void_costs_nothing(images, masks):
    model = use_losses(small(), "ce+dice", ignore_index=255)
    losses = model(images, torch.full_like(masks, 255))
    assert sum(losses.values()) == 0
    assert not any(gradient.any() for gradient in gradients(model, losses).values())


def test_an_auxiliary_classifier_of_other_classes_is_refused():
    model = small()
    model.classifier = FCNHead(512, 1)
    with pytest.raises(SpecError, match=r"classifier has 1 class.* aux_classifier 4"):
        use_losses(model, "bce+dice")
    model.aux_classifier = None
    use_losses(model, "bce+dice")


@pytest.mark.parametrize("spec", ["giou", "ce + l1"])
def test_a_loss_of_boxes_is_refused_by_its_kind(spec):
    with pytest.raises(SpecError, match=r"is a loss of .*, not of segmentation; .*'dice'"):
        use_losses(small(), spec)
