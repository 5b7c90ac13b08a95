"""IMTL-G: the direction with equal projections on all task gradients."""

from __future__ import annotations

import numpy as np

from equipoise.aggregation.base import EPS, Array, GramAggregator
from equipoise.aggregation.solvers import equal_projection_weights


class IMTLG(GramAggregator):
    """Impartial multi-task learning, gradient part (Liu et al., ICLR 2021, eq. 6).

    d = sum a_i g_i with sum a_i = 1 and equal products with all unit gradients. Weights may be
    negative. Where the gradients are linearly dependent, up to their own precision, the solution
    nearest to equal weights; the pseudo-inverse that other libraries use there need not solve the
    equations.

    "IMTL" in tables often means this part alone, as here; the loss part is IMTL-L.

    Unanimity value g. All tasks have the same cosine with d. It may be negative, so that every loss
    rises, and d may be very long: both where the plane through the gradients passes close to the
    origin or behind it, and both are the method's own. A zero gradient has no direction: that task
    is left out. Opposite gradients: d = 0. Passes: one trunk forward and T backwards a step.
    Memory: T x P.
    """

    def weights(self, gram: Array, losses: Array | None) -> Array:
        """Equal-projection weights over the tasks whose gradient is not zero."""
        return self.weights_at(gram, losses, EPS)

    def weights_at(self, gram: Array, losses: Array | None, eps: float) -> Array:
        """The same, where what cancels up to the precision of the rows counts as cancelling."""
        active = np.diagonal(gram) > 0
        w = np.zeros(len(gram))
        w[active] = equal_projection_weights(gram[np.ix_(active, active)], eps)
        return w
