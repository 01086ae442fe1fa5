"""The SMP adapter on real models; the classes with SMP's names against SMP's own, in float64."""

import copy
import inspect
import io
import itertools
import pickle

import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from detseg_losses import SpecError, build_loss
from detseg_losses.integrations import model_losses, restore_losses, use_losses
from detseg_losses.integrations import smp as ours
from processes import run_in_processes

CLASSES = 4
MODES = ["binary", "multiclass", "multilabel"]
# SMP's multiclass losses take class indices only.
KINDS_OF_TARGET = [(mode, False) for mode in MODES] + [("binary", True), ("multilabel", True)]
REGION = ["DiceLoss", "JaccardLoss", "TverskyLoss"]
LEAN = [*REGION, "FocalLoss", "SoftBCEWithLogitsLoss", "SoftCrossEntropyLoss"]
NAMES = [*LEAN, "LovaszLoss", "MCCLoss"]
WITHOUT_MODE = ["SoftBCEWithLogitsLoss", "SoftCrossEntropyLoss", "MCCLoss"]
OF_ONE_CHANNEL = ["SoftBCEWithLogitsLoss", "MCCLoss"]
OF_FLOAT32 = ["LovaszLoss", "MCCLoss"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """On tensors as small as these, threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- the classes with SMP's names ---


def make_batch(mode, *, soft=False):
    """Float64 logits and a target; class 3 (multilabel: 2) is absent."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 1 if mode == "binary" else CLASSES, 5, 6)
    logits = 3 * torch.randn(shape, dtype=torch.float64, generator=generator)
    if mode == "multiclass":
        return logits, torch.randint(CLASSES - 1, (2, 5, 6), generator=generator)
    target = torch.rand(shape, dtype=torch.float64, generator=generator)
    target = target if soft else target.round()
    if mode == "multilabel":
        target[:, 2] = 0
        return logits, target
    return logits, target[:, 0]


def with_void(target, void=255):
    target = target.clone()
    target[0, ..., :2] = void
    return target


def run(criterion, logits, target, activation=None):
    """The loss and the gradient of the logits; of a map, that of a weighted sum."""
    logits = logits.clone().requires_grad_()
    loss = criterion(logits if activation is None else activation(logits), target)
    weights = torch.arange(1, loss.numel() + 1, dtype=loss.dtype).view_as(loss)
    (loss * weights).sum().backward()
    return loss.detach(), logits.grad


def assert_equal_to_smp(name, options, logits, target, activation=None, rtol=1e-8, atol=1e-10):
    peer = run(getattr(smp.losses, name)(**options), logits, target, activation)
    assert all(value.isfinite().all() for value in peer)
    found = run(getattr(ours, name)(**options), logits, target, activation)
    torch.testing.assert_close(found, peer, rtol=rtol, atol=atol)


def activation_of(mode):
    return (lambda x: x.softmax(1)) if mode == "multiclass" else torch.sigmoid


@pytest.mark.parametrize("name", NAMES)
def test_arguments_and_attributes_are_those_of_smp(name):
    peer, own = getattr(smp.losses, name), getattr(ours, name)
    expected = inspect.signature(peer.__init__).parameters.values()
    found = inspect.signature(own.__init__).parameters.values()
    assert [(p.name, p.default) for p in found] == [(p.name, p.default) for p in expected]
    args = () if name in WITHOUT_MODE else ("multiclass",)
    private = {"focal_loss_fn"}
    assert {k for k in vars(peer(*args)) if k[0] != "_"} - private <= set(vars(own(*args)))


@pytest.mark.parametrize("mode", MODES)
def test_modes_are_those_of_smp(mode):
    name = f"{mode.upper()}_MODE"
    assert getattr(ours, name) == getattr(smp.losses, name) == mode


REGION_OPTIONS = [
    {},
    {"log_loss": True},
    {"smooth": 1.0},
    {"smooth": 0.3, "log_loss": True},
    {"eps": 50.0},
    {"eps": 0.9, "log_loss": True},
]
CLASS_OPTIONS = [
    {"classes": [1, 3]},
    {"class_weights": [1, 2, 0.5, 4]},
    {"class_weights": [1, 2, 0.5, 4], "classes": [0, 2]},
]
TVERSKY_OPTIONS = [
    {"alpha": 0.3, "beta": 0.7},
    {"alpha": 1.5, "beta": 0.2, "gamma": 0.75},
    {"gamma": 2.0, "log_loss": True},
]


@pytest.mark.parametrize("from_logits", [True, False])
@pytest.mark.parametrize(("mode", "soft"), KINDS_OF_TARGET)
@pytest.mark.parametrize("name", REGION)
def test_region_losses_equal_smp(name, mode, soft, from_logits):
    logits, target = make_batch(mode, soft=soft)
    options = REGION_OPTIONS + (CLASS_OPTIONS if mode != "binary" else [])
    options += TVERSKY_OPTIONS if name == "TverskyLoss" else []
    activation = None if from_logits else activation_of(mode)
    for each, void in itertools.product(options, [None, 255]):
        given = target if void is None else with_void(target, void)
        each = {"mode": mode, "from_logits": from_logits, "ignore_index": void} | each
        assert_equal_to_smp(name, each, logits, given, activation)


FOCAL_OPTIONS = [
    {},
    {"alpha": 0.25},
    {"gamma": 0.0},
    {"gamma": 0.5},
    {"normalized": True},
    {"reduced_threshold": 0.5},
    {"normalized": True, "reduced_threshold": 0.3, "alpha": 0.7, "gamma": 1.5},
]


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchwise_mean", "none", None])
@pytest.mark.parametrize(("mode", "soft"), KINDS_OF_TARGET)
def test_focal_loss_equals_smp(mode, soft, reduction):
    logits, target = make_batch(mode, soft=soft)
    options = list(FOCAL_OPTIONS)
    if mode != "binary" and reduction in ("mean", "sum"):
        options.append({"class_weights": [1, 2, 0.5, 4]})
    # SMP cannot leave out entries of multilabel masks, and reads multiclass probabilities wrong.
    voids = [None] if mode == "multilabel" else [None, 255]
    activations = [None] if mode == "multiclass" else [None, torch.sigmoid]
    for each, void, activation in itertools.product(options, voids, activations):
        given = target if void is None else with_void(target, void)
        each = {"mode": mode, "reduction": reduction, "ignore_index": void} | each
        each |= {"from_logits": activation is None, "eps": 1e-3 if activation else 1e-7}
        assert_equal_to_smp("FocalLoss", each, logits, given, activation)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("soft", [False, True])
def test_soft_bce_equals_smp(soft, reduction):
    logits, target = make_batch("multilabel", soft=soft)
    generator = torch.Generator().manual_seed(1)

    def factor(*shape):
        return 4 * torch.rand(shape, dtype=torch.float64, generator=generator)

    weights = [None, factor(CLASSES, 1, 1), factor(2, 1, 5, 6)]
    pos_weights = [None, factor(1), factor(CLASSES, 1, 1), factor(6)]
    for smooth, void, weight, pos_weight in itertools.product(
        [None, 0.1], [-100, None], weights, pos_weights
    ):
        options = {"weight": weight, "pos_weight": pos_weight, "smooth_factor": smooth}
        options |= {"reduction": reduction, "ignore_index": void}
        given = target if void is None else with_void(target, void)
        assert_equal_to_smp("SoftBCEWithLogitsLoss", options, logits, given)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_soft_cross_entropy_equals_smp(reduction):
    logits, target = make_batch("multiclass")
    for smooth, void in itertools.product([0.0, 0.1, 0.5], [255, None]):
        options = {"reduction": reduction, "smooth_factor": smooth, "ignore_index": void}
        given = target if void is None else with_void(target, void)
        for each in (given, given.unsqueeze(1)):
            assert_equal_to_smp("SoftCrossEntropyLoss", options, logits, each)
        assert_equal_to_smp("SoftCrossEntropyLoss", options, logits[:, :, 0, 0], given[:, 0, 0])
        options["dim"] = -1
        assert_equal_to_smp("SoftCrossEntropyLoss", options, logits.movedim(1, -1), given)


def test_soft_bce_equals_smp_on_loose_entries():
    logits, target = torch.randn(7, dtype=torch.float64), torch.rand(7, dtype=torch.float64)
    assert_equal_to_smp("SoftBCEWithLogitsLoss", {"smooth_factor": 0.2}, logits, target)


LOVASZ_OPTIONS = [{}, {"per_image": True}, {"from_logits": False}]


@pytest.mark.parametrize(("mode", "soft"), KINDS_OF_TARGET)
def test_lovasz_loss_equals_smp(mode, soft):
    """Which computes in float32 only."""
    logits, target = make_batch(mode, soft=soft)
    logits, target = logits.float(), target.float() if soft else target.long()
    for each, void in itertools.product(LOVASZ_OPTIONS, [None, 255]):
        given = target if void is None else with_void(target, void)
        each = {"mode": mode, "ignore_index": void} | each
        assert_equal_to_smp("LovaszLoss", each, logits, given, rtol=1e-4, atol=1e-6)


def test_lovasz_loss_of_empty_and_ignored_masks_equals_smp():
    """An image without the class costs the hinge of its worst pixel; one that is void nothing."""
    logits, target = (tensor.float() for tensor in make_batch("binary"))
    for fill, options in itertools.product([0, 1, 255], LOVASZ_OPTIONS):
        for images in (slice(0, 1), slice(0, 2)):
            given = target.clone()
            given[images] = fill
            each = {"mode": "binary", "ignore_index": 255} | options
            assert_equal_to_smp("LovaszLoss", each, logits, given, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("per_image", [False, True])
def test_lovasz_softmax_of_ignored_images_is_a_number(per_image):
    """SMP's is empty, or an error."""
    logits, target = make_batch("multiclass")
    target[0] = 255
    criterion = ours.LovaszLoss("multiclass", per_image, ignore_index=255)
    expected = smp.losses.LovaszLoss("multiclass")(logits[1:].float(), target[1:]).double()
    torch.testing.assert_close(criterion(logits, target), expected / (1 + per_image))


@pytest.mark.parametrize("soft", [False, True])
def test_mcc_loss_equals_smp(soft):
    logits, target = make_batch("binary", soft=soft)
    for eps, given in itertools.product([1e-5, 1.0], [target, target * 0, target.unsqueeze(1)]):
        assert_equal_to_smp("MCCLoss", {"eps": eps}, logits, given, torch.sigmoid)
        assert_equal_to_smp("MCCLoss", {"eps": eps}, logits[:, 0], given, torch.sigmoid)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("name", NAMES)
def test_masks_of_all_shapes_and_integer_types(name, dtype):
    """SMP's Dice refuses uint8 and int32, its BCE integers and (B, H, W) beside (B, 1, H, W)."""
    mode = "binary" if name in OF_ONE_CHANNEL else "multiclass"
    logits, target = make_batch(mode)
    if name in OF_FLOAT32:
        logits, target = logits.float().sigmoid(), target.float() if mode == "binary" else target
    own = {} if name in WITHOUT_MODE else {"mode": mode}
    smooth = {"smooth_factor": 0.0} if name == "SoftCrossEntropyLoss" else {}
    given = target.unsqueeze(1) if mode == "binary" else target
    expected = run(getattr(smp.losses, name)(**own, **smooth), logits, given)
    for mask in (target.to(dtype), target.to(dtype).unsqueeze(1)):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            found = run(getattr(ours, name)(**own), logits.to(memory_format=memory_format), mask)
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_label_out_of_range_is_named(name):
    mode = "binary" if name in OF_ONE_CHANNEL else "multiclass"
    logits, target = make_batch(mode)
    own = {} if name in WITHOUT_MODE else {"mode": mode}
    with pytest.raises(ValueError, match="255"):
        getattr(ours, name)(**own)(logits, with_void(target).to(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision(name, dtype):
    """At this size SMP's Dice and MCC in float16 are NaN."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 1, 512, 512, generator=generator).to(dtype)
    target = torch.ones(1, 1, 512, 512)
    if name == "MCCLoss":
        logits, target = logits.sigmoid(), target.triu()
    own = {} if name in WITHOUT_MODE else {"mode": "binary"}
    if name == "SoftCrossEntropyLoss":
        logits, target = torch.cat((logits, -logits), 1), target[:, 0].long()
    criterion = getattr(ours, name)(**own)
    loss, gradient = run(criterion, logits, target)
    expected, expected_gradient = run(criterion, logits.float(), target)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)
    torch.testing.assert_close(gradient, expected_gradient.to(dtype), rtol=1e-3, atol=0)
    if name in ("DiceLoss", "MCCLoss") and dtype == torch.float16:
        assert getattr(smp.losses, name)(**own)(logits, target.to(dtype)).isnan()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [*REGION, "FocalLoss"])
def test_probabilities_agree_with_logits(name, mode):
    """In SMP's multiclass focal loss they do not: .51 against .46 for random logits."""
    logits, target = make_batch(mode)
    softmax = mode == "multiclass" and name != "FocalLoss"
    probabilities = logits.softmax(1) if softmax else logits.sigmoid()
    expected = getattr(ours, name)(mode)(logits.float(), target)
    found = getattr(ours, name)(mode, from_logits=False)(probabilities.float(), target)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_certain_probabilities_are_finite():
    p = torch.tensor([0.0, 1.0, 0.0, 1.0]).view(1, 1, 2, 2)
    target = torch.tensor([0, 1, 1, 0]).view(1, 2, 2)
    for name in [*REGION, "FocalLoss"]:
        for dtype in (torch.float16, torch.float32):
            criterion = getattr(ours, name)("binary", from_logits=False)
            assert all(value.isfinite().all() for value in run(criterion, p.to(dtype), target))


def test_soft_cross_entropy_runs_with_its_defaults():
    logits, target = make_batch("multiclass")
    loss = ours.SoftCrossEntropyLoss()(logits, target)
    torch.testing.assert_close(loss, F.cross_entropy(logits, target))


def test_focal_leaves_out_entries_of_multilabel_masks():
    logits, target = make_batch("multilabel")
    kept = torch.rand(target.shape) > 0.3
    loss = ours.FocalLoss("multilabel", ignore_index=255)(logits, target.where(kept, 255))
    of_classes = [
        smp.losses.FocalLoss("binary")(logits[:, c][kept[:, c]], target[:, c][kept[:, c]])
        for c in range(CLASSES)
    ]
    torch.testing.assert_close(loss, torch.stack(of_classes).mean())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("FocalLoss", {"gamma": 0.5}),
        ("FocalLoss", {"normalized": True}),
        ("TverskyLoss", {"gamma": 0.5}),
    ],
)
def test_gradients_are_finite_at_saturated_logits(name, options):
    target = torch.tensor([0, 1, 0, 1]).view(1, 2, 2)
    for size in (50.0, 1e4):
        logits = torch.tensor([-size, size, size, -size]).view(1, 1, 2, 2)
        for given in (target, torch.zeros_like(target), 1 - target):
            criterion = getattr(ours, name)("binary", **options)
            assert all(value.isfinite().all() for value in run(criterion, logits, given))


def test_a_nan_is_not_hidden():
    logits, target = make_batch("multiclass")
    logits[0, 0, 0, 0] = torch.nan
    for name in NAMES:
        if name not in OF_ONE_CHANNEL:
            own = {} if name in WITHOUT_MODE else {"mode": "multiclass"}
            assert getattr(ours, name)(**own)(logits, target).isnan(), name


def test_ignored_pixels_only_are_a_loss_of_zero():
    for mode in MODES:
        logits, target = make_batch(mode)
        for name in [*REGION, "FocalLoss"]:
            criterion = getattr(ours, name)(mode, ignore_index=255)
            loss, gradient = run(criterion, logits, torch.full_like(target, 255))
            assert loss == 0
            assert not gradient.any()


@pytest.mark.parametrize("name", NAMES)
def test_pickles_and_copies(name):
    own = {} if name in WITHOUT_MODE else {"mode": "multiclass", "class_weights": [1, 2, 3, 4]}
    logits, target = make_batch("multiclass")
    if name == "SoftBCEWithLogitsLoss":
        own, target = {"pos_weight": torch.tensor(2.0)}, logits.sigmoid()
    elif name == "LovaszLoss":
        own = {"mode": "multiclass", "per_image": True}
    elif name == "MCCLoss":
        own, logits, target = {"eps": 1.0}, logits[:, :1].sigmoid(), target.clamp(max=1)
    criterion = getattr(ours, name)(**own)
    for other in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert torch.equal(other(logits, target), criterion(logits, target))


@pytest.mark.parametrize("name", LEAN)
def test_keeps_nothing_of_the_size_of_the_logits_for_backward(name):
    mode = "binary" if name in OF_ONE_CHANNEL else "multiclass"
    own = {} if name in WITHOUT_MODE else {"mode": mode}
    logits = torch.randn(2, 1 if mode == "binary" else 20, 32, 32, requires_grad=True)
    target = torch.randint(logits.shape[1], (2, 32, 32))
    given = {tensor.untyped_storage().data_ptr() for tensor in (logits, target)}
    new = {}

    def save(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            new[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        getattr(ours, name)(**own)(logits, target)
    assert sum(new.values()) < 0.3 * logits.untyped_storage().nbytes()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ours.DiceLoss("multi"), "multi"),
        (lambda: ours.DiceLoss("binary", classes=[0]), "classes"),
        (lambda: ours.FocalLoss("binary", class_weights=[1.0]), "class_weights"),
        (lambda: ours.FocalLoss("binary", reduction="avg"), "avg"),
        (lambda: ours.SoftCrossEntropyLoss("avg"), "avg"),
        (lambda: ours.SoftBCEWithLogitsLoss(reduction="avg"), "avg"),
        (
            lambda: ours.DiceLoss("multiclass")(torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 5)),
            r"\(2, 5, 5\)",
        ),
    ],
)
def test_errors_name_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- the adapter ---


