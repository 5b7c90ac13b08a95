"""Learning-rate schedules: how the learning rate changes from epoch to epoch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau, StepLR

from equipoise.errors import EquipoiseError
from equipoise.lab import options
from equipoise.text import show


class ScheduleError(EquipoiseError, ValueError):
    """A schedule that is not known."""


def none(optimizer: Optimizer) -> None:
    """The learning rate stays as it is."""


def halve(optimizer: Optimizer, *, every: int = 100, factor: float = 0.5) -> StepLR:
    """Times `factor` after each `every` epochs.

    Args:
        optimizer: all of its groups.
        every: epochs.
        factor: between 0 and 1.

    Raises:
        ValueError: a number out of its range.
    """
    if every < 1:
        raise ValueError(f"schedule halve: every is {every}; give 1 epoch or more.")
    _refuse_factor("halve", factor)
    return StepLR(optimizer, every, factor)


def plateau(
    optimizer: Optimizer, *, factor: float = 0.7, patience: int = 5, minimum: float = 1e-5
) -> ReduceLROnPlateau:
    """Times `factor` when validation has not become better for more than `patience` epochs.

    The judgement is that by which the best epoch is selected: Delta_m, as a fraction, where the
    data set has published single-task numbers, else the score; better is more than 1e-4 above the
    best so far.

    Args:
        optimizer: all of its groups.
        factor: between 0 and 1.
        patience: epochs that may pass without a better one.
        minimum: the learning rate does not fall below.

    Raises:
        ValueError: a number out of its range, or a minimum above the learning rate.
    """
    _refuse_factor("plateau", factor)
    if patience < 0:
        raise ValueError(f"schedule plateau: patience is {patience}; give 0 epochs or more.")
    lr = optimizer.param_groups[0]["lr"]
    if not 0 <= minimum <= lr:
        raise ValueError(
            f"schedule plateau: minimum is {minimum:g} and the learning rate {lr:g}; give a "
            "minimum from 0 up to that."
        )
    # An absolute threshold: a relative one counts a slightly worse Delta_m below 0 as better.
    return ReduceLROnPlateau(
        optimizer, "max", factor, patience, 1e-4, threshold_mode="abs", min_lr=minimum
    )


SCHEDULES: dict[str, Callable[..., LRScheduler | None]] = {
    "none": none,
    "halve": halve,
    "plateau": plateau,
}
"""Name -> `build(optimizer, **options)`. A new schedule is one line here."""


class Schedule:
    """A schedule at work on one optimizer.

    Args:
        text: one of `SCHEDULES`, with options in parentheses if need be: "halve(every=50)".
        optimizer: whose learning rates are set; those of learned weightings as well.

    Raises:
        ScheduleError: what is wrong with the text, see `canonical`.
        ValueError: an option has a value that cannot be.
    """

    def __init__(self, text: str, optimizer: Optimizer) -> None:
        name, given = options.read(text, SCHEDULES, "schedule", ScheduleError)
        self._scheduler = SCHEDULES[name](optimizer, **given)

    def step(self, judgement: float) -> None:
        """An epoch has ended.

        Args:
            judgement: of the validation, higher is better; NaN is not better than anything.
        """
        if isinstance(self._scheduler, ReduceLROnPlateau):
            self._scheduler.step(judgement)
        elif self._scheduler is not None:
            self._scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """All that the next steps depend on, besides the optimizer's own state."""
        return {} if self._scheduler is None else self._scheduler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        if self._scheduler is not None:
            self._scheduler.load_state_dict(dict(state))


def canonical(text: str) -> str:
    """The canonical form of "name(option=value, ...)", which leaves out what is default.

    Raises:
        ScheduleError: a name, an option or the type of a value is not known; says what is.
    """
    return show(*options.read(text, SCHEDULES, "schedule", ScheduleError))


def _refuse_factor(name: str, factor: float) -> None:
    if not 0 < factor < 1:
        raise ValueError(f"schedule {name}: factor is {factor}; give a number between 0 and 1.")
