"""The library beside the slow references on 200 random problems each, seeded.

T from 2 to 20, rank-deficient ones among them, scales from 1e-6 to 1e6. Weights need not be unique,
so directions are compared, to 1e-6 of the size of the rows.
"""

import numpy as np
import pytest
import torch
from reference import aggregation as reference
from reference.problems import size, task_gradients

from equipoise.aggregation import IMTLG, MGDA, CAGrad, Mean, PCGrad, Sum

SEEDS = range(200)


def direction(aggregator: torch.nn.Module, rows: np.ndarray, **options: torch.Tensor) -> np.ndarray:
    """Give the library's direction of float64 rows."""
    return aggregator(torch.from_numpy(rows), **options).numpy()


def assert_same(
    actual: np.ndarray, expected: np.ndarray, rows: np.ndarray, tolerance: float = 1e-6
) -> None:
    """Compare two directions relative to the size of the rows, and to their own if larger."""
    bound = tolerance * max(size(rows), float(np.linalg.norm(expected)))
    assert np.linalg.norm(actual - expected) <= bound


def test_the_problems_are_of_all_kinds() -> None:
    problems = [task_gradients(seed) for seed in SEEDS]
    tasks = {len(rows) for rows in problems}
    sizes = [size(rows) for rows in problems]
    deficient = [np.linalg.matrix_rank(rows) < min(rows.shape) for rows in problems]
    inside = [
        np.linalg.norm(reference.min_norm_weights(rows) @ rows) < 1e-9 * size(rows)
        for rows in problems
    ]
    assert tasks == set(range(2, 21))
    assert min(sizes) < 1e-5
    assert max(sizes) > 1e5
    assert 50 <= sum(deficient) <= 100
    assert 25 <= sum(inside) <= 100  # Pareto stationary ones


@pytest.mark.parametrize("seed", SEEDS)
def test_sum_and_mean(seed: int) -> None:
    rows = task_gradients(seed)
    assert_same(direction(Sum(), rows), reference.total(rows), rows, 1e-12)
    assert_same(direction(Mean(), rows), reference.mean(rows), rows, 1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_mgda(seed: int) -> None:
    rows = task_gradients(seed)
    actual, expected = direction(MGDA(), rows), reference.mgda(rows)
    assert_same(actual, expected, rows)
    slack = 1e-14 * size(rows) ** 2  # round-off of the squares that a Gram matrix holds
    assert actual @ actual <= expected @ expected * (1 + 1e-9) + slack


@pytest.mark.parametrize("combine", ["raw", "normalized"])
@pytest.mark.parametrize("normalize", ["l2", "loss", "loss+"])
@pytest.mark.parametrize("seed", SEEDS[:70])
def test_mgda_normalised(seed: int, normalize: str, combine: str) -> None:
    # The weights, and so the raw direction, are unique when the normalised rows are independent.
    rng = np.random.default_rng(seed)
    tasks = int(rng.integers(2, 21))
    rows = rng.normal(size=(tasks, tasks + 5)) * 10 ** rng.uniform(-6, 6)
    rows = rows * 10 ** rng.uniform(-1, 1, size=(tasks, 1))
    losses = 10 ** rng.uniform(-1, 1, size=tasks)
    aggregator = MGDA(normalize=normalize, combine=combine)
    actual = direction(aggregator, rows, losses=torch.from_numpy(losses))
    expected = reference.mgda(rows, normalize, losses, combine=combine)
    if combine == "raw":
        assert_same(actual, expected, rows)
    else:  # of another size than the rows
        assert np.linalg.norm(actual - expected) <= 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_pcgrad_with_the_orders_it_draws(seed: int) -> None:
    rows = task_gradients(seed)
    tasks = len(rows)
    draws = torch.Generator().manual_seed(seed)
    orders = []
    for i in range(tasks):
        order = torch.randperm(tasks, generator=draws).tolist()
        order.remove(i)
        orders.append(order)
    pcgrad = PCGrad(generator=torch.Generator().manual_seed(seed))
    assert_same(direction(pcgrad, rows), reference.pcgrad(rows, orders), rows)


@pytest.mark.parametrize("seed", SEEDS)
def test_cagrad(seed: int) -> None:
    rows = task_gradients(seed)
    c = [0.1, 0.4, 0.7, 0.95][seed % 4]
    rescale = seed % 3
    actual = direction(CAGrad(c=c, rescale=rescale), rows)
    expected = reference.cagrad(rows, c, rescale)
    # c |g_0| is what the method can change: compare with that, not with the rows, if smaller.
    change = c * np.linalg.norm(rows.mean(axis=0))
    assert np.linalg.norm(actual - expected) <= 1e-6 * max(change, 1e-3 * size(rows))


@pytest.mark.parametrize("seed", SEEDS)
def test_cagrad_of_two_by_halving(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(2, 3)) * 10 ** rng.uniform(-6, 6)
    rows[1] += rng.uniform(-1, 1) * rows[0]
    c = rng.uniform(0.01, 0.99)
    expected = reference.cagrad_dual_on_two(rows, c)
    assert_same(direction(CAGrad(c=c, rescale=0), rows), expected, rows)
    assert_same(reference.cagrad(rows, c, 0), expected, rows)


@pytest.mark.parametrize("seed", SEEDS)
def test_imtlg(seed: int) -> None:
    rows = task_gradients(seed)
    weights = reference.imtlg_weights(rows)
    expected = weights @ rows
    # Weights of both signs cancel: what is lost is relative to what is added up.
    added = np.abs(weights) @ np.linalg.norm(rows, axis=1)
    assert np.linalg.norm(direction(IMTLG(), rows) - expected) <= 1e-6 * added


@pytest.mark.parametrize("seed", range(0, 200, 10))
def test_mgda_reference_by_faces_and_by_wolfe(seed: int) -> None:
    rows = task_gradients(seed)[: reference.ENUMERATED]
    rows = rows / size(rows)
    faces = reference._min_norm_by_enumeration(rows) @ rows
    wolfe = reference._min_norm_by_wolfe(rows) @ rows
    assert_same(faces, wolfe, rows, 1e-10)


@pytest.mark.parametrize("seed", range(0, 200, 10))
def test_cagrad_reference_by_supports_and_by_levels(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = task_gradients(seed)[: reference.ENUMERATED]
    by_supports = reference.cagrad(rows)
    monkeypatch.setattr(reference, "ENUMERATED", 0)
    assert_same(reference.cagrad(rows), by_supports, rows, 1e-8)
