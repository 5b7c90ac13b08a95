"""The contract between a step and a network: losses, their gradients, and further looks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.buffers import Buffers, put_back
from equipoise.engine.gradients import Gradients, divided
from equipoise.engine.passes import Findings, Passes
from equipoise.engine.ranks import Ranks
from equipoise.engine.rows import Rows, TakesRows
from equipoise.engine.targets import Presence
from equipoise.errors import NOT_FINITE, TOO_LARGE, NonFiniteError
from equipoise.kept import Attributes
from equipoise.linalg import finite_norm
from equipoise.replay import RandomState, frozen_buffers, replayed

Moving = Callable[[int], AbstractContextManager[Any]]
"""Position of a present task -> a context in which that task's own parameters are moved."""


class Evaluation(ABC):
    """What a step asks of a batch, or of several that make one step: losses and their gradients.

    Gradients are those of the raw losses of the joint batch. A further look sees the parameters as
    they are by then, with the draws and from the buffers of the first look, and leaves buffers and
    random generators as they are.

    Attributes:
        presence: which T' of the T tasks take part.
        ranks: the processes that train together.
        shared: the shared parameters that are not frozen; their numbers are the P columns of rows.
        own: for each present task the parameters that follow its own loss.
        losses: (T',) detached losses of the joint batch, float64 on the CPU; once `look` was
            called.
        scale: what losses are multiplied by on their way back, so that half-precision gradients do
            not vanish; what comes out is divided by it.
    """

    presence: Presence
    ranks: Ranks
    shared: list[Tensor]
    own: list[list[Tensor]]
    losses: Tensor
    scale: float = 1.0

    @property
    @abstractmethod
    def parts(self) -> Sequence[OneBatch]:
        """The batches that are looked at one after the other, in the positions of this one."""

    @abstractmethod
    def look(self, apart: bool = True) -> Evaluation:
        """Make the forward pass.

        Args:
            apart: whether the tasks' gradients are wanted one by one; False: only the sum of all,
                equally weighted, which some networks get for less.

        Returns:
            The evaluation to go on with: this one, unless the losses turn out to need another.

        Raises:
            TaskError: a loss is not a scalar, not connected to the network, or not finite.
            EquipoiseError: no gradient can reach the shared parameters.
        """

    @abstractmethod
    def fill(self, rows: TakesRows) -> list[Gradients]:
        """Fill a row with each present task's gradient of the shared parameters.

        Costs T' backward passes, and where parts are compiled T' - 1 forward passes. Returns the
        gradients of each task's own parameters.
        """

    @abstractmethod
    def backward(self, coefficients: Tensor, factors: Tensor) -> tuple[Gradients, list[Gradients]]:
        """The gradients of sums of the losses, without any rows.

        Args:
            coefficients: (T',) the weighted losses' coefficients, for the shared parameters.
            factors: (T',) what multiplies each loss, for both.

        Returns:
            Gradients of the shared parameters, and of each task's own ones. A parameter that
            several tasks own has its whole gradient at the first of them.
        """

    @abstractmethod
    def own_again(
        self, tasks: Sequence[int], moving: Moving
    ) -> list[tuple[Tensor | None, Gradients]]:
        """Further look: losses and gradients of own parameters, each task's own being moved.

        The shared parameters stay where they are. Returns for each of `tasks` this process's
        loss, detached, and the gradients of the joint batch.
        """

    @abstractmethod
    def trial_losses(self) -> Tensor:
        """Further look: (T',) losses of the joint batch, float64 on the CPU, of any value."""

    @abstractmethod
    def losses_now(self, before: RandomState) -> Tensor:
        """(T,) losses of the batch with the parameters as they are by now, NaN where absent.

        Args:
            before: from where the first look has drawn.

        Returns:
            All NaN if one is not finite: the next step will say so.
        """

    @abstractmethod
    def why_not_finite(self, before: RandomState, buffer: Callable[[], Rows]) -> NonFiniteError:
        """The error for gradients that are not finite, which names the first task; slow.

        Args:
            before: from where the first look has drawn; the generators go back there.
            buffer: gives rows that may be filled.
        """


