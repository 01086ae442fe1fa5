"""The adapter of MaskFormer and Mask2Former: their numbers at their options, any losses else."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from detseg_losses import SpecError, tversky_loss
from detseg_losses.integrations import model_losses, restore_losses, use_losses
from processes import run_in_processes

transformers = pytest.importorskip("transformers")
pytest.importorskip("scipy")

CLASSES = 4
STOCK = {
    "Mask2Former": "2*ce + 5*bce + 5*dice(smooth=1)",
    "MaskFormer": "ce + 20*focal + dice(smooth=1)",
}
NAMES = {
    "Mask2Former": "Mask2FormerForUniversalSegmentation",
    "MaskFormer": "MaskFormerForInstanceSegmentation",
}


def small_model(kind):
    """Two decoder layers and six queries, with auxiliary losses."""
    torch.manual_seed(0)
    stages = ["stage1", "stage2", "stage3", "stage4"]
    body = transformers.SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=2,
        image_size=64,
        out_features=stages,
        drop_path_rate=0.0,
    )
    if kind == "Mask2Former":
        config = transformers.Mask2FormerConfig(
            backbone_config=body,
            feature_size=32,
            mask_feature_size=32,
            hidden_dim=32,
            encoder_feedforward_dim=16,
            encoder_layers=1,
            decoder_layers=3,
            num_attention_heads=4,
            dim_feedforward=16,
            num_queries=6,
            num_labels=CLASSES,
            train_num_points=256,
        )
    else:
        decoder = transformers.DetrConfig(
            d_model=32,
            encoder_layers=1,
            decoder_layers=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            num_queries=6,
            dropout=0.0,
        )
        config = transformers.MaskFormerConfig(
            backbone_config=body,
            decoder_config=decoder,
            fpn_feature_size=32,
            mask_feature_size=32,
            num_labels=CLASSES,
            use_auxiliary_loss=True,
        )
    return getattr(transformers, NAMES[kind])(config).train()


@pytest.fixture
def batch():
    """Two masks, and one."""
    masks = [torch.zeros(2, 64, 64), torch.zeros(1, 64, 64)]
    masks[0][0, :32], masks[0][1, 32:], masks[1][0, :, 10:50] = 1, 1, 1
    return {
        "pixel_values": torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)),
        "mask_labels": masks,
        "class_labels": [torch.tensor([1, 3]), torch.tensor([0])],
    }


def run(model, batch):
    """The loss and the gradients of all parameters; the sampled points are the same."""
    torch.manual_seed(0)
    model.zero_grad()
    loss = model(**batch, output_hidden_states=True).loss
    loss.sum().backward()
    return loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(first, second):
    (loss, gradients), (other, others) = first, second
    torch.testing.assert_close(loss, other, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == others.keys()
    bound = 1e-5 * max(g.abs().max() for g in gradients.values()).item()
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-3, atol=bound)


@pytest.mark.parametrize("kind", STOCK)
def test_the_models_own_options_give_its_values_and_gradients(kind, batch):
    model = small_model(kind)
    stock = run(model, batch)
    use_losses(model, STOCK[kind])
    ours = run(model, batch)
    assert_equal(stock, ours)
    torch.testing.assert_close(sum(model_losses(model).values.values()), ours[0].detach().sum())


@pytest.mark.parametrize("kind", STOCK)
def test_a_batch_without_any_mask(kind, batch):
    batch["mask_labels"] = [torch.zeros(0, 64, 64)] * 2
    batch["class_labels"] = [torch.zeros(0, dtype=torch.int64)] * 2
    model = small_model(kind)
    stock = run(model, batch)
    assert_equal(stock, run(use_losses(model, STOCK[kind]), batch))


def test_resampled_masks_and_half_precision(batch):
    """Resampling rounds: 1 may become 1.0000001."""
    model = use_losses(small_model("Mask2Former"), "ce + bce + focal + dice + tversky")
    batch["mask_labels"] = [torch.ones(2, 51, 37), torch.ones(1, 51, 37)]
    full = run(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        half = run(model, batch)
    torch.testing.assert_close(half[0], full[0], rtol=0.1, atol=0.1, check_dtype=False)
    assert all(gradient.isfinite().all() for gradient in half[1].values())


@pytest.mark.parametrize("kind", STOCK)
def test_other_losses_are_the_ones_of_the_string(kind, batch, monkeypatch):
    """Seen at the masks and classes that the criterion compares in each layer."""
    model = use_losses(small_model(kind), "3*softmax_focal(gamma=1) + .5*bce + 2*tversky(alpha=.7)")
    criterion, seen = model.criterion, {"pixels": [], "classes": []}
    pixels, labels = criterion._pixels, criterion.loss_labels
    monkeypatch.setattr(criterion, "_pixels", lambda *a: seen["pixels"].append(a) or pixels(*a))
    monkeypatch.setattr(
        criterion, "loss_labels", lambda *a: seen["classes"].append(a) or labels(*a)
    )
    loss, _ = run(model, batch)
    expected = dict.fromkeys(["softmax_focal", "bce", "tversky"], 0)
    for logits, masks, count in seen["pixels"]:
        assert logits.shape == masks.shape == (3, 1, masks.shape[2])
        assert count == 3
        bce = functional.binary_cross_entropy_with_logits(logits, masks, reduction="none")
        expected["bce"] += 0.5 * bce.mean(2).sum() / 3
        each = [
            tversky_loss(x[None], y[None], alpha=0.7, mode="binary")
            for x, y in zip(logits, masks, strict=True)
        ]
        expected["tversky"] += 2 * sum(each) / 3
    for logits, classes, indices in seen["classes"]:
        target = torch.full(logits.shape[:2], CLASSES)
        for image, (queries, objects) in enumerate(indices):
            target[image, queries] = classes[image][objects]
        weight = torch.where(target == CLASSES, 0.1, 1.0)
        p = logits.softmax(-1).gather(-1, target[..., None])[..., 0]
        expected["softmax_focal"] += 3 * (-weight * (1 - p) * p.log()).sum() / weight.sum()
    assert len(seen["pixels"]) == len(seen["classes"]) > 1
    torch.testing.assert_close(loss.sum(), sum(expected.values()), rtol=1e-4, atol=1e-5)


def test_an_entry_without_a_term_stays_with_its_weight_and_says_so(batch):
    model = small_model("Mask2Former")
    stock = run(model, batch)
    with pytest.warns(UserWarning, match="no loss for 'loss_mask': it stays") as record:
        use_losses(model, "2*ce + 5*dice(smooth=1)")
    assert [each.filename for each in record] == [__file__]
    assert_equal(stock, run(model, batch))
    with pytest.warns(UserWarning, match="stays as it is"):
        use_losses(model, "bce")
    assert run(model, batch)[0] != stock[0]


@pytest.mark.parametrize("kind", STOCK)
def test_copies_keep_the_losses_and_undo_is_exact(kind, batch, tmp_path):
    model = small_model(kind)
    stock, keys, modules = run(model, batch), list(model.state_dict()), str(model)
    use_losses(model, "softmax_focal(class_weights=[1, 2, 3, 4, 5]) + learned*focal + jaccard")
    expected = run(model, batch)
    copies = [copy.deepcopy(model) for _ in range(3)]
    # The criterion alone, for transformers puts hooks on these models that do not pickle.
    copies[1].criterion = pickle.loads(pickle.dumps(model.criterion))
    buffer = io.BytesIO()
    torch.save(model.criterion, buffer)
    buffer.seek(0)
    copies[2].criterion = torch.load(buffer, weights_only=False)
    assert "criterion.terms.log_variance_focal" in expected[1]
    assert list(model.state_dict()) == keys
    for each in (*copies, model):
        assert_equal(expected, run(each, batch))
        use_losses(each, "ce + bce + f1")
        restore_losses(restore_losses(each))
        assert str(each) == modules
        again = run(each, batch)
        assert torch.equal(stock[0], again[0])
        assert all(torch.equal(stock[1][name], again[1][name]) for name in stock[1])
    use_losses(model, STOCK[kind]).save_pretrained(tmp_path)
    assert b"detseg" not in b"".join(path.read_bytes() for path in tmp_path.iterdir())
    loaded = type(model).from_pretrained(tmp_path)
    assert list(loaded.state_dict()) == keys
    torch.testing.assert_close(run(loaded.train(), batch)[0], stock[0])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ce + bce + giou", "Mask2FormerForUniversalSegmentation has no use for 'giou'"),
        ("ce + bce + lovasz", "no use for 'lovasz', it has for .*tversky"),
        ("ce + ghm + dice", "no use for 'ghm'"),
        ("ce(class_weights=[1, 2]) + bce + dice", "2 class_weights, and the model 5 classes"),
        ("ce + bce(class_weights=[1, 2]) + dice", "2 class_weights, and the model 1 classes"),
        ("ce + bce + dice(per_image=True)", "itself decides 'per_image'"),
        ("ce + bce + dise", "column 12.*did you mean 'dice'"),
    ],
)
def test_an_unsuitable_loss_is_one_clear_line_and_changes_nothing(spec, message):
    model = small_model("Mask2Former")
    before, weights = type(model.criterion), model.weight_dict
    with pytest.raises(SpecError, match=message) as error:
        use_losses(model, spec)
    assert "\n" not in str(error.value)
    assert type(model.criterion) is before
    assert model.weight_dict is weights


@pytest.mark.parametrize("kind", STOCK)
def test_a_model_learns(kind, batch):
    model = use_losses(small_model(kind), "softmax_focal + 5*focal + 2*log_cosh_dice")
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    losses = []
    for _ in range(10):
        loss, gradients = run(model, batch)
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 0.95 * losses[0]


def test_two_processes_equal_one(batch):
    """Each with an image of one mask, for transformers counts the masks of a process."""
    batch["mask_labels"][0] = batch["mask_labels"][0][:1]
    batch["class_labels"][0] = batch["class_labels"][0][:1]
    _, expected = run(use_losses(small_model("MaskFormer"), "ce + learned*focal + f1"), batch)
    for gradients in run_in_processes(_gradients_of_rank, batch):
        assert gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-4)


def _gradients_of_rank(rank, batch):
    model = use_losses(small_model("MaskFormer"), "ce + learned*focal + f1")
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    part = {key: value[rank : rank + 1] for key, value in batch.items()}
    wrapped(**part, output_hidden_states=True).loss.sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_a_trainer_trains(batch, tmp_path):
    pytest.importorskip("accelerate")
    model = use_losses(small_model("Mask2Former"), "2*ce + 5*focal + 5*dice(smooth=1)")
    before = copy.deepcopy(dict(model.named_parameters()))
    samples = [
        dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)
    ]
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        save_steps=2,
        report_to="none",
        use_cpu=True,
        remove_unused_columns=False,
    )
    transformers.Trainer(model, arguments, train_dataset=samples, data_collator=_collate).train()
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    checkpoint = getattr(transformers, NAMES["Mask2Former"]).from_pretrained(
        tmp_path / "checkpoint-2"
    )
    assert list(checkpoint.state_dict()) == list(model.state_dict())


def _collate(samples):
    batch = {key: [sample[key] for sample in samples] for key in samples[0]}
    return batch | {"pixel_values": torch.stack(batch["pixel_values"])}


@pytest.mark.parametrize("kind", STOCK)
def test_masks_of_255_and_labels_out_of_range_are_refused(kind, batch):
    model = use_losses(small_model(kind), STOCK[kind])
    with pytest.raises(ValueError, match=r"masks must be .*255.*divide by 255"):
        run(model, batch | {"mask_labels": [255 * masks for masks in batch["mask_labels"]]})
    for label in (CLASSES, -1, 1000):
        labels = [batch["class_labels"][0], torch.tensor([label])]
        with pytest.raises(ValueError, match=f"image 1: label {label}, but num_labels=4 allows 0"):
            run(model, batch | {"class_labels": labels})


@pytest.mark.parametrize("kind", STOCK)
def test_another_scale_is_said_once(kind, batch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(use_losses(small_model(kind), STOCK[kind]), batch)
    model = use_losses(small_model(kind), "0.1*ce + 0.1*bce + 100*dice(smooth=1)")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state = run(model, batch) and torch.get_rng_state()
        run(model, batch)
    assert torch.equal(torch.get_rng_state(), state)
    entries = {str(each.message).partition(" ")[0] for each in caught}
    assert len(caught) == len(entries)
    assert {"loss_cross_entropy", "loss_dice"} <= entries
