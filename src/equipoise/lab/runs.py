"""One run: one recipe, one seed, a folder that a killed run goes on from."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from equipoise.lab import data as datasets
from equipoise.lab import models, searches
from equipoise.lab.config import RunConfig, environment, refuse_difference
from equipoise.lab.data import Data, Split, loader
from equipoise.lab.data.base import Batch
from equipoise.lab.evaluation import Values, conflict, evaluate, improvement, mean_conflict
from equipoise.lab.files import (
    DamagedError,
    read_json,
    read_state,
    replacing,
    write_json,
    write_rows,
)
from equipoise.lab.results import Result, described, upgraded
from equipoise.lab.schedules import Schedule
from equipoise.report import StepReport
from equipoise.trunk import SharedTrunk

logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it announces its precision

Progress = Callable[[float, StepReport], None]
"""Called after each step with the epochs done, fractions included, and the step's report."""

OPTIMIZERS = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}


def train(
    config: RunConfig,
    folder: str | Path,
    progress: Progress | None = None,
    make: Callable[[RunConfig], Run] | None = None,
) -> Result:
    """Make the run, or what is left of it, in `folder`; a finished run is read, not repeated.

    A run that was killed goes on after its last finished epoch, and ends with the numbers that it
    would have had (the times apart).

    Args:
        config: what to run.
        folder: where it is kept.
        progress: called after each step.
        make: makes the run; None: a plain `Run`.

    Raises:
        ConfigError: `folder` holds a run with another configuration.
        OSError: `folder` cannot be written.
        EquipoiseError: what went wrong in training, with the name of the task.
    """
    folder = Path(folder)
    refuse_another_run(config, folder)
    if (result := finished(folder)) is not None:
        return result
    folder.mkdir(parents=True, exist_ok=True)
    for draft in folder.glob(".*.tmp"):  # of a process that was killed while it wrote
        draft.unlink(missing_ok=True)
    with seeded(config):
        run = (make or Run)(config)
        write_json(folder / "config.json", config.model_dump(mode="json"))
        write_json(folder / "environment.json", environment(run.fabric.device))
        run.resume(folder)
        run.warm_up()
        while len(run.rows) < config.epochs:
            trained = run.train_epoch(progress)
            run.rows.append({**trained, **run.validate(), "conflict/probe": run.probe()})
            run.schedule.step(run.judgement)
            run.save(folder)
        result = run.result()
    write_json(folder / "result.json", result)
    return result


