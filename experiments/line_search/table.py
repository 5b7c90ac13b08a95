"""The tables and the picture of the line-search experiment, from its run folders.

    python -m experiments.line_search.table runs/line_search --csv FILE --json FILE --picture FILE

Prints Markdown, writes one line a run as CSV, the tables as JSON, and the curves as SVG. A set that
has not been trained is left out.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from equipoise.recipe import Recipe
from experiments.common import Row, Runs, interval, mean, save, spread, table, written
from experiments.line_search.run import BEYOND, SETS, STEPS, searches

TAKEN = ("size", "trials", "rejected", "fallback", "unverified")
SHOWN = ("FBLS, literal", "FBLS, matched", "FBLS, verified", "BLS, beta 0.1")

Curve = tuple[np.ndarray, np.ndarray]
"""Seconds of training, and error on validation in percent, after each epoch."""


def error(values: dict[str, dict[str, float]]) -> float:
    """100 minus accuracy or F1 in percent, mean over the tasks."""
    return 100 * (1 - mean(value for measures in values.values() for value in measures.values()))


class Set:
    """All runs on one data set, by the name of the method.

    Args:
        folder: of the set; in it one comparison for the searches and one for each step.
        name: of the set.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.runs: Runs = {}
        self.curves: dict[tuple[str, int], Curve] = {}
        for label, recipe in searches(name).items():
            self._add(folder / "searched", str(Recipe.parse(recipe)), label)
        for step in (*STEPS, *BEYOND):
            self._add(folder / f"step-{step:g}", "ew", f"SGD, {step:g}")
            self._add(folder / f"step-{step:g}", "mgda-ub", f"MGDA-UB, {step:g}")
        self.seeds = sorted({seed for _, seed in self.runs})

    def _add(self, folder: Path, recipe: str, label: str) -> None:
        for path in sorted(folder.glob("runs/*/result.json")):
            result = json.loads(path.read_text())
            if result["recipe"] != recipe:
                continue
            with (path.parent / "metrics.csv").open(newline="") as file:
                rows = list(csv.DictReader(file))
            seconds = np.array([float(row["seconds"]) for row in rows])
            row: Row = {
                "test error": error(result["test"]),
                "val error": error(result["val"]),
                "seconds an epoch": float(np.median(seconds)),
            }
            for column in TAKEN:
                values = [row[f"step/{column}"] for row in rows if row.get(f"step/{column}")]
                if values:
                    row[column] = mean(map(float, values))
            self.runs[label, result["seed"]] = row
            score = np.array([float(row["score"]) for row in rows])
            self.curves[label, result["seed"]] = np.cumsum(seconds), 100 * (1 - score)

    def of(self, label: str, column: str) -> list[float]:
        """One column of a method, seed by seed."""
        rows = [self.runs.get((label, seed), {}) for seed in self.seeds]
        return [row[column] for row in rows if column in row]

    def best(self, method: str) -> str:
        """Of the eight, the step with the least error on validation, mean over the seeds."""
        labels = [f"{method}, {step:g}" for step in STEPS]
        return min(
            (label for label in labels if self.of(label, "val error")),
            key=lambda label: mean(self.of(label, "val error")),
        )

    def minus(self, label: str, other: str) -> str:
        """Test error of one method minus that of another, paired by seed, with its interval."""
        pairs = [
            self.runs[label, seed]["test error"] - self.runs[other, seed]["test error"]
            for seed in self.seeds
            if (label, seed) in self.runs and (other, seed) in self.runs
        ]
        return written(interval(pairs)) if pairs else "-"


def errors(found: Set) -> str:
    """Every method against the best of the tuned steps, and against BLS."""
    best = found.best("SGD")
    labels = [f"SGD, {step:g}" for step in (*STEPS, *BEYOND)]
    labels = [*labels, found.best("MGDA-UB"), *searches(found.name)]
    unit = mean(found.of(best, "seconds an epoch"))
    rows = []
    for label in labels:
        values = found.of(label, "test error")
        if not values:
            continue
        time = mean(found.of(label, "seconds an epoch")) / unit
        star = " (best)" if label in (best, found.best("MGDA-UB")) else ""
        rows.append(
            [
                label + star,
                spread(values),
                found.minus(label, best),
                found.minus(label, "BLS, beta 0.1"),
                f"{time:.2f}",
                len(values),
            ]
        )
    head = ["method", "test error (%)", f"minus {best} [95 %]", "minus BLS, beta 0.1 [95 %]",
            "time", "seeds"]  # fmt: skip
    return table(head, rows)


def behaviour(found: Set) -> str:
    """What the searches did: sizes, trials, rejections, fallbacks."""
    rows = []
    for label in searches(found.name):
        cells = []
        for column in TAKEN:
            values = found.of(label, column)
            cells.append(f"{mean(values):.3g}" if values else "-")
        if found.of(label, "trials"):
            rows.append([label, *cells])
    head = ["search", "step size", "trials", "rejected (%)", "fallback (%)", "not verified (%)"]
    return table(head, rows)


def picture(sets: Sequence[Set], path: Path) -> None:
    """Error on validation against epochs and against seconds; the first seed of each set."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(sets), 2, figsize=(9, 3.2 * len(sets)), squeeze=False)
    for found, (by_epoch, by_second) in zip(sets, axes, strict=True):
        lines = [(label, "0.8", 1.0) for label in (f"SGD, {step:g}" for step in (*STEPS, *BEYOND))]
        lines += [(found.best("SGD"), "black", 1.5), (found.best("MGDA-UB"), "tab:brown", 1.5)]
        colours = ("tab:blue", "tab:orange", "tab:green", "tab:red")
        lines += [(label, c, 1.5) for label, c in zip(SHOWN, colours, strict=True)]
        for label, colour, width in lines:
            if (label, found.seeds[0]) not in found.curves:
                continue
            seconds, wrong = found.curves[label, found.seeds[0]]
            name = None if colour == "0.8" else label
            by_epoch.plot(range(1, len(wrong) + 1), wrong, color=colour, lw=width)
            by_second.plot(seconds, wrong, color=colour, lw=width, label=name)
        by_epoch.set(title=found.name, xlabel="epochs", ylabel="error on validation (%)")
        by_second.set(title=f"{found.name} (grey: the other steps of SGD)", xlabel="seconds")
        for axis in (by_epoch, by_second):
            axis.grid(alpha=0.3, which="both")
            if axis.get_ylim()[0] < 20:
                axis.set_yscale("log")
        by_second.legend(fontsize=7, loc="upper right")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    """Print the tables, write the files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--csv", type=Path, default=None)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--picture", type=Path, default=None)
    arguments = parser.parse_args()
    sets = [Set(arguments.folder / name, name) for name in SETS]
    sets = [found for found in sets if found.runs]
    tables = {}
    for found in sets:
        tables[f"{found.name}-errors"] = errors(found)
        tables[f"{found.name}-behaviour"] = behaviour(found)
    save(tables, {found.name: found.runs for found in sets}, arguments.csv, arguments.json)
    if arguments.picture:
        picture(sets, arguments.picture)


if __name__ == "__main__":
    main()
