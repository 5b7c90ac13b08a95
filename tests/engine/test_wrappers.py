"""Wrappers around a network, and optimizers: what a step would go around is refused when built."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import TWO, linear_model, regression_batch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

import equipoise as eq

LOSSES = dict.fromkeys(TWO, F.mse_loss)


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of this process alone."""
    path: Path = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", store=dist.FileStore(str(path), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def built(model: nn.Module, form: str, **more: Any) -> eq.Step:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return eq.Step(model, LOSSES if form == "trunk" else TWO, optimizer, **more)


def sharded(module: nn.Module) -> nn.Module:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("this torch has no fully_shard")
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    return fsdp.fully_shard(module, mesh=mesh)


@pytest.mark.parametrize("form", ["trunk", "closure"])
@pytest.mark.parametrize("wrapper", [DistributedDataParallel, DataParallel, sharded])
@pytest.mark.parametrize("where", ["model", "trunk", "a head"])
@pytest.mark.usefixtures("group")
def test_wrappers_are_refused(where: str, wrapper: Any, form: str) -> None:
    model: Any = linear_model()
    if where == "model":
        model = wrapper(model)
    elif where == "trunk":
        model.trunk = wrapper(model.trunk)
    else:
        model.heads["left"][0] = wrapper(model.heads["left"][0])
    name = {DistributedDataParallel: "DistributedDataParallel", DataParallel: "DataParallel"}.get(
        wrapper, "FSDPModule"
    )
    with pytest.raises(eq.CombinationError, match=rf"Step and {name}") as error:
        built(model, form)
    place = {"model": "", "trunk": "'trunk'", "a head": "'heads.left.0'"}[where]
    assert place in str(error.value)
    assert "Give it" in str(error.value)


@pytest.mark.usefixtures("group")
def test_parameters_that_are_spread() -> None:
    """Tensor parallelism: no class says it, the parameters do; `backward` looks, too."""
    tensor = pytest.importorskip("torch.distributed.tensor")
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    model = linear_model()
    last = model.trunk[2]
    last.weight = nn.Parameter(tensor.distribute_tensor(last.weight.detach(), mesh))
    with pytest.raises(eq.CombinationError, match=r"'trunk.2.weight', which is a DTensor"):
        built(model, "trunk")
    weight = last.weight
    losses = [(weight.to_local() * k).sum() for k in (1, 2)]
    with pytest.raises(eq.EquipoiseError, match="is a DTensor"):
        eq.backward(losses, [weight], eq.CAGrad())


class Legacy(nn.Module):
    """A wrapper of somebody else's: it is a layer like any other."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> Any:
        return self.module(*args)


def test_other_wrappers_are_layers() -> None:
    model: Any = linear_model()
    model.trunk = Legacy(model.trunk)
    built(model, "trunk", aggregator=eq.MGDA())(*regression_batch(TWO))
    whole = Legacy(linear_model())
    x, y = regression_batch(TWO)
    step = built(whole, "closure", aggregator=eq.MGDA())
    step(lambda: {t: F.mse_loss(o, y[t]) for t, o in whole(x).items()})
    with pytest.raises(eq.CombinationError, match="Legacy around a SharedTrunk .*`.module`"):
        built(whole, "trunk")
    with pytest.raises(eq.CombinationError, match="only a SharedTrunk says"):
        built(Legacy(whole), "trunk")


def by_function(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def its_forward(model: Any) -> Any:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


@pytest.mark.parametrize("compiled", [by_function, in_place, its_forward])
def test_a_compiled_shared_trunk(compiled: Any) -> None:
    """Nothing is compiled here: torch does that when it is called."""
    model = compiled(linear_model())
    with pytest.raises(eq.CombinationError, match=r"torch.compile around a SharedTrunk"):
        built(model, "trunk")
    built(model, "closure", shared="*trunk*")  # a closure may call it as a whole


def test_a_compiled_trunk_and_heads_are_calls_like_others() -> None:
    model = linear_model()
    model.trunk.compile(backend="eager")
    for head in model.heads.values():
        head.compile(backend="eager")
    plain = linear_model()
    for net in (model, plain):
        built(net, "trunk", aggregator=eq.MGDA())(*regression_batch(TWO))
    for own, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own, theirs)


# ------------------------------------------------------------------------------ optimizers


class WantsLosses(torch.optim.SGD):
    def step(self, losses: Tensor) -> None:  # type: ignore[override]
        raise AssertionError


class WantsAName(torch.optim.SGD):
    def step(self, closure: Any = None, *, phase: str) -> None:  # type: ignore[override]
        raise AssertionError


class Wrapper:
    """As the one of schedule-free: no Optimizer, but all that one has."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base = self.optimizer = base

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)

    def step(self) -> None:
        self.base.step()


