"""STCH: a smooth maximum of the losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from equipoise.weighting.base import EpochMean, Weighting, check_steps_per_epoch, for_each_task
from equipoise.weighting.positive import check_positive, unless_solved


class STCH(Weighting):
    """Smooth Tchebycheff scalarization: T mu ln sum_i exp(p_i (L_i - z_i) / mu).

    Lin et al., ICML 2024, its definition of g_mu^STCH, times T. The weights are
    w_i = T p_i softmax(p (L - z) / mu)_i: the worst loss counts most, the more so the smaller mu.

    Preferences p are scaled to sum T, and the whole is multiplied by T, as in the code published
    for multi-task learning, so that equal losses get the weights of EW; the paper's preferences
    sum to 1, which makes its mu T times smaller. The weighted losses sum to the value above.

    Losses of unlike scales have no common maximum. For its multi-task experiments the published
    code (and LibMTL) therefore replaces L_i by ln(L_i / N_i), N_i the mean loss over one epoch
    that follows `warmup_epochs` epochs, and until that epoch's end trains on the sum of ln L_i.
    That is what a number for `warmup_epochs` does; it needs `steps_per_epoch`.

    Args:
        mu: smoothness; towards 0 the maximum itself. The paper tries 0.01 to 1.
        preference: p, (T,) positive numbers; None: equal ones.
        ideal: z, one number for all, or (T,); it is not used with `warmup_epochs`.
        warmup_epochs: None: the losses as they are; else see above.
        steps_per_epoch: batches in one epoch; used with `warmup_epochs` only.

    Raises:
        ValueError: a parameter out of its range, or at the call of another length than losses.
        TaskError: at the call, a loss is negative and logarithms are taken.

    Passes: one trunk forward and one backward a step. State: none, or 2 T numbers and a counter.
    Only the present tasks count, T being their number. A loss in [0, 1e-12] under the logarithm
    counts as solved and contributes no gradient. A task absent from all of the epoch of N has
    N_i = 1.
    """

    steps: Tensor
    preference: Tensor
    ideal: Tensor

    def __init__(
        self,
        mu: float = 1.0,
        preference: Sequence[float] | Tensor | None = None,
        ideal: float | Sequence[float] | Tensor = 0.0,
        warmup_epochs: int | None = None,
        steps_per_epoch: int | None = None,
    ) -> None:
        super().__init__()
        if not mu > 0:
            raise ValueError(f"mu is {mu}; it must be positive.")
        if warmup_epochs is not None and not warmup_epochs >= 0:
            raise ValueError(f"warmup_epochs is {warmup_epochs}; give 0 or more, or None.")
        p = torch.as_tensor(
            1.0 if preference is None else preference, dtype=torch.float64, device="cpu"
        )
        if not bool((p > 0).all()) or (preference is not None and p.dim() != 1):
            raise ValueError(f"preference is {preference}; give a positive number for each task.")
        self.mu = mu
        self.warmup_epochs = warmup_epochs
        if warmup_epochs is not None:
            self.steps_per_epoch = check_steps_per_epoch(steps_per_epoch)
        self.register_buffer("preference", p, persistent=False)
        self.register_buffer(
            "ideal", torch.as_tensor(ideal, dtype=torch.float64, device="cpu"), persistent=False
        )
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device="cpu"))
        self.nadir = EpochMean()

    def weighted(self, losses: Tensor, present: Tensor) -> Tensor:
        """Elements that sum to the value, each with its own slope."""
        if self.warmup_epochs is None:
            ideal = for_each_task(self.ideal, losses, "ideal")
            return self._smooth_maximum(losses - ideal, present)
        check_positive(losses, self)
        logs = torch.log(unless_solved(losses))
        epoch = int(self.steps) // self.steps_per_epoch
        self.steps += 1
        if epoch == self.warmup_epochs:
            self.nadir.add(losses.detach(), present)
        if epoch <= self.warmup_epochs:
            self.weights = self.weigh(losses.detach(), present)
            return logs
        nadir = self.nadir.value()
        scale = torch.where(nadir.isnan(), 1.0, unless_solved(nadir))
        return self._smooth_maximum(logs - torch.log(scale).to(losses.dtype), present)

    def _smooth_maximum(self, values: Tensor, present: Tensor) -> Tensor:
        n = present.sum()
        p = torch.where(present, for_each_task(self.preference, values, "preference"), 0.0)
        p = p * n / p.sum()
        scores = (p * values.detach() / self.mu).masked_fill(~present, -torch.inf)
        self.weights = (n * p * torch.softmax(scores, 0)).to(values.dtype)
        value = (self.mu * torch.logsumexp(scores, 0)).to(values.dtype)
        return self.weights * (values - values.detach()) + value

    def weigh(self, losses: Tensor, present: Tensor) -> Tensor:
        """Ones, for the logarithms of the warm-up."""
        return torch.ones_like(losses)
