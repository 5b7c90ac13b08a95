"""The share of conflicting pairs: counted by hand, and laws that hold for all matrices."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from equipoise.diagnostics import conflict_share
from equipoise.errors import EquipoiseError

squares = st.integers(1, 8).flatmap(
    lambda n: arrays(np.float64, (n, n), elements=st.floats(-10, 10).map(lambda x: round(x, 1)))
)


def counted(gram: np.ndarray) -> float:
    pairs = list(combinations(range(len(gram)), 2))
    return 100 * sum(gram[i, j] < 0 for i, j in pairs) / len(pairs) if pairs else 0.0


def test_by_hand() -> None:
    assert conflict_share(torch.tensor([[18.0, -22.0], [-22.0, 38.0]])) == 100
    assert conflict_share(torch.eye(2)) == 0
    assert conflict_share([[1, -1, 0], [-1, 1, 2], [0, 2, 1]]) == pytest.approx(100 / 3)


def test_one_task_has_no_conflict() -> None:
    assert conflict_share(torch.ones(1, 1)) == 0.0
    assert type(conflict_share(torch.ones(1, 1))) is float


@given(squares)
def test_every_pair_counts_once(gram) -> None:
    gram = gram + gram.T
    assert conflict_share(torch.from_numpy(gram)) == pytest.approx(counted(gram), abs=1e-12)


@given(squares, st.floats(1e-200, 1e200), st.randoms(use_true_random=False))
def test_neither_order_nor_scale_matters(gram, scale, random) -> None:
    gram = gram + gram.T
    order = random.sample(range(len(gram)), len(gram))
    expected = conflict_share(gram)
    assert conflict_share(scale * gram[np.ix_(order, order)]) == expected


def test_no_tolerance() -> None:
    assert conflict_share(np.array([[1, -5e-324], [-5e-324, 1]])) == 100
    assert conflict_share(np.array([[1, -0.0], [-0.0, 1]])) == 0


def test_a_stack_gives_one_share_each() -> None:
    grams = torch.stack([torch.eye(3), -torch.ones(3, 3)]).expand(4, 2, 3, 3)
    shares = conflict_share(grams)
    assert shares.dtype == torch.float64
    assert torch.equal(shares, torch.tensor([0.0, 100.0], dtype=torch.float64).expand(4, 2))
    assert conflict_share(torch.zeros(0, 3, 3)).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
def test_dtypes(dtype) -> None:
    gram = torch.tensor([[1, -1], [-1, 1]], dtype=dtype)
    assert conflict_share(gram) == 100


def test_no_graph_is_kept() -> None:
    rows = torch.randn(3, 5, requires_grad=True)
    assert not conflict_share((rows @ rows.T).expand(2, 3, 3)).requires_grad


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 0), (2, 0, 0)])
def test_wrong_shapes(shape) -> None:
    with pytest.raises(EquipoiseError, match=r"\(\.\.\., T, T\) is needed"):
        conflict_share(torch.ones(shape))


def test_not_finite() -> None:
    with pytest.raises(EquipoiseError, match="not finite"):
        conflict_share([[1, float("nan")], [0, 1]])
    assert conflict_share([[float("nan"), 1.0], [1.0, 1.0]]) == 0  # the diagonal is not read
