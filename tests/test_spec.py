"""Loss strings and sums of losses."""

from __future__ import annotations

import contextlib
import copy
import pickle
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from detseg_losses import (
    LOSSES,
    CEDiceLoss,
    ComboLoss,
    LossSum,
    SpecError,
    UnifiedFocalLoss,
    binary_cross_entropy_loss,
    build_loss,
    cross_entropy_loss,
    dice_loss,
    jaccard_loss,
    sigmoid_focal_loss,
    tversky_loss,
)
from detseg_losses._engine.sigmoid import _Sigmoid
from detseg_losses._engine.softmax import _Softmax
from detseg_losses.spec import read_stages


def sample() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=generator)
    return x.requires_grad_(), torch.randint(0, 3, (2, 4, 5), generator=generator)


def grad_of(loss: Any, x: Tensor, *args: Any, **options: Any) -> Tensor:
    return torch.autograd.grad(loss(x, *args, **options).sum(), x)[0]


@pytest.mark.parametrize(
    ("spec", "terms"),
    [
        ("ce", [(1, "ce", {})]),
        ("  ce+dice ", [(1, "ce", {}), (1, "dice", {})]),
        ("0.5*ce + 2 * dice(smooth=1)", [(0.5, "ce", {}), (2, "dice", {"smooth": 1})]),
        ("1e-3*l1", [(1e-3, "l1", {})]),
        ("(ce + dice) + jaccard()", [(1, "ce", {}), (1, "dice", {}), (1, "jaccard", {})]),
        ("iou(mode='log', eps=1e-7)", [(1, "iou", {"mode": "log", "eps": 1e-7})]),
        ("focal(alpha=None, gamma=1.5)", [(1, "focal", {"alpha": None, "gamma": 1.5})]),
        (
            "dice(per_image=True, ignore_index=-1)",
            [(1, "dice", {"per_image": True, "ignore_index": -1})],
        ),
        ("focal(alpha=-1)", [(1, "focal", {"alpha": -1})]),
    ],
)
def test_grammar(spec: str, terms: list[tuple[float, str, dict[str, Any]]]) -> None:
    loss = build_loss(spec)
    assert [(weight, term.name) for _, weight, term in loss.items()] == [t[:2] for t in terms]
    for (_, _, term), (_, _, options) in zip(loss.items(), terms, strict=True):
        assert term.options == term.defaults | options
    assert repr(build_loss(repr(loss))) == repr(loss)


def test_lists_are_numbers_of_classes() -> None:
    loss = build_loss("ce(class_weights=[1, 2.5, 0]) + focal(alpha=[0.25, 0.5, 1])")
    ce, focal = loss.terms
    assert ce.options["class_weights"].tolist() == [1, 2.5, 0]
    assert focal.options["alpha"].tolist() == [0.25, 0.5, 1]
    assert repr(loss) == "ce(class_weights=[1.0, 2.5, 0.0]) + focal(alpha=[0.25, 0.5, 1.0])"
    assert loss.to(torch.float64).terms[0].options["class_weights"].dtype == torch.float64
    assert not loss.state_dict()


@pytest.mark.parametrize("weight", ["0.1", "0.123456789", "1234567.0", "1e-09", "3.0"])
def test_repr_keeps_every_digit(weight: str) -> None:
    loss = build_loss(f"{weight}*ce")
    assert build_loss(repr(loss)).weights == loss.weights == [float(weight)]


