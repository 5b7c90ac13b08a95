"""The solutions are exact at any number of tasks and any scale: by the equations that define them.

A convex problem needs no second solver: whatever satisfies its optimality conditions is the answer.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import aggregation_more as reference

from equipoise.aggregation import MGDA, CAGrad, NashMTL, UPGrad

TASKS = (2, 3, 10, 40, 100)
SCALES = (1e-12, 1e-6, 1.0, 1e6)


def problem(n_tasks: int, columns: int, scale: float, spread: float = 0.0) -> np.ndarray:
    """Rows of normal numbers, some of them up to 10^spread times as long as others."""
    rng = np.random.default_rng([n_tasks, columns, int(spread * 10)])
    lengths = 10.0 ** rng.uniform(-spread / 2, spread / 2, (n_tasks, 1))
    return scale * lengths * rng.standard_normal((n_tasks, columns))


def columns(n_tasks: int) -> tuple[int, ...]:
    """Fewer columns than tasks, as many, and more."""
    return (n_tasks // 2 + 1, n_tasks, 3 * n_tasks + 2)


every_size = pytest.mark.parametrize("n_tasks", TASKS)
every_scale = pytest.mark.parametrize("scale", SCALES)
like_and_unlike = pytest.mark.parametrize("spread", [0.0, 3.0])


@every_size
@every_scale
@like_and_unlike
def test_mgda_satisfies_the_kkt_conditions(n_tasks: int, scale: float, spread: float) -> None:
    for p in columns(n_tasks):
        rows = problem(n_tasks, p, scale, spread)
        gram = rows @ rows.T
        w = MGDA().coefficients(torch.from_numpy(gram)).numpy()
        products, size = gram @ w, gram.trace() / n_tasks
        square = w @ products
        assert w.min() >= 0
        assert w.sum() == pytest.approx(1, abs=1e-12)
        if square > 1e-9 * size:
            assert products.min() >= square * (1 - 1e-8)
        else:  # Pareto stationary: there is nothing but round-off
            assert products.min() >= square - 1e-14 * size


@every_size
@every_scale
@like_and_unlike
def test_nash_solves_its_equation(n_tasks: int, scale: float, spread: float) -> None:
    rows = problem(n_tasks, 3 * n_tasks + 2, scale, spread)
    gram = rows @ rows.T
    a = NashMTL(max_norm=None).coefficients(torch.from_numpy(gram)).numpy()
    assert a.min() > 0
    assert np.abs(a * (gram @ a) - 1).max() <= 1e-8


@every_size
@every_scale
@like_and_unlike
@pytest.mark.parametrize("c", [0.2, 0.4, 0.9])
def test_cagrad_minimises_its_dual(n_tasks: int, scale: float, spread: float, c: float) -> None:
    rows = problem(n_tasks, 3 * n_tasks + 2, scale, spread)
    gram = rows @ rows.T
    found = CAGrad(c, rescale=0).coefficients(torch.from_numpy(gram)).numpy()
    w = found - 1 / n_tasks
    w /= w.sum()
    b = gram.mean(1)
    k, norm = c * np.sqrt(b.mean()), np.sqrt(w @ gram @ w)
    # The length of the step is that of the ball, and no vertex of the simplex promises less.
    step = (found - 1 / n_tasks) @ gram @ (found - 1 / n_tasks)
    assert np.sqrt(step) == pytest.approx(k, rel=1e-9)
    assert w.min() >= -1e-9
    slopes = b + k * (gram @ w) / norm
    assert slopes.min() >= w @ slopes - 1e-9 * np.abs(slopes).max()


@every_size
@every_scale
def test_upgrad_agrees_with_projections_one_by_one(n_tasks: int, scale: float) -> None:
    p = 3 * n_tasks + 2
    rows = problem(n_tasks, p, scale)
    expected = reference.upgrad(rows)
    actual = UPGrad()(torch.from_numpy(rows)).numpy()
    assert np.linalg.norm(actual - expected) <= 1e-6 * np.linalg.norm(expected)
    # Never below 0 but for the rounding of the sum.
    assert (rows @ actual).min() >= -1e-9 * np.linalg.norm(rows, axis=1).max() * np.linalg.norm(
        actual
    )
