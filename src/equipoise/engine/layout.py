"""Where gradients lie: which parameters they reach, and the places of sparse ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from equipoise.engine.gradients import Gradients


class Layout:
    """What gradients of several losses had in common, to be given to what is made of them.

    A parameter that no gradient reaches gets none; one that sparse ones alone reach gets a sparse
    one, of which SparseAdam moves what has a place, also where the gradient there is zero.

    Args:
        n: how many parameters there are.
    """

    def __init__(self, n: int) -> None:
        self._reached = [False] * n
        self._dense = [False] * n
        self._places: list[list[Tensor]] = [[] for _ in range(n)]

    def note(self, k: int, gradient: Tensor) -> None:
        """Take note of a gradient of the k-th parameter."""
        self._reached[k] = True
        if gradient.is_sparse:
            self._places[k].append(gradient._indices())
        else:
            self._dense[k] = True

    def flags(self) -> list[float]:
        """Numbers that are to be summed over the processes, and given to `gradients`."""
        dims = [{len(places) for places in of_one} for of_one in self._places]
        dense = [dense or len(d) > 1 for dense, d in zip(self._dense, dims, strict=True)]
        return [*map(float, self._reached + dense), *map(float, map(bool, dims)), *map(sum, dims)]

    def gradients(
        self,
        parameters: Sequence[Tensor],
        pieces: Sequence[Tensor],
        flags: Sequence[float],
        summed: Callable[[Tensor], Tensor],
    ) -> Gradients:
        """Gradients as each parameter has them.

        Args:
            parameters: all of them.
            pieces: a dense one for each, in its shape.
            flags: the sums of `flags`.
            summed: gives the sum over the processes.
        """
        n, found = len(parameters), Gradients()
        for k, (p, piece) in enumerate(zip(parameters, pieces, strict=True)):
            reached, dense, holders, dims = flags[k::n]
            if not reached:
                found.append(None)
                continue
            piece = piece.to(p.dtype)
            if holders and not dense and dims % holders == 0 and piece.numel():
                piece = self._sparse(k, piece, int(dims / holders), summed)
            found.append(piece)
        return found

    def _sparse(
        self, k: int, piece: Tensor, dim: int, summed: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The piece at the places that were noted, and wherever else it is not zero."""
        there = (piece != 0).reshape(*piece.shape[:dim], -1).any(-1)
        for places in self._places[k]:
            there[tuple(places)] = True
        there = summed(there.float()) > 0
        return torch.sparse_coo_tensor(
            there.nonzero().T,
            piece[there],
            piece.shape,
            check_invariants=False,
            is_coalesced=True,
        )
