"""Where the gradients go in the end: to the parameters, and to the optimizer that looks there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from equipoise.batch import Batch
from equipoise.boundary import Gradients
from equipoise.weigh import learnable

if TYPE_CHECKING:
    from equipoise.step import Step


def give_gradients(
    step: Step, batch: Batch, trunk: Gradients, heads: Gradients, learned: Gradients
) -> None:
    """Put the gradients where an optimizer looks, None where no task reached."""
    parameters = [
        *batch.trunk_parameters,
        *(p for own in batch.head_parameters.values() for p in own),
        *learnable(step.weighting),
    ]
    for parameter, gradient in zip(parameters, (*trunk, *heads, *learned), strict=True):
        parameter.grad = gradient


def update(
    step: Step, batch: Batch, trunk: Gradients, heads: Gradients, learned: Gradients
) -> None:
    """Let the optimizer make its step."""
    give_gradients(step, batch, trunk, heads, learned)
    if step.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(step.model.parameters(), step.clip_norm)
    step.optimizer.step()
