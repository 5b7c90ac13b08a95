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
        normalise_to: sum of the weights; None: the number of tasks present, as in the IGB
            experiments. The original paper and LibMTL use 1.

    Raises:
        ValueError: `normalise_to` is not positive.

    Passes: one trunk forward and one backward a step. State: the generator.
    """

    def __init__(
        self, generator: torch.Generator | None = None, normalise_to: float | None = None
    ) -> None:
        super().__init__(generator)
        if normalise_to is not None and not normalise_to > 0:
            raise ValueError(f"normalise_to is {normalise_to}; give a positive sum of weights.")
        self.normalise_to = normalise_to

    def weigh(self, losses: Tensor, present: Tensor) -> Tensor:
        """Softmax of T standard normal numbers, over the present tasks."""
        draws = torch.randn(losses.shape, generator=self.generator, dtype=torch.float64)
        scores = draws.to(losses).masked_fill(~present, -torch.inf)
        total = present.sum() if self.normalise_to is None else self.normalise_to
        return torch.softmax(scores, 0) * total