def small_unet(classes=3, **options):
    """A Unet without batch statistics or dropout: its gradients are sums over the images."""
    torch.manual_seed(0)
    model = smp.Unet(
        "resnet18",
        encoder_weights=None,
        encoder_depth=3,
        decoder_channels=(32, 16, 8),
        decoder_use_norm=False,
        classes=classes,
        **options,
    )
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(4, child.num_features))
    return model


@pytest.fixture
def masks():
    """Squares of three classes."""
    squares = torch.randint(3, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    return squares.repeat_interleave(8, 1).repeat_interleave(8, 2)


@pytest.fixture
def images(masks):
    """Each class has a colour."""
    noise = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return F.one_hot(masks, 3).movedim(-1, 1) + noise / 4


def gradients(model, losses):
    model.zero_grad()
    sum(losses.values()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize(
    ("architecture", "encoder", "options"),
    [
        ("Unet", "resnet18", {}),
        ("UnetPlusPlus", "resnet18", {}),
        ("FPN", "mobilenet_v2", {}),
        ("DeepLabV3Plus", "resnet18", {}),
        ("Segformer", "mit_b0", {}),
        ("PSPNet", "resnet18", {}),
        ("UPerNet", "tu-mobilenetv3_small_050", {}),
        ("DPT", "tu-vit_tiny_patch16_224", {"encoder_depth": 4, "dynamic_img_size": True}),
    ],
)
def test_every_architecture(architecture, encoder, options):
    torch.manual_seed(0)
    model = smp.create_model(architecture, encoder, encoder_weights=None, classes=3, **options)
    keys = list(model.state_dict())
    images, masks = torch.randn(2, 3, 64, 64), torch.randint(3, (2, 64, 64))
    use_losses(model, "ce+0.5*dice", ignore_index=255)
    assert list(model.state_dict()) == keys
    losses = model.train()(images, masks)
    assert list(losses) == ["ce", "dice"]
    assert all(gradient.isfinite().all() for gradient in gradients(model, losses).values())
    assert all(p.grad.any() for p in model.segmentation_head.parameters())
    assert model(images).shape == model.eval()(images, masks).shape == (2, 3, 64, 64)


def target_of(mode, masks):
    if mode == "multiclass":
        return masks
    return (F.one_hot(masks, 3).movedim(-1, 1) if mode == "multilabel" else masks == 1).float()


@pytest.mark.parametrize("region", ["dice", "tversky", "focal_tversky", "jaccard"])
@pytest.mark.parametrize("dense", ["ce", "focal", "bce"])
@pytest.mark.parametrize("mode", MODES)
def test_every_pair_trains(mode, dense, region, images, masks):
    model = small_unet(1 if mode == "binary" else 3)
    spec = f"{dense}+{region}"
    if dense == "ce" and mode != "multiclass":
        with pytest.raises(SpecError, match=r"ce\b.*'bce'"):
            use_losses(model, spec, mode=mode)
        return
    use_losses(model, spec, mode=mode)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    history = []
    for _ in range(6):
        losses = model(images, target_of(mode, masks))
        assert list(losses) == [dense, region]
        assert {k: v.item() for k, v in losses.items()} == {
            k: v.item() for k, v in model.loss.values.items()
        }
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        history.append(total.item())
    assert history[-1] < 0.95 * history[0], history


@pytest.mark.parametrize("mode", MODES)
def test_equals_smp_losses_outside(mode, images, masks):
    model = small_unet(1 if mode == "binary" else 3)
    target = target_of(mode, masks)
    logits = model(images)
    if mode == "multiclass":
        spec, first = "ce+2*jaccard", F.cross_entropy(logits, target)
    else:
        spec = "bce+2*jaccard"
        first = smp.losses.SoftBCEWithLogitsLoss()(logits, target.view_as(logits))
    second = 2 * smp.losses.JaccardLoss(mode)(logits, target)
    expected = gradients(model, {"first": first, "second": second})
    use_losses(model, spec, mode=mode)
    losses = model(images, target)
    torch.testing.assert_close(list(losses.values()), [first, second])
    assert_same(gradients(model, losses), expected)


def test_the_changed_term_is_the_one_called(images, masks):
    model = use_losses(small_unet(), "ce + tversky(alpha=0.9, beta=0.1)")
    losses = model(images, masks)
    assert list(losses) == ["ce", "tversky"]
    p, y = model(images).softmax(1), F.one_hot(masks, 3).movedim(-1, 1)
    tp, fp, fn = ((a * b).sum((0, 2, 3)) for a, b in ((p, y), (p, 1 - y), (1 - p, y)))
    torch.testing.assert_close(losses["tversky"], (1 - tp / (tp + 0.9 * fp + 0.1 * fn)).mean())


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int32, torch.int64, torch.float32, torch.bool]
)
def test_binary_masks(dtype, images, masks):
    model = use_losses(small_unet(classes=1), "bce+dice")
    mask = (masks == 1).to(dtype)
    expected = build_loss("bce+dice", "segmentation").compute(model(images), mask.long())
    for each in (mask, mask.unsqueeze(1)):
        assert_same(model(images, each), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_multiclass_masks_with_void(dtype, images, masks):
    model = use_losses(small_unet(), "ce+focal+dice", ignore_index=255)
    mask = with_void(masks)
    criterion = build_loss("ce+focal+dice", "segmentation", ignore_index=255)
    expected = criterion.compute(model(images), mask)
    for each in (mask.to(dtype), mask.to(dtype).unsqueeze(1)):
        assert_same(model(images, masks=each), expected)


def test_multilabel_masks_need_the_mode(images, masks):
    target = target_of("multilabel", masks)
    with pytest.raises(ValueError, match="mode='multilabel'"):
        use_losses(small_unet(), "bce+dice")(images, target)
    losses = use_losses(small_unet(), "bce+dice", mode="multilabel")(images, target)
    assert list(losses) == ["bce", "dice"]


def test_evaluation_and_calls_without_masks_are_as_before(images, masks):
    model = small_unet()
    expected = model(images)
    use_losses(model, "ce+dice")
    assert torch.equal(model(images), expected)
    assert torch.equal(model(x=images), expected)
    assert torch.equal(model.predict(images), expected)
    assert torch.equal(model.eval()(images, masks), expected)
    assert list(model.train()(images, masks)) == ["ce", "dice"]


def test_undo_is_exact(images, masks):
    model = small_unet()
    before, text = set(vars(model)), repr(model)
    use_losses(model, "ce+dice")
    model(images, masks)
    assert restore_losses(model) is model
    assert set(vars(model)) == before
    assert repr(model) == text
    hooks = [value for key, value in vars(model).items() if "_hooks" in key]
    assert not any(hooks)
    with pytest.raises(TypeError):
        model(images, masks)
    restore_losses(model)


def test_applying_twice_replaces(images, masks):
    model = use_losses(use_losses(small_unet(), "ce+dice"), "softmax_focal")
    assert list(model(images, masks)) == ["softmax_focal"]
    assert model(restore_losses(model) and images).shape == (2, 3, 32, 32)


def test_a_refused_spec_leaves_the_model_as_it_was(images, masks):
    model = use_losses(small_unet(), "ce+dice")
    with pytest.raises(SpecError):
        use_losses(model, "giou")
    assert list(model(images, masks)) == ["ce", "dice"]


def test_a_failed_forward_does_not_leak_its_masks(images, masks):
    model = use_losses(small_unet(), "ce+dice")
    with pytest.raises(RuntimeError):
        model(images[:, :1], masks)
    assert model(images).shape == (2, 3, 32, 32)


@pytest.mark.parametrize(
    "copier",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: saved_and_loaded(model),
    ],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_are_whole_and_apart(copier, images, masks):
    model = use_losses(small_unet(), "ce+dice(smooth=1)")
    expected = model(images, masks)
    other = copier(model)
    assert_same(other(images, masks), expected)
    assert restore_losses(other)(images).shape == (2, 3, 32, 32)
    assert not other._forward_hooks
    assert not other._forward_pre_hooks
    assert_same(model(images, masks), expected)


def saved_and_loaded(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_save_pretrained(tmp_path, images):
    model = smp.Unet("resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=(8, 8, 8))
    use_losses(model, "bce+dice", mode="binary").save_pretrained(tmp_path)
    loaded = smp.from_pretrained(tmp_path)
    assert type(loaded) is smp.Unet
    assert torch.equal(loaded.eval()(images), model.eval()(images))
    use_losses(loaded, "bce").load_state_dict(restore_losses(model).state_dict())


def test_bf16_autocast(images, masks):
    model = use_losses(small_unet(), "ce+dice+focal")
    full = model(images, masks)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(images, masks)
        assert model(images).dtype == torch.bfloat16
    for key, value in half.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, full[key], rtol=0.05, atol=0.02)


def test_torch_compile(images, masks):
    model = use_losses(small_unet(), "ce+dice")
    expected = gradients(model, model(images, masks))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_same(gradients(model, compiled(images, masks)), expected)


def test_two_processes_equal_one(images, masks):
    masks = with_void(masks)  # more of the first image than of the second
    model = _synchronised()
    expected = gradients(model, model(images, masks))
    for found in run_in_processes(_gradients_of_rank, images, masks):
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def _synchronised():
    return use_losses(small_unet(), "ce+dice", ignore_index=255, sync=True)


def _gradients_of_rank(rank, images, masks):
    model = _synchronised()
    # With encoder_depth=3 SMP keeps the parameters of the deeper layers, and does not use them.
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    return gradients(model, wrapped(images[rank : rank + 1], masks[rank : rank + 1]))


# --- the loss of logits ---


class ExampleModel(nn.Module):
    """As SMP's examples train one, with the losses of the model in place of SMP's."""

    def __init__(self, spec):
        super().__init__()
        self.model = small_unet(1)
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.4))
        self.loss_fn = model_losses(use_losses(self.model, spec))

    def forward(self, image):
        return self.model((image - self.mean) / 0.2)

    def shared_step(self, batch):
        """The steps of training, validation and test."""
        image, mask = batch
        mask = mask.long()
        logits_mask = self.forward(image)
        assert logits_mask.shape[1] == 1
        loss = self.loss_fn(logits_mask.contiguous(), mask)
        pred_mask = (logits_mask.sigmoid() > 0.5).long().reshape(mask.shape)
        tp, fp, fn, tn = smp.metrics.get_stats(pred_mask, mask, mode="binary")
        return {"loss": loss, "tp": tp, "fp": fp, "fn": fn, "tn": tn}


