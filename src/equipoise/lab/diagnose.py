"""Diagnostics of finished runs: how flat, how sure and how robust the selected networks are."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equipoise import diagnostics as measures
from equipoise.lab import ood
from equipoise.lab.config import ConfigError, RunConfig
from equipoise.lab.data import load, loader
from equipoise.lab.data.base import Batch
from equipoise.lab.diagnose_settings import Measure, Settings
from equipoise.lab.evaluation import conflict, labelled
from equipoise.lab.files import DamagedError, read_json, write_json
from equipoise.lab.networks import Counted, Here, selected, separate
from equipoise.lab.runs import finished, seeded
from equipoise.lab.tasks import Task
from equipoise.trunk import SharedTrunk

NAME = "diagnostics.json"
SEED = 0
"""Of all draws: the same directions and the same samples for every run, so that runs are paired."""
RHO = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # radii of the sharpness curve
BINS = 50  # of the entropy's density
PROBES = 16  # batches of training data, where the run itself has looked at none
BATCH = 500  # samples looked at together

Progress = Callable[[float, str], None]
"""Called after each pass over the data with the share of the work done and the present measure."""


def diagnose(
    folder: str | Path,
    settings: Settings | None = None,
    *,
    data_root: str | None = None,
    device: str = "auto",
    again: bool = False,
    methods: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure the selected networks of a finished run; `folder`/diagnostics.json keeps it.

    What is there already is kept, each measure is written when it is finished; the call that was
    killed goes on with those that are missing. All measures are taken in single precision, in
    evaluation mode, on the test split, and nothing of the run is changed.

    Args:
        folder: the run.
        settings: what to measure, and how; None: `Settings()`.
        data_root: folder of the data set's files, if they are elsewhere now.
        device: "auto", "cpu", "cuda" or "cuda:1".
        again: measure also what is there already.
        methods: files and modules of the recipe's own methods, if they are elsewhere now.
        progress: see `Progress`.

    Returns:
        What diagnostics.json holds: `run`, `tasks`, and by name the `measures`.

    Raises:
        ConfigError: no finished run, or it has been measured with other settings.
        EquipoiseError: the data cannot be had, or a network gives no finite numbers.
        OSError: `folder` cannot be written.
    """
    folder = Path(folder)
    settings = settings or Settings()
    config = configuration(folder, data_root, device, methods)
    found = known(folder, settings, config, again)
    todo = [m for m in settings.only if m not in found["measures"]]
    if todo:
        with seeded(config):
            subject = Subject(config, folder, settings, progress or (lambda *_: None), todo)
            found["tasks"] = subject.description()
            for name in todo:
                found["measures"][name] = subject.measure(name)
                write_json(folder / NAME, found)
    return found


def configuration(
    folder: Path,
    data_root: str | None = None,
    device: str = "auto",
    methods: Sequence[str] = (),
) -> RunConfig:
    """The configuration of a finished run, for looking at it here.

    Raises:
        ConfigError: there is no finished run with its networks, or no such device or folder.
    """
    if not (folder / "config.json").exists():
        raise ConfigError(f"{folder} holds no run: it has no config.json.")
    if finished(folder) is None:
        raise ConfigError(f"{folder} holds a run that is not finished; finish it first.")
    if not (folder / "checkpoint.ckpt").exists():
        raise ConfigError(f"{folder} has no checkpoint.ckpt; without it there is no network.")
    given = dict(read_json(folder / "config.json"))
    given |= {"device": device, "precision": "32-true"}
    if data_root is not None:
        given["data_root"] = data_root
    if methods:
        given["methods"] = methods
    return RunConfig.of(**given)


def known(
    folder: Path, settings: Settings, config: RunConfig, again: bool = False
) -> dict[str, Any]:
    """What diagnostics.json holds of this run, without what is to be measured (again).

    Raises:
        ConfigError: a measure that is wanted is there, but with other settings.
    """
    result = finished(folder) or {}
    run = {key: result[key] for key in ("recipe", "seed", "data", "model", "finished")}
    found: dict[str, Any] = {"run": run, "tasks": {}, "measures": {}}
    path = folder / NAME
    if path.exists():
        there = read_json(path)
        if not isinstance(there, dict) or set(found) - set(there):
            raise DamagedError(path)
        if there["run"] == run:  # else the run has been made anew
            found = there
    for name in settings.only:
        if again:
            found["measures"].pop(name, None)
        elif name in found["measures"]:
            settings.refuse_difference(name, found["measures"][name]["settings"], config, path)
    return found


