"""Steps on random losses, as a training would make them, for the checks of weightings."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from equipoise.testing.common import STEPS_PER_EPOCH, Make, called, ensure, fresh
from equipoise.weighting.base import Weighting

T = 4
WARM = 3 * STEPS_PER_EPOCH + 1  # past the first epochs, so that weights are not all 1
LEARNING_RATE = 0.1
ALL = torch.ones(T, dtype=torch.bool)


def drawn(n_tasks: int, step: int) -> Tensor:
    """Positive losses (T,) of that step, around 1."""
    return torch.from_numpy(np.random.default_rng(step).uniform(0.1, 3, n_tasks))


def weighted(one: Any, losses: Tensor, where: str, *present: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted losses, and the factors: the derivative of their sum."""
    found = called(one, where, losses, *present)
    ensure(found.requires_grad, where, "weighted losses computed from the losses", "numbers")
    total = found.sum()
    factors = torch.autograd.grad(total, losses, retain_graph=True, materialize_grads=True)[0]
    return found, factors


def warm(make: Make, calls: int = WARM) -> Any:
    """One that has been used in so many steps."""
    one = fresh(make, T)
    for step in range(calls):
        losses = drawn(T, step)
        learn(one, losses, called(one, "positive losses", losses), ALL, step)
    return one


def learn(
    one: Any, losses: Tensor, found: Tensor, present: Tensor, step: int, order: Any = slice(None)
) -> None:
    """What a step does after the update, with rows and later losses of that step's own."""
    if not isinstance(one, Weighting):
        return
    rng = np.random.default_rng(1000 + step)
    if one.needs_gram or one.needs_losses_after:
        rows = torch.from_numpy(rng.normal(size=(len(losses), 6)))[order]
        rows = one.weights.detach().double()[:, None] * rows
        shrunk = torch.from_numpy(rng.uniform(0.5, 1.1, len(losses)))[order]
        one.observe(losses, present, gram=rows @ rows.T, after=losses * shrunk)
    for parameter in [p for p in one.parameters() if p.requires_grad]:
        slope = torch.autograd.grad(found.sum(), parameter, retain_graph=True)[0]
        finite = bool(slope.isfinite().all())
        ensure(finite, "positive losses", "a finite gradient of what is learned", slope)
        with torch.no_grad():
            parameter -= LEARNING_RATE * slope.clamp(-1, 1)
