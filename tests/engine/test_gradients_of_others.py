"""What a step does to gradients that are not its own, and what an error leaves of them."""

from copy import deepcopy
from typing import Any

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
    snapshot,
)
from torch import Tensor, nn

import equipoise as eq


class Scaled(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.size = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return (self.size * (output - target)).square().mean()


def fill(parameters: Any, value: float = 3.0) -> None:
    for p in parameters:
        p.grad = torch.full_like(p, value)


def raising(*_: object) -> None:
    raise ZeroDivisionError


# ---------------------------------------------------------------------------- where none is added


@pytest.mark.parametrize("clip_norm", [None, 0.1])
@pytest.mark.parametrize("aggregator", [eq.Sum, eq.CAGrad])
@pytest.mark.parametrize("closure", [False, True])
def test_gradients_to_which_nothing_is_added_stay(
    closure: bool, aggregator: type, clip_norm: float | None
) -> None:
    model = linear_model()
    model.trunk[0].spare = nn.Parameter(torch.ones(2, dtype=torch.float64))
    losses: Any = list(TWO) if closure else all_tasks(model, F.mse_loss)
    shared = {"shared": model.trunk} if closure else {}
    step = eq.Step(model, losses, None, None, aggregator(), clip_norm=clip_norm, **shared)
    inputs, targets = regression_batch()
    fill(model.parameters())
    if closure:
        step.backward(lambda: {"left": F.mse_loss(model(inputs)["left"], targets["left"])})
    else:
        step.backward(inputs, {"left": targets["left"]})
    assert (model.trunk[0].spare.grad == 3).all(), "no loss reaches it"
    assert all((p.grad == 3).all() for p in model.heads["right"].parameters()), "absent"
    assert not (model.trunk[0].weight.grad == 3).all()


# --------------------------------------------------------------------------- parameters of losses


@pytest.mark.parametrize("known", [False, True])
def test_the_parameters_of_a_loss_from_the_first_backward_on(known: bool) -> None:
    model, loss = linear_model(), Scaled()
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()]) if known else None
    losses = {"left": loss, "right": F.mse_loss}
    step = eq.Step(model, losses, optimizer, aggregator=eq.CAGrad())
    inputs, targets = regression_batch()
    expected = torch.autograd.grad(loss(model(inputs)["left"], targets["left"]), loss.size)[0]
    fill(loss.parameters())
    for k in (1, 2):
        step.backward(inputs, targets)
        assert torch.allclose(loss.size.grad, 3 + k * expected)
    fresh, other = linear_model(), Scaled()
    again = torch.optim.SGD([*fresh.parameters(), *other.parameters()]) if known else None
    with torch.no_grad():
        loss.size += 1
    loaded = eq.Step(fresh, {**losses, "left": other}, again, aggregator=eq.CAGrad())
    loaded.load_state_dict(step.state_dict())
    assert other.size == loss.size


def test_a_parameter_of_which_nobody_knows() -> None:
    model, loss = linear_model(), Scaled()
    inputs, targets = regression_batch()

    def losses() -> dict[str, Tensor]:
        outputs = model(inputs)
        return {"left": loss(outputs["left"], targets["left"])}

    step = eq.Step(model, TWO, None, shared=model.trunk)
    with pytest.raises(eq.TaskError, match=r"'left'.*outside the network.*dropped\. Give the Step"):
        step.backward(losses)
    assert all(p.grad is None for p in model.parameters())
    loss.size.requires_grad_(False)
    step.backward(losses)


def test_the_first_step_drops_no_gradient_of_a_loss() -> None:
    model, loss = linear_model(), Scaled()
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1)
    step = eq.Step(model, {"left": loss, "right": F.mse_loss}, optimizer, None, eq.CAGrad())
    fill(loss.parameters())
    before = snapshot(step)
    with pytest.raises(eq.EquipoiseError, match="parameter of a loss holds a gradient"):
        step(*regression_batch())
    assert differences(before, snapshot(step)) == []
    assert loss.size.grad == 3
    handle = model.heads["right"][0].weight.register_post_accumulate_grad_hook(raising)
    with pytest.raises(ZeroDivisionError):
        step.backward(*regression_batch())
    assert loss.size.grad == 3
    handle.remove()
    optimizer.zero_grad()
    step(*regression_batch())


# --------------------------------------------------------------------- parameters of the weighting


