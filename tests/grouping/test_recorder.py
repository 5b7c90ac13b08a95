"""Maps recorded in training are those of the outputs that the step has trained on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import equipoise as eq
from equipoise.grouping import DataMaps, Recorder, true_class_probability

N = 24


def network(dropout: float = 0.5) -> eq.SharedTrunk:
    torch.manual_seed(0)
    trunk = nn.Sequential(
        nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 8)
    )
    return eq.SharedTrunk(
        trunk, {"yes": nn.Linear(8, 1), "class": nn.Linear(8, 3), "size": nn.Linear(8, 1)}
    )


def data() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, 3, generator=generator)
    yes = (x[:, :1] > 0).float()
    yes[3] = math.nan
    return x, {"yes": yes, "class": x.argmax(1), "size": x.norm(dim=1, keepdim=True)}


LOSSES = {
    "yes": F.binary_cross_entropy_with_logits,
    "class": F.cross_entropy,
    "size": F.mse_loss,
}
KINDS = {"size": "regression"}


@pytest.mark.parametrize("recipe", ["ew", "f-mgda", "mgda-ub", "igbv1+pcgrad"])
def test_what_the_step_has_seen_is_recorded(recipe: str) -> None:
    x, targets = data()
    model, twin = network(), network()
    step = eq.Recipe.parse(recipe).build(model, LOSSES, lr=0.1, steps_per_epoch=2, seed=0)
    maps, expected = DataMaps(3, N, [1, 2]), DataMaps(3, N, [1, 2])
    record = Recorder(model, maps, KINDS)
    for epoch in range(2):
        for index in torch.randperm(N, generator=torch.Generator().manual_seed(epoch)).split(10):
            batch = {task: y[index] for task, y in targets.items()}
            twin.load_state_dict(model.state_dict())
            state = torch.get_rng_state()
            scores = true_class_probability(twin(x[index]), batch, kinds=KINDS)
            torch.set_rng_state(state)  # the masks that the step will draw
            expected.update(scores, index)
            with record(batch, index):
                step(x[index], batch)
        maps.end_epoch()
        expected.end_epoch()
    torch.testing.assert_close(maps.current(), expected.current(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(maps.gram(), expected.gram(), rtol=1e-5, atol=1e-5)
    assert maps.current()[0, 3].tolist() == [0, 0], "the sample without a label"
    assert not any(head._forward_hooks for head in model.heads.values())


def test_recording_changes_nothing_in_the_training() -> None:
    x, targets = data()
    states = []
    for recorded in (False, True):
        model = network()
        step = eq.Recipe.parse("ew").build(model, LOSSES, lr=0.1, steps_per_epoch=1, seed=0)
        record = Recorder(model, DataMaps(3, N, [1]), KINDS)
        for _ in range(3):
            if recorded:
                with record(targets, torch.arange(N)):
                    step(x, targets)
            else:
                step(x, targets)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_absent_tasks_and_masks() -> None:
    x, targets = data()
    model = network()
    step = eq.Recipe.parse("ew").build(model, LOSSES, lr=0.1, steps_per_epoch=1)
    maps = DataMaps(3, N, [1])
    del targets["size"]
    masks = {"class": torch.arange(N) % 2 == 0}
    with Recorder(model, maps, KINDS)(targets, torch.arange(N), masks):
        step(x, targets, masks)
    assert maps.count.sum(0).tolist() == [N - 1, N // 2, 0]


def test_a_step_that_fails_records_nothing() -> None:
    x, targets = data()
    model = network()
    maps = DataMaps(3, N, [1])
    record = Recorder(model, maps, KINDS)
    with pytest.raises(RuntimeError, match="half way"), record(targets, torch.arange(N)):
        model(x)
        raise RuntimeError("half way")
    assert not maps.count.any()
    assert not any(head._forward_hooks for head in model.heads.values())
    with pytest.raises(eq.EquipoiseError, match="no head"), record(targets, torch.arange(N)):
        pass
    with pytest.raises(ValueError, match="maps for 2 tasks"):
        Recorder(model, DataMaps(2, N, [1]))


def test_a_pass_of_its_own_in_evaluation_mode() -> None:
    x, targets = data()
    model = network()
    model.heads["yes"].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    random = torch.get_rng_state()
    maps = DataMaps(3, N, [1])
    batches = [(x[i], {t: y[i] for t, y in targets.items()}, i) for i in torch.arange(N).split(7)]
    Recorder(model, maps, KINDS).look(batches)
    maps.end_epoch()
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    expected = true_class_probability(model.eval()(x), targets, kinds=KINDS)
    found = maps.current()[..., 0].T
    torch.testing.assert_close(found, expected.nan_to_num(0.0), rtol=1e-5, atol=1e-6)


def test_a_batch_without_any_label_counts_for_nothing() -> None:
    """The step does nothing with it, and no head is called; without the step it is an error."""
    x, targets = data()
    model = network()
    step = eq.Recipe.parse("ew").build(model, LOSSES, lr=0.1, steps_per_epoch=1)
    maps = DataMaps(3, N, [1])
    record = Recorder(model, maps, KINDS)
    nothing = {"yes": torch.full((N, 1), math.nan), "size": torch.full((N, 1), math.nan)}
    with record(nothing, torch.arange(N)):
        step(x, nothing)
    assert not maps.count.any()
    with (
        pytest.raises(eq.EquipoiseError, match="no head of the model was called"),
        record(targets, torch.arange(N)),
    ):
        pass


def test_a_look_that_fails_counts_nothing() -> None:
    x, targets = data()
    maps = DataMaps(3, N, [1])
    record = Recorder(network(), maps, KINDS)

    def batches():
        yield x, targets, torch.arange(N)
        raise RuntimeError("the loader is broken")

    with pytest.raises(RuntimeError, match="broken"):
        record.look(batches())
    assert not maps.count.any() and record.model.training


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (eq.TaskError, "'Yes': has a kind .* did you mean 'yes'", {"kinds": {"Yes": "binary"}}),
        (eq.TaskError, "'yes': kind is 'bin'", {"kinds": {"yes": "bin"}}),
        (eq.TaskError, "kind is 'bin'", {"kinds": "bin"}),
        (eq.TaskError, "'zise': has a scale", {"scales": {"zise": 2.0}}),
    ],
)
def test_names_and_kinds_are_looked_at_before_training(error, message, arguments) -> None:
    with pytest.raises(error, match=message):
        Recorder(network(), DataMaps(3, N, [1]), **arguments)


def test_maps_of_other_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match="maps of tasks"):
        Recorder(network(), DataMaps(3, N, [1], tasks=("yes", "size", "class")))
    x, targets = data()
    record = Recorder(network(), DataMaps(3, N, [1]), KINDS)
    wrong = {"sise": targets["size"]}
    with pytest.raises(eq.TaskError, match="has a target"):
        record.look([(x, wrong, torch.arange(N))])
    with pytest.raises(eq.TaskError, match="has a target"), record(wrong, torch.arange(N)):
        pytest.fail("the body was run")
