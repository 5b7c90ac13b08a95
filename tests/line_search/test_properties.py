"""What must hold whatever the network: (4.1) looked at anew, refused steps, draws, passes."""

import io
import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flat_helpers import images, lenet
from helpers import (
    Counted,
    all_tasks,
    differences,
    linear_model,
    parameters_of,
    regression_batch,
    sgd,
    snapshot,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import line_search as slow
from torch import Tensor, nn

import equipoise as eq

THREE = ("a", "b", "c")


def spectral(tasks: tuple[str, ...], seed: int = 0) -> eq.SharedTrunk:
    """Give `lenet` with spectral norm in trunk and heads."""
    model = lenet(tasks, seed)
    nn.utils.parametrizations.spectral_norm(model.trunk.layers[-2])
    for task in tasks:
        nn.utils.parametrizations.spectral_norm(model.heads[task][0])
    return model


def image_step(
    search: eq.LineSearch,
    aggregator: Any = None,
    weighting: Any = None,
    tasks: tuple[str, ...] = THREE,
    build: Callable = lenet,
    seed: int = 0,
    **options: Any,
) -> eq.Step:
    model = build(tasks, seed)
    losses = all_tasks(model, F.cross_entropy)
    return eq.Step(model, losses, sgd(model), weighting, aggregator, line_search=search, **options)


def as_it_was(model: eq.SharedTrunk, losses: dict, inputs: Tensor, targets: dict) -> slow.Problem:
    """The slow reference at the same point, with the draws that the next step will make."""
    state = torch.get_rng_state()
    model = deepcopy(model)
    problem = slow.Problem(model.trunk, dict(model.heads.items()), losses, inputs, targets)
    torch.set_rng_state(state)
    return problem


# ------------------------------------------------------------------------- (4.1), looked at anew


@settings(max_examples=12)
@given(
    seed=st.integers(0, 10**6),
    search=st.sampled_from(
        [
            lambda: eq.Backtracking(),
            lambda: eq.Backtracking(beta=0.45, upper=8.0),
            lambda: eq.FastBacktracking(verify=True, upper=8.0),
            lambda: eq.FastBacktracking(verify=True, latent_scale="matched", beta=0.4),
        ]
    ),
    aggregator=st.sampled_from([eq.MGDA, eq.PCGrad, eq.EDM, eq.Sum]),
    build=st.sampled_from([lenet, spectral]),
)
def test_every_accepted_step_satisfies_the_rule_for_every_task(
    seed: int, search: Callable, aggregator: Callable, build: Callable
) -> None:
    step = image_step(search(), aggregator(), build=build, seed=seed)
    inputs, targets = images(THREE, seed)
    torch.manual_seed(seed)
    original = deepcopy(step.model)
    problem = as_it_was(original, step.losses, inputs, targets)
    seen = problem.look()
    before = slow.vector(slow.trained(step.model.trunk))
    torch.manual_seed(seed)
    report = step(inputs, targets)
    assert report.accepted
    beta, eta = step.line_search.beta, report.step_size
    # The direction, as the step has it, is what the parameters moved by.
    d = (before - slow.vector(slow.trained(step.model.trunk))) / eta
    now = deepcopy(original)  # with the buffers that the step began with
    now.load_state_dict(parameters_of(step.model), strict=False)
    for i, task in enumerate(THREE):
        new = slow.measured(problem, task, now.trunk, now.heads[task])
        fall = seen["h"][task] @ seen["h"][task] + seen["g"][task] @ d
        assert new <= seen["L"][task] - eta * beta * fall + 1e-9, task
        assert new == pytest.approx(report.trial_losses[i].item(), rel=1e-9)
        assert fall == pytest.approx(report.slopes[i].item(), rel=1e-6) or report.verified


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("search", "reference", "options"),
    [
        (eq.Backtracking, slow.backtracking, {"upper": 8.0}),
        (eq.Backtracking, slow.backtracking, {"rule": "head", "beta": 0.3}),
        (eq.Backtracking, slow.backtracking, {"rule": "latent", "shrink": 0.7, "upper": 20.0}),
        (eq.FastBacktracking, slow.fast_backtracking, {"upper": 64.0}),
        (eq.FastBacktracking, slow.fast_backtracking, {"rule": "head", "upper": 64.0}),
        (eq.FastBacktracking, slow.fast_backtracking, {"rule": "latent", "upper": 64.0}),
        (eq.FastBacktracking, slow.fast_backtracking, {"latent_scale": "matched", "upper": 64.0}),
        (eq.FastBacktracking, slow.fast_backtracking, {"latent_scale": "batch", "upper": 64.0}),
        (eq.FastBacktracking, slow.fast_backtracking, {"latent_scale": 3.0, "upper": 64.0}),
        (eq.FastBacktracking, slow.fast_backtracking, {"verify": True, "upper": 64.0}),
    ],
)
def test_as_the_slow_reference(
    search: Callable, reference: Callable, options: dict, seed: int
) -> None:
    step = image_step(search(**options), eq.MGDA(), seed=seed)
    inputs, targets = images(THREE, seed)
    torch.manual_seed(seed)
    problem = as_it_was(step.model, step.losses, inputs, targets)
    found = reference(problem, slow.min_norm, **options)
    torch.manual_seed(seed)
    report = step(inputs, targets)
    assert (report.step_size, report.trials) == (found.step_size, found.trials)
    assert (report.accepted, report.fallback) == (found.accepted, found.replaced)
    if options.get("verify"):
        assert report.verified == (not found.fell_back)
    expected = slow.vector(slow.trained(found.trunk))
    assert slow.vector(slow.trained(step.model.trunk)) == pytest.approx(
        expected, rel=1e-7, abs=1e-9
    )
    for task in THREE:
        expected = slow.vector(slow.trained(found.heads[task]))
        actual = slow.vector(slow.trained(step.model.heads[task]))
        assert actual == pytest.approx(expected, rel=1e-9)


