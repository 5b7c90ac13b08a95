"""What is refused, by which name, and that a refused step has changed nothing."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    all_tasks,
    class_batch,
    class_step,
    conv_model,
    differences,
    linear_model,
    parameters_of,
    regression_batch,
    regression_step,
    sgd,
    snapshot,
)
from torch import Tensor, nn

import equipoise as eq

TASKS = ("depth", "normals")

# Stages of every kind of state: counters, generators, learned parameters, none.
RECIPES: dict[str, tuple[Callable, Callable, dict]] = {
    "igbv1+pcgrad": (lambda: eq.IGBv1(2), eq.PCGrad, {}),
    "rlw": (eq.RLW, eq.Sum, {}),
    "uw+mgda-ub": (lambda: eq.UW(2), eq.MGDA, {"level": "features"}),
    "dwa+callable": (lambda: eq.DWA(1), lambda: lambda rows: rows.sum(0), {}),
}


class Fault(torch.autograd.Function):
    """Identity whose gradient is not finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bad: float) -> Tensor:
        ctx.bad = bad
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.bad, None


class Faulty(nn.Module):
    """A layer whose backward turns out not finite while `bad` is set."""

    def __init__(self, module: nn.Module, bad: float | None = None) -> None:
        super().__init__()
        self.module = module
        self.bad = bad

    def forward(self, x: Tensor) -> Tensor:
        x = self.module(x)
        return x if self.bad is None else Fault.apply(x, self.bad)


class Break(Exception):
    """Raised by a loss of the user's own."""


def interrupted(*_: Any) -> Tensor:
    raise KeyboardInterrupt("stop")


def broken(*_: Any) -> Tensor:
    raise Break("the user's own")


def spoiled(new: Callable[[Tensor], Any]) -> Callable:
    """The loss of `normals`, changed."""
    return lambda output, target: new(F.cross_entropy(output, target))


def overwriting(output: Tensor, target: Tensor) -> Tensor:
    kept = output.exp()  # exp keeps its result for the backward pass
    loss = F.cross_entropy(kept, target)
    kept.add_(1)
    return loss


@dataclass
class Case:
    """How a step goes wrong: `spoil` the step and the call; `mend` is automatic."""

    error: type[BaseException]
    words: str
    loss: Callable | None = None
    targets: dict | None = None
    masks: dict | None = None
    head: float | None = None
    trunk: bool = False


CASES = {
    "loss nan": Case(eq.NonFiniteError, "task 'normals': loss is nan",
                     spoiled(lambda loss: loss * torch.nan)),
    "loss inf": Case(eq.NonFiniteError, "task 'normals': loss is inf",
                     spoiled(lambda loss: loss + torch.inf)),
    "loss -inf": Case(eq.NonFiniteError, "task 'normals': loss is -inf",
                      spoiled(lambda loss: loss - torch.inf)),
    "loss not scalar": Case(eq.TaskError, r"task 'normals': loss has shape \(1,\)",
                            spoiled(lambda loss: loss[None])),
    "loss no tensor": Case(eq.TaskError, "task 'normals': loss is a float",
                           spoiled(lambda loss: loss.item())),
    "loss None": Case(eq.TaskError, "task 'normals': loss is a NoneType", lambda *_: None),
    "loss detached": Case(eq.TaskError, "task 'normals': loss is not connected",
                          spoiled(lambda loss: loss.detach())),
    "own error": Case(Break, "the user's own", broken),
    "interrupt": Case(KeyboardInterrupt, "stop", interrupted),
    "gradient of trunk and head": Case(
        eq.NonFiniteError, "task 'normals': gradient is not finite",
        spoiled(lambda loss: Fault.apply(loss, torch.inf))),
    "gradient of a head alone": Case(
        eq.NonFiniteError, "task 'normals': gradient is not finite", head=torch.nan),
    "gradient of the trunk alone": Case(
        eq.NonFiniteError, "task 'normals': gradient is not finite", trunk=True),
    "written in place": Case(RuntimeError, "modified by an inplace operation", overwriting),
    "target unknown": Case(eq.TaskError, "task 'normal': has a target .* did you mean 'normals'",
                           targets={"normal": torch.zeros(8)}),
    "mask unknown": Case(eq.TaskError, "task 'normal': has a mask .* did you mean 'normals'",
                         masks={"normal": torch.ones(8, dtype=torch.bool)}),
    "mask dtype": Case(eq.TaskError, r"task 'depth': mask is torch.float32 of shape \(8,\)",
                       masks={"depth": torch.ones(8)}),
    "mask shape": Case(eq.TaskError, r"task 'depth': mask is torch.bool of shape \(7,\)",
                       masks={"depth": torch.ones(7, dtype=torch.bool)}),
    "no targets": Case(eq.EquipoiseError, "targets is empty", targets={}),
    "target of wrong length": Case(ValueError, "batch_size",
                                   targets={"depth": torch.zeros(3, dtype=torch.long)}),
}  # fmt: skip


