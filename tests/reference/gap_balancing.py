"""Improvable gap balancing in plain Python, from the whole history of a training.

Nothing here keeps a running number: every function reads the list of all losses and derives what
it needs from there (IGB paper, arXiv 2307.15429; the schedule of version 2 as the authors run it).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from reference.weighting import TINY, log_loss, softmax
from torch import Tensor, nn

Batch = Sequence[float | None]  # one loss a task, None for a task without labels


# --------------------------------------------------------------------------------- version 1


def base_losses(epoch: Sequence[Batch]) -> list[float | None]:
    """Return each task's mean over the batches of the second epoch in which it had labels."""
    means: list[float | None] = []
    for column in zip(*epoch, strict=True):
        present = [loss for loss in column if loss is not None]
        means.append(math.fsum(present) / len(present) if present else None)
    return means


def igbv1_weights(history: Sequence[Sequence[Batch]]) -> list[list[list[float]]]:
    """Return lambda of every batch of a history (epochs of batches of losses), eq. 3.

    One in the first two epochs; then softmax(L / L_base) times the number of present tasks. A base
    of at most 1e-12 is a solved task (ratio 0), one that is not known is a ratio of 1.
    """
    table = []
    for e, epoch in enumerate(history):
        table.append([])
        for losses in epoch:
            present = [i for i, loss in enumerate(losses) if loss is not None]
            weights = [0.0] * len(losses)
            if e < 2:
                shares = [1.0 for _ in present]
            else:
                base = base_losses(history[1])
                ratios = []
                for i in present:
                    b = base[i]
                    ratios.append(1.0 if b is None else losses[i] / b if b > TINY else 0.0)
                shares = [len(present) * share for share in softmax(ratios)]
            for i, share in zip(present, shares, strict=True):
                weights[i] = share
            table[-1].append(weights)
    return table


def igb_objective(weights: Sequence[float], losses: Batch) -> float:
    """Return sum_i lambda_i ln L_i over the present tasks (eq. 2)."""
    return math.fsum(w * log_loss(x) for w, x in zip(weights, losses, strict=True) if x is not None)


def gradient_factors(
    weights: Sequence[float], losses: Batch, cap: float | None = None
) -> list[float]:
    """Return lambda_i / L_i, by which the gradient of L_i is multiplied; 0 for a solved task."""
    factors = []
    for w, x in zip(weights, losses, strict=True):
        factor = 0.0 if x is None or x <= TINY else w / x
        factors.append(factor if cap is None else min(factor, cap))
    return factors


# --------------------------------------------------------------------------------- version 2


@dataclass
class Event:
    """What IGBv2 does in the batch with the global number `batch`, in this order."""

    batch: int
    stored: tuple[int, int] | None  # state and action of the first, next state of the second
    size: int  # transitions in the buffer, after that
    gradient_steps: int
    batch_size: int  # of one gradient step; 0 without any
    weights: str  # "random" or "policy"


def igbv2_events(
    batches: int,
    steps_per_epoch: int,
    update_epoch: int = 4,
    use_epoch: int = 6,
    update_every: int = 50,
    buffer_size: int = 10_000,
    nominal_steps: int = 50,
    nominal_batch: int = 256,
) -> list[Event]:
    """Return the schedule; epochs are counted from 1, batches from 0.

    A transition needs the base losses, which are known when the second epoch has ended; its
    previous losses and weights may be those of the epoch's last batch.
    """
    table = []
    size = 0
    for c in range(batches):
        stored = None
        if c >= 2 * steps_per_epoch:
            stored = (c - 1, c)
            size = min(size + 1, buffer_size)
        steps = per_step = 0
        if c >= (update_epoch - 1) * steps_per_epoch and c % update_every == 0:
            steps, per_step = sac_effort(size, buffer_size, nominal_steps, nominal_batch)
        weights = "policy" if c >= (use_epoch - 1) * steps_per_epoch else "random"
        table.append(Event(c, stored, size, steps, per_step, weights))
    return table


