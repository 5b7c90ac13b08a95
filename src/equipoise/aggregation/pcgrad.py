"""PCGrad: projecting conflicting gradients."""

from __future__ import annotations

import numpy as np
import torch

from equipoise.aggregation.base import Array, GramAggregator
from equipoise.generators import GeneratorState


class PCGrad(GeneratorState, GramAggregator):
    """Gradient surgery (Yu et al., NeurIPS 2020, algorithm 1).

    From each gradient what conflicts with the others is projected out, one other task after the
    other in random order: `p <- p - (<p, g_j> / |g_j|^2) g_j` where `<p, g_j> < 0`; d = sum p_i.
    nash-mtl, IGB4MTL, LibMTL and F-MTL let a task also meet itself in that loop, which changes
    the result from three tasks on; here it does not.

    Args:
        reduction: "sum" (default, as published) or "mean" over tasks.
        generator: a CPU generator for the orders; None: a private one, seeded from torch's
            global generator at construction.

    Raises:
        ValueError: unknown `reduction`.

    Unanimity value T g ("mean": g). Conflict-free for two tasks, not always for more. A zero
    gradient never conflicts. Opposite gradients: d = 0. Passes: one trunk forward and T backwards
    a step. Memory: T x P. State: the generator.
    """

    def __init__(self, reduction: str = "sum", generator: torch.Generator | None = None) -> None:
        super().__init__(generator)
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction is {reduction!r}; known are 'sum' and 'mean'.")
        self.reduction = reduction

    def weights(self, gram: Array, losses: Array | None) -> Array:
        """The sum of all projected gradients, each as coefficients on the original ones."""
        m = len(gram)
        orders = random_orders(m, self.generator)
        squares = np.diagonal(gram)
        tasks = np.arange(m)
        projected = np.eye(m)
        products = gram.copy()  # products[i, j] = <p_i, g_j>
        # All tasks take their k-th step together: none looks at what another has become.
        for other in orders.T:
            product = products[tasks, other]
            step = np.where(product < 0, product / np.where(squares > 0, squares, 1)[other], 0.0)
            conflicting = np.flatnonzero(step)
            if len(conflicting):
                met, step = other[conflicting], step[conflicting]
                projected[conflicting, met] -= step
                products[conflicting] -= step[:, None] * gram[met]
        total = projected.sum(0)
        return total / m if self.reduction == "mean" else total


def random_orders(m: int, generator: torch.Generator) -> np.ndarray:
    """(m, m - 1): for each task the others in random order."""
    drawn = np.stack(
        [torch.randperm(m, generator=generator, device="cpu").numpy() for _ in range(m)]
    )
    return drawn[drawn != np.arange(m)[:, None]].reshape(m, m - 1)