class Subject:
    """The selected networks of a run, and the data to look at them with.

    Args:
        config: of the run.
        folder: of the run.
        settings: how to measure.
        progress: told after each pass over the data.
        todo: the measures that will be taken.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        settings: Settings,
        progress: Progress,
        todo: Iterable[Measure],
    ) -> None:
        self.config = config
        self.folder = folder
        self.settings = settings
        self.data = load(config.data, config.data_root)
        self.tasks = {task.name: task for task in self.data.tasks}
        self.classifying = {n: t for n, t in self.tasks.items() if t.n_classes}
        self.model = selected(config, self.data, folder).to(config.device)
        self.networks = list(separate(self.model))
        self._progress = progress
        self._passes = {name: self._number_of_passes(name) for name in todo}
        self._done = 0
        self._now = ""

    def description(self) -> dict[str, Any]:
        """What each task is."""
        return {
            name: {
                "kind": task.kind,
                "classes": task.n_classes,
                "chance": abs(self._chance(task)),
            }
            for name, task in self.tasks.items()
        }

    def measure(self, name: Measure) -> dict[str, Any]:
        """One measure, as it is written down."""
        self._now = name
        order = list(self._passes)
        self._done = sum(self._passes[other] for other in order[: order.index(name)])
        start = time.perf_counter()
        found = getattr(self, f"_{name}")()
        used = self.settings.of(name, self.config)
        return {"settings": used, "seconds": time.perf_counter() - start, **plain(found)}

    def _conflict(self) -> dict[str, Any]:
        if len(self.networks) > 1:
            return {"left_out": dict.fromkeys(self.tasks, "its network is its own")}
        batches = loader(self.data.train, self.config.batch_size, shuffle_seed=0)
        number = self.config.probes or PROBES
        probes = self._counted(Here(batches, self.config.device, self.tasks, number))
        return {"selected": conflict(self.model, self.data.tasks, probes, nullcontext)}

    def _robustness(self) -> dict[str, Any]:
        scores = {
            name: measures.accuracy if name in self.classifying else partial(_minus_loss, task)
            for name, task in self.tasks.items()
        }
        found = {}
        for network in self.networks:
            length = math.sqrt(
                sum(float(p.detach().double().square().sum()) for p in network.parameters())
            )
            curve = measures.noise_robustness(
                network,
                self._samples(network),
                {task: scores[task] for task in network.tasks},
                self.settings.lengths(length),
                self.settings.draws,
                torch.Generator().manual_seed(SEED),
            )
            chance = {task: self._chance(self.tasks[task]) for task in network.tasks}
            half = curve.radius(0.5, chance=chance)
            for k, task in enumerate(network.tasks):
                sign = 1 if task in self.classifying else -1  # losses, as they are known
                level = (float(curve.clean[k]) + chance[task]) / 2
                values = curve.values[:, :, k]
                found[task] = {
                    "measure": "accuracy" if task in self.classifying else "loss",
                    "length": length,
                    "clean": sign * curve.clean[k],
                    "radii": curve.radii,
                    "relative_radii": curve.relative_radii,
                    "values": sign * values,
                    "mean": sign * curve.mean[:, k],
                    "std": curve.std[:, k],
                    "half_radius": half[k],
                    "half_relative_radius": half[k] / length,
                    "half_reached": not bool((curve.mean[:, k] >= level).all()),
                }
        return {"tasks": found, "left_out": {}}

    def _entropy(self) -> dict[str, Any]:
        name = self.settings.out_of_domain(self.config)
        inside = self._entropies(loader(self.data.test, BATCH, shuffle_seed=None))
        outside: Mapping[str, Tensor] = {}
        if name is not None:
            batches = ood.batches(name, self.data, self.config.data_root, BATCH, SEED)
            outside = self._entropies(batches)
        found = {}
        for task, values in inside.items():
            most = math.log(self.tasks[task].n_classes)
            found[task] = {"most": most, "in": density(values, most)}
            if task in outside:
                found[task]["out"] = density(outside[task], most)
                found[task]["auroc"] = separation(values, outside[task])
        return {"ood": name, "tasks": found, "left_out": self._unsure()}

    def _entropies(self, batches: Iterable[Batch]) -> dict[str, Tensor]:
        if not self.classifying:
            return {}
        # Without targets: those of another data set are of other tasks.
        inputs = self._counted(Here(batches, self.config.device, ()))
        return measures.entropies(self.model, inputs, self.classifying)

    def _calibration(self) -> dict[str, Any]:
        if not self.classifying:
            return {"tasks": {}, "left_out": self._unsure()}
        given = loader(self.data.test, BATCH, shuffle_seed=None)
        batches = Here(given, self.config.device, self.tasks)
        found = measures.calibration(self.model, self._counted(batches), tasks=self.classifying)
        tasks = {
            task: {
                key: getattr(found, key)[k]
                for key in ("accuracy", "confidence", "ece", "brier", "n")
            }
            for k, task in enumerate(found.tasks)
        }
        return {"bins": 10, "tasks": tasks, "left_out": self._unsure()}

    def _surface(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        coordinates = torch.empty(0)
        for network in self.networks:
            surface = measures.loss_surface(
                network,
                self._samples(network),
                self._losses(network),
                self.settings.span,
                self.settings.points,
                torch.Generator().manual_seed(SEED),
            )
            coordinates = surface.coordinates
            found |= dict(zip(surface.tasks, surface.values, strict=True))
        return {"coordinates": coordinates, "tasks": found, "left_out": {}}

    def _sharpness(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for network in self.networks:
            batches = self._samples(network)
            curve = measures.sharpness_curve(network, batches, self._losses(network), RHO)
            for k, task in enumerate(curve.tasks):
                found[task] = {"loss": curve.losses[k], "increase": curve.values[:, k]}
        return {"radii": list(RHO), "tasks": found, "left_out": {}}

    def _losses(self, network: SharedTrunk) -> dict[str, Callable[..., Tensor]]:
        return {task: self.tasks[task].loss for task in network.tasks}

    def _samples(self, network: SharedTrunk) -> Iterable[Batch]:
        """The chosen samples of the test split, at hand for many passes of one network."""
        split, number = self.data.test, self.settings.samples
        order = torch.arange(len(split))
        if number is not None and number < len(split):
            generator = torch.Generator().manual_seed(SEED)
            order = torch.randperm(len(split), generator=generator)[:number].sort().values
        batches = [split[part] for part in order.split(BATCH)]
        return self._counted(list(Here(batches, self.config.device, network.tasks)))

    def _counted(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        def told() -> None:
            self._done += 1
            self._progress(min(1.0, self._done / sum(self._passes.values())), self._now)

        return Counted(batches, told)

    def _number_of_passes(self, name: Measure) -> int:
        """About as many as the measure makes, for the progress alone."""
        nets, tasks = len(self.networks), len(self.tasks)
        return {
            "conflict": 1,
            "robustness": nets * (1 + self.settings.draws * self.settings.number_of_radii),
            "entropy": 2,
            "calibration": 1,
            "surface": nets * self.settings.points**2,
            "sharpness": nets + tasks * (1 + len(RHO)),
        }[name]

    def _chance(self, task: Task) -> float:
        """The score of one answer for all: the commonest class, or minus the loss."""
        if not task.n_classes:
            return -task.uninformed_loss
        target = self.data.test.targets[task.name]
        _, target = labelled(target, target.float())
        return float(target.long().bincount().max() / len(target)) if len(target) else math.nan

    def _unsure(self) -> dict[str, str]:
        return {
            name: f"{task.kind} gives no probabilities"
            for name, task in self.tasks.items()
            if name not in self.classifying
        }


def density(values: Tensor, most: float) -> dict[str, Any]:
    """How entropies are distributed on [0, most]: counts in equal bins, mean and median."""
    counts = torch.histc(values.clamp(0, most), BINS, 0, most).long()
    return {"n": len(values), "mean": values.mean(), "median": values.median(), "counts": counts}


def separation(inside: Tensor, outside: Tensor) -> float:
    """The probability that a sample from outside has the higher entropy; ties count half.

    The area under the ROC curve of the entropy as a sign of being outside.
    """
    ordered = inside.sort().values
    below = torch.searchsorted(ordered, outside)
    up_to = torch.searchsorted(ordered, outside, right=True)
    return float((below + up_to).double().mean() / (2 * len(inside)))


def plain(value: Any) -> Any:
    """Numbers and lists as JSON has them; None for what is not finite."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _minus_loss(task: Task, output: Tensor, target: Tensor) -> Tensor:
    return -task.loss(output, target)
