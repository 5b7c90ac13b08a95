"""state_dict: complete, a copy, and enough to continue bit for bit."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    class_batch,
    class_step,
    differences,
    linear_model,
    regression_batch,
    regression_step,
    sgd,
    snapshot,
)

import equipoise as eq

STAGES: dict[str, tuple[Callable, Callable]] = {
    "igbv1+pcgrad": (lambda: eq.IGBv1(2), eq.PCGrad),
    "dwa+cagrad": (lambda: eq.DWA(2), eq.CAGrad),
    "uw+mean": (lambda: eq.UW(2), eq.Mean),
    "rlw+mgda": (eq.RLW, eq.MGDA),
}


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5])
def test_a_fresh_step_continues_bit_for_bit(stages: str, steps: int) -> None:
    weighting, aggregator = STAGES[stages]
    step = class_step(weighting(), aggregator())
    for k in range(steps):  # 2 steps are an epoch: stop within and between epochs
        step(*class_batch(seed=k))
    state = through_a_file(step.state_dict())
    expected = [step(*class_batch(seed=10 + k)) for k in range(5)]
    final = snapshot(step)

    torch.manual_seed(99)
    fresh = class_step(weighting(), aggregator())
    torch.manual_seed(98)
    fresh.load_state_dict(state)
    got = [fresh(*class_batch(seed=10 + k)) for k in range(5)]
    assert differences(expected, got) == []
    assert differences(final, snapshot(fresh)) == []


@pytest.mark.parametrize("stages", STAGES)
def test_loading_into_a_step_with_a_history_of_its_own(stages: str) -> None:
    weighting, aggregator = STAGES[stages]
    step, other = class_step(weighting(), aggregator()), class_step(weighting(), aggregator())
    step(*class_batch(seed=0))
    for k in range(6):
        other(*class_batch(seed=20 + k))
    state = step.state_dict()
    expected = step(*class_batch(seed=1))
    other.load_state_dict(state)
    assert differences(expected, other(*class_batch(seed=1))) == []
    assert differences(snapshot(step), snapshot(other)) == []


def test_the_state_is_a_copy_in_both_directions() -> None:
    step = class_step(eq.IGBv1(1), eq.PCGrad())
    step(*class_batch(seed=0))
    state = step.state_dict()
    kept = through_a_file(state)
    step(*class_batch(seed=1))
    assert differences(kept, state) == []
    step.load_state_dict(state)
    step(*class_batch(seed=2))
    assert differences(kept, state) == []


def test_the_state_holds_everything() -> None:
    state = class_step(eq.IGBv1(1), eq.PCGrad()).state_dict()
    assert state.keys() == {
        "model", "optimizer", "weighting", "aggregator", "random", "stages"
    }  # fmt: skip
    assert class_step(None, lambda rows: rows.sum(0)).state_dict().keys() == {
        "model", "optimizer", "weighting", "random", "stages"
    }  # fmt: skip


def test_taking_the_state_disturbs_nothing() -> None:
    step = class_step(eq.RLW(), eq.PCGrad())
    step(*class_batch())
    before = snapshot(step)
    step.state_dict()
    assert differences(before, snapshot(step)) == []


@pytest.mark.parametrize("load", [True, False])
def test_a_state_of_other_parts_is_refused_and_nothing_loaded(load: bool) -> None:
    plain = class_step(None, lambda rows: rows.sum(0))
    step = class_step(None, eq.Sum())
    if load:
        step, plain = plain, step
    step(*class_batch())
    before = snapshot(step)
    with pytest.raises(eq.EquipoiseError, match=r"the state holds .*'aggregator'|this Step .*"):
        step.load_state_dict(plain.state_dict())
    assert differences(before, snapshot(step)) == []


OTHER = [
    pytest.param(eq.EW, lambda: eq.IGBv1(2), id="weighting with other buffers"),
    pytest.param(eq.EW, eq.SI, id="weighting with the same buffers"),
]


@pytest.mark.parametrize(("saved", "built"), OTHER)
def test_a_state_of_another_stage_is_refused_and_nothing_loaded(
    saved: Callable, built: Callable
) -> None:
    state = class_step(saved()).state_dict()
    step = class_step(built())
    step(*class_batch())
    before = snapshot(step)
    with pytest.raises(eq.EquipoiseError):
        step.load_state_dict(state)
    assert differences(before, snapshot(step)) == []


def test_a_generator_given_from_outside_is_part_of_the_state() -> None:
    generator = torch.Generator().manual_seed(5)
    step = regression_step(eq.RLW(generator=generator))
    state = step.state_dict()
    first = step(*regression_batch()).weights
    torch.rand(3, generator=generator)
    step.load_state_dict(state)
    assert torch.equal(step(*regression_batch()).weights, first)


def test_stages_do_not_draw_from_the_global_generator() -> None:
    step = regression_step(eq.RLW(), eq.PCGrad())
    state = torch.get_rng_state()
    step(*regression_batch())
    assert torch.equal(torch.get_rng_state(), state)


def test_learned_weights_continue_with_their_own_learning_rate() -> None:
    def build(**options: Any) -> eq.Step:
        model = linear_model()
        losses = dict.fromkeys(model.tasks, torch.nn.functional.mse_loss)
        return eq.Step(model, losses, sgd(model, momentum=0.9), eq.UW(2, **options))

    step = build(lr=0.5)
    step(*regression_batch())
    state = through_a_file(step.state_dict())
    step(*regression_batch(seed=1))
    fresh = build()
    fresh.load_state_dict(state)
    fresh(*regression_batch(seed=1))
    assert torch.equal(step.weighting.log_variances, fresh.weighting.log_variances)


def test_something_else_than_a_state_is_refused() -> None:
    step = class_step(None, eq.Sum())
    before = snapshot(step)
    with pytest.raises(eq.EquipoiseError, match="was saved with None, this Step has"):
        step.load_state_dict(step.model.state_dict())
    assert differences(before, snapshot(step)) == []
