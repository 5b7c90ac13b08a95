"""What the documentation takes from the code, at build time.

A page may hold three kinds of mark, each on a line of its own:

    <!-- methods: weighting -->          the registered methods of one axis, as a table
    <!-- names: equipoise.weighting -->  the documentation of every public name of a module
    <!-- result: flat-regions accuracy -->  a table of docs/results/flat-regions.json
    <!-- result: weighting rows -->         the rows of a benchmark, by their key, as a table

so that a new method, or a new name, needs no change in the documentation. MkDocs calls
`on_page_markdown` for every page; `python docs/gen_pages.py` prints the table of methods.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

MARK = re.compile(r"^<!-- (methods|names|result): ([\w. -]+) -->$", re.MULTILINE)


def methods_table(axis: str) -> str:
    """The registered methods of one axis: their names in recipes, and what each does."""
    recipe = importlib.import_module("equipoise.registry")
    public = set(importlib.import_module("equipoise").__all__)
    tokens: dict[Any, list[str]] = {}  # one method may have a name for each level
    summaries = {}
    for method in recipe.METHODS.values():
        if method.axis == axis:
            tokens.setdefault(method.factory, []).append(method.token)
            summaries[method.factory] = method.summary
    if not tokens:
        raise ValueError(f"no registered method has the axis {axis!r}")
    lines = ["| in a recipe | as a stage | what it does |", "|---|---|---|"]
    for factory, known in tokens.items():
        name = factory.__name__
        stage = f"[`{name}`][{factory.__module__}.{name}]" if name in public else ""
        shown = ", ".join(f"`{token}`" for token in known)
        summary = summaries[factory].replace("|", r"\|")  # a bar would end the cell
        lines.append(f"| {shown} | {stage} | {summary} |")
    return "\n".join(lines)


def names(module: str) -> str:
    """One mkdocstrings block for each public name of a module."""
    public = importlib.import_module(module).__all__
    return "\n\n".join(f"::: {module}.{name}" for name in public)


def result(what: str) -> str:
    """One table of an experiment, or the rows of a benchmark, as it was measured."""
    file, _, name = what.partition(" ")
    path = Path(__file__).parent / "results" / f"{file}.json"
    measured = json.loads(path.read_text(encoding="utf-8"))
    if name in measured.get("tables", ()):
        return "\n".join(measured["tables"][name])
    rows = measured[name]
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def expand(markdown: str) -> str:
    """A page with its marks replaced by what they stand for."""
    makers = {"methods": methods_table, "names": names, "result": result}
    return MARK.sub(lambda mark: makers[mark[1]](mark[2]), markdown)


def on_page_markdown(markdown: str, **_: object) -> str:
    """MkDocs' hook."""
    return expand(markdown)


if __name__ == "__main__":
    for axis in ("weighting", "aggregation", "line search", "baseline"):
        print(methods_table(axis), end="\n\n")
