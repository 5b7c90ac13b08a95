"""Methods of one's own at the command line: from files, from modules, from installed packages.

A file or module registers its methods with `equipoise.register` when it is imported; an installed
package names such a module, or a function, in the entry-point group `equipoise.methods`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

from equipoise.errors import EquipoiseError
from equipoise.method import unwrapped
from equipoise.recipe import Recipe
from equipoise.registry import TOKENS, listening

GROUP = "equipoise.methods"

MethodsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--methods",
        metavar="FILE",
        help="Python file or module that registers methods of your own. Several: repeat.",
    ),
]

_brought: dict[str, set[str]] = {}  # what was loaded -> the tokens that it registered
_read: dict[str, bytes] = {}  # file -> its text when it was loaded


class MethodsError(EquipoiseError, ValueError):
    """Methods of one's own that cannot be loaded; one sentence that says why."""


def load(given: Iterable[str] | None = None) -> tuple[str, ...]:
    """Register the methods of installed packages, and those of files and modules.

    What was loaded before is loaded again only if the file has changed.

    Args:
        given: paths of Python files, or dotted names of modules.

    Returns:
        The same, without repetitions; files by their absolute paths.

    Raises:
        MethodsError: a file or module is not there, fails, or registers nothing.
    """
    _installed()
    return tuple(dict.fromkeys(_load(one) for one in given or ()))


def load_if_there(given: Iterable[str]) -> None:
    """The same, without what cannot be loaded: of a run that is only reported."""
    for one in given:
        with suppress(MethodsError):
            load([one])


def used(recipe: str, given: Sequence[str]) -> tuple[str, ...]:
    """Those of the loaded files and modules whose methods the recipe names."""
    tokens = {stage.method.token for stage in Recipe.parse(recipe).stages}
    return tuple(one for one in given if tokens & _brought[one])


# ------------------------------------------------------------------------------------- loading


def _load(given: str) -> str:
    if given.endswith(".py") or Path(given).is_file():
        path = Path(given).expanduser().resolve()
        name = str(path)
        if not path.is_file():
            raise MethodsError(f"--methods {given}: there is no such file.")
        text = path.read_bytes()
        if _read.get(name) != text:
            _register(given, name, lambda: _run(path))
            _read[name] = text
    else:
        name = given
        if name not in _brought:
            _register(given, name, lambda: _import(name))
    return name


def _register(given: str, name: str, work: Callable[[], object]) -> None:
    with _sentences(f"--methods {given}", name), listening() as heard:
        work()
    # A module that was imported before, by an entry point for example, says nothing any more.
    inside = {token: f"{unwrapped(method.factory).__module__}." for token, method in TOKENS.items()}
    found = {*heard, *(token for token, place in inside.items() if place.startswith(f"{name}."))}
    if not found:
        raise MethodsError(f"--methods {given} registers no method; call equipoise.register in it.")
    _brought[name] = found


def _import(name: str) -> None:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise MethodsError(
            f"--methods {name}: there is no module {error.name}; write the path of a file with "
            "its ending, my_methods.py."
        ) from None


def _run(path: Path) -> None:
    """Import a file by its path; what lies beside it can be imported meanwhile, as by a script."""
    name = f"_methods_{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise MethodsError(f"--methods {path} is no Python file; its name must end with .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where type hints are looked up
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        with suppress(ValueError):
            sys.path.remove(str(path.parent))


@cache
def _installed() -> None:
    for point in entry_points(group=GROUP):
        _enter(point)


def _enter(point: EntryPoint) -> None:
    of = f" of {point.dist.name}" if point.dist else ""
    with _sentences(f"the methods{of} ({point.value})", point.value):
        found = point.load()
        if not isinstance(found, ModuleType):
            found()


@contextmanager
def _sentences(what: str, name: str) -> Any:
    """Whatever goes wrong inside becomes one sentence."""
    try:
        yield
    except MethodsError:
        raise
    except (Exception, SystemExit) as error:
        at = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
              if frame.filename == name]  # fmt: skip
        line = at[-1] if at else getattr(error, "lineno", None)
        where = f"{what}, line {line}" if line else what
        kind = "" if isinstance(error, EquipoiseError) else f"{type(error).__name__}: "
        raise MethodsError(f"{where}: {kind}{' '.join(str(error).split())}") from error
