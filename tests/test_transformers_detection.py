"""The adapter of DETR and its kind: the numbers of transformers at its options, any losses else."""

import copy
import io
import json
import pickle
import re
import warnings

import pytest
import torch
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torchvision import ops

from detseg_losses import SpecError
from detseg_losses.integrations import check_losses, model_losses, restore_losses, use_losses
from processes import run_in_processes

pytestmark = pytest.mark.filterwarnings("ignore:.*stays as it is")
transformers = pytest.importorskip("transformers")
pytest.importorskip("scipy")

CLASSES = 4
BOXES = "5*l1 + 2*giou"
SOFTMAX, SIGMOID, QUALITY = (f"{name} + {BOXES}" for name in ("ce", "focal", "varifocal"))
STOCK = {
    "Detr": SOFTMAX,
    "TableTransformer": SOFTMAX,
    "Yolos": SOFTMAX,
    "ConditionalDetr": SIGMOID,
    "DabDetr": SIGMOID,
    "DeformableDetr": SIGMOID,
    "DeformableDetr two-stage": SIGMOID,
    "RTDetr": QUALITY,
    "RTDetrV2": QUALITY,
    "DFine": QUALITY,
    "Detr masks": SOFTMAX,
    "ConditionalDetr masks": SIGMOID,
    "LwDetr": BOXES,
    "RfDetr": BOXES,
    "Deimv2": BOXES,
}
"""The models, and what equals their own losses; the last ones' of classes are in no string."""

WITH_FIRST_STAGE = ("RTDetr", "RTDetrV2", "DFine", "Deimv2", "LwDetr", "RfDetr")
"""The models that have a loss of what the encoder proposes, too."""


def small_model(kind, *, denoising=4, **options):
    """Two decoder layers and six queries, with auxiliary losses where the model has any."""
    torch.manual_seed(0)
    name, _, variant = kind.partition(" ")
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"this version of transformers has no {name}")
    options = {
        "num_labels": CLASSES,
        "num_queries": 6,
        "auxiliary_loss": True,
        "d_model": 32,
        "dropout": 0.0,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "encoder_attention_heads": 8,
        "decoder_attention_heads": 8,
    } | options
    stages = {"stage4"}
    if name == "Yolos":
        options = {
            "num_labels": CLASSES,
            "num_detection_tokens": 6,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "image_size": [64, 64],
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }
    elif name == "DabDetr":
        options["hidden_size"] = options.pop("d_model")
    elif name == "DeformableDetr":
        stages = {"stage3", "stage4"}
        options |= {"num_feature_levels": 2, "disable_custom_kernels": True}
        if variant == "two-stage":
            options |= {"two_stage": True, "with_box_refine": True, "two_stage_num_proposals": 6}
    elif name in ("LwDetr", "RfDetr"):
        options = {
            "num_labels": CLASSES,
            "num_queries": 6,
            "group_detr": 2,
            "auxiliary_loss": True,
            "d_model": 32,
            "dropout": 0.0,
            "decoder_layers": 2,
            "decoder_ffn_dim": 16,
            "decoder_self_attention_heads": 4,
            "decoder_cross_attention_heads": 4,
        }
        if name == "LwDetr":
            options["projector_scale_factors"] = [1.0]
    elif name in ("RTDetr", "RTDetrV2", "DFine", "Deimv2"):
        stages = {"stage2", "stage3", "stage4"}
        options |= {"encoder_hidden_dim": 32, "num_denoising": denoising}
        options |= {"encoder_in_channels": [8, 16, 16], "decoder_in_channels": [32, 32, 32]}
    if variant == "masks":
        stages = {"stage1", "stage2", "stage3", "stage4"}
    if name in ("LwDetr", "RfDetr"):
        body = "LwDetrViTConfig" if name == "LwDetr" else "RfDetrDinov2Config"
        options["backbone_config"] = getattr(transformers, body)(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=64,
            patch_size=16,
            num_windows=4 if name == "LwDetr" else 2,
            out_features=["stage2"],
            **({"window_block_indices": [0]} if name == "LwDetr" else {}),
        )
    elif name != "Yolos":
        body = "RTDetrResNetConfig" if "encoder_in_channels" in options else "ResNetConfig"
        options["backbone_config"] = getattr(transformers, body)(
            embedding_size=8,
            hidden_sizes=[8, 8, 16, 16],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            out_features=sorted(stages),
        )
    config = getattr(transformers, f"{name}Config")(**options)
    task = "ForSegmentation" if variant == "masks" else "ForObjectDetection"
    model = getattr(transformers, name + task)(config).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Weights that start at 0 leave norms of constants, whose gradients have no digits.
            parameter += 0.1 * torch.randn(parameter.shape)
    return model


