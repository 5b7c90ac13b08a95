"""Which parameters are found to be shared, which belong to one task, and what is left alone.

An aggregator that answers 7 everywhere shows it: a shared parameter has the gradient 7, a task's
own parameter that of its loss, and what nobody reaches has none.
"""

import io
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import differences
from networks import NETWORKS, Network, closure_of, draw, layer, network, step_on, values
from torch import Tensor, nn

import equipoise as eq

every_network = pytest.mark.parametrize("name", NETWORKS)
SEVEN = 7.0


def seven(rows: Tensor) -> Tensor:
    return torch.full_like(rows[0], SEVEN)


def roles(net: Network) -> tuple[set[str], set[str]]:
    """The names of the shared parameters and of those with a gradient of their own."""
    shared, own = set(), set()
    for name, p in net.named().items():
        if p.grad is not None:
            (shared if bool((p.grad == SEVEN).all()) else own).add(name)
    return shared, own


def expected(net: Network) -> tuple[set[str], set[str]]:
    own = [w for patterns in net.own.values() for w in patterns]
    return {*net.matching(net.shared)}, {*net.matching(own)}


@every_network
def test_what_the_graph_says(name: str) -> None:
    net = network(name)
    step = step_on(net, None, seven, lr=0.0)
    for k in range(2):
        step(closure_of(net, k))
        assert roles(net) == expected(net)
    assert net.spare.weight.grad is None


@every_network
def test_rows_hold_the_shared_parameters_and_nothing_else(name: str) -> None:
    net, seen = network(name), []

    def look(rows: Tensor) -> Tensor:
        seen.append(rows.shape)
        return rows.sum(0)

    step_on(net, None, look)(closure_of(net))
    size = sum(p.numel() for p in net.matching(net.shared).values())
    assert seen == [(len(net.tasks), size)]


# ----------------------------------------------------------------------- from step to step


class Growing(Network):
    """From batch 1 on b looks at the adapter too; from batch 2 on both look at a new layer."""

    shared = ("trunk.*", "adapter.*", "late.*")
    own = {"a": ("heads.a.*",), "b": ("heads.b.*",)}

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.adapter, self.late = layer(5, 4), layer(4, 4), layer(4, 4)
        self.heads = nn.ModuleDict({t: nn.Linear(4, 1) for t in self.tasks})

    def batch(self, k: int) -> tuple:
        return k, *draw(k, (6, 5), (6, 1), (6, 1))

    def losses(self, k: int, x: Tensor, *targets: Tensor) -> dict[str, Tensor]:
        z = self.trunk(x)
        z = self.late(z) if k >= 2 else z
        seen = {"a": self.adapter(z), "b": self.adapter(z) if k >= 1 else z}
        return {
            t: F.mse_loss(self.heads[t](seen[t]), y)
            for t, y in zip(self.tasks, targets, strict=True)
        }


def test_a_leaf_that_appears_later_or_is_reached_by_a_second_task_later() -> None:
    torch.manual_seed(0)
    net = Growing().double()
    step = step_on(net, None, seven, lr=0.0)
    heads = {*net.matching(["heads.*"])}
    trunk, adapter, late = ({*net.matching([w])} for w in net.shared)
    step(closure_of(net, 0))
    assert roles(net) == (trunk, heads | adapter)
    step(closure_of(net, 1))
    assert roles(net) == (trunk | adapter, heads)
    step(closure_of(net, 2))
    assert roles(net) == (trunk | adapter | late, heads)
    # What was shared once stays so, also where one task alone reaches it, or none.
    step(closure_of(net, 0))
    assert roles(net) == (trunk | adapter, heads)


@pytest.mark.parametrize("name", ["mmoe", "cgc", "skips", "noisy"])
def test_a_task_that_is_absent_in_the_first_step(name: str) -> None:
    net = network(name)
    step = step_on(net, None, eq.MGDA(), lr=0.0)
    missing = net.tasks[-1]
    step(closure_of(net, 0, (missing,)))
    assert all(p.grad is None for p in net.matching(net.own[missing]).values())
    step.aggregator = seven
    step(closure_of(net, 1))
    assert roles(net) == expected(net)


