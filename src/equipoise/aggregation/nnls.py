"""Convex quadratic functions on the non-negative orthant, by active sets.

Lawson and Hanson's method (Solving Least Squares Problems, 1974, chapter 23) with two changes. It
begins at any x >= 0, so that a good guess ends it after a step or two. And it corrects x by the
step to the minimum over the positive entries, instead of computing them anew; where their columns
are dependent, that is the shortest such step.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import get_lapack_funcs, lstsq

from equipoise.aggregation.base import EPS, Array

DEPENDENT = 1e-12
"""Singular values below this, over the largest, count as zero."""
DAMPING = 1e-8
RESOLVED = EPS ** (2 / 3)
"""Relative noise up to which rows are resolved from their products in double precision: the error
from it is sqrt(RESOLVED), and that from round-off, at most EPS / RESOLVED, is no larger."""
PROXIMAL_STEPS = 8

Indices = NDArray[np.intp]

posv = get_lapack_funcs("posv", dtype=np.float64)


def nonnegative_least_squares(
    matrix: Array, target: Array, start: Array | None = None
) -> tuple[Array, bool]:
    """The x >= 0 that minimises |matrix x - target|, for a matrix of any rank.

    Args:
        matrix: (N, T).
        target: (N,).
        start: (T,) a non-negative guess; None: zeros.

    Returns:
        x (T,), and whether it meets the conditions of optimality up to round-off: the residual
        target - matrix x has product 0 with the columns of positive entries, and at most 0 with
        the others.
    """
    lengths = np.sqrt(np.einsum("ij,ij->j", matrix, matrix))
    x = np.zeros(matrix.shape[1]) if start is None else np.where(lengths > 0, start, 0)
    size = float(np.linalg.norm(target))

    def slope(x: Array) -> Array:
        return (target - matrix @ x) @ matrix

    def step(x: Array, index: Indices) -> Array:
        columns = matrix[:, index]
        left = target - columns @ x[index]
        return lstsq(columns, left, DEPENDENT, lapack_driver="gelsy", check_finite=False)[0]

    def noise(x: Array) -> Array:
        return 4 * len(x) * EPS * lengths * (size + lengths @ x)

    return _active_set(x, slope, step, noise)


def nonnegative_definite(matrix: Array, linear: Array, start: Array) -> tuple[Array, bool]:
    """The x >= 0 that minimises x^T matrix x / 2 + linear^T x, for a positive definite matrix.

    Args:
        matrix: (T, T) with a diagonal of order 1.
        linear: (T,).
        start: (T,) a non-negative guess.

    Returns:
        x (T,), and whether it meets the conditions of optimality up to round-off. It does not
        where `matrix` is not positive definite up to round-off.
    """
    size = float(np.abs(linear).max())

    def slope(x: Array) -> Array:
        return -(matrix @ x + linear)

    def step(x: Array, index: Indices) -> Array | None:
        inner = matrix[index[:, None], index]
        _, after, info = posv(inner, -linear[index], lower=1)
        return after - x[index] if info == 0 else None

    def noise(x: Array) -> float:
        return 4 * len(x) * EPS * (size + float(x.max()))

    return _active_set(start, slope, step, noise)


def nonnegative_semidefinite(matrix: Array, linear: Array, start: Array) -> tuple[Array, bool]:
    """As `nonnegative_definite`, for a matrix that may be singular.

    By proximal steps: each minimises the function plus DAMPING / 2 times the square of the change
    of x. What the last one changed, times DAMPING, is by how much the gradient is off.
    """
    damped = matrix + DAMPING * np.eye(len(matrix))
    x, size = start, float(np.abs(linear).max())
    for _ in range(PROXIMAL_STEPS):
        before = x
        x, exact = nonnegative_definite(damped, linear - DAMPING * before, before)
        off = DAMPING * float(np.abs(x - before).max())
        if not exact or off <= 4 * len(x) * EPS * (size + float(x.max())):
            return x, exact
    return x, False


def damped(gram: Array) -> Array:
    """The Gram matrix as if each vector had an entry of its own, sqrt(RESOLVED) of its length."""
    return gram + RESOLVED * np.diag(gram.diagonal())


def _active_set(
    x: Array,
    slope: Callable[[Array], Array],
    step: Callable[[Array, Indices], Array | None],
    noise: Callable[[Array], Array | float],
) -> tuple[Array, bool]:
    """Descend until no entry at 0 has a slope above the noise.

    Each round lets the entry with the largest slope in. One that does not bring the function down
    is not tried again before another one does; so the rounds end.

    Args:
        x: (T,) a non-negative start.
        slope: x -> the negative gradient (T,).
        step: x and the positive entries -> how they change to the minimum over them; None: it
            cannot be computed.
        noise: x -> the round-off of the slope.
    """
    after = _minimise_within(x, (x > 0).nonzero()[0], step)
    if after is None:
        return x, False
    x, falls = after, slope(after)
    useless = np.zeros(len(x), bool)
    for _ in range(30 * len(x)):
        wrong = (x == 0) & ~useless & (falls > noise(x))
        if not wrong.any():
            return x, not useless.any()
        entering = int(np.where(wrong, falls, 0).argmax())
        after = _minimise_within(x, np.append((x > 0).nonzero()[0], entering), step)
        if after is None:
            return x, False
        falls_after = slope(after)
        if (falls + falls_after) @ (after - x) > 0:  # twice by how much the function fell
            x, falls = after, falls_after
            useless[:] = False
        else:
            useless[entering] = True
    return x, False


def _minimise_within(
    x: Array, index: Indices, step: Callable[[Array, Indices], Array | None]
) -> Array | None:
    """Minimise over the given entries; those that would become negative stop at 0 on the way."""
    x = x.copy()
    while len(index):
        change = step(x, index)
        if change is None:
            return None
        before = x[index]
        after = before + change
        below = after <= 0
        if not below.any():
            x[index] = after
            break
        ratios = np.where(below, before / np.where(below, before - after, 1), np.inf)
        ratio = ratios.min()
        stopped = ratios <= ratio * (1 + 4 * EPS)
        x[index] = np.where(stopped, 0, (before + ratio * change).clip(0))
        index = index[~stopped]
    return x