@pytest.mark.parametrize("channel", [False, True])
def test_the_shared_step_of_smps_examples(channel, images, masks):
    """Masks of their scripts are ``(B, H, W)``, those of their notebooks ``(B, 1, H, W)``."""
    example = ExampleModel("dice")
    keys = list(small_unet(1).state_dict())
    assert [k.removeprefix("model.") for k in example.state_dict() if k != "mean"] == keys
    mask = (masks > 0).float()
    batch = images, mask.unsqueeze(1) if channel else mask
    stock = smp.losses.DiceLoss(smp.losses.BINARY_MODE, from_logits=True)
    results = []
    for training in (True, False):
        result = example.train(training).shared_step(batch)
        torch.testing.assert_close(result["loss"], stock(example(images), mask))
        assert example.loss_fn.values == {"dice": result["loss"].detach()}
        results.append(result)
    results[0]["loss"].backward()
    assert all(p.grad is not None for p in example.model.segmentation_head.parameters())
    assert len({*map(int, (results[1][k].sum() for k in ("tp", "fn")))}) == 2
    copied = copy.deepcopy(example)
    assert copied.loss_fn.model is copied.model
    assert torch.equal(copied.shared_step(batch)["loss"], results[1]["loss"])


# --- models with a classification head ---


def unet_with_labels(classes=5, activation=None):
    return small_unet(aux_params={"classes": classes, "dropout": None, "activation": activation})


