"""What every aggregator promises, as checks that anybody can run on one of their own."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import nn

from equipoise.aggregation.base import Aggregator, GramAggregator
from equipoise.errors import NonFiniteError
from equipoise.testing.common import (
    Check,
    Make,
    ensure,
    fresh,
    named,
    run,
    same_state,
    saved,
)
from equipoise.testing.directions import direction, independent, length, longest
from equipoise.testing.rows import kinds_of_rows, nearly_stationary_rows

TASKS = (1, 2, 3, 10, 100)
SCALES = (1e-12, 1e-6, 1.0, 1e6)
CANCELLING = ((3, 1, 0), (3, 2, 1), (5, 3, 0), (20, 10, 0), (20, 19, 5), (40, 7, 0))
UNRESOLVED = 4e-4
"""About the square root of single precision: what products of such rows cannot resolve."""
DEGREES = (2.0**-40, 2.0**-7, 2.0**20)


def check_aggregator(make: Make, *, leave_out: Collection[str] = ()) -> None:
    """Run every check that an aggregator's declared attributes ask for.

    Args:
        make: gives a fresh aggregator: a class or a function. What its signature has of `n_tasks`,
            `seed`, `generator` (seeded) and `steps_per_epoch` is given by keyword. An aggregator is
            an Aggregator, or any callable from rows (T, P) to a direction (P,); such a callable
            promises less.
        leave_out: names of checks that do not apply, for example "order of the tasks" where one
            task is the main one by intention.

    Raises:
        AssertionError: names the check and the kind of rows, and says what was expected and found.
        TypeError: `make` wants other arguments.
        ValueError: `leave_out` names no check.

    Example:
        >>> from equipoise import CAGrad
        >>> check_aggregator(lambda: CAGrad(c=0.5))
        >>> check_aggregator(lambda: lambda rows: rows[0], leave_out=["order of the tasks"])
    """
    run(aggregator_checks(make), leave_out)


def aggregator_checks(make: Make) -> Iterator[tuple[str, Check]]:
    """The same checks one by one, as pairs (name, callable), for pytest.

    Args:
        make: as of `check_aggregator`.

    Example:
        >>> from equipoise import CAGrad
        >>> checks = dict(aggregator_checks(CAGrad))
        >>> checks["scale"]()  # @pytest.mark.parametrize("name", checks) makes a test of each
    """
    one = fresh(make, 3)
    wanted = {
        "any rows": any_rows,
        "rows unchanged": rows_unchanged,
        "single precision": single_precision,
        "global generator": global_generator,
    }
    if not hasattr(one, "generator"):
        wanted["order of the tasks"] = order_of_the_tasks
    if isinstance(one, Aggregator) or hasattr(one, "degree"):
        wanted["scale"] = scale
    if isinstance(one, Aggregator):
        wanted |= {"agreement": agreement, "not finite": not_finite}
    if getattr(one, "never_conflicts", False):
        wanted |= {"no conflict": no_conflict, "rows that cancel": rows_that_cancel}
    if isinstance(one, GramAggregator) or getattr(one, "never_conflicts", False):
        wanted["opposite gradients"] = opposite_gradients
    if isinstance(one, nn.Module):
        wanted["saved state"] = saved_state
    if hasattr(one, "coefficients"):
        wanted["coefficients"] = coefficients
    if hasattr(one, "known_coefficients"):
        wanted["known coefficients"] = known_coefficients
    yield from named(wanted, make)


# ------------------------------------------------------------------------ any rows at any scale


def any_rows(make: Make) -> None:
    """A finite direction of the right shape and dtype for any rows; zero for zero rows."""
    for n_tasks in TASKS:
        for dtype in (torch.float32, torch.float64):
            for size in _scales(n_tasks):
                for kind, rows in kinds_of_rows(n_tasks):
                    given = (rows * size).to(dtype)
                    where = f"{kind} rows, T={n_tasks}, scale {size:g}, {dtype}"
                    found = direction(make, given, where)
                    finite = bool(found.isfinite().all())
                    ensure(finite, where, "finite numbers", found.tolist()[:5])
                    ensure(found.dtype == dtype, where, f"dtype {dtype}", found.dtype)
                    if not bool(rows.any()):
                        ensure(not found.any(), where, "a zero direction", found.tolist()[:5])


def rows_unchanged(make: Make) -> None:
    """The rows are those that were given."""
    for n_tasks in TASKS:
        for kind, rows in kinds_of_rows(n_tasks):
            given = rows.clone()
            direction(make, given, kind)
            where = f"{kind} rows, T={n_tasks}"
            ensure(torch.equal(given, rows), where, "the rows as given", "changed ones")


def no_conflict(make: Make) -> None:
    """No task's product with the direction is negative, where `never_conflicts` says so."""
    for n_tasks in TASKS:
        for size in _scales(n_tasks):
            for kind, rows in kinds_of_rows(n_tasks):
                rows = rows * size
                where = f"{kind} rows, T={n_tasks}, scale {size:g}"
                found = direction(make, rows, where)
                # What is left of gradients that cancel is round-off, and so is its sign.
                left = 1e-6 * length(found) + 1e-7 * longest(rows)
                worst = (rows @ found).min().item() / (longest(rows) or 1.0)
                bound = f"no product below -{left:.2g} of the longest row (never_conflicts)"
                ensure(worst >= -left, where, bound, f"{worst:.2g}")


