"""The selected networks of a finished run, and batches to look at them with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

from equipoise.lab import models
from equipoise.lab.config import RunConfig
from equipoise.lab.data.base import Batch, Data
from equipoise.lab.files import DamagedError, read_state
from equipoise.trunk import SeparateTrunks, SharedTrunk


class Counted:
    """Batches that say when they have been gone through once more."""

    def __init__(self, batches: Iterable[Batch], told: Callable[[], None]) -> None:
        self._batches = batches
        self._told = told

    def __iter__(self) -> Iterator[Batch]:
        yield from self._batches
        self._told()


class Here:
    """Batches on a device with the targets of some tasks; all of them, or the first `number`."""

    def __init__(
        self,
        batches: Iterable[Batch],
        device: str,
        tasks: Iterable[str],
        number: int | None = None,
    ) -> None:
        self._batches = batches
        self._device = device
        self._tasks = tuple(tasks)
        self._number = number

    def __iter__(self) -> Iterator[Batch]:
        for inputs, targets in islice(self._batches, self._number):
            here = {task: targets[task].to(self._device) for task in self._tasks}
            yield inputs.to(self._device), here


def selected(config: RunConfig, data: Data, folder: Path) -> SharedTrunk:
    """The networks of the selected epochs, as the test split has met them.

    Raises:
        DamagedError: checkpoint.ckpt cannot be read, or is that of another network.
    """
    model = models.build(config.model, data)
    if config.read_recipe().is_stl:
        model = model.separated()
    path = folder / "checkpoint.ckpt"
    try:
        best = read_state(path)["best"]
        model.load_state_dict({k: v for kept in best for k, v in kept["state"].items()})
    except (RuntimeError, KeyError, TypeError) as error:
        raise DamagedError(path) from error
    return model


def separate(model: SharedTrunk) -> Iterator[SharedTrunk]:
    """The networks that share nothing with each other: one, or for single tasks one for each."""
    if isinstance(model.trunk, SeparateTrunks):
        for task in model.tasks:
            yield SharedTrunk(model.trunk.of[task], {task: model.heads[task]})
    else:
        yield model