def prepared(recipe: str) -> eq.Step:
    """A step with history: two good steps made; its head can be made to fail."""
    weighting, aggregator, options = RECIPES[recipe]
    torch.manual_seed(11)
    step = class_step(weighting(), aggregator(), TASKS, **options)
    for task in TASKS:
        head = step.model.heads[task]
        head[2] = Faulty(head[2])  # after the ReLU and Dropout
        head[1] = Faulty(head[1])
    for k in range(2):
        step(*class_batch(TASKS, seed=k))
    return step


def without_grad(state: dict) -> dict:
    """A step frees the gradients of the step before as its first act; all else must stay."""
    return {k: v for k, v in state.items() if "grad" not in k}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", CASES)
def test_a_step_that_raises_changes_nothing(name: str, recipe: str) -> None:
    case = CASES[name]
    step, undisturbed = prepared(recipe), prepared(recipe)
    assert differences(snapshot(undisturbed), snapshot(step)) == []
    inputs, targets = class_batch(TASKS, seed=5)
    before = snapshot(step)
    head = step.model.heads["normals"]

    if case.loss is not None:
        step.losses["normals"] = case.loss
    if case.head is not None:
        # Between Linear and loss, in front of which nothing but the head's Linear learns ...
        head[2].bad = case.head
        # ... and the trunk is cut off from it.
        good_forward = head[1].forward
        head[1].forward = lambda x: good_forward(x).detach()
    if case.trunk:
        head[1].bad = torch.nan
    with pytest.raises(case.error, match=case.words) as caught:
        step(inputs, targets if case.targets is None else case.targets, case.masks)
    if isinstance(caught.value, eq.TaskError):
        assert isinstance(caught.value.task, str)

    assert differences(without_grad(before), without_grad(snapshot(step))) == []
    for parameter in step.model.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()

    # Mended, the next step is the one that would have followed without the error.
    step.losses["normals"] = F.cross_entropy
    head[1].bad = head[2].bad = None
    vars(head[1]).pop("forward", None)
    state = torch.get_rng_state()
    report = step(inputs, targets)
    torch.set_rng_state(state)
    assert differences(undisturbed(inputs, targets), report) == []
    assert differences(snapshot(undisturbed), snapshot(step)) == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_these_steps_do_change_everything_when_they_succeed(recipe: str) -> None:
    # What the test above compares would otherwise prove nothing.
    step = prepared(recipe)
    before = snapshot(step)
    step(*class_batch(TASKS, seed=5))
    changed = {path.split("/")[1] for path in differences(before, snapshot(step))}
    stages = {"weighting", "aggregator"} if "pcgrad" in recipe else {"weighting"}
    assert changed - {"weighting.grad"} == {"model", "optimizer", "random", "grad"} | stages


