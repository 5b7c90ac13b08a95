"""Networks with parts that torch.compile has compiled: as without, or one sentence."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Counted, all_tasks, class_batch, differences, sgd
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import equipoise as eq
from equipoise.engine.ranks import Ranks
from equipoise.grouping import LookaheadAffinity

TASKS = ("a", "b", "c")
RECIPES = (
    "ew",
    "uw",
    "famo",
    "gradnorm",
    "igbv2",
    "mgda-ub",
    "fbls",
    "fbls(verify=true)",
    "bls",
    "cagrad",
    "graddrop",
    "f-cagrad",
    "f-cagrad(perturb=joint)",
    "f-cagrad(perturb=joint-mean)",
    "f-cagrad(perturb=samo)",
)
NEED_FEATURES = ("mgda-ub", "fbls", "fbls(verify=true)")
CASES = [(recipe, "trunk") for recipe in RECIPES]
CASES += [(recipe, "closure") for recipe in RECIPES if recipe not in NEED_FEATURES]

pytestmark = pytest.mark.filterwarnings(
    "ignore:Guards may run slower:RuntimeWarning",  # on Python 3.13.0
)


def compiled(module: nn.Module) -> nn.Module:
    """Compile it into graphs as inductor has them, without what inductor does with them."""
    return torch.compile(module, backend="aot_eager")


def network() -> eq.SharedTrunk:
    """Give convolution, BatchNorm and dropout, with saved tensors that a compiled graph uses up."""
    torch.manual_seed(0)
    trunk = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(64, 12),
        nn.Tanh(),
    )
    heads = {
        t: nn.Sequential(nn.Linear(12, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 3))
        for t in TASKS
    }
    return eq.SharedTrunk(trunk, heads)


def with_compiled(parts: str) -> eq.SharedTrunk:
    """Give it with the trunk or the heads compiled, or both."""
    model = network()
    trunk, heads = model.trunk, dict(model.heads.items())
    trunk = compiled(trunk) if "trunk" in parts else trunk
    heads = {t: compiled(head) if "heads" in parts else head for t, head in heads.items()}
    return eq.SharedTrunk(trunk, heads)


@pytest.fixture(scope="module")
def networks() -> Iterator[Callable[[str], eq.SharedTrunk]]:
    """Give compiled networks, each compiled once and set back to its first state."""
    known: dict[str, tuple[eq.SharedTrunk, dict[str, Any]]] = {}

    def of(parts: str) -> eq.SharedTrunk:
        if parts not in known:
            model = with_compiled(parts)
            known[parts] = model, deepcopy(model.state_dict())
        model, state = known[parts]
        model.load_state_dict(state)
        return model

    yield of
    torch._dynamo.reset()


def closure_of(net: nn.Module, inputs: Tensor, targets: dict[str, Tensor]) -> Callable:
    """Give the closure that evaluates all tasks on one batch."""

    def losses() -> dict[str, Tensor]:
        return {t: F.cross_entropy(output, targets[t]) for t, output in net(inputs).items()}

    return losses


def two_steps(model: eq.SharedTrunk, recipe: str, form: str, net: nn.Module | None = None) -> Any:
    """Give all that two steps leave behind: reports, parameters, buffers, random state."""
    inputs, targets = class_batch(TASKS)
    losses: Any = all_tasks(model, F.cross_entropy) if form == "trunk" else list(TASKS)
    shared = None if form == "trunk" else model.trunk
    step = eq.Recipe.parse(recipe).build(model, losses, 0.05, 2, shared=shared, seed=0)
    torch.manual_seed(7)
    batch = (
        (inputs, targets)
        if form == "trunk"
        else (closure_of(model if net is None else net, inputs, targets),)
    )
    reports = [step(*batch) for _ in range(2)]
    grams = [report.gram for report in reports]
    return step, [*grams, *model.state_dict().values(), torch.get_rng_state()]


def close(first: list[Any], second: list[Any]) -> bool:
    """Tell whether numbers are equal but for round-off, and all others equal."""
    return all(
        (a is None and b is None) or torch.allclose(a, b, rtol=1e-4, atol=1e-6)
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize(("recipe", "form"), CASES)
def test_every_recipe_is_the_one_of_the_network_as_it_was(
    networks: Callable[[str], eq.SharedTrunk], recipe: str, form: str
) -> None:
    step, found = two_steps(networks("trunk and heads"), recipe, form)
    _, expected = two_steps(network(), recipe, form)
    assert step._network.findings.compiled
    assert close(found, expected)


@pytest.mark.parametrize("parts", ["trunk", "heads"])
@pytest.mark.parametrize("recipe", ["cagrad", "f-cagrad(perturb=joint-mean)"])
def test_one_part_compiled(
    networks: Callable[[str], eq.SharedTrunk], recipe: str, parts: str
) -> None:
    for form in ("trunk", "closure"):
        _, found = two_steps(networks(parts), recipe, form)
        assert close(found, two_steps(network(), recipe, form)[1])


class Saved(nn.Module):
    """A part that is checkpointed as a whole."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.part, x, use_reentrant=False)


