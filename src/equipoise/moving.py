"""Parameters that are moved for a trial, and come back bit for bit if it is not accepted."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor

from equipoise.boundary import Gradients


class Kept:
    """The values of parameters, which they have again when the body raises, or at `back`."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        # Through .data: once they are back, a graph that holds them still goes backward.
        self.parameters = [p.data for p in parameters]
        self.starts = [p.clone() for p in self.parameters]

    def back(self) -> None:
        """To where they were."""
        if self.parameters:
            torch._foreach_copy_(self.parameters, self.starts)

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.back()


class Moving(Kept):
    """Parameters on their way along directions, which are subtracted.

    Args:
        parameters: where they start.
        directions: for each parameter; None: it stays.
    """

    def __init__(self, parameters: Sequence[Tensor], directions: Gradients) -> None:
        pairs = [(p, d) for p, d in zip(parameters, directions, strict=True) if d is not None]
        super().__init__([p for p, _ in pairs])
        self.directions = [d for _, d in pairs]
        self._owners = [p for p, _ in pairs]

    def to(self, size: float) -> None:
        """To start - size direction."""
        if self.parameters:
            self.back()
            torch._foreach_add_(self.parameters, self.directions, alpha=-size)

    def stay(self) -> None:
        """Where they are is where they stay: graphs that hold the old values are void."""
        for parameter in self._owners:
            torch.autograd.graph.increment_version(parameter)
