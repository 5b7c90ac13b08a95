"""CAGrad: the best worst case within a ball around the mean gradient."""

from __future__ import annotations

from equipoise.aggregation.base import Array, GramAggregator
from equipoise.aggregation.solvers import cagrad_shift


class CAGrad(GramAggregator):
    """Conflict-averse gradient descent (Liu et al., NeurIPS 2021, eq. 4 and algorithm 1).

    d maximises `min_i <g_i, d>` under `|d - g_0| <= c |g_0|`, with g_0 the mean gradient. The dual
    is solved exactly; the reference stops SLSQP at an absolute tolerance and so returns equal
    weights for gradients shorter than about 1e-2.

    Args:
        c: radius of the ball over |g_0|, at least 0. 0.4 in nash-mtl, IGB4MTL and F-MTL; 0.5 in
            LibMTL. 0 gives the mean.
        rescale: 1 (default, as all references): d / (1 + c^2); 2: d / (1 + c); 0: d.

    Raises:
        ValueError: negative `c` or unknown `rescale`.

    Unanimity value g times (1 + c), (1 + c) / (1 + c^2) or 1 for rescale 0, 1, 2. Each task's
    product with d is at least its worst-case bound; it may be negative for c < 1 and never is for
    c >= 1, as the ball then holds 0. Where the gradients can be combined to zero, no d of the ball
    improves all tasks; if one of them harms none, d is the one nearest to g_0: the projection of
    DualProj. It is continuous in c. A zero gradient leaves no worst case: d = g_0 (scaled), which
    may then conflict. Opposite gradients: (1 - c) g_0 for c < 1. Mean gradient zero: d = 0.
    Passes: one trunk forward and T backwards a step. Memory: T x P.
    """

    def __init__(self, c: float = 0.4, rescale: int = 1) -> None:
        super().__init__()
        if not c >= 0:
            raise ValueError(f"c is {c}; the radius must be at least 0.")
        if rescale not in (0, 1, 2):
            raise ValueError(f"rescale is {rescale!r}; known are 0, 1 and 2.")
        self.c = c
        self.damping = 1 / max(1.0, c**2)  # conflicts that it allows grow with the ball
        self.rescale = rescale

    def weights(self, gram: Array, losses: Array | None) -> Array:
        """Equal weights, and what leads from the mean gradient to the best worst case."""
        return (1 / len(gram) + cagrad_shift(gram, self.c)) / self._divisor()

    def _divisor(self) -> float:
        return (1, 1 + self.c**2, 1 + self.c)[self.rescale]
