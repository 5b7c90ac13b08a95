"""The slow step for any graph, by plain autograd, numbers by hand, and trunks with heads."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import THREE, all_tasks, class_batch, conv_model, sgd
from networks import (
    NETWORKS,
    Network,
    apart,
    closure_of,
    gradients,
    network,
    shared_and_own,
    values,
)
from reference.any_graph import Found, reference_step
from torch import Tensor, nn

import equipoise as eq

every_network = pytest.mark.parametrize("name", NETWORKS)


def total(rows: Tensor) -> Tensor:
    return rows.sum(0)


def on(net: Network, aggregate: Callable, *args: Any, **options: Any) -> Found:
    """A reference step on batch 0."""
    torch.manual_seed(1)
    shared, own = shared_and_own(net)
    return reference_step(
        closure_of(net), net.named().values(), shared, own, aggregate, *args,
        modules=[net], **options,
    )  # fmt: skip


@every_network
def test_the_sum_is_one_plain_backward(name: str) -> None:
    net, plain = network(name), network(name)
    on(net, total)
    torch.manual_seed(1)
    sum(closure_of(plain)().values()).backward()
    assert apart(gradients(net), gradients(plain)) < 1e-13


@every_network
@pytest.mark.parametrize("perturb", ["separate", "joint", "joint-mean", "samo"])
def test_a_step_leaves_behind_what_one_call_of_the_closure_leaves(name: str, perturb: str) -> None:
    net, plain = network(name), network(name)
    on(net, total, rho=0.1, perturb=perturb)
    drawn = torch.get_rng_state()
    torch.manual_seed(1)
    closure_of(plain)()
    assert torch.equal(drawn, torch.get_rng_state())
    assert all(torch.equal(v, values(plain)[n]) for n, v in values(net).items())
    buffers = dict(plain.named_buffers())
    assert all(torch.equal(b, buffers[n]) for n, b in net.named_buffers())


@every_network
def test_what_nobody_reaches_has_no_gradient(name: str) -> None:
    net = network(name)
    on(net, total, rho=0.1)
    assert {n for n, g in gradients(net).items() if g is None} == {"spare.weight", "spare.bias"}


# ---------------------------------------------------------------------------- numbers by hand

TWO_BOWLS = (([1.0, 4.0], [0.0, 0.0]), ([2.0, 1.0], [5.0, -2.0]))


def bowls(theta: Tensor) -> dict[str, Tensor]:
    """Gradients (3, 4) and (-4, 3) at (3, 1)."""
    return {
        f"t{k}": (torch.tensor(h) * (theta - torch.tensor(c)) ** 2).sum() / 2
        for k, (h, c) in enumerate(TWO_BOWLS)
    }


@pytest.mark.parametrize(
    ("aggregate", "decompose", "expected"),
    [
        (lambda rows: rows.mean(0), True, (-0.75, 4.45)),
        (eq.MGDA(), True, (-1.11413793, 4.01965517)),
        (eq.MGDA(), False, (-1.22526093, 4.31504937)),
        (eq.IMTLG(), True, (-0.92138055, 4.24745935)),
        (eq.CAGrad(c=0.4), True, (-1.13613706, 5.16204278)),
        (eq.CAGrad(c=0.4), False, (-1.46508784, 5.15965717)),
    ],
)
def test_flat_parts_of_two_bowls(
    aggregate: Callable, decompose: bool, expected: tuple[float, float]
) -> None:
    theta = nn.Parameter(torch.tensor([3.0, 1.0], dtype=torch.float64))
    found = reference_step(
        lambda: bowls(theta), [theta], [theta], {}, aggregate, rho=0.5, decompose=decompose
    )
    assert torch.allclose(found.sam, torch.tensor([[3.3, 5.6], [-4.8, 3.3]]).double(), rtol=1e-6)
    assert theta.grad.tolist() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(
    ("options", "row", "own"),
    [
        ({"perturb": "separate"}, 2.1, 4.4),
        ({"perturb": "joint"}, 2.541, 4.851),
        # eps_w = 0.0447214 and eps_v = 0.0894427, in turn and at once
        ({"perturb": "separate", "norm": "joint"}, 2.0 + 0.1 / 5**0.5, 4.0 + 0.8 / 5**0.5),
        # By |w g| = |v h| = 4: eps_w = 0.1 * 4 * 2 / 4, eps_v = 0.1 * 1 * 4 / 4.
        ({"perturb": "separate", "adaptive": True}, 2.2, 4.4),
    ],
)
def test_one_weight_in_front_of_another(options: dict, row: float, own: float) -> None:
    # L = (v w x - y)^2 / 2 at x = 1, y = 0, w = 2, v = 1, and radii 0.1
    w, v = (nn.Parameter(torch.tensor([x], dtype=torch.float64)) for x in (2.0, 1.0))
    found = reference_step(
        lambda: {"t": (v * w).square().sum() / 2}, [w, v], [w], {"t": [v]}, total, rho=0.1,
        **options,
    )  # fmt: skip
    assert found.sam.item() == pytest.approx(row, rel=1e-9)
    assert w.grad.item() == pytest.approx(row, rel=1e-9)  # one task: plain SAM
    assert v.grad.item() == pytest.approx(own, rel=1e-9)


@pytest.mark.parametrize(("perturb", "mix"), [("joint-mean", 0.0), ("samo", 0.0), ("samo", 0.25)])
def test_points_that_tasks_share_in_part(perturb: str, mix: float) -> None:
    theta = nn.Parameter(torch.tensor([3.0, 1.0], dtype=torch.float64))
    found = reference_step(
        lambda: bowls(theta), [theta], [theta], {}, total, rho=0.5, perturb=perturb, mix=mix
    )
    g, h = torch.tensor([[3.0, 4.0], [-4.0, 3.0]]).double(), [t[0] for t in TWO_BOWLS]
    share = 1.0 if perturb == "joint-mean" else mix
    for k in range(2):
        up = share * g.mean(0) + (1 - share) * g[k]
        expected = g[k] + torch.tensor(h[k]) * 0.5 * up / up.norm()
        assert torch.allclose(found.sam[k], expected, rtol=1e-12)


def test_neither_shared_nor_of_one_task() -> None:
    p, q, s = (nn.Parameter(torch.tensor(x, dtype=torch.float64)) for x in (2.0, 3.0, 5.0))

    def losses() -> dict[str, Tensor]:
        return {"a": p * q, "b": p * q * s, "c": p * s}

    reference_step(
        losses, [p, q, s], [p], {}, eq.MGDA(), lambda x: x * torch.tensor([1, 10, 100]).double(),
        several=[q, s],
    )  # fmt: skip
    assert (q.grad.item(), s.grad.item()) == (2 + 10 * 10, 10 * 6 + 100 * 2)


def test_weights_by_losses_and_what_a_weighting_learns() -> None:
    p = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    uw = eq.UW(2)
    found = reference_step(
        lambda: {"a": p[0] ** 2, "b": 3 * p[1]}, [p], [p], {}, total, lambda x: x.log()
    )
    assert found.factors.tolist() == pytest.approx([1, 1 / 6])
    assert p.grad.tolist() == pytest.approx([2, 0.5])
    reference_step(lambda: {"a": p[0] ** 2, "b": 3 * p[1]}, [p], [p], {}, total, uw)
    (learned,) = uw.parameters()  # s = 0: (exp(-s) L + s) / 2
    assert learned.grad.tolist() == pytest.approx([0.0, -2.5])


# ------------------------------------------------------------------- trunks with heads, by Step


@pytest.mark.parametrize("decompose", [True, False])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(
    ("perturb", "norm"),
    [
        ("separate", "group"),
        ("separate", "joint"),
        ("joint", "group"),
        ("joint", "joint"),
        ("joint-mean", "group"),
        ("samo", "group"),
    ],
)
def test_a_step_on_a_shared_trunk(perturb: str, norm: str, adaptive: bool, decompose: bool) -> None:
    options = {"perturb": perturb, "norm": norm, "adaptive": adaptive, "decompose": decompose}
    compare(eq.CAGrad(), eq.SI(), rho=0.3, rho_task=0.7, **options)


@pytest.mark.parametrize("weighting", [eq.EW, eq.SI, lambda: eq.UW(3)])
@pytest.mark.parametrize("aggregator", [eq.Sum, eq.MGDA, eq.CAGrad, eq.UPGrad, eq.MaxNorm])
def test_a_plain_step_on_a_shared_trunk(aggregator: Callable, weighting: Callable) -> None:
    compare(aggregator(), weighting())


def compare(aggregator: Any, weighting: Any, **options: Any) -> None:
    model, plain = (conv_model(THREE, dtype=torch.float64) for _ in range(2))
    inputs, targets = class_batch(THREE, dtype=torch.float64)
    sharpness = eq.TaskSharpness(**options) if options else None
    losses = all_tasks(model, F.cross_entropy)
    step = eq.Step(model, losses, sgd(model, 0.0), weighting, aggregator, sharpness)
    torch.manual_seed(2)
    report = step(inputs, targets)

    def losses_of() -> dict[str, Tensor]:
        z = plain.trunk(inputs)
        return {t: F.cross_entropy(plain.heads[t](z), targets[t]) for t in THREE}

    torch.manual_seed(2)
    found = reference_step(
        losses_of,
        plain.parameters(),
        list(plain.trunk.parameters()),
        {t: list(plain.heads[t].parameters()) for t in THREE},
        aggregator,
        type(weighting)(3) if isinstance(weighting, eq.UW) else type(weighting)(),
        modules=[plain],
        **options,
    )
    ours, theirs = ({n: p.grad for n, p in m.named_parameters()} for m in (model, plain))
    assert apart(ours, theirs) < 1e-9
    assert torch.allclose(report.factors, found.factors, rtol=1e-12)
    if report.gram is not None:
        assert torch.allclose(report.gram, found.gram, rtol=1e-10)
    flat = found.sam if not options.get("decompose", True) else None
    if options and flat is None:
        flat = found.sam - found.rows
    if flat is not None:
        assert torch.allclose(report.flat_gram, flat @ flat.T, rtol=1e-8)
    assert report.direction_norm == pytest.approx(float(found.direction.norm()), rel=1e-9)
