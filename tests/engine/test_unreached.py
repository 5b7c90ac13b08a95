"""A trunk, or what is shared, that gets no gradient: one sentence, instead of staying put."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import TWO, linear_model, regression_batch
from torch import Tensor, nn

import equipoise as eq

LOSSES = dict.fromkeys(TWO, F.mse_loss)


class Cut(nn.Module):
    """A trunk whose gradients end in one of several ways."""

    def __init__(self, trunk: nn.Module, way: str) -> None:
        super().__init__()
        self.trunk, self.way = trunk, way

    def forward(self, x: Tensor) -> Any:
        if self.way == "no_grad":
            with torch.no_grad():
                return self.trunk(x)
        if self.way == "inference_mode":
            with torch.inference_mode():
                return self.trunk(x)
        z = self.trunk(x)
        return {
            "detached": z.detach(),
            "through numpy": torch.from_numpy(z.detach().numpy().copy()),
            "a new leaf": z.detach().clone().requires_grad_(),
            "a graph of its own": z.detach() * torch.ones(1, dtype=z.dtype, requires_grad=True),
            "whole": z,
        }[self.way]


WAYS = (
    "no_grad", "inference_mode", "detached", "through numpy", "a new leaf", "a graph of its own",
)  # fmt: skip


def model_with(way: str) -> eq.SharedTrunk:
    plain = linear_model()
    return eq.SharedTrunk(Cut(plain.trunk, way), dict(plain.heads.items()))


def step_of(model: Any, form: str, recipe: str) -> Any:
    """Give a function of a batch that makes a step."""
    shared = {"shared": "trunk.*"} if form == "closure" else {}
    step = eq.Recipe.parse(recipe).build(
        model, LOSSES if form == "trunk" else TWO, lr=0.1, steps_per_epoch=9,
        optimizer=torch.optim.SGD, **shared,
    )  # fmt: skip
    if form == "trunk":
        return step
    return lambda x, y: step(lambda: {t: F.mse_loss(o, y[t]) for t, o in model(x).items()})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", ["trunk", "closure"])
@pytest.mark.parametrize("recipe", ["ew", "cagrad"])
def test_a_trunk_without_gradients_is_refused(recipe: str, form: str, way: str) -> None:
    model = model_with(way)
    make = step_of(model, form, recipe)
    before = [p.detach().clone() for p in model.parameters()]
    batch = regression_batch(TWO)
    for _ in range(2):  # the second time as well
        # Heads that are trained on tensors of inference_mode: torch says so itself.
        kinds = (eq.EquipoiseError, RuntimeError) if way == "inference_mode" else eq.EquipoiseError
        with pytest.raises(kinds, match=r"the trunk|what is shared|Inference tensors"):
            make(*batch)
        assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("way", ["no_grad", "inference_mode", "detached"])
@pytest.mark.parametrize("recipe", ["ew", "si"])
def test_a_frozen_trunk_is_fine(recipe: str, way: str) -> None:
    """Equal to the trunk that makes a graph, and whose parameters are frozen."""
    found = []
    for cut in (way, "whole"):
        model = model_with(cut)
        model.trunk.requires_grad_(False)
        make = step_of(model, "trunk", recipe)
        before = [p.detach().clone() for p in model.heads.parameters()]
        make(*regression_batch(TWO))
        assert not any(map(torch.equal, before, model.heads.parameters()))
        found.append([p.detach() for p in model.heads.parameters()])
    assert all(map(torch.equal, *found))


def test_a_frozen_shared_part_of_a_closure_is_fine() -> None:
    model = model_with("whole")
    model.trunk.requires_grad_(False)
    before = [p.detach().clone() for p in model.heads.parameters()]
    step_of(model, "closure", "ew")(*regression_batch(TWO))
    assert not any(map(torch.equal, before, model.heads.parameters()))


class Stops(nn.Module):
    """A head that lets no gradient through."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, z: Tensor) -> Tensor:
        return self.head(z.detach())


