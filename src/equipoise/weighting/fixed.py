"""Fixed: constant weights, alone or on top of another weighting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from equipoise.errors import TaskError
from equipoise.weighting.base import Weighting
from equipoise.weighting.ew import EW


class Fixed(Weighting):
    """Constant weights: w_i times the weighted loss of task i, as specialists have them.

    STG-MTL (arXiv 2307.03374, eq. 3) trains on the sum of w_ij L_i. With another weighting inside,
    w multiplies what it makes of the losses, which it sees as they are: multiplying the losses
    first would leave no trace under SI and its kin, for which constant factors do not count. A
    task of weight 0 takes no part in the training at all.

    Aggregators that do not look at the length of a gradient (Nash-MTL; of IMTL-G and EDM the
    direction) ignore w. With MGDA it works the other way around: MGDA favours short gradients.

    Args:
        weights: (T,) not negative.
        inside: the weighting that it multiplies; None: EW.

    Raises:
        TaskError: a weight is negative or not finite.
        ValueError: no weight is above 0, or they are no vector.
    """

    factors: Tensor

    def __init__(self, weights: Sequence[float] | Tensor, inside: Weighting | None = None) -> None:
        super().__init__()
        factors = torch.as_tensor(weights, dtype=torch.float64, device="cpu").detach().cpu().clone()
        if factors.dim() != 1 or not bool((factors != 0).any()):
            raise ValueError(f"weights {factors.tolist()} must be a vector with an entry above 0.")
        for i, w in enumerate(factors.tolist()):
            if not 0 <= w < float("inf"):
                raise TaskError(i, f"weight is {w}; give a number from 0 on.")
        self.register_buffer("factors", factors)
        self.inside = EW() if inside is None else inside
        self.n_tasks = len(factors)
        self.lr = self.inside.lr
        self.needs_gram = self.inside.needs_gram
        self.needs_losses_after = self.inside.needs_losses_after
        self.needs_lr = self.inside.needs_lr

    @property
    def left_out(self) -> frozenset[int]:
        """The tasks of weight 0."""
        return frozenset((self.factors == 0).nonzero().flatten().tolist())

    @property
    def generator(self) -> torch.Generator:
        """The inner weighting's private generator, where it has one."""
        generator = getattr(self.inside, "generator", None)
        if generator is None:
            raise AttributeError(f"{type(self.inside).__name__} draws nothing.")
        return generator

    def begin(self, lr: float) -> None:
        """Tell the inner weighting."""
        self.inside.begin(lr)

    def weighted(self, losses: Tensor, present: Tensor) -> Tensor:
        """Factors times the weighted losses of the inner weighting."""
        if losses.shape != self.factors.shape:
            raise ValueError(f"there are {len(losses)} losses for {self.n_tasks} weights.")
        factors = self.factors.to(losses)
        weighted = self.inside(losses, present & (factors > 0))
        self.weights = factors * self.inside.weights
        return factors * weighted

    def weigh(self, losses: Tensor, present: Tensor) -> Tensor:
        """The factors."""
        return self.factors.to(losses)

    def learn(self, losses: Any, present: Any, gram: Any, after: Any) -> None:
        """Let the inner weighting learn; its gradients are those without the factors."""
        taken = present & (self.factors > 0).to(present.device)
        if gram is not None:
            factors = torch.where(self.factors > 0, self.factors, 1.0).to(gram)
            gram = gram / torch.outer(factors, factors)
        self.inside.observe(losses, taken, gram, after)
