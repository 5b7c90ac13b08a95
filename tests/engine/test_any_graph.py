"""Steps from a closure over networks of every shape, against a slow step by plain autograd."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from networks import (
    NETWORKS,
    Network,
    apart,
    closure_of,
    gradients,
    network,
    shared_and_own,
    step_on,
    values,
)
from reference.any_graph import Found, reference_step
from torch import Tensor, nn

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
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("by_names", [False, True])
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
@pytest.mark.parametrize("weighting", ["si", "uw"])
@pytest.mark.parametrize("aggregator", ["cagrad", "callable"])
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
    compare(name, aggregator, rho=0.2, rho_task=0.4, **options)


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
        name, "cagrad", "si", rho=0.3, rho_task=0.7, perturb=perturb, norm=norm,
        adaptive=adaptive, decompose=decompose,
    )  # fmt: skip


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
    ("aggregator", "weighting", "options"),
    [
        ("mgda", "ew", {}),
        ("callable", "ew", {}),
        ("mgda", "ew", {"rho": 0.2}),
        ("cagrad", "ew", {"rho": 0.2, "perturb": "joint-mean"}),
    ],
)
def test_an_absent_task_is_left_alone(
    name: str, aggregator: str, weighting: str, options: dict
) -> None:
    first, last = NETWORKS[name].tasks[0], NETWORKS[name].tasks[-1]
    compare(name, aggregator, weighting, absent=((), (first,), (last,), ()), **options)


# --------------------------------------------------------------------- neither shared nor own


@pytest.mark.parametrize("aggregator", ["mgda", "callable"])
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
    name: str, shared: Any, several: str, aggregator: str
) -> None:
    net, plain = network(name), network(name)
    step = step_on(net, eq.SI(), AGGREGATORS[aggregator](), shared=shared)
    step(closure_of(net))
    patterns = [shared] if isinstance(shared, str) else shared
    reference_step(
        closure_of(plain), plain.named().values(), list(plain.matching(patterns).values()),
        shared_and_own(plain)[1], AGGREGATORS[aggregator](), eq.SI(),
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
        torch.manual_seed(k)
        report = step(closure_of(net, k))
        # What the step was made of, where it began.
        with torch.no_grad():
            for n, p in plain.named().items():
                p.copy_(start[n])
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
        after = torch.stack(list(closure_of(net, k)().values())).detach()
        # Round-off of the losses only: the rule itself has no slack.
        assert torch.allclose(report.trial_losses, after, rtol=1e-12)
        allowed = found.losses - rule.beta * report.step_size * slopes
        assert (after <= allowed + 1e-12).all()


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
