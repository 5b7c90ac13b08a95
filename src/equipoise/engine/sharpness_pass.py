"""The second look at a batch, from perturbed points: what task-based flat regions are made of."""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from equipoise.engine.adapters import AggregatorStage
from equipoise.engine.direction import Combination, combine
from equipoise.engine.displaced import Displaced
from equipoise.engine.evaluation import Evaluation, OneBatch
from equipoise.engine.gradients import Gradients, divided, summed
from equipoise.engine.rows import Rows
from equipoise.errors import NonFiniteError
from equipoise.linalg import finite_norm, length, on_host
from equipoise.sharpness import TINY, TaskSharpness


class Sharpened(NamedTuple):
    """What the second look gave.

    Attributes:
        direction: (P,) of the shared parameters.
        own: gradients of each task's own parameters, of the raw losses.
        result: how the rows of the second look were combined; None if there were none.
    """

    direction: Tensor
    own: list[Gradients]
    result: Combination | None


class FirstLook(NamedTuple):
    """What was there before the second look took its place.

    Attributes:
        rows: (T', columns of this process) the clean rows.
        direction: (P,) that they gave.
    """

    rows: Tensor
    direction: Tensor


class Group(NamedTuple):
    """Parameters that are perturbed together, along what, and the norm that goes to the radius."""

    parameters: Sequence[Tensor]
    gradients: Gradients
    length: float
    sign: float = 1.0


