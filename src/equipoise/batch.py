"""One batch on its way through the network, and the backward passes that are asked of it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.boundary import (
    Boundary,
    Gradients,
    along_trunk,
    through_trunk,
    weighted_sum,
)
from equipoise.combine import Combination, Descent, combine_features
from equipoise.errors import EquipoiseError, NonFiniteError, TaskError
from equipoise.labels import Labels, check_loss
from equipoise.linalg import finite_norm, inner, length, on_host
from equipoise.ranks import Ranks
from equipoise.replay import RandomState, Replay, replayed
from equipoise.rows import Rows
from equipoise.trunk import SharedTrunk

TRUNK = "trunk"
"""The key under which a trunk's draws are recorded; a head's is its position."""


class Batch:
    """The forward pass: trunk, features, heads, losses; then whatever backward passes are wanted.

    Args:
        model: the network.
        losses: task name -> callable(output, target).
        inputs: what the trunk takes.
        labels: the targets, by which T' of the T tasks are present.
        ranks: the processes that train together.
        apart: whether what the heads send back is kept apart for each task.
        replay: where the draws of the trunk and of each head are recorded; None: nowhere, and
            `loss_again` cannot be called.

    Attributes:
        values: the present tasks' losses over this process's samples; None where it has none.
        losses: (T',) detached losses of the joint batch, float64 on the CPU.

    Raises:
        TaskError: a loss is not a scalar, not connected to the network, or not finite.
        EquipoiseError: no gradient can pass from the heads to the trunk.
    """

    def __init__(
        self,
        model: SharedTrunk,
        losses: Mapping[str, Callable[[Any, Any], Tensor]],
        inputs: Any,
        labels: Labels,
        ranks: Ranks,
        apart: bool = True,
        replay: Replay | None = None,
    ) -> None:
        self.model = model
        self.inputs = inputs
        self.labels = labels
        self.ranks = ranks
        self.replay = replay
        self.functions = [losses[task] for task in labels.names]
        self._again = (model, losses, inputs, labels, ranks)
        recording = replay.recording if replay else lambda *_: nullcontext()
        self.trunk_parameters = trainable(model.shared_parameters())
        self.head_parameters = {
            task: trainable(model.head_parameters(task)) for task in labels.names
        }
        with ranks.agreeing():
            with recording(TRUNK, model.trunk):
                features = model.trunk(inputs)
            self.features = Boundary(features, len(labels.names), apart)
            trained = self.trunk_parameters and torch.is_grad_enabled()
            if trained and not self.features.outputs:
                raise EquipoiseError(
                    "the trunk has parameters to train, but no tensor that requires a gradient "
                    "was found in what it returned; let it return a tensor, or nested dicts, lists "
                    "and tuples of tensors."
                )
            self.values: list[Tensor | None] = []
            for k, task in enumerate(labels.names):
                with recording(k, model.heads[task]):
                    self.values.append(self._loss(k, self.features.of(k)))
        self.losses = self._joint(self.values)
        for task, loss in zip(labels.names, self.losses.tolist(), strict=True):
            if not math.isfinite(loss):
                raise NonFiniteError(
                    task, f"loss is {loss}. Lower the learning rate, or leave this batch out."
                )
        self._sent_back: list[Gradients] = []
        self.latent: Gradients = []
        self._linear: tuple[Gradients, Gradients] = [], []

    def _loss(self, k: int, features: Any) -> Tensor | None:
        task = self.labels.names[k]
        if not self.labels.here(task):
            return None
        try:
            output = self.model.head(task, features)
        except RuntimeError as error:
            if "in-place" not in str(error):
                raise
            raise TaskError(
                task,
                "head changes the features in place, which all other heads see; give its first "
                "layer inplace=False.",
            ) from error
        output, target = self.labels.pair(task, output)
        loss = self.functions[k](output, target)
        check_loss(task, loss)
        trained = self.features.inputs or self.head_parameters[task]
        if trained and torch.is_grad_enabled() and not loss.requires_grad:
            raise TaskError(task, "loss is not connected to the network; was it detached?")
        return loss

    def _joint(self, values: Sequence[Tensor | None]) -> Tensor:
        """(T',) the losses of the joint batch from those of this process, float64 on the CPU."""
        known = [value.detach() for value in values if value is not None]
        here = torch.zeros(len(values), dtype=torch.float64)
        if known:  # one copy to the host for all
            common = known[0].device
            dtype = functools.reduce(torch.promote_types, {value.dtype for value in known})
            numbers = torch.stack([value.to(common, dtype) for value in known])
            here[[value is not None for value in values]] = numbers.to("cpu", torch.float64)
        return self.ranks.sum(here if self.ranks.alone else here * self.labels.shares)

    def features_again(self) -> Any:
        """What the trunk returns for its parameters as they are by now, with the same draws."""
        assert self.replay is not None
        with self.replay.again(TRUNK):
            return self.model.trunk(self.inputs)

    def loss_again(self, k: int, features: Any = None) -> Tensor | None:
        """Task k's loss for its head as it is by now, with the same draws.

        Args:
            k: position among the present tasks.
            features: what the head looks at; None: the features of the first pass.

        Returns:
            A scalar; None if this process has no sample of the task.
        """
        assert self.replay is not None
        with self.replay.again(k):
            return self._loss(k, self.features.of(k) if features is None else features)

    def losses_again(self, latent: tuple[Gradients, float] | None = None) -> Tensor:
        """All losses for the parameters as they are by now, with the same draws and no graph.

        Args:
            latent: for features moved from those of the first pass, of which the trunk makes no
                new ones: along what, and how far. None: through the whole network.

        Returns:
            (T',) float64 on the CPU, of the joint batch; they need not be finite.
        """
        with torch.no_grad(), self.ranks.agreeing():
            torch.clear_autocast_cache()  # it holds half-precision copies of the parameters
            features = self.features_again() if latent is None else self.features.moved(*latent)
            values = [self.loss_again(k, features) for k in range(len(self.labels.names))]
            torch.clear_autocast_cache()
        return self._joint(values)

    def losses_now(self, state: RandomState) -> Tensor:
        """The same losses with the parameters as they are by now: one forward, no graph.

        Args:
            state: of the random generators, as it was before the first forward.

        Returns:
            (T,) float64 on the CPU; NaN for an absent task, and for all if one is not finite.
        """
        try:
            with torch.no_grad(), replayed(self.model, state):
                losses = Batch(*self._again).losses
        except NonFiniteError:  # the next step will say so
            losses = torch.full_like(self.losses, torch.nan)
        return self.labels.spread(losses, torch.nan)

    def heads_backward(self, factors: Tensor) -> Gradients:
        """One backward through all heads.

        Args:
            factors: (T',) on the CPU, what each loss's gradient is multiplied by.

        Returns:
            Gradients of the present tasks' head parameters, task after task. What the heads send
            back to the features is kept for the passes through the trunk.
        """
        seeds = (factors * self.labels.shares).tolist()
        pairs = [
            (value, value.new_tensor(seed))
            for value, seed in zip(self.values, seeds, strict=True)
            if value is not None and value.requires_grad
        ]
        parameters = [p for own in self.head_parameters.values() for p in own]
        wanted = [*self.features.inputs, *parameters]
        found: Gradients = [None] * len(wanted)
        if pairs and wanted:
            ends, starts = zip(*pairs, strict=True)
            found = list(torch.autograd.grad(ends, wanted, starts, allow_unused=True))
        cut = len(self.features.inputs)
        self._sent_back = self.features.sort(found[:cut])
        return self.ranks.sum_gradients(found[cut:], parameters)

    def heads_times(self, heads: Gradients, weights: Tensor | None) -> Gradients:
        """What `heads_backward` found, that of task k times `weights[k]`."""
        assert weights is not None
        per_head = zip(self.head_parameters.values(), weights.tolist(), strict=True)
        each = [weight for own, weight in per_head for _ in own]
        return [None if g is None else g * w for g, w in zip(heads, each, strict=True)]

    def trunk_backward(self, weights: Tensor) -> Gradients:
        """The trunk's gradients if task k counts `weights[k]`: one backward."""
        self.latent = weighted_sum(self._sent_back, weights[: len(self._sent_back)])
        return self._below()

    def features_backward(
        self, aggregator: Any, descent: Descent | None = None, again: bool = False
    ) -> tuple[Combination, Gradients]:
        """The trunk's gradients if the aggregator combines those of the features: one backward.

        Args:
            aggregator: combines them.
            descent: what a line search asks of the direction.
            again: whether the trunk will be passed again, by `slopes` or `fill`.
        """
        result, self.latent = combine_features(
            self._sent_back, self.features.outputs, aggregator, self.losses, self.ranks, descent
        )
        return result, self._below(again)

    def _below(self, again: bool = False) -> Gradients:
        starts = self.latent
        if again:
            starts = [None if u is None else u.detach().requires_grad_() for u in starts]
        found = through_trunk(
            self.features.outputs, self.trunk_parameters, starts, create_graph=again
        )
        if again:
            self._linear = found, starts
            found = [None if g is None else g.detach() for g in found]
        return self.ranks.sum_gradients(found, self.trunk_parameters)

    def slopes(self, steps: Gradients) -> Tensor | None:
        """(T',) products `<g_t, v>` of the tasks' trunk gradients with v = J^T d_z; without g_t.

        They are `<q_t, J v>`, and J v is one derivative of the backward pass that gave v.

        Args:
            steps: what `features_backward` with `again` gave.

        Returns:
            float64 on the CPU; None if a layer has no such derivative, or a wrong one:
            `<d_z, J v>` has to be |v|^2.
        """
        moves = along_trunk(*self._linear, steps)
        numbers = torch.zeros(len(self._sent_back) + 1, dtype=torch.float64)
        if moves is not None:
            numbers = on_host([inner(own, moves) for own in (*self._sent_back, self.latent)])
        *found, square = self.ranks.sum(numbers).tolist()
        expected = length(g for g in steps if g is not None) ** 2
        if not abs(square - expected) <= 1e-3 * expected:
            return None
        return torch.tensor(found or [0.0] * len(self.labels.names), dtype=torch.float64)

    def fill(self, rows: Rows) -> Rows:
        """One trunk backward for each present task, each into its row."""
        rows.clear()
        for k in range(len(self.labels.names)):
            rows.add(self.row(k, retain_graph=k + 1 < len(self.labels.names)))
        return rows

    def row(self, k: int, retain_graph: bool) -> Gradients:
        """The trunk's gradients of the k-th present task, of this process: one backward."""
        sent_back = self._sent_back[k] if self._sent_back else []
        return through_trunk(self.features.outputs, self.trunk_parameters, sent_back, retain_graph)

    def culprit(self, heads: Gradients) -> str | None:
        """The first task with a gradient that is not finite; slow, for the error message."""
        heads = list(heads)
        for k, (task, parameters) in enumerate(self.head_parameters.items()):
            own, heads = heads[: len(parameters)], heads[len(parameters) :]
            if finite_norm([*own, *self.row(k, retain_graph=True)]) is None:
                return task
        return None


def trainable(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """Those that are not frozen."""
    return [p for p in parameters if p.requires_grad]
