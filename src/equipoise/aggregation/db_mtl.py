"""DB-MTL: averaged gradients of the log losses, all at the length of the longest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from equipoise.aggregation.base import Aggregator
from equipoise.aggregation.max_norm import MaxNorm
from equipoise.errors import EquipoiseError


class DBMTL(Aggregator):
    """Dual balancing, gradient part: MaxNorm of a moving average of each task's gradient.

    Lin et al., arXiv 2308.12029, algorithm 1: a_i becomes b a_i + (1 - b) g_i, from a_i = 0, and
    d = sum_i (max_j |a_j| / |a_i|) a_i, with b = beta / k^decay the k-th time the task is present.

    The method's loss part is the logarithm, which is SI: the recipe `db-mtl` is this aggregator
    with SI as its weighting, unless it names another. LibMTL adds 1e-8 inside the logarithm and to
    the norms.

    Args:
        n_tasks: number of tasks T.
        beta: how much of the average stays, at least 0 and less than 1. For 0 take MaxNorm, which
            does the same for less.
        decay: how b falls with the steps; 0, as by default in LibMTL, for not at all.

    Raises:
        ValueError: a parameter out of its range.
        EquipoiseError: at the call, the number of rows is not that of the present tasks: T, or as
            `begin` has said.

    Unanimity value T (1 - b) g at the first step, T g in the long run: the average starts at 0. A
    task whose average is zero takes no part. May conflict with the gradients of the step. Passes:
    one trunk forward and T backwards a step. Memory: 4 T x P: the rows, the average
    before and after, and a copy in case the step has to be undone. An absent task keeps its
    average, and adds nothing.
    """

    average: Tensor
    steps: Tensor

    def __init__(self, n_tasks: int, beta: float = 0.9, decay: float = 0.0) -> None:
        super().__init__()
        if n_tasks < 1:
            raise ValueError(f"n_tasks is {n_tasks}; give the number of tasks.")
        if not 0 <= beta < 1:
            raise ValueError(f"beta is {beta}; it must be at least 0 and less than 1.")
        if not decay >= 0:
            raise ValueError(f"decay is {decay}; it must not be negative.")
        self.n_tasks = n_tasks
        self.beta = beta
        self.decay = decay
        self.register_buffer("average", torch.zeros(0, 0, device="cpu"))
        self.register_buffer("steps", torch.zeros(n_tasks, dtype=torch.int64, device="cpu"))
        self._present: Tensor | None = None

    def begin(self, present: Tensor) -> None:
        """The rows of the next call are those of the present tasks."""
        self._present = present

    def forward(self, rows: Tensor) -> Tensor:
        """The direction (P,), from the rows (T, P) of this step and what is remembered."""
        if rows.dim() != 2:
            raise ValueError(f"rows must have shape (T, P), not {tuple(rows.shape)}.")
        all_tasks = torch.ones(self.n_tasks, dtype=torch.bool, device="cpu")
        present = all_tasks if self._present is None else self._present
        if len(rows) != int(present.sum()):
            raise EquipoiseError(
                f"DBMTL averages the gradients of {self.n_tasks} tasks, of which "
                f"{int(present.sum())} are present, but there are {len(rows)} rows."
            )
        average = self.average.to(rows)
        if average.shape != (self.n_tasks, rows.shape[1]):
            average = rows.new_zeros(self.n_tasks, rows.shape[1])
        steps = self.steps.cpu() + present
        stays = (self.beta / steps[present].to(torch.float64) ** self.decay).to(rows)
        everyone = bool(present.all())  # then nothing need be picked out, or put back
        fresh = torch.lerp(rows, average if everyone else average[present], stays[:, None])
        direction = MaxNorm()(fresh)  # refuses what is not finite, before it is kept
        self.average = fresh if everyone else average.index_put((present.to(rows.device),), fresh)
        self.steps, self._present = steps, None
        return direction

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        saved = state_dict.get(prefix + "average")
        if saved is not None:  # the shape and the dtype are known from the first rows only
            self.average = torch.empty_like(saved, device=self.average.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
