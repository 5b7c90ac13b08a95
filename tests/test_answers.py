"""Another answer to one of the four questions, given to a Step that is there already."""

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    all_tasks,
    differences,
    largest_difference,
    linear_model,
    parameters_of,
    regression_batch,
    regression_step,
    sgd,
    snapshot,
)

import equipoise as eq


def test_it_counts_from_the_next_step_on() -> None:
    changed, fresh = regression_step(momentum=0), regression_step(eq.SI(), eq.MGDA(), momentum=0)
    changed.weighting, changed.aggregator = eq.SI(), eq.MGDA()
    changed.sharpness = eq.TaskSharpness(rho=0.1)
    fresh.sharpness = changed.sharpness
    reports = [step(*regression_batch()) for step in (changed, fresh)]
    assert differences(*reports) == []
    assert reports[0].flat_gram is not None
    assert largest_difference(parameters_of(changed.model), parameters_of(fresh.model)) == 0


def test_it_is_checked_as_at_the_beginning_and_refused_without_a_trace() -> None:
    step = regression_step(eq.IGBv1(2), eq.PCGrad(), sharpness=eq.TaskSharpness())
    aggregator = step.aggregator
    with pytest.raises(eq.CombinationError, match="TaskSharpness and NashMTL of degree 0"):
        step.aggregator = eq.NashMTL()
    with pytest.raises(eq.CombinationError, match="FastBacktracking and TaskSharpness"):
        step.line_search = eq.FastBacktracking()
    with pytest.raises(eq.CombinationError, match=r"UW\(n_tasks=3\) and a model with 2 tasks"):
        step.weighting = eq.UW(3)
    with pytest.raises(eq.TaskError, match="task 'left': has a head but no loss"):
        step.losses = {"right": F.mse_loss}
    assert step.aggregator is aggregator and isinstance(step.weighting, eq.IGBv1)
    assert step.line_search is None and set(step.losses) == {"left", "right"}
    assert step(*regression_batch()).accepted


def test_learned_weights_come_later() -> None:
    step = regression_step()
    step.weighting = eq.UW(2)
    step(*regression_batch())
    assert bool((step.weighting.log_variances != 0).any())


def test_the_level_follows_the_line_search_unless_it_was_said() -> None:
    model = linear_model()
    step = eq.Step(model, all_tasks(model, F.mse_loss), sgd(model), None, eq.MGDA())
    assert step.level == "parameters"
    step.line_search = eq.FastBacktracking()
    assert step.level == "features"
    assert step(*regression_batch()).step_size is not None
    step.line_search = None
    assert step.level == "parameters"


def test_a_saved_state_knows_the_new_stage() -> None:
    step = regression_step(eq.IGBv1(2))
    step(*regression_batch())
    step.weighting = eq.DWA(2)
    assert step.state_dict()["stages"]["weighting"] == "DWA"
    before = snapshot(step)
    step.load_state_dict(step.state_dict())
    assert differences(before, snapshot(step)) == []
    assert torch.isfinite(step(*regression_batch()).losses).all()
