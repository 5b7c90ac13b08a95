"""Rows: the buffer, what it remembers, and what is made of it."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import equipoise as eq
from equipoise.engine.adapters import aggregator_stage
from equipoise.engine.direction import combine
from equipoise.engine.ranks import Ranks
from equipoise.engine.rows import Rows

SHAPES = [(2, 3), (4,), (), (0, 5)]


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES]


def gradients(seed: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=dtype) for shape in SHAPES]


def filled(n: int = 2) -> tuple[Rows, torch.Tensor]:
    rows = Rows(parameters(), 3, Ranks())
    for k in range(n):
        rows.add(gradients(k))
    expected = [torch.cat([g.reshape(-1) for g in gradients(k)]) for k in range(n)]
    return rows, torch.stack(expected)


def test_rows_are_the_concatenated_gradients() -> None:
    rows, expected = filled()
    assert rows.buffer.shape == (3, 11)
    assert torch.equal(rows.filled, expected)
    assert torch.equal(rows.whole(), expected)
    assert torch.allclose(rows.gram(), expected @ expected.T, rtol=1e-14)


def test_a_direction_goes_back_to_the_shapes_of_the_parameters() -> None:
    rows, expected = filled()
    pieces = rows.per_parameter(rows.combine(torch.tensor([2.0, -1.0])))
    assert [tuple(piece.shape) for piece in pieces] == SHAPES
    flat = torch.cat([piece.reshape(-1) for piece in pieces])
    assert torch.allclose(flat, 2 * expected[0] - expected[1], rtol=1e-14)


def test_none_is_zeros_and_a_parameter_nobody_reached_gets_none() -> None:
    rows = Rows(parameters(), 2, Ranks())
    rows.buffer.fill_(torch.nan)  # what an earlier step left must not show
    first, second = gradients(0), gradients(1)
    rows.add([first[0], None, None, first[3]])
    rows.add([None, None, second[2], None])
    assert torch.equal(rows.filled[0, 6:], torch.zeros(5, dtype=torch.float64))
    assert torch.equal(rows.filled[1, :10], torch.zeros(10, dtype=torch.float64))
    pieces = rows.per_parameter(rows.combine(torch.ones(2)))
    assert [piece is None for piece in pieces] == [False, True, False, False]


def test_clear_forgets_rows_and_reach() -> None:
    rows, _ = filled()
    rows.clear()
    assert rows.filled.shape == (0, 11)
    rows.add([None, gradients(5)[1], None, None])
    pieces = rows.per_parameter(rows.combine(torch.ones(1)))
    assert [piece is None for piece in pieces] == [True, False, True, True]


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_kept_in_single(half: torch.dtype) -> None:
    rows = Rows(parameters(half), 1, Ranks())
    assert rows.buffer.dtype == torch.float32
    small = [torch.full(shape, 2.0**-14, dtype=half) for shape in SHAPES]
    rows.add(small)
    # 2^-28 is nothing in half precision.
    assert rows.gram().item() == 11 * 2.0**-28
    assert {piece.dtype for piece in rows.per_parameter(rows.combine(torch.ones(1)))} == {half}


def test_mixed_precision_is_kept_in_the_widest() -> None:
    mixed = [nn.Parameter(torch.zeros(2, dtype=d)) for d in (torch.float16, torch.float64)]
    rows = Rows(mixed, 1, Ranks())
    assert rows.buffer.dtype == torch.float64
    rows.add([torch.ones_like(p) for p in mixed])
    pieces = rows.per_parameter(rows.combine(torch.ones(1)))
    assert [piece.dtype for piece in pieces] == [torch.float16, torch.float64]


def test_fit() -> None:
    own = parameters()
    rows = Rows(own, 2, Ranks())
    assert rows.fit(own)
    assert not rows.fit(own[:-1])
    assert not rows.fit(own[::-1])
    assert not rows.fit(parameters())


def test_a_buffer_does_not_fit_parameters_that_changed_their_dtype() -> None:
    module = nn.Linear(2, 2)
    rows = Rows(list(module.parameters()), 2, Ranks())
    module.double()  # keeps the Parameter objects
    assert not rows.fit(list(module.parameters()))


def test_no_parameters_at_all() -> None:
    rows = Rows([], 2, Ranks())
    rows.add([])
    rows.add([])
    assert torch.equal(rows.gram(), torch.zeros(2, 2, dtype=torch.float64))
    assert rows.per_parameter(rows.combine(torch.ones(2))) == []


def test_several_devices_are_refused() -> None:
    two = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, device="meta"))]
    with pytest.raises(eq.EquipoiseError, match=r"several devices .*cpu.*meta"):
        Rows(two, 2, Ranks())


def test_combine_by_coefficients_and_by_rows() -> None:
    rows, expected = filled()
    losses = torch.ones(2)
    result, direction = combine(rows, aggregator_stage(eq.MGDA()), losses)
    assert torch.allclose(direction, result.coefficients @ expected, rtol=1e-12)
    assert torch.allclose(direction, eq.MGDA()(expected), rtol=1e-12)
    plain, same = combine(rows, aggregator_stage(lambda r: eq.MGDA()(r)), losses)
    assert plain.coefficients is None
    assert torch.equal(plain.gram, result.gram)
    assert torch.allclose(same, direction, rtol=1e-12)


@pytest.mark.parametrize("aggregator", [eq.MGDA(), lambda r: r.sum(0)])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_is_named(aggregator: object, bad: float) -> None:
    rows, _ = filled()
    rows.buffer[1, 3] = bad
    with pytest.raises(eq.NonFiniteError) as caught:
        combine(rows, aggregator_stage(aggregator), torch.ones(2))
    assert caught.value.task == 1


@pytest.mark.parametrize(
    ("aggregator", "words"),
    [
        (lambda r: r, r"shape \(2, 11\) for rows of shape \(2, 11\); it must return \(11,\)"),
        (lambda r: r.sum(), r"shape \(\) "),
        (lambda r: r.sum(0) * torch.nan, "NaN or infinity"),
    ],
)
def test_what_a_callable_may_not_return(aggregator: object, words: str) -> None:
    rows, _ = filled()
    with pytest.raises(eq.EquipoiseError, match=words):
        combine(rows, aggregator_stage(aggregator), torch.ones(2))


@pytest.mark.parametrize("aggregator", [eq.MGDA(), lambda rows: rows.T @ rows.new_ones(len(rows))])
def test_autocast_does_not_round_the_direction(aggregator: Callable) -> None:
    torch.manual_seed(0)
    rows = Rows([nn.Parameter(torch.zeros(50))], 3, Ranks())
    for gradient in torch.randn(3, 50):
        rows.add([gradient])
    _, expected = combine(rows, aggregator_stage(aggregator), torch.ones(3))
    with torch.autocast("cpu", torch.bfloat16):
        _, direction = combine(rows, aggregator_stage(aggregator), torch.ones(3))
    assert direction.dtype == torch.float32
    assert torch.equal(direction, expected)
