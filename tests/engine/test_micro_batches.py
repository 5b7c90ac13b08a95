"""Micro-batches make the step of the joint batch."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conformance.test_every_recipe import COMBINED
from helpers import (
    THREE,
    all_tasks,
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
from equipoise.registry import TOKENS

TOLERANCE = 1e-10
UNEQUAL = (slice(0, 3), slice(3, 10), slice(10, 12))
STEPS = 3
LEARNED = (
    "bls(direction=optimizer)+imtl",
    "uw+f-cagrad",
    "f-cagrad(every=2)",
    "f-imtl(perturb=samo)",
)


def collects(text: str) -> bool:
    recipe = eq.Recipe.parse(text)
    search = recipe.line_search
    among_features = search is not None and search.method.level == "features"
    return not (among_features or recipe.aggregator.method.level == "features")


ALL = list(dict.fromkeys((*TOKENS, *COMBINED, *LEARNED)))
RECIPES = [text for text in ALL if collects(text)]


def batch(k: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Some samples of b have no label, all those of the first micro-batch among them."""
    inputs, targets = regression_batch(THREE, seed=k, n=12)
    if k == 1:
        targets["b"][[0, 1, 2, 5, 11]] = torch.nan
    return inputs, targets


def build(text: str, closure: bool = False) -> eq.Step:
    model = linear_model(THREE)
    losses: Any = list(THREE) if closure else all_tasks(model, F.mse_loss)
    shared = {"shared": model.trunk} if closure else {}
    recipe = eq.Recipe.parse(text)
    return recipe.build(model, losses, lr=0.05, steps_per_epoch=2, seed=3, **shared)


def closure_of(step: eq.Step, inputs: Tensor, targets: dict[str, Tensor]) -> Callable:
    def losses() -> dict[str, tuple[Tensor, int]]:
        outputs, found = step.model(inputs), {}
        for task, target in targets.items():
            known = ~target.isnan().any(1)
            if known.any():
                loss = F.mse_loss(outputs[task][known], target[known])
                found[task] = loss, int(known.sum())
        return found

    return losses


def in_parts(step: eq.Step, k: int, parts: Sequence[slice] = UNEQUAL) -> eq.StepReport:
    inputs, targets = batch(k)
    for part in parts:
        own = {task: y[part] for task, y in targets.items()}
        call = step if part is parts[-1] else step.collect
        whole = isinstance(step.losses, dict)
        found = call(inputs[part], own) if whole else call(closure_of(step, inputs[part], own))
    return found


@pytest.mark.parametrize("text", RECIPES)
def test_equal_to_the_joint_batch(text: str) -> None:
    joint, gathered = build(text), build(text)
    forms = [gathered] if eq.Recipe.parse(text).is_stl else [gathered, build(text, closure=True)]
    for k in range(STEPS):
        expected = joint(*batch(k))
        for step in forms:
            report = in_parts(step, k)
            apart = largest_difference(parameters_of(step.model), parameters_of(joint.model))
            assert apart < TOLERANCE
            for name in ("losses", "weights", "factors", "coefficients", "gram", "flat_gram"):
                ours, theirs = getattr(report, name), getattr(expected, name)
                if theirs is None:
                    assert ours is None
                else:
                    assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-12, equal_nan=True), name


@pytest.mark.parametrize("text", [text for text in ALL if not collects(text)][::7])
def test_features_are_refused_by_name(text: str) -> None:
    step = build(text)
    before = snapshot(step)
    with pytest.raises(eq.CombinationError, match="collect and (level='features'|Fast)"):
        step.collect(*batch(0))
    assert differences(before, snapshot(step)) == []


@pytest.mark.parametrize("text", ["ew", "cagrad", "uw+f-mgda", "famo"])
def test_draws_and_buffers_move_once_a_micro_batch(text: str) -> None:
    # Plain PyTorch would leave BatchNorm and the generators where one forward each leaves them.
    model, plain = (conv_model(dtype=torch.float64) for _ in range(2))
    step = eq.Recipe.parse(text).build(
        model,
        all_tasks(model, F.cross_entropy),
        lr=0.0,
        steps_per_epoch=2,
        optimizer=torch.optim.SGD,
    )
    plain.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    inputs = torch.randn(12, 1, 6, 6, dtype=torch.float64)
    targets = {task: torch.randint(3, (12,)) for task in model.tasks}
    start = torch.get_rng_state()
    for part in UNEQUAL:
        plain(inputs[part])
    after = torch.get_rng_state()
    torch.set_rng_state(start)
    for part in UNEQUAL:
        call = step if part is UNEQUAL[-1] else step.collect
        call(inputs[part], {task: y[part] for task, y in targets.items()})
    assert torch.equal(torch.get_rng_state(), after)
    moved, expected = dict(model.named_buffers()), dict(plain.named_buffers())
    assert all(torch.equal(buffer, expected[name]) for name, buffer in moved.items())


