"""Answers worked out by hand for the loss weightings."""

import math

import numpy as np
import pytest
import torch
from reference import weighting as reference
from scipy import stats

from equipoise.errors import TaskError
from equipoise.weighting import DWA, EW, RLW, SI, UW, IGBv1


def vector(*losses: float) -> torch.Tensor:
    """Give float64 losses that ask for a gradient."""
    return torch.tensor(losses, dtype=torch.float64, requires_grad=True)


def close(actual: torch.Tensor, expected: list[float], tolerance: float = 1e-8) -> None:
    """Compare with an absolute bound."""
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=0, atol=tolerance)


def factors(weighting: torch.nn.Module, losses: torch.Tensor) -> torch.Tensor:
    """Give the derivative of the sum of the weighted losses by each loss."""
    return torch.autograd.grad(weighting(losses).sum(), losses)[0]


def after_two_epochs(base: list[float], **options: float) -> IGBv1:
    """Give an IGBv1 whose second epoch, of one batch, had the losses `base`."""
    weighting = IGBv1(steps_per_epoch=1, **options)
    weighting(vector(*[7.0 for _ in base]))
    weighting(vector(*base))
    return weighting


# ---------------------------------------------------------------------------------- EW and SI


def test_ew_sums_the_losses() -> None:
    weighting = EW()
    close(weighting(vector(2, -3, 0)), [2, -3, 0], 0)
    close(weighting.weights, [1, 1, 1], 0)


def test_si_sums_the_logarithms() -> None:
    weighting = SI()
    close(weighting(vector(1, math.e, 0.5)), [0, 1, -math.log(2)], 1e-15)
    close(weighting.weights, [1, 1, 1], 0)
    close(factors(SI(), vector(1, 4, 0.5)), [1, 0.25, 2], 1e-15)


def test_si_holds_a_solved_task_still() -> None:
    losses = vector(0, 1e-13, 1e-12, 1e-11)
    close(SI()(losses), [math.log(1e-12)] * 3 + [math.log(1e-11)], 1e-12)
    found = factors(SI(), losses)
    close(found[:3], [0, 0, 0], 0)
    assert found[3].item() == pytest.approx(1e11, rel=1e-12)


def test_si_cap_bounds_the_gradient_factor_and_leaves_the_others() -> None:
    close(factors(SI(cap=100.0), vector(1e-6, 0.02, 0.005, 4)), [100, 50, 100, 0.25], 1e-9)


@pytest.mark.parametrize("make", [SI, lambda: IGBv1(3)])
def test_a_negative_loss_has_no_logarithm(make: type) -> None:
    with pytest.raises(TaskError) as error:
        make()(vector(1, 2, -1, -3))
    assert error.value.task == 2
    assert "-1" in str(error.value)


@pytest.mark.parametrize("cap", [0.0, -1.0, float("nan")])
def test_a_cap_is_positive(cap: float) -> None:
    with pytest.raises(ValueError, match="cap"):
        SI(cap=cap)


# -------------------------------------------------------------------------------------- IGBv1


def test_igbv1_paper_example() -> None:
    weighting = after_two_epochs([0.5, 0.3, 0.4])
    losses = vector(0.6, 0.3, 0.2)
    weighted = weighting(losses)
    close(weighting.weights, [1.29571943, 1.06084534, 0.64343523])
    assert weighted.sum().item() == pytest.approx(-2.97468468, abs=1e-8)
    close(
        torch.autograd.grad(weighted.sum(), losses)[0], [2.15953238, 3.53615115, 3.21717613], 1e-8
    )


def test_igbv1_schedule() -> None:
    # Epochs of two batches. The base is the mean over epoch 2: (2, 4); lambda from epoch 3 on.
    weighting = IGBv1(steps_per_epoch=2)
    for losses in ([9.0, 1.0], [8.0, 3.0], [1.0, 5.0], [3.0, 3.0]):
        weighted = weighting(vector(*losses))
        close(weighting.weights, [1, 1], 0)
        close(weighted, [math.log(loss) for loss in losses], 1e-12)
    for losses in ([2.0, 4.0], [1.0, 4.0], [6.0, 4.0], [2.0, 0.4]):  # epochs 3 and 4: base stays
        weighting(vector(*losses))
        ratio = losses[0] / 2 - losses[1] / 4
        first = 2 / (1 + math.exp(-ratio))
        close(weighting.weights, [first, 2 - first], 1e-12)


