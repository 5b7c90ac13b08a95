"""What the further methods promise, asked of gradients that hypothesis makes up.

The entries are small multiples of 1/4, so that zero, equal, opposite and dependent gradients
are frequent and exact.
"""

import numpy as np
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from reference import aggregation as first
from reference import aggregation_more as reference
from reference.problems import size

from equipoise.aggregation import EDM, ConFIG, DualProj, FairGrad, GradDrop, NashMTL, UPGrad

ENTRY = st.integers(-16, 16).map(lambda n: n / 4)


@st.composite
def gradients(draw: st.DrawFn) -> np.ndarray:
    """Draw (T, P) rows, T from 1 to 6, P from 1 to 8."""
    height, width = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    flat = draw(st.lists(ENTRY, min_size=height * width, max_size=height * width))
    return np.array(flat).reshape(height, width)


def direction(aggregator: torch.nn.Module, rows: np.ndarray) -> np.ndarray:
    return aggregator(torch.from_numpy(rows)).numpy()


def coefficients(aggregator: torch.nn.Module, rows: np.ndarray) -> np.ndarray:
    return aggregator.coefficients(torch.from_numpy(rows @ rows.T)).numpy()


def apart(rows: np.ndarray) -> float:
    """How far positive weights of the unit gradients are from combining them to zero."""
    units = rows / np.linalg.norm(rows, axis=1)[:, None]
    return float(np.linalg.norm(first.min_norm_weights(units) @ units))


@given(gradients())
def test_nash_meets_its_equation_or_stands_still(rows: np.ndarray) -> None:
    active = rows[np.abs(rows).sum(axis=1) > 0]
    assume(len(active))
    a = coefficients(NashMTL(max_norm=None), active)
    if apart(active) < 1e-7:
        assert (a == 0).all()
    else:
        assert np.abs(a * (active @ active.T @ a) - 1).max() <= 1e-8
        found = direction(NashMTL(max_norm=None), rows)
        np.testing.assert_allclose(found @ found, len(active), rtol=1e-8)


@given(gradients(), st.sampled_from([0.5, 1.5, 3.0]))
def test_fairgrad_meets_its_equation(rows: np.ndarray, alpha: float) -> None:
    assume((np.abs(rows).sum(axis=1) > 0).all())
    assume(apart(rows) > 1e-3)
    w = coefficients(FairGrad(alpha), rows)
    assert np.abs(w ** (1 / alpha) * (rows @ rows.T @ w) - 1).max() <= 1e-7


@given(gradients())
def test_edm_has_equal_cosines_where_it_has_weight(rows: np.ndarray) -> None:
    lengths = np.linalg.norm(rows, axis=1)
    assume((lengths > 0).all() and apart(rows) > 1e-3)
    found = direction(EDM(), rows)
    weights = coefficients(EDM(), rows)
    cosines = rows @ found / (lengths * np.linalg.norm(found))
    assert cosines.min() > 0
    carrying = weights * lengths > 1e-6 * (weights * lengths).max()
    np.testing.assert_allclose(cosines[carrying], cosines.min(), rtol=1e-6)
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-9)


@given(gradients())
def test_upgrad_and_dualproj_are_projections(rows: np.ndarray) -> None:
    for aggregator, oracle in (
        (UPGrad(), reference.upgrad),
        (DualProj(), reference.dualproj),
    ):
        found = direction(aggregator, rows)
        slack = 1e-7 * size(rows) ** 2
        assert (rows @ found).min(initial=0) >= -slack
        assert np.linalg.norm(found - oracle(rows)) <= 1e-6 * size(rows)


@given(gradients())
def test_upgrad_without_conflict_is_the_mean(rows: np.ndarray) -> None:
    agreeing = np.abs(rows)
    found = direction(UPGrad(), agreeing)
    np.testing.assert_allclose(found, agreeing.mean(axis=0), rtol=1e-12, atol=1e-12)


@given(gradients())
def test_config_of_independent_gradients_has_equal_cosines(rows: np.ndarray) -> None:
    assume(np.linalg.matrix_rank(rows) == len(rows))
    found = direction(ConFIG(), rows)
    products = rows @ found / np.linalg.norm(rows, axis=1)
    np.testing.assert_allclose(products, products.mean(), rtol=1e-6)
    # As long as the projections of all gradients onto it together.
    along = (rows @ found).sum() / np.linalg.norm(found)
    np.testing.assert_allclose(np.linalg.norm(found), along, rtol=1e-8)


@given(gradients(), st.integers(0, 2**31))
def test_graddrop_keeps_one_sign_of_each_entry(rows: np.ndarray, seed: int) -> None:
    found = direction(GradDrop(generator=torch.Generator().manual_seed(seed)), rows)
    positive, negative = rows.clip(min=0).sum(axis=0), rows.clip(max=0).sum(axis=0)
    assert ((found == positive) | (found == negative)).all()
    weights = GradDrop(generator=torch.Generator().manual_seed(seed)).entry_weights(
        torch.from_numpy(rows)
    )
    np.testing.assert_allclose((weights.numpy() * rows).sum(axis=0), found, atol=1e-12)