class Run:
    """The state of a run between two epochs.

    Args:
        config: what to run.
        data: the data set, if it is at hand already.

    Raises:
        EquipoiseError, ValueError: the recipe, the data or the model cannot be had like this.
    """

    def __init__(self, config: RunConfig, data: Data | None = None) -> None:
        # Here, not above: its import takes a second, which `equipoise list` need not wait for.
        from lightning_fabric import Fabric

        self.config = config
        self.data = data or datasets.load(config.data, config.data_root)
        device = torch.device(config.device)
        self.fabric = Fabric(
            accelerator=device.type,
            devices=1 if device.type == "cpu" else [device.index or 0],
            precision=config.precision,
        )
        model = models.build(config.model, self.data)
        self.fabric.to_device(model)
        losses = {task.name: task.loss for task in self.data.tasks}
        self.steps = len(loader(self.data.train, config.batch_size, shuffle_seed=None))
        self.step = config.read_recipe().build(
            model, losses, config.lr, self.steps, optimizer=OPTIMIZERS[config.optimizer],
            seed=config.seed, task_weights=config.task_weights,
        )  # fmt: skip
        self.schedule = Schedule(config.schedule, self.step.optimizer)
        self.model = cast(SharedTrunk, self.step.model)  # for the baseline, one network a task
        self.rows: list[dict[str, Any]] = []
        self.best: list[dict[str, Any]] = []  # one for each group of tasks that share a network

    def warm_up(self) -> None:
        """Make one step and take it back.

        The first step of a process pays for what torch loads and plans only then: seconds that
        belong to no method.
        """
        state = self.step.state_dict()
        inputs, targets = next(iter(self.batches(self.data.train, shuffle_seed=0)))
        self.model.train()
        with self.fabric.autocast():
            self.step(inputs, targets)
        self.step.load_state_dict(state)

    def train_epoch(self, progress: Progress | None = None) -> dict[str, Any]:
        """Go through the training data once; the first columns of metrics.csv."""
        epoch = len(self.rows) + 1
        batches = self.training_batches(epoch_seed(self.config.seed, epoch))
        reports: list[StepReport] = []
        self.model.train()
        start = time.perf_counter()
        for batch in batches:
            with self.fabric.autocast():
                reports.append(self.train_on(batch))
            if progress is not None:
                progress(epoch - 1 + len(reports) / self.steps, reports[-1])
        seconds = time.perf_counter() - start

        names = self.model.tasks
        lr = self.step.optimizer.param_groups[0]["lr"]
        grams, flat = (
            [gram for gram in found if gram is not None]
            for found in ((r.gram for r in reports), (r.flat_gram for r in reports))
        )
        return {
            "epoch": epoch,
            "seconds": seconds,
            "lr": lr,
            **columns("loss/train", names, (r.losses for r in reports)),
            **columns("weight", names, (r.weights for r in reports)),
            **columns("coefficient", names, (r.coefficients for r in reports)),
            **searches.columns(reports),
            "conflict/steps": mean_conflict(grams) if grams else None,
            "conflict/flat": mean_conflict(flat) if flat else None,
        }

    def training_batches(self, seed: int) -> Iterable[Any]:
        """The batches of an epoch whose order `seed` decides."""
        return self.batches(self.data.train, shuffle_seed=seed)

    def train_on(self, batch: Any) -> StepReport:
        """One step."""
        inputs, targets = batch
        return self.step(inputs, targets)

    def validate(self) -> dict[str, Any]:
        """Measure on the validation split, and keep each network that is better than before."""
        losses, values = self.measure(self.data.val)
        for i, group in enumerate(self.model.groups):
            score = self.judge(values, group)
            if i < len(self.best) and (score <= self.best[i]["score"] or np.isnan(score)):
                continue
            state = {
                key: value.detach().cpu().clone()
                for key, value in self.model.group_state(group).items()
            }
            kept = {"score": score, "epoch": len(self.rows) + 1, "state": state}
            self.best[i : i + 1] = [{**kept, "val": {name: values[name] for name in group}}]
        return {
            **{f"loss/val/{name}": loss for name, loss in losses.items()},
            **{
                f"{measure}/val/{name}": value
                for name, found in values.items()
                for measure, value in found.items()
            },
            **self.judgements(values, self.model.tasks),
        }

    def judgements(self, values: Values, names: Sequence[str]) -> dict[str, float]:
        """What validation says of some tasks together, as numbers that are higher when better.

        The mean of their scores, for a specialist by its weights; and else Delta_m in percent,
        where the data set has published single-task numbers, by which the protocols that have
        such numbers select.
        """
        shares = self.config.task_weights or [1.0] * len(self.data.tasks)
        taken = {t.name: w for t, w in zip(self.data.tasks, shares, strict=True) if w}
        tasks = [task for task in self.data.tasks if task.name in names and task.name in taken]
        weights = [taken[task.name] for task in tasks]
        found = {"score": mean([task.score(values[task.name]) for task in tasks], weights)}
        if self.data.baseline is not None and self.config.task_weights is None:
            found["delta_m"] = improvement(tasks, values, self.data.baseline)
        return found

    def judge(self, values: Values, names: Sequence[str]) -> float:
        """The one of the `judgements` that decides: the last."""
        return list(self.judgements(values, names).values())[-1]

    @property
    def judgement(self) -> float:
        """Of the last epoch, as a fraction."""
        row = self.rows[-1]
        return row["delta_m"] / 100 if "delta_m" in row else row["score"]

    def measure(self, split: Split) -> tuple[dict[str, float], Values]:
        """Losses and measures of the present networks on `split`."""
        batches = self.batches(split, shuffle_seed=None)
        return evaluate(self.model, self.data.tasks, batches, self.fabric.autocast)

    def probe(self) -> float | None:
        """Percent of conflicting task pairs on training batches that are the same in every run."""
        if not self.config.probes:
            return None
        batches = islice(self.batches(self.data.train, shuffle_seed=0), self.config.probes)
        return conflict(self.model, self.data.tasks, batches, self.fabric.autocast)

    def batches(self, split: Split, shuffle_seed: int | None) -> Iterable[Batch]:
        """The batches of `split`, on the device."""
        batches = loader(split, self.config.batch_size, shuffle_seed=shuffle_seed)
        return cast("Iterable[Batch]", self.fabric.setup_dataloaders(batches))

    def save(self, folder: Path) -> None:
        """Write what a resumed run needs, and the table of the epochs."""
        write_rows(folder / "metrics.csv", self.rows)
        with replacing(folder / "checkpoint.ckpt") as file:
            state = {"step": self.step.state_dict(), "schedule": self.schedule.state_dict()}
            torch.save({**state, "rows": self.rows, "best": self.best, **self.more_state()}, file)

    def more_state(self) -> dict[str, Any]:
        """What a kind of run keeps in its checkpoint besides."""
        return {}

    def take(self, state: dict[str, Any]) -> None:
        """Go on with what `more_state` gave."""

    def resume(self, folder: Path) -> None:
        """Go back to the last epoch that was saved in `folder`, if there is one."""
        path = folder / "checkpoint.ckpt"
        if path.exists():
            state = read_state(path)
            try:
                self.step.load_state_dict(state["step"])
                self.schedule.load_state_dict(state.get("schedule", {}))
                self.rows, self.best = state["rows"], state["best"]
                self.take(state)
            except (KeyError, TypeError) as error:  # of another kind of run
                raise DamagedError(path) from error

    def result(self) -> Result:
        """Measure the best networks on the test split; for the first and only time."""
        self.model.load_state_dict({k: v for kept in self.best for k, v in kept["state"].items()})
        _, test = self.measure(self.data.test)
        groups = list(zip(self.model.groups, self.best, strict=True))
        epochs = {name: kept["epoch"] for group, kept in groups for name in group}
        return {
            "recipe": self.config.recipe,
            "seed": self.config.seed,
            "data": self.config.data,
            "model": self.config.model,
            "sizes": {part: len(getattr(self.data, part)) for part in ("train", "val", "test")},
            "tasks": [described(task) for task in self.data.tasks],
            "baseline": None if self.data.baseline is None else asdict(self.data.baseline),
            "epochs": self.config.epochs,
            "best_epoch": epochs if len(groups) > 1 else groups[0][1]["epoch"],
            "val": {name: value for kept in self.best for name, value in kept["val"].items()},
            "test": test,
            "train_seconds": sum(row["seconds"] for row in self.rows),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }


