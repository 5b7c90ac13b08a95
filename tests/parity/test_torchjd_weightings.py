"""TorchJD 0.18's scalarizers as oracles for GLS, STCH, IMTL-L and FAMO."""

import numpy as np
import pytest
import torch

from equipoise.weighting import FAMO, GLS, IMTLL, STCH, Weighting

theirs = pytest.importorskip("torchjd.scalarization")

SEEDS = range(20)


def losses(seed: int) -> torch.Tensor:
    return series(seed, 1)[0].requires_grad_()


def series(seed: int, steps: int) -> torch.Tensor:
    """Give (steps, T) losses, T from 2 to 10."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.uniform(0.1, 5, size=(steps, 2 + seed % 9)))


def assert_equal(ours: Weighting, other: torch.nn.Module, times: float, at: torch.Tensor) -> None:
    """Compare value and gradient; theirs is multiplied by `times`."""
    values = ours(at).sum(), times * other(at)
    slopes = [torch.autograd.grad(value, at)[0] for value in values]
    # They add 1e-8 inside FAMO's logarithm.
    torch.testing.assert_close(*values, rtol=1e-6, atol=1e-7, check_dtype=False)
    torch.testing.assert_close(*slopes, rtol=1e-6, atol=1e-9, check_dtype=False)


@pytest.mark.parametrize("seed", SEEDS)
def test_gls_is_the_geometric_mean(seed: int) -> None:
    assert_equal(GLS(), theirs.GeometricMean(), 1, losses(seed))


@pytest.mark.parametrize("seed", SEEDS)
def test_stch_is_t_times_theirs(seed: int) -> None:
    at = losses(seed)
    tasks, mu = len(at), [0.05, 1.0][seed % 2]
    preference = torch.linspace(1, 2, tasks, dtype=torch.float64)
    preference = tasks * preference / preference.sum()
    ideal = 0.1 * torch.arange(tasks, dtype=torch.float64)
    assert_equal(STCH(mu, preference, ideal), theirs.STCH(mu, preference, ideal), tasks, at)
    # Preferences that sum to 1, as by default there, are a mu that is T times smaller.
    assert_equal(STCH(mu), theirs.STCH(mu / tasks), tasks**2, at)


@pytest.mark.parametrize("seed", SEEDS)
def test_imtl_l(seed: int) -> None:
    at = losses(seed)
    ours, other = IMTLL(len(at)), theirs.IMTLL(len(at))
    with torch.no_grad():
        for scales in (ours.log_scales, other.log_scale):
            scales.copy_(torch.linspace(-1, 2, len(at)))
    assert_equal(ours, other, 1, at)


@pytest.mark.parametrize("seed", SEEDS)
def test_famo(seed: int) -> None:
    batches = series(seed, 11)
    tasks = batches.shape[1]
    ours, other = FAMO(lr=0.1), theirs.FAMO(tasks, lr=0.1).double()
    everyone = torch.ones(tasks, dtype=torch.bool)
    for at, after in zip(batches, batches[1:], strict=False):
        assert_equal(ours, other, 1, at.clone().requires_grad_())
        ours.observe(at, everyone, after=after)
        other.update(after)
    assert ours.logits.std() > 0.05, "the logits hardly moved: nothing was compared"
