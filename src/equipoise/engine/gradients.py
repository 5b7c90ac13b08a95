"""Gradients as lists shaped as the parameters: multiplied, summed, given to an optimizer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Gradients = list[Tensor | None]
"""One gradient for each parameter of a list; None where the loss does not reach it."""


def scaled(own: Sequence[Gradients], factors: Tensor | None) -> Sequence[Gradients]:
    """The gradients of each task, new ones, times that task's factor.

    Args:
        own: T' lists of gradients, which stay as they are.
        factors: (T',) on the CPU; None: ones.
    """
    known, numbers = _with_factors(own, factors)
    if not known:
        return own
    found = iter(torch._foreach_mul(known, numbers))
    return [[None if g is None else next(found) for g in of_one] for of_one in own]


def scale(own: Sequence[Gradients], factors: Tensor) -> Sequence[Gradients]:
    """`scaled`, with the gradients overwritten: for those that nobody looks at again."""
    known, numbers = _with_factors(own, factors)
    if known:
        torch._foreach_mul_(known, numbers)
    return own


def _with_factors(
    own: Sequence[Gradients], factors: Tensor | None
) -> tuple[list[Tensor], list[float]]:
    """All gradients, each with its task's factor; nothing if all factors are 1."""
    known: list[Tensor] = []
    numbers: list[float] = []
    by_task = [] if factors is None else factors.tolist()
    if any(factor != 1.0 for factor in by_task):
        for of_one, factor in zip(own, by_task, strict=True):
            there = [g for g in of_one if g is not None]
            known += there
            numbers += [factor] * len(there)
    return known, numbers


def by_parameter(
    parameters: Sequence[Sequence[Tensor]], gradients: Sequence[Gradients]
) -> tuple[list[Tensor], Gradients]:
    """All parameters of the tasks, each once, and the sum of what the tasks have for it."""
    of: dict[Tensor, Tensor | None] = {}
    for some, theirs in zip(parameters, gradients, strict=True):
        for p, g in zip(some, theirs, strict=True):
            before = of.get(p)
            of[p] = g if before is None else before if g is None else before + g
    return list(of), list(of.values())


def give(parameters: Sequence[Tensor], gradients: Gradients) -> None:
    """Put gradients where an optimizer looks; None where no task reaches the parameter."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
