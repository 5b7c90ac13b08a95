"""How fast the losses rise around a model, along what F-MTL guards against."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from equipoise.diagnostics.evaluation import (
    Batches,
    Evaluation,
    Function,
    ascending,
    chosen,
    evaluation,
)
from equipoise.diagnostics.relative import MeasureError
from equipoise.errors import NOT_FINITE, NonFiniteError
from equipoise.linalg import finite_norm
from equipoise.sharpness import TaskSharpness
from equipoise.trunk import SharedTrunk

Where = Literal["both", "trunk"]
"""What `sharpness_curve` perturbs: trunk and head together, or the trunk alone."""


@dataclass(frozen=True, eq=False)
class SharpnessCurve:
    """Increases of the losses under perturbation. Tensors are float64 on the CPU.

    Attributes:
        tasks: the T task names.
        radii: (R,) radii rho, in the units of the parameters.
        losses: (T,) mean losses without perturbation; NaN for a task without a label.
        values: (R, T) increases L_i(theta + eps_i) - L_i(theta); NaN for a task without a label.
    """

    tasks: tuple[str, ...]
    radii: Tensor
    losses: Tensor
    values: Tensor


def sharpness_curve(
    model: SharedTrunk,
    batches: Batches,
    losses: Mapping[str, Function],
    radii: Iterable[float],
    perturbation: TaskSharpness | None = None,
    where: Where = "both",
) -> SharpnessCurve:
    """How much each task's loss rises where its own gradient points, at growing distance.

    To first order the worst rise within the radius rho, the inner maximum of SAM (Foret et al.,
    ICLR 2021, eq. 2) and of F-MTL for each task (Phan et al., arXiv 2211.13723, eq. 4): with g_i
    the gradient of the mean loss over all batches, eps_i = rho g_i / |g_i|. For a quadratic loss
    with Hessian H it is rho |g| + rho^2 g'Hg / (2 |g|^2).

    Args:
        model: in any mode; it is looked at in evaluation mode, and stays as it is.
        batches: pairs (inputs, targets by task name), gone through 1 + T (1 + R) times; no
            iterator. Samples whose target is wholly NaN are left out of their task.
        losses: task name -> callable(output, target) -> mean loss over the samples it is given;
            tasks may be left out.
        radii: R radii from 0 up, ascending; they take the place of the perturbation's `rho`, and
            of its `rho_task`.
        perturbation: how eps follows from the gradient: its `adaptive`, and its `norm`, by which
            trunk and head are each moved by rho ("group") or both together ("joint"). Every task
            climbs its own gradient, whatever `perturb` says. None: `TaskSharpness()`.
        where: "both": the trunk and the task's head are moved together; "trunk": the trunk alone.

    Raises:
        TaskError: an unknown task, or a loss that is not a scalar or not connected to the network.
        NonFiniteError: a gradient is not finite.
        MeasureError: wrong radii, no loss, an unknown `where`, nothing trainable there, an
            iterator, or no batch.

    Passes: for each task one forward and backward and R forwards over the batches, and one
    forward for all. Memory: three times the parameters.
    """
    if where not in get_args(Where):
        raise MeasureError(f"where is {where!r}; give 'both' or 'trunk'.")
    lengths = ascending(radii)
    if perturbation is None:
        perturbation = TaskSharpness()
    functions = {task: losses[task] for task in chosen(model, losses, "losses")}
    values = torch.full((len(lengths), len(functions)), torch.nan, dtype=torch.float64)
    with evaluation(model, batches) as looking:
        clean = looking.means(functions)
        for k, task in enumerate(functions):
            groups = _groups(looking, task, perturbation, where)
            gradients = _gradients(looking, task, functions[task], groups)
            if gradients is None:
                continue
            # The length of a gradient, and ASAM's scale, are those of the parameters as they are.
            norms = [perturbation.length(*pair) for pair in zip(groups, gradients, strict=True)]
            for r, radius in enumerate(lengths.tolist()):
                for group, gradient, norm in zip(groups, gradients, norms, strict=True):
                    offsets = perturbation.offsets(group, gradient, radius, norm)
                    looking.move(zip(group, offsets, strict=True))
                values[r, k] = looking.means({task: functions[task]})[0] - clean[k]
                looking.put_back()
    return SharpnessCurve(tuple(functions), lengths, clean, values)


def _groups(
    looking: Evaluation, task: str, perturbation: TaskSharpness, where: Where
) -> list[list[nn.Parameter]]:
    """The parameters that are moved, in groups that are scaled to the radius separately."""
    trunk = [p for p in looking.model.shared_parameters() if p.requires_grad]
    head = [p for p in looking.model.head_parameters(task) if p.requires_grad]
    if where == "trunk":
        groups = [trunk]
    elif perturbation.norm == "joint":
        groups = [[*trunk, *head]]
    else:
        groups = [trunk, head]
    groups = [group for group in groups if group]
    if not groups:
        place = "trunk" if where == "trunk" else f"trunk and head {task!r}"
        raise MeasureError(f"{place}: no parameter is trainable; there is nothing to perturb.")
    return groups


def _gradients(
    looking: Evaluation, task: str, loss: Function, groups: list[list[nn.Parameter]]
) -> list[list[Tensor]] | None:
    """The gradient of the task's mean loss, group by group; None for a task without a label."""
    found = looking.gradient(task, loss, [p for group in groups for p in group])
    if found is None:
        return None
    if finite_norm(found) is None:
        raise NonFiniteError(task, NOT_FINITE)
    rest = iter(found)
    return [[next(rest) for _ in group] for group in groups]
