"""A default device other than the model's: what lives on the host says so itself.

On "meta" no number can be read, so whatever is made there by mistake fails.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import THREE, linear_model, regression_batch
from torch import Tensor

import equipoise as eq
from equipoise.registry import METHODS

LOSSES = dict.fromkeys(THREE, F.mse_loss)


@contextmanager
def default_device(device: str | None) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


def recipes() -> list[str]:
    """Give one for each registered method, and some more of their forms."""
    more = [
        "cagrad-ub", "mgda-ub", "graddrop-ub", "f-cagrad", "f-graddrop", "fbls+mgda-ub",
        "uw+cagrad", "si+f-mgda(perturb=joint)", "f-cagrad(every=2,adaptive=True)", "fbls+gls",
        "bls(direction=optimizer)+mgda", "f-pcgrad(perturb=joint-mean)", "f-mgda(perturb=samo)",
        "dwa+bls", "igbv2(learn_epoch=1,use_epoch=1,gradient_steps=1)", "stch(warmup_epochs=1)",
        "cagrad(update_every=2)", "mgda(heads=weighted)", "dbmtl+mgda",
    ]  # fmt: skip
    return [recipe for recipe in (*METHODS, *more) if readable(recipe)]


def readable(recipe: str) -> bool:
    """Whether there is such a form, and its extra is here."""
    if "igbv2" in recipe and importlib.util.find_spec("stable_baselines3") is None:
        return False
    try:
        eq.Recipe.parse(recipe)
    except ValueError:
        return False
    return True


def trained(recipe: str, device: str | None) -> tuple[list[Tensor], Tensor]:
    """Give the parameters after three steps, one without a task, and a report's losses."""
    model = linear_model(THREE)
    batches = [regression_batch(THREE, seed=k) for k in range(3)]
    del batches[1][1]["c"]
    batches[2][1]["a"][:2] = torch.nan
    losses = {t: partial(positive, float(k + 1)) for k, t in enumerate(THREE)}
    with default_device(device):
        step = eq.Recipe.parse(recipe).build(
            model, losses, lr=0.01, steps_per_epoch=1, seed=0, optimizer=torch.optim.SGD
        )
        for batch in batches:
            report = step(*batch)
        step.load_state_dict(step.state_dict())
    return [p.detach() for p in step.model.parameters()], report.losses


def positive(shift: float, output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output, target) + shift


@pytest.mark.parametrize("recipe", recipes())
def test_the_same_step_under_any_default_device(recipe: str) -> None:
    own, losses = trained(recipe, None)
    found, found_losses = trained(recipe, "meta")
    assert found_losses.device.type == "cpu"
    assert torch.equal(losses, found_losses)
    assert all(map(torch.equal, own, found))


@pytest.mark.parametrize("features", [False, True])
def test_backward(features: bool) -> None:
    model = linear_model(THREE)
    x, y = regression_batch(THREE)
    with default_device("meta"):
        z = model.trunk(x)
        losses = {t: F.mse_loss(model.head(t, z), y[t]) for t in THREE}
        given = z if features else None
        weighting = eq.UW(3)
        result = eq.backward(
            losses, model.shared_parameters(), eq.CAGrad(), given, weighting=weighting
        )
    assert result.coefficients is not None
    assert result.coefficients.device.type == "cpu"
    assert all(p.grad is not None for p in (*model.parameters(), *weighting.parameters()))


def test_a_closure() -> None:
    model = linear_model(THREE)
    x, y = regression_batch(THREE)
    before = [p.detach().clone() for p in model.parameters()]
    with default_device("meta"):
        for recipe in ("ew", "f-cagrad", "bls"):
            step = eq.Recipe.parse(recipe).build(
                model, THREE, lr=0.1, steps_per_epoch=2, optimizer=torch.optim.SGD
            )
            step(lambda: {t: F.mse_loss(o, y[t]) for t, o in model(x).items()})
    assert not any(map(torch.equal, before, model.parameters()))
