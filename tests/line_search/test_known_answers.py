"""Line searches at answers that are known by hand: SPECS F.D, and further ones."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from helpers import differences, parameters_of
from torch import Tensor, nn

import equipoise as eq


class Times(nn.Module):
    """Multiplies by one number."""

    def __init__(self, factor: float, trained: bool = True) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor, dtype=torch.float64), trained)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def half_square(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (output - target).square().mean()


def product_step(
    w: float, v: float, search: eq.LineSearch, trained: bool = True, **options: Any
) -> eq.Step:
    """One task: L = (v w x)^2 / 2."""
    model = eq.SharedTrunk(Times(w), {"t": Times(v, trained)})
    optimizer = torch.optim.SGD(model.parameters(), lr=123.0)
    return eq.Step(model, {"t": half_square}, optimizer, line_search=search, **options)


def at(step: eq.Step, x: float = 1.0) -> eq.StepReport:
    value = torch.tensor([x], dtype=torch.float64)
    return step(value, {task: torch.zeros_like(value) for task in step.model.tasks})


def numbers(step: eq.Step) -> list[float]:
    return [number for p in step.model.parameters() for number in p.detach().reshape(-1).tolist()]


both = pytest.mark.parametrize("search", [eq.Backtracking, eq.FastBacktracking])


# ------------------------------------------------------------------------------------ F.D


@both
def test_one_task(search: type[eq.LineSearch]) -> None:
    # D1: L = 8, h = q = 8. eta = 1: 648 > -4.8; 1/2: 8 > 1.6; 1/4: 0 <= 4.8.
    step = product_step(2, 2, search())
    report = at(step)
    assert (report.step_size, report.trials, report.accepted) == (0.25, 3, True)
    assert report.losses.tolist() == [8]
    assert report.trial_losses.tolist() == [0]
    assert report.slopes.tolist() == [128]
    assert numbers(step) == [0, 0]


@both
def test_the_upper_bound_itself_is_tried(search: type[eq.LineSearch]) -> None:
    report = at(product_step(1, 1, search()))  # D2
    assert (report.step_size, report.trials) == (1, 1)


def test_the_literal_rule_lies() -> None:
    step = product_step(1, 1, eq.FastBacktracking(), trained=False)  # D3
    report = at(step, 10)
    assert (report.step_size, report.trials, report.verified) == (1, 1, None)
    assert numbers(step) == [-99, 1]
    assert report.losses.tolist() == [50]
    assert report.trial_losses.tolist() == [0]  # what it believes
    assert at(step, 10).losses.tolist() == [490_050]  # what is


def test_the_matched_scale_does_not() -> None:
    search = eq.FastBacktracking(latent_scale="matched")
    step = product_step(1, 1, search, trained=False)
    report = at(step, 10)
    assert (report.step_size, report.trials) == (1 / 64, 7)
    assert numbers(step) == [-0.5625, 1]
    assert report.trial_losses.tolist() == [15.8203125]
    assert at(step, 10).losses.tolist() == [15.8203125]


def test_a_step_that_lies_is_found_out() -> None:
    step = product_step(1, 1, eq.FastBacktracking(verify=True), trained=False)
    report = at(step, 10)
    # One latent trial, which does not hold; then those of Backtracking from 1 to 1/64.
    assert (report.step_size, report.trials, report.verified) == (1 / 64, 8, False)
    assert numbers(step) == [-0.5625, 1]
    honest = at(product_step(2, 2, eq.FastBacktracking(verify=True)))
    assert (honest.step_size, honest.trials, honest.verified) == (0.25, 3, True)


def test_the_schedule_of_the_upper_bound() -> None:
    # D5: epochs 0 to 9: 1, 10 to 19: 1/2, 90 to 99: 2^-9; here of 3 steps each.
    search = eq.Backtracking(steps_per_epoch=3)
    bounds = []
    for _ in range(300):
        bounds.append(search.bound)
        search.count(1, search.bound, torch.ones(1))
    for epoch, bound in ((0, 1), (9, 1), (10, 0.5), (19, 0.5), (20, 0.25), (99, 2**-9)):
        assert bounds[3 * epoch : 3 * epoch + 3] == [bound] * 3


def test_the_bound_never_falls_below_the_floor() -> None:
    search = eq.Backtracking(steps_per_epoch=1, floor=1e-2, halve_every=1)
    for _ in range(50):
        search.count(1, search.bound, torch.ones(1))
    assert list(search.sizes()) == [1e-2]


def test_without_epochs_or_halving_the_bound_stays() -> None:
    for search in (eq.Backtracking(), eq.Backtracking(steps_per_epoch=1, halve_every=None)):
        for _ in range(100):
            search.count(1, 1.0, torch.ones(1))
        assert search.bound == 1


@both
@pytest.mark.parametrize("bad", [1.0, 1e-9, math.nan, math.inf, -math.inf])
def test_a_loss_that_never_falls(search: type[eq.LineSearch], bad: float) -> None:
    # D5: 34 trials; 2^-33 is the last size above 1e-10.
    step = product_step(2, 2, search())

    def wall(output: Tensor, target: Tensor) -> Tensor:
        here = output.detach().item() == 4
        return output.sum() - output.sum().detach() + (1.0 if here else 1.0 + bad)

    step.losses["t"] = wall
    before = parameters_of(step.model)
    report = at(step)
    assert (report.step_size, report.trials, report.accepted) == (0, 34, False)
    assert report.trial_losses is None
    assert differences(before, parameters_of(step.model)) == []


@both
def test_other_factors(search: type[eq.LineSearch]) -> None:
    # eta = 0.9, 0.27: L = (2 - 8 eta)^4 / 2 = 0.0003 <= 8 - 0.27 * 0.1 * 128.
    report = at(product_step(2, 2, search(upper=0.9, shrink=0.3)))
    assert (report.step_size, report.trials) == (0.9 * 0.3, 2)
    # beta = 0.4: 0 <= 8 - 0.4 * 0.25 * 128 = -4.8 does not hold; 1/8: (2 - 1)^4 / 2 <= 1.6 does.
    assert at(product_step(2, 2, search(beta=0.4))).step_size == 0.125
    # floor: 1, 1/2, and then nothing.
    report = at(product_step(2, 2, search(floor=0.3)))
    assert (report.trials, report.accepted) == (2, False)


# --------------------------------------------------------------------------- rules, T = 3


class Point(nn.Module):
    """A trunk that is nothing but its parameters."""

    def __init__(self, theta: Sequence[float]) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.theta


class Shift(nn.Module):
    """Features plus one number."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, z: Tensor) -> Tensor:
        return torch.cat([z.reshape(-1), self.bias.reshape(1)])


