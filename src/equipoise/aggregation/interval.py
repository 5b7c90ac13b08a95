"""Every: coefficients that are computed once in k steps, and used in between."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from equipoise.aggregation.base import EPS, Array, GramAggregator


class Every(GramAggregator):
    """Any Gram aggregator, asked only each k-th step; the steps in between reuse its answer.

    A step with known coefficients needs one trunk backward instead of T, and no rows. Nash-MTL's
    authors do so with their `update_weights_every`.

    Args:
        aggregator: what is asked, with its state.
        k: 1 or more; 1 asks it in each step.

    Raises:
        ValueError: `k` is not a whole number of at least 1, or `aggregator` has no coefficients.

    A step in which other tasks are present than when the coefficients were computed computes them
    anew. Properties of the aggregator, such as that no task conflicts, hold in the steps that ask
    it. Passes: one trunk forward; T backwards in one of k steps and one in the others. Memory:
    T x P. State: the coefficients, their age, and the aggregator's own.
    """

    def __init__(self, aggregator: GramAggregator, k: int) -> None:
        super().__init__()
        if not isinstance(k, int) or k < 1:
            raise ValueError(f"k is {k!r}; it must be a whole number of at least 1.")
        if not isinstance(aggregator, GramAggregator):
            raise ValueError(
                f"{type(aggregator).__name__} has no coefficients to keep; Every needs a "
                "GramAggregator."
            )
        self.aggregator = aggregator
        self.k = self.interval = k
        self.degree = aggregator.degree
        self.needs_losses = aggregator.needs_losses
        self._kept: Tensor | None = None
        self._kept_for: Tensor | None = None
        self._age = 0
        self._present: Tensor | None = None

    @property
    def generator(self) -> torch.Generator:
        """The aggregator's private generator, where it has one."""
        generator = getattr(self.aggregator, "generator", None)
        if generator is None:
            raise AttributeError(f"{type(self.aggregator).__name__} draws nothing.")
        return generator

    def begin(self, present: Tensor) -> None:
        """One step more; forgets the coefficients if they are old or of other tasks."""
        self.aggregator.begin(present)
        self._present = present.clone()
        self._age += 1
        same = self._kept_for is not None and torch.equal(self._kept_for, present)
        if self._age >= self.k or not same:
            self._kept = None

    def known_coefficients(self, n_tasks: int) -> Tensor | None:
        """The kept coefficients, in the steps that do not compute them."""
        if self._kept is not None and len(self._kept) == n_tasks and self._present is not None:
            return self._kept
        return self.aggregator.known_coefficients(n_tasks)

    def coefficients(
        self, gram: Tensor, losses: Tensor | None = None, *, eps: float = EPS
    ) -> Tensor:
        """The aggregator's coefficients for this Gram matrix, which are kept."""
        w = self.aggregator.coefficients(gram, losses, eps=eps)
        self._kept, self._kept_for, self._age = w.cpu(), self._present, 0
        return w

    def weights(self, gram: Array, losses: Array | None) -> Array:
        """The aggregator's."""
        return self.aggregator.weights(gram, losses)

    def get_extra_state(self) -> dict[str, Any]:
        """What is kept, for which tasks, and for how long already, for `state_dict`."""
        return {"kept": self._kept, "kept_for": self._kept_for, "age": self._age}

    def set_extra_state(self, state: Any) -> None:
        """Restore it from `state_dict`."""
        self._kept, self._kept_for = state["kept"], state["kept_for"]
        self._age = state["age"]


def every(k: int, aggregator: GramAggregator) -> GramAggregator:
    """The aggregator with its coefficients computed each k-th step only; see `Every`."""
    return Every(aggregator, k)
