"""backward: aggregated gradients for a loop, a model or a graph of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from equipoise.boundary import Gradients, through_trunk, weighted_sum
from equipoise.combine import Combination, combine, combine_features, works_on_features
from equipoise.errors import (
    NOT_FINITE,
    CombinationError,
    EquipoiseError,
    NonFiniteError,
    TaskError,
)
from equipoise.labels import check_loss
from equipoise.linalg import finite_norm
from equipoise.ranks import Ranks
from equipoise.rows import Rows


def backward(
    losses: Mapping[str, Tensor] | Sequence[Tensor] | Tensor,
    shared: Iterable[nn.Parameter],
    aggregator: Callable,
    features: Any = None,
) -> Combination:
    """Fill `.grad` as `sum(losses).backward()` would, but aggregate on the shared parameters.

    For a loop, a model or a graph of one's own. Gradients are added to what `.grad` holds, and
    the graph is freed. Every other leaf that the losses reach (the heads' parameters) gets the
    gradient of the summed losses. Under torch.distributed the losses are averaged over the
    processes, which should hold batches of equal size.

    Args:
        losses: T scalar losses: a dict by task name, a sequence, or one tensor of shape (T,).
        shared: the shared parameters.
        aggregator: an aggregator, or any callable from rows (T, P) to a direction (P,).
        features: what the shared part returned (a tensor, or nested dicts, lists and tuples).
            None may be computed from another. If given, the aggregator works at the feature level
            (as MGDA-UB does): its rows are the gradients of the features, and the shared part sees
            one backward instead of T.

    Returns:
        The Gram matrix (T, T) of the rows and the coefficients (T,).

    Raises:
        TaskError: a loss is not a scalar, not connected to a graph, or not finite.
        NonFiniteError: a gradient is not finite. No `.grad` has changed in either case.
        CombinationError: a callable without coefficients at the feature level.

    Passes: T backwards; with `features` T through the heads and one through the shared part.
    Memory: T x P; with `features` T times their size.
    """
    ranks = Ranks()
    names, values = _scalar_losses(losses)
    parameters = [p for p in shared if p.requires_grad]
    own = {id(p) for p in parameters}
    others = [leaf for leaf in _leaves([value.grad_fn for value in values]) if id(leaf) not in own]
    values = [value / ranks.size for value in values]  # this process's part of the joint losses
    way = _by_rows if features is None else _by_features
    try:
        gradients, result = way(values, parameters, others, aggregator, features, ranks)
    except TaskError as error:
        raise error.named(names) from None
    if finite_norm(gradients) is None:
        raise EquipoiseError("each task's gradient is finite, but together they overflow.")
    for p, gradient in zip((*parameters, *others), gradients, strict=True):
        if gradient is not None:
            p.grad = gradient if p.grad is None else p.grad + gradient
    return result


def _by_rows(
    losses: list[Tensor],
    parameters: list[nn.Parameter],
    others: list[Tensor],
    aggregator: Callable,
    features: None,
    ranks: Ranks,
) -> tuple[Gradients, Combination]:
    """One backward a task through everything."""
    rows = Rows(parameters, len(losses), ranks)
    rest: list[Gradients] = []
    for i, loss in enumerate(losses):
        found = torch.autograd.grad(
            loss, (*parameters, *others), retain_graph=i < len(losses) - 1, allow_unused=True
        )
        rows.add(found[: len(parameters)])
        rest.append(_finite(i, found[len(parameters) :]))
    result, direction = combine(rows, aggregator, _joint(losses, ranks))
    heads = ranks.sum_gradients(weighted_sum(rest, torch.ones(len(losses))), others)
    return [*rows.per_parameter(direction), *heads], result


def _by_features(
    losses: list[Tensor],
    parameters: list[nn.Parameter],
    others: list[Tensor],
    aggregator: Callable,
    features: Any,
    ranks: Ranks,
) -> tuple[Gradients, Combination]:
    """One backward a task down to the features, and one below."""
    if not works_on_features(aggregator):
        raise CombinationError(
            f"{aggregator!r} has no coefficients(gram), which the feature level needs; leave "
            "`features` out."
        )
    outputs = [z for z in pytree.tree_leaves(features) if isinstance(z, Tensor) and z.requires_grad]
    ends = {z.grad_fn for z in outputs} - {None}
    if ends & set(
        _below(child for end in ends for child, _ in end.next_functions if child is not None)
    ):
        raise EquipoiseError(
            "one of the features is computed from another, which would count twice; give only "
            "those that come first."
        )
    sent_back: list[Gradients] = []
    rest: list[Gradients] = []
    for i, loss in enumerate(losses):
        found = torch.autograd.grad(loss, (*outputs, *others), retain_graph=True, allow_unused=True)
        sent_back.append(list(found[: len(outputs)]))
        rest.append(_finite(i, found[len(outputs) :]))
    joint = _joint(losses, ranks)
    result, together = combine_features(sent_back, outputs, aggregator, joint, ranks)
    below = through_trunk(outputs, parameters, together)
    heads = weighted_sum(rest, torch.ones(len(losses)))
    gradients = ranks.sum_gradients([*below, *heads], [*parameters, *others])
    return gradients, result


def _finite(i: int, gradients: Sequence[Tensor | None]) -> Gradients:
    """The gradients of task number i outside the shared part, unless one is not finite."""
    if finite_norm(gradients) is None:
        raise NonFiniteError(i, NOT_FINITE)
    return list(gradients)


def _joint(losses: list[Tensor], ranks: Ranks) -> Tensor:
    """(T,) the losses of the joint batch as numbers, float64 on the CPU."""
    return ranks.sum(torch.stack([loss.detach().to("cpu", torch.float64) for loss in losses]))


def _scalar_losses(
    losses: Mapping[str, Tensor] | Sequence[Tensor] | Tensor,
) -> tuple[list[str], list[Tensor]]:
    """The names and the values of the losses, checked."""
    if isinstance(losses, Tensor) and losses.dim() != 1:
        raise EquipoiseError(f"losses has shape {tuple(losses.shape)}; it must be (T,).")
    named = dict(losses) if isinstance(losses, Mapping) else dict(enumerate(losses))
    if not named:
        raise EquipoiseError("losses is empty; give at least one.")
    for task, loss in named.items():
        check_loss(task, loss)
        if not loss.requires_grad:
            raise TaskError(task, "loss is not connected to any parameter; was it detached?")
        if not bool(torch.isfinite(loss)):
            raise NonFiniteError(task, f"loss is {loss.item()}; leave this batch out.")
    return [str(task) for task in named], list(named.values())


def _leaves(roots: Iterable[Any]) -> list[Tensor]:
    """The leaf tensors of the graphs that end at `roots`."""
    return [node.variable for node in _below(roots) if hasattr(node, "variable")]


def _below(roots: Iterable[Any]) -> dict[Any, None]:
    """All nodes of the graphs that end at `roots`, these included, in the same order everywhere."""
    todo = list(roots)
    seen = dict.fromkeys(todo)
    while todo:
        for node, _ in todo.pop().next_functions:
            if node is not None and node not in seen:
                seen[node] = None
                todo.append(node)
    return seen
