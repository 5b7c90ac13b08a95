"""GradDrop: of entries whose signs disagree, one sign is drawn."""

from __future__ import annotations

import torch
from torch import Tensor

from equipoise.aggregation.base import Aggregator
from equipoise.errors import NOT_FINITE, NonFiniteError
from equipoise.generators import GeneratorState


class GradDrop(GeneratorState, Aggregator):
    """Gradient sign dropout (Chen et al., NeurIPS 2020, algorithm 1).

    In each entry the positive sign is kept with probability P = (1 + sum_i g_i / sum_i |g_i|) / 2,
    else the negative one; what has the other sign is dropped. d adds up what is left.

    As published this happens to the gradients of the features (`level="features"`): they are
    multiplied by the sign of the features and summed over the batch, and one draw for each feature
    says which tasks pass there, for all samples. At the level of the parameters each parameter is
    an entry; that is the simplification which other libraries offer.

    Args:
        leak: the part of each gradient, 0 to 1, that passes undropped. 0 by default; 1: the sum.
        generator: a CPU generator for the draws; None: a private one, seeded from torch's
            global generator at construction.

    Raises:
        ValueError: `leak` outside of 0 to 1.

    Where all gradients are zero TorchJD divides 0 by 0, and LibMTL adds 1e-7; here such an entry
    is zero.

    Unanimity value T g; the expected d is sum g_i, for opposite and collinear gradients too. A zero
    gradient has no say. May conflict. Passes: one trunk forward and T backwards a step;
    `level="features"`: one backward. Memory: (T + 5) x P. State: the generator.
    """

    def __init__(self, leak: float = 0.0, generator: torch.Generator | None = None) -> None:
        super().__init__(generator)
        if not 0 <= leak <= 1:
            raise ValueError(f"leak is {leak}; it must lie between 0 and 1.")
        self.leak = leak

    def forward(self, rows: Tensor) -> Tensor:
        """The direction (P,), with one draw for each column of the rows (T, P)."""
        positive = torch.zeros_like(rows[0])
        negative = torch.zeros_like(rows[0])
        for row in rows:  # one by one: no second T x P numbers
            positive += row.clamp(min=0)
            negative += row.clamp(max=0)
        if not bool((positive - negative).isfinite().all()):
            finite = rows.isfinite().all(1)
            if not bool(finite.all()):
                raise NonFiniteError(int((~finite).nonzero()[0]), NOT_FINITE)
        kept = torch.where(self._keep_positive(positive, negative), positive, negative)
        return self.leak * (positive + negative) + (1 - self.leak) * kept

    def entry_weights(self, rows: Tensor) -> Tensor:
        """(T, P) what each entry counts in one draw, for gradients that go with these signs.

        Args:
            rows: (T, P), in P entries the evidence of T tasks.
        """
        keep = self._keep_positive(rows.clamp(min=0).sum(0), rows.clamp(max=0).sum(0))
        passes = torch.where(keep, rows > 0, rows < 0)
        return self.leak + (1 - self.leak) * passes.to(rows)

    def _keep_positive(self, positive: Tensor, negative: Tensor) -> Tensor:
        """For each entry whether the positive sign is drawn; the sums are of either sign."""
        draws = torch.rand(positive.shape, generator=self.generator, device="cpu").to(positive)
        # P > U without the division, which would be 0 / 0 where all gradients are zero.
        return positive > draws * (positive - negative)
