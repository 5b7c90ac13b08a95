"""Quadratic functions on the non-negative orthant: the core of several solvers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import get_lapack_funcs
from scipy.optimize import nnls

from equipoise.aggregation.base import Array

EPS = float(np.finfo(np.float64).eps)
Mask = NDArray[np.bool_]
ROUNDS = 25
PATIENCE = 3
LARGEST = 1e4
"""Beyond this times the linear part, a solution of a quick way counts as the work of round-off."""

posv = get_lapack_funcs("posv", dtype=np.float64)


def gram_root(gram: Array) -> Array:
    """A matrix L of full rank with L^T L = gram up to round-off."""
    values, vectors = np.linalg.eigh(gram)
    kept = values > EPS * values[-1]
    return np.sqrt(values[kept])[:, None] * vectors[:, kept].T


def nonnegative(matrix: Array, linear: Array, free: Mask) -> Array | None:
    """The s >= 0 that minimises s^T matrix s / 2 + linear^T s; None if not found.

    Block principal pivoting (Portugal, Judice & Vicente 1994): solve with `free` the entries that
    may be positive, exchange all that turn out to be on the wrong side, repeat; where that does
    not bring their number down, exchange only the last, which cannot cycle.

    Args:
        matrix: (T, T) positive definite with entries of order 1.
        linear: (T,).
        free: (T,) the first guess.
    """
    n = len(linear)
    size = float(np.abs(linear).max())
    fewest, patience = n + 1, PATIENCE
    for _ in range(ROUNDS):
        s = np.zeros(n)
        index = free.nonzero()[0]
        if len(index):
            inner = matrix if len(index) == n else matrix[index[:, None], index]
            _, s[index], info = posv(inner, -linear[index], lower=1)
            if info != 0:
                return None
        slope = matrix @ s + linear
        largest = float(np.abs(s).max())
        if largest > LARGEST * size:
            return None
        tolerance = 4 * n * EPS
        wrong = np.where(free, s < -tolerance * largest, slope < -tolerance * (size + largest))
        count = int(np.count_nonzero(wrong))
        if count == 0:
            return s.clip(0)
        if count < fewest:
            fewest, patience = count, PATIENCE
        elif patience:
            patience -= 1
        else:
            last = wrong.nonzero()[0][-1]
            wrong[:] = False
            wrong[last] = True
        free = free ^ wrong
    return None


def nonnegative_by_root(cosines: Array, inverse: Array) -> Array:
    """The u >= 0 that minimises |L u|^2 + (inverse^T u - 1)^2, L^T L = cosines singular or not."""
    matrix = np.vstack([gram_root(cosines), inverse])
    target = np.zeros(len(matrix))
    target[-1] = 1
    u, _ = nnls(matrix, target, maxiter=30 * len(inverse))
    return u


def dual_cone_shifts(cosines: Array, starts: Array) -> Array:
    """For each start the s >= 0 such that start + s combines the rows to a projection.

    The point of the dual cone {x: <g_i, x> >= 0 for all i} nearest to sum_i start_i u_i is
    sum_i (start_i + s_i) u_i, with s the non-negative vector that makes it shortest. All starts
    are solved together, as in `nonnegative`, each on its own set of free entries.

    Args:
        cosines: (T, T) inner products of the unit gradients u_i.
        starts: (K, T).
    """
    linear = starts @ cosines
    shifts = np.zeros_like(starts)
    tolerance = 4 * len(cosines) * EPS
    size = np.abs(linear).max(1)
    free = linear < -tolerance * size[:, None]
    open_ = free.any(1).nonzero()[0]
    if not len(open_):
        return shifts
    free = _likely_free(cosines, linear[open_]) if len(cosines) > 16 else free[open_]
    for _ in range(ROUNDS):
        found = _solve_on(cosines, linear[open_], free)
        if found is None:
            break
        slope = found @ cosines + linear[open_]
        largest = np.abs(found).max(1)
        wrong = np.where(
            free,
            found < -tolerance * largest[:, None],
            slope < -tolerance * (size[open_] + largest)[:, None],
        )
        left = wrong.any(1)
        wild = largest > LARGEST * size[open_]
        left |= wild
        shifts[open_[~left]] = found[~left].clip(0)
        open_, free = open_[left], (free ^ wrong)[left]
        if wild.any() or not len(open_):
            break
    if len(open_):  # dependent gradients, or exchanges that run in a circle
        root = gram_root(cosines)
        for k in open_:
            shifts[k], _ = nnls(root, -root @ starts[k], maxiter=30 * len(cosines))
    return shifts


def _likely_free(cosines: Array, linear: Array) -> Mask:
    """Which entries are positive after a few steps of accelerated projected gradient descent."""
    v = np.ones(len(cosines))
    for _ in range(4):
        v = cosines @ v
        v /= np.linalg.norm(v)
    rate = 0.9 / float(v @ cosines @ v)
    s = ahead = np.maximum(-rate * linear, 0)
    for k in range(12):
        after = np.maximum(ahead - rate * (ahead @ cosines + linear), 0)
        ahead = after + k / (k + 3) * (after - s)
        s = after
    return s > 0


def _solve_on(matrix: Array, linear: Array, free: Mask) -> Array | None:
    """(K, T) zeros of the gradient in the free entries, 0 elsewhere; None if one is singular."""
    width = int(free.sum(1).max())
    if width == 0:
        return np.zeros_like(linear)
    rows = np.arange(len(free))[:, None]
    order = np.argsort(~free, axis=1, kind="stable")[:, :width]  # the free ones first
    used = free[rows, order]
    inner = matrix[order[:, :, None], order[:, None, :]]
    inner *= used[:, :, None] & used[:, None, :]
    diagonal = np.arange(width)
    inner[:, diagonal, diagonal] += ~used
    try:
        solved = np.linalg.solve(inner, -(linear[rows, order] * used)[:, :, None])[:, :, 0]
    except np.linalg.LinAlgError:
        return None
    found = np.zeros_like(linear)
    found[rows, order] = solved
    return found
