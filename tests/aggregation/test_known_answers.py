"""Answers worked out by hand, asked of the library and of the slow references alike."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from reference import aggregation as reference

from equipoise.aggregation import IMTLG, MGDA, CAGrad, Mean, PCGrad, Sum

Rows = list[list[float]]
Aggregate = Callable[[Rows], np.ndarray]

PAPER = [[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]  # also the example of TorchJD's documentation
ORTHOGONAL = [[3.0, 0.0], [0.0, 4.0]]
CONFLICT = [[1.0, 0.0], [-1.0, 1.0]]


def library(aggregator: torch.nn.Module) -> Aggregate:
    """Take rows as lists, give the library's direction."""
    return lambda rows: aggregator(torch.tensor(rows, dtype=torch.float64)).numpy()


def oracle(function: Callable[..., np.ndarray], **options: object) -> Aggregate:
    """Take rows as lists, give the reference's direction."""
    return lambda rows: function(np.array(rows, dtype=float), **options)


def weights_of(aggregator: torch.nn.Module, rows: Rows) -> np.ndarray:
    """Give the library's coefficients on the Gram matrix of the rows."""
    jacobian = torch.tensor(rows, dtype=torch.float64)
    return aggregator.coefficients(jacobian @ jacobian.T).numpy()


def two(rows: np.ndarray) -> np.ndarray:
    """PCGrad of two tasks, which leaves no choice of order."""
    return reference.pcgrad(rows, [[1], [0]])


