"""Somebody else's loop: backward without an update, gradients that are there already, hooks."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    TWO,
    all_tasks,
    differences,
    largest_difference,
    linear_model,
    parameters_of,
    regression_batch,
    regression_step,
    sgd,
    snapshot,
)
from torch import Tensor, nn

import equipoise as eq

RECIPES = ["ew", "si+cagrad", "uw+f-mgda", "igbv1+f-cagrad(perturb=joint-mean)", "mgda-ub"]


def build(text: str, model: eq.SharedTrunk, **options: object) -> eq.Step:
    losses = all_tasks(model, F.mse_loss)
    return eq.Recipe.parse(text).build(model, losses, lr=0.05, steps_per_epoch=2, seed=1, **options)


# ---------------------------------------------------------------------------------- backward


@pytest.mark.parametrize("text", RECIPES)
def test_backward_and_an_optimizer_are_a_step(text: str) -> None:
    ours, theirs = linear_model(), linear_model()
    step, other = build(text, ours), build(text, theirs)
    for k in range(4):
        step(*regression_batch(seed=k))
        other.optimizer.zero_grad()
        other.backward(*regression_batch(seed=k))
        other.optimizer.step()
    assert largest_difference(parameters_of(ours), parameters_of(theirs)) < 1e-15
    assert differences(step.weighting.state_dict(), other.weighting.state_dict()) == []


@pytest.mark.parametrize("text", RECIPES)
def test_backward_adds_to_what_is_there(text: str) -> None:
    model, plain = linear_model(), linear_model()
    step, once = build(text, model), build(text, plain)
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    before = parameters_of(model)
    step.backward(*regression_batch())
    once.backward(*regression_batch())
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad + 3, rtol=0, atol=1e-15)
    assert differences(before, parameters_of(model)) == [], "nothing is updated"


def test_without_an_optimizer_there_are_gradients_only() -> None:
    model = linear_model()
    step = eq.Step(model, all_tasks(model, F.mse_loss), None, eq.UW(2), eq.CAGrad())
    before = step.weighting.log_variances.clone()
    step.backward(*regression_batch())
    assert all(p.grad is not None for p in model.parameters())
    assert (step.weighting.log_variances != before).all(), "a state of the stage's, which moves"
    with pytest.raises(eq.CombinationError, match=r"call step\.backward"):
        step(*regression_batch())
    fresh = eq.Step(model, step.losses, None, eq.UW(2), eq.CAGrad())
    fresh.load_state_dict(step.state_dict())


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ({"line_search": eq.Backtracking()}, "Backtracking and no optimizer"),
        ({"weighting": eq.FAMO()}, "FAMO and no optimizer"),
        ({"weighting": eq.IMTLL(2)}, "IMTLL and no optimizer"),
    ],
)
def test_what_needs_an_optimizer_says_so(what: dict, named: str) -> None:
    model = linear_model()
    with pytest.raises(eq.CombinationError, match=named):
        eq.Step(model, all_tasks(model, F.mse_loss), None, **what)


@pytest.mark.parametrize("text", ["bls+mgda", "fbls", "famo"])
def test_what_makes_the_update_itself_has_no_backward(text: str) -> None:
    step = build(text, linear_model())
    before = snapshot(step)
    with pytest.raises(eq.CombinationError, match="makes the update. Call step"):
        step.backward(*regression_batch())
    assert differences(before, snapshot(step)) == []


def test_clip_norm_bounds_what_backward_adds() -> None:
    step = regression_step(clip_norm=0.01)
    for p in step.model.parameters():
        p.grad = torch.full_like(p, 3.0)
    step.backward(*regression_batch())
    added = [(p.grad - 3).flatten() for p in step.model.parameters()]
    assert float(torch.cat(added).norm()) == pytest.approx(0.01, rel=1e-6)


def test_a_backward_that_raises_puts_the_gradients_back() -> None:
    step = build("si+f-mgda", linear_model())
    for p in step.model.parameters():
        p.grad = torch.full_like(p, 3.0)
    step.losses["right"] = lambda output, target: (output - output.detach()).abs().sqrt().sum() + 1
    before = snapshot(step)
    with pytest.raises(eq.NonFiniteError, match="right"):
        step.backward(*regression_batch())
    assert differences(before, snapshot(step)) == []


# ------------------------------------------------------------------- gradients of somebody's


def test_a_step_does_not_drop_gradients_in_silence() -> None:
    step = regression_step()
    inputs, targets = regression_batch()
    step(inputs, targets)
    step(inputs, targets)  # its own, which have done their work, go
    model = step.model
    auxiliary = model.trunk(inputs).square().mean()
    auxiliary.backward()  # adds to what the step has left
    before = snapshot(step)
    with pytest.raises(eq.EquipoiseError, match=r"'trunk\.0\.weight' holds a gradient from before"):
        step(inputs, targets)
    assert differences(before, snapshot(step)) == []
    step.optimizer.zero_grad(set_to_none=False)  # zeros are nothing to lose
    step(inputs, targets)
    step.optimizer.zero_grad()
    step.backward(inputs, targets)
    with pytest.raises(eq.EquipoiseError, match="holds a gradient from before"):
        step(inputs, targets)


def test_another_step_on_the_same_network_may_follow() -> None:
    step = regression_step()
    step(*regression_batch())
    other = eq.Step(step.model, step.losses, step.optimizer, eq.SI(), eq.MGDA())
    assert other(*regression_batch()).accepted
    deepcopy(step.model)


# --------------------------------------------------------------------------------------- hooks


@pytest.mark.parametrize("text", ["ew", "cagrad", "f-cagrad", "mgda-ub"])
@pytest.mark.parametrize("name", ["trunk.0.weight", "heads.left.0.weight"])
def test_a_post_accumulate_hook_sees_the_final_gradient_once(text: str, name: str) -> None:
    step, plain = build(text, linear_model()), build(text, linear_model())
    seen: list[Tensor] = []
    parameter = dict(step.model.named_parameters())[name]
    parameter.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    step(*regression_batch())
    plain(*regression_batch())
    assert len(seen) == 1
    assert torch.equal(seen[0], dict(plain.model.named_parameters())[name].grad)


def test_an_optimizer_inside_the_hook() -> None:
    # The memory-saving way: each parameter is stepped, and its gradient freed, as it comes.
    model, plain = linear_model(), linear_model()
    outer = torch.optim.SGD([nn.Parameter(torch.zeros(1)), *model.parameters()], lr=0.0)
    inner = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def hook(p: Tensor) -> None:
        inner[p].step()
        p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(hook)
    step = eq.Step(model, all_tasks(model, F.mse_loss), outer, aggregator=eq.CAGrad())
    other = eq.Step(plain, all_tasks(plain, F.mse_loss), sgd(plain), aggregator=eq.CAGrad())
    for k in range(3):
        step(*regression_batch(seed=k))
        other(*regression_batch(seed=k))
    assert largest_difference(parameters_of(model), parameters_of(plain)) < 1e-15


def test_a_tensor_hook_sees_the_gradient_of_each_task() -> None:
    model, plain = linear_model(), linear_model()
    mask = torch.zeros(7, 5, dtype=torch.float64)
    mask[0] = 1
    model.trunk[0].weight.register_hook(lambda gradient: gradient * mask)
    step, other = build("sum", model), build("sum", plain)
    step(*regression_batch())
    other(*regression_batch())
    masked = plain.trunk[0].weight.grad * mask
    assert torch.allclose(model.trunk[0].weight.grad, masked, rtol=0, atol=1e-15)


# --------------------------------------------------------------------------- learned weightings


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda e: 0.9**e),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.01, total_steps=9),
        lambda o: torch.optim.lr_scheduler.CyclicLR(o, 1e-4, 1e-2),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    ],
)
@pytest.mark.parametrize("weighting", [eq.UW, eq.IMTLL])
def test_schedulers_made_before_the_step(scheduler: object, weighting: type) -> None:
    model = linear_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    rates = scheduler(optimizer)
    step = eq.Step(model, all_tasks(model, F.mse_loss), optimizer, weighting(2))
    assert len(optimizer.param_groups) == 1
    for k in range(3):
        report = step(*regression_batch(seed=k))
        rates.step(*([1.0] if hasattr(rates, "best") else []))
    assert (report.weights != regression_step(weighting(2))(*regression_batch()).weights).all()


def test_a_loaded_optimizer_fits_with_any_weighting() -> None:
    first = regression_step(eq.EW(), momentum=0.9)
    first(*regression_batch())
    state = first.optimizer.state_dict()
    model = linear_model()
    optimizer = sgd(model, momentum=0.9)
    step = eq.Step(model, all_tasks(model, F.mse_loss), optimizer, eq.UW(2))
    step(*regression_batch())
    optimizer.load_state_dict(state)
    step(*regression_batch())


def test_an_optimizer_that_holds_the_weights_moves_them() -> None:
    model, weighting = linear_model(), eq.UW(2)
    optimizer = sgd(model)
    optimizer.add_param_group({"params": weighting.parameters(), "lr": 0.0})
    step = eq.Step(model, all_tasks(model, F.mse_loss), optimizer, weighting)
    step(*regression_batch())
    assert (weighting.log_variances == 0).all(), "at the user's rate, which is 0, and not twice"
    assert (weighting.log_variances.grad != 0).all()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_the_weights_learn_as_the_network_does_and_without_decay(kind: type) -> None:
    model, weighting, own = linear_model(), eq.IMTLL(2), eq.IMTLL(2)
    optimizer = kind(model.parameters(), lr=0.02, weight_decay=0.5)
    step = eq.Step(model, all_tasks(model, F.mse_loss), optimizer, weighting)
    expected = kind(own.parameters(), lr=0.02, weight_decay=0.0)
    for k in range(4):
        rate = 0.02 / (k + 1)
        optimizer.param_groups[0]["lr"] = expected.param_groups[0]["lr"] = rate
        losses = step(*regression_batch(seed=k)).losses
        expected.zero_grad()
        own(losses).sum().backward()
        expected.step()
    pairs = zip(weighting.parameters(), own.parameters(), strict=True)
    assert all(torch.allclose(p, q, rtol=1e-6) for p, q in pairs)


def test_the_learned_weights_resume_bit_for_bit() -> None:
    step = build("uw+cagrad", linear_model())
    for k in range(3):
        step(*regression_batch(seed=k))
    fresh = build("uw+cagrad", linear_model(seed=5))
    fresh.load_state_dict(step.state_dict())
    for k in range(3, 6):
        step(*regression_batch(seed=k))
        fresh(*regression_batch(seed=k))
    assert differences(step.state_dict(), fresh.state_dict()) == []
    other = build("ew", linear_model())
    with pytest.raises(eq.EquipoiseError, match="saved with"):
        step.load_state_dict(other.state_dict())


# -------------------------------------------------------------------------------------- logging


def test_scalars_for_a_logger() -> None:
    step = build("si+cagrad", linear_model())
    inputs, targets = regression_batch()
    report = step(inputs, {"left": targets["left"]})
    found = report.scalars()
    assert found["loss/left"] == report.losses[0].item()
    assert {type(value) for value in found.values()} == {float}
    assert not [name for name in found if name.endswith("right")], "absent"
    assert set(found) == {
        "loss/left", "weight/left", "coefficient/left", "direction_norm", "accepted", "skipped",
    }  # fmt: skip
    searched = build("bls+mgda", linear_model())(*regression_batch()).scalars()
    assert {f"loss/{task}" for task in TWO} | {"step_size", "trials"} <= set(searched)


# ------------------------------------------------------------------------------------- closures


class Closing(torch.optim.SGD):
    def step(self, closure: object = None) -> None:
        assert closure is not None, "needs a closure"


def test_an_optimizer_that_wants_a_closure_is_named() -> None:
    model = linear_model()
    optimizer = Closing(model.parameters(), lr=0.1)
    step = eq.Step(model, all_tasks(model, F.mse_loss), optimizer)
    before = parameters_of(model)
    with pytest.raises(eq.CombinationError, match=r"Closing: its step .* closure"):
        step(*regression_batch())
    assert differences(before, parameters_of(model)) == []
