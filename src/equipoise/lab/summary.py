"""The runs of a comparison in numbers: mean and spread over seeds, Delta_m and T."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from equipoise.diagnostics import MeasureError, Sign, delta_m
from equipoise.errors import EquipoiseError

Over = Literal["metrics", "tasks"]
"""What Delta_m is the mean over."""
SINGLE_TASK = "stl"  # the recipe against which Delta_m is measured
TIME_UNIT = "ew"  # the recipe whose training time is T = 1


@dataclass(frozen=True)
class Metric:
    """One of the measures of one task; `percent` tells a share, written as a percentage."""

    task: str
    name: str
    higher_is_better: bool
    unit: str = ""
    percent: bool = False

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


Spreads = dict[str, dict[str, Spread]]
"""Task -> name of the measure -> values."""


@dataclass(frozen=True)
class Row:
    """One recipe.

    Attributes:
        recipe: in canonical form.
        seeds: of the finished runs, in the order of the values.
        metrics: task -> measure -> values on the test split; what has no number there is left
            out.
        delta_m: one value a seed, against the mean over seeds of single-task training, or against
            published numbers of it where there are no such runs; None without either.
        seconds: training time.
        relative_time: T, mean training time over that of equal weighting; None without such runs.
        failed: seed -> what went wrong, or how far the run has come.
    """

    recipe: str
    seeds: tuple[int, ...]
    metrics: Spreads
    delta_m: Spread | None
    seconds: Spread | None
    relative_time: float | None
    failed: dict[int, str]

    def of(self, metric: Metric) -> Spread | None:
        """The values of one metric, if there are any."""
        return self.metrics.get(metric.task, {}).get(metric.name)


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
    over: Over
    notes: tuple[str, ...]

    @property
    def several(self) -> bool:
        """Whether a task is judged by more than one measure."""
        return len({metric.task for metric in self.metrics}) < len(self.metrics)

    def title(self, metric: Metric) -> str:
        """How a metric is called among the others: by its task, if that is enough."""
        return f"{metric.task}: {metric.name}" if self.several else metric.task


def summarise(
    results: Iterable[Mapping[str, Any]], sign: Sign = "improvement", over: Over = "metrics"
) -> Summary:
    """Mean and spread over the seeds of each recipe.

    Args:
        results: what the result.json of each run holds. A run without a "test" entry has not
            finished or has failed; it needs "recipe" and "seed" only, and may say why in "failed".
        sign: the convention of Delta_m, see `equipoise.diagnostics.delta_m`.
        over: "metrics": Delta_m is the mean over all metrics of all tasks, as both papers have it;
            "tasks": the mean over the tasks of the means over their metrics.

    Raises:
        EquipoiseError: there is no run, one is there twice, or they are not of the same data,
            model and tasks; an unknown sign, or what Delta_m is over.
    """
    results = list(results)
    if sign not in get_args(Sign):
        raise MeasureError(f"sign is {sign!r}; give 'improvement' or 'drop'.")
    if over not in get_args(Over):
        raise MeasureError(f"Delta_m over {over!r}; give 'metrics' or 'tasks'.")
    if not results:
        raise EquipoiseError("there is no run to summarise.")
    _refuse_twice(results)
    finished = [result for result in results if "test" in result]
    _refuse_mixture(finished)
    metrics = _metrics(finished[0]) if finished else ()
    by_recipe: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        by_recipe.setdefault(result["recipe"], []).append(result)
    done = {
        recipe: [result for result in runs if "test" in result]
        for recipe, runs in by_recipe.items()
    }
    baseline, source = _baseline(metrics, done.get(SINGLE_TASK, []), finished)
    notes = list(_notes(finished, source))
    unit = _times(done.get(TIME_UNIT, []))
    rows = []
    undefined: set[str] = set()
    for recipe, runs in by_recipe.items():
        spreads = _spreads(metrics, done[recipe])
        seconds = _times(done[recipe])
        try:
            delta = _delta_m(metrics, spreads, baseline, len(done[recipe]), sign, over)
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
    data, model = (finished[0][key] if finished else "" for key in ("data", "model"))
    summary = Summary(data, model, metrics, tuple(rows), sign, over, ())
    for row in rows:
        lacking = [summary.title(m) for m in metrics if row.seeds and row.of(m) is None]
        if lacking:
            rest = "; its Δm is over the others" if row.delta_m else ""
            notes.append(f"{row.recipe} has no test value of {', '.join(lacking)}{rest}.")
        notes += [f"{row.recipe}, seed {seed}: {why}" for seed, why in row.failed.items()]
    return replace(summary, notes=tuple(notes))


def _metrics(result: Mapping[str, Any]) -> tuple[Metric, ...]:
    return tuple(
        Metric(task["name"], m["name"], m["higher_is_better"], m["unit"], m["share"])
        for task in result["tasks"]
        for m in task["measures"]
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
                    first, other = (_task_names(x) for x in (first, other))
                raise EquipoiseError(
                    f"one table needs runs of one {key.removesuffix('s')}, but "
                    f"{finished[0]['recipe']} has {first} and {result['recipe']} has {other}."
                )


def _task_names(tasks: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{t['name']} ({', '.join(m['name'] for m in t['measures'])})" for t in tasks)


def _notes(finished: Sequence[Mapping[str, Any]], source: str) -> Iterable[str]:
    epochs = {result["epochs"] for result in finished}
    if len(epochs) > 1:
        yield f"The runs are of different lengths: {', '.join(map(str, sorted(epochs)))} epochs."
    recipes = {result["recipe"] for result in finished}
    if source:
        yield f"No run of {SINGLE_TASK} has finished: Δm is against numbers of {source}."
    elif finished and SINGLE_TASK not in recipes:
        yield f"No Δm without a finished run of {SINGLE_TASK}."
    if finished and TIME_UNIT not in recipes:
        yield f"No T without a finished run of {TIME_UNIT}."


def _spreads(metrics: Sequence[Metric], results: Sequence[Mapping[str, Any]]) -> Spreads:
    """The test metrics over the runs; without those that have no number in some run."""
    found: Spreads = {}
    for metric in metrics:
        tests = [result["test"].get(metric.task, {}) for result in results]
        values = [_number(test.get(metric.name)) for test in tests]
        if values and all(map(math.isfinite, values)):
            found.setdefault(metric.task, {})[metric.name] = Spread(tuple(values))
    return found


def _baseline(
    metrics: Sequence[Metric],
    single: Sequence[Mapping[str, Any]],
    finished: Sequence[Mapping[str, Any]],
) -> tuple[Spreads, str]:
    """Single-task numbers: of runs of one's own, or published ones with their source."""
    published = next((r["baseline"] for r in finished if r.get("baseline")), None)
    if single or published is None:
        return _spreads(metrics, single), ""
    return _spreads(metrics, [{"test": published["values"]}]), published["source"]


