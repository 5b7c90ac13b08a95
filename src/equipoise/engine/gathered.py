"""What is gathered of the micro-batches of a step before the last one comes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from equipoise.engine.evaluation import OneBatch
from equipoise.engine.gradients import Gradients, divided, summed
from equipoise.engine.rows import Rows
from equipoise.engine.stages import Stages
from equipoise.engine.targets import Presence
from equipoise.errors import CombinationError, EquipoiseError, NonFiniteError
from equipoise.replay import Replay


class Part(NamedTuple):
    """A micro-batch that can be looked at again; `replay` knows how its forward pass began."""

    look: OneBatch
    replay: Replay

    @contextmanager
    def anew(self, joint: Presence) -> Generator[OneBatch]:
        """In the body, the same micro-batch as if it were new, before its first look."""
        with self.replay.again(None):
            again = self.look.repeated()
            again.be_part_of(joint)
            yield again


@dataclass
class Gathered:
    """What has been collected since the last update.

    Task gradients are summed up as they come, each mean over samples times their number, so that
    the sums are those of the joint batch however many there will be. Where the coefficients are
    known beforehand nothing is summed up: one backward pass for each micro-batch is made in the
    end, which costs one more forward pass and saves the T x P numbers.

    Attributes:
        presences: of each micro-batch.
        losses: (T,) of each, times the numbers of samples; 0 for an absent task.
        parts: those that may be looked at again; None where nobody will ask.
        rows: the summed rows; None if nothing is summed up.
        own: task -> its own parameters, and the sums of their gradients.
        shared: the shared parameters.
        spoiled: why the step will be skipped, because a micro-batch was not finite; else None.
    """

    presences: list[Presence] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    rows: Rows | None = None
    own: dict[str, tuple[list[Tensor], Gradients]] = field(default_factory=dict)
    shared: list[Tensor] = field(default_factory=list)
    spoiled: NonFiniteError | None = None

    def __len__(self) -> int:
        return len(self.presences) + (self.spoiled is not None)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, to which the sums would be lost.

        Raises:
            EquipoiseError: there are some.
        """
        if self:
            raise EquipoiseError(
                "micro-batches have been collected, which cannot be copied; make the step that "
                "they belong to first."
            )
        return vars(self)

    def add(self, part: Part, stages: Stages, buffer: Callable[[OneBatch], Rows]) -> None:
        """Take in a micro-batch that has been looked at.

        Args:
            part: the micro-batch.
            stages: say whether the coefficients are known beforehand, and who looks again.
            buffer: gives rows.
        """
        look = part.look
        if not self:
            self.shared = look.shared
            if stages.known(len(look.presence.names)) is None:
                self.rows = buffer(look)
                self.rows.begin_sums()
        self.refuse_other_parameters(look)
        if self.rows is not None:
            self.sum_up(look)
        presence = look.presence
        self.presences.append(presence)
        self.losses.append(presence.spread(look.losses) * presence.totals)
        again = stages.looks_again or stages.weighting.needs_losses_after
        if again or self.rows is None:
            look.rest()
            self.parts.append(part)

    def sum_up(self, look: OneBatch) -> None:
        """Add the rows and the gradients of own parameters, times the numbers of samples."""
        assert self.rows is not None
        presence = look.presence
        gradients = look.fill(_Sums(self.rows, presence))
        totals = presence.totals[presence.present].tolist()
        for task, total, parameters, found in zip(
            presence.names, totals, look.own, gradients, strict=True
        ):
            _, before = self.own.get(task, (parameters, [None] * len(parameters)))
            self.own[task] = parameters, summed(before, divided(found, 1 / total))

    def refuse_other_parameters(self, look: OneBatch) -> None:
        """Refuse a micro-batch that has shown that more, or less, is shared than was known."""
        known = [(self.shared, look.shared)]
        for task, own in zip(look.presence.names, look.own, strict=True):
            known.append((self.own.get(task, (own, []))[0], own))
        for before, now in known:
            if len(before) != len(now) or any(p is not q for p, q in zip(before, now, strict=True)):
                raise EquipoiseError(
                    "the micro-batches of one step do not agree on which parameters are shared, "
                    "because a task reaches some of them for the first time. Say by `shared` what "
                    "is shared, or make the first step without `collect`."
                )


class _Sums:
    """Takes the place of rows while an evaluation fills them: adds to those of all T tasks."""

    def __init__(self, rows: Rows, presence: Presence) -> None:
        self.rows = rows
        self.where = [presence.tasks.index(task) for task in presence.names]
        # A part of a larger batch gives gradients that are its share of that one's.
        self.factors = presence.totals[presence.present].tolist()
        self.clear()

    def clear(self) -> None:
        """The next row is the first."""
        self._next = zip(self.where, self.factors, strict=True)

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Add to the next row."""
        k, factor = next(self._next)
        self.rows.add_to(k, gradients, factor)


def refuse_collecting(stages: Stages) -> None:
    """Refuse to gather micro-batches for what needs all features at once.

    Raises:
        CombinationError: a stage that works on the features.
    """
    if stages.level == "features":
        raise CombinationError(
            f"collect and {stages.needs.features}: the gradients of the features of all "
            "micro-batches would be needed at once. Work at the parameters: level='parameters', "
            "or Backtracking."
        )
