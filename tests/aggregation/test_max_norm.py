"""MaxNorm and DBMTL: known answers, a plain-Python reference, promises, state."""

import io

import numpy as np
import pytest
import torch
from reference.problems import size, task_gradients
from reference.weighting_more import DualBalancing

from equipoise.aggregation import DBMTL, MaxNorm
from equipoise.errors import EquipoiseError, NonFiniteError
from equipoise.recipe import METHODS, Recipe

SEEDS = range(200)


def rows(*values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(actual: torch.Tensor, expected: list[float], tolerance: float = 1e-9) -> None:
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=tolerance)


# ---------------------------------------------------------------------------- known answers


def test_max_norm_brings_all_to_the_longest() -> None:
    close(MaxNorm()(rows([3, 0], [0, 4])), [4, 4])
    close(MaxNorm().coefficients(torch.diag(torch.tensor([9.0, 16.0]))), [4 / 3, 1])
    close(MaxNorm()(rows([1, 0], [-1, 1])), [np.sqrt(2) - 1, 1])


def test_max_norm_special_rows() -> None:
    close(MaxNorm()(rows([1, 2], [1, 2])), [2, 4])  # unanimity: T g
    close(MaxNorm()(rows([1, 0], [-5, 0])), [0, 0])  # opposite
    close(MaxNorm()(rows([1, 0], [5, 0])), [10, 0])  # collinear
    close(MaxNorm()(rows([0, 0], [3, 4])), [3, 4])  # a zero row takes no part
    close(MaxNorm()(rows([0, 0], [0, 0])), [0, 0])


def test_db_mtl_known_answers() -> None:
    aggregator = DBMTL(n_tasks=2, beta=0.5)
    close(aggregator(rows([2, 0], [0, 8])), [4, 4])  # averages (1, 0) and (0, 4)
    # Averages (1/2, 2) and (0, 2): the first has length sqrt(17) / 2.
    stretch = np.sqrt(17) / 4
    close(aggregator(rows([0, 4], [0, 0])), [0.5, 2 + 2 * stretch])


def test_db_mtl_decay() -> None:
    aggregator = DBMTL(n_tasks=1, beta=0.5, decay=1.0)
    close(aggregator(rows([4.0])), [2])  # b = 1/2
    close(aggregator(rows([4.0])), [3.5])  # b = 1/4
    close(aggregator(rows([0.0])), [3.5 / 6])  # b = 1/6


def test_db_mtl_keeps_the_average_of_an_absent_task() -> None:
    aggregator = DBMTL(n_tasks=3, beta=0.5, decay=1.0)
    aggregator(rows([4, 0], [0, 4], [4, 4]))
    average = aggregator.average.clone()
    aggregator.begin(torch.tensor([True, False, True]))
    close(aggregator(rows([4, 0], [0, 4])), rows([3.5, 0], [0.5, 3.5]).sum(0).tolist(), 0.1)
    close(aggregator.average[1], average[1].tolist(), 0)
    close(aggregator.average[0], [3.5, 0])  # b = 1/4
    assert aggregator.steps.tolist() == [2, 1, 2]


# -------------------------------------------------------------------------------- reference


@pytest.mark.parametrize("seed", SEEDS)
def test_max_norm_is_db_mtl_without_an_average(seed: int) -> None:
    gradients = task_gradients(seed)
    expected = DualBalancing(beta=0.0).call(gradients.tolist())
    found = MaxNorm()(torch.from_numpy(gradients)).numpy()
    bound = 1e-9 * len(gradients) ** 2 * size(gradients) * 10
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=bound)