# -------------------------------------------------------------------------- what does not move

SEARCHES = {
    "bls": lambda **o: eq.Backtracking(**o),
    "fbls": lambda **o: eq.FastBacktracking(**o),
    "matched": lambda **o: eq.FastBacktracking(latent_scale="matched", **o),
    "verified": lambda **o: eq.FastBacktracking(verify=True, **o),
}
every_search = pytest.mark.parametrize("name", SEARCHES)


@every_search
@pytest.mark.parametrize("build", [lenet, spectral])
@pytest.mark.parametrize("accepted", [True, False])
def test_buffers_and_generators_as_after_one_forward(
    name: str, build: Callable, accepted: bool
) -> None:
    # A step of 10^4 and nothing below is never accepted.
    limits = {} if accepted else {"upper": 1e4, "floor": 1e4}
    step = image_step(SEARCHES[name](**limits), eq.MGDA(), build=build)
    inputs, targets = images(THREE)
    plain = deepcopy(step.model)
    torch.manual_seed(3)
    plain(inputs)
    after = torch.get_rng_state()
    before = parameters_of(step.model)
    torch.manual_seed(3)
    report = step(inputs, targets)
    assert report.accepted == accepted
    assert report.trials >= 1
    assert torch.equal(torch.get_rng_state(), after)
    assert differences(dict(plain.named_buffers()), dict(step.model.named_buffers())) == []
    assert bool(differences(before, parameters_of(step.model))) == accepted


@every_search
def test_the_trial_that_is_accepted_becomes_the_parameters(name: str) -> None:
    step = image_step(SEARCHES[name](), eq.MGDA(), tasks=("a", "b"))
    step.model.eval()
    inputs, targets = images(("a", "b"))
    report = step(inputs, targets)
    again = step(inputs, targets).losses
    if name in ("bls", "verified"):
        assert torch.equal(again, report.trial_losses)
    else:
        assert not torch.equal(again, report.trial_losses)  # those of moved features


def test_a_step_that_raises_in_a_trial_changes_nothing() -> None:
    for name, make in SEARCHES.items():
        step = image_step(make(), eq.PCGrad(), eq.RLW(), tasks=("a", "b"))
        inputs, targets = images(("a", "b"))
        step(inputs, targets)
        calls = iter(range(100))
        step.losses["b"] = lambda o, t, calls=calls: (
            F.cross_entropy(o, t) if next(calls) == 0 else 1 / 0
        )
        before, bound = snapshot(step), step.line_search.state_dict()
        with pytest.raises(ZeroDivisionError):
            step(inputs, targets)
        after = snapshot(step)
        assert [d for d in differences(before, after) if "grad" not in d] == [], name
        assert step.line_search.state_dict() == bound


@pytest.mark.parametrize("aggregator", [eq.MGDA, eq.PCGrad])
@every_search
def test_an_absent_task_takes_no_part(name: str, aggregator: Callable) -> None:
    step = image_step(SEARCHES[name](), aggregator())
    inputs, targets = images(THREE)
    before = parameters_of(step.model.heads["b"])
    step.losses["b"] = lambda output, target: 1 / 0  # never asked
    report = step(inputs, {task: targets[task] for task in ("a", "c")})
    assert report.slopes[1] == 0
    assert report.trial_losses[1].isnan()
    assert differences(before, parameters_of(step.model.heads["b"])) == []


