"""Fixed weights on top of a weighting that hears the learning rate and guards its own state."""

import pytest
import torch
from helpers import differences, regression_batch, regression_step

import equipoise as eq

TASKS = ("a", "b")
SMALL = {"width": 8, "gradient_steps": 4, "batch_size": 6, "update_every": 3, "buffer_size": 20}


def learner() -> eq.IGBv2:
    return eq.IGBv2(2, 2, torch.Generator().manual_seed(3), **SMALL)


def rewards(step: eq.Step, inside: eq.IGBv2) -> list[float]:
    """Train with a falling learning rate; give the rewards that were kept."""
    for k in range(12):
        step.optimizer.param_groups[0]["lr"] = 0.01 * 0.5 ** (k // 4)
        step(*regression_batch(TASKS, seed=k))
    return inside._agent.buffer.rewards[: inside._agent.buffer.size(), 0].tolist()


def test_the_reward_knows_the_learning_rate() -> None:
    """Weights of one change nothing, so the rewards are those of IGBv2 alone."""
    alone, inside = learner(), learner()
    expected = rewards(regression_step(alone, tasks=TASKS), alone)
    found = rewards(regression_step(eq.Fixed([1.0, 1.0], inside), tasks=TASKS), inside)
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_failed_step_leaves_the_learner_as_it_was() -> None:
    inside = learner()
    step = regression_step(eq.Fixed([1.0, 2.0], inside), eq.MGDA(), tasks=TASKS)
    for k in range(9):
        step(*regression_batch(TASKS, seed=k))
    before = step.state_dict()
    right = step.losses["b"]
    step.losses["b"] = lambda output, target: (output - output.detach()).abs().sqrt().sum() + 1
    with pytest.raises(eq.EquipoiseError):
        step(*regression_batch(TASKS, seed=9))
    assert not differences(before, step.state_dict())
    step.losses["b"] = right
    step(*regression_batch(TASKS, seed=9))
