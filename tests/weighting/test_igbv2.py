"""IGBv2: what is stored, when it learns, when the policy is used; and all that it must not do."""

from __future__ import annotations

import io
import math
import random
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers import class_batch, class_step, differences, snapshot

import equipoise as eq
from equipoise.weighting import IGBv2
from equipoise.weighting.sac import Agent

SMALL: dict[str, Any] = {
    "learn_epoch": 3,
    "use_epoch": 4,
    "update_every": 3,
    "gradient_steps": 4,
    "batch_size": 8,
    "buffer_size": 12,
    "width": 8,
}
"""Settings in which everything happens within a few batches."""


def small(seed: int = 0, n_tasks: int = 2, **options: Any) -> IGBv2:
    """Epochs of two batches: stores from batch 4 on, learns in 6, 9, ..., acts from 6 on."""
    generator = torch.Generator().manual_seed(seed)
    return IGBv2(2, n_tasks, generator, **{**SMALL, **options})


def trace(n: int, n_tasks: int = 2, seed: int = 0) -> torch.Tensor:
    """Losses (n, T) of a training, float64."""
    generator = torch.Generator().manual_seed(seed)
    falling = torch.linspace(2, 1, n, dtype=torch.float64)[:, None]
    return falling * (0.5 + torch.rand(n, n_tasks, generator=generator, dtype=torch.float64))


def run(weighting: IGBv2, losses: torch.Tensor) -> torch.Tensor:
    """The weights (n, T) that come of the losses (n, T)."""
    found = []
    for batch in losses:
        weighting(batch)
        found.append(weighting.weights.clone())
    return torch.stack(found)


Event = tuple[Any, ...]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Event]]:
    """Everything that the agent is asked for, in order; it does not really learn."""
    seen: list[Event] = []
    store, act = Agent.store, Agent.act

    def stored(self: Agent, before: Any, action: Any, reward: float, after: Any) -> None:
        seen.append(("store", before.tolist(), action.tolist(), reward, after.tolist()))
        store(self, before, action, reward, after)

    def acted(self: Agent, state: Any, generator: torch.Generator) -> torch.Tensor:
        seen.append(("act", state.tolist()))
        return act(self, state, generator)

    monkeypatch.setattr(Agent, "store", stored)
    monkeypatch.setattr(Agent, "act", acted)
    monkeypatch.setattr(
        Agent, "learn", lambda self, steps, batch, generator: seen.append(("learn", steps, batch))
    )
    yield seen


# ------------------------------------------------------------------------------ the schedule


@pytest.mark.parametrize("buffer_size", [10_000, 60])
def test_the_published_schedule_batch_by_batch(events: list[Event], buffer_size: int) -> None:
    # 30 batches an epoch. Base: batches 30 to 59. Stored from 60 on, with batch 59 before it.
    # Learning: from batch 90 on where 50 divides it. Policy: from batch 150 on.
    losses = trace(201)
    weighting = IGBv2(30, 2, torch.Generator().manual_seed(0), buffer_size=buffer_size)
    base = losses[30:60].mean(0)
    weights = torch.zeros(0, 2)
    for c, batch in enumerate(losses):
        events.clear()
        weighting(batch)
        names = [event[0] for event in events]
        expected = ["store"] * (c >= 60) + ["learn"] * (c in (100, 150, 200)) + ["act"] * (c >= 150)
        assert names == expected, c
        if c >= 60:
            _, before, action, reward, after = events[0]
            assert before == losses[c - 1].tolist()
            assert after == batch.tolist()
            assert reward == pytest.approx(((losses[c - 1] - batch) / base).min().item())
            logits = weighting.bound * torch.tensor(action, dtype=torch.float64)
            acted = 2 * torch.softmax(logits, 0)
            assert torch.allclose(acted, weights, rtol=1e-12), "the weights of the batch before"
        if "learn" in names:
            k = 1 + min(c - 59, buffer_size) / buffer_size
            assert events[1] == ("learn", math.floor(25 * k), math.floor(128 * k))
        if "act" in names:
            assert events[-1] == ("act", batch.tolist())
        weights = weighting.weights.clone()


