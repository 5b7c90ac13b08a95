"""The weightings beside plain-Python references that keep the list of all losses ever seen.

100 random trainings each: T from 2 to 20, epochs of 1 to 5 batches, losses from 1e-6 to 1e6.
"""

import numpy as np
import pytest
import torch
from reference import weighting as reference

from equipoise.weighting import DWA, EW, SI, UW, IGBv1

SEEDS = range(100)


def training(seed: int) -> tuple[int, np.ndarray]:
    """Give the steps of an epoch and the (steps, T) losses of somewhat more than three epochs."""
    rng = np.random.default_rng(seed)
    tasks, steps = int(rng.integers(2, 21)), int(rng.integers(1, 6))
    batches = 3 * steps + int(rng.integers(1, 2 * steps + 1))
    scales = 10 ** rng.uniform(-6, 6, size=tasks)
    return steps, scales * rng.uniform(0.2, 3, size=(batches, tasks))


def assert_follows(weighting: torch.nn.Module, oracle: object, losses: np.ndarray) -> None:
    """Run both over all batches and compare weights and weighted losses."""
    varied = 0
    for batch in losses:
        weighted = weighting(torch.from_numpy(batch))
        weights, expected = oracle.call(batch.tolist())
        np.testing.assert_allclose(weighting.weights.numpy(), weights, rtol=1e-9)
        np.testing.assert_allclose(weighted.numpy(), expected, rtol=1e-9, atol=1e-12)
        varied += np.ptp(weights) > 1e-3
    if not isinstance(oracle, reference.EW | reference.SI):
        assert varied, "all weights were 1: nothing was compared"


@pytest.mark.parametrize("seed", SEEDS)
def test_ew(seed: int) -> None:
    assert_follows(EW(), reference.EW(), training(seed)[1])


@pytest.mark.parametrize("seed", SEEDS)
def test_si(seed: int) -> None:
    assert_follows(SI(), reference.SI(), training(seed)[1])


@pytest.mark.parametrize("seed", SEEDS)
def test_igbv1(seed: int) -> None:
    steps, losses = training(seed)
    assert_follows(IGBv1(steps), reference.IGBv1(steps), losses)


@pytest.mark.parametrize("seed", SEEDS)
def test_dwa(seed: int) -> None:
    steps, losses = training(seed)
    temperature = [0.5, 1.0, 2.0, 5.0][seed % 4]
    assert_follows(DWA(steps, temperature), reference.DWA(steps, temperature), losses)


@pytest.mark.parametrize("seed", SEEDS)
def test_uw(seed: int) -> None:
    rng = np.random.default_rng(seed)
    losses = training(seed)[1][0]
    logs = rng.uniform(-3, 3, size=len(losses)).astype(np.float32)  # as the parameter holds them
    weighting = UW(n_tasks=len(losses))
    with torch.no_grad():
        weighting.log_variances.copy_(torch.from_numpy(logs))
    weighted = weighting(torch.from_numpy(losses))
    expected = reference.uncertainty(losses.tolist(), logs.tolist())
    np.testing.assert_allclose(weighted.detach().numpy(), expected, rtol=1e-6, atol=1e-6)
    slopes = torch.autograd.grad(weighted.sum(), weighting.log_variances)[0]
    expected = reference.uncertainty_slopes(losses.tolist(), logs.tolist())
    np.testing.assert_allclose(slopes.numpy(), expected, rtol=1e-5, atol=1e-6)
