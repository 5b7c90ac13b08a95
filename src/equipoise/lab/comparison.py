"""Recipes x seeds: the runs of a comparison side by side, and what is written about them."""

from __future__ import annotations

import multiprocessing
import re
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol, TypeVar

from equipoise.diagnostics import Sign
from equipoise.errors import EquipoiseError
from equipoise.lab import runs, table
from equipoise.lab.config import ConfigError, RunConfig, refuse_difference
from equipoise.lab.files import read_json, write_json, write_text
from equipoise.lab.progress import Display, Throttle
from equipoise.lab.summary import Over


@dataclass(frozen=True)
class Failure:
    """A run that ended with an error instead of a result."""

    message: str


@dataclass(frozen=True)
class Job:
    """One run of a comparison, and the folder that is its own."""

    config: RunConfig
    folder: Path

    @property
    def name(self) -> str:
        """How the run is called on the screen."""
        return f"{self.config.recipe}, seed {self.config.seed}"

    def attempt(self, send: Callable[..., None]) -> Outcome:
        """Make it; `send` receives the epochs done and the losses now and then."""
        return attempt(self, Throttle(send))


class Work(Protocol):
    """What `one_by_one` and `in_processes` can make."""

    @property
    def name(self) -> str:
        """How it is called on the screen."""
        ...

    def attempt(self, send: Callable[..., None], /) -> Any:
        """Make it, tell `send` what `Display.update` wants, and return how it ended."""
        ...


Outcome = runs.Result | Failure


class Comparison:
    """The runs of `configs` in the folder `out`, in the order given.

    Args:
        configs: what to run; two of them may differ in recipe, its methods and seed only.
        out: the comparison folder.

    Raises:
        ConfigError: two runs are the same, or `out` holds a run with another configuration.
    """

    def __init__(self, configs: Sequence[RunConfig], out: str | Path) -> None:
        self.out = Path(out)
        self.common = configs[0].model_dump(mode="json", exclude={"recipe", "methods", "seed"})
        self.jobs = [Job(c, self.out / "runs" / run_name(c)) for c in configs]
        path = self.out / "comparison.json"
        if path.exists():
            refuse_difference(read_json(path)["config"], self.common, self.out)
        seen: set[Path] = set()
        for job in self.jobs:
            if job.folder in seen:
                raise ConfigError(f"{job.name} is given twice; give each recipe and seed once.")
            seen.add(job.folder)
            runs.refuse_another_run(job.config, job.folder)

    def run(self, side_by_side: int = 1, show: Callable[..., Display] = Display) -> list[Outcome]:
        """Make the runs that are not finished yet, `side_by_side` at a time.

        Returns:
            For each run its result, or why it failed. A failed run loses none of the others.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(self.out / "comparison.json", self.description())
        outcomes: dict[Path, Outcome] = {}
        todo: list[Job] = []
        for job in self.jobs:
            result = runs.finished(job.folder)
            if result is None:
                todo.append(job)
            else:
                outcomes[job.folder] = result
        if todo:
            side_by_side = min(side_by_side, len(todo))
            with show(self.jobs[0].config.epochs, len(todo)) as display:
                make = one_by_one if side_by_side == 1 else in_processes
                for job, outcome in make(todo, display, side_by_side):
                    outcomes[job.folder] = outcome
                    display.end(job.name, f"{job.name}: {summary(outcome)}")
        return [outcomes[job.folder] for job in self.jobs]

    def description(self) -> dict[str, Any]:
        """What comparison.json holds."""
        return {
            "recipes": list(dict.fromkeys(job.config.recipe for job in self.jobs)),
            "seeds": list(dict.fromkeys(job.config.seed for job in self.jobs)),
            "config": self.common,
            "runs": [job.folder.relative_to(self.out).as_posix() for job in self.jobs],
        }

    def save(self, outcomes: Sequence[Outcome], sign: Sign, over: Over = "metrics") -> table.Table:
        """Write the table in its four forms; returns it."""
        rows: list[dict[str, Any]] = [
            {"recipe": job.config.recipe, "seed": job.config.seed, "failed": outcome.message}
            if isinstance(outcome, Failure)
            else dict(outcome)
            for job, outcome in zip(self.jobs, outcomes, strict=True)
        ]
        summarised = table.summarise(rows, sign, over)
        write_text(self.out / "table.txt", summarised.text() + "\n")
        write_text(self.out / "table.md", summarised.markdown())
        write_text(self.out / "table.csv", summarised.csv())
        write_text(self.out / "table.json", summarised.json())
        return summarised


def run_name(config: RunConfig) -> str:
    """The name of a run's folder: "cagrad_c_0.5_-seed0"."""
    return f"{file_name(config.recipe)}-seed{config.seed}"


