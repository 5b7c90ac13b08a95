"""The cut between trunk and heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from equipoise.engine.gradients import Gradients
from equipoise.linalg import gram_matrix, real, shaped


class Boundary:
    """The features, as the trunk made them and as each head sees them.

    Heads run on detached features; what they send back is kept apart for each task until it is
    known how the tasks combine, and only then goes through the trunk.

    Args:
        features: what the trunk returned: a tensor, or nested dicts, lists and tuples of them.
        n_tasks: how many heads will look at them.
        apart: False: one detached copy for all heads, in which their gradients add up as they
            come, for when all tasks count the same.

    Attributes:
        outputs: the tensors among the features through which gradients reach the trunk.
        inputs: their detached copies, task after task.
    """

    def __init__(self, features: Any, n_tasks: int, apart: bool = True) -> None:
        leaves, self._spec = pytree.tree_flatten(features)
        # Of a frozen trunk under inference_mode: heads could not save them for their backward.
        self._leaves = [
            x.clone() if isinstance(x, Tensor) and x.is_inference() else x for x in leaves
        ]
        self._cut = [
            i for i, x in enumerate(self._leaves) if isinstance(x, Tensor) and x.requires_grad
        ]
        self.outputs: list[Tensor] = [self._leaves[i] for i in self._cut]
        if apart:
            self._copies = [self._detached() for _ in range(n_tasks)]
        else:
            self._copies = [self._detached()] * n_tasks
        distinct = self._copies if apart else self._copies[:1]
        self.inputs: list[Tensor] = [copy[i] for copy in distinct for i in self._cut]

    def _detached(self) -> list[Any]:
        copy = list(self._leaves)
        for i in self._cut:
            copy[i] = copy[i].detach().requires_grad_()
        return copy

    def join(self, n_tasks: int) -> None:
        """From now on one detached copy for so many heads."""
        self._copies = self._copies[:1] * n_tasks

    def of(self, k: int) -> Any:
        """The features as the k-th head sees them."""
        return pytree.tree_unflatten(self._copies[k], self._spec)

    def moved(self, direction: Sequence[Tensor | None], size: float, inputs: bool = False) -> Any:
        """The features at z - size direction, detached; None: where it does not move them.

        With `inputs` they require gradients, as those that a head sees.
        """
        leaves = list(self._leaves)
        for i, step in zip(self._cut, direction, strict=True):
            z = leaves[i].detach()
            leaves[i] = z if step is None else torch.sub(z, step, alpha=size)
            if inputs:
                leaves[i].requires_grad_()
        return pytree.tree_unflatten(leaves, self._spec)

    def samples(self) -> int:
        """How many samples there are: the first dimension of the first output."""
        return len(self.outputs[0]) if self.outputs and self.outputs[0].dim() else 1

    def sort(self, gradients: Sequence[Tensor | None]) -> list[Gradients]:
        """Gradients of `inputs` as a list for each copy with an entry for each output."""
        n = len(self.outputs)
        return [list(gradients[i : i + n]) for i in range(0, len(gradients), n)] if n else []


def through_trunk(
    outputs: Sequence[Tensor],
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    retain_graph: bool = False,
    create_graph: bool = False,
) -> Gradients:
    """Gradients of the trunk's parameters from gradients of its outputs: one trunk backward.

    With `create_graph` they can be differentiated by the gradients of the outputs (`along_trunk`).
    """
    ends = [z for z, g in zip(outputs, gradients, strict=True) if g is not None]
    if not ends or not parameters:
        return [None] * len(parameters)
    starts = [g for g in gradients if g is not None]
    return list(
        torch.autograd.grad(
            ends,
            parameters,
            starts,
            retain_graph=retain_graph or create_graph,
            create_graph=create_graph,
            allow_unused=True,
        )
    )


def along_trunk(
    gradients: Sequence[Tensor | None],
    starts: Sequence[Tensor | None],
    steps: Sequence[Tensor | None],
) -> Gradients | None:
    """How the trunk's outputs move along steps of its parameters: J v, from J^T u.

    J^T u is linear in u, so its derivative by u, against v, is J v: one pass, which holds no
    activations but those of the backward pass.

    Args:
        gradients: J^T u for each parameter, from `through_trunk` with `create_graph`.
        starts: u, requiring gradients, for each output.
        steps: v for each parameter.

    Returns:
        J v for each output; None if some layer's backward pass has no derivative.
    """
    pairs = [
        (g, v.to(g))
        for g, v in zip(gradients, steps, strict=True)
        if g is not None and v is not None and g.requires_grad
    ]
    wanted = [u for u in starts if u is not None]
    if not pairs or not wanted:
        return None
    ends, against = zip(*pairs, strict=True)
    try:
        found = iter(torch.autograd.grad(ends, wanted, against, True, allow_unused=True))
    except RuntimeError:  # whoever asks has another way
        return None
    return [None if u is None else next(found) for u in starts]


def weighted_sum(per_task: Sequence[Gradients], weights: Tensor) -> Gradients:
    """For each output the sum over tasks of weight times gradient; None where all are None."""
    total: Gradients = []
    for column in zip(*per_task, strict=True):
        result = None
        for weight, gradient in zip(weights.tolist(), column, strict=True):
            if gradient is not None:
                result = (
                    gradient * weight if result is None else result.add_(gradient, alpha=weight)
                )
        total.append(result)
    return total


def entrywise_sum(per_task: Sequence[Gradients], weights: Sequence[Tensor]) -> Gradients:
    """As `weighted_sum`, with for each output weights (T, ...) that differ from entry to entry."""
    total: Gradients = []
    for own, *column in zip(weights, *per_task, strict=True):
        some = next((g for g in column if g is not None), None)
        parts = [w * real(g) for w, g in zip(own, column, strict=True) if g is not None]
        total.append(None if some is None else shaped(torch.stack(parts).sum(0), some))
    return total


def signed_sums(per_task: Sequence[Gradients], outputs: Sequence[Tensor]) -> list[Tensor]:
    """For each output (B, ...) the tasks' sums over the batch of gradient times sign(output).

    Returns:
        (T, ...) for each output, with zeros for a task that sent nothing back; (T, ..., 2) for
        the real and imaginary parts of a complex one.
    """
    return [
        torch.stack(
            [torch.zeros_like(z[0]) if g is None else (z.sign() * real(g)).sum(0) for g in column]
        )
        for z, *column in zip([real(z.detach()) for z in outputs], *per_task, strict=True)
    ]


def feature_gram(per_task: Sequence[Gradients]) -> Tensor:
    """(T, T) inner products of the tasks' feature gradients, over all outputs, float64."""
    gram: Any = 0
    for column in zip(*per_task, strict=True):
        some = next((g for g in column if g is not None), None)
        if some is not None:
            flat = [torch.zeros_like(some) if g is None else g for g in column]
            gram = gram + gram_matrix(torch.stack([real(g).reshape(-1) for g in flat]))
    return gram