@pytest.mark.parametrize(
    ("size", "steps", "batch"),
    [(2500, 31, 160), (5000, 37, 192), (9999, 49, 255), (10000, 50, 256)],
)
def test_how_often_and_on_how_much_it_learns(
    events: list[Event], size: int, steps: int, batch: int
) -> None:
    weighting = IGBv2(1, 2)
    buffer = weighting._ready().buffer
    buffer.pos, buffer.full = size % 10_000, size == 10_000
    weighting._learn()
    assert events == [("learn", steps, batch)]


def test_it_does_not_learn_from_nothing(events: list[Event]) -> None:
    IGBv2(1, 2)._learn()
    assert events == []


def test_until_the_policy_is_used_the_weights_are_those_of_rlw() -> None:
    # The logits are standard normal draws, cut at the box; only making the agent draws too.
    weighting = IGBv2(2, 3, torch.Generator().manual_seed(5))
    same = torch.Generator().manual_seed(5)
    for weights in run(weighting, trace(4, 3)):
        draws = torch.randn(3, generator=same, dtype=torch.float64).clamp(-1.6, 1.6)
        assert torch.allclose(weights, 3 * torch.softmax(draws, 0), rtol=1e-14)


def test_the_box_bounds_the_weights() -> None:
    weights = run(small(bound=0.25), trace(30))
    ratios = weights[:, 0] / weights[:, 1]
    assert ratios.max() <= math.exp(0.5)
    assert ratios.min() >= math.exp(-0.5)
    assert (ratios[:6].log().abs() - 0.5).abs().min() < 1e-12, "draws are cut at the box"


# -------------------------------------------------------------------------------- the reward


def after_base(base: list[float], before: list[float], **options: Any) -> IGBv2:
    """An IGBv2 whose second epoch, of one batch, had the losses `base`; then came `before`."""
    weighting = IGBv2(1, len(base), **options)
    for losses in ([9.0] * len(base), base, before):
        weighting(torch.tensor(losses, dtype=torch.float64))
    return weighting


def reward(weighting: IGBv2, losses: list[float], present: list[bool] | None = None) -> Any:
    given = [True] * len(losses) if present is None else present
    return weighting.reward(torch.tensor(losses, dtype=torch.float64), torch.tensor(given))


def test_reward_known_answers() -> None:
    weighting = after_base([1, 2], [1, 2])
    weighting.begin(1e-4)
    assert reward(weighting, [0.8, 1.9]) == pytest.approx(0.05)
    weighting.begin(5e-5)
    assert reward(weighting, [0.8, 1.9]) == pytest.approx(0.1)
    assert reward(weighting, [1.5, 1.0]) == pytest.approx(-1.0), "2 min(-0.5, 0.5)"
    assert reward(after_base([1, 2], [1, 2]), [0.8, 1.9]) == pytest.approx(0.05), "no lr: no ratio"


def test_reward_of_the_ablations() -> None:
    mean = after_base([1, 2], [1, 2], reduction="mean")
    mean.begin(1e-4)
    mean.begin(5e-5)
    assert reward(mean, [0.8, 1.9]) == pytest.approx(0.25), "2 mean(0.2, 0.05)"
    plain = after_base([1, 2], [1, 2], lr_ratio=False)
    assert not plain.needs_lr
    plain.begin(1e-4)
    plain.begin(5e-5)
    assert reward(plain, [0.8, 1.9]) == pytest.approx(0.05)


def test_a_learning_rate_of_zero_tells_nothing_and_is_no_unit() -> None:
    weighting = after_base([1, 2], [1, 2])
    weighting.begin(0.0)  # a warm-up begins
    assert reward(weighting, [0.8, 1.9]) is None
    weighting.begin(2.0)
    weighting.begin(0.5)
    assert reward(weighting, [0.8, 1.9]) == pytest.approx(0.2)


def test_a_task_without_a_base_does_not_count() -> None:
    assert reward(after_base([0.0, 2], [1, 2]), [5.0, 1.9]) == pytest.approx(0.05)
    assert reward(after_base([0.0, 1e-12], [1, 2]), [5.0, 1.9]) is None