def file_name(text: str) -> str:
    """A recipe or a data set as the name of a folder: "cagrad_c_0.5_"."""
    return re.sub(r"[^A-Za-z0-9.-]", "_", text)


def run_folders(folder: str | Path) -> list[Path]:
    """The runs that `folder` stands for: itself, or those of a comparison that have begun.

    Raises:
        ConfigError: the folder is not there, or holds no run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}.")
    candidates = [folder]
    if (folder / "comparison.json").exists():
        candidates = [folder / run for run in read_json(folder / "comparison.json")["runs"]]
    found = [candidate for candidate in candidates if (candidate / "config.json").exists()]
    if not found:
        raise ConfigError(f"{folder} holds no run, and no comparison with one.")
    return found


def summary(outcome: Outcome) -> str:
    """A run's end in one line."""
    if isinstance(outcome, Failure):
        return f"failed: {outcome.message}"
    values = [
        f"{task} " + ", ".join(f"{measure} {value:.4g}" for measure, value in found.items())
        for task, found in outcome["test"].items()
    ]
    return f"{', '.join(values)} on test; {outcome['train_seconds']:.1f} s of training"


def attempt(job: Job, progress: runs.Progress) -> Outcome:
    """Make one run; an error becomes a Failure, with the traceback in the run's error.txt."""
    trace = job.folder / "error.txt"
    try:
        result = runs.train(job.config, job.folder, progress)
        trace.unlink(missing_ok=True)
        return result
    except Exception as error:
        with suppress(OSError):  # a full disk may be what went wrong
            write_text(trace, traceback.format_exc())
        expected = isinstance(error, EquipoiseError)
        return Failure(str(error) if expected else f"{type(error).__name__}: {error}")


AnyWork = TypeVar("AnyWork", bound=Work)


def one_by_one(
    jobs: Sequence[AnyWork], display: Display, side_by_side: int = 1
) -> Iterator[tuple[AnyWork, Any]]:
    """Make the runs in this process; yields each when it has ended."""
    for job in jobs:
        name = job.name
        yield job, job.attempt(lambda *seen, name=name: display.update(name, *seen))


def in_processes(
    jobs: Sequence[AnyWork], display: Display, side_by_side: int
) -> Iterator[tuple[AnyWork, Any]]:
    """Make the runs in that many processes; yields each when it has ended.

    Each worker has a pipe of its own. A queue for all would be locked for ever by a worker that
    is killed while it writes; the end of a pipe is simply seen.
    """
    waiting = deque(jobs)
    workers: dict[Connection, Worker] = {}
    try:
        while waiting or workers:
            while waiting and len(workers) < side_by_side:
                worker = Worker()
                workers[worker.pipe] = worker
                worker.give(waiting.popleft())
            for pipe in wait(list(workers)):
                worker = workers[pipe]  # ty: ignore[invalid-argument-type]
                try:
                    message = worker.pipe.recv()
                except (EOFError, OSError):
                    message = Failure(worker.cause_of_death())
                if isinstance(message, tuple):
                    display.update(worker.job.name, *message)
                    continue
                yield worker.job, message
                if worker.process.is_alive() and waiting:
                    worker.give(waiting.popleft())
                else:
                    workers.pop(worker.pipe).dismiss()
    finally:
        for worker in workers.values():
            worker.process.terminate()  # files are whole at any moment, see files.py
            worker.dismiss()


class Worker:
    """A process that makes one run after the other, as seen from the parent."""

    job: Any

    def __init__(self) -> None:
        # Spawned, not forked: torch's thread pools and CUDA do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self.pipe, other_end = context.Pipe()
        self.process: BaseProcess = context.Process(target=work, args=(other_end,), daemon=True)
        self.process.start()
        other_end.close()  # or the end of the worker would not end the pipe

    def give(self, job: Work) -> None:
        """Let it make a run."""
        self.job = job
        with suppress(OSError):  # it is dead; reading from the pipe will tell
            self.pipe.send(job)

    def dismiss(self) -> None:
        """No more runs: the closed pipe ends the process."""
        self.pipe.close()
        self.process.join()

    def cause_of_death(self) -> str:
        """Why the process is gone, as a failure's message."""
        self.process.join()
        code = self.process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        return f"its process {how}; the same command goes on after its last finished epoch."


def work(pipe: Connection) -> None:
    """What a worker does: receive a job, send its progress now and then, send the outcome.

    When the parent is gone the pipe breaks, and the worker ends with it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    try:
        while True:
            job = pipe.recv()
            pipe.send(job.attempt(lambda *seen: pipe.send(seen)))
    except (EOFError, OSError):
        return
