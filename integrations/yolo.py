"""Any losses in Ultralytics' YOLO: ``YOLO(...).train(trainer=yolo.trainer("giou+focal"), ...)``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from detseg_losses._core.blocks import compute_dtype, rows_where
from detseg_losses._core.module import Loss
from detseg_losses._core.reduction import divide
from detseg_losses.integrations import _adapter
from detseg_losses.integrations.detection import (
    FIXED,
    Roles,
    compare,
    read_losses,
    sigmoid_terms,
    terms_of,
    total,
)
from detseg_losses.integrations.extras import needs
from detseg_losses.spec import LossSum, SpecError, build_loss, read_stages

with needs("ultralytics"):
    from ultralytics.engine.trainer import BaseTrainer
    from ultralytics.models.yolo.detect import DetectionTrainer
    from ultralytics.models.yolo.segment import SegmentationTrainer
    from ultralytics.nn.tasks import DetectionModel, yaml_model_load
    from ultralytics.utils import DEFAULT_CFG, LOGGER, RANK
    from ultralytics.utils.loss import (
        BboxLoss,
        E2ELoss,
        RotatedBboxLoss,
        v8DetectionLoss,
        v8SegmentationLoss,
    )
    from ultralytics.utils.ops import crop_mask
    from ultralytics.utils.tal import bbox2dist
    from ultralytics.utils.torch_utils import unwrap_model

ROLES: Roles = {
    "cls_loss": ("classification",),
    "box_loss": ("boxes",),
    "dfl_loss": ("distribution",),
    "l1_loss": ("deltas",),
    "seg_loss": ("segmentation",),
}
"""What Ultralytics calls its losses."""

SIDES = ("dfl_loss", "l1_loss")
"""Of the distances to the sides of a box: one for heads that predict distributions, one for others.
"""

TRAINERS = {"detect": DetectionTrainer, "segment": SegmentationTrainer}
"""Ultralytics' own trainer of each task."""

OTHERS = ("RTDETR", "World", "YOLOE")
"""How the names of heads begin that have a task of these, and need other trainers."""

DETECTION = "detection"
"""The stage that a string need not name."""

Losses = dict[str, LossSum]
"""The sums of the two parts of a string, ``"detection"`` and ``"mask"``; either may be missing."""


def trainer(spec: str) -> Callable[..., BaseTrainer]:
    """What ``YOLO(...).train`` takes as its ``trainer``, to train with other losses.

    The task of the model, detection or instance segmentation, chooses Ultralytics' trainer. Its
    checkpoints hold a stock model. A run is resumed with ``resume=True`` and the same trainer
    again, for Ultralytics does not keep it.

    Args:
        spec: a loss string, see :class:`YoloAdapter`.

    Raises:
        SpecError: on a string that cannot be read, or a term that has no role in any such model.

    Example:
        >>> YOLO("yolo11n.yaml").train(trainer=yolo.trainer("giou+focal"), data="coco8.yaml")
    """
    _read(spec)
    return partial(_start, spec.strip())


def _start(
    spec: str, cfg: Any = DEFAULT_CFG, overrides: Any = None, _callbacks: Any = None
) -> BaseTrainer:
    task = (overrides or {}).get("task") or "detect"
    if task not in TRAINERS:
        raise ValueError(f"losses are put into models of {' or '.join(TRAINERS)}, not of {task}")
    return _trainer_class(task, spec)(cfg, overrides, _callbacks)


@functools.cache
def _trainer_class(task: str, spec: str) -> type[LossTrainer]:
    name = f"{task}_trainer_{spec.encode().hex()}"
    content = {"__module__": __name__, "spec": spec}
    return type(name, (_Trainer, TRAINERS[task]), content)


