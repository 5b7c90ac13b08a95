"""Tasks into groups on real data: maps, clusters, specialists, and the table beside the baselines.

Everything lies in one folder and is made in the order maps, groups, networks, table. What is
finished is read, not repeated, so the command goes on wherever it was killed.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from equipoise.grouping import Choice, DataMaps, Groups, Recorder, Specialists, choose, find_groups
from equipoise.lab import data as datasets
from equipoise.lab import grouping_figures, networks, runs
from equipoise.lab.comparison import Failure, Job, in_processes, one_by_one, summary
from equipoise.lab.config import ConfigError, RunConfig
from equipoise.lab.data import Data, loader
from equipoise.lab.evaluation import Values, evaluate
from equipoise.lab.files import read_json, write_json, write_text
from equipoise.lab.progress import Display, Throttle
from equipoise.step import StepReport

KINDS = ("binary", "classification", "regression")


@dataclass(frozen=True)
class Plan:
    """What a grouping depends on, besides the run that records the maps.

    Args:
        n_groups: number of groups; None: the one with the highest silhouette.
        checkpoints: numbers of finished epochs at which maps are taken.
        method: as in `find_groups`.
        fuzziness: F > 1.
        combine: how the specialists speak together, as in `Specialists`.
    """

    n_groups: int | None = None
    checkpoints: tuple[int, ...] = ()
    method: Any = "kmeans"
    fuzziness: float = 2.0
    combine: Any = "probabilities"


class MapsRun(runs.Run):
    """A run that records data maps while it trains, which changes nothing in the training."""

    def __init__(
        self, config: RunConfig, data: Data | None = None, *, checkpoints: Sequence[int]
    ) -> None:
        super().__init__(config, data)
        names = [task.name for task in self.data.tasks]
        self.maps = DataMaps(len(names), len(self.data.train), checkpoints, tasks=names)
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


def kinds(data: Data) -> dict[str, Any]:
    """Task name -> kind, as `true_class_probability` wants it.

    Raises:
        ConfigError: a task of another kind.
    """
    for task in data.tasks:
        if task.kind not in KINDS:
            raise ConfigError(
                f"task {task.name!r} is a {task.kind} task; data maps are made of tasks of the "
                f"kinds {', '.join(KINDS)}."
            )
    return {task.name: task.kind for task in data.tasks}


def evenly(epochs: int, number: int = 10) -> tuple[int, ...]:
    """Checkpoints at equal distances, up to the last epoch."""
    number = min(number, epochs)
    return tuple(math.ceil(epochs * (k + 1) / number) for k in range(number))


@dataclass
class Grouping:
    """A grouping in the folder `out`.

    Args:
        config: of the run that records the maps, which is also the MTL baseline; specialists
            and single tasks are trained under the same one.
        plan: of the grouping.
        out: the folder.

    Raises:
        ConfigError: `out` was begun with another configuration or plan, or the plan is impossible.
    """

    config: RunConfig
    plan: Plan
    out: Path
    data: Data = field(init=False)

    def __post_init__(self) -> None:
        if self.config.task_weights is not None:
            raise ConfigError("a grouping finds task weights itself.")
        last = max(self.plan.checkpoints, default=0)
        if not 0 < last <= self.config.epochs:
            raise ConfigError(
                f"the last checkpoint is after epoch {last}; give --checkpoints from 1 to "
                f"{self.config.epochs}, or more --epochs."
            )
        runs.refuse_another_run(self.config, self.out / "maps")
        path = self.out / "grouping.json"
        mine = {**asdict(self.plan), "checkpoints": list(self.plan.checkpoints)}
        if path.exists() and (there := read_json(path)) != mine:
            name = next(k for k in mine if there.get(k) != mine[k])
            raise ConfigError(
                f"{self.out} was begun with {name} {there.get(name)!r}, not {mine[name]!r}; choose "
                "another --out, or remove that folder."
            )
        try:
            with runs.seeded(self.config):
                run = MapsRun(self.config, checkpoints=self.plan.checkpoints)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self.data = run.data
        n_tasks = len(self.data.tasks)
        if self.plan.n_groups is not None and not 1 <= self.plan.n_groups <= n_tasks:
            raise ConfigError(f"groups is {self.plan.n_groups}; give 1 to {n_tasks}, the tasks.")

    # ------------------------------------------------------------------ groups

    def groups(self) -> tuple[Groups, Choice | None]:
        """Record the maps, find the groups, write memberships and pictures."""
        self.out.mkdir(parents=True, exist_ok=True)
        plan = {**asdict(self.plan), "checkpoints": list(self.plan.checkpoints)}
        write_json(self.out / "grouping.json", plan)
        folder = self.out / "maps"
        if runs.finished(folder) is None:
            make = partial(MapsRun, checkpoints=self.plan.checkpoints)
            with Display(self.config.epochs, 1) as display:
                told = Throttle(lambda *seen: display.update("maps", *seen))
                runs.train(self.config, folder, told, make)
        state = torch.load(folder / "checkpoint.ckpt", map_location="cpu", weights_only=True)
        names = tuple(task.name for task in self.data.tasks)
        maps = DataMaps(len(names), len(self.data.train), self.plan.checkpoints, tasks=names)
        maps.load_state_dict(state["maps"])
        gram = maps.gram()
        choice = choose(gram, seed=self.config.seed) if len(names) > 2 else None
        number = self.plan.n_groups or (choice.best if choice else 1)
        found = find_groups(
            maps.maps() if self.plan.method == "points" else gram,
            number,
            fuzziness=self.plan.fuzziness,
            seed=self.config.seed,
            method=self.plan.method,
            tasks=names,
        )
        found.to_json(self.out / "memberships.json")
        found.to_csv(self.out / "memberships.csv")
        pictures = self.out / "pictures"
        pictures.mkdir(exist_ok=True)
        grouping_figures.write(pictures, maps, found, gram)
        return found, choice

    # ------------------------------------------------------------------ networks

    def train(self, groups: Groups, side_by_side: int = 1) -> list[str]:
        """Train specialists and single tasks, `side_by_side` at a time; returns what failed."""
        jobs = [*self.specialists(groups), Named("stl", self._like("stl"), self.out / "stl")]
        todo = [job for job in jobs if runs.finished(job.folder) is None]
        failures = []
        for job in todo:
            runs.refuse_another_run(job.config, job.folder)
        if todo:
            side_by_side = min(side_by_side, len(todo))
            make = one_by_one if side_by_side == 1 else in_processes
            with Display(self.config.epochs, len(todo)) as display:
                for job, outcome in make(todo, display, side_by_side):
                    display.end(job.name, f"{job.name}: {_line(outcome)}")
                    if isinstance(outcome, Failure):
                        failures.append(f"{job.name}: {outcome.message}")
        return failures

    def specialists(self, groups: Groups) -> list[Named]:
        """The runs of the specialists."""
        jobs = []
        for j in range(len(groups)):
            weights = tuple(groups.memberships[:, j].tolist())
            config = self._like(self.config.recipe, weights)
            jobs.append(Named(f"specialist {j + 1}", config, self.out / f"specialist-{j + 1}"))
        return jobs

    def _like(self, recipe: str, weights: tuple[float, ...] | None = None) -> RunConfig:
        return self.config.model_copy(update={"recipe": recipe, "task_weights": weights})

    def together(self, groups: Groups) -> Specialists:
        """The selected networks of the specialists as an ensemble; also written to a file."""
        models = [
            networks.selected(job.config, self.data, job.folder) for job in self.specialists(groups)
        ]
        ensemble = Specialists(models, groups, kinds(self.data), self.plan.combine)
        ensemble.save(self.out / "specialists.pt")
        return ensemble

    def table(self, groups: Groups) -> str:
        """Measure the ensemble on the test split, write the table of all methods, return it."""
        ensemble = self.together(groups).to(self.config.device)
        with runs.seeded(self.config):
            run = runs.Run(self.config, self.data)
            batches = run.batches(self.data.test, shuffle_seed=None)
            _, values = evaluate(cast(Any, ensemble), self.data.tasks, batches, run.fabric.autocast)
        columns = {"stg-mtl": values}
        for name, folder in (("mtl", "maps"), ("stl", "stl")):
            result = runs.finished(self.out / folder)
            assert result is not None
            columns[name] = result["test"]
        return self._written(columns)

    def _written(self, columns: dict[str, Values]) -> str:
        rows: list[list[Any]] = []
        for task in self.data.tasks:
            for measure in task.measures:
                label = f"{task.name}: {measure.name}"
                rows.append([label, *(v[task.name][measure.name] for v in columns.values())])
        mean = [
            runs.mean([task.score(v[task.name]) for task in self.data.tasks])
            for v in columns.values()
        ]
        rows.append(["mean score", *mean])
        head = ["task", *columns]
        write_json(self.out / "table.json", {"columns": list(columns), "rows": rows})
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([head, *rows])
        write_text(self.out / "table.csv", text.getvalue())
        cells = [head, *([row[0], *(f"{value:.4f}" for value in row[1:])] for row in rows)]
        width = max(len(row[0]) for row in cells)
        lines = [row[0].ljust(width) + "".join(f"{c:>10}" for c in row[1:]) for row in cells]
        written = "\n".join(lines)
        write_text(self.out / "table.txt", written + "\n")
        return written


@dataclass(frozen=True)
class Named(Job):
    """A run with a name of its own on the screen."""

    title: str = ""

    def __init__(self, title: str, config: RunConfig, folder: Path) -> None:
        super().__init__(config, folder)
        object.__setattr__(self, "title", title)

    @property
    def name(self) -> str:
        """The title."""
        return self.title


def load(config: RunConfig) -> Data:
    """The data set of a configuration."""
    return datasets.load(config.data, config.data_root)


def _line(outcome: Any) -> str:
    if isinstance(outcome, Failure):
        return summary(outcome)
    return f"{outcome['train_seconds']:.1f} s of training"
