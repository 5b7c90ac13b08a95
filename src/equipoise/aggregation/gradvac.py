"""GradVac: gradients turned until they agree as much as they usually do."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from equipoise.aggregation.base import Array, GramAggregator
from equipoise.aggregation.pcgrad import random_orders
from equipoise.generators import GeneratorState


class GradVac(GeneratorState, GramAggregator):
    """Gradient vaccine (Wang et al., ICLR 2021, algorithm 1).

    As PCGrad, but with a target for each ordered pair of tasks: the moving average of their
    cosines. Where p, the i-th gradient on its way, has a cosine c with g_j below the target t,
    p <- p + |p| (t sqrt(1 - c^2) - c sqrt(1 - t^2)) / (|g_j| sqrt(1 - t^2)) g_j, after which the
    cosine is t. Then t <- (1 - beta) t + beta c. d = sum p_i. With all targets 0 it is PCGrad.

    Args:
        beta: rate of the moving average, 0 to 1; 0.01 in the paper.
        generator: a CPU generator for the orders; None: a private one, seeded from torch's
            global generator at construction.

    Raises:
        ValueError: `beta` outside of 0 to 1.

    The paper also keeps targets for each layer or block; here there is one for the whole shared
    part. Pairs with an absent task keep their target.

    Unanimity value T g. May conflict. A zero gradient, or one that has been turned to zero, has no
    cosine and is passed over. Opposite gradients: d = 0 in the first step. Passes: one trunk
    forward and T backwards a step. Memory: T x P. State: T x T targets and the generator.
    """

    def __init__(self, beta: float = 0.01, generator: torch.Generator | None = None) -> None:
        super().__init__(generator)
        if not 0 <= beta <= 1:
            raise ValueError(f"beta is {beta}; it must lie between 0 and 1.")
        self.beta = beta
        self.targets: Array = np.zeros((0, 0))
        self._present: NDArray[np.intp] | None = None

    def begin(self, present: Tensor) -> None:
        """Remember which tasks the next Gram matrix is of."""
        self._present = present.numpy().nonzero()[0]

    def weights(self, gram: Array, losses: Array | None) -> Array:
        """The sum of all turned gradients, each as coefficients on the original ones."""
        m = len(gram)
        tasks = np.arange(m)
        known = self._places(m)
        targets = self.targets[np.ix_(known, known)]
        norms = np.sqrt(gram.diagonal())
        turned = np.eye(m)
        products = gram.copy()  # products[i, j] = <p_i, g_j>
        for other in random_orders(m, self.generator).T:
            length = np.sqrt(np.einsum("ij,ij->i", turned, products).clip(0))
            size = length * norms[other]
            met = size > 1e-12 * norms * norms[other]
            cosine = np.where(met, products[tasks, other] / np.where(met, size, 1), 0).clip(-1, 1)
            target = targets[tasks, other]
            across = np.sqrt(1 - target**2)
            low = met & (cosine < target) & (across > 0)
            turn = target * np.sqrt(1 - cosine**2) - cosine * across
            step = np.where(low, length * turn / np.where(low, norms[other] * across, 1), 0)
            turned[tasks, other] += step
            rows = low.nonzero()[0]
            products[rows] += step[rows, None] * gram[other[rows]]
            targets[tasks, other] += np.where(met, self.beta * (cosine - target), 0)
        self.targets[np.ix_(known, known)] = targets
        return turned.sum(0)

    def _places(self, m: int) -> NDArray[np.intp]:
        """Where the m tasks at hand stand among all; makes room for those not seen before."""
        known = np.arange(m) if self._present is None else self._present
        if len(known) != m:
            raise ValueError(f"begin() announced {len(known)} tasks, the gradients are of {m}.")
        more = int(known.max()) + 1 - len(self.targets)
        if more > 0:
            self.targets = np.pad(self.targets, (0, more))
        return known

    def get_extra_state(self) -> dict[str, Tensor]:
        """The generator's state and the targets, for `state_dict`."""
        return {**super().get_extra_state(), "targets": torch.from_numpy(self.targets.copy())}

    def set_extra_state(self, state: Any) -> None:
        """Restore them from `state_dict`."""
        super().set_extra_state(state)
        self.targets = state["targets"].numpy().copy()