def __getattr__(name: str) -> Any:
    """The trainers by name: so they are pickled, and imported by the processes of several GPUs."""
    task, _, code = name.partition("_trainer_")
    try:
        if task in TRAINERS and code:
            return _trainer_class(task, bytes.fromhex(code).decode())
    except ValueError:
        pass
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class LossTrainer(BaseTrainer):
    """What a trainer of Ultralytics needs to train with other losses.

    :func:`trainer` mixes it into Ultralytics' own trainers; mix it into yours like this::

        class MyLossTrainer(yolo.LossTrainer, MyTrainer):
            spec = "giou+focal"

    Attributes:
        spec: the loss string.
        losses: from the start of training on, the sums by stage, ``"detection"`` and ``"mask"``.
    """

    spec: ClassVar[str]
    losses: Losses

    def resume_training(self, ckpt: Any) -> None:
        """Put the losses in: the last step before training starts, whether it resumes or not."""
        # Only now there are the weights of the classes and the criterion of a resumed run.
        super().resume_training(ckpt)
        model, _ = self._models()
        ADAPTER.attach(model, self.spec)
        self.losses = model.criterion.losses
        self._count_steps()
        if RANK in (-1, 0):
            LOGGER.info(f"Losses: {_in_words(model.criterion)}")

    def validate(self) -> Any:
        """Measure what is trained, by the average of the model."""
        # Not once for all: after a NaN, Ultralytics goes on with another average.
        model, averaged = self._models()
        averaged.criterion = model.criterion
        return super().validate()

    def _models(self) -> list[Any]:
        """The model that is trained, and its moving average; of a distillation, the student's."""
        both = unwrap_model(self.model), self.ema.ema
        return [getattr(each, "student_model", each) for each in both]

    def optimizer_step(self) -> None:
        """Let ramps go on, too."""
        super().optimizer_step()
        self._count_steps()

    def _count_steps(self) -> None:
        # Ultralytics counts them for its moving average, and keeps the count in checkpoints.
        for loss in self.losses.values():
            loss.load_state_dict({"step": torch.tensor(self.ema.updates)}, strict=False)


class _Trainer(LossTrainer):
    """What :func:`trainer` mixes in: Ultralytics' own trainers do not know every detector."""

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> nn.Module:
        layers = (cfg if isinstance(cfg, dict) else yaml_model_load(cfg))["head"]
        head = layers[-1][2]
        if head.startswith(OTHERS):
            raise TypeError(f"the model has the head {head}; losses are put into those of YOLO")
        return super().get_model(cfg=cfg, weights=weights, verbose=verbose)


