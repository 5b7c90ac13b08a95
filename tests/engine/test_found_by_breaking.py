"""What readers who tried to break a Step have found, each once."""

import pickle
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    all_tasks,
    differences,
    largest_difference,
    linear_model,
    parameters_of,
    regression_batch,
    regression_step,
    sgd,
)
from torch import Tensor, nn

import equipoise as eq

TASKS = ("left", "right")


def closure(model: eq.SharedTrunk, k: int = 0) -> Callable[[], dict[str, Tensor]]:
    inputs, targets = regression_batch(TASKS, seed=k)
    return lambda: {t: F.mse_loss(out, targets[t]) for t, out in model(inputs).items()}


def test_famo_learns_under_autocast() -> None:
    model = linear_model(TASKS, dtype=torch.float32)
    famo = eq.FAMO()
    step = eq.Step(model, all_tasks(model, F.mse_loss), sgd(model), famo)
    for k in range(5):
        with torch.autocast("cpu", torch.bfloat16):
            step(*regression_batch(TASKS, seed=k, dtype=torch.float32))
    assert bool((famo.logits != 0).all())


@pytest.mark.parametrize("copied", [deepcopy, lambda step: pickle.loads(pickle.dumps(step))])
@pytest.mark.parametrize("make", [lambda: eq.every(3, eq.IMTLG()), eq.GradVac, eq.CAGrad])
def test_a_copy_of_a_step_is_its_own(make: Callable, copied: Callable) -> None:
    step = regression_step(eq.IGBv1(2), make())
    step(*regression_batch())
    other = copied(step)
    for k in range(4):
        step(*regression_batch(seed=k))
    for k in range(4):
        other(*regression_batch(seed=k))
    assert differences(parameters_of(step.model), parameters_of(other.model)) == []


def reaching_right(model: eq.SharedTrunk) -> dict[str, Callable]:
    weight = model.heads["right"][2].weight

    def left(output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(output, target) + weight.square().sum()

    return {"left": left, "right": F.mse_loss}


@pytest.mark.parametrize("recipe", ["mgda", "f-cagrad", "bls+mgda"])
def test_resuming_where_a_loss_reaches_another_head(recipe: str) -> None:
    def build() -> eq.Step:
        model = linear_model(TASKS)
        return eq.Recipe.parse(recipe).build(model, reaching_right(model), 0.1, 2, seed=0)

    inputs, targets = regression_batch(TASKS)
    step, fresh = build(), build()
    step(inputs, {"left": targets["left"]})  # right's head is seen with left alone
    fresh.load_state_dict(step.state_dict())
    reports = [one(inputs, targets) for one in (step, fresh)]
    assert differences(*reports) == []
    assert differences(parameters_of(step.model), parameters_of(fresh.model)) == []


def test_another_loss_is_looked_at_as_the_first_was() -> None:
    model = linear_model(TASKS)
    step = eq.Step(model, all_tasks(model, F.mse_loss), sgd(model, lr=1e-3), None, eq.MGDA())
    step(*regression_batch())
    before = float(model.trunk[0].weight.detach().norm())
    step.losses["left"] = lambda output, target: 300 * model.trunk[0].weight.square().sum()
    step.losses["right"] = step.losses["left"]
    step(*regression_batch())
    assert float(model.trunk[0].weight.detach().norm()) < 0.5 * before


@pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")  # on Python 3.13.0
def test_a_compiled_part_hides_what_is_shared() -> None:
    model = linear_model(TASKS)
    compiled = torch.compile(model, backend="aot_eager")
    inputs, targets = regression_batch(TASKS)

    def losses() -> dict[str, Tensor]:
        return {t: F.mse_loss(out, targets[t]) for t, out in compiled(inputs).items()}

    step = eq.Step(model, TASKS, sgd(model), None, eq.CAGrad())
    with pytest.raises(eq.TaskError, match="'left': its graph has a compiled part"):
        step(losses)
    plain = linear_model(TASKS)
    said = eq.Step(model, TASKS, sgd(model), None, eq.CAGrad(), shared=model.trunk)
    expected = eq.Step(plain, TASKS, sgd(plain), None, eq.CAGrad(), shared=plain.trunk)
    said(losses)
    expected(closure(plain))
    assert largest_difference(parameters_of(model), parameters_of(plain)) < 1e-12
    torch._dynamo.reset()


def test_model_and_optimizer_stay_and_the_bound_is_checked() -> None:
    step = regression_step()
    for name, value in (("model", linear_model()), ("optimizer", None), ("shared", None)):
        with pytest.raises(eq.EquipoiseError, match=f"a Step keeps its {name}"):
            setattr(step, name, value)
    with pytest.raises(ValueError, match="clip_norm is -1"):
        step.clip_norm = -1.0
    step.clip_norm = 1e-9
    before = parameters_of(step.model)
    step(*regression_batch())
    assert largest_difference(before, parameters_of(step.model)) < 1e-6


def test_a_weighting_that_goes_takes_its_parameters_along() -> None:
    step = regression_step(eq.UW(2), momentum=0.9)
    step(*regression_batch())
    gone = step.weighting.log_variances
    step.weighting = eq.SI()
    step(*regression_batch())
    assert all(p is not gone for g in step.optimizer.param_groups for p in g["params"])
    assert gone not in step.optimizer.state
    regression_step(eq.SI(), momentum=0.9).load_state_dict(step.state_dict())
    step.weighting = step.aggregator = None  # what they are if nothing is said
    assert isinstance(step.weighting, eq.EW) and isinstance(step.aggregator, eq.Sum)


def test_the_joint_norm_where_nothing_is_shared() -> None:
    model = linear_model(TASKS)
    model.trunk.requires_grad_(False)
    sharpness = eq.TaskSharpness(rho=0.1, norm="joint")
    losses = all_tasks(model, F.mse_loss)
    step = eq.Step(model, losses, sgd(model), None, eq.MGDA(), sharpness)
    assert step(*regression_batch()).accepted


def test_a_forward_pass_outside_the_closure_is_named() -> None:
    model = linear_model(TASKS)
    step = eq.Step(model, TASKS, sgd(model), None, eq.MGDA(), eq.TaskSharpness(0.1))
    found = closure(model)()
    before = parameters_of(model)
    with pytest.raises(eq.EquipoiseError, match="whole forward pass inside the closure"):
        step(lambda: found)
    assert differences(before, parameters_of(model)) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weighting": eq.CAGrad()}, "weighting is a CAGrad; give a Weighting"),
        ({"aggregator": eq.SI()}, "aggregator is a SI; give an Aggregator"),
        ({"aggregator": eq.CAGrad}, r"aggregator is the class CAGrad; give CAGrad\(\)"),
        ({"aggregator": "cagrad"}, "aggregator is a str; give an Aggregator"),
        ({"optimizer": [1]}, "optimizer is a list; give a torch.optim.Optimizer"),
    ],
)
def test_things_in_the_wrong_place(options: dict[str, Any], words: str) -> None:
    model = linear_model()
    given = {"optimizer": sgd(model), **options}
    with pytest.raises(eq.CombinationError, match=words):
        eq.Step(model, all_tasks(model, F.mse_loss), **given)


