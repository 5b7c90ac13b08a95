"""How many pairs of tasks pull against each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from equipoise.diagnostics.relative import MeasureError


def conflict_share(gram: Any) -> float | Tensor:
    """Percent of task pairs whose gradients have a negative inner product.

    100 #{i < j : G_ij < 0} / (T (T - 1) / 2), with G_ij the inner product of the gradients of tasks
    i and j. The percentage of gradient conflicts is drawn over training by Phan et al.
    (arXiv 2211.13723, figure 3), who give no formula; this is the plain reading. No tolerance: a
    product that is a rounding error below 0 counts.

    Args:
        gram: (T, T), or a stack (..., T, T); cosines give the same answer. Only the part above
            the diagonal is read. A tensor, an array or nested lists.

    Returns:
        A float from 0 to 100 for one matrix; for a stack, a float64 CPU tensor of shape (...).
        One task alone has no pair: 0.

    Raises:
        MeasureError: not square, no task, or a number above the diagonal that is not finite.
    """
    gram = torch.as_tensor(gram)
    if gram.dim() < 2 or gram.shape[-1] != gram.shape[-2] or not gram.shape[-1]:
        raise MeasureError(f"gram has shape {tuple(gram.shape)}; (..., T, T) is needed.")
    n_tasks = gram.shape[-1]
    i, j = torch.triu_indices(n_tasks, n_tasks, offset=1, device=gram.device)
    pairs = gram.detach()[..., i, j]
    if not bool(pairs.isfinite().all()):
        raise MeasureError("gram holds a number that is not finite.")
    share = 100 * (pairs < 0).sum(-1).double().cpu() / max(len(i), 1)
    return float(share) if gram.dim() == 2 else share
