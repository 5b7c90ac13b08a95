"""How well tasks lie in their groups, and the tree of tasks."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.cluster.hierarchy as hierarchy
import torch
from scipy.spatial.distance import squareform
from torch import Tensor

from equipoise.grouping.vectors import Array, Given, centred_gram, pairwise


def silhouette(gram: Any, labels: Any, given: Given = "auto") -> Tensor:
    """How much nearer each task is to its own group than to the next one (Rousseeuw 1987).

    s_i = (b - a) / max(a, b), with a the mean distance to the others of its group, b the smallest
    mean distance to another group. 1: well placed; 0: between two groups; below: misplaced. A task
    that is alone in its group has 0.

    Args:
        gram: (T, T) inner products, or vectors (T, ...).
        labels: (T,) the group of each task.
        given: what `gram` is, as in `find_groups`.

    Returns:
        (T,) float64; its mean judges the grouping.

    Raises:
        ValueError: other than T labels, or fewer than two groups.
    """
    labels = np.asarray(labels)
    apart = pairwise(centred_gram(gram, given))
    if labels.shape != (len(apart),):
        raise ValueError(f"labels have shape {labels.shape}; give ({len(apart)},).")
    if len(np.unique(labels)) < 2:
        raise ValueError("there is one group only; a silhouette compares at least two.")
    return torch.from_numpy(silhouette_of(apart, labels))


def silhouette_of(apart: Array, labels: Array) -> Array:
    """(T,) from (T, T) distances; 0 for all where there is one group only."""
    groups = np.unique(labels)
    if len(groups) < 2:
        return np.zeros(len(labels))
    members = labels[None, :] == groups[:, None]
    totals = apart @ members.T.astype(float)
    own = members.argmax(0)
    sizes = members.sum(1)
    everybody = np.arange(len(labels))
    a = totals[everybody, own] / np.maximum(sizes[own] - 1, 1)
    means = totals / sizes
    means[everybody, own] = np.inf
    b = means.min(1)
    larger = np.maximum(a, b)
    s = np.divide(b - a, larger, out=np.zeros_like(larger), where=larger > 0)
    return np.where(sizes[own] > 1, s, 0.0)


def linkage(gram: Any, method: str = "average", given: Given = "auto") -> Array:
    """The tree of tasks, for `scipy.cluster.hierarchy.dendrogram`: (T - 1, 4).

    Args:
        gram: (T, T) inner products, or vectors (T, ...).
        method: as in scipy; "average", "ward", "complete", "single", ...
        given: what `gram` is, as in `find_groups`.
    """
    apart = pairwise(centred_gram(gram, given))
    return hierarchy.linkage(squareform(apart, checks=False), method)
