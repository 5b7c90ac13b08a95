"""EDM: the bisector of the cone of task gradients."""

from __future__ import annotations

import numpy as np

from equipoise.aggregation.base import Array, GramAggregator
from equipoise.aggregation.solvers import min_norm_weights, solve_if_regular


class EDM(GramAggregator):
    """Equiangular direction method (Katrutsa et al., 2020): d has the same angle with all tasks.

    With alpha the min-norm weights of the unit gradients g_i / n_i, d = sum w_i g_i, w_i
    proportional to alpha_i / n_i and sum w_i = 1. The tasks with alpha_i > 0 have equal cosines
    with d, the others larger ones.

    Args:
        zero: a zero gradient makes d = 0 ("keep", default, as published); "drop" leaves tasks
            with zero gradient out.

    Raises:
        ValueError: unknown `zero`.

    alpha is exact here. For two tasks the same as IMTL-G, and for more wherever all alpha_i > 0.

    Unanimity value g. Never conflicts. Opposite gradients: d = 0. Collinear ones: their harmonic
    mean. Passes: one trunk forward and T backwards a step. Memory: T x P.
    """

    never_conflicts = True
    damping = 1

    def __init__(self, zero: str = "keep") -> None:
        super().__init__()
        if zero not in ("keep", "drop"):
            raise ValueError(f"zero is {zero!r}; known are 'keep' and 'drop'.")
        self.zero = zero

    def weights(self, gram: Array, losses: Array | None) -> Array:
        """Min-norm weights of the unit gradients, over the norms, with sum 1."""
        norms = np.sqrt(gram.diagonal())
        active = norms > 0
        if not active.all():
            if self.zero == "keep":
                return np.where(active, 0.0, 1 / (~active).sum())
            w = np.zeros(len(gram))
            w[active] = self.weights(gram[np.ix_(active, active)], None)
            return w
        w = _even_min_norm_weights(gram / (norms[:, None] * norms)) / norms
        return w / w.sum()


def _even_min_norm_weights(cosines: Array) -> Array:
    """Min-norm weights of unit vectors; where several give the same point, even ones.

    The length of d depends on which of them it is.
    """
    m = len(cosines)
    if m == 2:
        return np.full(2, 0.5)
    w = min_norm_weights(cosines)
    products = cosines @ w
    square = float(w @ products)
    near = (products <= square + 1e-9).nonzero()[0]
    regular = solve_if_regular(cosines[near[:, None], near], np.ones(len(near)), 1e-7)
    if regular is None and square > 1e-4:
        # The ones with the least sum of squares, up to this and up to round-off over this.
        w = min_norm_weights(cosines + 1e-9 * np.eye(m))
    return w
