"""DWA: dynamic weight average."""

from __future__ import annotations

import torch
from torch import Tensor

from equipoise.weighting.base import EpochMean, Weighting, check_steps_per_epoch, softmax_over


class DWA(Weighting):
    """Dynamic weight average: tasks that fall slowly count more (Liu et al., CVPR 2019, eq. 7).

    weights = T softmax(r / temperature) with r_i = L_i(t-1) / L_i(t-2), where L_i(t) is the mean
    loss of task i over epoch t; all ones in the first two epochs. The code of nash-mtl and
    IGB4MTL uses sliding windows of 25 batches instead of epochs; give `steps_per_epoch=25` for
    a period of that length.

    Args:
        steps_per_epoch: batches in one epoch.
        temperature: larger means more even weights.

    Raises:
        ValueError: a parameter is not positive.

    Passes: one trunk forward and one backward a step. State: 3 T numbers and a counter.
    A task that was absent throughout one of the two epochs has r_i = 1.
    """

    steps: Tensor
    ratio: Tensor

    def __init__(self, steps_per_epoch: int, temperature: float = 2.0) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; it must be positive.")
        self.steps_per_epoch = check_steps_per_epoch(steps_per_epoch)
        self.temperature = temperature
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device="cpu"))
        self.this_epoch = EpochMean()
        self.last_epoch = EpochMean()
        self.register_buffer("ratio", torch.zeros(0, dtype=torch.float64, device="cpu"))

    def weigh(self, losses: Tensor, present: Tensor) -> Tensor:
        """Ones for two epochs, then from the ratio of the last two epoch means."""
        epoch, step = divmod(int(self.steps), self.steps_per_epoch)
        if step == 0 and epoch > 0:
            if epoch > 1:
                ratio = self.this_epoch.value() / self.last_epoch.value()
                self.ratio = torch.where(ratio.isfinite(), ratio, 1.0)
            self.last_epoch.load_state_dict(self.this_epoch.state_dict())
            self.this_epoch.reset(losses)
        self.this_epoch.add(losses, present)
        self.steps += 1
        if epoch < 2:
            return torch.ones_like(losses)
        return softmax_over(self.ratio / self.temperature, present)
