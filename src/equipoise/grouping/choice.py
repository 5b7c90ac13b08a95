"""How many groups: a scan over the numbers, judged by silhouettes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from equipoise.grouping.clustering import find_groups
from equipoise.grouping.vectors import centred_gram, first_equal


@dataclass(frozen=True)
class Choice:
    """What different numbers of groups come to.

    Attributes:
        silhouettes: number of groups -> mean silhouette of the tasks.
        inertias: number of groups -> sum of the squared distances of the tasks to their centres.
    """

    silhouettes: Mapping[int, float]
    inertias: Mapping[int, float]

    @property
    def best(self) -> int:
        """The number with the highest silhouette; of equal ones the smallest."""
        return max(self.silhouettes, key=lambda n: (self.silhouettes[n], -n))


def choose(gram: Any, numbers: Iterable[int] | None = None, **options: Any) -> Choice:
    """Group by k-means for each of several numbers of groups, and judge each by its silhouettes.

    Args:
        gram: (T, T) inner products, or vectors (T, ...).
        numbers: from 2 to T - 1; None: all of them, up to 10 and to the number of different tasks;
            where all tasks are equal, 1.
        options: as in `find_groups`, all but the method "points".

    Raises:
        ValueError: fewer than three tasks, a number out of its range, or the method "points".
    """
    if options.get("method") == "points":
        raise ValueError("method is 'points', which has no silhouettes; choose by 'kmeans'.")
    k = centred_gram(gram, options.pop("given", "auto"))
    most = len(k) - 1
    if most < 2:
        raise ValueError(f"{len(k)} tasks leave no choice; give three or more.")
    wanted = () if numbers is None else tuple(numbers)
    if numbers is None:
        different = len(set(first_equal(k).tolist()))
        wanted = tuple(range(min(2, different), min(most, different, 10) + 1))
    elif not wanted or min(wanted) < 2 or max(wanted) > most:
        raise ValueError(
            f"numbers is {list(wanted)}; {len(k)} tasks leave a choice of 2 to {most}."
        )
    found = {n: find_groups(k, n, given="gram", **options) for n in wanted}
    return Choice(
        {n: float(groups.silhouettes.mean()) for n, groups in found.items()},
        {n: groups.inertia for n, groups in found.items()},
    )
