"""TaskSharpness: at which points the task gradients are taken."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from equipoise.linalg import length, real

Perturbation = Literal["separate", "joint", "joint-mean", "samo"]
Norm = Literal["group", "joint"]

TINY = 1e-12
"""A gradient no longer than this is zero: it points nowhere, and nothing is perturbed."""


class TaskSharpness:
    """Task-based flat regions, F-MTL (Phan et al., arXiv 2211.13723, algorithm 1).

    Each task i climbs its own loss, in the trunk by eps_i = rho g_i / |g_i| with g_i its clean
    gradient there, and in its head by rho_task h_i / |h_i|. With g_i^SAM taken at the trunk's
    perturbed point and g_i^flat = g_i^SAM - g_i, the trunk learns along
    d = A(g_1, ..) + A(g_1^flat, ..), two separate calls of the aggregator A (eq. 5, 6), and head i
    along its gradient at its own perturbed point. Losses are weighted as in the clean pass.

    Args:
        rho: radius of the perturbation of the trunk, in the units of its parameters. 0: none.
        rho_task: the same for each head; None: `rho`.
        perturb: "separate": two points for each task, the trunk perturbed under the clean head,
            and the head on the clean features (algorithm 1). "joint": trunk and head i at once,
            and both gradients from there (with rho=0 too), as the authors' code does.
            "joint-mean": one point of the trunk for all tasks, up along the mean of the
            (weighted) task gradients; heads as for "separate". "samo": each task climbs along
            mix g_0 + (1 - mix) g_i, g_0 the mean of the (weighted) task gradients; the joint
            global-local perturbation of SAMO (Ban et al., ICCV 2025), with the g_i themselves
            where they estimate them without a backward.
        norm: "group": the trunk and each head are scaled to their radius separately. "joint": by
            the one norm of g_i and h_i together, for "separate" and "joint".
        adaptive: ASAM (Kwon et al., ICML 2021): eps = rho w^2 g / ||w| g| entry by entry, w the
            parameters, which does not depend on how the weights are scaled.
        decompose: False: d = A(g_1^SAM, ..), the naive way of the paper's ablation (table 5).
        every: the trunk's flat part is computed in each `every`-th step; in between it is held,
            and scaled as the length of A(g_1, ..) has changed. Heads are perturbed in every step.
        mix: SAMO's share of the global gradient, in [0, 1].

    Raises:
        ValueError: a value out of its range, or options that exclude each other; names both.

    A zero gradient (not above 1e-12) is not perturbed: its flat part is zero. Parameters come back
    bit for bit; buffers move in the clean pass alone; all passes see the same dropout masks.

    Passes: trunk 1 + T forwards and 2T backwards ("joint-mean": 2 and 2T); heads 3T forwards
    ("joint": 2T). In steps that hold the flat part: trunk 1 and T, heads 2T. Memory: as without,
    plus P for the parameters to be put back (and for a moment the gradient of one of them);
    "joint-mean" another P, "samo" two. State: with `every` above 1 the flat part, P numbers, and
    its age.
    """

    def __init__(
        self,
        rho: float = 0.05,
        rho_task: float | None = None,
        perturb: Perturbation = "separate",
        norm: Norm = "group",
        adaptive: bool = False,
        decompose: bool = True,
        every: int = 1,
        mix: float = 0.5,
    ) -> None:
        for name, radius in (("rho", rho), ("rho_task", rho_task)):
            if radius is not None and not 0 <= radius < math.inf:
                raise ValueError(f"{name} is {radius}; it must be a finite number, 0 or more.")
        for name, value, known in (("perturb", perturb, Perturbation), ("norm", norm, Norm)):
            if value not in get_args(known):
                raise ValueError(
                    f"{name} is {value!r}; known are {', '.join(map(repr, get_args(known)))}."
                )
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every is {every!r}; it must be a whole number of at least 1.")
        if not 0 <= mix <= 1:
            raise ValueError(f"mix is {mix}; it must lie in [0, 1].")
        if norm == "joint" and perturb not in ("separate", "joint"):
            raise ValueError(
                f"norm='joint' and perturb={perturb!r}: a perturbation that tasks share has no "
                "norm together with one head. Use norm='group'."
            )
        if every > 1 and not decompose:
            raise ValueError(
                f"every={every} and decompose=False: there is no flat part to hold. Use every=1."
            )
        if every > 1 and perturb == "joint":
            raise ValueError(
                f"every={every} and perturb='joint': the heads need that pass in every step. Use "
                "perturb='separate'."
            )
        self.rho = rho
        self.rho_task = rho_task
        self.perturb = perturb
        self.norm = norm
        self.adaptive = adaptive
        self.decompose = decompose
        self.every = every
        self.mix = mix
        self._held: Tensor | None = None
        self._held_length = 0.0
        self._held_for: Tensor | None = None
        self._age = 0

    # ------------------------------------------------------------------ what Step asks

    @property
    def rho_head(self) -> float:
        """The radius for heads."""
        return self.rho if self.rho_task is None else self.rho_task

    @property
    def active(self) -> bool:
        """Whether anything is perturbed at all."""
        return self.rho > 0 or self.rho_head > 0

    @property
    def shares_point(self) -> bool:
        """Whether all tasks look at the trunk from one perturbed point."""
        return self.perturb == "joint-mean"

    @property
    def moves_both(self) -> bool:
        """Whether trunk and head are perturbed at once."""
        return self.perturb == "joint"

    @property
    def needs_mean(self) -> bool:
        """Whether `ascent` wants the mean of the rows."""
        return self.perturb in ("joint-mean", "samo")

    def ascent(self, row: Tensor, mean: Tensor | None) -> Tensor:
        """Along what (P,) the trunk climbs for a task.

        Args:
            row: (P,) the task's gradient.
            mean: (P,) the mean of the rows; None unless `needs_mean`.
        """
        if mean is None:
            return row
        return mean if self.shares_point else torch.lerp(row, mean, self.mix)

    # ------------------------------------------------------------------ the perturbation

    def length(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> float:
        """The norm of one group's gradient g, or of |w| g if adaptive."""
        pairs = zip(parameters, gradients, strict=True)
        return length(
            real(p.detach()).abs() * real(g) if self.adaptive else g
            for p, g in pairs
            if g is not None
        )

    def scale(self, rho: float, length: float) -> float:
        """What `upward` is multiplied by for a group of that `length`; 0: it does not move."""
        return rho / length if length > TINY else 0.0

    def upward(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """The direction of eps: the gradient, or w^2 g if adaptive."""
        if not self.adaptive:
            return gradient
        found = real(parameter.detach()).square() * real(gradient)
        return torch.view_as_complex(found) if parameter.is_complex() else found

    def offsets(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        rho: float,
        length: float,
    ) -> Iterator[Tensor | None]:
        """eps of one group, one parameter after the other, none held longer than it is looked at.

        Args:
            parameters: the group, the trunk's or a head's.
            gradients: along which it climbs, shaped as the parameters; None: zeros.
            rho: the radius.
            length: the norm by which it is scaled, of `length`; 0: nothing moves.
        """
        scale = self.scale(rho, length)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            still = gradient is None or scale == 0
            yield None if still else self.upward(parameter, gradient) * scale

    # ------------------------------------------------------------------ holding the flat part

    def held(self, direction: Tensor, present: Tensor, length: float) -> Tensor | None:
        """The flat part (P,) to go on with, scaled to this step; None: it has to be computed.

        Args:
            direction: (P,) this step's A(g_1, ..).
            present: (T,) bool, the tasks of this step; a flat part of other tasks is not held.
            length: of `direction`.
        """
        if self._held is None or self._held_for is None or self._age >= self.every:
            return None
        if self._held.shape != direction.shape or not torch.equal(self._held_for, present):
            return None
        return self._held.to(direction) * (length / self._held_length)

    def hold(self, flat: Tensor | None, present: Tensor, length: float) -> None:
        """A step was made: `flat` (P,) was computed in it, or None if it was held."""
        if flat is None or self.every == 1:
            self._age += 1
        else:
            self._held = flat if length > 0 else None  # no length to scale by later
            self._held_length, self._held_for, self._age = length, present.clone(), 1

    def state_dict(self) -> dict[str, Any]:
        """The flat part that is held, for which tasks, its scale and its age."""
        return {
            "held": self._held,
            "length": self._held_length,
            "present": self._held_for,
            "age": self._age,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._held, self._held_for = state["held"], state["present"]
        self._held_length, self._age = state["length"], state["age"]
