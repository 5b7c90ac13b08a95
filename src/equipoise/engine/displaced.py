"""The one mover of parameters: away for a trial, and back bit for bit unless they stay."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType

import torch
from torch import Tensor

Offsets = Iterable[tuple[Tensor, Tensor | None]]
"""Parameters, each with what is added to it; None: it goes back to its start."""


class Displaced:
    """Parameters that may be moved away from where they are.

    As a context manager it puts them back in the end, unless `stay` was called in the body and the
    body raises nothing.

    Args:
        parameters: those that may be moved; their values are copied.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.parameters = list(parameters)
        # Through .data: once they are back, a graph that holds them still goes backward.
        self._values = [p.data for p in self.parameters]
        self._starts = [value.clone() for value in self._values]
        self._position = {id(p): i for i, p in enumerate(self.parameters)}
        self._stays = False

    @property
    def starts(self) -> list[Tensor]:
        """The copies of the values, one for each of `parameters`."""
        return self._starts

    @torch.no_grad()
    def move(self, offsets: Offsets, scale: float = 1.0) -> None:
        """Put the named parameters at start + scale * offset; the others remain where they are.

        Args:
            offsets: a sequence moves in one launch; an iterator is consumed one by one, so that
                offsets computed on the way are never held together.
            scale: a factor for all offsets.
        """
        if not isinstance(offsets, Sequence):
            for parameter, offset in offsets:
                self._one(self._position[id(parameter)], offset, scale)
            return
        chosen = [self._position[id(parameter)] for parameter, _ in offsets]
        if chosen:
            values = [self._values[i] for i in chosen]
            torch._foreach_copy_(values, [self._starts[i] for i in chosen])
            moved = [(v, o) for v, (_, o) in zip(values, offsets, strict=True) if o is not None]
            if moved:
                values, steps = zip(*moved, strict=True)
                torch._foreach_add_(values, steps, alpha=scale)

    def _one(self, i: int, offset: Tensor | None, scale: float) -> None:
        self._values[i].copy_(self._starts[i])
        if offset is not None:
            self._values[i].add_(offset, alpha=scale)

    @torch.no_grad()
    def back(self) -> None:
        """Put all parameters where they were."""
        if self._values:
            torch._foreach_copy_(self._values, self._starts)

    def stay(self) -> None:
        """Leave them where they are: graphs that hold the old values become invalid."""
        self._stays = True
        for parameter in self.parameters:
            torch.autograd.graph.increment_version(parameter)

    def __enter__(self) -> Displaced:
        self._stays = False
        torch.clear_autocast_cache()  # it holds half-precision copies of the parameters
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        if not self._stays or kind is not None:
            self.back()
        torch.clear_autocast_cache()
