"""Adapters to other libraries and readers of data formats; each file needs one third party only."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any, TypeVar

from torch import nn

ADAPTERS = {
    "torchvision.models.detection.faster_rcnn.FasterRCNN": "torchvision_rcnn",
    "torchvision.models.detection.retinanet.RetinaNet": "torchvision_retinanet",
    "torchvision.models.detection.fcos.FCOS": "torchvision_fcos",
    "torchvision.models.detection.ssd.SSD": "torchvision_ssd",
    "segmentation_models_pytorch.base.model.SegmentationModel": "smp",
}
"""The file that adapts each model class, and what is derived from it."""

Model = TypeVar("Model", bound=nn.Module)


def use_losses(model: Model, spec: str, **options: Any) -> Model:
    """Let a model train with the losses that a string names, in place.

    Args:
        model: a model that one of the adapters knows.
        spec: a loss string, for example ``"giou+focal"`` or ``"0.5*ce + dice"``.
        **options: those of ``use_losses`` in the adapter's module.

    Returns:
        The model. In training it returns a dictionary of losses; its ``state_dict`` keeps its
        keys, and :func:`restore_losses` undoes the change.

    Raises:
        TypeError: where no adapter knows the model.
        SpecError: on a string that cannot be read, or a loss that the model has no use for.
    """
    return _adapter(model).use_losses(model, spec, **options)


def restore_losses(model: Model) -> Model:
    """Undo :func:`use_losses`, in place; the model is as it came."""
    return _adapter(model).restore_losses(model)


def _adapter(model: nn.Module) -> ModuleType:
    for cls in type(model).__mro__:
        name = ADAPTERS.get(f"{cls.__module__}.{cls.__qualname__}")
        if name is not None:
            return import_module(f"{__name__}.{name}")
    known = ", ".join(sorted(ADAPTERS))
    raise TypeError(f"no adapter for {type(model).__name__}; there are adapters for {known}")
