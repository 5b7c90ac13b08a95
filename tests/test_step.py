"""Step: the data path against plain autograd, passes, features of any form, frozen parts."""

from collections.abc import Callable
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    THREE,
    TWO,
    Counted,
    all_tasks,
    class_batch,
    class_step,
    differences,
    largest_difference,
    linear_model,
    parameters_of,
    reference_step,
    regression_batch,
    regression_step,
    sgd,
)
from torch import Tensor, nn

import equipoise as eq


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


AGGREGATORS = {
    "sum": eq.Sum,
    "mean": eq.Mean,
    "mgda": eq.MGDA,
    "mgda(l2)": lambda: eq.MGDA(normalize="l2"),
    "cagrad": lambda: eq.CAGrad(c=0.5),
    "imtl": eq.IMTLG,
    "pcgrad": lambda: eq.PCGrad(generator=generator()),
}
WEIGHTINGS = {
    "ew": eq.EW,
    "si": eq.SI,
    "igbv1": lambda: eq.IGBv1(steps_per_epoch=1),
    "uw": lambda: eq.UW(3),
}
OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.01),
}


def report_matches(report: eq.StepReport, expected: dict[str, Tensor]) -> None:
    assert torch.allclose(report.losses, expected["losses"], rtol=1e-9)
    assert report.direction_norm == pytest.approx(expected["direction_norm"].item(), rel=1e-6)
    if report.gram is not None:
        assert torch.allclose(report.gram, expected["gram"], rtol=1e-8)


