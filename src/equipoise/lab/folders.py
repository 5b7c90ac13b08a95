"""Run folders as they lie on disk: whole, unfinished, failed or damaged."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.errors import EquipoiseError
from equipoise.lab.files import read_json
from equipoise.lab.results import upgraded

History = Mapping[str, np.ndarray]
"""metrics.csv: column -> (epochs,) values, NaN where the cell is empty."""
TASK_KEYS = {"name", "kind", "measures"}
MEASURE_KEYS = {"name", "higher_is_better", "unit", "share"}
RESULT_KEYS = {"recipe", "seed", "data", "model", "tasks", "best_epoch", "epochs", "test", "val",
               "train_seconds", "parameters"}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What a run folder holds.

    Attributes:
        folder: where it is.
        config: config.json.
        environment: environment.json; empty if there is none.
        history: metrics.csv, empty before the first epoch has ended.
        result: result.json; None as long as the run has not finished.
        failure: why there is no result.
    """

    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    history: History
    result: dict[str, Any] | None
    failure: str | None

    @property
    def recipe(self) -> str:
        """In canonical form."""
        return self.config["recipe"]

    @property
    def seed(self) -> int:
        """Of the run."""
        return self.config["seed"]

    @property
    def summary(self) -> dict[str, Any]:
        """What `equipoise.lab.table.summarise` reads."""
        return self.result or {"recipe": self.recipe, "seed": self.seed, "failed": self.failure}


def read(folder: str | Path) -> Run:
    """The run in a folder.

    Raises:
        EquipoiseError: there is no such folder, or it holds no run or a damaged one; names the
            file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise EquipoiseError(f"there is no folder {folder}.")
    if not (folder / "config.json").exists():
        raise EquipoiseError(f"{folder} holds no run: it has no config.json.")
    config = _json(folder / "config.json", {"recipe", "seed"})
    environment = folder / "environment.json"
    history = _history(folder / "metrics.csv")
    result = None
    if (folder / "result.json").exists():
        result = upgraded(_json(folder / "result.json", RESULT_KEYS))
        _check(result, folder / "result.json")
    return Run(
        folder,
        config,
        _json(environment, set()) if environment.exists() else {},
        history,
        result,
        None if result else _failure(folder, config, history),
    )


def listed(folder: Path) -> list[Path]:
    """The run folders of a comparison, whatever their state; none if `folder` is none.

    Raises:
        EquipoiseError: comparison.json is damaged.
    """
    path = folder / "comparison.json"
    return [folder / run for run in _json(path, {"runs"})["runs"]] if path.exists() else []


def _json(path: Path, keys: set[str]) -> dict[str, Any]:
    try:
        value = read_json(path)
    except OSError as error:
        raise EquipoiseError(f"{path} cannot be read ({error.strerror}).") from error

    if not isinstance(value, dict) or (lacking := keys - set(value)):
        what = f"it has no {min(lacking)!r}" if isinstance(value, dict) else "it is no object"
        raise EquipoiseError(f"{path} is damaged: {what}.")
    return value


def _check(result: Mapping[str, Any], path: Path) -> None:
    """Refuse a result that is complete by its keys, but not by what they hold."""
    try:
        for task in result["tasks"]:
            if lacking := TASK_KEYS - set(task):
                raise KeyError(f"a task has no {min(lacking)!r}")
            for measure in task["measures"]:
                if lacking := MEASURE_KEYS - set(measure):
                    raise KeyError(f"a measure has no {min(lacking)!r}")
        found = [task for split in ("val", "test") for task in result[split].values()]
        values = [v for task in found for v in task.values() if v is not None]
        numbers = [result[key] for key in ("train_seconds", "parameters", "epochs")]
        if "sizes" in result:  # older runs do not say
            numbers += [result["sizes"][split] for split in ("train", "val", "test")]
        for number in (*values, *numbers):
            float(number)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise EquipoiseError(f"{path} is damaged: {error.args[0]}.") from error


def _history(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        return {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, strict=True))
        history = {
            name: np.array([float(row[name]) if row[name] != "" else np.nan for row in rows])
            for name in (rows[0] if rows else ())
        }
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise EquipoiseError(f"{path} is damaged ({error}).") from error
    if history and not np.isfinite(history.get("epoch", np.array(np.nan))).all():
        raise EquipoiseError(f"{path} is damaged: a row has no epoch.")
    return history


def _failure(folder: Path, config: Mapping[str, Any], history: Mapping[str, np.ndarray]) -> str:
    done = f"{len(history.get('epoch', ()))} of {config.get('epochs', 'all')} epochs are done"
    trace = folder / "error.txt"
    if trace.exists():
        lines = trace.read_text("utf-8", errors="replace").strip().splitlines()
        last = re.sub(r"^equipoise\.[\w.]+: ", "", lines[-1]) if lines else "for no known reason"
        return f"failed ({last}); {done}"
    return f"not finished; {done}"
