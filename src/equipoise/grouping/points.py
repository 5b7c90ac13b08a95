"""Point-based grouping: by the regions of the data map in which a task's samples lie."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from equipoise.errors import EquipoiseError
from equipoise.grouping.kmeans import kmeans, squared_distances

Array = np.ndarray
SAMPLE = 50_000
"""Points from which the centres start."""
TOLERANCE = 1e-8


def shares_of_points(
    maps: Any, n_groups: int, generator: np.random.Generator, n_init: int
) -> tuple[Array, Array]:
    """K-means over all (mu, sigma) points of all tasks.

    Starts come from a sample of at most 50,000 points, the descent sees all, a task at a time.
    Points (0, 0), of samples that a task has not seen, are left out.

    Args:
        maps: (T, ..., 2), tensor or array, also one mapped into memory.
        n_groups: m.
        generator: of the sample and of the starts.
        n_init: number of starts.

    Returns:
        (T, m) share of each task's points that lie in each region; (m, 2) centres, by confidence.

    Raises:
        EquipoiseError: other shapes, or fewer different points than groups.
    """
    maps = maps.detach().cpu().numpy() if isinstance(maps, torch.Tensor) else maps
    if np.ndim(maps) < 3 or maps.shape[-1] != 2:
        raise EquipoiseError(
            f"method='points' needs maps (T, ..., 2), not {np.shape(maps)}; a Gram matrix does not "
            "hold the points. Give DataMaps.maps() or .current()."
        )
    sample = np.concatenate([_some(_points(task), len(maps), generator) for task in maps])
    if len(np.unique(sample, axis=0)) < n_groups:
        raise EquipoiseError(f"there are fewer than {n_groups} different points in the maps.")
    centres = kmeans(sample, n_groups, generator, n_init).centres
    spread = float(sample.var(0).sum())
    for _ in range(300):
        counts, sums = zip(*(_in_regions(_points(task), centres) for task in maps), strict=True)
        total = np.sum(counts, 0)
        new = np.where(total[:, None] > 0, np.sum(sums, 0) / np.maximum(total, 1)[:, None], centres)
        moved = float(((new - centres) ** 2).sum())
        centres = new
        if moved <= TOLERANCE * spread:
            break
    order = np.argsort(centres[:, 0])
    counts = np.array([_in_regions(_points(task), centres[order])[0] for task in maps])
    return counts / counts.sum(1, keepdims=True), centres[order]


def _points(task: Array) -> Array:
    points = np.asarray(task, float).reshape(-1, 2)
    seen = points[(points != 0).any(1)]
    if not len(seen):
        raise EquipoiseError("a task has no point in its map.")
    return seen


def _some(points: Array, n_tasks: int, generator: np.random.Generator) -> Array:
    most = max(1, SAMPLE // n_tasks)
    if len(points) <= most:
        return points
    return points[generator.choice(len(points), most, replace=False)]


def _in_regions(points: Array, centres: Array) -> tuple[Array, Array]:
    labels = squared_distances(points, centres).argmin(1)
    m = len(centres)
    sums = np.stack([np.bincount(labels, column, m) for column in points.T], 1)
    return np.bincount(labels, minlength=m), sums