def test_tasks_that_never_meet_share_what_both_have_reached() -> None:
    net = network("cgc")
    step = step_on(net, None, seven, lr=0.0)
    shared, a, b = ({*net.matching(w)} for w in (net.shared, net.own["a"], net.own["b"]))
    step(closure_of(net, 0, ("b",)))
    assert roles(net) == (set(), shared | a)
    step(closure_of(net, 1, ("a",)))
    assert roles(net) == (shared, b)
    step(closure_of(net, 2, ("b",)))
    assert roles(net) == (shared, a)


@pytest.mark.parametrize(
    "way", [lambda net: None, lambda net: net.common.parameters()], ids=["found", "generator"]
)
def test_another_aggregator_keeps_what_was_found(way: Callable) -> None:
    net = network("cgc")
    step = step_on(net, None, eq.MGDA(), shared=way(net), lr=0.0)
    step(closure_of(net))
    step.aggregator = seven
    step(closure_of(net, 1, ("a",)))
    assert roles(net) == ({*net.matching(net.shared)}, {*net.matching(net.own["b"])})


def test_partly_shared_where_the_other_tasks_are_absent() -> None:
    # Two of three reach the middle; where one of the two is absent its row alone is there.
    net = network("skips")
    step = step_on(net, None, seven, lr=0.0)
    step(closure_of(net, 0))
    step(closure_of(net, 1, ("wide",)))
    assert roles(net) == ({*net.matching(net.shared)}, {*net.matching(["heads.[sd]*"])})
    step(closure_of(net, 2, ("wide", "deep")))
    assert roles(net) == ({*net.matching(["stem.*"])}, {*net.matching(["heads.s*"])})


def test_a_layer_that_is_thawed_joins() -> None:
    net = network("mmoe")
    net.experts[1].requires_grad_(False)
    step = step_on(net, None, seven, lr=0.0)
    step(closure_of(net, 0))
    assert roles(net)[0] == {*net.matching(net.shared)} - {*net.matching(["experts.1.*"])}
    net.experts[1].requires_grad_(True)
    step(closure_of(net, 1))
    assert roles(net) == expected(net)


def test_one_layer_is_frozen_and_another_one_thawed() -> None:
    # As many parameters are frozen as before, but others.
    net = network("mmoe")
    step = step_on(net, None, seven, lr=0.0)
    for k, frozen in enumerate((None, 0, 1, 2)):
        for i, expert in enumerate(net.experts):
            expert.requires_grad_(i != frozen)
        step(closure_of(net, k))
        assert roles(net)[0] == {n for n in net.matching(net.shared) if f"s.{frozen}." not in n}


class Detached(Network):
    """b sees the deep layer without sending anything back, so that it belongs to a alone."""

    shared = ("stem.*",)
    own = {"a": ("deep.*", "heads.a.*"), "b": ("heads.b.*",)}

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = layer(5, 4), layer(4, 4)
        self.heads = nn.ModuleDict({t: nn.Linear(8, 1) for t in self.tasks})

    def losses(self, x: Tensor, *targets: Tensor) -> dict[str, Tensor]:
        stem = self.stem(x)
        deep = self.deep(stem)
        seen = {"a": torch.cat([stem, deep], 1), "b": torch.cat([stem, deep.detach()], 1)}
        return {
            t: F.mse_loss(self.heads[t](seen[t]), y)
            for t, y in zip(self.tasks, targets, strict=True)
        }


def test_gradients_decide_and_not_who_uses_a_layer() -> None:
    torch.manual_seed(0)
    net = Detached().double()
    step_on(net, None, seven)(closure_of(net))
    assert roles(net) == expected(net)


# ---------------------------------------------------------------------------- as the user says

EXPLICIT: dict[str, Callable[[Network], Any]] = {
    "module": lambda net: net.experts,
    "module list": lambda net: nn.ModuleList([*net.experts]),
    "parameters": lambda net: list(net.experts.parameters()),
    "generator": lambda net: net.experts.parameters(),
    "pattern": lambda net: "experts.*",
    "patterns": lambda net: ["experts.[01].*", "experts.2.?.weight", "experts.2.?.bias"],
    "names": lambda net: list(net.matching(["experts.*"])),
}


@pytest.mark.parametrize("way", EXPLICIT)
def test_every_way_to_name_what_is_shared(way: str) -> None:
    net = network("mmoe")
    step = step_on(net, None, seven, shared=EXPLICIT[way](net), lr=0.0)
    for k in range(2):
        step(closure_of(net, k))
        assert roles(net) == expected(net)
    step(closure_of(net, 2, ("a", "b")))
    assert roles(net)[0] == {*net.matching(net.shared)}


