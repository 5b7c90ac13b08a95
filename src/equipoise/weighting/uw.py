"""UW: weights learned as homoscedastic uncertainty."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from equipoise.weighting.base import Weighting


class UW(Weighting):
    """Uncertainty weighting: sum of (exp(-s_i) L_i + s_i) / 2, s learned (Kendall et al., 2018).

    s_i = ln sigma_i^2 starts at 0. The weight of task i is exp(-s_i) / 2. The paper leaves the
    factor 1/2 out for classification; nash-mtl and IGB4MTL keep it for every task, as here.
    LibMTL starts at s = -0.5.

    Args:
        n_tasks: number of tasks T.
        lr: learning rate of s, which is learned without weight decay.

    Raises:
        ValueError: a parameter is not positive, or at the call the number of losses differs.

    Passes: one trunk forward and one backward a step. State: T learned numbers.
    """

    def __init__(self, n_tasks: int, lr: float = 0.025) -> None:
        super().__init__()
        if n_tasks < 1:
            raise ValueError(f"n_tasks is {n_tasks}; give the number of tasks.")
        if not lr > 0:
            raise ValueError(f"lr is {lr}; it must be positive.")
        self.lr = lr
        self.n_tasks = n_tasks
        self.log_variances = nn.Parameter(torch.zeros(n_tasks, device="cpu"))

    def weighted(self, losses: Tensor, present: Tensor) -> Tensor:
        """(exp(-s) L + s) / 2."""
        if losses.shape != self.log_variances.shape:
            raise ValueError(
                f"UW was built for n_tasks={self.n_tasks} but got {len(losses)} losses."
            )
        precisions = torch.exp(-self.log_variances) / 2
        self.weights = precisions.detach().to(losses.dtype)
        return precisions * losses + self.log_variances / 2

    def weigh(self, losses: Tensor, present: Tensor) -> Tensor:
        """exp(-s) / 2."""
        return torch.exp(-self.log_variances.detach()) / 2
