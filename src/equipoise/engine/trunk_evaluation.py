"""One batch through a SharedTrunk: features once, heads on detached features."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.engine.boundary import Boundary, along_trunk, through_trunk, weighted_sum
from equipoise.engine.direction import Combination, FeatureGradients
from equipoise.engine.evaluation import Evaluation, Moving
from equipoise.engine.gradients import Gradients
from equipoise.engine.ranks import Ranks
from equipoise.engine.rows import Rows
from equipoise.engine.stages import Stages
from equipoise.engine.targets import Targets, check_loss
from equipoise.errors import EquipoiseError, TaskError, raised_in
from equipoise.kept import Attributes, Buffers, whole_of
from equipoise.linalg import inner, length, on_host
from equipoise.replay import Replay
from equipoise.trunk import SharedTrunk

TRUNK = "trunk"
"""The key under which a trunk's draws are recorded; a head's is its position."""

Losses = Mapping[str, Callable[[Any, Any], Tensor]]


class TrunkEvaluation(Evaluation):
    """The forward pass: trunk, features, heads, losses; then the backward passes.

    Args:
        model: the network.
        losses: task name -> callable(output, target).
        inputs: what the trunk takes.
        presence: the targets.
        ranks: the processes that train together.
        again: whether there will be further looks, for which draws are recorded.
        whole: as `kept.whole_of` gives it; None: the network.

    Attributes:
        features: the cut between trunk and heads; once `look` was called.
        latent: the gradient of the features that last went through the trunk.
    """

    def __init__(
        self,
        model: SharedTrunk,
        losses: Losses,
        inputs: Any,
        presence: Targets,
        ranks: Ranks,
        again: bool = False,
        whole: nn.Module | None = None,
    ) -> None:
        self.model = model
        self.whole = model if whole is None else whole
        self.start = Attributes(self.whole)
        self.losses_of = losses
        self.inputs = inputs
        self.presence = self.targets = presence
        self.ranks = ranks
        self.replay = Replay(self.whole, self.start) if again else None
        self.functions = [losses[task] for task in presence.names]
        self.shared = trainable(model.shared_parameters())
        self.own = [trainable(model.head_parameters(task)) for task in presence.names]
        self.first: TrunkEvaluation | None = None  # which this one repeats
        self.held: Buffers = []
        self.latent: Gradients = []
        self._sent_back: list[Gradients] = []
        self._linear: tuple[Gradients, Gradients] = [], []

    # ------------------------------------------------------------------ the first look

    def look(self, apart: bool = True) -> Evaluation:
        """Pass the trunk once and each head once; with `apart` each on features of its own."""
        recording = self.replay.recording if self.replay else lambda *_: nullcontext()
        names, model = self.presence.names, self.model
        if self.first is not None:
            self.first.begin_again()
        with self.ranks.agreeing():
            with recording(TRUNK, model.trunk):
                features = self._features()
            self.features = Boundary(features, len(names), apart)
            if self.shared and torch.is_grad_enabled() and not self.features.outputs:
                raise EquipoiseError(
                    "the trunk has parameters to train, but no tensor that requires a gradient "
                    "was found in what it returned; let it return a tensor, or nested dicts, lists "
                    "and tuples of tensors."
                )
            self.values: list[Tensor | None] = []
            for k in range(len(names)):
                with recording(k, self._parts(k)):
                    self.values.append(self._loss(k, self.features.of(k)))
        self.losses = self.joint(self.values)
        self.refuse_infinite_losses()
        return self

    def _features(self) -> Any:
        with raised_in("the trunk"):
            return self.model.trunk(self.inputs)

    def _parts(self, k: int) -> nn.Module:
        """What is called for a task: its head, and its loss if that may keep something."""
        head = self.model.heads[self.presence.names[k]]
        return head if self.whole is self.model else whole_of(head, [self.functions[k]])

    def _loss(self, k: int, features: Any) -> Tensor | None:
        task = self.presence.names[k]
        if not self.presence.here(task):
            return None
        try:
            with raised_in(f"the head of task {task!r}"):
                output = self.model.head(task, features)
        except RuntimeError as error:
            if "in-place" not in str(error):
                raise
            raise TaskError(
                task,
                "head changes the features in place, which all other heads see; give its first "
                "layer inplace=False.",
            ) from error
        output, target = self.targets.pair(task, output)
        with raised_in(f"the loss of task {task!r}"):
            loss = self.functions[k](output, target)
        check_loss(task, loss)
        trained = self.features.inputs or self.own[k]
        if trained and torch.is_grad_enabled() and not loss.requires_grad:
            raise TaskError(task, "loss is not connected to the network; was it detached?")
        return loss

    def repeated(self) -> TrunkEvaluation:
        """The same batch once more, as if it were new."""
        batch = self.inputs, self.targets, self.ranks
        again = TrunkEvaluation(self.model, self.losses_of, *batch, whole=self.whole)
        again.first = self
        return again

    def cause(self, task: str) -> str | None:
        """What the labels say."""
        return self.targets.cause(task, self.losses_of[task])

    # ------------------------------------------------------------------ backward

    def heads_backward(self, weights: Tensor) -> list[Gradients]:
        """One backward through all heads; what they send back to the features is kept.

        Args:
            weights: (T',) on the CPU, of the losses.
        """
        ends, starts = self.weighted(self.values, weights.tolist())
        parameters = list(itertools.chain(*self.own))
        wanted = [*self.features.inputs, *parameters]
        found: Gradients = [None] * len(wanted)
        if ends and wanted:
            found = list(torch.autograd.grad(ends, wanted, starts, allow_unused=True))
        cut = len(self.features.inputs)
        self._sent_back = self.features.sort(found[:cut])
        rest = iter(self.ranks.sum_gradients(found[cut:], parameters))
        return [[next(rest) for _ in own] for own in self.own]

    def fill(self, rows: Rows) -> list[Gradients]:
        """One backward through all heads, and one through the trunk for each task."""
        own = self.heads_backward(torch.ones(len(self.own)))
        self.fill_from_heads(rows)
        return own

    def fill_from_heads(self, rows: Rows) -> None:
        """The rows, from what the heads have sent back: one trunk backward for each task."""
        rows.clear()
        n_tasks = len(self.own)
        for k in range(n_tasks):
            rows.add(self.row(k, retain_graph=k + 1 < n_tasks))

    def row(self, k: int, retain_graph: bool) -> Gradients:
        """The trunk's gradients of the k-th present task, of this process: one backward."""
        sent_back = self._sent_back[k] if self._sent_back else []
        return through_trunk(self.features.outputs, self.shared, sent_back, retain_graph)

    def backward(self, coefficients: Tensor, factors: Tensor) -> tuple[Gradients, list[Gradients]]:
        """One backward through all heads and one through the trunk."""
        own = self.heads_backward(factors)
        together = weighted_sum(self._sent_back, coefficients[: len(self._sent_back)])
        return self.through(together), own

    # ------------------------------------------------------------------ the feature level

    def feature_gradients(self, factors: Tensor) -> tuple[FeatureGradients, list[Gradients]]:
        """What the heads send back, to be multiplied by `factors`, and the gradients of heads."""
        own = self.heads_backward(torch.ones(len(self.own)))
        found = FeatureGradients(self._sent_back, self.features.outputs, factors, self.ranks)
        return found, own

    def through(self, latent: Gradients, again: bool = False) -> Gradients:
        """The trunk's gradients from one gradient for each of its outputs: one backward.

        Args:
            latent: those gradients; kept as `latent`.
            again: whether the trunk will be passed again, by `slopes` or `fill_from_heads`.
        """
        self.latent = starts = latent
        if again:
            starts = [None if u is None else u.detach().requires_grad_() for u in starts]
        found = through_trunk(self.features.outputs, self.shared, starts, create_graph=again)
        if again:
            self._linear = found, starts
            found = [None if g is None else g.detach() for g in found]
        return self.ranks.sum_gradients(found, self.shared)

    def slopes(self, steps: Gradients) -> Tensor | None:
        """(T',) products `<g_t, v>` of the tasks' trunk gradients with v = J^T d_z; without g_t.

        They are `<q_t, J v>`, and J v is one derivative of the backward pass that gave v.

        Args:
            steps: what `through` gave, with `again`.

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
        return torch.tensor(found or [0.0] * len(self.own), dtype=torch.float64)

    # ------------------------------------------------------------------ further looks

    def losses_again(self, tasks: Sequence[int]) -> list[Tensor | None]:
        """Pass the trunk once, and the heads of these tasks."""
        assert self.replay is not None
        with self.ranks.agreeing(), self.replay.looking():
            with self.replay.again(TRUNK):
                features = self._features()
            return [self._loss_again(k, features) for k in tasks]

    def _loss_again(self, k: int, features: Any) -> Tensor | None:
        assert self.replay is not None
        with self.replay.again(k):
            return self._loss(k, features)

    def own_again(
        self, tasks: Sequence[int], moving: Moving
    ) -> list[tuple[Tensor | None, Gradients]]:
        """Pass the heads of these tasks, one after the other, on the features of the first look."""
        found: list[tuple[Tensor | None, Gradients]] = []
        for k in tasks:
            with moving(k):
                with self.ranks.agreeing():
                    value = self._loss_again(k, self.features.of(k))
                gradients = self.own_gradients(k, value)
            found.append((None if value is None else value.detach(), gradients))
        return found

    def trial_losses(self, latent: tuple[Gradients, float] | None = None) -> Tensor:
        """As in `Evaluation`; or for features that are moved, without the trunk.

        Args:
            latent: along what the features are moved, and how far; None: not at all.
        """
        assert self.replay is not None
        tasks = range(len(self.own))
        with torch.no_grad():
            torch.clear_autocast_cache()  # it holds half-precision copies of the parameters
            if latent is None:
                values = self.losses_again(tasks)
            else:
                features = self.features.moved(*latent)
                with self.ranks.agreeing(), self.replay.looking():
                    values = [self._loss_again(k, features) for k in tasks]
            torch.clear_autocast_cache()
        return self.joint(values)


def trainable(parameters: list[nn.Parameter]) -> list[Tensor]:
    """Those that are not frozen."""
    return [p for p in parameters if p.requires_grad]


def combine_features(
    look: Evaluation, stages: Stages, factors: Tensor
) -> tuple[Combination, Gradients, list[Gradients]]:
    """The direction from gradients of the features: one backward through all heads, one below.

    Returns:
        How it came about, the trunk's gradients, and those of the heads, of the raw losses.
    """
    assert isinstance(look, TrunkEvaluation)
    gradients, own = look.feature_gradients(factors)
    result, latent = gradients.combine(stages.aggregator, look.losses, stages.descent)
    return result, look.through(latent, again=stages.verifying is not None), own
