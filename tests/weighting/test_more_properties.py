"""What the further weightings promise: elements, absent tasks, precision, complete state."""

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch

from equipoise.errors import TaskError
from equipoise.weighting import FAMO, GLS, IMTLL, STCH, GradNorm, Weighting
from equipoise.weighting.adam import Adam

TASKS = 4
Make = Callable[[], Weighting]

MAKERS: dict[str, Make] = {
    "imtl-l": lambda: IMTLL(TASKS),
    "gls": GLS,
    "famo": lambda: FAMO(lr=0.2),
    "famo(bounds)": lambda: FAMO(lr=0.2, min_losses=[0.01, 0.02, -1.0, 0.0]),
    "stch": lambda: STCH(mu=0.5, preference=[1, 2, 3, 4]),
    "stch(warm-up)": lambda: STCH(mu=0.5, warmup_epochs=1, steps_per_epoch=2),
    "gradnorm": lambda: GradNorm(lr=0.1),
}
every = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
ALL = torch.ones(TASKS, dtype=torch.bool)
PRESENT = torch.tensor([True, False, True, True])


def train(weighting: Weighting, seed: int, steps: int, present: torch.Tensor = ALL) -> list:
    """Make steps with random losses and rows; gives what came out of each."""
    rng = np.random.default_rng(seed)
    seen = []
    for _ in range(steps):
        losses = torch.from_numpy(rng.uniform(0.1, 3, TASKS))
        weighted = weighting(losses, present)
        seen.append((weighted.detach().clone(), weighting.weights.clone()))
        rows = weighting.weights.detach().double()[:, None] * torch.from_numpy(
            rng.normal(size=(TASKS, 6))
        )
        after = losses * torch.from_numpy(rng.uniform(0.5, 1.1, TASKS))
        if weighting.needs_gram or weighting.needs_losses_after:
            weighting.observe(losses, present, gram=rows @ rows.T, after=after)
        for parameter in weighting.parameters():
            slope = torch.autograd.grad(weighted.sum(), parameter)[0]
            with torch.no_grad():
                parameter -= 0.1 * slope
    return seen


def warm(make: Make) -> Weighting:
    weighting = make()
    train(weighting, seed=0, steps=7)
    return weighting


def fresh_losses() -> torch.Tensor:
    return torch.tensor([0.7, 2.5, 1.0, 3.0], dtype=torch.float64, requires_grad=True)


@every
@pytest.mark.parametrize("prepare", [warm, lambda make: make()], ids=["later", "first call"])
def test_an_element_depends_on_its_own_loss_alone(make: Make, prepare: Callable) -> None:
    losses = fresh_losses()
    weighted = prepare(make)(losses)
    rows = [torch.autograd.grad(entry, losses, retain_graph=True)[0] for entry in weighted]
    jacobian = torch.stack(rows)
    assert torch.equal(jacobian, torch.diag(jacobian.diagonal()))
    assert (jacobian.diagonal() > 0).all()


@pytest.mark.parametrize("name", ["gls", "stch", "stch(warm-up)"])
def test_the_gradient_is_that_of_the_value(name: str) -> None:
    # Of the value as a function of all losses, by central differences.
    weighting, losses = warm(MAKERS[name]), fresh_losses()
    state = {k: v.clone() for k, v in weighting.state_dict().items()}
    found = torch.autograd.grad(weighting(losses).sum(), losses)[0]
    for i in range(TASKS):
        values = []
        for sign in (1, -1):
            weighting.load_state_dict(state)
            moved = losses.detach().clone()
            moved[i] += sign * 1e-5
            values.append(weighting(moved).sum().item())
        slope = (values[0] - values[1]) / 2e-5
        assert slope == pytest.approx(found[i].item(), rel=1e-6)


@every
def test_weights_are_numbers(make: Make) -> None:
    weighting = warm(make)
    weighting(fresh_losses())
    assert weighting.weights.shape == (TASKS,)
    assert not weighting.weights.requires_grad
    assert torch.isfinite(weighting.weights).all()


@every
def test_float32_losses_give_the_float64_weights(make: Make) -> None:
    exact, single = warm(make), make()
    assert single(torch.ones(TASKS) + 1).dtype == torch.float32
    single.load_state_dict(exact.state_dict())
    losses = fresh_losses()
    expected = exact(losses)
    found = single(losses.detach().float())
    assert found.dtype == single.weights.dtype == torch.float32
    np.testing.assert_allclose(found.detach().numpy(), expected.detach().numpy(), rtol=1e-5)
    np.testing.assert_allclose(single.weights.numpy(), exact.weights.numpy(), rtol=1e-5)


