"""Gradients as lists shaped as the parameters: multiplied, summed, given to an optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from equipoise.linalg import real

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
    return [y if x is None else x if y is None else added(x, y) for x, y in pairs]


def by_parameter(
    parameters: Sequence[Sequence[Tensor]], gradients: Sequence[Gradients]
) -> tuple[list[Tensor], Gradients]:
    """All parameters of the tasks, each once, and the sum of what the tasks have for it."""
    of: dict[int, Tensor | None] = {}
    order: list[Tensor] = []
    for some, theirs in zip(parameters, gradients, strict=True):
        for p, g in zip(some, theirs, strict=True):
            if id(p) not in of:
                order.append(p)
                of[id(p)] = g
            else:
                before = of[id(p)]
                of[id(p)] = g if before is None else before if g is None else added(before, g)
    return order, list(of.values())


def added(a: Tensor, b: Tensor) -> Tensor:
    """The sum of two gradients of a parameter; sparse only if both are."""
    return b + a if a.is_sparse and not b.is_sparse else a + b


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
        if gradient is not None and gradient.is_sparse:
            parameter.grad = gradient.clone().coalesce()  # which may be the same tensor again
        elif gradient is not None:
            if gradient.data_ptr() in seen or not gradient.is_contiguous():
                parameter.grad = gradient = gradient.clone()
            seen.add(gradient.data_ptr())


def clip(parameters: Iterable[Tensor], bound: float) -> None:
    """Scale gradients, each a tensor of its own, to a joint norm of at most `bound`.

    As torch.nn.utils.clip_grad_norm_, which does not know sparse gradients.
    """
    torch.nn.utils.clip_grad_norm_([_of_numbers(p) for p in parameters], bound)


def _of_numbers(parameter: Tensor) -> Tensor:
    """The parameter; for a sparse gradient what has the numbers in it as a dense one."""
    gradient = parameter.grad
    if gradient is None or not gradient.is_sparse:
        return parameter
    parameter.grad = gradient = gradient.coalesce()
    stand_in = torch.empty_like(gradient.values())
    stand_in.grad = gradient.values()
    return stand_in


def add_gradients(
    views: Sequence[Tensor],
    loss: Tensor,
    seed: Tensor | None,
    inputs: Sequence[Tensor],
    retain_graph: bool,
    factor: float = 1.0,
) -> Gradients:
    """Add gradients of the first inputs, times a factor, to real views; return the other ones.

    One parameter after the other, so that no list of them is held; all at once if one of them has
    hooks of the user's on what arrives in `.grad`, which wait for the final one. What `.grad`
    holds is there again afterwards.

    Args:
        views: one for each of the first inputs.
        loss: a scalar with a graph.
        seed: what multiplies it.
        inputs: leaves.
        retain_graph: whether the graph is kept.
        factor: of what is added; what is returned is not multiplied.
    """
    n = len(views)
    if any(getattr(p, "_post_accumulate_grad_hooks", None) for p in inputs):
        found = torch.autograd.grad(loss, inputs, seed, retain_graph, allow_unused=True)
        for view, gradient in zip(views, found, strict=False):
            if gradient is not None:
                view.add_(real(gradient), alpha=factor)
        return list(found[n:])
    held, hooks = [p.grad for p in inputs], []
    into = [
        view if factor == 1 and _same_kind(p, view) else None
        for p, view in zip(inputs, views, strict=False)
    ]
    try:
        for p, view, target in zip(inputs, views, into, strict=False):
            p.grad = target  # in which autograd accumulates in place
            if target is None:
                hooks.append(p.register_post_accumulate_grad_hook(partial(_move, view, factor)))
        for p in inputs[n:]:
            p.grad = None
        torch.autograd.backward(loss, seed, retain_graph=retain_graph, inputs=list(inputs))
        for p, target in zip(inputs, into, strict=False):
            if target is not None and p.grad is not None and p.grad is not target:
                target.copy_(p.grad)  # autograd has made a new sum
        return [p.grad for p in inputs[n:]]
    finally:
        for hook in hooks:
            hook.remove()
        for p, gradient in zip(inputs, held, strict=True):
            p.grad = gradient


def _same_kind(parameter: Tensor, view: Tensor) -> bool:
    """Whether a view can be the gradient of a parameter."""
    return parameter.dtype == view.dtype and parameter.layout == view.layout


def _move(view: Tensor, factor: float, parameter: Tensor) -> None:
    """Take a gradient that has just come in over to where it belongs."""
    if parameter.grad is not None:
        view.add_(real(parameter.grad), alpha=factor)
        parameter.grad = None