class YoloAdapter(_adapter.Adapter):
    """Lets a YOLO model train with other losses, in a training loop of your own: callables take
    the places of ``bce``, ``bbox_loss`` and ``single_mask_loss`` in its criterion.

    ``YOLO(...).train`` makes a new model, and wants a :func:`trainer`.

    Terms go by their kind. Classification terms take the place of the BCE, box terms (on decoded
    boxes, in pixels of the network's input) that of the CIoU, ``dfl`` that of the distribution
    focal loss of heads that predict distributions, and terms on offsets that of the L1 loss of
    heads that do not (on distances to the sides as shares of the image). What has no term stays as
    it is. After ``; mask:`` stand the terms of the masks of a segmentation model, on the pixels
    within the box of each object.

    The values are normalised as Ultralytics does: those of anchors are weighted by their target
    scores and divided by the sum of these, those of masks are averaged over the positive anchors,
    where a loss of pixels is divided by the area of the box. Its gains ``box``, ``cls`` and ``dfl``
    then apply; what is recorded is before the gains and before weights of classes (``cls_pw``), in
    an end-to-end head of the one-to-one branch. In the first batch with objects the values are
    compared with the stock losses, and where they are of another scale a warning names the terms
    that want another weight.

    The model is one of detection or segmentation, on its device, with Ultralytics' options as its
    ``args``; where one of these changes, apply ``use_losses`` again.
    """

    mechanism = "callable"

    def attach(self, model: Any, spec: str, **options: Any) -> None:
        old = getattr(model, "criterion", None)
        super().attach(model, spec, **options)
        if isinstance(old, E2ELoss):  # a criterion that was made anew goes on in its schedule
            new = model.criterion
            new.updates, new.o2m, new.o2o = old.updates, old.o2m, old.o2o

    def read(self, cls: type, spec: str) -> _adapter.Losses:
        return {"" if stage == DETECTION else stage: loss for stage, loss in _read(spec).items()}

    def fitting(self, model: Any, spec: str, **options: Any) -> _adapter.Losses:
        losses = self.read(type(model), spec, **options)
        if isinstance(getattr(model, "args", {}), dict):
            raise ValueError(
                "the model has no options yet: model.args = ultralytics.cfg.get_cfg() for a loop "
                "of your own; YOLO(...).train makes a new model, and takes "
                "trainer=yolo.trainer(spec)"
            )
        for branch in _branches(getattr(model, "criterion", None) or model.init_criterion()):
            _check_fit(_by_stage(losses), model, branch)
        return losses

    def inject(self, model: Any, losses: _adapter.Losses) -> None:
        made = getattr(model, "criterion", None) is None
        if made:
            model.criterion = model.init_criterion()
        model.criterion.made = made
        model.criterion.losses = by_stage = _by_stage(losses)
        for index, branch in enumerate(_branches(model.criterion)):
            compare = index == 0 and RANK in (-1, 0)
            branch.bce = ClassTerms(branch.bce, by_stage, compare)
            branch.bbox_loss = BoxTerms(branch.bbox_loss, by_stage, compare)
            if "mask" in losses:
                branch.single_mask_loss = MaskTerms(branch.single_mask_loss, by_stage, compare)

    def restore(self, model: Any) -> None:
        criterion: Any = getattr(model, "criterion", None)
        if hasattr(criterion, "losses"):
            for branch in _branches(criterion):
                branch.bce, branch.bbox_loss = branch.bce.stock, branch.bbox_loss.stock
                branch.__dict__.pop("single_mask_loss", None)
            if criterion.made:
                model.criterion = None
            del criterion.losses, criterion.made

    def losses(self, model: Any) -> _adapter.Losses:
        by_stage: Losses = getattr(getattr(model, "criterion", None), "losses", {})
        return {"" if stage == DETECTION else stage: loss for stage, loss in by_stage.items()}


ADAPTER = YoloAdapter()


def _by_stage(losses: _adapter.Losses) -> Losses:
    return {stage or DETECTION: loss for stage, loss in losses.items()}


def _branches(criterion: Any) -> list[Any]:
    """The criteria of the branches of a head."""
    if isinstance(criterion, E2ELoss):
        return [criterion.one2many, criterion.one2one]
    return [criterion]


def _read(spec: str) -> Losses:
    """The sums of a string such as ``"giou+focal; mask: bce+dice"``."""
    parts = read_stages(spec, ("detection", "mask"), "YOLO", unnamed=("detection",))
    losses: Losses = {}
    if "detection" in parts:
        # Of the sides of boxes most strings say nothing, and mean no change.
        stated = build_loss(parts["detection"])
        spoken = [role for role in SIDES if terms_of(stated, ROLES[role])]
        roles = {role: ROLES[role] for role in ("cls_loss", "box_loss", *spoken)}
        losses["detection"] = read_losses(parts["detection"], "YOLO", roles, "batch", masks=True)
    if "mask" in parts:
        losses["mask"] = _read_masks(parts["mask"])
    for loss in losses.values():
        for name, weight, _ in loss.items():
            if weight == "learned":
                raise SpecError(f"{name!r}: Ultralytics' optimizer does not know learned weights")
    return losses


def _read_masks(spec: str) -> LossSum:
    loss = sigmoid_terms(build_loss(spec, "segmentation"), "YOLO's masks")
    for name, _, term in loss.items():
        fixed = [option for option in FIXED if option in term.given]
        if fixed:
            raise SpecError(f"{name!r}: YOLO itself decides {fixed[0]!r}")
        if term.of_batch:
            raise SpecError(f"YOLO takes masks one by one, and {name!r} is a mean by nature")
        mask = torch.zeros(1, 2, 2)
        try:
            _of_masks(term, mask, mask, torch.ones_like(mask), torch.ones(1))
        except (TypeError, ValueError, RuntimeError) as error:
            raise SpecError(f"YOLO's masks have no use for {name!r}: {error}") from None
    return loss


