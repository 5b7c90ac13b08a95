"""Slow aggregators, written from the formulas of the papers alone, used as oracles by the tests.

Everything here works on the task gradients themselves, rows of a (T, P) array in float64, and
never on their Gram matrix: the numbers are reached on another way than in the library. A tolerance
is always relative to the root mean square length of the rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

ENUMERATED = 7  # up to this many tasks every support is tried, 2**7 - 1 of them


def nonnegative_least_squares(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return x >= 0 that minimises |matrix x - target| (Lawson and Hanson 1974, chapter 23).

    By the book, each solution from scratch; some releases of scipy stop this method early.
    """
    x = np.zeros(matrix.shape[1])
    positive: list[int] = []
    lengths = np.linalg.norm(matrix, axis=0)
    bound = 1e-15 * len(x) * np.linalg.norm(target)
    for _ in range(30 * len(x)):
        slope = np.where(lengths > 0, matrix.T @ (target - matrix @ x), 0)
        slope = slope / np.where(lengths > 0, lengths, 1)
        slope[positive] = 0
        if slope.max() <= bound:
            break
        positive.append(int(slope.argmax()))
        while positive:
            solution, *_ = np.linalg.lstsq(matrix[:, positive], target, rcond=None)
            if solution.min() > 0:
                x = np.zeros(len(x))
                x[positive] = solution
                break
            ratios = [
                x[i] / (x[i] - s) if s <= 0 else np.inf
                for i, s in zip(positive, solution, strict=True)
            ]
            x[positive] += min(ratios) * (solution - x[positive])
            positive = [i for i, r in zip(positive, ratios, strict=True) if r > min(ratios)]
            x[[i for i in range(len(x)) if i not in positive]] = 0
    return x


def total(rows: np.ndarray) -> np.ndarray:
    """Return the plain sum of the task gradients."""
    return rows.sum(axis=0)


def mean(rows: np.ndarray) -> np.ndarray:
    """Return the plain mean of the task gradients."""
    return rows.sum(axis=0) / len(rows)


# --------------------------------------------------------------------------------------- MGDA


def mgda(
    rows: np.ndarray,
    normalize: str | None = None,
    losses: np.ndarray | None = None,
    zero: str = "keep",
    combine: str = "raw",
) -> np.ndarray:
    """Return the MGDA direction (Desideri 2012; Sener and Koltun 2018, eq. 3).

    The weights are those of the shortest vector in the convex hull of the normalised gradients
    (none; `l2`: g/|g|; `loss`: g/L; `loss+`: g/(L|g|)); they multiply the gradients as they came,
    or (combine "normalized") the normalised ones.
    """
    lengths = np.linalg.norm(rows, axis=1)
    kept = lengths > 0 if zero == "drop" else np.ones(len(rows), dtype=bool)
    direction = np.zeros(rows.shape[1])
    if not kept.any() or (lengths[kept] == 0).any():
        return direction  # a kept zero gradient is the shortest vector of the hull
    divisor = np.ones(len(rows))
    if normalize in ("l2", "loss+"):
        divisor = divisor * np.where(kept, lengths, 1.0)
    if normalize in ("loss", "loss+"):
        divisor = divisor * np.asarray(losses, dtype=float)
    divided = (rows / divisor[:, None])[kept]
    return min_norm_weights(divided) @ (divided if combine == "normalized" else rows[kept])


def min_norm_weights(rows: np.ndarray) -> np.ndarray:
    """Return weights on the simplex of a shortest vector in the convex hull of the rows."""
    size = np.sqrt((rows**2).sum() / len(rows))
    if size == 0:
        return np.full(len(rows), 1 / len(rows))
    solve = _min_norm_by_enumeration if len(rows) <= ENUMERATED else _min_norm_by_wolfe
    return solve(rows / size)


def _min_norm_by_enumeration(rows: np.ndarray) -> np.ndarray:
    """Take the shortest among the shortest vectors of all faces of the hull."""
    best, best_length = np.zeros(len(rows)), np.inf
    lengths = np.linalg.norm(rows, axis=1)
    for support in _supports(len(rows)):
        weights = _affine_minimiser(rows[support])
        if weights is None:
            continue
        parts = weights * lengths[support]  # a tiny weight of a long gradient counts
        if parts.min() < -1e-12 * np.abs(parts).max():
            continue
        weights = np.clip(weights, 0, None)
        weights = weights / weights.sum()
        length = np.linalg.norm(weights @ rows[support])
        if length < best_length:
            best = np.zeros(len(rows))
            best[support] = weights
            best_length = length
    return best


