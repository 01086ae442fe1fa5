"""The adapter of transformers' segmentation models: their own numbers for ``ce``, and any else."""

import copy
import inspect
import io
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from detseg_losses import SpecError, build_loss
from detseg_losses.integrations import model_losses, restore_losses, use_losses
from processes import run_in_processes

transformers = pytest.importorskip("transformers")

CLASSES = 4
VIT = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 64}
BEIT = VIT | {"intermediate_size": 16, "auxiliary_channels": 8, "out_indices": [1, 2, 3, 4]}
STAGES = ["stage1", "stage2", "stage3", "stage4"]


def backbone(kind, **options):
    return transformers.AutoConfig.for_model(kind, **options)


CONFIGS = {
    "Segformer": lambda: {
        "hidden_sizes": [8, 8, 16, 16],
        "num_attention_heads": [1, 1, 2, 2],
        "depths": [1, 1, 1, 1],
        "decoder_hidden_size": 16,
    },
    "UperNet": lambda: {
        "backbone_config": backbone(
            "convnext", hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_features=STAGES
        ),
        "hidden_size": 16,
        "auxiliary_in_channels": 16,
        "auxiliary_channels": 8,
    },
    "DPT": lambda: (
        VIT
        | {
            "intermediate_size": 16,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [8, 8, 8, 8],
            "fusion_hidden_size": 8,
        }
    ),
    "Beit": lambda: BEIT,
    "Data2VecVision": lambda: BEIT,
    "MobileNetV2": lambda: {"depth_multiplier": 0.25},
    "MobileViT": lambda: {
        "hidden_sizes": [16, 16, 16],
        "neck_hidden_sizes": [8, 8, 8, 8, 16, 16, 32],
        "aspp_out_channels": 8,
        "image_size": 64,
    },
    "MobileViTV2": lambda: {
        "width_multiplier": 0.25,
        "n_attn_blocks": [1, 1, 1],
        "aspp_out_channels": 8,
        "image_size": 64,
    },
    "Sapiens2": lambda: (
        VIT
        | {
            "intermediate_size": 16,
            "num_key_value_attention_heads": 2,
            "head_config": {"upsample_out_channels": [8], "conv_out_channels": [8]},
        }
    ),
    "Tipsv2Dpt": lambda: {
        "backbone_config": backbone(
            "tipsv2_vision_model",
            **VIT,
            out_indices=[1, 2, 3, 4],
            reshape_hidden_states=False,
        ),
        "neck_hidden_sizes": [8, 8, 8, 8],
        "fusion_hidden_size": 8,
    },
}
AUXILIARY = ["UperNet", "DPT", "Beit", "Data2VecVision"]


def small(name="Segformer", classes=CLASSES, **options):
    """A model of a few thousand weights, in evaluation: no dropout, no batch statistics."""
    model = getattr(transformers, f"{name}ForSemanticSegmentation", None)
    if model is None:
        pytest.skip(f"this version of transformers has no {name}")
    torch.manual_seed(0)
    config = model.config_class(**CONFIGS[name](), num_labels=classes, **options)
    return model(config).eval()


