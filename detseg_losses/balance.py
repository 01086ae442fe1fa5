"""Weights of the terms of a sum that follow their gradients.

Weights on a schedule and weights learned by uncertainty need no more than a loss string, see
:class:`detseg_losses.LossSum`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from detseg_losses._core.distribution import processes, world_sum
from detseg_losses._core.reduction import divide
from detseg_losses.spec import LossSum


class GradNorm:
    r"""Balance the terms of a sum so that all of them train at a similar rate.

    Gradient normalisation (Chen et al., arXiv:1711.02257): a factor :math:`w_i` of each term
    follows

    .. math:: \min_w \sum_i \left| G_i - \bar G r_i^\alpha \right|, \quad
        G_i = \left\| \nabla_W w_i L_i \right\|_2, \quad
        r_i = \frac{L_i / L_i(0)}{\frac{1}{T} \sum_j L_j / L_j(0)}

    with the right side of the difference a constant, and the factors scaled to have the sum T.
    :math:`L_i` includes the number that is the term's weight in the loss string. The step is one of
    gradient descent on :math:`\log w_i`, of the objective in units of :math:`\bar G`: the paper
    leaves the optimizer open, and so the factors stay positive and ``lr`` has no unit.

    Choose it where terms of different origin share a trunk and one of them starves; it costs one
    backward pass through the heads for each term. It expects losses that are not negative. The
    factors and the first values belong to the loss and are in its ``state_dict``: to go on with a
    run, make the GradNorm first, then load. Where several processes train together all must call
    :meth:`step`, which averages norms and values over them, so that all have the same factors.

    Args:
        loss: the sum, whose weights are plain numbers.
        parameters: those of the last layer that all terms share, or of a part of it.
        alpha: how strongly a term that lags is favoured; 0 asks for equal norms.
        lr: how fast the factors follow.

    Raises:
        ValueError: where there are no parameters, or a weight is on a ramp or learned.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> trunk, head = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 5, 1)
        >>> images, masks = torch.rand(2, 3, 16, 16), torch.randint(5, (2, 16, 16))
        >>> criterion = build_loss("ce + dice")
        >>> balance = GradNorm(criterion, trunk.parameters())
        >>> terms = criterion.compute(head(trunk(images)), masks)
        >>> balance.step(terms)  # before backward, which frees the graph
        >>> sum(terms.values()).backward()
        >>> criterion.scales
        tensor([0.9750, 1.0250])
    """

    def __init__(
        self,
        loss: LossSum,
        parameters: Iterable[nn.Parameter],
        alpha: float = 1.5,
        lr: float = 0.025,
    ) -> None:
        self.loss = loss
        self.parameters = list(parameters)
        self.alpha = alpha
        self.lr = lr
        if not self.parameters:
            raise ValueError("parameters is empty: GradNorm needs those of a shared layer")
        for name, weight, _ in loss.items():
            if not isinstance(weight, (int, float)):
                raise ValueError(f"GradNorm sets the weight of {name!r}, which is {weight} already")
        unknown = torch.full((len(loss.names),), torch.nan, device=self.parameters[0].device)
        loss.register_buffer("scales", torch.ones_like(unknown))
        loss.register_buffer("first_values", unknown)

    def step(self, terms: Mapping[str, Tensor]) -> None:
        """Adjust the factors that the next call of the loss will use; before ``backward``.

        Args:
            terms: the weighted value of each term, attached to the graph, as
                :meth:`LossSum.compute` or an SMP model returns them; others are disregarded. A
                RetinaNet returns one value a role: of ``"giou + focal"`` give ``{"focal":
                losses["classification"], "giou": losses["bbox_regression"]}``.

        Raises:
            ValueError: where a term does not depend on the parameters.
        """
        buffers: dict[str, Any] = self.loss._buffers
        count = len(self.loss.names)
        norms = torch.stack([self._norm(name, terms[name]) for name in self.loss.names])
        values = torch.stack([terms[name].detach().float() for name in self.loss.names])
        norms, values = world_sum(torch.stack((norms, values)), sync=True) / processes(sync=True)
        old, known = (buffers[name].to(norms) for name in ("scales", "first_values"))

        values = values / old
        first = torch.where(known.isnan(), values, known)
        progress = divide(values, first).clamp(min=0)
        goal = norms.mean() * divide(progress, progress.mean()).pow(self.alpha)
        slope = divide((norms - goal).sign() * norms, norms.mean())
        new = old * torch.exp(-self.lr * slope)
        new = new * (count / new.sum())

        # A step that overflowed in half precision must not be remembered. And these are new
        # tensors, for the backward pass to come needs the old ones.
        sound = norms.isfinite().all() & values.isfinite().all()
        buffers["scales"] = torch.where(sound, new, old)
        buffers["first_values"] = torch.where(sound, first, known)

    def _norm(self, name: str, term: Tensor) -> Tensor:
        grads = torch.autograd.grad(term, self.parameters, retain_graph=True, allow_unused=True)
        norms = [torch.linalg.vector_norm(grad.float()) for grad in grads if grad is not None]
        if not norms:
            raise ValueError(f"{name!r} does not depend on the parameters given to GradNorm")
        return torch.linalg.vector_norm(torch.stack(norms))
