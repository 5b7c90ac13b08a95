"""DualProj: the mean gradient, freed of its conflicts."""

from __future__ import annotations

import numpy as np

from equipoise.aggregation.base import Array, GramAggregator
from equipoise.aggregation.quadratic import dual_cone_shifts


class DualProj(GramAggregator):
    """The mean gradient, projected onto the dual cone of the gradients.

    The nearest vector to the mean with which no task conflicts: GEM's projection (Lopez-Paz &
    Ranzato, NeurIPS 2017) with the mean as what is projected, as TorchJD's DualProj
    has it. Solved exactly and without the 1e-4 that TorchJD adds to the diagonal.

    Unanimity value g. Never conflicts. Without conflict the mean. A zero gradient counts in the
    mean, as zero. Opposite gradients: d = 0. Passes: one trunk forward and T backwards a step.
    Memory: T x P.
    """

    never_conflicts = True
    damping = 1

    def weights(self, gram: Array, losses: Array | None) -> Array:
        """1/T each, and what the projection adds."""
        w = np.full(len(gram), 1 / len(gram))
        norms = np.sqrt(gram.diagonal())
        active = norms > 0
        n = norms[active]
        cosines = gram[np.ix_(active, active)] / (n[:, None] * n)
        w[active] += dual_cone_shifts(cosines, (n / len(gram))[None])[0] / n
        return w
