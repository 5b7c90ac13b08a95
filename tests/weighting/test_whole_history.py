"""IGBv1 beside the slow one that reads lambda off the whole history, with absent tasks."""

import numpy as np
import pytest
import torch
from helpers import differences
from reference import gap_balancing as slow

from equipoise.weighting import IGBv1

SEEDS = range(60)


def history(seed: int) -> list[list[list[float | None]]]:
    """Give four to six epochs; each loss of 1e-6 to 1e6, one in five absent, some solved."""
    rng = np.random.default_rng(seed)
    tasks, batches = int(rng.integers(1, 7)), int(rng.integers(1, 5))
    scales = 10 ** rng.uniform(-6, 6, size=tasks)
    if seed % 4 == 0:
        scales[0] = 1e-14  # solved from the beginning
    losses = scales * rng.uniform(0.2, 3, size=(int(rng.integers(4, 7)), batches, tasks))
    absent = rng.uniform(size=losses.shape) < (0.2 if seed % 2 else 0)
    if seed % 3 == 0:
        absent[1, :, -1] = True  # not once in the second epoch
    absent[..., 0] = False  # a batch without any task is no step
    return np.where(absent, None, losses).tolist()


def tensors(losses: list[float | None]) -> tuple[torch.Tensor, torch.Tensor]:
    present = torch.tensor([x is not None for x in losses])
    values = [torch.nan if x is None else x for x in losses]
    return torch.tensor(values, dtype=torch.float64), present


def capped(weights: list[float], losses: list, cap: float | None) -> list[float]:
    """Give the weights whose factors are bounded."""
    if cap is None:
        return weights
    return [min(w, cap * x) if x else w for w, x in zip(weights, losses, strict=True)]


@pytest.mark.parametrize("seed", SEEDS)
def test_weights_objective_and_factors(seed: int) -> None:
    table = history(seed)
    cap = 0.5 if seed % 5 == 0 else None
    weighting = IGBv1(len(table[0]), cap=cap)
    for epoch, expected in zip(table, slow.igbv1_weights(table), strict=True):
        for losses, uncapped in zip(epoch, expected, strict=True):
            weights = capped(uncapped, losses, cap)
            values, present = tensors(losses)
            values.requires_grad_()
            total = weighting(values, present).sum()
            found = weighting.weights.numpy()
            np.testing.assert_allclose(found, weights, rtol=1e-9, atol=1e-15)
            factors = torch.autograd.grad(total, values)[0].nan_to_num(0.0).numpy()
            wanted = slow.gradient_factors(uncapped, losses, cap)
            np.testing.assert_allclose(factors, wanted, rtol=1e-9, atol=1e-300)
            if cap is None:
                assert found.sum() == pytest.approx(sum(x is not None for x in losses))
            assert total.item() == pytest.approx(slow.igb_objective(weights, losses), rel=1e-9)


@pytest.mark.parametrize("seed", range(0, 60, 7))
@pytest.mark.parametrize("cut", [1, 2, 3, 5, 8])
def test_a_resumed_history_goes_on_the_same(seed: int, cut: int) -> None:
    """Cut anywhere, in the middle of the second epoch too; a fresh instance takes over."""
    table = [b for epoch in history(seed) for b in epoch]
    steps = len(history(seed)[0])
    whole, first, second = IGBv1(steps), IGBv1(steps), IGBv1(steps)
    for k, losses in enumerate(table):
        if k == cut:
            second.load_state_dict(first.state_dict())
            first = second
        expected, found = whole(*tensors(losses)), first(*tensors(losses))
        assert torch.equal(expected, found), k
    assert not differences(whole.state_dict(), first.state_dict())