def _check_fit(losses: Losses, model: DetectionModel, branch: Any) -> None:
    """Raise on terms that have no role in a model."""
    box_loss = getattr(branch, "bbox_loss", None)
    box_loss = getattr(box_loss, "stock", box_loss)
    known = isinstance(branch, v8DetectionLoss) and isinstance(box_loss, BboxLoss)
    if not known or isinstance(box_loss, RotatedBboxLoss):
        raise TypeError(
            f"{type(model).__name__} has the criterion {type(branch).__name__}; losses are put "
            "into that of detection and of instance segmentation"
        )
    if "mask" in losses and not isinstance(branch, v8SegmentationLoss):
        raise SpecError(f"{type(model).__name__} has no masks, and so no use for 'mask: ...'")
    if "detection" in losses:
        losses["detection"].check_classes(branch.nc)
    lacking = SIDES[branch.use_dfl]
    for name, _ in _terms(losses, lacking):
        raise SpecError(f"the head of this model has no {lacking}, and so no use for {name!r}")


def _terms(losses: Any, role: str) -> list[tuple[str, Loss]]:
    """The terms of a role, with their names."""
    stage = "mask" if role == "seg_loss" else "detection"
    return terms_of(losses[stage], ROLES.get(role, ())) if stage in losses else []


def _in_words(criterion: Any) -> str:
    """Which losses train what."""
    words = []
    for role in _branches(criterion)[0].loss_names:
        names = [name for name, _ in _terms(criterion.losses, role)]
        words.append(f"{role} {'+'.join(names) or 'as it is'}")
    return ", ".join(words)


class _Terms(nn.Module):
    """Stands in for a part of a criterion.

    Args:
        stock: that part.
        losses: what to compute.
        compare: say in the first batch with objects where a value is of another scale than the
            stock one, see :func:`~detseg_losses.integrations.detection.compare`.
    """

    def __init__(self, stock: Any, losses: Losses, compare: bool) -> None:
        super().__init__()
        self.stock = stock
        self.losses: Any = nn.ModuleDict(losses)
        self.compare = compare


class ClassTerms(_Terms):
    """Stands in for the BCE of a criterion: of logits and target scores ``(B, A, C)``, as large."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        for loss in self.losses.values():
            loss.record({})  # of the parts of a criterion this is computed first
        terms = _terms(self.losses, "cls_loss")
        if not terms:
            return self.stock(logits, targets)
        loss = self.losses["detection"]
        count = targets.sum(dtype=compute_dtype(targets.dtype)).clamp(min=1)
        values = {}
        for name, term in terms:
            values[name] = loss.weighted(name, term(logits, targets, reduction="none"))
            loss.values[name] = values[name].detach().sum() / count
        each = total(values)
        if self.compare and targets.any():
            self.compare = False
            sums = {name: value.sum() for name, value in values.items()}
            stock = partial(self.stock, logits.detach(), targets)
            compare(loss, "cls_loss", sums, lambda: stock().sum(), LOGGER.warning)
        return each


class BoxTerms(_Terms):
    """Stands in for the losses of boxes, and of the distances to their sides, in a criterion."""

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The sums over the anchors of both, divided by that of the target scores.

        Args:
            inputs: what the head predicts ``(B, A, 4 * bins)`` or ``(B, A, 4)``, and the boxes
                ``(B, A, 4)`` that this makes; the anchors ``(A, 2)``, the true boxes
                ``(B, A, 4)``; all in units of the stride. The target scores ``(B, A, C)``, their
                sum, which anchors have an object ``(B, A)``, height and width of the image
                ``(2,)``, the stride of each anchor ``(A, 1)``.
        """
        sides = "dfl_loss" if self.stock.dfl_loss else "l1_loss"
        terms = {role: _terms(self.losses, role) for role in ("box_loss", sides)}
        found = {}
        has_objects = self.compare and bool(inputs[6].any())
        if has_objects or not all(terms.values()):
            found = dict(zip(terms, self.stock(*inputs), strict=True))
        if any(terms.values()):
            loss = self.losses["detection"]
            pairs, weight = self._pairs(sides, *inputs)
            for role, (prediction, target) in pairs.items():
                values = {}
                for name, term in terms[role]:
                    each = term(prediction, target, reduction="none")
                    each = each.mean(-1) if each.dim() > 1 else each  # over the sides
                    values[name] = loss.weighted(name, (each * weight).sum())
                    loss.values[name] = values[name].detach()
                if values:
                    if has_objects:
                        compare(
                            loss, role, values, partial(found.__getitem__, role), LOGGER.warning
                        )
                    found[role] = total(values)
        if has_objects:
            self.compare = False
        return found["box_loss"], found[sides]

    def _pairs(
        self,
        sides: str,
        raw: Tensor,
        boxes: Tensor,
        points: Tensor,
        true_boxes: Tensor,
        scores: Tensor,
        scores_sum: Tensor,
        foreground: Tensor,
        size: Tensor,
        stride: Tensor,
    ) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
        """Predictions and targets of each role, and what each row of them counts."""
        rows = rows_where(foreground.flatten())
        dtype = compute_dtype(boxes.dtype)

        def select(values: Tensor) -> Tensor:
            return values.expand(*foreground.shape, values.shape[-1]).flatten(0, 1)[rows].to(dtype)

        kept = select(foreground.unsqueeze(-1)).bool()
        weight = (select(scores).sum(-1) * kept.squeeze(-1)) / scores_sum
        pixels, anchor, box = select(stride), select(points), select(boxes)
        true_box = torch.where(kept, select(true_boxes), box.detach())
        pairs = {"box_loss": (box * pixels, true_box * pixels)}
        if sides == "dfl_loss":
            bins = self.stock.dfl_loss.reg_max
            distances = bbox2dist(anchor, true_box, bins - 1)
            pairs[sides] = (select(raw).unflatten(-1, (4, bins)), distances)
        else:
            share = pixels / size[[1, 0, 1, 0]].to(dtype)
            pairs[sides] = (select(raw) * share, bbox2dist(anchor, true_box) * share)
        return pairs, weight