class OneBatch(Evaluation):
    """One batch on its way through a network.

    It is made in two parts: the constructor finds out which tasks are present, `look` makes the
    forward pass.

    Attributes:
        whole: the network, together with losses that are modules and may keep something in them.
        start: what it held in plain attributes before the first look.
        held: the buffers of those losses before the first look.
        passes: within which its backward passes are made; once `look` was called.
        findings: what is known of the network's graphs, likewise.
    """

    whole: nn.Module
    start: Attributes
    held: Buffers
    passes: Passes
    findings: Findings

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """The network."""

    @property
    def parts(self) -> Sequence[OneBatch]:
        """This one."""
        return [self]

    @abstractmethod
    def look(self, apart: bool = True) -> OneBatch:
        """As in `Evaluation`."""

    @abstractmethod
    def be_part_of(self, joint: Presence) -> None:
        """Take the positions and shares of a larger batch; before `look`, or after `rest`."""

    @abstractmethod
    def rest(self) -> None:
        """Let go of what only the first backward passes need."""

    @abstractmethod
    def repeated(self) -> OneBatch:
        """The same batch once more, as if it were new."""

    @abstractmethod
    def losses_again(self, tasks: Sequence[int]) -> list[Tensor | None]:
        """Further look: the losses of some present tasks, with their graphs.

        Args:
            tasks: positions among the present tasks.

        Returns:
            A scalar for each of them, over this process's samples; None where it has none.
        """

    # ------------------------------------------------------------------ what all have

    def own_gradients(self, k: int, value: Tensor | None) -> Gradients:
        """Gradients of the k-th present task's own parameters by its loss, of all processes."""
        found: Gradients = [None] * len(self.own[k])
        if value is not None and value.requires_grad and self.own[k]:
            seed = self.seed(k, value)
            with self.passes.one():
                found = list(torch.autograd.grad(value, self.own[k], seed, allow_unused=True))
        return self.ranks.sum_gradients(self.unscaled(found), self.own[k])

    def seed(self, k: int, value: Tensor, weight: float = 1.0) -> Tensor:
        """What goes backward from the loss of the k-th present task: this process's share of it."""
        return value.new_tensor(weight * self.presence.parts[k] * self.scale)

    def unscaled(self, gradients: Gradients) -> Gradients:
        """Gradients without the scale of the losses."""
        return divided(gradients, self.scale)

    def weighted(
        self, values: Sequence[Tensor | None], weights: Sequence[float]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The losses of this process that have a graph, and what each is multiplied by."""
        parts, scale = self.presence.parts, self.scale
        found = [
            (value, weight * part * scale)
            for value, weight, part in zip(values, weights, parts, strict=True)
            if value is not None and value.requires_grad
        ]
        if not found:
            return [], []
        ends, numbers = map(list, zip(*found, strict=True))
        if len({(end.dtype, end.device) for end in ends}) == 1:  # one tensor for all
            return ends, list(ends[0].new_tensor(numbers).unbind())
        return ends, [end.new_tensor(number) for end, number in zip(ends, numbers, strict=True)]

    def joint(self, values: Sequence[Tensor | None]) -> Tensor:
        """(T',) the losses of the joint batch from those of this process, float64 on the CPU."""
        known = [value.detach() for value in values if value is not None]
        here = torch.zeros(len(values), dtype=torch.float64, device="cpu")
        if known:  # one copy to the host for all
            common = known[0].device
            numbers = torch.stack([value.to(common) for value in known])
            here[[value is not None for value in values]] = numbers.to("cpu", torch.float64)
        if not self.presence.is_whole:
            here *= here.new_tensor(self.presence.parts)
        return self.ranks.sum(here)

    def refuse_infinite_losses(self) -> None:
        """Raise NonFiniteError if a loss is NaN or infinite."""
        for task, loss in zip(self.presence.names, self.losses.tolist(), strict=True):
            if not math.isfinite(loss):
                cause = self.cause(task) if math.isnan(loss) else None
                if cause is not None:
                    raise NonFiniteError(task, f"loss is {loss}: {cause}")
                raise NonFiniteError(
                    task, f"loss is {loss}. Lower the learning rate, or leave this batch out."
                )

    def cause(self, task: str) -> str | None:
        """Why the loss of a task may be NaN, with what to do; None if nothing is known."""
        return None

    def begin_again(self) -> None:
        """Let the network hold what it held before the first look, but for its own buffers."""
        put_back(self.held)
        self.start.put_back()

    def losses_now(self, before: RandomState) -> Tensor:
        """As in `Evaluation`."""
        # Compiled parts run the code of the first look, which was made with gradients.
        grad = torch.set_grad_enabled(self.findings.compiled)
        with grad, replayed(self.module, before), frozen_buffers(self.whole):
            try:
                losses = self.repeated().look().losses
            except NonFiniteError:
                return torch.full(
                    self.presence.present.shape, torch.nan, dtype=torch.float64, device="cpu"
                )
        return self.presence.spread(losses, torch.nan)

    def why_not_finite(self, before: RandomState, buffer: Callable[[], Rows]) -> NonFiniteError:
        """As in `Evaluation`."""
        before.restore()  # the same dropout masks again
        again = self.repeated().look()
        rows = buffer()
        own = again.fill(rows)
        return first_not_finite(again.presence.names, own, rows)


def first_not_finite(
    names: Sequence[str], own: Sequence[Gradients], rows: Rows | None
) -> NonFiniteError:
    """The error that names the first task with a gradient that is not finite."""
    lengths = None if rows is None else rows.gram().diagonal()
    for k, task in enumerate(names):
        in_rows = lengths is not None and not bool(torch.isfinite(lengths[k]))
        if in_rows or finite_norm(own[k]) is None:
            return NonFiniteError(task, NOT_FINITE)
    return NonFiniteError(None, TOO_LARGE)
