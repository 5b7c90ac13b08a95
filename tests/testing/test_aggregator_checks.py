"""Each check of an aggregator finds the fault that it is for, and passes what has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import equipoise as eq
from equipoise.testing import aggregator_checks, check_aggregator


class Right(eq.GramAggregator):
    """The sum, by its Gram matrix."""

    def weights(self, gram: Any, losses: Any) -> Any:
        return np.ones(len(gram))


class Plain(eq.Aggregator):
    """The sum, from the rows."""

    def forward(self, rows: Tensor) -> Tensor:
        return rows.sum(0)


def wrong(base: type, **members: Any) -> type:
    """A subclass with something wrong about it."""
    return type("Wrong", (base,), members)


class Counting(Plain):
    """Depends on how often it was called, and does not save that."""

    calls = 0

    def forward(self, rows: Tensor) -> Tensor:
        self.calls += 1
        return rows.sum(0) * self.calls


class Unsaved(Counting):
    """Says that it has a state, and does not take it back."""

    def get_extra_state(self) -> dict:
        return {"calls": self.calls}

    def set_extra_state(self, state: Any) -> None:
        pass


def names_row_0(self: Any, rows: Tensor) -> Tensor:
    if not bool(rows.isfinite().all()):
        raise eq.NonFiniteError(0, "not finite.")
    return rows.sum(0)


def crooked(self: Any, rows: Tensor, losses: Any = None) -> Tensor:
    return rows.sum(0) + rows.norm() * torch.ones(rows.shape[1], dtype=rows.dtype)


def in_place(rows: Tensor) -> Tensor:
    return rows.mul_(1.5).sum(0)


def imprecise(rows: Tensor) -> Tensor:
    return rows.sum(0) * (1 if rows.dtype == torch.float64 else 1.1)


def short_of_memory(rows: Tensor) -> Tensor:
    raise RuntimeError("singular matrix")


FAULTS: list[tuple[str, Callable[[], Any], str]] = [
    ("any rows", lambda: lambda rows: rows.sum(0) / rows.norm(), "zero rows"),
    ("any rows", lambda: lambda rows: rows.sum(), r"expected \(\d+,\), found \(\)"),
    ("any rows", lambda: lambda rows: rows.sum(0).double(), "found torch.float64"),
    ("any rows", lambda: lambda rows: rows.sum(0) + 1, "expected a zero direction"),
    ("any rows", lambda: lambda rows: rows.sum(0).tolist(), "expected a tensor, found list"),
    ("any rows", lambda: short_of_memory, "found RuntimeError: singular matrix"),
    ("rows unchanged", lambda: in_place, "found changed ones"),
    ("no conflict", wrong(Right, never_conflicts=True), "expected no product below"),
    ("rows that cancel", wrong(Right, never_conflicts=True), "cancelling rows, T=3, rank 1, "),
    ("scale", wrong(Plain, degree=2), r"times 9.09495e-13 \*\* 2"),
    ("scale", wrong(Plain, forward=lambda self, rows: rows.sum(0).sign()), "off by"),
    ("order of the tasks", lambda: lambda rows: rows[0], "in another order"),
    ("agreement", wrong(Plain, forward=lambda self, rows: 0.01 * rows.sum(0)), "found 0.01 g"),
    ("agreement", wrong(Plain, forward=crooked), "T=1: expected"),
    ("opposite gradients", wrong(Right, never_conflicts=True), r"zero \(never_conflicts\)"),
    ("opposite gradients", wrong(Right, forward=crooked), "along them"),
    ("single precision", lambda: imprecise, "the direction of float64"),
    ("not finite", Plain, "NonFiniteError of task 0, found tensor"),
    ("not finite", wrong(Plain, forward=names_row_0), "of task 2, found NonFiniteError of task 0"),
    ("saved state", Counting, "after 3 calls: expected the direction bit for bit"),
    ("saved state", Unsaved, "after 3 calls: expected the state that was loaded"),
    ("global generator", lambda: lambda rows: rows.sum(0) + 0 * torch.rand(()), "a moved one"),
    ("coefficients", wrong(Right, forward=lambda self, rows: 2 * rows.sum(0)), "one off by"),
    ("coefficients", wrong(Right, coefficients=lambda self, gram: torch.ones(len(gram))),
     "in float64, found torch.float32"),
    ("known coefficients",
     wrong(Right, known_coefficients=lambda self, n: torch.full((n,), 2.0).double()),
     r"coefficients \[2.0, 2.0, 2.0\], found \[1.0, 1.0, 1.0\]"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "make", "words"), FAULTS, ids=[name for name, *_ in FAULTS])
def test_a_fault_is_found_and_described(name: str, make: Callable[[], Any], words: str) -> None:
    check = dict(aggregator_checks(make))[name]
    with pytest.raises(AssertionError, match=words) as caught:
        check()
    assert str(caught.value).startswith(f"{name}: ")
    assert "expected" in str(caught.value) and "found" in str(caught.value)


@pytest.mark.parametrize(
    ("make", "words"), [FAULTS[0][1:], (FAULTS[-1][1], ": expected")], ids=["first", "last"]
)
def test_all_checks_together_find_it_too(make: Callable[..., Any], words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        check_aggregator(make)


def test_every_check_has_a_fault_that_it_finds() -> None:
    makes = (wrong(Right, never_conflicts=True), Plain, lambda: torch.sum)
    names = {name for make in makes for name, _ in aggregator_checks(make)}
    assert names == {name for name, *_ in FAULTS}


def test_what_is_right_passes() -> None:
    for make in (Right, lambda: lambda rows: rows.sum(0), lambda: eq.PCGrad(reduction="mean")):
        check_aggregator(make)


def test_a_plain_callable_promises_less() -> None:
    plain = {name for name, _ in aggregator_checks(lambda: lambda rows: rows.sum(0))}
    assert plain == {"any rows", "rows unchanged", "order of the tasks", "single precision",
                     "global generator"}  # fmt: skip


def test_make_is_given_what_it_asks_for() -> None:
    seen: list[dict[str, Any]] = []

    def make(seed: int, generator: torch.Generator, *, n_tasks: int) -> eq.Aggregator:
        seen.append({"seed": seed, "n_tasks": n_tasks, "draw": generator.initial_seed()})
        return eq.Sum()  # cheap: what it is given is looked at

    check_aggregator(make)
    assert {one["n_tasks"] for one in seen} == {2, 3, 1, 10, 100}
    assert {one["seed"] for one in seen} == {one["draw"] for one in seen} == {0, 99}


def test_a_method_in_place_of_what_makes_it_is_refused() -> None:
    with pytest.raises(TypeError, match="without being told 'rows'; write lambda: method"):
        check_aggregator(lambda rows: rows.sum(0))


def test_a_check_can_be_left_out() -> None:
    first = lambda: lambda rows: rows[0]  # noqa: E731
    check_aggregator(first, leave_out=["order of the tasks"])
    with pytest.raises(ValueError, match="there is no check 'order' to leave out"):
        check_aggregator(first, leave_out=["order"])