class SecondLook:
    """Gradients of the losses of a batch at the points that TaskSharpness asks for.

    Args:
        evaluation: of the batch, which can be looked at again.
        rows: the clean rows, which will make room for those of the second look.
        own: gradients of each task's own parameters, of the raw losses.
        factors: (T',) what multiplies each loss; its sign says which way is up.
        sharpness: which points.
        keep: whether what it takes the place of will still be asked for.

    Attributes:
        before: that, if so.
    """

    before: FirstLook | None = None

    def __init__(
        self,
        evaluation: Evaluation,
        rows: Rows,
        own: Sequence[Gradients],
        factors: Tensor,
        sharpness: TaskSharpness,
        keep: bool = False,
    ) -> None:
        self.evaluation = evaluation
        self.rows = rows
        self.sharpness = sharpness
        rows.refuse_changes()
        self.seen: list[tuple[int, Tensor]] = []  # losses at perturbed points, looked at in the end
        self.length = 0.0  # of the direction without the flat part
        self.flat: Tensor | None = None  # the flat part, if this step computes it
        self.keep = keep
        multiplied = torch.ones_like(factors) if rows.multiplied is None else rows.multiplied
        self.multiplied = multiplied.tolist()
        self.heads = [
            Group(parameters, gradients, sharpness.length(parameters, gradients), sign)
            for parameters, gradients, sign in zip(
                evaluation.own, own, torch.sign(factors).tolist(), strict=True
            )
        ]
        if sharpness.norm == "joint":
            trunks = [self._trunk(rows.full_row(k)).length for k in range(len(self.heads))]
            self.heads = [
                # The buffer may hold the row multiplied; the head's gradient is the raw one.
                head._replace(length=math.hypot(head.length, trunk / (abs(f) or 1.0)))
                for head, trunk, f in zip(self.heads, trunks, self.multiplied, strict=True)
            ]

    def along(self, direction: Tensor, aggregator: AggregatorStage) -> Sharpened:
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
        present = self.evaluation.presence.present
        held = sharp.held(direction, present, self.length)
        if held is not None:
            direction += held
        if held is not None or (sharp.rho == 0 and not sharp.moves_both):
            own = self._own_moved()
            self._refuse_what_is_not_finite(own)
            return Sharpened(direction, own, None)
        own = self._fill()
        self._refuse_what_is_not_finite(own)
        try:
            result, second = combine(self.rows, aggregator, self.evaluation.losses)
        except NonFiniteError as error:
            raise self._too_far(error.task, "gradient") from None
        self.flat = second if sharp.every > 1 else None
        return Sharpened(direction.add_(second) if sharp.decompose else second, own, result)

    def commit(self) -> None:
        """The step was made: let sharpness hold what it holds from step to step."""
        self.sharpness.hold(self.flat, self.evaluation.presence.present, self.length)

    def _refuse_what_is_not_finite(self, own: Sequence[Gradients]) -> None:
        """Where a loss, or a gradient of own parameters, is not finite, name the task."""
        bad = torch.zeros(len(self.heads), dtype=torch.float64, device="cpu")
        if self.seen:  # one read for all
            tasks, values = zip(*self.seen, strict=True)
            infinite = (~on_host(values).isfinite()).to(torch.float64)
            bad.index_add_(0, torch.tensor(tasks, device="cpu"), infinite)
        for k, count in enumerate(self.evaluation.ranks.sum(bad).tolist()):
            if count > 0:
                raise self._too_far(k, "loss")
        if finite_norm(itertools.chain(*own)) is None:
            k = next((k for k, gs in enumerate(own) if finite_norm(gs) is None), None)
            if k is not None:  # else they overflow together, which is no task's fault
                raise self._too_far(k, "gradient")

    def _too_far(self, task: int | str | None, what: str) -> NonFiniteError:
        radii = f"rho={self.sharpness.rho} and rho_task={self.sharpness.rho_head}"
        problem = f"{what} at its perturbed point is not finite, with {radii}. Lower them."
        return NonFiniteError(task, problem)

    # ------------------------------------------------------------------ the passes

    def _fill(self) -> list[Gradients]:
        """Fill each row again, from its task's perturbed point; return own gradients."""
        sharp, rows = self.sharpness, self.rows
        if sharp.shares_point:
            self._fill_from(self._trunk(rows.mean()))
            return self._own_moved()
        mean = rows.mean() if sharp.needs_mean else None
        ways = range(len(self.heads))
        lengths = [self._trunk(sharp.ascent(self._upward(k), mean)).length for k in ways]
        displaced = Displaced(self.evaluation.shared)  # whose starts are copied once for all tasks
        found: list[Gradients] = []
        for k, head in enumerate(self.heads):
            trunk = self._trunk(sharp.ascent(self._upward(k), mean), lengths[k])
            if sharp.norm == "joint":
                trunk = trunk._replace(length=head.length * abs(self.multiplied[k]))
            if trunk.length <= TINY and not (sharp.moves_both and head.length > TINY):
                rows.stay(k, sharp.decompose)
                found.append(head.gradients)
                continue
            moving = moved(trunk, sharp, sharp.rho, displaced)
            del trunk  # where it is no row it is P numbers more
            with moving:
                rows.renew(k, sharp.decompose)  # not before: it may be what the trunk climbs along
                if sharp.moves_both:
                    with moved(head, sharp, sharp.rho_head):
                        found.append(self._looked_at_again(k, head.parameters))
                else:
                    self._looked_at_again(k)
        return found if sharp.moves_both else self._own_moved()

    def _fill_from(self, trunk: Group) -> None:
        """Fill all rows again from one point of the shared parameters."""
        tasks = range(len(self.heads))
        if trunk.length <= TINY:
            for k in tasks:
                self.rows.stay(k, self.sharpness.decompose)
            return
        moving = moved(trunk, self.sharpness, self.sharpness.rho)
        del trunk
        with moving:
            for k in tasks:
                self.rows.renew(k, self.sharpness.decompose)
            for part in self.evaluation.parts:
                if part.findings.compiled:  # each graph allows one backward pass
                    for k in tasks:
                        self._receive(part, k, self._losses(part, [k])[0])
                    continue
                for k, value in enumerate(self._losses(part, tasks)):
                    self._receive(part, k, value, retain_graph=k + 1 < len(tasks))

    def _own_moved(self) -> list[Gradients]:
        """Gradients of own parameters at their perturbed points, the shared ones being clean."""
        found = [head.gradients for head in self.heads]
        if self.sharpness.rho_head > 0:
            tasks = [k for k, head in enumerate(self.heads) if head.length > TINY]
            for k, (value, gradients) in zip(tasks, self._own_again(tasks), strict=True):
                found[k] = gradients
                if value is not None:
                    self.seen.append((k, value))
        return found

    def _own_again(self, tasks: Sequence[int]) -> list[tuple[Tensor | None, Gradients]]:
        def moving(k: int) -> AbstractContextManager[None]:
            return moved(self.heads[k], self.sharpness, self.sharpness.rho_head)

        return self.evaluation.own_again(tasks, moving) if tasks else []

    def _looked_at_again(self, k: int, also: Sequence[Tensor] = ()) -> Gradients:
        """Row k from where the parameters are now; and the gradients of some other parameters."""
        total: Gradients = [None] * len(also)
        for part in self.evaluation.parts:
            found = self._receive(part, k, self._losses(part, [k])[0], also)
            total = summed(total, found)
        return total

    def _receive(
        self,
        part: OneBatch,
        k: int,
        value: Tensor | None,
        also: Sequence[Tensor] = (),
        retain_graph: bool = False,
    ) -> Gradients:
        """Let row k receive the gradient of a loss; return those of some other parameters."""
        factor = self.multiplied[k]
        seed = None if value is None else part.seed(k, value, factor)
        with part.passes.one():
            found = self.rows.receive(k, value, seed, also, retain_graph, part.scale)
        return part.ranks.sum_gradients(divided(found, part.scale * (factor or 1.0)), also)

    def _losses(self, part: OneBatch, tasks: Sequence[int]) -> list[Tensor | None]:
        values = part.losses_again(tasks)
        self.seen += [(k, v.detach()) for k, v in zip(tasks, values, strict=True) if v is not None]
        return values

    def _upward(self, k: int) -> Tensor:
        """(P,) along what the weighted loss of task k rises."""
        row, factors = self.rows.full_row(k), self.rows.factors
        factor = 1.0 if factors is None else float(factors[k])
        if not self.sharpness.needs_mean:  # else its length matters, too
            factor = math.copysign(1.0, factor)
        return row if factor == 1 else row * factor

    def _trunk(self, upward: Tensor, length: float | None = None) -> Group:
        parameters = self.evaluation.shared
        pieces: Gradients = list(self.rows.pieces(upward))
        known = self.sharpness.length(parameters, pieces) if length is None else length
        return Group(parameters, pieces, known)


@contextmanager
def moved(
    group: Group, sharpness: TaskSharpness, rho: float, displaced: Displaced | None = None
) -> Generator[None]:
    """The group's parameters perturbed in the body; bit for bit as before it afterwards."""
    scale = group.sign * sharpness.scale(rho, group.length)
    moving = [
        (p, g)
        for p, g in zip(group.parameters, group.gradients, strict=True)
        if g is not None and scale != 0
    ]
    with displaced or Displaced([p for p, _ in moving]) as mover:
        mover.move(_offsets(moving, sharpness), scale)
        del group, moving  # what they climbed along is not needed any more
        yield


def _offsets(
    moving: Sequence[tuple[Tensor, Tensor]], sharpness: TaskSharpness
) -> Iterable[tuple[Tensor, Tensor]]:
    """Along what each parameter climbs; one by one where that is not the gradient itself."""
    if sharpness.adaptive:
        return ((p, sharpness.upward(p, g)) for p, g in moving)
    return moving
