"""The small exact solvers on which the aggregators stand.

All work in float64 on a T x T Gram matrix whose scale the caller has made of order 1, and to
tolerances that are relative to it. The quick way to a solution guesses which constraints bind and
solves one linear system for each guess; what it finds is checked, and where it fails a slower and
surer way takes over.
"""

from __future__ import annotations

import numpy as np

from equipoise.aggregation.base import Array
from equipoise.aggregation.nnls import EPS, nonnegative_least_squares, posv
from equipoise.aggregation.quadratic import Mask, gram_root, nonnegative, nonnegative_surely

MANY_STEPS = 100
LITTLE = 1e-6


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
    first = min(max((d - b) / apart, 0.0), 1.0) if apart > 0 else 0.5
    return np.array([first, 1 - first])


def cagrad_weights(gram: Array, c: float) -> Array:
    """Weights w in the simplex that minimise w^T b + k sqrt(w^T G w), the dual of CAGrad.

    b = G 1 / T holds the products with the mean gradient g_0, and k = c |g_0|. At the solution
    G w + t b is constant on the support and larger elsewhere, with t = |g_w| / k. On a given
    support w is linear in t, and t the root of a quadratic equation.
    """
    m = len(gram)
    b = gram.mean(1)
    mean_square = b.mean()
    k = c * np.sqrt(max(mean_square, 0.0))
    if k <= EPS or m == 1:
        return np.full(m, 1 / m)
    w = _cagrad_by_supports(gram, b, k, np.ones(m, bool))
    return _cagrad_by_halving(gram, b, k, c) if w is None else w


def _cagrad_by_supports(gram: Array, b: Array, k: float, support: Mask) -> Array | None:
    """Exchange all tasks that are on the wrong side until none is; None if that leads nowhere."""
    right = np.stack([np.ones(len(gram)), b], axis=1)
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
        wrong = np.where(support, w < 0, level < least * (1 - 1e-12))
        if not wrong.any():
            exact = np.ptp(level[index]) <= 1e-11 * abs(least)
            return w if exact else None
        support ^= wrong
        if not support.any():
            return None
    return None


def _cagrad_by_halving(gram: Array, b: Array, k: float, c: float) -> Array:
    """For fixed t a min-norm problem; so t is found between 0 and max |g_i| / k."""
    mean_square = b.mean()
    low, high = 0.0, float(np.sqrt(gram.diagonal().max()) / k)
    w = min_norm_weights(gram)
    if w @ gram @ w <= EPS * (w @ gram.diagonal()):
        at_zero, little = w, high * LITTLE
        w = min_norm_weights(shifted(gram, b, mean_square, little))
        if w @ gram @ w <= (little * k) ** 2:
            return at_zero  # t, and with it g_w, vanishes
        low = little
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


def equal_projection_weights(gram: Array) -> Array:
    """Weights with sum 1 whose combination has equal products with all unit gradients.

    Solves gram a = l n, 1^T a = 1 with n_i = sqrt(gram_ii) > 0. Where that has no solution or
    several, the least-squares solution nearest to equal weights is taken.
    """
    m = len(gram)
    n = np.sqrt(gram.diagonal())
    cosines = gram / (n[:, None] * n)
    tolerance = 100 * m * EPS
    unscaled = solve_if_regular(cosines, np.ones(m))
    if unscaled is None:
        values, vectors = np.linalg.eigh(cosines)
        if values[0] > tolerance * values[-1]:
            unscaled = vectors @ (vectors.sum(0) / values)
    if unscaled is not None:
        a = unscaled / n
        if abs(a.sum()) > tolerance * np.abs(a).sum():  # else no multiple of it has sum 1
            return a / a.sum()
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
