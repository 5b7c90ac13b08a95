"""Where gradients go in the end: to the parameters, and to the optimizer that looks there."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equipoise.engine.adapters import WeightingStage
from equipoise.engine.evaluation import Evaluation
from equipoise.engine.gradients import Gradients, by_parameter, clip, give, part
from equipoise.engine.stages import Stages


@dataclass(frozen=True)
class Update:
    """The parameters of a step, and what moves them.

    Attributes:
        optimizer: makes the update.
        clip_norm: bound on the norm of the whole direction; None: none.
        look: whose parameters, shared and own, are updated.
        learnable: the parameters of the weighting.
    """

    optimizer: torch.optim.Optimizer
    clip_norm: float | None
    look: Evaluation
    learnable: Sequence[Tensor]

    def give(self, shared: Gradients, own: Sequence[Gradients], learned: Gradients) -> None:
        """Put the gradients where an optimizer looks."""
        give(self.look.shared, shared)
        give(*by_parameter(self.look.own, own))
        give(self.learnable, learned)

    def step(self, shared: Gradients, own: Sequence[Gradients], learned: Gradients) -> None:
        """Let the optimizer make its step."""
        self.give(shared, own, learned)
        if self.clip_norm is not None:
            moved = dict.fromkeys((*self.look.shared, *itertools.chain(*self.look.own)))
            part(moved)
            clip(moved, self.clip_norm)
        self.optimizer.step()
        torch.clear_autocast_cache()  # it holds half-precision copies of the old parameters

    def learn(self, learned: Gradients) -> None:
        """Let the optimizer step the weighting's parameters alone."""
        nothing: Gradients = [None] * len(self.look.shared)
        self.step(nothing, [[None] * len(own) for own in self.look.own], learned)


def adopt(
    optimizer: torch.optim.Optimizer, weighting: WeightingStage, before: Stages | None
) -> None:
    """Bring the weighting's parameters to the optimizer, in a group of their own.

    Args:
        optimizer: where they go.
        weighting: whose they are.
        before: the stages whose weighting it replaces; the parameters of that one go.
    """
    held = set(held_by(optimizer))
    new = [p for p in weighting.learnable if p not in held]
    gone = set() if before is None else set(before.weighting.learnable) - set(weighting.learnable)
    for group in [g for g in optimizer.param_groups if gone.issuperset(g["params"])]:
        optimizer.param_groups.remove(group)
        for p in group["params"]:
            optimizer.state.pop(p, None)
    if new:
        own: dict[str, Any] = {"params": new, "weight_decay": 0.0}
        lr = None if weighting.method is None else weighting.method.lr
        optimizer.add_param_group(own if lr is None else {**own, "lr": lr})


def held_by(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All parameters of an optimizer."""
    return [p for group in optimizer.param_groups for p in group["params"]]