def bowls_step(
    search: eq.LineSearch,
    bowls: Mapping[str, tuple[float, float, float]],
    aggregator: Any = None,
    x: float = 1.0,
    theta: Sequence[float] = (1.0, 1.0),
) -> tuple[eq.Step, eq.StepReport]:
    """Tasks a theta_1^2 / 2 + b theta_2^2 / 2 + c (phi - 1)^2 / 2, with theta times x for z."""
    model = eq.SharedTrunk(Point(theta), {task: Shift() for task in bowls})

    def loss(a: float, b: float, c: float) -> Any:
        def value(output: Tensor, _: Any) -> Tensor:
            return a * output[0] ** 2 / 2 + b * output[1] ** 2 / 2 + c * (output[2] - 1) ** 2 / 2

        return value

    losses = {task: loss(*bowl) for task, bowl in bowls.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    step = eq.Step(model, losses, optimizer, None, aggregator, line_search=search)
    return step, at(step, x)


THREE = {"a": (1.0, 0.0, 1.0), "b": (0.0, 2.0, 1.0), "c": (1.0, 1.0, 4.0)}
"""Rows (1, 0), (0, 2), (1, 1); heads' gradients -1, -1, -4."""


@both
@pytest.mark.parametrize(
    ("rule", "size"),
    [
        # Mean: d = (2/3, 1), products 2/3, 2, 5/3; |h|^2 = 1, 1, 16. Loss c is 3, with eta = 1
        # 1/18 + 18, with 1/2 it is 2/9 + 1/8 + 2 = 2.347, which is to be at most 3 less 0.05 times
        # 17.67, 16 or 1.67: 2.117, 2.2, 2.917. With 1/4 it is 0.628.
        ("full", 0.25),
        ("head", 0.25),
        ("latent", 0.5),
    ],
)
def test_three_tasks_by_hand(search: type[eq.LineSearch], rule: str, size: float) -> None:
    step, report = bowls_step(search(rule=rule), THREE, eq.Mean())
    promised = {
        "full": [5 / 3, 3, 53 / 3],
        "head": [1, 1, 16],
        "latent": [2 / 3, 2, 5 / 3],
    }[rule]
    assert report.slopes.tolist() == pytest.approx(promised)
    assert report.step_size == size
    assert report.trials == {0.5: 2, 0.25: 3}[size]
    one, two = 1 - 2 * size / 3, 1 - size
    assert numbers(step) == pytest.approx([one, two, size, size, 4 * size])
    losses = [
        one**2 / 2 + (1 - size) ** 2 / 2,
        two**2 + (1 - size) ** 2 / 2,
        (one**2 + two**2) / 2 + 2 * (1 - 4 * size) ** 2,
    ]
    assert report.trial_losses.tolist() == pytest.approx(losses)


@both
def test_the_rules_differ(search: type[eq.LineSearch]) -> None:
    # One task, (3 theta_1^2 + (phi - 1)^2) / 2 at theta_1 = phi + 1 = 1: L = 2, g = 3, |h|^2 = 1.
    # eta = 1: theta -2, phi 1: 6. eta = 1/2: theta -1/2, phi 1/2: 1/2.
    # With beta = 0.49 the terms are 0.49 eta times 10, 1 or 9: 1/2 <= 2 - 2.45 does not hold.
    one = {"a": (3.0, 0.0, 1.0)}
    found = {}
    for rule in ("full", "head", "latent"):
        _, report = bowls_step(search(rule=rule, beta=0.49), one, theta=(1.0, 0.0))
        found[rule] = report.step_size
    # 1/4: theta 1/4, phi 1/4: 3/32 + 9/32 = 3/8 <= 2 - 1.225; latent: 1/2 <= 2 - 2.205 fails.
    assert found == {"full": 0.25, "head": 0.5, "latent": 0.25}


@both
def test_opposite_tasks_search_the_heads_alone(search: type[eq.LineSearch]) -> None:
    # Rows (1, 0) and (-1, 0): MGDA gives 0, and the trunk stays, to the bit.
    bowls = {"a": (1.0, 0.0, 1.0), "b": (-1.0, 0.0, 1.0)}
    step, report = bowls_step(search(), bowls, eq.MGDA(), theta=(1.0, 0.3))
    assert report.direction_norm == 0
    assert (report.step_size, report.accepted) == (1, True)
    assert numbers(step) == [1, 0.3, 1, 1]


# ------------------------------------------------------------------------------- directions


@both
def test_a_direction_upwards_is_replaced(search: type[eq.LineSearch]) -> None:
    # Rows (3, 0) and (-1, 1): their sum (2, 1) has the product -1 with the second.
    bowls = {"a": (3.0, 0.0, 0.0), "b": (-1.0, 1.0, 0.0)}
    _, report = bowls_step(search(), bowls, eq.Sum())
    assert report.fallback
    w = (2 + 3) / (9 + 2 + 6)  # of a: (G_bb - G_ab) / (G_aa + G_bb - 2 G_ab)
    assert report.coefficients.tolist() == pytest.approx([w, 1 - w])
    assert (report.slopes > 0).all()
    _, report = bowls_step(search(), bowls, eq.PCGrad())
    assert not report.fallback  # two tasks


@both
def test_what_needs_no_product_replaces_nothing(search: type[eq.LineSearch]) -> None:
    bowls = {"a": (3.0, 0.0, 1.0), "b": (-1.0, 1.0, 1.0)}
    for options in ({"rule": "head"}, {"objective": "sum"}):
        _, report = bowls_step(search(**options), bowls, eq.Sum())
        assert not report.fallback
        assert report.gram is None  # one backward


@both
def test_one_condition_for_the_sum(search: type[eq.LineSearch]) -> None:
    # L = (theta_1^2 - 3 theta_1 ..): the second loss grows along the sum, and may.
    bowls = {"a": (3.0, 0.0, 0.0), "b": (-1.0, 0.0, 0.0)}
    # Sum: L = theta^2, g = 2: eta 1: theta -1: 1 > 1 - 0.4; 1/2: 0 <= 1 - 0.2.
    step, report = bowls_step(search(objective="sum"), bowls, eq.Sum(), theta=(1.0, 0.0))
    assert report.step_size == 0.5
    assert report.slopes.sum() == 4
    assert numbers(step)[0] == 0
    assert report.trial_losses[1] > report.losses[1]


# --------------------------------------------------------------------------- weighted losses


def test_a_weight_scales_both_sides() -> None:
    # L = 8 counted 3 times: h = g = 24, promised 3 * 384; the trial at eta is 3 (2 - 24 eta)^4 / 2:
    # 1/8: 3 / 2 <= 24 - 0.1 / 8 * 1152 = 9.6; 1/4: 24 * 32 > ..
    model = eq.SharedTrunk(Times(2.0), {"t": Times(2.0)})
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    search = eq.Backtracking()
    step = eq.Step(
        model, {"t": half_square}, optimizer, lambda losses: 3 * losses, line_search=search
    )
    report = at(step)
    assert report.slopes.tolist() == [2 * 24**2]
    assert (report.step_size, report.trials) == (0.125, 4)
    assert numbers(step) == [-1, -1]


# ----------------------------------------------------------------------------- latent scale


def test_the_batch_as_latent_scale() -> None:
    # Two equal samples: L = mean (v z)^2 / 2 = 1/2, q = 1/2 each, h = 1. With s = 2 the features
    # move as those of one sample: eta = 1 gives z = 0, v = 0; and what is promised is 1 + 2 * 1/2.
    step = product_step(1, 1, eq.FastBacktracking(latent_scale="batch"))
    x = torch.ones(2, dtype=torch.float64)
    report = step(x, {"t": torch.zeros(2, dtype=torch.float64)})
    assert report.slopes.tolist() == [2]
    assert report.trial_losses.tolist() == [0]
    literal = product_step(1, 1, eq.FastBacktracking(latent_scale=1))
    report = literal(x, {"t": torch.zeros(2, dtype=torch.float64)})
    assert report.slopes.tolist() == [1.5]


def test_a_number_as_latent_scale() -> None:
    search = eq.FastBacktracking(latent_scale=100.0)
    step = product_step(1, 1, search, trained=False)
    assert at(step, 10).step_size == 1 / 64  # as matched, whose scale is 100 there


# --------------------------------------------------------------------------- adaptive bound


def test_an_upper_bound_that_adapts() -> None:
    search = eq.Backtracking(adapt=True, steps_per_epoch=1)
    seen = []
    for trials, size in ((1, 1.0), (1, 2.0), (2, 2.0), (3, 1.0), (5, 1 / 8), (34, 0.0)):
        assert trials == 34 or size == search.bound * 0.5 ** (trials - 1)
        search.count(trials, size, torch.ones(2))
        seen.append(search.bound)
    # Grows after 1, stays after 2, then one trial above what was accepted; halved if nothing was.
    assert seen == [2, 4, 4, 2, 1 / 4, 1 / 8]
    search.count(1, 1 / 8, torch.zeros(2))  # nothing to learn where nothing is promised
    assert search.bound == 1 / 8
    fresh = eq.Backtracking(adapt=True)
    fresh.load_state_dict(search.state_dict())
    assert fresh.bound == search.bound


def test_the_adapted_bound_is_bounded() -> None:
    search = eq.Backtracking(adapt=True)
    for _ in range(100):
        search.count(1, search.bound, torch.ones(1))
    assert search.bound == 1e10
    for _ in range(200):
        search.count(3, 0.0, torch.ones(1))
    assert search.bound == search.floor
    assert list(search.sizes()) == [search.floor]


# ------------------------------------------------------------------- the optimizer's direction


def test_the_step_of_an_optimizer_is_the_unit() -> None:
    # Adam's first step is lr in each parameter: from (2, 2) by 0.5, to (1.5, 1.5).
    model = eq.SharedTrunk(Times(2.0), {"t": Times(2.0)})
    optimizer = torch.optim.Adam(model.parameters(), lr=0.5, eps=0.0)
    search = eq.Backtracking(direction="optimizer")
    step = eq.Step(model, {"t": half_square}, optimizer, line_search=search)
    report = at(step)
    assert report.slopes.tolist() == pytest.approx([8 * 0.5 + 8 * 0.5])
    assert (report.step_size, report.trials) == (1, 1)
    assert numbers(step) == pytest.approx([1.5, 1.5])
    assert optimizer.state_dict()["state"][0]["step"] == 1


def test_what_a_refused_step_did_to_the_optimizer_is_taken_back() -> None:
    model = eq.SharedTrunk(Times(2.0), {"t": Times(2.0)})
    optimizer = torch.optim.Adam(model.parameters(), lr=4.0)
    search = eq.Backtracking(direction="optimizer", floor=0.9)
    step = eq.Step(model, {"t": half_square}, optimizer, line_search=search)
    before, state = parameters_of(model), optimizer.state_dict()
    report = at(step)  # from (2, 2) to (-2, -2): as high as before
    assert (report.accepted, report.trials) == (False, 1)
    assert differences(before, parameters_of(model)) == []
    assert differences(state, optimizer.state_dict()) == []


def test_a_step_of_the_optimizer_that_leads_upwards() -> None:
    # Momentum from a loss that was turned round since.
    model = eq.SharedTrunk(Times(2.0), {"t": Times(2.0)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    search = eq.Backtracking(direction="optimizer")
    step = eq.Step(model, {"t": half_square}, optimizer, line_search=search)
    assert not at(step).fallback
    step.losses["t"] = lambda output, target: 10 - 0.5 * half_square(output, target)
    report = at(step)
    assert report.fallback
    assert report.accepted
    assert report.trial_losses.item() < report.losses.item()
