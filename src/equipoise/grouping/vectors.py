"""From vectors, inner products or affinities of tasks to a few coordinates with the distances."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from equipoise.errors import EquipoiseError

Array = np.ndarray
Given = Literal["auto", "gram", "vectors"]
BLOCK = 1 << 20
"""Numbers that are held in double precision at a time."""
ROUNDING = 1e-13
"""Squared distances below this, relative to squared lengths, are those of equal vectors."""


def centred_gram(given: Any, what: Given = "auto") -> Array:
    """(T, T) float64 inner products of task vectors, centred over the tasks.

    Args:
        given: (T, T) inner products, or T vectors of any shape (T, ...), tensor or array.
        what: which of the two; "auto": a symmetric square matrix holds inner products.

    Raises:
        EquipoiseError: a value that is not finite, something else than T rows, or a matrix of
            inner products that is not symmetric.
    """
    if what not in ("auto", "gram", "vectors"):
        raise ValueError(f"given is {what!r}; give 'auto', 'gram' or 'vectors'.")
    x = _array(given)
    if x.ndim < 2 or not x.size:
        raise EquipoiseError(f"tasks have shape {x.shape}; give (T, T) or vectors (T, ...).")
    x = x.reshape(len(x), -1)
    symmetric = x.shape[0] == x.shape[1] and _symmetric(x)
    if what == "gram" and not symmetric:
        raise EquipoiseError(f"inner products of shape {x.shape} must be symmetric (T, T).")
    if what == "gram" or (what == "auto" and symmetric):
        k = x.astype(float)
    else:
        # A block of columns at a time, each centred before it is multiplied.
        k = np.zeros((len(x), len(x)))
        size = max(1, BLOCK // len(x))
        for start in range(0, x.shape[1], size):
            piece = x[:, start : start + size].astype(float)
            piece -= piece.mean(0)
            k += piece @ piece.T
    if not np.isfinite(k).all():
        raise EquipoiseError("the vectors or inner products of tasks hold NaN or infinity.")
    k = (k + k.T) / 2
    return k - k.mean(0) - k.mean(1, keepdims=True) + k.mean()


def _array(given: Any) -> Array:
    if not isinstance(given, Tensor):
        return np.asarray(given)
    exact = given.dtype in (torch.float32, torch.float64)
    return (given if exact else given.to(torch.float64)).detach().cpu().numpy()


def _symmetric(x: Array) -> bool:
    x = x.astype(float)
    return bool((x.diagonal() >= 0).all() and (abs(x - x.T) <= 1e-9 * abs(x).max()).all())


def coordinates(gram: Array) -> Array:
    """(T, r) points with the inner products `gram`, up to rounding.

    Raises:
        EquipoiseError: no points have such inner products (a negative eigenvalue).
    """
    values, vectors = np.linalg.eigh(gram)
    largest = max(values[-1], 0.0)
    if values[0] < -1e-8 * max(largest, -values[0]):
        raise EquipoiseError(
            f"the matrix has the eigenvalue {values[0]:.3g}, so it holds no inner products. Give "
            "affinities through affinity_gram."
        )
    keep = values > len(values) * np.finfo(float).eps * largest
    return vectors[:, keep] * np.sqrt(values[keep])


def pairwise(gram: Array) -> Array:
    """(T, T) Euclidean distances between tasks from their inner products; 0 below rounding."""
    square = np.diagonal(gram)
    squared = square[:, None] + square[None, :] - 2 * gram
    rounding = ROUNDING * (square[:, None] + square[None, :])
    return np.sqrt(np.where(squared > rounding, squared, 0.0))


def first_equal(gram: Array) -> Array:
    """(T,) for each task the first one with the same vector, itself if there is none before."""
    return (pairwise(gram) > 0).argmin(1)


def affinity_gram(affinity: Any, *, diagonal: bool = True) -> Tensor:
    """Inner products of task vectors that are the nearer, the higher the tasks' affinity is.

    Distances are d_ij^2 = 2 (a - S_ij), S = (A + A^T) / 2, with a its largest entry: for cosines
    d_ij^2 = 2 (1 - cos), the distance of the unit gradients. Where no points have such distances
    (lookahead affinities), all d_ij^2 grow by the smallest constant with which some have, which
    changes neither the best partition into k groups nor the order of the distances (constant shift
    embedding; Roth et al., IEEE PAMI 2003).

    Args:
        affinity: (T, T), not necessarily symmetric.
        diagonal: True: a may be an entry of the diagonal, as it is for cosines, which say with 1
            where the distance is 0. False: only of the others, for lookahead affinities: how much
            a task helps itself would put all tasks at nearly the same distance from each other.

    Returns:
        (T, T) float64, for `cluster`, `silhouette` and the others.

    Raises:
        EquipoiseError: not a square matrix, or an entry that is not finite.
    """
    a = _array(affinity).astype(float)
    if a.ndim != 2 or a.shape[0] != a.shape[1]:
        raise EquipoiseError(f"affinities are {a.shape}; give (T, T).")
    if not np.isfinite(a).all():
        i, j = np.argwhere(~np.isfinite(a))[0]
        raise EquipoiseError(f"the affinity [{i}, {j}] is {a[i, j]}; affinities must be finite.")
    s = (a + a.T) / 2
    beside = ~np.eye(len(s), dtype=bool)
    np.fill_diagonal(s, s.max() if diagonal or len(s) == 1 else s[beside].max())
    s = s - s.mean(0) - s.mean(1, keepdims=True) + s.mean()
    lowest = np.linalg.eigvalsh(s)[0]
    if lowest < 0:
        n = len(s)
        s = s - lowest * (np.eye(n) - 1 / n)
    return torch.from_numpy(s)
