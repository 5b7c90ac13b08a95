"""Loss balancing beside gradient balancing: whose heads are multiplied by what, and what then
cannot matter.

Multiplying the loss of task i by c_i multiplies its gradient: exact Nash-MTL undoes that to the
last digit, IMTL-G and EDM but for the length, the others do not.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import THREE, all_tasks, linear_model, parameters_of, regression_batch, sgd
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import equipoise as eq

IGB = (
    eq.SI,
    lambda: eq.IGBv1(1),
    lambda: eq.IGBv2(1, 3, torch.Generator().manual_seed(0), use_epoch=3),
)


def updates(
    weighting: Any, aggregator: Any, heads: str = "own", **options: Any
) -> dict[str, Tensor]:
    """Give `.grad` of all parameters after a step in the third epoch; all start alike."""
    model = linear_model(THREE)
    step = eq.Step(
        model, all_tasks(model, F.mse_loss), sgd(model, lr=0.0), weighting, aggregator,
        heads=heads, **options,
    )  # fmt: skip
    for k in range(3):
        report = step(*regression_batch(THREE, seed=k))
    if not isinstance(weighting, eq.EW):
        assert (report.factors - report.factors[0]).abs().max() > 0.05, "the losses are weighted"
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def parts(found: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The trunk's and the heads' update, each as one vector."""
    return tuple(
        torch.cat([g.flatten() for name, g in found.items() if name.startswith(part)])
        for part in ("trunk", "heads")
    )


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


# ------------------------------------------------------------------------------- invariances


@pytest.mark.parametrize("weighting", IGB)
@pytest.mark.parametrize("level", ["parameters", "features"])
def test_exact_nash_gives_the_same_step_whatever_the_weights(weighting: Any, level: str) -> None:
    nash = eq.NashMTL(max_norm=None)
    trunk, heads = parts(updates(eq.EW(), nash, "weighted", level=level))
    balanced = parts(updates(weighting(), nash, "weighted", level=level))
    assert relative(balanced[0], trunk) < 1e-7
    assert relative(balanced[1], heads) < 1e-7
    apart = parts(updates(weighting(), nash, "own", level=level))
    assert relative(apart[0], trunk) < 1e-7
    assert relative(apart[1], heads) > 0.01, "heads by the loss weights alone do see them"


@pytest.mark.parametrize("weighting", IGB)
@pytest.mark.parametrize("aggregator", [eq.IMTLG, eq.EDM])
def test_bisectors_keep_their_direction_and_change_their_length(
    weighting: Any, aggregator: Any
) -> None:
    plain, balanced = (parts(updates(w, aggregator()))[0] for w in (eq.EW(), weighting()))
    assert relative(balanced / balanced.norm(), plain / plain.norm()) < 1e-7
    assert abs(balanced.norm() / plain.norm() - 1) > 0.01


@pytest.mark.parametrize("weighting", IGB)
@pytest.mark.parametrize(
    "aggregator", [eq.MGDA, eq.PCGrad, eq.CAGrad, eq.AlignedMTL, eq.UPGrad, eq.Sum]
)
def test_the_others_change_their_direction(weighting: Any, aggregator: Any) -> None:
    plain, balanced = (parts(updates(w, aggregator()))[0] for w in (eq.EW(), weighting()))
    assert relative(balanced / balanced.norm(), plain / plain.norm()) > 1e-3