def test_what_is_named_is_shared_from_the_first_step_on() -> None:
    net = network("cgc")
    step = step_on(net, None, seven, shared="common.*", lr=0.0)
    step(closure_of(net, 0, ("b",)))
    assert roles(net) == ({*net.matching(net.shared)}, {*net.matching(net.own["a"])})


def test_only_what_is_named_is_aggregated() -> None:
    net = network("skips")
    step_on(net, None, seven, shared=net.stem)(closure_of(net))
    assert roles(net) == (
        {*net.matching(["stem.*"])},
        {*net.matching(["middle.*", "heads.*"])},
    )


@pytest.mark.parametrize("shared", ["expert.*", ["gates.*", "expert.*"]])
def test_a_pattern_that_fits_nothing(shared: Any) -> None:
    with pytest.raises((eq.EquipoiseError, ValueError), match=r"expert\.\*.*experts\.") as caught:
        step_on(network("mmoe"), None, eq.MGDA(), shared=shared)
    assert "gates" not in str(caught.value).partition("expert.*")[0]


# --------------------------------------------------------------------------------- left alone


@pytest.mark.parametrize("options", [{}, {"sharpness": eq.TaskSharpness(0.1)}])
def test_inputs_that_require_a_gradient(options: dict) -> None:
    net = network("physics-informed")
    x, y, inner = net.batch(0)
    x.requires_grad_()
    x.grad = torch.ones_like(x)
    before = [t.detach().clone() for t in (x, inner)]
    step = step_on(net, None, eq.CAGrad(), **options)
    step(lambda: net.losses(x, y, inner))
    assert inner.grad is None
    assert torch.equal(x.grad, torch.ones_like(x))
    assert torch.equal(x.detach(), before[0]) and torch.equal(inner.detach(), before[1])


def test_a_leaf_that_neither_network_nor_optimizer_holds() -> None:
    net = network("cgc")
    stranger = torch.ones((), dtype=torch.float64, requires_grad=True)
    losses = closure_of(net)
    step_on(net, None, seven)(lambda: {t: v * stranger for t, v in losses().items()})
    assert roles(net) == expected(net)
    assert stranger.grad is None
    assert stranger.item() == 1


