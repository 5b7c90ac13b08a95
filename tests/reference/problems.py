"""Seeded task gradients on which the library and the references are compared."""

from __future__ import annotations

import numpy as np


def task_gradients(seed: int) -> np.ndarray:
    """Return a (T, P) float64 array: T from 2 to 20, a scale from 1e-6 to 1e6.

    Every third has rank below min(T, P); every second leans on a common direction, so that both
    conflicting and agreeing tasks occur; every fifth has rows of unlike lengths (1 to 100).
    """
    rng = np.random.default_rng(seed)
    tasks = int(rng.integers(2, 21))
    parameters = int(rng.integers(2, 41))
    rank = min(tasks, parameters)
    if seed % 3 == 0:
        rank = int(rng.integers(1, rank))
    if rank < min(tasks, parameters):
        rows = rng.normal(size=(tasks, rank)) @ rng.normal(size=(rank, parameters))
    else:
        rows = rng.normal(size=(tasks, parameters))
    if seed % 2 == 0:
        rows = rows + rng.uniform(0.3, 3) * rows[0]
    if seed % 5 == 0:
        rows = rows * 10 ** rng.uniform(0, 2, size=(tasks, 1))
    return rows * 10 ** rng.uniform(-6, 6)


def size(rows: np.ndarray) -> float:
    """Return the root mean square length of the rows."""
    return float(np.sqrt((rows**2).sum() / len(rows)))
