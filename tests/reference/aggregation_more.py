"""More slow aggregators, from the formulas of the papers alone; see `reference.aggregation`.

All work on the task gradients, rows of a (T, P) array in float64, never on their Gram matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from reference.aggregation import min_norm_weights, nonnegative_least_squares
from scipy.optimize import brentq, root


def fair_weights(rows: np.ndarray, alpha: float = 1.0) -> np.ndarray:
    """Return w > 0 with (J J^T w)_i = w_i^(-1/alpha) (Ban and Ji 2024; Nash for alpha 1).

    The convex function behind it is brought down one weight at a time; MINPACK's hybrid method
    finishes, on the logarithms. Raises ArithmeticError if the equations are not then met.
    """
    power = 1 / alpha
    lengths = np.linalg.norm(rows, axis=1)
    units = rows / lengths[:, None]
    sizes = lengths ** (power - 1)  # in b_i = n_i w_i: <u_i, sum b_j u_j> = sizes_i b_i^-power
    b = sizes ** (1 / (1 + power))

    def unmet(logs: np.ndarray) -> np.ndarray:
        found = np.exp(logs.clip(-300, 300))
        return (units @ (found @ units)) * found**power / sizes - 1

    for _ in range(10):
        b = _one_at_a_time(b, units, sizes, power)
        logs = root(unmet, np.log(b), tol=1e-13).x
        if np.abs(unmet(logs)).max() < 1e-9:
            return np.exp(logs) / lengths
    raise ArithmeticError("the fixed point was not found")


def _one_at_a_time(
    b: np.ndarray, units: np.ndarray, sizes: np.ndarray, power: float, sweeps: int = 300
) -> np.ndarray:
    """Solve for each weight in turn with the others as they are."""
    b = b.copy()
    point = b @ units
    for _ in range(sweeps):
        for i, unit in enumerate(units):
            rest = point @ unit - b[i]
            top = max(sizes[i] ** (1 / (1 + power)), 1.0) + abs(rest) + 1
            while top + rest < sizes[i] * top**-power:
                top *= 2
            low = top
            while low + rest > sizes[i] * low**-power:
                low /= 2
            new = brentq(lambda x, i=i, rest=rest: x + rest - sizes[i] * x**-power, low, top)
            point += (new - b[i]) * unit
            b[i] = new
    return b


def nash(rows: np.ndarray, max_norm: float | None = 1.0) -> np.ndarray:
    """Return the bargaining direction (Navon et al. 2022), clipped."""
    direction = fair_weights(rows) @ rows
    length = np.linalg.norm(direction)
    return direction if max_norm is None else direction * min(1.0, max_norm / length)


def edm(rows: np.ndarray) -> np.ndarray:
    """Return the equiangular direction, scaled to weights of sum 1 (Katrutsa et al. 2020).

    Several weights may give the shortest vector: the even ones are taken.
    """
    lengths = np.linalg.norm(rows, axis=1)
    if (lengths == 0).any():
        return np.zeros(rows.shape[1])
    units = rows / lengths[:, None]
    point = min_norm_weights(units) @ units
    m = len(rows)
    exactly = 1e6 * np.vstack([units.T, np.ones(m)])
    target = np.r_[1e6 * point, 1e6, np.zeros(m)]
    alpha = nonnegative_least_squares(np.vstack([exactly, np.eye(m)]), target)
    weights = alpha / lengths
    return weights / weights.sum() @ rows


def projected(vector: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the point of {x: rows x >= 0} nearest to the vector.

    By Moreau: what is missing is the point of the cone of the rows nearest to -vector.
    """
    size = np.linalg.norm(vector)
    lengths = np.linalg.norm(rows, axis=1)
    units = rows[lengths > 0] / lengths[lengths > 0, None]
    if size == 0 or not len(units):
        return vector
    shares = nonnegative_least_squares(units.T, -vector / size)
    return size * (vector / size + shares @ units)


def upgrad(rows: np.ndarray) -> np.ndarray:
    """Return the mean of the projected gradients (Quinton and Rey 2024)."""
    return np.mean([projected(row, rows) for row in rows], axis=0)


def dualproj(rows: np.ndarray) -> np.ndarray:
    """Return the projected mean (Lopez-Paz and Ranzato 2017, of the mean)."""
    return projected(rows.mean(axis=0), rows)


def aligned(rows: np.ndarray, scale: str = "min") -> np.ndarray:
    """Return the mean row of the aligned gradients (Senushkin et al. 2023), by their SVD."""
    left, values, right = np.linalg.svd(rows, full_matrices=False)
    kept = values > 1e-6 * values[0]
    left, values, right = left[:, kept], values[kept], right[kept]
    squares = values**2
    middle = np.sort(squares)[(len(squares) - 1) // 2]  # of two the lower, as the authors have it
    common = {"min": squares.min(), "median": middle, "rmse": squares.mean()}[scale]
    return np.sqrt(common) * (left @ right).mean(axis=0)


def config(rows: np.ndarray) -> np.ndarray:
    """Return the conflict-free direction (Liu et al. 2025) with NumPy's pinv."""
    lengths = np.linalg.norm(rows, axis=1)
    units = rows[lengths > 0] / lengths[lengths > 0, None]
    x = np.linalg.pinv(units, rcond=1e-6) @ np.ones(len(units))
    if np.linalg.norm(x) < 1e-9:  # no direction has equal products, not even by least squares
        return np.zeros(rows.shape[1])
    unit = x / np.linalg.norm(x)
    return (rows @ unit).sum() * unit


def sdmgrad(rows: np.ndarray, lam: float = 0.3) -> np.ndarray:
    """Return the shortest g_w + lam g_0 (Xiao et al. 2023)."""
    moved = rows + lam * rows.mean(axis=0)
    return min_norm_weights(moved) @ moved


def graddrop(rows: np.ndarray, draws: np.ndarray, leak: float = 0.0) -> np.ndarray:
    """Return the sum of what passes (Chen et al. 2020, algorithm 1), entry by entry."""
    direction = np.zeros(rows.shape[1])
    for k, column in enumerate(rows.T):
        if not np.abs(column).sum() > 0:
            continue
        positive = (1 + column.sum() / np.abs(column).sum()) / 2
        for g in column:
            passes = (positive > draws[k] and g > 0) or (positive < draws[k] and g < 0)
            direction[k] += (leak + (1 - leak) * passes) * g
    return direction


def gradvac(
    rows: np.ndarray, orders: Sequence[Sequence[int]], targets: np.ndarray, beta: float = 0.01
) -> np.ndarray:
    """Return the sum of the vaccinated gradients (Wang et al. 2021, algorithm 1).

    `targets` (T, T) is updated in place.
    """
    lengths = np.linalg.norm(rows, axis=1)
    direction = np.zeros(rows.shape[1])
    for i, order in enumerate(orders):
        p = rows[i].copy()
        for j in order:
            size = np.linalg.norm(p)
            if size <= 1e-12 * lengths[i] or lengths[j] == 0:
                continue
            cosine = np.clip(p @ rows[j] / (size * lengths[j]), -1, 1)
            target = targets[i, j]
            if cosine < target:
                turn = target * np.sqrt(1 - cosine**2) - cosine * np.sqrt(1 - target**2)
                p += size * turn / (lengths[j] * np.sqrt(1 - target**2)) * rows[j]
            targets[i, j] = (1 - beta) * target + beta * cosine
        direction += p
    return direction