def rows_that_cancel(make: Make) -> None:
    """Nor where non-negative weights combine the rows to zero, up to their round-off."""
    for n_tasks, rank, zeros in CANCELLING:
        generator = torch.Generator().manual_seed(n_tasks)
        rows, _ = nearly_stationary_rows(n_tasks, rank, zeros=zeros, generator=generator)
        where = f"cancelling rows, T={n_tasks}, rank {rank}, {zeros} weights 0, {rows.dtype}"
        found, lengths = direction(make, rows, where).double(), rows.double().norm(dim=1)
        worst = (rows.double() @ found / lengths).min().item()
        bound = f"no product below -{UNRESOLVED:g} for unit rows (never_conflicts)"
        ensure(worst >= -UNRESOLVED, where, bound, f"{worst:.2g}")


def scale(make: Make) -> None:
    """Rows c times as long give a direction c ** degree times as long."""
    for n_tasks in TASKS:
        for kind, rows in kinds_of_rows(n_tasks):
            found = direction(make, rows, kind)
            power = getattr(fresh(make, n_tasks), "degree", 1)
            for factor in DEGREES:
                where = f"{kind} rows, T={n_tasks}, times {factor:g}"
                scaled = direction(make, factor * rows, where) / factor**power
                off = length(scaled - found)
                bound = 1e-8 * max(length(found), longest(rows))
                expected = f"the direction times {factor:g} ** {power:g}"
                ensure(off <= bound, where, expected, f"one that is off by {off:.2g}")


def order_of_the_tasks(make: Make) -> None:
    """The order of the rows does not matter, where nothing is drawn."""
    for n_tasks in TASKS:
        order = torch.randperm(n_tasks, generator=torch.Generator().manual_seed(1))
        for kind, rows in kinds_of_rows(n_tasks):
            if kind.startswith("nearly"):
                continue  # round-off decides between the two
            where = f"{kind} rows, T={n_tasks}, in another order"
            found, other = direction(make, rows, where), direction(make, rows[order], where)
            off = length(other - found)
            bound = 1e-5 * max(length(found), longest(rows))
            ensure(off <= bound, where, "the same direction", f"one that is off by {off:.2g}")


def agreement(make: Make) -> None:
    """All tasks ask for the same: they get it, at a length that depends on T and g only."""
    for n_tasks in TASKS:
        where = f"all rows alike, T={n_tasks}"
        rows = torch.tensor([[3.0, -4.0, 0.0]], dtype=torch.float64).repeat(n_tasks, 1)
        found = direction(make, rows, where)
        factor = (found @ rows[0] / 25).item()
        within = 0.05 < factor <= 2 * n_tasks
        ensure(within, where, f"between 0.05 g and {2 * n_tasks} g", f"{factor:.3g} g")
        off = length(found - factor * rows[0])
        ensure(off <= 1e-6 * length(found), where, "along g", f"{off:.2g} off it")