class WrapperThatWants(Wrapper):
    def step(self, scale: float) -> None:  # type: ignore[override]
        raise AssertionError


class Half:
    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.param_groups, self.state, self.step = base.param_groups, base.state, base.step


@pytest.mark.parametrize("form", ["trunk", "closure"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda ps: torch.optim.LBFGS(ps), "LBFGS evaluates the loss itself"),
        (lambda ps: WantsLosses(ps, lr=0.1), "WantsLosses: its step wants the argument 'losses'"),
        (lambda ps: WantsAName(ps, lr=0.1), "wants the argument 'phase'"),
        (lambda ps: WrapperThatWants(torch.optim.SGD(ps)), "wants the argument 'scale'"),
        (lambda ps: Half(torch.optim.SGD(ps)), "optimizer is a Half without zero_grad"),
        (lambda ps: torch.optim.SGD, "give a torch.optim.Optimizer"),
        (lambda ps: [1], "optimizer is a list; give a torch.optim.Optimizer"),
    ],
)
def test_optimizers_that_are_refused(make: Any, message: str, form: str) -> None:
    model = linear_model()
    with pytest.raises(eq.CombinationError, match=message):
        eq.Step(model, LOSSES if form == "trunk" else TWO, make(model.parameters()))


def with_a_scheduler(parameters: Any) -> torch.optim.Optimizer:
    """The scheduler puts a wrapper of `step` into the instance."""
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1.0)
    return optimizer


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("weighting", [None, eq.UW])
def test_optimizers_that_are_taken(wrapped: bool, weighting: Any) -> None:
    found = []
    for other in (False, True):
        model = linear_model()
        optimizer: Any = with_a_scheduler(model.parameters())
        if wrapped and other:
            optimizer = Wrapper(optimizer)
        stage = None if weighting is None else weighting(2)
        step = eq.Step(model, LOSSES, optimizer, stage, eq.CAGrad(), clip_norm=1.0)
        for k in range(2):
            step(*regression_batch(TWO, seed=k))
        step.load_state_dict(step.state_dict())
        found.append([*model.parameters(), *(stage.parameters() if stage else ())])
    assert all(map(torch.equal, *found))


def test_the_wrapper_of_schedule_free() -> None:
    schedule_free = pytest.importorskip("schedulefree")
    model = linear_model()
    optimizer = schedule_free.ScheduleFreeWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer.train()
    step = eq.Step(model, LOSSES, optimizer, aggregator=eq.MGDA())
    before = [p.detach().clone() for p in model.parameters()]
    for k in range(2):
        step(*regression_batch(TWO, seed=k))
    assert not any(map(torch.equal, before, model.parameters()))


def test_a_wrapper_of_plain_sgd_serves_a_line_search() -> None:
    model = linear_model()
    optimizer: Any = Wrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    step = eq.Step(model, LOSSES, optimizer, None, eq.MGDA(), None, eq.Backtracking())
    assert step(*regression_batch(TWO)).accepted
    optimizer = Wrapper(torch.optim.Adam(model.parameters()))
    with pytest.raises(eq.CombinationError, match="Backtracking and Adam"):
        eq.Step(model, LOSSES, optimizer, None, eq.MGDA(), None, eq.Backtracking())