@pytest.fixture
def images():
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels():
    """Two objects, none, one."""
    boxes = [[0.3, 0.3, 0.4, 0.5], [0.6, 0.5, 0.6, 0.5]], [], [[0.4, 0.4, 0.5, 0.5]]
    return [
        {
            "class_labels": torch.tensor(classes, dtype=torch.int64),
            "boxes": torch.tensor(each).reshape(-1, 4),
            "masks": (torch.arange(64.0) < 32).float().expand(len(classes), 64, 64),
        }
        for classes, each in zip(([1, 3], [], [0]), boxes, strict=True)
    ]


def run(model, images, labels):
    """The output and the gradients of all parameters; the noise of denoising is the same."""
    torch.manual_seed(0)
    model.zero_grad()
    output = model(images, labels=labels)
    output.loss.backward()
    return output, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(first, second):
    (output, gradients), (other, others) = first, second
    torch.testing.assert_close(output.loss, other.loss, rtol=1e-5, atol=1e-5)
    assert list(output.loss_dict) == list(other.loss_dict)
    assert gradients.keys() == others.keys()
    bound = 1e-5 * max(g.abs().max() for g in gradients.values()).item()
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=bound)


@pytest.mark.parametrize("kind", STOCK)
def test_the_models_own_options_give_its_values_and_gradients(kind, images, labels):
    model = small_model(kind)
    stock = run(model, images, labels)
    use_losses(model, STOCK[kind])
    ours = run(model, images, labels)
    if STOCK[kind] == QUALITY:
        # There the weights of negatives are constants for the gradient, in the paper they are not.
        torch.testing.assert_close(ours[0].loss, stock[0].loss, rtol=1e-5, atol=1e-5)
        use_losses(model, BOXES)
        assert_equal(stock, run(model, images, labels))
    else:
        assert_equal(stock, ours)
    weighted = hasattr(model.config, "weight_loss_giou")  # the entries of its dictionary
    weights = {} if weighted else {"loss_bbox": 5, "loss_giou": 2}
    for entry, value in stock[0].loss_dict.items():
        weight = weights.get("_".join(entry.split("_")[:2]), 1)
        torch.testing.assert_close(ours[0].loss_dict[entry], weight * value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["Detr", "DeformableDetr", "RTDetr", "DFine"])
def test_a_batch_without_any_object(kind, images, labels):
    model = small_model(kind)
    nothing = [labels[1]] * 3
    stock = run(model, images, nothing)
    use_losses(model, BOXES if STOCK[kind] == QUALITY else STOCK[kind])
    ours = run(model, images, nothing)
    assert ours[0].loss_dict["loss_giou"] == 0
    assert_equal(stock, ours)


def corners(boxes):
    return ops.box_convert(boxes, "cxcywh", "xyxy")


