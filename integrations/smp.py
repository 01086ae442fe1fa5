"""Any losses in the models of segmentation-models-pytorch, and its own losses, leaner.

:class:`SMPAdapter` lets a model return its losses in training; the classes with SMP's names stand
in for SMP's in a pipeline that calls its own criterion, see
:mod:`detseg_losses.integrations.smp_losses` for what differs.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from detseg_losses.integrations._adapter import Losses
from detseg_losses.integrations.extras import needs
from detseg_losses.integrations.segmentation import (
    SegmentationAdapter,
    classes_of,
    read_losses,
    taken,
)
from detseg_losses.integrations.smp_losses import (
    BINARY_MODE,
    MULTICLASS_MODE,
    MULTILABEL_MODE,
    DiceLoss,
    FocalLoss,
    JaccardLoss,
    LovaszLoss,
    MCCLoss,
    SoftBCEWithLogitsLoss,
    SoftCrossEntropyLoss,
    TverskyLoss,
)
from detseg_losses.losses.sigmoid import binary_cross_entropy_loss
from detseg_losses.losses.softmax import cross_entropy_loss

with needs("smp"):
    from segmentation_models_pytorch.base.modules import Activation

__all__ = [
    "ADAPTER",
    "BINARY_MODE",
    "MULTICLASS_MODE",
    "MULTILABEL_MODE",
    "DiceLoss",
    "FocalLoss",
    "JaccardLoss",
    "LovaszLoss",
    "MCCLoss",
    "SMPAdapter",
    "SoftBCEWithLogitsLoss",
    "SoftCrossEntropyLoss",
    "TverskyLoss",
]


class SMPAdapter(SegmentationAdapter):
    """Lets a model of segmentation-models-pytorch return its losses in training, by hooks.

    In training ``model(images, masks)`` returns the weighted value of each term by name, attached
    to the graph; their sum is the loss. In evaluation, or without masks, the model returns what it
    always did, and ``model_losses(model)(output, masks)`` is the loss. The keys of the
    ``state_dict`` are unchanged.

    A model with a classification head (``aux_params``) takes the labels of the images as a third
    argument, and adds the loss of its class logits as ``"classification"``: cross entropy for
    class indices ``(B,)``, binary cross entropy for values in [0, 1] of the logits' shape, or
    ``(B,)`` for a single class. Without labels the class logits are no part of the loss, and the
    parameters of that head get no gradient.

    The model may be any whose head gives logits, before it is wrapped for several processes.

    Args:
        mode: ``"multiclass"``, ``"binary"`` or ``"multilabel"``; None: binary for a model with one
            class, else multiclass. Masks are class indices ``(B, H, W)`` or ``(B, 1, H, W)``, for
            multilabel values in [0, 1] ``(B, C, H, W)``.
        ignore_index: label of the pixels that are ignored.
        **defaults: options for every term that has them, see
            :func:`detseg_losses.build_loss`.
    """

    def fitting(self, model: Any, spec: str, **options: Any) -> Losses:
        _check_logits(model.segmentation_head, "activation=None")
        return {"": read_losses(spec, classes_of(model.segmentation_head), **options)}

    def take_targets(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        images, model._targets = _call(*args, **kwargs)
        return (images,), {}

    def give_losses(self, model: Any, args: tuple[Any, ...], output: Any) -> Any:
        masks, labels = taken(model)
        if not model.training or masks is None:
            return output
        return self.compute(model, output, masks, labels)

    def compute(
        self, model: Any, output: Any, masks: Tensor, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        logits, class_logits = output if isinstance(output, tuple) else (output, None)
        losses: dict[str, Tensor] = model.loss.compute(logits, masks)
        if labels is not None:
            if class_logits is None:
                raise ValueError("labels were given, but the model has no classification head")
            _check_logits(model.classification_head, "aux_params={'activation': None, ...}")
            losses["classification"] = _classification_loss(class_logits, labels)
            model.loss.values["classification"] = losses["classification"].detach()
        return losses


def _call(
    x: Tensor, masks: Tensor | None = None, labels: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """What the model can be called with."""
    return x, (masks, labels)


def _classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.shape[1] > 1 and labels.dim() == 1:
        return cross_entropy_loss(logits, labels)
    return binary_cross_entropy_loss(logits, labels.reshape(logits.shape))


def _check_logits(head: nn.Module, remedy: str) -> None:
    for module in head.modules():
        if isinstance(module, Activation) and not isinstance(module.activation, nn.Identity):
            raise ValueError(
                f"the head ends in {type(module.activation).__name__}, but losses are computed on "
                f"logits; build the model with {remedy}"
            )


ADAPTER = SMPAdapter()