def test_the_losses_of_a_micro_batch() -> None:
    step = build("cagrad")
    inputs, targets = batch(1)
    losses = step.collect(inputs[:3], {task: y[:3] for task, y in targets.items()})
    expected = F.mse_loss(step.model(inputs[:3])["a"], targets["a"][:3])
    assert losses[0] == pytest.approx(expected.item())
    assert losses[1].isnan(), "b has no labels there"


@pytest.mark.parametrize("text", ["ew", "cagrad", "f-mgda"])
def test_a_last_micro_batch_without_labels(text: str) -> None:
    step, joint = build(text), build(text)
    inputs, targets = batch(0)
    nothing = {task: torch.full_like(y, torch.nan) for task, y in targets.items()}
    step.collect(inputs, targets)
    report = step(inputs, nothing)
    assert report.accepted
    joint(inputs, targets)
    assert largest_difference(parameters_of(step.model), parameters_of(joint.model)) < TOLERANCE
    assert step.collect(inputs, nothing).isnan().all(), "nothing to gather is no error"
    before = parameters_of(step.model)
    assert not step(inputs, nothing).accepted
    assert differences(before, parameters_of(step.model)) == []


@pytest.mark.parametrize("text", ["ew", "cagrad", "f-mgda"])
def test_backward_takes_them_too(text: str) -> None:
    step, joint = build(text), build(text)
    inputs, targets = batch(1)
    step.collect(inputs[:3], {task: y[:3] for task, y in targets.items()})
    step.backward(inputs[3:], {task: y[3:] for task, y in targets.items()})
    joint.backward(inputs, targets)
    for p, q in zip(step.model.parameters(), joint.model.parameters(), strict=True):
        assert (p.grad - q.grad).abs().max() < TOLERANCE


@pytest.mark.parametrize("text", ["ew", "cagrad", "f-mgda"])
def test_a_bad_micro_batch_changes_nothing(text: str) -> None:
    step, joint = build(text), build(text)
    inputs, targets = batch(0)
    part = {task: y[:5] for task, y in targets.items()}
    step.collect(inputs[:5], part)
    before = parameters_of(step.model)
    for call in (step.collect, step):
        with pytest.raises(eq.TaskError, match="typo"):
            call(inputs[5:], {"typo": targets["a"][5:]})
    assert differences(before, parameters_of(step.model)) == []
    step(inputs[5:], {task: y[5:] for task, y in targets.items()})  # what was collected is there
    joint(inputs, targets)
    assert largest_difference(parameters_of(step.model), parameters_of(joint.model)) < TOLERANCE


@pytest.mark.parametrize("text", ["ew", "cagrad"])
@pytest.mark.parametrize("first", [True, False])
def test_a_gradient_that_is_not_finite_names_its_task(text: str, first: bool) -> None:
    step = build(text)

    def root(output: Tensor, target: Tensor) -> Tensor:
        loss = F.mse_loss(output, target)
        steep = target.max() > 99
        return loss + (output - output.detach()).abs().sqrt().sum() if steep else loss

    step.losses["b"] = root
    inputs, targets = batch(0)
    targets["b"][0 if first else -1] = 100.0
    before = parameters_of(step.model)
    with pytest.raises(eq.NonFiniteError, match="task 'b'"):
        for part in UNEQUAL:
            call = step if part is UNEQUAL[-1] else step.collect
            call(inputs[part], {task: y[part] for task, y in targets.items()})
    assert differences(before, parameters_of(step.model)) == []
    assert in_parts(step, 1).accepted, "what was collected has been forgotten"


def test_stages_and_states_wait_for_the_step() -> None:
    step = build("cagrad")
    step.collect(*batch(0))
    with pytest.raises(eq.EquipoiseError, match="collected and would be lost"):
        step.state_dict()
    with pytest.raises(eq.EquipoiseError, match="micro-batches have been collected"):
        step.aggregator = eq.MGDA()
    step(*batch(1))
    step.aggregator = eq.MGDA()
    state = step.state_dict()
    step.collect(*batch(2))
    step.load_state_dict(state)
    step.state_dict()


def test_tasks_that_turn_out_to_share_between_micro_batches() -> None:
    net = nn.ModuleDict({"body": nn.Linear(5, 4), "a": nn.Linear(4, 1), "b": nn.Linear(4, 1)})
    net.double()
    step = eq.Step(net, ["a", "b"], sgd(net), aggregator=eq.CAGrad())
    inputs, targets = regression_batch(("a", "b"))

    def losses(*tasks: str) -> Callable[[], dict[str, Tensor]]:
        return lambda: {t: F.mse_loss(net[t](net["body"](inputs)), targets[t]) for t in tasks}

    step.collect(losses("a"))
    with pytest.raises(eq.EquipoiseError, match="Say by `shared` what is shared"):
        step(losses("b"))
    named = eq.Step(net, ["a", "b"], sgd(net), aggregator=eq.CAGrad(), shared="body")
    named.collect(losses("a"))
    assert named(losses("b")).gram[0, 1] != 0