def test_igbv1_takes_a_task_of_no_base_as_solved() -> None:
    weighting = after_two_epochs([0.0, 2.0, 1e-12])
    weighting(vector(5, 2, 5))
    powers = [1.0, math.e, 1.0]  # ratios 0, 1, 0
    close(weighting.weights, [3 * power / sum(powers) for power in powers], 1e-12)


def test_igbv1_of_a_zero_loss_is_finite_and_has_no_gradient() -> None:
    weighting = after_two_epochs([1.0, 2.0])
    losses = vector(0, 2)
    weighted = weighting(losses)
    first = 2 / (1 + math.e)
    close(weighting.weights, [first, 2 - first], 1e-12)
    close(weighted, [first * math.log(1e-12), (2 - first) * math.log(2)], 1e-12)
    close(torch.autograd.grad(weighted.sum(), losses)[0], [0, (2 - first) / 2], 1e-12)


def test_igbv1_huge_ratio_is_finite() -> None:
    weighting = after_two_epochs([1e-6, 1.0])
    close(weighting(vector(10, 1)) / math.log(10), [2, 0], 1e-12)


def test_igbv1_cap_bounds_lambda_over_loss() -> None:
    weighting = after_two_epochs([1.0, 1.0], cap=10.0)
    first = 2 / (1 + math.exp(-(0.01 - 2)))  # lambda/L would be about 24 for a loss of 0.01
    close(factors(weighting, vector(0.01, 2)), [10, (2 - first) / 2], 1e-9)


# ---------------------------------------------------------------------------------------- DWA


def test_dwa_known_answer() -> None:
    weighting = DWA(steps_per_epoch=1, temperature=2.0)
    close(weighting(vector(2, 2)), [2, 2], 0)
    close(weighting(vector(1, 2)), [1, 2], 0)
    close(weighting(vector(10, 100)), [8.75647, 112.4353], 1e-4)
    close(weighting.weights, [0.875647, 1.124353], 1e-6)


def test_dwa_of_three_tasks_uses_epoch_means_and_the_temperature() -> None:
    weighting = DWA(steps_per_epoch=2, temperature=1.0)
    for losses in ([1, 4, 2], [3, 4, 6], [1, 2, 8], [1, 2, 4]):  # means (2, 4, 4), (1, 2, 6)
        weighting(vector(*losses))
        close(weighting.weights, [1, 1, 1], 0)
    speeds = [math.exp(0.5), math.exp(0.5), math.exp(1.5)]
    expected = [3 * speed / sum(speeds) for speed in speeds]
    weighting(vector(5, 5, 5))
    close(weighting.weights, expected, 1e-12)
    weighting(vector(3, 1, 1))  # the same in the whole epoch; means (4, 3, 3)
    close(weighting.weights, expected, 1e-12)
    weighting(vector(1, 1, 1))
    speeds = [math.exp(4), math.exp(1.5), math.exp(0.5)]
    close(weighting.weights, [3 * speed / sum(speeds) for speed in speeds], 1e-12)


# ----------------------------------------------------------------------------------------- UW


def test_uw_known_answers() -> None:
    weighting = UW(n_tasks=2)
    close(weighting.log_variances, [0, 0], 0)
    losses = vector(2, 4)
    total = weighting(losses).sum()
    assert total.item() == pytest.approx(3.0, abs=1e-6)
    slopes = torch.autograd.grad(total, [weighting.log_variances, losses])
    close(slopes[0], [-0.5, -1.5], 1e-6)
    close(slopes[1], [0.5, 0.5], 1e-6)
    with torch.no_grad():
        weighting.log_variances.copy_(torch.tensor([math.log(2), math.log(4)]))
    total = weighting(losses).sum()
    assert total.item() == pytest.approx(2.03972077, abs=1e-6)
    # There the slope by s is 0, and each loss counts 1 / (2 L): the scale-invariant objective.
    slopes = torch.autograd.grad(total, [weighting.log_variances, losses])
    close(slopes[0], [0, 0], 1e-6)
    close(slopes[1], [1 / 4, 1 / 8], 1e-6)
    close(weighting.weights, [1 / 4, 1 / 8], 1e-6)


