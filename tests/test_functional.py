"""backward(): the functional form."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Counted, differences, linear_model, regression_batch, regression_step
from torch import Tensor, nn

import equipoise as eq

AGGREGATORS = {
    "sum": eq.Sum,
    "mean": eq.Mean,
    "mgda": eq.MGDA,
    "mgda(loss+)": lambda: eq.MGDA(normalize="loss+"),
    "cagrad": eq.CAGrad,
    "imtl": eq.IMTLG,
    "pcgrad": lambda: eq.PCGrad(generator=torch.Generator().manual_seed(5)),
    "callable": lambda: lambda rows: rows.sum(0) * rows.abs().mean(0),
}


def grads(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def losses_of(model: eq.SharedTrunk, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    inputs, targets = regression_batch(model.tasks, seed)
    features = model.trunk(inputs)
    found = {t: F.mse_loss(model.head(t, features), targets[t]) for t in model.tasks}
    return found, features


def difference(a: dict[str, Tensor | None], b: dict[str, Tensor | None]) -> float:
    assert {k for k, v in a.items() if v is None} == {k for k, v in b.items() if v is None}
    return max(
        ((v - b[k]).norm() / b[k].norm().clamp_min(1e-300)).item()
        for k, v in a.items()
        if v is not None
    )


@pytest.mark.parametrize("name", AGGREGATORS)
@pytest.mark.parametrize("level", ["parameters", "features"])
def test_same_gradients_as_a_step(name: str, level: str) -> None:
    if name == "callable" and level == "features":
        pytest.skip("refused, see below")
    tasks = ("a", "b", "c")
    step = regression_step(None, AGGREGATORS[name](), tasks, level=level)
    model = linear_model(tasks)
    losses, features = losses_of(model)
    given = features if level == "features" else None
    result = eq.backward(losses, model.shared_parameters(), AGGREGATORS[name](), given)
    report = step(*regression_batch(tasks))
    assert difference(grads(model), grads(step.model)) < 1e-10
    if report.gram is not None:
        assert torch.allclose(result.gram, report.gram, rtol=1e-10)
    if name == "callable":
        assert result.coefficients is None
    else:
        assert torch.allclose(result.coefficients, report.coefficients, rtol=1e-8)


def test_sum_is_plain_backward() -> None:
    ours, plain = linear_model(), linear_model()
    eq.backward(losses_of(ours)[0], ours.trunk.parameters(), eq.Sum())
    sum(losses_of(plain)[0].values()).backward()
    assert difference(grads(ours), grads(plain)) < 1e-12


def test_gradients_are_added_to_what_is_there() -> None:
    model, other = linear_model(), linear_model()
    eq.backward(losses_of(model, 0)[0], model.trunk.parameters(), eq.MGDA())
    first = {k: v.clone() for k, v in grads(model).items()}
    eq.backward(losses_of(model, 1)[0], model.trunk.parameters(), eq.MGDA())
    eq.backward(losses_of(other, 1)[0], other.trunk.parameters(), eq.MGDA())
    expected = {k: first[k] + v for k, v in grads(other).items()}
    assert difference(grads(model), expected) < 1e-12


@pytest.mark.parametrize(
    "form", [dict, lambda d: list(d.values()), lambda d: torch.stack(list(d.values()))]
)
def test_losses_as_dict_sequence_and_tensor(form: Callable) -> None:
    model, other = linear_model(), linear_model()
    eq.backward(form(losses_of(model)[0]), model.trunk.parameters(), eq.CAGrad())
    eq.backward(losses_of(other)[0], other.trunk.parameters(), eq.CAGrad())
    assert differences(grads(model), grads(other)) == []


@pytest.mark.parametrize("level", ["parameters", "features"])
def test_frozen_and_unreached_parameters_keep_no_gradient(level: str) -> None:
    model = linear_model()
    model.trunk[0].requires_grad_(False)
    model.heads["left"][0].bias.requires_grad_(False)
    unreached = nn.Linear(2, 2)
    losses, features = losses_of(model)
    shared = [*model.trunk.parameters(), *unreached.parameters()]
    given = features if level == "features" else None
    eq.backward(losses, shared, eq.MGDA(), given)
    assert unreached.weight.grad is None
    without = {name for name, grad in grads(model).items() if grad is None}
    assert without == {"trunk.0.weight", "trunk.0.bias", "heads.left.0.bias"}


@pytest.mark.parametrize("kind", ["tuple", "dict", "nested"])
def test_features_in_any_form(kind: str) -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(3, 2).double(), nn.Linear(3, 4).double()
    head, other = nn.Linear(2, 1).double(), nn.Linear(4, 1).double()
    x = torch.randn(6, 3, dtype=torch.float64)

    def run() -> tuple[list[Tensor], Any]:
        y, z = first(x).tanh(), second(x).tanh()
        losses = [head(y).square().mean() + z.mean(), other(z).exp().mean()]
        if kind == "tuple":
            return losses, (y, z)
        if kind == "dict":
            return losses, {"y": y, "z": z, "ids": torch.arange(3), "note": "text"}
        return losses, [{"y": y}, (z, None)]

    shared = [*first.parameters(), *second.parameters()]
    losses, features = run()
    result = eq.backward(losses, shared, eq.MGDA(), features)
    got = [p.grad for p in shared]

    losses, _ = run()
    y, z = first(x).tanh(), second(x).tanh()
    flat = []
    for loss in (head(y).square().mean() + z.mean(), other(z).exp().mean()):
        parts = torch.autograd.grad(loss, (y, z), retain_graph=True, allow_unused=True)
        parts = [
            torch.zeros_like(v) if g is None else g for g, v in zip(parts, (y, z), strict=True)
        ]
        flat.append(torch.cat([g.reshape(-1) for g in parts]))
    gram = torch.stack(flat) @ torch.stack(flat).T
    assert torch.allclose(result.gram, gram, rtol=1e-12)
    w = eq.MGDA().coefficients(gram)
    expected = torch.autograd.grad(w[0] * losses[0] + w[1] * losses[1], shared)
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-10)


@pytest.mark.parametrize("level", ["parameters", "features"])
def test_a_head_is_passed_once(level: str) -> None:
    model = linear_model()
    trunk = model.trunk = Counted(model.trunk)
    for task in model.tasks:
        model.heads[task] = Counted(model.heads[task])
    losses, features = losses_of(model)
    given = features if level == "features" else None
    eq.backward(losses, model.trunk.parameters(), eq.MGDA(), given)
    assert trunk.counts() == (1, 1 if given is not None else 2)
    assert [head.counts() for head in model.heads.values()] == [(1, 1), (1, 1)]


def test_features_that_follow_from_each_other() -> None:
    torch.manual_seed(0)
    first, second, head = (nn.Linear(3, 3).double() for _ in range(3))
    x = torch.randn(6, 3, dtype=torch.float64)

    def run() -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
        fine = first(x).tanh()
        coarse = second(fine).tanh()
        return [head(coarse).square().mean(), (head(coarse) + fine).exp().mean()], (fine, coarse)

    losses, features = run()
    with pytest.raises(eq.EquipoiseError, match="computed from another"):
        eq.backward(losses, first.parameters(), eq.Sum(), features)
    assert first.weight.grad is None
    eq.backward(losses, first.parameters(), eq.Sum(), features[0])  # the one that comes first
    got, first.weight.grad = first.weight.grad, None
    sum(run()[0]).backward()
    assert torch.allclose(got, first.weight.grad, rtol=1e-10)


def test_half_precision_parameters() -> None:
    model = linear_model(dtype=torch.bfloat16)
    inputs, targets = regression_batch(dtype=torch.bfloat16)
    outputs = model(inputs)
    losses = {t: F.mse_loss(outputs[t].float(), targets[t].float()) for t in model.tasks}
    eq.backward(losses, model.trunk.parameters(), eq.MGDA())
    assert {p.grad.dtype for p in model.parameters()} == {torch.bfloat16}


# ------------------------------------------------------------------------------------ errors


class BadGradient(torch.autograd.Function):
    """Identity with an infinite gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * torch.inf


