"""Which tasks belong together: groups of task vectors, and how much each task belongs to each."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from equipoise.errors import EquipoiseError
from equipoise.grouping.groups import Groups
from equipoise.grouping.kmeans import cmeans, kmeans, squared_distances
from equipoise.grouping.points import shares_of_points
from equipoise.grouping.silhouettes import silhouette_of
from equipoise.grouping.vectors import (
    ROUNDING,
    Array,
    Given,
    centred_gram,
    coordinates,
    first_equal,
    pairwise,
)

Method = Literal["kmeans", "hard", "cmeans", "points"]


def memberships(distances: Any, fuzziness: float = 2.0) -> Tensor:
    """w_ij = d_ij^(-2/(F-1)) / sum_k d_ik^(-2/(F-1)) (STG-MTL, arXiv 2307.03374, eq. 1-2).

    The sum runs over the groups; the paper prints the number of tasks as its end. A task at
    distance 0 belongs to the centres there in equal parts, and to no other. Computed from
    logarithms, so that no distance and no F overflows.

    Args:
        distances: (T, m), Euclidean, of each task to each centre.
        fuzziness: F > 1; near 1 the nearest centre takes all, for large F all take the same.

    Returns:
        (T, m) float64 with rows that sum to 1.

    Raises:
        ValueError: F not above 1, or a distance that is negative or no number.
    """
    if not fuzziness > 1:
        raise ValueError(
            f"fuzziness is {fuzziness}; it must be above 1. For hard groups use 'hard'."
        )
    d = torch.as_tensor(distances).detach().to(torch.float64)
    if not bool((d >= 0).all()) or bool(d.isinf().any()):
        raise ValueError("distances must be finite and not negative.")
    zero = (d == 0).to(torch.float64)
    on_top = zero.sum(-1, keepdim=True)
    soft = torch.softmax(-2 / (fuzziness - 1) * torch.where(d == 0, 1.0, d).log(), -1)
    return torch.where(on_top > 0, zero / on_top.clamp_min(1), soft)


def cluster(
    gram_or_vectors: Any,
    n_groups: int,
    fuzziness: float = 2.0,
    seed: int = 0,
    method: Method = "kmeans",
    **more: Any,
) -> Tensor:
    """How much each task belongs to each group: the `memberships` of `find_groups`.

    Args:
        gram_or_vectors: as in `find_groups`, and so the others.
        n_groups: m.
        fuzziness: F > 1.
        seed: of the starts.
        method: "kmeans", "hard", "cmeans" or "points".
        more: what `find_groups` takes besides.

    Returns:
        (T, m) float64 with rows that sum to 1.

    Raises:
        EquipoiseError, ValueError: as `find_groups`.
    """
    found = find_groups(
        gram_or_vectors, n_groups, fuzziness=fuzziness, seed=seed, method=method, **more
    )
    return found.memberships


def find_groups(
    gram_or_vectors: Any,
    n_groups: int,
    *,
    fuzziness: float = 2.0,
    seed: int = 0,
    method: Method = "kmeans",
    tasks: Sequence[str] | None = None,
    n_init: int = 20,
    given: Given = "auto",
    tolerance: float = 1e-8,
    max_iter: int = 300,
) -> Groups:
    """Put tasks into groups (STG-MTL, arXiv 2307.03374, section 3.3).

    | method   | centres                                       | memberships                    |
    |----------|-----------------------------------------------|--------------------------------|
    | "kmeans" | k-means, the best of `n_init` starts          | `memberships` of the distances |
    | "hard"   | the same                                      | 1 in the task's group, else 0  |
    | "cmeans" | fuzzy c-means, from those of k-means          | its own                        |
    | "points" | k-means of all points (mu, sigma) of the maps | share of the task's points     |

    Everything is computed from the T x T inner products, which is exact: the distances, and with
    them the groups, are those of the vectors themselves, of millions of entries. Groups are
    numbered in the order of their first task; those of "points" by the confidence of their centre.

    Args:
        gram_or_vectors: (T, T) inner products (DataMaps.gram, affinity_gram), or vectors (T, ...).
        n_groups: m, from 1 to the number of different tasks.
        fuzziness: F > 1, for soft memberships; 2 in the paper.
        seed: of the starts.
        method: see above. "points" needs maps (T, ..., 2).
        tasks: names of the tasks; None: "0", "1", ...
        n_init: number of starts.
        given: what `gram_or_vectors` is; "auto": a symmetric square matrix holds inner products.
        tolerance: of fuzzy c-means, relative: it ends when the squared moves of the centres sum to
            that much of the vectors' mean squared length. STG-MTL's code has 0.01, absolute.
        max_iter: of fuzzy c-means.

    Raises:
        EquipoiseError: something that is neither inner products nor vectors, or more groups than
            different tasks.
        ValueError: a parameter out of its range.
    """
    if method not in get_args(Method):
        raise ValueError(f"method is {method!r}; give 'kmeans', 'hard', 'cmeans' or 'points'.")
    for name, value in (("n_groups", n_groups), ("n_init", n_init)):
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name} is {value!r}; give a whole number from 1 on.")
    memberships(torch.ones(1, 1), fuzziness)  # refuses an impossible F before the work
    gram = centred_gram(gram_or_vectors, "vectors" if method == "points" else given)
    names = tuple(str(i) for i in range(len(gram))) if tasks is None else tuple(tasks)
    if len(names) != len(gram):
        raise ValueError(f"tasks has {len(names)} names for {len(gram)} tasks.")
    generator = np.random.default_rng(seed)
    if method == "points":
        shares, _ = shares_of_points(gram_or_vectors, n_groups, generator, n_init)
        labels, weights = shares.argmax(1), _mean_weights(shares)
        distances = _distances(gram, weights)
    else:
        equal_to = first_equal(gram)
        points = coordinates(gram)[equal_to]
        different = len(set(equal_to.tolist()))
        if n_groups > different:
            raise EquipoiseError(
                f"{n_groups} groups of {len(gram)} tasks, of which {different} are different; give "
                f"at most {different}."
            )
        found = kmeans(points, n_groups, generator, n_init, one_by_one=True)
        labels = found.labels
        weights = _mean_weights(np.eye(n_groups)[labels])
        distances = _snapped(points, found.centres, gram)
        shares = memberships(distances, fuzziness).numpy()
        if method == "hard":
            shares = np.eye(n_groups)[labels]
        elif method == "cmeans":
            shares, weights = cmeans(
                points,
                found.centres,
                fuzziness,
                lambda d: memberships(d, fuzziness).numpy(),
                tolerance,
                max_iter,
            )
            labels = shares.argmax(1)
            distances = _snapped(points, weights @ points, gram)
    return Groups(
        tasks=names,
        method=method,
        labels=torch.from_numpy(labels.astype(np.int64)),
        memberships=torch.from_numpy(np.ascontiguousarray(shares)),
        distances=torch.from_numpy(distances),
        centres=torch.from_numpy(weights),
        silhouettes=torch.from_numpy(silhouette_of(pairwise(gram), labels)),
        inertia=float((distances[np.arange(len(labels)), labels] ** 2).sum()),
    )


def _mean_weights(shares: Array) -> Array:
    """(m, T) the centres as weighted means of the tasks; all alike for a group of nobody."""
    total = shares.sum(0)
    nobody = total == 0
    return (np.where(nobody, 1 / len(shares), shares) / np.where(nobody, 1, total)).T


def _distances(gram: Array, weights: Array) -> Array:
    points = coordinates(gram)
    return _snapped(points, weights @ points, gram)


def _snapped(points: Array, centres: Array, gram: Array) -> Array:
    """(T, m) distances, exactly 0 where they are below the rounding of the inner products."""
    squared = squared_distances(points, centres)
    rounding = ROUNDING * float(np.diagonal(gram).max(initial=0.0))
    return np.where(squared > rounding, np.sqrt(squared), 0.0)
