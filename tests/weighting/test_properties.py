"""What every weighting promises: detached weights, their sum, absent tasks, complete state."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equipoise.errors import TaskError
from equipoise.weighting import DWA, DWASI, EW, RLW, RLWSI, SI, UW, IGBv1, IGBv2

TASKS = 4
Make = Callable[[], torch.nn.Module]

MAKERS: dict[str, Make] = {
    "ew": EW,
    "si": SI,
    "si(cap)": lambda: SI(cap=1.5),
    "rlw": RLW,
    "dwa": lambda: DWA(steps_per_epoch=2),
    "uw": lambda: UW(n_tasks=TASKS),
    "igbv1": lambda: IGBv1(steps_per_epoch=2),
    "igbv1(cap)": lambda: IGBv1(steps_per_epoch=2, cap=1.5),
    "rlw-si": RLWSI,
    "dwa-si": lambda: DWASI(steps_per_epoch=2),
    "igbv2": lambda: IGBv2(steps_per_epoch=1, n_tasks=TASKS),
    "igbv2(learning)": lambda: IGBv2(
        1,
        TASKS,
        cap=1.5,
        learn_epoch=3,
        use_epoch=3,
        update_every=2,
        gradient_steps=2,
        batch_size=4,
        width=4,
        buffer_size=5,
    ),
}
every = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
balanced = pytest.mark.parametrize(
    "make",
    [MAKERS[name] for name in ("ew", "si", "rlw", "dwa", "igbv1", "rlw-si", "dwa-si", "igbv2")],
)
LOSSES = st.lists(st.floats(1e-3, 1e3), min_size=TASKS, max_size=TASKS)
WARM_UP = torch.tensor(
    [[1.0, 2.0, 3.0, 0.5], [2.0, 1.0, 4.0, 0.25], [1.5, 0.5, 5.0, 1.0], [0.5, 0.7, 2.0, 0.125]],
    dtype=torch.float64,
)


def warm(make: Make) -> torch.nn.Module:
    """Give a weighting past its first two epochs, so that its weights are not all 1."""
    weighting = make()
    for losses in WARM_UP:
        weighting(losses)
    if isinstance(weighting, UW):
        with torch.no_grad():
            weighting.log_variances.copy_(torch.tensor([0.5, -1.0, 2.0, 0.0]))
    return weighting


def fresh_losses() -> torch.Tensor:
    """Give losses that ask for a gradient."""
    return torch.tensor([0.7, 2.5, 1.0, 3.0], dtype=torch.float64, requires_grad=True)


@every
@pytest.mark.parametrize("prepare", [warm, lambda make: make()], ids=["later", "first call"])
def test_an_element_depends_on_its_own_loss_alone(
    make: Make, prepare: Callable[[Make], torch.nn.Module]
) -> None:
    weighting, losses = prepare(make), fresh_losses()
    weighted = weighting(losses)
    rows = [torch.autograd.grad(entry, losses, retain_graph=True)[0] for entry in weighted]
    jacobian = torch.stack(rows)
    assert torch.equal(jacobian, torch.diag(jacobian.diagonal()))
    values = losses.detach()
    factor = weighting.weights / values if isinstance(weighting, SI) else weighting.weights
    np.testing.assert_allclose(jacobian.diagonal().numpy(), factor.numpy(), rtol=1e-12)
    assert (factor > 0).all()


@every
def test_weights_are_numbers(make: Make) -> None:
    weighting = warm(make)
    weighting(fresh_losses())
    assert weighting.weights.shape == (TASKS,)
    assert not weighting.weights.requires_grad
    assert torch.isfinite(weighting.weights).all()


@every
def test_state_holds_no_graph(make: Make) -> None:
    weighting = make()
    for _ in range(5):
        weighting(fresh_losses())
    learned = {name for name, _ in weighting.named_parameters()}
    graphs = [
        key
        for key, value in weighting.state_dict(keep_vars=True).items()
        if key not in learned and isinstance(value, torch.Tensor) and value.requires_grad
    ]
    assert not graphs


@given(LOSSES)
@balanced
def test_weights_sum_to_the_number_of_tasks(make: Make, losses: list[float]) -> None:
    weighting = warm(make)
    weighting(torch.tensor(losses, dtype=torch.float64))
    assert weighting.weights.sum().item() == pytest.approx(TASKS, rel=1e-6)
    assert (weighting.weights >= 0).all()


@given(LOSSES, st.permutations(range(TASKS)))
@pytest.mark.parametrize("name", ["ew", "si", "dwa", "igbv1", "dwa-si"])
def test_permuting_the_tasks_permutes_the_weights(
    name: str, losses: list[float], order: list[int]
) -> None:
    straight, permuted = MAKERS[name](), MAKERS[name]()
    for batch in [*WARM_UP, torch.tensor(losses, dtype=torch.float64)]:
        expected = straight(batch)[order]
        np.testing.assert_allclose(permuted(batch[order]).numpy(), expected.numpy(), rtol=1e-12)
    assert torch.allclose(permuted.weights, straight.weights[order], rtol=1e-12)


@given(st.floats(1e-6, 1e6))
@pytest.mark.parametrize("name", ["si", "dwa", "igbv1", "dwa-si"])
def test_the_unit_of_a_loss_does_not_matter(name: str, unit: float) -> None:
    # L -> c L for one task: DWA and IGBv1 see ratios only, SI subtracts a constant.
    units = torch.tensor([1.0, unit, 1.0, 1.0], dtype=torch.float64)
    plain, scaled = MAKERS[name](), MAKERS[name]()
    for batch in WARM_UP:
        plain(batch)
        scaled(units * batch)
    losses, others = fresh_losses(), fresh_losses()
    expected = torch.autograd.grad(plain(losses).sum(), losses)[0]
    found = torch.autograd.grad(scaled(units * others).sum(), others)[0]
    assert torch.allclose(scaled.weights, plain.weights, rtol=1e-9)
    if name != "dwa":  # the gradient itself is scale-invariant
        assert torch.allclose(found, expected, rtol=1e-9)


@given(LOSSES)
def test_igbv1_weighs_the_least_improved_task_most(losses: list[float]) -> None:
    weighting = warm(MAKERS["igbv1"])
    batch = torch.tensor(losses, dtype=torch.float64)
    weighting(batch)
    ratios = batch / WARM_UP[2:].mean(dim=0)
    assert weighting.weights[ratios.argmax()] == weighting.weights.max()
    assert weighting.weights[ratios.argmin()] == weighting.weights.min()


@pytest.mark.parametrize("name", ["ew", "si", "si(cap)", "dwa", "uw", "igbv1"])
def test_float32_losses_give_the_float64_weights(name: str) -> None:
    exact, single = warm(MAKERS[name]), MAKERS[name]()
    for batch in WARM_UP:
        assert single(batch.float()).dtype == torch.float32
    single.load_state_dict(exact.state_dict())
    losses = fresh_losses()
    expected = exact(losses)
    found = single(losses.detach().float())
    np.testing.assert_allclose(found.detach().numpy(), expected.detach().numpy(), rtol=1e-5)
    np.testing.assert_allclose(single.weights.numpy(), exact.weights.numpy(), rtol=1e-5)


@every
@pytest.mark.parametrize("done", range(7))
def test_state_continues_bit_for_bit(make: Make, done: int) -> None:
    # Saved in the middle of an epoch, at its end, before, in and after the epoch of the base.
    draw = torch.Generator().manual_seed(9)
    batches = torch.rand(14, TASKS, generator=draw) + 0.1
    weighting = make()
    for batch in batches[:done]:
        weighting(batch)
    state = {  # as a file would hold it: nothing shared with the weighting that goes on
        key: value.clone() if isinstance(value, torch.Tensor) else value
        for key, value in weighting.state_dict().items()
    }
    following = [(weighting(batch), weighting.weights.clone()) for batch in batches[done:]]
    loaded = make()
    loaded.load_state_dict(state)
    for batch, (weighted, weights) in zip(batches[done:], following, strict=True):
        assert torch.equal(loaded(batch), weighted)
        assert torch.equal(loaded.weights, weights)


@every
def test_state_loads_into_one_that_was_used(make: Make) -> None:
    weighting, other = warm(make), make()
    other(torch.ones(TASKS))
    other.load_state_dict(weighting.state_dict())
    batch = torch.tensor([0.5, 2.0, 0.1, 3.0], dtype=torch.float64)
    assert torch.equal(other(batch), weighting(batch))


# ------------------------------------------------------------------------------- absent tasks


PRESENT = torch.tensor([True, False, True, True])
ABSENT = torch.tensor([0.7, float("nan"), 1.0, 3.0], dtype=torch.float64)


@every
@pytest.mark.parametrize("value", [float("nan"), -1.0, 0.0, float("inf")])
def test_an_absent_loss_may_hold_anything(make: Make, value: float) -> None:
    torch.manual_seed(0)
    weighting = warm(make)
    losses = ABSENT.clone()
    losses[1] = value
    losses.requires_grad_()
    weighted = weighting(losses, present=PRESENT)
    assert weighted[1] == 0
    assert weighting.weights[1] == 0
    assert torch.isfinite(weighted).all()
    weighted.sum().backward()
    assert losses.grad[1] == 0
    assert torch.isfinite(losses.grad).all()
    assert (losses.grad[PRESENT] > 0).all()


@balanced
def test_weights_sum_to_the_number_of_present_tasks(make: Make) -> None:
    weighting = warm(make)
    weighting(ABSENT, present=PRESENT)
    assert weighting.weights.sum().item() == pytest.approx(3, rel=1e-6)


@every
def test_all_present_is_the_same_as_no_mask(make: Make) -> None:
    torch.manual_seed(0)
    plain = warm(make)
    torch.manual_seed(0)
    masked = warm(make)
    expected = plain(fresh_losses())
    found = masked(fresh_losses(), present=torch.ones(TASKS, dtype=torch.bool))
    assert torch.equal(found, expected)


def test_uw_does_not_move_an_absent_task() -> None:
    weighting = UW(n_tasks=TASKS)
    weighting(ABSENT, present=PRESENT).sum().backward()
    assert weighting.log_variances.grad[1] == 0
    assert (weighting.log_variances.grad[PRESENT][[0, 2]] != 0).all()


def test_igbv1_takes_its_base_from_the_batches_with_the_task() -> None:
    weighting = IGBv1(steps_per_epoch=2)
    weighting(torch.tensor([1.0, 1.0], dtype=torch.float64))
    weighting(torch.tensor([1.0, 1.0], dtype=torch.float64))
    weighting(torch.tensor([2.0, 8.0], dtype=torch.float64))
    with_one = torch.tensor([True, False])
    weighting(torch.tensor([4.0, float("nan")], dtype=torch.float64), present=with_one)
    weighting(torch.tensor([3.0, 4.0], dtype=torch.float64))  # bases 3 and 8: ratios 1 and 1/2
    first = 2 / (1 + math.exp(-0.5))
    np.testing.assert_allclose(weighting.weights.numpy(), [first, 2 - first], rtol=1e-12)


def test_dwa_takes_its_means_from_the_batches_with_the_task() -> None:
    weighting = DWA(steps_per_epoch=2, temperature=1.0)
    nothing = float("nan")
    with_one = torch.tensor([True, False])
    weighting(torch.tensor([2.0, 4.0], dtype=torch.float64))
    weighting(torch.tensor([2.0, nothing], dtype=torch.float64), present=with_one)
    weighting(torch.tensor([2.0, nothing], dtype=torch.float64), present=with_one)
    weighting(torch.tensor([2.0, 2.0], dtype=torch.float64))
    weighting(torch.tensor([1.0, 1.0], dtype=torch.float64))  # speeds 2/2 and 2/4
    first = 2 / (1 + math.exp(-0.5))
    np.testing.assert_allclose(weighting.weights.numpy(), [first, 2 - first], rtol=1e-12)


@pytest.mark.parametrize("name", ["dwa", "igbv1"])
def test_a_task_that_never_came_does_not_spoil_the_others(name: str) -> None:
    weighting = MAKERS[name]()
    for losses in WARM_UP:
        weighting(losses, present=PRESENT)
    weighted = weighting(fresh_losses())  # now it comes, with nothing to compare it with
    assert torch.isfinite(weighted).all()
    assert torch.isfinite(weighting.weights).all()
    assert (weighting.weights > 0).all()


# --------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("name", ["si", "igbv1", "igbv1(cap)"])
@pytest.mark.parametrize("done", [0, 1, 3, 4])
def test_a_refused_loss_changes_nothing(name: str, done: int) -> None:
    weighting = MAKERS[name]()
    for losses in WARM_UP[:done]:
        weighting(losses)
    before = {key: value.clone() for key, value in weighting.state_dict().items()}
    with pytest.raises(TaskError):
        weighting(torch.tensor([1.0, -2.0, 1.0, 1.0], dtype=torch.float64))
    after = weighting.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
