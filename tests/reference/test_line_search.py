"""The slow line searches themselves, at answers known by hand."""

import math

import numpy as np
import pytest
import torch
from reference import line_search as slow
from torch import nn


class Times(nn.Module):
    """Multiply by one number."""

    def __init__(self, factor: float, frozen: bool = False) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor, dtype=torch.float64), not frozen)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


def half_square(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return 0.5 * ((output - target) ** 2).mean()


def problem(w: float, heads: dict[str, nn.Module], x: float = 1.0, losses=None, target=0.0):
    inputs = torch.tensor([x], dtype=torch.float64)
    targets = {task: torch.tensor([target], dtype=torch.float64) for task in heads}
    losses = losses or dict.fromkeys(heads, half_square)
    return slow.Problem(Times(w), heads, losses, inputs, targets)


@pytest.mark.parametrize("search", [slow.backtracking, slow.fast_backtracking])
def test_one_task_of_the_specification(search) -> None:
    found = search(problem(2.0, {"t": Times(2.0)}), slow.min_norm)  # D1
    assert (found.step_size, found.trials, found.accepted) == (0.25, 3, True)
    assert found.trunk.factor.item() == 0 and found.heads["t"].factor.item() == 0


@pytest.mark.parametrize("search", [slow.backtracking, slow.fast_backtracking])
def test_the_upper_bound_itself_is_tried(search) -> None:
    found = search(problem(1.0, {"t": Times(1.0)}), slow.min_norm)  # D2
    assert (found.step_size, found.trials) == (1.0, 1)


def test_the_literal_rule_lies_and_the_matched_scale_does_not() -> None:
    fixed = {"t": Times(1.0, frozen=True)}  # D3
    literal = slow.fast_backtracking(problem(1.0, fixed, x=10.0), slow.min_norm)
    assert literal.step_size == 1 and literal.trunk.factor.item() == -99
    assert slow.measured(problem(1.0, fixed, x=10.0), "t", literal.trunk, fixed["t"]) == 490_050
    at = problem(1.0, fixed, x=10.0)
    matched = slow.fast_backtracking(at, slow.min_norm, latent_scale="matched")
    assert matched.step_size == 1 / 64 and matched.trunk.factor.item() == -0.5625
    assert slow.measured(at, "t", matched.trunk, fixed["t"]) == 15.8203125


def test_a_step_that_lies_is_found_out() -> None:
    fixed = {"t": Times(1.0, frozen=True)}
    found = slow.fast_backtracking(problem(1.0, fixed, x=10.0), slow.min_norm, verify=True)
    assert found.fell_back and found.step_size == 1 / 64 and found.trials == 1 + 7
    honest = slow.fast_backtracking(problem(2.0, {"t": Times(2.0)}), slow.min_norm, verify=True)
    assert not honest.fell_back and honest.step_size == 0.25


@pytest.mark.parametrize("search", [slow.backtracking, slow.fast_backtracking])
@pytest.mark.parametrize("bad", [1.0, math.nan, math.inf])
def test_never_accepting(search, bad: float) -> None:
    """The loss is 1 where the search starts, and no less, or no number at all, elsewhere."""
    at = problem(2.0, {"t": Times(2.0)})
    first = (torch.tensor(2.0).double() * 2).item()

    def wall(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        value = output.sum()
        return value - value.detach() + (1.0 if value.item() == first else 1.0 + bad)

    at.losses = {"t": wall}
    found = search(at, slow.min_norm)
    assert (found.step_size, found.trials, found.accepted) == (0.0, 34, False)
    assert found.trunk.factor.item() == 2 and found.heads["t"].factor.item() == 2


def test_a_smaller_floor_and_another_factor() -> None:
    assert slow.sizes(1.0, 0.5, 1e-10)[-1] == 2.0**-33
    assert slow.sizes(1.0, 0.1, 0.01) == pytest.approx([1, 0.1, 0.01])
    assert slow.sizes(1e-11, 0.5, 1e-10) == []


def test_the_bound_is_halved_every_ten_epochs() -> None:
    assert [slow.upper_at(e) for e in (0, 9, 10, 19, 20, 90, 99)] == [
        1, 1, 0.5, 0.5, 0.25, 2.0**-9, 2.0**-9,
    ]  # fmt: skip


def test_three_tasks_and_each_rule_by_hand() -> None:
    """z = 1, heads 1, 2, 3: L = v^2/2, q = v^2, h = v; mean-norm in one dimension is q_1 = 1.

    At eta the losses are (v(1 - eta))^2 (1 - eta)^2 / 2 and have to fall by eta beta times
    v^2 + v^2 (full), v^2 (head), v^2 (latent). (1 - eta)^4 <= 1 - 4 eta beta or 1 - 2 eta beta.
    """
    heads = {name: Times(float(v)) for name, v in zip("abc", (1, 2, 3), strict=True)}
    for rule, beta, expected in (
        ("full", 0.1, 1.0),
        ("full", 0.3, 0.5),  # 1: 0 <= -0.2 no; 1/2: 1/16 <= 0.4
        ("full", 0.45, 0.5),  # 1/2: 1/16 <= 0.1
        ("full", 0.49, 0.25),  # 1/2: 0.0625 > 0.02; 1/4: 0.316 <= 0.51
        ("head", 0.49, 1.0),  # 0 <= 0.02
        ("latent", 0.49, 1.0),
    ):
        found = slow.fast_backtracking(problem(1.0, heads), slow.min_norm, beta=beta, rule=rule)
        assert found.step_size == expected, (rule, beta)
        assert found.heads["c"].factor.item() == pytest.approx(3 * (1 - expected))


def test_a_direction_that_lets_a_loss_grow_is_replaced() -> None:
    """Losses z and z^2 / 2 at z = -1: the slope of the first alone lets the second grow."""
    heads = {"up": Times(1.0), "down": Times(1.0)}
    losses = {"up": lambda output, target: output.sum(), "down": half_square}
    at = problem(-1.0, heads, losses=losses)  # q = 1 and -1
    found = slow.fast_backtracking(at, lambda rows: rows[0])
    assert found.replaced
    assert found.trunk.factor.item() == -1, "opposite slopes: the trunk stays, the heads move"
    assert found.accepted and found.heads["down"].factor.item() != 1
    kept = slow.fast_backtracking(problem(1.0, heads), lambda rows: rows.sum(0))
    assert not kept.replaced


def test_masks_of_a_trial_are_those_of_the_first_look_and_buffers_stay() -> None:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)).double()
    heads = {t: nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 1)).double() for t in "ab"}
    x = torch.randn(12, 4).double()
    targets = {t: torch.randn(12, 1).double() for t in "ab"}
    at = slow.Problem(trunk, heads, dict.fromkeys("ab", half_square), x, targets)
    seen = at.look()
    for task in "ab":
        assert slow.measured(at, task, trunk, heads[task]) == seen["L"][task]
        z = at.features(trunk.train())
        assert seen["q"][task].size == z.numel()
    found = slow.fast_backtracking(at, slow.min_norm, latent_scale="batch")
    assert found.accepted and np.isfinite(found.step_size)
    # g_t = J^T q_t, by two ways
    for task in "ab":
        through = at.through_trunk(seen["q"][task])
        np.testing.assert_allclose(through, seen["g"][task], rtol=1e-9, atol=1e-12)
