"""What the checks of aggregators ask: the direction of a fresh one, and lengths in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from equipoise.testing.common import Make, called, ensure, fresh
from equipoise.testing.rows import kinds_of_rows


def direction(make: Make, rows: Tensor, where: str) -> Tensor:
    """The direction of a fresh aggregator; its shape is checked."""
    one = fresh(make, len(rows))
    more = (torch.ones(len(rows)).to(rows),) if getattr(one, "needs_losses", False) else ()
    found = called(one, where, rows, *more)
    ensure(found.shape == rows.shape[1:], where, f"{tuple(rows.shape[1:])}", tuple(found.shape))
    return found


def independent(n_tasks: int) -> Tensor:
    """Rows without any relation."""
    return dict(kinds_of_rows(n_tasks))["independent"]


def length(vector: Tensor) -> float:
    """Of a direction, in float64."""
    return vector.double().norm().item()


def longest(rows: Tensor) -> float:
    """The length of the longest row."""
    return rows.double().norm(dim=1).max().item()