@pytest.mark.parametrize(
    ("spec", "column", "message"),
    [
        ("", 1, "is empty; write for example 'giou + focal'"),
        (" \n", 1, "is empty"),
        ("ce +", 4, "after the last '+' there is no loss"),
        ("+ ce", 1, "before the '+' there is no loss"),
        ("giou++focal", 6, "between '+' and '+' there is no loss"),
        ("ce ; dice", 4, "';' and ':' are for models that have stages"),
        ("; ce", 1, "';' and ':' are for models that have stages"),
        ("mask: ce", 5, "';' and ':' are for models that have stages"),
        ("ce dice", 4, "between two losses there must be '+'"),
        ("ce if 1 else dice", 4, "between two losses there must be '+'"),
        ("giou, focal", 5, "losses are joined by '+', as in 'ce + dice', and not by ','"),
        ("ce - dice", 4, "losses are joined by '+', as in 'ce + dice', and not by '-'"),
        ("torch.nn.L1Loss", 6, "losses are joined by '+', as in 'ce + dice', and not by '.'"),
        ("ce\0", 3, r"and not by '\x00'"),
        ("ce\ud800", 3, r"and not by '\ud800'"),
        ("-ce", 1, "losses are added, and have no minus"),
        ("ce + -0.5*dice", 6, "losses are added, and have no minus"),
        ("ce * 2", 6, "the weight stands first: '2*ce'"),
        ("ce(label_smoothing=0.1)*2", 24, "the weight stands first: '2*ce'"),
        ("giou*focal", 1, "losses are added: 'giou + focal'"),
        ("2giou", 1, "after a weight there must be '*' and a loss: '2*giou'"),
        ("0.5", 1, "after a weight there must be '*' and a loss: '0.5*ce'"),
        ("2*3*ce", 3, "a loss has one weight"),
        ("2*", 2, "after the last '*' there is no loss"),
        ("2*(ce + dice)", 3, "a weight is that of one loss: '2*ce + 2*dice'"),
        ("(ce + dice", 1, "this '(' is not closed"),
        ("ce + dice)", 10, "there is no '(' for this ')'"),
        ("ce(label_smoothing=0.1", 3, "this '(' is not closed"),
        ("focal gamma=2", 7, "between two losses there must be '+'"),
        ("focal=2", 6, "options stand in parentheses: 'focal(gamma=1.5)'"),
        ("focal(gamma)", 7, "options are given as name=value"),
        ("focal(gamma=)", 13, "the value of 'gamma' is not a number"),
        ("focal(gamma=1 alpha=2)", 15, "after a value of 'gamma' there must be ',' or ')'"),
        ("GIoU + Focal", 1, "no loss 'GIoU'; write 'giou'"),
        ("giou + FOCAL", 8, "no loss 'FOCAL'; write 'focal'"),
        ("\N{LATIN SMALL LIGATURE FI}ou + ce", 1, "no loss '\N{LATIN SMALL LIGATURE FI}ou'"),
        ("focall", 1, "no loss 'focall'; did you mean 'focal'?"),
        ("ce + dicee", 6, "no loss 'dicee'; did you mean 'dice'?"),
        ("0.5*ce + 2*tverski", 12, "did you mean 'tversky'?"),
        ("zzz", 1, "no loss 'zzz'; there are "),
        ("dice(smoth=1)", 6, "dice has no option 'smoth'; did you mean 'smooth'?"),
        ("ce + l1(gamma=1)", 9, "l1 has no option 'gamma'; there are reduction"),
        ("ce(0.1)", 4, "options are given as name=value"),
        ("ce(**{})", 4, "options are given as name=value"),
        ("focal(gamma=1, gamma=2)", 16, "'gamma' is given twice"),
        ("True*ce", 1, "a weight is a number"),
        ("'2'*ce", 1, "a weight is a number"),
        ("focal(gamma=one)", 13, "the value of 'gamma' is not a number"),
        ("ce(class_weights={1: 2})", 18, "the value of 'class_weights' is not a number"),
        ("ce(class_weights=['a'])", 19, "a list holds numbers"),
        ("ce(class_weights=[1 2])", 18, "a list is written '[0.5, 2]'"),
        ("ce(class_weights=[[1, 2]])", 19, "a list holds numbers"),
        ("ce(class_weights=[])", 18, "this list is empty; it holds a number for each class"),
        ("ce(class_weights=0.5)", 4, "class_weights is a list with a number for each class"),
        ("dice(class_weights='balanced')", 6, "class_weights is a list"),
        (f"{10**400}*ce", 1, "' is too large"),
        (f"dice(smooth={10**400})", 13, "' is too large"),
        (f"ce(ignore_index={2**63})", 17, "the number '9223372036854775808' is too large"),
        ("ghm(bins=4000000000)", 1, "ghm: bins must be 1 or more, and no more than 65536"),
        ("ce(reduction='avg')", 1, "reduction must be one of"),
    ],
)
def test_errors_point_at_the_column(spec: str, column: int, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        build_loss(spec)
    assert isinstance(caught.value, ValueError)
    assert f"column {column}:" in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "spec",
    [
        "__import__('os').mkdir('made')",
        "ce(label_smoothing=__import__('os').mkdir('made'))",
        "(lambda: ce)()",
        "[ce for ce in [1]]",
        "ce(label_smoothing=(0).__class__)",
        "f'{ce}'",
        "ce.__class__",
        "ce(label_smoothing=10**8)",
    ],
)
def test_nothing_is_evaluated(spec: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError):
        build_loss(spec)
    assert not list(tmp_path.iterdir())


