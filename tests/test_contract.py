"""What every registered loss must do, and every kind of input that it says it can eat."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import detseg_losses
from common.benchmark import can_compile, kept_bytes
from detseg_losses import LOSSES, Loss, build_loss
from detseg_losses._core import blocks

CASES = [(name, kind) for name, cls in LOSSES.items() for kind in cls.kinds]
DENSE = [case for case in CASES if case[1] in ("classification", "segmentation")]
SEGMENTATION = [name for name, kind in CASES if kind == "segmentation"]
SUMS = ["ce + dice", "bce + dice", "0.5*ce(label_smoothing=0.1) + focal_tversky + focal"]
OF_LIKELIHOOD = ("softmax_focal", "poly", "symmetric_ce")
SOFT = [case for case in DENSE if case[0] not in OF_LIKELIHOOD]  # which need class indices
# GHM-C weighs an entry by the whole batch: it is not the mean of what it is of each image
OF_IMAGES = [*(name for name in SEGMENTATION if name != "ghm"), *SUMS]
ALPHA = ("focal", "poly_focal", "softmax_focal")  # that take one for each class
# They take factors for constants, by definition: their gradient is not that of their value
CONSTANTS = ("ciou", "focal_eiou", "wiou")
DIFFERENTIABLE = [case for case in CASES if case[0] not in CONSTANTS]
# Not formulas on counts: they keep maps of the size of the logits
MAPS = ("boundary", "cldice", "lovasz")
cases = pytest.mark.parametrize(("name", "kind"), CASES)
dense_cases = pytest.mark.parametrize(("name", "kind"), DENSE)


def sample(
    kind: str, *, dtype: torch.dtype = torch.float64, size: int = 4, device: Any = "cpu"
) -> tuple[Tensor, Tensor]:
    """A prediction that requires grad, and a target."""
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    if kind == "boxes":
        x, y = (torch.cat((c[:, :2], c[:, :2] + c[:, 2:].abs() + 0.1), 1) for c in random(2, 6, 4))
    elif kind == "deltas":
        x, y = random(2, 6, 4)
    elif kind == "distribution":
        x, y = random(7, 4, 5), random(7, 4) + 2
    elif kind == "classification":
        x, y = random(2, 7, 3), torch.randint(-2, 3, (2, 7), generator=generator)
    else:
        x = random(2, 3, size, size + 1)
        y = torch.randint(0, 3, (2, size, size + 1), generator=generator)
    y = y.to(dtype) if y.is_floating_point() else y
    return x.to(device, dtype).requires_grad_(), y.to(device)


def make(name: str, kind: str, **options: Any) -> Loss:
    """A registered loss, told how to read the logits where it must be."""
    if kind == "segmentation" and "classification" in LOSSES[name].kinds:
        options.setdefault("mode", "multiclass")
    return LOSSES[name](**options)


def value_and_grad(loss: Any, x: Tensor, y: Tensor, **call: Any) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    value = loss(x, y, **call)
    return value.detach(), torch.autograd.grad(value, x)[0]


def check_gradients(loss: Loss, x: Tensor, y: Tensor) -> None:
    assert torch.autograd.gradcheck(lambda x: loss(x, y), (x,))
    assert torch.autograd.gradgradcheck(lambda x: loss(x, y), (x,))


@cases
def test_runs_with_its_defaults(name: str, kind: str, device: torch.device) -> None:
    """Without a warning, inputs untouched, as in float64 on the CPU."""
    expected, slope = value_and_grad(make(name, kind), *sample(kind))
    x, y = sample(kind, dtype=torch.float32, device=device)
    versions = x._version, y._version
    copies = x.detach().clone(), y.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value = make(name, kind)(x, y)
        value.backward()
    assert value.shape == ()
    assert value > 0
    assert x.grad is not None
    torch.testing.assert_close(value.cpu().double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(x.grad.cpu().double(), slope, rtol=1e-4, atol=1e-7)
    assert x.grad.any()
    assert (x._version, y._version) == versions
    assert torch.equal(x.detach(), copies[0])
    assert torch.equal(y, copies[1])


@cases
def test_module_is_function(name: str, kind: str) -> None:
    x, y = sample(kind)
    loss = make(name, kind)
    assert torch.equal(loss(x, y), LOSSES[name].function(x, y, **loss.options))
    given = {"mode": "multiclass"} if kind == "segmentation" else {}
    assert torch.equal(loss(x, y), LOSSES[name].function(x, y, reduction="mean", **given))


@pytest.mark.parametrize("name", LOSSES)
def test_options_and_their_copies(name: str) -> None:
    """pickle, deepcopy and repr keep every option; the state_dict stays empty."""
    cls = LOSSES[name]
    options: dict[str, Any] = {"reduction": "sum"}
    for option, value in cls.defaults.items():
        if option in ("class_weights", "pos_weight") or (option == "alpha" and name in ALPHA):
            options[option] = [0.125, 0.5, 1.0]
        elif isinstance(value, float):
            options[option] = 0.625
    loss = cls(**options)
    assert not loss.state_dict()
    for twin in (
        copy.deepcopy(loss),
        pickle.loads(pickle.dumps(loss)),
        build_loss(repr(loss)).terms[0],
    ):
        assert type(twin) is cls
        assert repr(twin) == repr(loss)
        assert twin.options.keys() == loss.options.keys() == cls.defaults.keys()
    moved = copy.deepcopy(loss).to("meta")
    tensors = [value for value in moved.options.values() if isinstance(value, Tensor)]
    assert all(value.device.type == "meta" for value in tensors)
    assert len(tensors) == sum(isinstance(value, list) for value in options.values())
    assert cls().options == cls.defaults
    assert repr(cls()) == name
    with pytest.raises(TypeError, match=rf"{cls.__name__}\(\) has no option 'reducton'; did you"):
        cls(reducton="sum")


def test_public_names_have_docstrings() -> None:
    """Functions state their formula, arguments and errors."""
    for name in detseg_losses.__all__:
        found = getattr(detseg_losses, name)
        if inspect.isroutine(found) and name.endswith("_loss") and name != "build_loss":
            doc = inspect.getdoc(found) or ""
            assert ".. math::" in doc, name
            assert "Args:" in doc, name
            assert "Raises:" in doc, name
        elif not isinstance(found, dict):
            assert inspect.getdoc(found), name


@pytest.mark.parametrize(("name", "kind"), DIFFERENTIABLE)
def test_gradcheck(name: str, kind: str) -> None:
    x, y = sample(kind, size=2)
    check_gradients(make(name, kind), x, y)


@dense_cases
def test_gradcheck_with_options(name: str, kind: str) -> None:
    x, y = sample(kind, size=2)
    ignored = -2 if kind == "classification" else 1
    options: dict[str, Any] = {"class_weights": [1, 2, 3], "per_image": True}
    check_gradients(make(name, kind, ignore_index=ignored, **options), x, y)


@pytest.mark.parametrize(("name", "kind"), SOFT)
def test_gradcheck_with_soft_targets(name: str, kind: str) -> None:
    x, _ = sample(kind, size=2)
    y = torch.rand(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(3))
    options = {"mode": "multiclass"} if kind == "segmentation" else {}
    check_gradients(make(name, kind, **options), x, y)


@cases
def test_gradients_of_gradients(name: str, kind: str) -> None:
    """create_graph, nested torch.func.grad, and a second backward pass."""
    x, y = sample(kind)
    loss = make(name, kind)
    value = loss(x, y)
    (first,) = torch.autograd.grad(value, x, retain_graph=True)
    (second,) = torch.autograd.grad(3 * value, x, retain_graph=True)
    torch.testing.assert_close(second, 3 * first)
    (graph,) = torch.autograd.grad(value, x, create_graph=True)
    torch.testing.assert_close(graph.detach(), first)
    (total,) = torch.autograd.grad(value + graph.pow(2).sum(), x, allow_unused=True)

    def penalised(x: Tensor) -> Tensor:
        return loss(x, y) + torch.func.grad(lambda x: loss(x, y))(x).pow(2).sum()

    torch.testing.assert_close(torch.func.grad(lambda x: loss(x, y))(x.detach()), first)
    torch.testing.assert_close(torch.func.grad(penalised)(x.detach()), total)
    if (name, kind) not in DIFFERENTIABLE:
        return
    step = 1e-5 * torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))

    def reached(x: Tensor) -> Tensor:
        value, grad = value_and_grad(loss, x, y)
        return value + grad.pow(2).sum()

    slope = reached(x + step) - reached(x - step)
    torch.testing.assert_close(slope, 2 * (total * step).sum(), rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("block", [1, 7, 40, 1 << 30])
@pytest.mark.parametrize("spec", [*SEGMENTATION, *SUMS])
def test_blocks_do_not_show(spec: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut anywhere, into places or images, with all that a block must cut with it."""
    x, y = sample("segmentation")
    y[0, 1] = 255
    generator = torch.Generator().manual_seed(3)
    weight = torch.rand(y.shape, dtype=x.dtype, generator=generator)
    soft = torch.rand(x.shape, dtype=x.dtype, generator=generator)
    labels = build_loss(spec, kind="segmentation", ignore_index=255)
    dense = build_loss(spec, kind="segmentation", mode="multiclass")

    def run() -> list[tuple[Tensor, Tensor]]:
        found = [value_and_grad(labels, x, y, pixel_weight=weight)]
        if spec not in OF_LIKELIHOOD:
            found.append(value_and_grad(dense, x, soft, pixel_weight=weight))
        return found

    expected = run()
    monkeypatch.setattr(blocks, "BLOCK", block)
    torch.testing.assert_close(run(), expected)


