"""SDMGrad: the min-norm point, held near the mean gradient."""

from __future__ import annotations

from equipoise.aggregation.base import Array, GramAggregator
from equipoise.aggregation.solvers import min_norm_weights, shifted


class SDMGrad(GramAggregator):
    """Direction-oriented multi-objective descent (Xiao et al., NeurIPS 2023).

    d = g_w + lam g_0 with g_0 the mean gradient and w = argmin over the simplex of
    |g_w + lam g_0|: it maximises `min_i <g_i, d> + lam <g_0, d> - |d|^2 / 2`.

    The paper estimates w over the steps, by projected gradient steps on several independent batches
    a step. Here all of that is one batch and the exact minimum for it, so that the method
    has no state and no rates, and is the one of the paper in the limit of noiseless gradients.

    Args:
        lam: weight of the mean gradient, at least 0. 0: MGDA. 0.3 by default.

    Raises:
        ValueError: negative `lam`.

    Unanimity value (1 + lam) g. May conflict for lam > 0. A zero gradient has weight as in MGDA:
    d = lam g_0 where it alone can be the min-norm point. Opposite gradients, and all others whose
    hull holds -lam g_0: d = 0. Passes: one trunk forward and T backwards a step. Memory: T x P.
    """

    def __init__(self, lam: float = 0.3) -> None:
        super().__init__()
        if not lam >= 0:
            raise ValueError(f"lam is {lam}; it must be at least 0.")
        self.lam = lam

    def weights(self, gram: Array, losses: Array | None) -> Array:
        """Min-norm weights of the shifted gradients g_i + lam g_0, and lam / T each."""
        b = gram.mean(1)
        w = min_norm_weights(shifted(gram, b, float(b.mean()), self.lam))
        return w + self.lam / len(gram)
