"""EW: every loss counts the same."""

from __future__ import annotations

import torch
from torch import Tensor

from equipoise.weighting.base import Weighting


class EW(Weighting):
    """Equal weights (linear scalarisation): the sum of the losses, not their mean.

    Passes: one trunk forward and one backward a step. No state.
    """

    def weigh(self, losses: Tensor, present: Tensor) -> Tensor:
        """Ones."""
        return torch.ones_like(losses)
