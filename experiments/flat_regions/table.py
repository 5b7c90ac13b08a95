"""The tables of the flat-regions experiment, from its run folders.

    python -m experiments.flat_regions.table runs/flat_regions --csv FILE --json FILE

Reads result.json, metrics.csv and, where `equipoise diagnose` has been there, diagnostics.json;
prints Markdown, writes one line a run as CSV and all that the tables say as JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np

from equipoise.lab.folders import read
from experiments.common import Runs, interval, mean, save, spread, table, written
from experiments.flat_regions.run import FLAT, FORMS, NAIVE, RADII, SETS, VARIED, recipe

PLAIN_OF = {method: method.partition("-")[2] for method in FLAT}
NAMES = {"mgda": "MGDA", "pcgrad": "PCGrad", "cagrad": "CAGrad", "imtl": "IMTL-G"}
LAST = 3  # epochs, over which conflicts are averaged at the end


def measured(folder: Path) -> dict[str, float]:
    """One run as numbers: accuracies and conflicts in percent."""
    run = read(folder)
    assert run.result is not None
    test, val = run.result["test"], run.result["val"]
    right, val_right = (
        {task: 100 * found["accuracy"] for task, found in split.items()} for split in (test, val)
    )
    row = {f"test {task}": value for task, value in right.items()}
    row |= {"test": mean(right.values()), "val": mean(val_right.values())}
    row["seconds"] = run.result["train_seconds"]
    losses = [run.history[f"loss/train/{task}"][-1] for task in test]
    row["training loss at the end"] = mean(losses)
    for column in ("steps", "probe", "flat"):
        values = run.history.get(f"conflict/{column}")
        if values is not None and np.isfinite(values).any():
            row[f"conflict {column}"] = mean(values[-LAST:])
            row[f"conflict {column}, all epochs"] = mean(values)
    path = folder / "diagnostics.json"
    if path.exists():
        found = json.loads(path.read_text())["measures"]
        of: dict[str, tuple[str, Callable[[dict], float]]] = {
            "ECE": ("calibration", lambda task: 100 * task["ece"]),
            "Brier": ("calibration", lambda task: task["brier"]),
            "radius": ("robustness", lambda task: 100 * task["half_relative_radius"]),
            "entropy in": ("entropy", lambda task: task["in"]["mean"]),
            "entropy out": ("entropy", lambda task: task["out"]["mean"]),
            "AUROC": ("entropy", lambda task: task["auroc"]),
            "sharpness": ("sharpness", lambda task: task["increase"][3]),  # radius 0.1
        }
        for name, (measure, value) in of.items():
            tasks = found.get(measure, {}).get("tasks", {}).values()
            with suppress(KeyError):  # not every set has a partner to be out of domain with
                row[name] = mean([value(task) for task in tasks])
    return row


def runs_in(folder: Path) -> Runs:
    """All finished runs of a comparison."""
    found: Runs = {}
    for path in sorted(folder.glob("runs/*/result.json")):
        result = json.loads(path.read_text())
        found[result["recipe"], result["seed"]] = measured(path.parent)
    return found


class Set:
    """The runs on one data set, with the radius that validation chose for each method.

    Args:
        name: of the data set.
        folder: the comparison.
        choosing: the seeds that choose.
    """

    def __init__(self, name: str, folder: Path, choosing: Sequence[int]) -> None:
        self.name = name
        self.runs = runs_in(folder)
        self.seeds = sorted({seed for r, seed in self.runs if r == "ew"})
        self.radius = {
            method: max(RADII, key=partial(self._validation, method, choosing))
            for method in (*FLAT, NAIVE)
            if all((recipe(method, rho), choosing[0]) in self.runs for rho in RADII)
        }

    def _validation(self, method: str, seeds: Sequence[int], rho: float) -> float:
        return mean(self.runs[recipe(method, rho), seed]["val"] for seed in seeds)

    def of(self, name: str, column: str) -> list[float]:
        """One column of a recipe, seed by seed."""
        rows = [self.runs.get((name, seed), {}) for seed in self.seeds]
        return [row[column] for row in rows if column in row]

    def flat(self, method: str, form: str = "") -> str:
        """The recipe of a method at its radius."""
        return recipe(method, self.radius[method], form)

    def differences(self, one: str, other: str, column: str = "test") -> list[float]:
        """Seed by seed."""
        pairs = zip(self.of(one, column), self.of(other, column), strict=True)
        return [a - b for a, b in pairs]


def accuracy(sets: Sequence[Set]) -> str:
    """Test accuracy, F against plain."""
    rows = []
    for s in sets:
        for single in ("stl", "ew"):
            rows.append([s.name, single, spread(s.of(single, "test")), "", "", ""])
        for method in FLAT:
            plain, flat = PLAIN_OF[method], s.flat(method)
            rows.append(
                [
                    s.name,
                    NAMES[plain],
                    spread(s.of(plain, "test")),
                    s.radius[method],
                    spread(s.of(flat, "test")),
                    written(interval(s.differences(flat, plain))),
                ]
            )
    for method in FLAT:
        plain = PLAIN_OF[method]
        pooled = [d for s in sets for d in s.differences(s.flat(method), plain)]
        rows.append(["all", NAMES[plain], "", "", "", written(interval(pooled))])
    head = ["set", "method", "plain", "rho", "F-", "F- minus plain [95 %]"]
    return table(head, rows)


def beside(sets: Sequence[Set], columns: dict[str, int]) -> str:
    """Other columns, plain -> F, means over seeds, and the pooled difference."""
    rows: list[list[str]] = []
    for s in sets:
        for method in FLAT:
            plain, flat = PLAIN_OF[method], s.flat(method)
            cells = [
                f"{mean(a):.{digits}f} → {mean(b):.{digits}f}"
                if (a := s.of(plain, column)) and (b := s.of(flat, column))
                else "-"
                for column, digits in columns.items()
            ]
            rows.append([s.name, NAMES[plain], *cells])
    pooled = []
    for column, digits in columns.items():
        found = [
            d
            for s in sets
            for method in FLAT
            if s.of(s.flat(method), column) and s.of(PLAIN_OF[method], column)
            for d in s.differences(s.flat(method), PLAIN_OF[method], column)
        ]
        pooled.append(written(interval(found), digits) if found else "-")
    rows.append(["all", "F- minus plain [95 %]", *pooled])
    return table(["set", "method", *columns], rows)


def naive(sets: Sequence[Set]) -> str:
    """The ablation: decomposed against naive, task by task."""
    rows = []
    sets = [s for s in sets if NAIVE in s.radius]
    for s in sets:
        decomposed, direct = s.flat("f-cagrad"), s.flat(NAIVE)
        differences = [
            written(interval(s.differences(decomposed, direct, f"test {task}")))
            for task in ("left", "right")
        ]
        rows.append(
            [
                s.name,
                f"{s.radius['f-cagrad']}, {s.radius[NAIVE]}",
                spread(s.of(decomposed, "test")),
                spread(s.of(direct, "test")),
                *differences,
            ]
        )
    pooled = [
        written(
            interval(
                [
                    d
                    for s in sets
                    for d in s.differences(s.flat("f-cagrad"), s.flat(NAIVE), f"test {task}")
                ]
            )
        )
        for task in ("left", "right")
    ]
    rows.append(["all", "", "", "", *pooled])
    head = ["set", "rho", "F-CAGrad", "naive", "left: F- minus naive", "right: F- minus naive"]
    return table(head, rows)


def cheaper(sets: Sequence[Set]) -> str:
    """What cheaper forms keep of the gain of the exact one."""
    rows = []
    plain = PLAIN_OF[VARIED]
    for s in sets:
        if not s.of(s.flat(VARIED, FORMS[0]), "test"):
            continue
        gain = mean(s.differences(s.flat(VARIED), plain))
        rows.append(
            [s.name, "exact", spread(s.of(s.flat(VARIED), "test")), f"{gain:+.2f}", "100 %"]
        )
        for form in FORMS:
            if len(s.of(s.flat(VARIED, form), "test")) == len(s.seeds):
                own = mean(s.differences(s.flat(VARIED, form), plain))
                text = spread(s.of(s.flat(VARIED, form), "test"))
                rows.append([s.name, form, text, f"{own:+.2f}", f"{100 * own / gain:.0f} %"])
    return table(["set", "F-PCGrad", "accuracy", "gain over PCGrad", "share of the gain"], rows)


def radii(s: Set, seeds: Sequence[int]) -> str:
    """Every radius: validation and test accuracy, mean over the seeds that chose."""
    rows = []
    for method in s.radius:
        cells = [
            " / ".join(
                f"{mean(s.runs[recipe(method, rho), seed][c] for seed in seeds):.2f}"
                for c in ("val", "test")
            )
            for rho in RADII
        ]
        rows.append([s.name, method, *cells])
    return table(["set", "method", *(f"rho {rho}: val / test" for rho in RADII)], rows)


def small(runs: Runs) -> str:
    """LeNet, which cannot overfit as much."""
    names = ("pcgrad", *(recipe("f-pcgrad", rho) for rho in RADII))
    seeds = sorted({s for _, s in runs if all((name, s) in runs for name in names)})
    rows = []
    for name in names:
        own = [runs[name, s] for s in seeds]
        base = [runs["pcgrad", s]["test"] for s in seeds]
        change = interval([row["test"] - b for row, b in zip(own, base, strict=True)])
        rows.append(
            [
                name,
                spread([row["val"] for row in own]),
                spread([row["test"] for row in own]),
                "" if name == "pcgrad" else written(change),
            ]
        )
    return table(["LeNet on multifashion", "validation", "test", "minus plain [95 %]"], rows)


def main() -> None:
    """Print the tables, write the files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--choose-on", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--csv", type=Path, default=None)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    there = [
        name for name in SETS if list(arguments.folder.glob(f"{name}/runs/imtl-seed2/result.json"))
    ]
    sets = [Set(name, arguments.folder / name, arguments.choose_on) for name in there]
    lenet = runs_in(arguments.folder / "multifashion-lenet")
    tables = {
        "accuracy": accuracy(sets),
        "conflicts": beside(
            sets,
            {
                "conflict steps": 1,
                "conflict steps, all epochs": 1,
                "conflict probe": 1,
                "training loss at the end": 3,
            },
        ),
        "calibration": beside(
            sets,
            {"ECE": 2, "Brier": 3, "entropy in": 3, "entropy out": 3, "AUROC": 3},
        ),
        "robustness": beside(sets, {"radius": 1, "sharpness": 3}),
        "ablation": naive(sets),
        "cheaper": cheaper(sets),
        "radii": "\n".join(radii(s, arguments.choose_on) for s in sets),
    }
    if lenet:
        tables["lenet"] = small(lenet)
    everything = {**{s.name: s.runs for s in sets}, "multifashion-lenet": lenet}
    chosen = {s.name: s.radius for s in sets}
    save(tables, everything, arguments.csv, arguments.json, radius=chosen)


if __name__ == "__main__":
    main()
