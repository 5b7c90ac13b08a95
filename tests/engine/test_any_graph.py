"""Steps from a closure over networks of every shape, against a slow step by plain autograd."""

import random
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch
from helpers import differences
from networks import (
    NETWORKS,
    Network,
    apart,
    closure_of,
    gradients,
    layer,
    network,
    shared_and_own,
    step_on,
    values,
)
from reference.any_graph import Found, reference_step
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import equipoise as eq

every_network = pytest.mark.parametrize("name", NETWORKS)
POSITIVE = [name for name, kind in NETWORKS.items() if kind.positive]
OPTIMIZERS = {
    "sgd": lambda ps, lr: torch.optim.SGD(ps, lr, momentum=0.9, weight_decay=0.01),
    "adam": lambda ps, lr: torch.optim.Adam(ps, lr / 10),
}


def by_size(rows: Tensor) -> Tensor:
    """A callable without coefficients, for which the order of the columns does not matter."""
    return rows.sum(0) * (1 + rows.abs().mean(0))


def seeded(kind: Callable) -> Callable:
    return lambda: kind(generator=torch.Generator().manual_seed(3))


AGGREGATORS: dict[str, Callable[[], Any]] = {
    "mgda": eq.MGDA,
    "cagrad": eq.CAGrad,
    "pcgrad": seeded(eq.PCGrad),
    "graddrop": seeded(eq.GradDrop),
    "callable": lambda: by_size,
}
WEIGHTINGS: dict[str, Callable[[int], Any]] = {
    "ew": lambda n: eq.EW(),
    "si": lambda n: eq.SI(),
    "uw": lambda n: eq.UW(n),
    # Climbs the loss of the second task, and leaves out that of a third one.
    "signed": lambda n: lambda x: x * torch.tensor([2.0, -0.5, 0.0, 1.0, 1.0]).to(x)[: len(x)],
}


def compare(
    name: str,
    aggregator: str = "mgda",
    weighting: str = "ew",
    optimizer: str = "sgd",
    absent: Sequence[Sequence[str]] = ((), ()),
    by_names: bool = False,
    tolerance: float = 1e-10,
    **options: Any,
) -> None:
    """Let both make a step for each entry of `absent`, without the tasks in it."""
    net, plain = network(name), network(name)
    own_weighting, n = WEIGHTINGS[weighting](len(net.tasks)), len(net.tasks)
    step = step_on(
        net,
        WEIGHTINGS[weighting](n),
        AGGREGATORS[aggregator](),
        eq.TaskSharpness(**options) if options else None,
        optimizer=OPTIMIZERS[optimizer],
        shared=list(net.shared) if by_names else None,
    )
    held = OPTIMIZERS[optimizer](plain.named().values(), lr=0.1)
    if isinstance(own_weighting, nn.Module) and list(own_weighting.parameters()):
        group = {"params": list(own_weighting.parameters()), "weight_decay": 0.0}
        held.add_param_group(group | ({} if own_weighting.lr is None else {"lr": own_weighting.lr}))
    aggregate = AGGREGATORS[aggregator]()
    shared, own = shared_and_own(plain)
    for k, without in enumerate(absent):
        torch.manual_seed(k)
        report = step(closure_of(net, k, without))
        drawn = torch.rand(3)
        torch.manual_seed(k)
        found = reference_step(
            closure_of(plain, k, without), plain.named().values(), shared, own, aggregate,
            own_weighting, modules=[plain], **options,
        )  # fmt: skip
        held.step()
        assert torch.equal(drawn, torch.rand(3)), "the global generator went another way"
        assert apart(gradients(net), gradients(plain)) < tolerance
        check_report(report, found, aggregate, options, tolerance)
    assert apart(values(net), values(plain)) < tolerance
    buffers = dict(plain.named_buffers())
    for buffer_name, buffer in net.named_buffers():
        assert torch.allclose(buffer, buffers[buffer_name], rtol=tolerance, atol=0), buffer_name