def test_class_indices_cost_cross_entropy(images, masks):
    model = unet_with_labels()
    logits, class_logits = model(images)
    labels = torch.tensor([1, 4])
    expected = {"dice": smp.losses.DiceLoss("multiclass")(logits, masks)}
    expected["classification"] = F.cross_entropy(class_logits, labels)
    wanted = gradients(model, expected)
    use_losses(model, "dice")
    losses = model(images, masks, labels)
    assert_same(losses, expected)
    assert_same(gradients(model, losses), wanted)
    assert_same(model.loss.values, {key: value.detach() for key, value in losses.items()})


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_multi_hot_labels_cost_binary_cross_entropy(dtype, images, masks):
    model = use_losses(unet_with_labels(), "dice")
    labels = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 1, 0, 0]], dtype=dtype)
    expected = F.binary_cross_entropy_with_logits(model(images)[1], labels.float())
    losses = model(images, masks, labels=labels)
    torch.testing.assert_close(losses["classification"], expected)


def test_labels_of_a_single_class(images, masks):
    model = use_losses(unet_with_labels(classes=1), "dice")
    labels = torch.tensor([1.0, 0.0])
    expected = F.binary_cross_entropy_with_logits(model(images)[1], labels.unsqueeze(1))
    torch.testing.assert_close(model(images, masks, labels)["classification"], expected)