@pytest.fixture
def labels():
    """Squares of four classes, and a line that is void in the first image."""
    squares = torch.randint(CLASSES, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    squares = squares.repeat_interleave(16, 1).repeat_interleave(16, 2)
    squares[0, :, 20:30] = 255
    return squares


@pytest.fixture
def images(labels):
    """Each class has a colour."""
    noise = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return torch.eye(4)[:, :3].repeat(64, 1)[labels].movedim(-1, 1) + noise / 4


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(
            found[key], value, msg=lambda text, key=key: f"{key}: {text}", **tolerance
        )


@pytest.mark.parametrize("name", CONFIGS)
def test_cross_entropy_is_the_models_own_loss(name, images, labels):
    model = small(name)
    keys, config = list(model.state_dict()), model.config.to_json_string()
    stock = model(pixel_values=images, labels=labels)
    expected = gradients(model, stock.loss)
    use_losses(model, "ce")
    assert list(model.state_dict()) == keys
    assert model.config.to_json_string() == config
    ours = model(pixel_values=images, labels=labels)
    assert type(ours) is type(stock)
    assert list(ours) == list(stock)
    torch.testing.assert_close(ours.loss, stock.loss)
    assert torch.equal(ours.logits, stock.logits)
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    assert_same(gradients(model, ours.loss), expected, rtol=1e-4, atol=1e-5 * scale)
    values = model_losses(model).values
    assert list(values) == (["ce", "aux"] if name in AUXILIARY else ["ce"])
    torch.testing.assert_close(sum(values.values()), ours.loss.detach())


@pytest.mark.parametrize("training", [True, False])
def test_the_loss_of_what_the_model_returned(training, images, labels):
    model = use_losses(small("Segformer").train(training), "ce+dice")
    losses = model_losses(model)
    torch.manual_seed(0)  # for the dropout
    expected = model(pixel_values=images, labels=labels).loss
    for return_dict in (True, False):
        torch.manual_seed(0)
        output = model(pixel_values=images, return_dict=return_dict)
        assert torch.equal(losses(output, labels), expected)
    torch.testing.assert_close(sum(losses.values.values()), expected.detach())


@pytest.mark.parametrize("name", CONFIGS)
def test_every_model_makes_a_step(name, images, labels):
    """The gradient reaches every weight that stock training reaches, and a step lowers the loss."""
    model = use_losses(small(name), "0.5*softmax_focal + dice")
    before = model(pixel_values=images, labels=labels).loss
    found = gradients(model, before)
    assert all(gradient.isfinite().all() for gradient in found.values())
    norm = torch.stack([gradient.norm() for gradient in found.values()]).norm()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name in found:
                parameter -= 1e-2 * found[parameter_name] / norm
    assert model(pixel_values=images, labels=labels).loss < before


@pytest.mark.parametrize("name", AUXILIARY)
def test_a_model_without_its_auxiliary_head(name, images, labels):
    model = use_losses(small(name, use_auxiliary_head=False), "ce")
    output = model(pixel_values=images, labels=labels)
    logits = F.interpolate(output.logits, (64, 64), mode="bilinear")
    torch.testing.assert_close(output.loss, F.cross_entropy(logits, labels, ignore_index=255))


def test_the_changed_term_is_the_one_called(images, labels):
    options = {"auxiliary_loss_weight": 0.25, "loss_ignore_index": 3}
    model = use_losses(small("UperNet", **options), "tversky(alpha=0.9, beta=0.1)")
    labels = labels.clamp(max=3)
    caught = []
    handle = model.auxiliary_head.register_forward_hook(lambda *call: caught.append(call[-1]))
    output = model(pixel_values=images, labels=labels)
    handle.remove()
    valid = (labels != 3).unsqueeze(1)
    y = F.one_hot(labels, CLASSES).movedim(-1, 1) * valid
    values = []
    for logits in (output.logits, caught[0]):
        p = F.interpolate(logits, (64, 64), mode="bilinear").softmax(1) * valid
        tp, fp, fn = ((a * b).sum((0, 2, 3)) for a, b in ((p, y), (p, 1 - y), (1 - p, y)))
        values.append((1 - tp / (tp + 0.9 * fp + 0.1 * fn))[:3].mean())
    torch.testing.assert_close(output.loss, values[0] + 0.25 * values[1])


@pytest.mark.parametrize("spec", ["ce+dice", "softmax_focal+tversky", "bce+jaccard", "lovasz"])
def test_a_model_learns(spec, images, labels):
    model = use_losses(small(drop_path_rate=0.0, classifier_dropout_prob=0.0), spec).train()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    history = []
    for _ in range(8):
        loss = model(pixel_values=images, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.95 * history[0], history


def test_one_class_and_many_labels(images, labels):
    one = use_losses(small(classes=1), "bce+dice")
    binary = torch.where(labels == 255, labels, (labels == 1).long())
    output = one(pixel_values=images, labels=binary)
    logits = F.interpolate(output.logits, (64, 64), mode="bilinear")
    expected = build_loss("bce+dice", "segmentation", ignore_index=255)(logits, binary)
    torch.testing.assert_close(output.loss, expected)
    many = use_losses(small(), "bce+dice", mode="multilabel")
    target = F.one_hot(labels % 255, CLASSES).movedim(-1, 1).float()
    assert many(pixel_values=images, labels=target).loss > 0


def test_learned_and_moving_weights(images, labels):
    model = small()
    use_losses(model, "ce+dice")
    plain = model(pixel_values=images, labels=labels).loss, model.loss.values
    use_losses(model, "learned*ce + ramp(1, 3, steps=1)*dice")
    loss = model(pixel_values=images, labels=labels).loss
    torch.testing.assert_close(loss, plain[0])
    assert gradients(model, loss)["loss.log_variance_ce"] != 0
    model.loss.advance()
    model(pixel_values=images, labels=labels)
    torch.testing.assert_close(model.loss.values["dice"], 3 * plain[1]["dice"])


@pytest.mark.parametrize("name", ["Segformer", "UperNet", "MobileNetV2"])
def test_outputs_as_tuples_and_labels_by_position(name, images, labels):
    model = small(name)
    stock = model(pixel_values=images, return_dict=False)
    use_losses(model, "dice")
    expected = model(pixel_values=images, labels=labels).loss
    loss, *others = model(images, labels=labels, return_dict=False)
    assert torch.equal(loss, expected)
    assert len(others) == len(stock)
    assert torch.equal(others[0], stock[0])
    names = list(inspect.signature(model.forward).parameters)
    between = [None] * (names.index("labels") - 1)
    assert torch.equal(model(images, *between, labels).loss, expected)
    without = model(images)
    assert without.loss is None
    assert torch.equal(without.logits, stock[0])


@pytest.mark.parametrize("name", ["Segformer", "DPT"])
def test_undo_is_exact(name, images, labels):
    model = small(name)
    stock = model(pixel_values=images, labels=labels).loss
    modules = [model, *([model.auxiliary_head] if name == "DPT" else [])]
    before, text = [set(vars(module)) for module in modules], repr(model)
    use_losses(model, "ce+dice")
    use_losses(model, "lovasz")
    model(pixel_values=images, labels=labels)
    assert list(model.loss.values) == ["lovasz", *(["aux"] if name == "DPT" else [])]
    assert restore_losses(model) is model
    assert [set(vars(module)) for module in modules] == before
    assert repr(model) == text
    for module in modules:
        assert not any(value for key, value in vars(module).items() if "_hooks" in key)
    assert torch.equal(model(pixel_values=images, labels=labels).loss, stock)
    restore_losses(model)


@pytest.mark.parametrize("name", ["Segformer", "DPT"])
@pytest.mark.parametrize("copier", ["deepcopy", "pickle", "torch.save", "state_dict"])
def test_copies_are_whole_and_apart(copier, name, images, labels):
    # Not yet called: transformers' hooks of the first call cannot be pickled.
    model = use_losses(small(name), "ce+dice(smooth=1)")
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
        other = use_losses(small(name), repr(model.loss))
        other.load_state_dict(model.state_dict())
    expected = model(pixel_values=images, labels=labels).loss
    assert torch.equal(other(pixel_values=images, labels=labels).loss, expected)
    assert restore_losses(other)(pixel_values=images, labels=labels).loss != expected
    assert not other._forward_hooks
    assert torch.equal(model(pixel_values=images, labels=labels).loss, expected)


@pytest.mark.parametrize("name", ["Segformer", "DPT"])
def test_save_pretrained_knows_nothing_of_us(name, tmp_path, images, labels):
    model = small(name)
    model.save_pretrained(tmp_path / "stock")
    use_losses(model, "learned*ce + dice")
    model.save_pretrained(tmp_path / "adapted")
    for file in (tmp_path / "stock").iterdir():
        assert (tmp_path / "adapted" / file.name).read_bytes() == file.read_bytes(), file.name
    config = json.loads((tmp_path / "adapted" / "config.json").read_text())
    assert config["architectures"] == [f"{name}ForSemanticSegmentation"]
    loaded = type(model).from_pretrained(tmp_path / "adapted").eval()
    assert not hasattr(loaded, "loss")
    assert torch.equal(loaded(images).logits, model(images).logits)


def test_bf16(images, labels):
    model = use_losses(small("UperNet"), "ce+dice")
    full = model(pixel_values=images, labels=labels).loss
    with torch.autocast("cpu", torch.bfloat16):
        half = model(pixel_values=images, labels=labels).loss
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0.05, atol=0.02)


def test_a_batch_of_nothing_but_void_costs_nothing(images, labels):
    model = use_losses(small("UperNet"), "ce+dice")
    loss = model(pixel_values=images, labels=torch.full_like(labels, 255)).loss
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients(model, loss).values())


