"""IGBv2 beside the table of what should happen in which batch, and what the buffer then holds."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from helpers import differences, regression_batch, regression_step
from reference import gap_balancing as slow

import equipoise as eq
from equipoise.weighting import IGBv2
from equipoise.weighting.sac import Agent

SMALL: dict[str, Any] = {"width": 8, "gradient_steps": 4, "batch_size": 6, "update_every": 5}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Write down, in order, what is asked of the agent."""
    calls: list[tuple] = []
    store, learn, act = Agent.store, Agent.learn, Agent.act

    def watched_store(self: Agent, before: Any, action: Any, reward: float, after: Any) -> None:
        calls.append(("store", before.copy(), action.copy(), reward, after.copy()))
        store(self, before, action, reward, after)

    def watched_learn(self: Agent, steps: int, batch: int, generator: Any) -> None:
        calls.append(("learn", steps, batch))
        learn(self, steps, batch, generator)

    def watched_act(self: Agent, *rest: Any) -> torch.Tensor:
        calls.append(("act",))
        return act(self, *rest)

    monkeypatch.setattr(Agent, "store", watched_store)
    monkeypatch.setattr(Agent, "learn", watched_learn)
    monkeypatch.setattr(Agent, "act", watched_act)
    return calls


def played(
    seen: list[tuple], weighting: IGBv2, losses: np.ndarray, lrs: np.ndarray | None = None
) -> tuple[list[list[tuple]], list[np.ndarray]]:
    """Let a weighting see a history; give the calls and the weights of each batch."""
    calls, weights = [], []
    for k, batch in enumerate(losses):
        seen.clear()
        if lrs is not None:
            weighting.begin(float(lrs[k]))
        weighting(torch.from_numpy(batch))
        calls.append(list(seen))
        weights.append(weighting.weights.numpy().copy())
    return calls, weights


@pytest.mark.parametrize(
    "batches, per_epoch, options",
    [
        (60, 7, {}),
        (40, 5, {"update_every": 1}),
        (40, 1, {"buffer_size": 9}),
        (70, 8, {"learn_epoch": 5, "use_epoch": 4, "buffer_size": 20, "update_every": 3}),
        (30, 3, {"learn_epoch": 3, "use_epoch": 3, "update_every": 6}),
    ],
)
def test_each_batch(seen: list, batches: int, per_epoch: int, options: dict) -> None:
    rng = np.random.default_rng(0)
    losses = rng.uniform(0.2, 3, size=(batches, 3)) * [1, 10, 0.1]
    lrs = 0.1 * 0.9 ** np.arange(batches)
    settings = {**SMALL, **options}
    weighting = IGBv2(per_epoch, 3, torch.Generator().manual_seed(1), **settings)
    calls, weights = played(seen, weighting, losses, lrs)
    table = slow.igbv2_events(
        batches,
        per_epoch,
        settings.get("learn_epoch", 4),
        settings.get("use_epoch", 6),
        settings["update_every"],
        settings.get("buffer_size", 10_000),
        settings["gradient_steps"],
        settings["batch_size"],
    )
    base = losses[per_epoch : 2 * per_epoch].mean(0)
    learned = acted = 0
    for event, did in zip(table, calls, strict=True):
        c = event.batch
        wanted = [
            *(["store"] if event.stored else []),
            *(["learn"] if event.gradient_steps else []),
            *(["act"] if event.weights == "policy" else []),
        ]
        assert [name for name, *_ in did] == wanted, event
        learned += bool(event.gradient_steps)
        acted += event.weights == "policy"
        for name, *what in did:
            if name == "learn":
                assert tuple(what) == (event.gradient_steps, event.batch_size), event
            if name == "store":
                before, action, reward, after = what
                assert event.stored == (c - 1, c)
                np.testing.assert_allclose(before, losses[c - 1])
                np.testing.assert_allclose(after, losses[c])
                logits = weighting.bound * action
                np.testing.assert_allclose(slow.weights_of(logits), weights[c - 1], rtol=1e-6)
                expected = slow.reward(losses[c - 1], losses[c], base, lrs[0], lrs[c])
                assert reward == pytest.approx(expected, rel=1e-9)
    assert learned and acted
    buffer = weighting._agent.buffer
    assert buffer.size() == table[-1].size
    kept = [(e.stored, e.batch) for e in table if e.stored][-table[-1].size :]
    rows = {tuple(np.float32(losses[b]).tolist()) for (_, b), _ in kept}
    found = {tuple(row.tolist()) for row in buffer.next_observations[: buffer.size(), 0]}
    assert found == rows, "the ring keeps the newest"
    assert not buffer.dones.any(), "an episode never ends"


