"""A second look at the same batch: same dropout masks, buffers untouched.

Two things change when a module is merely evaluated: the random generators that its dropout draws
from, and the buffers in which its normalisation layers keep running statistics. What follows
records both, repeats the former and protects the latter.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import deepcopy
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


class RandomState:
    """The state of torch's global generators: the CPU's, and those of the named devices.

    Args:
        devices: devices a model runs on; CPU needs no mention, repeated ones count once.
    """

    def __init__(self, devices: Iterable[torch.device] = ()) -> None:
        self.cpu = torch.get_rng_state()
        self.devices = {
            device: torch.get_device_module(device).get_rng_state(device)
            for device in set(devices)
            if device.type not in ("cpu", "meta")
        }

    def restore(self) -> None:
        """Set the generators back to the recorded state."""
        torch.set_rng_state(self.cpu)
        for device, state in self.devices.items():
            torch.get_device_module(device).set_rng_state(state, device)

    def state_dict(self) -> dict[str, Tensor]:
        """Device name -> state."""
        return {"cpu": self.cpu, **{str(d): state for d, state in self.devices.items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave, for the devices that exist here."""
        self.cpu = state["cpu"].cpu()
        self.devices = {d: state.get(str(d), own).cpu() for d, own in self.devices.items()}


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """In evaluation mode; afterwards each module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class Replay:
    """Calls again, on the same batch, what was called before, with the same random draws.

    Record every stochastic part under a key of its own (the trunk, each head): the parts may then
    be replayed alone and in any order, and each sees the masks of its first call.

    Args:
        model: the module whose parts are replayed. The buffers of a part do not move during its
            replay, which starts from the values that they had when it was recorded.

    Example:
        >>> replay = Replay(model)
        >>> with replay.recording("trunk", model.trunk):
        ...     features = model.trunk(inputs)
        >>> with replay.again("trunk"):
        ...     same_features = model.trunk(inputs)
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._devices = devices_of(model)
        self._known: dict[Any, tuple[nn.Module, Buffers, RandomState]] = {}

    @contextmanager
    def recording(self, key: Any, part: nn.Module | None = None) -> Generator[None]:
        """The first call of a part: remembers from which random state and buffers it starts.

        Args:
            key: the name of the part.
            part: the module that is called; None: the whole model.
        """
        part = self.model if part is None else part
        self._known[key] = part, copy_of_buffers(part), RandomState(self._devices)
        yield

    @contextmanager
    def again(self, key: Any) -> Generator[None]:
        """A further call of the part `key`: same draws; afterwards all is as before.

        Raises:
            KeyError: nothing was recorded under `key`.
        """
        if key not in self._known:
            raise KeyError(f"nothing was recorded under {key!r}; call recording({key!r}) first.")
        part, buffers, state = self._known[key]
        with replayed(part, state):
            put_back(buffers)
            yield


@contextmanager
def replayed(model: nn.Module, state: RandomState) -> Generator[None]:
    """The body draws from `state` on; afterwards generators and buffers are as before it."""
    after = RandomState({*devices_of(model), *state.devices})
    state.restore()
    try:
        with frozen_buffers(model):
            yield
    finally:
        after.restore()


@contextmanager
def frozen_buffers(module: nn.Module) -> Generator[None]:
    """Let `module` run in its present mode without moving any of its buffers.

    BatchNorm layers go on normalising by the batch. Every buffer (running statistics and their
    counters, spectral norm vectors, moving averages) has its old value, bit for bit, afterwards,
    also when the body raises. Re-entrant.
    """
    before = copy_of_buffers(module)
    try:
        yield
    finally:
        put_back(before)


@runtime_checkable
class UndoesItself(Protocol):
    """A stage whose state is too large to be copied in each step, and which goes back by itself."""

    def unchanged_on_error(self) -> AbstractContextManager[None]:
        """If the body raises, the state is as before it."""
        ...


@contextmanager
def unchanged_on_error(
    model: nn.Module,
    devices: Iterable[torch.device],
    stages: Iterable[Any] = (),
    by_themselves: Iterable[UndoesItself] = (),
) -> Generator[RandomState]:
    """Whatever the body raises, an interrupt too, leaves no trace.

    The model's buffers, the state of the stages (by `state_dict` and `load_state_dict`), of what
    goes back by itself, and the global random generators, the CPU's and those of `devices`, are
    then as they were before. Gives the random state at the beginning.
    """
    random = RandomState(devices)
    buffers = copy_of_buffers(model)
    states = [(stage, _copy(stage.state_dict())) for stage in stages]
    try:
        with ExitStack() as guards:
            for part in by_themselves:
                guards.enter_context(part.unchanged_on_error())
            yield random
    except BaseException:
        put_back(buffers)
        for stage, state in states:
            stage.load_state_dict(state)
        random.restore()
        raise


def _copy(state: Any) -> Any:
    return deepcopy(state) if state else state


Buffers = list[tuple[nn.Module, str, Tensor, Tensor]]


def copy_of_buffers(module: nn.Module) -> Buffers:
    """Every buffer with a copy of its value: (owner, name, buffer, value)."""
    return [
        (owner, name, buffer, buffer.clone())
        for owner in module.modules()
        for name, buffer in owner.named_buffers(recurse=False)
    ]


def put_back(saved: Buffers) -> None:
    """Give each owner its buffer back, with the value that it had."""
    for owner, name, buffer, value in saved:
        # Through .data: a graph that holds the buffer must still be able to go backward.
        buffer.data.copy_(value)
        setattr(owner, name, buffer)


def devices_of(module: nn.Module) -> set[torch.device]:
    """The devices on which a module's parameters and buffers lie."""
    return {t.device for t in (*module.parameters(), *module.buffers())}