# -------------------------------------------------------- the data path against plain autograd


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("level", ["parameters", "features"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_equals_a_full_backward_for_each_task(
    aggregator: str, weighting: str, level: str, kind: str
) -> None:
    model = linear_model(THREE)
    plain = deepcopy(model)
    losses = all_tasks(model, F.mse_loss)
    step = eq.Step(
        model,
        losses,
        OPTIMIZERS[kind](model.parameters()),
        WEIGHTINGS[weighting](),
        AGGREGATORS[aggregator](),
        level=level,
    )
    own_weighting, own_aggregator = WEIGHTINGS[weighting](), AGGREGATORS[aggregator]()
    optimizer = OPTIMIZERS[kind](plain.parameters())
    if weighting == "uw":
        group = {"params": [own_weighting.log_variances], "lr": 0.025, "weight_decay": 0.0}
        optimizer.add_param_group(group)
    for k in range(5):
        batch = regression_batch(THREE, seed=k)
        expected = reference_step(
            plain, losses, optimizer, own_weighting, own_aggregator, level, *batch
        )
        report_matches(step(*batch), expected)
    assert largest_difference(parameters_of(model), parameters_of(plain)) < 1e-6
    if weighting == "uw":
        ours, theirs = step.weighting.log_variances, own_weighting.log_variances
        assert torch.allclose(ours, theirs, rtol=1e-5)
        assert theirs.abs().min() > 0.01


@pytest.mark.parametrize("normalize", ["loss", "loss+"])
@pytest.mark.parametrize("level", ["parameters", "features"])
def test_an_aggregator_that_needs_losses_gets_them(normalize: str, level: str) -> None:
    model, plain = linear_model(THREE), linear_model(THREE)
    losses, aggregator = all_tasks(model, F.mse_loss), eq.MGDA(normalize=normalize)
    step = eq.Step(model, losses, sgd(model), None, aggregator, level=level)
    optimizer = sgd(plain)
    for k in range(3):
        batch = regression_batch(THREE, seed=k)
        expected = reference_step(plain, losses, optimizer, eq.EW(), aggregator, level, *batch)
        report_matches(step(*batch), expected)
    assert largest_difference(parameters_of(model), parameters_of(plain)) < 1e-6


def test_any_callables_stand_in_for_stages() -> None:
    def weighting(losses: Tensor) -> Tensor:
        return losses.square() * torch.tensor([1.0, 2.0, 3.0], dtype=losses.dtype)

    def aggregator(rows: Tensor) -> Tensor:
        return rows.sum(0) * rows.abs().mean(0)

    model, plain = linear_model(THREE), linear_model(THREE)
    losses = all_tasks(model, F.mse_loss)
    step = eq.Step(model, losses, sgd(model), weighting, aggregator)
    optimizer = sgd(plain)
    for k in range(3):
        batch = regression_batch(THREE, seed=k)
        args = (plain, losses, optimizer, weighting, aggregator, "parameters", *batch)
        expected = reference_step(*args)
        report = step(*batch)
        report_matches(report, expected)
        assert report.coefficients is None
        assert torch.allclose(report.factors, 2 * report.losses * torch.tensor([1.0, 2, 3]))
    assert largest_difference(parameters_of(model), parameters_of(plain)) < 1e-9


def test_ew_is_plain_training_with_dropout_and_batchnorm() -> None:
    step = class_step()
    plain = deepcopy(step.model)
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-2)
    for k in range(3):
        inputs, targets = class_batch(seed=k)
        torch.manual_seed(k)
        step(inputs, targets)
        torch.manual_seed(k)
        outputs = plain(inputs)
        optimizer.zero_grad()
        sum(F.cross_entropy(outputs[t], targets[t]) for t in TWO).backward()
        optimizer.step()
    assert largest_difference(parameters_of(step.model), parameters_of(plain)) < 1e-3
    buffers = dict(plain.named_buffers())
    for name, buffer in step.model.named_buffers():
        assert torch.allclose(buffer, buffers[name], rtol=1e-4)


def test_separate_trunks_train_as_separate_networks() -> None:
    shared = linear_model()
    model = shared.separated()
    step = eq.Step(model, all_tasks(model, F.mse_loss), sgd(model))
    for k in range(3):
        step(*regression_batch(seed=k))
    for task in TWO:
        alone = eq.SharedTrunk(deepcopy(shared.trunk), {task: deepcopy(shared.heads[task])})
        one = eq.Step(alone, {task: F.mse_loss}, sgd(alone))
        for k in range(3):
            inputs, targets = regression_batch(seed=k)
            one(inputs, {task: targets[task]})
        expected = parameters_of(alone.trunk)
        assert largest_difference(parameters_of(model.trunk.of[task]), expected) < 1e-12


def test_clip_norm_bounds_the_whole_update() -> None:
    free, clipped = regression_step(momentum=0), regression_step(momentum=0, clip_norm=0.01)
    before = parameters_of(free.model)
    batch = regression_batch()
    assert free(*batch).direction_norm == clipped(*batch).direction_norm  # told before clipping

    def moved(step: eq.Step) -> Tensor:
        after = parameters_of(step.model)
        return torch.cat([(after[k] - before[k]).reshape(-1) for k in before])

    long, short = moved(free), moved(clipped)
    assert short.norm().item() == pytest.approx(0.1 * 0.01, rel=1e-3)
    assert torch.allclose(short / short.norm(), long / long.norm(), atol=1e-9)


def test_report() -> None:
    step = regression_step(eq.SI(), eq.MGDA(), THREE)
    report = step(*regression_batch(THREE))
    assert report.tasks == THREE
    for vector in (report.losses, report.weights, report.factors, report.coefficients):
        assert vector.shape == (3,)
        assert vector.dtype == torch.float64
    assert report.weights.tolist() == [1, 1, 1]
    assert torch.allclose(report.factors, 1 / report.losses)
    assert report.coefficients.sum().item() == pytest.approx(1)
    assert report.gram.shape == (3, 3)
    assert torch.allclose(report.cosines.diagonal(), torch.ones(3, dtype=torch.float64))
    w = report.coefficients
    assert report.direction_norm**2 == pytest.approx((w @ report.gram @ w).item())
    assert (report.step_size, report.trials, report.accepted) == (None, 0, True)
    with pytest.raises(AttributeError):
        report.losses = None
    loss_only = regression_step(None, eq.Sum())(*regression_batch())
    assert loss_only.gram is None
    assert loss_only.cosines is None
    assert loss_only.coefficients.tolist() == [1, 1]


# ----------------------------------------------------------------------------- what it costs


@pytest.mark.parametrize(
    ("aggregator", "level", "trunk_backwards"),
    [
        (eq.Sum(), "parameters", 1),
        (eq.Mean(), "parameters", 1),
        (eq.Sum(), "features", 1),
        (eq.MGDA(), "parameters", 3),
        (eq.PCGrad(), "parameters", 3),
        (lambda rows: rows.sum(0), "parameters", 3),
        (eq.MGDA(), "features", 1),
        (eq.CAGrad(), "features", 1),
    ],
)
def test_passes_and_memory(aggregator: Any, level: str, trunk_backwards: int) -> None:
    model = linear_model(THREE)
    trunk = model.trunk = Counted(model.trunk)
    heads = {}
    for task in THREE:
        heads[task] = model.heads[task] = Counted(model.heads[task])
    step = eq.Step(model, all_tasks(model, F.mse_loss), sgd(model), None, aggregator, level=level)
    pointers = set()
    for k in range(3):
        step(*regression_batch(THREE, seed=k))
        assert trunk.counts() == (1, trunk_backwards)
        assert [head.counts() for head in heads.values()] == [(1, 1)] * 3
        if step._rows is not None:
            pointers.add(step._rows.buffer.data_ptr())
    if trunk_backwards == 3:
        assert len(pointers) == 1
        assert step._rows.buffer.shape == (3, sum(p.numel() for p in model.trunk.parameters()))
    else:
        assert step._rows is None
    # An absent task costs nothing.
    inputs, targets = regression_batch(("a", "c"))
    step(inputs, targets)
    assert trunk.counts() == (1, min(trunk_backwards, 2))
    assert [head.counts() for head in heads.values()] == [(1, 1), (0, 0), (1, 1)]


class Watching(nn.Module):
    """A head that keeps the features it was given."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.seen: Tensor | None = None

    def forward(self, features: Tensor) -> Tensor:
        self.seen = features
        return self.head(features)


@pytest.mark.parametrize("aggregator", [eq.Sum(), eq.Mean(), eq.MGDA()])
def test_features_are_never_copied(aggregator: eq.GramAggregator) -> None:
    model = linear_model(THREE)
    for task in THREE:
        model.heads[task] = Watching(model.heads[task])
    step = eq.Step(model, all_tasks(model, F.mse_loss), sgd(model), None, aggregator)
    step(*regression_batch(THREE))
    seen = [model.heads[task].seen for task in THREE]
    assert len({x.data_ptr() for x in seen}) == 1
    # Where all tasks count the same, their gradients add up in one place.
    loss_only = aggregator.known_coefficients(3) is not None
    assert len({id(x) for x in seen}) == (1 if loss_only else 3)


def test_each_weighting_is_called_once_a_step() -> None:
    calls = []

    def weighting(losses: Tensor) -> Tensor:
        calls.append(losses.shape)
        return losses

    for aggregator in (eq.Sum(), eq.MGDA()):
        regression_step(weighting, aggregator)(*regression_batch())
    assert calls == [(2,), (2,)]


# ------------------------------------------------------------------------ features of any form


class Trunk(nn.Module):
    """Returns its two features in the wanted form."""

    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(5, 3)
        self.form = form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.first(x).tanh(), self.second(x).tanh())


class Head(nn.Module):
    """Uses of the features what `pick` chooses."""

    def __init__(self, pick: Callable[[Any], Tensor], width: int) -> None:
        super().__init__()
        self.pick = pick
        self.linear = nn.Linear(width, 1)

    def forward(self, features: Any) -> Tensor:
        return self.linear(self.pick(features))


# form of (y, z); what "both" sees; what "one" sees, which is y alone
FORMS: dict[str, tuple[Callable, Callable, Callable]] = {
    "tensor": (lambda y, z: torch.cat([y, z], 1), lambda f: f, lambda f: f[:, :4]),
    "tuple": (lambda y, z: (y, z), lambda f: torch.cat(f, 1), lambda f: f[0]),
    "list": (lambda y, z: [z, y], lambda f: torch.cat([f[1], f[0]], 1), lambda f: f[1]),
    "dict": (
        lambda y, z: {"y": y, "z": z},
        lambda f: torch.cat([f["y"], f["z"]], 1),
        lambda f: f["y"],
    ),
    "nested": (
        lambda y, z: {"deep": [{"y": y}, (z, "text", None)], "ids": torch.arange(3), "n": 2},
        lambda f: torch.cat([f["deep"][0]["y"], f["deep"][1][0]], 1) * (f["n"] + f["ids"][-1]) / 4,
        lambda f: f["deep"][0]["y"],
    ),
    "same tensor twice": (
        lambda y, z: (y, z, y),
        lambda f: torch.cat([f[0], f[1]], 1) + f[2].sum(1, keepdim=True),
        lambda f: f[2],
    ),
    "one follows from the other": (
        lambda y, z: (y, z * y[:, :3]),
        lambda f: torch.cat(f, 1),
        lambda f: f[0],
    ),
    "a part without gradient": (
        lambda y, z: (y, z, z.detach()),
        lambda f: torch.cat([f[0], f[1] * f[2]], 1),
        lambda f: f[0],
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("recipe", ["sum", "mgda", "mgda-ub"])
def test_features_of_any_form(form: str, recipe: str) -> None:
    made, both, one = FORMS[form]

    def build() -> eq.SharedTrunk:
        torch.manual_seed(0)
        heads = {"both": Head(both, 7), "one": Head(one, 4)}
        return eq.SharedTrunk(Trunk(made), heads).double()

    model, plain = build(), build()
    aggregator = eq.Sum() if recipe == "sum" else eq.MGDA()
    level = "features" if recipe == "mgda-ub" else "parameters"
    losses = all_tasks(model, F.mse_loss)
    step = eq.Step(model, losses, sgd(model), None, aggregator, level=level)
    inputs, targets = regression_batch(("both", "one"))
    report = step(inputs, targets)

    outputs = plain(inputs)
    found = [F.mse_loss(outputs[t], targets[t]) for t in plain.tasks]
    shared = list(plain.trunk.parameters())
    w = report.coefficients
    if recipe == "mgda":
        rows = []
        for loss in found:
            parts = torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True)
            parts = [
                torch.zeros_like(p) if g is None else g for g, p in zip(parts, shared, strict=True)
            ]
            rows.append(torch.cat([g.reshape(-1) for g in parts]))
        gram = torch.stack(rows) @ torch.stack(rows).T
        assert torch.allclose(report.gram, gram, rtol=1e-9)
        assert torch.allclose(w, eq.MGDA().coefficients(gram))
    expected = torch.autograd.grad(w[0] * found[0] + w[1] * found[1], shared, retain_graph=True)
    for p, gradient in zip(model.trunk.parameters(), expected, strict=True):
        assert torch.allclose(p.grad, gradient, rtol=1e-9)
    for task, loss in zip(plain.tasks, found, strict=True):
        own = list(plain.heads[task].parameters())
        expected = torch.autograd.grad(loss, own, retain_graph=True)
        for p, gradient in zip(model.heads[task].parameters(), expected, strict=True):
            assert torch.allclose(p.grad, gradient, rtol=1e-9)


def test_features_that_cannot_be_cut_are_refused_or_trained() -> None:
    trunk = Trunk(lambda y, z: SimpleNamespace(y=y))
    model = eq.SharedTrunk(trunk, {"a": Head(lambda f: f.y, 4)}).double()
    step = eq.Step(model, {"a": F.mse_loss}, sgd(model))
    before = parameters_of(trunk.first)
    try:
        step(*regression_batch(("a",)))
    except eq.EquipoiseError:
        return
    assert differences(before, parameters_of(trunk.first)) != []


def test_heads_that_write_into_their_own_intermediate_results() -> None:
    model = linear_model()
    for task in TWO:
        model.heads[task] = nn.Sequential(
            nn.Linear(6, 4), nn.ReLU(inplace=True), nn.Linear(4, 1)
        ).double()
    plain = deepcopy(model)
    losses = all_tasks(model, F.mse_loss)
    batch = regression_batch()
    eq.Step(model, losses, sgd(model), None, eq.MGDA())(*batch)
    reference_step(plain, losses, sgd(plain), eq.EW(), eq.MGDA(), "parameters", *batch)
    assert largest_difference(parameters_of(model), parameters_of(plain)) < 1e-9


# ------------------------------------------------------------------------------- frozen parts

RECIPES = {
    "sum": (eq.Sum, "parameters"),
    "mgda": (eq.MGDA, "parameters"),
    "mgda-ub": (eq.MGDA, "features"),
    "callable": (lambda: lambda rows: rows.sum(0), "parameters"),
}


def step_of(model: eq.SharedTrunk, recipe: str) -> eq.Step:
    aggregator, level = RECIPES[recipe]
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    losses = all_tasks(model, F.mse_loss)
    return eq.Step(model, losses, optimizer, None, aggregator(), level=level)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "frozen", ["trunk.0", "trunk.2", "trunk", "heads.left", "heads.left.2", "trunk heads.left"]
)
def test_frozen_parts_do_not_move_and_all_else_does(recipe: str, frozen: str) -> None:
    model = linear_model()
    prefixes = tuple(f"{name}." for name in frozen.split())
    for name in frozen.split():
        model.get_submodule(name).requires_grad_(False)
    step = step_of(model, recipe)
    before = parameters_of(model)
    for k in range(2):
        report = step(*regression_batch(seed=k))
    moved = {d.strip("/") for d in differences(before, parameters_of(model))}
    assert moved == {name for name in before if not name.startswith(prefixes)}
    for name, p in model.named_parameters():
        assert (p.grad is None) == name.startswith(prefixes)
    assert report.accepted
    assert (report.direction_norm == 0) == ("trunk" in frozen.split())


@pytest.mark.parametrize("recipe", RECIPES)
def test_frozen_first_layer_gives_the_same_step_as_its_output_for_input(recipe: str) -> None:
    model, plain = linear_model(), linear_model()
    model.trunk[0].requires_grad_(False)
    inputs, targets = regression_batch()
    step_of(model, recipe)(inputs, targets)
    rest = eq.SharedTrunk(plain.trunk[2:], dict(plain.heads.items()))
    with torch.no_grad():
        hidden = plain.trunk[:2](inputs)
    step_of(rest, recipe)(hidden, targets)
    assert largest_difference(parameters_of(model.heads), parameters_of(rest.heads)) < 1e-12
    assert torch.allclose(model.trunk[2].weight, plain.trunk[2].weight, rtol=1e-12)


@pytest.mark.parametrize("recipe", RECIPES)
def test_unfreezing_and_freezing_between_steps(recipe: str) -> None:
    model = linear_model()
    first, second = model.trunk[0], model.trunk[2]
    first.requires_grad_(False)
    step = step_of(model, recipe)
    step(*regression_batch(seed=0))
    kept = parameters_of(first)
    first.requires_grad_(True)
    step(*regression_batch(seed=1))
    assert len(differences(kept, parameters_of(first))) == 2
    second.requires_grad_(False)
    kept = parameters_of(second)
    step(*regression_batch(seed=2))
    assert differences(kept, parameters_of(second)) == []
    assert second.weight.grad is None


class WithSpare(nn.Module):
    """A layer that no task ever reaches beside one that all do."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x).tanh()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("where", ["trunk", "head"])
def test_what_no_task_reaches_is_left_alone(recipe: str, where: str) -> None:
    model = linear_model()
    spared = WithSpare(5, 6) if where == "trunk" else WithSpare(6, 1)
    if where == "trunk":
        model.trunk = spared
    else:
        model.heads["right"] = spared
    model.double()
    step = step_of(model, recipe)
    spare = parameters_of(spared.spare)
    for k in range(3):
        step(*regression_batch(seed=k))
        assert spared.spare.weight.grad is None
        assert spared.used.weight.grad is not None
    assert differences(spare, parameters_of(spared.spare)) == []


def test_a_shared_part_that_only_one_task_reaches() -> None:
    # Its row entry is zero for the other task; it is reached, so it moves.
    model = eq.SharedTrunk(
        Trunk(lambda y, z: (y, z)), {"y": Head(lambda f: f[0], 4), "z": Head(lambda f: f[1], 3)}
    ).double()
    step = eq.Step(model, all_tasks(model, F.mse_loss), sgd(model), None, eq.Mean())
    inputs, targets = regression_batch(("y", "z"))
    before = parameters_of(model.trunk)
    step(inputs, {"y": targets["y"]})
    moved = differences(before, parameters_of(model.trunk))
    assert moved == ["/first.weight", "/first.bias"]
    mgda = eq.Step(model, all_tasks(model, F.mse_loss), sgd(model), None, eq.MGDA())
    report = mgda(inputs, targets)
    assert report.gram[0, 1] == 0
    assert len(differences(before, parameters_of(model.trunk))) == 4


# --------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recipe", RECIPES)
def test_half_precision_networks(half: torch.dtype, recipe: str) -> None:
    model = linear_model(dtype=half)
    step = step_of(model, recipe)
    before = parameters_of(model)
    for k in range(2):
        report = step(*regression_batch(seed=k, dtype=half))
    assert report.losses.dtype == torch.float64
    assert {p.dtype for p in model.parameters()} == {half}
    assert {p.grad.dtype for p in model.parameters()} == {half}
    assert len(differences(before, parameters_of(model))) == len(before)
    if step._rows is not None:
        assert step._rows.buffer.dtype == torch.float32
        # The direction is that of the rows in single precision.
        got = torch.cat([p.grad.reshape(-1) for p in model.trunk.parameters()])
        if report.coefficients is not None:
            wanted = report.coefficients.float() @ step._rows.filled
            assert torch.allclose(got.float(), wanted, rtol=2**-7)


def test_a_head_in_another_precision_than_the_trunk() -> None:
    class Widen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 1).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.double())

    model = linear_model(dtype=torch.float32)
    model.heads["right"] = Widen()
    inputs, targets = regression_batch(dtype=torch.float32)
    targets["right"] = targets["right"].double()
    for recipe in RECIPES:
        report = step_of(model, recipe)(inputs, targets)
        assert report.accepted
    assert model.heads["right"].linear.weight.grad.dtype == torch.float64
    assert model.trunk[0].weight.grad.dtype == torch.float32
