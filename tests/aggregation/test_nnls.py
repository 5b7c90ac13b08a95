"""Non-negative least squares: the solvers against enumeration, scipy and their own conditions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from reference import aggregation as reference
from scipy.optimize import nnls

from equipoise.aggregation import nnls as ours
from equipoise.aggregation.quadratic import dual_cone_shifts
from equipoise.aggregation.solvers import min_norm_weights

KINDS = ("regular", "wide", "dependent", "nearly dependent", "unlike", "opposite")


def problem(kind: str, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A matrix (N, n) with columns of length 1 (unless unlike) and a target of length about 1."""
    rng = np.random.default_rng([n, seed, KINDS.index(kind)])
    height = {"regular": n + 3, "wide": max(1, n // 2)}.get(kind, n)
    matrix = rng.normal(size=(height, n))
    target = rng.normal(size=height)
    if kind == "dependent":
        rank = max(1, n // 3)
        matrix = rng.normal(size=(height, rank)) @ rng.normal(size=(rank, n))
    elif kind == "nearly dependent":
        matrix[:, n // 2 :] = matrix[:, : n - n // 2] + 1e-9 * matrix[:, n // 2 :]
    elif kind == "opposite":
        matrix[:, n // 2 :] = -matrix[:, : n - n // 2]
    matrix /= np.linalg.norm(matrix, axis=0)
    if kind == "unlike":
        matrix *= 10 ** rng.uniform(-4, 4, n)
    return matrix, target / np.linalg.norm(target)


def off(matrix: np.ndarray, target: np.ndarray, x: np.ndarray) -> float:
    """How far x is from optimal: the worst cosine of the residual that it should not have."""
    lengths = np.linalg.norm(matrix, axis=0)
    slope = (target - matrix @ x) @ matrix / lengths
    return max(float(slope.max()), float(np.abs(slope[x > 0]).max(initial=0)))


def by_enumeration(matrix: np.ndarray, target: np.ndarray) -> float:
    """The shortest residual of all supports whose solution is not negative."""
    n = matrix.shape[1]
    best = float(np.linalg.norm(target))
    supports: Iterator[tuple[int, ...]] = itertools.chain.from_iterable(
        itertools.combinations(range(n), size) for size in range(1, n + 1)
    )
    for support in supports:
        part = matrix[:, list(support)]
        x, *_ = np.linalg.lstsq(part, target, rcond=None)
        if x.min() >= 0:
            best = min(best, float(np.linalg.norm(target - part @ x)))
    return best


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_the_residual_is_that_of_the_best_support(kind: str, n: int) -> None:
    for seed in range(15):
        matrix, target = problem(kind, n, seed)
        x, exact = ours.nonnegative_least_squares(matrix, target)
        assert exact
        assert x.min() >= 0
        found = np.linalg.norm(target - matrix @ x)
        assert found == pytest.approx(by_enumeration(matrix, target), rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [2, 10, 40, 100])
def test_the_conditions_of_optimality_are_met(kind: str, n: int) -> None:
    for seed in range(4):
        matrix, target = problem(kind, n, seed)
        x, exact = ours.nonnegative_least_squares(matrix, target)
        assert exact
        assert x.min() >= 0
        assert off(matrix, target, x) <= 1e-11


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [3, 30])
def test_any_start_leads_to_an_optimum(kind: str, n: int) -> None:
    matrix, target = problem(kind, n, 0)
    rng = np.random.default_rng(n)
    for start in (np.zeros(n), np.ones(n), rng.random(n) * (rng.random(n) < 0.5)):
        before = start.copy()
        x, exact = ours.nonnegative_least_squares(matrix, target, start)
        assert exact
        assert off(matrix, target, x) <= 1e-11
        assert np.array_equal(start, before)


@pytest.mark.parametrize("n", [5, 20, 60])
def test_the_solution_is_that_of_scipy_where_that_one_is_optimal(n: int) -> None:
    compared = 0
    for seed in range(10):
        matrix, target = problem("regular", n, seed)
        theirs, _ = nnls(matrix, target, maxiter=100 * n)
        if off(matrix, target, theirs) > 1e-12:
            continue  # scipy 1.15.3 stops early
        compared += 1
        x, _ = ours.nonnegative_least_squares(matrix, target)
        np.testing.assert_allclose(x, theirs, atol=1e-9)
    assert compared >= 2


@pytest.mark.parametrize("kind", ["regular", "wide", "dependent", "nearly dependent", "opposite"])
@pytest.mark.parametrize("n", [2, 10, 40, 100])
def test_the_gram_matrix_will_do(kind: str, n: int) -> None:
    for seed in range(4):
        matrix, target = problem(kind, n, seed)
        gram, linear = matrix.T @ matrix, -target @ matrix
        x, exact = ours.nonnegative_semidefinite(gram, linear, np.zeros(n))
        assert x.min() >= 0
        if exact:
            assert off(matrix, target, x) <= 1e-9
        else:
            assert kind == "nearly dependent"
        if kind == "regular":
            y, exact = ours.nonnegative_definite(gram, linear, np.zeros(n))
            assert exact
            np.testing.assert_allclose(x, y, atol=1e-8)


def test_a_matrix_that_is_not_positive_definite_is_not_solved_silently() -> None:
    gram = np.array([[1.0, -2.0], [-2.0, 1.0]])
    _, exact = ours.nonnegative_definite(gram, np.array([-1.0, -1.0]), np.zeros(2))
    assert not exact


def test_zero_columns_and_a_zero_target() -> None:
    matrix = np.array([[1.0, 0.0], [1.0, 0.0]])
    x, exact = ours.nonnegative_least_squares(matrix, np.array([1.0, 1.0]), np.ones(2))
    assert exact
    np.testing.assert_allclose(x, [1, 0])
    x, exact = ours.nonnegative_least_squares(matrix, np.zeros(2))
    assert exact
    assert not x.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [2, 5, 10, 40])
def test_the_shortest_vector_of_the_hull(kind: str, n: int) -> None:
    for seed in range(4):
        rows = problem(kind, n, seed)[0].T
        gram = rows @ rows.T
        gram /= gram.trace() / n
        w = min_norm_weights(gram)
        products = gram @ w
        assert w.min() >= 0
        assert w.sum() == pytest.approx(1, abs=1e-12)
        # <g_i, d> >= |d|^2 up to the round-off of the products
        noise = 1e-13 * n * np.sqrt(gram.diagonal()) * (w @ np.sqrt(gram.diagonal()))
        assert (products >= (w @ products) * (1 - 1e-10) - noise).all()


@pytest.mark.parametrize("kind", ["regular", "wide", "dependent", "opposite"])
@pytest.mark.parametrize("n", [2, 5, 10, 40])
def test_projections_onto_the_dual_cone(kind: str, n: int) -> None:
    for seed in range(3):
        rows = problem(kind, n, seed)[0].T
        starts = np.random.default_rng(seed).normal(size=(3, n))
        shifts = dual_cone_shifts(rows @ rows.T, starts)
        assert shifts.min() >= 0
        for start, shift in zip(starts, shifts, strict=True):
            vector = start @ rows
            expected = vector + reference.nonnegative_least_squares(rows.T, -vector) @ rows
            found = (start + shift) @ rows
            assert np.linalg.norm(found - expected) <= 1e-7 * max(1, np.linalg.norm(vector))
