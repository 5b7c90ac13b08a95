"""Aligned-MTL: gradients made orthogonal and of equal length."""

from __future__ import annotations

import numpy as np

from equipoise.aggregation.base import Array, GramAggregator
from equipoise.aggregation.nnls import EPS

SCALES = ("min", "median", "rmse")


class AlignedMTL(GramAggregator):
    """Aligned-MTL (Senushkin et al., CVPR 2023, algorithm 1).

    With G = V diag(l) V^T, the matrix of task gradients is replaced by the nearest one whose
    singular values are all alike, s V diag(l)^(-1/2) V^T times the rows; d is the mean of its
    rows. Eigenvalues below round-off are left out.

    Args:
        scale: the common singular value s: "min" (default, as published) the least that is not
            left out, "median" the median (of two the lower), "rmse" the root of the mean
            eigenvalue.

    Raises:
        ValueError: unknown `scale`.

    LibMTL sums the rows, which gives T times as much. TorchJD takes single-precision round-off as
    the bound; here it is that of double precision.

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
        values, vectors = np.linalg.eigh(gram)
        kept = values > values[-1] * 10 * len(gram) * EPS
        values, vectors = values[kept], vectors[:, kept]
        if self.scale == "rmse":
            common = values.mean()
        else:
            common = values[0 if self.scale == "min" else (len(values) - 1) // 2]
        return vectors @ (vectors.mean(0) * np.sqrt(common / values))
