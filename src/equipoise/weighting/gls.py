"""GLS: the geometric mean of the losses."""

from __future__ import annotations

import torch
from torch import Tensor

from equipoise.weighting.base import Weighting
from equipoise.weighting.positive import check_positive, unless_solved


class GLS(Weighting):
    """Geometric loss strategy: (L_1 ... L_T)^(1/T) (Chennupati et al., CVPRW 2019).

    Its gradient is the sum of w_i times that of L_i with w_i = GLS / (T L_i), so the weighted
    losses w_i L_i are all GLS / T: their sum has the value and the gradient of the geometric mean,
    while each depends on its own loss alone. The direction is that of SI; the length shrinks
    with the losses instead of growing. Only the present tasks count.

    The mean is taken of the logarithms: a product, as in LibMTL and in the paper, vanishes or
    overflows for many tasks. A loss in [0, 1e-12] counts as solved: it enters as 1e-12 and
    contributes no gradient. LibMTL reports L_i / (T prod L) as weights, and uses the above.

    Raises:
        TaskError: at the call, a loss is negative.

    Passes: one trunk forward and one backward a step. No state.
    """

    def weigh(self, losses: Tensor, present: Tensor) -> Tensor:
        """GLS / (T L)."""
        check_positive(losses, self)
        logs = torch.log(unless_solved(losses))
        mean = torch.where(present, logs, 0.0).sum() / present.sum()
        return torch.exp(mean - logs) / present.sum()

    def objective(self, losses: Tensor) -> Tensor:
        """The losses, constant where the task is solved."""
        return unless_solved(losses)