def refused(
    change: Callable, error: type[Exception], words: str, level: str = "parameters"
) -> None:
    """Check that `change` of losses, features and aggregator is refused and no .grad changed."""
    model = linear_model(("depth", "normals"))
    eq.backward(losses_of(model)[0], model.trunk.parameters(), eq.Sum())
    before = {k: v.clone() for k, v in grads(model).items()}
    losses, features = losses_of(model)
    given = {"losses": losses, "features": features if level == "features" else None,
             "aggregator": eq.MGDA(), "shared": model.shared_parameters()}  # fmt: skip
    with pytest.raises(error, match=words):
        eq.backward(**given | change(model, losses))
    assert differences(before, grads(model)) == []


def replaced(new: Callable[[Tensor], Any]) -> Callable:
    return lambda model, losses: {"losses": losses | {"normals": new(losses["normals"])}}


@pytest.mark.parametrize("level", ["parameters", "features"])
@pytest.mark.parametrize(
    ("new", "error", "words"),
    [
        (lambda loss: loss * torch.nan, eq.NonFiniteError, "task 'normals': loss is nan"),
        (lambda loss: loss * torch.inf, eq.NonFiniteError, "task 'normals': loss is inf"),
        (lambda loss: loss.detach(), eq.TaskError, "task 'normals': loss is not connected"),
        (lambda loss: loss.reshape(1), eq.TaskError, r"task 'normals': loss has shape \(1,\)"),
        (lambda loss: 0.5, eq.TaskError, "task 'normals': loss is a float"),
        pytest.param(
            BadGradient.apply,
            eq.NonFiniteError,
            "task 'normals': gradient is not finite",
        ),
    ],
)
def test_bad_losses_are_refused_by_name(
    new: Callable, error: type[Exception], words: str, level: str
) -> None:
    refused(replaced(new), error, words, level)


