"""TorchJD 0.18 as an oracle: equal where the definition is, and the differences as documented."""

import numpy as np
import pytest
import torch

from equipoise.aggregation import IMTLG, MGDA, CAGrad, Mean, PCGrad, Sum

theirs = pytest.importorskip("torchjd.aggregation")

PAPER = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]], dtype=torch.float64)
CONFLICT = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)


def problem(seed: int, tasks: int) -> torch.Tensor:
    """Give independent float64 rows with a common part; their scale differs from seed to seed."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(tasks, tasks + 5)) + rng.random(tasks + 5)
    return torch.from_numpy(rows * 10 ** rng.uniform(-2, 2))


def difference(ours: torch.Tensor, other: torch.Tensor) -> float:
    """Give the distance of two directions relative to the first."""
    return ((ours - other).norm() / ours.norm()).item()


def their_cagrad(c: float, norm_eps: float = 1e-4) -> torch.nn.Module:
    """Give TorchJD's CAGrad, which needs a solver of its own."""
    pytest.importorskip("cvxpy")
    return theirs.CAGrad(c=c, norm_eps=norm_eps)


# -------------------------------------------------------------------------------------- equal


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    ("ours", "other"),
    [(Sum, theirs.Sum), (Mean, theirs.Mean), (IMTLG, theirs.IMTLG)],
)
def test_equal_on_independent_gradients(ours: type, other: type, seed: int) -> None:
    rows = problem(seed, tasks=2 + seed % 9)
    assert difference(ours()(rows), other()(rows)) < 1e-9


@pytest.mark.parametrize("seed", range(20))
def test_pcgrad_of_two_tasks_is_equal(seed: int) -> None:
    rows = problem(seed, tasks=2)
    rows[1] -= rows[0] * (seed % 3)
    assert difference(PCGrad()(rows), theirs.PCGrad()(rows)) < 1e-12


@pytest.mark.parametrize("seed", range(20))
def test_mgda_of_two_tasks_is_equal(seed: int) -> None:
    rows = problem(seed, tasks=2)
    assert difference(MGDA()(rows), theirs.MGDA()(rows)) < 1e-9


@pytest.mark.parametrize("tasks", [3, 4, 5])
@pytest.mark.parametrize("seed", range(3))
def test_mgda_of_few_tasks_is_equal_once_theirs_has_converged(seed: int, tasks: int) -> None:
    rows = problem(seed, tasks)
    patient = theirs.MGDA(epsilon=1e-9, max_iters=3000)
    assert difference(MGDA()(rows), patient(rows)) < 1e-2
    assert MGDA()(rows).norm() <= patient(rows).norm() * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_cagrad_is_equal_without_rescale(seed: int) -> None:
    rows = problem(seed, tasks=2 + seed % 5)
    c = [0.2, 0.5, 0.8][seed % 3]
    # Their solver stops at a gap of 1e-8, which leaves about its root in the direction.
    assert difference(CAGrad(c=c, rescale=0)(rows), their_cagrad(c, norm_eps=0.0)(rows)) < 1e-3


@pytest.mark.parametrize(
    ("ours", "other"), [(MGDA, theirs.MGDA), (IMTLG, theirs.IMTLG), (PCGrad, theirs.PCGrad)]
)
def test_equal_on_the_example_of_their_documentation(ours: type, other: type) -> None:
    assert difference(ours()(PAPER), other()(PAPER)) < 1e-9


def test_cagrad_on_the_example_of_their_documentation() -> None:
    assert difference(CAGrad(c=0.5, rescale=0)(PAPER), their_cagrad(0.5)(PAPER)) < 1e-6


# -------------------------------------------------------------------------------- differences


@pytest.mark.parametrize("c", [0.2, 0.5, 0.8])
def test_cagrad_is_divided_by_1_plus_c_squared_by_default(c: float) -> None:
    ours = CAGrad(c=c)(CONFLICT)
    assert difference(ours * (1 + c**2), their_cagrad(c)(CONFLICT)) < 1e-3
    assert difference(ours, their_cagrad(c)(CONFLICT)) > 0.03


@pytest.mark.parametrize("scale", [1e-4, 1e-6])
def test_their_cagrad_gives_up_small_gradients(scale: float) -> None:
    other = their_cagrad(0.4)
    ours = CAGrad(c=0.4, rescale=0)
    assert difference(other(CONFLICT), ours(CONFLICT)) < 1e-3
    assert torch.equal(other(scale * CONFLICT), torch.zeros(2, dtype=torch.float64))
    assert difference(ours(scale * CONFLICT) / scale, ours(CONFLICT)) < 1e-9


@pytest.mark.parametrize("gradient", [[1.0, 2.0], [1.0, 0.0]])
def test_their_imtlg_climbs_when_gradients_are_opposite(gradient: list[float]) -> None:
    first = torch.tensor(gradient, dtype=torch.float64)
    rows = torch.stack([first, -2 * first])
    other = theirs.IMTLG()(rows)
    assert other.norm() > first.norm()
    assert (rows @ other).min() < -1  # one task goes up, the other down
    # Equal projections on two opposite unit vectors: only the zero vector has them.
    assert IMTLG()(rows).norm() < 1e-12


def test_their_imtlg_does_not_project_alike_in_too_few_dimensions() -> None:
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    projections = rows @ theirs.IMTLG()(rows)  # the rows are unit vectors
    assert projections.max() - projections.min() > 0.9
    ours = rows @ IMTLG()(rows)
    assert ours.max() - ours.min() < 1e-12


def test_their_mgda_is_too_long_for_many_tasks() -> None:
    for seed in range(5):
        rows = problem(seed, tasks=40)
        ours, other = MGDA()(rows), theirs.MGDA()(rows)
        assert ((rows @ ours).min() >= ours.square().sum() * (1 - 1e-8)).item()
        assert other.norm() > 1.003 * ours.norm()
        # Theirs is not the shortest: some task gains less than the squared length.
        assert (rows @ other).min() < 0.99 * other.square().sum()


def test_pcgrad_of_three_draws_orders_of_its_own() -> None:
    # Same method, other random numbers: each gives some of the same eight directions.
    rows = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [-2.0, -1.0]], dtype=torch.float64)
    torch.manual_seed(0)
    ours, other = PCGrad(), theirs.PCGrad()
    seen = [
        {tuple((aggregator(rows) * 1e6).round().long().tolist()) for _ in range(200)}
        for aggregator in (ours, other)
    ]
    assert seen[0] == seen[1]
    assert len(seen[0]) == 8
