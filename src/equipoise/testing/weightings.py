"""What every weighting promises, as checks that anybody can run on one of their own."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.errors import TaskError
from equipoise.testing.common import (
    Check,
    Make,
    called,
    ensure,
    fresh,
    named,
    run,
    same_state,
    saved,
)
from equipoise.testing.steps import ALL, WARM, T, drawn, learn, warm, weighted
from equipoise.weighting.base import Weighting

PRESENT = torch.tensor([True, False, True, True])


def check_weighting(make: Make, *, leave_out: Collection[str] = ()) -> None:
    """Run every check that a weighting's declared attributes ask for.

    Args:
        make: gives a fresh weighting: a class or a function. What its signature has of `n_tasks`,
            `seed`, `generator` (seeded) and `steps_per_epoch` is given by keyword. A weighting is a
            Weighting, or any callable from losses (T,) to weighted losses (T,); such a callable
            promises less.
        leave_out: names of checks that do not apply, for example "order of the tasks" where tasks
            have constants of their own.

    Raises:
        AssertionError: names the check and the kind of losses, and says what was expected and
            found.
        TypeError: `make` wants other arguments.
        ValueError: `leave_out` names no check.

    Example:
        >>> from equipoise import DWA
        >>> check_weighting(lambda steps_per_epoch: DWA(steps_per_epoch, temperature=1.0))
        >>> check_weighting(lambda: lambda losses: losses.log())
    """
    run(weighting_checks(make), leave_out)


def weighting_checks(make: Make) -> Iterator[tuple[str, Check]]:
    """The same checks one by one, as pairs (name, callable), for pytest.

    Args:
        make: as of `check_weighting`.

    Example:
        >>> from equipoise import SI
        >>> checks = dict(weighting_checks(SI))
        >>> checks["own loss"]()  # @pytest.mark.parametrize("name", checks) makes a test of each
    """
    one = fresh(make, T)
    wanted = {
        "any losses": any_losses,
        "own loss": own_loss,
        "losses unchanged": losses_unchanged,
        "single precision": single_precision,
        "global generator": global_generator,
    }
    if not hasattr(one, "generator"):
        wanted["order of the tasks"] = order_of_the_tasks
    if isinstance(one, Weighting):
        wanted |= {
            "weights": weights,
            "absent tasks": absent_tasks,
            "all present": all_present,
            "refused losses": refused_losses,
        }
        if one.needs_gram or one.needs_losses_after:
            wanted["what it needs"] = what_it_needs
    if isinstance(one, nn.Module):
        wanted |= {"saved state": saved_state, "state of a used one": state_of_a_used_one}
        wanted["state without graph"] = state_without_graph
    yield from named(wanted, make)


# ------------------------------------------------------------------------------- any losses


def any_losses(make: Make) -> None:
    """Finite weighted losses and factors for positive losses of any size and number."""
    for n_tasks in (1, 2, T, 10):
        for size in (1e-6, 1.0, 1e6):
            where = f"positive losses around {size:g}, T={n_tasks}"
            one = fresh(make, n_tasks)
            for step in range(WARM):
                losses = drawn(n_tasks, step) * size
                found, factors = weighted(one, losses.requires_grad_(), where)
                finite = bool(found.isfinite().all() and factors.isfinite().all())
                ensure(finite, where, "finite numbers", (found.tolist(), factors.tolist()))
                ensure(found.shape == losses.shape, where, f"({n_tasks},)", tuple(found.shape))
                ensure(found.dtype == losses.dtype, where, f"{losses.dtype}", found.dtype)
                ensure((factors >= 0).all(), where, "factors of 0 and more", factors.tolist())
                learn(one, losses.detach(), found, torch.ones(n_tasks, dtype=torch.bool), step)


def own_loss(make: Make) -> None:
    """Element i depends on loss i through the graph, and on the others as numbers."""
    for one, when in ((fresh(make, T), "first call"), (warm(make), "later")):
        losses = drawn(T, 50).requires_grad_()
        found = called(one, when, losses)
        ensure(found.requires_grad, when, "weighted losses computed from the losses", "numbers")
        rows = [
            torch.autograd.grad(entry, losses, retain_graph=True, materialize_grads=True)[0]
            for entry in found
        ]
        for i, row in enumerate(rows):
            others = row.clone()
            others[i] = 0
            where = f"{when}, element {i}"
            ensure(not others.any(), where, "a derivative by its own loss only", row.tolist())


def losses_unchanged(make: Make) -> None:
    """The losses are those that were given."""
    one = warm(make)
    losses = drawn(T, 50)
    given = losses.clone()
    called(one, "positive losses", given)
    ensure(torch.equal(given, losses), "positive losses", losses.tolist(), given.tolist())


def order_of_the_tasks(make: Make) -> None:
    """Tasks in another order have the same weighted losses, where nothing is drawn."""
    order = torch.tensor([2, 0, 3, 1])
    straight, permuted = fresh(make, T), fresh(make, T)
    for step in range(WARM + 2):
        losses, where = drawn(T, step), f"positive losses in another order, call {step + 1}"
        expected = called(straight, where, losses)
        found = called(permuted, where, losses[order])
        close = torch.allclose(found, expected[order], rtol=1e-6, atol=1e-9)
        ensure(close, where, expected[order].tolist(), found.tolist())
        learn(straight, losses, expected, ALL, step)
        learn(permuted, losses[order], found, ALL, step, order)


def single_precision(make: Make) -> None:
    """Float32 losses give what float64 losses give, in float32."""
    exact, single, where = warm(make), warm(make), "positive losses in torch.float32"
    if isinstance(exact, nn.Module):
        single.load_state_dict(exact.state_dict())
    losses = drawn(T, 50).float()
    expected, found = called(exact, where, losses.double()), called(single, where, losses)
    ensure(found.dtype == torch.float32, where, "dtype torch.float32", found.dtype)
    close = torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-6)
    ensure(close, where, f"{expected.tolist()}", found.tolist())


def global_generator(make: Make) -> None:
    """Draws leave torch's global generator alone."""
    one, before = fresh(make, T), torch.get_rng_state()
    for step in range(WARM):
        called(one, "positive losses", drawn(T, step))
    same = torch.equal(torch.get_rng_state(), before)
    ensure(same, "positive losses", "torch's global generator as it was", "a moved one")


