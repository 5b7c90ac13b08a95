"""Weightings that learn from the step: what Step shows them, when, and at what price."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import equipoise as eq

TASKS = ("a", "b", "c")
LOSSES = dict.fromkeys(TASKS, F.mse_loss)


def network(*layers: nn.Module, seed: int = 0) -> eq.SharedTrunk:
    torch.manual_seed(seed)
    trunk = nn.Sequential(nn.Linear(4, 8), *layers, nn.Tanh())
    return eq.SharedTrunk(trunk, {task: nn.Linear(8, 1) for task in TASKS}).double()


def batch(seed: int = 0, tasks: tuple[str, ...] = TASKS) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(16, 4, generator=generator, dtype=torch.float64)
    targets = {
        task: (k + 1) * torch.randn(16, 1, generator=generator, dtype=torch.float64)
        for k, task in enumerate(TASKS)
    }
    return inputs, {task: targets[task] for task in tasks}


def step(model: eq.SharedTrunk, weighting: Any, aggregator: Any = None, **options: Any) -> eq.Step:
    optimizer = torch.optim.SGD(model.parameters(), lr=options.pop("lr", 0.05))
    losses = options.pop("losses", LOSSES)
    return eq.Step(model, losses, optimizer, weighting, aggregator, **options)


class Watcher(eq.Weighting):
    """Equal weights; keeps what it is shown."""

    def __init__(self, gram: bool = False, after: bool = False) -> None:
        super().__init__()
        self.needs_gram, self.needs_losses_after = gram, after
        self.seen: list[tuple[Tensor, ...]] = []

    def weigh(self, losses: Tensor, present: Tensor) -> Tensor:
        return 2 * torch.ones_like(losses)

    def learn(self, *shown: Any) -> None:
        self.seen.append(shown)


def losses_of(model: eq.SharedTrunk, inputs: Tensor, targets: dict[str, Tensor]) -> list[float]:
    with torch.no_grad():
        outputs = model(inputs)
    return [F.mse_loss(outputs[task], targets[task]).item() for task in targets]


# --------------------------------------------------------------------- the losses after the update


def test_the_losses_after_are_those_of_the_new_parameters() -> None:
    model, watcher = network(), Watcher(after=True)
    inputs, targets = batch()
    before = losses_of(model, inputs, targets)
    step(model, watcher)(inputs, targets)
    ((losses, present, gram, after),) = watcher.seen
    assert losses.tolist() == pytest.approx(before, rel=1e-12)
    assert after.tolist() == pytest.approx(losses_of(model, inputs, targets), rel=1e-12)
    assert present.tolist() == [True] * 3
    assert gram is None, "no rows are formed for it"
    assert (after < losses).all()


def test_dropout_repeats_its_masks_and_nothing_else_moves() -> None:
    # With a learning rate of 0 the second look must give the first losses to the last bit.
    inputs, targets = batch()
    plain, watched = (network(nn.BatchNorm1d(8), nn.Dropout(0.5)) for _ in range(2))
    watcher = Watcher(after=True)
    torch.manual_seed(7)
    step(plain, Watcher(), lr=0.0)(inputs, targets)
    state = torch.get_rng_state()
    torch.manual_seed(7)
    step(watched, watcher, lr=0.0)(inputs, targets)
    losses, _, _, after = watcher.seen[0]
    assert torch.equal(losses, after)
    assert torch.equal(torch.get_rng_state(), state)
    for ours, theirs in zip(watched.buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    assert watched.trunk[1].num_batches_tracked == 1


@pytest.mark.parametrize(("weighting", "forwards"), [(eq.EW, 1), (eq.FAMO, 2), (eq.GradNorm, 1)])
def test_forward_passes(weighting: type, forwards: int) -> None:
    model, calls = network(), []
    model.trunk.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    step(model, weighting())(*batch())
    assert calls == [True, False][:forwards]


def test_losses_that_explode_are_nothing_to_learn_from() -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(output, target) if torch.is_grad_enabled() else output.sum() * torch.inf

    watcher = Watcher(after=True)
    report = step(network(), watcher, losses={**LOSSES, "b": loss})(*batch())
    assert report.accepted
    assert watcher.seen[0][3].isnan().all()
    famo = eq.FAMO()
    step(network(), famo, losses={**LOSSES, "b": loss})(*batch())
    assert famo.logits.tolist() == [0, 0, 0]


def test_an_absent_task_is_shown_as_absent() -> None:
    watcher = Watcher(gram=True, after=True)
    step(network(), watcher)(*batch(tasks=("a", "c")))
    losses, present, gram, after = watcher.seen[0]
    assert present.tolist() == [True, False, True]
    assert losses.isnan().tolist() == after.isnan().tolist() == [False, True, False]
    assert gram.shape == (3, 3)
    assert (gram[1] == 0).all()


def test_famo_in_a_step_is_famo_by_hand() -> None:
    model, other = network(), network()
    famo, by_hand = eq.FAMO(lr=0.3), eq.FAMO(lr=0.3)
    stepped = step(model, famo)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.05)
    for seed in range(5):
        inputs, targets = batch(seed)
        stepped(inputs, targets)
        outputs = other(inputs)
        losses = torch.stack([F.mse_loss(outputs[task], targets[task]) for task in TASKS])
        optimizer.zero_grad()
        by_hand(losses).sum().backward()
        optimizer.step()
        after = torch.tensor(losses_of(other, inputs, targets), dtype=torch.float64)
        by_hand.observe(losses.detach(), torch.ones(3, dtype=torch.bool), after=after)
    np.testing.assert_allclose(famo.logits, by_hand.logits, rtol=1e-9)
    assert np.ptp(famo.logits.numpy()) > 0.1
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------------- the inner products


def test_the_gram_matrix_is_that_of_the_weighted_losses() -> None:
    model, watcher = network(), Watcher(gram=True)
    inputs, targets = batch()
    outputs = model(inputs)
    rows = torch.stack(
        [
            torch.cat(
                [
                    2 * g.reshape(-1)
                    for g in torch.autograd.grad(
                        F.mse_loss(outputs[task], targets[task]),
                        list(model.trunk.parameters()),
                        retain_graph=True,
                    )
                ]
            )
            for task in TASKS
        ]
    )
    report = step(model, watcher)(inputs, targets)
    _, _, gram, after = watcher.seen[0]
    np.testing.assert_allclose(gram, rows @ rows.T, rtol=1e-10)
    assert torch.equal(gram, report.gram)
    assert report.coefficients.tolist() == [1, 1, 1]
    assert after is None


@pytest.mark.parametrize("aggregator", [eq.Sum, eq.Mean])
def test_forming_rows_changes_nothing_else(aggregator: type) -> None:
    models = network(), network()
    for model, gram in zip(models, (False, True), strict=True):
        step(model, Watcher(gram=gram), aggregator())(*batch())
    for plain, watched in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(plain, watched, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("aggregator", [eq.Sum(), eq.MGDA()])
def test_at_the_feature_level_it_is_the_features(aggregator: Any) -> None:
    model, watcher, calls = network(), Watcher(gram=True), []
    model.trunk[1].register_full_backward_hook(lambda *_: calls.append(1))
    report = step(model, watcher, aggregator, level="features")(*batch())
    assert torch.equal(watcher.seen[0][2], report.gram)
    assert calls == [1], "one backward through the trunk"


def test_gradnorm_brings_the_norms_together() -> None:
    def spread(report: eq.StepReport) -> float:
        norms = report.gram.diagonal().sqrt()
        return (norms.max() / norms.min()).item()

    model = network()
    stepped = step(model, eq.GradNorm(alpha=0.0, lr=0.05), lr=0.0)
    reports = [stepped(*batch()) for _ in range(60)]
    assert spread(reports[0]) > 1.5
    assert spread(reports[-1]) < 1.2
    assert reports[-1].weights.sum().item() == pytest.approx(3)


def test_separate_trunks_have_no_inner_products() -> None:
    with pytest.raises(eq.CombinationError, match="GradNorm"):
        step(network().separated(), eq.GradNorm())


# -------------------------------------------------------------------------------------- in all


def test_a_callable_of_ones_own_is_shown_nothing() -> None:
    assert step(network(), lambda losses: 2 * losses)(*batch()).accepted


@pytest.mark.parametrize("make", [eq.FAMO, eq.GradNorm, eq.GLS, lambda: eq.IMTLL(3)])
def test_a_step_that_raises_leaves_the_weighting_as_it_was(make: Any) -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(output, target) * (torch.nan if target[0, 0] == 99 else 1.0)

    stepped = step(network(), make(), losses={**LOSSES, "b": loss})
    for seed in range(3):
        stepped(*batch(seed))
    before = stepped.state_dict()
    inputs, targets = batch()
    targets["b"] = targets["b"].clone()
    targets["b"][0] = 99
    with pytest.raises(eq.TaskError, match="'b'"):
        stepped(inputs, targets)
    after = stepped.state_dict()["weighting"]
    assert all(torch.equal(after[key], value) for key, value in before["weighting"].items())


@pytest.mark.parametrize("make", [eq.FAMO, eq.GradNorm, eq.GLS, lambda: eq.IMTLL(3)])
def test_a_negative_loss_is_called_by_its_task(make: Any) -> None:
    losses = {**LOSSES, "b": lambda output, target: -F.mse_loss(output, target)}
    with pytest.raises(eq.TaskError, match="task 'b'.*positive losses"):
        step(network(), make(), losses=losses)(*batch())
    with pytest.raises(eq.TaskError, match="task 'b'.*positive losses"):
        step(network(), make(), losses=losses)(*batch(tasks=("b", "c")))