def test_weights_in_the_users_optimizer_add_up() -> None:
    model, weighting = linear_model(), eq.UW(2)
    optimizer = torch.optim.SGD([*model.parameters(), *weighting.parameters()], lr=0.1)
    step = eq.Step(model, all_tasks(model, F.mse_loss), optimizer, weighting)
    step.backward(*regression_batch())
    once = weighting.log_variances.grad.clone()
    step.backward(*regression_batch())
    assert torch.allclose(weighting.log_variances.grad, 2 * once)


@pytest.mark.parametrize("held", [False, True])
def test_an_error_leaves_no_gradient_in_a_weighting(held: bool) -> None:
    model, weighting = linear_model(), eq.UW(2)
    own = weighting.parameters() if held else ()
    optimizer = torch.optim.SGD([*model.parameters(), *own], lr=0.1, momentum=0.9)
    step = eq.Step(model, all_tasks(model, F.mse_loss), optimizer, weighting)
    optimizer.register_step_pre_hook(raising)
    before, state = snapshot(step), step.state_dict()
    with pytest.raises(ZeroDivisionError):
        step(*regression_batch())
    assert differences(before, snapshot(step)) == []
    model.trunk[0].weight.register_post_accumulate_grad_hook(raising)
    with pytest.raises(ZeroDivisionError):
        step.backward(*regression_batch())
    assert differences(state, step.state_dict()) == [], "nor in what moves it"


# ------------------------------------------------------------------------------------ line searches


@pytest.mark.parametrize("text", ["bls+mgda", "fbls", "fbls(verify=true)+pcgrad", "uw+bls"])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_hook_that_raises_after_a_search(text: str, error: type) -> None:
    def hook(_: Tensor) -> None:
        raise error

    model = linear_model()
    losses = all_tasks(model, F.mse_loss)
    step = eq.Recipe.parse(text).build(model, losses, lr=0.1, steps_per_epoch=2, seed=0)
    twin = eq.Recipe.parse(text).build(deepcopy(model), losses, lr=0.1, steps_per_epoch=2, seed=0)
    handle = model.heads["left"][0].weight.register_post_accumulate_grad_hook(hook)
    before = snapshot(step)
    with pytest.raises(error):
        step(*regression_batch())
    assert differences(before, snapshot(step)) == []
    handle.remove()
    step(*regression_batch())
    twin(*regression_batch())
    assert largest_difference(parameters_of(step.model), parameters_of(twin.model)) == 0


# ---------------------------------------------------------------------------------- micro-batches


@pytest.mark.parametrize("text", ["ew", "f-cagrad", "bls+mgda", "famo"])
@pytest.mark.parametrize("how", ["closure of a loop", "tensors used again", "evaluation mode"])
def test_a_micro_batch_that_changes_before_the_step(text: str, how: str) -> None:
    model = linear_model()
    model.trunk.append(nn.Dropout(0.5))
    losses: Any = list(TWO) if how == "closure of a loop" else all_tasks(model, F.mse_loss)
    shared = {"shared": model.trunk} if how == "closure of a loop" else {}
    step = eq.Recipe.parse(text).build(model, losses, lr=0.1, steps_per_epoch=2, **shared)
    inputs, targets = regression_batch()
    kept = torch.empty(4, 5, dtype=torch.float64)
    before = snapshot(step)
    with pytest.raises(eq.TaskError, match="micro-batch 0 has changed since it was collected"):
        for part, call in ((slice(0, 4), step.collect), (slice(4, 8), step)):
            own = {task: y[part] for task, y in targets.items()}
            if how == "closure of a loop":
                x = inputs[part]
                call(lambda: {t: F.mse_loss(z, own[t]) for t, z in model(x).items()})  # noqa: B023
            else:
                call(kept.copy_(inputs[part]) if how == "tensors used again" else inputs[part], own)
            model.train(how != "evaluation mode")
    assert [d for d in differences(before, snapshot(step)) if "random" not in d] == []


def test_nothing_is_asked_for_again_in_later_steps() -> None:
    step, calls = regression_step(), []
    step.model.trunk.register_forward_hook(lambda *_: calls.append(1))
    counts = []
    for _ in range(3):
        step.collect(*regression_batch())
        step(*regression_batch())
        counts.append(len(calls))
        calls.clear()
    assert counts == [4, 3, 3], "one more in the first step"


def test_what_was_collected_is_not_copied() -> None:
    step = regression_step(aggregator=eq.CAGrad())
    step.collect(*regression_batch())
    with pytest.raises(eq.EquipoiseError, match="collected, which cannot be copied"):
        deepcopy(step)
    step(*regression_batch())
    deepcopy(step)
