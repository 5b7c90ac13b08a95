"""TorchJD 0.18 as an oracle for the further aggregators; see test_torchjd."""

import numpy as np
import pytest
import torch

import equipoise as eq

theirs = pytest.importorskip("torchjd.aggregation")
TINY = 1e-12


def problem(seed: int, tasks: int) -> torch.Tensor:
    """Give independent float64 rows of lengths around 1, some of them in conflict."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(tasks, tasks + 5)) + 0.5 * rng.normal(size=tasks + 5)
    return torch.from_numpy(rows)


def difference(ours: torch.Tensor, other: torch.Tensor) -> float:
    return ((ours - other).norm() / ours.norm()).item()


def projector() -> object:
    pytest.importorskip("qpsolvers")
    pytest.importorskip("quadprog")
    from torchjd.linalg import QuadprogProjector

    return QuadprogProjector(norm_eps=TINY, reg_eps=TINY)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("scale", ["min", "median", "rmse"])
def test_aligned_is_equal(scale: str, seed: int) -> None:
    rows = problem(seed, 2 + seed % 9)
    other = theirs.AlignedMTL(scale_mode=scale)(rows)
    assert difference(eq.AlignedMTL(scale)(rows), other) < 1e-9


@pytest.mark.parametrize("seed", range(20))
def test_config_is_equal(seed: int) -> None:
    rows = problem(seed, 2 + seed % 9)
    assert difference(eq.ConFIG()(rows), theirs.ConFIG()(rows)) < 1e-9


@pytest.mark.parametrize("seed", range(20))
def test_projections_are_equal_without_their_regularisation(seed: int) -> None:
    rows = problem(seed, 2 + seed % 9)
    upgrad = theirs.UPGrad(projector=projector())
    assert difference(eq.UPGrad()(rows), upgrad(rows)) < 1e-6
    dualproj = theirs.DualProj(projector=projector())
    assert difference(eq.DualProj()(rows), dualproj(rows)) < 1e-6


@pytest.mark.parametrize("seed", range(5))
def test_nash_is_what_theirs_approaches(seed: int) -> None:
    pytest.importorskip("cvxpy")
    pytest.importorskip("ecos")
    rows = problem(seed, 2 + seed)
    other = theirs.NashMTL(n_tasks=len(rows), max_norm=1.0, optim_niter=50)
    with pytest.warns(UserWarning, match="DPP"):
        found = other(rows)
    # They stop at a residual of 1e-3.
    assert difference(eq.NashMTL()(rows), found) < 0.02


@pytest.mark.parametrize("seed", range(5))
def test_graddrop_has_their_mean(seed: int) -> None:
    rows = problem(seed, 3)
    torch.manual_seed(seed)
    ours, other = eq.GradDrop(), theirs.GradDrop()
    means = [torch.stack([f(rows) for _ in range(3000)]).mean(0) for f in (ours, other)]
    # Both have the sum as their mean; five standard errors of a draw that is at most this far off.
    bound = 5 * rows.abs().sum(0) / np.sqrt(3000)
    for mean in means:
        assert ((mean - rows.sum(0)).abs() <= bound).all()
    # Each entry is what one sign adds up to, and both signs do occur.
    signs = torch.stack([rows.clamp(min=0).sum(0), rows.clamp(max=0).sum(0)])
    for f in (ours, other):
        found = torch.stack([f(rows) for _ in range(50)])
        near = (found[:, None] - signs).abs().min(1).values
        assert near.max() < 1e-9
        assert (found.std(0) > 0).any()


@pytest.mark.parametrize("seed", range(10))
def test_gradvac_of_two_follows_theirs(seed: int) -> None:
    # Of two tasks there is no order to draw; targets and steps must agree from step to step.
    ours, other = eq.GradVac(beta=0.3), theirs.GradVac(beta=0.3)
    for k in range(5):
        rows = problem(100 * seed + k, 2)
        assert difference(ours(rows), other(rows)) < 1e-6
