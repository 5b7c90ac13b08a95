"""The command `equipoise list`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from equipoise.lab import data as datasets
from equipoise.lab import models, options, own_methods, schedules
from equipoise.registry import METHODS


def list_names(methods: own_methods.MethodsOption = None) -> None:
    """Show the methods by axis, the data sets and the models."""
    own_methods.load(methods)
    kinds: dict[str, dict[str, list[str]]] = {}  # kind -> description -> names
    for method in METHODS.values():
        names = kinds.setdefault(method.axis, {}).setdefault(method.summary, [])
        names.append(method.token)
    for kind, registry in (
        ("data", datasets.DATASETS), ("model", models.MODELS), ("schedule", schedules.SCHEDULES),
    ):  # fmt: skip
        kinds[kind] = {
            f"{first_line(build)}\n({options.written(build)})": [name]
            for name, build in registry.items()
        }
    table = Table(box=None, pad_edge=False, show_header=False)
    for kind, entries in kinds.items():
        for i, (text, names) in enumerate(entries.items()):
            table.add_row("" if i else kind, ", ".join(names), text)
        table.add_row()
    console = Console(highlight=False)
    console.print(table)
    console.print(
        "A recipe joins one of each axis: igbv1+cagrad. With -ub an aggregation works on the "
        "features instead of the parameters; with f- before it, it seeks flat regions (a-: the "
        "naive way): f-cagrad(rho=0.1). A line search makes plain SGD steps as long as all tasks "
        "agree to: bls+mgda. stl trains one network for each task. A file with methods of your own "
        "is given by --methods. Options of "
        "data, model and schedule, here with their defaults, go into parentheses: "
        "--data 'multidigits(canvas=24)'."
    )


def first_line(thing: Callable[..., Any]) -> str:
    """The first line of a docstring."""
    return (thing.__doc__ or "").strip().split("\n")[0]
