"""Constant weights on top of any weighting."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import equipoise as eq
from equipoise.weighting import FAMO, SI, UW, Fixed, GradNorm, IGBv1

L = torch.tensor([0.6, 0.3, 0.2], dtype=torch.float64)
W = torch.tensor([2.0, 0.5, 0.0], dtype=torch.float64)


def test_alone() -> None:
    fixed = Fixed([2.0, 0.5, 0.0])
    torch.testing.assert_close(fixed(L), W * L)
    torch.testing.assert_close(fixed.weights, W)
    assert fixed.left_out == {2}
    assert fixed.n_tasks == 3


def test_on_top_of_si_it_leaves_a_trace() -> None:
    """Factors before SI would be lost: the gradient of ln(w L) does not know w."""
    losses = L.clone().requires_grad_()
    Fixed(W, SI())(losses).sum().backward()
    torch.testing.assert_close(losses.grad, torch.tensor([2 / 0.6, 0.5 / 0.3, 0.0]).double())


def test_the_inner_weighting_sees_the_losses_as_they_are() -> None:
    inner, outer = IGBv1(steps_per_epoch=1), Fixed([2.0, 0.5, 1.0], IGBv1(steps_per_epoch=1))
    for k in range(4):
        losses = L * (1 + k)
        torch.testing.assert_close(outer(losses), inner(losses) * torch.tensor([2, 0.5, 1]))


def test_a_task_of_weight_zero_is_absent_for_the_inner_weighting() -> None:
    """lambda of IGB sums to the number of tasks that take part."""
    fixed = Fixed([1.0, 1.0, 0.0], IGBv1(steps_per_epoch=1))
    for _ in range(3):
        fixed(L)
    assert float(fixed.weights.sum()) == pytest.approx(2)
    losses = torch.tensor([0.6, 0.3, math.nan], dtype=torch.float64)
    assert fixed(losses, torch.tensor([True, True, False])).isfinite().all()


def test_needs_and_learned_parameters_are_those_of_the_inner_weighting() -> None:
    assert Fixed([1.0, 1.0], GradNorm()).needs_gram
    assert Fixed([1.0, 1.0], FAMO()).needs_losses_after
    assert Fixed([1.0, 1.0], UW(2)).lr == UW(2).lr
    assert len(list(Fixed([1.0, 1.0], UW(2)).parameters())) == 1
    assert not hasattr(Fixed([1.0]), "generator")
    assert isinstance(Fixed([1.0], eq.RLW()).generator, torch.Generator)


def test_gradnorm_inside_learns_from_the_gradients_without_the_factors() -> None:
    inner, outer = GradNorm(), Fixed([3.0, 0.5], GradNorm())
    losses, present = torch.tensor([1.0, 2.0]).double(), torch.tensor([True, True])
    gram = torch.tensor([[4.0, 1.0], [1.0, 9.0]]).double()
    factors = torch.tensor([3.0, 0.5]).double()
    for _ in range(3):
        inner(losses)
        outer(losses)
        inner.observe(losses, present, gram)
        outer.observe(losses, present, gram * torch.outer(factors, factors))
    torch.testing.assert_close(outer.inside.learned, inner.learned)


def model() -> eq.SharedTrunk:
    torch.manual_seed(0)
    return eq.SharedTrunk(nn.Linear(2, 3), {t: nn.Linear(3, 1) for t in "abc"})


@pytest.mark.parametrize("recipe", ["ew", "mgda", "pcgrad", "mgda-ub", "f-cagrad", "nash"])
def test_weight_zero_is_as_if_the_task_had_no_labels(recipe: str) -> None:
    """MGDA would stand still at the zero gradient that a mere factor leaves."""
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    targets = {t: x[:, :1] * k for k, t in enumerate("abc", 1)}
    states = []
    for weights, given in (([1.0, 1.0, 0.0], "abc"), (None, "ab")):
        net = model()
        step = eq.Recipe.parse(recipe).build(
            net, dict.fromkeys("abc", F.mse_loss), 0.1, 1, seed=0, task_weights=weights
        )
        for _ in range(3):
            report = step(x, {t: targets[t] for t in given})
        assert report.losses[2].isnan() and report.weights[2] == 0
        states.append(net.state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_a_batch_of_left_out_tasks_alone_is_skipped() -> None:
    net = model()
    step = eq.Step(
        net,
        dict.fromkeys("abc", F.mse_loss),
        torch.optim.SGD(net.parameters(), 0.1),
        Fixed([1.0, 0.0, 0.0]),
    )
    assert not step(torch.zeros(2, 2), {"b": torch.zeros(2, 1)}).accepted


def test_saving_and_loading() -> None:
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    targets = dict.fromkeys("abc", x[:, :1])

    def step() -> eq.Step:
        recipe = eq.Recipe.parse("rlw+pcgrad")
        losses = dict.fromkeys("abc", F.mse_loss)
        return recipe.build(model(), losses, 0.1, 1, seed=0, task_weights=[0.2, 0.0, 1.0])

    first = step()
    first(x, targets)
    second = step()
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x, targets).weights, second(x, targets).weights)
    loaded = Fixed([1.0, 1.0])
    loaded.load_state_dict(Fixed([0.0, 3.0]).state_dict())
    assert loaded.left_out == {0}


def test_impossible_weights() -> None:
    for weights, error, message in (
        ([0.0, 0.0], ValueError, "above 0"),
        ([], ValueError, "above 0"),
        ([[1.0]], ValueError, "vector"),
        ([1.0, -1.0], eq.TaskError, "weight is -1"),
        ([1.0, math.inf], eq.TaskError, "weight is inf"),
        ([1.0, math.nan], eq.TaskError, "weight is nan"),
    ):
        with pytest.raises(error, match=message):
            Fixed(weights)
    with pytest.raises(ValueError, match="3 losses for 2 weights"):
        Fixed([1.0, 2.0])(L)
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with pytest.raises(eq.CombinationError, match=r"Fixed\(n_tasks=2\)"):
        eq.Step(net, dict.fromkeys("abc", F.mse_loss), optimizer, Fixed([1.0, 2.0]))
