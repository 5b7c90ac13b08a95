"""Recipes in flat regions against their plain partners, seed by seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from equipoise.errors import EquipoiseError
from equipoise.lab.pages import Grid, Section
from equipoise.lab.summary import Metric, Row, Summary
from equipoise.recipe import Recipe

CONFIDENCE = 0.95
ACCURACY = "accuracy"
FEW = 6  # tasks that have columns of their own
NONE = "–"


def partners(recipes: Iterable[str]) -> dict[str, str]:
    """Each recipe in flat regions -> its plain partner, whether it is there or not."""
    found = {}
    for recipe in recipes:
        try:
            plain = Recipe.parse(recipe).plain
        except (EquipoiseError, ValueError):  # of another version, perhaps
            continue
        if plain is not None:
            found[recipe] = str(plain)
    return found


@dataclass(frozen=True)
class Difference:
    """Flat minus plain, seed by seed.

    Attributes:
        flat: the recipe in flat regions.
        plain: its partner.
        seeds: those of both.
        values: (n,) one a seed.
    """

    flat: str
    plain: str
    seeds: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Of the values."""
        return float(np.mean(self.values))

    @property
    def margin(self) -> float | None:
        """Half of the 95 % confidence interval of the mean, by Student's t; None for one seed."""
        n = len(self.values)
        if n < 2:
            return None
        quantile = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)
        return float(quantile * np.std(self.values, ddof=1) / math.sqrt(n))


def differences(summary: Summary, metrics: Sequence[Metric]) -> Iterator[Difference]:
    """Of the mean over `metrics`, in percentage points, for recipes whose partner is there too."""
    rows = {row.recipe: row for row in summary.rows}
    for flat, plain in partners(rows).items():
        if plain not in rows:
            continue
        one, other = (_by_seed(rows[recipe], metrics) for recipe in (flat, plain))
        seeds = tuple(seed for seed in one if seed in other)
        if seeds:
            values = tuple(100 * (one[seed] - other[seed]) for seed in seeds)
            yield Difference(flat, plain, seeds, values)


def section(summary: Summary) -> Iterator[Section]:
    """The table of differences, if there is a pair."""
    tasks = [metric for metric in summary.metrics if metric.name == ACCURACY]
    groups = [tasks, *([task] for task in tasks)] if 1 < len(tasks) <= FEW else [tasks]
    columns = [{d.flat: d for d in differences(summary, group)} for group in groups if group]
    if not columns or not columns[0]:
        return
    rows = [
        [
            f"{found.flat} – {found.plain}",
            *(_interval(column[flat]) if flat in column else NONE for column in columns),
            ", ".join(f"{value:+.2f}" for value in found.values),
            ", ".join(map(str, found.seeds)),
        ]
        for flat, found in columns[0].items()
    ]
    names = ["mean accuracy", *(group[0].task for group in groups[1:])]
    yield Section(
        "Flat against plain",
        "Accuracy on the test split with flat regions minus that without them, in percentage "
        "points, paired by seed: the mean over seeds, and in brackets its 95 % confidence interval "
        "by Student's t, which takes the differences of seeds for normally distributed and is not "
        "corrected for the number of comparisons.",
        table=Grid(
            [("pair", ""), *((name, "points ↑") for name in names), ("each seed", "mean accuracy"),
             ("seeds", "")],
            rows,
        ),
    )  # fmt: skip


def _by_seed(row: Row, metrics: Sequence[Metric]) -> dict[int, float]:
    """Mean over `metrics` for each seed; nothing if one of them was not measured."""
    found = [spread.values for metric in metrics if (spread := row.of(metric))]
    if len(found) < len(metrics):
        return {}
    values: Any = np.mean(found, axis=0)
    return dict(zip(row.seeds, map(float, values), strict=True))


def _interval(found: Difference) -> str:
    if found.margin is None:
        return f"{found.mean:+.2f} (one seed)"
    low, high = found.mean - found.margin, found.mean + found.margin
    return f"{found.mean:+.2f} [{low:+.2f}, {high:+.2f}]"
