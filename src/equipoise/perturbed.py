"""The second look at a batch, from perturbed points: what task-based flat regions are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from equipoise.batch import Batch
from equipoise.boundary import Gradients
from equipoise.combine import Combination, combine
from equipoise.errors import NonFiniteError
from equipoise.linalg import length
from equipoise.rows import Rows
from equipoise.sharpness import TINY, TaskSharpness


class Sharpened(NamedTuple):
    """What the second look gave.

    Attributes:
        direction: (P,) of the shared parameters.
        heads: gradients of the heads, as `Batch.heads_backward` has them.
        result: how the rows of the second look were combined; None if there were none.
    """

    direction: Tensor
    heads: Gradients
    result: Combination | None


class FirstLook(NamedTuple):
    """What was there before the second look took its place.

    Attributes:
        rows: (T', columns of this process) the clean rows.
        direction: (P,) that they gave.
    """

    rows: Tensor
    direction: Tensor


class SecondLook:
    """Gradients of the losses of a batch at the points that TaskSharpness asks for.

    Args:
        batch: after its heads' backward; it has recorded its draws.
        rows: the clean rows, which will make room for those of the second look.
        heads: gradients of the head parameters, as `Batch.heads_backward` gave them.
        factors: (T',) by which each loss is multiplied.
        sharpness: which points.
        keep: whether what it takes the place of will still be asked for.

    Attributes:
        before: that, if so.
    """

    before: FirstLook | None = None

    def __init__(
        self,
        batch: Batch,
        rows: Rows,
        heads: Gradients,
        factors: Tensor,
        sharpness: TaskSharpness,
        keep: bool = False,
    ) -> None:
        self.batch = batch
        self.rows = rows
        self.sharpness = sharpness
        rows.refuse_changes()
        self.seen: list[tuple[int, Tensor]] = []  # losses at perturbed points, looked at in the end
        self.length = 0.0  # of the direction without the flat part
        self.flat: Tensor | None = None  # the flat part, if this step computes it
        self.seeds = (factors * batch.labels.shares).tolist()
        self.heads: list[Group] = []
        self.keep = keep
        for parameters in batch.head_parameters.values():
            own, heads = heads[: len(parameters)], heads[len(parameters) :]
            self.heads.append(Group(parameters, own, sharpness.length(parameters, own)))
        if sharpness.norm == "joint":
            trunks = [self._trunk(rows.full_row(k)).length for k in range(len(self.heads))]
            self.heads = [
                head._replace(length=math.hypot(head.length, trunk))
                for head, trunk in zip(self.heads, trunks, strict=True)
            ]

    def along(self, direction: Tensor, aggregator: Callable) -> Sharpened:
        """The whole direction.

        Args:
            direction: (P,) that the clean rows gave; may be overwritten.
            aggregator: combines the rows of the second look.

        Raises:
            NonFiniteError: a gradient at a perturbed point; names the task.
        """
        sharp = self.sharpness
        if self.keep:
            self.before = FirstLook(self.rows.filled.clone(), direction.clone())
        self.length = length([direction])
        held = sharp.held(direction, self.batch.labels.present, self.length)
        if held is not None:
            direction += held
        if held is not None or (sharp.rho == 0 and not sharp.moves_both):
            heads = self.heads_moved()
            self._refuse_infinite_losses()
            return Sharpened(direction, heads, None)
        heads = self.fill()
        self._refuse_infinite_losses()
        try:
            result, second = combine(self.rows, aggregator, self.batch.losses)
        except NonFiniteError as error:
            raise self._too_far(error.task, "gradient") from None
        self.flat = second if sharp.every > 1 else None
        return Sharpened(direction.add_(second) if sharp.decompose else second, heads, result)

    def commit(self) -> None:
        """The step was made: let sharpness hold what it holds from step to step."""
        self.sharpness.hold(self.flat, self.batch.labels.present, self.length)

    def _refuse_infinite_losses(self) -> None:
        """Where a loss is not finite in one process, all name the task."""
        bad = torch.zeros(len(self.heads))
        for k, value in self.seen:
            bad[k] += not math.isfinite(float(value))
        for k, count in enumerate(self.batch.ranks.sum(bad).tolist()):
            if count > 0:
                raise self._too_far(k, "loss")

    def _too_far(self, task: int | str, what: str) -> NonFiniteError:
        radii = f"rho={self.sharpness.rho} and rho_task={self.sharpness.rho_head}"
        problem = f"{what} at its perturbed point is not finite, with {radii}. Lower them."
        return NonFiniteError(task, problem)

    # ------------------------------------------------------------------ the passes

    def fill(self) -> Gradients:
        """Each row anew, from its task's perturbed point; and the gradients of the heads."""
        sharp, rows = self.sharpness, self.rows
        if sharp.shares_point:
            self._fill_from(self._trunk(rows.mean()))
            return self.heads_moved()
        mean = rows.mean() if sharp.needs_mean else None
        found: Gradients = []
        for k, head in enumerate(self.heads):
            trunk = self._trunk(sharp.ascent(rows.full_row(k), mean))
            if sharp.norm == "joint":
                trunk = trunk._replace(length=head.length)
            if trunk.length <= TINY and not (sharp.moves_both and head.length > TINY):
                rows.stay(k, sharp.decompose)
                found += head.gradients
                continue
            moving = moved(trunk, sharp, sharp.rho)
            del trunk  # where it is no row it is P numbers more
            with moving:
                if sharp.moves_both:
                    with moved(head, sharp, sharp.rho_head):
                        found += self._renew(k, None, head.parameters)
                else:
                    self._renew(k, None)
        return found if sharp.moves_both else self.heads_moved()

    def _fill_from(self, trunk: Group) -> None:
        """All rows anew from one point of the trunk."""
        if trunk.length <= TINY:
            for k in range(len(self.heads)):
                self.rows.stay(k, self.sharpness.decompose)
            return
        moving = moved(trunk, self.sharpness, self.sharpness.rho)
        del trunk
        with moving:
            features = self._agreed(self.batch.features_again)
            for k in range(len(self.heads)):
                self._renew(k, features, retain_graph=k + 1 < len(self.heads))

    def heads_moved(self) -> Gradients:
        """Gradients of the heads at their perturbed points, on the features of the first pass."""
        return [
            gradient for k, head in enumerate(self.heads) for gradient in self._head_moved(k, head)
        ]

    def _head_moved(self, k: int, head: Group) -> Gradients:
        if self.sharpness.rho_head == 0 or head.length <= TINY:
            return head.gradients
        with moved(head, self.sharpness, self.sharpness.rho_head):
            value = self._loss(k)
            gradients: Gradients = [None] * len(head.parameters)
            if value is not None:
                seed = value.new_tensor(self.seeds[k])
                found = torch.autograd.grad(value, head.parameters, seed, allow_unused=True)
                gradients = list(found)
        return self.batch.ranks.sum_gradients(gradients, head.parameters)

    def _renew(
        self, k: int, features: Any, also: Sequence[Tensor] = (), retain_graph: bool = False
    ) -> Gradients:
        """Row k from where the parameters are now; and the gradients of parameters beside."""
        if features is None:
            features = self._agreed(self.batch.features_again)
        value = self._loss(k, features)
        with self.rows.renewed(k, self.sharpness.decompose):
            if value is not None:
                torch.autograd.backward(
                    value,
                    value.new_tensor(self.seeds[k]),
                    retain_graph=retain_graph,
                    inputs=[*self.batch.trunk_parameters, *also],
                )
        gradients = [p.grad for p in also]
        for parameter in also:
            parameter.grad = None
        return self.batch.ranks.sum_gradients(gradients, also)

    def _loss(self, k: int, features: Any = None) -> Tensor | None:
        value = self._agreed(self.batch.loss_again, k, features)
        if value is not None:
            self.seen.append((k, value.detach()))
        return value

    def _trunk(self, upward: Tensor) -> Group:
        parameters = self.batch.trunk_parameters
        pieces: Gradients = list(self.rows.pieces(upward))
        return Group(parameters, pieces, self.sharpness.length(parameters, pieces))

    def _agreed(self, function: Callable, *arguments: Any) -> Any:
        with self.batch.ranks.agreeing():
            return function(*arguments)


class Group(NamedTuple):
    """Parameters that are perturbed together, along what, and the norm that goes to the radius."""

    parameters: Sequence[Tensor]
    gradients: Gradients
    length: float


@contextmanager
def moved(group: Group, sharpness: TaskSharpness, rho: float) -> Generator[None]:
    """The group's parameters perturbed in the body; bit for bit as before it afterwards."""
    before: list[tuple[Tensor, Tensor]] = []
    try:
        _move(group, sharpness, rho, before)
        del group  # what it climbed along is not needed any more
        torch.clear_autocast_cache()  # it holds half-precision copies of the parameters
        yield
    finally:
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)
        torch.clear_autocast_cache()


@torch.no_grad()
def _move(group: Group, sharpness: TaskSharpness, rho: float, before: list) -> None:
    scale = sharpness.scale(rho, group.length)
    for parameter, gradient in zip(group.parameters, group.gradients, strict=True):
        if gradient is not None and scale != 0:
            before.append((parameter, parameter.detach().clone()))
            parameter.add_(sharpness.upward(parameter, gradient), alpha=scale)