@pytest.mark.parametrize("block", [1, 7, 1 << 30])
@pytest.mark.parametrize("name", [name for name, kind in CASES if kind == "classification"])
def test_blocks_of_anchors_do_not_show(
    name: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = sample("classification")
    numbers: dict[str, Any] = {"pos_weight": [1.0, 2.0, 3.0]} if name == "bce" else {}
    if name in ALPHA:
        numbers = {"alpha": [0.25, 0.5, 0.75]}
    for reduction in ("sum", "none"):
        loss = LOSSES[name](reduction=reduction, **numbers)
        weight = torch.rand(x.shape[:2], dtype=x.dtype, generator=torch.Generator().manual_seed(3))
        expected = value_and_grad(lambda x, y: loss(x, y, weight=weight).sum(), x, y)  # noqa: B023
        with monkeypatch.context() as patch:
            patch.setattr(blocks, "BLOCK", block)
            got = value_and_grad(lambda x, y: loss(x, y, weight=weight).sum(), x, y)  # noqa: B023
        torch.testing.assert_close(got, expected)


@dense_cases
def test_memory_layouts_do_not_show(name: str, kind: str) -> None:
    """Strided, transposed and channels_last inputs; the gradient has the shape of the logits."""
    x, y = sample(kind)
    loss = make(name, kind)
    expected = value_and_grad(loss, x, y)
    strided = torch.stack((x.detach(), x.detach()), -1)[..., 0]
    transposed = x.detach().transpose(1, -1).contiguous().transpose(1, -1)
    layouts = [strided, transposed]
    if x.dim() == 4:
        layouts.append(x.detach().contiguous(memory_format=torch.channels_last))
    for other in layouts:
        assert not other.is_contiguous()
        torch.testing.assert_close(value_and_grad(loss, other, y), expected)
    cut = torch.stack((y, y), -1)[..., 0]
    torch.testing.assert_close(value_and_grad(loss, x, cut), expected)


@pytest.mark.parametrize("spec", [*SEGMENTATION, *SUMS])
def test_images_without_pixels_and_pixels_without_labels(spec: str) -> None:
    """Nothing costs 0, attached to the graph, with a gradient of 0."""
    loss = build_loss(spec, kind="segmentation", ignore_index=255)
    for shape in [(0, 3, 4, 5), (2, 3, 0, 5), (0, 3), (2, 3, 1, 1), (2, 3, 4, 5), (1, 3)]:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = torch.full((shape[0], *shape[2:]), 255)
        value = loss(x, y)
        value.backward()
        assert value == 0
        assert x.grad is not None
        assert x.grad.shape == shape
        assert (x.grad == 0).all()
    if spec != "boundary":  # an image of one class has none
        x = torch.randn(1, 3, 1, 1, requires_grad=True)
        assert loss(x, torch.ones(1, 1, 1, dtype=torch.long)) > 0


@pytest.mark.parametrize("spec", [*SEGMENTATION, *SUMS])
def test_what_is_ignored_changes_nothing(spec: str) -> None:
    """Its logits may even be infinite; a weight of 0 is the same as ignore_index."""
    x, y = sample("segmentation")
    ignored = y.clone()
    ignored[:, 1] = 255
    loss = build_loss(spec, kind="segmentation", ignore_index=255)
    expected = value_and_grad(loss, x, ignored)
    bad = x.detach().clone()
    bad[:, 0, 1], bad[:, 1, 1], bad[:, 2, 1] = torch.inf, torch.nan, -torch.inf
    value, grad = value_and_grad(loss, bad, ignored)
    assert (grad[:, :, 1] == 0).all()
    torch.testing.assert_close((value, grad), expected)
    weight = (ignored != 255).to(x.dtype)
    torch.testing.assert_close(value_and_grad(loss, bad, y, pixel_weight=weight), expected)
    weight = weight.float().unsqueeze(1)
    torch.testing.assert_close(value_and_grad(loss, bad, y, pixel_weight=weight), expected)


@pytest.mark.parametrize("absent", ["skip", "penalise"])
@pytest.mark.parametrize("spec", OF_IMAGES)
def test_per_image_is_the_mean_of_the_images(spec: str, absent: str) -> None:
    x, y = sample("segmentation")
    y[0] %= 2
    y[1, 2] = 255
    options: dict[str, Any] = {"per_image": True, "ignore_index": 255}
    if any("absent" in term.options for term in build_loss(spec).terms):
        options["absent"] = absent
    loss = build_loss(spec, kind="segmentation", **options)
    value, grad = value_and_grad(loss, x, y)
    found = [value_and_grad(loss, x[b : b + 1], y[b : b + 1]) for b in range(2)]
    torch.testing.assert_close(value, (found[0][0] + found[1][0]) / 2)
    torch.testing.assert_close(grad, torch.cat((found[0][1], found[1][1])) / 2)


@pytest.mark.parametrize("spec", [*SEGMENTATION, *SUMS])
def test_dtypes_of_labels(spec: str) -> None:
    """As uint8, -100 would be 156 and 255 an ordinary label."""
    x, y = sample("segmentation")
    plain = build_loss(spec, kind="segmentation", ignore_index=-100)
    expected = value_and_grad(plain, x, y)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        torch.testing.assert_close(value_and_grad(plain, x, y.to(dtype)), expected)
        torch.testing.assert_close(value_and_grad(plain, x, y.to(dtype).unsqueeze(1)), expected)
    x = x.detach()[:, :2]
    two = y.clamp(max=1)
    expected = value_and_grad(plain, x, two)
    torch.testing.assert_close(value_and_grad(plain, x, two.bool()), expected)
    void = build_loss(spec, kind="segmentation", ignore_index=255)
    two[0, 0] = 255
    expected = value_and_grad(void, x, two)
    torch.testing.assert_close(value_and_grad(void, x, two.byte()), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec", [*SEGMENTATION, *SUMS])
def test_half_precision(spec: str, dtype: torch.dtype) -> None:
    """At 512 x 512 the sums of Dice in float16 overflow to NaN elsewhere."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(1, 2, 512, 512, generator=generator) * 2).to(dtype)
    y = torch.randint(0, 2, (1, 512, 512), generator=generator)
    loss = build_loss(spec, kind="segmentation")
    value, grad = value_and_grad(loss, x, y)
    expected, slope = value_and_grad(loss, x.float(), y)
    assert (value.dtype, grad.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(value, expected, rtol=1e-3, atol=0)
    # what float16 loses of gradients near 1e-7 is what a loss scaler is for
    torch.testing.assert_close(grad.float(), slope, rtol=1e-2, atol=6e-8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(value_and_grad(loss, x, y), (value, grad))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("classes", [2, 19])
@pytest.mark.parametrize("spec", [*(name for name in SEGMENTATION if name not in MAPS), *SUMS])
def test_memory(spec: str, classes: int, dtype: torch.dtype) -> None:
    """What is kept for backward beside logits and target, in bytes for a byte of logits."""
    x = torch.randn(1, classes, 64, 64).to(dtype).requires_grad_()
    y = torch.randint(0, classes, (1, 64, 64))
    loss = build_loss(spec, kind="segmentation", ignore_index=255)
    # a byte a pixel each for what is ignored and what is hard; in float32 the likelihoods, or the
    # slopes of the positives
    limit = 6 * y.numel() + 3000
    if dtype == torch.float32:
        # the slopes, or the probabilities; both where a sum asks both engines
        limit += x.nbytes * (2 if spec in SUMS[1:] else 1)
    assert kept_bytes(lambda: loss(x, y), [x, y]) <= limit


@pytest.mark.parametrize("name", [name for name, kind in CASES if kind == "classification"])
def test_memory_of_anchors(name: str) -> None:
    x, y = torch.randn(1, 2000, 90, requires_grad=True), torch.randint(-2, 90, (1, 2000))
    weight = torch.rand(1, 1)
    loss = LOSSES[name](reduction="sum")
    assert kept_bytes(lambda: loss(x, y, weight=weight), [x, y, weight]) <= 1.1 * x.nbytes


@cases
def test_deterministic_algorithms(name: str, kind: str) -> None:
    x, y = sample(kind, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.use_deterministic_algorithms(True)
        try:
            first, second = (value_and_grad(make(name, kind), x, y) for _ in range(2))
        finally:
            torch.use_deterministic_algorithms(False)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@st.composite
def batches(draw: st.DrawFn, kind: str) -> tuple[Tensor, Tensor]:
    """Logits of any shape and size as far as 1e4, some labels ignored; a third label means 255."""
    images, classes = draw(st.integers(0, 3)), draw(st.integers(2, 4))
    rest = draw(st.lists(st.integers(1, 5), max_size=3))
    scale = draw(st.sampled_from([0.0, 1e-6, 1.0, 100.0, 1e4]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    x = torch.randn(images, classes, *rest, generator=generator).clamp(-1, 1) * scale
    y = torch.randint(-1 if kind == "classification" else 0, classes, (images, *rest))
    y[torch.rand(y.shape, generator=generator) < 0.3] = 255
    if kind == "classification":
        x = x.movedim(1, -1)
    elif draw(st.booleans()):
        y = y.to(draw(st.sampled_from([torch.uint8, torch.int16, torch.int32])))
    return x.requires_grad_(), y


@dense_cases
@given(data=st.data())
@settings(max_examples=15, deadline=None, derandomize=True)
def test_any_shape_and_any_value(name: str, kind: str, data: st.DataObject) -> None:
    """Finite, and nothing flows where the label is ignored."""
    x, y = data.draw(batches(kind))
    if name == "cldice" and x.dim() < 3:
        return  # it is of images
    value, grad = value_and_grad(make(name, kind, ignore_index=255), x, y)
    assert value.isfinite()
    assert grad.isfinite().all()
    ignored = (y == 255).unsqueeze(-1 if kind == "classification" else 1)
    assert (grad.masked_select(ignored) == 0).all()


@cases
def test_meta_tensors(name: str, kind: str) -> None:
    """No value is looked at: nothing makes a device wait."""
    x, y = sample(kind, dtype=torch.float32, device="meta")
    value = make(name, kind)(x, y)
    value.backward()
    assert value.shape == ()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    if kind == "segmentation":
        options = {"class_weights": [1, 2, 3], "ignore_index": 255, "per_image": True}
        given = {"mode": "multiclass"} if "classification" in LOSSES[name].kinds else {}
        LOSSES[name].function(x, y, **options, **given).sum().backward()


@cases
def test_no_sync_on_cuda(name: str, kind: str) -> None:
    """Traced as if on a GPU, where reading a value raises."""
    with FakeTensorMode():
        x, y = sample(kind)
        x, y = (torch.empty_like(t, device="cuda") for t in (x.detach(), y))
        assert make(name, kind)(x, y).device.type == "cuda"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@cases
def test_no_sync_on_a_gpu(name: str, kind: str) -> None:
    """Forward and backward, where CUDA raises on every wait."""
    x, y = (tensor.cuda() for tensor in sample(kind))
    loss = make(name, kind).cuda()
    expected = value_and_grad(loss, x, y)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = value_and_grad(loss, x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("spec", [*dict.fromkeys(name for name, _ in CASES), *SUMS])
def test_compiles_into_one_graph(spec: str) -> None:
    kind = "segmentation" if "+" in spec else LOSSES[spec].kinds[-1]
    loss = build_loss(spec, kind=kind) if "+" in spec else make(spec, kind)
    x, y = sample(kind, dtype=torch.float32)
    expected = value_and_grad(loss, x, y)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(value_and_grad(compiled, x, y), expected)


@pytest.mark.parametrize("target", ["index", "dense"])
@pytest.mark.parametrize(("spec", "classes"), [("focal", 5), ("ce + dice", 3), ("ce + dice", 21)])
def test_compiles_whatever_the_order_of_memory(spec: str, classes: int, target: str) -> None:
    """Heads have their classes last, and so have masks in channels_last memory."""
    generator = torch.Generator().manual_seed(0)
    head = spec == "focal"
    x = torch.randn(*((2, 40, classes) if head else (2, classes, 8, 5)), generator=generator)
    y = torch.randint(-2 if head else 0, classes, (2, 40) if head else (2, 8, 5))
    if target == "dense":
        y = x.softmax(-1 if head else 1)
    loss = build_loss(spec, **({} if head else {"mode": "multiclass"}))
    x = x if head else x.contiguous(memory_format=torch.channels_last)
    expected = value_and_grad(loss, x, y)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(value_and_grad(compiled, x, y), expected)


@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="there is no compiler")
@pytest.mark.parametrize("spec", ["bce + dice", "ce + dice"])
def test_the_compiled_code_computes_the_same(spec: str) -> None:
    x, y = sample("segmentation", dtype=torch.float32)
    loss = build_loss(spec, **({"mode": "multilabel"} if "bce" in spec else {}))
    y = (x.detach() > 1).float() if "bce" in spec else y
    expected = value_and_grad(loss, x, y)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True)
    torch.testing.assert_close(value_and_grad(compiled, x, y), expected)


@dense_cases
def test_labels_out_of_range_are_named(name: str, kind: str) -> None:
    """Always on the CPU, also in uint8 and beside an ignore_index."""
    x, y = sample(kind)
    y = y.clamp(min=0)
    y.view(-1)[3] = 200
    for options in ({}, {"ignore_index": 255}):
        for labels in (y, y.byte()):
            with pytest.raises(ValueError, match="is label 200, but there are 3 classes, 0 to 2"):
                make(name, kind, **options)(x, labels)
    make(name, kind, ignore_index=200)(x, y)


@dense_cases
@pytest.mark.parametrize(("dtype", "classes"), [(torch.uint8, 300), (torch.int8, 200)])
def test_labels_in_range_are_taken(name: str, kind: str, dtype: torch.dtype, classes: int) -> None:
    """However few bits they have: as int8, 200 classes are -56; as uint8, -100 is label 156."""
    x = torch.randn(2, 5, classes, generator=torch.Generator().manual_seed(0))
    x = x if kind == "classification" else x.transpose(1, 2)
    y = torch.arange(10).reshape(2, 5) * 12 + (60 if dtype == torch.uint8 else 0)
    loss = make(name, kind, ignore_index=-100)
    torch.testing.assert_close(loss(x, y.to(dtype)), loss(x, y))
