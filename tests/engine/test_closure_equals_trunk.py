"""Every recipe on trunk and heads: from batches and from a closure, the same training."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conformance.test_every_recipe import COMBINED
from helpers import THREE, all_tasks, class_batch, conv_model
from torch import Tensor, nn

import equipoise as eq
from equipoise.registry import TOKENS

STEPS = 5
TOLERANCE = 1e-12
# SGD throughout: the bias in front of BatchNorm has a gradient of round-off alone, which differs
# from one order of additions to another, and which Adam would make a whole step of.
OPTIMIZER = torch.optim.SGD


def takes_a_closure(text: str) -> bool:
    recipe = eq.Recipe.parse(text)
    search = recipe.line_search
    among_features = search is not None and search.method.level == "features"
    return not (recipe.is_stl or among_features or recipe.aggregator.method.level == "features")


RECIPES = [text for text in (*TOKENS, *COMBINED) if takes_a_closure(text)]
SOME = ["ew", "igbv1+cagrad", "f-mgda", "rlw+graddrop"]


class Plain(nn.Module):
    """The parts of a SharedTrunk, under the same names, in a module that says nothing of roles."""

    def __init__(self, model: eq.SharedTrunk) -> None:
        super().__init__()
        self.trunk, self.heads = model.trunk, model.heads


def closure_over(net: Any, inputs: Tensor, targets: dict[str, Tensor]) -> Callable:
    def losses() -> dict[str, Tensor]:
        # Dropout draws as in a SharedTrunk: first the trunk, then the heads in the order of tasks.
        features = net.trunk(inputs)
        present = [task for task in THREE if task in targets]
        return {t: F.cross_entropy(net.heads[t](features), targets[t]) for t in present}

    return losses


def batch(k: int) -> tuple[Tensor, dict[str, Tensor]]:
    """One batch of five has no labels of b."""
    inputs, targets = class_batch(THREE, seed=k, dtype=torch.float64)
    return inputs, {t: y for t, y in targets.items() if k != 3 or t != "b"}


def build(text: str, model: nn.Module, losses: Any, **options: Any) -> eq.Step:
    return eq.Recipe.parse(text).build(
        model, losses, lr=0.05, steps_per_epoch=2, optimizer=OPTIMIZER, seed=3, **options
    )


def both(text: str, shared: Callable[[Any], Any], plain: bool = True, **options: Any) -> None:
    """Train both, and compare them after each step."""
    model, other = (conv_model(THREE, dtype=torch.float64) for _ in range(2))
    trunk = build(text, model, all_tasks(model, F.cross_entropy), **options)
    net = Plain(other) if plain else other
    graph = build(text, net, list(THREE), shared=shared(net), **options)
    for k in range(STEPS):
        states = []
        for step, of, call in ((trunk, model, batch(k)), (graph, net, None)):
            torch.manual_seed(k)
            report = step(*call) if call else step(closure_over(net, *batch(k)))
            states.append((report, of.state_dict(), torch.get_rng_state()))
        (expected, theirs, drawn), (report, ours, now) = states
        check_reports(report, expected)
        assert torch.equal(now, drawn), "the global generator went another way"
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert close(value, theirs[name]), name
        for name, p in net.named_parameters():
            assert (p.grad is None) == (model.get_parameter(name).grad is None), name


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree, relative to the largest entry; NaN where the other has NaN."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    if not torch.equal(a.isnan(), b.isnan()):
        return False
    a, b = a.nan_to_num(), b.nan_to_num()
    return bool((a - b).abs().max() <= TOLERANCE * b.abs().max())


def check_reports(report: eq.StepReport, expected: eq.StepReport) -> None:
    for name, value in vars(expected).items():
        found = getattr(report, name)
        if isinstance(value, Tensor):
            assert isinstance(found, Tensor), name
            assert close(found, value), (name, found, value)
        elif name == "direction_norm":
            assert found == pytest.approx(value, rel=TOLERANCE)
        else:
            assert found == value, name


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe(recipe: str) -> None:
    both(recipe, lambda net: net.trunk)


WAYS = {
    "found": lambda net: None,
    "patterns": lambda net: ["trunk.*"],
    "one pattern": lambda net: "trunk*",
    "parameters": lambda net: list(net.trunk.parameters()),
    "generator": lambda net: net.trunk.parameters(),
}


@pytest.mark.parametrize("recipe", SOME)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_say_what_is_shared(recipe: str, way: str) -> None:
    both(recipe, WAYS[way])


@pytest.mark.parametrize("recipe", SOME)
@pytest.mark.parametrize("way", ["found", "patterns"])
def test_a_shared_trunk_from_a_closure(recipe: str, way: str) -> None:
    both(recipe, WAYS[way], plain=False)


@pytest.mark.parametrize("recipe", ["ew", "igbv1+cagrad", "f-mgda"])
def test_constant_task_weights(recipe: str) -> None:
    both(recipe, lambda net: net.trunk, task_weights=[0.5, 2.0, 1.0])


@pytest.mark.parametrize("recipe", ["ew", "igbv1+cagrad", "f-mgda", "bls+mgda"])
def test_numbers_of_samples_change_nothing_within_one_batch(recipe: str) -> None:
    nets = [Plain(conv_model(THREE, dtype=torch.float64)) for _ in range(2)]
    steps = [build(recipe, net, list(THREE), shared=net.trunk) for net in nets]
    for k in range(3):
        reports = []
        for net, step, counted in zip(nets, steps, (False, True), strict=True):
            losses = closure_over(net, *batch(k))
            torch.manual_seed(k)
            reports.append(step(counting(losses) if counted else losses))
        check_reports(*reports)
    for name, value in nets[0].state_dict().items():
        assert close(value, nets[1].state_dict()[name]), name


def counting(losses: Callable) -> Callable:
    return lambda: {task: (loss, 8 - k) for k, (task, loss) in enumerate(losses().items())}
