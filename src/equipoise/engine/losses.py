"""Losses as a user gives them, checked: each a scalar with a graph."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from equipoise.errors import NOT_CONNECTED, EquipoiseError, NonFiniteError, TaskError, nearest


def check_loss(task: int | str, loss: Any) -> None:
    """A loss must be a scalar tensor, or TaskError."""
    if not isinstance(loss, Tensor):
        raise TaskError(task, f"loss is a {type(loss).__name__}; return a scalar tensor.")
    if loss.dim() != 0:
        raise TaskError(
            task, f"loss has shape {tuple(loss.shape)}; return a scalar, for example its mean."
        )


def losses_of_closure(
    given: Any, tasks: Sequence[str], left_out: Collection[str]
) -> dict[str, tuple[Tensor, float]]:
    """Task name -> loss and number of samples, from what a closure has returned.

    Args:
        given: task name -> loss, or -> (loss, number of samples).
        tasks: all there are.
        left_out: those whose losses do not count.

    Raises:
        EquipoiseError: no dict.
        TaskError: an unknown task; a loss that is no scalar or has no graph; a negative number.
    """
    if not isinstance(given, Mapping):
        raise EquipoiseError(
            f"the closure returned a {type(given).__name__}; it must return a dict, task name -> "
            "scalar loss."
        )
    found = {}
    for task, loss in given.items():
        if task not in tasks:
            raise TaskError(
                str(task),
                "has a loss, but the Step was built with other tasks; " + nearest(str(task), tasks),
            )
        count = 1.0
        if isinstance(loss, tuple) and len(loss) == 2:
            loss, count = loss[0], float(loss[1])
        check_loss(task, loss)
        if not loss.requires_grad:
            raise TaskError(task, NOT_CONNECTED)
        if not 0 <= count < float("inf"):
            raise TaskError(task, f"has {count} samples; give a number from 0 on.")
        if task not in left_out and count > 0:
            found[task] = loss, count
    return found


def scalar_losses(
    losses: Mapping[str, Tensor] | Sequence[Tensor] | Tensor,
) -> tuple[list[str], list[Tensor]]:
    """The names and the values of the losses, checked."""
    if isinstance(losses, Tensor) and losses.dim() != 1:
        raise EquipoiseError(f"losses has shape {tuple(losses.shape)}; it must be (T,).")
    named = dict(losses) if isinstance(losses, Mapping) else dict(enumerate(losses))
    if not named:
        raise EquipoiseError("losses is empty; give at least one.")
    for task, loss in named.items():
        check_loss(task, loss)
        if not loss.requires_grad:
            raise TaskError(task, "loss is not connected to any parameter; was it detached?")
    return [str(task) for task in named], list(named.values())


def refuse_infinite(losses: Sequence[Tensor]) -> None:
    """Raise NonFiniteError, with the position of the first loss that is not finite."""
    for i, loss in enumerate(losses):
        if not bool(torch.isfinite(loss)):
            raise NonFiniteError(i, f"loss is {loss.item()}; leave this batch out.")
