"""Several runs diagnosed side by side, with progress; what `equipoise diagnose` does."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equipoise.errors import EquipoiseError
from equipoise.lab import diagnose_page, ood
from equipoise.lab.comparison import Failure, in_processes, one_by_one, run_folders
from equipoise.lab.config import ConfigError
from equipoise.lab.data import load
from equipoise.lab.diagnose import SEED, configuration, diagnose, known
from equipoise.lab.diagnose_settings import Settings
from equipoise.lab.progress import MeasureDisplay, Pace


@dataclass(frozen=True)
class Job:
    """One run to be diagnosed; arguments as of `equipoise.lab.diagnose.diagnose`."""

    folder: Path
    settings: Settings
    data_root: str | None = None
    device: str = "auto"
    again: bool = False
    methods: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """How it is called on the screen."""
        return str(self.folder)

    def attempt(self, send: Callable[..., None]) -> dict[str, Any] | Failure:
        """Measure; an error becomes a Failure."""
        try:
            found = diagnose(
                self.folder,
                self.settings,
                data_root=self.data_root,
                device=self.device,
                again=self.again,
                methods=self.methods,
                progress=Pace(send),
            )
            diagnose_page.write(self.folder)
            return found
        except Exception as error:
            if os.environ.get("EQUIPOISE_TRACEBACK"):
                raise
            expected = isinstance(error, EquipoiseError)
            return Failure(str(error) if expected else f"{type(error).__name__}: {error}")


def finished_runs(given: Iterable[str | Path]) -> list[Path]:
    """The runs that folders stand for: a run itself, or those of a comparison that have finished.

    Raises:
        ConfigError: no such folder, no run, or none that has finished.
    """
    found: dict[Path, Path] = {}
    for folder in map(Path, given):
        runs = run_folders(folder)
        if runs != [folder]:
            runs = [run for run in runs if (run / "result.json").exists()]
            if not runs:
                raise ConfigError(f"{folder} holds no finished run; finish one first.")
        found |= {run.resolve(): run for run in runs}
    return list(found.values())


def check(jobs: Sequence[Job]) -> None:
    """Look for all that the jobs need, before the first one starts.

    Raises:
        EquipoiseError: a run that is not finished, other settings than were used before, data or
            an out-of-domain set that cannot be had.
    """
    seen = set()
    for job in jobs:
        config = configuration(job.folder, job.data_root, job.device, job.methods)
        known(job.folder, job.settings, config, job.again)
        if (config.data, config.data_root) in seen:
            continue
        seen.add((config.data, config.data_root))
        try:
            data = load(config.data, config.data_root)
            name = job.settings.out_of_domain(config) if "entropy" in job.settings.only else None
            if name is not None:
                ood.batches(name, data, config.data_root, 1, SEED)
        except ValueError as error:
            raise error if isinstance(error, EquipoiseError) else ConfigError(str(error)) from error


def make(jobs: Sequence[Job], side_by_side: int = 1) -> int:
    """Diagnose them, `side_by_side` at a time.

    Returns:
        How many of them failed.
    """
    side_by_side = min(side_by_side, len(jobs))
    failures = 0
    with MeasureDisplay(1, len(jobs)) as display:
        do = one_by_one if side_by_side == 1 else in_processes
        for job, outcome in do(jobs, display, side_by_side):
            failures += isinstance(outcome, Failure)
            display.end(job.name, f"{job.name}: {summary(outcome)}")
    return failures


def summary(outcome: dict[str, Any] | Failure) -> str:
    """How a run's measuring ended, in one line."""
    if isinstance(outcome, Failure):
        return f"failed: {outcome.message}"
    seconds = sum(measure["seconds"] for measure in outcome["measures"].values())
    return f"{', '.join(outcome['measures'])} measured in {seconds:.1f} s"
