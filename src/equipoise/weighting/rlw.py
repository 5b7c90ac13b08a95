"""RLW: random loss weights."""

from __future__ import annotations

import torch
from torch import Tensor

from equipoise.generators import GeneratorState
from equipoise.weighting.base import Weighting


class RLW(GeneratorState, Weighting):
    """Random loss weighting: softmax of normal draws, anew each batch (Lin et al., TMLR 2022).

    Args:
        generator: a CPU generator for the draws; None: a private one, seeded from torch's global
            generator at construction.
        normalize_to: sum of the weights; None: the number of tasks present, as in the IGB
            experiments. The original paper and LibMTL use 1.

    Raises:
        ValueError: `normalize_to` is not positive.

    Passes: one trunk forward and one backward a step. State: the generator.
    """

    def __init__(
        self, generator: torch.Generator | None = None, normalize_to: float | None = None
    ) -> None:
        super().__init__(generator)
        if normalize_to is not None and not normalize_to > 0:
            raise ValueError(f"normalize_to is {normalize_to}; give a positive sum of weights.")
        self.normalize_to = normalize_to

    def weigh(self, losses: Tensor, present: Tensor) -> Tensor:
        """Softmax of T standard normal numbers, over the present tasks."""
        draws = torch.randn(
            losses.shape, generator=self.generator, dtype=torch.float64, device="cpu"
        )
        scores = draws.to(losses).masked_fill(~present, -torch.inf)
        total = present.sum() if self.normalize_to is None else self.normalize_to
        return torch.softmax(scores, 0) * total