def _min_norm_by_wolfe(rows: np.ndarray) -> np.ndarray:
    """Find the shortest vector of the hull by Wolfe's finite method (Math. Programming, 1976)."""
    support = [int(np.argmin(np.linalg.norm(rows, axis=1)))]
    weights = np.ones(1)
    for _ in range(100 * len(rows)):
        point = weights @ rows[support]
        products = rows @ point
        entering = int(np.argmin(products))
        if products[entering] >= point @ point - 1e-13 or entering in support:
            result = np.zeros(len(rows))
            result[support] = weights
            return result
        support.append(entering)
        weights = np.append(weights, 0.0)
        while True:
            target = _affine_minimiser(rows[support])
            if target is None:  # affinely dependent to working precision: nothing more to gain
                support, weights = support[:-1], weights[:-1]
                result = np.zeros(len(rows))
                result[support] = weights
                return result
            if target.min() > 1e-14:
                weights = target
                break
            leaving = [k for k in range(len(support)) if target[k] <= 1e-14]
            ratio = min(weights[k] / (weights[k] - target[k]) for k in leaving)
            weights = ratio * target + (1 - ratio) * weights
            kept = [k for k in range(len(support)) if weights[k] > 1e-14]
            support = [support[k] for k in kept]
            weights = weights[kept] / weights[kept].sum()
    raise RuntimeError("Wolfe's method did not end")


def _affine_minimiser(points: np.ndarray) -> np.ndarray | None:
    """Return weights of sum 1, of any sign, of the shortest combination; None if not unique."""
    if len(points) == 1:
        return np.ones(1)
    edges = (points[1:] - points[0]).T
    solution, _, rank, _ = np.linalg.lstsq(edges, -points[0], rcond=1e-11)
    if rank < len(points) - 1:
        return None
    return np.concatenate([[1 - solution.sum()], solution])


# ------------------------------------------------------------------------------------- PCGrad


def pcgrad(rows: np.ndarray, orders: Sequence[Sequence[int]], reduction: str = "sum") -> np.ndarray:
    """Return the PCGrad direction (Yu et al. 2020, algorithm 1); orders[i]: the others, for i."""
    projected = []
    for i, order in enumerate(orders):
        vector = rows[i].copy()
        for j in order:
            product = vector @ rows[j]
            if product < 0:
                vector = vector - product / (rows[j] @ rows[j]) * rows[j]
        projected.append(vector)
    result = np.sum(projected, axis=0)
    return result / len(rows) if reduction == "mean" else result


