"""What each method promises, asked of gradients that hypothesis makes up.

The entries are small multiples of 1/4, so that zero, equal, opposite and dependent gradients
are frequent and exact.
"""

import numpy as np
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from reference import aggregation as reference
from reference.problems import size

from equipoise.aggregation import IMTLG, MGDA, CAGrad, Mean, PCGrad, Sum

ENTRY = st.integers(-16, 16).map(lambda n: n / 4)


@st.composite
def gradients(draw: st.DrawFn, tasks: int | None = None) -> np.ndarray:
    """Draw (T, P) rows, T from 1 to 6 unless given, P from 1 to 8."""
    height = tasks or draw(st.integers(1, 6))
    width = draw(st.integers(1, 8))
    flat = draw(st.lists(ENTRY, min_size=height * width, max_size=height * width))
    return np.array(flat).reshape(height, width)


@st.composite
def shuffled(draw: st.DrawFn, tasks: int | None = None) -> tuple[np.ndarray, list[int]]:
    """Draw rows and an order of them."""
    rows = draw(gradients(tasks))
    return rows, draw(st.permutations(range(len(rows))))


SCALE = st.sampled_from([2.0**-20, 2.0**-7, 3.0, 2.0**20])
RADIUS = st.sampled_from([0.07, 0.37, 0.73, 0.97])  # no cosine of small integers is one of these
# All but PCGrad, whose answer depends on the order that it draws.
DETERMINISTIC = st.sampled_from([Sum, Mean, MGDA, IMTLG, CAGrad, lambda: CAGrad(0.73, rescale=0)])


def direction(aggregator: torch.nn.Module, rows: np.ndarray) -> np.ndarray:
    """Give the library's direction of float64 rows."""
    return aggregator(torch.from_numpy(np.ascontiguousarray(rows))).numpy()


def coefficients(aggregator: torch.nn.Module, rows: np.ndarray) -> np.ndarray:
    """Give the library's coefficients on the Gram matrix of the rows."""
    return aggregator.coefficients(torch.from_numpy(rows @ rows.T)).numpy()


def solvable(rows: np.ndarray) -> bool:
    """Tell whether equal projections exist with weights of sum 1 that are not huge."""
    try:
        weights = reference.imtlg_weights(rows)
    except ValueError:
        return False
    return bool(np.abs(weights).max() < 1e3)


@given(shuffled(), DETERMINISTIC)
def test_permuting_the_tasks_changes_nothing(problem: tuple, make: type) -> None:
    rows, order = problem
    assume(make is not IMTLG or solvable(rows))
    bound = 1e-6 * size(rows) + 1e-300
    assert np.linalg.norm(direction(make(), rows[order]) - direction(make(), rows)) <= bound


@given(shuffled(), st.sampled_from([Sum, Mean]))
def test_permuting_the_tasks_permutes_constant_weights(problem: tuple, make: type) -> None:
    rows, order = problem
    assert np.array_equal(coefficients(make(), rows[order]), coefficients(make(), rows)[order])


@given(shuffled(tasks=2))
def test_permuting_two_tasks_changes_nothing_in_pcgrad(problem: tuple) -> None:
    rows, order = problem
    weights = coefficients(PCGrad(), rows)
    np.testing.assert_allclose(coefficients(PCGrad(), rows[order]), weights[order], rtol=1e-12)


@given(gradients(tasks=3))
def test_pcgrad_gives_one_of_the_directions_of_its_orders(rows: np.ndarray) -> None:
    # Permuting the tasks permutes the orders: the same directions remain possible.
    possible = [reference.pcgrad(rows, orders) for orders in reference.all_orders(3)]
    reordered = [reference.pcgrad(rows[[2, 0, 1]], orders) for orders in reference.all_orders(3)]
    bound = 1e-9 * size(rows)
    for candidate in (direction(PCGrad(), rows), direction(PCGrad(), rows[[2, 0, 1]])):
        assert min(np.linalg.norm(candidate - d) for d in possible) <= bound
        assert min(np.linalg.norm(candidate - d) for d in reordered) <= bound


@given(gradients(), SCALE, DETERMINISTIC)
def test_scaling_all_gradients_scales_the_direction(
    rows: np.ndarray, scale: float, make: type
) -> None:
    assume(make is not IMTLG or solvable(rows))
    expected = scale * direction(make(), rows)
    bound = 1e-8 * scale * size(rows) + 1e-300
    assert np.linalg.norm(direction(make(), scale * rows) - expected) <= bound


@given(gradients(), SCALE, st.integers(0, 2**31))
def test_scaling_all_gradients_scales_pcgrad(rows: np.ndarray, scale: float, seed: int) -> None:
    one = direction(PCGrad(generator=torch.Generator().manual_seed(seed)), rows)
    other = direction(PCGrad(generator=torch.Generator().manual_seed(seed)), scale * rows)
    assert np.linalg.norm(other - scale * one) <= 1e-9 * scale * size(rows)


@given(gradients(), DETERMINISTIC | st.just(PCGrad))
def test_the_direction_lies_in_the_span_of_the_gradients(rows: np.ndarray, make: type) -> None:
    assume(make is not IMTLG or solvable(rows))
    found = direction(make(), rows)
    nearest = rows.T @ np.linalg.lstsq(rows.T, found, rcond=None)[0]
    assert np.linalg.norm(found - nearest) <= 1e-9 * max(size(rows), float(np.linalg.norm(found)))


