"""From losses to what multiplies their gradients: here, and only here, weightings are derived."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.boundary import Gradients
from equipoise.errors import EquipoiseError, NonFiniteError, TaskError
from equipoise.labels import Labels
from equipoise.weighting import Weighting


def weigh(
    weighting: Any, losses: Tensor, labels: Labels, optimizer: torch.optim.Optimizer
) -> tuple[Tensor, Tensor, Gradients]:
    """Gradient factors (T',) of the losses, weights (T',), gradients of the weighting itself.

    The weighting sees the losses as numbers; the derivative of what it makes of them is all that
    the network needs to know.

    Args:
        weighting: a Weighting, or any callable from losses (T',) to weighted losses (T',).
        losses: (T',) of the present tasks.
        labels: which tasks are present.
        optimizer: whose learning rate a weighting hears that declares to need it.

    Raises:
        TaskError: the weighting refuses a loss, or gives a weight that is not finite.
        EquipoiseError: it returned something else than a weighted loss for each loss.
    """
    losses = losses.clone().requires_grad_()
    if isinstance(weighting, Weighting):
        if weighting.needs_lr:
            weighting.begin(float(optimizer.param_groups[0]["lr"]))
        present = labels.present
        full = losses.new_full(present.shape, torch.nan).masked_scatter(present, losses)
        try:
            weighted = weighting(full, present)[present]
        except TaskError as error:  # it counts all tasks, not only those present
            raise error.named(labels.tasks) from None
    else:
        weighted = weighting(losses)
    shape = getattr(weighted, "shape", None)
    if shape != losses.shape or not weighted.requires_grad:
        raise EquipoiseError(
            f"{type(weighting).__name__} must return a weighted loss for each of the "
            f"{len(losses)} losses, computed from it; it returned {weighted!r}."
        )
    factors, *learned = torch.autograd.grad(
        weighted.sum(), (losses, *learnable(weighting)), materialize_grads=True
    )
    for task, factor in zip(labels.names, factors.tolist(), strict=True):
        if not math.isfinite(factor):
            raise NonFiniteError(
                task, f"{type(weighting).__name__} gave its loss the weight {factor}."
            )
    weights = getattr(weighting, "weights", None)
    return factors, factors if weights is None else weights[labels.present], list(learned)


def learnable(weighting: Any) -> list[nn.Parameter]:
    """The parameters that the weighting learns."""
    parameters = weighting.parameters() if isinstance(weighting, nn.Module) else ()
    return [p for p in parameters if p.requires_grad]
