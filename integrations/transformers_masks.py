"""Any losses in MaskFormer and Mask2Former of transformers.

Their criterion is a module of the model. It gets a class that asks other losses for the values;
matching, the points at which masks are compared, and normalisation stay its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from detseg_losses._core.module import Loss
from detseg_losses.integrations._adapter import Adapter, Losses, Swapped
from detseg_losses.integrations.detection import (
    FIXED,
    check_class_labels,
    compare,
    detached,
    total,
    within_0_and_1,
)
from detseg_losses.integrations.extras import needs
from detseg_losses.integrations.transformers_detection import looking_up
from detseg_losses.losses.regions import RegionLoss
from detseg_losses.losses.sigmoid import SigmoidLoss
from detseg_losses.losses.softmax import PixelLoss
from detseg_losses.spec import LossSum, SpecError, build_loss, warn

with needs("transformers"):
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss
    from transformers.models.maskformer.modeling_maskformer import MaskFormerLoss

Values = Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]

ENTRIES: dict[str, type[Loss]] = {
    "loss_cross_entropy": PixelLoss,
    "loss_mask": SigmoidLoss,
    "loss_dice": RegionLoss,
}
"""The entries of the loss dictionary, and which losses serve each."""


class Terms(Swapped):
    """What the criterion of an adapted model does otherwise."""

    added = ("terms", "weights")

    terms: LossSum
    weights: dict[str, float]
    """Those of the entries, as the model had them."""
    pixel_loss: str
    """What the criterion calls its function of the masks' pixels."""
    empty_weight: Tensor
    num_labels: int
    _get_predictions_permutation_indices: Any

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        # Not in forward, which calls itself for each further layer.
        call = inspect.signature(self.forward).bind(*args, **kwargs)
        check_class_labels(call.arguments["class_labels"], self.num_labels)
        self.terms.record({})
        return super().__call__(*args, **kwargs)

    def loss_labels(
        self, class_queries_logits: Tensor, class_labels: list[Tensor], indices: Any
    ) -> dict[str, Tensor]:
        """The loss of the classes of all queries, a mean.

        Args:
            class_queries_logits: ``(B, Q, K + 1)``, the last for "no object".
            class_labels: of each image ``(G,)``.
            indices: of each image which queries have an object, and which one.
        """
        library: Any = super()
        own = partial(library.loss_labels, class_queries_logits, class_labels, indices)
        if not _terms(self.terms, PixelLoss):
            return own()
        labels = torch.full_like(class_queries_logits[..., 0], self.num_labels, dtype=torch.int64)
        labels[self._get_predictions_permutation_indices(indices)] = torch.cat(
            [found[chosen] for found, (_, chosen) in zip(class_labels, indices, strict=True)]
        )
        logits, weight = class_queries_logits.transpose(1, 2), self.empty_weight[labels]
        values = {
            name: self.terms.weighted(name, term(logits, labels, pixel_weight=weight))
            for name, term in _terms(self.terms, PixelLoss)
        }

        has_objects = any(len(found) for found in class_labels)
        entry = "loss_cross_entropy"
        return {entry: self._total(entry, values, (lambda: own()[entry]) if has_objects else None)}

    def loss_masks(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The losses of the matched masks, at the points that the criterion takes."""
        library: Any = super()
        stock = library.loss_masks
        names: dict[str, Any] = {}
        if _terms(self.terms, SigmoidLoss):
            names[self.pixel_loss] = partial(
                self._compare, "loss_mask", self._pixels, stock.__globals__[self.pixel_loss]
            )
        if _terms(self.terms, RegionLoss):
            names["dice_loss"] = partial(
                self._compare, "loss_dice", self._regions, stock.__globals__["dice_loss"]
            )
        return looking_up(stock, names)(self, *args, **kwargs)

    def _compare(
        self, entry: str, ours: Values, stock: Any, logits: Tensor, masks: Tensor, num_masks: Tensor
    ) -> Tensor:
        """The terms of masks ``(N, P)``, which were resampled, as of images of one class."""
        masks = within_0_and_1(masks)
        values = ours(logits.unsqueeze(1), masks.unsqueeze(1), num_masks)
        own = partial(stock, logits.detach(), masks, num_masks) if len(masks) else None
        return self._total(entry, values, own)

    def _pixels(self, logits: Tensor, masks: Tensor, num_masks: Tensor) -> dict[str, Tensor]:
        """The mean over the points of each mask ``(N, 1, P)``, their sum over their number."""
        values = {}
        for name, term in _terms(self.terms, SigmoidLoss):
            each = term(logits, masks, mode="binary", reduction="sum")
            values[name] = self.terms.weighted(name, each / (logits.shape[2] * num_masks))
        return values

    def _regions(self, logits: Tensor, masks: Tensor, num_masks: Tensor) -> dict[str, Tensor]:
        """The loss of each mask ``(N, 1, P)``, their sum over their number."""
        options: dict[str, Any] = {"mode": "binary", "per_image": True, "reduction": "none"}
        values = {}
        for name, term in _terms(self.terms, RegionLoss):
            each = term(logits, masks, **options)
            values[name] = self.terms.weighted(name, each.sum() / num_masks)
        return values

    def _total(
        self, entry: str, values: dict[str, Tensor], stock: Callable[[], Tensor] | None
    ) -> Tensor:
        """The sum of the terms of an entry, noted; and compared with the stock loss, if there is
        one.
        """
        for name, value in detached(values).items():
            self.terms.values[name] = self.terms.values.get(name, 0) + value
        if stock is not None:
            weight = self.weights[entry]
            compare(self.terms, entry, values, lambda: stock() * weight)
        return total(values)


class MaskFormerTerms(Terms, MaskFormerLoss):
    """MaskFormer's criterion with other losses."""

    own = MaskFormerLoss
    pixel_loss = "sigmoid_focal_loss"


class Mask2FormerTerms(Terms, Mask2FormerLoss):
    """Mask2Former's criterion with other losses."""

    own = Mask2FormerLoss
    pixel_loss = "sigmoid_cross_entropy_loss"


CRITERIA: tuple[type[Terms], ...] = (MaskFormerTerms, Mask2FormerTerms)


class MaskFormerAdapter(Adapter):
    """Lets a MaskFormer or Mask2Former train with other losses: its criterion becomes
    :class:`MaskFormerTerms` or :class:`Mask2FormerTerms`.

    Losses of classes that exclude each other (``ce``, ``softmax_focal``) replace that of the
    classes of the queries, those of independent sigmoids (``bce``, ``focal``) the pixel loss of the
    masks, region losses (``dice``, ``tversky``) the Dice loss of the masks, in all layers that have
    losses. The weights of the string are the weights: those of ``model.config`` count only for the
    entries without a term, which keep the model's own loss, with a warning. So
    ``"2*ce + 5*bce + 5*dice(smooth=1)"`` is what Mask2Former does by default, and
    ``"ce + 20*focal + dice(smooth=1)"`` what MaskFormer does.

    The keys of the ``state_dict``, and so of a saved checkpoint, are unchanged. The values of the
    terms are summed over the layers of a step. Weights of classes are one for each class and one
    for "no object".
    """

    mechanism = "class"

    def read(self, cls: type, spec: str) -> Losses:
        loss, owner = build_loss(spec), cls.__name__
        families = tuple(ENTRIES.values())
        for name, _, term in loss.items():
            if not isinstance(term, families) or term.of_batch:
                raise SpecError(
                    f"{owner} has no use for {name!r}, it has for losses such as ce, "
                    "softmax_focal, bce, focal, dice, tversky"
                )
            if fixed := [option for option in FIXED if option in term.given]:
                raise SpecError(f"{name!r}: {owner} itself decides {fixed[0]!r}")
        for entry, family in ENTRIES.items():
            if not _terms(loss, family):
                warn(f"{spec!r} has no loss for {entry!r}: it stays as it is")
        return {"": loss}

    def fitting(self, model: Any, spec: str, **options: Any) -> Losses:
        losses = self.read(type(model), spec, **options)
        for _, _, term in losses[""].items():
            classes = model.config.num_labels + 1 if isinstance(term, PixelLoss) else 1
            LossSum([(1.0, term)]).check_classes(classes)
        return losses

    def inject(self, model: Any, losses: Losses) -> None:
        criterion, loss, weights = model.criterion, losses[""], model.weight_dict
        (ours,) = (each for each in CRITERIA if each.own is type(criterion))
        ours.swap(criterion, loss, weights)
        # The model multiplies what the criterion returns by these.
        model.weight_dict = {
            entry: 1.0 if _terms(loss, ENTRIES[entry]) else weight
            for entry, weight in weights.items()
        }

    def restore(self, model: Any) -> None:
        criterion = model.criterion
        if isinstance(criterion, Terms):
            model.weight_dict = criterion.weights
            criterion.swap_back(criterion)

    def losses(self, model: Any) -> Losses:
        criterion = model.criterion
        return {"": criterion.terms} if isinstance(criterion, Terms) else {}


def _terms(loss: LossSum, family: type[Loss]) -> list[tuple[str, Loss]]:
    return [(name, term) for name, _, term in loss.items() if isinstance(term, family)]


ADAPTER = MaskFormerAdapter()