@given(st.lists(st.floats(1e-3, 1e3), min_size=4, max_size=4), st.integers(0, 20))
def test_rows_of_any_scale(scales: list[float], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    scaled = torch.tensor(scales, dtype=torch.float64)[:, None] * rows
    nash = eq.NashMTL(max_norm=None)
    assert relative(nash(scaled), nash(rows)) < 1e-6
    coefficients = nash.coefficients(scaled @ scaled.T) * torch.tensor(scales)
    assert torch.allclose(coefficients, nash.coefficients(rows @ rows.T), rtol=1e-6)
    for aggregator in (eq.IMTLG(), eq.EDM()):
        a, b = aggregator(scaled), aggregator(rows)
        assert relative(a / a.norm(), b / b.norm()) < 1e-6


# -------------------------------------------------------------------------- what heads receive


@pytest.mark.parametrize(
    ("aggregator", "level"),
    [(eq.MGDA(), "parameters"), (eq.CAGrad(), "features"), (eq.IMTLG(), "parameters"),
     (eq.Mean(), "parameters"), (eq.every(3, eq.MGDA()), "parameters")],
)  # fmt: skip
def test_weighted_heads_are_those_of_one_backward(aggregator: Any, level: str) -> None:
    model = linear_model(THREE)
    step = eq.Step(
        model, all_tasks(model, F.mse_loss), sgd(model), eq.SI(), aggregator,
        level=level, heads="weighted",
    )  # fmt: skip
    for k in range(2):
        inputs, targets = regression_batch(THREE, seed=k)
        before = linear_model(THREE)
        before.load_state_dict(parameters_of(model))
        report = step(inputs, targets)
        outputs = before(inputs)
        logs = [F.mse_loss(outputs[task], targets[task]).log() for task in THREE]
        sum(w * log for w, log in zip(report.coefficients, logs, strict=True)).backward()
        for (name, p), expected in zip(
            model.named_parameters(), before.parameters(), strict=True
        ):  # the trunk too, at either level
            assert torch.allclose(p.grad, expected.grad, rtol=1e-9, atol=1e-14), name


def test_absent_tasks_keep_their_heads() -> None:
    model = linear_model(THREE)
    step = eq.Step(
        model, all_tasks(model, F.mse_loss), sgd(model), None, eq.MGDA(), heads="weighted"
    )
    inputs, targets = regression_batch(THREE)
    before = parameters_of(model.heads["b"])
    report = step(inputs, {"a": targets["a"], "c": targets["c"]})
    assert report.coefficients[1] == 0
    assert all(torch.equal(before[n], p) for n, p in model.heads["b"].named_parameters())


def test_with_the_sum_nothing_changes() -> None:
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            updates(eq.SI(), eq.Sum(), "weighted").values(),
            updates(eq.SI(), eq.Sum(), "own").values(),
            strict=True,
        )
    )


# ----------------------------------------------------------------------------------- refusals


def step_with(aggregator: Any, heads: str = "weighted", **options: Any) -> eq.Step:
    model = linear_model(THREE)
    losses = all_tasks(model, F.mse_loss)
    return eq.Step(model, losses, sgd(model), None, aggregator, heads=heads, **options)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="heads is 'all'; known are 'own' and 'weighted'"):
        step_with(eq.MGDA(), "all")
    with pytest.raises(eq.CombinationError, match="heads='weighted' and GradDrop: .*heads='own'"):
        step_with(eq.GradDrop())
    with pytest.raises(eq.CombinationError, match="heads='weighted' and function"):
        step_with(lambda rows: rows.sum(0))
    with pytest.raises(eq.CombinationError, match="heads='weighted' and TaskSharpness"):
        step_with(eq.MGDA(), sharpness=eq.TaskSharpness())


def test_recipes_name_it() -> None:
    def build(text: str) -> eq.Step:
        model = linear_model(THREE)
        return eq.Recipe.parse(text).build(model, all_tasks(model, F.mse_loss), 0.1, 1)

    assert build("igbv1+mgda").heads == "own"
    step = build("igbv1+mgda(update_every=2, heads=weighted)")
    assert step.heads == "weighted"
    assert step.aggregator.k == 2
    assert build("cagrad-ub(heads=weighted)").heads == "weighted"
    recipe = eq.Recipe.parse("igbv1+nash(max_norm=none, heads=weighted)")
    assert str(recipe) == "igbv1+nash(heads=weighted, max_norm=none)"
    assert eq.Recipe.parse(str(recipe)) == recipe
    assert str(eq.Recipe.parse("mgda(heads=own)")) == "mgda"
    for text in ("graddrop", "f-mgda", "sum", "stl"):
        with pytest.raises(eq.RecipeError, match="has no parameter 'heads'; it takes"):
            eq.Recipe.parse(f"{text}(heads=weighted)")
    with pytest.raises(eq.RecipeError, match="heads is True; it takes 'own' or 'weighted'"):
        eq.Recipe.parse("mgda(heads=true)")
