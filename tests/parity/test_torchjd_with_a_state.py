"""TorchJD's methods that keep a state: saved and loaded, put back on an error, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import THREE, linear_model, regression_batch
from torch import Tensor, nn

import equipoise as eq

theirs = pytest.importorskip("torchjd.aggregation")
mixins = pytest.importorskip("torchjd._mixins")

LOSSES = dict.fromkeys(THREE, F.mse_loss)


def smoothed() -> Any:
    inside = theirs.CRMOGMWeighting(theirs.UPGradWeighting(), alpha=0.5)
    return theirs.GramianWeightedAggregator(inside)


STATEFUL: dict[str, Callable[[], Any]] = {
    "GradVac": lambda: theirs.GradVac(beta=0.3),
    "GradVacWeighting": lambda: theirs.GradVacWeighting(beta=0.3),
    "PCD": lambda: theirs.PCD(),
    "CRMOGM": smoothed,
    "ExcessMTL": lambda: theirs.ExcessMTL(),
}


def step_with(aggregator: Any, model: nn.Module | None = None, **more: Any) -> eq.Step:
    model = linear_model(THREE) if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return eq.Step(model, LOSSES, optimizer, None, aggregator, **more)


def values(step: eq.Step) -> list[Tensor]:
    return [p.detach().clone() for p in step.model.parameters()]


@pytest.mark.parametrize("name", STATEFUL)
def test_a_loaded_state_goes_on_as_the_saved_one(name: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    first, second = step_with(STATEFUL[name]()), step_with(STATEFUL[name]())
    for k in range(2):
        first(*regression_batch(THREE, seed=k))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    ends = []
    for step in (first, second):
        torch.manual_seed(1)
        for k in (2, 3):
            step(*regression_batch(THREE, seed=k))
        ends.append(values(step))
    assert all(map(torch.equal, *ends))


@pytest.mark.parametrize("name", STATEFUL)
def test_a_step_that_raises_leaves_the_state(name: str) -> None:
    """The state moves before the update, which raises; the step is then made as if nothing was."""
    ends = []
    for fails in (False, True):
        torch.manual_seed(0)
        step = step_with(STATEFUL[name]())
        step(*regression_batch(THREE, seed=0))
        if fails:
            step.optimizer.step, works = refuse, step.optimizer.step
            with pytest.raises(RuntimeError, match="no"):
                step(*regression_batch(THREE, seed=1))
            step.optimizer.step = works
        step(*regression_batch(THREE, seed=2))
        step(*regression_batch(THREE, seed=3))
        ends.append(values(step))
    assert all(map(torch.equal, *ends))


def buffers(state: dict[str, Any], stage: str = "aggregator") -> list[Tensor]:
    """Give all tensors of the state of a stage; there are some."""
    found = [b for part in state[stage].values() for b in part["buffers"].values()]
    assert found
    return found


def refuse() -> None:
    raise RuntimeError("no")


@pytest.mark.parametrize("name", ["GradVac", "CRMOGM"])
def test_the_flat_rows_have_a_state_of_their_own(name: str) -> None:
    torch.manual_seed(0)
    step = step_with(STATEFUL[name](), sharpness=eq.TaskSharpness(0.05))
    step(*regression_batch(THREE))
    state = step.state_dict()
    clean, flat = buffers(state), buffers(state, "flat_aggregator")
    assert not torch.equal(clean[0], flat[0])


@pytest.mark.parametrize("name", ["GradVac", "PCD", "CRMOGM"])
def test_absent_tasks_would_start_it_anew(name: str) -> None:
    step = step_with(STATEFUL[name]())
    step(*regression_batch(THREE))
    x, y = regression_batch(THREE, seed=1)
    del y["b"]
    before, state = values(step), step.state_dict()
    with pytest.raises(eq.EquipoiseError, match="start anew where a task is absent"):
        step(x, y)
    assert all(map(torch.equal, before, values(step)))
    assert all(map(torch.equal, buffers(state), buffers(step.state_dict())))


def test_methods_without_a_state_take_absent_tasks() -> None:
    step = step_with(theirs.UPGrad())
    x, y = regression_batch(THREE)
    del y["b"]
    step(x, y)


class WithASolver(theirs.Aggregator, mixins.Stateful):
    """As NashMTL, which keeps a problem of cvxpy's."""

    def __init__(self) -> None:
        super().__init__()
        self.problem = object()

    def reset(self) -> None:
        self.problem = object()

    def forward(self, matrix: Tensor, /) -> Tensor:
        return matrix.sum(0)


class NashMTL(WithASolver):
    pass


@pytest.mark.parametrize(
    ("kind", "advice"),
    [(NashMTL, "equipoise.NashMTL"), (WithASolver, "a method of Equipoise's own")],
)
def test_a_state_that_cannot_be_saved(kind: type, advice: str) -> None:
    with pytest.raises(eq.CombinationError, match=rf"its problem is a object. Use {advice}"):
        step_with(kind())
    # In a loop of the user's nobody saves it.
    w = torch.ones(3, requires_grad=True)
    eq.backward([w.sum(), w.square().sum()], [w], kind())
    assert w.grad is not None


@pytest.mark.parametrize("name", ["DWA", "IMTLL", "FAMO"])
def test_scalarizers_are_no_weightings(name: str) -> None:
    scalarizers = pytest.importorskip("torchjd.scalarization")
    made = getattr(scalarizers, name)
    other = made(3) if name in ("FAMO",) else made(*([3] if name == "IMTLL" else []))
    model = linear_model(THREE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with pytest.raises(eq.CombinationError, match=f"weighting is TorchJD's {name}"):
        eq.Step(model, LOSSES, optimizer, other)
    with pytest.raises(eq.CombinationError, match=f"aggregator is TorchJD's {name}"):
        eq.Step(model, LOSSES, optimizer, None, other)
