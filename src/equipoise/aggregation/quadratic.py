"""Quadratic functions on the non-negative orthant: the core of several solvers.

The quick way guesses which entries are positive, solves one linear system a guess and exchanges
those on the wrong side. Where the rows are dependent it may run in a circle, or find no system to
solve; the active sets of `nnls`, each surer and slower than the one before, then take over from a
guess by gradient descent. All ways check what they return.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from equipoise.aggregation.base import Array
from equipoise.aggregation.nnls import (
    EPS,
    damped,
    nonnegative_definite,
    nonnegative_semidefinite,
    posv,
)

Mask = NDArray[np.bool_]
ROUNDS = 25
PATIENCE = 3
LARGEST = 1e4
"""Beyond this times the linear part, a solution of a quick way counts as the work of round-off."""


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


def dual_cone_shifts(cosines: Array, starts: Array) -> Array:
    """For each start the s >= 0 such that start + s combines the rows to a projection.

    The point of the dual cone {x: <g_i, x> >= 0 for all i} nearest to sum_i start_i u_i is
    sum_i (start_i + s_i) u_i, with s the non-negative vector that makes it shortest. All starts
    are solved together, each on its own set of free entries.

    Args:
        cosines: (T, T) inner products of the unit gradients u_i, singular or not.
        starts: (K, T).
    """
    linear = starts @ cosines
    shifts = np.zeros_like(starts)
    free = linear < -4 * len(cosines) * EPS * np.abs(linear).max(1, keepdims=True)
    left = free.any(1).nonzero()[0]
    if not len(left):
        return shifts
    free = _descend(cosines, linear[left], 12) > 0 if len(cosines) > 16 else free[left]
    shifts[left], done = _exchange(cosines, linear[left], free)
    left = left[~done]
    if len(left):
        guesses = _descend(cosines, linear[left], min(100, 2 * len(cosines)))
        for k, guess in zip(left, guesses, strict=True):
            shifts[k], exact = _surely(cosines, linear[k], guess)
            if not exact:  # the rows cannot be told from dependent ones
                sure = damped(cosines)
                shifts[k], _ = nonnegative_definite(sure, starts[k] @ sure, shifts[k])
    return shifts


def nonnegative_surely(matrix: Array, linear: Array) -> tuple[Array, bool]:
    """As `nonnegative` for a matrix that may be singular; and whether the solution is exact."""
    return _surely(matrix, linear, _descend(matrix, linear[None], min(100, 2 * len(matrix)))[0])


def _surely(matrix: Array, linear: Array, guess: Array) -> tuple[Array, bool]:
    largest = LARGEST * float(np.abs(linear).max())
    s, exact = nonnegative_definite(matrix, linear, guess)
    if not exact or s.max() > largest:
        s, exact = nonnegative_semidefinite(matrix, linear, guess)
    return s, exact and bool(s.max() <= largest)


def _exchange(matrix: Array, linear: Array, free: Mask) -> tuple[Array, Mask]:
    """As `nonnegative` for K linear parts (K, T) together, exchanging all wrong entries.

    Returns:
        (K, T) the solutions, 0 where none was found, and (K,) whether one was.
    """
    shifts = np.zeros_like(linear)
    done = np.zeros(len(linear), bool)
    left = np.arange(len(linear))
    size = np.abs(linear).max(1)
    tolerance = 4 * len(matrix) * EPS
    fewest = np.full(len(linear), len(matrix) + 1)
    patience = np.full(len(linear), PATIENCE)
    for _ in range(ROUNDS):
        found = _solve_on(matrix, linear[left], free)
        if found is None:
            break
        slope = found @ matrix + linear[left]
        largest = np.abs(found).max(1)
        wrong = np.where(
            free,
            found < -tolerance * largest[:, None],
            slope < -tolerance * (size[left] + largest)[:, None],
        )
        count = wrong.sum(1)
        wild = largest > LARGEST * size[left]
        right = (count == 0) & ~wild
        shifts[left[right]] = found[right].clip(0)
        done[left[right]] = True
        better = count < fewest[left]
        fewest[left] = np.where(better, count, fewest[left])
        patience[left] = np.where(better, PATIENCE, patience[left] - 1)
        going = (count > 0) & ~wild & (patience[left] >= 0)
        left, free = left[going], (free ^ wrong)[going]
        if not len(left):
            break
    return shifts, done


def _descend(matrix: Array, linear: Array, steps: int) -> Array:
    """(K, T) near the minimum, by accelerated projected gradient descent from 0."""
    v = 1 + 0.5 * np.cos(np.arange(len(matrix)))  # no likely combination of the rows to zero
    for _ in range(4):
        v = matrix @ v
        v /= np.linalg.norm(v)
    rate = 0.9 / float(v @ matrix @ v)
    s = ahead = np.maximum(-rate * linear, 0)
    for k in range(steps):
        after = np.maximum(ahead - rate * (ahead @ matrix + linear), 0)
        ahead = after + k / (k + 3) * (after - s)
        s = after
    return s


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