@pytest.mark.parametrize(
    "trunk",
    [
        lambda part: nn.Sequential(*part[:4], compiled(part[4:6]), *part[6:]),
        lambda part: Saved(compiled(part)),
        lambda part: compiled(Saved(part)),
    ],
    ids=["a layer within the trunk", "inside a checkpoint", "with a checkpoint inside"],
)
def test_compiled_in_part_and_checkpointed(trunk: Callable[[nn.Module], nn.Module]) -> None:
    for form in ("trunk", "closure"):
        found = []
        for make in (trunk, lambda part: part):
            plain = network()
            model = eq.SharedTrunk(make(plain.trunk), dict(plain.heads.items()))
            step, _ = two_steps(model, "cagrad", form)
            found.append([p.detach() for p in step.model.parameters()])
        assert close(*found)


def test_a_network_compiled_as_a_whole() -> None:
    model = network()
    _, found = two_steps(model, "cagrad", "closure", compiled(model))
    assert close(found, two_steps(network(), "cagrad", "closure")[1])
    with pytest.raises(eq.EquipoiseError, match=r"TaskSharpness needs .* Compile what is shared"):
        two_steps(model, "f-cagrad", "closure", compiled(model))


def test_a_closure_compiled_as_a_whole() -> None:
    batch = class_batch(TASKS)
    found = []
    for wrap in (compiled, lambda closure: closure):
        model = network().eval()
        step = eq.Step(model, TASKS, sgd(model), None, eq.CAGrad(), shared=model.trunk)
        step(wrap(closure_of(model, *batch)))
        found.append([p.detach() for p in model.parameters()])
    assert close(*found)
    step = eq.Step(model, TASKS, sgd(model), None, eq.CAGrad())
    with pytest.raises(eq.TaskError, match="has a compiled part"):
        step(compiled(closure_of(model, *batch)))


def test_heads_compiled_one_by_one_show_what_they_reach(
    networks: Callable[[str], eq.SharedTrunk],
) -> None:
    model = networks("heads")
    step = eq.Step(model, TASKS, sgd(model), None, eq.CAGrad())
    step(closure_of(model, *class_batch(TASKS)))
    assert step._network.partition.shared == list(model.trunk.parameters())


@pytest.mark.parametrize(
    ("recipe", "passes"),
    [("ew", (1, 1)), ("mgda-ub", (1, 1)), ("cagrad", (3, 3)), ("gradnorm", (3, 3))],
)
def test_a_forward_pass_for_each_backward_pass(
    networks: Callable[[str], eq.SharedTrunk], recipe: str, passes: tuple[int, int]
) -> None:
    model = networks("trunk")
    trunk, model.trunk = model.trunk, Counted(model.trunk)
    step = eq.Recipe.parse(recipe).build(model, all_tasks(model, F.cross_entropy), 1e-3, 2, seed=0)
    step(*class_batch(TASKS))
    model.trunk.counts()
    step(*class_batch(TASKS))
    counts = model.trunk.counts()
    model.trunk = trunk
    assert counts == passes


@pytest.mark.parametrize("recipe", ["bls", "fbls(verify=true)", "famo", "f-cagrad"])
def test_further_looks_use_the_code_of_the_first(
    networks: Callable[[str], eq.SharedTrunk], recipe: str
) -> None:
    """Other code might have other dropout masks, and would cost another compilation."""
    two_steps(networks("trunk and heads"), "ew", "trunk")
    compilations = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    two_steps(networks("trunk and heads"), recipe, "trunk")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compilations >= 2


def test_lookahead_affinity(networks: Callable[[str], eq.SharedTrunk]) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    found = []
    for model in (networks("trunk"), network()):
        torch.set_rng_state(state)
        affinity = LookaheadAffinity(model, all_tasks(model, F.cross_entropy), 0.1)
        found.append(affinity.update(*class_batch(TASKS)))
    assert torch.allclose(*found, atol=1e-5)


# ---------------------------------------------------------------------------- second derivatives