def all_orders(tasks: int) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Yield every choice of one order of the other tasks for each task."""
    choices = [
        list(itertools.permutations([j for j in range(tasks) if j != i])) for i in range(tasks)
    ]
    yield from itertools.product(*choices)


# ------------------------------------------------------------------------------------- CAGrad


def cagrad(rows: np.ndarray, c: float = 0.4, rescale: int = 1) -> np.ndarray:
    """Return the CAGrad direction (Liu et al. 2021, eq. 3), from the primal problem.

    max over d of min_i <g_i, d> subject to |d - g_0| <= c |g_0|, where g_0 is the mean gradient.
    If the zero vector is optimal for the dual, the maximiser is not unique: d is the nearest to
    g_0, but g_0 itself if a gradient is zero.
    """
    divisor = {0: 1.0, 1: 1 + c**2, 2: 1 + c}[rescale]
    size = np.sqrt((rows**2).sum() / len(rows))
    if size == 0:
        return np.zeros(rows.shape[1])
    unit = rows / size
    center = mean(unit)
    radius = c * np.linalg.norm(center)
    if radius <= 1e-14:
        return center * size / divisor
    candidates = [center]
    if len(rows) <= ENUMERATED:
        for support in _supports(len(rows)):
            candidates += _cagrad_on_support(unit, center, radius, support)
    else:
        candidates += _cagrad_by_levels(unit, center, radius)
    best = max(candidates, key=lambda d: (unit @ d).min())
    stationary = np.linalg.norm(min_norm_weights(unit) @ unit) <= 1e-9
    shift = _nearest_shift(unit, center, 0.0) if stationary else None
    if shift is not None and np.linalg.norm(shift) <= radius:
        # No task need lose and not all can gain: the optimum is 0, and so is g_w.
        best = center + shift if np.linalg.norm(unit, axis=1).min() > 0 else center
    return best * size / divisor


def _cagrad_on_support(
    rows: np.ndarray,
    center: np.ndarray,
    radius: float,
    support: Sequence[int] | np.ndarray | np.ndarray,
) -> list[np.ndarray]:
    """Return the points of the sphere at which the tasks of the support gain equally.

    d = g_0 + radius u with u a unit vector in the span of the support, <g_i, d> = level for each i
    of it. So u = p level - q for fixed vectors p, q of the span, and |u| = 1 is quadratic in level.
    """
    part = rows[list(support)]
    if np.linalg.matrix_rank(part, tol=1e-9) < len(part):
        return []
    inverse = np.linalg.pinv(part)  # <g_i, inverse @ y> = y_i, and inverse @ y is in the span
    p = inverse @ np.ones(len(part)) / radius
    q = inverse @ (part @ center) / radius
    a, b, constant = p @ p, -2 * p @ q, q @ q - 1
    root = b**2 - 4 * a * constant
    if root < 0:
        return []
    levels = [(-b + sign * np.sqrt(root)) / (2 * a) for sign in (1, -1)]
    units = [p * level - q for level in levels]
    return [center + radius * u / np.linalg.norm(u) for u in units]


def _cagrad_by_levels(rows: np.ndarray, center: np.ndarray, radius: float) -> list[np.ndarray]:
    """Raise the gain that all tasks reach until the nearest such point leaves the ball."""
    low = (rows @ center).min()
    high = (rows @ center + radius * np.linalg.norm(rows, axis=1)).min()
    candidates = []
    for _ in range(60):
        level = (low + high) / 2
        shift = _nearest_shift(rows, center, level)
        if shift is None or np.linalg.norm(shift) > radius:
            high = level
            continue
        low = level
        if np.linalg.norm(shift) > 0:
            reached = center + radius * shift / np.linalg.norm(shift)
            gains = rows @ reached
            active = np.flatnonzero(gains <= gains.min() + 1e-7)
            candidates = [reached, *_cagrad_on_support(rows, center, radius, active)]
    return candidates


def _nearest_shift(rows: np.ndarray, center: np.ndarray, level: float) -> np.ndarray | None:
    """Return the shortest s with <g_i, center + s> >= level for all i, or None if there is none.

    A least distance problem, solved as in Lawson and Hanson (Solving Least Squares Problems, 1974,
    chapter 23).
    """
    matrix = np.vstack([rows.T, level - rows @ center])
    target = np.zeros(len(matrix))
    target[-1] = 1.0
    solution = nonnegative_least_squares(matrix, target)
    residual = matrix @ solution - target
    return -residual[:-1] / residual[-1] if residual[-1] < -1e-15 else None


def cagrad_dual_on_two(rows: np.ndarray, c: float, rescale: int = 0) -> np.ndarray:
    """Return the CAGrad direction for two tasks from the dual, by halving on its derivative."""
    first, second = rows
    center = mean(rows)
    radius = c * np.linalg.norm(center)

    def slope(share: float) -> float:
        mixture = share * first + (1 - share) * second
        change = first - second
        return change @ center + radius * (change @ mixture) / np.linalg.norm(mixture)

    low, high = 0.0, 1.0
    if slope(0.0) >= 0:
        high = 0.0
    elif slope(1.0) <= 0:
        low = 1.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    mixture = high * first + (1 - high) * second
    direction = center + radius * mixture / np.linalg.norm(mixture)
    return direction / {0: 1.0, 1: 1 + c**2, 2: 1 + c}[rescale]


# ------------------------------------------------------------------------------------- IMTL-G


def imtlg(rows: np.ndarray) -> np.ndarray:
    """Return the IMTL-G direction (Liu et al. 2021, eq. 5)."""
    return imtlg_weights(rows) @ rows


def imtlg_weights(rows: np.ndarray) -> np.ndarray:
    """Return weights of sum 1 whose direction has equal projections on all unit gradients.

    Among several such weights the nearest to 1/T; a zero gradient gets none. Raises ValueError if
    no weights do.
    """
    weights = np.zeros(len(rows))
    lengths = np.linalg.norm(rows, axis=1)
    kept = np.flatnonzero(lengths > 0)
    if len(kept) == 0:
        return weights
    part = rows[kept] / np.sqrt((lengths[kept] ** 2).mean())
    units = rows[kept] / lengths[kept, None]
    tasks = len(kept)
    conditions = np.vstack([(units[1:] - units[0]) @ part.T, np.ones(tasks)])
    wanted = np.zeros(tasks)
    wanted[-1] = 1.0
    even = np.full(tasks, 1 / tasks)
    shift, *_ = np.linalg.lstsq(conditions, wanted - conditions @ even, rcond=1e-11)
    result = even + shift
    miss = np.abs(conditions @ result - wanted).max()
    if miss > 1e-8 * max(1.0, np.abs(result).max()):
        raise ValueError(f"no weights of sum 1 give equal projections (missed by {miss:.1e})")
    weights[kept] = result
    return weights


def _supports(tasks: int) -> Iterator[list[int]]:
    for size in range(1, tasks + 1):
        for support in itertools.combinations(range(tasks), size):
            yield list(support)
