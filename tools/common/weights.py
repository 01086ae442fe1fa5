"""Loading weights of whatever origin into a model, recognised by their keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.checkpoint import load_tensors
from common.errors import UsageError

from torch import Tensor, nn
from torchvision.models.detection import RetinaNet_ResNet50_FPN_Weights


def load_file(model: nn.Module, file: Path, classes: list[str]) -> str:
    """Load a file with a state dict, alone or as ``model`` or ``state_dict`` of a dict.

    Returns:
        A line that says how much of it fits, see :func:`load_matching`.

    Raises:
        UsageError: if it holds no state dict, or less than half of it fits.
    """
    content = load_tensors(file)
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    return load_matching(model, content, str(file), classes)


def load_matching(model: nn.Module, state: Any, origin: str, classes: list[str]) -> str:
    """Load a state dict of a backbone, an encoder or a whole model, whichever its keys show it is.

    Of a detector for COCO the outputs of the classes that have the same names are taken over.

    Args:
        model: receives the weights, in place.
        state: the weights; what is not a tensor in it is ignored.
        origin: where they are from, for messages.
        classes: names of the classes of ``model``.

    Returns:
        A line that says how many tensors match in name and shape.

    Raises:
        UsageError: if there is no tensor, or less than half of them do.
    """
    state = {
        key: value
        for key, value in (state.items() if isinstance(state, dict) else ())
        if isinstance(key, str)
        and isinstance(value, Tensor)
        and not key.endswith("num_batches_tracked")
    }
    if not state:
        raise UsageError(f"model.weights {origin}: there is no state dict in this file")
    own = model.state_dict()
    _select_coco_classes(state, own, classes)

    def matching(strip: str, add: str) -> dict[str, Tensor]:
        renamed = {add + key.removeprefix(strip): value for key, value in state.items()}
        return {k: v for k, v in renamed.items() if k in own and own[k].shape == v.shape}

    strips = ("", "module.", "model.", "backbone.", "backbone.body.", "features.", "encoder.")
    adds = ("", "backbone.body.", "backbone.", "encoder.", "segformer.")
    best = max((matching(strip, add) for strip in strips for add in adds), key=len)
    if 2 * len(best) < len(state):
        raise UsageError(
            f"model.weights {origin}: only {len(best)} of its {len(state)} tensors have the name "
            f"and shape of one in the model; its keys begin with {next(iter(state))!r}, those of "
            f"the model with {next(iter(own))!r}"
        )
    model.load_state_dict(best, strict=False)
    total = sum(not key.endswith("num_batches_tracked") for key in own)
    return f"weights: {origin}: {len(best)} of its {len(state)} tensors, {total} in the model"


def _select_coco_classes(
    state: dict[str, Tensor], own: dict[str, Tensor], classes: list[str]
) -> None:
    """Reduce the outputs of a COCO detector to those of ``classes``, where it knows them all."""
    names: list[str] = RetinaNet_ResNet50_FPN_Weights.DEFAULT.meta["categories"]
    if not {*classes} <= {*names}:
        return
    rows = [0, *(names.index(name) for name in classes)]
    for key, value in state.items():
        each, rest = divmod(len(value), len(names)) if value.dim() else (0, 0)
        if rest or not each or key not in own or len(own[key]) != each * len(rows):
            continue
        if "bbox_pred" in key:  # the offsets of one class after the other
            state[key] = value.unflatten(0, (len(names), each))[rows].flatten(0, 1)
        else:  # the classes of one anchor after the other
            state[key] = value.unflatten(0, (each, len(names)))[:, rows].flatten(0, 1)
