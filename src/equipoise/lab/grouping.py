"""Tasks into groups on real data: maps, clusters, specialists, and the table beside the baselines.

Everything lies in one folder and is made in the order maps, groups, networks, table. What is
finished is read, not repeated, so the command goes on wherever it was killed.

    maps/       the training that records them, which is also the MTL baseline
    stl/        the single tasks
    pictures/   the data maps, and the tree of the tasks
    kmeans-3/   one for each plan: memberships, specialist-1/ ..., the table
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

from equipoise.errors import EquipoiseError
from equipoise.grouping import Choice, DataMaps, Groups, Recorder, Specialists, choose, find_groups
from equipoise.lab import grouping_figures, networks, runs
from equipoise.lab.comparison import Failure, Job, in_processes, one_by_one, summary
from equipoise.lab.config import ConfigError, RunConfig
from equipoise.lab.data import Data, loader
from equipoise.lab.evaluation import Values, evaluate
from equipoise.lab.files import read_json, read_state, write_json, write_text
from equipoise.lab.progress import Display, Throttle
from equipoise.step import StepReport

KINDS = ("binary", "classification", "regression")


@dataclass(frozen=True)
class Plan:
    """How tasks are grouped, once their maps are there.

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

    def name(self, n_groups: int) -> str:
        """Of the folder in which it is carried out: "kmeans-3", "cmeans-2-fuzziness-1.5"."""
        soft = self.method in ("kmeans", "cmeans") and self.fuzziness != 2
        return f"{self.method}-{n_groups}" + (f"-fuzziness-{self.fuzziness:g}" if soft else "")


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
        self.maps = empty_maps(self.data, checkpoints, path)
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


def empty_maps(data: Data, checkpoints: Sequence[int], path: Path | None) -> DataMaps:
    """Maps of the training split; the full ones go to the file `path`, if there is one."""
    names = [task.name for task in data.tasks]
    return DataMaps(len(names), len(data.train), checkpoints, path=path, tasks=names)


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
    """A grouping in the folder `out`, which several plans can share.

    Args:
        config: of the run that records the maps, which is also the MTL baseline; specialists
            and single tasks are trained under the same one.
        plan: of the grouping.
        out: the folder.
        full_maps: whether to keep the maps of all checkpoints in the file maps/maps.npy; the method
            "points" needs them.

    Raises:
        ConfigError: `out` was begun with another configuration or other checkpoints, or the plan
            is impossible.
    """

    config: RunConfig
    plan: Plan
    out: Path
    full_maps: bool = False
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
        self.full_maps |= self.plan.method == "points"
        if (path := self.out / "grouping.json").exists():
            there, mine = read_json(path), list(self.plan.checkpoints)
            self.full_maps = there.get("full_maps", False)
            if there["checkpoints"] != mine:
                raise ConfigError(
                    f"{self.out} was begun with checkpoints {there['checkpoints']}, not {mine}; "
                    "choose another --out, or remove that folder."
                )
        try:
            with runs.seeded(self.config):
                run = self._recording(self.config)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if self.plan.method == "points":
            try:
                run.maps.maps()
            except EquipoiseError as error:
                raise ConfigError(
                    f"{self.out} was begun without full maps, which the method points needs; "
                    "choose another --out, or remove that folder."
                ) from error
        self.data = run.data
        n_tasks = len(self.data.tasks)
        if self.plan.n_groups is not None and not 1 <= self.plan.n_groups <= n_tasks:
            raise ConfigError(f"groups is {self.plan.n_groups}; give 1 to {n_tasks}, the tasks.")

    # ------------------------------------------------------------------ groups

    def groups(self) -> tuple[Groups, Choice | None]:
        """Record the maps, find the groups, write memberships and pictures."""
        maps = self._maps()
        gram = maps.gram()
        choice = choose(gram, seed=self.config.seed) if maps.n_tasks > 2 else None
        number = self.plan.n_groups or (choice.best if choice else 1)
        found = find_groups(
            maps.maps() if self.plan.method == "points" else gram,
            number,
            fuzziness=self.plan.fuzziness,
            seed=self.config.seed,
            method=self.plan.method,
            tasks=[task.name for task in self.data.tasks],
        )
        folder = self.folder(found)
        folder.mkdir(exist_ok=True)
        found.to_json(folder / "memberships.json")
        found.to_csv(folder / "memberships.csv")
        grouping_figures.save(grouping_figures.memberships(found), folder / "memberships.svg")
        return found, choice

    def _maps(self) -> DataMaps:
        """The maps, from the run that records them; with their pictures."""
        self.out.mkdir(parents=True, exist_ok=True)
        begun = {"checkpoints": list(self.plan.checkpoints), "full_maps": self.full_maps}
        write_json(self.out / "grouping.json", begun)
        folder = self.out / "maps"
        if runs.finished(folder) is None:
            folder.mkdir(exist_ok=True)
            with Display(self.config.epochs, 1) as display:
                told = Throttle(lambda *seen: display.update("maps", *seen))
                runs.train(self.config, folder, told, self._recording)
        maps = empty_maps(self.data, self.plan.checkpoints, self._path)
        maps.load_state_dict(read_state(folder / "checkpoint.ckpt")["maps"])
        grouping_figures.write(self.out / "pictures", maps)
        return maps

    def _recording(self, config: RunConfig) -> MapsRun:
        return MapsRun(config, checkpoints=self.plan.checkpoints, path=self._path)

    @property
    def _path(self) -> Path | None:
        return self.out / "maps" / "maps.npy" if self.full_maps else None

    def folder(self, groups: Groups) -> Path:
        """Where the plan is carried out: all that depends on the groups."""
        return self.out / self.plan.name(len(groups))

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
        jobs, folder = [], self.folder(groups)
        for j in range(len(groups)):
            weights = tuple(groups.memberships[:, j].tolist())
            config = self._like(self.config.recipe, weights)
            jobs.append(Named(f"specialist {j + 1}", config, folder / f"specialist-{j + 1}"))
        return jobs

    def _like(self, recipe: str, weights: tuple[float, ...] | None = None) -> RunConfig:
        return self.config.model_copy(update={"recipe": recipe, "task_weights": weights})

    def together(self, groups: Groups) -> Specialists:
        """The selected networks of the specialists as an ensemble; also written to a file."""
        models = [
            networks.selected(job.config, self.data, job.folder) for job in self.specialists(groups)
        ]
        ensemble = Specialists(models, groups, kinds(self.data), self.plan.combine)
        ensemble.save(self.file(groups, "specialists", "pt"))
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
        return self._written(columns, partial(self.file, groups, "table"))

    def file(self, groups: Groups, stem: str, ending: str) -> Path:
        """Of what the specialists say together."""
        logits = "-logits" if self.plan.combine == "logits" else ""
        return self.folder(groups) / f"{stem}{logits}.{ending}"

    def _written(self, columns: dict[str, Values], path: Callable[[str], Path]) -> str:
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
        write_json(path("json"), {"columns": list(columns), "rows": rows})
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([head, *rows])
        write_text(path("csv"), text.getvalue())
        cells = [head, *([row[0], *(f"{value:.4f}" for value in row[1:])] for row in rows)]
        width = max(len(row[0]) for row in cells)
        lines = [row[0].ljust(width) + "".join(f"{c:>10}" for c in row[1:]) for row in cells]
        written = "\n".join(lines)
        write_text(path("txt"), written + "\n")
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


def _line(outcome: Any) -> str:
    if isinstance(outcome, Failure):
        return summary(outcome)
    return f"{outcome['train_seconds']:.1f} s of training"