def sac_effort(
    size: int, buffer_size: int, nominal_steps: int = 50, nominal_batch: int = 256
) -> tuple[int, int]:
    """Return gradient steps and batch size, floor(n k / 2) with k = 1 + size / max."""
    # In whole numbers: n (1 + s/S) / 2 = n (S + s) / (2 S).
    over, under = buffer_size + size, 2 * buffer_size
    return nominal_steps * over // under, nominal_batch * over // under


def reward(
    before: Sequence[float],
    after: Sequence[float],
    base: Sequence[float],
    lr_initial: float,
    lr_current: float,
    reduction: str = "min",
    use_lr: bool = True,
) -> float:
    """Return alpha times the least (or mean) normalised decrease of any task (eq. 4)."""
    falls = [(a - b) / c for a, b, c in zip(before, after, base, strict=True)]
    least = min(falls) if reduction == "min" else math.fsum(falls) / len(falls)
    return (lr_initial / lr_current if use_lr else 1.0) * least


def weights_of(logits: Sequence[float]) -> list[float]:
    """Return the action: T softmax(u)."""
    return [len(logits) * share for share in softmax(list(logits))]


def simplex_log_density(u: Sequence[float], mu: Sequence[float], sigma: Sequence[float]) -> float:
    """Return ln of the density of a = T softmax(u) on the simplex, u ~ N(mu, diag sigma^2).

    With y_i = u_i - u_T: ln N(y) - sum ln p_i - (T - 1) ln T.
    """
    m = len(u)
    y = np.array([u[i] - u[-1] for i in range(m - 1)])
    centre = np.array([mu[i] - mu[-1] for i in range(m - 1)])
    spread = np.diag([sigma[i] ** 2 for i in range(m - 1)]) + sigma[-1] ** 2
    away = y - centre
    normal = -0.5 * (
        away @ np.linalg.solve(spread, away)
        + math.log(np.linalg.det(spread))
        + (m - 1) * math.log(2 * math.pi)
    )
    shares = softmax(list(u))
    return float(normal - math.fsum(map(math.log, shares)) - (m - 1) * math.log(m))


# ------------------------------------------------------------- together with an aggregator


def step_gradients(
    trunk: nn.Module,
    heads: Mapping[str, nn.Module],
    losses: Mapping[str, Callable[[Any, Any], Tensor]],
    inputs: Any,
    targets: Mapping[str, Any],
    factors: Sequence[float],
    weights: Callable[[np.ndarray], np.ndarray],
    on_all: bool = False,
) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """Return the gradients that a step leaves in the trunk and in each head (Alg. 3).

    `factors` are those of `gradient_factors`; `weights` maps rows (T, P) to the aggregator's T
    weights. With `on_all` they multiply the losses and so reach the heads, by one backward of the
    weighted sum; otherwise only the trunk knows of them.
    """
    shared = [p for p in trunk.parameters() if p.requires_grad]

    def weighted() -> list[Tensor]:
        z = trunk(inputs)
        return [
            factor * losses[task](head(z), targets[task])
            for factor, (task, head) in zip(factors, heads.items(), strict=True)
        ]

    rows = []
    for i in range(len(heads)):
        found = torch.autograd.grad(weighted()[i], shared, materialize_grads=True)
        rows.append(torch.cat([g.reshape(-1) for g in found]).double().numpy())
    w = weights(np.stack(rows))

    total = sum(float(w[i]) * loss for i, loss in enumerate(weighted()))
    of_trunk = list(torch.autograd.grad(total, shared, materialize_grads=True))
    of_heads = {}
    for i, (task, head) in enumerate(heads.items()):
        own = [p for p in head.parameters() if p.requires_grad]
        loss = weighted()[i] * (float(w[i]) if on_all else 1.0)
        of_heads[task] = list(torch.autograd.grad(loss, own, materialize_grads=True))
    return of_trunk, of_heads