@pytest.mark.parametrize("recipe", RECIPES)
def test_nothing_finite_in_a_parameter(recipe: str) -> None:
    step = prepared(recipe)
    with torch.no_grad():
        step.model.heads["normals"][2].module.bias[0] = torch.nan
    before = snapshot(step)
    with pytest.raises(eq.NonFiniteError, match="task 'normals': loss is nan"):
        step(*class_batch(TASKS, seed=5))
    assert differences(without_grad(before), without_grad(snapshot(step))) == []


def test_the_error_names_the_task_also_when_others_are_absent() -> None:
    # Positions among those present and among all differ here.
    step = regression_step(None, eq.MGDA(), ("a", "b", "c"))
    inputs, targets = regression_batch(("b", "c"))
    step.losses["c"] = lambda output, target: Fault.apply(F.mse_loss(output, target), torch.nan)
    with pytest.raises(eq.NonFiniteError, match="task 'c': gradient"):
        step(inputs, targets)
    step.losses["c"] = lambda output, target: -F.mse_loss(output, target)
    step.weighting = eq.SI()
    with pytest.raises(eq.TaskError, match="task 'c': loss is -"):
        step(inputs, targets)
    step.losses["c"] = lambda output, target: F.mse_loss(output, target) * torch.nan
    with pytest.raises(eq.NonFiniteError, match="task 'c': loss is nan"):
        step(inputs, targets)


class SometimesFaulty(nn.Module):
    """Has a bad gradient if a random draw says so, as a dropout mask may."""

    def forward(self, x: Tensor) -> Tensor:
        return Fault.apply(x, torch.inf) if torch.rand(()) < 0.5 else x


def test_the_task_is_found_with_the_same_random_draws() -> None:
    for seed in range(100):
        torch.manual_seed(seed)
        if torch.rand(()) < 0.5 < torch.rand(()):
            break
    step = regression_step(None, eq.Sum(), TASKS)
    step.model.heads["normals"].append(SometimesFaulty())
    torch.manual_seed(seed)
    with pytest.raises(eq.NonFiniteError, match="task 'normals': gradient"):
        step(*regression_batch(TASKS))


@pytest.mark.parametrize("weighting", [eq.SI, lambda: eq.IGBv1(1)])
def test_a_negative_loss_under_si(weighting: Callable) -> None:
    step = class_step(weighting(), eq.PCGrad(), TASKS)
    for k in range(3):
        step(*class_batch(TASKS, seed=k))
    step.losses["normals"] = spoiled(lambda loss: loss - 50)
    before = snapshot(step)
    with pytest.raises(eq.TaskError, match=r"task 'normals': loss is -4\d.*; (SI|IGBv1) needs"):
        step(*class_batch(TASKS))
    assert differences(without_grad(before), without_grad(snapshot(step))) == []


@pytest.mark.parametrize("normalize", ["loss", "loss+"])
@pytest.mark.parametrize("absent", [False, True])
def test_a_negative_loss_under_mgda_that_divides_by_losses(normalize: str, absent: bool) -> None:
    step = regression_step(None, eq.MGDA(normalize=normalize))
    name = step.model.tasks[-1]
    step.losses[name] = lambda output, target: F.mse_loss(output, target) - 1e3
    inputs, targets = regression_batch(step.model.tasks)
    targets = {name: targets[name]} if absent else targets
    words = (
        rf"task '{name}': loss is -9\d\d.*; MGDA\(normalize='{re.escape(normalize)}'\) needs pos"
    )
    before = snapshot(step)
    with pytest.raises(eq.TaskError, match=words):
        step(inputs, targets)
    assert differences(without_grad(before), without_grad(snapshot(step))) == []


