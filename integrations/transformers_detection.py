"""Any losses in the detectors of transformers that are of DETR's kind.

The criteria of all of them compute each entry of the loss dictionary in ``get_loss``, for the last
layer, the auxiliary outputs and the denoising queries alike. That is where other losses come in:
matching, normalisation and all else stay the model's own.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from detseg_losses._core.blocks import compute_dtype
from detseg_losses._core.module import Loss
from detseg_losses.integrations._adapter import Adapter, Losses
from detseg_losses.integrations.detection import (
    Roles,
    check_class_labels,
    compare,
    detached,
    read_losses,
    terms_of,
    total,
    with_objects,
)
from detseg_losses.integrations.extras import needs
from detseg_losses.losses.boxes import iou_loss
from detseg_losses.losses.sigmoid import QualityFocalLoss, VarifocalLoss
from detseg_losses.spec import LossSum

with needs("transformers"):
    from transformers import PreTrainedModel
    from transformers.loss.loss_utils import LOSS_MAPPING

CLASS_ENTRIES = {
    "ImageLoss": "loss_ce",
    "DeformableDetrImageLoss": "loss_ce",
    "LwDetrImageLoss": "loss_ce",
    "RTDetrLoss": "loss_vfl",
    "DFineLoss": "loss_vfl",
    "Deimv2Loss": "loss_mal",
}
"""The criteria, and what each calls its loss of classes."""

SOFTMAX = "ImageLoss"
"""The criterion whose classes exclude each other; the others have independent sigmoids."""

ENTRIES = {
    "labels": ("loss_ce",),
    "vfl": ("loss_vfl",),
    "mal": ("loss_mal",),
    "boxes": ("loss_bbox", "loss_giou"),
}
"""The entries of the loss dictionary that each request to ``get_loss`` is for."""

COEFFICIENTS = {
    "loss_ce": ("class_loss_coefficient",),
    "loss_vfl": ("weight_loss_vfl",),
    "loss_mal": ("weight_loss_mal",),
    "loss_bbox": ("bbox_loss_coefficient", "weight_loss_bbox"),
    "loss_giou": ("giou_loss_coefficient", "weight_loss_giou"),
}
"""What configurations call the weight of each entry."""


class DetrAdapter(Adapter):
    """Lets a DETR, or a detector of its kind, train with other losses: a :class:`LossFunction`
    becomes ``model.loss_function``, which transformers' models call.

    Terms go by their kind, and each replaces one entry of the loss dictionary: those of classes
    ``loss_ce`` (or ``loss_vfl``, ``loss_mal``), terms on offsets ``loss_bbox`` (on normalised
    centre, width and height), box terms ``loss_giou`` (on normalised corners), in the last layer,
    the auxiliary outputs and the denoising queries alike. The weights of the string are the
    weights: the coefficients of ``model.config`` count for the entries without a term alone, which
    keep the model's own loss, with a warning. So ``"ce + 5*l1 + 2*giou"`` is what DETR does by
    default.

    DETR, YOLOS and Table Transformer have a softmax with "no object" as the last class, which
    ``eos_coefficient`` weighs: there ``focal`` is taken as ``softmax_focal`` and ``bce`` as ``ce``,
    and the other way round where classes are sigmoids. There ``varifocal`` and ``quality_focal``
    learn the IoU of the box.

    The model calls as before, and returns ``loss`` and ``loss_dict`` with the same keys. The keys
    of its ``state_dict``, and so of a saved checkpoint, are unchanged. The values of the terms are
    summed over all outputs of a step.
    """

    mechanism = "callable"

    def read(self, cls: type, spec: str) -> Losses:
        names = " ".join(each.__name__ for each in cls.__mro__)
        found = re.search("|".join(LOSS_MAPPING), names)  # as a model itself finds it
        if found is None:
            raise TypeError(f"transformers has no loss for {cls.__name__}")
        roles, softmax = _roles(found.group())
        return {"": read_losses(spec, cls.__name__, roles, "batch", softmax=softmax)}

    def fitting(self, model: Any, spec: str) -> Losses:
        roles, softmax = _roles(model.loss_type)
        loss = read_losses(spec, type(model).__name__, roles, "batch", softmax=softmax)
        loss.check_classes(model.config.num_labels + softmax)
        return {"": loss}

    def inject(self, model: Any, losses: Losses) -> None:
        # A submodule: it follows the model to its device, and an optimizer finds its weights.
        model.detseg_losses = losses[""]
        roles, _ = _roles(model.loss_type)
        model.loss_function = function = LossFunction(losses[""], model, roles)
        function.hook = model.register_forward_pre_hook(_check_labels, with_kwargs=True)

    def restore(self, model: Any) -> None:
        function = vars(model).get("_loss_function")
        if isinstance(function, LossFunction):
            function.hook.remove()
            del model.detseg_losses, model._loss_function
            if function.before is not None:
                model.loss_function = function.before

    def losses(self, model: Any) -> Losses:
        function = vars(model).get("_loss_function")
        return {"": function.loss} if isinstance(function, LossFunction) else {}


def _roles(loss_type: str) -> tuple[Roles, bool]:
    """Which kinds of terms serve each entry; and whether the classes exclude each other."""
    name, _ = _criterion(LOSS_MAPPING[loss_type])
    softmax = name == SOFTMAX
    roles: Roles = {
        CLASS_ENTRIES[name]: ("segmentation",) if softmax else ("classification",),
        "loss_bbox": ("deltas",),
        "loss_giou": ("boxes",),
    }
    return roles, softmax


def _check_labels(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before the denoising of some models looks labels up, where torch would give no reason."""
    call = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    labels = call.get("labels") or ()
    check_class_labels([each["class_labels"] for each in labels], model.config.num_labels)