LEFT_ALONE = {
    "plain": {},
    "flat": {"sharpness": eq.TaskSharpness(0.1)},
    "line search": {"line_search": eq.Backtracking()},
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_a_network_inside_the_losses_that_nobody_trains(name: str) -> None:
    """As in a perceptual loss: its parameters require a gradient, but no optimizer holds them."""
    reports = []
    for frozen in (False, True):
        net = network("cgc")
        torch.manual_seed(3)
        judge = layer(1, 3).double().requires_grad_(not frozen)
        before = {n: p.detach().clone() for n, p in judge.named_parameters()}
        x, *targets = net.batch(0)

        def losses(net: Network = net, x: Tensor = x, judge: nn.Module = judge) -> dict:
            common = [expert(x) for expert in net.common]
            return {
                t: judge(net.towers[t](net.experts[t](x) + sum(common))).square().mean()
                for t in net.tasks
            }

        reports.append(step_on(net, None, eq.MGDA(), **LEFT_ALONE[name])(losses))
        for n, p in judge.named_parameters():
            assert torch.equal(p, before[n]), n
            assert p.grad is None, n
    assert torch.allclose(reports[0].gram, reports[1].gram, rtol=1e-12)


@pytest.mark.parametrize("shared", [None, "trunk.*"])
@pytest.mark.parametrize("flat", [False, True])
def test_weights_inside_a_loss_are_trained_like_a_head(shared: Any, flat: bool) -> None:
    net = network("centres")
    sharpness = eq.TaskSharpness(0.1) if flat else None
    step = step_on(net, None, eq.MGDA(), sharpness, shared=shared)
    before = values(net)
    step(closure_of(net))
    moved = {n for n, v in values(net).items() if not torch.equal(v, before[n])}
    assert moved == {n for n in before if not n.startswith("spare")}


# -------------------------------------------------------------------------- nothing is shared


class Apart(Network):
    """Two networks that share nothing."""

    own = {"a": ("of.a.*",), "b": ("of.b.*",)}

    def __init__(self) -> None:
        super().__init__()
        self.of = nn.ModuleDict({t: nn.Linear(5, 1) for t in self.tasks})

    def losses(self, x: Tensor, *targets: Tensor) -> dict[str, Tensor]:
        return {t: F.mse_loss(self.of[t](x), y) for t, y in zip(self.tasks, targets, strict=True)}


def test_nothing_to_aggregate() -> None:
    net = Apart().double()
    before = values(net)
    with pytest.raises(eq.EquipoiseError, match="shared"):
        step_on(net, None, eq.MGDA())(closure_of(net))
    assert differences(before, values(net)) == []


@pytest.mark.parametrize("weighting", [None, eq.SI()])
def test_a_sum_needs_nothing_that_is_shared(weighting: Any) -> None:
    net, plain = Apart().double(), Apart().double()
    plain.load_state_dict(net.state_dict())
    step_on(net, weighting)(closure_of(net))
    total = sum(v.log() if weighting else v for v in closure_of(plain)().values())
    total.backward()
    for name, p in plain.named().items():
        grad = net.named()[name].grad
        assert (grad is None) == (p.grad is None)
        assert grad is None or torch.allclose(grad, p.grad, rtol=1e-12)


@pytest.mark.parametrize("stages", [(None, eq.MGDA()), (None, eq.CAGrad(), eq.TaskSharpness(0.1))])
def test_one_task_alone_is_no_conflict(stages: Sequence) -> None:
    net = Apart().double()
    step = step_on(net, *stages)
    report = step(closure_of(net, 0, ("b",)))
    assert report.losses.isnan().tolist() == [False, True]
    assert net.of["a"].weight.grad is not None
    assert net.of["b"].weight.grad is None


# -------------------------------------------------------------------------------------- state

STATE = {
    "cagrad": lambda n: (None, eq.CAGrad()),
    "uw+pcgrad": lambda n: (eq.UW(n), eq.PCGrad()),
    "igbv1+graddrop": lambda n: (eq.IGBv1(2), eq.GradDrop()),
    "f-cagrad": lambda n: (None, eq.CAGrad(), eq.TaskSharpness(0.1, every=2)),
    "bls": lambda n: (None, eq.MGDA(), None, eq.Backtracking(adapt=True)),
}


@pytest.mark.parametrize("recipe", STATE)
@pytest.mark.parametrize("name", ["skips", "vae", "noisy", "centres"])
def test_a_fresh_step_continues_bit_for_bit(name: str, recipe: str) -> None:
    def start(seed: int) -> tuple[Network, eq.Step]:
        net = network(name, seed)
        torch.manual_seed(seed)
        optimizer = torch.optim.SGD if recipe == "bls" else torch.optim.Adam
        return net, step_on(net, *STATE[recipe](len(net.tasks)), optimizer=optimizer, lr=0.01)

    def go_on(net: Network, step: eq.Step) -> list:
        # With the first task absent, only what was seen before says what is shared.
        absent = [(net.tasks[0],), (), (net.tasks[-1],)]
        reports = [step(closure_of(net, 10 + k, without)) for k, without in enumerate(absent)]
        return [reports, values(net), dict(net.named_buffers()), torch.get_rng_state()]

    net, step = start(0)
    for k in range(3):
        step(closure_of(net, k))
    file = io.BytesIO()
    torch.save(step.state_dict(), file)
    going_on = go_on(net, step)

    file.seek(0)
    again, fresh = start(9)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert differences(going_on, go_on(again, fresh)) == []


def test_the_partition_is_part_of_the_state() -> None:
    # CAGrad makes of one gradient (1 + c) / (1 + c^2) times it, if it is asked at all.
    def first(step: eq.Step, net: Network) -> dict[str, Tensor]:
        step(closure_of(net, 5, ("b",)))
        return {n: p.grad.clone() for n, p in net.matching(net.shared).items()}

    net = network("cgc")
    step = step_on(net, None, eq.CAGrad(0.4), lr=0.0)
    step(closure_of(net))
    other, loaded = network("cgc"), network("cgc")
    fresh, filled = (step_on(x, None, eq.CAGrad(0.4), lr=0.0) for x in (other, loaded))
    filled.load_state_dict(step.state_dict())
    known, unknown, told = first(step, net), first(fresh, other), first(filled, loaded)
    assert differences(known, told) == []
    for name, gradient in known.items():
        assert torch.allclose(gradient, 1.4 / 1.16 * unknown[name], rtol=1e-10)
