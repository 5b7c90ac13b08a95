"""Answers worked out by hand for IMTL-L, GLS, FAMO, STCH and GradNorm."""

import math

import numpy as np
import pytest
import torch

from equipoise.errors import TaskError
from equipoise.weighting import FAMO, GLS, IMTLL, SI, STCH, UW, GradNorm

BOTH = torch.tensor([True, True])


def vector(*losses: float) -> torch.Tensor:
    """Give float64 losses that ask for a gradient."""
    return torch.tensor(losses, dtype=torch.float64, requires_grad=True)


def close(actual: torch.Tensor, expected: list[float], tolerance: float = 1e-9) -> None:
    """Compare with an absolute bound."""
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=0, atol=tolerance)


def factors(weighting: torch.nn.Module, losses: torch.Tensor) -> torch.Tensor:
    """Give the derivative of the sum of the weighted losses by each loss."""
    return torch.autograd.grad(weighting(losses).sum(), losses)[0]


# -------------------------------------------------------------------------------------- IMTL-L


def test_imtl_l_begins_with_the_sum() -> None:
    weighting = IMTLL(n_tasks=2)
    losses = vector(2, 0.5)
    weighted = weighting(losses)
    close(weighted, [2, 0.5])
    close(weighting.weights, [1, 1], 0)
    slopes = torch.autograd.grad(weighted.sum(), weighting.log_scales)[0]
    close(slopes, [1, -0.5], 1e-7)
    assert weighting.lr is None


def test_imtl_l_is_best_where_all_scaled_losses_are_one() -> None:
    weighting = IMTLL(n_tasks=2).double()
    with torch.no_grad():
        weighting.log_scales.copy_(torch.tensor([-math.log(2), math.log(2)]))
    weighted = weighting(vector(2, 0.5))
    close(weighted, [1 + math.log(2), 1 - math.log(2)], 1e-7)
    close(weighting.weights, [0.5, 2], 1e-7)
    close(torch.autograd.grad(weighted.sum(), weighting.log_scales)[0], [0, 0], 1e-7)


def test_imtl_l_is_twice_uw_of_the_opposite_sign() -> None:
    ours, uw, losses = IMTLL(3), UW(3), vector(0.3, 2, 7)
    with torch.no_grad():
        ours.log_scales.copy_(torch.tensor([0.5, -1.0, 2.0]))
        uw.log_variances.copy_(-ours.log_scales)
    close(ours(losses), (2 * uw(losses)).tolist(), 1e-6)


# ----------------------------------------------------------------------------------------- GLS


def test_gls_known_answers() -> None:
    weighting = GLS()
    close(weighting(vector(1, 4)), [1, 1])  # half of sqrt(1 x 4) each
    close(weighting.weights, [1, 0.25])
    close(factors(GLS(), vector(1, 4)), [1, 0.25])
    close(factors(GLS(), vector(2, 4, 8)), [2 / 3, 1 / 3, 1 / 6])
    assert GLS()(vector(2, 4, 8)).sum().item() == pytest.approx(4, rel=1e-12)


def test_gls_of_many_small_losses_does_not_vanish() -> None:
    losses = vector(*[1e-6] * 100)  # their product is 1e-600
    assert GLS()(losses).sum().item() == pytest.approx(1e-6, rel=1e-9)
    close(factors(GLS(), losses), [0.01] * 100, 1e-12)


def test_gls_holds_a_solved_task_still() -> None:
    losses = vector(0, 4)
    assert GLS()(losses).sum().item() == pytest.approx(2e-6, rel=1e-9)
    close(factors(GLS(), losses), [0, 2.5e-7], 1e-15)


def test_gls_has_the_direction_of_si() -> None:
    losses = vector(0.2, 3, 40)
    ratio = factors(GLS(), losses) / factors(SI(), losses)
    close(ratio, [24 ** (1 / 3) / 3] * 3, 1e-12)


def test_gls_takes_the_mean_over_the_present_tasks() -> None:
    weighting = GLS()
    weighted = weighting(vector(1, 4, -9), present=torch.tensor([True, True, False]))
    close(weighted, [1, 1, 0])


# ---------------------------------------------------------------------------------------- FAMO


def test_famo_first_factors_and_first_step() -> None:
    weighting = FAMO(lr=0.025, gamma=0.001)
    losses = vector(1, 3)
    close(factors(weighting, losses), [0.75, 0.25])  # c = 1 / (1/2 + 1/6)
    close(weighting.weights, [0.75, 0.75])
    # The first one halved, the other stayed: slope ln(2) / 4 x (1, -1). Adam's first step is lr.
    weighting.observe(losses.detach(), BOTH, after=torch.tensor([0.5, 3.0]))
    close(weighting.logits, [-0.025, 0.025], 1e-8)
    z = 1 / (1 + math.exp(0.05))
    c = 1 / (z + (1 - z) / 3)
    close(factors(weighting, losses), [c * z, c * (1 - z) / 3], 1e-8)