def test_two_processes_equal_one(images, labels):
    model = _synchronised()
    expected = gradients(model, model(pixel_values=images, labels=labels).loss)
    for found in run_in_processes(_gradients_of_rank, images, labels):
        assert_same(found, expected, rtol=1e-4, atol=1e-6)


def _synchronised():
    return use_losses(small("DPT"), "ce+dice", sync=True)


def _gradients_of_rank(rank, images, labels):
    model = _synchronised()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    part = slice(rank, rank + 1)
    return gradients(model, wrapped(pixel_values=images[part], labels=labels[part]).loss)


@pytest.mark.parametrize(
    ("classes", "spec", "options", "message"),
    [
        (1, "ce+dice", {}, "'bce'"),
        (4, "ce", {"mode": "multilabel"}, "'bce'"),
        (4, "dice", {"mode": "binary"}, "4 class"),
        (4, "ce+giou", {}, "giou"),
        (4, "ce+dise", {}, "did you mean 'dice'"),
        (4, "ce(class_weights=[1, 2])", {}, "2 class_weights"),
    ],
)
def test_a_spec_that_does_not_fit_is_one_clear_line_and_changes_nothing(
    classes, spec, options, message
):
    model = small(classes=classes)
    with pytest.raises(SpecError, match=message) as error:
        use_losses(model, spec, **options)
    assert "\n" not in str(error.value)
    assert not model._forward_hooks


