"""Rows that non-negative weights combine to zero, up to the round-off of the rows.

Exact coefficients resolve that round-off there. What the methods promise must hold all the same:
to 4e-4 of the rows' length in single precision, about the square root of its eps, and to 1e-5 in
double precision, since a Gram matrix of float64 holds squares.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from reference import aggregation_more as reference
from torch import Tensor

from equipoise.aggregation import (
    EDM,
    IMTLG,
    MGDA,
    Aggregator,
    AlignedMTL,
    CAGrad,
    ConFIG,
    DualProj,
    UPGrad,
)
from equipoise.aggregation.base import GramAggregator
from equipoise.linalg import combine_rows, gram_matrix
from equipoise.testing.rows import kinds_of_rows, nearly_stationary_rows

ALL: dict[str, Callable[[], GramAggregator]] = {
    "UPGrad": UPGrad,
    "DualProj": DualProj,
    "MGDA": MGDA,
    "EDM": EDM,
    "IMTLG": IMTLG,
    "CAGrad": CAGrad,
    "CAGrad of c 1": lambda: CAGrad(c=1.0, rescale=0),
    "CAGrad of c 1.5": lambda: CAGrad(c=1.5, rescale=0),
    "AlignedMTL": AlignedMTL,
    "ConFIG": ConFIG,
}
WITHOUT_CONFLICT = ["UPGrad", "DualProj", "MGDA", "EDM", "CAGrad of c 1", "CAGrad of c 1.5"]
BOUND = {torch.float32: 4e-4, torch.float64: 1e-5}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def problems(dtype: torch.dtype) -> list[Tensor]:
    """3 to 40 tasks, ranks from 1 to full, with and without zero weights, like and unlike rows."""
    found = []
    for n_tasks in (3, 4, 7, 12, 20, 40):
        for rank in sorted({1, 2, n_tasks // 2, n_tasks - 2, n_tasks - 1}):
            for zeros in sorted({0, 1, n_tasks // 2 - 1}):
                seed = 10_000 * n_tasks + 100 * rank + zeros
                rows, _ = nearly_stationary_rows(
                    n_tasks,
                    rank,
                    zeros=zeros,
                    spread=float(seed % 3),
                    columns=rank + 5 * (seed % 2),
                    dtype=dtype,
                    generator=torch.Generator().manual_seed(seed),
                )
                found.append(rows)
    return found


def longest(rows: Tensor) -> float:
    return rows.double().norm(dim=1).max().item()


def least_gain(rows: Tensor, direction: Tensor) -> float:
    """min_i <g_i, d> / |g_i|, computed in float64."""
    rows = rows.double()
    return ((rows @ direction.double()) / rows.norm(dim=1)).min().item()


@DTYPES
@pytest.mark.parametrize("name", WITHOUT_CONFLICT)
def test_no_conflict(name: str, dtype: torch.dtype) -> None:
    for rows in problems(dtype):
        assert least_gain(rows, ALL[name]()(rows)) >= -BOUND[dtype] * longest(rows), rows.shape


@DTYPES
@pytest.mark.parametrize("name", ALL)
def test_neither_order_nor_scale_matter(name: str, dtype: torch.dtype) -> None:
    for seed, rows in enumerate(problems(dtype)):
        direction = ALL[name]()(rows)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        bound = BOUND[dtype] * longest(rows)
        assert (ALL[name]()(rows[order]) - direction).norm() <= bound, rows.shape
        # 3.3 is no power of 2: each entry is rounded anew.
        assert (ALL[name]()(3.3 * rows) / 3.3 - direction).norm() <= bound, rows.shape


@DTYPES
@pytest.mark.parametrize("name", ["MGDA", "EDM", "IMTLG"])
def test_equal_gains_are_none_where_the_rows_cancel(name: str, dtype: torch.dtype) -> None:
    for rows in problems(dtype):
        # A weight of zero for some task changes nothing: all have the gain of those that cancel.
        assert ALL[name]()(rows).norm() <= 2 * BOUND[dtype] * longest(rows), rows.shape


@DTYPES
@pytest.mark.parametrize("name", ["UPGrad", "DualProj"])
def test_the_projections_are_those_of_the_slow_reference(name: str, dtype: torch.dtype) -> None:
    slow = {"UPGrad": reference.upgrad, "DualProj": reference.dualproj}[name]
    for n_tasks, rank, zeros in ((3, 1, 0), (5, 3, 2), (12, 6, 5), (12, 11, 3)):
        generator = torch.Generator().manual_seed(n_tasks + rank)
        exact, _ = nearly_stationary_rows(
            n_tasks, rank, zeros=zeros, dtype=torch.float64, generator=generator
        )
        found = ALL[name]()(exact.to(dtype)).double().numpy()
        assert np.linalg.norm(found - slow(exact.numpy())) <= BOUND[dtype]


@pytest.mark.parametrize("name", ALL)
def test_coefficients_do_not_resolve_the_rows_round_off(name: str) -> None:
    if name == "IMTLG":
        pytest.skip("its weights may be long: that is the method's own")
    for rows in problems(torch.float32):
        gram = gram_matrix(rows)
        w = ALL[name]().coefficients(gram, eps=torch.finfo(torch.float32).eps)
        shares = w.abs() * gram.diagonal().sqrt() / longest(rows)
        assert shares.max() <= 3e3  # 1 / sqrt(eps) = 2900


@DTYPES
@pytest.mark.parametrize("name", ALL)
def test_rows_that_almost_cancel_are_no_worse(name: str, dtype: torch.dtype) -> None:
    for seed, rows in enumerate(problems(dtype)[::5]):
        generator = torch.Generator().manual_seed(seed)
        for size in (1e-3, 1e-5, 1e-7):
            noise = torch.randn(rows.shape, dtype=torch.float64, generator=generator)
            noise *= size * rows.double().norm(dim=1, keepdim=True) / rows.shape[1] ** 0.5
            given = (rows.double() + noise).to(dtype)
            direction = ALL[name]()(given)
            if name in WITHOUT_CONFLICT:
                assert least_gain(given, direction) >= -BOUND[dtype] * longest(given)
            if name != "ConFIG":  # as long as all rows together
                flipped = ALL[name]()(given.flip(0))
                assert (flipped - direction).norm() <= BOUND[dtype] * longest(given)


@pytest.mark.parametrize("name", ALL)
def test_ordinary_float32_rows_give_the_float64_direction(name: str) -> None:
    for n_tasks in (1, 2, 10, 40):
        rows = dict(kinds_of_rows(n_tasks))["independent"].float()
        exact = ALL[name]()(rows.double())
        assert (ALL[name]()(rows).double() - exact).norm() <= 4e-6 * max(1, exact.norm())


# --------------------------------------------------------------------------------- combine_rows


def test_large_coefficients_that_cancel_are_combined_in_double_precision() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 5000, generator=generator)
    rows[1] = rows[0] + 1e-3 * rows[1]
    w = torch.tensor([1e6, -1e6, 1.0], dtype=torch.float64)
    exact = w @ rows.double()
    found = combine_rows(rows, w, gram_matrix(rows))
    assert found.dtype == torch.float32
    assert (found - exact).norm() <= 1e-6 * exact.norm()
    assert (w.float() @ rows - exact).norm() > 1e-5 * exact.norm()  # what is avoided


def test_ordinary_coefficients_are_combined_as_they_are() -> None:
    rows = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    w = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    assert torch.equal(combine_rows(rows, w, gram_matrix(rows)), w.float() @ rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_direction_has_the_dtype_of_the_rows(dtype: torch.dtype) -> None:
    rows = torch.tensor([[1.0, 2.0], [-1.0, -2.0]], dtype=dtype)
    direction = combine_rows(rows, torch.tensor([0.5, 0.5]), gram_matrix(rows))
    assert direction.dtype == dtype
    assert direction.tolist() == [0, 0]


# ------------------------------------------------------------------------------------ the sampler


@pytest.mark.parametrize(("n_tasks", "rank", "zeros"), [(2, 1, 0), (3, 2, 1), (20, 10, 7)])
def test_the_sampler_gives_what_it_says(n_tasks: int, rank: int, zeros: int) -> None:
    rows, weights = nearly_stationary_rows(
        n_tasks,
        rank,
        zeros=zeros,
        spread=2.0,
        columns=rank + 3,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(1),
    )
    assert rows.shape == (n_tasks, rank + 3)
    assert torch.linalg.matrix_rank(rows) == rank
    assert (weights == 0).sum() == zeros
    assert weights.min() >= 0
    assert weights.sum().item() == pytest.approx(1)
    assert (weights @ rows).norm() <= 1e-13
    assert 0.1 <= rows.norm(dim=1).min() <= longest(rows) <= 10


@pytest.mark.parametrize(
    "bad", [{"rank": 0}, {"rank": 4}, {"zeros": 3}, {"zeros": -1}, {"columns": 1}]
)
def test_the_sampler_refuses_what_cannot_be(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        nearly_stationary_rows(**{"n_tasks": 4, "rank": 2, **bad})


def test_kinds_of_rows_are_the_same_at_each_call() -> None:
    first, second = dict(kinds_of_rows(3)), dict(kinds_of_rows(3))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(isinstance(rows, Tensor) and len(rows) == 3 for rows in first.values())


def test_a_method_without_weights_at_is_asked_as_ever() -> None:
    class Own(GramAggregator):
        def weights(self, gram: np.ndarray, losses: np.ndarray | None) -> np.ndarray:
            assert gram.trace() == pytest.approx(2, abs=1e-12)
            return np.array([1.0, 2.0])

    rows = torch.eye(2)
    assert isinstance(Own(), Aggregator)
    assert Own()(rows).tolist() == [1, 2]
    assert Own().coefficients(rows @ rows.T, eps=1e-3).tolist() == [1, 2]
