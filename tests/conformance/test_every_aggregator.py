"""What every aggregator of the registry promises; a new one enters by being registered."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

import equipoise as eq
from equipoise.registry import METHODS
from equipoise.testing import aggregator_checks
from equipoise.testing.common import fresh

TOKENS = [
    method.token
    for method in METHODS.values()
    if method.axis == "aggregation" and method.level == "parameters"
]
CHECKS = {
    (token, name): check
    for token in TOKENS
    for name, check in aggregator_checks(METHODS[token].factory)
}
every_aggregator = pytest.mark.parametrize("token", TOKENS)


@pytest.mark.parametrize(("token", "name"), CHECKS)
def test_conformance(token: str, name: str) -> None:
    CHECKS[token, name]()


@every_aggregator
def test_every_aggregator_has_the_checks_of_its_kind(token: str) -> None:
    # A check that is left out by mistake would be missed by nobody.
    one = fresh(METHODS[token].factory, 3)
    names = {name for of, name in CHECKS if of == token}
    expected = {"any rows", "rows unchanged", "scale", "agreement", "single precision"}
    expected |= {"not finite", "saved state", "global generator"}
    if isinstance(one, eq.GramAggregator):
        expected |= {"opposite gradients", "coefficients", "known coefficients"}
    if one.never_conflicts:
        expected |= {"opposite gradients", "no conflict", "rows that cancel"}
    if not hasattr(one, "generator"):
        expected |= {"order of the tasks"}
    assert names == expected


@every_aggregator
def test_conflicts_where_none_are_excluded(token: str) -> None:
    # The attribute is no decoration: each method without it does conflict somewhere.
    factory = METHODS[token].factory
    if fresh(factory, 3).never_conflicts:
        pytest.skip("never conflicts")
    worst = 0.0
    for n_tasks in (3, 5, 10):
        for seed in range(40):
            rng = np.random.default_rng(seed)
            rows = rng.normal(size=(n_tasks, n_tasks - 1 + seed % 3)) + 0.3 * rng.normal()
            rows *= 10 ** rng.uniform(-1, 1, size=(n_tasks, 1))
            given = torch.from_numpy(rows)
            direction = fresh(factory, n_tasks, seed)(given)
            worst = min(worst, ((given @ direction) / given.norm(dim=1)).min().item())
    assert worst < -1e-3


@every_aggregator
def test_the_docstring_says_what_a_user_must_know(token: str) -> None:
    text = " ".join((inspect.getdoc(METHODS[token].factory) or "").split())
    for word in ("Unanimity value", "zero", "Passes:"):
        assert word.lower() in text.lower(), word
