"""How often a step calls its closure, and that every call but the first leaves no trace."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import differences
from torch import Tensor, nn

import equipoise as eq

COUNTS = (2, 3, 5)
PERTURB: dict[str, Callable[[int], int]] = {
    "separate": lambda n: n + 2,  # the clean look, each task's trunk, all own parameters at once
    "samo": lambda n: n + 2,
    "joint": lambda n: n + 1,
    "joint-mean": lambda n: 3,
}
each_count = pytest.mark.parametrize("n", COUNTS)
each_way = pytest.mark.parametrize("perturb", PERTURB)


class Counted(nn.Module):
    """A network with BatchNorm and dropout, that remembers how it was called."""

    def __init__(self, n: int, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tasks = [f"t{k}" for k in range(n)]
        self.trunk = nn.Sequential(
            nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3)
        )
        self.heads = nn.ModuleDict(
            {
                t: nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.3), nn.Linear(4, 1))
                for t in self.tasks
            }
        )
        self.double()
        self.masks: list[Tensor] = []
        self.moving: list[set[str]] = []
        self.start: dict[str, Tensor] = {}

    def closure(self, seed: int = 0, without: tuple[str, ...] = ()) -> Callable:
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(8, 4, generator=g, dtype=torch.float64)
        y = torch.randn(len(self.tasks), 8, 1, generator=g, dtype=torch.float64)
        self.masks, self.moving, self.start = [], [], values(self)

        def losses() -> dict[str, Tensor]:
            self.moving.append({n for n, p in self.named_parameters() if differs(p, self.start[n])})
            z = self.trunk(x)
            found = {
                t: (self.heads[t](z) - y[k]).square().mean()
                for k, t in enumerate(self.tasks)
                if t not in without
            }
            self.masks.append(torch.rand(3))
            return found

        return losses

    def calls(self) -> int:
        return len(self.masks)


def values(net: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in net.named_parameters()}


def differs(a: Tensor, b: Tensor) -> bool:
    return not torch.equal(a.detach(), b)


def step_on(net: Counted, *stages: Any, lr: float = 0.1, **options: Any) -> eq.Step:
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    return eq.Step(net, net.tasks, optimizer, *stages, **options)


# ------------------------------------------------------------------------------------- counts


@each_count
@pytest.mark.parametrize("shared", [None, "trunk.*"])
@pytest.mark.parametrize(
    "recipe", ["ew", "mean", "si", "uw+mgda", "pcgrad", "graddrop", "gradnorm"]
)
def test_a_plain_step_calls_once(recipe: str, shared: Any, n: int) -> None:
    net = Counted(n)
    step = eq.Recipe.parse(recipe).build(net, net.tasks, 0.1, 2, shared=shared)
    for k in range(3):
        step(net.closure(k))
        assert net.calls() == 1


@each_count
@each_way
@pytest.mark.parametrize(
    ("aggregator", "decompose"),
    [(eq.MGDA(), True), (eq.Sum(), True), (lambda rows: rows.sum(0), False)],
)
def test_flat_regions(perturb: str, decompose: bool, aggregator: Any, n: int) -> None:
    net = Counted(n)
    sharpness = eq.TaskSharpness(perturb=perturb, decompose=decompose)
    step = step_on(net, None, aggregator, sharpness)
    for k in range(2):
        step(net.closure(k))
        assert net.calls() == PERTURB[perturb](n)


@each_way
def test_an_absent_task_is_not_looked_at(perturb: str) -> None:
    net = Counted(5)
    step = step_on(net, None, eq.MGDA(), eq.TaskSharpness(perturb=perturb))
    step(net.closure())
    step(net.closure(1, without=("t1", "t4")))
    assert net.calls() == PERTURB[perturb](3)


@each_count
@pytest.mark.parametrize("upper", [0.1, 64.0])
@pytest.mark.parametrize("perturb", [None, *PERTURB])
def test_a_line_search_calls_once_more_for_each_trial(
    perturb: str | None, upper: float, n: int
) -> None:
    net = Counted(n)
    sharpness = None if perturb is None else eq.TaskSharpness(perturb=perturb)
    step = step_on(net, None, eq.MGDA(), sharpness, eq.Backtracking(upper=upper))
    report = step(net.closure())
    looks = 1 if perturb is None else PERTURB[perturb](n)
    assert report.trials >= (1 if upper < 1 else 3)
    assert net.calls() == looks + report.trials


@each_count
@pytest.mark.parametrize("perturb", [None, *PERTURB])
def test_losses_after_the_update_are_one_call_more(perturb: str | None, n: int) -> None:
    net = Counted(n)
    sharpness = None if perturb is None else eq.TaskSharpness(perturb=perturb)
    step = step_on(net, eq.FAMO(), eq.MGDA(), sharpness)
    for k in range(2):
        step(net.closure(k))
        assert net.calls() == (1 if perturb is None else PERTURB[perturb](n)) + 1


def test_radius_zero_costs_nothing() -> None:
    net = Counted(3)
    step_on(net, None, eq.MGDA(), eq.TaskSharpness(rho=0.0))(net.closure())
    assert net.calls() == 1


# ---------------------------------------------------------------------------------- no traces

STAGES: dict[str, tuple] = {
    "plain": (None, eq.MGDA()),
    **{way: (None, eq.MGDA(), eq.TaskSharpness(0.1, perturb=way)) for way in PERTURB},
    "famo": (eq.FAMO(), eq.CAGrad()),
    "line search": (None, eq.MGDA(), None, eq.Backtracking(upper=64.0)),
    "all": (eq.FAMO(), eq.MGDA(), eq.TaskSharpness(0.1), eq.Backtracking(upper=64.0)),
}


@pytest.mark.parametrize("name", STAGES)
def test_all_calls_see_the_same_draws_and_leave_those_of_one(name: str) -> None:
    net, plain = Counted(3), Counted(3)
    step = step_on(net, *STAGES[name])
    torch.manual_seed(7)
    step(net.closure())
    after = torch.get_rng_state()
    assert net.calls() > 1 or name == "plain"
    assert all(torch.equal(mask, net.masks[0]) for mask in net.masks)
    torch.manual_seed(7)
    plain.closure()()
    assert torch.equal(after, torch.get_rng_state())
    # BatchNorm has moved once, from the point where the step began.
    assert differences(dict(net.named_buffers()), dict(plain.named_buffers())) == []
    assert net.trunk[1].num_batches_tracked == 1


@pytest.mark.parametrize("name", STAGES)
def test_parameters_come_back_bit_for_bit(name: str) -> None:
    net = Counted(3)
    stages = STAGES[name]
    if len(stages) == 4:  # so far that no loss can have fallen
        stages = (*stages[:3], eq.Backtracking(upper=1e10, floor=1e10))
    step = step_on(net, *stages, lr=0.0)
    before = values(net)
    report = step(net.closure())
    assert report.accepted == (len(stages) < 4)
    assert differences(before, values(net)) == []


def moved_of(net: Counted) -> list[tuple[bool, set[str]]]:
    """For each call whether the trunk was moved, and whose heads were."""
    return [
        (
            any(n.startswith("trunk") for n in names),
            {n.split(".")[1] for n in names if "heads" in n},
        )
        for names in net.moving
    ]


@each_count
@each_way
def test_what_is_moved_in_which_call(perturb: str, n: int) -> None:
    net = Counted(n)
    step_on(net, None, eq.MGDA(), eq.TaskSharpness(perturb=perturb))(net.closure())
    first, *others = moved_of(net)
    everyone = set(net.tasks)
    assert first == (False, set())
    if perturb == "joint":
        assert sorted(others, key=str) == sorted(((True, {t}) for t in net.tasks), key=str)
        return
    trunk_only = [look for look in others if look == (True, set())]
    assert len(trunk_only) == (1 if perturb == "joint-mean" else n)
    assert [look for look in others if look not in trunk_only] == [(False, everyone)]
