"""Grouping of tasks by their data maps, slow and literal: everything is stored and tried.

From the STG-MTL paper (arXiv 2307.03374), with the index of eq. 2 corrected: the sums run over
the clusters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np

# ------------------------------------------------------------------------------- data maps


class StoredMaps:
    """Keep every probability that was ever seen, and look through all of them when asked."""

    def __init__(self, n_tasks: int, n_samples: int, epochs: Sequence[int], ddof: int = 0) -> None:
        """`epochs` are the numbers of completed epochs after which a map is drawn."""
        self.shape = (n_tasks, n_samples)
        self.epochs, self.ddof = list(epochs), ddof
        self.seen: list[list[tuple[int, int, float]]] = [[]]  # epoch -> (task, sample, p)

    def update(self, true_class_probability: np.ndarray, index: np.ndarray) -> None:
        """Write down p[b, t] for the sample index[b]; NaN says that task t has no label there."""
        for row, sample in zip(np.asarray(true_class_probability), index, strict=True):
            for task, p in enumerate(row):
                if not math.isnan(p):
                    self.seen[-1].append((task, int(sample), float(p)))

    def end_epoch(self) -> None:
        """Start the list of another epoch."""
        self.seen.append([])

    def values(self, task: int, sample: int, epochs: int) -> list[float]:
        """Return all that a task has given to a sample in the first epochs."""
        return [p for epoch in self.seen[:epochs] for t, s, p in epoch if (t, s) == (task, sample)]

    def map_after(self, epochs: int) -> np.ndarray:
        """Return (T, N, 2): mean and deviation over all epochs from the start."""
        out = np.zeros((*self.shape, 2))
        for task in range(self.shape[0]):
            for sample in range(self.shape[1]):
                out[task, sample] = mean_and_deviation(self.values(task, sample, epochs), self.ddof)
        return out

    def maps(self) -> np.ndarray:
        """Return (T, e, N, 2)."""
        return np.stack([self.map_after(epochs) for epochs in self.epochs], axis=1)

    def filled(self) -> np.ndarray:
        """Return the maps, a task being the mean of the others wherever it has seen nothing."""
        out = self.maps()
        for k, epochs in enumerate(self.epochs):
            for sample in range(self.shape[1]):
                seen = [t for t in range(self.shape[0]) if self.values(t, sample, epochs)]
                for task in set(range(self.shape[0])) - set(seen):
                    out[task, k, sample] = np.mean([out[t, k, sample] for t in seen] or [[0, 0]], 0)
        return out

    def gram(self, centred: bool = False) -> np.ndarray:
        """Return the (T, T) inner products of the flattened maps."""
        return gram(self.filled().reshape(self.shape[0], -1), centred)


def mean_and_deviation(values: Sequence[float], ddof: int = 0) -> tuple[float, float]:
    """Return mu and sigma in exact arithmetic up to the root; 0 where nothing would be left."""
    if not values:
        return 0.0, 0.0
    exact = [Fraction(v) for v in values]
    mean = sum(exact) / len(exact)
    if len(exact) <= ddof:
        return float(mean), 0.0
    square = sum((v - mean) ** 2 for v in exact) / (len(exact) - ddof)
    return float(mean), math.sqrt(square)


def gram(vectors: np.ndarray, centred: bool = False) -> np.ndarray:
    """Return X X^T in extended precision, of the vectors less their mean if centred."""
    x = np.asarray(vectors, dtype=np.longdouble)
    if centred:
        x = x - x.mean(axis=0)
    return np.array([[float((a * b).sum()) for b in x] for a in x])


def true_probability(logit: float, label: float) -> float:
    """Return p of the true class of a binary head: 1 - |y - sigmoid(o)|."""
    sigmoid = 1 / (1 + math.exp(-logit)) if logit > -700 else 0.0
    return 1 - abs(label - sigmoid)


# ------------------------------------------------------------------------------ memberships


def memberships(distances: np.ndarray, fuzziness: float = 2.0) -> np.ndarray:
    """Return w_ij = 1 / sum_k (d_ij / d_ik)^(2 / (F - 1)), in 60 decimal digits (eq. 2).

    A task on top of some centres belongs to these in equal shares, and to no other.
    """
    out = np.zeros(np.shape(distances))
    with localcontext() as context:
        context.prec = 60
        # Decimal reaches 10^(10^17), so that no fuzziness overflows.
        exponent = Decimal(2) / (Decimal(float(fuzziness)) - 1)
        for i, row in enumerate(np.asarray(distances, dtype=float)):
            on_top = [j for j, d in enumerate(row) if d == 0]
            for j, d in enumerate(row):
                if on_top:
                    out[i, j] = 1 / len(on_top) if j in on_top else 0.0
                    continue
                ratios = [(Decimal(float(d)) / Decimal(float(e))) ** exponent for e in row]
                out[i, j] = float(1 / sum(ratios))
    return out


def centres_of(vectors: np.ndarray, labels: Sequence[int], n_groups: int) -> np.ndarray:
    """Return the mean vector of each group; NaN for an empty one."""
    centres = np.full((n_groups, vectors.shape[1]), np.nan)
    for j in range(n_groups):
        own = [x for x, label in zip(vectors, labels, strict=True) if label == j]
        if own:
            centres[j] = np.sum(own, axis=0) / len(own)
    return centres


def distances_to(vectors: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Return (T, m) Euclidean distances."""
    return np.array([[math.sqrt(((x - c) ** 2).sum()) for c in centres] for x in vectors])


