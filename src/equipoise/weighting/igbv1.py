"""IGBv1: improvable gap balancing by the ratio of each loss to its early mean."""

from __future__ import annotations

import torch
from torch import Tensor

from equipoise.weighting.base import EpochMean, check_steps_per_epoch, softmax_over
from equipoise.weighting.positive import SOLVED
from equipoise.weighting.si import SI


class IGBv1(SI):
    """Improvable gap balancing, version 1 (Dai et al., arXiv 2307.15429, section 3.2.1, eq. 3).

    The objective is the sum of lambda_i ln L_i. lambda is 1 in the first two epochs; the mean
    loss of each task over the second one is its base. From the third on
    lambda = T softmax(L / L_base) with the losses of the current batch, detached: what is still
    far from solved, measured against what had been reached early, counts more.

    The gradient of task i is multiplied by lambda_i / L_i, which can grow for a task that is
    nearly solved; `cap` bounds it.

    Args:
        steps_per_epoch: batches in one epoch.
        cap: upper bound of lambda_i / L_i; None: no bound, as published.

    Raises:
        ValueError: a parameter is not positive.
        TaskError: at the call, a loss is negative.

    Passes: one trunk forward and one backward a step. State: 2 T numbers and a counter.
    A task whose base is at most 1e-12 counts as solved (ratio 0); one that was absent throughout
    the second epoch has ratio 1.
    """

    steps: Tensor

    def __init__(self, steps_per_epoch: int, cap: float | None = None) -> None:
        super().__init__(cap)
        self.steps_per_epoch = check_steps_per_epoch(steps_per_epoch)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device="cpu"))
        self.base = EpochMean()

    def weigh(self, losses: Tensor, present: Tensor) -> Tensor:
        """Ones for two epochs, then T softmax(L / L_base)."""
        epoch = int(self.steps) // self.steps_per_epoch
        self.steps += 1
        if epoch == 1:
            self.base.add(losses, present)
        if epoch < 2:
            return torch.ones_like(losses)
        base = self.base.value()
        gap = torch.where(base > SOLVED, losses / base, 0.0)
        return softmax_over(torch.where(base.isnan(), 1.0, gap), present)