class MaskTerms(_Terms):
    """Stands in for the loss of the masks of one image in a criterion."""

    def forward(
        self, masks: Tensor, coefficients: Tensor, prototypes: Tensor, boxes: Tensor, area: Tensor
    ) -> Tensor:
        """The sum over the positive anchors.

        Args:
            masks: the true masks, ``(N, H, W)``, 0 or 1.
            coefficients: of the predicted masks, ``(N, K)``.
            prototypes: what they are coefficients of, ``(K, H, W)``.
            boxes: the true boxes, ``(N, 4)`` in pixels of the masks.
            area: that of the boxes, ``(N,)`` as a share of the image.
        """
        loss = self.losses["mask"]
        logits = torch.einsum("nk,khw->nhw", coefficients, prototypes)
        inside = crop_mask(torch.ones_like(masks), boxes)
        if not loss.values:
            self.seen = 0
        self.seen += len(masks)
        values = {}
        for name, term in _terms(self.losses, "seg_loss"):
            each = _of_masks(term, logits, masks, inside, area)
            values[name] = loss.weighted(name, each.sum())
            before = loss.values.get(name, torch.zeros_like(area.sum()))
            # The mean of all images so far.
            more = values[name].detach() - len(masks) * before
            loss.values[name] = before + more / self.seen
        result = total(values)
        if self.compare and len(masks):
            self.compare = False
            coefficients, prototypes = coefficients.detach(), prototypes.detach()
            own = partial(self.stock, masks, coefficients, prototypes, boxes, area)
            compare(loss, "seg_loss", values, own, LOGGER.warning, "mask: ")
        return result


def _of_masks(term: Loss, logits: Tensor, masks: Tensor, inside: Tensor, area: Tensor) -> Tensor:
    """The loss of each mask ``(N,)`` within its box, of logits ``(N, H, W)``."""
    each = term(logits, masks, mode="binary", per_image=True, reduction="none", pixel_weight=inside)
    if each.shape == masks.shape:
        return divide(each.mean((1, 2)), area.to(each.dtype))
    return each.sum(1)
