"""MGDA with combine="normalized": the weights multiply the gradients as they were solved for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from reference import aggregation as reference

from equipoise.aggregation import MGDA

ENTRY = st.integers(-16, 16).map(lambda n: n / 4)
NORMALIZE = st.sampled_from(["l2", "loss", "loss+"])


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Rows (T, P), none of them zero, and positive losses (T,)."""
    tasks, width = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    flat = draw(st.lists(ENTRY, min_size=tasks * width, max_size=tasks * width))
    rows = np.array(flat).reshape(tasks, width)
    assume((np.abs(rows).sum(axis=1) > 0).all())
    losses = draw(st.lists(st.integers(1, 32), min_size=tasks, max_size=tasks))
    return rows, np.array(losses) / 8


def normalized(rows: np.ndarray, losses: np.ndarray, normalize: str) -> np.ndarray:
    """The library's direction."""
    aggregator = MGDA(normalize=normalize, combine="normalized")
    return aggregator(torch.from_numpy(rows), torch.from_numpy(losses)).numpy()


@pytest.mark.parametrize(
    ("normalize", "direction", "raw"),
    [
        # Unit gradients (1, 0) and (0, 1): half of each.
        ("l2", [0.5, 0.5], [1.5, 2.0]),
        # Divided by the losses 1 and 2: (3, 0) and (0, 2), weights (4, 9) / 13.
        ("loss", [12 / 13, 18 / 13], [12 / 13, 36 / 13]),
        # Both: (1, 0) and (0, 1/2), weights (1, 4) / 5.
        ("loss+", [0.2, 0.4], [0.6, 3.2]),
    ],
)
def test_by_hand(normalize: str, direction: list[float], raw: list[float]) -> None:
    rows = torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    losses = torch.tensor([1.0, 2.0], dtype=torch.float64)
    found = MGDA(normalize=normalize, combine="normalized")(rows, losses)
    np.testing.assert_allclose(found, direction, rtol=1e-12)
    expected = reference.mgda(rows.numpy(), normalize, losses.numpy(), combine="normalized")
    np.testing.assert_allclose(expected, direction, rtol=1e-12)
    np.testing.assert_allclose(MGDA(normalize=normalize)(rows, losses), raw, rtol=1e-12)


def test_a_zero_gradient_is_kept_or_dropped() -> None:
    rows = torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    kept = MGDA(normalize="l2", combine="normalized")
    assert not kept(rows).any()
    dropped = MGDA(normalize="l2", combine="normalized", zero="drop")
    np.testing.assert_allclose(dropped(rows), [0.5, 0.5], rtol=1e-12)
    assert dropped.coefficients(rows @ rows.T)[1] == 0


@given(problems(), NORMALIZE)
def test_the_direction_is_the_shortest_of_the_normalized_hull(
    problem: tuple[np.ndarray, np.ndarray], normalize: str
) -> None:
    rows, losses = problem
    found = normalized(rows, losses, normalize)
    expected = reference.mgda(rows, normalize, losses, combine="normalized")
    divisor = losses if normalize == "loss" else np.linalg.norm(rows, axis=1)
    divisor = divisor * losses if normalize == "loss+" else divisor
    size = (np.linalg.norm(rows, axis=1) / divisor).max()
    assert np.linalg.norm(found - expected) <= 1e-7 * size
    assert MGDA(normalize=normalize, combine="normalized").never_conflicts
    assert (rows @ found >= -1e-7 * size * np.linalg.norm(rows, axis=1)).all()


@given(problems(), NORMALIZE, st.sampled_from([2.0**-20, 3.0, 2.0**20]))
def test_the_degree_is_that_of_the_attribute(
    problem: tuple[np.ndarray, np.ndarray], normalize: str, scale: float
) -> None:
    rows, losses = problem
    degree = MGDA(normalize=normalize, combine="normalized").degree
    assert degree == (1 if normalize == "loss" else 0)
    one = normalized(rows, losses, normalize)
    size = (np.linalg.norm(rows, axis=1) / losses).max() if degree else 1 / losses.min()
    scaled = normalized(scale * rows, losses, normalize) / scale**degree
    assert np.linalg.norm(scaled - one) <= 1e-7 * size


def test_raw_stays_of_degree_one() -> None:
    for normalize in (None, "l2", "loss", "loss+"):
        assert MGDA(normalize=normalize).degree == 1
