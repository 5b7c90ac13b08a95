"""Line searches beside other stages: what is refused, and what recipes mean."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import all_tasks, linear_model, regression_batch, sgd

import equipoise as eq


def build(search: Any, optimizer: Any = None, **options: Any) -> eq.Step:
    model = linear_model()
    optimizer = sgd(model) if optimizer is None else optimizer(model)
    return eq.Step(model, all_tasks(model, F.mse_loss), optimizer, line_search=search, **options)


@pytest.mark.parametrize(
    ("search", "options", "words"),
    [
        (eq.Backtracking(), {"level": "features", "aggregator": eq.MGDA()}, "level='features'"),
        (eq.FastBacktracking(), {"aggregator": lambda rows: rows.sum(0)}, "coefficients"),
        (eq.FastBacktracking(), {"sharpness": eq.TaskSharpness()}, "TaskSharpness"),
        (eq.Backtracking(), {"aggregator": eq.every(3, eq.MGDA())}, "Every(k=3)"),
        (eq.Backtracking(), {"clip_norm": 1.0}, "clip_norm=1.0"),
        ("armijo", {}, "line_search is a str"),
    ],
)
def test_refused_and_both_named(search: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(eq.CombinationError) as caught:
        build(search, **options)
    assert words in str(caught.value)
    if isinstance(search, eq.LineSearch) and "coefficients" not in words:
        assert type(search).__name__ in str(caught.value) or "TaskSharpness" in words


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (lambda m: torch.optim.Adam(m.parameters()), "Backtracking and Adam"),
        (lambda m: sgd(m, momentum=0.9), "SGD(momentum=0.9)"),
        (lambda m: sgd(m, weight_decay=0.1), "SGD(weight_decay=0.1)"),
        (lambda m: sgd(m, maximize=True), "SGD(maximize=True)"),
        (lambda m: sgd(m.trunk), "an optimizer without 'heads.left.0.weight'"),
    ],
)
def test_other_optimizers_are_refused(optimizer: Any, words: str) -> None:
    with pytest.raises(eq.CombinationError) as caught:
        build(eq.Backtracking(), optimizer)
    assert words in str(caught.value)


def test_the_optimizers_own_step_takes_any_optimizer() -> None:
    search = eq.Backtracking(direction="optimizer")
    step = build(search, lambda m: sgd(m, momentum=0.9, weight_decay=0.1), clip_norm=1.0)
    assert step(*regression_batch()).accepted


def test_frozen_parameters_stay() -> None:
    model = linear_model()
    model.trunk[0].requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    before = model.trunk[0].weight.clone()
    losses = all_tasks(model, F.mse_loss)
    for search in (eq.Backtracking(), eq.FastBacktracking(verify=True)):
        assert eq.Step(model, losses, optimizer, line_search=search)(*regression_batch()).accepted
    assert torch.equal(model.trunk[0].weight, before)


def test_separate_trunks_are_refused() -> None:
    model = linear_model().separated()
    for search in (eq.Backtracking(), eq.FastBacktracking()):
        with pytest.raises(eq.CombinationError, match="separate trunks"):
            eq.Step(model, all_tasks(model, F.mse_loss), sgd(model), line_search=search)


@pytest.mark.parametrize("search", [eq.Backtracking, eq.FastBacktracking])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta": 0.5}, "beta is 0.5"),
        ({"beta": 0.0}, "beta is 0.0"),
        ({"shrink": 1.0}, "shrink is 1.0"),
        ({"upper_shrink": 0.0}, "upper_shrink is 0.0"),
        ({"upper": 0.0}, "upper is 0.0"),
        ({"floor": 2.0}, "floor=2.0 and upper=1.0"),
        ({"rule": "all"}, "rule is 'all'"),
        ({"objective": "mean"}, "objective is 'mean'"),
        ({"steps_per_epoch": 0}, "steps_per_epoch is 0"),
        ({"halve_every": 1.5}, "halve_every is 1.5"),
    ],
)
def test_values_out_of_range(search: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        search(**options)


def test_values_of_one_search_only() -> None:
    with pytest.raises(ValueError, match="latent_scale is 'exact'"):
        eq.FastBacktracking(latent_scale="exact")
    with pytest.raises(ValueError, match="latent_scale is 0"):
        eq.FastBacktracking(latent_scale=0)
    with pytest.raises(ValueError, match="direction is 'adam'"):
        eq.Backtracking(direction="adam")  # ty: ignore[invalid-argument-type]


@pytest.mark.parametrize(
    ("text", "canonical", "search", "aggregator", "level"),
    [
        ("bls", "bls", "Backtracking", "Sum", "parameters"),
        ("MGDA+BLS", "bls+mgda", "Backtracking", "MGDA", "parameters"),
        ("bls+f-cagrad", "bls+f-cagrad", "Backtracking", "CAGrad", "parameters"),
        ("fbls", "fbls", "FastBacktracking", "MGDA", "features"),
        ("fbls+mgda", "fbls", "FastBacktracking", "MGDA", "features"),
        ("mgda-ub+fbls", "fbls", "FastBacktracking", "MGDA", "features"),
        ("fbls+sum", "fbls+sum", "FastBacktracking", "Sum", "features"),
        ("fbls+cagrad-ub(c=0.5)", "fbls+cagrad(c=0.5)", "FastBacktracking", "CAGrad", "features"),
        ("edm+fbls(verify=true)+igbv1", "igbv1+fbls(verify=true)+edm", "FastBacktracking", "EDM",
         "features"),
        ("fbls(latent_scale=1)", "fbls", "FastBacktracking", "MGDA", "features"),
        ("fbls(latent_scale=matched)", "fbls(latent_scale=matched)", "FastBacktracking", "MGDA",
         "features"),
        ("bls(halve_every=none)+edm", "bls(halve_every=none)+edm", "Backtracking", "EDM",
         "parameters"),
    ],
)  # fmt: skip
def test_recipes(text: str, canonical: str, search: str, aggregator: str, level: str) -> None:
    recipe = eq.Recipe.parse(text)
    assert str(recipe) == canonical
    assert eq.Recipe.parse(canonical) == recipe
    assert recipe.needs_sgd
    model = linear_model()
    step = recipe.build(model, all_tasks(model, F.mse_loss), 0.25, 7, seed=0)
    assert type(step.line_search).__name__ == search
    assert type(step.aggregator).__name__ == aggregator
    assert step.level == level
    assert step.line_search.steps_per_epoch == 7
    assert isinstance(step.optimizer, torch.optim.SGD)
    assert step(*regression_batch()).step_size is not None


def test_a_search_along_the_optimizers_step_keeps_the_optimizer() -> None:
    recipe = eq.Recipe.parse("bls(direction=optimizer)+mgda")
    assert not recipe.needs_sgd
    model = linear_model()
    step = recipe.build(model, all_tasks(model, F.mse_loss), 0.25, 7)
    assert isinstance(step.optimizer, torch.optim.Adam)
    assert step.optimizer.param_groups[0]["lr"] == 0.25


def test_the_plain_partner_keeps_the_search() -> None:
    assert str(eq.Recipe.parse("bls+f-mgda(rho=0.1)").plain) == "bls+mgda"
