"""UPGrad: the mean of all gradients, each first freed of its conflicts."""

from __future__ import annotations

import numpy as np

from equipoise.aggregation.base import Array, GramAggregator
from equipoise.aggregation.quadratic import dual_cone_shifts


class UPGrad(GramAggregator):
    """Unconflicting projection of gradients (Quinton & Rey, 2024): mean of projections.

    Each g_i is projected onto the dual cone `{x: <g_j, x> >= 0 for all j}`, and d is the mean of
    the projections. Each is a convex quadratic problem in T unknowns, solved exactly and all
    together.

    TorchJD, the authors' code, adds 1e-4 to the diagonal of the normalised Gram matrix and takes
    gradients with trace below 1e-4 for zero; here nothing is added and no scale is special.

    Unanimity value g. Never conflicts: `<g_i, d> >= 0`. Without conflict the mean; for two tasks
    half of PCGrad's sum. A zero gradient counts in the mean, as zero. Opposite gradients: d = 0.
    Passes: one trunk forward and T backwards a step. Memory: T x P.
    """

    never_conflicts = True
    damping = 1

    def weights(self, gram: Array, losses: Array | None) -> Array:
        """1/T each, and what the projections add."""
        w = np.full(len(gram), 1 / len(gram))
        norms = np.sqrt(gram.diagonal())
        active = norms > 0
        if active.all():
            cosines = gram / (norms[:, None] * norms)
            if cosines.min() < 0:
                w += norms @ dual_cone_shifts(cosines, np.eye(len(gram))) / (norms * len(gram))
        else:
            w[active] = self.weights(gram[np.ix_(active, active)], None)
            w[active] *= active.sum() / len(gram)
        return w
