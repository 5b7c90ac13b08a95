"""Nash-MTL: the bargaining solution between the tasks."""

from __future__ import annotations

import numpy as np

from equipoise.aggregation.base import Array, GramAggregator
from equipoise.aggregation.solvers import fair_weights


class NashMTL(GramAggregator):
    """Nash-MTL (Navon et al., ICML 2022): the a > 0 with G a = 1 / a, d = sum a_i g_i.

    Solved exactly by Newton's method on the matrix of cosines, on which it does not matter how
    long the gradients are: d is the same after any rescaling of any task, and |d| = sqrt(T).

    Args:
        max_norm: bound on |d| (default 1, as in the authors' code, so that |d| = 1); None: none.
        degree: 0 (default): d has that fixed length, however short the gradients. 1: d is
            multiplied by sqrt(|G|_F), the form that the authors' code has before it clips; it
            grows with the gradients, as the flat part of F-MTL needs, and needs max_norm=None.

    Raises:
        ValueError: `max_norm` not positive, unknown `degree`, or a `max_norm` with degree 1.

    nash-mtl, IGB4MTL and LibMTL solve a sequence of convex programs to an absolute residual of
    1e-3, start where the last step ended, keep the old weights where the solver fails, and multiply
    the losses by a, heads included; here each step stands alone and heads get their own gradient.

    Unanimity value sqrt(T) g / |g|, clipped to `max_norm`; T g for degree 1. Each task gains:
    `<g_i, d>` = 1 / a_i > 0. Zero gradients are left out. Opposite gradients, and any others that
    positive weights combine to zero (up to round-off): no solution, d = 0. Collinear ones: along
    them, at full length. Passes: one trunk forward and T backwards a step. Memory: T x P.
    """

    never_conflicts = True

    def __init__(self, max_norm: float | None = 1.0, degree: int = 0) -> None:
        super().__init__()
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm is {max_norm}; it must be positive, or None.")
        if degree not in (0, 1):
            raise ValueError(f"degree is {degree!r}; known are 0 and 1.")
        if degree == 1 and max_norm is not None:
            raise ValueError(
                f"degree=1 and max_norm={max_norm}: a bound that does not depend on the size of "
                "the gradients makes the direction independent of it again. Use max_norm=None."
            )
        self.max_norm = max_norm
        self.degree = degree

    def weights(self, gram: Array, losses: Array | None) -> Array:
        """The bargaining weights, clipped, or times sqrt(|G|_F)."""
        norms = np.sqrt(gram.diagonal())
        active = norms > 0
        if not active.all():
            w = np.zeros(len(gram))
            w[active] = self.weights(gram[np.ix_(active, active)], None)
            return w
        cosines = gram / (norms[:, None] * norms)
        if len(gram) == 2:  # both at the same angle with d
            together = 1 + float(cosines[0, 1])
            b = np.full(2, together**-0.5) if together > 1e-13 else None
        else:
            b = fair_weights(cosines, np.ones(len(gram)), 1.0)
        if b is None:
            return np.zeros(len(gram))
        w = b / norms
        if self.degree == 1:
            return w * np.sqrt(np.linalg.norm(gram))
        length = np.sqrt(len(gram))
        return w if self.max_norm is None else w * min(1.0, self.max_norm / length)
