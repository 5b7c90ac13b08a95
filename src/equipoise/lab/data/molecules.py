"""What the two QM9 sets have in common: the eleven tasks, their units, standardisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from equipoise.lab.data.base import Baseline, Data, Split
from equipoise.lab.data.graphs import Graphs
from equipoise.lab.tasks import Task

MEV_PER_HARTREE = 27211.386246  # CODATA 2018
MEV_PER_KCAL_MOL = 43.36414
PARTS = ("train", "val", "test")
Standardise = Literal["train", "all"]


class Target(NamedTuple):
    """One of the published targets: its number there, its name and unit here."""

    number: int
    name: str
    unit: str


TARGETS = (
    Target(0, "mu", "D"),
    Target(1, "alpha", "a0³"),
    Target(2, "homo", "meV"),
    Target(3, "lumo", "meV"),
    Target(5, "r2", "a0²"),
    Target(6, "zpve", "meV"),
    Target(12, "u0_atom", "meV"),
    Target(13, "u298_atom", "meV"),
    Target(14, "h298_atom", "meV"),
    Target(15, "g298_atom", "meV"),
    Target(11, "cv", "cal/(mol K)"),
)
"""The targets of the published multi-task protocol, in its order: 0 1 2 3 5 6 12 13 14 15 11."""


def molecules(
    name: str,
    graphs: Graphs,
    values: Mapping[str, np.ndarray],
    chosen: Mapping[str, np.ndarray],
    standardise: Standardise,
    description: str,
    baseline: Baseline | None = None,
) -> Data:
    """A data set of graphs with standardised targets.

    Args:
        name: of the set.
        graphs: all N molecules.
        values: target -> (N,) values in the unit of `TARGETS`.
        chosen: split -> its molecules.
        standardise: the molecules by whose mean and standard deviation targets are standardised:
            those of the training split, or all N.
        description: one sentence.
        baseline: published numbers, if there are any.

    Raises:
        ValueError: a target that is the same for all molecules.
    """
    tasks = []
    targets: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    for target in TARGETS:
        known = values[target.name]
        seen = known[chosen["train"]] if standardise == "train" else known
        mean, scale = float(seen.mean()), float(seen.std())
        if not scale > 0:
            raise ValueError(
                f"{name}: {target.name} is {mean:g} {target.unit} in all {len(seen)} molecules by "
                "which it is standardised; take more of them."
            )
        tasks.append(Task.regression(target.name, target.unit, mean, scale))
        for part in PARTS:
            standardised = (known[chosen[part]] - mean) / scale
            targets[part][target.name] = torch.from_numpy(standardised).float()
    train, val, test = (Split(graphs.taken(chosen[part]), targets[part]) for part in PARTS)
    return Data(
        name=name,
        tasks=tuple(tasks),
        train=train,
        val=val,
        test=test,
        input_shape=graphs.widths,
        description=description,
        baseline=baseline,
    )


def refuse_sizes(name: str, limits: Sequence[int | None]) -> None:
    """Raise ValueError where a split would be empty."""
    for part, limit in zip(PARTS, limits, strict=True):
        if limit is not None and limit < 1:
            raise ValueError(f"{name}: {part} is {limit}; give 1 or more, or none for all.")


def limited(chosen: np.ndarray, limit: int | None, seed: Sequence[int]) -> np.ndarray:
    """As many of them, drawn without replacement, in their order.

    A smaller number is a part of a larger.
    """
    if limit is None or limit >= len(chosen):
        return chosen
    return chosen[np.sort(np.random.default_rng(seed).permutation(len(chosen))[:limit])]
