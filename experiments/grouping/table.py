"""The tables of the grouping experiment, from its run folders.

    python -m experiments.grouping.table runs/grouping --csv FILE --memberships FILE --json FILE

Prints Markdown, writes one line a method and seed as CSV, one line a task for all memberships, and
the tables as JSON. What has not been trained is left out.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import adjusted_rand_score

from equipoise.grouping import Groups, find_groups
from equipoise.grouping.vectors import pairwise
from equipoise.lab.data.cifar import VEHICLES
from equipoise.lab.files import read_json, read_state, write_text
from experiments.common import Row, Runs, interval, mean, save, spread, table, written
from experiments.grouping.run import NUMBERS, PARTS, SETS

CLASSES = 10
"""The tasks that ask for one class come first."""

KINDS = [int(i in VEHICLES) for i in range(CLASSES)]
COMPARED = "without random"
"""The mean by which methods are compared."""

TRAINING = "training, without random"
MEANS = ("mean", COMPARED, TRAINING)
METHODS = ("MTL", "STL", *(f"{n} groups, {name}" for n in NUMBERS for name in ("soft", "hard")))

MOST = 10
"""The largest number of groups that is tried where a task may stand alone."""


@dataclass(frozen=True)
class Seed:
    """What one seed has left in its folder."""

    folder: Path
    number: int

    def groups(self, n_groups: int, by: str = "") -> Groups | None:
        """Soft groups by maps, or by another affinity."""
        path = self.folder / f"{by}{'-' if by else ''}kmeans-{n_groups}" / "memberships.json"
        return Groups.from_json(path) if path.exists() else None

    @property
    def vectors(self) -> np.ndarray:
        """(T, checkpoints, N, 2) the full maps."""
        return read_state(self.folder / "maps" / "checkpoint.ckpt")["maps"]["kept"].numpy()

    def f1(self) -> Iterator[tuple[str, Row]]:
        """Method -> F1 on test of each task, and means on test and on the training split."""
        for method, name in (("kmeans", "soft"), ("hard", "hard")):
            for n in NUMBERS:
                path = self.folder / f"{method}-{n}" / "table.json"
                if path.exists():
                    columns = read_json(path)
                    yield f"{n} groups, {name}", _row(columns, "stg-mtl")
                    yield "MTL", _row(columns, "mtl")
                    yield "STL", _row(columns, "stl")
        if not list(self.folder.glob("*/table.json")):
            test = read_json(self.folder / "maps" / "result.json")["test"]
            f1 = {task: measures["f1"] for task, measures in test.items()}
            yield "MTL", {"mean": mean(f1.values()), COMPARED: _without(f1), **f1}


def _row(of_table: dict[str, Any], method: str) -> Row:
    test, training = (
        {
            row[0].partition(":")[0]: row[1 + of_table["columns"].index(name)]
            for row in of_table["rows"][:-1]  # the last is the mean
        }
        for name in (method, f"{method}, training")
    )
    means = (mean(test.values()), _without(test), _without(training))
    return {**dict(zip(MEANS, means, strict=True)), **test}


def _without(f1: Row) -> float:
    """The mean without random, which a guess at yes answers with 0.67."""
    return mean(value for task, value in f1.items() if task != "random")


class Set:
    """All seeds of a part and a set of tasks.

    Args:
        out: the folder of the experiment.
        part: of the experiment.
        tasks: g1 or g2.
    """

    def __init__(self, out: Path, part: str, tasks: str) -> None:
        self.name = f"{part}-{tasks}"
        folders = sorted((out / part / tasks).glob("seed-*"))
        told = [f for f in folders if (f / f"kmeans-{NUMBERS[-1]}" / "memberships.json").exists()]
        self.seeds = [Seed(f, int(f.name.partition("-")[2])) for f in told]
        self.runs: Runs = {
            (method, seed.number): row for seed in self.seeds for method, row in seed.f1()
        }

    def groups(self, n_groups: int, by: str = "") -> list[Groups]:
        """Of each seed that has them."""
        found = (seed.groups(n_groups, by) for seed in self.seeds)
        return [groups for groups in found if groups is not None]

    def of(self, method: str, column: str = "mean") -> list[float]:
        """One column of a method in percent, seed by seed."""
        return [100 * r[column] for (m, _), r in sorted(self.runs.items()) if m == method]

    def minus(self, method: str, other: str) -> str:
        """F1 of one method minus that of another, paired by seed, with its interval."""
        pairs = [
            100 * (row[COMPARED] - self.runs[other, seed][COMPARED])
            for (m, seed), row in sorted(self.runs.items())
            if m == method and (other, seed) in self.runs
        ]
        return written(interval(pairs)) if pairs else "-"


def agreement(groups: Sequence[Groups]) -> str:
    """Adjusted Rand index, mean over the pairs of seeds."""
    pairs = [adjusted_rand_score(a.labels, b.labels) for a, b in combinations(groups, 2)]
    return f"{mean(pairs):.2f}" if pairs else "-"


def members(sets: Sequence[Set]) -> str:
    """Which groups there are, in how many seeds, and how far the seeds agree."""
    rows = []
    for found in sets:
        for n in NUMBERS:
            groups = found.groups(n)
            seen: dict[str, list[int]] = {}
            for seed, of_seed in zip(found.seeds, groups, strict=True):
                text = " / ".join(", ".join(names) for names in of_seed.members)
                seen.setdefault(text, []).append(seed.number)
            for text, seeds in seen.items():
                rows.append([found.name, n, text, ", ".join(map(str, seeds)), agreement(groups)])
    return table(["part and set", "groups", "members", "seeds", "agreement (ARI)"], rows)


def memberships(found: Set, n_groups: int) -> str:
    """Each task's memberships, mean over the seeds that have the groups of the first."""
    every = found.groups(n_groups)
    same = [groups for groups in every if torch.equal(groups.labels, every[0].labels)]
    w = np.stack([groups.memberships.numpy() for groups in same])
    rows = []
    for i, task in enumerate(every[0].tasks):
        rows.append([task, *(spread(w[:, i, j].tolist()) for j in range(n_groups))])
    head = ["task", *(f"group {j + 1}" for j in range(n_groups))]
    return table([*head[:-1], f"{head[-1]} ({len(same)} of {len(every)} seeds)"], rows)


