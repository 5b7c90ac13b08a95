"""CAGrad where no direction of the ball improves all tasks: the conflict-free one nearest to g_0.

That makes d continuous in c, and free of conflict for c >= 1, where the ball holds 0.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from reference import aggregation as reference
from reference import aggregation_more as more
from reference.problems import task_gradients

from equipoise.aggregation import CAGrad, DualProj
from equipoise.testing.rows import kinds_of_rows, nearly_stationary_rows

EXAMPLE = torch.tensor([[1, 0], [-0.9, 0], [0, 1]], dtype=torch.float64)
ENTRY = st.integers(-16, 16).map(lambda n: n / 4)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
BOUND = {torch.float32: 4e-4, torch.float64: 1e-5}


@pytest.mark.parametrize(("rescale", "divisor"), [(0, 1.0), (1, 1.16), (2, 1.4)])
def test_the_nearest_direction_without_conflict(rescale: int, divisor: float) -> None:
    # g_0 = (1/30, 1/3) conflicts with the second; without conflict are the (0, y), y >= 0.
    expected = [0, 1 / 3 / divisor]
    found = CAGrad(c=0.4, rescale=rescale)(EXAMPLE)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    slow = reference.cagrad(EXAMPLE.numpy(), 0.4, rescale)
    np.testing.assert_allclose(slow, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(CAGrad(c=0.4, rescale=rescale)(EXAMPLE.float()), expected, atol=1e-5)


def test_below_the_threshold_the_worst_case_is_negative() -> None:
    # c |g_0| = 1/30 at c = 0.0995: a smaller ball does not reach (0, 1/3).
    found = CAGrad(c=0.05, rescale=0)(EXAMPLE)
    np.testing.assert_allclose(found, reference.cagrad(EXAMPLE.numpy(), 0.05, 0), atol=1e-8)
    assert float((EXAMPLE @ found).min()) < -1e-3


@pytest.mark.parametrize("c", [0.2, 0.4, 0.99])
def test_opposite_gradients_leave_a_part_of_the_mean(c: float) -> None:
    rows = torch.tensor([[1, 2], [-2, -4]], dtype=torch.float64)
    np.testing.assert_allclose(
        CAGrad(c=c, rescale=0)(rows), (1 - c) * rows.mean(0), rtol=0, atol=1e-7
    )


@pytest.mark.parametrize("c", [0.4, 1.0, 3.0])
def test_a_zero_gradient_gives_the_mean(c: float) -> None:
    rows = torch.tensor([[1, 0], [0, 0], [-3, 1]], dtype=torch.float64)
    np.testing.assert_allclose(CAGrad(c=c, rescale=0)(rows), rows.mean(0), rtol=1e-12)


def largest_jump(rows: torch.Tensor, low: float, high: float, steps: int = 200) -> float:
    """The largest change of d between neighbours of a grid of c, over the change of the radius."""
    found = [CAGrad(c=c, rescale=0)(rows).double() for c in np.linspace(low, high, steps)]
    radius = (high - low) / (steps - 1) * rows.double().mean(0).norm().item()
    return max((b - a).norm().item() for a, b in zip(found, found[1:], strict=False)) / radius


@DTYPES
def test_no_jump_in_c_in_the_example(dtype: torch.dtype) -> None:
    rows = EXAMPLE.to(dtype)
    assert largest_jump(rows, 0.099, 0.1, 400) <= 10  # 1 for a straight way; 2,000 for a jump
    assert largest_jump(rows, 0.0, 2.0, 400) <= 2


@DTYPES
@pytest.mark.parametrize("seed", range(12))
def test_no_jump_in_c_across_the_threshold(seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    tasks = 3 + seed
    rows, _ = nearly_stationary_rows(
        tasks, 1 + seed % (tasks - 1), zeros=seed % 3 % (tasks - 1), dtype=dtype,
        generator=generator,
    )  # fmt: skip
    mean = rows.double().mean(0)
    nearest = torch.from_numpy(more.dualproj(rows.double().numpy()))
    threshold = ((nearest - mean).norm() / mean.norm()).item()
    step = 1e-3
    grid = threshold + np.arange(-20, 21) * step
    found = [CAGrad(c=c, rescale=0)(rows).double() for c in grid[grid > 0]]
    # Towards the threshold d slides along the sphere, as fast as the square root of what is left.
    bound = 2 * (2 * step) ** 0.5 * max(1.0, threshold) * mean.norm() + BOUND[dtype]
    for a, b in zip(found, found[1:], strict=False):
        assert (b - a).norm() <= bound
    beyond = CAGrad(c=2 * threshold + 0.1, rescale=0)(rows).double()
    assert (rows.double() @ beyond).min() >= -BOUND[dtype]
    if dtype == torch.float64:  # single precision does not determine a cone that is hardly open
        assert (beyond - nearest).norm() <= 5e-5


@st.composite
def gradients(draw: st.DrawFn) -> np.ndarray:
    """Rows (T, P), T from 2 to 6, none of them zero."""
    height, width = draw(st.integers(2, 6)), draw(st.integers(1, 5))
    flat = draw(st.lists(ENTRY, min_size=height * width, max_size=height * width))
    rows = np.array(flat).reshape(height, width)
    assume((np.abs(rows).sum(axis=1) > 0).all())
    return rows


@DTYPES
@given(rows=gradients(), c=st.sampled_from([1.0, 1.25, 2.0, 10.0]))
def test_no_conflict_from_c_of_one_on(dtype: torch.dtype, rows: np.ndarray, c: float) -> None:
    given_rows = torch.from_numpy(rows).to(dtype)
    found = CAGrad(c=c, rescale=0)(given_rows).double()
    lengths = given_rows.double().norm(dim=1)
    gains = (given_rows.double() @ found) / lengths
    assert gains.min() >= -BOUND[dtype] * max(1.0, float(lengths.max()))


@DTYPES
@pytest.mark.parametrize("c", [1.0, 1.5, 4.0])
@pytest.mark.parametrize("n_tasks", [2, 3, 10, 40])
def test_no_conflict_from_c_of_one_on_for_rows_of_all_kinds(
    n_tasks: int, c: float, dtype: torch.dtype
) -> None:
    for name, rows in kinds_of_rows(n_tasks):
        if name in ("zero", "a zero row"):
            continue  # d = g_0
        rows = rows.to(dtype).double()
        found = CAGrad(c=c, rescale=0)(rows.to(dtype)).double()
        lengths = rows.norm(dim=1)
        assert (rows @ found / lengths).min() >= -BOUND[dtype] * lengths.max(), name


@given(rows=gradients(), c=st.sampled_from([0.37, 0.73, 1.0, 1.5]))
def test_stationary_rows_give_the_slow_references_answer(rows: np.ndarray, c: float) -> None:
    closed = np.vstack([rows, -rows.sum(axis=0)])  # the last one makes them cancel
    assume(np.abs(closed[-1]).sum() > 0)
    closed = np.vstack([closed, closed[0]])  # and g_0 is not zero
    size = np.linalg.norm(closed, axis=1).max()
    found = CAGrad(c=c, rescale=0)(torch.from_numpy(closed)).numpy()
    assert np.linalg.norm(found - reference.cagrad(closed, c, 0)) <= 1e-5 * size


@pytest.mark.parametrize("seed", range(0, 60, 3))
def test_where_it_does_not_gain_it_is_dualproj(seed: int) -> None:
    rows = task_gradients(seed)
    given_rows = torch.from_numpy(rows / np.linalg.norm(rows, axis=1).max())
    lowest = reference.mgda(given_rows.numpy())
    if np.linalg.norm(lowest) > 1e-10:
        pytest.skip("all tasks can gain")
    found = CAGrad(c=1.0, rescale=0)(given_rows)
    assert (found - DualProj()(given_rows)).norm() <= 1e-5
