"""What the first step checks costs the later ones nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import all_tasks, class_batch, conv_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import equipoise as eq
from equipoise.engine.passes import Findings, Passes
from equipoise.engine.trunk_network import TrunkNetwork

TASKS = ("a", "b", "c")
RECIPES = ("ew", "uw", "famo", "mgda-ub", "fbls(verify=true)", "bls", "cagrad", "f-cagrad")
CASES = [(recipe, "trunk") for recipe in RECIPES]
CASES += [(r, "closure") for r in RECIPES if r not in ("mgda-ub", "fbls(verify=true)")]
USERS = ("equipoise.engine.trunk_looks", "equipoise.engine.graph_evaluation")


class Operations(TorchDispatchMode):
    """Counts what is dispatched while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


def closure_of(model: nn.Module, inputs: Tensor, targets: dict[str, Tensor]) -> Callable:
    """Give the closure that evaluates all tasks on one batch."""

    def losses() -> dict[str, Tensor]:
        return {t: F.cross_entropy(output, targets[t]) for t, output in model(inputs).items()}

    return losses


def operations(recipe: str, form: str) -> list[Counter[str]]:
    """Give what each of the first three steps of a fresh network dispatches."""
    model = conv_model(TASKS)
    losses: Any = all_tasks(model, F.cross_entropy) if form == "trunk" else list(TASKS)
    step = eq.Recipe.parse(recipe).build(model, losses, 1e-3, 2, seed=0)
    inputs, targets = class_batch(TASKS)
    batch = (inputs, targets) if form == "trunk" else (closure_of(model, inputs, targets),)
    torch.manual_seed(7)
    found = []
    for _ in range(3):
        with Operations() as seen:
            step(*batch)
        found.append(seen.counts)
    return found


def without_checks(patch: pytest.MonkeyPatch) -> None:
    """Take what the first step checks out of it."""
    for user in USERS:
        patch.setattr(f"{user}.findings_of", lambda tasks, *_: Findings(frozenset(tasks)))
    patch.setattr(Passes, "one", lambda _: nullcontext())
    patch.setattr(TrunkNetwork, "beyond", lambda *_: {})


@pytest.mark.parametrize(("recipe", "form"), CASES)
def test_later_steps_dispatch_what_they_would_without(
    recipe: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = operations(recipe, form)
    with monkeypatch.context() as patch:
        without_checks(patch)
        bare = operations(recipe, form)
    assert checked[1:] == bare[1:]
    assert checked[0] - bare[0]  # the first step has them


@pytest.mark.parametrize("form", ["trunk", "closure"])
def test_a_network_is_looked_at_once_for_each_task(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[tuple[str, ...]] = []

    def noted(tasks: Any, *_: Any) -> Findings:
        looked.append(tuple(tasks))
        return Findings(frozenset(tasks))

    for user in USERS:
        monkeypatch.setattr(f"{user}.findings_of", noted)
    model = conv_model(TASKS)
    losses: Any = all_tasks(model, F.cross_entropy) if form == "trunk" else list(TASKS)
    step = eq.Step(model, losses, torch.optim.SGD(model.parameters(), lr=1e-3), None, eq.MGDA())
    inputs, targets = class_batch(TASKS)
    for present in (("a", "b"), ("b",), ("a", "c"), TASKS):
        some = {t: targets[t] for t in present}
        if form == "trunk":
            step(inputs, some)
        else:
            every = closure_of(model, inputs, targets)
            step(lambda every=every, some=some: {t: v for t, v in every().items() if t in some})
    assert looked == [("a", "b"), ("a", "c")]
