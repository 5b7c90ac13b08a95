"""A SharedTrunk whose losses reach more than their own heads and the features."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    Counted,
    conv_model,
    differences,
    largest_difference,
    linear_model,
    parameters_of,
    regression_batch,
    sgd,
    snapshot,
)
from torch import Tensor, nn

import equipoise as eq

TASKS = ("left", "right")


class Scaled(eq.SharedTrunk):
    """Has a parameter between trunk and heads."""

    def __init__(self, trunk: nn.Module, heads: dict[str, nn.Module]) -> None:
        super().__init__(trunk, heads)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 6, dtype=torch.float64))

    def head(self, task: str, features: Any) -> Any:
        return super().head(task, features * self.scale)


class Margin(nn.Module):
    """A loss that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.margin = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target - self.margin).square().mean() + 0.1 * self.margin.square()


Case = tuple[eq.SharedTrunk, dict[str, Callable], list[Tensor]]


def penalty() -> Case:
    model = linear_model(TASKS)

    def penalised(output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(output, target) + model.trunk[0].weight.square().sum()

    return model, {"left": penalised, "right": F.mse_loss}, []


def own_parameter() -> Case:
    margin = Margin()
    return linear_model(TASKS), {"left": margin, "right": F.mse_loss}, [margin.margin]


def between() -> Case:
    model = linear_model(TASKS)
    scaled = Scaled(model.trunk, dict(model.heads.items()))
    return scaled, dict.fromkeys(TASKS, F.mse_loss), []


def other_head() -> Case:
    model = linear_model(TASKS)

    def alike(output: Tensor, target: Tensor) -> Tensor:
        gap = model.heads["left"][2].weight - model.heads["right"][2].weight
        return F.mse_loss(output, target) + gap.square().sum()

    return model, {"left": F.mse_loss, "right": alike}, []


CASES = {"penalty": penalty, "own": own_parameter, "between": between, "other head": other_head}
SHARED = {
    "penalty": ["trunk.*"],
    "own": ["trunk.*"],
    "between": ["trunk.*", "scale"],
    "other head": ["trunk.*", "heads.left.2.weight"],
}


def closure(case: Case, batch: tuple) -> Callable[[], dict[str, Tensor]]:
    model, losses, _ = case
    inputs, targets = batch

    def found() -> dict[str, Tensor]:
        outputs = model(inputs)
        return {t: losses[t](model.head(t, model.trunk(inputs)), targets[t]) for t in outputs}

    return found


def run(name: str, recipe: str, form: str) -> tuple[dict[str, Tensor], list]:
    case = CASES[name]()
    model, losses, more = case
    parsed = eq.Recipe.parse(recipe)

    def optimizer(parameters: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD([*parameters, *more], lr=lr)

    given = losses if form == "trunk" else list(TASKS)
    shared = None if form == "trunk" else SHARED[name]
    step = parsed.build(model, given, 0.01, 2, optimizer=optimizer, seed=0, shared=shared)
    reports = []
    for k in range(3):
        batch = regression_batch(TASKS, seed=k)
        reports.append(step(*batch) if form == "trunk" else step(closure(case, batch)))
    found = {**parameters_of(model), **{f"more.{i}": p.detach() for i, p in enumerate(more)}}
    return found, reports


@pytest.mark.parametrize("recipe", ["ew", "si+cagrad", "graddrop", "f-mgda", "bls+mgda"])
@pytest.mark.parametrize("name", CASES)
def test_nothing_is_lost(name: str, recipe: str) -> None:
    ours, reports = run(name, recipe, "trunk")
    plain, expected = run(name, recipe, "closure")
    assert largest_difference(ours, plain) < 1e-12
    for a, b in zip(reports, expected, strict=True):
        assert torch.allclose(a.losses, b.losses, rtol=1e-12)
        assert (a.gram is None) == (b.gram is None)
        assert a.gram is None or torch.allclose(a.gram, b.gram, rtol=1e-10)


def test_plain_autograd_for_the_sum() -> None:
    for name in CASES:
        model, losses, more = CASES[name]()
        step = eq.Step(model, losses, torch.optim.SGD([*model.parameters(), *more], lr=0.0))
        inputs, targets = regression_batch(TASKS)
        step(inputs, targets)
        sum(losses[t](model.head(t, model.trunk(inputs)), targets[t]) for t in TASKS).backward()
        for p in (*model.parameters(), *more):  # .grad now holds both
            assert p.grad is not None, name
        again, losses, more_again = CASES[name]()
        sum(losses[t](again.head(t, again.trunk(inputs)), targets[t]) for t in TASKS).backward()
        for p, q in zip((*model.parameters(), *more), (*again.parameters(), *more_again),
                        strict=True):  # fmt: skip
            assert torch.allclose(p.grad, 2 * q.grad, rtol=1e-12), name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"level": "features"}, "level='features'"),
        ({"line_search": eq.FastBacktracking()}, "FastBacktracking"),
    ],
)
def test_features_do_not_know_of_it(options: dict, words: str) -> None:
    model, losses, _ = penalty()
    step = eq.Step(model, losses, sgd(model), None, eq.MGDA(), **options)
    before = snapshot(step)
    words += " and the loss of task 'left': the loss reaches parameter 'trunk.0.weight'"
    for _ in range(2):  # each time
        with pytest.raises(eq.CombinationError, match=words):
            step(*regression_batch(TASKS))
    assert differences(before, snapshot(step)) == []


def test_draws_and_buffers_are_those_of_one_look() -> None:
    def trained(penalised: bool) -> tuple[eq.SharedTrunk, list[Tensor]]:
        model = conv_model(TASKS, dtype=torch.float64)
        weight = model.trunk[0].weight

        def loss(output: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(output, target) + (0 * weight.sum() if penalised else 0)

        step = eq.Step(model, {"left": loss, "right": F.cross_entropy}, sgd(model))
        torch.manual_seed(3)
        g = torch.Generator().manual_seed(0)
        found = []
        for _ in range(3):
            targets = {t: torch.randint(3, (8,), generator=g) for t in TASKS}
            found.append(step(torch.randn(8, 1, 6, 6, generator=g).double(), targets).losses)
        return model, found

    (plain, losses), (other, same) = trained(False), trained(True)
    assert torch.allclose(torch.stack(losses), torch.stack(same), rtol=1e-12)
    assert largest_difference(parameters_of(plain), parameters_of(other)) < 1e-12
    for (name, a), b in zip(plain.named_buffers(), other.buffers(), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-12), name


def test_it_costs_nothing_where_there_is_nothing() -> None:
    model = linear_model(TASKS)
    trunk = model.trunk = Counted(model.trunk)
    step = eq.Step(model, dict.fromkeys(TASKS, F.mse_loss), sgd(model), None, eq.MGDA())
    for _ in range(2):
        step(*regression_batch(TASKS))
        assert trunk.counts() == (1, 2)


def test_a_task_that_comes_later_is_looked_at_when_it_comes() -> None:
    model, losses, more = own_parameter()
    optimizer = torch.optim.SGD([*model.parameters(), *more], lr=0.1)
    step = eq.Step(model, losses, optimizer, None, eq.CAGrad())
    inputs, targets = regression_batch(TASKS)
    step(inputs, {"right": targets["right"]})
    start = more[0].detach().clone()
    step(inputs, targets)
    assert not torch.equal(more[0], start)
