"""The small exact solvers on which the aggregators stand.

All work in float64 on a T x T Gram matrix whose scale the caller has made of order 1, and to
tolerances that are relative to it. The quick way to a solution guesses which constraints bind and
solves one linear system for each guess; what it finds is checked, and where it fails a slower and
surer way takes over.
"""

from __future__ import annotations

import numpy as np

from equipoise.aggregation.base import Array
from equipoise.aggregation.nnls import EPS, damped, nonnegative_least_squares, posv
from equipoise.aggregation.quadratic import (
    Mask,
    gram_root,
    nonnegative,
    nonnegative_surely,
)

MANY_STEPS = 100


def min_norm_weights(gram: Array) -> Array:
    """Weights w in the simplex that minimise w^T gram w, exact up to rounding.

    With L^T L = gram this is the non-negative least-squares problem
    min_{v >= 0} |L v|^2 + (1^T v - 1)^2, w = v / 1^T v: for v = t w the best t leaves
    q / (1 + q) with q = |L w|^2, which grows with q. It is solved in the unit vectors, u_i =
    n_i v_i with n_i = |L_i| over the shortest one, so that vectors of very unlike lengths lose
    no digits. Where some are zero, they share the weight.
    """
    if len(gram) == 1:
        return np.ones(1)
    if len(gram) == 2:
        return _min_norm_of_two(gram)
    lengths = np.sqrt(gram.diagonal().clip(0))
    shortest = lengths.min()
    if shortest == 0:
        return (lengths == 0) / (lengths == 0).sum()
    cosines = gram / (lengths[:, None] * lengths)
    inverse = shortest / lengths
    matrix = cosines + inverse[:, None] * inverse
    u = nonnegative(matrix, -inverse, np.ones(len(gram), bool))
    if u is not None:
        w = u * inverse / (u @ inverse)
        products = gram @ w
        noise = 4 * len(gram) * EPS * (w @ lengths) * lengths
        if (products >= (w @ products) * (1 - 1e-11) - noise).all():
            return w
    u, exact = nonnegative_surely(matrix, -inverse)
    if not exact:
        root = np.vstack([gram_root(cosines), inverse])
        target = np.append(np.zeros(len(root) - 1), 1.0)
        u, _ = nonnegative_least_squares(root, target, u)
    return u * inverse / (u @ inverse)


def _min_norm_of_two(gram: Array) -> Array:
    """The foot of the perpendicular from 0 on the segment, or the nearer end."""
    (a, b), (_, d) = gram.tolist()
    apart = a + d - 2 * b
    if not apart > 0:
        return np.full(2, 0.5)
    # Neither as 1 less the other: the weight of a much longer vector would lose its digits.
    return np.array([min(max(x / apart, 0.0), 1.0) for x in (d - b, a - b)])


def cagrad_shift(gram: Array, c: float) -> Array:
    """The s >= 0 with d = g_0 + sum s_i g_i the direction of CAGrad.

    s = k w / |g_w| with k = c |g_0| and w in the simplex the minimum of w^T b + k |g_w|, the dual
    problem; b = G 1 / T holds the products with the mean gradient g_0. At the solution G w + t b is
    constant on the support and larger elsewhere, with t = |g_w| / k. On a given support w is linear
    in t, and t the root of a quadratic equation.

    Where g_w = 0 the best worst case is 0, and d the nearest point to g_0 that reaches it.
    """
    m = len(gram)
    b = gram.mean(1)
    k = c * float(np.sqrt(max(b.mean(), 0.0)))
    lengths = np.sqrt(gram.diagonal())
    if k <= EPS or m == 1 or not lengths.min() > 0:
        return np.full(m, k / lengths[0] if m == 1 else 0.0)
    w = _cagrad_by_supports(gram, b, k, np.ones(m, bool))
    if w is None or _nearly_cancels(gram, w, lengths):
        # Damped gradients never cancel. Where the others do, they lead to the nearest point.
        sure = damped(gram)
        guess = _cagrad_by_halving(sure, b, k, c)
        w = _cagrad_by_supports(gram, b, k, guess > 0)
        if w is None or _nearly_cancels(gram, w, lengths):
            gram, w = sure, guess
    return k / np.sqrt(w @ gram @ w) * w


