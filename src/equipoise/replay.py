"""A second look at the same batch: same dropout masks, buffers untouched.

Two things change when a module is merely evaluated: the random generators that its dropout draws
from, and what it keeps from batch to batch, as the buffers of normalisation layers. What follows
records both, repeats the former and protects the latter.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import deepcopy
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from equipoise.buffers import Buffers, copy_of_buffers, put_back
from equipoise.draws import RandomState
from equipoise.kept import Attributes


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
    be replayed alone and in any order, and each sees the masks of its first call. Repeated are the
    draws from the global generators of torch, Python's `random` and numpy.

    Args:
        model: the module whose parts are replayed. What a part keeps from batch to batch, buffers
            and tensors in plain attributes, does not move during its replay, which starts from the
            values that there were when it was recorded.
        start: what the model held before its first call; None: what it holds now.

    Example:
        >>> replay = Replay(model)
        >>> with replay.recording("trunk", model.trunk):
        ...     features = model.trunk(inputs)
        >>> with replay.again("trunk"):
        ...     same_features = model.trunk(inputs)
    """

    def __init__(self, model: nn.Module, start: Attributes | None = None) -> None:
        self.model = model
        self._start = Attributes(model) if start is None else start
        self._inside = False
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
        state = RandomState(self._devices)
        self._known[key] = part, copy_of_buffers(part), state
        yield
        state.forget_unused()

    @contextmanager
    def looking(self) -> Generator[None]:
        """A further look, of one or several parts: afterwards plain attributes are as before it.

        What one part leaves in an attribute is there for the next part.
        """
        self._start.found(final=False)
        now = Attributes(self.model) if self._start else None
        self._inside = True
        try:
            yield
        finally:
            self._inside = False
            if now is not None:
                now.put_back()

    @contextmanager
    def again(self, key: Any) -> Generator[None]:
        """A further call of the part `key`: same draws; afterwards all is as before.

        Raises:
            KeyError: nothing was recorded under `key`.
        """
        if key not in self._known:
            raise KeyError(f"nothing was recorded under {key!r}; call recording({key!r}) first.")
        part, buffers, state = self._known[key]
        with nullcontext() if self._inside else self.looking():
            before, after = copy_of_buffers(part), state.now(self._devices)
            state.restore()
            try:
                put_back(buffers)
                self._start.put_back(part)
                yield
            finally:
                put_back(before)
                after.restore()


class Beginning(RandomState):
    """The random state and the buffers with which a step begins; made by `unchanged_on_error`."""

    buffers: Buffers = []  # noqa: RUF012


@contextmanager
def replayed(model: nn.Module, state: RandomState) -> Generator[None]:
    """The body draws from `state` on, and begins with its buffers if it has some.

    Afterwards generators and buffers are as before it.
    """
    after = state.now(devices_of(model))
    state.restore()
    try:
        with frozen_buffers(model):
            if isinstance(state, Beginning):
                put_back(state.buffers)
            yield
    finally:
        after.restore()


@contextmanager
def frozen_buffers(module: nn.Module) -> Generator[None]:
    """Let `module` run in its present mode without moving any of its buffers.

    BatchNorm layers go on normalising by the batch. Every buffer (running statistics and their
    counters, spectral norm vectors, moving averages) has its old value, bit for bit, afterwards,
    also when the body raises, and so have tensors that a layer keeps in plain attributes, as some
    recurrent networks keep their state. Re-entrant.
    """
    before, attributes = copy_of_buffers(module), Attributes(module)
    try:
        yield
    finally:
        put_back(before)
        attributes.put_back()


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
) -> Generator[Beginning]:
    """Whatever the body raises, an interrupt too, leaves no trace.

    The model's buffers and what it holds in plain attributes, the state of the stages (by
    `state_dict` and `load_state_dict`), of what goes back by itself, and the global random
    generators, those of `devices` too, are then as they were before. Gives the random state and the
    buffers at the beginning.
    """
    random = Beginning(devices)
    random.buffers = buffers = copy_of_buffers(model)
    attributes = Attributes(model)
    states = [(stage, _copy(stage.state_dict())) for stage in stages]
    try:
        with ExitStack() as guards:
            for part in by_themselves:
                guards.enter_context(part.unchanged_on_error())
            yield random
    except BaseException:
        put_back(buffers)
        attributes.put_back()
        for stage, state in states:
            stage.load_state_dict(state)
        random.restore()
        raise


def _copy(state: Any) -> Any:
    return deepcopy(state) if state else state


def devices_of(module: nn.Module) -> set[torch.device]:
    """The devices on which a module's parameters and buffers lie."""
    return {t.device for t in (*module.parameters(), *module.buffers())}
