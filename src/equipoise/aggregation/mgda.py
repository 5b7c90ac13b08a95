"""MGDA: the shortest vector in the convex hull of the task gradients."""

from __future__ import annotations

import numpy as np

from equipoise.aggregation.base import Array, GramAggregator
from equipoise.aggregation.solvers import min_norm_weights
from equipoise.errors import TaskError

NORMALIZATIONS = (None, "l2", "loss", "loss+")


class MGDA(GramAggregator):
    """Multiple-gradient descent: d = sum w_i g_i with w = argmin over the simplex of |sum w_i g_i|.

    Desideri (2012); Sener & Koltun (2018), eq. 3. Solved exactly, as a non-negative least-squares
    problem. d satisfies `<g_i, d> >= |d|^2` for all i, with equality where w_i > 0: it never
    conflicts, and is 0 exactly at Pareto stationary points. With `normalize` and combine="raw" it
    may conflict.

    Args:
        normalize: what each gradient is divided by while solving: None (default), "l2" its norm,
            "loss" its loss, "loss+" both.
        zero: a zero gradient makes d = 0, which is the exact answer ("keep", default); "drop"
            leaves tasks with zero gradient out.
        combine: what the weights then multiply: "raw" (default) the gradients themselves, as in
            nash-mtl and IGB4MTL, "normalized" the gradients divided as for solving, as in LibMTL
            and for NYUv2 in F-MTL's code.

    Raises:
        ValueError: unknown `normalize`, `zero` or `combine`, or "normalized" without `normalize`.
        TaskError: a loss that is not positive, with "loss" and "loss+".

    With "normalized" d is the min-norm point of the divided gradients: with "l2" and "loss+" its
    length does not depend on theirs (`degree` 0). F-MTL's published F-MGDA on NYUv2 is that with
    "l2", where the flat part of the direction does not depend on rho. The recipes here refuse it
    unless decompose=False.

    Unanimity value g (nash-mtl and IGB4MTL: T g); "normalized": g over the largest divisor.
    Opposite gradients: d = 0. Collinear ones: the shorter. Passes: one trunk forward and T
    backwards a step; `level="features"` (MGDA-UB): one backward. Memory: T x P.
    """

    def __init__(
        self, normalize: str | None = None, zero: str = "keep", combine: str = "raw"
    ) -> None:
        super().__init__()
        if normalize not in NORMALIZATIONS:
            raise ValueError(f"normalize is {normalize!r}; known are {NORMALIZATIONS}.")
        if zero not in ("keep", "drop"):
            raise ValueError(f"zero is {zero!r}; known are 'keep' and 'drop'.")
        if combine not in ("raw", "normalized"):
            raise ValueError(f"combine is {combine!r}; known are 'raw' and 'normalized'.")
        if combine == "normalized" and normalize is None:
            raise ValueError(
                "combine='normalized' needs a divisor. Give normalize='l2', 'loss' or 'loss+'."
            )
        self.normalize = normalize
        self.zero = zero
        self.combine = combine
        self.never_conflicts = normalize is None or combine == "normalized"
        self.needs_losses = normalize in ("loss", "loss+")
        self.degree = 0 if combine == "normalized" and normalize in ("l2", "loss+") else 1

    def weights(self, gram: Array, losses: Array | None) -> Array:
        """Min-norm weights of the (normalised) gradients."""
        if self.normalize is None and self.zero == "keep":
            return min_norm_weights(gram)
        norms = np.sqrt(gram.diagonal())
        active = norms > 0
        if self.zero == "keep" and not active.all():
            return np.where(active, 0.0, 1 / (~active).sum())
        divisor = np.ones(len(gram))
        if self.normalize in ("l2", "loss+"):
            divisor = divisor * norms
        if losses is not None and self.needs_losses:
            bad = active & (losses <= 0)
            if bad.any():
                i = int(bad.argmax())
                raise TaskError(
                    i,
                    f"loss is {losses[i]:.6g}; MGDA(normalize={self.normalize!r}) needs positive "
                    "losses. Use normalize='l2' or None.",
                )
            divisor = divisor * losses
        divisor = divisor[active]
        inner = gram[np.ix_(active, active)] / np.outer(divisor, divisor)
        w = np.zeros(len(gram))
        w[active] = min_norm_weights(inner / (inner.trace() / len(inner)))
        if self.combine == "normalized":
            w[active] /= divisor
        return w