def test_uw_learns_the_logarithms_of_the_losses() -> None:
    weighting = UW(n_tasks=3)
    assert weighting.lr == 0.025
    optimizer = torch.optim.SGD(weighting.parameters(), lr=1.0)
    for _ in range(200):
        optimizer.zero_grad()
        weighting(vector(0.2, 1, 5)).sum().backward()
        optimizer.step()
    close(weighting.log_variances, [math.log(0.2), 0, math.log(5)], 1e-5)


# ---------------------------------------------------------------------------------------- RLW


@pytest.mark.parametrize(("normalize_to", "total"), [(None, 3.0), (1.0, 1.0), (7.5, 7.5)])
def test_rlw_weights_are_positive_and_sum_as_told(normalize_to: float | None, total: float) -> None:
    weighting = RLW(generator=torch.Generator().manual_seed(0), normalize_to=normalize_to)
    losses = vector(1, 2, 4)
    seen = set()
    for _ in range(20):
        weighted = weighting(losses)
        weights = weighting.weights
        assert weights.min() > 0
        assert weights.sum().item() == pytest.approx(total, rel=1e-6)
        close(weighted, (weights * losses).tolist(), 1e-12)
        seen.add(tuple(weights.tolist()))
    assert len(seen) == 20, "the weights are drawn anew for each batch"


def test_rlw_is_the_softmax_of_standard_normal_draws() -> None:
    weighting = RLW(generator=torch.Generator().manual_seed(1))
    draws = []
    for _ in range(3000):
        weighting(vector(1, 1, 1, 1))
        draws.append(weighting.weights.clone())
    logs = torch.stack(draws).log().double().numpy()
    # ln w_i - ln w_j = xi_i - xi_j is normal with variance 2; (xi_1 - xi_2) + ... with variance 4.
    for ratio in (
        (logs[:, 0] - logs[:, 1]) / math.sqrt(2),
        (logs[:, 3] - logs[:, 2]) / math.sqrt(2),
        (logs[:, 0] - logs[:, 1] + logs[:, 2] - logs[:, 3]) / 2,
    ):
        assert stats.kstest(ratio, "norm").pvalue > 1e-3
    # Independent from batch to batch.
    series = logs[:, 0] - logs[:, 1]
    assert abs(np.corrcoef(series[1:], series[:-1])[0, 1]) < 5 / math.sqrt(3000)


def test_rlw_draws_from_a_generator_of_its_own() -> None:
    torch.manual_seed(0)
    first, second = RLW(), RLW()
    state = torch.get_rng_state()
    ours = first(vector(1, 2, 3)).tolist()
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    assert second(vector(1, 2, 3)).tolist() != ours
    torch.manual_seed(0)
    assert RLW()(vector(1, 2, 3)).tolist() == ours


# ----------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("make", [DWA, IGBv1])
@pytest.mark.parametrize("steps", [0, -1, 2.5])
def test_an_epoch_has_a_positive_whole_number_of_steps(make: type, steps: float) -> None:
    with pytest.raises(ValueError, match="steps_per_epoch"):
        make(steps)


@pytest.mark.parametrize("make", [EW, SI, RLW, lambda: DWA(1), lambda: UW(2), lambda: IGBv1(1)])
@pytest.mark.parametrize("shape", [(), (1, 2)])
def test_losses_are_a_vector(make: type, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="shape"):
        make()(torch.ones(shape))


# ------------------------------------------------------------------- the references themselves


def test_references_give_the_known_answers() -> None:
    igb = reference.IGBv1(1)
    igb.call([7, 7, 7])
    igb.call([0.5, 0.3, 0.4])
    weights, weighted = igb.call([0.6, 0.3, 0.2])
    np.testing.assert_allclose(weights, [1.29571943, 1.06084534, 0.64343523], atol=1e-8)
    assert sum(weighted) == pytest.approx(-2.97468468, abs=1e-8)
    dwa = reference.DWA(1)
    dwa.call([2, 2])
    dwa.call([1, 2])
    np.testing.assert_allclose(dwa.call([1, 1])[0], [0.875647, 1.124353], atol=1e-6)
    assert sum(reference.uncertainty([2, 4], [0, 0])) == 3.0
    assert reference.uncertainty_slopes([2, 4], [0, 0]) == [-0.5, -1.5]
    at_best = reference.uncertainty([2, 4], [math.log(2), math.log(4)])
    assert sum(at_best) == pytest.approx(2.03972077, abs=1e-8)
    with pytest.raises(ValueError, match="logarithm"):
        reference.SI().call([-1])