def opposite_gradients(make: Make) -> None:
    """Two opposite gradients: nothing, where conflicts are excluded; else along their line."""
    rows = torch.tensor([[3.0, -4.0], [-6.0, 8.0]], dtype=torch.float64)
    where = "two opposite rows"
    found, one = direction(make, rows, where), fresh(make, 2)
    if getattr(one, "never_conflicts", False):
        ensure(length(found) <= 1e-7, where, "zero (never_conflicts)", found.tolist())
    if isinstance(one, GramAggregator):
        beside = abs(found[0] * 4 + found[1] * 3).item()
        ensure(beside <= 1e-6, where, "a direction along them", found.tolist())


def single_precision(make: Make) -> None:
    """Float32 rows give the direction of float64 rows."""
    for n_tasks in TASKS:
        where = f"independent rows, T={n_tasks}, torch.float32"
        rows = independent(n_tasks).float()
        single = direction(make, rows, where).double()
        double = direction(make, rows.double(), where)
        # Weights of both signs cancel: what is lost is relative to what is added up.
        off, bound = length(single - double), 1e-3 * max(length(double), longest(rows))
        ensure(off <= bound, where, "the direction of float64", f"one off by {off:.2g}")


def not_finite(make: Make) -> None:
    """A row that is not finite is named by a NonFiniteError."""
    for bad in (torch.nan, torch.inf, -torch.inf):
        for row in (0, 2):
            where = f"independent rows with {bad} in row {row}"
            rows = independent(3)
            rows[row, 1] = bad
            try:
                found: object = fresh(make, 3)(rows)
            except NonFiniteError as error:
                found = f"NonFiniteError of task {error.task}"
                if error.task == row:
                    continue
            ensure(False, where, f"NonFiniteError of task {row}", found)


# ---------------------------------------------------------------------------- state and contract


def saved_state(make: Make) -> None:
    """A fresh one that loads the state goes on as the old one would, bit for bit."""
    rows = [independent(3) * (k + 1) for k in range(6)]
    first, second = fresh(make, 3), fresh(make, 3, seed=99)
    for one in rows[:3]:
        first(one)
    state = saved(first)
    second.load_state_dict(state)
    where = "independent rows, after 3 calls"
    ensure(same_state(saved(second), state), where, "the state that was loaded", "another one")
    for one in rows[3:]:
        expected, found = first(one), second(one)
        ensure(torch.equal(found, expected), where, "the direction bit for bit", found - expected)


def global_generator(make: Make) -> None:
    """Draws leave torch's global generator alone."""
    one, before = fresh(make, 3), torch.get_rng_state()
    one(independent(3))
    same = torch.equal(torch.get_rng_state(), before)
    ensure(same, "independent rows", "torch's global generator as it was", "a moved one")


def coefficients(make: Make) -> None:
    """Coefficients w of the Gram matrix, in float64, give the direction as rows^T w."""
    for n_tasks in TASKS:
        where = f"independent rows, T={n_tasks}"
        rows, one = independent(n_tasks), fresh(make, n_tasks)
        more = (torch.ones(n_tasks),) if getattr(one, "needs_losses", False) else ()
        w = one.coefficients(rows @ rows.T, *more)
        ensure(w.shape == (n_tasks,), where, f"coefficients ({n_tasks},)", tuple(w.shape))
        ensure(w.dtype == torch.float64, where, "coefficients in float64", w.dtype)
        off = length(w @ rows - direction(make, rows, where))
        bound = 1e-9 * (1 + w.abs().sum().item())
        ensure(off <= bound, where, "the direction of the coefficients", f"one off by {off:.2g}")


def known_coefficients(make: Make) -> None:
    """Coefficients that are known before the gradients are those that come of them."""
    one, rows = fresh(make, 3), independent(3)
    if hasattr(one, "begin"):
        one.begin(torch.tensor([True, True, False, True]))
    known = one.known_coefficients(3)
    if known is not None:
        more = (torch.ones(3),) if getattr(one, "needs_losses", False) else ()
        found = one.coefficients(rows @ rows.T, *more)
        same = torch.equal(known, found)
        ensure(same, "independent rows, T=3", f"coefficients {known.tolist()}", found.tolist())


def _scales(n_tasks: int) -> tuple[float, ...]:
    """The lengths of rows that are tried: with many tasks two of them, for the sake of time."""
    return SCALES if n_tasks < 100 else SCALES[1:3]
