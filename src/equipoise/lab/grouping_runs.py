"""The training that tells which tasks belong together: by data maps, gradients or lookaheads."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from torch import Tensor

from equipoise.grouping import (
    DataMaps,
    GradientAffinity,
    LookaheadAffinity,
    Recorder,
    affinity_gram,
)
from equipoise.grouping.scores import KINDS
from equipoise.lab import grouping_figures, runs
from equipoise.lab.config import ConfigError, RunConfig
from equipoise.lab.data import Data, loader
from equipoise.lab.files import write_text
from equipoise.report import StepReport
from equipoise.step import Step

EVERY = 10
"""Batches from one lookahead to the next: with as many, TAG loses little (arXiv 2109.04617)."""


class Telling(Protocol):
    """A run from whose training groups can be made."""

    def resume(self, folder: Path) -> None:
        """Go back to what is saved in `folder`."""
        ...

    def gram(self) -> Tensor:
        """(T, T) inner products of the tasks' vectors."""
        ...

    def show(self, folder: Path) -> None:
        """Write what was learned about the tasks, with pictures."""
        ...


class MapsRun(runs.Run):
    """A run that records data maps while it trains, which changes nothing in the training."""

    def __init__(
        self,
        config: RunConfig,
        data: Data | None = None,
        *,
        checkpoints: Sequence[int],
        path: Path | None = None,
    ) -> None:
        super().__init__(config, data)
        names, n_samples = self.model.tasks, len(self.data.train)
        self.maps = DataMaps(len(names), n_samples, checkpoints, path=path, tasks=names)
        self.record = Recorder(self.model, self.maps, kinds(self.data))

    def train_epoch(self, progress: runs.Progress | None = None) -> dict[str, Any]:
        """An epoch of training, and of the maps."""
        trained = super().train_epoch(progress)
        self.maps.end_epoch()
        return trained

    def training_batches(self, seed: int) -> Iterable[Any]:
        """The same batches, which also say which samples they hold."""
        batches = loader(
            self.data.train, self.config.batch_size, shuffle_seed=seed, with_index=True
        )
        return self.fabric.setup_dataloaders(cast(Any, batches))

    def train_on(self, batch: Any) -> StepReport:
        """One step, recorded."""
        inputs, targets, index = batch
        with self.record(targets, index):
            return self.step(inputs, targets)

    def more_state(self) -> dict[str, Any]:
        """The maps."""
        return {"maps": self.maps.state_dict()}

    def take(self, state: dict[str, Any]) -> None:
        """The maps as they were."""
        self.maps.load_state_dict(state["maps"])

    def gram(self) -> Tensor:
        """Of the maps."""
        return self.maps.gram()

    def show(self, folder: Path) -> None:
        """The data maps, and the tree of the tasks."""
        grouping_figures.write(folder / "pictures", self.maps)


class AffinityRun(runs.Run):
    """A run that measures how much tasks help each other, which changes nothing in the training."""

    affinity: GradientAffinity | LookaheadAffinity

    def more_state(self) -> dict[str, Any]:
        """The affinities so far."""
        return {"affinity": self.affinity.state_dict()}

    def take(self, state: dict[str, Any]) -> None:
        """The affinities as they were."""
        self.affinity.load_state_dict(state["affinity"])

    to_itself = True
    """Whether it counts how much a task helps itself."""

    def gram(self) -> Tensor:
        """Of vectors that are the nearer, the higher the affinity is."""
        return affinity_gram(self.affinity.matrix(), diagonal=self.to_itself)

    def show(self, folder: Path) -> None:
        """The affinities as a table and a picture, and the tree of the tasks."""
        names, matrix = self.model.tasks, self.affinity.matrix()
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["task", *names])
        writer.writerows([name, *row] for name, row in zip(names, matrix.tolist(), strict=True))
        write_text(folder / "affinity.csv", text.getvalue())
        pictures = folder / "pictures"
        pictures.mkdir(exist_ok=True)
        grouping_figures.save(
            grouping_figures.affinities(matrix.numpy(), names), pictures / "affinity.svg"
        )
        grouping_figures.save(grouping_figures.tree(self.gram(), names), pictures / "tree.svg")


class GradientsRun(AffinityRun):
    """Gradient cosines, of the steps that form them.

    Raises:
        ConfigError: the recipe forms none.
    """

    def __init__(self, config: RunConfig, data: Data | None = None) -> None:
        super().__init__(config, data)
        self.affinity = self.cosines = GradientAffinity(self.model.tasks)
        if isinstance(self.step, Step) and self.step.forms_gram:
            return
        raise ConfigError(
            f"the recipe {config.recipe} forms no inner products of gradients; for groups by "
            "gradients use a gradient recipe, for example pcgrad or mgda-ub."
        )

    def train_on(self, batch: Any) -> StepReport:
        """One step, and the cosines of its gradients."""
        report = super().train_on(batch)
        if report.cosines is not None:
            self.cosines.update(report)
        return report


class LookaheadRun(AffinityRun):
    """TAG's lookaheads, before the first step of each epoch and each tenth after it."""

    to_itself = False

    def __init__(self, config: RunConfig, data: Data | None = None) -> None:
        super().__init__(config, data)
        losses: dict[str, Callable[[Any, Any], Tensor]] = {t.name: t.loss for t in self.data.tasks}
        self.affinity = self.lookahead = LookaheadAffinity(self.model, losses, config.lr)
        self.batches_seen = 0

    def train_epoch(self, progress: runs.Progress | None = None) -> dict[str, Any]:
        """An epoch; its first batch is looked at."""
        self.batches_seen = 0
        return super().train_epoch(progress)

    def train_on(self, batch: Any) -> StepReport:
        """A lookahead now and then, and one step."""
        if self.batches_seen % EVERY == 0:
            self.lookahead.update(*batch)
        self.batches_seen += 1
        return super().train_on(batch)


def kinds(data: Data) -> dict[str, Any]:
    """Task name -> kind, as `true_class_probability` wants it.

    Raises:
        ConfigError: a task of another kind.
    """
    for task in data.tasks:
        if task.kind not in KINDS:
            raise ConfigError(
                f"task {task.name!r} is a {task.kind} task; groups are made of tasks of the "
                f"kinds {', '.join(KINDS)}."
            )
    return {task.name: task.kind for task in data.tasks}
