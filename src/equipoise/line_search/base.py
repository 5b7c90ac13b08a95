"""The contract of a line search: which step sizes are tried, and which one is accepted."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Rule = Literal["full", "head", "latent"]
Objective = Literal["each", "sum"]

LARGEST = 1e10
"""Up to here an upper bound that adapts may grow."""


class LineSearch:
    """Backtracking with the sufficient-decrease rule of Armijo, for several tasks at once.

    It knows numbers only: it names step sizes, the largest first, and judges what the losses
    became. Who drives it moves parameters or features, and evaluates.

    Attributes:
        level: the level, "parameters" or "features", at which it needs the gradients.
        moves: "gradient" where steps go along the direction itself, and the optimizer has to be
            plain SGD; "optimizer" where they go along what the optimizer makes of it.
        verify: whether a step that was found among features is checked in the parameters.
        bound: the step size that is tried first in the next step.
    """

    level: str = "parameters"
    moves: str = "gradient"
    verify: bool = False

    def __init__(
        self,
        beta: float,
        shrink: float,
        upper: float,
        floor: float,
        rule: Rule,
        steps_per_epoch: int | None,
        halve_every: int | None,
        upper_shrink: float,
        objective: Objective,
        adapt: bool,
    ) -> None:
        if not 0 < beta < 0.5:
            raise ValueError(f"beta is {beta}; it must lie between 0 and 1/2, both excluded.")
        for name, factor in (("shrink", shrink), ("upper_shrink", upper_shrink)):
            if not 0 < factor < 1:
                raise ValueError(f"{name} is {factor}; it must lie between 0 and 1, both excluded.")
        if not (0 < upper < math.inf and 0 < floor < math.inf):
            raise ValueError(f"upper is {upper} and floor {floor}; both must be positive, finite.")
        if floor > upper:
            raise ValueError(f"floor={floor} and upper={upper}: no step size lies between them.")
        for name, value, known in (("rule", rule, Rule), ("objective", objective, Objective)):
            if value not in get_args(known):
                raise ValueError(
                    f"{name} is {value!r}; known are {', '.join(map(repr, get_args(known)))}."
                )
        for name, count in (("steps_per_epoch", steps_per_epoch), ("halve_every", halve_every)):
            if count is not None and (int(count) != count or count < 1):
                raise ValueError(f"{name} is {count!r}; it must be a whole number, 1 or more.")
        self.beta = beta
        self.shrink = shrink
        self.upper = upper
        self.floor = floor
        self.rule = rule
        self.steps_per_epoch = steps_per_epoch
        self.halve_every = halve_every
        self.upper_shrink = upper_shrink
        self.objective = objective
        self.adapt = adapt
        self._steps = 0
        self._adapted = upper

    # ------------------------------------------------------------------ which step sizes

    @property
    def bound(self) -> float:
        """The step size that is tried first: lr_ub, never below the floor."""
        if self.adapt:
            return self._adapted
        if self.steps_per_epoch is None or self.halve_every is None:
            return self.upper
        epoch = self._steps // self.steps_per_epoch
        return max(self.upper * self.upper_shrink ** (epoch // self.halve_every), self.floor)

    def sizes(self) -> Iterator[float]:
        """The step sizes of one search, from the bound down to the floor."""
        size = self.bound
        while size >= self.floor:
            yield size
            size *= self.shrink

    def count(self, trials: int, step_size: float, promised: Tensor) -> None:
        """A step was made, or was given up after so many trials.

        Args:
            trials: how many step sizes were tried.
            step_size: the accepted one; 0 if none was.
            promised: (T,) what `promised` gave; if it is all 0 a search tells nothing.
        """
        self._steps += 1
        if not self.adapt or not bool((promised != 0).any()):
            return
        if step_size and trials == 1:
            self._adapted = min(self._adapted / self.shrink, LARGEST)
        elif trials > 2:
            # One trial above what was accepted, so that the next step may find it too small.
            self._adapted = max(step_size / self.shrink or self._adapted * self.shrink, self.floor)

    # ------------------------------------------------------------------ which one is accepted

    @property
    def needs_products(self) -> bool:
        """Whether the products `<g_t, d>` of the shared direction are asked for at all."""
        return self.rule != "head"

    def content_with(self, known: Tensor) -> bool:
        """Whether it can judge a step along sum_t w_t g_t from that direction alone.

        Args:
            known: (T,) the coefficients w.
        """
        together = self.objective == "sum" and bool((known == known[0]).all() and known[0] != 0)
        return together or not self.needs_products

    def promised(self, head: Tensor, shared: Tensor, rule: Rule | None = None) -> Tensor:
        """(T,) what each loss would fall by for each unit of step size, were it linear.

        Args:
            head: (T,) products of each head's gradient with its direction: |h_t|^2.
            shared: (T,) products of the shared gradients with the shared direction.
            rule: None: that of this search.
        """
        parts = {"full": head + shared, "head": head, "latent": shared}
        return parts[self.rule if rule is None else rule]

    def descends(self, products: Tensor, rule: Rule | None = None) -> bool:
        """Whether a direction with these products (T,) lets no loss grow, to first order.

        Args:
            products: of the tasks' gradients with it.
            rule: None: that of this search; with "head" any direction will do.
        """
        if (self.rule if rule is None else rule) == "head":
            return True
        judged = products.sum() if self.objective == "sum" else products
        return bool((judged >= 0).all())

    def allows(self, size: float, before: Tensor, after: Tensor, promised: Tensor) -> bool:
        """Whether the losses have fallen enough: L~_t <= L_t - eta beta promised_t, for every t.

        Compared as they are, in float64, without any slack.

        Args:
            size: eta, the step size.
            before: (T,) the losses where the step begins.
            after: (T,) the losses at its end; one that is not finite is never accepted.
            promised: (T,) as `promised` gives it.
        """
        if not bool(torch.isfinite(after).all()):
            return False
        if self.objective == "sum":
            before, after, promised = before.sum(), after.sum(), promised.sum()
        return bool((after <= before - size * self.beta * promised).all())

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """How many steps there were, and the bound that adapts."""
        return {"steps": self._steps, "adapted": self._adapted}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._steps, self._adapted = state["steps"], state["adapted"]


class LatentLineSearch(LineSearch, ABC):
    """A line search whose trials move the features, for which the heads alone are evaluated."""

    level = "features"

    @property
    @abstractmethod
    def needs_lengths(self) -> bool:
        """Whether `scale` wants the two lengths."""

    @abstractmethod
    def scale(self, squared_step: float, squared_direction: float, samples: int) -> float:
        """How far the features move for each unit of step size.

        Args:
            squared_step: |J^T d_z|^2, the length of the trunk's step.
            squared_direction: |d_z|^2; 0 if the trunk does not move.
            samples: of the batch.
        """