def test_the_reward_is_over_tasks_in_both_batches(events: list[Event]) -> None:
    weighting = IGBv2(1, 3)
    batches = [
        ([9.0, 9, 9], [True] * 3),
        ([1.0, 2, 4], [True, True, False]),  # the third has no base
        ([1.0, 2, 4], [True] * 3),
        ([0.5, 7, 3], [True, False, True]),  # first: 0.5; the second is gone, the third has no base
        ([0.5, 1, 3], [False, True, True]),  # first gone, second was gone: nothing to compare
        ([0.5, 0.5, 3], [False, True, True]),  # second: 0.25
    ]
    for losses, present in batches:
        weighting(torch.tensor(losses, dtype=torch.float64), torch.tensor(present))
        assert ((weighting.weights > 0) == torch.tensor(present)).all()
        assert weighting.weights.sum().item() == pytest.approx(sum(present))
    stored = [(event[1], event[3], event[4]) for event in events if event[0] == "store"]
    assert stored == [
        # An absent task keeps its last loss in the state.
        ([1.0, 2, 9], 0.0, [1.0, 2, 4]),
        ([1.0, 2, 4], 0.5, [0.5, 2, 3]),
        ([0.5, 1, 3], 0.25, [0.5, 0.5, 3]),
    ]


def test_a_step_says_what_the_learning_rate_is(events: list[Event]) -> None:
    step = class_step(IGBv2(2, 2))
    schedule = torch.optim.lr_scheduler.StepLR(step.optimizer, step_size=2, gamma=0.5)
    losses = []
    for c in range(8):
        events.clear()
        losses.append(step(*class_batch(seed=c)).losses)
        schedule.step()  # lr halves after every second batch
        if c >= 4:
            gains = (losses[c - 1] - losses[c]) / ((losses[2] + losses[3]) / 2)
            assert events[0][3] == pytest.approx(2 ** (c // 2) * gains.min().item(), rel=1e-12)
    assert step.weighting.first_lr == 1e-2


# ------------------------------------------------------------------------------ what it learns


def test_it_finds_weights_that_pay() -> None:
    # A world in which task 0 gains its weight in each batch, and task 1 a third of its own: the
    # smaller gain is largest at the weights (0.5, 1.5).
    weighting = IGBv2(
        10, 2, torch.Generator().manual_seed(0), learn_epoch=3, use_epoch=3, update_every=5,
        gradient_steps=24, batch_size=64, buffer_size=100, width=16, sac_lr=2e-2, discount=0.0,
        bound=2.0, temperature=0.02,
    )  # fmt: skip
    start = torch.full((2,), 2.0, dtype=torch.float64)
    losses, weights = start, []
    for _ in range(90):
        weighting(losses)
        weights.append(weighting.weights.clone())
        weighting.last_losses = start
        losses = start - weights[-1] * torch.tensor([1.0, 1 / 3], dtype=torch.float64)
    early, late = torch.stack(weights[:20]).mean(0), torch.stack(weights[-30:]).mean(0)
    assert abs(early[1] - 1) < 0.4
    assert 1.25 < late[1] < 1.75


def test_the_density_belongs_to_the_policy() -> None:
    # Integrated over the box of actions the density by which the agent learns gives 1.
    actor = Agent(
        2, torch.Generator().manual_seed(0), buffer_size=4, lr=1e-3, width=8, discount=0.9,
        tau=0.1, temperature=0.2, target_entropy=-2.0,
    ).sac.actor  # fmt: skip
    mean, log_std, _ = actor.get_action_dist_params(torch.tensor([[0.3, 2.0]]))
    n = 400
    middles = torch.linspace(-1, 1, 2 * n + 1)[1::2]
    grid = torch.cartesian_prod(middles, middles)
    density = actor.action_dist.proba_distribution(mean, log_std).log_prob(grid).exp()
    assert density.sum().item() * (2 / n) ** 2 == pytest.approx(1, abs=2e-3)


# ----------------------------------------------------------------- draws, state, resumed runs


def test_the_seed_decides_and_nothing_else_does() -> None:
    losses = trace(16)  # learns four times
    torch.manual_seed(1)
    np.random.seed(1)
    first = run(small(3), losses)
    torch.manual_seed(2)
    np.random.seed(2)
    assert torch.equal(run(small(3), losses), first)
    assert not torch.equal(run(small(4), losses)[6:], first[6:])


def test_the_global_generators_stay_where_they_are() -> None:
    np.random.seed(7)
    random.seed(7)
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    weighting = small()
    run(weighting, trace(20))
    assert weighting._agent is not None
    assert torch.equal(torch.get_rng_state(), before[0])
    after = np.random.get_state()
    assert all(np.array_equal(a, b) for a, b in zip(before[1], after, strict=True))
    assert random.getstate() == before[2]


@pytest.mark.parametrize("done", [1, 3, 5, 8, 9, 14, 25])
def test_continues_bit_for_bit_in_the_middle_of_learning(done: int) -> None:
    # The buffer of 12 is empty, filling (from 4 on), or overwritten (from 17 on).
    losses = trace(45)
    weighting = small()
    run(weighting, losses[:done])
    file = io.BytesIO()
    torch.save(weighting.state_dict(), file)
    # Far enough that each kind learns twice and the buffer is overwritten.
    rest = losses[done : done + 14]
    expected = run(weighting, rest)
    torch.manual_seed(123)
    np.random.seed(123)
    used = small(seed=9)
    run(used, trace(20, seed=4))
    for other in (small(seed=8), used):
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(run(other, rest), expected)
        state, ours = other.state_dict(), weighting.state_dict()
        assert differences(state, ours) == []


def test_the_state_holds_all_of_the_agent() -> None:
    weighting = small()
    run(weighting, trace(10))
    agent = weighting.state_dict()["_extra_state"]["agent"]
    assert set(agent["networks"]) == {
        "policy", "actor.optimizer", "critic.optimizer", "ent_coef_optimizer", "log_temperature",
    }  # fmt: skip
    assert agent["transitions"]["observations"].shape == (6, 1, 2)
    run(weighting, trace(20))
    assert agent["transitions"]["observations"].shape == (6, 1, 2), "a copy"


def test_a_state_of_another_agent_is_refused() -> None:
    step = class_step(small())
    for c in range(8):
        step(*class_batch(seed=c))
    for options in ({"buffer_size": 13}, {"width": 9}):
        other = class_step(small(**options))
        before = differences(snapshot(other), snapshot(other))
        with pytest.raises(eq.EquipoiseError, match="does not fit this Step"):
            other.load_state_dict(step.state_dict())
        assert before == []
        assert other.weighting._agent is None


def test_settings_of_the_published_agent() -> None:
    weighting = IGBv2(1, 3)
    agent = weighting._ready().sac
    assert (agent.gamma, agent.tau, agent.buffer_size) == (0.99, 0.005, 10_000)
    assert agent.target_entropy == -3
    assert agent.log_ent_coef.exp().item() == pytest.approx(0.2)
    optimizers = (agent.actor.optimizer, agent.critic.optimizer, agent.ent_coef_optimizer)
    assert [o.param_groups[0]["lr"] for o in optimizers] == [3e-4] * 3
    linear = torch.nn.Linear
    for network, inputs in ((agent.actor.latent_pi, 3), (agent.critic.q_networks[1], 6)):
        sizes = [m.weight.shape for m in network if isinstance(m, linear)]
        assert sizes[:2] == [(128, inputs), (128, 128)]
    assert len(agent.critic.q_networks) == 2


# ------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("done", [3, 4, 5, 6, 9, 20])
def test_a_step_that_raises_leaves_no_trace(done: int) -> None:
    # Before the agent exists, in the batch that makes it, in one that learns, with a full buffer.
    step = class_step(small())
    for c in range(done):
        step(*class_batch(seed=c))
    kept = {k: v for k, v in snapshot(step).items() if "grad" not in k}
    good = step.losses["right"]
    # A gradient that is not finite is found last, after a second look that moves the agent again.
    step.losses["right"] = lambda output, target: good(output.sqrt().nan_to_num() * 0, target)
    with pytest.raises(eq.NonFiniteError):
        step(*class_batch(seed=99))
    assert differences(kept, {k: v for k, v in snapshot(step).items() if "grad" not in k}) == []
    assert (step.weighting._agent is None) == (done < 5)


def test_a_step_does_not_copy_the_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    step = class_step(small())
    for c in range(6):
        step(*class_batch(seed=c))

    def refuse(self: Agent) -> None:
        raise AssertionError("copied")

    monkeypatch.setattr(Agent, "state_dict", refuse)
    for c in range(7):
        step(*class_batch(seed=c))
    monkeypatch.setattr(Agent, "_networks", refuse)
    step(*class_batch(seed=7))  # batch 13: nothing is learned, no network need be kept
    assert step.weighting._agent.journal is None


@pytest.mark.parametrize(("bad", "error"), [(-0.5, eq.TaskError), (math.nan, eq.NonFiniteError)])
def test_a_loss_that_cannot_be_is_named_before_anything_moves(bad: float, error: type) -> None:
    weighting = small()
    run(weighting, trace(9))
    before = weighting.state_dict()
    with pytest.raises(error) as caught:
        weighting(torch.tensor([1.0, bad]))
    assert caught.value.task == 1
    assert differences(before, weighting.state_dict()) == []


def test_a_zero_loss_is_finite_and_has_no_gradient() -> None:
    weighting = small()
    run(weighting, trace(9))
    losses = torch.tensor([0.0, 2.0], requires_grad=True)
    weighted = weighting(losses)
    assert weighted.isfinite().all()
    factors = torch.autograd.grad(weighted.sum(), losses)[0]
    assert factors[0] == 0
    assert factors[1].item() == pytest.approx(weighting.weights[1].item() / 2)


def test_the_cap_bounds_lambda_over_loss() -> None:
    weighting = small(cap=3.0)
    for batch in 0.01 * trace(12):
        losses = batch.requires_grad_()
        factors = torch.autograd.grad(weighting(losses).sum(), losses)[0]
        assert factors.max().item() <= 3 + 1e-9
        assert (factors > 2.9).any()


def test_without_the_extra_there_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    line = r'IGBv2 needs stable-baselines3.*pip install -c constraints.txt "equipoise\[rl\]"'
    with pytest.raises(eq.MissingExtraError, match=line) as caught:
        IGBv2(10, 2)
    assert isinstance(caught.value, ImportError)
    with pytest.raises(eq.MissingExtraError, match=line):
        eq.Recipe.parse("igbv2+cagrad")
    assert eq.Recipe.known(), "everything else works"


def test_nothing_is_imported_before_it_is_needed_and_nothing_is_said() -> None:
    program = """
import sys, torch, equipoise as eq
eq.Recipe.parse("igbv1")
assert "stable_baselines3" not in sys.modules
torch.set_default_dtype(torch.float64)
w = eq.IGBv2(1, 2, learn_epoch=3, use_epoch=3, update_every=2, gradient_steps=2, batch_size=4)
assert torch.get_default_dtype() == torch.float64
for _ in range(8):
    w(torch.tensor([1.0, 2.0]))
with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
    for _ in range(2):
        w(torch.tensor([1.0, 2.0]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps_per_epoch": 0}, "steps_per_epoch is 0"),
        ({"n_tasks": 0}, "n_tasks is 0"),
        ({"cap": 0.0}, "cap is 0.0"),
        ({"reduction": "max"}, "reduction is 'max'; known are 'min' and 'mean'"),
        ({"learn_epoch": 2}, "learn_epoch is 2; give a whole number of at least 3"),
        ({"use_epoch": 2}, "use_epoch is 2"),
        ({"update_every": 0}, "update_every is 0"),
        ({"gradient_steps": 1}, "gradient_steps is 1"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
        ({"buffer_size": 0}, "buffer_size is 0"),
        ({"width": 0}, "width is 0"),
        ({"discount": 1.0}, r"discount is 1.0; it must lie in \[0, 1\)"),
        ({"tau": 1.5}, "tau is 1.5; it must be positive and at most 1"),
        ({"sac_lr": 0.0}, "sac_lr is 0.0; it must be positive"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"bound": -1.0}, "bound is -1.0"),
    ],
)
def test_a_setting_out_of_its_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        IGBv2(**{"steps_per_epoch": 10, "n_tasks": 2, **options})


def test_another_number_of_tasks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"n_tasks=2 but got 3"):
        IGBv2(10, 2)(torch.ones(3))
    with pytest.raises(eq.CombinationError, match="n_tasks=3"):
        class_step(IGBv2(10, 3))


def test_recipes_reach_the_settings() -> None:
    text = "igbv2(buffer_size=5000, lr_ratio=false, reduction=mean, sac_lr=0.0001)+mgda"
    recipe = eq.Recipe.parse(text)
    assert str(recipe) == text
    weighting = recipe.weighting.build(steps_per_epoch=7, n_tasks=3)
    assert (weighting.buffer_size, weighting.sac_lr, weighting.n_tasks) == (5000, 1e-4, 3)
    assert (weighting.lr_ratio, weighting.reduction, weighting.steps_per_epoch) == (
        False,
        "mean",
        7,
    )
    with pytest.raises(eq.RecipeError, match="reduction is 'max'"):
        eq.Recipe.parse("igbv2(reduction=max)")
