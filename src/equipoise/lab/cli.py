"""The command `equipoise`: train, compare, report, diagnose, list."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from equipoise.diagnostics import Sign
from equipoise.errors import EquipoiseError
from equipoise.lab import (
    diagnose_page,
    diagnosing,
    grouping_command,
    list_command,
    own_methods,
    report,
)
from equipoise.lab.comparison import (
    Comparison,
    Failure,
    Job,
    attempt,
    file_name,
    run_folders,
    run_name,
    summary,
)
from equipoise.lab.config import ConfigError, RunConfig
from equipoise.lab.diagnose_settings import MEASURES, Settings
from equipoise.lab.progress import Display, Throttle
from equipoise.lab.runs import Run, finished, refuse_another_run, seeded
from equipoise.lab.shell import complain, writable
from equipoise.lab.summary import Over

DONE, FAILED, WRONG_USE, INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train one network on several tasks by many recipes, and see which is best.",
)


USUAL = Settings()
DEFAULT = RunConfig.model_construct()  # unchecked: "auto" is still "auto"

Recipes = Annotated[
    list[str], typer.Argument(metavar="RECIPE", help="For example: ew igbv1 cagrad stl")
]
Seeds = Annotated[list[str], typer.Option(help="A comma list or a range: 0,1,2 or 0-4.")]
DataName = Annotated[
    str, typer.Option("--data", help="Data set, with options: 'multidigits(canvas=24)'; see list.")
]
DataRoot = Annotated[str | None, typer.Option(help="Folder with the files of the data set.")]
Model = Annotated[str, typer.Option(help="Network, with options: 'resnet18(width=8)'; see list.")]
Epochs = Annotated[int, typer.Option(help="Passes through the training data.")]
BatchSize = Annotated[int, typer.Option(help="Samples in a batch.")]
LearningRate = Annotated[float, typer.Option("--lr", help="Learning rate of the optimizer.")]
Optimizer = Annotated[
    str, typer.Option(help="adam or sgd (plain). Line searches always make plain SGD steps.")
]
ScheduleText = Annotated[
    str, typer.Option("--schedule", help="Of the learning rate: 'halve(every=100)'; see list.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")]
Precision = Annotated[str, typer.Option(help="32-true or bf16-mixed.")]
Probes = Annotated[int, typer.Option(help="Batches to measure conflicts on after each epoch.")]
Threads = Annotated[int, typer.Option(help="CPU threads of one run.")]
SignOption = Annotated[
    Sign,
    typer.Option(help="Delta_m as improvement in percent (higher is better) or as drop (lower)."),
]


OverOption = Annotated[
    Over,
    typer.Option("--over", help="Delta_m is the mean over all metrics, or over the tasks' means."),
]


@app.callback(invoke_without_command=True)
def equipoise(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    """Balanced multi-task training."""
    if version:
        from equipoise import __version__

        print(f"equipoise {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="For example: igbv1+cagrad")],
    data: DataName = DEFAULT.data,
    data_root: DataRoot = None,
    model: Model = DEFAULT.model,
    epochs: Epochs = DEFAULT.epochs,
    seed: Annotated[int, typer.Option(help="Of the initial weights, order and draws.")] = 0,
    batch_size: BatchSize = DEFAULT.batch_size,
    lr: LearningRate = DEFAULT.lr,
    optimizer: Optimizer = DEFAULT.optimizer,
    schedule: ScheduleText = DEFAULT.schedule,
    device: Device = DEFAULT.device,
    precision: Precision = DEFAULT.precision,
    probes: Probes = DEFAULT.probes,
    threads: Threads = DEFAULT.threads,
    methods: own_methods.MethodsOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; default runs/DATA-RECIPE-seedN.")
    ] = None,
) -> int:
    """Train one network by one recipe. A killed run goes on when the command is given again."""
    config = RunConfig.of(
        recipe=recipe, data=data, data_root=data_root, model=model, epochs=epochs, seed=seed,
        batch_size=batch_size, lr=lr, optimizer=optimizer, schedule=schedule, device=device,
        precision=precision, probes=probes, threads=threads, methods=methods,
    )  # fmt: skip
    folder = out or Path("runs", f"{file_name(config.data)}-{run_name(config)}")
    refuse_another_run(config, folder)
    check([config])
    writable(folder)
    job = Job(config, folder)
    if (outcome := finished(folder)) is None:
        with Display(config.epochs, 1) as display:
            outcome = attempt(job, Throttle(lambda *seen: display.update(job.name, *seen)))
    if isinstance(outcome, Failure):
        complain(f"{job.name} failed: {outcome.message}")
        return FAILED
    print(f"{job.name}: {summary(outcome)}")
    print(f"The run: {folder}")
    return DONE


@app.command()
def compare(
    recipes: Recipes,
    data: DataName = DEFAULT.data,
    data_root: DataRoot = None,
    model: Model = DEFAULT.model,
    epochs: Epochs = DEFAULT.epochs,
    seeds: Seeds = ["0"],  # noqa: B006 - typer copies it
    batch_size: BatchSize = DEFAULT.batch_size,
    lr: LearningRate = DEFAULT.lr,
    optimizer: Optimizer = DEFAULT.optimizer,
    schedule: ScheduleText = DEFAULT.schedule,
    device: Device = DEFAULT.device,
    precision: Precision = DEFAULT.precision,
    probes: Probes = DEFAULT.probes,
    threads: Threads = DEFAULT.threads,
    methods: own_methods.MethodsOption = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs side by side.")] = 1,
    sign: SignOption = "improvement",
    over: OverOption = "metrics",
    out: Annotated[
        Path | None, typer.Option(help="Comparison folder; default runs/compare-DATA.")
    ] = None,
) -> int:
    """Train every recipe with every seed; print one table and write it, with a page of pictures.

    Given again, the command makes what is missing: finished runs are kept, others go on.
    """
    common = {
        "data": data, "data_root": data_root, "model": model, "epochs": epochs, "lr": lr,
        "batch_size": batch_size, "device": device, "precision": precision, "threads": threads,
        "schedule": schedule, "optimizer": optimizer, "probes": probes, "methods": methods,
    }  # fmt: skip
    configs = [
        RunConfig.of(recipe=recipe, seed=seed, **common)
        for recipe in recipes
        for seed in parse_seeds(seeds)
    ]
    folder = out or Path("runs", f"compare-{file_name(configs[0].data)}")
    comparison = Comparison(configs, folder)
    check(configs)
    writable(comparison.out)
    outcomes = comparison.run(jobs)
    failures = sum(isinstance(outcome, Failure) for outcome in outcomes)
    try:
        print(comparison.save(outcomes, sign, over).text())
        if failures < len(outcomes):
            page = report.write(comparison.out, run_folders(comparison.out), sign, over)
            print(f"\nThe page with the pictures: {page}")
    except EquipoiseError as error:  # after the training it is no longer wrong use
        complain(str(error))
        return FAILED
    if failures:
        complain(f"{failures} of {len(outcomes)} runs failed; see error.txt in their folders.")
    return FAILED if failures else DONE


@app.command("report")
def write_report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUNS", help="Comparison or runs.")],
    sign: SignOption = "improvement",
    over: OverOption = "metrics",
    methods: own_methods.MethodsOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the page; default: that of the runs.")
    ] = None,
) -> int:
    """Write the page: table, learning curves, weights, conflicts, the tasks against each other."""
    own_methods.load(methods)
    folders = [folder for given in runs for folder in run_folders(given)]
    together = runs[0] if len(runs) == 1 else Path(os.path.commonpath([r.resolve() for r in runs]))
    target = out or together
    writable(target)
    print(f"The page: {report.write(target, folders, sign, over)}")
    return DONE


@app.command("diagnose")
def diagnose_runs(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Finished runs, or comparisons.")
    ],
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help=f"Only these: {', '.join(MEASURES)}. Several: repeat."),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(help="Of the test split, where it is gone through many times; 0: all."),
    ] = USUAL.samples,
    radii: Annotated[
        str, typer.Option(help="Of the noise: 1%,5% of the parameters' length, or 0.5,1.")
    ] = USUAL.radii,
    draws: Annotated[int, typer.Option(help="Directions of the noise.")] = USUAL.draws,
    points: Annotated[
        int, typer.Option(help="Of the loss surface along each side; odd.")
    ] = USUAL.points,
    span: Annotated[
        float, typer.Option(help="How far the surface reaches; 1: each filter by its length.")
    ] = USUAL.span,
    ood: Annotated[
        str | None,
        typer.Option(help="What is out of the domain: a data set, inverted, shuffled or none."),
    ] = None,
    data_root: DataRoot = None,
    device: Device = "auto",
    jobs: Annotated[int, typer.Option(min=1, help="Runs side by side.")] = 1,
    again: Annotated[bool, typer.Option("--again", help="Measure also what is there.")] = False,
    methods: own_methods.MethodsOption = None,
) -> int:
    """Measure finished runs: conflicts, robustness, entropy, calibration, flatness.

    Each run folder gets diagnostics.json and a page. Given again, the command measures what is
    missing.
    """
    own = own_methods.load(methods)
    settings = Settings(
        tuple(dict.fromkeys(only or MEASURES)),  # ty: ignore[invalid-argument-type]
        samples or None, radii, draws, points, span, ood,
    )  # fmt: skip
    folders = diagnosing.finished_runs(runs)
    work = [diagnosing.Job(folder, settings, data_root, device, again, own) for folder in folders]
    diagnosing.check(work)
    for folder in folders:
        writable(folder, "make it writable, or copy it")
    try:
        failures = diagnosing.make(work, jobs)
    except KeyboardInterrupt:
        complain("interrupted; the same command goes on with the measures that are missing.")
        sys.exit(INTERRUPTED)  # not returned: `main` would add the words for training
    if failures:
        complain(f"{failures} of {len(work)} runs could not be measured.")
        return FAILED
    if len(folders) == 1:
        print(f"The page: {folders[0] / diagnose_page.NAME}")
    else:
        together = " ".join(map(str, runs))
        print(f"A page in each run's folder; all together: equipoise report {together}")
    return DONE


app.command("group")(grouping_command.group)


app.command("list")(list_command.list_names)


def parse_seeds(given: list[str]) -> list[int]:
    """The seeds of "0,1,2", "0-4" or a mixture.

    Raises:
        ConfigError: it cannot be read, or names a seed twice.
    """
    if len(given) > 1:
        raise ConfigError(f"--seeds is given {len(given)} times; write --seeds {','.join(given)}.")
    seeds: list[int] = []
    for part in given[0].split(","):
        found = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not found or (found[2] and int(found[2]) < int(found[1])):
            raise ConfigError(f"seeds {given[0]!r} cannot be read; write 0,1,2 or 0-4.")
        seeds += range(int(found[1]), int(found[2] or found[1]) + 1)
    twice = [seed for seed in seeds if seeds.count(seed) > 1]
    if twice:
        raise ConfigError(f"seed {twice[0]} is given twice; give each seed once.")
    return seeds


def check(configs: list[RunConfig]) -> None:
    """Build everything that the runs need, once for each recipe, before the first one starts.

    Raises:
        EquipoiseError: what cannot be had.
        ConfigError: the same, from parts that raise a plain ValueError.
    """
    data = None
    for config in {config.recipe: config for config in configs}.values():
        try:
            with seeded(config):
                data = Run(config, data).data
        except ValueError as error:
            raise ConfigError(str(error)) from error


def main() -> None:
    """The entry point: runs the command and exits with 0, 1, 2 or 130."""
    try:
        status = app(prog_name="equipoise", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except EquipoiseError as error:
        complain(str(error))
        status = WRONG_USE
    except Exception as error:
        # Typer brings its own click, older ones import it: known by what all usage errors have.
        describe = getattr(error, "format_message", None)
        if describe is None and os.environ.get("EQUIPOISE_TRACEBACK"):
            raise
        complain(
            describe()
            if describe
            else f"{type(error).__name__}: {error} (EQUIPOISE_TRACEBACK=1 shows where)"
        )
        status = WRONG_USE if describe else FAILED
    if status == INTERRUPTED:
        complain("interrupted; the same command goes on after the last finished epoch.")
    sys.exit(status or DONE)
