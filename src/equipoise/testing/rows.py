"""Task gradients on which aggregators break: dependent, cancelling, of unlike lengths, zero."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


def nearly_stationary_rows(
    n_tasks: int,
    rank: int,
    *,
    zeros: int = 0,
    spread: float = 0.0,
    columns: int | None = None,
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Random task gradients that non-negative weights combine to zero, up to their round-off.

    At such a point no direction improves all tasks. The exact directions of MGDA and EDM are zero;
    those of UPGrad, DualProj and CAGrad need the rows to cancel, so that coefficients which resolve
    the round-off of the rows are huge and meaningless. An aggregator that promises to avoid
    conflict must do so here too, up to the square root of the rows' precision.

    Args:
        n_tasks: T, at least 2.
        rank: rank of the rows before rounding, from 1 to T - 1.
        zeros: how many of the weights are 0, at most T - 2.
        spread: 0 (default): every row has length 1. Otherwise the lengths are drawn between
            10^(-spread / 2) and 10^(spread / 2), uniformly in the exponent.
        columns: P, at least `rank`, which is the default.
        dtype: the dtype to which the rows are rounded.
        generator: a CPU generator for the draws; None: torch's global one.

    Returns:
        The rows (T, P), and the weights (T,) in float64, which sum to 1. The length of
        `weights @ rows` is at most about `finfo(dtype).eps` times the longest row.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> rows, weights = nearly_stationary_rows(20, 10, generator=generator)
        >>> tuple(rows.shape), rows.dtype
        ((20, 10), torch.float32)
        >>> bool((weights >= 0).all()), bool((weights @ rows.double()).norm() < 1e-6)
        (True, True)
        >>> from equipoise.aggregation import UPGrad
        >>> direction = UPGrad()(rows).double()  # the exact one is 0
        >>> bool((rows.double() @ direction).min() >= -4e-4)
        True
    """
    columns = rank if columns is None else columns
    if not 1 <= rank <= n_tasks - 1:
        raise ValueError(f"rank is {rank}; for {n_tasks} tasks it is between 1 and {n_tasks - 1}.")
    if not 0 <= zeros <= n_tasks - 2:
        raise ValueError(f"zeros is {zeros}; two of {n_tasks} tasks must keep a weight.")
    if columns < rank:
        raise ValueError(f"columns is {columns}; rank {rank} needs as many.")

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    def uniform() -> Tensor:
        return torch.rand(n_tasks, dtype=torch.float64, generator=generator)

    weights = 0.1 + uniform()
    weights[torch.randperm(n_tasks, generator=generator)[:zeros]] = 0
    inner = normal(n_tasks, rank)
    inner -= torch.outer(weights, weights @ inner) / (weights @ weights)
    rows = inner @ normal(rank, columns)
    factors = 10 ** (spread * (uniform() - 0.5)) / rows.norm(dim=1)
    weights = weights / factors
    return (rows * factors[:, None]).to(dtype), weights / weights.sum()


def kinds_of_rows(n_tasks: int) -> Iterator[tuple[str, Tensor]]:
    """Task gradients of all kinds: independent, dependent, opposite, collinear, zero.

    The same for the same T at each call.

    Args:
        n_tasks: T, at least 1.

    Yields:
        The name of a kind, and float64 rows (T, P) of it. Their lengths are about 1 unless the
        name says otherwise.

    Example:
        >>> dict(kinds_of_rows(3))["zero"].tolist()
        [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """
    rng = np.random.default_rng(n_tasks)
    width = n_tasks + 20

    def fresh(columns: int = width) -> np.ndarray:
        return rng.normal(size=(n_tasks, columns)) / np.sqrt(columns)

    found = {
        "independent": fresh(),
        "agreeing": np.abs(fresh()),
        "few parameters": fresh(max(1, n_tasks // 2)),
        "one parameter": fresh(1),
        "rank one": np.outer(rng.normal(size=n_tasks), rng.normal(size=5)),
        "alike": np.tile(rng.normal(size=7), (n_tasks, 1)),
        "lengths from 1e-5 to 1e5": fresh() * 10 ** rng.uniform(-5, 5, size=(n_tasks, 1)),
        "zero": np.zeros((n_tasks, 3)),
    }
    for name, change in {
        "a zero row": lambda rows: 0 * rows[0],
        "opposite": lambda rows: -rows[0],
        "collinear": lambda rows: 3 * rows[0],
        "nearly collinear": lambda rows: (1 + 1e-9) * rows[0] + 1e-9 * rows[-1],
        "nearly opposite": lambda rows: -rows[0] + 1e-5 * rows[-1],
    }.items():
        rows = fresh()
        rows[-1] = change(rows)
        found[name] = rows
    for name, rows in found.items():
        yield name, torch.from_numpy(np.ascontiguousarray(rows))
