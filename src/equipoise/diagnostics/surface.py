"""Losses on a plane through the parameters of a model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from equipoise.diagnostics.evaluation import (
    Batches,
    Function,
    at_least,
    chosen,
    evaluation,
    private,
)
from equipoise.diagnostics.relative import MeasureError
from equipoise.trunk import SharedTrunk


@dataclass(frozen=True, eq=False)
class LossSurface:
    """The losses at theta + a d_1 + b d_2. Tensors are float64 on the CPU.

    Attributes:
        tasks: the T task names.
        coordinates: (points,) the values of a, and of b, from -span to span.
        values: (T, points, points) mean losses; a varies along the first of the two, b along the
            second. NaN for a task without a label; inf or NaN where the loss itself is.
    """

    tasks: tuple[str, ...]
    coordinates: Tensor
    values: Tensor


Directions = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
"""Two directions, each parameter name -> tensor of its shape."""


def random_directions(
    model: nn.Module, generator: torch.Generator | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two Gaussian directions for `loss_surface`, to be shared by models of one architecture.

    Args:
        model: whose trainable parameters give the names and the shapes.
        generator: a CPU generator; None: the same directions each time.

    Returns:
        Twice parameter name -> tensor of its shape from N(0, 1), float64 on the CPU, not yet
        scaled to any filter.

    Raises:
        MeasureError: the generator is not a CPU generator.
    """
    generator = private(generator)
    shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}

    def draw() -> dict[str, Tensor]:
        return {
            name: torch.randn(shape, generator=generator, dtype=torch.float64)
            for name, shape in shapes.items()
        }

    return draw(), draw()


def loss_surface(
    model: SharedTrunk,
    batches: Batches,
    losses: Mapping[str, Function],
    span: float = 1.0,
    points: int = 21,
    generator: torch.Generator | None = None,
    directions: Directions | None = None,
) -> LossSurface:
    """Every task's loss on a plane through the model along two filter-normalised directions.

    Li et al. (NeurIPS 2018, section 4): each filter of a direction is scaled to the length of the
    model's own, d_f <- d_f |theta_f| / |d_f|, so that the picture does not depend on how the
    weights are scaled; biases and the parameters of normalisation layers do not move. A filter is
    what feeds one output: a row of a linear weight, weight[k] of a convolution. What has at most
    one dimension, and the parameters of LayerNorm and RMSNorm, do not move; neither does what is
    frozen. As in Phan et al. (arXiv 2211.13723, figure 5) BatchNorm uses its running statistics.

    Args:
        model: in any mode; it is looked at in evaluation mode, and stays as it is.
        batches: pairs (inputs, targets by task name), gone through points^2 times; no iterator.
            Samples whose target is wholly NaN are left out of their task.
        losses: task name -> callable(output, target) -> mean loss over the samples it is given;
            tasks may be left out.
        span: the largest coordinate; 1 moves every filter by its own length.
        points: the number of points along each direction; the model itself is one if it is odd.
        generator: a CPU generator for the directions; None: the same ones each time.
        directions: two directions by parameter name, as of `random_directions`, instead of new
            ones; they are scaled to the filters of this model.

    Raises:
        TaskError: an unknown task, or a loss that is not a scalar.
        MeasureError: a wrong span or number of points, no loss, directions that do not fit the
            model, an iterator, or no batch.

    Passes: points^2 forwards over the batches. Memory: three times the parameters.
    """
    at_least(points, 2, "points")
    if not 0 < span < math.inf:
        raise MeasureError(f"span is {span}; give a finite number above 0.")
    functions = {task: losses[task] for task in chosen(model, losses, "losses")}
    if directions is None:
        directions = random_directions(model, generator)
    first, second = _fitting(model, directions)
    # Whole numbers first: symmetric, and exactly 0 in the middle.
    coordinates = torch.arange(1 - points, points, 2, dtype=torch.float64) / (points - 1) * span
    values = torch.empty(len(functions), points, points, dtype=torch.float64)
    with evaluation(model, batches) as looking:
        for i, a in enumerate(coordinates.tolist()):
            for j, b in enumerate(coordinates.tolist()):
                looking.move((p, a * d + b * second[p]) for p, d in first.items())
                values[:, i, j] = looking.means(functions)
    return LossSurface(tuple(functions), coordinates, values)


def _fitting(model: nn.Module, directions: Sequence[Mapping[str, Tensor]]) -> list[dict]:
    """Both directions by parameter, scaled to its filters; of those parameters that move."""
    still = {
        id(p)
        for module in model.modules()
        if isinstance(module, nn.LayerNorm | nn.RMSNorm)
        for p in module.parameters(recurse=False)
    }
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if len(directions) != 2:
        raise MeasureError(f"directions holds {len(directions)}; give two.")
    for direction in directions:
        if set(direction) != set(trainable):
            name = min(set(direction) ^ set(trainable))
            holder = "model" if name in trainable else "direction"
            raise MeasureError(f"{name!r} is a trainable parameter of the {holder} alone.")
        for name, p in trainable.items():
            if direction[name].shape != p.shape:
                raise MeasureError(
                    f"direction {name!r} has shape {tuple(direction[name].shape)}; the parameter "
                    f"has {tuple(p.shape)}."
                )
    moving = {n: p for n, p in trainable.items() if p.dim() > 1 and id(p) not in still}
    if not moving:
        raise MeasureError("the model has no trainable weight of two or more dimensions to move.")
    return [{p: _filters(direction[n], p) for n, p in moving.items()} for direction in directions]


def _filters(direction: Tensor, parameter: Tensor) -> Tensor:
    """The direction with each filter as long as the parameter's, on its device."""
    d = direction.detach().cpu().double().flatten(1)
    theta = parameter.detach().cpu().double().flatten(1)
    lengths = d.norm(dim=1, keepdim=True)
    ratio = theta.norm(dim=1, keepdim=True) / lengths
    ratio = torch.where(lengths > 0, ratio, 0.0)  # a filter without a direction stays
    return (d * ratio).reshape(parameter.shape).to(parameter.device, parameter.dtype)
