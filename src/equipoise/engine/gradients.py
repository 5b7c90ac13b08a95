"""Gradients as lists shaped as the parameters: multiplied, summed, given to an optimizer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Gradients = list[Tensor | None]
"""One gradient for each parameter of a list; None where the loss does not reach it."""


def scaled(own: Sequence[Gradients], factors: Tensor | None) -> list[Gradients]:
    """The gradients of each task, new ones, times that task's factor.

    Args:
        own: T' lists of gradients, which stay as they are.
        factors: (T',) on the CPU; None: ones.
    """
    numbers = [] if factors is None else factors.tolist()
    if all(number == 1.0 for number in numbers):
        return list(own)
    known = [
        (g, f) for of_one, f in zip(own, numbers, strict=True) for g in of_one if g is not None
    ]
    found = iter(torch._foreach_mul(*map(list, zip(*known, strict=True))) if known else ())
    return [[None if g is None else next(found) for g in of_one] for of_one in own]


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
