"""GradNorm: weights learned so that gradient norms follow the training rates."""

from __future__ import annotations

import torch
from torch import Tensor

from equipoise.weighting.adam import Adam
from equipoise.weighting.base import Weighting
from equipoise.weighting.positive import check_positive, unless_solved

SMALLEST = 1e-3
"""Weights do not fall below this; the paper does not say what keeps them positive."""


class GradNorm(Weighting):
    """Gradient normalization (Chen et al., ICML 2018, section 3, eq. 2 and algorithm 1).

    w_i = 1 at first. After each step w goes down the slope of sum_i |G_i - mean(G) r_i^alpha|, in
    which G_i = |gradient of w_i L_i| over what is shared, r_i is L_i / L_i(0) divided by its mean
    over tasks, and the second term is a number. Then w is scaled back to its sum T. So the
    new weights serve from the next step on, as in the paper's algorithm 1.

    What is shared: all shared parameters, or the features at `level="features"`, which takes one
    backward through the trunk. The paper takes the last shared layer. LibMTL has w = T softmax of
    what is learned, begins in the second epoch, and takes the mean loss of the first for L_i(0).

    Args:
        alpha: how strongly tasks are pulled to a common rate; 0 makes all norms equal. The paper
            uses 1.5 on NYUv2 and 0.12 on its toy problem.
        lr: learning rate of w in Adam, 0.025 as in the paper.

    Raises:
        ValueError: `lr` is not positive, or `alpha` is negative.
        TaskError: at the call, a loss is negative.

    Passes: one trunk forward and T backwards a step (1 at the feature level), whatever the
    aggregator. Memory: T x P. State: 5 T numbers.

    L_i(0) is the first loss of the task that was seen; one up to 1e-12 counts as 1e-12. Weights
    stay at or above 1e-3 before scaling. An absent task leaves its w_i where it is, and the sum of
    the others' is kept. Without `observe` (see Weighting) all weights stay 1.
    """

    needs_gram = True
    learned: Tensor
    first_losses: Tensor

    def __init__(self, alpha: float = 1.5, lr: float = 0.025) -> None:
        super().__init__()
        if not alpha >= 0:
            raise ValueError(f"alpha is {alpha}; it must not be negative.")
        self.alpha = alpha
        self.adam = Adam(lr)
        self.register_buffer("learned", torch.zeros(0, dtype=torch.float64, device="cpu"))
        self.register_buffer("first_losses", torch.zeros(0, dtype=torch.float64, device="cpu"))

    def weigh(self, losses: Tensor, present: Tensor) -> Tensor:
        """The weights as learned so far."""
        check_positive(losses, self)
        if self.learned.numel() == 0:
            self.learned = torch.ones_like(losses, dtype=torch.float64)
            self.first_losses = torch.full_like(self.learned, torch.nan)
        new = present & self.first_losses.isnan()
        self.first_losses = torch.where(new, losses.to(self.learned), self.first_losses)
        return self.learned

    def learn(self, losses: Tensor, present: Tensor, gram: Tensor, after: None) -> None:
        """One step of Adam on w."""
        norms = gram.diagonal().clamp_min(0).sqrt().to(self.learned)
        rates = unless_solved(losses.to(self.learned)) / unless_solved(self.first_losses)
        wanted = norms[present].mean() * (rates / rates[present].mean()) ** self.alpha
        slopes = torch.sign(norms - wanted) * norms / self.learned
        moved = self.adam.step(self.learned, slopes, present).clamp_min(SMALLEST)
        back = self.learned[present].sum() / moved[present].sum()
        self.learned = torch.where(present, moved * back, self.learned)
