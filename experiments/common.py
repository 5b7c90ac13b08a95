"""What the experiments share: runs that grow seed by seed, and numbers as text.

Experiments are run from the repository's root: python -m experiments.NAME.run
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from equipoise.lab.comparison import Comparison, Failure
from equipoise.lab.config import RunConfig
from equipoise.lab.files import write_text
from equipoise.recipe import Recipe

Row = dict[str, float]
"""What was measured of one run."""

Runs = dict[tuple[str, int], Row]
"""(recipe, seed) -> what was measured."""


class Experiment:
    """Recipes x seeds on one data set with one network, in one comparison folder.

    Args:
        out: the comparison folder.
        jobs: runs side by side.
        settings: the fields of RunConfig that all runs have.
    """

    def __init__(self, out: Path, jobs: int, **settings: Any) -> None:
        self.out = out
        self.jobs = jobs
        self.settings = settings
        self.results: dict[tuple[str, int], dict] = {}

    def train(self, recipes: Sequence[str], seeds: Sequence[int]) -> None:
        """Make what is missing of recipes x seeds; all that was made stays in the comparison."""
        wanted = [*self.results, *((r, s) for s in seeds for r in recipes)]
        configs = [
            RunConfig.of(recipe=r, seed=s, **self.settings) for r, s in dict.fromkeys(wanted)
        ]
        comparison = Comparison(configs, self.out)
        outcomes = comparison.run(self.jobs)
        for (r, s), outcome in zip(dict.fromkeys(wanted), outcomes, strict=True):
            if isinstance(outcome, Failure):
                raise SystemExit(f"{self.out}: {r}, seed {s}: {outcome.message}")
            self.results[r, s] = dict(outcome)
        comparison.save(outcomes, "improvement")


@dataclass(frozen=True)
class Part:
    """One part of an experiment that is nothing but recipes x seeds.

    Attributes:
        recipes: as they are written on the command line.
        settings: the fields of RunConfig that all its runs have.
    """

    recipes: Sequence[str]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def canonical(self) -> list[str]:
        """The recipes as result.json has them."""
        return [str(Recipe.parse(recipe)) for recipe in self.recipes]

    def train(self, out: Path, seeds: Sequence[int], jobs: int, **more: Any) -> None:
        """All recipes with the first seed, then all with the next."""
        experiment = Experiment(out, jobs, **self.settings, **more)
        for seed in seeds:
            experiment.train(self.canonical, [seed])


def options(doc: str, name: str, data: str) -> argparse.ArgumentParser:
    """The options that the runs of every experiment take.

    Args:
        doc: the docstring of its module.
        name: of the experiment.
        data: what lies in the folder of the data.
    """
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--data-root", required=True, help=f"the folder with {data}")
    parser.add_argument("--out", type=Path, default=Path("runs", name))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    return parser


def results(folder: Path) -> list[dict[str, Any]]:
    """What the result.json of each finished run of a comparison holds."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("runs/*/result.json"))]


def mean(values: Iterable[float]) -> float:
    """The mean."""
    return float(np.mean(list(values)))


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and sample standard deviation."""
    if not values:
        return "-"
    text = f"{np.mean(values):.{digits}f}"
    return f"{text} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else text


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean, and the ends of its 95 percent confidence interval (Student's t)."""
    middle, n = float(np.mean(differences)), len(differences)
    if n < 2:
        return middle, float("nan"), float("nan")
    half = float(student.ppf(0.975, n - 1) * np.std(differences, ddof=1) / np.sqrt(n))
    return middle, middle - half, middle + half


def written(found: tuple[float, float, float], digits: int = 2) -> str:
    """An interval as text; of a single difference that alone."""
    middle, low, high = (f"{x:+.{digits}f}" for x in found)
    return middle if np.isnan(found[1]) else f"{middle} [{low}, {high}]"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def as_csv(everything: Mapping[str, Runs]) -> str:
    """One line a run; the key of the mapping becomes the first column."""
    columns = sorted({c for runs in everything.values() for row in runs.values() for c in row})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["set", "recipe", "seed", *columns])
    for name, runs in everything.items():
        for (recipe, seed), row in sorted(runs.items()):
            cells = [f"{row[c]:.6g}" if c in row else "" for c in columns]
            writer.writerow([name, recipe, seed, *cells])
    return text.getvalue()


def save(
    tables: Mapping[str, str], runs: Mapping[str, Runs], csv_path: Path | None, path: Path | None,
    **more: Any,
) -> None:  # fmt: skip
    """Print the tables; write one line a run as CSV, and what the pages show as JSON.

    The JSON holds each table as a list of lines, as docs/gen_pages.py wants it.
    """
    for title, text in tables.items():
        print(f"### {title}\n\n{text}")
    if csv_path:
        write_text(csv_path, as_csv(runs))
    if path:
        lines = {title: text.splitlines() for title, text in tables.items()}
        write_text(path, json.dumps({**more, "tables": lines}, indent=1, ensure_ascii=False) + "\n")