def soft_groups(vectors: np.ndarray, labels: Sequence[int], n_groups: int, fuzziness: float = 2.0):
    """Return memberships to the centres of a hard grouping, a task alone being on its centre."""
    d = distances_to(vectors, centres_of(vectors, labels, n_groups))
    for i, label in enumerate(labels):
        if list(labels).count(label) == 1:
            d[i, label] = 0.0
    return memberships(d, fuzziness)


# ------------------------------------------------------------------------------- clustering


def partitions(n: int, m: int) -> Iterator[list[int]]:
    """Give every grouping of n things into exactly m groups, numbered by first appearance."""

    def grow(labels: list[int], used: int) -> Iterator[list[int]]:
        if len(labels) == n:
            if used == m:
                yield labels
            return
        for label in range(min(used + 1, m)):
            yield from grow([*labels, label], max(used, label + 1))

    yield from grow([], 0)


def inertia(vectors: np.ndarray, labels: Sequence[int]) -> float:
    """Return the sum of squared distances to the own centre."""
    centres = centres_of(vectors, labels, max(labels) + 1)
    return math.fsum(
        float(((x - centres[label]) ** 2).sum()) for x, label in zip(vectors, labels, strict=True)
    )


def best_groups(vectors: np.ndarray, n_groups: int) -> tuple[list[int], float, float]:
    """Return the k-means grouping of least inertia of all, its inertia, and that of the second."""
    found = sorted(
        (inertia(vectors, labels), labels) for labels in partitions(len(vectors), n_groups)
    )
    second = found[1][0] if len(found) > 1 else math.inf
    return found[0][1], found[0][0], second


def settled(vectors: np.ndarray, labels: Sequence[int], slack: float = 1e-9) -> bool:
    """Tell whether every task is nearest to its own centre: a fixed point of k-means."""
    d = distances_to(vectors, centres_of(vectors, labels, max(labels) + 1))
    return all(d[i, label] <= d[i].min() * (1 + slack) + slack for i, label in enumerate(labels))


def fuzzy_c_means(
    vectors: np.ndarray,
    centres: np.ndarray,
    fuzziness: float = 2.0,
    eps: float = 0.01,
    max_iterations: int = 300,
) -> tuple[np.ndarray, np.ndarray]:
    """Return memberships and centres of c_j = sum w^F x / sum w^F until it stands still.

    It stands still when the squared moves of all centres sum up to at most `eps`.
    """
    centres = np.array(centres, dtype=float)
    for _ in range(max_iterations):
        w = memberships(distances_to(vectors, centres), fuzziness)
        new = np.zeros_like(centres)
        for j in range(len(centres)):
            powers = [w[i, j] ** fuzziness for i in range(len(vectors))]
            new[j] = sum(p * x for p, x in zip(powers, vectors, strict=True)) / math.fsum(powers)
        moved = float(((new - centres) ** 2).sum())
        centres = new
        if moved <= eps:
            break
    return memberships(distances_to(vectors, centres), fuzziness), centres


def point_shares(labels: np.ndarray, n_groups: int) -> np.ndarray:
    """Return the share of each task's points (T, points) in every cluster."""
    return np.array([[float(np.mean(row == j)) for j in range(n_groups)] for row in labels])


def silhouette(vectors: np.ndarray, labels: Sequence[int]) -> float:
    """Return the mean of (b - a) / max(a, b); 0 for a task alone."""
    n, values = len(vectors), []
    d = distances_to(vectors, vectors)
    for i in range(n):
        own = [d[i, k] for k in range(n) if k != i and labels[k] == labels[i]]
        if not own:
            values.append(0.0)
            continue
        a = math.fsum(own) / len(own)
        others = []
        for label in set(labels) - {labels[i]}:
            away = [d[i, k] for k in range(n) if labels[k] == label]
            others.append(math.fsum(away) / len(away))
        b = min(others)
        values.append((b - a) / max(a, b) if max(a, b) > 0 else 0.0)
    return math.fsum(values) / n


# ------------------------------------------------------------------------------ specialists


def specialist_loss(losses: Sequence[float], membership: np.ndarray, group: int) -> float:
    """Return WL_j = sum_i w_ij L_i (eq. 3)."""
    return math.fsum(membership[i][group] * loss for i, loss in enumerate(losses))


def ensemble(
    logits: np.ndarray, membership: np.ndarray, average: str = "probabilities"
) -> np.ndarray:
    """Return the probabilities (T, B) of binary tasks from logits (m, T, B), eq. 4."""
    groups, tasks, samples = np.shape(logits)
    out = np.zeros((tasks, samples))
    for i in range(tasks):
        for b in range(samples):
            parts = [float(logits[j][i][b]) for j in range(groups)]
            if average == "probabilities":
                parts = [1 / (1 + math.exp(-o)) for o in parts]
            value = math.fsum(membership[i][j] * part for j, part in enumerate(parts))
            out[i, b] = value if average == "probabilities" else 1 / (1 + math.exp(-value))
    return out


def f1(predicted: Sequence[bool], label: Sequence[bool]) -> float:
    """Return 2 TP / (2 TP + FP + FN); 0 if nothing is positive anywhere."""
    pairs = [(bool(p), bool(y)) for p, y in zip(predicted, label, strict=True)]
    right, wrong, missed = (pairs.count(c) for c in ((True, True), (True, False), (False, True)))
    below = 2 * right + wrong + missed
    return 2 * right / below if below else 0.0
