"""The small exact solvers on which the aggregators stand.

All work in float64 on a T x T Gram matrix whose scale the caller has made of order 1, and to
tolerances that are relative to it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from equipoise.aggregation.base import Array

EPS = float(np.finfo(np.float64).eps)


def gram_root(gram: Array) -> Array:
    """A matrix L with L^T L = gram, negative eigenvalues (round-off) taken as 0."""
    values, vectors = np.linalg.eigh(gram)
    return np.sqrt(values.clip(0))[:, None] * vectors.T


def min_norm_weights(gram: Array) -> Array:
    """Weights w in the simplex that minimise w^T gram w, exact up to rounding.

    With L^T L = gram this is the non-negative least-squares problem
    min_{v >= 0} |L v|^2 + (1^T v - 1)^2, w = v / 1^T v: for v = t w the best t leaves
    q / (1 + q) with q = |L w|^2, which grows with q. It is solved in the unit vectors, u_i =
    n_i v_i with n_i = |L_i| over the shortest one, so that vectors of very unlike lengths lose
    no digits. Where some are zero, they share the weight.
    """
    lengths = np.sqrt(np.diagonal(gram).clip(0))
    shortest = lengths.min()
    if shortest == 0:
        return (lengths == 0) / (lengths == 0).sum()
    if len(gram) == 1:
        return np.ones(1)
    if len(gram) == 2:
        return _min_norm_of_two(gram)
    inverse = shortest / lengths
    matrix = np.vstack([gram_root(gram / np.outer(lengths, lengths)), inverse])
    target = np.zeros(len(matrix))
    target[-1] = 1
    u, _ = nnls(matrix, target, maxiter=30 * len(gram))
    v = u * inverse
    return v / v.sum()


def _min_norm_of_two(gram: Array) -> Array:
    """The foot of the perpendicular from 0 on the segment, or the nearer end."""
    apart = gram[0, 0] + gram[1, 1] - 2 * gram[0, 1]
    if apart <= 0:
        return np.full(2, 0.5)
    first = min(max((gram[1, 1] - gram[0, 1]) / apart, 0.0), 1.0)
    return np.array([first, 1 - first])


def cagrad_weights(gram: Array, c: float) -> Array:
    """Weights w in the simplex that minimise w^T b + k sqrt(w^T G w), the dual of CAGrad.

    b = G 1 / T holds the products with the mean gradient g_0, and k = c |g_0|. At the solution
    G w + t b is constant on the support and larger elsewhere, with t = |g_w| / k: for fixed t
    that is a min-norm problem. So t is found between 0 and max |g_i| / k; on a given support
    the equation for t is a quadratic one, whose root is exact once the support is right.
    """
    m = len(gram)
    b = gram.mean(1)
    mean_square = b.mean()
    k = c * np.sqrt(max(mean_square, 0.0))
    if k <= EPS or m == 1:
        return np.full(m, 1 / m)
    low, high = 0.0, float(np.sqrt(np.diagonal(gram).max()) / k)
    t = min(1.0 / c, high) if high > 0 else 0.0
    for _ in range(100):
        w = min_norm_weights(gram + t * (b[:, None] + b) + t**2 * mean_square)
        excess = np.sqrt(max(w @ gram @ w, 0.0)) - t * k
        if abs(excess) <= 4 * EPS * t * k or high - low <= 4 * EPS * high:
            break
        low, high = (t, high) if excess > 0 else (low, t)
        guess = _radius_on_support(gram, b, k, w > 0, t)
        t = guess if low < guess < high else (low + high) / 2
    return w


def _radius_on_support(
    gram: Array, b: Array, k: float, support: NDArray[np.bool_], near: float
) -> float:
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
    n = np.sqrt(np.diagonal(gram))
    tolerance = 100 * m * EPS
    cosines = gram / np.outer(n, n)
    values, vectors = np.linalg.eigh(cosines)
    if values[0] > tolerance * values[-1]:
        a = vectors @ (vectors.sum(0) / values) / n
        if abs(a.sum()) > tolerance * np.abs(a).sum():
            return a / a.sum()
    # gram a is parallel to n exactly if its part orthogonal to n vanishes.
    unit = n / np.linalg.norm(n)
    equal = np.full(m, 1 / m)
    orthogonal = gram - np.outer(unit, unit @ gram)
    system = np.vstack([orthogonal, np.ones(m)])
    right = np.append(-orthogonal @ equal, 0.0)
    correction, *_ = np.linalg.lstsq(system, right, rcond=tolerance)
    return equal + correction