def finished(folder: str | Path) -> Result | None:
    """The result of the run in `folder`, if it has come to its end."""
    path = Path(folder) / "result.json"
    return upgraded(read_json(path)) if path.exists() else None


def refuse_another_run(config: RunConfig, folder: str | Path) -> None:
    """A folder holds one run; going on with another configuration would mix two.

    Raises:
        ConfigError: names the first field that differs, with both values.
    """
    path = Path(folder) / "config.json"
    if path.exists():
        refuse_difference(read_json(path), config.model_dump(mode="json"), folder)


@contextmanager
def seeded(config: RunConfig) -> Generator[None]:
    """Random numbers and threads as `config` says; the caller's own come back afterwards."""
    threads = torch.get_num_threads()
    device = torch.device(config.device)
    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(config.seed)
        torch.set_num_threads(config.threads)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def epoch_seed(seed: int, epoch: int) -> int:
    """The seed of one epoch's order.

    A function of seed and epoch alone, so that a resumed run meets the same batches.
    """
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> 1)


def mean(scores: list[float], weights: list[float] | None = None) -> float:
    """The mean of those that are known: a task may have no label to validate on (NaN)."""
    values = torch.tensor(scores, dtype=torch.float64)
    if weights is None or len(set(weights)) == 1:
        return float(values.nanmean())
    shares = torch.where(values.isnan(), 0.0, torch.tensor(weights, dtype=torch.float64))
    return float((shares * values.nan_to_num()).sum() / shares.sum())


def columns(
    kind: str, names: Sequence[str], vectors: Iterable[Tensor | None]
) -> dict[str, float | None]:
    """Columns "loss/train/left" and so on, from one vector (T,) for each step.

    The mean over the steps, without those in which the task was absent (NaN); None, an empty
    cell, where a stage does not say.
    """
    known = [vector for vector in vectors if vector is not None]
    values = torch.stack(known).nanmean(0).tolist() if known else [None] * len(names)
    return {f"{kind}/{name}": value for name, value in zip(names, values, strict=True)}
