"""IMTL-L: loss scales learned so that all scaled losses come to 1."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from equipoise.weighting.base import Weighting
from equipoise.weighting.positive import check_positive


class IMTLL(Weighting):
    """Impartial multi-task learning, loss part: sum of exp(s_i) L_i - s_i, s learned.

    Liu et al., ICLR 2021, section 3.2 (its g(s) with a = e, b = 1). s_i starts at 0; the weight
    of task i is exp(s_i). At the best s the scaled loss exp(s_i) L_i is 1 for every task, and the
    objective is T + sum of ln L_i: SI is where IMTL-L goes, learning apart. With s of the opposite
    sign it is twice UW. LibMTL's IMTL is this and IMTL-G together: `imtl-l+imtl` here.

    Args:
        n_tasks: number of tasks T.
        lr: learning rate of s, which is learned without weight decay;
            None: that of the network, as published.

    Raises:
        ValueError: a parameter is not positive, or at the call the number of losses differs.
        TaskError: at the call, a loss is negative, for which s would grow without end.

    Passes: one trunk forward and one backward a step. State: T learned numbers.
    An absent task leaves its s_i where it is, but for the optimizer's momentum.
    """

    def __init__(self, n_tasks: int, lr: float | None = None) -> None:
        super().__init__()
        if n_tasks < 1:
            raise ValueError(f"n_tasks is {n_tasks}; give the number of tasks.")
        if lr is not None and not lr > 0:
            raise ValueError(f"lr is {lr}; it must be positive, or None.")
        self.lr = lr
        self.n_tasks = n_tasks
        self.log_scales = nn.Parameter(torch.zeros(n_tasks, device="cpu"))

    def weighted(self, losses: Tensor, present: Tensor) -> Tensor:
        """exp(s) L - s."""
        if losses.shape != self.log_scales.shape:
            raise ValueError(
                f"IMTLL was built for n_tasks={self.n_tasks} but got {len(losses)} losses."
            )
        check_positive(losses, self)
        self.weights = self.weigh(losses, present).to(losses.dtype)
        return torch.exp(self.log_scales) * losses - self.log_scales

    def weigh(self, losses: Tensor, present: Tensor) -> Tensor:
        """exp(s)."""
        return torch.exp(self.log_scales.detach())
