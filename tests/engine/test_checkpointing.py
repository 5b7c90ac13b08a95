"""Activation checkpointing: a step moves buffers as often as plain PyTorch does."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import all_tasks, class_batch, differences, sgd, snapshot
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import equipoise as eq

TASKS = ("a", "b", "c")
RECIPES = (
    "ew",
    "famo",
    "gradnorm",
    "mgda-ub",
    "fbls",
    "fbls(verify=true)",
    "bls",
    "cagrad",
    "graddrop",
    "f-cagrad",
    "f-cagrad(perturb=joint)",
    "f-cagrad(perturb=joint-mean)",
)
NEED_FEATURES = ("mgda-ub", "fbls", "fbls(verify=true)")
CASES = [(recipe, "trunk") for recipe in RECIPES]
CASES += [(recipe, "closure") for recipe in RECIPES if recipe not in NEED_FEATURES]


class Saved(nn.Module):
    """A part that is checkpointed as a whole."""

    def __init__(self, part: nn.Module, use_reentrant: bool = False) -> None:
        super().__init__()
        self.part, self.use_reentrant = part, use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.part, x, use_reentrant=self.use_reentrant)


class InSegments(Saved):
    """A part that is checkpointed segment after segment."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint_sequential(self.part, 3, x, use_reentrant=self.use_reentrant)


class Stored(Saved):
    """The same, not checkpointed."""

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)


class MovingMean(nn.Module):
    """Subtracts a mean that moves, and is another tensor after each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = self.mean * 0.9 + x.detach().mean(0) * 0.1
        return x - x.mean(0)


class Counterless(nn.Module):
    """BatchNorm that does not count, so that nothing but the values shows that they move."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(12))
        self.register_buffer("variance", torch.ones(12))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.variance, training=True)


Part = Callable[[nn.Module], nn.Module]
WHERE: dict[str, tuple[Part, Part]] = {
    "trunk": (Saved, Stored),
    "heads": (Stored, Saved),
    "all in segments": (InSegments, InSegments),
}


def network(trunk: Part = Stored, head: Part = Stored) -> eq.SharedTrunk:
    """Give convolution, BatchNorm and dropout."""
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(64, 12),
        MovingMean(),
        nn.Tanh(),
        Counterless(),
    )
    heads = {
        t: nn.Sequential(nn.Linear(12, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 3))
        for t in TASKS
    }
    return eq.SharedTrunk(trunk(body), {t: head(part) for t, part in heads.items()})


def closure_of(model: nn.Module, inputs: Tensor, targets: dict[str, Tensor]) -> Callable:
    """Give the closure that evaluates all tasks on one batch."""

    def losses() -> dict[str, Tensor]:
        return {t: F.cross_entropy(output, targets[t]) for t, output in model(inputs).items()}

    return losses


def built(model: eq.SharedTrunk, recipe: str, form: str) -> tuple[eq.Step, tuple]:
    """Give a step with the batch that it is called with."""
    losses: Any = all_tasks(model, F.cross_entropy) if form == "trunk" else list(TASKS)
    step = eq.Recipe.parse(recipe).build(model, losses, 0.05, 2, seed=0)
    inputs, targets = class_batch(TASKS)
    batch = (inputs, targets) if form == "trunk" else (closure_of(model, inputs, targets),)
    return step, batch


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(("recipe", "form"), CASES)
def test_every_recipe_moves_buffers_as_plain_pytorch_does(
    recipe: str, form: str, where: str
) -> None:
    model, expected, stored = network(*WHERE[where]), network(*WHERE[where]), network()
    (step, batch), (usual, _) = built(model, recipe, form), built(stored, recipe, form)
    usual_batch = built(stored, recipe, form)[1]
    for seed in (7, 8):
        expected.load_state_dict(model.state_dict())
        torch.manual_seed(seed)
        sum(closure_of(expected, *class_batch(TASKS))().values()).backward()
        torch.manual_seed(seed)
        gram = usual(*usual_batch).gram
        random = torch.get_rng_state()
        torch.manual_seed(seed)
        assert differences(gram, step(*batch).gram) == []
        assert torch.equal(torch.get_rng_state(), random)
        found = dict(model.named_buffers())
        assert differences(dict(expected.named_buffers()), found) == []
        assert differences(list(stored.parameters()), list(model.parameters())) == []
    counts = {int(v) for name, v in found.items() if name.endswith("num_batches_tracked")}
    assert max(counts) == 4  # in each of two steps a forward pass, and one that is repeated


def test_nothing_is_copied_for_a_network_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    step, batch = built(network(), "cagrad", "trunk")
    step(*batch)
    called = []
    monkeypatch.setattr("equipoise.engine.passes.copy_of_buffers", called.append)
    step(*batch)
    assert called == []


