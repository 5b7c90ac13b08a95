"""TorchJD's methods that keep a state: saved, put back on an error, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.errors import CombinationError, EquipoiseError

OURS = {"NashMTL": "equipoise.NashMTL"}
"""Our own methods, by the names of theirs whose state cannot be carried."""

NO_STATE = frozenset(vars(nn.Module()))
"""What every module has."""


def of_torchjd(part: Any, kind: str | None = None) -> bool:
    """Whether a class of TorchJD, of that name if one is given, is among those of an object."""
    return any(
        c.__module__.partition(".")[0] == "torchjd" and kind in (None, c.__name__)
        for c in type(part).__mro__
    )


def keeping(stage: Any) -> list[tuple[str, nn.Module]]:
    """The parts of a method of TorchJD that keep a state, by name; they say so by `reset`."""
    if not isinstance(stage, nn.Module):
        return []
    named = stage.named_modules()
    return [(name, part) for name, part in named if hasattr(part, "reset") and of_torchjd(part)]


class Carried:
    """The state of a method of TorchJD, whose own `state_dict` does not load.

    It lies in buffers that are not there in the beginning, and in plain attributes.

    Args:
        stage: the method.
        place: "aggregator" or "weighting", for messages.

    Raises:
        CombinationError: its state holds other things than numbers and tensors.
    """

    def __init__(self, stage: nn.Module, place: str) -> None:
        self.parts = dict(keeping(stage))
        self.name = type(stage).__name__
        for part in self.parts.values():
            for name, value in vars(part).items():
                if name not in NO_STATE and not _is_plain(value):
                    advice = OURS.get(self.name, "a method of Equipoise's own")
                    raise CombinationError(
                        f"{place} is TorchJD's {self.name}, whose state cannot be saved: its "
                        f"{name} is a {type(value).__name__}. Use {advice}."
                    )

    def state_dict(self) -> dict[str, Any]:
        """Part -> its buffers and its plain attributes."""
        return {name: self._of(part) for name, part in self.parts.items()}

    def _of(self, part: nn.Module) -> dict[str, Any]:
        plain = {name: value for name, value in vars(part).items() if name not in NO_STATE}
        return {"buffers": dict(part._buffers), "plain": plain}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Take over what `state_dict` gave.

        Raises:
            KeyError: the state of another method.
        """
        parts = [(part, state[name]) for name, part in self.parts.items()]
        for part, saved in parts:
            for name in part._buffers:
                part._buffers[name] = saved["buffers"][name]
            for name, value in saved["plain"].items():
                vars(part)[name] = value


@dataclass(frozen=True)
class WantsAllTasks:
    """Refuses a batch without one of the tasks, for which a state would start anew.

    Attributes:
        name: of the class that keeps it.
    """

    name: str

    def __call__(self, present: Tensor) -> None:
        """Look which tasks are present.

        Raises:
            EquipoiseError: not all are.
        """
        if not bool(present.all()):
            raise EquipoiseError(
                f"TorchJD's {self.name} keeps numbers of each task, which start anew where a task "
                "is absent, as in this batch. Use a method of Equipoise's own."
            )


def stateful(stage: Any, place: str) -> Any:
    """What saves and loads the state of a stage: itself, unless it is TorchJD's."""
    return Carried(stage, place) if keeping(stage) else stage


def _is_plain(value: Any) -> bool:
    """Whether a value can be saved, and read again without running anything."""
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, (*value.keys(), *value.values())))
    plain = (bool, int, float, str, torch.dtype, torch.device)
    return value is None or isinstance(value, (Tensor, *plain))