@pytest.mark.parametrize(
    "recipe",
    ["bls(adapt=true)", "bls(direction=optimizer)+f-pcgrad", "fbls(verify=true)+pcgrad"],
)
def test_a_fresh_step_continues_bit_for_bit(recipe: str) -> None:
    def build(seed: int) -> eq.Step:
        model = lenet(THREE, seed)
        losses = all_tasks(model, F.cross_entropy)
        return eq.Recipe.parse(recipe).build(model, losses, 0.1, 2, seed=seed)

    step = build(0)
    for k in range(3):
        step(*images(THREE, k))
    file = io.BytesIO()
    torch.save(step.state_dict(), file)
    reports = [step(*images(THREE, 9 + k)) for k in range(2)]
    file.seek(0)
    fresh = build(5)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert differences(reports, [fresh(*images(THREE, 9 + k)) for k in range(2)]) == []
    assert fresh.line_search.bound == step.line_search.bound


# ---------------------------------------------------------------------------------- passes


def counted_step(search: eq.LineSearch, aggregator: Any, n: int) -> eq.Step:
    tasks = tuple(f"t{i}" for i in range(n))
    model = linear_model(tasks)
    model.trunk = Counted(model.trunk)
    for task in tasks:
        model.heads[task] = Counted(model.heads[task])
    return eq.Step(
        model, all_tasks(model, F.mse_loss), sgd(model), None, aggregator, line_search=search
    )


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize(
    ("search", "aggregator", "trunk"),
    [
        # trunk forwards and backwards as functions of T and the number of trials
        (eq.Backtracking, eq.MGDA, lambda n, k: (1 + k, n)),
        (eq.Backtracking, eq.Sum, lambda n, k: (1 + k, n)),
        (lambda: eq.Backtracking(objective="sum"), eq.Sum, lambda n, k: (1 + k, 1)),
        (lambda: eq.Backtracking(rule="head"), eq.Sum, lambda n, k: (1 + k, 1)),
        (eq.FastBacktracking, eq.MGDA, lambda n, k: (1, 1)),
        (eq.FastBacktracking, eq.Sum, lambda n, k: (1, 1)),
        (lambda: eq.FastBacktracking(latent_scale="matched"), eq.EDM, lambda n, k: (1, 1)),
        (lambda: eq.FastBacktracking(latent_scale="batch"), eq.EDM, lambda n, k: (1, 1)),
    ],
)
def test_passes(search: Callable, aggregator: Callable, trunk: Callable, n: int) -> None:
    step = counted_step(search(), aggregator(), n)
    for k in range(3):
        report = step(*regression_batch(step.model.tasks, seed=k))
        assert step.model.trunk.counts() == trunk(n, report.trials)
        for task in step.model.tasks:
            assert step.model.heads[task].counts() == (1 + report.trials, 1)


def test_passes_of_a_verified_step() -> None:
    seen = set()
    # A size of the inputs, and so of J J^T, for which a latent step holds, and one for which not.
    for size, tasks in ((0.1, ("a",)), (10.0, THREE)):
        trunk = Counted(nn.Linear(5, 6).double())
        heads = {t: nn.Linear(6, 1).double().requires_grad_(False) for t in tasks}
        model = eq.SharedTrunk(trunk, heads)
        search = eq.FastBacktracking(verify=True)
        step = eq.Step(model, all_tasks(model, F.mse_loss), sgd(trunk), line_search=search)
        inputs, targets = regression_batch(tasks)
        report = step(size * inputs, targets)
        forwards, backwards = trunk.counts()
        if report.verified:
            assert (forwards, backwards) == (2, 1)
        else:  # 1, the one that verifies, and those of Backtracking, which starts anew
            tried = 1 - math.log2(report.step_size)
            assert (forwards, backwards) == (2 + tried, 1 + 3)
            assert report.trials > tried
        seen.add(report.verified)
    assert seen == {True, False}


class Opaque(torch.autograd.Function):
    """The identity, with a backward that knows no derivative of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Silent(torch.autograd.Function):
    """The identity, with a backward whose derivative is silently wrong."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 0.5 * gradient + 0.5 * gradient.detach()


