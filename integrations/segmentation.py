"""What the adapters of segmentation models share: a criterion that fits, and its hooks."""

from __future__ import annotations

import functools
import operator
from abc import abstractmethod
from typing import Any

from torch import Tensor, nn

from detseg_losses._core.batch import Mode
from detseg_losses.integrations._adapter import Adapter, Losses
from detseg_losses.losses.softmax import PixelLoss
from detseg_losses.spec import LossSum, SpecError, build_loss

AUXILIARY = "aux"
"""What the loss of the auxiliary logits is called, beside the terms of the others."""


def read_losses(
    spec: str,
    classes: int | None,
    *,
    mode: Mode | None = None,
    ignore_index: int | None = None,
    **defaults: Any,
) -> LossSum:
    """Make the losses of a model, and say at once which have no meaning for it.

    Args:
        spec: a loss string of segmentation losses.
        classes: how many channels the logits of the model have; None where that is unknown.
        mode: None: binary for one class, else multiclass.
        ignore_index: label of the pixels that are ignored.
        **defaults: options for every term that has them.

    Raises:
        SpecError: on a string that cannot be read, that does not fit the model or the mode, or that
            has another ``ignore_index``.
    """
    loss = build_loss(spec, kind="segmentation", mode=mode, ignore_index=ignore_index, **defaults)
    if classes is not None:
        loss.check_classes(classes)
    for name, _, term in loss.items():
        options = term.options
        if ignore_index is not None and options["ignore_index"] != ignore_index:
            raise SpecError(
                f"{name!r}: ignore_index={options['ignore_index']} in the string, but the masks "
                f"have {ignore_index} where they are ignored; remove it from the string"
            )
        mode = options["mode"] or {None: None, 1: "binary"}.get(classes, "multiclass")
        if isinstance(term, PixelLoss) and mode in ("binary", "multilabel"):
            model = "" if classes is None else f" (the model has {classes} class(es))"
            raise SpecError(
                f"{name!r} is a loss of classes that exclude each other, and has no meaning for "
                f"{mode} masks{model}; use 'bce' or 'focal'"
            )
        if (mode == "multiclass" and classes == 1) or (mode == "binary" and (classes or 1) > 1):
            raise SpecError(
                f"{name!r}: mode={mode!r} does not fit a model with {classes} class(es)"
            )
        if options["reduction"] == "none":
            raise SpecError(f"{name!r}: a model trains on one number; leave reduction='none' out")
    return loss


def classes_of(head: nn.Module) -> int:
    """How many classes a head has whose last convolution gives the logits."""
    return [m for m in head.modules() if isinstance(m, nn.Conv2d)][-1].out_channels


class SegmentationAdapter(Adapter):
    """Lets a model compute losses from masks, which it is given beside the images.

    ``model.loss`` is the criterion. A hook before the forward pass takes the masks, one after it
    returns the losses. The hooks are methods of an adapter without state, and so are copied and
    pickled with the model.
    """

    mechanism = "hooks"

    def read(
        self,
        cls: type,
        spec: str,
        *,
        mode: Mode | None = None,
        ignore_index: int | None = None,
        **defaults: Any,
    ) -> Losses:
        return {"": read_losses(spec, None, mode=mode, ignore_index=ignore_index, **defaults)}

    def inject(self, model: Any, losses: Losses, **options: Any) -> None:
        model.loss = losses[""]
        model._targets = None
        model._loss_hooks = (
            model.register_forward_pre_hook(self.take_targets, with_kwargs=True),
            model.register_forward_hook(self.give_losses),
        )

    def restore(self, model: Any) -> None:
        if self.losses(model):
            for handle in model._loss_hooks:
                handle.remove()
            del model.loss, model._targets, model._loss_hooks

    def losses(self, model: Any) -> Losses:
        return {"": model.loss} if hasattr(model, "_loss_hooks") else {}

    @abstractmethod
    def take_targets(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before the forward pass: take the masks out of a call, and leave ``model._targets``."""

    @abstractmethod
    def give_losses(self, model: Any, args: tuple[Any, ...], output: Any) -> Any:
        """After the forward pass: what the model is to return instead."""


def taken(model: Any) -> Any:
    """What the hook before the forward pass left; it is kept no longer than that."""
    targets, model._targets = model._targets, None
    return targets


def losses_of(
    loss: LossSum, logits: Tensor, auxiliary: Tensor | None, masks: Tensor, aux_weight: float
) -> dict[str, Tensor]:
    """The weighted value of each term, and those of the auxiliary logits as one, ``"aux"``.

    Args:
        loss: the criterion; its ``values`` are those that are returned, detached.
        logits: ``(B, C, H, W)``.
        auxiliary: logits of an auxiliary head, ``(B, C, H, W)``, if there are any.
        masks: the truth, as the mode of the losses has it.
        aux_weight: what the sum of the terms of the auxiliary logits is multiplied by.
    """
    if auxiliary is None:
        return loss.compute(logits, masks)
    terms = loss.compute(auxiliary, masks)
    aux = aux_weight * functools.reduce(operator.add, terms.values())
    losses = loss.compute(logits, masks) | {AUXILIARY: aux}
    loss.values[AUXILIARY] = aux.detach()
    return losses
