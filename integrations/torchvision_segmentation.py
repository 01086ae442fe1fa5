"""Any losses in torchvision's segmentation models: FCN, DeepLabV3 and LRASPP."""

from __future__ import annotations

from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from detseg_losses._core.batch import Mode
from detseg_losses.integrations.extras import needs
from detseg_losses.integrations.segmentation import (
    attach,
    classes_of,
    detach,
    losses_of,
    read,  # noqa: F401
    read_losses,
    taken,
)
from detseg_losses.spec import SpecError

with needs("torchvision"):
    from torchvision.models.segmentation import FCN, LRASPP, DeepLabV3

Model = TypeVar("Model", FCN, DeepLabV3, LRASPP)


def use_losses(
    model: Model,
    spec: str,
    *,
    aux_weight: float = 0.5,
    ignore_index: int | None = None,
    mode: Mode | None = None,
    **defaults: Any,
) -> Model:
    """Let a segmentation model return its losses in training, in place.

    In training ``model(images, masks)`` returns the weighted value of each term by name, attached
    to the graph; their sum is the loss. A model with an auxiliary classifier adds the sum of the
    same terms on its logits, times ``aux_weight``, as ``"aux"``. In evaluation, or without masks,
    the model returns its dictionary of logits, as it always did. ``model.loss`` is the criterion,
    ``model.loss.values`` holds the values, detached. The keys of the ``state_dict`` are unchanged.

    Args:
        model: an FCN, DeepLabV3 or LRASPP, before it is wrapped for several processes.
        spec: a loss string of segmentation losses, for example ``"ce + 0.5*dice"``.
        aux_weight: weight of the loss of the auxiliary logits; torchvision's reference script
            trains with 0.5.
        ignore_index: label of the pixels that are left out; 255 in that script.
        mode: ``"multiclass"``, ``"binary"`` or ``"multilabel"``; None: binary for a model with one
            class, else multiclass. Masks are class indices ``(B, H, W)`` or ``(B, 1, H, W)``, for
            multilabel values in [0, 1] ``(B, C, H, W)``.
        **defaults: options for every term that has them, see
            :func:`detseg_losses.build_loss`.

    Returns:
        The model.

    Raises:
        SpecError: on a string that cannot be read, or that does not fit the model or the mode, and
            where the auxiliary classifier has another number of classes.
    """
    classes = classes_of(model.classifier)
    loss = read_losses(spec, classes, mode=mode, ignore_index=ignore_index, **defaults)
    auxiliary = getattr(model, "aux_classifier", None)
    if auxiliary is not None and classes_of(auxiliary) != classes:
        raise SpecError(
            f"the classifier has {classes} class(es) and aux_classifier {classes_of(auxiliary)}; "
            "replace both, or set model.aux_classifier = None"
        )
    attach(model, loss, _take_masks, partial(_give_losses, aux_weight=aux_weight))
    return model


def restore_losses(model: Model) -> Model:
    """Undo :func:`use_losses`, in place."""
    detach(model)
    return model


def _take_masks(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    model._targets = kwargs.pop("masks", None)
    if len(args) > 1:
        args, model._targets = (args[0], *args[2:]), args[1]
    return args, kwargs


def _give_losses(model: Any, args: Any, output: dict[str, Tensor], *, aux_weight: float) -> Any:
    masks = taken(model)
    if not model.training or masks is None:
        return output
    return losses_of(model.loss, output["out"], output.get("aux"), masks, aux_weight)