def check_report(
    report: eq.StepReport, found: Found, aggregate: Any, options: dict, tolerance: float
) -> None:
    here = [report.tasks.index(task) for task in found.tasks]
    gone = [k for k in range(len(report.tasks)) if k not in here]
    assert torch.allclose(report.losses[here], found.losses, rtol=tolerance)
    assert torch.allclose(report.factors[here], found.factors, rtol=tolerance)
    assert report.losses[gone].isnan().all()
    assert not report.weights[gone].any() and not report.factors[gone].any()
    second = found.sam
    if second is not None and options.get("decompose", True):
        second = found.sam - found.rows
    for gram, rows in ((report.gram, found.rows), (report.flat_gram, second)):
        assert (gram is None) == (rows is None)
        if gram is not None:
            wanted = rows @ rows.T
            assert (gram[here][:, here] - wanted).norm() <= 10 * tolerance * wanted.norm()
            assert not gram[gone].any() and not gram[:, gone].any()
    norm = float(found.direction.norm())
    assert report.direction_norm == pytest.approx(norm, rel=10 * tolerance)
    if not hasattr(aggregate, "coefficients"):
        assert report.coefficients is None
    elif second is None:
        direction = report.coefficients[here] @ found.rows
        assert (direction - found.direction).norm() <= 10 * tolerance * norm
        assert not report.coefficients[gone].any()


# ------------------------------------------------------------------------------- plain steps


@every_network
@pytest.mark.parametrize(("optimizer", "by_names"), [("adam", False), ("sgd", True)])
def test_ew_is_one_plain_backward(name: str, optimizer: str, by_names: bool) -> None:
    net, plain = network(name), network(name)
    shared = list(net.shared) if by_names else None
    step = step_on(net, optimizer=OPTIMIZERS[optimizer], shared=shared)
    held = OPTIMIZERS[optimizer](plain.named().values(), lr=0.1)
    for k in range(3):
        torch.manual_seed(k)
        step(closure_of(net, k))
        torch.manual_seed(k)
        held.zero_grad()
        sum(closure_of(plain, k)().values()).backward()
        held.step()
        assert apart(gradients(net), gradients(plain)) < 1e-12
    assert apart(values(net), values(plain)) < 1e-12
    assert {n for n, g in gradients(net).items() if g is None} == {"spare.weight", "spare.bias"}


@every_network
@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_every_aggregator(name: str, aggregator: str) -> None:
    compare(name, aggregator)


@pytest.mark.parametrize("name", POSITIVE)
@pytest.mark.parametrize(("weighting", "aggregator"), [("si", "cagrad"), ("uw", "callable")])
def test_weighted_losses(name: str, weighting: str, aggregator: str) -> None:
    compare(name, aggregator, weighting, optimizer="adam", by_names=True)


# ------------------------------------------------------------------------------ flat regions


@every_network
@pytest.mark.parametrize(
    ("aggregator", "options"),
    [
        ("mgda", {}),
        ("cagrad", {}),
        ("cagrad", {"perturb": "joint"}),
        ("cagrad", {"perturb": "joint-mean"}),
        ("mgda", {"perturb": "samo", "mix": 0.3}),
    ],
)
def test_flat_regions(name: str, aggregator: str, options: dict) -> None:
    compare(name, aggregator, absent=((),), rho=0.2, rho_task=0.4, **options)


@pytest.mark.parametrize("decompose", [True, False])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(
    ("perturb", "norm"),
    [("separate", "group"), ("separate", "joint"), ("joint", "group"), ("joint", "joint"),
     ("joint-mean", "group"), ("samo", "group")],
)  # fmt: skip
@pytest.mark.parametrize("name", ["physics-informed", "noisy"])
def test_every_way_to_perturb(
    name: str, perturb: str, norm: str, adaptive: bool, decompose: bool
) -> None:
    compare(
        name, "cagrad", "si", absent=((),), rho=0.3, rho_task=0.7, perturb=perturb, norm=norm,
        adaptive=adaptive, decompose=decompose,
    )  # fmt: skip


@pytest.mark.parametrize("perturb", ["separate", "joint", "joint-mean", "samo"])
@pytest.mark.parametrize("norm", ["group", "joint"])
@pytest.mark.parametrize("name", ["mmoe", "cgc"])
def test_negative_and_zero_factors(name: str, norm: str, perturb: str) -> None:
    if norm == "joint" and perturb not in ("separate", "joint"):
        norm = "group"
    compare(name, "callable", "signed", absent=((),), rho=0.2, norm=norm, perturb=perturb)


@pytest.mark.parametrize("radii", [{"rho": 0.0, "rho_task": 0.1}, {"rho": 0.1, "rho_task": 0.0}])
@pytest.mark.parametrize("perturb", ["separate", "joint", "joint-mean", "samo"])
def test_one_radius_of_zero(perturb: str, radii: dict) -> None:
    net, plain = network("cgc"), network("cgc")
    step = step_on(net, None, eq.CAGrad(), eq.TaskSharpness(perturb=perturb, **radii))
    step(closure_of(net))
    reference_step(
        closure_of(plain), plain.named().values(), *shared_and_own(plain), eq.CAGrad(),
        perturb=perturb, **radii,
    )  # fmt: skip
    assert apart(gradients(net), gradients(plain)) < 1e-10


