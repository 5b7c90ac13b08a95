"""Gradients as lists shaped as the parameters: multiplied, summed, given to an optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Gradients = list[Tensor | None]
"""One gradient for each parameter of a list; None where the loss does not reach it."""


def scaled(own: Sequence[Gradients], factors: Tensor | None) -> Sequence[Gradients]:
    """The gradients of each task, new ones, times that task's factor.

    Never in place: what autograd gives for two parameters may be one tensor, or an expanded one.

    Args:
        own: T' lists of gradients, which stay as they are.
        factors: (T',) on the CPU; None: ones.
    """
    known: list[Tensor] = []
    numbers: list[float] = []
    by_task = [] if factors is None else factors.tolist()
    if all(factor == 1.0 for factor in by_task):
        return own
    for of_one, factor in zip(own, by_task, strict=True):
        there = [g for g in of_one if g is not None]
        known += there
        numbers += [factor] * len(there)
    found = iter(torch._foreach_mul(known, numbers) if known else ())
    return [[None if g is None else next(found) for g in of_one] for of_one in own]


def divided(gradients: Gradients, scale: float) -> Gradients:
    """The gradients, new ones, without a scale; the same ones if it is 1."""
    there = [g for g in gradients if g is not None]
    if scale == 1.0 or not there:
        return gradients
    found = iter(torch._foreach_mul(there, 1 / scale))
    return [None if g is None else next(found) for g in gradients]


def summed(a: Gradients, b: Gradients) -> Gradients:
    """The sum of two lists; None only where both have none. May give a tensor of theirs."""
    pairs = zip(a, b, strict=True)
    return [y if x is None else x if y is None else x + y for x, y in pairs]


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


def part(parameters: Iterable[Tensor]) -> None:
    """Give each parameter a gradient of its own, so that it can be changed in place.

    Autograd may have given the same tensor for two of them, or an expanded one.
    """
    seen: set[int] = set()
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None:
            if gradient.data_ptr() in seen or not gradient.is_contiguous():
                parameter.grad = gradient = gradient.clone()
            seen.add(gradient.data_ptr())