@pytest.mark.parametrize("form", ["trunk", "closure"])
def test_heads_that_stop_all_gradients(form: str) -> None:
    """One of them is an auxiliary task; all of them leave the trunk alone, once each was seen."""
    x, y = regression_batch(TWO)
    model = linear_model()
    model.heads["left"] = Stops(model.heads["left"])
    before = [p.detach().clone() for p in model.trunk.parameters()]
    make = step_of(model, form, "ew")
    if form == "trunk":
        make(x, {"left": y["left"]})  # the right one may still come
        assert all(map(torch.equal, before, model.trunk.parameters()))
    make(x, y)
    assert not any(map(torch.equal, before, model.trunk.parameters()))

    model = linear_model()
    for task in TWO:
        model.heads[task] = Stops(model.heads[task])
    make = step_of(model, form, "ew")
    if form == "trunk":
        make(x, {"left": y["left"]})
        with pytest.raises(eq.EquipoiseError, match="no loss reaches the features"):
            make(x, {"right": y["right"]})
    with pytest.raises(eq.EquipoiseError, match="no loss reaches"):
        make(x, y)


def test_shared_that_the_network_does_not_use() -> None:
    model = linear_model()
    spare = nn.Linear(2, 2).double()
    both = nn.ModuleDict({"model": model, "spare": spare})
    optimizer = torch.optim.SGD(both.parameters(), lr=0.1)
    step = eq.Step(both, TWO, optimizer, shared=spare)
    x, y = regression_batch(TWO)
    before = [p.detach().clone() for p in both.parameters()]
    with pytest.raises(eq.EquipoiseError, match="no loss reaches any parameter of what is shared"):
        step(lambda: {t: F.mse_loss(o, y[t]) for t, o in model(x).items()})
    assert all(map(torch.equal, before, both.parameters()))


# ------------------------------------------------------------- features that tasks do not share


class TwoStreams(nn.Module):
    """Features of which each head reads its own."""

    def __init__(self, trunk: nn.Module, form: str) -> None:
        super().__init__()
        self.trunk, self.form = trunk, form

    def forward(self, x: Tensor) -> Any:
        z = self.trunk(x)
        if self.form == "dict":
            return {"left": z, "right": z * 2}
        return torch.cat([z, z * 2], 1)


class Reads(nn.Module):
    def __init__(self, head: nn.Module, which: str) -> None:
        super().__init__()
        self.head, self.which = head, which

    def forward(self, features: Any) -> Tensor:
        if isinstance(features, dict):
            return self.head(features[self.which])
        return self.head(features[:, :6] if self.which == "left" else features[:, 6:])


def streams(form: str, same: bool = False) -> eq.SharedTrunk:
    plain = linear_model()
    heads = {t: Reads(plain.heads[t], "left" if same else t) for t in TWO}
    return eq.SharedTrunk(TwoStreams(plain.trunk, form), heads)


@pytest.mark.parametrize("form", ["dict", "slices"])
@pytest.mark.parametrize("recipe", ["mgda-ub", "fbls", "graddrop-ub"])
def test_disjoint_features_are_told_once(recipe: str, form: str) -> None:
    make = step_of(streams(form), "trunk", recipe)
    advice = "Backtracking" if recipe == "fbls" else "level='parameters'"
    with pytest.warns(UserWarning, match=rf"each head reads features of its own.*{advice}"):
        make(*regression_batch(TWO))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(*regression_batch(TWO, seed=1))


def test_samples_of_one_task_each() -> None:
    """Two data sets in one batch: their gradients of the features never meet; summed, they do."""
    for recipe, warned in (("mgda-ub", True), ("graddrop-ub", False), ("mgda", False)):
        x, y = regression_batch(TWO)
        y["left"][:4] = y["right"][4:] = torch.nan
        make = step_of(linear_model(), "trunk", recipe)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            make(x, y)
        assert [str(w.message)[:18] for w in seen] == ["level='features': "] * warned


@pytest.mark.parametrize("recipe", ["mgda-ub", "fbls"])
def test_features_that_meet_are_not_warned_of(recipe: str) -> None:
    x, y = regression_batch(TWO)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step_of(streams("dict", same=True), "trunk", recipe)(x, y)
        step_of(linear_model(), "trunk", recipe)(x, y)
        step_of(streams("dict"), "trunk", recipe)(x, {"left": y["left"]})  # alone


def test_disjoint_features_do_not_matter_elsewhere() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for recipe in ("ew", "cagrad", "bls"):
            step_of(streams("dict"), "trunk", recipe)(*regression_batch(TWO))