def complements(sets: Sequence[Set]) -> str:
    """How far living and not-living are apart, beside all other pairs of tasks."""
    rows = []
    for found in sets:
        for seed, groups in zip(found.seeds, found.groups(NUMBERS[-1]), strict=True):
            x, y = (groups.tasks.index(name) for name in ("living", "not-living"))
            vectors = seed.vectors
            distances = _distances(vectors)
            others = np.sort(distances[np.triu_indices(len(distances), 1)])
            mu = np.abs(vectors[x, -1, :, 0] - vectors[y, -1, :, 0])
            w = groups.memberships
            rows.append(
                [
                    found.name,
                    seed.number,
                    f"{distances[x, y]:.1f}",
                    f"{others[1]:.1f}",
                    f"{np.median(others):.1f}",
                    f"{mu.mean():.4f}",
                    f"{float((w[x] - w[y]).abs().max()):.3f}",
                ]
            )
    head = ["part and set", "seed", "distance", "next smallest of all", "median of all",
            "mean difference of μ", "largest of a membership"]  # fmt: skip
    return table(head, rows)


def alone(sets: Sequence[Set]) -> str:
    """With how many groups random stands alone, by the epochs that the maps are of."""
    rows = []
    for found in sets:
        for seed, groups in zip(found.seeds, found.groups(NUMBERS[-1]), strict=True):
            i = groups.tasks.index("random")
            checkpoints = read_state(seed.folder / "maps" / "checkpoint.ckpt")["maps"]
            vectors = seed.vectors
            for k in _some(len(checkpoints["checkpoints"])):
                distances = _distances(vectors[:, : k + 1])
                near = np.argsort(distances[i])[1]
                least = _least(vectors[:, : k + 1], i)
                rows.append(
                    [
                        found.name,
                        seed.number,
                        checkpoints["checkpoints"][k],
                        groups.tasks[near],
                        f"{distances[i, near] / np.median(distances[distances > 0]):.2f}",
                        least,
                    ]
                )
    head = ["part and set", "seed", "epochs", "nearest task",
            "its distance, in medians of all", "random alone from ... groups on"]  # fmt: skip
    return table(head, rows)