def _nearly_cancels(gram: Array, w: Array, lengths: Array) -> bool:
    """Whether the combination is so short that damping, or round-off, would change it."""
    return bool(w @ gram @ w < EPS ** (1 / 3) * (w @ lengths) ** 2)


def _cagrad_by_supports(gram: Array, b: Array, k: float, support: Mask) -> Array | None:
    """Exchange all tasks that are on the wrong side until none is; None if that leads nowhere."""
    right = np.stack([np.ones(len(gram)), b], axis=1)
    lengths = np.sqrt(gram.diagonal())
    for _ in range(12):
        index = support.nonzero()[0]
        inner = gram if len(index) == len(gram) else gram[index[:, None], index]
        _, solved, info = posv(inner, right[index], lower=1)
        if info != 0:
            return None
        flat, along = solved.T
        constant = flat / flat.sum()  # w(t) = constant + t slope
        slope = along.sum() * constant - along
        moved = inner @ slope
        # |g_w(t)|^2 = t^2 k^2; the products with `constant` are all alike and slope sums to 0.
        curvature, offset = slope @ moved - k**2, 1 / flat.sum()
        if not (curvature < 0 < offset):
            return None
        t = np.sqrt(offset / -curvature)
        w = np.zeros(len(gram))
        w[index] = constant + t * slope
        level = gram @ w + t * b
        least = level[index].mean()
        noise = 4 * EPS * len(gram) * (lengths * (np.abs(w) @ lengths) + t * np.abs(b))
        wrong = np.where(support, w < 0, level < least - 1e-12 * abs(least) - noise)
        if not wrong.any():
            off = np.abs(level - least)[index]
            return w if (off <= 1e-11 * abs(least) + noise[index]).all() else None
        support ^= wrong
        if not support.any():
            return None
    return None


def _cagrad_by_halving(gram: Array, b: Array, k: float, c: float) -> Array:
    """For fixed t a min-norm problem; so t is found between 0 and max |g_i| / k."""
    mean_square = b.mean()
    low, high = 0.0, float(np.sqrt(gram.diagonal().max()) / k)
    t = min(1.0 / c, high)
    for _ in range(MANY_STEPS):
        w = min_norm_weights(shifted(gram, b, mean_square, t))
        exact = _cagrad_by_supports(gram, b, k, w > 0)
        if exact is not None:
            return exact
        excess = np.sqrt(max(w @ gram @ w, 0.0)) - t * k
        if abs(excess) <= 4 * EPS * t * k or high - low <= 4 * EPS * high:
            break
        low, high = (t, high) if excess > 0 else (low, t)
        guess = _radius_on_support(gram, b, k, w > 0, t)
        t = guess if low < guess < high else (low + high) / 2
    return w


def shifted(gram: Array, b: Array, mean_square: float, t: float) -> Array:
    """The Gram matrix of g_i + t g_0, with b the products with g_0 and mean_square = |g_0|^2."""
    return gram + t * (b[:, None] + b) + t**2 * mean_square


def _radius_on_support(gram: Array, b: Array, k: float, support: Mask, near: float) -> float:
    """The t with |g_w(t)| = t k if w(t) keeps its support; the root nearest to `near`."""
    inner = gram[np.ix_(support, support)]
    s = len(inner)
    bordered = np.block([[inner, -np.ones((s, 1))], [np.ones((1, s)), np.zeros((1, 1))]])
    right = np.zeros((s + 1, 2))
    right[-1, 0] = 1
    right[:-1, 1] = -b[support]
    try:
        constant, slope = np.linalg.solve(bordered, right)[:-1].T  # w(t) = constant + t slope
    except np.linalg.LinAlgError:
        return np.nan
    roots = np.roots(
        [slope @ inner @ slope - k**2, 2 * slope @ inner @ constant, constant @ inner @ constant]
    )
    real = roots.real[np.abs(roots.imag) <= 1e-6 * np.abs(roots)]
    return float(real[np.abs(real - near).argmin()]) if len(real) else np.nan


