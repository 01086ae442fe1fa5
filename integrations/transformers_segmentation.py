"""Any losses in the semantic segmentation models of transformers: SegFormer, UPerNet, DPT, ...

They compute a cross entropy of their own when they are given labels. Here they are not given any:
a hook takes the labels before the forward pass, and another puts the loss into the output.
"""

from __future__ import annotations

import functools
import inspect
import operator
from typing import Any

from torch import Tensor
from torch.nn.functional import interpolate

from detseg_losses.integrations._adapter import Losses
from detseg_losses.integrations.extras import needs
from detseg_losses.integrations.segmentation import (
    SegmentationAdapter,
    losses_of,
    read_losses,
    taken,
)

with needs("transformers"):
    import transformers  # noqa: F401


class SemanticAdapter(SegmentationAdapter):
    """Lets a semantic segmentation model compute other losses from its labels, by hooks.

    ``model(pixel_values=images, labels=labels)`` returns what it always did, in training and in
    evaluation, but its ``loss`` is the sum of the terms, on logits that are resized to the labels
    (bilinear, as the model does it). A model with an auxiliary head adds the sum of the same terms
    on its logits, times ``config.auxiliary_loss_weight``, as ``"aux"``. The keys of the
    ``state_dict``, the config and what ``save_pretrained`` writes are unchanged.

    The loss is a mean of each batch. So the model says by ``accepts_loss_kwargs = False`` that
    transformers' ``Trainer`` has to divide it by the number of accumulated batches; adapt the model
    before the ``Trainer`` is made.

    The model may be SegFormer, UPerNet, DPT, BEiT, Data2Vec, MobileViT, MobileNetV2, Sapiens2 or
    TIPSv2, ``...ForSemanticSegmentation``, before it is wrapped for several processes.

    Args:
        mode: ``"multiclass"``, ``"binary"`` or ``"multilabel"``; None: binary for a model with one
            class, else multiclass. Labels are class indices ``(B, H, W)``, for multilabel values in
            [0, 1] ``(B, C, H, W)``.
        ignore_index: label of the pixels that are ignored; None: the one in the config.
        **defaults: options for every term that has them, see
            :func:`detseg_losses.build_loss`.
    """

    def fitting(
        self, model: Any, spec: str, *, ignore_index: int | None = None, **options: Any
    ) -> Losses:
        config = model.config
        if ignore_index is None:
            # UPerNet's config has a name of its own.
            ignore_index = getattr(config, "semantic_loss_ignore_index", None)
            ignore_index = config.loss_ignore_index if ignore_index is None else ignore_index
        return {"": read_losses(spec, config.num_labels, ignore_index=ignore_index, **options)}

    def inject(self, model: Any, losses: Losses, **options: Any) -> None:
        super().inject(model, losses)
        model.accepts_loss_kwargs = False
        auxiliary_head = getattr(model, "auxiliary_head", None)
        if auxiliary_head is not None:
            auxiliary_head._logits = None
            model._loss_hooks += (auxiliary_head.register_forward_hook(_keep_logits),)

    def restore(self, model: Any) -> None:
        if self.losses(model):
            del model.accepts_loss_kwargs
            if getattr(model, "auxiliary_head", None) is not None:
                vars(model.auxiliary_head).pop("_logits", None)
        super().restore(model)

    def take_targets(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if len(args) > 1:
            names = inspect.signature(model.forward).parameters
            args, kwargs = (), dict(zip(names, args, strict=False)) | kwargs
        model._targets = kwargs.pop("labels", None)
        return args, kwargs

    def give_losses(self, model: Any, args: tuple[Any, ...], output: Any) -> Any:
        labels = taken(model)
        auxiliary = None
        if getattr(model, "auxiliary_head", None) is not None:
            auxiliary, model.auxiliary_head._logits = model.auxiliary_head._logits, None
        if labels is None:
            return output
        losses = self.compute(model, output, labels, auxiliary)
        loss = functools.reduce(operator.add, losses.values())
        if isinstance(output, tuple):
            return loss, *output
        return type(output)(**(dict(output) | {"loss": loss}))

    def compute(
        self, model: Any, output: Any, labels: Tensor, auxiliary: Tensor | None = None
    ) -> dict[str, Tensor]:
        def resized(logits: Tensor) -> Tensor:
            return interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)

        return losses_of(
            model.loss,
            resized(output[0] if isinstance(output, tuple) else output["logits"]),
            None if auxiliary is None else resized(auxiliary),
            labels,
            getattr(model.config, "auxiliary_loss_weight", 0.0),
        )


def _keep_logits(auxiliary_head: Any, args: Any, output: Tensor) -> None:
    auxiliary_head._logits = output


ADAPTER = SemanticAdapter()