@pytest.mark.parametrize("kind", ["Detr", "DeformableDetr", "RTDetr"])
def test_other_losses_are_the_ones_of_the_string(kind, images, labels):
    """Of the last layer, computed here from the output and the model's own matching."""
    from transformers.loss import loss_deformable_detr, loss_for_object_detection, loss_rt_detr

    model = small_model(kind, auxiliary_loss=False, denoising=0)
    config = model.config
    matcher = {
        "Detr": lambda: loss_for_object_detection.HungarianMatcher(1, 5, 2),
        "DeformableDetr": lambda: loss_deformable_detr.DeformableDetrHungarianMatcher(1, 5, 2),
        "RTDetr": lambda: loss_rt_detr.RTDetrHungarianMatcher(config),
    }[kind]()
    classes = "3*softmax_focal(gamma=1)" if kind == "Detr" else "3*quality_focal"
    use_losses(model, f"{classes} + 7*smooth_l1(beta=.1) + .5*ciou + diou")
    output = model(images, labels=labels)
    matches = matcher({"logits": output.logits, "pred_boxes": output.pred_boxes}, labels)
    predicted = torch.cat([output.pred_boxes[i][m] for i, (m, _) in enumerate(matches)])
    boxes = torch.cat([labels[i]["boxes"][m] for i, (_, m) in enumerate(matches)])
    pairs = corners(predicted), corners(boxes)
    smooth = functional.smooth_l1_loss(predicted, boxes, beta=0.1, reduction="sum")
    expected = {
        "smooth_l1": 7 * smooth / 3,
        "ciou": 0.5 * ops.complete_box_iou_loss(*pairs, reduction="sum") / 3,
        "diou": ops.distance_box_iou_loss(*pairs, reduction="sum") / 3,
    }
    quality = torch.zeros(3, 6, CLASSES)
    found = torch.full((3, 6), CLASSES)
    ious = iter(ops.box_iou(*pairs).diag().detach())
    for image, (queries, objects) in enumerate(matches):
        for query, label in zip(queries, labels[image]["class_labels"][objects], strict=True):
            quality[image, query, label] = next(ious)
            found[image, query] = label
    if kind == "Detr":
        weight = torch.where(found == CLASSES, config.eos_coefficient, 1.0)
        probability = output.logits.softmax(-1).gather(-1, found[..., None])[..., 0]
        each = -(1 - probability) * probability.log()
        expected["softmax_focal"] = 3 * (weight * each).sum() / weight.sum()
    else:
        bce = functional.binary_cross_entropy_with_logits(output.logits, quality, reduction="none")
        gap = (output.logits.sigmoid() - quality).square()
        expected["quality_focal"] = 3 * (gap * bce).sum() / 3
    values = model_losses(model).values
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(values[name], value.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(output.loss, sum(values.values()), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        output.loss_dict["loss_giou"], expected["ciou"] + expected["diou"], rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("kind", STOCK)
def test_every_output_goes_through_the_changed_terms(kind, images, labels):
    """Auxiliary outputs and denoising queries too; what has no term is as it was."""
    model = small_model(kind)
    stock, _ = run(model, images, labels)
    ours, _ = run(use_losses(model, STOCK[kind].replace("giou", "eiou")), images, labels)
    entries = [entry for entry in stock.loss_dict if entry.startswith("loss_giou")]
    denoising, first_stage = 2 * hasattr(model.config, "num_denoising"), kind in WITH_FIRST_STAGE
    assert len(entries) == (1 if kind == "Yolos" else 2 + denoising + first_stage)
    for entry, value in stock.loss_dict.items():
        if entry in entries:
            assert ours.loss_dict[entry] > value
        elif entry.startswith(("loss_mask", "loss_dice", "loss_fgl", "loss_ddf", "card")):
            torch.testing.assert_close(ours.loss_dict[entry], value)
    total = sum(ours.loss_dict[entry] for entry in entries)
    torch.testing.assert_close(model.detseg_losses.values["eiou"], total.detach())


@pytest.mark.parametrize("kind", ["Detr", "RTDetr"])
def test_an_entry_without_a_term_stays_with_its_coefficient_and_says_so(kind, images, labels):
    model = small_model(kind)
    stock, _ = run(model, images, labels)
    with pytest.warns(UserWarning, match="'loss_bbox' stays as it is") as record:
        use_losses(model, STOCK[kind].replace(" + 5*l1", ""))
    assert [each.filename for each in record] == [__file__]
    ours, _ = run(model, images, labels)
    torch.testing.assert_close(ours.loss, stock.loss)
    assert torch.equal(ours.loss_dict["loss_bbox"], stock.loss_dict["loss_bbox"])
    assert set(model.detseg_losses.values) == {STOCK[kind].split()[0], "giou"}


def test_a_weight_of_zero_drops_an_entry(images, labels):
    model = use_losses(small_model("Detr"), "ce + 0*l1 + 0*giou")
    output, _ = run(model, images, labels)
    classes = output.loss_dict["loss_ce"] + output.loss_dict["loss_ce_0"]
    torch.testing.assert_close(output.loss, classes)


def test_sigmoid_losses_are_taken_as_their_softmax_counterparts(images, labels):
    model = small_model("Detr")
    with pytest.warns(UserWarning, match="'focal' is taken as 'softmax_focal'"):
        use_losses(model, "focal(gamma=1) + l1 + giou")
    assert list(model.detseg_losses.names) == ["softmax_focal", "l1", "giou"]
    assert model(images, labels=labels).loss.isfinite()


def test_softmax_losses_are_taken_as_their_sigmoid_counterparts(images, labels):
    model = small_model("RTDetr")
    with pytest.warns(UserWarning, match="'softmax_focal' is taken as 'focal'"):
        use_losses(model, "softmax_focal(gamma=1) + 0.5*ce + l1 + giou")
    ours, _ = run(model, images, labels)
    same, _ = run(use_losses(model, "focal(gamma=1) + 0.5*bce + l1 + giou"), images, labels)
    assert torch.equal(ours.loss, same.loss)


def test_undo_is_exact(images, labels):
    model = small_model("RTDetr")
    keys, attributes = list(model.state_dict()), set(vars(model))
    modules = [name for name, _ in model.named_modules()]
    stock = run(model, images, labels)
    use_losses(model, "focal + l1 + giou")
    use_losses(model, "varifocal + mse + ciou")
    assert list(model.state_dict()) == keys
    assert model.detseg_losses.names == ["varifocal", "mse", "ciou"]
    restore_losses(model)
    restore_losses(model)
    assert set(vars(model)) == attributes
    assert [name for name, _ in model.named_modules()] == modules
    again = run(model, images, labels)
    assert torch.equal(stock[0].loss, again[0].loss)
    assert all(torch.equal(stock[1][name], again[1][name]) for name in stock[1])


def test_a_function_that_the_user_has_set_comes_back():
    model = small_model("Detr")
    model.loss_function = mine = pickle.dumps
    use_losses(model, SOFTMAX)
    use_losses(model, SOFTMAX)
    assert model.loss_function is not mine
    assert restore_losses(model).loss_function is mine


def test_copies_keep_the_losses(images, labels):
    spec = "focal(class_weights=[1, 2, 3, 4]) + learned*l1 + ramp(1, 2, steps=5)*ciou"
    model = use_losses(small_model("DeformableDetr"), spec)
    expected = run(model, images, labels)
    assert "detseg_losses.log_variance_l1" in expected[1]
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    fresh = use_losses(small_model("DeformableDetr"), repr(model.detseg_losses))
    fresh.load_state_dict(model.state_dict())
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
        fresh,
    ]
    for each in copies:
        assert each.loss_function.loss is each.detseg_losses
        assert each.detseg_losses is not model.detseg_losses
        assert_equal(expected, run(each, images, labels))
        each.detseg_losses.log_variance_l1.data.fill_(1)
        assert run(each, images, labels)[0].loss != expected[0].loss
        restore_losses(each)
    assert run(model, images, labels)[0].loss == expected[0].loss


def test_a_checkpoint_knows_nothing_of_the_losses(images, labels, tmp_path):
    model = small_model("Detr")
    stock = run(model, images, labels)
    keys, config = list(model.state_dict()), model.config.to_dict()
    use_losses(model, "ce(class_weights=[1, 1, 1, 1, 1]) + learned*l1 + giou")
    run(model, images, labels)
    assert model.config.to_dict() == config
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert "detseg" not in (tmp_path / "config.json").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        "DetrForObjectDetection"
    ]
    assert b"detseg" not in (tmp_path / "model.safetensors").read_bytes()
    loaded, info = transformers.DetrForObjectDetection.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert list(loaded.state_dict()) == keys
    torch.testing.assert_close(run(loaded, images, labels)[0].loss, stock[0].loss)