def test_huge_but_finite_gradients_that_overflow_together() -> None:
    step = regression_step(None, eq.Sum(), ("a", "b"))
    step.model.float()
    for task in ("a", "b"):
        step.losses[task] = lambda output, target: (
            output.mean() * 0 + (Fault.apply(output.sum() * 1e-3, 1e38))
        )
    inputs, targets = regression_batch(("a", "b"), dtype=torch.float32)
    before = parameters_of(step.model)
    try:
        step(inputs, targets)
    except eq.EquipoiseError as error:
        assert "finite" in str(error)
        assert differences(before, parameters_of(step.model)) == []
    else:
        assert all(p.isfinite().all() for p in step.model.parameters())


def test_an_interrupt_between_the_backward_passes() -> None:
    step = prepared("igbv1+pcgrad")
    step.aggregator = lambda rows: interrupted()
    before = snapshot(step)
    with pytest.raises(KeyboardInterrupt):
        step(*class_batch(TASKS, seed=5))
    assert differences(without_grad(before), without_grad(snapshot(step))) == []


def test_an_error_of_the_optimizer_before_it_changes_a_parameter() -> None:
    step = prepared("igbv1+pcgrad")
    step.optimizer.register_step_pre_hook(broken)
    before = snapshot(step)
    with pytest.raises(Break):
        step(*class_batch(TASKS, seed=5))
    assert differences(without_grad(before), without_grad(snapshot(step))) == []


# --------------------------------------------------------------------- stages that misbehave


