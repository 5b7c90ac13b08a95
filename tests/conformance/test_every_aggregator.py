"""What every aggregator of the registry promises; a new one enters by being registered.

What only some promise is read from the class: `degree`, `never_conflicts`, `needs_losses`, a
private generator.
"""

from __future__ import annotations

import inspect
import io
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

import equipoise as eq
from equipoise.registry import METHODS

TOKENS = [
    method.token
    for method in METHODS.values()
    if method.axis == "aggregation" and method.level == "parameters"
]
every_aggregator = pytest.mark.parametrize("token", TOKENS)
TASKS = (1, 2, 3, 10, 100)
SCALES = (1e-12, 1e-6, 1.0, 1e6)


def make(token: str, n_tasks: int = 3, seed: int = 0) -> torch.nn.Module:
    """The aggregator with its defaults, its draws seeded."""
    context = {"generator": torch.Generator().manual_seed(seed), "n_tasks": n_tasks}
    factory = METHODS[token].factory
    wanted = inspect.signature(factory).parameters
    return factory(**{name: value for name, value in context.items() if name in wanted})


def aggregate(token: str, rows: Tensor, seed: int = 0) -> Tensor:
    """The direction from a fresh one."""
    return make(token, len(rows), seed)(rows)


def draws(token: str) -> bool:
    return hasattr(make(token), "generator")


def gram_tokens() -> list[str]:
    return [token for token in TOKENS if isinstance(make(token), eq.GramAggregator)]


def degree(token: str) -> float:
    return getattr(make(token), "degree", 1)


