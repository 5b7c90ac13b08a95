"""FAMO: weights learned so that all losses fall at the same rate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from equipoise.weighting.adam import Adam
from equipoise.weighting.base import Weighting, for_each_task
from equipoise.weighting.positive import SOLVED, check_positive, unless_solved


class FAMO(Weighting):
    """Fast adaptive multitask optimization (Liu et al., NeurIPS 2023, algorithm 1).

    The objective is the sum of c z_i ln(L_i - b_i) with z = softmax(xi), xi = 0 at first, and
    c = 1 / sum_i z_i / (L_i - b_i) as a number: the gradient of task i is multiplied by
    c z_i / (L_i - b_i), and these factors sum to 1. After the update the losses of the same batch
    tell how far each logarithm fell, delta_i = ln(L_i - b_i) - ln(L_i' - b_i), and xi goes down
    the slope J delta + gamma xi, J the Jacobian of the softmax: what fell far counts less.

    Algorithm 1 writes a plain step for xi; the published code takes one of Adam, as here.

    Args:
        lr: learning rate of xi.
        gamma: decay of xi. 1e-3 in the paper's appendix and in LibMTL, 1e-2 in the published file.
        min_losses: b, what each loss cannot fall below; one number for all, or (T,).

    Raises:
        ValueError: `lr` or `gamma` out of its range; at the call, `min_losses` has another length.
        TaskError: at the call, a loss is below its b_i.

    Passes: one trunk forward and one backward a step, and one forward more for the losses after
    the update, without gradients. Dropout repeats its masks in it and buffers do not move; in the
    published code both go on. State: 4 T numbers, Adam's among them.

    A task within 1e-12 of b_i counts as solved and contributes no gradient, where others add 1e-8
    inside the logarithm. An absent task leaves its xi_i where it is; z is the softmax over the
    present ones. Without `observe` (see Weighting) all z_i stay equal.
    """

    needs_losses_after = True
    logits: Tensor
    min_losses: Tensor

    def __init__(
        self,
        lr: float = 0.025,
        gamma: float = 1e-3,
        min_losses: float | Sequence[float] | Tensor = 0.0,
    ) -> None:
        super().__init__()
        self.adam = Adam(lr, gamma)
        self.register_buffer("logits", torch.zeros(0, dtype=torch.float64, device="cpu"))
        self.register_buffer(
            "min_losses", torch.as_tensor(min_losses, dtype=torch.float64, device="cpu"), False
        )

    def weighted(self, losses: Tensor, present: Tensor) -> Tensor:
        """c z ln(L - b)."""
        bounds = for_each_task(self.min_losses, losses, "min_losses")
        gaps = losses - torch.where(present, bounds, 0.0)
        check_positive(gaps, self, "loss above its min_losses")
        return super().weighted(gaps, present)

    def weigh(self, losses: Tensor, present: Tensor) -> Tensor:
        """c z."""
        if self.logits.numel() == 0:
            self.logits = torch.zeros_like(losses, dtype=torch.float64)
        z = self._softmax(present)
        # A solved task has no factor z / L; at L = 1e-12 it would take everybody else's.
        total = torch.where(losses > SOLVED, z / unless_solved(losses), 0.0).sum()
        return z / torch.where(total > 0, total, 1.0)

    def objective(self, losses: Tensor) -> Tensor:
        """ln L, constant where the task is solved."""
        return torch.log(unless_solved(losses))

    def learn(self, losses: Tensor, present: Tensor, gram: None, after: Tensor) -> None:
        """One step of Adam on xi."""
        present = present & after.isfinite()
        before, now = (
            torch.log(unless_solved(x.to(self.logits) - self.min_losses)) for x in (losses, after)
        )
        z = self._softmax(present)
        delta = torch.where(present, before - now, 0.0)
        self.logits = self.adam.step(self.logits, z * (delta - z @ delta), present)

    def _softmax(self, present: Tensor) -> Tensor:
        return torch.softmax(self.logits.masked_fill(~present, -torch.inf), 0)
