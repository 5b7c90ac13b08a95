"""Lazy modules get their shapes before the first batch, and nothing else notices."""

import io
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import differences
from torch import Tensor, nn

import equipoise as eq
from equipoise.engine import lazy

LOSSES = {"a": F.mse_loss, "b": F.l1_loss}
RECIPES = ("ew", "cagrad", "f-cagrad", "bls", "fbls(verify=true)", "famo")


def batch(images: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    shape = (12, 3, 6, 6) if images else (12, 8)
    return torch.randn(*shape, generator=g), {t: torch.randn(12, 1, generator=g) for t in LOSSES}


NETWORKS: dict[str, Callable[[], eq.SharedTrunk]] = {
    "linear": lambda: eq.SharedTrunk(
        nn.Sequential(nn.LazyLinear(6), nn.Tanh(), nn.Dropout(0.2)),
        {t: nn.Linear(6, 1) for t in LOSSES},
    ),
    "batchnorm and heads": lambda: eq.SharedTrunk(
        nn.Sequential(nn.LazyLinear(6), nn.LazyBatchNorm1d(), nn.Dropout(0.2)),
        {
            t: nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.LazyLinear(1))
            for t in LOSSES
        },
    ),
    "convolution": lambda: eq.SharedTrunk(
        nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten()),
        {t: nn.LazyLinear(1) for t in LOSSES},
    ),
}  # fmt: skip


def step_of(recipe: str, model: eq.SharedTrunk, closure: bool) -> Callable[..., eq.StepReport]:
    given = list(LOSSES) if closure else LOSSES
    step = eq.Recipe.parse(recipe).build(model, given, lr=1e-3, steps_per_epoch=9)

    def make(x: Tensor, y: dict[str, Tensor]) -> eq.StepReport:
        def losses() -> dict[str, Tensor]:
            outputs = model(x)
            return {t: LOSSES[t](outputs[t], y[t]) for t in y}

        return step(losses) if closure else step(x, y)

    return make


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("closure", [False, True])
def test_as_if_the_shapes_had_been_known(name: str, recipe: str, closure: bool) -> None:
    if closure and recipe.startswith("fbls"):
        pytest.skip("needs a trunk")
    x, y = batch(name == "convolution")

    def train(known: bool) -> tuple[dict[str, Tensor], Tensor, float]:
        torch.manual_seed(0)
        model = NETWORKS[name]()
        make = step_of(recipe, model, closure)
        torch.manual_seed(0)  # what initialises the weights is drawn from here
        if known:
            with torch.no_grad():
                model.eval()(x)
            model.train()
        torch.manual_seed(0)
        for _ in range(3):
            make(x, y)
        assert model.trunk.training
        return model.state_dict(), torch.rand(2), random.random()

    random.seed(0)
    lazily = train(known=False)
    random.seed(0)
    known = train(known=True)
    assert differences(lazily[0], known[0]) == []
    assert torch.equal(lazily[1], known[1])
    assert lazily[2] == known[2]


@pytest.mark.parametrize("closure", [False, True])
def test_a_head_whose_labels_come_later(closure: bool) -> None:
    model, (x, y) = NETWORKS["batchnorm and heads"](), batch()
    make = step_of("f-cagrad", model, closure)
    if closure:  # what the closure does not call stays as it is until then

        def losses(tasks: tuple[str, ...]) -> Callable[[], dict[str, Tensor]]:
            return lambda: {t: LOSSES[t](model.heads[t](model.trunk(x)), y[t]) for t in tasks}

        step = eq.Recipe.parse("f-cagrad").build(model, list(LOSSES), lr=1e-3, steps_per_epoch=9)
        step(losses(("a",)))
        step(losses(("a", "b")))
    else:
        make(x, {"a": y["a"]})
        make(x, y)
    assert int(model.heads["a"][1].num_batches_tracked) == 2
    assert int(model.heads["b"][1].num_batches_tracked) == 1


@pytest.mark.parametrize("closure", [False, True])
def test_a_first_step_that_raises_keeps_the_shapes_alone(closure: bool) -> None:
    model, (x, y) = NETWORKS["batchnorm and heads"](), batch()
    make = step_of("cagrad", model, closure)
    random_before = torch.get_rng_state()
    with pytest.raises(eq.NonFiniteError):
        make(x, {**y, "b": y["b"] * torch.inf})
    assert torch.equal(torch.get_rng_state(), random_before)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm1d):
            assert int(part.num_batches_tracked) == 0
            assert part.running_mean.abs().sum() == 0
    make(x, y)


def test_an_error_in_that_call_says_so() -> None:
    model, (x, y) = NETWORKS["linear"](), batch()
    model.heads["b"] = nn.Linear(3, 1)
    with pytest.raises(RuntimeError) as caught:
        step_of("ew", model, closure=False)(x, y)
    said = [*getattr(caught.value, "__notes__", ()), str(caught.value)]
    assert any("gives lazy modules their shapes" in text for text in said)


def test_a_state_continues_in_a_network_without_shapes() -> None:
    def build() -> eq.Step:
        model = NETWORKS["batchnorm and heads"]()
        return eq.Recipe.parse("cagrad").build(model, LOSSES, lr=1e-3, steps_per_epoch=9)

    step, file = build(), io.BytesIO()
    step(*batch())
    torch.save(step.state_dict(), file)
    expected = step(*batch())
    file.seek(0)
    other = build()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(*batch()).losses, expected.losses)
    assert differences(step.model.state_dict(), other.model.state_dict()) == []


def test_later_steps_do_not_look_for_lazy_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    for closure in (False, True):
        make = step_of("ew", NETWORKS["linear"](), closure)
        make(*batch())
        with monkeypatch.context() as patch:
            patch.setattr(lazy, "is_lazy", lambda tensor: pytest.fail("looks again"))
            make(*batch())
