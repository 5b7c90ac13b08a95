"""A measure leaves no trace: on the model, on its modes, on any generator; and what is refused."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import TWO, class_batch, conv_model, differences
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset

import equipoise as eq
from equipoise import diagnostics
from equipoise.errors import EquipoiseError, NonFiniteError, TaskError


class Restless(nn.Module):
    """Draws, and moves its buffer, whenever it is called; raises in the given call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.raises_in = 0
        self.seen = 0

    def forward(self, x: Any) -> Any:
        self.calls += 1
        self.seen += 1
        assert not self.training
        if self.seen == self.raises_in:
            raise RuntimeError("on purpose")
        return x + 1e-3 * torch.rand(x.shape, dtype=x.dtype)


class Augmented(Dataset):
    """Nine images; reading one draws from the global generators of torch, numpy and Python."""

    def __init__(self) -> None:
        self.inputs, self.targets = class_batch(n=9)

    def __len__(self) -> int:
        return 9

    def __getitem__(self, k: int) -> tuple[Any, dict]:
        noise = np.random.standard_normal() + random.random() + float(torch.rand(()))
        return self.inputs[k] + 0.1 * noise, {t: y[k] for t, y in self.targets.items()}


def restless() -> tuple[eq.SharedTrunk, Restless]:
    """A model in a mixture of modes, with gradients, BatchNorm, Dropout and a restless layer."""
    model = conv_model()
    layer = Restless()
    model.trunk.append(layer)
    model.train()
    model.trunk[1].eval()
    model.heads["left"].eval()
    next(iter(model.trunk[0].parameters())).requires_grad_(False)
    for p in model.trunk[4].parameters():
        p.grad = torch.ones_like(p)
    return model, layer