# ------------------------------------------------------------------- weights and absent tasks


def weights(make: Make) -> None:
    """`weights` are those of the last call: T finite numbers without a graph."""
    for one, where in ((fresh(make, T), "first call"), (warm(make), "later")):
        called(one, where, drawn(T, 50).requires_grad_())
        found: Any = getattr(one, "weights", None)
        ensure(isinstance(found, Tensor), where, "the attribute weights", found)
        good = found.shape == (T,) and not found.requires_grad and bool(found.isfinite().all())
        ensure(good, where, f"weights of shape ({T},), finite, detached", found)


def absent_tasks(make: Make) -> None:
    """An absent task may hold any loss, has weight 0, and sends nothing back."""
    for value in (torch.nan, -1.0, 0.0, torch.inf):
        where = f"a loss of {value} that is absent"
        one, losses = warm(make), drawn(T, 50)
        losses[1] = value
        losses.requires_grad_()
        found, factors = weighted(one, losses, where, PRESENT)
        finite = bool(found.isfinite().all() and factors.isfinite().all())
        ensure(finite, where, "finite numbers", (found.tolist(), factors.tolist()))
        of_absent = (("weighted loss", found), ("weight", one.weights), ("factor", factors))
        for name, vector in of_absent:
            ensure(vector[1] == 0, where, f"{name} 0 for that task", vector.tolist())
        learn(one, losses.detach(), found, PRESENT, 50)
        where = f"the call after {where}"
        found = called(one, where, drawn(T, 51))
        ensure(found.isfinite().all(), where, "finite numbers", found.tolist())


def all_present(make: Make) -> None:
    """`present` that is True for all tasks is the same as None."""
    plain, masked = warm(make), warm(make)
    expected, found = plain(drawn(T, 50)), masked(drawn(T, 50), ALL)
    same = torch.equal(found, expected)
    ensure(same, "present all True", expected.tolist(), found.tolist())


def refused_losses(make: Make) -> None:
    """A loss that is refused is named, and changes nothing."""
    for value in (-2.0, 0.0):
        for calls in (0, 1, WARM):
            where = f"a loss of {value} after {calls} calls"
            one, losses = warm(make, calls), drawn(T, 50)
            before, losses[1] = saved(one), value
            try:
                one(losses)
            except TaskError as error:
                ensure(error.task == 1, where, "a TaskError of task 1", f"of task {error.task}")
                same = same_state(saved(one), before)
                ensure(same, where, "the state as before the refused call", "another one")
            except Exception as error:
                ensure(False, where, "weighted losses or a TaskError", repr(error))


def what_it_needs(make: Make) -> None:
    """`observe` without what is declared to be needed is an error."""
    one, losses = warm(make), drawn(T, 50)
    one(losses)
    gram, after = torch.eye(T), losses
    for name, needed in (("gram", one.needs_gram), ("after", one.needs_losses_after)):
        if needed:
            given = {"gram": gram, "after": after, name: None}
            try:
                one.observe(losses, ALL, **given)
            except ValueError:
                continue
            ensure(False, f"observe without {name}", "a ValueError", "none")


# -------------------------------------------------------------------------------------- state


def saved_state(make: Make) -> None:
    """A fresh one that loads the state goes on as the old one would, bit for bit."""
    for calls in range(WARM + 1):
        first, second = warm(make, calls), fresh(make, T, seed=99)
        state = saved(first)
        second.load_state_dict(state)
        where = f"state after {calls} calls"
        ensure(same_state(saved(second), state), where, "the state that was loaded", "another one")
        _go_on_alike(first, second, where)


def state_of_a_used_one(make: Make) -> None:
    """The state loads into one that was used before."""
    first, second = warm(make), warm(make, 1)
    second.load_state_dict(saved(first))
    _go_on_alike(first, second, "state loaded into one that was used")


def state_without_graph(make: Make) -> None:
    """The state holds no graph, which would keep all batches in memory."""
    one = fresh(make, T)
    for step in range(WARM):
        called(one, "positive losses", drawn(T, step).requires_grad_())
    learned = {name for name, _ in one.named_parameters()}
    for name, value in one.state_dict(keep_vars=True).items():
        if name not in learned and isinstance(value, Tensor):
            ensure(not value.requires_grad, f"state {name!r}", "a detached tensor", "a graph")


def _go_on_alike(first: Any, second: Any, where: str) -> None:
    for step in range(50, 50 + WARM):
        losses = drawn(T, step)
        expected, found = called(first, where, losses), called(second, where, losses)
        ensure(torch.equal(found, expected), where, expected.tolist(), found.tolist())
        learn(first, losses, expected, ALL, step)
        learn(second, losses, found, ALL, step)
