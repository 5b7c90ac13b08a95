"""Tasks into groups on real data: maps, clusters, specialists, and the table beside the baselines.

Everything lies in one folder and is made in the order maps, groups, networks, table. What is
finished is read, not repeated, so the command goes on wherever it was killed.

    maps/       the training that records them, which is also the MTL baseline; pictures of them
    stl/        the single tasks
    kmeans-3/   one for each plan: memberships, specialist-1/ ..., the table

What else can tell the groups has folders of its own: stl-maps/ (which takes the place of stl/, and
mtl/ that of maps/), gradients/ or lookahead/, and stl-maps-kmeans-3/ and so on.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch

from equipoise.errors import EquipoiseError
from equipoise.grouping import Choice, DataMaps, Groups, Specialists, choose, find_groups
from equipoise.lab import grouping_figures, networks, runs
from equipoise.lab.comparison import Failure, Job, in_processes, one_by_one, summary
from equipoise.lab.config import ConfigError, RunConfig
from equipoise.lab.data import Data
from equipoise.lab.evaluation import Values, evaluate
from equipoise.lab.files import DamagedError, read_json, write_json, write_text
from equipoise.lab.grouping_runs import GradientsRun, LookaheadRun, MapsRun, Telling, kinds
from equipoise.lab.progress import Display, Throttle

By = Literal["maps", "stl-maps", "gradients", "lookahead"]


@dataclass(frozen=True)
class Plan:
    """How tasks are grouped, once their maps are there.

    Args:
        n_groups: number of groups; None: the one with the highest silhouette.
        checkpoints: numbers of finished epochs at which maps are taken.
        method: as in `find_groups`.
        fuzziness: F > 1.
        combine: how the specialists speak together, as in `Specialists`.
        by: what tells which tasks belong together: the data maps of one network or of single tasks,
            gradient cosines, or TAG's lookaheads.
    """

    n_groups: int | None = None
    checkpoints: tuple[int, ...] = ()
    method: Any = "kmeans"
    fuzziness: float = 2.0
    combine: Any = "probabilities"
    by: By = "maps"

    def name(self, n_groups: int) -> str:
        """Of the folder in which it is carried out: "kmeans-3", "lookahead-hard-2"."""
        soft = self.method in ("kmeans", "cmeans") and self.fuzziness != 2
        by = "" if self.by == "maps" else f"{self.by}-"
        return f"{by}{self.method}-{n_groups}" + (f"-fuzziness-{self.fuzziness:g}" if soft else "")


def evenly(epochs: int, number: int = 10) -> tuple[int, ...]:
    """Checkpoints at equal distances, up to the last epoch."""
    number = min(number, epochs)
    return tuple(math.ceil(epochs * (k + 1) / number) for k in range(number))


@dataclass
class Grouping:
    """A grouping in the folder `out`, which several plans can share.

    Args:
        config: of the run that tells which tasks belong together, which is also the MTL baseline;
            specialists and single tasks are trained under the same one.
        plan: of the grouping.
        out: the folder.
        full_maps: whether to keep the maps of all checkpoints in a file, maps.npy beside them; the
            method "points" needs them.
        singles: whether single tasks are trained for the table.

    Raises:
        ConfigError: `out` was begun with another configuration, with other checkpoints or without
            the full maps that are wanted now, or the plan is impossible.
    """

    config: RunConfig
    plan: Plan
    out: Path
    full_maps: bool = False
    singles: bool = True
    source: Telling = field(init=False)
    data: Data = field(init=False)

    def __post_init__(self) -> None:
        if self.config.task_weights is not None:
            raise ConfigError("a grouping finds task weights itself.")
        if self.config.read_recipe().is_stl:
            raise ConfigError(
                "stl trains tasks apart, and has no use for groups; for groups by the maps of "
                "single tasks give --by stl-maps."
            )
        last = max(self.plan.checkpoints, default=0)
        if not 0 < last <= self.config.epochs:
            raise ConfigError(
                f"the last checkpoint is after epoch {last}; give --checkpoints from 1 to "
                f"{self.config.epochs}, or more --epochs."
            )
        if not self._of_maps and (self.full_maps or self.plan.method == "points"):
            what = "--full-maps" if self.full_maps else "the method points"
            raise ConfigError(f"{what} needs data maps; --by is {self.plan.by}.")
        for job in (self.telling, *self.baselines.values()):
            runs.refuse_another_run(job.config, job.folder)
        self._go_on()
        try:
            with runs.seeded(self.config):
                run = self._make(self.telling.config)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self.source, self.data = run, run.data
        kinds(self.data)
        n_tasks = len(self.data.tasks)
        if self.plan.n_groups is not None and not 1 <= self.plan.n_groups <= n_tasks:
            raise ConfigError(f"groups is {self.plan.n_groups}; give 1 to {n_tasks}, the tasks.")
        if self.plan.method == "points":
            try:
                self._maps.maps()
            except EquipoiseError as error:
                raise ConfigError(self._without_full_maps) from error

    def _go_on(self) -> None:
        """Agree with how the recording in the folder was begun, if it was."""
        asked, self.full_maps = self.full_maps, self.full_maps or self.plan.method == "points"
        if not self._begun.exists():
            return
        there, mine = read_json(self._begun), list(self.plan.checkpoints)
        if not there.keys() >= {"checkpoints", "full_maps"}:
            raise DamagedError(self._begun)
        if there["checkpoints"] != mine:
            raise ConfigError(
                f"{self.out} was begun with checkpoints {there['checkpoints']}, not {mine}; "
                "choose another --out, or remove that folder."
            )
        self.full_maps = there["full_maps"]
        if asked and not self.full_maps:
            raise ConfigError(self._without_full_maps)

    @property
    def _without_full_maps(self) -> str:
        return (
            f"{self.out} was begun without full maps; choose another --out, or remove that folder."
        )

    # ------------------------------------------------------------------ groups

    def groups(self) -> tuple[Groups, Choice | None]:
        """Train what tells them, find the groups, write memberships and pictures."""
        self._tell()
        gram = self.source.gram()
        choice = choose(gram, seed=self.config.seed) if len(gram) > 2 else None
        number = self.plan.n_groups or (choice.best if choice else 1)
        found = find_groups(
            self._maps.maps() if self.plan.method == "points" else gram,
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

    def _tell(self) -> None:
        """Train what tells the groups, and show it."""
        folder = self.telling.folder
        if runs.finished(folder) is None:
            folder.mkdir(parents=True, exist_ok=True)
            if self._of_maps:
                begun = {"checkpoints": list(self.plan.checkpoints), "full_maps": self.full_maps}
                write_json(self._begun, begun)
            with Display(self.config.epochs, 1) as display:
                told = Throttle(lambda *seen: display.update(self.telling.name, *seen))
                runs.train(self.telling.config, folder, told, self._make)
        if not (folder / "checkpoint.ckpt").exists():
            raise DamagedError(folder / "checkpoint.ckpt")
        try:
            self.source.resume(folder)
        except DamagedError:
            raise
        except EquipoiseError as error:  # another run's checkpoint, or no file of the full maps
            raise EquipoiseError(f"{folder} cannot be gone on with; remove it. {error}") from error
        self.source.show(folder)

    def _make(self, config: RunConfig) -> Any:
        if self._of_maps:
            path = self.telling.folder / "maps.npy" if self.full_maps else None
            return MapsRun(config, checkpoints=self.plan.checkpoints, path=path)
        return {"gradients": GradientsRun, "lookahead": LookaheadRun}[self.plan.by](config)

    @property
    def _of_maps(self) -> bool:
        return self.plan.by in ("maps", "stl-maps")

    @property
    def _begun(self) -> Path:
        """How the recording was begun."""
        return self.telling.folder / "recording.json"

    @property
    def _maps(self) -> DataMaps:
        return cast(MapsRun, self.source).maps

    @property
    def telling(self) -> Named:
        """The run that tells which tasks belong together."""
        recipe = "stl" if self.plan.by == "stl-maps" else self.config.recipe
        return Named(self.plan.by, self._like(recipe), self.out / self.plan.by)

    @property
    def baselines(self) -> dict[str, Named]:
        """One network for all tasks, and one for each; the run that tells the groups is either."""
        told = self.telling
        if self.plan.by == "stl-maps":
            return {"mtl": Named("mtl", self.config, self.out / "mtl"), "stl": told}
        single = {"stl": Named("stl", self._like("stl"), self.out / "stl")}
        return {"mtl": told} | (single if self.singles else {})

    def folder(self, groups: Groups) -> Path:
        """Where the plan is carried out: all that depends on the groups."""
        return self.out / self.plan.name(len(groups))

    # ------------------------------------------------------------------ networks

    def train(self, groups: Groups, side_by_side: int = 1) -> list[str]:
        """Train specialists and baselines, `side_by_side` at a time; returns what failed."""
        jobs = [*self.specialists(groups), *self.baselines.values()]
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
        """Measure ensemble and baselines on test and training split; write the table, return it."""
        models: dict[str, torch.nn.Module] = {"stg-mtl": self.together(groups)}
        for name, job in self.baselines.items():
            models[name] = networks.selected(job.config, self.data, job.folder)
        with runs.seeded(self.config):
            run = runs.Run(self.config, self.data)
            found = {}
            for part in ("test", "train"):
                batches = run.batches(getattr(self.data, part), shuffle_seed=None)
                for name, model in models.items():
                    here = cast(Any, model.to(self.config.device))
                    _, values = evaluate(here, self.data.tasks, batches, run.fabric.autocast)
                    found[name if part == "test" else f"{name}, training"] = values
        return self._written(found, partial(self.file, groups, "table"))

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
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            row[0].ljust(widths[0])
            + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
            for row in cells
        ]
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
