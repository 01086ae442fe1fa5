"""Adapters to other libraries and readers of data formats; each file needs one third party only."""

from __future__ import annotations

import functools
import operator
import warnings
from importlib import import_module
from typing import Any, TypeVar

from torch import Tensor, nn

if __name__ == "integrations":
    raise ImportError("import detseg_losses.integrations: two names make two of each class")

from detseg_losses.integrations._adapter import Adapter

__all__ = [
    "ADAPTERS",
    "FAMILIES",
    "ModelLosses",
    "check_losses",
    "model_losses",
    "restore_losses",
    "use_losses",
]

_ADAPTED = {
    "smp": ["segmentation_models_pytorch.base.model.SegmentationModel"],
    "torchvision_fcos": ["torchvision.models.detection.fcos.FCOS"],
    "torchvision_rcnn": ["torchvision.models.detection.faster_rcnn.FasterRCNN"],
    "torchvision_retinanet": ["torchvision.models.detection.retinanet.RetinaNet"],
    "torchvision_segmentation": [
        "torchvision.models.segmentation.deeplabv3.DeepLabV3",
        "torchvision.models.segmentation.fcn.FCN",
        "torchvision.models.segmentation.lraspp.LRASPP",
    ],
    "torchvision_ssd": ["torchvision.models.detection.ssd.SSD"],
    "transformers_detection": [
        "transformers.models.conditional_detr.modeling_conditional_detr.ConditionalDetrForObjectDetection",
        "transformers.models.conditional_detr.modeling_conditional_detr.ConditionalDetrForSegmentation",
        "transformers.models.d_fine.modeling_d_fine.DFineForObjectDetection",
        "transformers.models.dab_detr.modeling_dab_detr.DabDetrForObjectDetection",
        "transformers.models.deformable_detr.modeling_deformable_detr.DeformableDetrForObjectDetection",
        "transformers.models.deimv2.modeling_deimv2.Deimv2ForObjectDetection",
        "transformers.models.detr.modeling_detr.DetrForObjectDetection",
        "transformers.models.detr.modeling_detr.DetrForSegmentation",
        "transformers.models.lw_detr.modeling_lw_detr.LwDetrForObjectDetection",
        "transformers.models.rf_detr.modeling_rf_detr.RfDetrForObjectDetection",
        "transformers.models.rt_detr.modeling_rt_detr.RTDetrForObjectDetection",
        "transformers.models.rt_detr_v2.modeling_rt_detr_v2.RTDetrV2ForObjectDetection",
        "transformers.models.table_transformer.modeling_table_transformer.TableTransformerForObjectDetection",
        "transformers.models.yolos.modeling_yolos.YolosForObjectDetection",
    ],
    "transformers_masks": [
        "transformers.models.mask2former.modeling_mask2former.Mask2FormerForUniversalSegmentation",
        "transformers.models.maskformer.modeling_maskformer.MaskFormerForInstanceSegmentation",
    ],
    "transformers_segmentation": [
        "transformers.models.beit.modeling_beit.BeitForSemanticSegmentation",
        "transformers.models.data2vec.modeling_data2vec_vision.Data2VecVisionForSemanticSegmentation",
        "transformers.models.dpt.modeling_dpt.DPTForSemanticSegmentation",
        "transformers.models.mobilenet_v2.modeling_mobilenet_v2.MobileNetV2ForSemanticSegmentation",
        "transformers.models.mobilevit.modeling_mobilevit.MobileViTForSemanticSegmentation",
        "transformers.models.mobilevitv2.modeling_mobilevitv2.MobileViTV2ForSemanticSegmentation",
        "transformers.models.sapiens2.modeling_sapiens2.Sapiens2ForSemanticSegmentation",
        "transformers.models.segformer.modeling_segformer.SegformerForSemanticSegmentation",
        "transformers.models.tipsv2_dpt.modeling_tipsv2_dpt.Tipsv2DptForSemanticSegmentation",
        "transformers.models.upernet.modeling_upernet.UperNetForSemanticSegmentation",
    ],
    "yolo": ["ultralytics.nn.tasks.DetectionModel"],
}

ADAPTERS = {model: name for name, models in _ADAPTED.items() for model in models}
"""The module whose ``ADAPTER`` is for each model class, and for what is derived from it."""

