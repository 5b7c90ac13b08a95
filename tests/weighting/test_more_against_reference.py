"""IMTL-L, GLS, FAMO, STCH and GradNorm beside plain-Python references, 100 random problems each."""

import numpy as np
import pytest
import torch
from reference import weighting_more as reference

from equipoise.weighting import FAMO, GLS, IMTLL, STCH, GradNorm

SEEDS = range(100)
CLOSE = {"rtol": 1e-6, "atol": 1e-12}


def draw(seed: int, steps: int = 1) -> tuple[np.random.Generator, np.ndarray]:
    """Give (steps, T) losses of T from 2 to 20 tasks with scales from 1e-6 to 1e6."""
    rng = np.random.default_rng(seed)
    scales = 10 ** rng.uniform(-6, 6, size=int(rng.integers(2, 21)))
    return rng, scales * rng.uniform(0.2, 3, size=(steps, len(scales)))


def tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float64)).requires_grad_()


def factors(weighting: torch.nn.Module, losses: torch.Tensor) -> np.ndarray:
    return torch.autograd.grad(weighting(losses).sum(), losses)[0].numpy()


@pytest.mark.parametrize("seed", SEEDS)
def test_imtl_l(seed: int) -> None:
    rng, losses = draw(seed)
    scales = rng.uniform(-3, 3, size=losses.shape[1])
    weighting = IMTLL(len(scales)).double()
    with torch.no_grad():
        weighting.log_scales.copy_(torch.from_numpy(scales))
    values = tensor(losses[0])
    weighted = weighting(values)
    expected = reference.impartial(losses[0].tolist(), scales.tolist())
    np.testing.assert_allclose(weighted.detach().numpy(), expected, **CLOSE)
    slopes, factor = torch.autograd.grad(weighted.sum(), (weighting.log_scales, values))
    expected = reference.impartial_slopes(losses[0].tolist(), scales.tolist())
    np.testing.assert_allclose(slopes.numpy(), expected, **CLOSE)
    np.testing.assert_allclose(factor.numpy(), np.exp(scales), **CLOSE)


@pytest.mark.parametrize("seed", SEEDS)
def test_gls(seed: int) -> None:
    losses = draw(seed)[1][0]
    value = GLS()(tensor(losses)).sum().item()
    assert value == pytest.approx(reference.geometric(losses.tolist()), rel=1e-9)
    expected = reference.geometric_slopes(losses.tolist())
    np.testing.assert_allclose(factors(GLS(), tensor(losses)), expected, rtol=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_stch(seed: int) -> None:
    rng, losses = draw(seed)
    losses = losses[0] * 10 ** rng.uniform(-6, 0)
    tasks = len(losses)
    mu = [0.01, 0.1, 1.0, 10.0][seed % 4]
    preference = rng.uniform(0.1, 3, size=tasks)
    ideal = rng.uniform(-1, 1, size=tasks) * losses
    weighting = STCH(mu, preference.tolist(), ideal.tolist())
    scaled = preference * tasks / preference.sum()
    value, slopes = reference.smooth_maximum(losses.tolist(), scaled.tolist(), ideal.tolist(), mu)
    values = tensor(losses)
    weighted = weighting(values)
    assert weighted.sum().item() == pytest.approx(tasks * value, rel=1e-9)
    found = torch.autograd.grad(weighted.sum(), values)[0].numpy()
    np.testing.assert_allclose(found, tasks * np.array(slopes), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(weighting.weights.numpy(), found, **CLOSE)


@pytest.mark.parametrize("seed", SEEDS)
def test_famo(seed: int) -> None:
    rng, losses = draw(seed, steps=13)
    tasks = losses.shape[1]
    bounds = losses.min(0) * rng.uniform(-1, 0.9, size=tasks) * (seed % 3 > 0)
    gamma = [0.0, 1e-3, 1.0][seed % 3]
    weighting = FAMO(lr=0.5, gamma=gamma, min_losses=bounds.tolist())
    oracle = reference.FAMO(tasks, 0.5, gamma, bounds.tolist())
    for before, after in zip(losses, losses[1:], strict=False):
        found = factors(weighting, tensor(before))
        np.testing.assert_allclose(found, oracle.factors(before.tolist()), **CLOSE)
        assert found.sum() == pytest.approx(1, rel=1e-9)
        everyone = torch.ones(tasks, dtype=torch.bool)
        weighting.observe(torch.from_numpy(before), everyone, after=torch.from_numpy(after))
        oracle.update(before.tolist(), after.tolist())
        np.testing.assert_allclose(weighting.logits.numpy(), oracle.logits, **CLOSE)
    assert np.ptp(oracle.logits) > 0.1, "the logits hardly moved: nothing was compared"


@pytest.mark.parametrize("seed", SEEDS)
def test_gradnorm(seed: int) -> None:
    rng, losses = draw(seed, steps=12)
    tasks = losses.shape[1]
    alpha = [0.0, 0.5, 1.5][seed % 3]
    weighting, oracle = GradNorm(alpha, lr=0.05), reference.GradNorm(tasks, alpha, 0.05)
    scales = 10 ** rng.uniform(-2, 2, size=(tasks, 1))
    for batch in losses:
        gradients = scales * rng.normal(size=(tasks, 7))
        found = factors(weighting, tensor(batch))
        np.testing.assert_allclose(found, oracle.weights, **CLOSE)
        rows = found[:, None] * gradients
        everyone = torch.ones(tasks, dtype=torch.bool)
        weighting.observe(torch.from_numpy(batch), everyone, gram=torch.from_numpy(rows @ rows.T))
        oracle.update(batch.tolist(), gradients.tolist())
        np.testing.assert_allclose(weighting.learned.numpy(), oracle.weights, **CLOSE)
    assert np.ptp(oracle.weights) > 0.01, "the weights hardly moved: nothing was compared"
