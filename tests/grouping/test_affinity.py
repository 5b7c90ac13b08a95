"""Gradient cosines and lookahead affinities beside what they mean."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import equipoise as eq
from equipoise.grouping import GradientAffinity, LookaheadAffinity, affinity_gram, cluster


class Point(nn.Module):
    """A trunk that is one vector, repeated for the batch."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(values))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.theta.expand(len(x), -1)


def quadratic(*centre: float):
    c = torch.tensor(centre)
    return lambda output, target: 0.5 * ((output - c) ** 2).sum(1).mean()


def test_lookahead_by_hand() -> None:
    """theta = (2, 0); L_1 = |theta|^2 / 2 = 2, L_2 = |theta - (1, 0)|^2 / 2 = 1/2,
    L_3 = |theta - (4, 0)|^2 / 2 = 2. g = (2, 0), (1, 0), (-2, 0); lr = 1/2."""
    model = eq.SharedTrunk(Point(2.0, 0.0), {t: nn.Identity() for t in "abc"})
    losses = {"a": quadratic(0, 0), "b": quadratic(1, 0), "c": quadratic(4, 0)}
    affinity = LookaheadAffinity(model, losses, lr=0.5)
    targets = {t: torch.zeros(3) for t in "abc"}
    # Losses after a's step, theta = 1: .5, 0, 4.5; b's, 1.5: 1.125, .125, 3.125; c's, 3: 4.5, 2, .5
    expected = [
        [1 - 0.25, 1.0, 1 - 2.25],
        [1 - 0.5625, 1 - 0.25, 1 - 1.5625],
        [1 - 2.25, 1 - 4.0, 1 - 0.25],
    ]
    found = affinity.update(torch.zeros(3, 1), targets)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert model.trunk.theta.tolist() == [2, 0]
    affinity.update(torch.zeros(3, 1), {t: torch.zeros(3) for t in "ab"})
    torch.testing.assert_close(affinity.matrix(), found)
    assert affinity.count.tolist() == [[2, 2, 1], [2, 2, 1], [1, 1, 1]]


def network() -> eq.SharedTrunk:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
    return eq.SharedTrunk(
        trunk, {t: nn.Sequential(nn.Dropout(0.3), nn.Linear(4, 1)) for t in "abc"}
    )


def batch() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(12, 3, generator=generator)
    return x, {t: torch.randn(12, 1, generator=generator) for t in "abc"}


def test_lookahead_beside_copies_of_the_model_and_leaves_no_trace() -> None:
    model = network()
    x, targets = batch()
    losses = dict.fromkeys("abc", F.mse_loss)
    state, random = deepcopy(model.state_dict()), torch.get_rng_state()
    found = LookaheadAffinity(model, losses, lr=0.3).update(x, targets)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())

    def loss_of(net, task):  # draws trunk and heads in the order of a step
        torch.set_rng_state(random)
        outputs = net(x)
        return F.mse_loss(outputs[task], targets[task])

    for i in "abc":
        moved = deepcopy(model)
        gradients = torch.autograd.grad(loss_of(moved, i), list(moved.trunk.parameters()))
        with torch.no_grad():
            for p, g in zip(moved.trunk.parameters(), gradients, strict=True):
                p -= 0.3 * g
        for j in "abc":
            before = float(loss_of(deepcopy(model), j).detach())
            after = float(loss_of(deepcopy(moved), j).detach())
            z = float(found["abc".index(i), "abc".index(j)])
            assert z == pytest.approx(1 - after / before, abs=1e-5)


def test_lookahead_errors_change_nothing() -> None:
    model = network()
    x, targets = batch()
    losses = dict.fromkeys("abc", F.mse_loss)
    state = deepcopy(model.state_dict())
    for lr in (0.0, -1.0):
        with pytest.raises(ValueError, match="lr is"):
            LookaheadAffinity(model, losses, lr)
    with pytest.raises(eq.TaskError, match="'c': has a head but no loss"):
        LookaheadAffinity(model, dict.fromkeys("ab", F.mse_loss), 0.1)
    affinity = LookaheadAffinity(model, losses, 1e30)
    with pytest.raises(eq.NonFiniteError, match="lookahead with lr=1e"):
        affinity.update(x, targets)
    with pytest.raises(eq.TaskError, match="no such task"):
        affinity.update(x, {"d": x})
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert not affinity.count.any()
    with pytest.raises(eq.EquipoiseError, match="'a' and 'a' have never been measured"):
        affinity.matrix()


def test_a_loss_of_zero_counts_for_no_pair() -> None:
    model = eq.SharedTrunk(Point(1.0), {t: nn.Identity() for t in "ab"})
    affinity = LookaheadAffinity(model, {"a": quadratic(0), "b": quadratic(1)}, 0.1)
    affinity.update(torch.zeros(1, 1), {t: torch.zeros(1) for t in "ab"})
    assert affinity.count.tolist() == [[1, 0], [1, 0]]


def test_cosines_of_the_steps() -> None:
    model = network()
    x, targets = batch()
    losses = dict.fromkeys("abc", F.mse_loss)
    step = eq.Recipe.parse("si+pcgrad").build(model, losses, 0.01, 1)
    affinity = GradientAffinity(model.tasks)
    cosines = []
    for given in (targets, targets, {t: targets[t] for t in "ab"}):
        report = step(x, given)
        affinity.update(report)
        cosines.append(report.cosines)
    found = affinity.matrix()
    torch.testing.assert_close(found[:2, :2], torch.stack(cosines)[:, :2, :2].mean(0))
    torch.testing.assert_close(found[2], torch.stack(cosines)[:2, 2].mean(0))
    again = GradientAffinity(model.tasks)
    again.load_state_dict(affinity.state_dict())
    assert torch.equal(again.matrix(), found)
    assert cluster(affinity_gram(found), 2).shape == (3, 2)


def test_cosines_need_gradients() -> None:
    model = network()
    x, targets = batch()
    step = eq.Recipe.parse("ew").build(model, dict.fromkeys("abc", F.mse_loss), 0.01, 1)
    affinity = GradientAffinity(model.tasks)
    with pytest.raises(eq.EquipoiseError, match="use a gradient recipe"):
        affinity.update(step(x, targets))
    with pytest.raises(eq.EquipoiseError, match="of tasks"):
        GradientAffinity(("a", "b")).update(step(x, targets))
