"""Line searches beside slow ones that move a copy of the network for every trial."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import all_tasks, class_batch, conv_model, linear_model, regression_batch, sgd
from reference import line_search as slow
from reference.aggregation import mgda, total
from reference.aggregation_more import edm

import equipoise as eq

TASKS = {1: ("a",), 2: ("a", "b"), 3: ("a", "b", "c"), 5: ("a", "b", "c", "d", "e")}
AGGREGATORS: dict[str, tuple[Callable, Callable]] = {
    "sum": (eq.Sum, total),
    "mgda": (eq.MGDA, mgda),
    "edm": (eq.EDM, edm),
}
SEEDS = range(4)


def searching(model: eq.SharedTrunk, loss: Callable, aggregator: Any, search: Any) -> eq.Step:
    """Give a Step on `model` that searches its step size."""
    level = "features" if isinstance(search, eq.FastBacktracking) else "parameters"
    return eq.Step(
        model,
        all_tasks(model, loss),
        sgd(model, lr=1.0),
        None,
        aggregator,
        line_search=search,
        level=level,
    )


def follow(
    model: eq.SharedTrunk,
    loss: Callable,
    batches: Callable[[int], tuple],
    aggregator: str,
    *,
    steps: int = 3,
    fast: bool = False,
    **options: Any,
) -> list[slow.Found]:
    """Let both make the same steps from the same parameters; compare after each."""
    theirs = deepcopy(model)
    ours_of, slow_of = AGGREGATORS[aggregator]
    stage = eq.FastBacktracking if fast else eq.Backtracking
    reference = slow.fast_backtracking if fast else slow.backtracking
    step = searching(model, loss, ours_of(), stage(**options))
    seen = []
    for k in range(steps):
        inputs, targets = batches(k)
        torch.manual_seed(100 + k)
        at = slow.Problem(theirs.trunk, theirs.heads, step.losses, inputs, targets)
        found = reference(at, slow_of, **options)
        after = torch.rand(2)
        torch.manual_seed(100 + k)
        report = step(inputs, targets)
        assert torch.equal(torch.rand(2), after), "the global generator went another way"
        assert report.step_size == found.step_size
        assert report.trials == found.trials
        assert report.accepted == found.accepted
        assert report.fallback == found.replaced
        if options.get("verify") and (found.accepted or found.fell_back):
            assert report.verified == (not found.fell_back)
        moved = {"trunk": found.trunk, **found.heads}
        for name, module in moved.items():
            mine = model.trunk if name == "trunk" else model.heads[name]
            for p, q in zip(mine.parameters(), module.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)
        theirs = deepcopy(model)  # small differences must not add up to another step size
        seen.append(found)
    return seen


def lines(tasks: int, seed: int) -> dict[str, Any]:
    """Give a smooth network and batches whose targets grow: small and large steps are needed."""
    names = TASKS[tasks]
    scale = 10.0 ** (seed % 3 - 1)

    def batch(k: int) -> tuple:
        inputs, targets = regression_batch(names, seed=10 * seed + k)
        return 3 * scale * inputs, {t: scale * y for t, y in targets.items()}

    return {"model": linear_model(names, seed=seed), "loss": F.mse_loss, "batches": batch}


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("aggregator", AGGREGATORS)
@pytest.mark.parametrize("seed", range(2))
def test_backtracking(tasks: int, aggregator: str, seed: int) -> None:
    found = follow(**lines(tasks, seed), aggregator=aggregator)
    assert any(f.accepted for f in found)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("rule", ["full", "head", "latent"])
@pytest.mark.parametrize("seed", SEEDS)
def test_rules(fast: bool, rule: str, seed: int) -> None:
    beta = [0.1, 0.3, 0.49][seed % 3]
    follow(**lines(3, seed), aggregator="mgda", fast=fast, rule=rule, beta=beta)


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("scale", [1, "matched", "batch"])
@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_latent_scales(tasks: int, scale: Any, aggregator: str) -> None:
    seed = tasks
    follow(**lines(tasks, seed), aggregator=aggregator, fast=True, latent_scale=scale)


def test_step_sizes_differ_somewhere() -> None:
    """What the other tests compare is not one and the same step size."""
    sizes = {
        f.step_size for seed in SEEDS for f in follow(**lines(3, seed), aggregator="mgda", steps=6)
    }
    assert len(sizes) > 3


@pytest.mark.parametrize(
    "options", [{"shrink": 0.3}, {"upper": 7.0}, {"floor": 0.2}, {"beta": 0.4}]
)
@pytest.mark.parametrize("fast", [False, True])
def test_options(options: dict, fast: bool) -> None:
    for seed in SEEDS:
        follow(**lines(2, seed), aggregator="mgda", fast=fast, **options)


@pytest.mark.parametrize("rule", ["full", "head", "latent"])
def test_verify(rule: str) -> None:
    """Both outcomes occur: steps that hold among the parameters, and steps that do not."""
    outcomes = set()
    for seed in range(6):
        found = follow(
            **lines(3, seed), aggregator="mgda", fast=True, verify=True, upper=64.0, rule=rule
        )
        outcomes |= {f.fell_back for f in found if f.accepted}
        if seed and len(outcomes) == 2:
            break  # dear steps
    assert outcomes == {True, False}


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_dropout_and_batch_norm(fast: bool, aggregator: str) -> None:
    model = conv_model(("a", "b", "c"), dtype=torch.float64)
    seen = follow(
        model,
        F.cross_entropy,
        lambda k: class_batch(("a", "b", "c"), seed=k, dtype=torch.float64),
        aggregator,
        fast=fast,
        upper=16.0,
    )
    assert any(f.trials > 1 for f in seen)
    assert int(model.trunk[1].num_batches_tracked) == len(seen)


def test_the_buffers_move_as_in_a_plain_pass() -> None:
    for search in (eq.Backtracking(upper=64.0), eq.FastBacktracking(upper=64.0)):
        model = conv_model(dtype=torch.float64)
        plain = deepcopy(model)
        inputs, targets = class_batch(dtype=torch.float64)
        plain(inputs)
        searching(model, F.cross_entropy, eq.MGDA(), search)(inputs, targets)
        for (name, ours), (_, theirs) in zip(
            model.named_buffers(), plain.named_buffers(), strict=True
        ):
            assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("fast", [False, True])
def test_absent_tasks_are_left_alone(fast: bool) -> None:
    given = lines(3, 1)
    model, batches = given["model"], given["batches"]

    def without_b(k: int) -> tuple:
        inputs, targets = batches(k)
        return inputs, {t: y for t, y in targets.items() if t != "b"}

    before = deepcopy(model.heads["b"].state_dict())
    follow(model, F.mse_loss, without_b, "mgda", fast=fast)
    for name, value in model.heads["b"].state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("fast", [False, True])
def test_conflicts_that_let_a_loss_grow(fast: bool) -> None:
    """Sum among conflicting tasks: the min-norm direction takes its place."""
    replaced = 0
    for seed in range(8):
        given = lines(2, seed)
        batches = given["batches"]

        def opposed(k: int, batches: Callable = batches) -> tuple:
            inputs, targets = batches(k)
            return inputs, {"a": targets["a"], "b": -10 * targets["a"]}

        given["batches"] = opposed
        replaced += sum(f.replaced for f in follow(**given, aggregator="sum", fast=fast, steps=2))
    assert replaced


# --------------------------------------------------------------- what a step has to satisfy


@pytest.mark.parametrize("kind", ["slow", "verified"])
@pytest.mark.parametrize("aggregator", AGGREGATORS)
@pytest.mark.parametrize("seed", SEEDS)
def test_an_accepted_step_satisfies_the_condition(kind: str, aggregator: str, seed: int) -> None:
    """Eq. 4.1 for every task, looked at anew in float64."""
    given = lines(3, seed)
    model, loss, batches = given["model"], given["loss"], given["batches"]
    search = (
        eq.Backtracking(upper=8.0)
        if kind == "slow"
        else eq.FastBacktracking(upper=8.0, verify=True)
    )
    step = searching(model, loss, AGGREGATORS[aggregator][0](), search)
    for k in range(3):
        inputs, targets = batches(k)
        at = slow.Problem(
            deepcopy(model.trunk), deepcopy(dict(model.heads)), step.losses, inputs, targets
        )
        seen = at.look()
        report = step(inputs, targets)
        if not report.accepted:
            assert report.step_size == 0
            continue
        shift = slow.vector(at.trunk.parameters()) - slow.vector(model.trunk.parameters())
        for task in model.tasks:
            new = slow.measured(at, task, model.trunk, model.heads[task])
            h = seen["h"][task]
            bound = seen["L"][task] - 0.1 * (report.step_size * h @ h + seen["g"][task] @ shift)
            assert new <= bound + 1e-9 * abs(bound), task


@pytest.mark.parametrize("fast", [False, True])
def test_a_rejected_step_changes_nothing(fast: bool) -> None:
    model = conv_model(dtype=torch.float64)
    stage = eq.FastBacktracking if fast else eq.Backtracking
    step = searching(model, F.cross_entropy, eq.MGDA(), stage())

    calls = {"n": 0}

    def spoiled(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        calls["n"] += 1
        value = F.cross_entropy(output, target)
        return value if torch.is_grad_enabled() else value * np.nan

    step.losses = all_tasks(model, spoiled)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    report = step(*class_batch(dtype=torch.float64))
    assert (report.accepted, report.step_size, report.trials) == (False, 0.0, 34)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name


@pytest.mark.parametrize("rule", ["full", "head", "latent"])
def test_sums_that_are_verified(rule: str) -> None:
    """Tasks that pull apart by powers of ten: the step among the parameters needs its own check."""
    found = []
    for seed in range(5):
        given = lines(3, seed)

        def opposed(k: int, seed: int = seed) -> tuple:
            inputs, targets = regression_batch(TASKS[3], seed=seed)
            return 30 * inputs, {t: (-10.0) ** j * targets["a"] for j, t in enumerate(TASKS[3])}

        given["batches"] = opposed
        found += follow(
            **given, aggregator="sum", fast=True, verify=True, upper=64.0, rule=rule, steps=1
        )
    assert any(f.fell_back for f in found)


@pytest.mark.parametrize("fast", [False, True])
def test_equality_is_enough(fast: bool) -> None:
    """Where every task is solved there is nothing to gain: 0 <= 0 - eta beta 0, at once."""
    model = linear_model(TASKS[2])
    inputs, _ = regression_batch(TASKS[2])
    targets = {task: output.detach() for task, output in model(inputs).items()}
    stage = eq.FastBacktracking if fast else eq.Backtracking
    report = searching(model, F.mse_loss, eq.MGDA(), stage())(inputs, targets)
    assert (report.accepted, report.trials, report.step_size) == (True, 1, 1.0)
