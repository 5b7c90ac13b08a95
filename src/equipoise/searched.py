"""The trials of a line search on a batch: something is moved, and the losses are looked at."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from equipoise.batch import Batch
from equipoise.boundary import Gradients
from equipoise.combine import Combination, combine, products
from equipoise.linalg import finite_norm, inner, length, on_host
from equipoise.line_search import FastBacktracking
from equipoise.line_search.base import Rule
from equipoise.moving import Kept, Moving
from equipoise.perturbed import SecondLook
from equipoise.rows import Rows
from equipoise.update import give_gradients, update
from equipoise.weigh import learnable

if TYPE_CHECKING:
    from equipoise.step import Step


class Found(NamedTuple):
    """How a search ended.

    Attributes:
        step_size: the accepted one; 0 if none was.
        trials: how many were tried.
        slopes: (T',) what each weighted loss falls by for each unit of step size, were it linear.
        losses: (T',) of the accepted trial; None if there was none.
        verified: whether the accepted latent step held for the whole network; None: not looked at.
    """

    step_size: float
    trials: int
    slopes: Tensor
    losses: Tensor | None
    verified: bool | None = None

    @property
    def accepted(self) -> bool:
        """Whether a step was made."""
        return self.losses is not None


class Search:
    """One step whose length is searched for.

    Args:
        step: whose line search, optimizer and weighting they are.
        batch: after its heads' backward; it has recorded its draws.
        factors: (T',) by which each loss is multiplied.
        own: gradients of the head parameters, as `Batch.heads_backward` gave them.
        rows: the task gradients of the shared parameters, where there are any.
        look: the second look that made the direction, if one did; it has kept what the first saw.
    """

    def __init__(
        self,
        step: Step,
        batch: Batch,
        factors: Tensor,
        own: Gradients,
        rows: Rows | None = None,
        look: SecondLook | None = None,
    ) -> None:
        assert step.line_search is not None
        self.step, self.batch, self.rows = step, batch, rows
        self.first = None if look is None else look.before
        self.own = own
        self.rule = step.line_search
        self.factors = factors.detach()
        self.before = self.factors * batch.losses
        self.head_parameters = [p for own in batch.head_parameters.values() for p in own]

    def along(
        self, result: Combination, trunk: Gradients, heads: Gradients, learned: Gradients
    ) -> tuple[Found, Combination, float]:
        """Search along a direction, and leave the parameters where the search ends.

        Args:
            result: how the direction came about.
            trunk: the direction of the trunk's parameters.
            heads: that of the heads.
            learned: gradients of the weighting's parameters, which the optimizer steps with its
                own learning rate if a step was accepted.

        Returns:
            What was found; how the direction of the trunk that was searched in the end came
            about, and its length.
        """
        promised = self._promised(heads, self._shared(result, trunk))
        if not self.rule.descends(promised):
            # By flat regions, or by heads that negative coefficients let climb.
            result.fallback = True
            heads = self.own
            if self.first is not None:
                assert self.rows is not None
                trunk = self.rows.per_parameter(self.first.direction)
            promised = self._promised(heads, self._shared(result, trunk))
        if self.rule.moves == "optimizer":
            found = self._along_optimizer(result, trunk, heads, learned, promised)
        else:
            if isinstance(self.rule, FastBacktracking):
                found, result, trunk = self._among_features(self.rule, result, trunk, heads)
            else:
                found = self._among_parameters([*trunk, *heads], promised)
            if found.accepted and learned:
                update(self.step, self.batch, [None] * len(trunk), [None] * len(heads), learned)
            give_gradients(self.step, self.batch, trunk, heads, learned)
        self.rule.count(found.trials, found.step_size, found.slopes)
        norm = finite_norm(trunk)
        return found, result, math.inf if norm is None else norm

    def _try(self, moving: Moving, promised: Tensor, losses: Callable[[float], Tensor]) -> Found:
        """Trials until one is accepted; the parameters are then there, or else back."""
        trials = 0
        with moving:
            for size in self.rule.sizes():
                trials += 1
                moving.to(size)
                after = losses(size)
                if self.rule.allows(size, self.before, self.factors * after, promised):
                    moving.stay()
                    return Found(size, trials, promised, after)
            moving.back()
        return Found(0.0, trials, promised, None)

    # ------------------------------------------------------------------ in the parameters

    def _among_parameters(self, directions: Gradients, promised: Tensor) -> Found:
        moving = Moving([*self.batch.trunk_parameters, *self.head_parameters], directions)
        return self._try(moving, promised, lambda size: self.batch.losses_again())

    def _along_optimizer(
        self,
        result: Combination,
        trunk: Gradients,
        heads: Gradients,
        learned: Gradients,
        promised: Tensor,
    ) -> Found:
        """To where the optimizer would go, if that is downwards for every task."""
        optimizer = self.step.optimizer
        parameters = [*self.batch.trunk_parameters, *self.head_parameters]
        before = Kept([*parameters, *learnable(self.step.weighting)])
        starts = before.starts[: len(parameters)]
        state = deepcopy(optimizer.state_dict())
        found = None
        try:
            update(self.step, self.batch, trunk, heads, learned)
            ends = [p.data for p in parameters]
            steps: Gradients = [a - b for a, b in zip(starts, ends, strict=True)]
            torch._foreach_copy_(ends, starts)
            cut = len(trunk)
            along = self._promised(steps[cut:], self._products(result, trunk, steps[:cut]))
            if self.rule.descends(along):
                promised = along
            else:
                result.fallback = True
                steps = [*trunk, *heads]
            found = self._among_parameters(steps, promised)
            return found
        finally:
            if found is None or not found.accepted:
                before.back()
                optimizer.load_state_dict(state)

    # ------------------------------------------------------------------ among the features

    def _among_features(
        self, rule: FastBacktracking, result: Combination, trunk: Gradients, heads: Gradients
    ) -> tuple[Found, Combination, Gradients]:
        batch = self.batch
        latent = batch.latent
        scale = self._scale(rule, trunk)
        promised = self._promised(heads, scale * self._shared(result, trunk))
        slopes = self._slopes(trunk) if rule.verify else None
        moving = Moving(self.head_parameters, heads)
        found = self._try(moving, promised, lambda size: batch.losses_again((latent, size * scale)))
        if not found.accepted:
            return found, result, trunk
        moving_trunk = Moving(batch.trunk_parameters, trunk)
        with moving, moving_trunk:
            moving_trunk.to(found.step_size)
            if slopes is None:
                moving_trunk.stay()
                return found, result, trunk
            after = batch.losses_again()
            # A slope upwards would let the loss grow; such a step does not hold.
            falls = self._promised(heads, slopes.clamp_min(0), "full")
            if rule.allows(found.step_size, self.before, self.factors * after, falls):
                moving_trunk.stay()
                sure = found._replace(slopes=falls, losses=after, verified=True)
                return sure, result, trunk
            moving.back()
            moving_trunk.back()
        return self._in_the_end_among_parameters(found, heads)

    def _in_the_end_among_parameters(
        self, tried: Found, heads: Gradients
    ) -> tuple[Found, Combination, Gradients]:
        """The step of Backtracking, after a latent one that did not hold."""
        step, batch = self.step, self.batch
        if self.rows is None:
            self.rows = batch.fill(step.buffer(batch))
        # Whatever the rule among the features: here the full one judges, also the direction.
        assert step.descent is not None
        descent = step.descent._replace(holds=partial(self.rule.descends, rule="full"))
        result, direction = combine(self.rows, step.rows_aggregator, batch.losses, descent)
        trunk = self.rows.per_parameter(direction)
        if step.heads == "weighted":
            heads = batch.heads_times(self.own, result.coefficients)
        promised = self._promised(heads, result.products, "full")
        if not self.rule.descends(promised, "full"):
            heads, result.fallback = self.own, True
            promised = self._promised(heads, result.products, "full")
        found = self._among_parameters([*trunk, *heads], promised)
        found = found._replace(trials=tried.trials + found.trials, verified=False)
        return found, result, trunk

    def _scale(self, rule: FastBacktracking, trunk: Gradients) -> float:
        batch = self.batch
        if rule.needs_lengths:
            square = batch.ranks.sum(inner(batch.latent, batch.latent).cpu())
            return rule.scale(length(g for g in trunk if g is not None) ** 2, float(square), 1)
        count = batch.features.samples()
        return rule.scale(0.0, 0.0, int(batch.ranks.sum(torch.tensor(count))))

    def _slopes(self, trunk: Gradients) -> Tensor:
        """(T',) products of the tasks' trunk gradients with J^T d_z."""
        slopes = self.batch.slopes(trunk)
        if slopes is None:
            self.rows = self.batch.fill(self.step.buffer(self.batch))
            slopes = self.rows.products(self.rows.joined(trunk))
        return slopes

    # ------------------------------------------------------------------ first-order decreases

    def _promised(
        self, heads: Gradients, shared: Tensor | None, rule: Rule | None = None
    ) -> Tensor:
        assert shared is not None
        return self.rule.promised(self._head_products(heads), shared, rule)

    def _shared(self, result: Combination, trunk: Gradients) -> Tensor:
        """(T',) products of the tasks' gradients with the shared direction."""
        if result.products is not None and self.first is None:
            return result.products
        if self.rule.level == "features":
            latent = self.batch.latent
            return self._of_all(result, self.batch.ranks.sum(inner(latent, latent).cpu()))
        return self._products(result, trunk, trunk)

    def _products(self, result: Combination, trunk: Gradients, steps: Gradients) -> Tensor:
        """(T',) products of the tasks' gradients with steps of the trunk's parameters."""
        if self.rows is None:
            return self._of_all(result, inner(trunk, steps).cpu())
        clean = None if self.first is None else self.first.rows
        return products(self.rows, result.gram, self.rows.joined(steps), clean)

    def _of_all(self, result: Combination, product: Tensor) -> Tensor:
        """(T',) with the right sum, where the direction c sum_t g_t is all that is known.

        A search that is content with that wants to know no more.
        """
        w = result.coefficients
        assert w is not None
        return (product / w.sum()).expand_as(w) if w.sum() != 0 else torch.zeros_like(w)

    def _head_products(self, heads: Gradients) -> Tensor:
        """(T',) products of each head's gradient with its direction."""
        found, first = [], 0
        for parameters in self.batch.head_parameters.values():
            part = slice(first, first + len(parameters))
            found.append(inner(self.own[part], heads[part]))
            first = part.stop
        return on_host(found)
