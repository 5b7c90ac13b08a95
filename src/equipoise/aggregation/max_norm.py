"""MaxNorm: all task gradients brought to the length of the longest."""

from __future__ import annotations

import numpy as np

from equipoise.aggregation.base import Array, GramAggregator


class MaxNorm(GramAggregator):
    """The sum of the task gradients at the largest norm: d = sum_i (max_j |g_j| / |g_i|) g_i.

    Lin et al., "Dual-Balancing for Multi-Task Learning" (arXiv 2308.12029), its gradient part,
    without the moving average: `si+max-norm` is DB-MTL with beta = 0. Here it costs no memory
    on top of the rows, works at the feature level, and allows tasks to be absent.

    LibMTL adds 1e-8 to the norm of g_i, so that scale matters when gradients are short.

    Unanimity value T g. Never conflicts for T = 2, may for T >= 3. Opposite gradients: d = 0. A
    zero gradient has no direction: it takes no part. Passes: one trunk forward and T backwards a
    step; `level="features"`: one backward. Memory: T x P.
    """

    def weights(self, gram: Array, losses: Array | None) -> Array:
        """max_j |g_j| / |g_i|, and 0 where g_i is 0."""
        norms = np.sqrt(np.diagonal(gram))
        return np.divide(norms.max(), norms, out=np.zeros_like(norms), where=norms > 0)
