"""Gradients that nearly cancel, on their way through a Step, at each level."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import equipoise as eq
from equipoise.testing import nearly_stationary_rows

AGGREGATORS: dict[str, Callable] = {
    "UPGrad": eq.UPGrad,
    "DualProj": eq.DualProj,
    "MGDA": eq.MGDA,
    "EDM": eq.EDM,
    "IMTL-G": eq.IMTLG,
    "CAGrad": lambda: eq.CAGrad(c=1.0),
    "Aligned-MTL": eq.AlignedMTL,
    "ConFIG": eq.ConFIG,
}
CONFLICT_FREE = ("UPGrad", "DualProj", "MGDA", "EDM", "CAGrad")
PROBLEMS = [(3, 1), (3, 2), (5, 3), (20, 10), (20, 19), (40, 7)]
BOUND = 4e-4
"""Of the longest row, as SPECS E.0 has it for single precision."""


class Point(nn.Module):
    """A trunk that is one vector, whatever its input."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.zeros(width, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.at[None]


def direction(rows: Tensor, aggregator: Callable, level: str) -> Tensor:
    """Of a step whose task gradients are these rows."""
    tasks = [f"t{k}" for k in range(len(rows))]
    trunk = Point(rows.shape[1], rows.dtype)
    losses = {t: lambda z, y: (z[0] * y[0]).sum() for t in tasks}
    model = eq.SharedTrunk(trunk, {t: nn.Identity() for t in tasks})
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    step = eq.Step(model, losses, optimizer, None, aggregator, level=level)
    step(torch.zeros(1), {t: row[None] for t, row in zip(tasks, rows, strict=True)})
    return trunk.at.grad.double()


@pytest.mark.parametrize("level", ["parameters", "features"])
@pytest.mark.parametrize("name", AGGREGATORS)
def test_promises_hold(name: str, level: str) -> None:
    worst = 0.0
    for seed, (n_tasks, rank) in enumerate(PROBLEMS):
        for zeros in {0, min(1, n_tasks - 2)}:
            generator = torch.Generator().manual_seed(seed)
            rows, _ = nearly_stationary_rows(n_tasks, rank, zeros=zeros, generator=generator)
            size = float(rows.norm(dim=1).max())
            d = direction(rows, AGGREGATORS[name](), level)
            order = torch.randperm(n_tasks, generator=generator)
            other = direction(rows[order], AGGREGATORS[name](), level)
            assert float((d - other).norm()) <= BOUND * size, (n_tasks, rank)
            if name in CONFLICT_FREE:
                worst = min(worst, float((rows.double() @ d / rows.norm(dim=1)).min()) / size)
    assert worst >= -BOUND
