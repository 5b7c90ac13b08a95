"""ConFIG: equal cosines with all tasks, and the length that all tasks together ask for."""

from __future__ import annotations

import numpy as np

from equipoise.aggregation.base import Array, GramAggregator
from equipoise.aggregation.nnls import EPS
from equipoise.aggregation.solvers import solve_if_regular


class ConFIG(GramAggregator):
    """Conflict-free inverse gradients (Liu et al., ICLR 2025).

    With U the unit gradients, x = pinv(U) 1 has the same product with all of them;
    `d = (sum_i <g_i, x>) x / |x|^2`.

    TorchJD takes the pseudo-inverse of the T x P matrix of unit gradients in their own precision;
    here the T x T matrix of cosines is solved in double precision. Where it is singular, its
    eigenvalues below round-off are left out, and the products may differ.

    Unanimity value T g. Never conflicts where the gradients are linearly independent. Zero
    gradients are left out. Opposite gradients: d = 0. Collinear ones: their sum. Passes: one
    trunk forward and T backwards a step. Memory: T x P.
    """

    def weights(self, gram: Array, losses: Array | None) -> Array:
        """The coefficients of x on the gradients, times the summed products."""
        norms = np.sqrt(gram.diagonal())
        active = norms > 0
        w = np.zeros(len(gram))
        n = norms[active]
        cosines = gram[np.ix_(active, active)] / (n[:, None] * n)
        x = solve_if_regular(cosines, np.ones(len(n)))
        if x is None:
            values, vectors = np.linalg.eigh(cosines)
            kept = values > 10 * len(n) * EPS * values[-1]
            sums = vectors[:, kept].sum(0)
            # Rows that cancel leave sums of the size of round-off, not zeros.
            sums[np.abs(sums) <= 10 * len(n) * EPS] = 0
            x = vectors[:, kept] @ (sums / values[kept])
        products = cosines @ x
        square = float(x @ products)
        if square > 0:
            w[active] = (n @ products) / square * x / n
        return w
