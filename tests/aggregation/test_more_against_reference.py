"""The further aggregators beside slow references, on the problems of test_against_reference."""

import numpy as np
import pytest
import torch
from reference import aggregation as first
from reference import aggregation_more as reference
from reference.problems import size, task_gradients

from equipoise.aggregation import (
    EDM,
    AlignedMTL,
    ConFIG,
    DualProj,
    FairGrad,
    GradDrop,
    GradVac,
    NashMTL,
    SDMGrad,
    UPGrad,
)

SEEDS = range(200)
seeds = pytest.mark.parametrize("seed", SEEDS)
fewer = pytest.mark.parametrize("seed", SEEDS[:80])  # their references are slow


def direction(aggregator: torch.nn.Module, rows: np.ndarray) -> np.ndarray:
    return aggregator(torch.from_numpy(np.ascontiguousarray(rows))).numpy()


def assert_same(
    actual: np.ndarray, expected: np.ndarray, scale: float, tolerance: float = 1e-6
) -> None:
    assert np.linalg.norm(actual - expected) <= tolerance * scale


def stationary(rows: np.ndarray) -> bool:
    """Whether positive weights combine the gradients to zero."""
    units = rows / np.linalg.norm(rows, axis=1)[:, None]
    return bool(np.linalg.norm(first.min_norm_weights(units) @ units) < 1e-6)


@fewer
def test_nash(seed: int) -> None:
    rows = task_gradients(seed)
    if stationary(rows):
        assert (direction(NashMTL(), rows) == 0).all()
        return
    exact = reference.nash(rows, max_norm=None)
    length = np.sqrt(len(rows))
    np.testing.assert_allclose(np.linalg.norm(exact), length, rtol=1e-8)
    assert_same(direction(NashMTL(max_norm=None), rows), exact, length)
    for bound in (1.0, 1.3):
        clipped = exact * min(1.0, bound / length)
        if seed % 10 == 0:  # slow: what is clipped is solved once more
            np.testing.assert_allclose(reference.nash(rows, bound), clipped, rtol=1e-6, atol=1e-9)
        assert_same(direction(NashMTL(max_norm=bound), rows), clipped, 1)
    assert_same(direction(NashMTL(), rows), exact * min(1.0, 1 / length), 1)
    grown = exact * np.sqrt(np.linalg.norm(rows @ rows.T))
    found = direction(NashMTL(max_norm=None, degree=1), rows)
    assert_same(found, grown, float(np.linalg.norm(grown)))


@fewer
def test_fairgrad(seed: int) -> None:
    rows = task_gradients(seed)
    alpha = [0.5, 1.0, 2.0, 4.0][seed % 4]
    if stationary(rows):
        assert (direction(FairGrad(alpha), rows) == 0).all()
        return
    expected = reference.fair_weights(rows, alpha) @ rows
    assert_same(direction(FairGrad(alpha), rows), expected, float(np.linalg.norm(expected)))


@seeds
def test_edm(seed: int) -> None:
    rows = task_gradients(seed)
    assert_same(direction(EDM(), rows), reference.edm(rows), size(rows))


@seeds
def test_upgrad(seed: int) -> None:
    rows = task_gradients(seed)
    assert_same(direction(UPGrad(), rows), reference.upgrad(rows), size(rows))


@seeds
def test_dualproj(seed: int) -> None:
    rows = task_gradients(seed)
    assert_same(direction(DualProj(), rows), reference.dualproj(rows), size(rows))


@seeds
def test_sdmgrad(seed: int) -> None:
    rows = task_gradients(seed)
    lam = [0.0, 0.3, 1.0][seed % 3]
    assert_same(direction(SDMGrad(lam), rows), reference.sdmgrad(rows, lam), size(rows))


@seeds
def test_aligned(seed: int) -> None:
    rows = task_gradients(seed)
    scale = ["min", "median", "rmse"][seed % 3]
    expected = reference.aligned(rows, scale)
    assert_same(direction(AlignedMTL(scale), rows), expected, size(rows))


@seeds
def test_config(seed: int) -> None:
    rows = task_gradients(seed)
    expected = reference.config(rows)
    assert_same(direction(ConFIG(), rows), expected, float(np.abs(rows).sum()))


@seeds
def test_graddrop_with_the_numbers_it_draws(seed: int) -> None:
    rows = task_gradients(seed)
    leak = [0.0, 0.3][seed % 2]
    draws = torch.rand(rows.shape[1], generator=torch.Generator().manual_seed(seed)).numpy()
    graddrop = GradDrop(leak, generator=torch.Generator().manual_seed(seed))
    assert_same(direction(graddrop, rows), reference.graddrop(rows, draws, leak), size(rows), 1e-9)


@seeds
def test_gradvac_with_the_orders_it_draws(seed: int) -> None:
    tasks = len(task_gradients(seed))
    draws = torch.Generator().manual_seed(seed)
    gradvac = GradVac(0.3, generator=torch.Generator().manual_seed(seed))
    targets = np.zeros((tasks, tasks))
    rng = np.random.default_rng(seed)
    for _ in range(3):  # the targets of one step are the next one's
        rows = rng.normal(size=(tasks, 2 * tasks)) * 10 ** rng.uniform(-6, 6)
        orders = []
        for i in range(tasks):
            order = torch.randperm(tasks, generator=draws).tolist()
            order.remove(i)
            orders.append(order)
        expected = reference.gradvac(rows, orders, targets, 0.3)
        assert_same(direction(gradvac, rows), expected, tasks * size(rows))
    np.testing.assert_allclose(gradvac.targets, targets, rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", range(0, 200, 10))
def test_the_projection_of_the_reference_is_one(seed: int) -> None:
    rows = task_gradients(seed)
    vector = rows.mean(axis=0)
    found = reference.projected(vector, rows)
    slack = 1e-9 * size(rows) ** 2 * len(rows)
    assert (rows @ found).min() >= -slack  # in the cone,
    assert abs(found @ (vector - found)) <= slack  # and nothing of the vector is left in it
