"""From losses to what multiplies their gradients: only here is a weighting differentiated."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from equipoise.engine.adapters import WeightingStage
from equipoise.engine.gradients import Gradients
from equipoise.engine.targets import Presence
from equipoise.errors import EquipoiseError, NonFiniteError, TaskError


class Factors(NamedTuple):
    """What a weighting makes of the losses.

    Attributes:
        factors: (T',) derivative of each weighted loss by its loss; multiplies its gradient.
        weights: (T',) lambda, as the method defines it.
        learned: gradients of the weighting's own parameters.
    """

    factors: Tensor
    weights: Tensor
    learned: Gradients


def factors_of(
    weighting: WeightingStage, losses: Tensor, presence: Presence, lr: float | None
) -> Factors:
    """Ask a weighting; it sees the losses as numbers.

    Args:
        weighting: the stage.
        losses: (T',) of the present tasks.
        presence: which tasks are present.
        lr: learning rate of the coming step, for a weighting that declares to need it.

    Raises:
        TaskError: the weighting refuses a loss, or gives a weight that is not finite.
        EquipoiseError: it returned something else than a weighted loss for each loss.
    """
    losses = losses.clone().requires_grad_()
    weighted = _weighted(weighting, losses, presence, lr)
    shape = getattr(weighted, "shape", None)
    if shape != losses.shape or not weighted.requires_grad:
        raise EquipoiseError(
            f"{weighting.name} must return a weighted loss for each of the {len(losses)} losses, "
            f"computed from it; it returned {weighted!r}."
        )
    factors, *learned = torch.autograd.grad(
        weighted.sum(), (losses, *weighting.learnable), materialize_grads=True
    )
    for task, factor in zip(presence.names, factors.tolist(), strict=True):
        if not math.isfinite(factor):
            raise NonFiniteError(task, f"{weighting.name} gave its loss the weight {factor}.")
    method = weighting.method
    weights = factors if method is None else method.weights[presence.present]
    return Factors(factors, weights, list(learned))


def _weighted(
    weighting: WeightingStage, losses: Tensor, presence: Presence, lr: float | None
) -> Tensor:
    method, present = weighting.method, presence.present
    if method is None:
        return weighting.given(losses)
    if lr is not None:
        method.begin(lr)
    full = losses.new_full(present.shape, torch.nan).masked_scatter(present, losses)
    try:
        return method(full, present)[present]
    except TaskError as error:  # it counts all tasks, not only those present
        raise error.named(presence.tasks) from None