# ------------------------------------------------------------------------------ absent tasks


@every_network
@pytest.mark.parametrize(
    ("aggregator", "options"),
    [("callable", {}), ("mgda", {"rho": 0.2}), ("cagrad", {"rho": 0.2, "perturb": "joint-mean"})],
)
def test_an_absent_task_is_left_alone(name: str, aggregator: str, options: dict) -> None:
    first, last = NETWORKS[name].tasks[0], NETWORKS[name].tasks[-1]
    compare(name, aggregator, absent=((), (first,), (last,)), **options)


# ----------------------------------------------------------------------------- random graphs


class Tangle(Network):
    """Each task goes its own way through common blocks, here and there without a way back."""

    def __init__(self, seed: int, with_cuts: bool) -> None:
        super().__init__()
        chance = random.Random(seed)
        self.tasks = tuple("abcde"[: chance.randint(2, 5)])
        self.blocks = nn.ModuleList(layer(5, 5) for _ in range(6))
        self.ways = {t: chance.sample(range(6), chance.randint(1, 4)) for t in self.tasks}
        # A cut behind the last block would leave the task with nothing to learn.
        cuts = {t: chance.choice([None, None, *way[:-1]]) for t, way in self.ways.items()}
        self.cuts = cuts if with_cuts else {}

    def losses(self, x: Tensor, *targets: Tensor) -> dict[str, Tensor]:
        found = {}
        for t, y in zip(self.tasks, targets, strict=True):
            z = x
            for k in self.ways[t]:
                z = self.blocks[k](z)
                z = z.detach() if k == self.cuts.get(t) else z
            found[t] = (z.sum(1, keepdim=True) - y).square().mean()
        return found


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("options", [{}, {"rho": 0.2}], ids=["plain", "flat"])
def test_random_graphs_with_tasks_that_come_and_go(seed: int, options: dict) -> None:
    # One call moves the own parameters of all tasks, so that a task which sees those of another
    # one through a cut sees them moved: see the test below.
    torch.manual_seed(seed)
    net = Tangle(seed, with_cuts=not options).double()
    plain, chance = deepcopy(net), random.Random(seed)
    aggregator = eq.MGDA()  # of one gradient it makes that gradient, whoever owns it
    step = step_on(net, None, aggregator, eq.TaskSharpness(**options) if options else None)
    held = torch.optim.SGD(plain.parameters(), lr=0.1)
    reached: dict[Tensor, set[str]] = {p: set() for p in plain.parameters()}
    for k in range(4):
        without = chance.sample(net.tasks, chance.randint(0, len(net.tasks) - 1)) if k else ()
        present = closure_of(plain, k, without)()
        for t, loss in present.items():
            found_by_t = torch.autograd.grad(loss, [*reached], allow_unused=True)
            for p, g in zip(reached, found_by_t, strict=True):
                reached[p] |= set() if g is None else {t}
        shared = [p for p, tasks in reached.items() if len(tasks) > 1]
        own = {t: [p for p, tasks in reached.items() if tasks == {t}] for t in present}
        if not shared and len(present) > 1:
            with pytest.raises(eq.EquipoiseError, match="shared"):
                step(closure_of(net, k, without))
            return
        report = step(closure_of(net, k, without))
        found = reference_step(
            closure_of(plain, k, without), plain.parameters(), shared, own, aggregator, **options
        )
        held.step()
        assert apart(gradients(net), gradients(plain)) < 1e-10
        norm = float(found.direction.norm())
        assert report.direction_norm == pytest.approx(norm, rel=1e-9, abs=1e-300)
    assert apart(values(net), values(plain)) < 1e-10


