"""GradDrop at the feature level: one mask for each feature, from signs summed over the batch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import Counted, all_tasks, class_batch, class_step, linear_model, regression_batch, sgd
from torch import Tensor, nn

import equipoise as eq

TASKS = ("a", "b", "c")


def seeded(leak: float = 0.0, seed: int = 0) -> eq.GradDrop:
    return eq.GradDrop(leak, torch.Generator().manual_seed(seed))


def sent_back(model: eq.SharedTrunk, inputs: Tensor, targets: dict) -> tuple[Tensor, list[Tensor]]:
    """The features, connected to the trunk, and each task's gradient of them."""
    features = model.trunk(inputs)
    found = []
    for task in model.tasks:
        loss = F.mse_loss(model.heads[task](features), targets[task])
        found += torch.autograd.grad(loss, features, retain_graph=True)
    return features, found


def by_the_paper(
    features: Tensor, gradients: list[Tensor], draws: np.ndarray, leak: float
) -> Tensor:
    """Algorithm 1 of Chen et al. (2020), feature by feature, sample by sample."""
    z = features.detach().numpy()
    gs = [g.numpy() for g in gradients]
    result = np.zeros_like(z)
    for f in range(z.shape[1]):
        sums = [sum(np.sign(z[b, f]) * g[b, f] for b in range(len(z))) for g in gs]
        total = sum(abs(s) for s in sums)
        positive = (1 + sum(sums) / total) / 2 if total > 0 else 0.5
        for g, s in zip(gs, sums, strict=True):
            passes = (positive > draws[f] and s > 0) or (positive < draws[f] and s < 0)
            result[:, f] += (leak + (1 - leak) * passes) * g[:, f]
    return torch.from_numpy(result)


@pytest.mark.parametrize("leak", [0.0, 0.4])
@pytest.mark.parametrize("seed", range(5))
def test_equals_the_paper(seed: int, leak: float) -> None:
    model = linear_model(TASKS)
    inputs, targets = regression_batch(TASKS, seed=seed)
    features, gradients = sent_back(model, inputs, targets)
    draws = torch.rand(features.shape[1], generator=torch.Generator().manual_seed(seed)).numpy()
    below = by_the_paper(features, gradients, draws, leak)
    shared = list(model.shared_parameters())
    expected = torch.autograd.grad(features, shared, below)

    step = eq.Step(
        model,
        all_tasks(model, F.mse_loss),
        sgd(model, lr=0.0),
        aggregator=seeded(leak, seed),
        level="features",
    )
    report = step(inputs, targets)
    assert report.coefficients is None
    assert report.gram is not None
    for parameter, gradient in zip(shared, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)


def test_backward_with_features_does_the_same() -> None:
    model = linear_model(TASKS)
    inputs, targets = regression_batch(TASKS)
    step = eq.Step(
        model, all_tasks(model, F.mse_loss), sgd(model, lr=0.0), None, seeded(), level="features"
    )
    step(inputs, targets)
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    features = model.trunk(inputs)
    losses = {t: F.mse_loss(model.heads[t](features), targets[t]) for t in TASKS}
    eq.backward(losses, model.shared_parameters(), seeded(), features)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)


def test_one_trunk_backward_a_step() -> None:
    step = class_step(aggregator=seeded(), tasks=TASKS, level="features")
    step.model.trunk = trunk = Counted(step.model.trunk)
    step(*class_batch(TASKS))
    assert trunk.backwards == 1


def test_a_full_leak_is_the_sum() -> None:
    found = []
    for aggregator, level in ((seeded(leak=1.0), "features"), (eq.Sum(), "parameters")):
        model = linear_model(TASKS)
        losses = all_tasks(model, F.mse_loss)
        step = eq.Step(model, losses, sgd(model, lr=0.0), None, aggregator, level=level)
        step(*regression_batch(TASKS))
        found.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_features_in_several_pieces_and_a_task_that_skips_one() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(5, 4), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"left": self.left(x), "right": self.right(x).view(-1, 3, 1)}

    class Head(nn.Module):
        def __init__(self, sides: tuple[str, ...]) -> None:
            super().__init__()
            self.sides = sides

        def forward(self, features: dict[str, Tensor]) -> Tensor:
            return sum(features[side].square().flatten(1).sum(1) for side in self.sides)

    torch.manual_seed(0)
    heads = {"a": Head(("left", "right")), "b": Head(("left",))}
    model = eq.SharedTrunk(Two(), heads)
    losses = {task: lambda output, target: (output - target).mean() for task in heads}
    step = eq.Step(model, losses, sgd(model), None, seeded(), level="features")
    inputs = torch.randn(6, 5)
    step(inputs, {task: torch.zeros(6) for task in heads})
    # All that asks for anything here asks for smaller features: nothing is dropped.
    plain = eq.SharedTrunk(Two(), heads)
    torch.manual_seed(0)
    plain.trunk.__init__()
    features = plain.trunk(inputs)
    sum(heads[task](features).mean() for task in heads).backward()
    for mine, theirs in zip(model.trunk.parameters(), plain.trunk.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_no_coefficients_and_no_entry_weights_is_refused() -> None:
    with pytest.raises(eq.CombinationError, match="level='features'"):
        class_step(aggregator=lambda rows: rows.sum(0), level="features")


def test_recipe() -> None:
    step = class_step()
    built = eq.Recipe.parse("graddrop-ub(leak=0.2)").build(step.model, step.losses, 1e-3, 10)
    assert built.level == "features"
    assert built.aggregator.leak == 0.2