def close(actual: np.ndarray, expected: list[float], tolerance: float = 1e-6) -> None:
    """Compare with an absolute bound: the answers are of order 1."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


both_mgda = pytest.mark.parametrize("mgda", [library(MGDA()), oracle(reference.mgda)])
both_imtlg = pytest.mark.parametrize("imtlg", [library(IMTLG()), oracle(reference.imtlg)])
both_cagrad = pytest.mark.parametrize(
    "cagrad",
    [
        lambda rows, c, rescale=0: library(CAGrad(c=c, rescale=rescale))(rows),
        lambda rows, c, rescale=0: oracle(reference.cagrad, c=c, rescale=rescale)(rows),
    ],
    ids=["library", "reference"],
)


# --------------------------------------------------------------------------------- two tasks


@pytest.mark.parametrize(
    ("rows", "direction"),
    [(PAPER, [0, 1, 1]), (ORTHOGONAL, [1.92, 1.44]), (CONFLICT, [0.2, 0.4])],
)
@both_mgda
def test_mgda_of_two(mgda: Aggregate, rows: Rows, direction: list[float]) -> None:
    close(mgda(rows), direction, 1e-12)


@pytest.mark.parametrize(
    ("rows", "weights"),
    [(PAPER, [0.6, 0.4]), (ORTHOGONAL, [0.64, 0.36]), (CONFLICT, [0.6, 0.4])],
)
def test_mgda_weights_of_two(rows: Rows, weights: list[float]) -> None:
    close(weights_of(MGDA(), rows), weights, 1e-12)


@pytest.mark.parametrize(
    ("rows", "direction"),
    [
        (PAPER, [0.07669683, 1, 1]),
        (ORTHOGONAL, [12 / 7, 12 / 7]),
        (CONFLICT, [0.17157288, 0.41421356]),
    ],
)
@both_imtlg
def test_imtlg_of_two(imtlg: Aggregate, rows: Rows, direction: list[float]) -> None:
    close(imtlg(rows), direction, 1e-8)


@pytest.mark.parametrize(
    ("rows", "weights"),
    [
        (PAPER, [0.59233032, 0.40766968]),
        (ORTHOGONAL, [4 / 7, 3 / 7]),
        (CONFLICT, [2 - math.sqrt(2), math.sqrt(2) - 1]),
    ],
)
def test_imtlg_weights_of_two_are_the_swapped_lengths(rows: Rows, weights: list[float]) -> None:
    close(weights_of(IMTLG(), rows), weights, 1e-8)


@pytest.mark.parametrize(
    ("rows", "c", "direction"),
    [
        (PAPER, 0.4, [0.34680274, 1.16329932, 1.16329932]),
        (PAPER, 0.5, [0.18350342, 1.20412415, 1.20412415]),
        (ORTHOGONAL, 0.4, [2.5, 2]),
        (CONFLICT, 0.4, [0.2, 0.5]),
        (CONFLICT, 0.8, [0.34832397, 0.69664794]),
        (CONFLICT, 0.0, [0, 0.5]),
    ],
)
@both_cagrad
def test_cagrad_of_two(
    cagrad: Callable[..., np.ndarray], rows: Rows, c: float, direction: list[float]
) -> None:
    close(cagrad(rows, c), direction, 1e-8)


@pytest.mark.parametrize(("rescale", "divisor"), [(0, 1.0), (1, 1.16), (2, 1.4)])
@both_cagrad
def test_cagrad_rescale_divides(
    cagrad: Callable[..., np.ndarray], rescale: int, divisor: float
) -> None:
    close(cagrad(CONFLICT, 0.4, rescale), [0.2 / divisor, 0.5 / divisor], 1e-12)


def test_cagrad_defaults_to_c_of_04_and_division_by_1_plus_c_squared() -> None:
    close(library(CAGrad())(CONFLICT), [0.2 / 1.16, 0.5 / 1.16], 1e-12)


def test_cagrad_coefficients_hold_the_mean_and_the_dual_weights() -> None:
    # w = (1, 0): d = g_0 + 0.4 |g_0| g_1 / |g_1| with |g_0| = 1/2, |g_1| = 1.
    close(weights_of(CAGrad(c=0.4, rescale=0), CONFLICT), [0.7, 0.5], 1e-12)
    # w = (0.73483997, 0.26516003), |g_w| by hand from these.
    share = np.array([0.73483997, 0.26516003])
    length = np.linalg.norm(share @ np.array(CONFLICT))
    close(weights_of(CAGrad(c=0.8, rescale=0), CONFLICT), 0.5 + 0.4 * share / length, 1e-7)


@pytest.mark.parametrize(
    ("rows", "direction"),
    [
        (PAPER, [0.58479532, 3.80116959, 3.80116959]),
        (ORTHOGONAL, [3, 4]),
        (CONFLICT, [0.5, 1.5]),
    ],
)
@pytest.mark.parametrize("pcgrad", [library(PCGrad()), oracle(two)])
def test_pcgrad_of_two(pcgrad: Aggregate, rows: Rows, direction: list[float]) -> None:
    close(pcgrad(rows), direction, 1e-8)


@pytest.mark.parametrize(
    ("rows", "weights"),
    [(PAPER, [2.22222222, 1.57894737]), (ORTHOGONAL, [1, 1]), (CONFLICT, [2, 1.5])],
)
def test_pcgrad_weights_of_two(rows: Rows, weights: list[float]) -> None:
    close(weights_of(PCGrad(), rows), weights, 1e-8)
    close(weights_of(PCGrad(reduction="mean"), rows), [w / 2 for w in weights], 1e-8)


def test_sum_and_mean() -> None:
    rows = [[1.0, 2.0], [3.0, -5.0], [0.5, 0.0]]
    close(library(Sum())(rows), [4.5, -3], 1e-15)
    close(library(Mean())(rows), [1.5, -1], 1e-15)
    close(weights_of(Sum(), rows), [1, 1, 1], 0)
    close(weights_of(Mean(), rows), [1 / 3] * 3, 1e-15)


# ------------------------------------------------------------------------ F-MTL's quadratics


@pytest.mark.parametrize(
    ("aggregate", "direction"),
    [
        (library(Mean()), [-0.5, 3.5]),
        (library(MGDA()), [-0.5, 3.5]),
        (library(IMTLG()), [-0.5, 3.5]),
        (library(PCGrad()), [-1, 7]),
        (library(CAGrad()), [-0.5 * 1.4 / 1.16, 3.5 * 1.4 / 1.16]),
    ],
)
def test_orthogonal_gradients_of_one_length_agree_on_the_middle(
    aggregate: Aggregate, direction: list[float]
) -> None:
    close(aggregate([[3, 4], [-4, 3]]), direction, 1e-12)


def test_flat_parts_of_two_quadratics() -> None:
    flat = [[0.3, 1.6], [-0.8, 0.3]]
    close(library(MGDA())(flat), [-0.61413793, 0.51965517], 1e-8)
    close(weights_of(MGDA(), flat), [0.16896552, 0.83103448], 1e-8)
    close(library(IMTLG())(flat), [-0.92138055 + 0.5, 4.24745935 - 3.5], 1e-8)
    loss_part = np.array([-0.5, 3.5]) * 1.4 / 1.16
    close(library(CAGrad())(flat) + loss_part, [-1.13613706, 5.16204278], 1e-8)


def test_sam_gradients_of_two_quadratics() -> None:
    sam = [[3.3, 5.6], [-4.8, 3.3]]
    close(library(MGDA())(sam), [-1.22526093, 4.31504937], 1e-8)
    close(library(IMTLG())(sam), [-0.97182387, 4.38701298], 1e-8)
    close(library(CAGrad())(sam), [-1.46508784, 5.15965717], 1e-8)
    close(library(PCGrad())(sam), [-1.5, 8.9], 1e-12)


# ----------------------------------------------------------------------- three tasks or more


@both_mgda
def test_mgda_of_orthogonal_gradients_weighs_by_inverse_squares(mgda: Aggregate) -> None:
    # w_i = (1/n_i^2) / sum(1/n_j^2) with n = 1, 2, 3: (36, 9, 4) / 49.
    rows = [[1, 0, 0], [0, 2, 0], [0, 0, 3]]
    close(mgda(rows), [36 / 49, 18 / 49, 12 / 49], 1e-12)
    close(weights_of(MGDA(), rows), [36 / 49, 9 / 49, 4 / 49], 1e-12)


@both_mgda
def test_mgda_gives_no_weight_to_a_task_that_gains_enough(mgda: Aggregate) -> None:
    rows = [[1, 0], [0, 1], [3, 3]]
    close(mgda(rows), [0.5, 0.5], 1e-12)
    close(weights_of(MGDA(), rows), [0.5, 0.5, 0], 1e-12)


@both_mgda
def test_mgda_inside_a_triangle_is_stationary(mgda: Aggregate) -> None:
    rows = [[1, 0], [-1, 1], [-1, -1]]
    close(mgda(rows), [0, 0], 1e-7)
    close(weights_of(MGDA(), rows), [0.5, 0.25, 0.25], 1e-7)


@both_mgda
def test_mgda_in_space_uses_two_of_four(mgda: Aggregate) -> None:
    # The hull's nearest point (1, 0, 0) lies between the first two; the others are further along x.
    rows = [[1, 2, 0], [1, -1, 0], [2, 0, 5], [4, 0, -3]]
    close(mgda(rows), [1, 0, 0], 1e-12)
    close(weights_of(MGDA(), rows), [1 / 3, 2 / 3, 0, 0], 1e-12)


@pytest.mark.parametrize(
    ("normalize", "direction"),
    [
        (None, [1.92, 1.44]),  # w = (16, 9) / 25
        ("l2", [1.5, 2.0]),  # unit vectors: w = (1, 1) / 2
        ("loss", [48 / 17, 4 / 17]),  # (1, 0) and (0, 4): w = (16, 1) / 17
        ("loss+", [2.7, 0.4]),  # (1/3, 0) and (0, 1): w = (9, 1) / 10
    ],
)
def test_mgda_normalised_weights_multiply_the_raw_gradients(
    normalize: str | None, direction: list[float]
) -> None:
    rows = torch.tensor(ORTHOGONAL, dtype=torch.float64)
    losses = torch.tensor([3.0, 1.0], dtype=torch.float64)
    close(MGDA(normalize=normalize)(rows, losses=losses).numpy(), direction, 1e-12)
    close(reference.mgda(rows.numpy(), normalize, losses.numpy()), direction, 1e-12)


@both_cagrad
def test_cagrad_of_orthonormal_gradients_lengthens_the_mean(
    cagrad: Callable[..., np.ndarray],
) -> None:
    close(cagrad(np.eye(4).tolist(), 0.4), [1.4 / 4] * 4, 1e-9)


@pytest.mark.parametrize(
    ("c", "direction"),
    [
        (0.25, [1 / 4, 5 / 12]),  # c <= 1/3: all dual weight on (-1, 1)
        # Dual along the hull g(s) = (1 - 2s, s): stationary where 7.5 s^2 - 6 s + 1 = 0, so
        # s = (6 + sqrt 6) / 15, |g(s)| = 1/sqrt 3, d = g_0 + g(s) / sqrt 6.
        (
            0.5,
            [
                1 / 3 + (3 - 2 * math.sqrt(6)) / 15 / math.sqrt(6),
                1 / 3 + (6 + math.sqrt(6)) / 15 / math.sqrt(6),
            ],
        ),
    ],
)
@both_cagrad
def test_cagrad_with_a_doubled_task(
    cagrad: Callable[..., np.ndarray], c: float, direction: list[float]
) -> None:
    close(cagrad([[1, 0], [1, 0], [-1, 1]], c), direction, 1e-9)


@both_cagrad
def test_cagrad_with_stationary_gradients_and_a_zero_optimum_is_the_mean(
    cagrad: Callable[..., np.ndarray],
) -> None:
    # (1, 0) and (-1, 0) gain nothing whatever happens to (0, 1): the dual's g_w is 0.
    close(cagrad([[1, 0], [-1, 0], [0, 1]], 0.4), [0, 1 / 3], 1e-9)


@both_cagrad
def test_cagrad_inside_a_triangle_still_moves(cagrad: Callable[..., np.ndarray]) -> None:
    # g_0 = (-1/3, 0). The first task loses most: d = g_0 + c/3 (1, 0).
    rows = [[1, 0], [-1, 1], [-1, -1]]
    close(cagrad(rows, 0.4), [-0.2, 0], 1e-9)


@both_imtlg
def test_imtlg_of_orthogonal_gradients_weighs_by_inverse_lengths(imtlg: Aggregate) -> None:
    rows = [[1, 0, 0], [0, 2, 0], [0, 0, 4]]
    close(imtlg(rows), [4 / 7] * 3, 1e-12)
    close(weights_of(IMTLG(), rows), [4 / 7, 2 / 7, 1 / 7], 1e-12)


@both_imtlg
def test_imtlg_weights_may_be_negative(imtlg: Aggregate) -> None:
    # Unit vectors e1, e2, (2, 2, 1)/3: projections are equal along (1, 1, -1) alone.
    rows = [[1, 0, 0], [0, 1, 0], [2, 2, 1]]
    close(imtlg(rows), [0.2, 0.2, -0.2], 1e-10)
    close(weights_of(IMTLG(), rows), [0.6, 0.6, -0.2], 1e-10)


@both_imtlg
def test_imtlg_in_too_few_dimensions_stands_still(imtlg: Aggregate) -> None:
    # Three unlike directions of a plane have equal projections on the zero vector only, and
    # 3 g_1 + 4 g_2 + g_3 = 0 has the weights (3, 4, 1) / 8.
    rows = [[1, 1], [-1, 0], [1, -3]]
    close(imtlg(rows), [0, 0], 1e-7)
    close(weights_of(IMTLG(), rows), [3 / 8, 4 / 8, 1 / 8], 1e-7)


# g_1 onto g_2 and then g_3: (1, 0) -> (.5, .5) -> (-.1, .2), now in conflict with g_1 itself, which
# must be left so; onto g_3 and then g_2: (1, 0) -> (.2, -.4) -> (-.1, -.1).
# g_2 = (-1, 1): onto g_1: (0, 1), onto g_3: (-.4, .8); or g_3: no conflict, onto g_1: (0, 1).
# g_3 = (-2, -1): onto g_1: (0, -1), onto g_2: (-.5, -.5); or g_2: no conflict, onto g_1: (0, -1).
THREE = [[1.0, 0.0], [-1.0, 1.0], [-2.0, -1.0]]
PROJECTED = [
    {(1, 2): (-0.1, 0.2), (2, 1): (-0.1, -0.1)},
    {(0, 2): (-0.4, 0.8), (2, 0): (0.0, 1.0)},
    {(0, 1): (-0.5, -0.5), (1, 0): (0.0, -1.0)},
]


def test_pcgrad_of_three_for_all_orders() -> None:
    for orders in reference.all_orders(3):
        expected = np.sum([PROJECTED[i][order] for i, order in enumerate(orders)], axis=0)
        close(reference.pcgrad(np.array(THREE), orders), expected, 1e-12)


def test_pcgrad_of_three_draws_each_order_equally_often() -> None:
    rows = torch.tensor(THREE, dtype=torch.float64)
    pcgrad = PCGrad(generator=torch.Generator().manual_seed(3))
    sums = {
        tuple(np.round(np.sum([PROJECTED[i][o] for i, o in enumerate(orders)], axis=0), 6) + 0.0)
        for orders in reference.all_orders(3)
    }
    assert len(sums) == 8
    counts = dict.fromkeys(sums, 0)
    draws = 1600
    for _ in range(draws):
        counts[tuple(np.round(pcgrad(rows).numpy(), 6) + 0.0)] += 1
    # 200 expected with a standard deviation of 13: five of them either way.
    assert all(135 <= count <= 265 for count in counts.values()), counts


def test_pcgrad_mean_is_the_sum_over_the_number_of_tasks() -> None:
    rows = torch.tensor(THREE, dtype=torch.float64)
    total = PCGrad(generator=torch.Generator().manual_seed(8))(rows)
    mean = PCGrad(reduction="mean", generator=torch.Generator().manual_seed(8))(rows)
    close(mean.numpy() * 3, total.tolist(), 1e-12)


# --------------------------------------------------------------------------------- unanimity


def test_two_equal_gradients_share_the_weight() -> None:
    equal = [[0.5, -2.0], [0.5, -2.0]]
    close(weights_of(MGDA(), equal), [0.5, 0.5], 1e-12)
    close(weights_of(IMTLG(), equal), [0.5, 0.5], 1e-12)


@pytest.mark.parametrize("tasks", [1, 2, 3, 5, 12])
@pytest.mark.parametrize(
    ("aggregator", "factor"),
    [
        (Sum(), lambda m: m),
        (Mean(), lambda m: 1),
        (MGDA(), lambda m: 1),
        (MGDA(normalize="l2"), lambda m: 1),
        (PCGrad(), lambda m: m),
        (PCGrad(reduction="mean"), lambda m: 1),
        (IMTLG(), lambda m: 1),
        (CAGrad(c=0.4, rescale=0), lambda m: 1.4),
        (CAGrad(c=0.4, rescale=1), lambda m: 1.4 / 1.16),
        (CAGrad(c=0.4, rescale=2), lambda m: 1),
        (CAGrad(c=0.0), lambda m: 1),
    ],
)
def test_unanimity(aggregator: torch.nn.Module, factor: Callable[[int], float], tasks: int) -> None:
    gradient = [0.5, -2.0, 0.25]
    direction = library(aggregator)([gradient] * tasks)
    close(direction, [factor(tasks) * entry for entry in gradient], 1e-7)


# ------------------------------------------------------------------------------ scale (1e12)


@pytest.mark.parametrize("scale", [1e-6, 1e-4, 1e-2, 1e2, 1e4, 1e6])
@pytest.mark.parametrize(
    "rows",
    [
        PAPER,
        ORTHOGONAL,
        CONFLICT,
        [[1, 0, 0], [0, 1, 0], [2, 2, 1]],
        [[1, 2, 0, 3], [1, -1, 0, 1], [2, 0, 5, -1], [4, 0, -3, 1]],
    ],
)
@pytest.mark.parametrize(
    "aggregator",
    [Sum(), Mean(), MGDA(), MGDA(normalize="l2"), CAGrad(), CAGrad(c=0.8, rescale=0), IMTLG()],
)
def test_weights_do_not_depend_on_the_scale(
    aggregator: torch.nn.Module, rows: Rows, scale: float
) -> None:
    scaled = [[entry * scale for entry in row] for row in rows]
    close(weights_of(aggregator, scaled), weights_of(aggregator, rows), 1e-8)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_weights_of_pcgrad_do_not_depend_on_the_scale(scale: float) -> None:
    rows = np.array(THREE)
    one = weights_of(PCGrad(generator=torch.Generator().manual_seed(1)), THREE)
    other = PCGrad(generator=torch.Generator().manual_seed(1))
    close(weights_of(other, (rows * scale).tolist()), one.tolist(), 1e-8)
