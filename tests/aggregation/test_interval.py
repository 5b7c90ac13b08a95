"""Every: when the coefficients are computed, what a step in between costs, what it saves."""

import io
from typing import Any

import pytest
import torch
from helpers import Counted, class_batch, class_step, differences, snapshot
from torch import Tensor

import equipoise as eq
from equipoise.aggregation.interval import Every

THREE = ("a", "b", "c")


class Counting(eq.MGDA):
    """MGDA that counts how often it is asked."""

    asked = 0

    def coefficients(
        self, gram: Tensor, losses: Tensor | None = None, *, eps: float = 0.0
    ) -> Tensor:
        self.asked += 1
        return super().coefficients(gram, losses, eps=eps)


def step_with(k: int, tasks: tuple[str, ...] = THREE, **options: Any) -> tuple[eq.Step, Counting]:
    inner = Counting()
    return class_step(aggregator=eq.every(k, inner), tasks=tasks, **options), inner


@pytest.mark.parametrize("level", ["parameters", "features"])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_coefficients_are_computed_each_kth_step(k: int, level: str) -> None:
    step, inner = step_with(k, level=level)
    reports = [step(*class_batch(THREE, seed=i)) for i in range(9)]
    assert inner.asked == -(-9 // k)
    for i, report in enumerate(reports):
        assert (report.gram is None) == (i % k != 0)
        assert torch.equal(report.coefficients, reports[i - i % k].coefficients)
        assert report.coefficients.sum().item() == pytest.approx(1)


def test_each_step_asked_is_a_step_without_it() -> None:
    reports = []
    for aggregator in (eq.CAGrad(), eq.every(1, eq.CAGrad())):
        torch.manual_seed(0)  # of the dropout
        step = class_step(aggregator=aggregator, tasks=THREE)
        reports.append([step(*class_batch(THREE, seed=i)) for i in range(4)])
    assert differences(*reports) == []


def test_a_step_in_between_makes_one_trunk_backward() -> None:
    step, _ = step_with(3)
    step.model.trunk = trunk = Counted(step.model.trunk)
    backwards = []
    for i in range(6):
        before = trunk.backwards
        step(*class_batch(THREE, seed=i))
        backwards.append(trunk.backwards - before)
    assert backwards == [3, 1, 1, 3, 1, 1]


def test_other_tasks_force_new_coefficients() -> None:
    step, inner = step_with(10)
    present = [THREE, THREE, ("a", "b"), ("a", "b"), ("b", "c"), THREE, THREE]
    asked = []
    for i, tasks in enumerate(present):
        inputs, targets = class_batch(THREE, seed=i)
        step(inputs, {task: targets[task] for task in tasks})
        asked.append(inner.asked)
    # Two of the pairs have the same number of tasks, but not the same tasks.
    assert asked == [1, 1, 2, 2, 3, 4, 4]


def test_a_failed_step_does_not_count() -> None:
    step, inner = step_with(2)
    step(*class_batch(THREE, seed=0))
    good = step.losses["b"]
    step.losses["b"] = lambda output, target: good(output, target) * torch.nan
    before = step.aggregator.get_extra_state()
    for _ in range(3):
        with pytest.raises(eq.NonFiniteError):
            step(*class_batch(THREE, seed=1))
    assert step.aggregator.get_extra_state()["age"] == before["age"]
    step.losses["b"] = good
    assert step(*class_batch(THREE, seed=1)).gram is None
    assert step(*class_batch(THREE, seed=2)).gram is not None
    assert inner.asked == 2


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_continues_bit_for_bit(steps: int) -> None:
    def build() -> eq.Step:
        generator = torch.Generator().manual_seed(0)
        return class_step(aggregator=eq.every(3, eq.PCGrad(generator=generator)), tasks=THREE)

    step, fresh = build(), build()
    for i in range(steps):
        step(*class_batch(THREE, seed=i))
    file = io.BytesIO()
    torch.save(step.state_dict(), file)
    file.seek(0)
    more = [class_batch(THREE, seed=i) for i in range(steps, steps + 4)]
    reports = [step(*batch) for batch in more]
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert differences(reports, [fresh(*batch) for batch in more]) == []
    assert differences(snapshot(step), snapshot(fresh)) == []


def test_outside_of_a_step_it_always_asks() -> None:
    aggregator = Every(Counting(), 5)
    rows = torch.eye(2)
    for _ in range(3):
        assert aggregator.known_coefficients(2) is None
        aggregator(rows)
    assert aggregator.aggregator.asked == 3


def test_what_it_takes_over_from_the_aggregator() -> None:
    assert Every(eq.NashMTL(), 2).degree == 0
    assert Every(eq.MGDA(normalize="loss"), 2).needs_losses
    pcgrad = eq.PCGrad()
    assert Every(pcgrad, 2).generator is pcgrad.generator
    assert not hasattr(Every(eq.MGDA(), 2), "generator")


def test_what_cannot_be_wrapped_is_refused() -> None:
    with pytest.raises(ValueError, match="k is 0; it must be a whole number of at least 1"):
        eq.every(0, eq.MGDA())
    with pytest.raises(ValueError, match="k is 2.5"):
        eq.every(2.5, eq.MGDA())
    with pytest.raises(ValueError, match="GradDrop has no coefficients to keep"):
        eq.every(2, eq.GradDrop())


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("cagrad(update_every=10)", "cagrad(update_every=10)"),
        ("si+CAGrad(update_every=10, c=0.5)", "si+cagrad(c=0.5, update_every=10)"),
        ("pcgrad-ub(update_every=2)", "pcgrad-ub(update_every=2)"),
        ("mgda(update_every=1)", "mgda"),
    ],
)
def test_recipes(text: str, canonical: str) -> None:
    recipe = eq.Recipe.parse(text)
    assert str(recipe) == canonical
    assert eq.Recipe.parse(str(recipe)) == recipe
    step = class_step()
    built = recipe.build(step.model, step.losses, 1e-3, 10, seed=0)
    assert isinstance(built.aggregator, Every) == ("every" in canonical)


@pytest.mark.parametrize(
    "text", ["mgda(update_every=0)", "mgda(update_every=2.5)", "sum(update_every=2)"]
)
def test_recipes_that_are_refused(text: str) -> None:
    with pytest.raises(eq.RecipeError):
        eq.Recipe.parse(text)