def test_effort_is_exact_at_every_size() -> None:
    """floor(50 k / 2) and floor(256 k / 2), in whole numbers, for a full range of sizes."""
    asked: list[tuple[int, int]] = []

    class Stub:
        class Buffer:
            n = 0

            def size(self) -> int:
                return self.n

        buffer = Buffer()

        def learn(self, steps: int, batch: int, _: Any) -> None:
            asked.append((steps, batch))

    for capacity in (10_000, 5_000, 777):
        weighting = IGBv2(10, 2, buffer_size=capacity)
        stub = Stub()
        weighting._agent = stub
        asked.clear()
        sizes = range(1, capacity + 1)  # 1600 of 10,000 is 29 steps, and 28.999... in floats
        for n in sizes:
            stub.buffer.n = n
            weighting._learn()
        assert asked == [slow.sac_effort(n, capacity) for n in sizes]


def test_a_learner_can_be_pickled_and_goes_on_the_same() -> None:
    losses = torch.rand(40, 3, generator=torch.Generator().manual_seed(0)).double() + 0.1
    weighting = IGBv2(2, 3, torch.Generator().manual_seed(7), **SMALL)
    for batch in losses[:20]:
        weighting(batch)
    again = pickle.loads(pickle.dumps(weighting))
    for batch in losses[20:]:
        assert torch.equal(weighting(batch), again(batch))


def test_a_loss_that_single_precision_cannot_hold_is_refused() -> None:
    weighting = IGBv2(1, 2, **SMALL)
    for _ in range(12):
        weighting(torch.tensor([1.0, 2.0], dtype=torch.float64))
    before = weighting.state_dict()
    with pytest.raises(eq.NonFiniteError, match="1e[+]39"):
        weighting(torch.tensor([1.0, 1e39], dtype=torch.float64))
    assert not differences(before, weighting.state_dict())


def test_the_reward_s_ablations(seen: list) -> None:
    rng = np.random.default_rng(3)
    losses, lrs = rng.uniform(0.5, 2, size=(12, 2)), np.linspace(1, 0.1, 12)
    for reduction in ("min", "mean"):
        for lr_ratio in (True, False):
            weighting = IGBv2(3, 2, reduction=reduction, lr_ratio=lr_ratio, **SMALL)
            calls, _ = played(seen, weighting, losses, lrs)
            base = losses[3:6].mean(0)
            for c in range(6, 12):
                reward = calls[c][0][3]
                expected = slow.reward(
                    losses[c - 1], losses[c], base, lrs[0], lrs[c], reduction, lr_ratio
                )
                assert reward == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("heads", ["own", "weighted"])
@pytest.mark.parametrize("name", ["mgda", "nash", "imtl", "cagrad"])
def test_coefficients_reach_the_heads_only_if_asked(heads: str, name: str) -> None:
    """One step with fixed weights of the losses beside plain autograd (Alg. 3)."""
    makers = {
        "mgda": eq.MGDA,
        "nash": lambda: eq.NashMTL(max_norm=None),
        "imtl": eq.IMTLG,
        "cagrad": eq.CAGrad,
    }
    step = regression_step(eq.SI(), makers[name](), tasks=("a", "b", "c"), heads=heads)
    inputs, targets = regression_batch(("a", "b", "c"))
    model = step.model
    outputs = model(inputs)
    values = [step.losses[t](outputs[t], targets[t]).item() for t in model.tasks]
    factors = slow.gradient_factors([1.0, 1.0, 1.0], values)
    aggregator = makers[name]()

    def weights(rows: np.ndarray) -> np.ndarray:
        gram = torch.from_numpy(rows @ rows.T)
        return aggregator.coefficients(gram).numpy()

    trunk, own = slow.step_gradients(
        model.trunk,
        dict(model.heads),
        step.losses,
        inputs,
        targets,
        factors,
        weights,
        on_all=heads == "weighted",
    )
    step(inputs, targets)
    found = [p.grad for p in model.trunk.parameters()]
    torch.testing.assert_close(found, trunk, rtol=1e-6, atol=1e-10)
    for task, gradients in own.items():
        mine = [p.grad for p in model.heads[task].parameters()]
        torch.testing.assert_close(mine, gradients, rtol=1e-6, atol=1e-10)
