"""Bring logits, targets and weights of every layout into one, and check them, once for all losses.

Segmentation models give logits ``(B, C, *)``, detection heads ``(*, K)`` with the classes last.
Both engines see ``(B, C, P)``: images, classes, and places (pixels or anchors), as views in
whatever memory order the logits have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from detseg_losses._core.blocks import compute_dtype
from detseg_losses._core.checks import Mode as Mode
from detseg_losses._core.checks import (
    check_choice,
    check_constant,
    check_tensors,
    check_weight,
    read_target,
)


@dataclass
class Batch:
    """One batch in the layout of the engines.

    Attributes:
        logits: ``(B, C, P)``.
        target: class indices ``(B, P)``, or values in [0, 1] ``(B, C, P)``.
        weight: factor of each place ``(B, 1, P)`` or entry ``(B, C, P)``, bool or floating; None
            where everything counts. What has weight 0 is left out.
        shape: the shape that the logits came in.
        mode: how a segmentation model's channels are read; None in a detection head.
        scale: a further factor of each image, ``(B, 1)``, which sums are multiplied with, not each
            value; None where images count alike.
    """

    logits: Tensor
    target: Tensor
    weight: Tensor | None
    shape: torch.Size
    mode: Mode | None = None
    scale: Tensor | None = None

    @property
    def dense(self) -> bool:
        """Whether the target is values, not class indices."""
        return self.target.dim() == 3

    @property
    def dtype(self) -> torch.dtype:
        """What losses are computed in."""
        return compute_dtype(self.logits.dtype)

    def valid(self) -> Tensor:
        """The weight of what counts, ``(B, C)``."""
        batch, classes, places = self.logits.shape
        if self.weight is None:
            counts = self.logits.new_full((batch, classes), places, dtype=self.dtype)
        else:
            counts = self.weight.sum(-1, dtype=self.dtype).expand(-1, classes)
        return counts if self.scale is None else counts * self.scale

    def labels(self) -> Tensor:
        """Class indices ``(B, P)``; what is left out counts towards class 0, with weight 0."""
        left_out = None if self.weight is None else self.weight == 0
        return _labels(self.target, left_out, 0)

    def masks(self) -> Tensor:
        """Whether each pixel is of each class, ``(B, C, P)``; dense targets are rounded, and what
        is left out is of none.
        """
        if self.dense:
            masks = self.target > 0.5
        else:
            classes = torch.arange(self.logits.shape[1], device=self.logits.device)
            masks = self.labels().unsqueeze(1) == classes.unsqueeze(1)
        return masks if self.weight is None else masks & (self.weight != 0)

    def guarded(self) -> Tensor:
        """Logits in the dtype of the computation, 0 where ignored: there they may be infinite."""
        x = self.logits.to(self.dtype)
        # masked_fill would lose the order of memory.
        return x if self.weight is None else torch.where(self.weight == 0, 0, x)

    def weighted(self, values: Tensor) -> Tensor:
        """Values times the weight."""
        return values if self.weight is None else values * self.weight.to(self.dtype)

    def spatial(self, values: Tensor) -> Tensor:
        """Values ``(B, C or 1, P)`` with the dimensions of the image, ``(B, C or 1, *)``."""
        stated = self.shape[1] == self.logits.shape[1]  # else one class without a dimension
        return values.reshape(*values.shape[:2], *self.shape[2 if stated else 1 :])

    def entries(self, values: Tensor) -> Tensor:
        """Values ``(B, C, P)`` in the shape that the logits came in."""
        return (values if self.mode else values.movedim(1, -1)).reshape(self.shape)

    def pixels(self, values: Tensor) -> Tensor:
        """Values ``(B, P)`` as a map ``(B, *)``."""
        return values.reshape(self.shape[0], *self.shape[2:])

    def per_class(self, weights: Any, option: str = "class_weights") -> Any:
        """Numbers of the classes as a tensor ``(C,)`` beside the logits; None as it is.

        Raises:
            ValueError: on another number of weights.
        """
        if weights is None:
            return None
        weights = torch.as_tensor(weights, dtype=self.dtype, device=self.logits.device)
        check_constant(option, weights)
        if weights.dim() and weights.shape != self.logits.shape[1:2]:
            raise ValueError(
                f"{option} has the shape {tuple(weights.shape)} for {self.logits.shape[1]} "
                "classes; pass one number for each"
            )
        return weights


def _labels(target: Tensor, left_out: Tensor | None, instead: int) -> Tensor:
    """Class indices ``(b, n)``, another one where they are left out."""
    labels = target.long()
    return labels if left_out is None else labels.masked_fill(left_out.all(1), instead)


def segmentation_batch(
    logits: Tensor,
    target: Tensor | None,
    *,
    mode: Mode | None = None,
    ignore_index: int | None = None,
    pixel_weight: Tensor | None = None,
    weight: Tensor | None = None,
    validate: bool = False,
) -> Batch:
    """The batch of a segmentation model.

    Args:
        logits: raw scores, ``(B, C, *)``; ``(B, *)`` too where ``mode="binary"`` is stated.
        target: class indices ``(B, *)`` or ``(B, 1, *)``, or values in [0, 1] of the logits' shape.
        mode: ``"multiclass"``, ``"binary"`` or ``"multilabel"``; None: one channel is binary, else
            multiclass.
        ignore_index: label of the pixels (multilabel: entries) that are left out.
        pixel_weight: weight of each pixel, ``(B, *)`` or ``(B, 1, *)``.
        weight: in its place, weight of each pixel or, of the logits' shape, of each entry.
        validate: check target and weights also where that makes the device wait.

    Raises:
        TypeError: on what is not a tensor.
        ValueError: on shapes that do not fit, a mode that cannot be told, or a label or weight out
            of range.
    """
    check_tensors(logits=logits, target=target)
    assert target is not None
    mode = _resolve_mode(logits, target, mode)
    flat_binary = mode == "binary" and logits.shape[1:2] != (1,)
    stated = logits.unsqueeze(1) if flat_binary else logits
    x = stated.flatten(2) if stated.dim() > 2 else stated.unsqueeze(-1)  # one score an image: P = 1
    images, channels, places = x.shape
    dense = mode != "multiclass" or target.shape == logits.shape
    if dense and mode == "multiclass" and ignore_index is not None:
        raise ValueError("ignore_index needs class indices; leave pixels out by pixel_weight")
    y, kept = read_target(target, None if dense else range(channels), ignore_index, validate)
    y = y.reshape(x.shape if dense else (images, places))
    if kept is not None:
        kept = kept.reshape(x.shape if dense else (images, 1, places))
    if pixel_weight is not None or weight is not None:
        factor = _of_places(stated.shape, pixel_weight, weight, validate)
        kept = factor if kept is None else factor * kept
    return Batch(x, y, kept, logits.shape, mode)


def check_one_weight(weight: Tensor | None, pixel_weight: Tensor | None) -> None:
    """Raise a ValueError where a weight is given by both of its names."""
    if weight is not None and pixel_weight is not None:
        raise ValueError("weight and pixel_weight are two names for one thing; pass one of them")


def _of_places(
    shape: torch.Size, pixel_weight: Tensor | None, weight: Tensor | None, validate: bool
) -> Tensor:
    """Weights of pixels as ``(B, 1, P)``, of the entries of logits ``(B, C, *)`` as ``(B, C, P)``.

    Only ``weight`` can be of entries: what is pooled over the classes has a weight for each pixel.
    """
    check_one_weight(weight, pixel_weight)
    name, values = ("pixel_weight", pixel_weight) if weight is None else ("weight", weight)
    check_weight(name, values, validate)
    assert values is not None
    images, channels, *rest = shape
    fits = [(images, *rest), (images, 1, *rest), *([tuple(shape)] if weight is not None else [])]
    if values.shape not in fits:
        raise ValueError(
            f"{name} {tuple(values.shape)} does not fit logits {tuple(shape)}; one weight a pixel "
            f"has the shape {fits[0]}" + f", one an entry {tuple(shape)}" * (len(fits) > 2)
        )
    of_entries = channels > 1 and values.shape == shape
    return values.reshape(images, channels if of_entries else 1, math.prod(rest))


def detection_batch(
    inputs: Tensor,
    targets: Tensor | None,
    *,
    ignore_index: int | None = None,
    weight: Tensor | None = None,
    validate: bool = False,
) -> Batch:
    """The batch of a detection head, or of any independent sigmoids.

    Args:
        inputs: logits, ``(*, K)``.
        targets: values in [0, 1] of the same shape; or class indices ``(*)``, where -1 stands for
            background and ``ignore_index`` for a row that is left out.
        ignore_index: -2 by default among class indices.
        weight: factor of each row or entry, broadcast to ``(*)`` or, with as many dimensions as
            the inputs, to ``(*, K)``.
        validate: check targets and weights also where that makes the device wait.

    Raises:
        TypeError: on what is not a tensor.
        ValueError: on shapes that do not fit, or a label or weight out of range.
    """
    check_tensors(inputs=inputs, targets=targets)
    assert targets is not None
    if weight is not None:
        check_weight("weight", weight, validate)
    dense = targets.shape == inputs.shape
    if not dense and targets.shape != inputs.shape[:-1]:
        raise ValueError(
            f"inputs {tuple(inputs.shape)} and targets {tuple(targets.shape)} do not fit: targets "
            "hold a value for each entry or a class index for each row of the last dimension; "
            "the logits (B, C, *) of a segmentation model need a mode"
        )
    shape = inputs.shape
    if dense and inputs.dim() < 2:  # loose entries: one class
        inputs, targets = inputs.reshape(-1, 1), targets.reshape(-1, 1)
        weight = None if weight is None else weight.reshape(-1, 1)
    places, classes = inputs.shape[:-1], inputs.shape[-1]
    images = inputs.shape[0] if inputs.dim() > 2 else 1
    length = places.numel() // max(images, 1)

    def channels_second(tensor: Tensor, channels: int = classes) -> Tensor:
        return tensor.reshape(images, length, channels).movedim(-1, 1)

    x = channels_second(inputs)
    if not dense and targets.is_floating_point() and classes == 1:
        # In a head of one class 1 would be out of range, and 0 would stand for the class.
        raise ValueError(
            f"inputs {tuple(inputs.shape)} and floating point targets {tuple(targets.shape)} may "
            "be values or class indices: call .unsqueeze(-1) or .long() on the targets"
        )
    ignored = ignore_index if dense or ignore_index is not None else -2
    there = None if dense else range(-1, classes)
    targets, kept = read_target(targets, there, ignored, validate)
    y = channels_second(targets) if dense else targets.reshape(images, length)
    if kept is not None:
        kept = channels_second(kept) if dense else kept.reshape(images, 1, length)
    scale = None
    if weight is not None:
        if weight.dim() == inputs.dim():
            factor = channels_second(_expanded(weight, inputs.shape, inputs.shape))
        else:
            factor = channels_second(_expanded(weight, places, inputs.shape), 1)
            one_an_image = weight.dim() == len(places) > 1 and weight.shape[1:].numel() == 1
            if one_an_image:
                scale = weight.reshape(-1, 1).expand(images, 1).to(compute_dtype(inputs.dtype))
                factor = factor != 0
        kept = factor if kept is None else factor * kept
    return Batch(x, y, kept, shape, scale=scale)


def _expanded(weight: Tensor, shape: torch.Size, inputs: torch.Size) -> Tensor:
    """A weight of rows or entries, broadcast.

    Raises:
        ValueError: on a shape that does not broadcast.
    """
    pairs = zip(reversed(weight.shape), reversed(shape), strict=False)
    if weight.dim() > len(shape) or any(own not in (1, there) for own, there in pairs):
        raise ValueError(
            f"weight {tuple(weight.shape)} does not fit inputs {tuple(inputs)}; one weight a row "
            f"has the shape {tuple(inputs[:-1])}, one an entry {tuple(inputs)}; the logits "
            "(B, C, *) of a segmentation model need a mode"
        )
    return weight.expand(shape)


def _resolve_mode(logits: Tensor, target: Tensor, mode: Mode | None) -> Mode:
    shapes = f"logits {tuple(logits.shape)} and target {tuple(target.shape)}"
    if logits.dim() < 2:
        raise ValueError(f"logits must be (B, C, *), not {tuple(logits.shape)}")
    batch, channels, *rest = logits.shape
    same = target.shape == logits.shape
    index = target.shape in ((batch, *rest), (batch, 1, *rest))
    if mode is None:
        if same and channels > 1:
            raise ValueError(
                f"{shapes} have one shape: state mode='multilabel' (independent classes) or "
                "mode='multiclass' (probabilities that sum to 1)"
            )
        mode = "binary" if channels == 1 else "multiclass"
    check_choice("mode", mode, Mode)
    if mode == "multiclass" and channels == 1:
        raise ValueError(
            f"logits {tuple(logits.shape)} have one channel, whose softmax is always 1; "
            "use 'bce' or mode='binary'"
        )
    if not (same or (index and (mode == "multiclass" or channels == 1))):
        raise ValueError(f"{shapes} do not fit together in mode {mode!r}")
    return mode
