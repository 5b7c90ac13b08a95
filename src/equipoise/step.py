"""Step: the data path of one training step, top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from equipoise.aggregation import Aggregator, Sum
from equipoise.batch import Batch
from equipoise.boundary import Gradients
from equipoise.combinations import held_by, known_coefficients, refuse_senseless
from equipoise.errors import (
    NOT_FINITE,
    EquipoiseError,
    NonFiniteError,
    TaskError,
)
from equipoise.labels import Labels
from equipoise.linalg import finite_norm
from equipoise.perturbed import SecondLook
from equipoise.random import twin
from equipoise.ranks import Ranks
from equipoise.replay import RandomState, Replay, devices_of, unchanged_on_error
from equipoise.rows import Combination, Rows, combine
from equipoise.sharpness import TaskSharpness
from equipoise.step_report import StepReport
from equipoise.trunk import SharedTrunk
from equipoise.weigh import learnable, weigh
from equipoise.weighting import EW, Weighting


class Step:
    """One training step of several tasks: losses, weighting, aggregation, update.

    Args:
        model: a SharedTrunk.
        losses: task name -> callable(output, target) that returns the mean over the samples.
        optimizer: holds the model's parameters; any optimizer whose `step` needs no closure.
        weighting: how much each loss counts; a Weighting, or any callable from losses (T,) to
            weighted losses (T,). None: EW. Its parameters get an optimizer group of their own.
        aggregator: how the task gradients become one direction; an Aggregator, or any callable
            from rows (T, P), which it leaves as they are, to (P,), for example one of TorchJD's.
            None: Sum.
        sharpness: TaskSharpness, for gradients from perturbed points (F-MTL); the flat rows then
            have an aggregator of their own, a copy. None: from where the parameters are.
        level: "parameters": the rows are gradients of the shared parameters. "features": of the
            features (MGDA-UB and its kin); the trunk then sees one backward.
        heads: "own": each head follows the gradient of its own weighted loss. "weighted": times the
            aggregator's coefficient of its task, as one backward of the sum of coefficient times
            weighted loss would give it; a negative coefficient lets a head climb.
        clip_norm: bound on the norm of the whole update direction, heads included; None: none.

    Raises:
        TaskError: `losses` misses a task, or names one that the model does not have.
        CombinationError: stages that make no sense together; both are named.
        ValueError: a parameter out of its range.

    The trunk learns through its features
    alone: a loss that looks at the trunk's parameters directly does not reach them. Under
    torch.distributed each process calls the step with its part of the batch, and all make the step
    of the joint batch.

    Passes: trunk 1 forward; T backwards, or 1 at the feature level and for loss-only recipes
    (Sum, Mean); heads 1 forward and 1 backward; more where a stage says so. Memory: T x P numbers,
    or none for those.
    """

    def __init__(
        self,
        model: SharedTrunk,
        losses: Mapping[str, Callable[[Any, Any], Tensor]],
        optimizer: torch.optim.Optimizer,
        weighting: Callable[..., Tensor] | None = None,
        aggregator: Callable[..., Tensor] | None = None,
        sharpness: TaskSharpness | None = None,
        *,
        level: str = "parameters",
        heads: str = "own",
        clip_norm: float | None = None,
    ) -> None:
        self.model = model
        self.losses = dict(losses)
        self.optimizer = optimizer
        self.weighting = EW() if weighting is None else weighting
        self.aggregator = Sum() if aggregator is None else aggregator
        self.sharpness = sharpness
        self.flat_aggregator: Any = None if sharpness is None else twin(self.aggregator)
        self.level = level
        self.heads = heads
        self.clip_norm = clip_norm
        refuse_senseless(self)
        self.ranks = Ranks()
        self.ranks.align(s.generator for s in self._stages().values() if hasattr(s, "generator"))
        self._adopt_weighting()
        self._rows: Rows | None = None

    def __call__(
        self,
        inputs: Any,
        targets: Mapping[str, Any],
        masks: Mapping[str, Tensor] | None = None,
    ) -> StepReport:
        """Make one step.

        Args:
            inputs: whatever the trunk takes.
            targets: task name -> target. A task may be absent: its head is then left alone.
                Samples with a NaN in their target do not count for that task.
            masks: task name -> bool (B,), False for samples that do not count for that task.

        Raises:
            TaskError: what is wrong with which task. A step that raises has changed nothing:
                parameters, buffers, optimizer, stages and random generators are as before (only
                the gradients of the step before are gone).
        """
        left_out = getattr(self.weighting, "left_out", ())
        labels = Labels(self.model.tasks, targets, masks, self.ranks, left_out)
        if not labels.names:
            return StepReport.skipped(labels.tasks)
        self.model.zero_grad()  # frees P numbers before the rows are formed
        with self._undo(labels) as before:
            known = self._known(labels)
            sharp = self.sharpness if self.sharpness and self.sharpness.active else None
            batch = self._forward(inputs, labels, known, sharp is not None)
            factors, weights, learned = weigh(self.weighting, batch.losses, labels, self.optimizer)
            heads = batch.heads_backward(factors)
            look = None

            if known is not None:
                result = Combination(known)
                trunk = batch.trunk_backward(known)
            elif self.level == "features":
                result, trunk = batch.features_backward(self.aggregator)
            else:
                rows = batch.fill(self._buffer(batch))
                result, direction = combine(rows, self.aggregator, batch.losses)
                if sharp:
                    look = SecondLook(batch, rows, heads, factors, sharp)
                    direction, heads, result.flat = look.along(direction, self.flat_aggregator)
                trunk = rows.per_parameter(direction)
            if self.heads == "weighted":
                heads = batch.heads_times(heads, result.coefficients)

            norm = finite_norm(trunk)
            if norm is None or finite_norm(heads) is None:
                raise self._non_finite(inputs, labels, heads, before)
            report = StepReport.of_present(labels, batch.losses, weights, factors, result, norm)
            self._update(batch, trunk, heads, learned)
        if look:
            look.commit()
        self._let_weighting_learn(batch, report, before)
        return report

    # ------------------------------------------------------------------ its parts

    def _forward(self, inputs: Any, labels: Labels, known: Tensor | None, again: bool) -> Batch:
        apart = known is None or bool((known != known[0]).any())
        replay = Replay(self.model) if again else None
        return Batch(self.model, self.losses, inputs, labels, self.ranks, apart, replay)

    def _buffer(self, batch: Batch) -> Rows:
        """The (T, P) buffer, made anew only if the trunk's trainable parameters have changed."""
        if self._rows is None or not self._rows.fit(batch.trunk_parameters):
            self._rows = None  # free the old one first
            self._rows = Rows(batch.trunk_parameters, len(self.model.tasks), self.ranks)
        return self._rows

    def _non_finite(
        self, inputs: Any, labels: Labels, heads: Gradients, before: RandomState
    ) -> EquipoiseError:
        """The error for a gradient that is not finite: names the task, at the price of a replay."""
        before.restore()  # the same dropout masks again
        batch = Batch(self.model, self.losses, inputs, labels, self.ranks)
        batch.heads_backward(weigh(self.weighting, batch.losses, labels, self.optimizer)[0])
        task = batch.culprit(heads)
        if task is None:
            return EquipoiseError("each task's gradient is finite, but together they overflow.")
        return NonFiniteError(task, NOT_FINITE)

    def _update(self, batch: Batch, trunk: Gradients, heads: Gradients, learned: Gradients) -> None:
        """Put the gradients where the optimizer looks, None where no task reached, and step."""
        parameters = [
            *batch.trunk_parameters,
            *(p for own in batch.head_parameters.values() for p in own),
            *learnable(self.weighting),
        ]
        for parameter, gradient in zip(parameters, (*trunk, *heads, *learned), strict=True):
            parameter.grad = gradient
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()

    def _let_weighting_learn(self, batch: Batch, report: StepReport, before: RandomState) -> None:
        """Show the weighting what it declares to need of the step that was made."""
        w = self.weighting
        if isinstance(w, Weighting) and (w.needs_gram or w.needs_losses_after):
            after = batch.losses_now(before) if w.needs_losses_after else None
            w.observe(report.losses, batch.labels.present, report.gram, after)

    # ------------------------------------------------------------------ stages

    def _adopt_weighting(self) -> None:
        """Bring the weighting's parameters to the optimizer."""
        held = {id(p) for p in held_by(self.optimizer)}
        new = [p for p in learnable(self.weighting) if id(p) not in held]
        if new:
            group: dict[str, Any] = {"params": new, "weight_decay": 0.0}
            lr = getattr(self.weighting, "lr", None)
            self.optimizer.add_param_group(group if lr is None else {**group, "lr": lr})

    def _known(self, labels: Labels) -> Tensor | None:
        """The coefficients, where the aggregator can name them before there are gradients."""
        for aggregator in (self.aggregator, self.flat_aggregator):
            if isinstance(aggregator, Aggregator):
                aggregator.begin(labels.present)
        known = known_coefficients(self, len(labels.names))
        return None if known is None else self.ranks.from_first(known)

    def _stages(self) -> dict[str, Any]:
        stages = {"weighting": self.weighting, "aggregator": self.aggregator}
        if self.sharpness is not None:
            stages |= {"sharpness": self.sharpness, "flat_aggregator": self.flat_aggregator}
        return stages

    @contextmanager
    def _undo(self, labels: Labels) -> Generator[RandomState]:
        """On an error put everything back, and let the error call the task by its name."""
        try:
            devices = {p.device for p in held_by(self.optimizer)}
            # What sharpness holds may be large; it is not touched before the step has been made.
            stages = [s for s in self._stages().values() if s is not self.sharpness]
            with unchanged_on_error(self.model, stages, devices) as before:
                yield before
        except TaskError as error:
            raise error.named(labels.names) from None

    # ------------------------------------------------------------------ state

    def _stateful(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, **self._stages()}
        return {name: part for name, part in parts.items() if hasattr(part, "load_state_dict")}

    def state_dict(self) -> dict[str, Any]:
        """A copy of all that the next step depends on.

        That is the model, the optimizer, the stages, and the state of torch's global random
        generators, from which dropout draws.
        """
        state: dict[str, Any] = {k: part.state_dict() for k, part in self._stateful().items()}
        state["random"] = RandomState(devices_of(self.model)).state_dict()
        state["stages"] = {k: type(stage).__name__ for k, stage in self._stages().items()}
        return deepcopy(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken: the next step will be the same, bit for bit.

        Raises:
            EquipoiseError: the state belongs to a Step with other stages or another model;
                nothing has changed then.
        """
        mine = self.state_dict()
        if state.get("stages") != mine["stages"]:
            raise EquipoiseError(
                f"the state was saved with {state.get('stages')}, this Step has {mine['stages']}."
            )
        try:
            self._load(state)
        except (KeyError, RuntimeError, ValueError) as error:
            self._load(mine)
            raise EquipoiseError(f"the state does not fit this Step: {error}") from error

    def _load(self, state: Mapping[str, Any]) -> None:
        for name, part in self._stateful().items():
            part.load_state_dict(deepcopy(state[name]))
        random = RandomState(devices_of(self.model))
        random.load_state_dict(state["random"])
        random.restore()
