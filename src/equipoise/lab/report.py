"""The page of a comparison: one HTML file that needs nothing else, no network either."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from equipoise.diagnostics import Sign
from equipoise.errors import EquipoiseError, RecipeError
from equipoise.lab import figures, flat_report, own_methods, paired, searches
from equipoise.lab.files import write_text
from equipoise.lab.folders import History, Run, listed, read
from equipoise.lab.pages import Section, picture, render
from equipoise.lab.summary import SINGLE_TASK, TIME_UNIT, Metric, Over, Row, Summary
from equipoise.lab.table import summarise
from equipoise.recipe import Recipe

NAME = "report.html"
KINDS = {"weight": "weights λ of the weighting", "coefficient": "coefficients of the aggregator"}


def write(
    folder: str | Path,
    runs: Iterable[str | Path],
    sign: Sign = "improvement",
    over: Over = "metrics",
) -> Path:
    """Write `folder`/report.html, in one go.

    Args:
        folder: exists, and can be written; when it is a comparison folder, those of its runs that
            are neither given nor finished are named on the page.
        runs: run folders, finished or not.
        sign: the convention of Delta_m, see `equipoise.diagnostics.delta_m`.
        over: what Delta_m is the mean over, see `equipoise.lab.summary.summarise`.

    Returns:
        The path of the page.

    Raises:
        EquipoiseError: there is no such folder, one holds no run or a damaged one, or the runs
            cannot be in one table.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise EquipoiseError(f"there is no folder {folder} to write the page to.")
    found = {Path(run).resolve(): read(run) for run in runs}
    order = [run.resolve() for run in listed(folder)]
    missing = []
    for run in order:
        if run in found or (run / "result.json").exists():
            continue
        if (run / "config.json").exists():
            found[run] = read(run)
        else:
            missing.append(f"{run.name}: not started")
    if order:  # the order in which the recipes were given to the comparison
        found = {run: found[run] for run in (*order, *found) if run in found}
    if not found:
        raise EquipoiseError(f"there is no run to report in {folder}.")
    for run in found.values():
        own_methods.load_if_there(run.config.get("methods", ()))
    path = folder / NAME
    try:
        write_text(path, page(list(found.values()), sign, missing, over))
    except OSError as error:
        raise EquipoiseError(f"cannot write {path} ({error.strerror}).") from error
    return path


def page(
    runs: Sequence[Run],
    sign: Sign = "improvement",
    missing: Sequence[str] = (),
    over: Over = "metrics",
) -> str:
    """The page as text.

    Args:
        runs: at least one.
        sign: the convention of Delta_m.
        missing: runs of which there is nothing but a name, a phrase each.
        over: what Delta_m is the mean over.
    """
    table = summarise([run.summary for run in runs], sign, over)
    return render(
        "report.html.j2",
        title=table.title,
        table=table,
        columns=table.columns(),
        missing=missing,
        how=list(how(table.summary, runs)),
        sections=list(sections(table.summary, runs)),
        runs=runs,
        metrics=table.summary.metrics,
        written=_written,
        epochs=_epochs,
        settings=_common([_settings(run) for run in runs]),
        differences=_differences([_settings(run) for run in runs]),
    )