def _some(n: int) -> list[int]:
    return sorted({n // 3 - 1, 2 * n // 3 - 1, n - 1} - {-1})


def _least(vectors: np.ndarray, i: int) -> str:
    """The smallest number of groups from which on a task stands alone, up to MOST."""
    gram = _gram(vectors)
    counts = [
        int((found.labels == found.labels[i]).sum())
        for found in (find_groups(gram, n) for n in range(2, MOST + 1))
    ]
    from_here = [n for n in range(2, MOST + 1) if all(c == 1 for c in counts[n - 2 :])]
    return str(from_here[0]) if from_here else f"more than {MOST}"


def _gram(vectors: np.ndarray) -> torch.Tensor:
    x = torch.from_numpy(vectors).flatten(1).double()
    x -= x.mean(0)
    return x @ x.T


def _distances(vectors: np.ndarray) -> np.ndarray:
    return pairwise(_gram(vectors).numpy())


def kinds(sets: Sequence[Set]) -> str:
    """Do the class tasks fall into animals and vehicles?"""
    rows = []
    for found in sets:
        for n in NUMBERS:
            labels = [groups.labels[:CLASSES] for groups in found.groups(n)]
            mixed = [
                sum(len({KINDS[i] for i in range(CLASSES) if of[i] == j}) > 1 for j in range(n))
                for of in labels
            ]
            agree = [adjusted_rand_score(KINDS, of) for of in labels]
            rows.append(
                [found.name, n, f"{mean(agree):.2f}", f"{sum(m == 0 for m in mixed)}/{len(mixed)}"]
            )
    head = ["part and set", "groups", "agreement with animals, vehicles (ARI)",
            "seeds without a mixed group"]  # fmt: skip
    return table(head, rows)


def f1(found: Set) -> str:
    """All methods beside MTL and STL."""
    rows = []
    for m in METHODS:
        if not found.of(m):
            continue
        means = [spread(found.of(m, column)) for column in (COMPARED, "mean", TRAINING)]
        minus = ["-" if m == other else found.minus(m, other) for other in ("MTL", "STL")]
        rows.append([m, *means, *minus, len(found.of(m))])
    head = ["method", "F1 without random (%)", "with it", "training split", "minus MTL [95 %]",
            "minus STL [95 %]", "seeds"]  # fmt: skip
    return table(head, rows)


def by_task(found: Set) -> str:
    """F1 of each task, mean over the seeds."""
    methods = [method for method in METHODS if found.of(method)]
    columns = found.runs[methods[0], found.seeds[0].number]
    tasks = [column for column in columns if column not in MEANS]
    rows = [[task, *(f"{mean(found.of(m, task)):.1f}" for m in methods)] for task in tasks]
    return table(["task", *methods], rows)


def affinities(sets: Sequence[Set]) -> str:
    """What other affinities say, beside the data maps of the same seed."""
    rows = []
    for found in sets:
        for by in ("gradients", "lookahead"):
            for n in NUMBERS:
                groups = found.groups(n, by)
                if not groups:
                    continue
                pairs = [(seed.groups(n, by), seed.groups(n)) for seed in found.seeds]
                agree = [adjusted_rand_score(a.labels, b.labels) for a, b in pairs if a and b]
                first = " / ".join(", ".join(names) for names in groups[0].members)
                rows.append([found.name, by, n, first, agreement(groups), f"{mean(agree):.2f}"])
    head = ["part and set", "by", "groups", "members", "agreement of the seeds (ARI)",
            "with the maps (ARI)"]  # fmt: skip
    return table(head, rows)


def every_membership(sets: Sequence[Set]) -> str:
    """CSV, a line for each task of each grouping."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["set", "seed", "by", "groups", "task", "group", "memberships"])
    for found in sets:
        for seed in found.seeds:
            for by in ("", "gradients", "lookahead"):
                for n in NUMBERS:
                    groups = seed.groups(n, by)
                    if groups is None:
                        continue
                    each = zip(groups.tasks, groups.labels, groups.memberships, strict=True)
                    for task, label, w in each:
                        cells = " ".join(f"{x:.4f}" for x in w.tolist())
                        writer.writerow(
                            [found.name, seed.number, by or "maps", n, task, int(label) + 1, cells]
                        )
    return text.getvalue()


def main() -> None:
    """Print the tables, write the files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--csv", type=Path, default=None)
    parser.add_argument("--memberships", type=Path, default=None)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    sets = [Set(arguments.folder, part, tasks) for part in PARTS for tasks in SETS]
    sets = [found for found in sets if found.seeds]
    second = [found for found in sets if found.name.endswith("g2")]
    tables = {
        "members": members(sets),
        "complements": complements(second),
        "alone": alone(second),
        "kinds": kinds(sets),
        "affinities": affinities(sets),
    }
    for found in sets:
        if not found.name.startswith("paper"):
            for n in NUMBERS:
                tables[f"memberships-{found.name}-{n}"] = memberships(found, n)
        if found.name.startswith("table"):
            tables[f"f1-{found.name}"] = f1(found)
            tables[f"f1-tasks-{found.name}"] = by_task(found)
    save(tables, {found.name: found.runs for found in sets}, arguments.csv, arguments.json)
    if arguments.memberships:
        write_text(arguments.memberships, every_membership(sets))


if __name__ == "__main__":
    main()
