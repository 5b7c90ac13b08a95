"""Step: the data path of one training step, top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from equipoise.aggregation import MGDA, Aggregator, Sum
from equipoise.batch import Batch
from equipoise.boundary import Gradients
from equipoise.combinations import held_by, known_coefficients, refuse_senseless
from equipoise.combine import Combination, Descent, combine
from equipoise.errors import (
    NOT_FINITE,
    EquipoiseError,
    NonFiniteError,
    TaskError,
)
from equipoise.labels import Labels
from equipoise.linalg import finite_norm
from equipoise.line_search import LineSearch
from equipoise.perturbed import SecondLook
from equipoise.random import twin
from equipoise.ranks import Ranks
from equipoise.replay import RandomState, Replay, devices_of, unchanged_on_error
from equipoise.rows import Rows
from equipoise.search_combinations import refuse_senseless_search
from equipoise.searched import Search
from equipoise.sharpness import TaskSharpness
from equipoise.step_report import StepReport
from equipoise.trunk import SharedTrunk
from equipoise.update import update
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
            None: Sum; beside FastBacktracking MGDA.
        sharpness: TaskSharpness, for gradients from perturbed points (F-MTL); the flat rows then
            have an aggregator of their own, a copy. None: from where the parameters are.
        line_search: Backtracking or FastBacktracking, which say how far to go; the optimizer is
            then plain SGD, whose learning rate serves the weighting's parameters alone. None: the
            optimizer says.
        level: "parameters": the rows are gradients of the shared parameters. "features": of the
            features (MGDA-UB and its kin); the trunk then sees one backward. That is where
            FastBacktracking always works.
        heads: "own": each head follows the gradient of its own weighted loss. "weighted": times the
            aggregator's coefficient of its task, as one backward of the sum of coefficient times
            weighted loss would give it; a negative coefficient lets a head climb.
        clip_norm: bound on the norm of the whole update direction, heads included; None: none.

    Raises:
        TaskError: `losses` misses a task, or names one that the model does not have.
        CombinationError: stages that make no sense together; both are named.
        ValueError: a parameter out of its range.

    The trunk learns through its features alone: a loss that looks at its parameters directly does
    not reach them. Under torch.distributed each process calls the step with its part of the batch,
    and all make the step of the joint batch.

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
        line_search: LineSearch | None = None,
        *,
        level: str = "parameters",
        heads: str = "own",
        clip_norm: float | None = None,
    ) -> None:
        self.model = model
        self.losses = dict(losses)
        self.optimizer = optimizer
        self.weighting = EW() if weighting is None else weighting
        among_features = getattr(line_search, "level", level) == "features"
        usual = MGDA if line_search is not None and among_features else Sum
        self.aggregator = usual() if aggregator is None else aggregator
        self.sharpness = sharpness
        self.flat_aggregator: Any = None if sharpness is None else twin(self.aggregator)
        self.line_search = line_search
        verify = getattr(line_search, "verify", False)
        self.rows_aggregator: Any = twin(self.aggregator) if verify else None
        self.level = "features" if among_features else level
        self.heads = heads
        self.clip_norm = clip_norm
        refuse_senseless(self)
        refuse_senseless_search(self)
        self.descent = None if line_search is None else Descent(line_search.descends, MGDA())
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
            again = sharp is not None or self.line_search is not None
            batch = self._forward(inputs, labels, known, again)
            factors, weights, learned = weigh(self.weighting, batch.losses, labels, self.optimizer)
            heads = own = batch.heads_backward(factors)
            rows = look = found = None

            if known is not None:
                result = Combination(known)
                trunk = batch.trunk_backward(known)
            elif self.level == "features":
                verify = self.rows_aggregator is not None
                result, trunk = batch.features_backward(self.aggregator, self.descent, verify)
            else:
                rows = batch.fill(self.buffer(batch))
                result, direction = combine(rows, self.aggregator, batch.losses, self.descent)
                if sharp:
                    keep = self.line_search is not None
                    look = SecondLook(batch, rows, heads, factors, sharp, keep)
                    direction, heads, result.flat = look.along(direction, self.flat_aggregator)
                trunk = rows.per_parameter(direction)
            if self.heads == "weighted":
                heads = batch.heads_times(heads, result.coefficients)

            norm = finite_norm(trunk)
            if norm is None or finite_norm(heads) is None:
                raise self._non_finite(inputs, labels, heads, before)
            if self.line_search is None:
                update(self, batch, trunk, heads, learned)
            else:
                search = Search(self, batch, factors, own, rows, look)
                found, result, norm = search.along(result, trunk, heads, learned)
            report = StepReport.of_present(
                labels, batch.losses, weights, factors, result, norm, found
            )
        if look:
            look.commit()
        self._let_weighting_learn(batch, report, before)
        return report

    # ------------------------------------------------------------------ its parts

    def _forward(self, inputs: Any, labels: Labels, known: Tensor | None, again: bool) -> Batch:
        apart = known is None or bool((known != known[0]).any())
        replay = Replay(self.model) if again else None
        return Batch(self.model, self.losses, inputs, labels, self.ranks, apart, replay)

    def buffer(self, batch: Batch) -> Rows:
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
        for aggregator in (self.aggregator, self.flat_aggregator, self.rows_aggregator):
            if isinstance(aggregator, Aggregator):
                aggregator.begin(labels.present)
        known = known_coefficients(self, len(labels.names))
        if known is None or not (self.line_search is None or self.line_search.content_with(known)):
            return None
        return self.ranks.from_first(known)

    def _stages(self) -> dict[str, Any]:
        stages = {"weighting": self.weighting, "aggregator": self.aggregator}
        if self.sharpness is not None:
            stages |= {"sharpness": self.sharpness, "flat_aggregator": self.flat_aggregator}
        if self.line_search is not None:
            stages["line_search"] = self.line_search
        if self.rows_aggregator is not None:
            stages["rows_aggregator"] = self.rows_aggregator
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
