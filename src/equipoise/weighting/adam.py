"""Adam for the T numbers that a weighting learns by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from equipoise.weighting.base import _ResizingModule

BETAS = (0.9, 0.999)
EPS = 1e-8


class Adam(_ResizingModule):
    """Adam (Kingma & Ba, ICLR 2015), a number for each task, that of an absent one at rest.

    The same as torch.optim.Adam as long as all tasks are present. It is here because a weighting
    that computes its own slopes cannot lend its numbers to the user's optimizer, and because in
    buffers the moments are part of `state_dict`, to the last bit.

    Args:
        lr: learning rate.
        weight_decay: what of each number is added to its slope.

    Raises:
        ValueError: a parameter out of its range.
    """

    steps: Tensor
    first: Tensor
    second: Tensor

    def __init__(self, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__()
        if not lr > 0:
            raise ValueError(f"lr is {lr}; it must be positive.")
        if not weight_decay >= 0:
            raise ValueError(f"weight decay is {weight_decay}; it must not be negative.")
        self.lr = lr
        self.weight_decay = weight_decay
        self.register_buffer("steps", torch.zeros(0, dtype=torch.int64, device="cpu"))
        self.register_buffer("first", torch.zeros(0, dtype=torch.float64, device="cpu"))
        self.register_buffer("second", torch.zeros(0, dtype=torch.float64, device="cpu"))

    def step(self, values: Tensor, slopes: Tensor, present: Tensor) -> Tensor:
        """The values (T,) after one step down the slopes (T,)."""
        if self.first.numel() == 0:
            self.steps = torch.zeros_like(values, dtype=torch.int64)
            self.first = torch.zeros_like(values)
            self.second = torch.zeros_like(values)
        slopes = slopes + self.weight_decay * values
        self.steps = self.steps + present
        self.first = torch.where(present, self.first.lerp(slopes, 1 - BETAS[0]), self.first)
        squares = torch.where(present, slopes**2, 0.0)
        self.second = torch.where(present, self.second.lerp(squares, 1 - BETAS[1]), self.second)
        steps = self.steps.to(values)  # a power of an integer tensor has single precision
        mean = self.first / (1 - BETAS[0] ** steps)
        spread = (self.second / (1 - BETAS[1] ** steps)).sqrt()
        return torch.where(present, values - self.lr * mean / (spread + EPS), values)