FAMILIES = "torchvision's detectors and segmentation models, SMP, transformers, and Ultralytics"

Model = TypeVar("Model", bound=nn.Module)


def check_losses(model_class: type[nn.Module], spec: str, **options: Any) -> None:
    """Judge a loss string for a class of models, of which none has to be made.

    What depends on the number of classes, weights of classes for example, is left to
    :func:`use_losses`.

    Args:
        model_class: a class that one of the adapters knows, or a subclass.
        spec: a loss string.
        **options: those of the adapter, which its page and the class in its module explain.

    Raises:
        TypeError: where no adapter knows the class, or the string is not a str.
        SpecError: on a string that cannot be read, or a loss that such models have no use for.

    Examples:
        >>> from torchvision.models.detection import MaskRCNN
        >>> check_losses(MaskRCNN, "rpn: giou+bce; roi: 10*giou+ce; mask: dice")
        >>> check_losses(MaskRCNN, "mask: giou")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        detseg_losses.spec.SpecError: ...
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # use_losses will say it again
        _adapter_of(model_class).read(model_class, spec, **options)


def use_losses(model: Model, spec: str, **options: Any) -> Model:
    """Let a model train with the losses that a string names, in place.

    Args:
        model: a model that one of the adapters knows.
        spec: a loss string, for example ``"giou+focal"`` or ``"0.5*ce + dice"``.
        **options: those of the adapter, which its page and the class in its module explain.

    Returns:
        The model. In training it returns a dictionary of losses; its ``state_dict`` keeps its
        keys, and :func:`restore_losses` undoes the change.

    Raises:
        TypeError: where no adapter knows the model, it is a class or on the meta device, or the
            string is not a str.
        SpecError: on a string that cannot be read, or a loss that the model has no use for.

    Examples:
        >>> from torchvision.models.segmentation import lraspp_mobilenet_v3_large
        >>> model = lraspp_mobilenet_v3_large(weights_backbone=None, num_classes=5)
        >>> model = use_losses(model, "ce + dice", ignore_index=255)
        >>> images, masks = torch.rand(2, 3, 64, 64), torch.randint(5, (2, 64, 64))
        >>> losses = model(images, masks)
        >>> list(losses)
        ['ce', 'dice']
        >>> sum(losses.values()).backward()
    """
    if isinstance(model, type):
        raise TypeError(f"use_losses takes a model, and {model.__name__} is a class of models")
    _adapter_of(type(model), model).attach(model, spec, **options)
    return model


def restore_losses(model: Model) -> Model:
    """Undo :func:`use_losses`, in place; the model is as it came.

    Examples:
        >>> from torchvision.models.segmentation import lraspp_mobilenet_v3_large
        >>> model = lraspp_mobilenet_v3_large(weights_backbone=None, num_classes=5)
        >>> model = restore_losses(use_losses(model, "ce + dice"))
        >>> list(model(torch.rand(2, 3, 64, 64)))
        ['out']
    """
    _adapter_of(type(model), model).restore(model)
    return model


def model_losses(model: nn.Module) -> ModelLosses:
    """The losses that :func:`use_losses` put into a model: their values, their state.

    It is the same for every model: ``model_losses(model).values`` after a step holds the value of
    each term, and ``model_losses(model)(model(images), masks)`` is the loss of a model of semantic
    segmentation in evaluation.

    Args:
        model: an adapted model; it may be wrapped or compiled.

    Raises:
        TypeError: where no adapter knows the model.
        ValueError: where it is not adapted.

    Examples:
        >>> from torchvision.models.segmentation import lraspp_mobilenet_v3_large
        >>> model = lraspp_mobilenet_v3_large(weights_backbone=None, num_classes=5)
        >>> losses = model_losses(use_losses(model, "ce + ramp(0, 1, steps=100)*dice"))
        >>> losses.advance()  # after each step of the optimizer
        >>> losses.factors
        {'ce': 1.0, 'dice': tensor(0.0100)}
    """
    return ModelLosses(model)


class ModelLosses:
    """The losses of an adapted model, as one; see :func:`model_losses`.

    Where a loss string has stages, the names of terms and the keys of the state begin with the
    stage: ``"rpn.giou"``. To be made again where :func:`use_losses` replaces the losses.

    Args:
        model: an adapted model; it may be wrapped or compiled.

    Raises:
        TypeError: where no adapter knows the model.
        ValueError: where it is not adapted.

    Examples:
        >>> from torchvision.models.segmentation import lraspp_mobilenet_v3_large
        >>> model = lraspp_mobilenet_v3_large(weights_backbone=None, num_classes=5)
        >>> losses = ModelLosses(use_losses(model, "ce + ramp(0, 1, steps=100)*dice"))
        >>> losses.advance()  # after each step of the optimizer
        >>> losses.factors
        {'ce': 1.0, 'dice': tensor(0.0100)}
    """

    def __init__(self, model: nn.Module) -> None:
        while isinstance(inner := _wrapped(model), nn.Module):
            model = inner
        self.model = model
        self.sums = _adapter_of(type(model), model).losses(model)
        if not self.sums:
            raise ValueError(f"this {type(model).__name__} has no losses of use_losses")
        for loss in self.sums.values():
            loss.kept = True

    def __call__(self, output: Any, *targets: Any) -> Tensor:
        """The loss of what the model returned, in training or evaluation.

        Args:
            output: of a model of semantic segmentation that was called without masks.
            *targets: what the model is called with in training beside the images.

        Raises:
            TypeError: where the model alone can compute its losses, as a detector.
        """
        values = _adapter_of(type(self.model)).compute(self.model, output, *targets)
        return functools.reduce(operator.add, values.values())

    @property
    def values(self) -> dict[str, Tensor]:
        """The weighted value of each term in the last step, detached."""
        return {
            _key(s, name): v for s, loss in self.sums.items() for name, v in loss.values.items()
        }

    @property
    def factors(self) -> dict[str, Tensor | float]:
        """What the loss of each term is multiplied by in this step."""
        return {_key(s, n): loss.factor(n) for s, loss in self.sums.items() for n in loss.names}

    def advance(self) -> None:
        """Count an optimizer step, see :meth:`LossSum.advance`."""
        for loss in self.sums.values():
            loss.advance()

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on, beside the ``state_dict`` of the model."""
        return {
            _key(s, k): v for s, loss in self.sums.items() for k, v in loss.state_dict().items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of losses like these.

        Raises:
            RuntimeError: where those were other losses.
        """
        parts: dict[str, dict[str, Any]] = {stage: {} for stage in self.sums}
        for key, value in state.items():
            stage, _, rest = key.partition(".")
            stage, rest = (stage, rest) if stage in self.sums else ("", key)
            if stage not in parts:
                raise RuntimeError(f"no loss has the state {key}")
            parts[stage][rest] = value
        for stage, loss in self.sums.items():
            loss.load_state_dict(parts[stage])


def _key(stage: str, name: str) -> str:
    return f"{stage}.{name}" if stage else name


def _wrapped(model: object) -> object:
    """The model in a wrapper such as DistributedDataParallel or a compiled model, if it is one."""
    return getattr(model, "module", getattr(model, "_orig_mod", None))


def _adapter_of(model_class: type, model: object = None) -> Adapter:
    for cls in model_class.__mro__:
        name = ADAPTERS.get(f"{cls.__module__}.{cls.__qualname__}")
        if name is not None:
            adapter: Adapter = import_module(f"{__name__}.{name}").ADAPTER
            return adapter
    if any(cls.__module__ == "ultralytics.engine.model" for cls in model_class.__mro__):
        raise TypeError(
            f"{model_class.__name__} makes a new model when it trains; give that the losses: "
            'YOLO(...).train(trainer=detseg_losses.integrations.yolo.trainer("giou+focal"), ...)'
        )
    if isinstance(_wrapped(model), nn.Module):
        raise TypeError(
            f"{model_class.__name__} wraps a model: call use_losses on the model, then wrap it"
        )
    import difflib  # which is for mistakes only

    name = model_class.__name__[:60]
    known = [path.rpartition(".")[2] for path in ADAPTERS]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    hint = f"; the nearest class that has one is {near[0]}" if near else ""
    raise TypeError(f"no adapter for {name}; there are adapters for {FAMILIES}{hint}")
