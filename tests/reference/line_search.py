"""Slow backtracking line searches, written from the fast line search thesis, as corrected.

Every trial moves a copy of the whole network in float64 and looks at it anew: nothing is shared
between trials, and every inner product is a sum over the gradients of a pass of its own. Signs:
directions are gradient-like, steps subtract them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from reference.aggregation import min_norm_weights
from torch import Tensor, nn

Vector = np.ndarray
Direction = Callable[[Vector], Vector]  # rows (T, P) or (T, B d) -> one direction


@dataclass
class Found:
    """The outcome of one search; `trunk` and `heads` are moved copies."""

    trunk: nn.Module
    heads: dict[str, nn.Module]
    step_size: float
    trials: int
    accepted: bool
    replaced: bool  # the direction let a loss grow, the min-norm direction took its place (D.5)
    fell_back: bool = False  # the verified latent step failed in the parameters


def min_norm(rows: Vector) -> Vector:
    """Return the shortest vector of the convex hull of the rows."""
    return min_norm_weights(rows) @ rows


def upper_at(epoch: int, upper: float = 1.0, every: int = 10, factor: float = 0.5) -> float:
    """Return the first step size that is tried in an epoch, counted from 0."""
    for _ in range(epoch // every):
        upper = upper * factor
    return upper


def sizes(upper: float, shrink: float, floor: float) -> list[float]:
    """Return all step sizes that a search may try, largest first: none is below the floor."""
    tried = []
    while upper >= floor:
        tried.append(upper)
        upper = upper * shrink
    return tried


class Problem:
    """A trunk, heads and losses at one batch, seen from where the parameters are.

    The dropout masks of the first look are those of all others; the buffers of the given modules
    never move, since every look is taken on a copy.
    """

    def __init__(
        self,
        trunk: nn.Module,
        heads: Mapping[str, nn.Module],
        losses: Mapping[str, Callable[[Any, Any], Tensor]],
        inputs: Any,
        targets: Mapping[str, Any],
    ) -> None:
        self.trunk, self.heads, self.losses = trunk, dict(heads), losses
        self.inputs, self.targets = inputs, targets
        self.tasks = [task for task in heads if task in targets]
        self.starts = {"trunk": torch.get_rng_state()}
        with torch.no_grad():
            z = deepcopy(trunk)(inputs)
            for task in self.tasks:
                self.starts["head " + task] = torch.get_rng_state()
                deepcopy(self.heads[task])(z)
        self.after = torch.get_rng_state()

    def features(self, trunk: nn.Module) -> Tensor:
        """Give z of a copy of a trunk."""
        torch.set_rng_state(self.starts["trunk"])
        return trunk(self.inputs)

    def loss(self, task: str, head: nn.Module, z: Tensor) -> Tensor:
        """Give the loss of one task from features."""
        torch.set_rng_state(self.starts["head " + task])
        return self.losses[task](head(z), self.targets[task])

    def look(self) -> dict[str, Any]:
        """Give L_t, g_t and h_t by parameter, q_t by feature."""
        seen: dict[str, Any] = {"L": {}, "g": {}, "h": {}, "q": {}}
        for task in self.tasks:
            trunk, head = deepcopy(self.trunk), deepcopy(self.heads[task])
            z = self.features(trunk)
            loss = self.loss(task, head, z)
            wanted = (*trained(trunk), *trained(head), *([z] if z.requires_grad else []))
            found = torch.autograd.grad(loss, wanted, materialize_grads=True)
            n, k = len(trained(trunk)), len(trained(head))
            seen["L"][task] = loss.item()
            seen["g"][task] = vector(found[:n])
            seen["h"][task] = vector(found[n : n + k])
            seen["q"][task] = vector(found[n + k :])
        return seen

    def through_trunk(self, d: Vector) -> Vector:
        """Give (dz/dtheta)^T d for a direction d among the features."""
        trunk = deepcopy(self.trunk)
        z = self.features(trunk)
        if not z.requires_grad:
            return np.zeros(0)
        cotangent = torch.as_tensor(d, dtype=z.dtype).reshape(z.shape)
        return vector(torch.autograd.grad(z, trained(trunk), cotangent, materialize_grads=True))

    def moved_head(self, task: str, h: Vector, step: float) -> nn.Module:
        """Give a copy of a head at phi_t - step h_t."""
        return moved(self.heads[task], step * h)


def backtracking(
    problem: Problem,
    direction: Direction,
    *,
    beta: float = 0.1,
    shrink: float = 0.5,
    upper: float = 1.0,
    floor: float = 1e-10,
    rule: str = "full",
) -> Found:
    """Search along d_sh = A(g_1..g_T), all parameters moved at every trial (Alg. 4.1, eq. 4.1)."""
    seen = problem.look()
    rows = np.stack([seen["g"][task] for task in problem.tasks])
    d, replaced = admissible(rows, direction, rule)
    trials = 0
    for step in sizes(upper, shrink, floor):
        trials += 1
        trunk = moved(problem.trunk, step * d)
        heads = {t: problem.moved_head(t, seen["h"][t], step) for t in problem.tasks}
        if all(
            holds(
                measured(problem, task, trunk, heads[task]),
                seen["L"][task],
                seen["h"][task] @ seen["h"][task],
                row @ d,
                step,
                beta,
                rule,
            )
            for task, row in zip(problem.tasks, rows, strict=True)
        ):
            torch.set_rng_state(problem.after)
            return Found(trunk, {**problem.heads, **heads}, step, trials, True, replaced)
    torch.set_rng_state(problem.after)
    return Found(problem.trunk, problem.heads, 0.0, trials, False, replaced)


def fast_backtracking(
    problem: Problem,
    direction: Direction,
    *,
    beta: float = 0.1,
    shrink: float = 0.5,
    upper: float = 1.0,
    floor: float = 1e-10,
    rule: str = "full",
    latent_scale: float | str = 1,
    verify: bool = False,
) -> Found:
    """Search along d_z = A(q_1..q_T) among the features, with the heads only (Alg. 4.2, eq. 4.2).

    Every trial starts from the z of the first look. The trunk moves by step times (dz/dtheta)^T
    d_z once a step is accepted. With `verify` the accepted step has to satisfy eq. 4.1 at the new
    parameters, where no slope may lead upwards, or the search along the parameters takes its place.
    """
    seen = problem.look()
    rows = np.stack([seen["q"][task] for task in problem.tasks])
    d, replaced = admissible(rows, direction, rule)
    through = problem.through_trunk(d)
    with torch.no_grad():
        z = problem.features(deepcopy(problem.trunk))
    scale = scaled(latent_scale, d, through, len(z))
    trials = 0
    for step in sizes(upper, shrink, floor):
        trials += 1
        shifted = z - torch.as_tensor(step * scale * d, dtype=z.dtype).reshape(z.shape)
        heads = {t: problem.moved_head(t, seen["h"][t], step) for t in problem.tasks}
        values = {}
        with torch.no_grad():
            for task in problem.tasks:
                values[task] = float(problem.loss(task, deepcopy(heads[task]), shifted))
        if all(
            holds(
                values[task],
                seen["L"][task],
                seen["h"][task] @ seen["h"][task],
                scale * (row @ d),
                step,
                beta,
                rule,
            )
            for task, row in zip(problem.tasks, rows, strict=True)
        ):
            break
    else:
        torch.set_rng_state(problem.after)
        return Found(problem.trunk, problem.heads, 0.0, trials, False, replaced)

    trunk = moved(problem.trunk, step * through)
    fell_back = verify and not all(
        holds(
            measured(problem, task, trunk, heads[task]),
            seen["L"][task],
            seen["h"][task] @ seen["h"][task],
            max(seen["g"][task] @ through, 0.0),
            step,
            beta,
            "full",
        )
        for task in problem.tasks
    )
    torch.set_rng_state(problem.after)
    if fell_back:
        slow = backtracking(problem, direction, beta=beta, shrink=shrink, upper=upper, floor=floor)
        slow.trials, slow.fell_back = slow.trials + trials, True
        return slow
    return Found(trunk, {**problem.heads, **heads}, step, trials, True, replaced)


# ------------------------------------------------------------------------------- its parts


def holds(
    new: float,
    old: float,
    head: float,
    shared: float,
    step: float,
    beta: float,
    rule: str,
) -> bool:
    """Tell whether L(new) <= L - step beta (|h|^2 + <g, d>), the terms named by the rule only."""
    fall = {"full": head + shared, "head": head, "latent": shared}[rule]
    return math.isfinite(new) and new <= old - step * beta * fall


def admissible(rows: Vector, direction: Direction, rule: str) -> tuple[Vector, bool]:
    """Give the direction, or the min-norm one where the rule would let a loss grow (D.5)."""
    d = direction(rows)
    if rule != "head" and min(row @ d for row in rows) < 0:
        return min_norm(rows), True
    return d, False


def scaled(latent_scale: float | str, d: Vector, through: Vector, batch: int) -> float:
    """Give s: how many times as far the features are thought to move."""
    if latent_scale == "batch":
        return float(batch)
    if latent_scale == "matched":
        return float(through @ through / (d @ d)) if d @ d > 0 else 1.0
    return float(latent_scale)


def measured(problem: Problem, task: str, trunk: nn.Module, head: nn.Module) -> float:
    """Give a task's loss at moved parameters, by a pass of its own."""
    with torch.no_grad():
        return float(problem.loss(task, deepcopy(head), problem.features(deepcopy(trunk))))


def trained(module: nn.Module) -> list[nn.Parameter]:
    """Give the parameters that are not frozen."""
    return [p for p in module.parameters() if p.requires_grad]


def moved(module: nn.Module, offset: Vector) -> nn.Module:
    """Give a copy with an offset subtracted from its trained parameters."""
    copy, position = deepcopy(module), 0
    with torch.no_grad():
        for p in trained(copy):
            piece = offset[position : position + p.numel()]
            p -= torch.as_tensor(piece, dtype=p.dtype).reshape(p.shape)
            position += p.numel()
    return copy


def vector(tensors: Any) -> Vector:
    """Concatenate everything in float64."""
    parts = [t.detach().double().reshape(-1).numpy() for t in tensors]
    return np.concatenate(parts) if parts else np.zeros(0)
