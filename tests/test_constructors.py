"""The constructors of modules: what they take, and that type checkers and readers are told."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typing_extensions import get_type_hints

import detseg_losses
from detseg_losses import (
    LOSSES,
    BCELoss,
    BoundaryLoss,
    CEDiceLoss,
    ComboLoss,
    DiceLoss,
    Ramp,
    SmoothL1Loss,
    UnifiedFocalLoss,
)
from detseg_losses._core.checks import OF_A_CALL
from detseg_losses._core.options import parameters, unpacked
from typed import check_types

CALLS = """
from typing import assert_type

from detseg_losses import (
    BoundaryLoss, CEDiceLoss, DiceLoss, LossSum, Ramp, SigmoidFocalLoss, SmoothL1Loss, build_loss
)

DiceLoss(per_image=True, absent="penalise", class_weights=[1, 2.5])
DiceLoss(per_imge=True)  # wrong
DiceLoss(absent="never")  # wrong
DiceLoss(True)  # wrong
SigmoidFocalLoss(gamma=Ramp(0, 2, 2), mode="binary")
SigmoidFocalLoss(gamma="2")  # wrong
SmoothL1Loss("sum", 0.5)
SmoothL1Loss("sum", beta=None)  # wrong
BoundaryLoss(spacing=[5, 1, 1])
BoundaryLoss(spaceing=1)  # wrong
CEDiceLoss(0.5, Ramp(0, 1, 5), smooth=1, label_smoothing=0.1)
CEDiceLoss(gama=2)  # wrong
Ramp(0, 2, steps="2")  # wrong
assert_type(DiceLoss(), DiceLoss)
assert_type(build_loss("dice"), LossSum)
"""


def test_type_checkers_know_the_options(tmp_path: Path) -> None:
    """mypy finds the lines that are wrong, and no others."""
    check_types(CALLS, tmp_path, Path(detseg_losses.__file__).parents[1], "strict = true")


@pytest.mark.parametrize("name", LOSSES)
def test_a_constructor_takes_what_the_function_does(name: str) -> None:
    cls = LOSSES[name]
    taken = inspect.signature(cls).parameters
    for each in parameters(cls.function)[2:]:
        if each.name in (*OF_A_CALL, *cls.extra) or each.kind is each.VAR_KEYWORD:
            assert each.name not in taken
        elif each.name == "reduction":
            assert taken["reduction"] == each.replace(default="mean")
        else:
            assert taken[each.name] == each
    passed_on = unpacked(parameters(cls.function))
    if passed_on is not None:
        types = get_type_hints(passed_on)
        assert {each: taken[each].annotation for each in types if each not in OF_A_CALL} == {
            each: types[each] for each in types if each not in OF_A_CALL
        }
    assert cls.defaults == {each.name: each.default for each in taken.values()}


@pytest.mark.parametrize("name", LOSSES)
def test_help_has_every_option(name: str) -> None:
    cls = LOSSES[name]
    text = inspect.getdoc(cls) or ""
    assert text.partition("\n")[0] == (inspect.getdoc(cls.function) or "").partition("\n")[0]
    arguments = text.partition("Args:\n")[2].partition("\n\n")[0].splitlines()
    starts = [line.split(":")[0] for line in arguments if not line.startswith(8 * " ")]
    assert starts == [f"    {option}" for option in cls.defaults]
    assert ".. math::" in text
    assert "Raises:" in text


def test_options_by_place() -> None:
    assert repr(SmoothL1Loss("sum", 0.5)) == "smooth_l1(reduction='sum', beta=0.5)"
    with pytest.raises(TypeError, match="multiple values"):
        SmoothL1Loss("sum", reduction="mean")
    with pytest.raises(TypeError, match="positional"):
        DiceLoss(1.0)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("cls", "option", "hint"),
    [
        (DiceLoss, "per_imge", "did you mean 'per_image'"),
        (DiceLoss, "Smooth", "did you mean 'smooth'"),
        (SmoothL1Loss, "zz", "there are beta, reduction"),
        (CEDiceLoss, "label_smooting", "did you mean 'label_smoothing'"),
        (UnifiedFocalLoss, "gama", "did you mean 'gamma'"),
        (DiceLoss, "pixel_weight", "it belongs to a batch"),
        (BCELoss, "weight", "it belongs to a batch"),
        (BoundaryLoss, "distance", "it belongs to a batch"),
        (ComboLoss, "pixel_weight", "it belongs to a batch"),
    ],
)
def test_an_option_that_there_is_not(cls: Any, option: str, hint: str) -> None:
    with pytest.raises(TypeError, match=rf"{cls.__name__}\(\) has no option '{option}'; {hint}"):
        cls(**{option: 1})


@pytest.mark.parametrize(
    ("cls", "decided"),
    [(CEDiceLoss, set()), (ComboLoss, {"pos_weight"}), (UnifiedFocalLoss, {"beta"})],
)
def test_a_named_sum_takes_what_its_parts_do(cls: Any, decided: set[str]) -> None:
    taken = inspect.signature(cls).parameters
    parts = {option: part for part in reversed(cls.parts) for option in part.defaults}
    own = {"ce_weight", "dice_weight", "weight", "delta", "alpha", "beta", "gamma"} & taken.keys()
    assert taken.keys() | decided == parts.keys() | own
    for option in taken.keys() - own:
        assert taken[option].annotation == parts[option].signature.parameters[option].annotation
        assert taken[option].default == parts[option].defaults[option]
        loss = cls(**{option: parts[option].defaults[option]})
        assert any(option in term.given for term in loss.terms)


def test_classes_of_ones_own() -> None:
    class Own(DiceLoss):
        def __init__(self, smoothing: float) -> None:
            super().__init__(smooth=smoothing, per_image=True)

    class Sum(ComboLoss):
        def __init__(self) -> None:
            super().__init__(0.3)

    class Same(ComboLoss):
        pass

    assert repr(Own(2)) == "dice(smooth=2, per_image=True)"
    assert [*inspect.signature(Own).parameters] == ["smoothing"]
    assert Sum().weights == ComboLoss(0.3).weights
    assert inspect.signature(Same) == inspect.signature(ComboLoss)
    assert "smooth" in inspect.signature(DiceLoss).parameters


def test_a_ramp_is_no_number_where_it_runs() -> None:
    """To type checkers alone it is one."""
    ramp: Any = Ramp(0, 1, 2)
    assert not isinstance(ramp, float)
    with pytest.raises(ValueError, match="smooth must be a finite number"):
        detseg_losses.dice_loss(torch.zeros(1, 2, 3), torch.zeros(1, 3).long(), smooth=ramp)


def test_no_function_shadows_a_module() -> None:
    """``import detseg_losses.x`` gives the module of each x.py."""
    for found in pkgutil.walk_packages(detseg_losses.__path__, "detseg_losses."):
        name, package = found.name.rpartition(".")[2], found.name.rpartition(".")[0]
        parent = importlib.import_module(package)
        assert name not in getattr(parent, "__all__", ())
        if package != "detseg_losses.integrations":  # they import what may not be there
            module = importlib.import_module(found.name)
            assert getattr(parent, name) is module
