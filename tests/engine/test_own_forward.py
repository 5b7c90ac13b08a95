"""What a SharedTrunk does besides trunk and heads: trained, or refused at the feature level."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import TWO, linear_model, regression_batch
from torch import Tensor, nn

import equipoise as eq

LOSSES = dict.fromkeys(TWO, F.mse_loss)


class Normalising(eq.SharedTrunk):
    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        return super().forward(inputs / 4)


class Cascade(eq.SharedTrunk):
    """The right head sees what the left one says; a scale of its own; an output too many."""

    def __init__(self, trunk: nn.Module, heads: Any) -> None:
        super().__init__(trunk, heads)
        self.scale = nn.Parameter(torch.full((1,), 0.5, dtype=torch.float64))

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        z = self.trunk(inputs) * self.scale
        left = self.heads["left"](z)
        right = self.heads["right"](z + left)
        return {"left": left, "right": right, "features": z}


class Called(eq.SharedTrunk):
    def __call__(self, inputs: Tensor) -> dict[str, Tensor]:
        return super().__call__(inputs + 1)


def of_class(kind: type) -> eq.SharedTrunk:
    plain = linear_model()
    return kind(plain.trunk, dict(plain.heads.items())).double()


def hooked_before() -> eq.SharedTrunk:
    model = linear_model()
    model.register_forward_pre_hook(lambda module, args: (args[0] - 0.5,))
    return model


def hooked_after() -> eq.SharedTrunk:
    model = linear_model()
    model.register_forward_hook(lambda module, args, out: {t: 2 * o for t, o in out.items()})
    return model


def replaced() -> eq.SharedTrunk:
    model = linear_model()
    forward = model.forward
    model.forward = lambda inputs: forward(inputs.tanh())
    return model


MODELS = {
    "normalising": lambda: of_class(Normalising),
    "cascade": lambda: of_class(Cascade),
    "called": lambda: of_class(Called),
    "pre-hook": hooked_before,
    "hook": hooked_after,
    "replaced": replaced,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recipe", ["ew", "cagrad", "f-cagrad", "bls"])
def test_a_step_trains_what_model_of_inputs_says(name: str, recipe: str) -> None:
    """The same as a closure that calls model(inputs)."""
    found = []
    for closure in (False, True):
        torch.manual_seed(0)
        model = MODELS[name]()
        shared = {"shared": model.trunk} if closure and name != "cascade" else {}
        step = eq.Recipe.parse(recipe).build(
            model, TWO if closure else LOSSES, lr=0.1, steps_per_epoch=9,
            optimizer=torch.optim.SGD, **shared,
        )  # fmt: skip
        before = [p.detach().clone() for p in model.parameters()]
        for k in range(3):
            x, y = regression_batch(TWO, seed=k)
            if closure:
                step(lambda x=x, y=y, m=model: {t: F.mse_loss(m(x)[t], y[t]) for t in TWO})
            else:
                step(x, y)
        for p, start in zip(model.parameters(), before, strict=True):
            assert not torch.equal(p, start)
        found.append([p.detach() for p in model.parameters()])
    for own, theirs in zip(*found, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recipe", ["mgda-ub", "fbls"])
def test_refused_at_the_feature_level(name: str, recipe: str) -> None:
    with pytest.raises(eq.CombinationError, match="the forward method of|hook on the Sh") as error:
        eq.Recipe.parse(recipe).build(MODELS[name](), LOSSES, lr=0.1, steps_per_epoch=9)
    assert "level='parameters'" in str(error.value)


def test_a_hook_that_comes_later() -> None:
    """Used from the next step on; at the feature level that step is refused, with no change."""
    seen = []
    for level in ("parameters", "features"):
        model = linear_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = eq.Step(model, LOSSES, optimizer, aggregator=eq.MGDA(), level=level)
        batch = regression_batch(TWO)
        step(*batch)
        model.register_forward_pre_hook(lambda module, args: seen.append(args))
        before = [p.detach().clone() for p in model.parameters()]
        if level == "parameters":
            step(*batch)
            assert len(seen) == 1
        else:
            with pytest.raises(eq.CombinationError, match="hook on the SharedTrunk itself"):
                step(*batch)
            assert all(map(torch.equal, before, model.parameters()))


def test_a_task_that_is_absent_stays_put() -> None:
    model = of_class(Normalising)
    step = eq.Step(model, LOSSES, torch.optim.SGD(model.parameters(), lr=0.1), None, eq.MGDA())
    x, y = regression_batch(TWO)
    before = [p.detach().clone() for p in model.heads["right"].parameters()]
    step(x, {"left": y["left"]})
    assert all(map(torch.equal, before, model.heads["right"].parameters()))


def test_outputs_that_are_none() -> None:
    class ATuple(eq.SharedTrunk):
        def forward(self, inputs: Tensor) -> Any:
            return tuple(super().forward(inputs).values())

    class OneOnly(eq.SharedTrunk):
        def forward(self, inputs: Tensor) -> Any:
            return {"left": self.head("left", self.trunk(inputs))}

    for kind, message in ((ATuple, "ATuple.forward returned a tuple"), (OneOnly, "task 'right'")):
        model = of_class(kind)
        step = eq.Step(model, LOSSES, torch.optim.SGD(model.parameters(), lr=0.1))
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(eq.EquipoiseError, match=message):
            step(*regression_batch(TWO))
        assert all(map(torch.equal, before, model.parameters()))


def test_the_state_of_such_a_step_goes_on() -> None:
    def made() -> eq.Step:
        model = of_class(Cascade)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return eq.Step(model, LOSSES, optimizer, aggregator=eq.CAGrad())

    first, second = made(), made()
    first(*regression_batch(TWO, seed=0))
    second.load_state_dict(first.state_dict())
    for step in (first, second):
        step(*regression_batch(TWO, seed=1))
    assert all(map(torch.equal, first.model.parameters(), second.model.parameters()))


def test_separate_networks_of_a_forward_of_its_own() -> None:
    for make in MODELS.values():
        with pytest.raises(eq.CombinationError, match="stl and (a hook on|the forward method)"):
            eq.Recipe.parse("stl").build(make(), LOSSES, lr=0.1, steps_per_epoch=9)


@pytest.mark.parametrize("name", MODELS)
def test_diagnostics_and_specialists_ask_the_same_network(name: str) -> None:
    from equipoise.diagnostics.evaluation import Evaluation

    model = MODELS[name]()
    x, y = regression_batch(TWO)
    found = dict(Evaluation(model, [(x, y)]).outputs(TWO))
    together = eq.grouping.Specialists([model], torch.ones(2, 1), "regression")(x)
    outputs = model(x)
    for task in TWO:
        assert torch.equal(found[task], outputs[task])
        assert torch.equal(together[task], outputs[task])


def test_lookahead_works_on_trunk_and_heads_alone() -> None:
    from equipoise.grouping import LookaheadAffinity

    with pytest.raises(eq.CombinationError, match="LookaheadAffinity and the forward method of"):
        LookaheadAffinity(of_class(Normalising), LOSSES, lr=0.1)