def loader() -> DataLoader:
    """Shuffles by the global generator; batches of 4, 4 and 1."""
    return DataLoader(Augmented(), batch_size=4, shuffle=True)


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that a measure could move."""
    return {
        "model": {k: v.clone() for k, v in model.state_dict().items()},
        "grad": {k: p.grad if p.grad is None else p.grad.clone() for k, p in named(model)},
        "trained": [p.requires_grad for _, p in named(model)],
        "modes": [module.training for module in model.modules()],
        "torch": torch.get_rng_state(),
        "numpy": list(map(str, np.random.get_state()[1])) + [np.random.get_state()[2]],
        "python": str(random.getstate()),
        "grad mode": torch.is_grad_enabled(),
    }


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters())


LOSSES = dict.fromkeys(TWO, F.cross_entropy)
SCORES = dict.fromkeys(TWO, diagnostics.accuracy)
MEASURES = {
    "noise": lambda m, b: diagnostics.noise_robustness(m, b, SCORES, [0.0, 0.5, 2.0], 2).values,
    "entropies": lambda m, b: torch.stack(list(diagnostics.entropies(m, b).values())),
    "calibration": lambda m, b: torch.stack(
        [diagnostics.calibration(m, b).ece, diagnostics.calibration(m, b).brier]
    ),
    "surface": lambda m, b: diagnostics.loss_surface(m, b, LOSSES, points=2).values,
    "sharpness": lambda m, b: diagnostics.sharpness_curve(m, b, LOSSES, [0.0, 0.1]).values,
}
every_measure = pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)


@every_measure
def test_everything_is_as_before_and_the_next_run_gives_the_same(measure) -> None:
    model, layer = restless()
    pointers = [p.data_ptr() for p in model.parameters()]
    before = state(model)
    first = measure(model, loader())
    assert layer.seen >= 3, "the layer was called"
    assert differences(before, state(model)) == []
    assert pointers == [p.data_ptr() for p in model.parameters()]
    assert torch.equal(first, measure(model, loader()))
    assert bool(first.isfinite().all())
    assert not first.requires_grad


@every_measure
@given(st.integers(1, 7))
@settings(max_examples=4)
def test_everything_is_as_before_when_something_raises(measure, call: int) -> None:
    model, layer = restless()
    before = state(model)
    layer.raises_in = call
    given_batches = loader()
    try:
        measure(model, given_batches)
    except RuntimeError as error:
        assert str(error) == "on purpose"  # noqa: PT017
    else:
        assert call > 3, "there were at least three calls"
    assert differences(before, state(model)) == []


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, ZeroDivisionError])
def test_a_callable_that_raises_in_the_middle(interrupt) -> None:
    model, _ = restless()
    before = state(model)
    calls = []

    def loss(output, target):
        calls.append(1)
        if len(calls) == 11:  # within the perturbed passes
            raise interrupt
        return F.cross_entropy(output, target)

    for measure in (
        lambda: diagnostics.noise_robustness(model, loader(), {"left": loss}, [1.0]),
        lambda: diagnostics.loss_surface(model, loader(), {"left": loss}),
        lambda: diagnostics.sharpness_curve(model, loader(), {"left": loss}, [0.1, 0.2, 0.3]),
    ):
        calls.clear()
        with pytest.raises(interrupt):
            measure()
        assert differences(before, state(model)) == []


def test_every_pass_sees_the_same_order_and_the_same_draws() -> None:
    """Otherwise shuffling, augmentation or noise in the model would look like a rise."""
    model, _ = restless()
    radii = [0.0, 1e-12]
    found = diagnostics.sharpness_curve(model, loader(), LOSSES, radii).values
    assert found[0].tolist() == [0, 0]
    assert bool((found[1].abs() < 1e-6).all())
    flat = [{n: torch.zeros_like(p) for n, p in named(model) if p.requires_grad}] * 2
    surface = diagnostics.loss_surface(model, loader(), LOSSES, points=2, directions=flat).values
    assert torch.equal(surface, surface[:, :1, :1].expand_as(surface))


@every_measure
def test_it_does_not_matter_how_the_samples_are_cut_into_batches(measure) -> None:
    inputs, targets = class_batch(n=9)
    model = conv_model()

    def cut(*sizes: int) -> list:
        parts = [torch.arange(9).split(list(sizes))][0]
        return [(inputs[part], {t: y[part] for t, y in targets.items()}) for part in parts]

    torch.testing.assert_close(
        measure(model, cut(9)), measure(model, cut(1, 3, 5)), rtol=1e-4, atol=1e-5
    )


@every_measure
def test_absent_tasks_and_missing_labels(measure) -> None:
    """Samples without a label, and batches without a task, do not count."""
    inputs, targets = class_batch(n=8)
    model = conv_model()
    some = targets["left"].double()
    some[[0, 5]] = torch.nan
    holed = [
        (inputs[:4], {"left": some[:4], "right": targets["right"][:4]}),
        (inputs[4:], {"left": some[4:]}),
    ]
    here = torch.tensor([1, 2, 3, 4, 6, 7])
    whole = [
        (inputs[here], {"left": targets["left"][here]}),
        (inputs[:4], {"right": targets["right"][:4]}),
    ]
    if measure is MEASURES["entropies"]:
        assert measure(model, holed).shape == (2, 8), "no label is looked at"
        return
    long = {t: lambda o, y: F.cross_entropy(o, y.long()) for t in TWO}
    by_hand = {
        "noise": lambda b: measure(model, b),
        "calibration": lambda b: measure(model, b),
        "surface": lambda b: diagnostics.loss_surface(model, b, long, points=2).values,
        "sharpness": lambda b: diagnostics.sharpness_curve(model, b, long, [0.1]).values,
    }
    run = by_hand[next(name for name, m in MEASURES.items() if m is measure)]
    torch.testing.assert_close(run(holed), run(whole), rtol=1e-5, atol=1e-6)


def test_a_task_without_labels_is_nan() -> None:
    inputs, targets = class_batch()
    model = conv_model()
    nothing = torch.full((8,), torch.nan)
    for batch in ((inputs, {"right": targets["right"]}), (inputs, {**targets, "left": nothing})):
        batches = [batch, batch]
        noise = diagnostics.noise_robustness(model, batches, SCORES, [0.0, 1.0], 2)
        assert noise.values[..., 0].isnan().all() and noise.clean[0].isnan()
        assert noise.values[..., 1].isfinite().all()
        assert noise.radius(chance=0.0).isnan().tolist()[0]
        found = diagnostics.calibration(model, batches)
        assert found.n.tolist() == [0, 16]
        for values in (found.ece, found.brier, found.accuracy, found.confidence):
            assert values.isnan().tolist() == [True, False]
        surface = diagnostics.loss_surface(model, batches, LOSSES, points=2).values
        assert surface[0].isnan().all() and surface[1].isfinite().all()
        curve = diagnostics.sharpness_curve(model, batches, LOSSES, [0.1])
        assert curve.values.isnan().tolist() == [[True, False]]
        assert curve.losses.isnan().tolist() == [True, False]


@every_measure
def test_an_iterator_is_refused_before_it_is_used(measure) -> None:
    model = conv_model()
    before = state(model)
    for once in (iter([class_batch()]), (batch for batch in [class_batch()]), iter(loader())):
        after_making = torch.get_rng_state()
        with pytest.raises(EquipoiseError, match="used up after one pass; give a list") as caught:
            measure(model, once)
        assert type(once).__name__ in str(caught.value)
        assert torch.equal(torch.get_rng_state(), after_making)
    next(once)  # nothing was taken from it
    assert differences(before["model"], state(model)["model"]) == []


class Unwrapped:
    """Looks as if it could be iterated twice, and cannot."""

    def __init__(self, batches: list) -> None:
        self.once = iter(batches)

    def __iter__(self) -> Any:
        return self.once


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "batches gave no batch; give a list or a DataLoader"),
        (Unwrapped([class_batch()]), ValueError, "can be gone through several times"),
        ([class_batch()[0]], ValueError, "a batch is a Tensor; give pairs"),
        ([(1, 2, 3)], ValueError, "a batch is a tuple; give pairs"),
        ([(class_batch()[0], torch.zeros(8))], ValueError, "are a Tensor; give a dict"),
        (
            [(class_batch()[0], {"rihgt": torch.zeros(8)})],
            TaskError,
            "task 'rihgt': has a target but the model has no such task; did you mean 'right'?",
        ),
    ],
)
def test_batches_that_cannot_be_used(batches, error, message) -> None:
    with pytest.raises(error) as caught:
        diagnostics.sharpness_curve(conv_model(), batches, LOSSES, [0.1])
    assert message in str(caught.value)
    assert isinstance(caught.value, EquipoiseError)


def test_tasks_are_chosen_by_name_and_come_in_the_models_order() -> None:
    model = conv_model(("a", "b", "c"))
    batches = [class_batch(("a", "b", "c"))]
    turned = dict.fromkeys(("c", "a"), F.cross_entropy)
    assert diagnostics.loss_surface(model, batches, turned, points=2).tasks == ("a", "c")
    assert diagnostics.sharpness_curve(model, batches, turned, [0.1]).tasks == ("a", "c")
    assert diagnostics.noise_robustness(model, batches, turned, [0.1], 1).tasks == ("a", "c")
    assert diagnostics.calibration(model, batches, tasks=["c", "a"]).tasks == ("a", "c")
    assert list(diagnostics.entropies(model, batches, tasks=["c", "a"])) == ["a", "c"]
    assert list(diagnostics.entropies(model, batches, tasks="b")) == ["b"]
    for unknown in (
        lambda: diagnostics.calibration(model, batches, tasks=["d"]),
        lambda: diagnostics.loss_surface(model, batches, {"d": F.cross_entropy}),
    ):
        with pytest.raises(TaskError, match="task 'd': is named in (tasks|losses), but the model"):
            unknown()
    for empty in (
        lambda: diagnostics.entropies(model, batches, tasks=[]),
        lambda: diagnostics.noise_robustness(model, batches, {}, [0.1]),
    ):
        with pytest.raises(ValueError, match="is empty; name at least one task"):
            empty()


def test_a_value_that_is_no_scalar_names_the_task() -> None:
    model, batches = conv_model(), [class_batch()]
    each = {"right": lambda o, y: F.cross_entropy(o, y, reduction="none")}
    for measure in (
        lambda: diagnostics.noise_robustness(model, batches, each, [0.1]),
        lambda: diagnostics.loss_surface(model, batches, each),
        lambda: diagnostics.sharpness_curve(model, batches, each, [0.1]),
    ):
        with pytest.raises(TaskError, match=r"task 'right': its callable gave shape \(8,\)"):
            measure()


def test_a_plain_number_is_a_score() -> None:
    found = diagnostics.noise_robustness(
        conv_model(), [class_batch(), class_batch(n=2)], {"left": lambda o, y: len(y)}, [0.0], 1
    )
    assert found.clean.tolist() == [(8 * 8 + 2 * 2) / 10]
    third = diagnostics.noise_robustness(
        conv_model(), [class_batch()], {"left": lambda o, y: 1 / 3}, [0.0], 1
    )
    assert third.clean.item() == pytest.approx(1 / 3, abs=1e-15)


def test_nested_inputs_and_dict_outputs() -> None:
    class Trunk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, inputs: dict) -> dict:
            return {"z": self.layer(inputs["x"]), "note": "no tensor"}

    class Head(nn.Module):
        def forward(self, features: dict) -> dict:
            return {"out": features["z"], "note": features["note"]}

    torch.manual_seed(0)
    model = eq.SharedTrunk(Trunk(), {"a": Head()})
    target = torch.randn(4, 2)
    target[1] = torch.nan
    batches = [({"x": torch.randn(4, 3)}, {"a": target})]
    seen = []

    def loss(output: dict, target: torch.Tensor) -> torch.Tensor:
        seen.append(len(target))
        return F.mse_loss(output["out"], target)

    curve = diagnostics.sharpness_curve(model, batches, {"a": loss}, [0.1])
    assert set(seen) == {3}
    assert curve.values.item() > 0


def test_no_grad_around_it_does_not_matter() -> None:
    model, batches = conv_model(), [class_batch()]
    expected = diagnostics.sharpness_curve(model, batches, LOSSES, [0.1]).values
    with torch.no_grad():
        found = diagnostics.sharpness_curve(model, batches, LOSSES, [0.1]).values
        assert not torch.is_grad_enabled()
    assert torch.equal(found, expected)


def test_separate_trunks_are_measured_as_well() -> None:
    model, batches = conv_model().separated(), [class_batch()]
    for measure in MEASURES.values():
        assert measure(model, batches).isfinite().all()


def test_a_generator_on_another_device_is_refused() -> None:
    class Elsewhere:
        device = torch.device("cuda")

    model, batches = conv_model(), [class_batch()]
    for measure in (
        lambda g: diagnostics.noise_robustness(model, batches, SCORES, [1.0], generator=g),
        lambda g: diagnostics.loss_surface(model, batches, LOSSES, generator=g),
    ):
        with pytest.raises(ValueError, match="generator is on cuda; draws are made on the CPU"):
            measure(Elsewhere())


@pytest.mark.parametrize("name", ["entropies", "calibration"])
def test_outputs_that_are_not_finite_name_the_task(name) -> None:
    model, batches = conv_model(), [class_batch()]
    with torch.no_grad():
        model.heads["right"][2].bias[1] = torch.nan
    with pytest.raises(NonFiniteError, match="task 'right': output holds a NaN"):
        MEASURES[name](model, batches)