class LossFunction:
    """Stands in for a model's ``loss_function``.

    No module, for a model would register one as a submodule and go on with its own function.

    Args:
        loss: what to compute.
        model: the model, whose attributes still hold the function that a user may have set.
        roles: the kinds of terms that serve each entry.
    """

    def __init__(self, loss: LossSum, model: PreTrainedModel, roles: Roles) -> None:
        self.loss = loss
        self.loss_type = model.loss_type
        self.roles = roles
        self.before = vars(model).get("_loss_function")
        self.hook: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor], Any]:
        """What the model's own function returns, with other losses.

        Raises:
            ValueError: on a label out of range, on the CPU.
        """
        stock = LOSS_MAPPING[self.loss_type]
        call = inspect.signature(stock).bind(*args, **kwargs)
        config = call.arguments["config"]
        labels = [target["class_labels"] for target in call.arguments["labels"]]
        check_class_labels(labels, config.num_labels)
        call.arguments["config"] = self._without_weights(config)
        self.loss.record({})
        return self._with_terms(stock, config)(*call.args, **call.kwargs)

    def _without_weights(self, config: Any) -> Any:
        """A configuration whose weights of the entries that have terms are 1."""
        config = copy.copy(config)
        for entry, kinds in self.roles.items():
            if terms_of(self.loss, kinds):
                # Past the checks of its setter, which wants 1 of some and 1.0 of others.
                vars(config).update(dict.fromkeys(COEFFICIENTS[entry], 1))
        return config

    def _with_terms(self, stock: Any, config: Any) -> Callable[..., Any]:
        """The model's own function, which now makes a criterion that computes other losses.

        Which outputs the criterion gets is so left to the version of transformers.
        """
        name, criterion = _criterion(stock)

        def make(*args: Any, **kwargs: Any) -> nn.Module:
            made = criterion(*args, **kwargs)
            made.get_loss = partial(self._get_loss, made, made.get_loss, config)
            return made

        return looking_up(stock, {name: make})

    def _get_loss(
        self,
        criterion: Any,
        stock: Callable[..., dict[str, Tensor]],
        config: Any,
        request: str,
        outputs: dict[str, Any],
        targets: list[dict[str, Tensor]],
        indices: list[tuple[Tensor, Tensor]],
        num_boxes: float,
    ) -> dict[str, Tensor]:
        """The entries of one request: of our terms where there are any, else the model's own.

        Args:
            criterion: the model's.
            stock: its method of this name.
            config: that of the model, with its weights of the entries.
            request: what to compute, ``"boxes"`` for example.
            outputs: of one layer, ``logits`` ``(B, Q, K)`` and ``pred_boxes`` ``(B, Q, 4)``.
            targets: of each image ``class_labels`` ``(G,)`` and ``boxes`` ``(G, 4)``.
            indices: of each image which queries have an object, and which one.
            num_boxes: what sums over the queries are divided by.
        """
        entries = ENTRIES.get(request, ())
        terms = {entry: terms_of(self.loss, self.roles[entry]) for entry in entries}
        losses = {}
        if not all(terms.values()) or not entries:
            losses = stock(request, outputs, targets, indices, num_boxes)
        if any(terms.values()):
            layer = Layer(criterion, outputs, targets, indices, num_boxes)
            for entry in filter(terms.get, entries):
                values = {n: self.loss.weighted(n, layer.value(term)) for n, term in terms[entry]}
                losses[entry] = total(values)
                for name, value in detached(values).items():
                    self.loss.values[name] = self.loss.values.get(name, 0) + value
                if with_objects(targets):
                    own = partial(stock, request, outputs, targets, indices, num_boxes)
                    weight = _coefficient(config, entry)
                    compare(self.loss, entry, values, lambda: own()[entry] * weight)  # noqa: B023
        return losses


