"""The pictures of a grouping: data maps, affinities, the tree of tasks, memberships."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import dendrogram
from torch import Tensor

from equipoise.grouping import DataMaps, Groups, linkage
from equipoise.lab.figures import INK, STYLE, canvas
from equipoise.lab.files import replacing


def write(folder: Path, maps: DataMaps) -> None:
    """Write the pictures of the maps as SVG: map-TASK, tree; those that are there stay."""
    folder.mkdir(exist_ok=True)
    tasks = tuple(map(str, maps.tasks))
    plain = [re.sub(r"[^A-Za-z0-9.-]", "_", task) for task in tasks]
    for i, points in enumerate(maps.current().numpy()):
        number = f"-{i + 1}" if plain.count(plain[i]) > 1 else ""
        path = folder / f"map-{plain[i]}{number}.svg"
        if not path.exists():
            save(data_map(points, f"{tasks[i]}, {maps.epoch} epochs"), path)
    path = folder / "tree.svg"
    if len(tasks) > 1 and not path.exists():
        save(tree(maps.gram(), tasks), path)


def data_map(points: np.ndarray, title: str) -> Figure:
    """Where the samples of a task lie: confidence up, variability to the right, by their number.

    Args:
        points: (N, 2) mean and deviation of the probability of the true class; (0, 0) is left out.
        title: of the picture.
    """
    seen = points[(points != 0).any(1)]
    with canvas(title) as (figure, axes):
        drawn = axes.hexbin(
            seen[:, 1], seen[:, 0], gridsize=36, extent=(0, 0.5, 0, 1), mincnt=1, bins="log",
            cmap="viridis_r", linewidths=0.1,
        )  # fmt: skip
        figure.colorbar(drawn, ax=axes, label="samples").ax.yaxis.set_major_formatter(
            lambda value, _: f"{value:g}"
        )
        axes.set(xlabel="variability σ", ylabel="confidence μ", xlim=(0, 0.5), ylim=(0, 1))
    return figure


def memberships(groups: Groups) -> Figure:
    """How much each task belongs to each group."""
    w = groups.memberships.numpy()
    with canvas("Memberships", height=1.0 + 0.2 * len(w)) as (figure, axes):
        axes.imshow(w, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.grid(visible=False)
        axes.set_yticks(range(len(w)), groups.tasks)
        axes.set_xticks(range(w.shape[1]), [f"group {j + 1}" for j in range(w.shape[1])])
        if w.shape[1] <= 10:
            for i, row in enumerate(w):
                for j, value in enumerate(row):
                    colour = "white" if value > 0.6 else INK
                    text = f"{value:.2f}"
                    axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=8)
    return figure


def affinities(matrix: np.ndarray, tasks: Sequence[str]) -> Figure:
    """How much the step of one task (row) helps another (column); the diagonal is left out."""
    shown = np.where(np.eye(len(matrix), dtype=bool), np.nan, matrix)
    with canvas("Affinities", height=1.4 + 0.2 * len(matrix)) as (figure, axes):
        limit = float(np.nanmax(np.abs(shown), initial=0.0)) or 1.0
        drawn = axes.imshow(shown, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
        figure.colorbar(drawn, ax=axes)
        axes.grid(visible=False)
        axes.set_yticks(range(len(tasks)), tasks)
        axes.set_xticks(range(len(tasks)), tasks, rotation=90)
        axes.set(ylabel="the step of", xlabel="helps")
    return figure


def tree(gram: Tensor, tasks: Sequence[str]) -> Figure:
    """Which tasks join first, by the mean distance between them."""
    with canvas("Distances", height=1.0 + 0.2 * len(tasks)) as (figure, axes):
        dendrogram(
            linkage(gram), ax=axes, labels=list(tasks), orientation="right",
            link_color_func=lambda _: INK, leaf_font_size=8,
        )  # fmt: skip
        axes.grid(visible=False, axis="y")
        axes.set(xlabel="distance")
    return figure


def save(figure: Figure, path: Path) -> None:
    """As a file of its own, the same for the same numbers."""
    style: Any = {**STYLE, "svg.hashsalt": path.stem}
    with matplotlib.rc_context(style), replacing(path) as file:
        figure.savefig(file, format="svg", metadata={"Date": None})
