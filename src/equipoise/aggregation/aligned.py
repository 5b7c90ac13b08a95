"""Aligned-MTL: gradients made orthogonal and of equal length."""

from __future__ import annotations

import numpy as np

from equipoise.aggregation.base import EPS, Array, GramAggregator

SCALES = ("min", "median", "rmse")


class AlignedMTL(GramAggregator):
    """Aligned-MTL (Senushkin et al., CVPR 2023, algorithm 1).

    With G = V diag(l) V^T, the matrix of task gradients is replaced by the nearest one whose
    singular values are all alike, s V diag(l)^(-1/2) V^T times the rows; d is the mean of its
    rows. Eigenvalues below the round-off of the rows are left out.

    Args:
        scale: the common singular value s: "min" (default, as published) the least that is not
            left out, "median" the median (of two the lower), "rmse" the root of the mean
            eigenvalue.

    Raises:
        ValueError: unknown `scale`.

    LibMTL sums the rows, which gives T times as much. TorchJD takes single-precision round-off of
    the largest eigenvalue as the bound, so that short gradients vanish next to long ones; here each
    eigenvalue is compared with the round-off of those gradients that it is made of.

    Unanimity value g. May conflict where the gradients are linearly dependent: of two opposite
    ones d is not 0 but along the longer. A zero gradient changes nothing but the number of
    tasks in the mean. Passes: one trunk forward and T backwards a step. Memory: T x P.
    """

    def __init__(self, scale: str = "min") -> None:
        super().__init__()
        if scale not in SCALES:
            raise ValueError(f"scale is {scale!r}; known are {SCALES}.")
        self.scale = scale

    def weights(self, gram: Array, losses: Array | None) -> Array:
        """The balance matrix times 1/T."""
        return self.weights_at(gram, losses, EPS)

    def weights_at(self, gram: Array, losses: Array | None, eps: float) -> Array:
        """The same, without the eigenvalues that the precision of the rows does not determine."""
        m = len(gram)
        values, vectors = np.linalg.eigh(gram)
        # An eigenvalue is a squared length |sum v_i g_i|^2, of which T eps sum v_i^2 |g_i|^2 is
        # within round-off. So a short gradient counts in full next to long ones.
        noise = m * eps * (gram.diagonal() @ vectors**2)
        kept = values > np.maximum(noise, 10 * m * EPS * values[-1])
        values, vectors = values[kept], vectors[:, kept]
        if self.scale == "rmse":
            common = values.mean()
        else:
            common = values[0 if self.scale == "min" else (len(values) - 1) // 2]
        return vectors @ (vectors.mean(0) * np.sqrt(common / values))