def _times(results: Sequence[Mapping[str, Any]]) -> Spread | None:
    return Spread(tuple(float(r["train_seconds"]) for r in results)) if results else None


def _delta_m(
    metrics: Sequence[Metric],
    spreads: Spreads,
    baseline: Spreads,
    n_seeds: int,
    sign: Sign,
    over: Over,
) -> Spread | None:
    """Over the metrics that have a number in both; one value for each seed."""
    groups: dict[str, list[Metric]] = {}
    for metric in metrics:
        if all(metric.name in x.get(metric.task, {}) for x in (spreads, baseline)):
            groups.setdefault(metric.task if over == "tasks" else "", []).append(metric)
    if not groups:
        return None
    seeds = []
    for i in range(n_seeds):
        means = []
        for group in groups.values():
            titles = {f"{m.task} {m.name}": m for m in group}
            values = {t: spreads[m.task][m.name].values[i] for t, m in titles.items()}
            single = {t: baseline[m.task][m.name].mean for t, m in titles.items()}
            higher = {t: m.higher_is_better for t, m in titles.items()}
            means.append(delta_m(values, single, higher, sign))
        seeds.append(statistics.fmean(means))
    return Spread(tuple(seeds))


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _one_line(text: str) -> str:
    return " ".join(str(text).split())