def test_a_model_without_an_adapter_is_named():
    with pytest.raises(TypeError, match="no adapter for Linear"):
        use_losses(nn.Linear(1, 1), "ce")


def test_trainer(tmp_path, images, labels):
    pytest.importorskip("accelerate")
    model = use_losses(small(drop_path_rate=0.0, classifier_dropout_prob=0.0), "ce+2*dice")

    def mean_of_batches():
        parts = zip(images.split(1), labels.split(1), strict=True)
        return sum(model(pixel_values=x, labels=y).loss.item() for x, y in parts) / 2

    model.train()
    expected = mean_of_batches()
    data = [{"pixel_values": x, "labels": y} for x, y in zip(images, labels, strict=True)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=2,
        logging_steps=1,
        learning_rate=1e-3,
        report_to=[],
        use_cpu=True,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(expected, abs=1e-3)
    assert losses[1] < losses[0]
    evaluated = trainer.evaluate()["eval_loss"]
    model.eval()
    assert evaluated == pytest.approx(mean_of_batches(), abs=1e-3)
    trainer.save_model()
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(images).logits, model.eval()(images).logits)


def test_what_the_trainer_asks_a_model(images, labels):
    """Its columns are those of the signature, and it divides by the accumulated batches."""
    model = use_losses(small(), "ce")
    assert {"pixel_values", "labels"} <= set(inspect.signature(model.forward).parameters)
    assert model.accepts_loss_kwargs is False
    output = model(**{"pixel_values": images, "labels": labels})
    assert output["loss"] is output.loss is output[0]
