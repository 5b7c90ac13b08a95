"""A line search whose heads follow the aggregator's coefficients: the rule counts that step."""

import pytest
import torch.nn.functional as F
from helpers import all_tasks, linear_model, regression_batch, sgd
from reference import line_search as slow

import equipoise as eq

TASKS = ("a", "b", "c")


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("aggregator", [eq.MGDA, eq.CAGrad, eq.Sum])
def test_the_condition_holds_for_the_step_that_is_made(aggregator, fast: bool) -> None:
    """L_new <= L - beta (<h, phi - phi_new> + <g, theta - theta_new>) of every task, anew."""
    made = 0
    for seed in range(3):
        model = linear_model(TASKS, seed=seed)
        search = (
            eq.FastBacktracking(upper=32.0, verify=True) if fast else eq.Backtracking(upper=32.0)
        )
        step = eq.Step(
            model,
            all_tasks(model, F.mse_loss),
            sgd(model, 1.0),
            None,
            aggregator(),
            line_search=search,
            level="features" if fast else "parameters",
            heads="weighted",
        )
        start = linear_model(TASKS, seed=seed)
        inputs, targets = regression_batch(TASKS, seed=seed)
        at = slow.Problem(start.trunk, dict(start.heads), step.losses, inputs, targets)
        seen = at.look()
        report = step(inputs, targets)
        made += report.accepted
        trunk = slow.vector(start.trunk.parameters()) - slow.vector(model.trunk.parameters())
        for i, task in enumerate(TASKS):
            own = slow.vector(start.heads[task].parameters())
            shift = own - slow.vector(model.heads[task].parameters())
            w = float(report.coefficients[i])
            assert shift == pytest.approx(report.step_size * w * seen["h"][task], abs=1e-9)
            fall = seen["h"][task] @ shift + seen["g"][task] @ trunk
            new = slow.measured(at, task, model.trunk, model.heads[task])
            assert new <= seen["L"][task] - 0.1 * fall + 1e-9, task
    assert made