def equal_projection_weights(gram: Array, eps: float = EPS) -> Array:
    """Weights with sum 1 whose combination has equal products with all unit gradients.

    Solves C y = l 1, 1^T a = 1 with C the cosines, y_i = n_i a_i and n_i = sqrt(gram_ii) > 0.
    Where several weights do, those nearest to equal ones are taken; where none do, the nearest to
    it in the sense of least squares. Eigenvalues of C below the round-off of the rows, T eps of the
    largest, count as zero.
    """
    m = len(gram)
    n = np.sqrt(gram.diagonal())
    cosines = gram / (n[:, None] * n)
    tolerance = 100 * m * EPS + m * eps
    unscaled = solve_if_regular(cosines, np.ones(m), max(1e-4, np.sqrt(10 * m * tolerance)))
    if unscaled is not None:
        solutions = (unscaled / n)[:, None]
    else:
        values, vectors = np.linalg.eigh(cosines)
        kept = values > tolerance * values[-1]
        range_, null = vectors[:, kept], vectors[:, ~kept]
        ones_in_range = range_.sum(0)
        solutions = null / n[:, None]
        if (null.sum(0) ** 2).sum() <= 10 * tolerance * m:  # else all the products are 0
            regular = range_ @ (ones_in_range / values[kept])
            solutions = np.column_stack([regular / n, solutions])
    basis = solutions / np.linalg.norm(solutions, axis=0)
    if basis.shape[1] > 1:
        basis, _ = np.linalg.qr(basis)
    # The point nearest to equal weights on the plane of sum 1 within a subspace is a multiple of
    # the projection of 1 onto it.
    ones = basis @ basis.sum(0)
    if ones.sum() > tolerance**2 * m:
        return ones / ones.sum()
    # gram a is parallel to n exactly if its part orthogonal to n vanishes.
    unit = n / np.linalg.norm(n)
    equal = np.full(m, 1 / m)
    orthogonal = gram - np.outer(unit, unit @ gram)
    system = np.vstack([orthogonal, np.ones(m)])
    right = np.append(-orthogonal @ equal, 0.0)
    correction, *_ = np.linalg.lstsq(system, right, rcond=tolerance)
    return equal + correction


def solve_if_regular(matrix: Array, right: Array, least: float = 1e-4) -> Array | None:
    """matrix^-1 right for a positive definite matrix; None unless it clearly is one.

    That is, unless the pivots of its Cholesky factor are all `least` of the largest or more.
    """
    factor, solution, info = posv(matrix, right, lower=1)
    if info != 0:
        return None
    pivots = factor.diagonal()
    return solution if pivots.min() >= least * pivots.max() else None


def fair_weights(cosines: Array, sizes: Array, power: float) -> Array | None:
    """Weights b > 0 with cosines b = sizes b^-power; None where there are none.

    They are the one minimum of the convex function b^T C b / 2 - sum s_i phi(b_i), phi'(b) =
    b^-power, found by Newton's method with a search along the step while it is far away. There is
    no minimum where some non-negative weights combine the gradients to zero: the function then
    falls for ever.
    """
    m = len(cosines)
    b = (sizes / np.abs(cosines).sum(1)) ** (1 / (1 + power))
    before = np.inf
    for _ in range(10 * MANY_STEPS):  # below 10, but for powers far from 1
        pull = sizes * b**-power
        hessian = cosines.copy()
        hessian.flat[:: m + 1] += power * pull / b
        _, step, info = posv(hessian, pull - cosines @ b, lower=1)
        if info != 0:
            return None
        change = float(np.abs(step / b).max())
        if change > 0.1:
            step = _length(cosines, sizes, power, b, step) * step
        b = b + step
        if not float(b @ cosines @ b) > 100 * m * EPS * float(b.sum()) ** 2:
            return None  # the unit gradients, so combined, leave nothing but round-off
        if change < 1e-7 or before <= change < 1e-3:  # squared by this step; or all round-off
            return b
        before = change
    return None


def _length(cosines: Array, sizes: Array, power: float, b: Array, step: Array) -> float:
    """How much of the step to go: to where the function of `fair_weights` stops falling."""
    curvature, slope = float(step @ cosines @ step), float(step @ (cosines @ b))
    sizes = sizes * step
    steepest = slope - float(sizes @ b**-power)
    shrinking = float((step / b).min())
    high = length = min(1.0, -0.95 / shrinking) if shrinking < 0 else 1.0
    low = 0.0
    for _ in range(20):
        rise = length * curvature + slope - float(sizes @ (b + length * step) ** -power)
        if abs(rise) <= -0.2 * steepest or (rise < 0 and length == high):
            break
        low, high = (low, length) if rise > 0 else (length, high)
        length = (low + high) / 2
    return length
