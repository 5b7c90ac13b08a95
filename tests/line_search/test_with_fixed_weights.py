"""Line searches inside specialists: fixed weights multiply both sides of the rule."""

import pytest
import torch
import torch.nn.functional as F
from helpers import all_tasks, linear_model, regression_batch, sgd
from reference import line_search as slow

import equipoise as eq

TASKS = ("a", "b", "c")


@pytest.mark.parametrize("fast", [False, True])
def test_fixed_weights_are_those_of_the_weighted_losses(fast: bool) -> None:
    """Specialists with a line search inside; a task of weight 0 takes no part."""
    w = {"a": 0.5, "b": 0.0, "c": 4.0}
    model, plain = linear_model(TASKS), linear_model(TASKS)
    inputs, targets = regression_batch(TASKS)
    inputs = 5 * inputs
    search = eq.FastBacktracking(upper=16.0) if fast else eq.Backtracking(upper=16.0)
    step = eq.Step(
        model,
        all_tasks(model, F.mse_loss),
        sgd(model, 1.0),
        eq.Fixed(list(w.values())),
        eq.MGDA(),
        line_search=search,
        level="features" if fast else "parameters",
    )
    losses = {t: lambda o, y, t=t: w[t] * F.mse_loss(o, y) for t in ("a", "c")}
    present = {t: targets[t] for t in losses}
    at = slow.Problem(plain.trunk, dict(plain.heads), losses, inputs, present)
    found = (slow.fast_backtracking if fast else slow.backtracking)(at, slow.min_norm, upper=16.0)
    report = step(inputs, targets)
    assert (report.step_size, report.trials) == (found.step_size, found.trials)
    for p, q in zip(model.trunk.parameters(), found.trunk.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)
    for p, q in zip(model.heads["b"].parameters(), plain.heads["b"].parameters(), strict=True):
        assert torch.equal(p, q)