def test_own_parameters_are_moved_at_once_also_where_others_see_them() -> None:
    """b looks at v, which is a's own, without sending anything back: L_b = (w u detach(v))^2 / 2.

    Algorithm 1 would move b's own parameter u alone, and give it w^2 v^2 (u + eps). One call for
    all own parameters, which is what T + 2 calls allow, has v moved as well.
    """
    net = nn.Module()
    for name, at in (("w", 2.0), ("v", 3.0), ("u", 1.0)):
        setattr(net, name, nn.Parameter(torch.tensor(at, dtype=torch.float64)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    step = eq.Step(net, ["a", "b"], optimizer, None, eq.Sum(), eq.TaskSharpness(0.1))
    step(
        lambda: {
            "a": (net.w * net.v).square() / 2,
            "b": (net.w * net.u * net.v.detach()).square() / 2,
        }
    )
    assert net.v.grad.item() == pytest.approx(4 * 3.1)
    assert net.u.grad.item() == pytest.approx(4 * 3.1**2 * 1.1)


# --------------------------------------------------------------------- neither shared nor own


@pytest.mark.parametrize("aggregator", [eq.Sum, eq.Mean, eq.MGDA, lambda: by_size])
@pytest.mark.parametrize(
    ("name", "shared", "several"),
    [
        ("skips", "stem.*", "middle.*"),
        ("cascade", "trunk.*", "a.*"),
        ("one head", ["trunk.*"], "head.*"),
        ("ple", ["second.common.*", "between.*"], "first.*"),
    ],
)
def test_what_several_tasks_reach_outside_of_the_shared_part(
    name: str, shared: Any, several: str, aggregator: Callable
) -> None:
    net, plain = network(name), network(name)
    step = step_on(net, eq.SI(), aggregator(), shared=shared)
    step(closure_of(net))
    patterns = [shared] if isinstance(shared, str) else shared
    reference_step(
        closure_of(plain), plain.named().values(), list(plain.matching(patterns).values()),
        shared_and_own(plain)[1], aggregator(), eq.SI(),
        several=list(plain.matching([several]).values()),
    )  # fmt: skip
    assert apart(gradients(net), gradients(plain)) < 1e-10


@pytest.mark.parametrize(
    "stages",
    [{"sharpness": eq.TaskSharpness()}, {"line_search": eq.Backtracking()}],
    ids=["sharpness", "line search"],
)
def test_what_several_tasks_reach_has_no_place_to_be_moved_to(stages: dict) -> None:
    net = network("skips")
    step = step_on(net, aggregator=eq.MGDA(), shared="stem.*", **stages)
    before = values(net)
    with pytest.raises(eq.EquipoiseError, match="middle"):
        step(closure_of(net))
    assert all(torch.equal(v, before[n]) for n, v in values(net).items())


@pytest.mark.parametrize("name", ["cgc", "noisy"])
@pytest.mark.parametrize("options", [{}, {"rho": 0.2}], ids=["plain", "flat"])
def test_a_larger_shared_part_than_needed(name: str, options: dict) -> None:
    # What one task reaches may be named as shared: the other rows have zeros there.
    net, plain = network(name), network(name)
    task = net.tasks[0]
    patterns = [*net.shared, *net.own[task], "spare.*"]
    sharpness = eq.TaskSharpness(**options) if options else None
    step = step_on(net, None, eq.MGDA(), sharpness, shared=patterns)
    torch.manual_seed(1)
    step(closure_of(net))
    torch.manual_seed(1)
    own = {t: ps for t, ps in shared_and_own(plain)[1].items() if t != task}
    reference_step(
        closure_of(plain), plain.named().values(), list(plain.matching(patterns).values()), own,
        eq.MGDA(), modules=[plain], **options,
    )  # fmt: skip
    assert apart(gradients(net), gradients(plain)) < 1e-10


# ------------------------------------------------------------------------------- line search


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "actor-critic"])
@pytest.mark.parametrize("options", [{}, {"rho": 0.1}], ids=["plain", "flat"])
def test_the_accepted_step_lowers_every_loss_enough(name: str, options: dict) -> None:
    """Armijo's inequality, with the slopes of the reference and losses looked at anew."""
    net, plain = network(name), network(name)
    sharpness = eq.TaskSharpness(**options) if options else None
    rule = eq.Backtracking(upper=4.0)
    step = step_on(net, None, eq.MGDA(), sharpness, rule)
    for k in range(2):
        start = values(net)
        buffers = {n: b.clone() for n, b in net.named_buffers()}
        torch.manual_seed(k)
        report = step(closure_of(net, k))
        # What the step was made of, where it began.
        with torch.no_grad():
            for n, p in plain.named().items():
                p.copy_(start[n])
        set_buffers(plain, buffers)
        shared, own = shared_and_own(plain)
        # A flat part that led upwards was left out.
        radii = {} if report.fallback else options
        torch.manual_seed(k)
        found = reference_step(
            closure_of(plain, k), plain.named().values(), shared, own, eq.MGDA(), modules=[plain],
            **radii,
        )  # fmt: skip
        slopes = found.rows @ found.direction
        torch.manual_seed(k)
        set_buffers(plain, buffers)
        at_start = closure_of(plain, k)()
        for i, t in enumerate(net.tasks):
            if own[t]:
                clean = torch.autograd.grad(
                    at_start[t], own[t], retain_graph=True, allow_unused=True
                )
                slopes[i] += sum(
                    float((g * p.grad).sum()) for g, p in zip(clean, own[t], strict=True)
                )
        assert torch.allclose(report.slopes, slopes, rtol=1e-8, atol=1e-12)
        assert report.accepted and report.step_size == 4.0 * 0.5 ** (report.trials - 1)
        with torch.no_grad():
            for p in plain.named().values():
                if p.grad is not None:
                    p -= report.step_size * p.grad
        assert apart(values(net), values(plain)) < 1e-10
        torch.manual_seed(k)
        set_buffers(plain, buffers)
        after = torch.stack(list(closure_of(plain, k)().values())).detach()
        # Round-off of the losses only: the rule itself has no slack.
        assert torch.allclose(report.trial_losses, after, rtol=1e-12)
        allowed = found.losses - rule.beta * report.step_size * slopes
        assert (after <= allowed + 1e-12).all()


