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
    weighting: WeightingStage,
    losses: Tensor,
    presence: Presence,
    optimizer: torch.optim.Optimizer | None,
) -> Factors:
    """Ask a weighting; it sees the losses as numbers.

    Args:
        weighting: the stage.
        losses: (T',) of the present tasks.
        presence: which tasks are present.
        optimizer: says the learning rate of the coming step, to a weighting that declares to need
            it; None: nobody asks.

    Raises:
        TaskError: the weighting refuses a loss, or gives a weight that is not finite.
        EquipoiseError: it returned something else than a weighted loss for each loss, or
            gradients are switched off.
    """
    if not torch.is_grad_enabled():
        raise EquipoiseError(
            "gradients are switched off here, by torch.no_grad or inference_mode; call the step "
            "outside of it."
        )
    losses = losses.clone().requires_grad_()
    if weighting.method is not None and weighting.method.needs_lr and optimizer is not None:
        weighting.method.begin(float(optimizer.param_groups[0]["lr"]))
    weighted = _weighted(weighting, losses, presence)
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
            said = f"{weighting.name} gave this loss the weight {factor}; look for a division by 0."
            raise NonFiniteError(task, said)
    method = weighting.method
    weights = factors if method is None else method.weights[presence.present]
    return Factors(factors, weights, list(learned))


def _weighted(weighting: WeightingStage, losses: Tensor, presence: Presence) -> Tensor:
    method, present = weighting.method, presence.present
    if method is None:
        return weighting.given(losses)
    full = losses.new_full(present.shape, torch.nan).masked_scatter(present, losses)
    try:
        return method(full, present)[present]
    except TaskError as error:  # it counts all tasks, not only those present
        raise error.named(presence.tasks) from None
