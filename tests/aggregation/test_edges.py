"""Zero, opposite, collinear, unlike and non-finite gradients; bad parameters."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from reference import aggregation as reference

from equipoise.aggregation import IMTLG, MGDA, CAGrad, Mean, PCGrad, Sum
from equipoise.errors import NonFiniteError, TaskError

EVERY = [
    Sum,
    Mean,
    MGDA,
    lambda: MGDA(normalize="l2"),
    lambda: MGDA(zero="drop"),
    PCGrad,
    lambda: PCGrad(reduction="mean"),
    CAGrad,
    lambda: CAGrad(c=0.0),
    lambda: CAGrad(c=0.9, rescale=0),
    IMTLG,
]
every = pytest.mark.parametrize("make", EVERY)
Make = Callable[[], torch.nn.Module]


def rows(*gradients: list[float]) -> torch.Tensor:
    """Give the gradients as float64 rows."""
    return torch.tensor(gradients, dtype=torch.float64)


def close(actual: torch.Tensor, expected: list[float], tolerance: float = 1e-8) -> None:
    """Compare with an absolute bound."""
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=tolerance)


# --------------------------------------------------------------------------------------- zero


@every
@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_all_gradients_zero_give_no_direction(make: Make, tasks: int) -> None:
    close(make()(torch.zeros(tasks, 4, dtype=torch.float64)), [0, 0, 0, 0], 0)
    coefficients = make().coefficients(torch.zeros(tasks, tasks, dtype=torch.float64))
    assert coefficients.shape == (tasks,)
    assert torch.isfinite(coefficients).all()


@pytest.mark.parametrize("normalize", [None, "l2"])
def test_mgda_keeps_a_zero_gradient_as_a_stationary_task(normalize: str | None) -> None:
    with_zero = rows([3, 0], [0, 0], [0, 4])
    close(MGDA(normalize=normalize)(with_zero), [0, 0], 0)


def test_mgda_drops_a_zero_gradient_if_told() -> None:
    with_zero = rows([3, 0], [0, 0], [0, 4])
    close(MGDA(zero="drop")(with_zero), [1.92, 1.44])
    close(MGDA(zero="drop").coefficients(with_zero @ with_zero.T), [0.64, 0, 0.36])
    close(MGDA(normalize="l2", zero="drop")(with_zero), [1.5, 2])


def test_pcgrad_takes_a_zero_gradient_as_no_conflict() -> None:
    with_zero = rows([1, 0], [0, 0], [-1, 1])
    close(PCGrad()(with_zero), [0.5, 1.5])
    close(PCGrad().coefficients(with_zero @ with_zero.T), [2, 1, 1.5])


@pytest.mark.parametrize(("rescale", "divisor"), [(0, 1.0), (1, 1.16), (2, 1.4)])
def test_cagrad_with_a_zero_gradient_is_the_mean(rescale: int, divisor: float) -> None:
    with_zero = rows([3, 0], [0, 0], [0, 3])
    close(CAGrad(rescale=rescale)(with_zero), [1 / divisor, 1 / divisor])
    coefficients = CAGrad(rescale=rescale).coefficients(with_zero @ with_zero.T)
    close(coefficients[[0, 2]], [1 / 3 / divisor, 1 / 3 / divisor])
    assert 0 <= coefficients[1] <= 1  # it changes nothing, but must not be huge


def test_cagrad_with_gradients_that_cancel_stands_still() -> None:
    close(CAGrad()(rows([1, 0], [-1, 1], [0, -1])), [0, 0])
    close(CAGrad()(rows([1, 2], [-1, -2])), [0, 0])


def test_imtlg_drops_a_zero_gradient() -> None:
    with_zero = rows([3, 0], [0, 0], [0, 4])
    close(IMTLG()(with_zero), [12 / 7, 12 / 7])
    close(IMTLG().coefficients(with_zero @ with_zero.T), [4 / 7, 0, 3 / 7])


# ------------------------------------------------------------------------ opposite, collinear


@pytest.mark.parametrize(
    ("aggregator", "direction"),
    [
        (Sum(), [-1, -2]),
        (Mean(), [-0.5, -1]),
        (MGDA(), [0, 0]),
        (MGDA(normalize="l2"), [-0.5, -1]),  # half of each unit gradient; the weights are even
        (PCGrad(), [0, 0]),
        (CAGrad(c=0.4, rescale=0), [-0.5 * 0.6, -1 * 0.6]),  # (1 - c) g_0
        (CAGrad(c=0.9, rescale=0), [-0.5 * 0.1, -1 * 0.1]),
        (CAGrad(c=0.4, rescale=1), [-0.5 * 0.6 / 1.16, -1 * 0.6 / 1.16]),
        (IMTLG(), [0, 0]),
    ],
)
def test_opposite(aggregator: torch.nn.Module, direction: list[float]) -> None:
    close(aggregator(rows([1, 2], [-2, -4])), direction, 1e-7)


def test_opposite_weights() -> None:
    gram = torch.tensor([[5.0, -10.0], [-10.0, 20.0]], dtype=torch.float64)  # g and -2 g
    close(MGDA().coefficients(gram), [2 / 3, 1 / 3])
    close(IMTLG().coefficients(gram), [2 / 3, 1 / 3])


@pytest.mark.parametrize(
    ("aggregator", "direction"),
    [
        (MGDA(), [1, 2]),  # the shortest
        (MGDA(normalize="l2"), None),  # any weights on unit gradients that are one and the same
        (PCGrad(), [9, 18]),
        (CAGrad(c=0.4, rescale=0), [4.2, 8.4]),
        (CAGrad(c=0.4, rescale=2), [3, 6]),
        (IMTLG(), [3, 6]),  # all projections are equal whatever the weights: the even ones
    ],
)
def test_collinear(aggregator: torch.nn.Module, direction: list[float] | None) -> None:
    result = aggregator(rows([3, 6], [1, 2], [5, 10]))
    if direction is None:
        assert 1 - 1e-8 <= result[0] <= 5 + 1e-8
        assert result[1].item() == pytest.approx(2 * result[0].item(), rel=1e-12)
    else:
        close(result, direction, 1e-7)


def test_collinear_and_one_more() -> None:
    doubled = rows([2, 0], [1, 0], [0, 1])
    close(MGDA()(doubled), [0.5, 0.5])
    # Weights (a, b, y): equal projections mean y = 2a + b, a sum of 1 then 3a + 2b = 1. They are
    # free along (2, -3, 1); the nearest to even ones have 2a - 3b + y = 0, so 7a = 1.
    close(IMTLG().coefficients(doubled @ doubled.T), [1 / 7, 2 / 7, 4 / 7])
    close(IMTLG()(doubled), [4 / 7, 4 / 7])


@every
def test_one_task_keeps_its_direction(make: Make) -> None:
    gradient = [0.5, -2.0, 1.0]
    result = make()(rows(gradient))
    factor = result[0] / gradient[0]
    assert 0.9 <= factor <= 2
    close(result, [float(factor) * entry for entry in gradient])


@every
@pytest.mark.parametrize("gap", [1e-4, 1e-8, 1e-12])
def test_nearly_equal_gradients_give_nearly_their_direction(make: Make, gap: float) -> None:
    result = make()(rows([1, 0, 0], [1, gap, 0], [1, 0, gap]))
    factor = result[0].item()
    assert 0.9 <= factor <= 3.1
    close(result, [factor, 0, 0], 10 * gap + 1e-7)


@every
@pytest.mark.parametrize("gap", [1e-4, 1e-8, 1e-12])
def test_nearly_opposite_gradients_give_nothing_large(make: Make, gap: float) -> None:
    result = make()(rows([1, 0], [-1, gap]))
    assert torch.isfinite(result).all()
    assert result.norm() <= 1e-7 + 2 * gap


# ------------------------------------------------------------------------------ unlike lengths


def unlike(seed: int, spread: float) -> np.ndarray:
    """Give (T, P) rows whose lengths spread over the given factor."""
    rng = np.random.default_rng(seed)
    tasks, parameters = int(rng.integers(2, 8)), int(rng.integers(2, 12))
    even = rng.normal(size=(tasks, parameters)) + 2 * rng.random()
    return even * spread ** rng.uniform(-0.5, 0.5, size=(tasks, 1))


@pytest.mark.parametrize("spread", [1e2, 1e4, 1e6, 1e8])
@pytest.mark.parametrize("seed", range(30))
def test_mgda_of_unlike_lengths_is_exact_in_the_size_of_the_answer(
    seed: int, spread: float
) -> None:
    # The answer is about as short as the shortest gradient: a bound relative to the longest one
    # would accept anything.
    gradients = unlike(seed, spread)
    expected = reference.mgda(gradients)
    actual = MGDA()(torch.from_numpy(gradients)).numpy()
    shortest = np.linalg.norm(gradients, axis=1).min()
    if np.linalg.norm(expected) < 1e-6 * shortest:  # stationary: the answer is 0
        assert np.linalg.norm(actual) <= 1e-6 * shortest
        return
    assert np.linalg.norm(actual - expected) <= 1e-6 * np.linalg.norm(expected)
    assert (gradients @ actual).min() >= (actual @ actual) * (1 - 1e-8)


@pytest.mark.parametrize("spread", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("seed", range(30))
def test_cagrad_and_imtlg_of_unlike_lengths(seed: int, spread: float) -> None:
    gradients = unlike(seed, spread)
    jacobian = torch.from_numpy(gradients)
    expected = reference.cagrad(gradients, 0.4, 0)
    change = 0.4 * np.linalg.norm(gradients.mean(axis=0))
    actual = CAGrad(c=0.4, rescale=0)(jacobian).numpy()
    assert np.linalg.norm(actual - expected) <= 1e-6 * change
    weights = reference.imtlg_weights(gradients)
    added = np.abs(weights) @ np.linalg.norm(gradients, axis=1)
    assert np.linalg.norm(IMTLG()(jacobian).numpy() - weights @ gradients) <= 1e-6 * added


@pytest.mark.parametrize("spread", [1e2, 1e4, 1e6, 1e8])
@pytest.mark.parametrize("seed", range(10))
def test_imtlg_projections_are_equal_in_the_size_of_the_answer(seed: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    tasks = int(rng.integers(2, 8))
    gradients = rng.normal(size=(tasks, tasks + 4)) + rng.random()
    gradients = gradients * spread ** rng.uniform(-0.5, 0.5, size=(tasks, 1))
    jacobian = torch.from_numpy(gradients)
    weights = IMTLG().coefficients(jacobian @ jacobian.T).numpy()
    units = gradients / np.linalg.norm(gradients, axis=1, keepdims=True)
    projections = units @ (weights @ gradients)
    assert np.ptp(projections) <= 1e-8 * np.abs(projections).max()
    assert weights.sum() == pytest.approx(1, rel=1e-9)


# ------------------------------------------------------------------------- input, dtype, state


@every
def test_coefficients_give_the_direction(make: Make) -> None:
    jacobian = rows([1, 0, 2], [-1, 1, 0], [0.5, 0.5, -4], [3, 1, 1])
    torch.manual_seed(5)
    direction = make()(jacobian)
    torch.manual_seed(5)
    weights = make().coefficients(jacobian @ jacobian.T)
    assert weights.dtype == torch.float64
    close(direction, (jacobian.T @ weights).tolist(), 1e-12)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_stay_and_the_direction_has_their_dtype(make: Make, dtype: torch.dtype) -> None:
    jacobian = torch.tensor([[1.0, 0.0, 2.0], [-1.0, 1.0, 0.0]], dtype=dtype)
    before = jacobian.clone()
    direction = make()(jacobian)
    assert torch.equal(jacobian, before)
    assert direction.dtype == dtype
    assert direction.shape == (3,)
    assert not direction.requires_grad


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e-12, 1e12, 1e22, 1e30])
@pytest.mark.parametrize(
    ("aggregator", "direction"),
    [
        (MGDA(), [0.2, 0.4]),
        (CAGrad(rescale=0), [0.2, 0.5]),
        (IMTLG(), [0.17157288, 0.41421356]),
        (PCGrad(), [0.5, 1.5]),
    ],
)
def test_float32_rows_whose_squares_leave_float32(
    aggregator: torch.nn.Module, direction: list[float], scale: float
) -> None:
    jacobian = torch.tensor([[1.0, 0.0], [-1.0, 1.0]]) * scale
    close(aggregator(jacobian).double() / scale, direction, 1e-6)


def test_pcgrad_draws_from_a_generator_of_its_own() -> None:
    jacobian = rows([1, 0], [-1, 1], [-2, -1])
    torch.manual_seed(0)
    first, second = PCGrad(), PCGrad()
    state = torch.get_rng_state()
    ours = [first(jacobian).tolist() for _ in range(20)]
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    theirs = [second(jacobian).tolist() for _ in range(20)]
    assert ours != theirs
    torch.manual_seed(0)
    again = PCGrad()
    assert [again(jacobian).tolist() for _ in range(20)] == ours


def test_pcgrad_continues_from_its_state() -> None:
    jacobian = rows([1, 0], [-1, 1], [-2, -1])
    pcgrad = PCGrad(generator=torch.Generator().manual_seed(4))
    for _ in range(3):
        pcgrad(jacobian)
    state = pcgrad.state_dict()
    following = [pcgrad(jacobian) for _ in range(10)]
    fresh = PCGrad()
    fresh.load_state_dict(state)
    for expected in following:
        assert torch.equal(fresh(jacobian), expected)


# ---------------------------------------------------------------------------------- refusals


@every
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_non_finite_row_is_named(make: Make, value: float, dtype: torch.dtype) -> None:
    jacobian = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [0.0, 2.0]], dtype=dtype)
    jacobian[1, 0] = value
    with pytest.raises(NonFiniteError) as error:
        make()(jacobian)
    assert error.value.task == 1


@pytest.mark.parametrize(
    "bad",
    [
        lambda: MGDA(normalize="l1"),
        lambda: MGDA(normalize="l2", combine="both"),
        lambda: MGDA(combine="normalized"),
        lambda: MGDA(zero="forget"),
        lambda: PCGrad(reduction="max"),
        lambda: CAGrad(c=-0.1),
        lambda: CAGrad(c=float("nan")),
        lambda: CAGrad(rescale=3),
    ],
)
def test_bad_parameters_are_refused(bad: Make) -> None:
    with pytest.raises(ValueError, match=r"."):
        bad()


@pytest.mark.parametrize("normalize", ["loss", "loss+"])
def test_mgda_by_losses_needs_positive_ones(normalize: str) -> None:
    jacobian = rows([3, 0], [0, 4])
    with pytest.raises(ValueError, match="loss"):
        MGDA(normalize=normalize)(jacobian)
    with pytest.raises(TaskError, match="task 1: loss is 0; .* positive"):
        MGDA(normalize=normalize)(jacobian, losses=torch.tensor([1.0, 0.0]))


def test_imtl_g_where_no_weights_of_sum_one_give_equal_projections() -> None:
    # G^-1 n is (1, 1, -2) up to its length: it cannot be scaled to sum 1. The direction stays
    # of the size of the gradients instead of growing without bound.
    rows = torch.tensor([[6, 0, 0], [0, 6, 0], [2, 2, 1]], dtype=torch.float64) / 6
    weights = IMTLG().coefficients(rows @ rows.T)
    assert float(weights.sum()) == pytest.approx(1, abs=0.05)  # in the sense of least squares
    assert float(weights.abs().max()) < 2
