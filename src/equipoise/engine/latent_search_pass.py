"""The trials of a line search among the features, for which the heads alone are evaluated."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from equipoise.engine.direction import Combination, combine
from equipoise.engine.displaced import Displaced
from equipoise.engine.evaluation import Evaluation
from equipoise.engine.gradients import Gradients, scaled
from equipoise.engine.rows import Rows
from equipoise.engine.search_pass import Found, Search, pairs_of
from equipoise.engine.trunk_evaluation import TrunkEvaluation
from equipoise.linalg import inner, length
from equipoise.line_search.base import LatentLineSearch


class LatentSearch(Search):
    """One step whose length is searched for among the features of a SharedTrunk.

    The trunk has been passed backward once. Arguments are those of `Search`.
    """

    def __init__(self, look: Evaluation, *arguments: Any) -> None:
        super().__init__(look, *arguments)
        assert isinstance(look, TrunkEvaluation) and isinstance(self.rule, LatentLineSearch)
        self.look, self.latent_rule = look, self.rule

    def _find(
        self, result: Combination, shared: Gradients, heads: Sequence[Gradients], promised: Tensor
    ) -> tuple[Found, Combination, Gradients, Sequence[Gradients]]:
        """Trials among the features; then the trunk follows, and is looked at if asked for."""
        look, rule = self.look, self.latent_rule
        latent = look.latent
        scale = self._scale(shared)
        promised = self._promised(heads, scale * self._shared(result, shared))
        slopes = self._slopes(shared) if rule.verify else None
        of_heads = pairs_of(itertools.chain(*look.own), itertools.chain(*heads))
        of_trunk = pairs_of(look.shared, shared)
        moved_heads = Displaced([p for p, _ in of_heads])
        found = self._try(
            moved_heads, of_heads, promised, lambda size: look.trial_losses((latent, size * scale))
        )
        if not found.accepted:
            return found, result, shared, heads
        moved_trunk = Displaced([p for p, _ in of_trunk])
        with moved_heads, moved_trunk:
            moved_trunk.move(of_trunk, -found.step_size)
            after = None if slopes is None else look.trial_losses()
            if slopes is not None and after is not None:
                # A slope upwards would let the loss grow; such a step does not hold.
                falls = self._promised(heads, slopes.clamp_min(0), "full")
                held = rule.allows(found.step_size, self.before, self.factors * after, falls)
                found = found._replace(slopes=falls, losses=after, verified=held)
            if found.verified is not False:
                self._settle(moved_heads, moved_trunk)
                return found, result, shared, heads
        return self._in_the_end_among_parameters(found, heads)

    def _in_the_end_among_parameters(
        self, tried: Found, heads: Sequence[Gradients]
    ) -> tuple[Found, Combination, Gradients, Sequence[Gradients]]:
        """The step of Backtracking, after a latent one that did not hold."""
        rows, verifying, descent = self._filled(), self.stages.verifying, self.stages.descent
        assert verifying is not None and descent is not None
        # Whatever the rule among the features: here the full one judges, also the direction.
        descent = descent._replace(holds=partial(self.rule.descends, rule="full"))
        result, direction = combine(rows, verifying, self.look.losses, descent)
        shared = rows.per_parameter(direction)
        if self.stages.heads == "weighted":
            assert result.coefficients is not None
            heads = scaled(self.own, result.coefficients)
        promised = self._promised(heads, result.products, "full")
        if not self.rule.descends(promised, "full"):
            heads, result.fallback = self.own, True
            promised = self._promised(heads, result.products, "full")
        found = self._among_parameters(shared, heads, promised)
        found = found._replace(trials=tried.trials + found.trials, verified=False)
        return found, result, shared, heads

    def _scale(self, shared: Gradients) -> float:
        rule, ranks = self.latent_rule, self.look.ranks
        if rule.needs_lengths:
            square = float(self._latent_square())
            return rule.scale(length(g for g in shared if g is not None) ** 2, square, 1)
        return rule.scale(
            0.0, 0.0, int(ranks.sum(torch.tensor(self.look.features.samples(), device="cpu")))
        )

    def _latent_square(self) -> Tensor:
        """|d_z|^2 over all processes."""
        latent = self.look.latent
        return self.look.ranks.sum(inner(latent, latent).cpu())

    def _slopes(self, shared: Gradients) -> Tensor:
        """(T',) products of the weighted losses' trunk gradients with J^T d_z."""
        slopes = self.look.slopes(shared)
        if slopes is not None:
            return slopes * self.factors
        rows = self._filled()
        return rows.products(rows.joined(shared))

    def _filled(self) -> Rows:
        if self.rows is None:
            self.rows = self.buffer()
            self.look.fill_from_heads(self.rows)
            self.rows.weigh(self.factors)
        return self.rows

    def _shared(self, result: Combination, direction: Gradients) -> Tensor:
        """(T',) products of the tasks' feature gradients with the direction of the features."""
        if result.products is not None:
            return result.products
        return self._of_all(result, self._latent_square())
