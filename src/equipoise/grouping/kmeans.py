"""K-means and fuzzy c-means on points, with seeds of their own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
MAX_ITER = 300


@dataclass(frozen=True)
class Partition:
    """Points in groups.

    Attributes:
        labels: (n,) the group of each point.
        centres: (m, d).
        inertia: sum over points of the squared distance to the centre of their group.
    """

    labels: Array
    centres: Array
    inertia: float


def squared_distances(points: Array, centres: Array) -> Array:
    """(n, m), from differences: nothing cancels, a point on its centre has exactly 0."""
    result = np.empty((len(points), len(centres)))
    for j, centre in enumerate(centres):
        difference = points - centre
        result[:, j] = np.einsum("nd,nd->n", difference, difference)
    return result


def kmeans(
    points: Array,
    n_groups: int,
    generator: np.random.Generator,
    n_init: int,
    one_by_one: bool = False,
) -> Partition:
    """The best of `n_init` descents (Lloyd) from k-means++ centres (Arthur & Vassilvitskii 2007).

    Groups are numbered in the order of their first point.

    Args:
        points: (n, d) float64.
        n_groups: at most as many as there are different points.
        generator: of the starts.
        n_init: number of starts.
        one_by_one: whether single points move on where Lloyd's descent has ended: it comes nearer
            to the best partition, at a price that only few points are worth.
    """
    best = None
    for _ in range(n_init):
        found = lloyd(points, spread_out(points, n_groups, generator))
        if one_by_one:
            found = single_moves(points, found)
        if best is None or found.inertia < best.inertia * (1 - 1e-12):
            best = found
    assert best is not None
    return in_order(best)


def spread_out(points: Array, n_groups: int, generator: np.random.Generator) -> Array:
    """(m, d) centres by k-means++: each next one is a point, likelier the farther from the last."""
    chosen = [int(generator.integers(len(points)))]
    nearest = squared_distances(points, points[chosen])[:, 0]
    while len(chosen) < n_groups:
        total = np.cumsum(nearest)
        # Strictly below the total, so that a point at distance 0 is never drawn.
        at = int(np.searchsorted(total, generator.random() * total[-1], side="right"))
        chosen.append(min(at, int(nearest.nonzero()[0][-1])))
        nearest = np.minimum(nearest, squared_distances(points, points[chosen[-1:]])[:, 0])
    return points[chosen]


def lloyd(points: Array, centres: Array) -> Partition:
    """Descend until no point changes its group; an empty group takes the farthest point."""
    m = len(centres)
    labels = None
    for _ in range(MAX_ITER):
        distances = squared_distances(points, centres)
        new = distances.argmin(1)
        own = distances[np.arange(len(points)), new]
        for j in np.setdiff1d(np.arange(m), new):
            sizes = np.bincount(new, minlength=m)
            far = int(np.where(sizes[new] > 1, own, -1.0).argmax())
            new[far], own[far] = j, 0.0
        if labels is not None and np.array_equal(new, labels):
            break
        labels = new
        centres = means(points, labels, m)
    assert labels is not None
    difference = points - centres[labels]
    return Partition(labels, centres, float(np.einsum("nd,nd->", difference, difference)))


def single_moves(points: Array, found: Partition) -> Partition:
    """Move the one point whose move lowers the inertia most, until none does (Hartigan 1975).

    The centre of a group comes along with a point that leaves it, which Lloyd's descent does not
    see: among few points in many dimensions it ends early.
    """
    labels, centres, m = found.labels.copy(), found.centres.copy(), len(found.centres)
    everybody = np.arange(len(points))
    inertia = found.inertia
    while m > 1:
        squared = squared_distances(points, centres)
        sizes = np.bincount(labels, minlength=m)
        own = sizes[labels]
        loss = squared * sizes / (sizes + 1)
        gain = (squared[everybody, labels] * own / np.maximum(own - 1, 1))[:, None] - loss
        gain[everybody, labels] = 0
        gain[own == 1] = 0
        i, j = np.unravel_index(int(gain.argmax()), gain.shape)
        if gain[i, j] <= 1e-12 * inertia:
            break
        labels[i] = j
        centres = means(points, labels, m)
        inertia -= gain[i, j]
    difference = points - centres[labels]
    return Partition(labels, centres, float(np.einsum("nd,nd->", difference, difference)))


def means(points: Array, labels: Array, m: int) -> Array:
    """(m, d) mean of each group, which for equal points is that point to the last bit."""
    centres = np.empty((m, points.shape[1]))
    for j in range(m):
        own = points[labels == j]
        centres[j] = own[0] + (own - own[0]).mean(0)
    return centres


def in_order(found: Partition) -> Partition:
    """The same groups, numbered in the order of their first point."""
    _, first = np.unique(found.labels, return_index=True)
    order = np.argsort(first)  # order[new] = old
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return Partition(rank[found.labels], found.centres[order], found.inertia)


def cmeans(
    points: Array,
    centres: Array,
    fuzziness: float,
    memberships_of: Callable[[Array], Array],
    tolerance: float,
    max_iter: int,
) -> tuple[Array, Array]:
    """Fuzzy c-means (Bezdek 1981) from given centres: (n, m) memberships, (m, n) centre weights.

    Centres are c_j = sum_i w_ij^F x_i / sum_i w_ij^F, until the sum of the squares of their moves
    is at most `tolerance` times the mean squared length of the points.

    Args:
        points: (n, d), centred.
        centres: (m, d) to begin with.
        fuzziness: F > 1.
        memberships_of: from (n, m) distances to (n, m) memberships.
        tolerance: relative.
        max_iter: a warning says if it was not enough.
    """
    scale = float(np.einsum("nd,nd->", points, points)) / len(points)
    weights = np.empty((len(centres), len(points)))
    for _ in range(max_iter):
        shares = memberships_of(np.sqrt(squared_distances(points, centres)))
        highest = shares.max(0)
        # Scaled, or high powers vanish. A centre that nobody belongs to is nowhere: to the middle.
        powers = np.where(highest > 0, shares / np.where(highest > 0, highest, 1), 1) ** fuzziness
        weights = (powers / powers.sum(0)).T
        new = weights @ points
        moved = float(((new - centres) ** 2).sum())
        centres = new
        if moved <= tolerance * scale:
            break
    else:
        warnings.warn(
            f"fuzzy c-means still moves after {max_iter} iterations; raise max_iter.", stacklevel=4
        )
    return memberships_of(np.sqrt(squared_distances(points, centres))), weights
