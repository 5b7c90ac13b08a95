"""IGBv1 to its edges, and RLW and DWA on the scale-invariant objective."""

from __future__ import annotations

import io
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import weighting as reference

import equipoise as eq
from equipoise.weighting import DWA, DWASI, RLW, RLWSI, SI, IGBv1


def trace(n: int, n_tasks: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.1 + 3 * torch.rand(n, n_tasks, generator=generator, dtype=torch.float64)


# -------------------------------------------------------------------------------------- IGBv1


def literal_igbv1(
    batches: list[tuple[list[float], list[bool]]], steps_per_epoch: int
) -> list[list[float]]:
    """The weights of each batch, from the list of all batches (losses, present); eq. 3."""
    second = batches[steps_per_epoch : 2 * steps_per_epoch]
    weights = []
    for c, (losses, present) in enumerate(batches):
        if c < 2 * steps_per_epoch:
            weights.append([float(here) for here in present])
            continue
        ratios = {}
        for i in (i for i, here in enumerate(present) if here):
            seen = [values[i] for values, here in second if here[i]]
            if not seen:
                ratios[i] = 1.0
            else:
                base = math.fsum(seen) / len(seen)
                ratios[i] = losses[i] / base if base > 1e-12 else 0.0
        shares = dict(zip(ratios, reference.softmax(list(ratios.values())), strict=True))
        weights.append([len(ratios) * shares.get(i, 0.0) for i in range(len(losses))])
    return weights


@given(st.data())
def test_igbv1_with_tasks_that_come_and_go(data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, 3))
    n_tasks = data.draw(st.integers(2, 4))
    some = st.lists(st.booleans(), min_size=n_tasks, max_size=n_tasks).filter(any)
    loss = st.floats(1e-3, 10) | st.just(0.0)
    values = st.lists(loss, min_size=n_tasks, max_size=n_tasks)
    batches = data.draw(st.lists(st.tuples(values, some), min_size=1, max_size=10))
    weighting = IGBv1(steps)
    for (losses, present), expected in zip(batches, literal_igbv1(batches, steps), strict=True):
        given_losses = torch.tensor(losses, dtype=torch.float64)
        given_losses[~torch.tensor(present)] = torch.nan
        weighted = weighting(given_losses, torch.tensor(present))
        np.testing.assert_allclose(weighting.weights.numpy(), expected, rtol=1e-9, atol=1e-12)
        assert weighted.isfinite().all()


def test_igbv1_base_is_that_of_the_batches_that_had_the_task() -> None:
    weighting = IGBv1(steps_per_epoch=3)
    both, first = torch.tensor([True, True]), torch.tensor([True, False])
    for _ in range(3):
        weighting(torch.tensor([5.0, 5.0]), both)
    for losses, present in (
        ([1.0, 8.0], both),
        ([2.0, torch.nan], first),
        ([3.0, torch.nan], first),
    ):
        weighting(torch.tensor(losses), present)
    assert weighting.base.value().tolist() == [2, 8]


@pytest.mark.parametrize("done", range(0, 12))
def test_igbv1_goes_on_with_the_base_that_it_had(done: int) -> None:
    # Epochs of three: stopped before, in and after the epoch of the base, and between epochs.
    batches = trace(14)
    first = IGBv1(3, cap=0.8)
    for batch in batches[:done]:
        first(batch)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = IGBv1(3, cap=0.8)
    second.load_state_dict(torch.load(file, weights_only=True))
    for batch in batches[done:]:
        assert torch.equal(first(batch), second(batch))
        assert torch.equal(first.weights, second.weights)
    assert int(second.steps) == 14
    if done:
        assert torch.equal(second.base.value(), batches[3:6].mean(0))


def test_igbv1_cap_leaves_factors_below_it_alone() -> None:
    free, capped = IGBv1(1), IGBv1(1, cap=1.0)
    for batch in trace(8):
        a, b = (batch.clone().requires_grad_() for _ in range(2))
        factors = torch.autograd.grad(free(a).sum(), a)[0]
        found = torch.autograd.grad(capped(b).sum(), b)[0]
        torch.testing.assert_close(found, factors.clamp(max=1.0))


# ------------------------------------------------------------------------------ RLW-SI, DWA-SI


