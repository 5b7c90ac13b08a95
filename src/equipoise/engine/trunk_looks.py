"""The forward passes of a batch through a SharedTrunk: features once, heads on detached ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.buffers import Buffers
from equipoise.engine.boundary import Boundary
from equipoise.engine.evaluation import Moving, OneBatch
from equipoise.engine.gradients import Gradients
from equipoise.engine.losses import check_loss
from equipoise.engine.passes import Findings, Passes, findings_of, noting_cuts
from equipoise.engine.ranks import Ranks
from equipoise.engine.targets import Presence, Targets
from equipoise.errors import NOT_CONNECTED, EquipoiseError, TaskError, raised_in
from equipoise.kept import Attributes, whole_of
from equipoise.replay import Replay
from equipoise.trunk import SharedTrunk

TRUNK = None
"""The key under which a trunk's draws are recorded; a head's is the name of its task."""

Losses = Mapping[str, Callable[[Any, Any], Tensor]]


class TrunkLooks(OneBatch):
    """The first look, trunk, features, heads, losses, and further ones.

    Args:
        model: the network.
        losses: task name -> callable(output, target).
        inputs: what the trunk takes.
        presence: the targets.
        ranks: the processes that train together.
        again: whether there will be further looks, for which draws are recorded.
        findings: what is known of the network's graphs; None: the first look finds it out.
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
        findings: Findings | None = None,
        whole: nn.Module | None = None,
    ) -> None:
        self.model = model
        self.whole = model if whole is None else whole
        self.start = Attributes(self.whole)
        self.losses_of = losses
        self.inputs = inputs
        self.ranks = ranks
        self._first = findings is None
        self.findings = Findings() if findings is None else findings
        self.replay = Replay(self.whole, self.start) if again or self._first else None
        self.repeats: OneBatch | None = None
        self.held: Buffers = []
        self.shared = trainable(model.shared_parameters())
        self._place(presence)
        self.latent: Gradients = []
        self._sent_back: list[Gradients] = []
        self._linear: tuple[Gradients, Gradients] = [], []
        self._used = False  # whether the graph of the features has seen a backward pass

    def _place(self, presence: Targets) -> None:
        names, model = presence.names, self.model
        self.presence = self.targets = presence
        self.functions = [self.losses_of[task] for task in names]
        self.own = [trainable(model.head_parameters(task)) for task in names]

    @property
    def module(self) -> SharedTrunk:
        """The network."""
        return self.model

    def be_part_of(self, joint: Presence) -> None:
        """Take the positions and shares of a larger batch."""
        self._place(self.targets.part_of(joint))

    def rest(self) -> None:
        """Let go of the losses and of what the heads sent back; all heads share the features."""
        self.values, self._sent_back = [], []
        self.features.join(len(self.presence.tasks))

    # ------------------------------------------------------------------ the first look

    def look(self, apart: bool = True) -> OneBatch:
        """Pass the trunk once and each head once; with `apart` each on features of its own."""
        if apart and self.findings.compiled_trunk and self.replay is None:
            self.replay = Replay(self.whole, self.start)
        recording = self.replay.recording if self.replay else lambda *_: nullcontext()
        names, model = self.presence.names, self.model
        if self.repeats is not None:
            self.repeats.begin_again()
        with self.ranks.agreeing(), noting_cuts(self._first) as cuts:
            with recording(TRUNK, model.trunk):
                features = self._features()
            self.features = Boundary(features, len(names), apart)
            if self.shared and torch.is_grad_enabled() and not self.features.outputs:
                raise EquipoiseError(
                    "the trunk has parameters to train, but no tensor that it returned requires a "
                    "gradient. It may be detached, made under torch.no_grad, in something other "
                    "than dicts, lists and tuples, or checkpointed with use_reentrant=True."
                )
            self.values: list[Tensor | None] = []
            for k, task in enumerate(names):
                with recording(task, self._parts(k)):
                    self.values.append(self._loss(k, self.features.of(k)))
        if self._first:
            outputs, suspect = self.features.outputs, model if cuts else None
            self.findings = findings_of(names, outputs, self.values, self.ranks, suspect)
        self.passes = Passes(model, self.findings, self._first)
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
            raise TaskError(task, NOT_CONNECTED)
        return loss

    def cause(self, task: str) -> str | None:
        """What the labels say."""
        return self.targets.cause(task, self.losses_of[task])

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
        task = self.presence.names[k]
        if not self.presence.here(task):  # nor has anything been recorded
            return None
        with self.replay.again(task):
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
        recorded = self.findings.compiled  # then the code of the first look serves again
        with torch.set_grad_enabled(recorded):
            torch.clear_autocast_cache()  # it holds half-precision copies of the parameters
            if latent is None:
                values = self.losses_again(tasks)
            else:
                features = self.features.moved(*latent, recorded)
                with self.ranks.agreeing(), self.replay.looking():
                    values = [self._loss_again(k, features) for k in tasks]
            torch.clear_autocast_cache()
        return self.joint(values)


def trainable(parameters: list[nn.Parameter]) -> list[Tensor]:
    """Those that are not frozen."""
    return [p for p in parameters if p.requires_grad]
