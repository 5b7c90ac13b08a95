"""The contract of an aggregator: task gradients in, one direction out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from equipoise.errors import NOT_FINITE, NonFiniteError
from equipoise.linalg import combine_rows, gram_matrix

Array = NDArray[np.float64]
EPS = float(np.finfo(np.float64).eps)


class Aggregator(nn.Module, ABC):
    """T task gradients as rows (T, P) to one direction (P,), which an optimizer then subtracts.

    Any callable of that shape may stand in its place.

    Attributes:
        never_conflicts: whether no task has a negative product with the direction, ever.
    """

    never_conflicts: bool = False

    def begin(self, present: Tensor) -> None:
        """Step calls this before anything else of a step; for methods that remember each task.

        Args:
            present: (T,) bool on the CPU, which of all tasks this step has a gradient of.
        """

    @abstractmethod
    def forward(self, rows: Tensor) -> Tensor:
        """The direction.

        Args:
            rows: (T, P), row i the gradient of task i.

        Returns:
            (P,) of the same dtype and device.
        """


class GramAggregator(Aggregator):
    """An aggregator whose direction is rows^T w with w a function of G = rows rows^T alone.

    A method implements `weights` on a float64 matrix that is finite, not zero, and scaled to mean
    diagonal 1, so that whatever tolerance it needs is a relative one. All else is done here.

    Where some combination of the gradients nearly cancels, the exact coefficients of many methods
    resolve the round-off of the rows: they are huge, and the direction is noise. Two ways out: with
    `damping` the method sees each gradient with one more entry, which no other gradient shares, of
    sqrt(damping eps) times its length. Coefficients then stay below about 1 / sqrt(eps), and all
    that the method promises holds up to sqrt(eps) times the rows. Or it overrides `weights_at`.

    Attributes:
        degree: the direction is homogeneous of this degree in the rows; 1 for nearly all.
        needs_losses: whether `coefficients` wants the T losses too.
        interval: in which share of the steps, one in so many, it looks at the gradients at all.
        damping: how many times the precision of the rows, relative, is added to the diagonal of
            the Gram matrix that `weights` gets. 0, the default, leaves it as it is.
    """

    degree: float = 1
    needs_losses: bool = False
    interval: int = 1
    damping: float = 0

    def forward(self, rows: Tensor, losses: Tensor | None = None) -> Tensor:
        """The direction, as in `Aggregator`; `losses` (T,) where `needs_losses` says so."""
        if rows.dim() != 2:
            raise ValueError(f"rows must have shape (T, P), not {tuple(rows.shape)}.")
        known = self.known_coefficients(len(rows))
        if known is not None:
            direction = known.to(rows) @ rows
            if bool(torch.isfinite(direction).all()):  # else the inner products will name the row
                return direction
        gram = gram_matrix(rows).cpu()
        w = self.coefficients(gram, losses, eps=torch.finfo(rows.dtype).eps)
        return combine_rows(rows, w, gram)

    def coefficients(
        self, gram: Tensor, losses: Tensor | None = None, *, eps: float = EPS
    ) -> Tensor:
        """The T coefficients w of the direction rows^T w.

        Args:
            gram: (T, T) inner products of the task gradients.
            losses: (T,), for the methods that need them.
            eps: relative precision of the entries of the gradients, `torch.finfo(dtype).eps`: what
                lies below it is not resolved.

        Returns:
            (T,) float64 on the device of `gram`; zeros if all gradients are zero.

        Raises:
            NonFiniteError: a gradient is NaN or infinite; names the row.
            ValueError: `gram` is not square, or losses are needed and missing.
        """
        if gram.dim() != 2 or gram.shape[0] != gram.shape[1]:
            raise ValueError(f"gram must have shape (T, T), not {tuple(gram.shape)}.")
        if self.needs_losses and losses is None:
            raise ValueError(f"{self} needs the losses as well as the gradients.")
        matrix = gram.detach().to("cpu", torch.float64).numpy()  # the one copy to the host
        _refuse_non_finite(matrix)
        scale = float(matrix.trace()) / len(matrix)
        if scale == 0:
            return gram.new_zeros(len(matrix), dtype=torch.float64)
        values = None if losses is None else losses.detach().to("cpu", torch.float64).numpy()
        matrix = matrix / scale
        if self.damping and eps > EPS:  # what double precision would add is round-off itself
            matrix.flat[:: len(matrix) + 1] *= 1 + self.damping * eps
        w = self.weights_at(matrix, values, eps)
        if self.degree != 1:
            w = w * scale ** ((self.degree - 1) / 2)
        return torch.from_numpy(np.ascontiguousarray(w)).to(gram.device)

    @abstractmethod
    def weights(self, gram: Array, losses: Array | None) -> Array:
        """The method itself: coefficients (T,) from the scaled Gram matrix (T, T)."""

    def weights_at(self, gram: Array, losses: Array | None, eps: float) -> Array:
        """`weights`, for gradients whose entries are known to a relative precision `eps`.

        A method overrides it to count as zero what lies below that; the default does not look.
        """
        return self.weights(gram, losses)

    def known_coefficients(self, n_tasks: int) -> Tensor | None:
        """The coefficients, if they do not depend on this step's gradients; else None.

        Where they are known a step needs one backward, and no rows at all.
        """
        return None


def _refuse_non_finite(gram: Array) -> None:
    if not math.isfinite(np.vdot(gram, gram)) and not np.isfinite(gram).all():
        bad = ~np.isfinite(np.diagonal(gram))
        row = int(bad.argmax()) if bad.any() else int((~np.isfinite(gram)).any(1).argmax())
        raise NonFiniteError(row, NOT_FINITE)
