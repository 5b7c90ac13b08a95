"""One batch through a SharedTrunk, and its backward passes: of the heads, then of the trunk."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from equipoise.engine.boundary import Boundary, along_trunk, through_trunk, weighted_sum
from equipoise.engine.direction import FeatureGradients
from equipoise.engine.gradients import Gradients
from equipoise.engine.rows import TakesRows
from equipoise.engine.stages import Stages
from equipoise.engine.trunk_looks import TRUNK, TrunkLooks
from equipoise.linalg import inner, length, on_host


class TrunkEvaluation(TrunkLooks):
    """The backward passes, after the forward pass. Arguments are those of `TrunkLooks`."""

    def repeated(self) -> TrunkEvaluation:
        """The same batch once more, as if it were new."""
        again = TrunkEvaluation(
            self.model, self.losses_of, self.inputs, self.targets, self.ranks, False,
            self.findings, self.whole,
        )  # fmt: skip
        again.repeats, again.scale = self, self.scale
        return again

    # ------------------------------------------------------------------ backward

    def heads_backward(self, weights: Tensor) -> list[Gradients]:
        """One backward through all heads; what they send back to the features is kept.

        Args:
            weights: (T',) on the CPU, of the losses.
        """
        ends, starts = self.weighted(self.values, weights.tolist())
        parameters = list(itertools.chain(*self.own))
        wanted = [*self.features.inputs, *parameters]
        found: Gradients = [None] * len(wanted)
        if ends and wanted:
            with self.passes.one():
                found = list(torch.autograd.grad(ends, wanted, starts, allow_unused=True))
        cut = len(self.features.inputs)
        self._sent_back = self.features.sort(found[:cut])
        rest = iter(self.ranks.sum_gradients(self.unscaled(found[cut:]), parameters))
        return [[next(rest) for _ in own] for own in self.own]

    def fill(self, rows: TakesRows) -> list[Gradients]:
        """One backward through all heads, and one through the trunk for each task."""
        own = self.heads_backward(torch.ones(len(self.own), device="cpu"))
        self.fill_from_heads(rows)
        return own

    def fill_from_heads(self, rows: TakesRows) -> None:
        """The rows, from what the heads have sent back: one trunk backward for each task."""
        rows.clear()
        n_tasks = len(self.own)
        for k in range(n_tasks):
            rows.add(self.row(k, retain_graph=k + 1 < n_tasks))

    def row(self, k: int, retain_graph: bool) -> Gradients:
        """The trunk's gradients of the k-th present task, of this process: one backward."""
        sent_back = self._sent_back[k] if self._sent_back else []
        outputs = self._outputs()
        keep = retain_graph and not self.findings.compiled_trunk
        with self.passes.one():
            found = through_trunk(outputs, self.shared, sent_back, keep)
        return self.unscaled(found)

    def _outputs(self) -> list[Tensor]:
        """The trunk's outputs, with a graph for one more backward pass."""
        used, self._used = self._used, True
        if not used or not self.findings.compiled_trunk:
            return self.features.outputs
        assert self.replay is not None
        with self.ranks.agreeing(), self.replay.again(TRUNK):
            return Boundary(self.model.trunk(self.inputs), 0).outputs

    def backward(self, coefficients: Tensor, factors: Tensor) -> tuple[Gradients, list[Gradients]]:
        """One backward through all heads and one through the trunk."""
        own = self.heads_backward(factors)
        together = weighted_sum(self._sent_back, coefficients[: len(self._sent_back)])
        return self.through(together), own

    # ------------------------------------------------------------------ the feature level

    def feature_gradients(self, factors: Tensor) -> tuple[FeatureGradients, list[Gradients]]:
        """What the heads send back, to be multiplied by `factors`, and the gradients of heads."""
        own = self.heads_backward(torch.ones(len(self.own), device="cpu"))
        outputs = self.features.outputs
        found = FeatureGradients(self._sent_back, outputs, factors, self.ranks, self.scale)
        return found, own

    def check_overlap(self, gradients: FeatureGradients, stages: Stages) -> None:
        """Warn, in the first looks alone, where no conflict can be seen among the features."""

    def through(self, latent: Gradients, again: bool = False) -> Gradients:
        """The trunk's gradients from one gradient for each of its outputs: one backward.

        Args:
            latent: those gradients, times `scale`; kept as `latent`.
            again: whether the trunk will be passed again, by `slopes` or `fill_from_heads`.
        """
        self.latent = starts = latent
        again = again and not self.findings.compiled_trunk  # which has no second derivative
        if again:
            starts = [None if u is None else u.detach().requires_grad_() for u in starts]
        outputs = self._outputs()
        with self.passes.one():
            found = through_trunk(outputs, self.shared, starts, create_graph=again)
        if again:
            self._linear = found, starts
            found = [None if g is None else g.detach() for g in found]
        return self.ranks.sum_gradients(self.unscaled(found), self.shared)

    def slopes(self, steps: Gradients) -> Tensor | None:
        """(T',) products `<g_t, v>` of the tasks' trunk gradients with v = J^T d_z; without g_t.

        They are `<q_t, J v>`, and J v is one derivative of the backward pass that gave v.

        Args:
            steps: what `through` gave, with `again`.

        Returns:
            float64 on the CPU; None if a layer has no such derivative, or a wrong one:
            `<d_z, J v>` has to be |v|^2.
        """
        moves = None
        if self._linear[0]:
            with self.passes.one():
                moves = along_trunk(*self._linear, steps)
        numbers = torch.zeros(len(self._sent_back) + 1, dtype=torch.float64, device="cpu")
        if moves is not None:
            numbers = on_host([inner(own, moves) for own in (*self._sent_back, self.latent)])
        *found, square = self.ranks.sum(numbers).tolist()
        expected = length(g for g in steps if g is not None) ** 2
        if not abs(square - expected) <= 1e-3 * expected:
            return None
        return torch.tensor(found or [0.0] * len(self.own), dtype=torch.float64, device="cpu")
