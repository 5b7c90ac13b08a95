"""What the checks of aggregators and of weightings share: fresh methods, names, failures."""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

Check = Callable[[], None]
Make = Callable[..., Any]

STEPS_PER_EPOCH = 2


def fresh(make: Make, n_tasks: int, seed: int = 0) -> Any:
    """A new method, with what `make` takes of number of tasks, seed, generator, steps an epoch.

    Raises:
        TypeError: `make` wants something else.
    """
    known: dict[str, Any] = {
        "n_tasks": n_tasks,
        "seed": seed,
        "generator": torch.Generator().manual_seed(seed),
        "steps_per_epoch": STEPS_PER_EPOCH,
    }
    parameters = inspect.signature(make).parameters
    for name, parameter in parameters.items():
        many = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if name not in known and not many and parameter.default is parameter.empty:
            raise TypeError(
                f"make must give a fresh method without being told {name!r}; write "
                f"lambda: method, or lambda: Method({name}=...)."
            )
    with torch.random.fork_rng(devices=[]):  # a method without a seed draws one
        torch.manual_seed(seed)
        return make(**{name: value for name, value in known.items() if name in parameters})


def named(checks: Mapping[str, Callable[[Make], None]], make: Make) -> Iterator[tuple[str, Check]]:
    """Each check by its name, which its failure names first."""
    for name, check in checks.items():
        yield name, _naming(name, check, make)


def run(checks: Iterator[tuple[str, Check]], leave_out: Collection[str]) -> None:
    """Run all but those left out.

    Raises:
        AssertionError: of the first one that fails.
        ValueError: there is no check of a name to be left out.
    """
    todo = dict(checks)
    for name in leave_out:
        if name not in todo:
            raise ValueError(f"there is no check {name!r} to leave out; there are {list(todo)}.")
    for name, check in todo.items():
        if name not in leave_out:
            check()


def ensure(holds: object, where: str, expected: object, found: object) -> None:
    """Fail, unless it holds, with what was put in, what was expected and what was found."""
    if not holds:
        raise AssertionError(f"{where}: expected {expected}, found {found}.")


def called(method: Callable[..., Any], where: str, *arguments: Any) -> Tensor:
    """What a method gives, which is a tensor; an error of its own is a failure."""
    try:
        found = method(*arguments)
    except Exception as error:
        raise AssertionError(
            f"{where}: expected a tensor, found {type(error).__name__}: {error}"
        ) from error
    ensure(isinstance(found, Tensor), where, "a tensor", type(found).__name__)
    return found


def saved(method: Any) -> Any:
    """The state of a method as a file gives it back, read weights-only."""
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same_state(a: Any, b: Any) -> bool:
    """Whether two states hold the same numbers, bit for bit; NaN equals NaN."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same_kind = a.shape == b.shape and a.dtype == b.dtype
        return same_kind and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_state(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same_state, a, b))
    return type(a) is type(b) and bool(a == b)


def _naming(name: str, check: Callable[[Make], None], make: Make) -> Check:
    def named_check() -> None:
        try:
            check(make)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error.__cause__
        except Exception as error:
            raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error

    return named_check
