"""What can go wrong, each with the name of the task and what to do."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from typing import Any


class EquipoiseError(Exception):
    """Base of every error that Equipoise raises on purpose."""


class TaskError(EquipoiseError):
    """Something is wrong with one task.

    Stages know tasks by their position only; whoever knows the names calls `named`.

    Args:
        task: the task's name, or its position in the order of tasks; None: all of them together.
        problem: one sentence with the value and what to do.
    """

    def __init__(self, task: int | str | None, problem: str) -> None:
        super().__init__(task, problem)
        self.task = task
        self.problem = problem

    def named(self, tasks: Sequence[str]) -> TaskError:
        """Replace the position by the name from `tasks`, in place; returns the error itself."""
        if isinstance(self.task, int):
            self.task = tasks[self.task]
        return self

    def __str__(self) -> str:
        return self.problem if self.task is None else f"task {self.task!r}: {self.problem}"


class NonFiniteError(TaskError):
    """A loss or a gradient is NaN or infinite; `task` is None where only their sum is."""


NOT_CONNECTED = (
    "loss is not connected to the network; was it detached, or computed inside a checkpoint with "
    "use_reentrant=True?"
)

NOT_FINITE = (
    "gradient is not finite. Lower the learning rate, look for a division or a logarithm at 0, "
    "or leave this batch out."
)

TOO_LARGE = (
    "each task's gradient is finite, but their sum overflows. Divide the losses by a constant, or "
    "leave this batch out."
)


class raised_in:  # noqa: N801
    """A context: an error of the user's code in the body says where it was raised.

    It keeps its type and traceback. If a context inside has said where, nothing is added.

    Args:
        place: "the head of task 'a'".
    """

    __slots__ = ("place",)

    def __init__(self, place: str) -> None:
        self.place = place

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, Exception) or isinstance(error, EquipoiseError):
            return
        if hasattr(error, "_place"):
            return
        with suppress(AttributeError):  # a type with slots
            setattr(error, "_place", self.place)  # noqa: B010
        note = f"This was raised in {self.place}."
        if sys.version_info >= (3, 11):
            error.add_note(note)
        elif error.args and isinstance(error.args[0], str):
            error.args = (f"{error.args[0]} {note}", *error.args[1:])


class MissingExtraError(EquipoiseError, ImportError):
    """A method needs a package that comes with an extra only.

    Args:
        user: what needs it.
        package: what is needed.
        extra: with which extra it is installed.
    """

    def __init__(self, user: str, package: str, extra: str) -> None:
        super().__init__(
            f"{user} needs {package}, which is not installed: "
            f'pip install -c constraints.txt "equipoise[{extra}]"'
        )


class RecipeError(EquipoiseError, ValueError):
    """A recipe that cannot be read."""


class CombinationError(EquipoiseError, ValueError):
    """Two stages that make no sense together; the message names both."""


def nearest(
    word: str, known: Iterable[str], count: int = 3, listed: Iterable[str] | None = None
) -> str:
    """The `known` words nearest to `word`, or else those `listed`, as the end of an error message.

    What is listed is all that is known, unless given.
    """
    known = sorted(known)
    close = get_close_matches(word.lower(), known, n=count, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(repr(name) for name in close)}?"
    return f"known are: {', '.join(known if listed is None else sorted(listed))}."