def test_graphs_are_kept_only_where_another_backward_pass_follows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept: list[bool] = []
    gradient = torch.autograd.grad

    def noted(outputs: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        found = gradient(outputs, inputs, *args, **options)
        if any(p is model.trunk.part[0].weight for p in inputs):
            kept.append(bool(options.get("retain_graph", args[1:2] == (True,))))
        return found

    monkeypatch.setattr(torch.autograd, "grad", noted)
    for recipe, expected in {"ew": [False], "cagrad": [True, True, False]}.items():
        for form in ("trunk", "closure"):
            model = network()
            step, batch = built(model, recipe, form)
            kept.clear()
            step(*batch)
            assert kept == expected


# ------------------------------------------------------------------------------- the reentrant kind


def reentrant(part: nn.Module) -> nn.Module:
    """Checkpoint the part in the reentrant way, after a layer that is not."""
    return nn.Sequential(nn.Identity(), part[0], Saved(part[1:], use_reentrant=True))


def reentrant_segments(part: nn.Module) -> nn.Module:
    """Checkpoint all but the first layer in the reentrant way, in segments."""
    return nn.Sequential(part[0], InSegments(part[1:], use_reentrant=True))


@pytest.mark.parametrize("parts", [(reentrant, Stored), (Stored, reentrant_segments)])
@pytest.mark.parametrize("recipe", ["ew", "cagrad", "f-cagrad"])
@pytest.mark.parametrize("form", ["trunk", "closure"])
def test_the_reentrant_kind_is_refused(parts: tuple[Part, Part], recipe: str, form: str) -> None:
    step, batch = built(network(*parts), recipe, form)
    before = deepcopy(snapshot(step))
    with pytest.raises(eq.EquipoiseError, match="use_reentrant=False"):
        step(*batch)
    assert differences(before, snapshot(step)) == []


def wholly_reentrant(part: nn.Module) -> nn.Module:
    """Checkpoint all of it in the reentrant way: the graph does not show that there is a part."""
    return Saved(part, use_reentrant=True)


def first_reentrant(part: nn.Module) -> nn.Module:
    """Checkpoint the first layers in the reentrant way, and no others."""
    return nn.Sequential(Saved(part[:5], use_reentrant=True), part[5:])


@pytest.mark.parametrize("part", [wholly_reentrant, first_reentrant])
@pytest.mark.parametrize("recipe", ["ew", "cagrad"])
@pytest.mark.parametrize("form", ["trunk", "closure"])
def test_a_reentrant_part_that_comes_first(part: Part, recipe: str, form: str) -> None:
    step, batch = built(network(part), recipe, form)
    before = deepcopy(snapshot(step))
    with pytest.raises(eq.EquipoiseError, match="use_reentrant="):
        step(*batch)
    assert differences(before, snapshot(step)) == []


def test_a_closure_that_ends_in_a_reentrant_part() -> None:
    model = network(wholly_reentrant)
    inputs, targets = class_batch(TASKS)

    def losses() -> dict[str, Tensor]:
        outputs = model.trunk(inputs)[:, :3]
        return {t: F.cross_entropy(outputs, targets[t]) for t in TASKS}

    step = eq.Step(model, TASKS, sgd(model), None, eq.MGDA())
    with pytest.raises(eq.TaskError, match="inside a checkpoint with use_reentrant=True"):
        step(losses)


@pytest.mark.parametrize("form", ["trunk", "closure"])
def test_a_frozen_part_may_be_of_the_reentrant_kind(form: str) -> None:
    found = []
    for part in (first_reentrant, Stored):
        model = network(part)
        body = model.trunk[0].part if part is first_reentrant else model.trunk.part[:5]
        body.requires_grad_(False)
        step, batch = built(model, "cagrad", form)
        torch.manual_seed(7)
        found.append([step(*batch).gram, *(p.detach().clone() for p in model.parameters())])
    assert differences(*found) == []


def test_other_warnings_of_the_first_step_come_through() -> None:
    model = network()

    def losses() -> dict[str, Tensor]:
        warnings.warn("said by the closure", UserWarning, stacklevel=1)
        return closure_of(model, *class_batch(TASKS))()

    step = eq.Step(model, TASKS, sgd(model), None, eq.MGDA())
    with pytest.warns(UserWarning, match="said by the closure"):
        step(losses)


def test_backward_refuses_the_reentrant_kind() -> None:
    model = network(reentrant)
    losses = closure_of(model, *class_batch(TASKS))()
    with pytest.raises(eq.EquipoiseError, match="use_reentrant=False"):
        eq.backward(losses, model.trunk.parameters(), eq.CAGrad())
