"""The trials of a line search on a batch: something is moved, and the losses are looked at."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor

from equipoise.engine.direction import Combination, products
from equipoise.engine.displaced import Displaced
from equipoise.engine.evaluation import Evaluation
from equipoise.engine.gradients import Gradients
from equipoise.engine.rows import Rows
from equipoise.engine.sharpness_pass import SecondLook
from equipoise.engine.stages import Stages
from equipoise.engine.update import Update
from equipoise.linalg import finite_norm, inner, on_host
from equipoise.line_search.base import Rule


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
        evaluation: of the batch, which can be looked at again.
        stages: whose line search it is.
        factors: (T',) what multiplies each loss.
        own: gradients of each task's own parameters, of the weighted losses.
        update: the parameters, and what moves those that are not searched.
        buffer: gives an empty buffer for rows, if a step has to be verified by them.
        filled: the task gradients of the shared parameters, where there are any.
        second: the second look, if one made the direction; it has kept what the first one saw.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        stages: Stages,
        factors: Tensor,
        own: Sequence[Gradients],
        update: Update,
        buffer: Callable[[], Rows],
        filled: Rows | None = None,
        second: SecondLook | None = None,
    ) -> None:
        assert stages.line_search is not None
        self.evaluation, self.stages, self.update = evaluation, stages, update
        self.rule = stages.line_search
        self.buffer = buffer
        self.rows, self.first = filled, second.before if second else None
        self.own = list(own)
        self.factors = factors.detach()
        self.before = self.factors * evaluation.losses
        self._settled: list[Displaced] = []

    def along(
        self,
        result: Combination,
        shared: Gradients,
        heads: Sequence[Gradients],
        learned: Gradients,
    ) -> tuple[Found, Combination, float]:
        """Search along a direction, and leave the parameters where the search ends.

        Args:
            result: how the direction came about.
            shared: the direction of the shared parameters.
            heads: that of each task's own parameters.
            learned: gradients of the weighting's parameters, which the optimizer steps with its
                own learning rate if a step was accepted.

        Returns:
            What was found; how the direction that was searched in the end came about, and its
            length in the shared parameters.
        """
        promised = self._promised(heads, self._shared(result, shared))
        if not self.rule.descends(promised):
            # By flat regions, or by heads that negative coefficients let climb.
            result.fallback = True
            heads = self.own
            if self.first is not None:
                assert self.rows is not None
                shared = self.rows.per_parameter(self.first.direction)
            promised = self._promised(heads, self._shared(result, shared))
        if self.rule.moves == "optimizer":
            found = self._along_optimizer(result, shared, heads, learned, promised)
        else:
            found, result, shared, heads = self._find(result, shared, heads, promised)
            try:
                if found.accepted:  # also for those who count the optimizer's steps
                    self.update.learn(learned)
                self.update.give(shared, heads, learned)
            except BaseException:  # of a hook
                for displaced in self._settled:
                    displaced.back()
                raise
        self.rule.count(found.trials, found.step_size, found.slopes)
        norm = finite_norm(shared)
        return found, result, math.inf if norm is None else norm

    def _try(
        self,
        displaced: Displaced,
        directions: Sequence[tuple[Tensor, Tensor | None]],
        promised: Tensor,
        losses: Callable[[float], Tensor],
    ) -> Found:
        """Trials until one is accepted; the parameters are then there, or else back."""
        trials = 0
        with displaced:
            for size in self.rule.sizes():
                trials += 1
                displaced.move(directions, -size)
                after = losses(size)
                if self.rule.allows(size, self.before, self.factors * after, promised):
                    self._settle(displaced)
                    return Found(size, trials, promised, after)
        return Found(0.0, trials, promised, None)

    def _settle(self, *moved: Displaced) -> None:
        """Leave parameters where they are."""
        for displaced in moved:
            displaced.stay()
        self._settled += moved

    # ------------------------------------------------------------------ in the parameters

    def _find(
        self, result: Combination, shared: Gradients, heads: Sequence[Gradients], promised: Tensor
    ) -> tuple[Found, Combination, Gradients, Sequence[Gradients]]:
        """Search, and say along which direction in the end."""
        return self._among_parameters(shared, heads, promised), result, shared, heads

    def _among_parameters(
        self, shared: Gradients, heads: Sequence[Gradients], promised: Tensor
    ) -> Found:
        pairs = pairs_of(self.evaluation.shared, shared)
        pairs += pairs_of(itertools.chain(*self.evaluation.own), itertools.chain(*heads))
        displaced = Displaced([p for p, _ in pairs])
        trial = self.evaluation.trial_losses
        return self._try(displaced, pairs, promised, lambda size: trial())

    def _along_optimizer(
        self,
        result: Combination,
        shared: Gradients,
        heads: Sequence[Gradients],
        learned: Gradients,
        promised: Tensor,
    ) -> Found:
        """To where the optimizer would go, if that is downwards for every task."""
        optimizers = self.update.optimizers
        parameters = [*self.evaluation.shared, *itertools.chain(*self.evaluation.own)]
        before = Displaced([*parameters, *self.update.learner.parameters])
        states = [deepcopy(optimizer.state_dict()) for optimizer in optimizers]
        found = None
        try:
            before.moved_by_others()
            self.update.step(shared, heads, learned)
            starts = before.starts[: len(parameters)]
            moves = iter([a - b.detach() for a, b in zip(starts, parameters, strict=True)])
            before.move([(p, None) for p in parameters])
            steps: Gradients = [next(moves) for _ in self.evaluation.shared]
            own_steps: list[Gradients] = [[next(moves) for _ in own] for own in heads]
            along = self._promised(own_steps, self._products(result, shared, steps))
            if self.rule.descends(along):
                promised = along
            else:
                result.fallback = True
                steps, own_steps = shared, list(heads)
            found = self._among_parameters(steps, own_steps, promised)
            return found
        finally:
            if found is None or not found.accepted:
                before.back()
                for optimizer, state in zip(optimizers, states, strict=True):
                    optimizer.load_state_dict(state)

    # ------------------------------------------------------------------ first-order decreases

    def _promised(
        self, heads: Sequence[Gradients], shared: Tensor | None, rule: Rule | None = None
    ) -> Tensor:
        assert shared is not None
        of_heads = [inner(own, along) for own, along in zip(self.own, heads, strict=True)]
        return self.rule.promised(on_host(of_heads), shared, rule)

    def _shared(self, result: Combination, direction: Gradients) -> Tensor:
        """(T',) products of the tasks' gradients with the shared direction."""
        if result.products is not None and self.first is None:
            return result.products
        return self._products(result, direction, direction)

    def _products(self, result: Combination, shared: Gradients, steps: Gradients) -> Tensor:
        """(T',) products of the tasks' gradients with steps of the shared parameters."""
        if self.rows is None:
            return self._of_all(result, inner(shared, steps).cpu())
        clean = None if self.first is None else self.first.rows
        assert result.gram is not None
        return products(self.rows, result.gram, self.rows.joined(steps), clean)

    def _of_all(self, result: Combination, product: Tensor) -> Tensor:
        """(T',) with the right sum, where the direction c sum_t g_t is all that is known.

        A search that is content with that wants to know no more.
        """
        w = result.coefficients
        assert w is not None
        return (product / w.sum()).expand_as(w) if w.sum() != 0 else torch.zeros_like(w)


def pairs_of(
    parameters: Sequence[Tensor] | itertools.chain[Tensor],
    directions: Sequence[Tensor | None] | itertools.chain[Tensor | None],
) -> list[tuple[Tensor, Tensor | None]]:
    """Parameters with their directions, of those that have one."""
    return [(p, d) for p, d in zip(parameters, directions, strict=True) if d is not None]