def set_buffers(net: nn.Module, to: dict[str, Tensor]) -> None:
    for name, buffer in net.named_buffers():
        buffer.data.copy_(to[name])  # past autograd, whose graph may hold it


def test_a_loss_that_moves_without_a_gradient_is_not_searched_for_ever() -> None:
    # The policy's loss follows the value, to which it sends nothing back: it grows at every size.
    net = network("actor-critic")
    before = values(net)
    step = step_on(net, None, eq.MGDA(), None, eq.Backtracking())
    report = step(closure_of(net))
    assert not report.accepted and report.step_size == 0 and report.trials == 34
    assert all(torch.equal(v, before[n]) for n, v in values(net).items())


# --------------------------------------------------------------------------------- other parts


def test_losses_after_the_update_of_a_network_that_differentiates_by_its_inputs() -> None:
    net = network("physics-informed")
    step = step_on(net, eq.FAMO(), eq.MGDA())
    for k in range(3):
        report = step(closure_of(net, k))
    assert report.losses.isfinite().all()


@pytest.mark.parametrize("aggregator", [None, eq.MGDA()], ids=["sum", "mgda"])
def test_clipping_counts_everything(aggregator: Any) -> None:
    net, free = network("cgc"), network("cgc")
    step_on(net, None, aggregator, clip_norm=0.1)(closure_of(net))
    step_on(free, None, aggregator)(closure_of(free))
    torch.nn.utils.clip_grad_norm_(free.named().values(), 0.1)
    assert apart(gradients(net), gradients(free)) < 1e-12


def test_a_frozen_part_stays() -> None:
    net: Network = network("mmoe")
    net.experts[0].requires_grad_(False)
    net.towers["b"].requires_grad_(False)
    before = values(net)
    step = step_on(net, None, eq.CAGrad(), eq.TaskSharpness(0.1))
    step(closure_of(net))
    still = {n for n, v in values(net).items() if torch.equal(v, before[n])}
    assert still == {*net.matching(["experts.0.*", "towers.b.*", "spare.*"])}


@pytest.mark.parametrize("options", [{}, {"sharpness": eq.TaskSharpness(0.1)}])
def test_the_order_of_what_the_closure_returns_does_not_matter(options: dict) -> None:
    net, other = network("mmoe"), network("mmoe")
    losses = closure_of(other)
    report = step_on(net, eq.SI(), eq.CAGrad(), **options)(closure_of(net))
    again = step_on(other, eq.SI(), eq.CAGrad(), **options)(
        lambda: dict(reversed(losses().items()))
    )
    assert differences(report, again) == []
    assert differences(values(net), values(other)) == []


@pytest.mark.parametrize("options", [{}, {"sharpness": eq.TaskSharpness(0.1)}])
def test_activation_checkpoints(options: dict) -> None:
    net, other = network("noisy"), network("noisy")
    forward = other.trunk.forward
    other.trunk.forward = lambda x: checkpoint(forward, x, use_reentrant=False)
    reports = []
    for each in (net, other):
        torch.manual_seed(1)
        # BatchNorm moves twice in a checkpoint, in the forward and again in the backward pass.
        each.trunk[1].eval()
        reports.append(step_on(each, None, eq.CAGrad(), **options)(closure_of(each)))
    assert differences(*reports) == []
    assert differences(values(net), values(other)) == []