@pytest.mark.parametrize("seed", SEEDS)
def test_db_mtl(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tasks, parameters = int(rng.integers(2, 21)), int(rng.integers(2, 41))
    beta, decay = [0.0, 0.5, 0.9][seed % 3], [0.0, 0.5][seed % 2]
    scales = 10 ** rng.uniform(-3, 3, size=(tasks, 1)) * 10 ** rng.uniform(-6, 6)
    ours, oracle = DBMTL(tasks, beta, decay), DualBalancing(beta, decay)
    for _ in range(5):
        gradients = scales * rng.normal(size=(tasks, parameters))
        expected = np.array(oracle.call(gradients.tolist()))
        found = ours(torch.from_numpy(gradients)).numpy()
        assert np.abs(found - expected).max() <= 1e-9 * np.abs(expected).max()


# -------------------------------------------------------------------------------- promises


@pytest.mark.parametrize("seed", range(50))
def test_two_tasks_never_conflict(seed: int) -> None:
    gradients = torch.from_numpy(task_gradients(seed)[:2])
    direction = MaxNorm()(gradients)
    slack = 1e-9 * gradients.norm(dim=1).max() ** 2
    assert (gradients @ direction >= -slack).all()


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scale(scale: float, dtype: torch.dtype) -> None:
    gradients = torch.randn(5, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    for make in (MaxNorm, lambda: DBMTL(5)):
        plain, scaled = make()(gradients), make()(scale * gradients)
        assert scaled.dtype == dtype
        torch.testing.assert_close(scaled / scale, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("done", [0, 1, 4])
def test_the_average_is_saved_bit_for_bit(dtype: torch.dtype, done: int) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = torch.randn(done + 4, 3, 7, generator=generator, dtype=dtype)
    aggregator = DBMTL(3)
    for gradients in batches[:done]:
        aggregator(gradients)
    file = io.BytesIO()
    torch.save(aggregator.state_dict(), file)
    file.seek(0)
    following = [aggregator(gradients) for gradients in batches[done:]]
    for loaded in (DBMTL(3), DBMTL(3)):
        loaded.load_state_dict(torch.load(file))
        file.seek(0)
        for gradients, expected in zip(batches[done:], following, strict=True):
            assert torch.equal(loaded(gradients), expected)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="beta"):
        DBMTL(2, beta=1.0)
    with pytest.raises(ValueError, match="decay"):
        DBMTL(2, decay=-0.5)
    with pytest.raises(ValueError, match="n_tasks"):
        DBMTL(0)
    aggregator = DBMTL(3)
    with pytest.raises(EquipoiseError, match="of which 3 are present, but there are 2 rows"):
        aggregator(torch.ones(2, 4))
    with pytest.raises(ValueError, match="shape"):
        aggregator(torch.ones(4))
    aggregator(torch.ones(3, 4))
    before = aggregator.average.clone()
    with pytest.raises(NonFiniteError) as error:
        aggregator(torch.tensor([[1.0] * 4, [1.0] * 4, [torch.nan] * 4]))
    assert error.value.task == 2
    assert torch.equal(aggregator.average, before)
    assert aggregator.steps.tolist() == [1, 1, 1]


# ---------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("text", "weighting", "canonical"),
    [
        ("db-mtl", "si", "db-mtl"),
        ("DBMTL(beta=0.5)", "si", "db-mtl(beta=0.5)"),
        ("si+db-mtl", "si", "db-mtl"),
        ("ew+db-mtl", "ew", "ew+db-mtl"),
        ("db-mtl+igbv1", "igbv1", "igbv1+db-mtl"),
        ("si(cap=0.5)+db-mtl", "si", "si(cap=0.5)+db-mtl"),
        ("max-norm", "ew", "max-norm"),
        ("si+max-norm-ub", "si", "si+max-norm-ub"),
    ],
)
def test_db_mtl_brings_the_logarithm(text: str, weighting: str, canonical: str) -> None:
    recipe = Recipe.parse(text)
    assert recipe.weighting.method.token == weighting
    assert str(recipe) == canonical
    assert Recipe.parse(canonical) == recipe


def test_an_average_of_feature_gradients_is_not_offered() -> None:
    assert "db-mtl-ub" not in METHODS
    assert "max-norm-ub" in METHODS