def _coefficient(config: Any, entry: str) -> float:
    """The weight that a configuration has for an entry."""
    return next((getattr(config, n) for n in COEFFICIENTS[entry] if hasattr(config, n)), 1.0)


class Layer:
    """What one layer predicts, and the objects that its queries are matched to.

    Args:
        criterion: the model's.
        outputs: ``logits`` ``(B, Q, K)`` and ``pred_boxes`` ``(B, Q, 4)``.
        targets: of each image ``class_labels`` ``(G,)`` and ``boxes`` ``(G, 4)``.
        indices: of each image which queries have an object, and which one.
        num_boxes: what sums over the queries are divided by.
    """

    def __init__(
        self,
        criterion: Any,
        outputs: dict[str, Any],
        targets: list[dict[str, Tensor]],
        indices: list[tuple[Tensor, Tensor]],
        num_boxes: float,
    ) -> None:
        self.criterion = criterion
        self.num_boxes = num_boxes
        self.logits: Tensor = outputs["logits"]
        self.match = criterion._get_source_permutation_idx(indices)
        boxes = outputs["pred_boxes"][self.match]
        self.boxes = boxes.to(compute_dtype(boxes.dtype))
        self.true_boxes, self.true_labels = (
            torch.cat([t[key][chosen] for t, (_, chosen) in zip(targets, indices, strict=True)])
            for key in ("boxes", "class_labels")
        )

    def value(self, term: Loss) -> Tensor:
        """A term's value over all queries."""
        if "deltas" in term.kinds:
            return term(self.boxes, self.true_boxes, reduction="sum") / self.num_boxes
        if "boxes" in term.kinds:
            boxes, true_boxes = corners(self.boxes), corners(self.true_boxes)
            return term(boxes, true_boxes, reduction="sum") / self.num_boxes
        if isinstance(term, (QualityFocalLoss, VarifocalLoss)):
            return term(self.logits, self.qualities(), reduction="sum") / self.num_boxes
        if "classification" in term.kinds:
            return term(self.logits, self.labels(-1), reduction="sum") / self.num_boxes
        labels = self.labels(self.criterion.num_classes)
        weight = self.criterion.empty_weight[labels]
        return term(self.logits.transpose(1, 2), labels, pixel_weight=weight)

    def labels(self, nothing: int) -> Tensor:
        """The class of the object that each query has, ``(B, Q)``."""
        labels = torch.full_like(self.logits[..., 0], nothing, dtype=torch.int64)
        labels[self.match] = self.true_labels
        return labels

    def qualities(self) -> Tensor:
        """The IoU of each query's box for the class of its object, 0 for others, ``(B, Q, K)``."""
        iou = 1 - iou_loss(corners(self.boxes.detach()), corners(self.true_boxes))
        qualities = self.logits.new_zeros(self.logits.shape, dtype=iou.dtype)
        # A disjoint box does not make a background of the object.
        qualities[(*self.match, self.true_labels)] = iou.clamp(min=torch.finfo(iou.dtype).tiny)
        return qualities


def corners(boxes: Tensor) -> Tensor:
    """Boxes ``(*, 4)`` as ``x1, y1, x2, y2``, from centre, width and height."""
    centre, size = boxes.chunk(2, -1)
    return torch.cat((centre - size / 2, centre + size / 2), -1)


def looking_up(function: Any, names: dict[str, Any]) -> Callable[..., Any]:
    """A copy of a function that finds other objects under global names of its module.

    The function and its module stay as they are, for all others who use them.

    Raises:
        AttributeError: where the function has no use for one of the names.
    """
    if unknown := names.keys() - set(function.__code__.co_names):
        raise AttributeError(f"{function.__qualname__} does not use {', '.join(unknown)}")
    return FunctionType(
        function.__code__, function.__globals__ | names, function.__name__, function.__defaults__
    )


def _criterion(function: Any) -> tuple[str, Any]:
    """The class that one of transformers' loss functions computes with, and its name there."""
    for name in function.__code__.co_names:
        if name in CLASS_ENTRIES:
            return name, function.__globals__[name]
    raise TypeError(f"{function.__name__} has none of the criteria {', '.join(CLASS_ENTRIES)}")


ADAPTER = DetrAdapter()
