"""What every weighting of the registry promises; a new one enters by being registered."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import equipoise as eq
from equipoise.registry import METHODS
from equipoise.testing import weighting_checks

FACTORIES: dict[str, Callable[..., Any]] = {
    method.token: method.factory for method in METHODS.values() if method.axis == "weighting"
}
VARIANTS: dict[str, Callable[..., Any]] = {
    "si(cap)": lambda: eq.SI(cap=1.5),
    "igbv1(cap)": lambda: eq.IGBv1(steps_per_epoch=2, cap=1.5),
    "igbv2(learning)": lambda n_tasks, generator: eq.IGBv2(
        1, n_tasks, generator, cap=1.5, learn_epoch=3, use_epoch=3, update_every=2,
        gradient_steps=2, batch_size=4, width=4, buffer_size=5,
    ),
    "stch(warm-up)": lambda: eq.STCH(mu=0.5, warmup_epochs=1, steps_per_epoch=2),
    "gradnorm(lr)": lambda: eq.GradNorm(lr=0.1),
    "famo(lr)": lambda: eq.FAMO(lr=0.2),
    "fixed(uw)": lambda n_tasks: eq.Fixed([1.0] * n_tasks, eq.UW(n_tasks)),
}  # fmt: skip


def checks() -> Iterator[Any]:
    """Each check of each weighting; one whose extra is missing is skipped as a whole."""
    for name, make in {**FACTORIES, **VARIANTS}.items():
        try:
            for check, call in weighting_checks(make):
                yield pytest.param(call, id=f"{name}-{check}")
        except eq.MissingExtraError as error:
            yield pytest.param(None, id=name, marks=pytest.mark.skip(str(error)))


@pytest.mark.parametrize("check", list(checks()))
def test_conformance(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("token", FACTORIES)
def test_the_docstring_says_what_a_user_must_know(token: str) -> None:
    assert "Passes:" in (inspect.getdoc(FACTORIES[token]) or "")