def test_the_functional_form_without_a_way_to_the_shared_part() -> None:
    trunk, head = nn.Linear(3, 4), nn.Linear(4, 2)
    z = trunk(torch.randn(5, 3)).detach()
    losses = list(head(z).square().mean(0))
    with pytest.raises(eq.EquipoiseError, match="no loss reaches any of the shared parameters"):
        eq.backward(losses, trunk.parameters(), eq.MGDA())
    z = trunk(torch.randn(5, 3))
    losses = list(head(z).square().mean(0))
    with pytest.raises(eq.EquipoiseError, match="features holds no tensor that requires"):
        eq.backward(losses, trunk.parameters(), eq.MGDA(), z.detach())


class Twice(nn.Module):
    """A head with two parameters that autograd gives one gradient, and one with an expanded one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (
            nn.Parameter(torch.zeros(6, 1, dtype=torch.float64)) for _ in range(3)
        )

    def forward(self, z: Tensor) -> Tensor:
        return z @ (self.first + self.second) + self.third.sum()


@pytest.mark.parametrize("clip_norm", [None, 1e-3])
@pytest.mark.parametrize("recipe", ["ew", "mgda", "si+cagrad", "mgda-ub", "si+f-mgda"])
def test_gradients_that_autograd_gives_twice(recipe: str, clip_norm: float | None) -> None:
    model = linear_model(TASKS)
    for task in TASKS:
        model.heads[task] = Twice()
    step = eq.Recipe.parse(recipe).build(
        model, all_tasks(model, F.mse_loss), 0.1, 2, optimizer=torch.optim.SGD
    )
    step.clip_norm = clip_norm
    report = step(*regression_batch())
    gradients = [p.grad for p in model.parameters()]
    norm = float(torch.cat([g.flatten() for g in gradients]).norm())
    assert clip_norm is None or norm == pytest.approx(clip_norm, rel=1e-6)
    for task, factor in zip(TASKS, report.factors.tolist(), strict=True):
        head = model.heads[task]
        assert torch.equal(head.first.grad, head.second.grad)
        if clip_norm is None and "f-" not in recipe:
            plain = linear_model(TASKS)
            plain.heads[task] = Twice()
            inputs, targets = regression_batch()
            F.mse_loss(plain.heads[task](plain.trunk(inputs)), targets[task]).backward()
            expected = factor * plain.heads[task].first.grad
            assert torch.allclose(head.first.grad, expected, rtol=1e-10)
