"""Any losses in torchvision's segmentation models: FCN, DeepLabV3 and LRASPP."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from detseg_losses.integrations._adapter import Losses
from detseg_losses.integrations.extras import needs
from detseg_losses.integrations.segmentation import (
    SegmentationAdapter,
    classes_of,
    losses_of,
    read_losses,
    taken,
)
from detseg_losses.spec import SpecError

with needs("torchvision"):
    import torchvision  # noqa: F401


class TorchvisionAdapter(SegmentationAdapter):
    """Lets an FCN, DeepLabV3 or LRASPP return its losses in training, by hooks.

    In training ``model(images, masks)`` returns the weighted value of each term by name, attached
    to the graph; their sum is the loss. A model with an auxiliary classifier adds the sum of the
    same terms on its logits, times ``aux_weight``, as ``"aux"``. In evaluation, or without masks,
    the model returns its dictionary of logits, as it always did, and
    ``model_losses(model)(output, masks)`` is the loss. The keys of the ``state_dict`` are
    unchanged.

    Args:
        aux_weight: weight of the loss of the auxiliary logits; torchvision's reference script
            trains with 0.5.
        mode: ``"multiclass"``, ``"binary"`` or ``"multilabel"``; None: binary for a model with one
            class, else multiclass. Masks are class indices ``(B, H, W)`` or ``(B, 1, H, W)``, for
            multilabel values in [0, 1] ``(B, C, H, W)``.
        ignore_index: label of the pixels that are ignored; 255 in that script.
        **defaults: options for every term that has them, see
            :func:`detseg_losses.build_loss`.
    """

    def read(self, cls: type, spec: str, *, aux_weight: float = 0.5, **options: Any) -> Losses:
        return super().read(cls, spec, **options)

    def fitting(self, model: Any, spec: str, *, aux_weight: float = 0.5, **options: Any) -> Losses:
        classes = classes_of(model.classifier)
        losses = {"": read_losses(spec, classes, **options)}
        auxiliary = getattr(model, "aux_classifier", None)
        if auxiliary is not None and classes_of(auxiliary) != classes:
            raise SpecError(
                f"the classifier has {classes} class(es) and aux_classifier "
                f"{classes_of(auxiliary)}; replace both, or set model.aux_classifier = None"
            )
        return losses

    def inject(
        self, model: Any, losses: Losses, *, aux_weight: float = 0.5, **options: Any
    ) -> None:
        super().inject(model, losses)
        model._aux_weight = aux_weight

    def restore(self, model: Any) -> None:
        super().restore(model)
        vars(model).pop("_aux_weight", None)

    def take_targets(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        model._targets = kwargs.pop("masks", None)
        if len(args) > 1:
            args, model._targets = (args[0], *args[2:]), args[1]
        return args, kwargs

    def give_losses(self, model: Any, args: tuple[Any, ...], output: Any) -> Any:
        masks = taken(model)
        if not model.training or masks is None:
            return output
        return self.compute(model, output, masks)

    def compute(self, model: Any, output: Any, masks: Tensor) -> dict[str, Tensor]:
        return losses_of(model.loss, output["out"], output.get("aux"), masks, model._aux_weight)


ADAPTER = TorchvisionAdapter()