class Own(eq.GramAggregator):
    """Coefficients as given."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.values = np.array(values)

    def weights(self, gram: Any, losses: Any) -> Any:
        return self.values


def refused(step: eq.Step, error: type[Exception], words: str, dtype: Any = torch.float64) -> None:
    """Check that a step is refused and changes nothing."""
    batch = regression_batch(step.model.tasks, dtype=dtype)
    before = snapshot(step)
    with pytest.raises(error, match=words):
        step(*batch)
    assert differences(without_grad(before), without_grad(snapshot(step))) == []


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (lambda rows: rows, r"returned shape \(2, 90\) for rows of shape \(2, 90\)"),
        (lambda rows: rows.sum(), r"returned shape \(\)"),
        (lambda rows: rows.sum(0) * torch.nan, "returned NaN or infinity"),
        (lambda rows: rows.sum(0) / 0, "returned NaN or infinity"),
    ],
)
def test_an_aggregator_that_returns_something_else(returned: Callable, words: str) -> None:
    step = regression_step(eq.RLW(), returned)
    assert sum(p.numel() for p in step.model.trunk.parameters()) == 90
    refused(step, eq.EquipoiseError, words)


@pytest.mark.parametrize("level", ["parameters", "features"])
def test_coefficients_that_are_not_finite(level: str) -> None:
    step = regression_step(eq.RLW(), Own([1.0, np.nan]), level=level)
    refused(step, eq.EquipoiseError, "finite")


@pytest.mark.parametrize("level", ["parameters", "features"])
@pytest.mark.parametrize("n", [1, 3])
def test_coefficients_of_the_wrong_number_are_explained(level: str, n: int) -> None:
    step = regression_step(None, Own([1.0] * n), level=level)
    refused(step, eq.EquipoiseError, "coefficients")


@pytest.mark.parametrize(
    "returned",
    [
        lambda losses: losses.sum(),
        lambda losses: losses[:1],
        lambda losses: losses[:, None],
        lambda losses: losses.detach(),
        lambda losses: torch.ones(2),
    ],
)
def test_a_weighting_that_returns_something_else(returned: Callable) -> None:
    words = "function must return a weighted loss for each of the 2 losses"
    refused(regression_step(returned, eq.PCGrad()), eq.EquipoiseError, words)


@pytest.mark.parametrize("aggregator", [eq.Sum, eq.MGDA])
def test_a_weighting_that_returns_nan(aggregator: Callable) -> None:
    step = regression_step(lambda losses: losses * torch.tensor([1.0, torch.nan]), aggregator())
    refused(step, eq.NonFiniteError, "task 'right'")


def test_uncertainty_weighting_for_another_number_of_tasks() -> None:
    with pytest.raises(eq.CombinationError, match=r"UW\(n_tasks=3\) and a model with 2 tasks"):
        regression_step(eq.UW(3), eq.MGDA())


# ------------------------------------------------------------------------------- construction


def build(**change: Any) -> eq.Step:
    model = linear_model(TASKS)
    given: dict[str, Any] = {
        "model": model,
        "losses": all_tasks(model, F.mse_loss),
        "optimizer": sgd(model),
    }
    return eq.Step(**given | change)


def test_a_loss_that_is_missing() -> None:
    with pytest.raises(eq.TaskError, match="task 'normals': has a head but no loss"):
        build(losses={"depth": F.mse_loss})


def test_a_loss_without_a_head() -> None:
    losses = dict.fromkeys((*TASKS, "normal"), F.mse_loss)
    with pytest.raises(eq.TaskError, match="task 'normal': .* did you mean 'normals'"):
        build(losses=losses)


@pytest.mark.parametrize("level", ["feature", "", "rows"])
def test_an_unknown_level(level: Any) -> None:
    with pytest.raises(ValueError, match=f"level is {level!r}; known are 'parameters'"):
        build(level=level)


@pytest.mark.parametrize("clip", [0, -1.0, float("nan")])
def test_a_bound_that_is_not_positive(clip: float) -> None:
    with pytest.raises(ValueError, match=f"clip_norm is {clip}"):
        build(clip_norm=clip)


def mean_of_rows(rows: Tensor) -> Tensor:
    return rows.mean(0)


def test_the_feature_level_needs_coefficients() -> None:
    with pytest.raises(eq.CombinationError, match="level='features' and function"):
        build(aggregator=mean_of_rows, level="features")


@pytest.mark.parametrize("aggregator", [eq.MGDA, eq.PCGrad, eq.CAGrad, eq.IMTLG])
def test_separate_trunks_have_nothing_to_aggregate(aggregator: Callable) -> None:
    model = linear_model(TASKS).separated()
    words = f"separate trunks and {aggregator.__name__}"
    with pytest.raises(eq.CombinationError, match=words):
        build(model=model, optimizer=sgd(model), aggregator=aggregator())


def test_lbfgs_is_refused() -> None:
    model = linear_model(TASKS)
    with pytest.raises(eq.CombinationError, match="Step and LBFGS"):
        build(model=model, optimizer=torch.optim.LBFGS(model.parameters()))


def test_an_optimizer_of_another_model() -> None:
    with pytest.raises(ValueError, match="none of the model's parameters"):
        build(optimizer=sgd(linear_model(TASKS)))


def test_a_refused_construction_leaves_the_optimizer_as_it_was() -> None:
    model = linear_model(TASKS)
    optimizer = sgd(model)
    with pytest.raises(ValueError, match="level"):
        build(model=model, optimizer=optimizer, weighting=eq.UW(2), level="nowhere")
    assert len(optimizer.param_groups) == 1


def test_every_error_is_one_of_ours() -> None:
    for error in (eq.TaskError, eq.NonFiniteError, eq.RecipeError, eq.CombinationError):
        assert issubclass(error, eq.EquipoiseError)
    for error in (eq.RecipeError, eq.CombinationError):
        assert issubclass(error, ValueError)
    assert conv_model().tasks == ("left", "right")


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("recipe", ["ew", "f-mgda"])
def test_gradients_that_are_switched_off(off: Callable, recipe: str) -> None:
    model = linear_model()
    step = eq.Recipe.parse(recipe).build(model, all_tasks(model, F.mse_loss), 0.1, 1)
    before = snapshot(step)
    with off(), pytest.raises(eq.EquipoiseError, match="gradients are switched off here"):
        step(*regression_batch())
    assert differences(before, snapshot(step)) == []
    assert step(*regression_batch()).accepted