def how(summary: Summary, runs: Sequence[Run]) -> Iterator[str]:
    """How the numbers were made, in a few plain sentences."""
    recipes = list(dict.fromkeys(run.recipe for run in runs))
    settings = _common([_settings(run) for run in runs])
    seeds = ", ".join(map(str, sorted({run.seed for run in runs})))
    phrases = {
        "epochs": "{} epochs",
        "batch_size": "batches of {}",
        "lr": f"{_optimizers(runs)} with learning rate {{}}",
        "schedule": "schedule {}",
        "precision": "precision {}",
    }
    given = {key: settings[key] for key in phrases if key in settings}
    if given.get("schedule") == "none":
        del given["schedule"]
    details = [phrases[key].format(value) for key, value in given.items()]
    yield (
        f"{len(recipes)} {'recipe was' if len(recipes) == 1 else 'recipes were'} trained with "
        f"the seeds {seeds}" + (f": {', '.join(details)}." if details else ".")
    )
    splits = {tuple(r.result["sizes"].items()) for r in runs if r.result and "sizes" in r.result}
    if len(splits) == 1:  # one set of data; older runs do not say
        numbers = dict(splits.pop())
        yield (
            f"{summary.data} has {numbers['train']:,} training, {numbers['val']:,} validation and "
            f"{numbers['test']:,} test samples."
        )
    separate = SINGLE_TASK in recipes
    published = any(run.result and run.result.get("baseline") for run in runs)
    best = "Δm there, against published single-task numbers," if published else "mean score there"
    yield (
        "After every epoch all tasks were measured on the validation split. The epoch with the "
        f"best {best} was chosen"
        + (f" ({SINGLE_TASK}: for each task its own)" if separate else "")
        + ", and the networks of that epoch were then measured on the test split, once."
    )
    sizes = {run.recipe: run.result["parameters"] for run in runs if run.result}
    shared = {size for recipe, size in sizes.items() if recipe != SINGLE_TASK}
    if len(shared) == 1:
        single = sizes.get(SINGLE_TASK)
        yield f"The network has {shared.pop():,} parameters" + (
            f"; {SINGLE_TASK}, with one network a task, {single:,}." if single else "."
        )
    if any(row.relative_time is not None for row in summary.rows):
        yield (
            "T counts the time in training steps, without evaluation, as the mean over seeds "
            f"divided by that of {TIME_UNIT}. Runs that share a machine slow each other down."
        )
    packages = {key: settings[key] for key in ("equipoise", "torch", "python") if key in settings}
    versions = ", ".join(f"{name} {version}" for name, version in packages.items())
    machine = ", ".join(str(settings[key]) for key in ("device", "platform") if key in settings)
    if machine or versions:
        cpus = f", {settings['cpus']} CPUs" if "cpus" in settings else ""
        yield f"Machine: {machine}{cpus}; {versions}." if versions else f"Machine: {machine}{cpus}."


def sections(summary: Summary, runs: Sequence[Run]) -> Iterator[Section]:
    """All pictures."""
    histories: dict[str, list[History]] = {}
    for run in runs:
        if len(run.history.get("epoch", ())):
            histories.setdefault(run.recipe, []).append(run.history)
    recipes = list(dict.fromkeys(run.recipe for run in runs))
    look = figures.looks(recipes, partners=paired.partners(recipes))
    keys = {recipe: Markup(figures.key(look[recipe])) for recipe in histories}
    band = ""
    if any(len(found) > 1 for found in histories.values()):
        band = " Lines are means over seeds, bands reach from the least to the greatest."
    start = ""
    if any(run["epoch"].max() > figures.SHORT for found in histories.values() for run in found):
        start = " The vertical axis fits what comes after the first fifth of training."
    metrics = summary.metrics

    def key_of(recipes: Iterable[str]) -> list[tuple[Markup, str]]:
        return [(keys[recipe], recipe) for recipe in recipes if recipe in keys]

    if len(metrics) > 1 and any(row.metrics for row in summary.rows):
        yield from _tradeoff(summary, look, key_of)
    yield from paired.section(summary)
    if metrics and histories:
        yield Section(
            "Validation",
            f"Metrics on the validation split, by which the epoch is chosen.{band}{start}",
            [
                picture(
                    figures.curves(
                        histories,
                        f"{metric.name}/val/{metric.task}",
                        metric.task,
                        f"{metric.label} {metric.better}",
                        look,
                        factor=100 if metric.percent else 1,
                    ),
                    f"Validation {metric.name} of task {metric.task} over the epochs",
                )
                for metric in metrics
            ],
            key_of(histories),
        )
    tasks = list(dict.fromkeys(m.task for m in metrics)) or _tasks_of(histories)
    if histories:
        yield Section(
            "Training loss",
            f"Of each task by itself, before any weighting.{band}{start}",
            [
                picture(
                    figures.curves(histories, f"loss/train/{task}", task, "training loss ↓", look),
                    f"Training loss of task {task} over the epochs",
                )
                for task in tasks
            ],
            key_of(histories),
        )
    joint = {recipe: found for recipe, found in histories.items() if recipe != SINGLE_TASK}
    apart = f" {SINGLE_TASK} shares nothing, and is not drawn." if SINGLE_TASK in histories else ""
    yield from searches.section(histories, look, key_of)
    if len(tasks) > 1 and joint:
        yield _weights(joint, tasks)
        yield from flat_report.conflicts(joint, look, key_of(joint), f"{apart}{band}")
    yield from flat_report.diagnosed(runs, look, key_of)