def test_famo_of_equal_rates_stays() -> None:
    weighting = FAMO()
    losses = vector(1, 300)
    weighting(losses)
    weighting.observe(losses.detach(), BOTH, after=0.5 * losses.detach())
    close(weighting.logits, [0, 0], 1e-7)


def test_famo_decay_pulls_the_logits_back() -> None:
    weighting = FAMO(lr=0.1, gamma=0.5)
    losses = vector(1, 1)
    weighting(losses)
    weighting.logits = torch.tensor([1.0, -1.0], dtype=torch.float64)
    weighting.observe(losses.detach(), BOTH, after=losses.detach())
    close(weighting.logits, [0.9, -0.9], 1e-6)


def test_famo_counts_from_the_lower_bounds() -> None:
    weighting = FAMO(min_losses=[1.0, -1.0])
    close(factors(weighting, vector(2, 2)), [0.75, 0.25])
    assert FAMO(min_losses=-4.0)(vector(-3, -1)).isfinite().all()
    with pytest.raises(TaskError, match="above its min_losses is -0.5; FAMO") as error:
        weighting(vector(2, -1.5))
    assert error.value.task == 1


def test_famo_holds_a_solved_task_still_and_leaves_the_others_their_share() -> None:
    close(factors(FAMO(), vector(0, 2, 6)), [0, 0.75, 0.25])
    close(factors(FAMO(), vector(0, 0)), [0, 0], 0)


def test_famo_learns_nothing_from_losses_that_are_not_finite() -> None:
    weighting = FAMO()
    weighting(vector(1, 2))
    weighting.observe(torch.tensor([1.0, 2.0]), BOTH, after=torch.full((2,), torch.nan))
    close(weighting.logits, [0, 0], 0)
    assert weighting.adam.steps.tolist() == [0, 0]


# ---------------------------------------------------------------------------------------- STCH


def test_stch_of_equal_losses_is_ew() -> None:
    weighting = STCH(mu=0.7)
    weighted = weighting(vector(2, 2, 2))
    close(weighting.weights, [1, 1, 1])
    assert weighted.sum().item() == pytest.approx(3 * (2 + 0.7 * math.log(3)), rel=1e-12)


def test_stch_known_answers() -> None:
    weighting = STCH()
    weighted = weighting(vector(0, math.log(3)))
    close(weighting.weights, [0.5, 1.5])
    assert weighted.sum().item() == pytest.approx(2 * math.log(4), rel=1e-12)
    weighting = STCH(preference=[1, 3])  # scaled to (1/2, 3/2)
    close(factors(weighting, vector(0, math.log(3) / 1.5)), [0.25, 2.25])
    close(factors(STCH(mu=1e-3), vector(1, 2, 1.5)), [0, 3, 0])  # the maximum itself
    close(factors(STCH(mu=1e6), vector(1, 2, 1.5)), [1, 1, 1], 1e-5)  # the mean


def test_stch_huge_losses_are_finite() -> None:
    losses = vector(1e6, 1e6 - 1)
    assert STCH(mu=0.01)(losses).sum().item() == pytest.approx(2e6)
    close(factors(STCH(mu=0.01), losses), [2, 0])


def test_stch_counts_from_the_ideal_point_and_takes_negative_losses() -> None:
    close(factors(STCH(ideal=[5, -5]), vector(5, -5 + math.log(3))), [0.5, 1.5])
    close(factors(STCH(ideal=7.0), vector(-1, -1 + math.log(3))), [0.5, 1.5])


def test_stch_with_warm_up() -> None:
    # Epochs of two batches; one of warming up, one for N = (2, 40), then ln(L / N).
    weighting = STCH(mu=0.5, warmup_epochs=1, steps_per_epoch=2)
    for losses in ([9.0, 9.0], [7.0, 8.0], [1.0, 30.0], [3.0, 50.0]):
        weighted = weighting(vector(*losses))
        close(weighted, [math.log(loss) for loss in losses])
        close(weighting.weights, [1, 1], 0)
    for losses in ([2.0, 40.0], [1.0, 60.0], [4.0, 4.0]):
        squares = [(losses[0] / 2) ** 2, (losses[1] / 40) ** 2]  # exp(ln(L / N) / mu)
        shares = [2 * square / sum(squares) for square in squares]
        values = vector(*losses)
        weighted = weighting(values)
        close(weighting.weights, shares)
        assert weighted.sum().item() == pytest.approx(math.log(sum(squares)), abs=1e-9)
        found = torch.autograd.grad(weighted.sum(), values)[0]
        close(found, [share / loss for share, loss in zip(shares, losses, strict=True)])


