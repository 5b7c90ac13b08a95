"""What a user sees while runs are under way."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from equipoise.report import StepReport

Losses = Mapping[str, float]
SHOWN_TASKS = 3  # more would not fit in a line


class Throttle:
    """Passes on a run's progress, but not more often than a reader can follow.

    Args:
        send: receives the epochs done, fractions included, and the losses by task.
        every: seconds between two calls of `send`.
    """

    def __init__(self, send: Callable[[float, dict[str, float]], None], every: float = 0.2) -> None:
        self.send = send
        self.every = every
        self._next = 0.0

    def __call__(self, done: float, report: StepReport) -> None:
        """A step has been made; `done` epochs lie behind."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + self.every
            self.send(done, dict(zip(report.tasks, report.losses.tolist(), strict=True)))


class Pace:
    """Passes on what it is told, but not more often than a reader can follow; see `Throttle`."""

    def __init__(self, send: Callable[..., None], every: float = 0.2) -> None:
        self.send = send
        self.every = every
        self._next = 0.0

    def __call__(self, *seen: object) -> None:
        """Something has moved."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + self.every
            self.send(*seen)


class Display:
    """A bar for each active run and one for all; plain lines where nobody watches.

    On a terminal: epoch, losses and remaining time of each active run, and the whole. Elsewhere:
    one line for each run that has ended, and nothing else.

    Args:
        epochs: epochs of one run.
        runs: how many runs there are to make.
        console: where to write; standard error by default, so that output can be redirected.
    """

    def __init__(self, epochs: int, runs: int, console: Console | None = None) -> None:
        self.epochs = epochs
        self.console = console or Console(stderr=True, highlight=False)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[position]}"),
            TextColumn("{task.fields[losses]}", style="dim"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._active: dict[str, TaskID] = {}
        self._ended = 0
        self._runs = runs
        self._all = self._bars.add_task(
            "all runs", total=runs * epochs, visible=runs > 1, position=f"0/{runs}", losses=""
        )

    def __enter__(self) -> Display:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def update(self, run: str, done: float, losses: Losses) -> None:
        """The run called `run` has `done` epochs behind it."""
        if run not in self._active:
            # Not from 0: a resumed run starts further on, and that was not today's work.
            self._active[run] = self._bars.add_task(
                run, total=self.epochs, completed=int(done), position="", losses=""
            )
        position, beside = self.describe(done, losses)
        self._bars.update(self._active[run], completed=done, position=position, losses=beside)
        self._update_all()

    def describe(self, done: float, losses: Losses) -> tuple[str, str]:
        """What stands beside the bar of a run, in two columns."""
        return f"epoch {min(int(done) + 1, self.epochs)}/{self.epochs}", describe_losses(losses)

    def end(self, run: str, line: str) -> None:
        """The run called `run` has ended; `line` says how."""
        self.console.print(line, soft_wrap=True, markup=False)
        self._ended += 1
        if run in self._active:
            self._bars.remove_task(self._active.pop(run))
        self._update_all()

    def _update_all(self) -> None:
        under_way = sum(t.completed for t in self._bars.tasks if t.id in self._active.values())
        self._bars.update(
            self._all,
            completed=self._ended * self.epochs + under_way,
            position=f"{self._ended}/{self._runs}",
        )


class MeasureDisplay(Display):
    """The same for measuring: the share done of each run that is looked at, and what is measured.

    Args:
        epochs: 1.
    """

    def describe(self, done: float, losses: Any) -> tuple[str, str]:
        """The share, and the measure, which comes where training has its losses."""
        return f"{100 * done:.0f} %", str(losses)


def describe_losses(losses: Losses) -> str:
    """The losses in a few words: by name for a few tasks, else their mean."""
    if len(losses) <= SHOWN_TASKS:
        return "  ".join(f"{task} {loss:.3f}" for task, loss in losses.items())
    present = [loss for loss in losses.values() if loss == loss]  # an absent task's loss is NaN
    return f"mean loss {sum(present) / max(len(present), 1):.3f}"