@every
@pytest.mark.parametrize("done", range(7))
def test_state_continues_bit_for_bit(make: Make, done: int) -> None:
    weighting = make()
    train(weighting, seed=1, steps=done)
    file = io.BytesIO()
    torch.save(weighting.state_dict(), file)
    following = train(weighting, seed=2, steps=7)
    file.seek(0)
    loaded = make()
    loaded.load_state_dict(torch.load(file))
    for ours, theirs in zip(train(loaded, seed=2, steps=7), following, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


@every
def test_state_loads_into_one_that_was_used(make: Make) -> None:
    weighting, other = warm(make), make()
    train(other, seed=5, steps=3)
    other.load_state_dict(weighting.state_dict())
    assert all(
        torch.equal(a[0], b[0])
        for a, b in zip(train(other, 6, 4), train(weighting, 6, 4), strict=True)
    )


@every
@pytest.mark.parametrize("value", [float("nan"), -1.0, 0.0, float("inf")])
def test_an_absent_loss_may_hold_anything(make: Make, value: float) -> None:
    weighting = warm(make)
    losses = fresh_losses().detach()
    losses[1] = value
    losses.requires_grad_()
    weighted = weighting(losses, present=PRESENT)
    assert weighted[1] == 0
    assert weighting.weights[1] == 0
    weighted.sum().backward()
    assert losses.grad[1] == 0
    assert torch.isfinite(losses.grad).all()
    assert (losses.grad[PRESENT] > 0).all()
    if weighting.needs_gram or weighting.needs_losses_after:
        gram = torch.diag(torch.tensor([1.0, 0.0, 2.0, 3.0]))
        weighting.observe(losses.detach(), PRESENT, gram=gram, after=losses.detach())
        assert all(torch.isfinite(buffer).all() for buffer in weighting.buffers())


@pytest.mark.parametrize(("name", "learned"), [("famo", "logits"), ("gradnorm", "learned")])
def test_an_absent_task_stays_where_it_is(name: str, learned: str) -> None:
    weighting = warm(MAKERS[name])
    before = getattr(weighting, learned).clone()
    train(weighting, seed=3, steps=4, present=PRESENT)
    after = getattr(weighting, learned)
    assert after[1] == before[1]
    assert (after[PRESENT] != before[PRESENT]).all()
    if name == "gradnorm":
        assert after.sum().item() == pytest.approx(TASKS)


@pytest.mark.parametrize("name", ["famo", "gradnorm"])
def test_the_present_tasks_learn_as_if_the_absent_one_were_not_there(name: str) -> None:
    rng = np.random.default_rng(0)
    many, few = MAKERS[name](), MAKERS[name]()
    for _ in range(5):
        losses = torch.from_numpy(rng.uniform(0.1, 3, TASKS))
        rows = torch.from_numpy(rng.normal(size=(TASKS, 6)))
        rows[1] = 0
        gram, after = rows @ rows.T, losses * torch.from_numpy(rng.uniform(0.5, 1.1, TASKS))
        found = many(losses, PRESENT)[PRESENT]
        np.testing.assert_allclose(found, few(losses[PRESENT]), rtol=1e-12)
        many.observe(losses, PRESENT, gram=gram, after=after)
        some = gram[PRESENT][:, PRESENT]
        few.observe(losses[PRESENT], ALL[:3], gram=some, after=after[PRESENT])


@pytest.mark.parametrize("name", ["gls", "famo", "stch(warm-up)", "gradnorm"])
def test_permuting_the_tasks_permutes_the_weights(name: str) -> None:
    rng = np.random.default_rng(4)
    order = [2, 0, 3, 1]
    straight, permuted = MAKERS[name](), MAKERS[name]()
    for _ in range(7):
        losses = torch.from_numpy(rng.uniform(0.1, 3, TASKS))
        rows = torch.from_numpy(rng.normal(size=(TASKS, 6)))
        after = losses * torch.from_numpy(rng.uniform(0.5, 1.1, TASKS))
        expected = straight(losses)[order]
        np.testing.assert_allclose(permuted(losses[order]), expected, rtol=1e-9, atol=1e-12)
        if straight.needs_gram or straight.needs_losses_after:
            straight.observe(losses, ALL, gram=rows @ rows.T, after=after)
            rows = rows[order]
            permuted.observe(losses[order], ALL, gram=rows @ rows.T, after=after[order])


@pytest.mark.parametrize("name", ["gls", "famo", "stch(warm-up)"])
def test_the_unit_of_a_loss_does_not_matter(name: str) -> None:
    units = torch.tensor([1.0, 1e6, 1e-3, 1.0], dtype=torch.float64)
    rng = np.random.default_rng(5)
    plain, scaled = MAKERS[name](), MAKERS[name]()
    for _ in range(7):
        losses = torch.from_numpy(rng.uniform(0.1, 3, TASKS)).requires_grad_()
        after = losses.detach() * torch.from_numpy(rng.uniform(0.5, 1.1, TASKS))
        expected = torch.autograd.grad(plain(losses).sum(), losses)[0]
        found = torch.autograd.grad(scaled(units * losses).sum(), losses)[0]
        # Up to one factor for all: GLS and FAMO have the unit of a loss.
        ratio = found / expected
        np.testing.assert_allclose(ratio, ratio[0].expand(TASKS), rtol=1e-9)
        if plain.needs_losses_after:
            plain.observe(losses.detach(), ALL, after=after)
            scaled.observe(units * losses.detach(), ALL, after=units * after)


@pytest.mark.parametrize("name", ["imtl-l", "gls", "famo", "stch(warm-up)", "gradnorm"])
@pytest.mark.parametrize("done", [0, 1, 3, 5])
def test_a_refused_loss_changes_nothing(name: str, done: int) -> None:
    weighting = MAKERS[name]()
    train(weighting, seed=1, steps=done)
    before = {key: value.clone() for key, value in weighting.state_dict().items()}
    with pytest.raises(TaskError):
        weighting(torch.tensor([1.0, -2.0, 1.0, 1.0], dtype=torch.float64))
    after = weighting.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adam_is_torchs(decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(5, generator=generator, dtype=torch.float64)
    theirs = torch.nn.Parameter(ours.clone())
    adam = Adam(lr=0.03, weight_decay=decay)
    optimizer = torch.optim.Adam([theirs], lr=0.03, weight_decay=decay)
    for k in range(50):
        slopes = torch.randn(5, generator=generator, dtype=torch.float64) * 10.0 ** (k % 7 - 3)
        ours = adam.step(ours, slopes, torch.ones(5, dtype=torch.bool))
        theirs.grad = slopes
        optimizer.step()
        np.testing.assert_allclose(ours, theirs.detach(), rtol=1e-12)