def test_without_labels_the_class_logits_are_left_out(images, masks):
    model = use_losses(unet_with_labels(), "ce+dice")
    assert list(model(images, masks)) == ["ce", "dice"]
    logits, class_logits = model(images)
    assert logits.shape == (2, 3, 32, 32)
    assert class_logits.shape == (2, 5)


def test_labels_that_cannot_be_used(images, masks):
    labels = torch.tensor([1, 4])
    with pytest.raises(ValueError, match="no classification head"):
        use_losses(small_unet(), "dice")(images, masks, labels)
    model = use_losses(unet_with_labels(activation="sigmoid"), "dice")
    assert list(model(images, masks)) == ["dice"]
    with pytest.raises(ValueError, match="Sigmoid"):
        model(images, masks, labels)


@pytest.mark.parametrize(
    ("classes", "spec", "options", "message"),
    [
        (1, "ce+dice", {}, "'bce'"),
        (1, "softmax_focal", {}, "'bce'"),
        (3, "ce", {"mode": "multilabel"}, "'bce'"),
        (1, "dice", {"mode": "multiclass"}, "1 class"),
        (3, "dice", {"mode": "binary"}, "3 class"),
        (3, "ce+giou", {}, "giou"),
        (3, "ce+dise", {}, "did you mean 'dice'"),
        (3, "ce(reduction='none')", {}, "reduction"),
        (3, "ce", {"alpha": 0.3}, "alpha"),
    ],
)
def test_a_spec_that_does_not_fit_is_one_clear_line(classes, spec, options, message):
    with pytest.raises(SpecError, match=message) as error:
        use_losses(small_unet(classes), spec, **options)
    assert "\n" not in str(error.value)


def test_a_model_that_gives_probabilities_is_refused():
    with pytest.raises(ValueError, match=r"Sigmoid.*activation=None"):
        use_losses(small_unet(activation="sigmoid"), "bce")