def inputs(n_tasks: int) -> Iterator[tuple[str, Tensor]]:
    """Rows of all kinds, of lengths around 1 unless said otherwise."""
    rng = np.random.default_rng(n_tasks)
    width = n_tasks + 20

    def fresh(columns: int = width) -> np.ndarray:
        return rng.normal(size=(n_tasks, columns)) / np.sqrt(columns)

    found = {
        "independent": fresh(),
        "agreeing": np.abs(fresh()),
        "few parameters": fresh(max(1, n_tasks // 2)),
        "one parameter": fresh(1),
        "rank one": np.outer(rng.normal(size=n_tasks), rng.normal(size=5)),
        "alike": np.tile(rng.normal(size=7), (n_tasks, 1)),
        "lengths from 1e-5 to 1e5": fresh() * 10 ** rng.uniform(-5, 5, size=(n_tasks, 1)),
        "zero": np.zeros((n_tasks, 3)),
    }
    for name, change in {
        "a zero row": lambda rows: 0 * rows[0],
        "opposite": lambda rows: -rows[0],
        "collinear": lambda rows: 3 * rows[0],
        "nearly collinear": lambda rows: (1 + 1e-9) * rows[0] + 1e-9 * rows[-1],
        "nearly opposite": lambda rows: -rows[0] + 1e-5 * rows[-1],
    }.items():
        rows = fresh()
        rows[-1] = change(rows)
        found[name] = rows
    for name, rows in found.items():
        yield name, torch.from_numpy(np.ascontiguousarray(rows))


def length(direction: Tensor) -> float:
    return direction.double().norm().item()


def longest(rows: Tensor) -> float:
    return rows.double().norm(dim=1).max().item()


# ------------------------------------------------------------------------ any rows at any scale


@every_aggregator
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n_tasks", TASKS)
def test_a_finite_direction_for_any_rows(token: str, n_tasks: int, dtype: torch.dtype) -> None:
    for scale in SCALES:
        for name, rows in inputs(n_tasks):
            given = (rows * scale).to(dtype)
            before = given.clone()
            direction = aggregate(token, given)
            assert direction.shape == rows.shape[1:], name
            assert direction.dtype == dtype, name
            assert bool(direction.isfinite().all()), (name, scale)
            assert torch.equal(given, before), name
            if not bool(rows.any()):
                assert not bool(direction.any())


@every_aggregator
@pytest.mark.parametrize("n_tasks", TASKS)
def test_no_conflict_where_that_is_promised(token: str, n_tasks: int) -> None:
    if not make(token).never_conflicts:
        pytest.skip("may conflict")
    for scale in SCALES:
        for name, rows in inputs(n_tasks):
            direction = aggregate(token, rows * scale)
            # What is left of gradients that cancel is round-off, and so is its sign.
            left = 1e-6 * length(direction) + 1e-7 * longest(rows * scale)
            worst = (rows @ direction).min().item()
            assert worst >= -left * longest(rows), (name, scale)


@pytest.mark.parametrize("token", TOKENS)
def test_conflicts_where_none_are_excluded(token: str) -> None:
    # The attribute is no decoration: each method without it does conflict somewhere.
    if make(token).never_conflicts:
        pytest.skip("never conflicts")
    worst = 0.0
    for n_tasks in (3, 5, 10):
        for seed in range(40):
            rng = np.random.default_rng(seed)
            rows = rng.normal(size=(n_tasks, n_tasks - 1 + seed % 3)) + 0.3 * rng.normal()
            rows *= 10 ** rng.uniform(-1, 1, size=(n_tasks, 1))
            given = torch.from_numpy(rows)
            direction = aggregate(token, given, seed)
            worst = min(worst, ((given @ direction) / given.norm(dim=1)).min().item())
    assert worst < -1e-3


@every_aggregator
@pytest.mark.parametrize("n_tasks", TASKS)
@pytest.mark.parametrize("scale", [2.0**-40, 2.0**-7, 2.0**20])
def test_scaling_the_gradients_scales_the_direction(token: str, n_tasks: int, scale: float) -> None:
    for name, rows in inputs(n_tasks):
        direction = aggregate(token, rows)
        scaled = aggregate(token, scale * rows) / scale ** degree(token)
        bound = 1e-8 * max(length(direction), longest(rows))
        assert length(scaled - direction) <= bound, name


@every_aggregator
@pytest.mark.parametrize("n_tasks", TASKS)
def test_the_order_of_the_tasks_does_not_matter(token: str, n_tasks: int) -> None:
    if draws(token):
        pytest.skip("draws an order or signs")
    for name, rows in inputs(n_tasks):
        if name.startswith("nearly"):
            continue  # round-off decides between the two
        order = torch.randperm(n_tasks, generator=torch.Generator().manual_seed(1))
        direction, other = aggregate(token, rows), aggregate(token, rows[order])
        bound = 1e-5 * max(length(direction), longest(rows))
        assert length(other - direction) <= bound, name


@every_aggregator
def test_agreement(token: str) -> None:
    # All tasks ask for the same: they get it, at a length that depends on nothing but T and g.
    for n_tasks in TASKS:
        rows = torch.tensor([[3.0, -4.0, 0.0]], dtype=torch.float64).repeat(n_tasks, 1)
        direction = aggregate(token, rows)
        factor = (direction @ rows[0] / 25).item()
        assert 0.05 < factor <= 2 * n_tasks
        assert length(direction - factor * rows[0]) <= 1e-6 * length(direction)


@every_aggregator
def test_two_opposite_gradients(token: str) -> None:
    rows = torch.tensor([[3.0, -4.0], [-6.0, 8.0]], dtype=torch.float64)
    direction = aggregate(token, rows)
    if make(token).never_conflicts:
        assert length(direction) <= 1e-7  # nothing else conflicts with neither
    if token in gram_tokens():
        assert abs(direction[0] * 4 + direction[1] * 3) <= 1e-6  # along their line


@every_aggregator
def test_single_precision_is_that_of_the_rows_only(token: str) -> None:
    for n_tasks in TASKS:
        rows = dict(inputs(n_tasks))["independent"].float()
        single = aggregate(token, rows).double()
        double = aggregate(token, rows.double())
        # Weights of both signs cancel: what is lost is relative to what is added up.
        assert length(single - double) <= 1e-3 * max(length(double), longest(rows)), n_tasks


@every_aggregator
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("row", [0, 2])
def test_a_gradient_that_is_not_finite_is_named(token: str, bad: float, row: int) -> None:
    rows = dict(inputs(3))["independent"]
    rows[row, 1] = bad
    with pytest.raises(eq.NonFiniteError) as caught:
        aggregate(token, rows)
    assert caught.value.task == row


# ---------------------------------------------------------------------------- state and contract


@every_aggregator
def test_continues_from_its_saved_state(token: str) -> None:
    rows = [dict(inputs(3))["independent"] * (k + 1) for k in range(6)]
    first = make(token)
    for r in rows[:3]:
        first(r)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    expected = [first(r) for r in rows[3:]]
    file.seek(0)
    second = make(token, seed=99)
    second.load_state_dict(torch.load(file, weights_only=True))
    for r, direction in zip(rows[3:], expected, strict=True):
        assert torch.equal(second(r), direction)


@every_aggregator
def test_draws_leave_the_global_generator_alone(token: str) -> None:
    aggregator = make(token)
    before = torch.get_rng_state()
    aggregator(dict(inputs(3))["independent"])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("token", gram_tokens())
def test_the_direction_is_that_of_the_coefficients(token: str) -> None:
    for n_tasks in TASKS:
        rows = dict(inputs(n_tasks))["independent"]
        w = make(token, n_tasks).coefficients(rows @ rows.T)
        assert w.shape == (n_tasks,)
        assert w.dtype == torch.float64
        direction = aggregate(token, rows)
        bound = 1e-9 * (1 + w.abs().sum().item())
        assert length(w @ rows - direction) <= bound


@pytest.mark.parametrize("token", gram_tokens())
def test_known_coefficients_are_true_ones(token: str) -> None:
    aggregator = make(token)
    aggregator.begin(torch.tensor([True, True, False, True]))
    known = aggregator.known_coefficients(3)
    if known is not None:
        rows = dict(inputs(3))["independent"]
        assert torch.equal(known, aggregator.coefficients(rows @ rows.T))


@every_aggregator
def test_the_docstring_says_what_a_user_must_know(token: str) -> None:
    text = " ".join((inspect.getdoc(METHODS[token].factory) or "").split())
    for word in ("Unanimity value", "zero", "Passes:"):
        assert word.lower() in text.lower(), word
