"""Which numbers of a row of task gradients belong to which parameter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from equipoise.engine.gradients import Gradients
from equipoise.engine.wrappers import is_spread
from equipoise.errors import EquipoiseError
from equipoise.linalg import real, shaped


class Columns:
    """The P columns of rows: dense and real, two for each complex number.

    Args:
        parameters: the shared parameters, in the order of the columns.

    Attributes:
        total: P.
        dtype: of rows: that of the parameters, but single precision for half-precision ones.
        device: of rows.

    Raises:
        EquipoiseError: the parameters lie on several devices, or are spread over processes.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        devices = {p.device for p in parameters}
        if len(devices) > 1:
            raise EquipoiseError(
                f"the shared parameters lie on several devices ({sorted(map(str, devices))}); "
                "rows need them on one."
            )
        if any(is_spread(p) for p in parameters):
            raise EquipoiseError(
                "a shared parameter is a DTensor, spread over processes (fully_shard, tensor "
                "parallelism); rows need it whole. Use a module without them."
            )
        self.parameters = list(parameters)
        self._sizes = [p.numel() * (1 + p.is_complex()) for p in parameters]
        self._shapes = [real(p.detach()).shape for p in parameters]
        self.total = sum(self._sizes)
        self.dtype = _dtype_of(parameters)
        self.device = devices.pop() if devices else torch.device("cpu")

    def fit(self, parameters: Sequence[Tensor]) -> bool:
        """Whether they are those of these parameters, as they are now."""
        return (
            len(parameters) == len(self.parameters)
            and all(p is own for p, own in zip(parameters, self.parameters, strict=True))
            and all(p.device == self.device for p in parameters)
            and _dtype_of(parameters) == self.dtype
        )

    def split(self, row: Tensor) -> list[Tensor]:
        """Real views of a row, (..., 2) for a complex parameter."""
        pieces = row[: self.total].split(self._sizes)
        return [piece.view(shape) for piece, shape in zip(pieces, self._shapes, strict=True)]

    def pieces(self, vector: Tensor) -> list[Tensor]:
        """The parts of a vector (P,), shaped as the parameters; views where these are real."""
        parts = zip(self.split(vector), self.parameters, strict=True)
        return [shaped(piece, p) if p.is_complex() else piece for piece, p in parts]

    def joined(self, pieces: Gradients) -> Tensor:
        """(P,) one vector from pieces shaped as the parameters; None is zeros."""
        vector = torch.zeros(self.total, dtype=self.dtype, device=self.device)
        for view, piece in zip(self.split(vector), pieces, strict=True):
            if piece is not None:
                view.add_(real(piece))  # which may be sparse
        return vector


def _dtype_of(parameters: Sequence[Tensor]) -> torch.dtype:
    dtype = torch.float32
    for dtype_of_one in {p.dtype for p in parameters}:
        dtype = torch.promote_types(dtype, dtype_of_one)
    return dtype.to_real()