# ------------------------------------------------------------------------------------ GradNorm


def after_one_step(weighting: GradNorm, losses: list[list[float]], norms: list[float]) -> list:
    """Give the weights learned from the first losses, the later ones, and gradient norms."""
    for batch in losses:
        weighting(vector(*batch))
    gram = torch.diag(torch.tensor(norms, dtype=torch.float64) ** 2)
    weighting.observe(torch.tensor(losses[-1], dtype=torch.float64), BOTH, gram=gram)
    return weighting.learned.tolist()


def test_gradnorm_pulls_the_norms_together() -> None:
    # Norms 1 and 3, mean 2: the slopes are -1 and 3, and Adam's first step is lr.
    weighting = GradNorm(alpha=0.0)
    assert after_one_step(weighting, [[5, 9]], [1, 3]) == pytest.approx([1.025, 0.975], abs=1e-8)
    close(factors(weighting, vector(5, 9)), [1.025, 0.975], 1e-8)


def test_gradnorm_leaves_equal_norms() -> None:
    assert after_one_step(GradNorm(alpha=0.0), [[5, 9]], [2, 2]) == [1, 1]


def test_gradnorm_wants_more_of_the_task_that_falls_slowly() -> None:
    # Both norms 2. Ratios 1 and 1/4, mean 5/8, rates 1.6 and 0.4: wanted 3.2 and 0.8.
    found = after_one_step(GradNorm(alpha=1.0), [[8, 8], [8, 2]], [2, 2])
    assert found == pytest.approx([1.025, 0.975], abs=1e-8)


def test_gradnorm_scales_the_weights_back_to_their_sum() -> None:
    # Three tasks: the slopes are -, -, +; (1.1, 1.1, 0.9) x 3 / 3.1.
    weighting = GradNorm(alpha=0.0, lr=0.1)
    weighting(vector(1, 1, 1))
    gram = torch.diag(torch.tensor([1.0, 1.0, 16.0]))
    weighting.observe(torch.ones(3), torch.ones(3, dtype=torch.bool), gram=gram)
    close(weighting.learned, [3.3 / 3.1, 3.3 / 3.1, 2.7 / 3.1], 1e-7)


def test_gradnorm_weights_stay_positive() -> None:
    weighting = GradNorm(alpha=0.0, lr=0.5)
    for _ in range(50):
        weighting(vector(1, 1))
        gram = torch.diag(torch.tensor([1e-6, 1e6]))
        weighting.observe(torch.ones(2), BOTH, gram=gram)
        assert (weighting.learned > 0).all()
        assert weighting.learned.sum().item() == pytest.approx(2)
    close(weighting.learned, [2, 0], 0.01)


# ------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: IMTLL(0), "n_tasks"),
        (lambda: IMTLL(2, lr=0.0), "lr"),
        (lambda: FAMO(lr=0.0), "lr"),
        (lambda: FAMO(gamma=-1.0), "decay"),
        (lambda: GradNorm(alpha=-1.0), "alpha"),
        (lambda: GradNorm(lr=math.nan), "lr"),
        (lambda: STCH(mu=0.0), "mu"),
        (lambda: STCH(preference=[1, 0]), "preference"),
        (lambda: STCH(preference=2.0), "preference"),
        (lambda: STCH(warmup_epochs=-1, steps_per_epoch=1), "warmup_epochs"),
        (lambda: STCH(warmup_epochs=4), "steps_per_epoch"),
        (lambda: IMTLL(3)(torch.ones(2)), "n_tasks=3"),
        (lambda: FAMO(min_losses=[0, 0, 0])(torch.ones(2)), "min_losses has 3"),
        (lambda: STCH(ideal=[0, 0, 0])(torch.ones(2)), "ideal has 3"),
        (lambda: STCH(preference=[1, 1, 1])(torch.ones(2)), "preference has 3"),
    ],
)
def test_a_wrong_parameter_is_refused(make: object, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(
    "make",
    [lambda: IMTLL(3), GLS, FAMO, GradNorm, lambda: STCH(warmup_epochs=0, steps_per_epoch=1)],
)
def test_a_negative_loss_is_refused_by_name(make: type) -> None:
    weighting = make()
    with pytest.raises(TaskError, match=f"is -0.5; {type(weighting).__name__} needs") as error:
        weighting(vector(1, -0.5, -2))
    assert error.value.task == 1


@pytest.mark.parametrize(("make", "what"), [(FAMO, "after"), (GradNorm, "gram")])
def test_nothing_is_learned_from_nothing(make: type, what: str) -> None:
    weighting = make()
    weighting(vector(1, 2))
    with pytest.raises(ValueError, match=what):
        weighting.observe(torch.ones(2), BOTH)
