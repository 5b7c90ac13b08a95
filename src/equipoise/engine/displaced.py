"""The one mover of parameters: away for a trial, and back bit for bit unless they stay."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from types import TracebackType

import torch
from torch import Tensor

from equipoise.linalg import copies, real

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
        self._values = [real(p.data) for p in self.parameters]
        self._starts = copies(self._values)
        self._away = self._stays = False

    @cached_property
    def _position(self) -> dict[int, int]:
        return {id(p): i for i, p in enumerate(self.parameters)}

    @property
    def starts(self) -> list[Tensor]:
        """The copies of the values, one for each of `parameters`."""
        return [
            torch.view_as_complex(start.clone()) if p.is_complex() else start
            for start, p in zip(self._starts, self.parameters, strict=True)
        ]

    @torch.no_grad()
    def move(self, offsets: Offsets, scale: float = 1.0) -> None:
        """Put the named parameters at start + scale * offset; the others remain where they are.

        Args:
            offsets: a sequence moves in one launch; an iterator is consumed one by one, so that
                offsets computed on the way are never held together.
            scale: a factor for all offsets.
        """
        at_home, self._away = not self._away, True
        if isinstance(offsets, Sequence):
            self._together(offsets, scale, at_home)
        else:
            for parameter, offset in offsets:
                self._one(self._position[id(parameter)], offset, scale, at_home)

    def _one(self, i: int, offset: Tensor | None, scale: float, at_home: bool) -> None:
        if not at_home:
            self._values[i].copy_(self._starts[i])
        if offset is not None:
            self._values[i].add_(real(offset), alpha=scale)

    def _together(
        self, offsets: Sequence[tuple[Tensor, Tensor | None]], scale: float, at_home: bool
    ) -> None:
        values, starts = self._values, self._starts
        everyone = zip(offsets, self.parameters, strict=False)
        if len(offsets) != len(values) or not all(p is own for (p, _), own in everyone):
            chosen = [self._position[id(p)] for p, _ in offsets]
            values, starts = [values[i] for i in chosen], [starts[i] for i in chosen]
        if values and not at_home:
            torch._foreach_copy_(values, starts)
        moved = [(v, real(o)) for v, (_, o) in zip(values, offsets, strict=True) if o is not None]
        if moved:
            values, steps = map(list, zip(*moved, strict=True))
            torch._foreach_add_(values, steps, alpha=scale)

    def moved_by_others(self) -> None:
        """Take note that something else, an optimizer, has moved them."""
        self._away = True

    @torch.no_grad()
    def back(self) -> None:
        """Put all parameters where they were."""
        if self._away and self._values:
            torch._foreach_copy_(self._values, self._starts)
        self._away = False

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