def test_rlw_si_has_the_draws_of_rlw_and_the_objective_of_si() -> None:
    plain = RLW(torch.Generator().manual_seed(3), normalize_to=1.5)
    ours = RLWSI(torch.Generator().manual_seed(3), normalize_to=1.5)
    for losses in trace(5):
        plain(losses)
        given_losses = losses.clone().requires_grad_()
        weighted = ours(given_losses)
        torch.testing.assert_close(ours.weights, plain.weights)
        torch.testing.assert_close(weighted, plain.weights * losses.log())
        factors = torch.autograd.grad(weighted.sum(), given_losses)[0]
        torch.testing.assert_close(factors, plain.weights / losses)


def test_dwa_si_known_answer() -> None:
    weighting = DWASI(steps_per_epoch=1)
    for losses in ([2.0, 2.0], [1.0, 2.0]):
        weighting(torch.tensor(losses, dtype=torch.float64))
        assert weighting.weights.tolist() == [1, 1]
    weighted = weighting(torch.tensor([0.5, 4.0], dtype=torch.float64))
    expected = [0.875647 * math.log(0.5), 1.124353 * math.log(4)]
    assert weighted.tolist() == pytest.approx(expected, abs=2e-6)


def test_dwa_si_has_the_weights_of_dwa() -> None:
    plain, ours = DWA(2, temperature=0.7), DWASI(2, temperature=0.7)
    for losses in trace(9):
        plain(losses)
        weighted = ours(losses)
        torch.testing.assert_close(ours.weights, plain.weights)
        torch.testing.assert_close(weighted, plain.weights * losses.log())


@pytest.mark.parametrize("make", [RLWSI, lambda: DWASI(1)])
def test_they_want_positive_losses(make: type) -> None:
    with pytest.raises(eq.TaskError, match="needs positive losses"):
        make()(torch.tensor([1.0, -1.0]))
    losses = torch.tensor([0.0, 1.0], requires_grad=True)
    weighted = make()(losses)
    assert weighted.isfinite().all()
    assert torch.autograd.grad(weighted.sum(), losses)[0][0] == 0


@pytest.mark.parametrize("make", [RLWSI, lambda **o: DWASI(1, **o)])
def test_they_take_a_cap(make: type) -> None:
    losses = torch.tensor([1e-3, 1.0, 2.0], requires_grad=True)
    factors = torch.autograd.grad(make(cap=0.5)(losses).sum(), losses)[0]
    assert factors[0].item() == pytest.approx(0.5)
    with pytest.raises(ValueError, match="cap is 0.0"):
        make(cap=0.0)


def test_recipes_name_them() -> None:
    for text, kind, parent in (
        ("rlw-si(cap=9.0)", RLWSI, RLW),
        ("dwa-si(temperature=1.0)", DWASI, DWA),
    ):
        recipe = eq.Recipe.parse(f"{text}+mgda")
        assert str(recipe) == f"{text}+mgda"
        built = recipe.weighting.build(steps_per_epoch=3)
        assert type(built) is kind
        assert isinstance(built, parent)
        assert isinstance(built, SI)


@pytest.mark.parametrize("text", ["uw-si", "UWSI", "uw+si", "si+uw", "si+mgda+uw", "uw-si+cagrad"])
def test_uw_si_is_refused_with_the_reason(text: str) -> None:
    # Both kinds of error are ValueErrors: one name that is none, two answers to one question.
    with pytest.raises(ValueError, match=re.escape(repr(text))) as caught:
        eq.Recipe.parse(text)
    assert "goes to minus infinity with s. Use si" in str(caught.value)
    assert isinstance(caught.value, eq.EquipoiseError)


@pytest.mark.parametrize("text", ["rlw+si", "si+rlw", "dwa+si+cagrad"])
def test_two_weightings_that_exist_as_one(text: str) -> None:
    meant = "dwa-si" if "dwa" in text else "rlw-si"
    with pytest.raises(eq.CombinationError, match=f"keep one, or use {meant}"):
        eq.Recipe.parse(text)


def test_why_uw_si_is_refused() -> None:
    # The reason itself: for a loss below 1 the objective falls without end in s.
    loss = 0.5
    values = [(math.exp(-s) * math.log(loss) + s) / 2 for s in (0, -2, -4, -8)]
    assert all(b < a for a, b in zip(values, values[1:], strict=False))
    assert values[-1] < -1000