def test_values_sum_to_the_total() -> None:
    x, y = sample()
    loss = build_loss("0.5*ce + dice(smooth=1) + 2*focal(mode='multiclass')", kind="segmentation")
    total = loss(x, y)
    assert list(loss.values) == ["ce", "dice", "focal"]
    assert not any(value.requires_grad for value in loss.values.values())
    torch.testing.assert_close(sum(loss.values.values()), total.detach())
    expected = (
        0.5 * cross_entropy_loss(x, y)
        + dice_loss(x, y, smooth=1)
        + 2 * sigmoid_focal_loss(x, y, mode="multiclass", reduction="mean")
    )
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(grad_of(loss, x, y), torch.autograd.grad(expected, x)[0])


def test_gradient_of_each_term() -> None:
    x, y = sample()
    terms = build_loss("0.5*ce + dice").compute(x, y)
    (ce,) = torch.autograd.grad(terms["ce"], x, retain_graph=True)
    (dice,) = torch.autograd.grad(terms["dice"], x, retain_graph=True)
    torch.testing.assert_close(ce, 0.5 * grad_of(cross_entropy_loss, x, y))
    torch.testing.assert_close(dice, grad_of(dice_loss, x, y))
    (both,) = torch.autograd.grad(sum(terms.values()), x)
    torch.testing.assert_close(both, ce + dice)


