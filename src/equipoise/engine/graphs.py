"""Walks over the graphs that autograd records, and what their nodes show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from equipoise.errors import EquipoiseError


def reached_leaves(
    losses: Sequence[Tensor], stop: Iterable[Any] = (), kinds: set[type] | None = None
) -> dict[Tensor, int]:
    """The leaves of the graphs of several losses, each with a bit for each loss that reaches it.

    Args:
        losses: what the graphs end at.
        stop: nodes beyond which the walk does not go.
        kinds: is given the types of all nodes that the walk meets.
    """
    leaves: dict[Tensor, int] = {}
    for i, loss in enumerate(losses):
        if loss.grad_fn is None and loss.requires_grad:
            leaves[loss] = leaves.get(loss, 0) | 1 << i
    masks = reached_nodes(losses, stop)
    if kinds is not None:
        kinds.update(map(type, masks))
    for node, mask in masks.items():
        variable = getattr(node, "variable", None)
        if variable is not None:
            leaves[variable] = leaves.get(variable, 0) | mask
    return leaves


def reached_nodes(losses: Sequence[Tensor], stop: Iterable[Any] = ()) -> dict[Any, int]:
    """The nodes of the graphs of several losses, each with a bit for each loss that reaches it.

    A node comes after all that lead to it. Arguments are those of `reached_leaves`.
    """
    stop = set(stop)
    roots: dict[Any, int] = {}
    for i, loss in enumerate(losses):
        if loss.grad_fn is not None:
            roots[loss.grad_fn] = roots.get(loss.grad_fn, 0) | 1 << i
    masks = {node: roots.get(node, 0) for node in reversed(below(roots, stop))}
    for node, mask in masks.items():
        for child, _ in node.next_functions:
            if child is not None and child not in stop:
                masks[child] |= mask
    return masks


def below(roots: Iterable[Any], stop: Iterable[Any] = ()) -> list[Any]:
    """All nodes of the graphs that end at `roots`, these included, each after those below it.

    The order is the same everywhere. Nodes of `stop` are left out, and what only they lead to.
    """
    seen: set[Any] = set(stop)
    order: list[Any] = []
    todo = [(root, False) for root in roots if root not in seen]
    while todo:
        node, left = todo.pop()
        if left:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            todo.append((node, True))
            todo += [
                (child, False)
                for child, _ in node.next_functions
                if child is not None and child not in seen
            ]
    return order


# ---------------------------------------------------------------------- kinds of nodes


def kinds_below(tensors: Iterable[Tensor | None]) -> set[type]:
    """The types of all nodes in the graphs of some tensors."""
    roots = (t.grad_fn for t in tensors if t is not None and t.grad_fn is not None)
    return set(map(type, below(dict.fromkeys(roots))))


def is_compiled(kinds: Iterable[type]) -> bool:
    """Whether a part is compiled, so that the graph can be passed backward once only."""
    return any(kind.__name__.startswith("CompiledFunction") for kind in kinds)


def refuse_reentrant(kinds: Iterable[type]) -> None:
    """Refuse parts that no gradient of chosen tensors can pass.

    Raises:
        EquipoiseError: a part is checkpointed in the reentrant way.
    """
    if any(kind.__name__ == "CheckpointFunctionBackward" for kind in kinds):
        raise EquipoiseError(REENTRANT)


REENTRANT = (
    "a part of the network is checkpointed in the reentrant way, in which the gradient of one task "
    "cannot be taken. Give torch.utils.checkpoint use_reentrant=False (with Hugging Face: "
    'gradient_checkpointing_enable({"use_reentrant": False})).'
)