@given(gradients(), DETERMINISTIC)
def test_float32_rows_give_the_float64_direction(rows: np.ndarray, make: type) -> None:
    # The entries are exact in float32: only what is computed from them may differ.
    assume(make is not IMTLG or solvable(rows))
    exact = direction(make(), rows)
    single = make()(torch.from_numpy(rows).float()).double().numpy()
    weight = np.abs(coefficients(make(), rows)).max()
    assert np.linalg.norm(single - exact) <= 1e-6 * len(rows) * max(1, weight) * size(rows)


@given(gradients())
def test_mgda_never_conflicts_and_lies_in_the_hull(rows: np.ndarray) -> None:
    weights = coefficients(MGDA(), rows)
    assert weights.min() >= 0
    if size(rows) > 0:
        np.testing.assert_allclose(weights.sum(), 1, rtol=1e-12)
    found = direction(MGDA(), rows)
    lengths = np.linalg.norm(rows, axis=1)
    # <g_i, d> >= |d|^2: to 1e-8 of it, and to the round-off of the products themselves.
    slack = 1e-12 * lengths * (weights @ lengths)
    assert (rows @ found - found @ found * (1 - 1e-8) >= -slack).all()


@given(gradients())
def test_mgda_treats_tasks_with_weight_alike(rows: np.ndarray) -> None:
    weights = coefficients(MGDA(), rows)
    found = direction(MGDA(), rows)
    active = weights > 1e-9
    np.testing.assert_allclose(
        (rows @ found)[active], found @ found, rtol=1e-6, atol=1e-9 * size(rows) ** 2
    )


@given(gradients(), st.integers(0, 5), st.sampled_from([1.0, 1.25, 3.0]))
def test_mgda_does_not_see_a_longer_copy(rows: np.ndarray, task: int, factor: float) -> None:
    copied = np.vstack([rows, factor * rows[task % len(rows)]])
    bound = 1e-7 * size(copied)
    assert np.linalg.norm(direction(MGDA(), copied) - direction(MGDA(), rows)) <= bound


@given(gradients(), RADIUS)
def test_cagrad_stays_in_its_ball_and_is_optimal_there(rows: np.ndarray, c: float) -> None:
    assume((np.abs(rows).sum(axis=1) > 0).all())  # a zero gradient: see test_edges
    found = direction(CAGrad(c=c, rescale=0), rows)
    center = rows.mean(axis=0)
    radius = c * np.linalg.norm(center)
    assert np.linalg.norm(found - center) <= radius * (1 + 1e-9) + 1e-12 * size(rows)
    best = reference.cagrad(rows, c, 0)
    assert (rows @ found).min() >= (rows @ best).min() - 1e-8 * size(rows) ** 2


@given(gradients(), RADIUS)
def test_cagrad_meets_its_dual(rows: np.ndarray, c: float) -> None:
    # Weak duality: no direction of the ball gains all tasks more than the dual value of any
    # weights. Where both meet, both are optimal; the weights are read off the coefficients.
    assume((np.abs(rows).sum(axis=1) > 0).all())
    aggregator = CAGrad(c=c, rescale=0)
    found = direction(aggregator, rows)
    center = rows.mean(axis=0)
    radius = c * np.linalg.norm(center)
    extra = coefficients(aggregator, rows) - 1 / len(rows)
    assume(radius > 0 and extra.sum() > 1e-9)
    assert extra.min() >= -1e-12 * max(1, extra.max())
    mixture = (extra / extra.sum()) @ rows
    dual = mixture @ center + radius * np.linalg.norm(mixture)
    gain = (rows @ found).min()
    assert -1e-8 * size(rows) ** 2 <= dual - gain <= 1e-7 * size(rows) ** 2


@given(gradients())
def test_cagrad_without_a_ball_is_the_mean(rows: np.ndarray) -> None:
    np.testing.assert_allclose(
        direction(CAGrad(c=0.0), rows), rows.mean(axis=0), rtol=0, atol=1e-12 * (size(rows) + 1)
    )


@given(gradients())
def test_imtlg_projects_alike_on_all_unit_gradients(rows: np.ndarray) -> None:
    assume(solvable(rows))
    weights = coefficients(IMTLG(), rows)
    lengths = np.linalg.norm(rows, axis=1)
    active = lengths > 0
    assert (weights[~active] == 0).all()
    if active.any():
        np.testing.assert_allclose(weights.sum(), 1, rtol=1e-8)
        projections = (rows[active] / lengths[active, None]) @ direction(IMTLG(), rows)
        spread = projections.max() - projections.min()
        assert spread <= 1e-7 * (np.abs(weights) @ lengths)


@given(gradients())
def test_imtlg_weights_are_the_nearest_to_even_ones(rows: np.ndarray) -> None:
    assume(solvable(rows))
    expected = reference.imtlg_weights(rows)
    bound = 1e-6 * (1 + np.abs(expected).max())
    assert np.abs(coefficients(IMTLG(), rows) - expected).max() <= bound


@given(gradients(tasks=2))
def test_pcgrad_of_two_never_conflicts(rows: np.ndarray) -> None:
    found = direction(PCGrad(), rows)
    assert (rows @ found).min() >= -1e-12 * size(rows) ** 2


@given(gradients())
def test_agreeing_gradients_are_summed_by_pcgrad(rows: np.ndarray) -> None:
    agreeing = np.abs(rows)  # no negative inner product
    np.testing.assert_allclose(direction(PCGrad(), agreeing), agreeing.sum(axis=0), rtol=1e-12)
