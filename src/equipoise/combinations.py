"""What makes no sense together is refused when a Step is built."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from equipoise.combine import works_on_features
from equipoise.errors import CombinationError, TaskError, nearest
from equipoise.sharpness import TaskSharpness
from equipoise.trunk import SeparateTrunks

if TYPE_CHECKING:
    from equipoise.step import Step


def refuse_senseless(step: Step) -> None:
    """Check the parts of a Step against each other; they are not used yet.

    Raises:
        TaskError: a head without a loss, or a loss without a head.
        CombinationError: two parts that cannot work together; names both.
        ValueError: a value out of its range.
    """
    for task in (*step.losses, *step.model.tasks):
        if task not in step.model.tasks:
            raise TaskError(task, "has a loss but no head; " + nearest(task, step.model.tasks))
        if task not in step.losses:
            raise TaskError(task, "has a head but no loss; add it to `losses`.")
    if step.level not in ("parameters", "features"):
        raise ValueError(f"level is {step.level!r}; known are 'parameters' and 'features'.")
    if step.heads not in ("own", "weighted"):
        raise ValueError(f"heads is {step.heads!r}; known are 'own' and 'weighted'.")
    if step.clip_norm is not None and not step.clip_norm > 0:
        raise ValueError(f"clip_norm is {step.clip_norm}; it must be positive, or None.")
    name = type(step.aggregator).__name__
    if step.level == "features" and not works_on_features(step.aggregator):
        raise CombinationError(
            f"level='features' and {name}: the feature level needs an aggregator with "
            "coefficients(gram). Use level='parameters'."
        )
    if step.heads == "weighted" and not hasattr(step.aggregator, "coefficients"):
        raise CombinationError(
            f"heads='weighted' and {name}: it has no coefficients to multiply the heads by. Use "
            "heads='own'."
        )
    if step.heads == "weighted" and step.sharpness is not None:
        raise CombinationError(
            f"heads='weighted' and {type(step.sharpness).__name__}: a step has two sets of "
            "coefficients then, and heads learn where each task was perturbed. Use heads='own'."
        )
    if step.sharpness is not None:
        _refuse_senseless_sharpness(step, name)
    if isinstance(step.model.trunk, SeparateTrunks) and known_coefficients(step, 1) is None:
        if getattr(step.weighting, "needs_gram", False):
            name = type(step.weighting).__name__
        raise CombinationError(f"separate trunks and {name}: there is no shared parameter.")
    n_tasks = getattr(step.weighting, "n_tasks", None)
    if n_tasks not in (None, len(step.model.tasks)):
        raise CombinationError(
            f"{type(step.weighting).__name__}(n_tasks={n_tasks}) and a SharedTrunk with "
            f"{len(step.model.tasks)} tasks: give n_tasks={len(step.model.tasks)}."
        )
    if isinstance(step.optimizer, torch.optim.LBFGS):
        raise CombinationError("Step and LBFGS: LBFGS evaluates the loss itself. Use another.")
    held = {id(p) for p in held_by(step.optimizer)}
    if not any(id(p) in held for p in step.model.parameters()):
        raise ValueError("the optimizer holds none of the model's parameters.")


def _refuse_senseless_sharpness(step: Step, aggregator: str) -> None:
    sharp = step.sharpness
    name = type(sharp).__name__
    if not isinstance(sharp, TaskSharpness):
        raise CombinationError(
            f"sharpness is a {name}; give a TaskSharpness, or None for gradients taken here."
        )
    if step.level == "features":
        raise CombinationError(
            f"level='features' and {name}: flat regions need the gradients of the shared "
            "parameters for each task. Use level='parameters'."
        )
    if isinstance(step.model.trunk, SeparateTrunks):
        raise CombinationError(f"separate trunks and {name}: there is no shared parameter.")
    degree = getattr(step.aggregator, "degree", 1)
    if sharp.decompose and degree != 1:
        raise CombinationError(
            f"{name} and {aggregator} of degree {degree:g}: the flat part would not be in "
            f"proportion to rho. Give {aggregator} degree=1, or use decompose=False."
        )
    interval = getattr(step.aggregator, "interval", 1)
    if interval > 1:
        raise CombinationError(
            f"{name} and {aggregator}(k={interval}): flat regions need the rows in every step. Use "
            f"{name}(every={interval}) around the aggregator itself."
        )


def known_coefficients(step: Step, n_tasks: int) -> Tensor | None:
    """The coefficients that the aggregator can name without seeing gradients, if it can.

    None as well where the weighting wants to see what the gradients' inner products are, and where
    each task's gradient says where its loss is looked at a second time.
    """
    perturbs = step.sharpness is not None and step.sharpness.active
    if perturbs or getattr(step.weighting, "needs_gram", False):
        return None
    known = getattr(step.aggregator, "known_coefficients", None)
    return None if known is None else known(n_tasks)


def held_by(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All parameters of an optimizer."""
    return [p for group in optimizer.param_groups for p in group["params"]]
