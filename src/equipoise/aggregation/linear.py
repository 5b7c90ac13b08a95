"""Sum and Mean: the aggregators that need no rows."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from equipoise.aggregation.base import Array, GramAggregator


class Sum(GramAggregator):
    """The sum of the task gradients: the gradient of the summed losses.

    Unanimity value T g. May conflict with single tasks. A zero gradient adds nothing.
    Passes: one trunk forward and one backward a step; no rows are formed.
    """

    def weights(self, gram: Array, losses: Array | None) -> Array:
        """Ones."""
        return np.ones(len(gram))

    def known_coefficients(self, n_tasks: int) -> Tensor:
        """Ones."""
        return torch.ones(n_tasks, dtype=torch.float64, device="cpu")


class Mean(GramAggregator):
    """The mean of the task gradients, for the trunk; heads get their own gradient in full.

    Unanimity value g. May conflict with single tasks. A zero gradient counts in the mean.
    Passes: one trunk forward and one backward a step; no rows are formed.
    """

    def weights(self, gram: Array, losses: Array | None) -> Array:
        """1/T each."""
        return np.full(len(gram), 1 / len(gram))

    def known_coefficients(self, n_tasks: int) -> Tensor:
        """1/T each."""
        return torch.full((n_tasks,), 1 / n_tasks, dtype=torch.float64, device="cpu")