@pytest.mark.parametrize(
    ("kind", "spec", "message"),
    [
        ("Detr", "giou + dice", "no use for 'dice', it has for ce, .*softmax_focal"),
        ("Detr", "giou + varifocal", "no use for 'varifocal'"),
        ("Detr", "giou + ce(class_weights=[1, 2, 3, 4])", "4 class_weights, and the model 5"),
        ("Detr", "giou + dfl", "DetrForObjectDetection has no use for 'dfl'"),
        ("RTDetr", "giou + poly", "RTDetrForObjectDetection has no use for 'poly'"),
        ("RTDetr", "giou + ghm", "'ghm' is a mean by nature"),
        ("RTDetr", "giou + focal(alpha=[1, 1])", "2 alpha, and the model 4 classes"),
        ("RTDetr", "giou + focal(reduction='mean')", "itself decides 'reduction'"),
        ("RTDetr", "giou + focl", "column 8.*did you mean 'focal'"),
    ],
)
def test_an_unsuitable_loss_is_one_clear_line_and_changes_nothing(kind, spec, message):
    model = small_model(kind)
    function, attributes = model.loss_function, set(vars(model))
    with pytest.raises(SpecError, match=message) as error:
        use_losses(model, spec)
    assert "\n" not in str(error.value)
    assert model.loss_function is function
    assert set(vars(model)) == attributes


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        ("Detr", "softmax_focal + 5*l1 + 2*ciou"),
        ("ConditionalDetr", "bce + 5*smooth_l1 + 2*siou"),
        ("DFine", "quality_focal + 5*huber + 2*diou"),
    ],
)
def test_a_model_learns(kind, spec, images, labels):
    model = use_losses(small_model(kind), spec)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    first = None
    for _ in range(12):
        output, gradients = run(model, images, labels)
        first = output.loss.item() if first is None else first
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        optimizer.step()
    assert output.loss < 0.9 * first


