"""Each check of a weighting finds the fault that it is for, and passes what has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import equipoise as eq
from equipoise.testing import check_weighting, weighting_checks


class Right(eq.Weighting):
    """Each loss counts 1."""

    def weigh(self, losses: Tensor, present: Tensor) -> Tensor:
        return torch.ones_like(losses)


class Counting(Right):
    """Depends on how often it was called, and does not save that."""

    calls = 0

    def weigh(self, losses: Tensor, present: Tensor) -> Tensor:
        self.calls += 1
        return torch.full_like(losses, self.calls)


class Unsaved(Counting):
    """Says that it has a state, and does not take it back."""

    def get_extra_state(self) -> dict:
        return {"calls": self.calls}

    def set_extra_state(self, state: Any) -> None:
        pass


class Adding(Counting):
    """Adds what it loads to what it has."""

    def get_extra_state(self) -> dict:
        return {"calls": self.calls}

    def set_extra_state(self, state: Any) -> None:
        self.calls += state["calls"]


class Late(Adding):
    """Counts a batch before it refuses it."""

    def weigh(self, losses: Tensor, present: Tensor) -> Tensor:
        weights = super().weigh(losses, present)
        if bool((losses <= 0).any()):
            raise eq.TaskError(int((losses <= 0).nonzero()[0]), "loss is not positive.")
        return weights


class Graph(Right):
    """Keeps the graph of the last batch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(0))

    def weighted(self, losses: Tensor, present: Tensor) -> Tensor:
        self.last = losses * 2
        return super().weighted(losses, present)


def wrong(**members: Any) -> type:
    """A subclass with something wrong about it."""
    return type("Wrong", (Right,), members)


def refuses_wrongly(self: Any, losses: Tensor, present: Tensor) -> Tensor:
    if bool((losses <= 0).any()):
        raise eq.TaskError(0, "loss is not positive.")
    return torch.ones_like(losses)


def breaks_down(self: Any, losses: Tensor, present: Tensor) -> Tensor:
    if bool((losses < 0).any()):
        raise RuntimeError("negative")
    return torch.ones_like(losses)


def keeps_weights(self: Any, losses: Tensor, present: Tensor) -> Tensor:
    self.weights = losses
    return losses * 1


def doubled_with_mask(self: Any, losses: Tensor, present: Tensor | None = None) -> Tensor:
    self.weights = torch.ones_like(losses)
    return losses * (1 if present is None else 2)


def far_from_mean(losses: Tensor) -> Tensor:
    return losses / (losses - losses.mean()).detach()


FAULTS: list[tuple[str, Callable[..., Any], str]] = [
    ("any losses", lambda: far_from_mean, "around 1e-06, T=1: expected finite numbers"),
    ("any losses", lambda: lambda losses: -losses, "expected factors of 0 and more"),
    ("any losses", lambda: torch.sum, r"expected \(1,\), found \(\)"),
    ("any losses", lambda: lambda losses: losses.detach(), "found numbers"),
    ("any losses", wrong(weigh=lambda self, losses, _: losses.item()), "found AttributeError"),
    ("own loss", lambda: lambda losses: losses * losses.sum(), "first call, element 0"),
    ("own loss", lambda: lambda losses: losses * losses.roll(1).detach() + losses.mean(), "by its"),
    ("losses unchanged", lambda: lambda losses: losses.mul_(2), "positive losses: expected"),
    ("order of the tasks", lambda: lambda losses: losses * torch.arange(4), "in another order"),
    ("single precision", lambda: lambda losses: losses.double(), "dtype torch.float32"),
    ("single precision",
     lambda: lambda losses: losses * (1 if losses.dtype == torch.float64 else 2), "found"),
    ("global generator", lambda: lambda losses: losses * torch.rand(()), "a moved one"),
    ("weights", wrong(weighted=keeps_weights), "finite, detached"),
    ("weights", wrong(forward=lambda self, losses: losses * 1), "the attribute weights"),
    ("absent tasks", wrong(forward=doubled_with_mask), "a loss of nan that is absent"),
    ("all present", wrong(forward=doubled_with_mask), "present all True: expected"),
    ("refused losses", Late, "the state as before the refused call"),
    ("refused losses", wrong(weigh=refuses_wrongly), "a TaskError of task 1, found of task 0"),
    ("refused losses", wrong(weigh=breaks_down), "or a TaskError, found RuntimeError"),
    ("what it needs", wrong(needs_gram=True, observe=lambda self, *_, **__: None),
     "observe without gram: expected a ValueError"),
    ("saved state", Counting, "state after 1 calls"),
    ("saved state", Unsaved, "expected the state that was loaded"),
    ("state of a used one", Adding, "loaded into one that was used"),
    ("state without graph", Graph, "state 'last': expected a detached tensor"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "make", "words"), FAULTS, ids=[name for name, *_ in FAULTS])
def test_a_fault_is_found_and_described(name: str, make: Callable[..., Any], words: str) -> None:
    check = dict(weighting_checks(make))[name]
    with pytest.raises(AssertionError, match=words) as caught:
        check()
    assert str(caught.value).startswith(f"{name}: ")
    assert "expected" in str(caught.value) and "found" in str(caught.value)


@pytest.mark.parametrize(
    ("make", "words"), [FAULTS[0][1:], (FAULTS[-1][1], ": expected")], ids=["first", "last"]
)
def test_all_checks_together_find_it_too(make: Callable[..., Any], words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        check_weighting(make)


def test_every_check_has_a_fault_that_it_finds() -> None:
    names = {name for name, _ in weighting_checks(eq.GradNorm)}
    assert names == {name for name, *_ in FAULTS}


def test_what_is_right_passes() -> None:
    for make in (Right, eq.UW, eq.RLW, eq.DWA, lambda: torch.log, lambda: eq.GradNorm(lr=0.1)):
        check_weighting(make)


def test_a_plain_callable_promises_less() -> None:
    plain = {name for name, _ in weighting_checks(lambda: torch.log)}
    assert plain == {"any losses", "own loss", "losses unchanged", "order of the tasks",
                     "single precision", "global generator"}  # fmt: skip


def test_a_check_can_be_left_out() -> None:
    make = lambda: lambda losses: losses * torch.arange(1, len(losses) + 1)  # noqa: E731
    check_weighting(make, leave_out=["order of the tasks"])
    with pytest.raises(ValueError, match="there is no check 'scale' to leave out"):
        check_weighting(make, leave_out=["scale"])
