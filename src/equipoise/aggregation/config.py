"""ConFIG: equal cosines with all tasks, and the length that all tasks together ask for."""

from __future__ import annotations

import numpy as np

from equipoise.aggregation.base import EPS, Array, GramAggregator
from equipoise.aggregation.solvers import solve_if_regular


class ConFIG(GramAggregator):
    """Conflict-free inverse gradients (Liu et al., ICLR 2025).

    With U the unit gradients, x = pinv(U) 1 has the same product with all of them;
    `d = (sum_i <g_i, x>) x / |x|^2`.

    TorchJD takes the pseudo-inverse of the T x P matrix of unit gradients in their own precision;
    here the T x T matrix of cosines is solved in double precision. Where it is singular, its
    eigenvalues below the round-off of the rows are left out, and the products may differ.

    Unanimity value T g. Never conflicts where the gradients are linearly independent. Zero
    gradients are left out. Opposite gradients: d = 0. Collinear ones: their sum. Passes: one
    trunk forward and T backwards a step. Memory: T x P.
    """

    def weights(self, gram: Array, losses: Array | None) -> Array:
        """The coefficients of x on the gradients, times the summed products."""
        return self.weights_at(gram, losses, EPS)

    def weights_at(self, gram: Array, losses: Array | None, eps: float) -> Array:
        """The same, where what cancels up to the precision of the rows counts as cancelling."""
        norms = np.sqrt(gram.diagonal())
        active = norms > 0
        w = np.zeros(len(gram))
        n = norms[active]
        m = len(n)
        noise = 10 * m * EPS + m * eps
        cosines = gram[np.ix_(active, active)] / (n[:, None] * n)
        x = solve_if_regular(cosines, np.ones(m), max(1e-4, np.sqrt(10 * m * noise)))
        if x is None:
            values, vectors = np.linalg.eigh(cosines)
            kept = values > noise * values[-1]
            sums = vectors[:, kept].sum(0)
            if np.linalg.norm(sums) <= 10 * noise:  # all unit gradients cancel, up to round-off
                return w
            # Rows that cancel leave sums of the size of round-off, not zeros.
            sums[np.abs(sums) <= 10 * m * EPS] = 0
            x = vectors[:, kept] @ (sums / values[kept])
        products = cosines @ x
        square = float(x @ products)
        if square > 0:
            w[active] = (n @ products) / square * x / n
        return w