@pytest.mark.parametrize(
    ("spec", "channels", "softmax", "sigmoid"),
    [
        ("ce + dice", 3, 1, 0),
        ("ce(label_smoothing=0.1) + dice + 0.5*tversky + jaccard(per_image=True)", 3, 1, 0),
        ("ce(class_weights=[1, 2, 3]) + softmax_focal(class_weights=[1, 2, 3])", 3, 1, 0),
        ("ce(class_weights=[1, 2, 3]) + softmax_focal", 3, 2, 0),
        ("dice + ce(class_weights=[1, 2, 3], label_smoothing=0.1) + softmax_focal", 3, 2, 0),
        ("ce(ignore_index=0) + dice", 3, 2, 0),
        ("ce + dice + focal", 3, 1, 1),
        ("bce + dice + focal + focal(gamma=1) + jaccard", 1, 0, 1),
        ("bce(pos_weight=[2]) + dice", 1, 0, 1),
    ],
)
def test_terms_share_one_pass(
    spec: str, channels: int, softmax: int, sigmoid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def count(engine: Any) -> None:
        forward = engine.forward

        def counted(*args: Any) -> Any:
            calls.append(engine)
            return forward(*args)

        monkeypatch.setattr(engine, "forward", staticmethod(counted))

    count(_Softmax)
    count(_Sigmoid)
    x, y = sample()
    x = x[:, :channels]
    y = y.clamp(max=1) if channels == 1 else y
    loss = build_loss(spec, kind="segmentation")
    calls.clear()
    total = loss(x, y)
    assert (calls.count(_Softmax), calls.count(_Sigmoid)) == (softmax, sigmoid)
    alone = [
        weight * build_loss(repr(term), kind="segmentation")(x, y)
        for _, weight, term in loss.items()
    ]
    torch.testing.assert_close(total, sum(alone))


@pytest.mark.parametrize(
    "spec",
    ["ce", "dice", "ce + dice", "focal(mode='multiclass') + dice", "bce + lovasz", "combo"],
)
def test_weight_is_another_name_for_pixel_weight(spec: str) -> None:
    x, y = sample()
    weight = torch.rand(y.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    loss = build_loss(spec, kind="segmentation")
    expected = loss(x, y, pixel_weight=weight)
    assert not torch.equal(expected, loss(x, y))
    assert torch.equal(loss(x, y, weight=weight), expected)
    assert torch.equal(loss(x, y, weight=None, pixel_weight=weight), expected)
    with pytest.raises(ValueError, match="weight and pixel_weight"):
        loss(x, y, weight=weight, pixel_weight=weight)
    with pytest.raises(ValueError, match="one weight a pixel has the shape"):
        loss(x, y, weight=weight.unsqueeze(1).expand_as(x))


@pytest.mark.parametrize("spec", ["ce + dice", "bce + jaccard", "focal + tversky + dice"])
def test_options_reach_every_term(spec: str) -> None:
    """Defaults for all terms, and the weights of the pixels of this batch."""
    x, y = sample()
    if "ce + d" not in spec:
        x, y = x[:, :1], y.clamp(max=1)
    y = y.masked_fill(torch.rand(y.shape, generator=torch.Generator().manual_seed(1)) < 0.3, 255)
    weight = torch.rand(y.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    got = build_loss(spec, kind="segmentation", ignore_index=255)(x, y, pixel_weight=weight)
    options: dict[str, Any] = {"ignore_index": 255, "pixel_weight": weight}
    sigmoid: dict[str, Any] = {"mode": "binary", "ignore_index": 255, "weight": weight}
    expected = {
        "ce + dice": lambda: cross_entropy_loss(x, y, **options) + dice_loss(x, y, **options),
        "bce + jaccard": lambda: (
            binary_cross_entropy_loss(x, y, **sigmoid) + jaccard_loss(x, y, **options)
        ),
        "focal + tversky + dice": lambda: (
            sigmoid_focal_loss(x, y, reduction="mean", **sigmoid)
            + tversky_loss(x, y, **options)
            + dice_loss(x, y, **options)
        ),
    }[spec]()
    torch.testing.assert_close(got, expected)


def test_defaults() -> None:
    loss = build_loss("ce + dice(smooth=2, ignore_index=3)", smooth=1, ignore_index=255)
    ce, dice = loss.terms
    assert (ce.options["ignore_index"], dice.options["ignore_index"]) == (255, 3)
    assert dice.options["smooth"] == 2
    with pytest.raises(SpecError, match="no term of 'ce' has the option 'smooth'"):
        build_loss("ce", smooth=1)


def test_equal_names_are_numbered() -> None:
    x = torch.tensor([[0.0, 0, 2, 2]])
    y = torch.tensor([[1.0, 0, 3, 2]])
    loss = build_loss("iou + 2*iou(mode='square') + iou(mode='log')")
    total = loss(x, y)
    assert list(loss.values) == ["iou", "iou_2", "iou_3"]
    torch.testing.assert_close(total, torch.tensor(2 / 3 + 2 * 8 / 9 + 1.0986123))


def test_kinds() -> None:
    assert build_loss("bce").kind == "classification"
    assert build_loss("bce", kind="segmentation").kind == "segmentation"
    assert build_loss("bce + dice").kind == "segmentation"
    assert build_loss("giou + iou").kind == "boxes"
    assert build_loss("l1").kind == "deltas"
    assert build_loss("dfl").kind == "distribution"
    mixed = build_loss("giou + focal")
    assert mixed.kind is None
    with pytest.raises(TypeError, match="mixes kinds"):
        mixed(torch.zeros(1, 4), torch.zeros(1, 4))
    with pytest.raises(SpecError, match=r"'giou' is a loss of boxes, not of segmentation"):
        build_loss("giou", kind="segmentation")
    with pytest.raises(SpecError, match="'ce' is a loss of segmentation, not of classification"):
        build_loss("focal + ce", kind="classification")
    with pytest.raises(ValueError, match="kind must be one of"):
        build_loss("ce", kind="masks")  # type: ignore[arg-type]


def test_reduction_none_stands_alone() -> None:
    x, y = sample()
    assert build_loss("ce(reduction='none')")(x, y).shape == y.shape
    assert build_loss("bce(reduction='none')", kind="segmentation")(x, y).shape == x.shape
    with pytest.raises(SpecError, match="reduction='none' has no meaning in a sum"):
        build_loss("ce(reduction='none') + dice")


def test_ce_dice() -> None:
    x, y = sample()
    y[0, 0] = 255
    loss = CEDiceLoss(0.5, 2.0, ignore_index=255, smooth=1.0, label_smoothing=0.1)
    expected = 0.5 * cross_entropy_loss(x, y, ignore_index=255, label_smoothing=0.1)
    expected = expected + 2 * dice_loss(x, y, ignore_index=255, smooth=1.0)
    torch.testing.assert_close(loss(x, y), expected)
    torch.testing.assert_close(build_loss(repr(loss))(x, y), expected)
    with pytest.raises(TypeError, match=r"CEDiceLoss\(\) has no option 'gamma'"):
        CEDiceLoss(gamma=1)


def test_sums_pickle_and_deepcopy() -> None:
    x, y = sample()
    loss = build_loss("0.5*ce(class_weights=[1, 2, 3]) + dice(smooth=1)", ignore_index=255)
    value = loss(x, y)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert isinstance(twin, LossSum)
        assert repr(twin) == repr(loss)
        assert torch.equal(twin(x, y), value)
        assert not twin.state_dict()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("giou + focal(gamma=-1)", "column 8: focal: gamma must be a finite number"),
        ("iou(mode='x')", "iou: mode must be one of"),
        ("ce(label_smoothing='a')", "ce: label_smoothing must be in"),
        ("dice(smooth=1, absent='never')", "dice: absent must be one of"),
        ("1e999*ce", "the number '1e999' is too large"),
    ],
)
def test_a_bad_value_shows_before_the_first_step(spec, message):
    with pytest.raises(SpecError, match=message):
        build_loss(spec)


@pytest.mark.parametrize(
    "spec",
    [
        "bce(mode='binary', pos_weight=[3.0])",
        "dice(mode='multilabel', class_weights=[1.0, 2.0, 3.0])",
        "focal(mode='multiclass', alpha=[0.5, 0.25, 0.125])",
        "ce(class_weights=[1.0, 2.0], label_smoothing=0.1)",
        "bce(pos_weight=[1.0, 2.0, 3.0])",
    ],
)
def test_good_values_in_every_mode_are_accepted(spec):
    assert repr(build_loss(repr(build_loss(spec)))) == repr(build_loss(spec))


def test_combo_loss() -> None:
    """From the paper's formula, less Dice being subtracted from 1."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, 4, 5, dtype=torch.float64, generator=generator)
    y = torch.randint(0, 2, (2, 4, 5), generator=generator)
    p, t = x[:, 0].sigmoid(), y.double()
    bce = -(0.7 * t * p.log() + 0.3 * (1 - t) * (1 - p).log()).mean()
    dice = (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
    loss = ComboLoss(alpha=0.4, beta=0.7, smooth=1.0, ignore_index=255)
    torch.testing.assert_close(loss(x, y), 0.4 * bce + 0.6 * (1 - dice))
    assert repr(build_loss(repr(loss), kind="segmentation")) == repr(loss)
    for options in ({"alpha": 2}, {"beta": 1}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
            ComboLoss(**options)
    with pytest.raises(TypeError, match="no option 'gamma'"):
        ComboLoss(gamma=1)


def test_unified_focal_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=generator)
    y = torch.randint(0, 3, (2, 4, 5), generator=generator)
    p = x.softmax(1)
    of_target = p.gather(1, y.unsqueeze(1))
    focal = (-0.8 * (1 - of_target) ** 0.7 * of_target.log()).mean()
    parts = []
    for c in range(3):
        q, t = p[:, c], (y == c).double()
        tp, fn, fp = (q * t).sum(), ((1 - q) * t).sum(), (q * (1 - t)).sum()
        parts.append((1 - tp / (tp + 0.8 * fn + 0.2 * fp)) ** 0.3)
    loss = UnifiedFocalLoss(weight=0.6, delta=0.8, gamma=0.3)
    torch.testing.assert_close(loss(x, y), 0.6 * focal + 0.4 * torch.stack(parts).mean())
    assert len(loss.groups) == 1  # one pass over the logits
    for options in ({"weight": 2}, {"delta": -1}, {"gamma": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
            UnifiedFocalLoss(**options)


def test_a_sum_that_has_a_name_is_a_term_of_a_string() -> None:
    loss = build_loss("2*combo(alpha=0.4, beta=0.7, smooth=1) + ghm", ignore_index=255)
    assert loss.names == ["bce", "dice", "ghm"]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, 4, 5, generator=generator)
    y = torch.randint(0, 2, (2, 4, 5), generator=generator)
    values = build_loss("ghm", kind="segmentation")(x, y)
    values = values + 2 * ComboLoss(alpha=0.4, beta=0.7, smooth=1.0)(x, y)
    torch.testing.assert_close(build_loss(repr(loss), kind="segmentation")(x, y), values)
    for spec, message in {
        "learned*combo": "column 9: combo: a sum has a number",
        "combo(alpha=2)": "combo: alpha must be in",
        "combo(betta=1)": "did you mean 'beta'",
        "unified_focal(gamma=0)": "gamma must be positive",
        "kombo": "did you mean 'combo'",
    }.items():
        with pytest.raises(SpecError, match=message):
            build_loss(spec)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        *((cls.__name__, name) for name, cls in LOSSES.items()),
        *((cls.function.__name__, name) for name, cls in LOSSES.items()),
        *((f"{name.title()}_Loss", name) for name in LOSSES),
        ("cross_entropy", "ce"),
        ("crossentropy", "ce"),
        ("l1loss", "l1"),
        ("focal_loss", "focal"),
        ("bce_dice", "bce+dice"),
        ("BCEDiceLoss", "bce+dice"),
        ("ce_dice", "ce+dice"),
        ("dicefocal", "dice+focal"),
    ],
)
def test_what_else_a_loss_is_called_is_suggested(name: str, meant: str) -> None:
    with pytest.raises(SpecError, match=re.escape(f"no loss '{name}'; write '{meant}'") + "$"):
        build_loss(name)


@pytest.mark.parametrize("name", ["GIoU", "gioou", "giou_loss", "GIoULoss", "giou_dice"])
def test_a_name_of_another_kind_is_said_to_be_that(name: str) -> None:
    message = f"column 6: no loss '{name}'; 'giou' is a loss of boxes, not of segmentation"
    with pytest.raises(SpecError, match=message):
        build_loss(f"ce + {name}", kind="segmentation")


@pytest.mark.parametrize("spec", [["a" * 9000], "a" * 9000, f"dice(mode='{'a' * 9000}')"])
def test_messages_hold_the_beginning_of_what_is_long(spec: Any) -> None:
    with pytest.raises((SpecError, TypeError)) as caught:
        build_loss(spec)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("spec", [None, 1, b"ce", ["ce", "dice"], ("ce",), {"ce": 1}])
@pytest.mark.parametrize("read", [build_loss, lambda s: read_stages(s, ["rpn"], "X", ["rpn"])])
def test_what_is_no_str_is_a_type_error(read: Any, spec: Any) -> None:
    with pytest.raises(TypeError, match=f"a loss string is a str .*, not {type(spec).__name__}"):
        read(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("+".join(["ce"] * 3000), "there are more than 100 terms"),
        ("(" * 50_000 + "ce", "this '(' is not closed"),
        ("-" * 50_000 + "ce", "losses are added"),
        ("a" * 100_000, "no loss 'aaaa"),
        ("ce" * 50_001, "column 1: has 100002 characters; at most 100000 are read"),
        ("focal(gamma=" + "[" * 50_000, "a list holds numbers"),
        (f"focal(gamma={'9' * 90_000})", "is too large"),
        ("+".join(["cldice(iterations=1000)"] * 100), None),
        (f"ce(class_weights={[1] * 30_000})", None),
    ],
    ids=lambda value: str(value)[:30],
)
def test_long_strings_are_read_or_refused_in_a_short_line(spec: str, message: str | None) -> None:
    if message is None:
        build_loss(spec)
        return
    with pytest.raises(SpecError) as caught:
        build_loss(spec)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 1000


TOKENS = [
    *("ce", "dice", "giou", "focal", "cldice", "ghm", "combo", "learned", "ramp", "mode", "steps"),
    *("gamma", "class_weights", "ignore_index", "bins", "smooth", "None", "True", "'binary'", "'"),
    *("0", "1", "-1", "0.5", "1e999", "9" * 400, "2_0", ".", "+", "-", "*", "(", ")", "[", "]"),
    *(",", "=", ";", ":", " ", "\n", "\0", "\ud800", "\N{BLACK HEART SUIT}", "lambda", "#", "\\"),
]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(TOKENS), max_size=20).map("".join) | st.text(max_size=30))
def test_any_string_is_a_loss_or_a_spec_error(spec: str) -> None:
    for read in (build_loss, lambda s: read_stages(s, ["rpn", "mask"], "X", ["rpn"])):
        with contextlib.suppress(SpecError):
            read(spec)
