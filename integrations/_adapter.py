"""The base of all adapters: how the losses of a string get into a model, and out again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from detseg_losses.spec import LossSum

Losses = dict[str, LossSum]
"""The sums of a model by stage, in the order of the string; that of no stage has an empty name."""

Mechanism = Literal["class", "hooks", "callable"]
"""How losses get into a model:

- ``"class"``: a module of it is given a subclass of its own class (its ``__class__`` is assigned).
- ``"hooks"``: torch's hooks before and after its forward pass.
- ``"callable"``: an object takes the place of one that the library calls for its losses.
"""


class Adapter(ABC):
    """What :func:`detseg_losses.integrations.use_losses` and its kin ask of a kind of models.

    An adapter has no state: all that belongs to an adapted model is in the model. The options of
    ``use_losses`` are those of :meth:`read`.
    """

    mechanism: ClassVar[Mechanism]

    def attach(self, model: Any, spec: str, **options: Any) -> None:
        """Put the losses of a string into a model, in place of those that it has."""
        losses = self.fitting(model, spec, **options)
        for loss in losses.values():
            loss.adapt(model)
        self.restore(model)
        self.inject(model, losses, **options)

    @abstractmethod
    def read(self, cls: type, spec: str) -> Losses:
        """The losses of a string, as far as it can be judged without a model."""

    @abstractmethod
    def fitting(self, model: Any, spec: str, *_: Any, **options: Any) -> Losses:
        """The losses of a string for this model, which stays as it is.

        Raises:
            SpecError: on a string that cannot be read, or a loss that the model has no use for.
            TypeError: where the model computes its loss in a way that is not the library's own.
        """

    @abstractmethod
    def inject(self, model: Any, losses: Losses, *_: Any, **options: Any) -> None:
        """Put losses that fit into a model that has none."""

    @abstractmethod
    def restore(self, model: Any) -> None:
        """Take the losses out again; a model without any stays as it is."""

    @abstractmethod
    def losses(self, model: Any) -> Losses:
        """Those of a model; empty where it is not adapted."""

    def compute(self, model: Any, output: Any, *targets: Any) -> dict[str, Tensor]:
        """The weighted values of the terms from what the model returned.

        Raises:
            TypeError: where the model alone can compute its losses.
        """
        raise TypeError(
            f"{type(model).__name__} computes its losses itself, from images and targets in "
            "training mode; those of what it returned are for models of semantic segmentation"
        )


class Swapped(nn.Module):
    """A class for a module that exists: mixed into a subclass of the module's own class.

    So whatever the module holds, now or later, stays in its place: parameters, hooks, the names in
    the ``state_dict``.
    """

    own: ClassVar[type[nn.Module]]
    """The library's class."""
    added: ClassVar[tuple[str, ...]] = ("loss",)
    """The attributes that a module has beyond those of its own class."""

    @classmethod
    def swap(cls, module: Any, *values: Any) -> None:
        """Give a module this class, with values for what is :attr:`added`."""
        module.__class__ = cls
        for name, value in zip(cls.added, values, strict=True):
            setattr(module, name, value)

    @classmethod
    def swap_back(cls, module: Any) -> None:
        """Undo :meth:`swap`, if it was done."""
        if isinstance(module, cls):
            for name in cls.added:
                delattr(module, name)
            module.__class__ = cls.own  # type: ignore[assignment]

    @classmethod
    def check_own(cls, name: str, found: object) -> None:
        """Refuse what is not of the library's own class, for it may compute its loss differently.

        Raises:
            TypeError: naming both.
        """
        if type(found) not in (cls.own, cls):
            library = cls.own.__module__.partition(".")[0]
            raise TypeError(
                f"{name} is a {type(found).__name__}, not {library}'s {cls.own.__name__}"
            )
