"""What the weightings that need positive losses have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from equipoise.errors import TaskError

SOLVED = 1e-12
"""A loss up to here counts as solved: it stands at this value and has no gradient."""


def check_positive(losses: Tensor, method: object, what: str = "loss") -> None:
    """Refuse negative losses, or whatever is called `what` in their place.

    Raises:
        TaskError: one is negative; names the first.
    """
    negative = losses < 0
    if bool(negative.any()):
        i = int(negative.nonzero()[0])
        raise TaskError(
            i,
            f"{what} is {losses[i].item():.6g}; {type(method).__name__} needs positive losses. "
            "Use EW, or shift the loss.",
        )


def unless_solved(losses: Tensor) -> Tensor:
    """The losses; SOLVED, a constant, in the place of those up to SOLVED."""
    return torch.where(losses > SOLVED, losses, SOLVED)