class Slope(nn.Module):
    """A loss with the derivative of a network by its inputs."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def losses(self) -> dict[str, Tensor]:
        x = torch.linspace(0, 1, 6)[:, None].requires_grad_()
        y = self.net(x)
        slope = torch.autograd.grad(y.sum(), x, create_graph=True)[0]
        return {"values": y.square().mean(), "slopes": (slope - 1).square().mean()}


def test_a_loss_that_differentiates_a_compiled_part() -> None:
    for net in (
        nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)),
        nn.Sequential(nn.Linear(1, 5), nn.BatchNorm1d(5), nn.Softplus(), nn.Linear(5, 1)),
    ):
        problem = Slope(compiled(net))
        step = eq.Step(
            problem, ["values", "slopes"], sgd(problem), None, eq.CAGrad(), shared=problem.net
        )
        before = deepcopy(problem.state_dict())
        with pytest.raises(eq.EquipoiseError, match="leave what it differentiates uncompiled"):
            step(problem.losses)
        assert differences(before, problem.state_dict()) == []


def test_compiled_after_the_first_step() -> None:
    model = network()
    step = eq.Step(model, all_tasks(model, F.cross_entropy), sgd(model), None, eq.CAGrad())
    step(*class_batch(TASKS))
    model.trunk = compiled(model.trunk)
    before = deepcopy(model.state_dict())
    with pytest.raises(eq.EquipoiseError, match="build a new Step"):
        step(*class_batch(TASKS))
    assert differences(before, model.state_dict()) == []
    step = eq.Step(model, all_tasks(model, F.cross_entropy), sgd(model), None, eq.CAGrad())
    step(*class_batch(TASKS))


# ------------------------------------------------------------------------- backward of one's own


def test_backward_passes_a_compiled_part_once(networks: Callable[[str], eq.SharedTrunk]) -> None:
    inputs, targets = class_batch(TASKS)
    gradients = []
    for model in (networks("trunk"), network()):
        model.zero_grad()
        torch.manual_seed(7)
        features = model.trunk(inputs)
        losses = {t: F.cross_entropy(model.head(t, features), targets[t]) for t in TASKS}
        shared = list(model.trunk.parameters())
        eq.backward(losses, shared, eq.CAGrad(), features=features)
        gradients.append([p.grad for p in model.parameters()])
    assert close(*gradients)


@pytest.mark.parametrize("parts", ["trunk", "heads"])
def test_backward_refuses_to_pass_it_again(
    networks: Callable[[str], eq.SharedTrunk], parts: str
) -> None:
    model = networks(parts)
    model.zero_grad()
    inputs, targets = class_batch(TASKS)
    features = model.trunk(inputs)
    losses = {t: F.cross_entropy(model.head(t, features), targets[t]) for t in TASKS}
    given = features if parts == "heads" else None
    with pytest.raises(eq.EquipoiseError, match=r"passes a compiled part .* Use a Step"):
        eq.backward(losses, model.trunk.parameters(), eq.CAGrad(), features=given)
    assert all(p.grad is None for p in model.parameters())


# ------------------------------------------------------------------------------------- inductor


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_repeats_its_own_draws() -> None:
    """Its dropout has other masks than the uncompiled one's, but the same in each look."""
    torch.manual_seed(0)
    trunk = torch.compile(nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)))
    model = eq.SharedTrunk(trunk, {t: nn.Linear(8, 3) for t in TASKS})
    g = torch.Generator().manual_seed(1)
    inputs = torch.randn(8, 5, generator=g)
    targets = {t: torch.randint(3, (8,), generator=g) for t in TASKS}
    step = eq.Step(model, all_tasks(model, F.cross_entropy), sgd(model), None, eq.CAGrad())
    state, before = torch.get_rng_state(), deepcopy(model.state_dict())
    rows = []
    for task in TASKS:  # plain PyTorch: a forward pass for each task, from the same state
        torch.set_rng_state(state)
        model.load_state_dict(before)
        loss = F.cross_entropy(model.head(task, trunk(inputs)), targets[task])
        gradients = torch.autograd.grad(loss, list(trunk.parameters()))
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    torch.set_rng_state(state)
    model.load_state_dict(before)
    gram = step(inputs, targets).gram
    expected = torch.stack(rows) @ torch.stack(rows).T
    assert torch.allclose(gram, expected.double(), rtol=1e-4)
    assert not torch.equal(torch.get_rng_state(), state)  # there were draws

    batch = (inputs, targets, None)
    look = step._network.evaluate(batch, Ranks(), frozenset(), True).look()
    again = torch.stack([v.detach() for v in look.losses_again(range(3))])
    assert torch.allclose(again.double(), look.losses)
    assert torch.allclose(look.trial_losses(), look.losses)
