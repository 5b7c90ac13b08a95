"""All that a step may change: put back on an error, saved, and loaded."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from equipoise.engine.partition import outside
from equipoise.engine.passes import explained
from equipoise.engine.stages import Stateful
from equipoise.errors import EquipoiseError, TaskError
from equipoise.replay import RandomState, UndoesItself, devices_of, unchanged_on_error

MAY_BE_EMPTY = ("network", "learner", "scaling")
"""Parts that often have no state."""


@dataclass
class Before:
    """What there was when a step began.

    Attributes:
        random: the state of torch's global generators.
        names: the present tasks, by which an error calls them, once they are known.
    """

    random: RandomState
    names: Sequence[str] = ()


@contextmanager
def undone_on_error(
    model: nn.Module,
    devices: Iterable[torch.device],
    stages: Iterable[Stateful],
    by_themselves: Iterable[UndoesItself],
) -> Generator[Before]:
    """`unchanged_on_error`, with an error that calls the task by its name."""
    before = None
    try:
        with unchanged_on_error(model, devices, stages, by_themselves) as random:
            before = Before(random)
            yield before
    except TaskError as error:
        raise (error if before is None else error.named(before.names)) from None
    except RuntimeError as error:
        known = explained(error)
        if known is None:
            raise
        raise known from error


def held_outside(
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    losses: Any,
    saved_elsewhere: Iterable[Tensor],
) -> dict[str, Stateful]:
    """What only the optimizer holds and nothing else saves, as the parameters of a loss.

    Args:
        module: the network, which saves its own.
        optimizer: whose parameters they are.
        losses: as the user gave them; where nobody gave an optimizer, those of the losses.
        saved_elsewhere: those of the weighting.

    Returns:
        One part for `saved`; none if there is no such parameter.
    """
    known = set(saved_elsewhere)
    found = {name: p for name, p in outside(module, optimizer, losses).items() if p not in known}
    return {"outside": _Outside(found)} if found else {}


class _Outside:
    """Parameters by their places in the optimizer."""

    def __init__(self, parameters: dict[str, Tensor]) -> None:
        self.parameters = parameters

    def state_dict(self) -> dict[str, Tensor]:
        """Their values."""
        return {name: p.detach() for name, p in self.parameters.items()}

    def load_state_dict(self, state: Mapping[str, Tensor], /) -> None:
        """Take the values over.

        Raises:
            KeyError: one is missing.
            RuntimeError: one has another shape.
        """
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(state[name])


def saved(
    parts: Mapping[str, Stateful], stages: Mapping[str, str], model: nn.Module
) -> dict[str, Any]:
    """A copy of the states of all parts, and of torch's global random generators.

    Args:
        parts: by name, whatever has a state.
        stages: the class of each stage by its name, by which a state is recognised.
        model: says on which devices draws are made.
    """
    state: dict[str, Any] = {name: part.state_dict() for name, part in parts.items()}
    for name in MAY_BE_EMPTY:
        if not state[name]:
            del state[name]  # as in files that know nothing of it
    state["random"] = RandomState(devices_of(model)).state_dict()
    state["stages"] = dict(stages)
    # What has no shape yet has no copy either.
    shapeless = {id(v): v for v in state["model"].values() if is_lazy(v)}
    return deepcopy(state, shapeless)


def load(
    state: Mapping[str, Any],
    parts: Mapping[str, Stateful],
    stages: Mapping[str, str],
    model: nn.Module,
) -> None:
    """Take over what `saved` gave.

    Raises:
        EquipoiseError: the state is of other stages or another model; nothing has changed then.
    """
    mine = saved(parts, stages, model)
    if state.get("stages") != mine["stages"]:
        raise EquipoiseError(
            f"the state was saved with {state.get('stages')}, this Step has {mine['stages']}. Give "
            "the Step the same stages, and load what step.state_dict() gave."
        )
    try:
        _load(state, parts, model)
    except (KeyError, RuntimeError, ValueError) as error:
        _load(mine, parts, model)
        said = f"{error} is missing." if isinstance(error, KeyError) else error
        raise EquipoiseError(f"the state does not fit this Step: {said}") from error


def _load(state: Mapping[str, Any], parts: Mapping[str, Stateful], model: nn.Module) -> None:
    for name, part in parts.items():
        theirs = state.get(name, {}) if name in MAY_BE_EMPTY else state[name]
        part.load_state_dict(deepcopy(theirs))
    random = RandomState(devices_of(model))
    random.load_state_dict(state["random"])
    random.restore()