def test_a_bad_loss_in_a_sequence_is_named_by_its_position() -> None:
    model = linear_model()
    losses, _ = losses_of(model)
    first, second = losses.values()
    with pytest.raises(eq.NonFiniteError, match="task 1: loss is nan"):
        eq.backward([first, second * torch.nan], model.trunk.parameters(), eq.MGDA())


@pytest.mark.parametrize(
    ("losses", "words"), [({}, "losses is empty"), ([], "losses is empty"),
                          (torch.ones(2, 2, requires_grad=True), r"\(2, 2\); it must be \(T,\)")]
)  # fmt: skip
def test_losses_of_the_wrong_form(losses: Any, words: str) -> None:
    refused(lambda model, _: {"losses": losses}, eq.EquipoiseError, words)


@pytest.mark.parametrize("way", ["penalty", "skip", "a part of the features"])
@pytest.mark.parametrize("named", [True, False])
def test_ways_around_the_features_are_refused(way: str, named: bool) -> None:
    model = linear_model(("depth", "normals"))
    inputs, targets = regression_batch(model.tasks)
    first = model.trunk[0](inputs)
    features = model.trunk[1:](first)
    losses = {t: F.mse_loss(model.head(t, features), targets[t]) for t in model.tasks}
    other = {
        "penalty": model.trunk[0].weight.square().sum(),
        "skip": first.mean(),
        "a part of the features": (features * 1).mean(),
    }[way]
    losses["normals"] = losses["normals"] + other
    given = features * 2 if way == "a part of the features" else features
    name = "'depth'" if way == "a part of the features" else "'normals'"
    task = name if named else {"'depth'": "0", "'normals'": "1"}[name]
    with pytest.raises(eq.TaskError, match=rf"task {task}: loss reaches .* without passing"):
        eq.backward(
            losses if named else list(losses.values()), model.shared_parameters(), eq.MGDA(), given
        )
    assert all(p.grad is None for p in model.parameters())


def test_a_gradient_of_a_head_that_is_not_finite() -> None:
    def change(model: eq.SharedTrunk, losses: dict[str, Tensor]) -> dict:
        bias = model.heads["normals"][-1].bias
        return {"losses": losses | {"normals": losses["normals"] + BadGradient.apply(bias).sum()}}

    refused(change, eq.EquipoiseError, "not finite")


@pytest.mark.parametrize(
    ("returned", "words"), [(lambda rows: rows, "must return"),
                            (lambda rows: rows.sum(0) * torch.nan, "NaN or infinity")]
)  # fmt: skip
def test_what_a_callable_may_not_return(returned: Callable, words: str) -> None:
    refused(lambda model, losses: {"aggregator": returned}, eq.EquipoiseError, words)


def test_a_callable_at_the_feature_level_is_refused() -> None:
    change = {"aggregator": lambda rows: rows.sum(0)}
    refused(lambda model, losses: change, eq.CombinationError, "features and function", "features")
