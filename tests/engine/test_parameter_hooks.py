"""Hooks of the user's on parameters, and what `.grad` holds before a step looks twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import TWO, linear_model, regression_batch
from torch import Tensor, nn

import equipoise as eq
from equipoise.engine.ranks import Ranks
from equipoise.engine.rows import Rows

LOSSES = dict.fromkeys(TWO, F.mse_loss)


def step_of(model: nn.Module, form: str, recipe: str) -> Any:
    shared = {"shared": "trunk.*"} if form == "closure" else {}
    step = eq.Recipe.parse(recipe).build(
        model, LOSSES if form == "trunk" else TWO, lr=0.1, steps_per_epoch=9,
        optimizer=torch.optim.SGD, **shared,
    )  # fmt: skip
    if form == "trunk":
        return step
    return lambda x, y: step(lambda: {t: F.mse_loss(o, y[t]) for t, o in model(x).items()})


@pytest.mark.parametrize("form", ["trunk", "closure"])
@pytest.mark.parametrize(
    ("recipe", "shared_calls", "own_calls"),
    [
        ("ew", 1, 1),  # one backward of the sum
        ("mgda-ub", 1, 1),
        ("cagrad", 2, 1),  # of each task by itself
        ("f-cagrad(rho_task=0.0)", 4, 1),  # and at each perturbed point
        ("f-cagrad", 4, 2),
    ],
)
def test_how_often_tensor_hooks_run(
    recipe: str, shared_calls: int, own_calls: int, form: str
) -> None:
    if form == "closure" and "ub" in recipe:
        pytest.skip("a closure shows no features")
    model = linear_model()
    calls = {"shared": 0, "own": 0}

    def count(which: str) -> Any:
        def hook(gradient: Tensor) -> None:
            calls[which] += 1

        return hook

    model.trunk[0].weight.register_hook(count("shared"))
    model.heads["left"][0].weight.register_hook(count("own"))
    step_of(model, form, recipe)(*regression_batch(TWO))
    assert calls == {"shared": shared_calls, "own": own_calls}


@pytest.mark.parametrize("form", ["trunk", "closure"])
@pytest.mark.parametrize("recipe", ["ew", "mgda", "f-mgda"])
def test_what_tensor_hooks_return_counts(recipe: str, form: str) -> None:
    """A mask on the gradients of one weight and one bias keeps these where they are."""
    model = linear_model()
    kept = [model.trunk[0].weight, model.heads["right"][0].bias]
    for p in kept:
        p.register_hook(torch.zeros_like)
    before = [p.detach().clone() for p in kept]
    bias = model.trunk[0].bias.detach().clone()
    step_of(model, form, recipe)(*regression_batch(TWO))
    assert all(map(torch.equal, before, kept))
    assert not torch.equal(bias, model.trunk[0].bias)


@pytest.mark.parametrize("recipe", ["f-cagrad", "f-mgda(perturb=joint)", "f-cagrad(every=2)"])
def test_post_accumulate_hooks_see_no_partial_gradient(recipe: str) -> None:
    """The rows are the same as without such hooks, which do not run on the way."""
    found = []
    for hooked in (False, True):
        model, seen = linear_model(), []
        if hooked:
            for p in (model.trunk[0].weight, model.heads["left"][0].weight):
                p.register_post_accumulate_grad_hook(lambda p, seen=seen: seen.append(p.grad + 0))
        step = step_of(model, "trunk", recipe)
        for k in range(2):
            step(*regression_batch(TWO, seed=k))
        final = [model.trunk[0].weight.grad, model.heads["left"][0].weight.grad]
        assert len(seen) == 4 * hooked  # once a step, with what the optimizer gets
        assert not seen or all(map(torch.equal, seen[2:], final))
        found.append([p.detach() for p in model.parameters()])
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("hooked", [False, True])
def test_what_grad_holds_does_not_leak_into_a_row(hooked: bool) -> None:
    """Gradients that were added up before are set aside, and are there again."""
    trunk, head = nn.Linear(3, 4).double(), nn.Linear(4, 1).double()
    parameters, own = list(trunk.parameters()), list(head.parameters())
    seen: list[Tensor] = []
    if hooked:
        trunk.weight.register_post_accumulate_grad_hook(seen.append)
    rows = Rows(parameters, 2, Ranks())
    x = torch.randn(5, 3, dtype=torch.float64)

    def loss() -> Tensor:
        return head(trunk(x).tanh()).square().mean()

    wanted = torch.autograd.grad(loss(), [*parameters, *own])
    for _ in range(2):
        rows.add([torch.ones_like(p) for p in parameters])
    for k, p in enumerate((*parameters, *own)):
        p.grad = torch.full_like(p, 10.0 + k)
    held = [p.grad for p in (*parameters, *own)]
    seed = torch.tensor(3.0, dtype=torch.float64)
    rows.renew(1, minus_old=True)
    found = rows.receive(1, loss(), seed, also=own)
    for piece, gradient in zip(rows.pieces(rows.buffer[1]), wanted[:2], strict=True):
        torch.testing.assert_close(piece, 3 * gradient - 1)
    for gradient, other in zip(found, wanted[2:], strict=True):
        torch.testing.assert_close(gradient, 3 * other)
    assert all(p.grad is g for p, g in zip((*parameters, *own), held, strict=True))
    assert torch.equal(held[0], torch.full_like(held[0], 10.0))
    assert not seen


def test_what_grad_holds_is_there_after_an_error() -> None:
    p = nn.Parameter(torch.ones(3))
    rows = Rows([p], 1, Ranks())
    rows.add([torch.ones(3)])
    p.grad = before = torch.full((3,), 7.0)

    def fail(gradient: Tensor) -> None:
        raise RuntimeError("stop")

    p.register_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        rows.receive(0, p.square().sum(), None)
    assert p.grad is before
    assert not p._post_accumulate_grad_hooks
