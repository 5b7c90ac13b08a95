"""The joint batch of several micro-batches, of which the last one makes the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from equipoise.engine.evaluation import Evaluation, Moving, OneBatch, first_not_finite
from equipoise.engine.gathered import Gathered
from equipoise.engine.gradients import Gradients, divided, scaled, summed
from equipoise.engine.rows import Rows, TakesRows
from equipoise.engine.targets import Presence
from equipoise.errors import NonFiniteError, TaskError
from equipoise.replay import RandomState


class MicroBatches(Evaluation):
    """The joint batch of what was gathered and the last micro-batch, which is yet to be looked at.

    Args:
        gathered: at least one micro-batch.
        last: of the batch with which the step is made.
    """

    def __init__(self, gathered: Gathered, last: OneBatch) -> None:
        self.gathered = gathered
        self.ranks = last.ranks
        self.presence = Presence.joint([*gathered.presences, last.presence])
        self.last = last if last.presence.names else None
        for part in (*(part.look for part in gathered.parts), *([last] if self.last else ())):
            part.be_part_of(self.presence)

    @property
    def parts(self) -> Sequence[OneBatch]:
        """All micro-batches."""
        return [part.look for part in self.gathered.parts] + ([self.last] if self.last else [])

    # ------------------------------------------------------------------ the first look

    def refuse_changed(self) -> None:
        """Look at what was gathered once more: is it still what it was?

        Raises:
            TaskError: a loss is not.
        """
        gathered, presence = self.gathered, self.presence
        for number, (part, then) in enumerate(zip(gathered.parts, gathered.losses, strict=True)):
            with part.anew(presence) as again:
                now = presence.spread(again.look().losses) * presence.totals
            for i, task in enumerate(presence.tasks):
                if not math.isclose(now[i], then[i], rel_tol=1e-3, abs_tol=1e-12):
                    raise TaskError(
                        task,
                        f"loss of micro-batch {number} has changed since it was collected. Keep "
                        "its tensors as they are, and bind them in a closure that is made in a "
                        "loop: lambda x=x, y=y: ...",
                    )

    def look(self, apart: bool = True) -> Evaluation:
        """Make the forward pass of the last micro-batch."""
        gathered, present = self.gathered, self.presence.present
        self.shared = gathered.shared
        self.losses = (sum(gathered.losses, torch.zeros((), device="cpu")) / self.presence.totals)[
            present
        ]
        if self.last is not None:
            self.last.scale = self.scale
            self.last = self.last.look(apart)
            gathered.refuse_other_parameters(self.last)
            self.losses = self.losses + self.last.losses
        by_task = {task: own for task, (own, _) in gathered.own.items()}
        for part in self.parts:
            by_task |= dict(zip(part.presence.names, part.own, strict=True))
        self.own = [by_task[task] for task in self.presence.names]
        return self

    # ------------------------------------------------------------------ backward

    def fill(self, rows: TakesRows) -> list[Gradients]:
        """The sums of what was gathered and of the last micro-batch, over the whole numbers."""
        gathered, presence = self.gathered, self.presence
        assert isinstance(rows, Rows)
        if gathered.rows is None:
            gathered.rows = rows
            rows.begin_sums()
            for part in gathered.parts:
                with part.anew(presence) as again:
                    gathered.sum_up(again.look())
        if self.last is not None:
            gathered.sum_up(self.last)
        where = [presence.tasks.index(task) for task in presence.names]
        totals = presence.totals[presence.present].tolist()
        rows.end_sums(where, totals)
        nothing: list[Gradients] = [[None] * len(own) for own in self.own]
        found = [
            gathered.own.get(task, ([], of_none))[1]
            for task, of_none in zip(presence.names, nothing, strict=True)
        ]
        return [divided(own, total) for own, total in zip(found, totals, strict=True)]

    def backward(self, coefficients: Tensor, factors: Tensor) -> tuple[Gradients, list[Gradients]]:
        """One forward and one backward for each micro-batch; the last one's forward was made."""
        rows = self.gathered.rows
        if rows is not None:  # they have been summed up, as it was not known that none are needed
            own = self.fill(rows)
            rows.weigh(factors)
            return rows.per_parameter(rows.combine(coefficients)), list(scaled(own, factors))
        apart = bool((coefficients != coefficients[0]).any())
        shared: Gradients = [None] * len(self.shared)
        by_task: list[Gradients] = [[None] * len(own) for own in self.own]

        def add(look: OneBatch) -> None:
            nonlocal shared, by_task
            found, own = look.backward(coefficients, factors)
            shared = summed(shared, found)
            by_task = [summed(a, b) for a, b in zip(by_task, own, strict=True)]

        for part in self.gathered.parts:
            with part.anew(self.presence) as again:
                add(again.look(apart))
        if self.last is not None:
            add(self.last)
        return shared, by_task

    # ------------------------------------------------------------------ further looks

    def own_again(
        self, tasks: Sequence[int], moving: Moving
    ) -> list[tuple[Tensor | None, Gradients]]:
        """The sums over the parts; each loss is this process's share of the joint one."""
        values: list[Tensor | None] = [None] * len(tasks)
        gradients: list[Gradients] = [[None] * len(self.own[k]) for k in tasks]
        for part in self.parts:
            for i, (value, found) in enumerate(part.own_again(tasks, moving)):
                if value is not None:
                    share, before = value * part.presence.parts[tasks[i]], values[i]
                    values[i] = share if before is None else before + share
                gradients[i] = summed(gradients[i], found)
        return list(zip(values, gradients, strict=True))

    def trial_losses(self) -> Tensor:
        """One further look at each part."""
        return torch.stack([part.trial_losses() for part in self.parts]).sum(0)

    # ------------------------------------------------------------------ as if it were new

    def losses_now(self, before: RandomState) -> Tensor:
        """(T,) losses with the parameters as they are by now; all NaN if one is not finite."""
        found = [] if self.last is None else [self.last.losses_now(before)]
        for part in self.gathered.parts:
            grad = torch.set_grad_enabled(part.look.findings.compiled)
            with grad, part.anew(self.presence) as again:
                try:
                    losses = again.look().losses
                except NonFiniteError:
                    losses = torch.full_like(self.losses, torch.nan)
                found.append(self.presence.spread(losses, torch.nan))
        return torch.stack(found).sum(0)

    def why_not_finite(self, before: RandomState, buffer: Callable[[], Rows]) -> NonFiniteError:
        """The error that names the first task, from what has been summed up or anew."""
        gathered, names = self.gathered, self.presence.names
        if gathered.rows is not None:  # which are finite, or they would have been named
            return first_not_finite(names, [gathered.own[task][1] for task in names], None)
        if self.last is not None:
            before.restore()
            again = self.last.repeated()
            again.be_part_of(self.presence)
            self.last = again.look()
        rows = buffer()
        own = self.fill(rows)
        return first_not_finite(names, own, rows)