def _optimizers(runs: Sequence[Run]) -> str:
    """What made the steps, line searches apart."""
    own = [_searches(run.recipe) for run in runs]
    names = {"adam": "Adam", "sgd": "SGD"}
    given = [run.config.get("optimizer", "adam") for run, s in zip(runs, own, strict=True) if not s]
    known = " or ".join(dict.fromkeys(names.get(name, name) for name in given))
    if any(own):
        plain = "line searches along plain SGD steps"
        return f"{plain}, {known}" if known else plain
    return known


def _searches(recipe: str) -> bool:
    """Whether a line search makes the steps; of what another version knew, nothing is known."""
    try:
        return Recipe.parse(recipe).needs_sgd
    except RecipeError:
        return False


def _tradeoff(summary: Summary, look: Any, key_of: Any) -> Iterator[Section]:
    metrics = summary.metrics
    rows = [row for row in summary.rows if row.metrics]
    marks = ""
    if any(len(row.seeds) > 1 for row in rows):
        marks = " Large markers are means over seeds, faint ones the seeds."
    by_recipe = {row.recipe: row for row in rows}
    if len(metrics) == 2:
        text = f"Test split.{marks}"
        if SINGLE_TASK in by_recipe:
            text += f" The dashed lines are {SINGLE_TASK}: beyond both is better than it in both."
        figure = figures.plane(summary, *metrics, look)
        about = f"Test metric of task {metrics[0].task} against that of task {metrics[1].task}"
    else:
        baseline: Row = by_recipe.get(SINGLE_TASK) or by_recipe.get(TIME_UNIT) or rows[0]
        rows.remove(baseline)
        figure = figures.tasks_against(summary, baseline, look) if rows else None
        text = (
            f"Test split: by how many percent each recipe is better than the mean of "
            f"{baseline.recipe} in each metric; right of the dashed line is better.{marks}"
        )
        about = f"Improvement of each recipe over {baseline.recipe}, task by task"
    if figure is not None:
        key = key_of(row.recipe for row in rows)
        yield Section("Task against task", text, [picture(figure, about)], key)


def _weights(histories: figures.Histories, tasks: Sequence[str]) -> Section:
    look = figures.looks(tasks, first=2)  # not the colours of the first recipes
    pictures = []
    steady: dict[str, list[str]] = {}
    for recipe, runs in histories.items():
        for kind, name in KINDS.items():
            figure = figures.task_curves(runs, kind, tasks, f"{recipe}: {name}", look)
            if figure is not None:
                pictures.append(picture(figure, f"{name} of {recipe} over the epochs"))
            elif (value := figures.constant(runs, kind, tasks)) is not None:
                steady.setdefault(f"{name} are all {value:.4g}", []).append(recipe)
    text = (
        "The weighting multiplies the losses by λ (those of the SI family their logarithms), the "
        "aggregator then multiplies each task's gradient by its coefficient. Means over the steps "
        "of an epoch."
    )
    for what, recipes in steady.items():
        text += f" The {what} all the time for {', '.join(recipes)}."
    key = [(Markup(figures.key(look[task])), task) for task in tasks] if pictures else []
    return Section("Task weights", text, pictures, key, shown=12)


def _tasks_of(histories: figures.Histories) -> list[str]:
    names = [name for runs in histories.values() for run in runs for name in run]
    start = "loss/train/"
    return list(dict.fromkeys(n.removeprefix(start) for n in names if n.startswith(start)))


def _settings(run: Run) -> dict[str, Any]:
    """Configuration and environment as one flat mapping, without recipe and seed."""
    environment = {k: v for k, v in run.environment.items() if not isinstance(v, dict)}
    packages = run.environment.get("packages") or {}
    found = {**environment, **packages, **run.config, **_device(run)}
    return {k: v for k, v in found.items() if k not in ("recipe", "seed") and v is not None}


def _device(run: Run) -> dict[str, Any]:
    """The name of the device says more than "cuda"."""
    return {"device": run.environment["device"]} if "device" in run.environment else {}


def _common(settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is the same in all."""
    first, *others = settings
    return {
        key: value
        for key, value in first.items()
        if all(key in other and other[key] == value for other in others)
    }


def _differences(settings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    common = _common(settings)
    return [{k: v for k, v in own.items() if k not in common} for own in settings]


def _written(metric: Metric, value: Any) -> str:
    if value is None or value != value:
        return "–"
    return f"{100 * value:.2f}" if metric.percent else f"{value:.4g}"


def _epochs(best: Any) -> str:
    """The chosen epoch, or those of each task."""
    return ", ".join(f"{k} {v}" for k, v in best.items()) if isinstance(best, dict) else str(best)
