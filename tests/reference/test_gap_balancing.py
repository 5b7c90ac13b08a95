"""The slow gap balancing itself, at answers known by hand."""

import math

import numpy as np
import pytest
import torch
from reference import gap_balancing as slow
from reference.weighting import IGBv1
from torch import nn

BASE, NOW = (0.5, 0.3, 0.4), (0.6, 0.3, 0.2)


def test_the_specification_s_weights() -> None:
    history = [[[9.0, 9.0, 9.0]], [BASE], [NOW]]  # B1
    table = slow.igbv1_weights(history)
    assert table[0] == table[1] == [[1.0, 1.0, 1.0]]
    assert table[2][0] == pytest.approx([1.29571943, 1.06084534, 0.64343523], abs=1e-8)
    assert slow.igb_objective(table[2][0], NOW) == pytest.approx(-2.97468468, abs=1e-8)
    factors = slow.gradient_factors(table[2][0], NOW)
    assert factors == pytest.approx([2.15953238, 3.53615115, 3.21717613], abs=1e-8)
    assert slow.gradient_factors(table[2][0], NOW, cap=3.0)[1:] == [3.0, 3.0]


def test_the_whole_history_agrees_with_the_step_by_step_reference() -> None:
    rng = np.random.default_rng(0)
    history = rng.uniform(0.1, 3, size=(5, 4, 3)).tolist()
    one_by_one = IGBv1(steps_per_epoch=4)
    for epoch, weights in zip(history, slow.igbv1_weights(history), strict=True):
        for losses, expected in zip(epoch, weights, strict=True):
            assert one_by_one.call(losses)[0] == pytest.approx(expected, rel=1e-12)


def test_absent_tasks_and_solved_ones() -> None:
    history = [[[1.0, 1.0, 1.0]], [[0.5, None, 0.0], [1.5, None, 0.0]], [[1.0, 7.0, 5.0]]]
    weights = slow.igbv1_weights(history)[2][0]
    powers = [math.e, math.e, 1.0]  # ratios 1, unknown 1, solved 0
    assert weights == pytest.approx([3 * p / sum(powers) for p in powers])
    history[2] = [[1.0, None, None]]
    assert slow.igbv1_weights(history)[2][0] == [1.0, 0.0, 0.0]
    assert slow.gradient_factors([1.0, 1.0, 1.0], [0.0, None, 2.0]) == [0.0, 0.0, 0.5]


def test_reward() -> None:
    assert slow.reward((1, 2), (0.8, 1.9), (1, 2), 1e-4, 5e-5) == pytest.approx(0.1)  # B2
    assert slow.reward((1, 2), (0.8, 1.9), (1, 2), 1e-4, 5e-5, "mean") == pytest.approx(0.25)
    assert slow.reward((1, 2), (0.8, 1.9), (1, 2), 1e-4, 5e-5, use_lr=False) == pytest.approx(0.05)


def test_effort() -> None:
    sizes = (0, 2500, 5000, 9999, 10_000)  # B4
    assert [slow.sac_effort(n, 10_000) for n in sizes] == [
        (25, 128), (31, 160), (37, 192), (49, 255), (50, 256),
    ]  # fmt: skip


def test_density() -> None:
    ones, zeros = (1.0, 1.0), (0.0, 0.0)  # B3
    assert slow.simplex_log_density((0, 0), zeros, ones) == pytest.approx(-0.57236494, abs=1e-8)
    for u in ((1.0, -1.0), (2.0, 0.0)):
        assert slow.simplex_log_density(u, zeros, ones) == pytest.approx(-0.70480328, abs=1e-8)
    grid = np.linspace(1e-6, 2 - 1e-6, 200_001)
    density = [
        math.exp(slow.simplex_log_density((math.log(a / (2 - a)), 0), zeros, ones))
        for a in grid[::20]
    ]
    assert np.trapezoid(density, grid[::20]) == pytest.approx(1, abs=1e-5)


def test_schedule_by_hand() -> None:
    """Epochs of 40 batches: base after 80, learning from 120 at multiples of 50, use from 200."""
    table = slow.igbv2_events(301, 40, buffer_size=100)
    assert all(e.stored is None and e.size == 0 for e in table[:80])
    assert table[80].stored == (79, 80) and table[80].size == 1
    assert [e.batch for e in table if e.gradient_steps] == [150, 200, 250, 300]
    assert table[150].size == 71 and table[180].size == 100 == table[300].size
    assert (table[150].gradient_steps, table[150].batch_size) == (42, 218)
    assert [(e.gradient_steps, e.batch_size) for e in table if e.batch in (200, 300)] == [
        (50, 256)
    ] * 2
    assert {e.weights for e in table[:200]} == {"random"}
    assert {e.weights for e in table[200:]} == {"policy"}


def test_schedule_of_short_epochs() -> None:
    """Two batches an epoch: nothing is learned before batch 50, the policy is used untrained."""
    table = slow.igbv2_events(60, 2)
    assert table[4].stored == (3, 4)
    assert [e.batch for e in table if e.gradient_steps] == [50]
    assert table[10].weights == "policy" and table[9].weights == "random"


def test_weights_reach_the_heads_only_if_asked() -> None:
    torch.manual_seed(0)
    trunk, heads = nn.Linear(3, 4), {t: nn.Linear(4, 1) for t in "ab"}
    x, y = torch.randn(5, 3), {t: torch.randn(5, 1) for t in "ab"}
    losses = dict.fromkeys("ab", nn.functional.mse_loss)

    def given(rows: np.ndarray) -> np.ndarray:
        assert rows.shape == (2, 16)
        return np.array([2.0, 0.5])

    arguments = (trunk, heads, losses, x, y, [3.0, 4.0], given)
    shared, own = slow.step_gradients(*arguments)
    shared_all, own_all = slow.step_gradients(*arguments, on_all=True)
    plain_trunk, plain = slow.step_gradients(*arguments[:5], [1.0, 1.0], lambda r: np.ones(2))
    for a, b in zip(shared, shared_all, strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(own["a"][0], 3 * plain["a"][0])
    torch.testing.assert_close(own_all["a"][0], 6 * plain["a"][0])
    torch.testing.assert_close(own_all["b"][1], 2 * plain["b"][1])
    loss = sum(losses[t](heads[t](trunk(x)), y[t]) for t in "ab")
    torch.testing.assert_close(
        plain_trunk, list(torch.autograd.grad(loss, list(trunk.parameters())))
    )
