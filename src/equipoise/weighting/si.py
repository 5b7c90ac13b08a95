"""SI: the scale-invariant objective, on which improvable gap balancing stands."""

from __future__ import annotations

import torch
from torch import Tensor

from equipoise.weighting.base import Weighting
from equipoise.weighting.positive import check_positive, unless_solved


class SI(Weighting):
    """Scale-invariant objective: the sum of ln L_i (Dai et al., arXiv 2307.15429, eq. 2).

    The gradient of task i is that of its loss divided by L_i, so a loss may be multiplied by any
    constant without effect. No eps is added inside the logarithm; a loss in [0, 1e-12] counts as
    solved and contributes no gradient.

    Args:
        cap: upper bound of the gradient factor weight_i / L_i, which is otherwise unbounded as
            L_i goes to 0; None: no bound, as published.

    Raises:
        ValueError: `cap` is not positive.
        TaskError: at the call, a loss is negative.

    Passes: one trunk forward and one backward a step. No state.
    """

    def __init__(self, cap: float | None = None) -> None:
        super().__init__()
        self._set_cap(cap)

    def _set_cap(self, cap: float | None) -> None:
        if cap is not None and not cap > 0:
            raise ValueError(f"cap is {cap}; give a positive bound, or None for no bound.")
        self.cap = cap

    def weighted(self, losses: Tensor, present: Tensor) -> Tensor:
        """Weights times ln L."""
        check_positive(losses, self)
        self.weights = self.weigh(losses.detach(), present).to(losses.dtype)
        if self.cap is not None:
            self.weights = torch.minimum(self.weights, self.cap * losses.detach())
        return self.weights * self.objective(losses)

    def weigh(self, losses: Tensor, present: Tensor) -> Tensor:
        """Ones."""
        return torch.ones_like(losses)

    def objective(self, losses: Tensor) -> Tensor:
        """ln L, constant where the task is solved."""
        return torch.log(unless_solved(losses))
