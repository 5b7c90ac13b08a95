"""The runs of a comparison in numbers: mean and spread over seeds, Delta_m and T."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from equipoise.diagnostics import MeasureError, Sign, delta_m
from equipoise.errors import EquipoiseError

SINGLE_TASK = "stl"  # the recipe against which Delta_m is measured
TIME_UNIT = "ew"  # the recipe whose training time is T = 1


@dataclass(frozen=True)
class Metric:
    """What is measured of one task."""

    task: str
    name: str
    higher_is_better: bool
    unit: str = ""

    @property
    def percent(self) -> bool:
        """Whether the value is a share, written as a percentage."""
        return "accuracy" in self.name and not self.unit

    @property
    def label(self) -> str:
        """The metric with its unit, without the task: "accuracy (%)"."""
        unit = "%" if self.percent else self.unit
        return f"{self.name} ({unit})" if unit else self.name

    @property
    def better(self) -> str:
        """The direction of better values as an arrow."""
        return "↑" if self.higher_is_better else "↓"


@dataclass(frozen=True)
class Spread:
    """The values of several seeds as one number, and how far they lie apart."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Arithmetic mean."""
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        """Sample standard deviation (n - 1); None for a single value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def times(self, factor: float) -> Spread:
        """The same in another unit."""
        return Spread(tuple(factor * value for value in self.values))

    def format(self, decimals: int | None = None, plus: bool = False) -> str:
        """Mean ± standard deviation, by default with 4 significant digits of the mean."""
        if decimals is None:
            size = abs(self.mean)
            if size and not 1e-4 <= size < 1e7:
                tail = "" if self.std is None else f" ± {self.std:.1e}"
                return f"{self.mean:{'+' if plus else ''}.3e}{tail}"
            decimals = max(0, 3 - math.floor(math.log10(size))) if size else 3
        # + 0.0 turns a rounded "-0.00" into "0.00".
        text = f"{round(self.mean, decimals) + 0.0:{'+' if plus else ''}.{decimals}f}"
        return text if self.std is None else f"{text} ± {self.std:.{decimals}f}"


@dataclass(frozen=True)
class Row:
    """One recipe.

    Attributes:
        recipe: in canonical form.
        seeds: of the finished runs, in the order of the values.
        metrics: task -> values on the test split; a task without labels there is left out.
        delta_m: one value a seed, against the mean over seeds of single-task training; None
            without such runs.
        seconds: training time.
        relative_time: T, mean training time over that of equal weighting; None without such runs.
        failed: seed -> what went wrong, or how far the run has come.
    """

    recipe: str
    seeds: tuple[int, ...]
    metrics: dict[str, Spread]
    delta_m: Spread | None
    seconds: Spread | None
    relative_time: float | None
    failed: dict[int, str]


@dataclass(frozen=True)
class Summary:
    """All recipes, in the order in which they were given.

    Attributes:
        data: name of the data set; empty while no run has finished.
        model: name of the network.
        notes: what a reader of the numbers has to know, a sentence each.
    """

    data: str
    model: str
    metrics: tuple[Metric, ...]
    rows: tuple[Row, ...]
    sign: Sign
    notes: tuple[str, ...]


def summarise(results: Iterable[Mapping[str, Any]], sign: Sign = "improvement") -> Summary:
    """Mean and spread over the seeds of each recipe.

    Args:
        results: what the result.json of each run holds. A run without a "test" entry has not
            finished or has failed; it needs "recipe" and "seed" only, and may say why in "failed".
        sign: the convention of Delta_m, see `equipoise.diagnostics.delta_m`.

    Raises:
        EquipoiseError: there is no run, one is there twice, or they are not of the same data,
            model and tasks; an unknown sign.
    """
    results = list(results)
    if sign not in get_args(Sign):
        raise MeasureError(f"sign is {sign!r}; give 'improvement' or 'drop'.")
    if not results:
        raise EquipoiseError("there is no run to summarise.")
    _refuse_twice(results)
    finished = [result for result in results if "test" in result]
    notes = list(_notes(finished))
    _refuse_mixture(finished)
    metrics = _metrics(finished[0]) if finished else ()
    by_recipe: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        by_recipe.setdefault(result["recipe"], []).append(result)
    done = {
        recipe: [result for result in runs if "test" in result]
        for recipe, runs in by_recipe.items()
    }
    baseline = _spreads(metrics, done.get(SINGLE_TASK, []))
    unit = _times(done.get(TIME_UNIT, []))
    rows = []
    undefined: set[str] = set()
    for recipe, runs in by_recipe.items():
        spreads = _spreads(metrics, done[recipe])
        seconds = _times(done[recipe])
        try:
            delta = _delta_m(metrics, spreads, baseline, len(done[recipe]), sign)
        except MeasureError as error:
            delta = None
            undefined.add(str(error))
        rows.append(
            Row(
                recipe,
                tuple(result["seed"] for result in done[recipe]),
                spreads,
                delta,
                seconds,
                seconds.mean / unit.mean if seconds and unit and unit.mean else None,
                {
                    r["seed"]: _one_line(r.get("failed") or "not finished")
                    for r in runs
                    if "test" not in r
                },
            )  # fmt: skip
        )
    notes += [f"Δm is not defined: {why}" for why in sorted(undefined)]
    for row in rows:
        lacking = [m.task for m in metrics if row.seeds and m.task not in row.metrics]
        if lacking:
            over = "; its Δm is over the other tasks" if row.delta_m else ""
            notes.append(f"{row.recipe} has no test value of {', '.join(lacking)}{over}.")
        notes += [f"{row.recipe}, seed {seed}: {why}" for seed, why in row.failed.items()]
    data, model = (finished[0][key] if finished else "" for key in ("data", "model"))
    return Summary(data, model, metrics, tuple(rows), sign, tuple(notes))


def _metrics(result: Mapping[str, Any]) -> tuple[Metric, ...]:
    return tuple(
        Metric(t["name"], t["metric"], t["higher_is_better"], t["unit"]) for t in result["tasks"]
    )


def _refuse_twice(results: Sequence[Mapping[str, Any]]) -> None:
    seen = set()
    for result in results:
        key = (result["recipe"], result["seed"])
        if key in seen:
            raise EquipoiseError(f"{key[0]} with seed {key[1]} is there twice; give each run once.")
        seen.add(key)


def _refuse_mixture(finished: Sequence[Mapping[str, Any]]) -> None:
    for key in ("data", "model", "tasks"):
        for result in finished[1:]:
            first, other = finished[0][key], result[key]
            if first != other:
                if key == "tasks":
                    first, other = (", ".join(t["name"] for t in x) for x in (first, other))
                raise EquipoiseError(
                    f"one table needs runs of one {key.removesuffix('s')}, but "
                    f"{finished[0]['recipe']} has {first} and {result['recipe']} has {other}."
                )


def _notes(finished: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    epochs = {result["epochs"] for result in finished}
    if len(epochs) > 1:
        yield f"The runs are of different lengths: {', '.join(map(str, sorted(epochs)))} epochs."
    recipes = {result["recipe"] for result in finished}
    if finished and SINGLE_TASK not in recipes:
        yield f"No Δm without a finished run of {SINGLE_TASK}."
    if finished and TIME_UNIT not in recipes:
        yield f"No T without a finished run of {TIME_UNIT}."


def _spreads(metrics: Sequence[Metric], results: Sequence[Mapping[str, Any]]) -> dict[str, Spread]:
    """Task -> its test metric over the runs; without the tasks that have no number in some run."""
    found = {}
    for metric in metrics:
        values = [_number(result["test"].get(metric.task)) for result in results]
        if values and all(map(math.isfinite, values)):
            found[metric.task] = Spread(tuple(values))
    return found


def _times(results: Sequence[Mapping[str, Any]]) -> Spread | None:
    return Spread(tuple(float(r["train_seconds"]) for r in results)) if results else None


def _delta_m(
    metrics: Sequence[Metric],
    spreads: Mapping[str, Spread],
    baseline: Mapping[str, Spread],
    n_seeds: int,
    sign: Sign,
) -> Spread | None:
    """Over the tasks that have a number in both; one value for each seed."""
    higher = {
        m.task: m.higher_is_better for m in metrics if m.task in spreads and m.task in baseline
    }
    if not higher:
        return None
    single = {task: baseline[task].mean for task in higher}
    return Spread(
        tuple(
            delta_m({task: spreads[task].values[i] for task in higher}, single, higher, sign)
            for i in range(n_seeds)
        )
    )


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _one_line(text: str) -> str:
    return " ".join(str(text).split())