@pytest.mark.parametrize("layer", [Opaque, Silent])
def test_slopes_where_the_backward_pass_has_no_derivative(layer: Any) -> None:
    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return layer.apply(x)

    def build(blind: bool) -> eq.Step:
        model = linear_model(THREE)
        model.trunk.insert(2, Layer() if blind else nn.Identity())
        losses = all_tasks(model, F.mse_loss)
        search = eq.FastBacktracking(verify=True)
        return eq.Step(model, losses, sgd(model), line_search=search)

    seeing, blind = build(False), build(True)
    for k in range(3):
        batch = regression_batch(THREE, seed=k)
        one, other = seeing(*batch), blind(*batch)
        assert torch.allclose(one.slopes, other.slopes, rtol=1e-9)
        assert (one.step_size, one.trials, one.verified) == (
            other.step_size, other.trials, other.verified
        )  # fmt: skip


# -------------------------------------------------------------------- beside the other stages


def test_flat_regions_are_searched_along_the_true_slopes() -> None:
    for seed in range(4):
        sharpness = eq.TaskSharpness(rho=0.5)
        step = image_step(eq.Backtracking(), eq.MGDA(), eq.SI(), seed=seed, sharpness=sharpness)
        inputs, targets = images(THREE, seed)
        torch.manual_seed(seed)
        problem = as_it_was(step.model, step.losses, inputs, targets)
        seen = problem.look()
        trunk = slow.vector(slow.trained(step.model.trunk))
        heads = {t: slow.vector(slow.trained(step.model.heads[t])) for t in THREE}
        torch.manual_seed(seed)
        report = step(inputs, targets)
        assert report.accepted
        eta = report.step_size
        d = (trunk - slow.vector(slow.trained(step.model.trunk))) / eta
        for i, task in enumerate(THREE):
            head = (heads[task] - slow.vector(slow.trained(step.model.heads[task]))) / eta
            slope = (seen["g"][task] @ d + seen["h"][task] @ head) / seen["L"][task]  # SI
            assert slope == pytest.approx(report.slopes[i].item(), rel=1e-6)
            assert slope >= 0


def test_perturbed_directions_upwards_are_replaced() -> None:
    # Where the curvature is negative and rho is large, the perturbed gradient points the other way.
    model = eq.SharedTrunk(nn.Linear(1, 1, bias=False).double(), {"t": nn.Identity()})
    with torch.no_grad():
        model.trunk.weight.fill_(0.5)
    losses = {"t": lambda output, target: output.cos().mean()}
    search, sharpness = eq.Backtracking(), eq.TaskSharpness(rho=3.0, decompose=False)
    step = eq.Step(model, losses, sgd(model), sharpness=sharpness, line_search=search)
    x = torch.ones(1, 1, dtype=torch.float64)
    report = step(x, {"t": x})
    assert report.fallback
    assert report.slopes.item() == pytest.approx(torch.tensor(0.5).sin().square().item())
    assert report.trial_losses.item() < report.losses.item()


def test_learned_weights_step_beside_the_search() -> None:
    step = image_step(eq.FastBacktracking(), eq.MGDA(), eq.UW(3))
    before = step.weighting.log_variances.detach().clone()
    report = step(*images(THREE))
    # Its own learning rate, once: d/ds of (e^-s L + s) / 2 at s = 0.
    lr = step.weighting.lr
    expected = before - lr * (1 - report.losses) / 2
    assert torch.allclose(step.weighting.log_variances.double(), expected, rtol=1e-6)
    refusing = image_step(eq.FastBacktracking(upper=1e4, floor=1e4), eq.MGDA(), eq.UW(3))
    assert not refusing(*images(THREE)).accepted
    assert torch.equal(refusing.weighting.log_variances, before)


def test_autocast() -> None:
    for search in (eq.Backtracking(), eq.FastBacktracking(verify=True)):
        model = lenet(THREE, dtype=torch.float32)
        step = eq.Step(model, all_tasks(model, F.cross_entropy), sgd(model), line_search=search)
        inputs, targets = images(THREE, dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            reports = [step(inputs, targets) for _ in range(3)]
        assert all(report.accepted for report in reports)
        assert reports[-1].losses.sum() < reports[0].losses.sum()


@pytest.mark.parametrize("search", [eq.Backtracking(), eq.FastBacktracking()])
def test_an_accepted_step_is_counted_by_whoever_counts_the_optimizers_steps(search: object) -> None:
    step = image_step(search, eq.MGDA())
    counted: list[int] = []
    step.optimizer.register_step_post_hook(lambda *_: counted.append(1))
    accepted = [step(*images(THREE)).accepted for _ in range(3)]
    assert sum(counted) == sum(accepted) > 0