@pytest.mark.parametrize("kind", ["Detr", "RTDetr"])
def test_bf16_autocast(kind, images, labels):
    model = small_model(kind)
    with torch.autocast("cpu", torch.bfloat16):
        stock, _ = run(model, images, labels)
        ours, gradients = run(use_losses(model, STOCK[kind]), images, labels)
    assert ours.loss.dtype == torch.float32
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    torch.testing.assert_close(ours.loss, stock.loss, rtol=0.02, atol=0.02, check_dtype=False)


def test_two_processes_equal_one(images, labels):
    """Each with an image of one object, for transformers counts the objects of a process."""
    images, labels = images[:2], [labels[2]] * 2
    model = use_losses(small_model("DeformableDetr"), "focal + learned*l1 + 2*ciou")
    _, expected = run(model, images, labels)
    for gradients in run_in_processes(_gradients_of_rank, images, labels):
        assert gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-4)


def _gradients_of_rank(rank, images, labels):
    model = use_losses(small_model("DeformableDetr"), "focal + learned*l1 + 2*ciou")
    wrapped = DistributedDataParallel(model)
    wrapped(images[rank : rank + 1], labels=labels[rank : rank + 1]).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_a_trainer_trains(images, labels, tmp_path):
    pytest.importorskip("accelerate")
    model = use_losses(small_model("Detr"), "softmax_focal + learned*l1 + 2*ciou")
    before = copy.deepcopy(dict(model.named_parameters()))
    data = [{"pixel_values": i, "labels": label} for i, label in zip(images, labels, strict=True)]
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=3,
        save_steps=2,
        report_to="none",
        use_cpu=True,
        remove_unused_columns=False,
    )
    transformers.Trainer(model, arguments, train_dataset=data, data_collator=_collate).train()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert "detseg_losses.log_variance_l1" in changed
    checkpoint = transformers.DetrForObjectDetection.from_pretrained(tmp_path / "checkpoint-2")
    assert list(checkpoint.state_dict()) == list(model.state_dict())


def _collate(samples):
    return {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "labels": [sample["labels"] for sample in samples],
    }


@pytest.mark.parametrize("kind", ["Detr", "DeformableDetr", "RTDetr", "DFine"])
@pytest.mark.parametrize("label", [CLASSES, 1000, -1])
def test_labels_out_of_range_are_named(kind, label, images, labels):
    """Also the one that is "no object" to a softmax."""
    model = use_losses(small_model(kind), STOCK[kind])
    labels[0]["class_labels"] = torch.full_like(labels[0]["class_labels"], label)
    with pytest.raises(ValueError, match=f"image 0: label {label}, but num_labels=4 allows 0..3"):
        model(pixel_values=images, labels=labels)


@pytest.mark.parametrize("kind", STOCK)
def test_another_scale_is_said_once(kind, images, labels):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "(?!.*stays as it is)")
        model = use_losses(small_model(kind), STOCK[kind])
        model(pixel_values=images, labels=labels)
    use_losses(model, "100*l1 + 0.02*giou")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model(pixel_values=images, labels=labels)
    bbox, giou = (str(each.message) for each in caught)
    assert re.search(r"loss_bbox is 20 times .* write '5\*l1'", bbox)
    assert re.search(r"loss_giou is 0.01 times .* write '2\*giou'", giou)


@pytest.mark.parametrize("spec", ["giou+dfl", "giou+dice"])
def test_a_string_is_judged_by_the_class_alone(spec):
    check_losses(transformers.DetrForObjectDetection, "ce + l1")
    with pytest.raises(SpecError, match="has no use for"):
        check_losses(transformers.RTDetrForObjectDetection, spec)
