"""Step: the data path of one training step, top to bottom."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.assembly import Assembly
from equipoise.engine.direction import Combination, combine
from equipoise.engine.evaluation import Evaluation
from equipoise.engine.factors import factors_of
from equipoise.engine.feature_pass import combine_features
from equipoise.engine.gathered import Gathered, Part, refuse_collecting
from equipoise.engine.gradients import scaled
from equipoise.engine.latent_search_pass import LatentSearch
from equipoise.engine.partition import Shared
from equipoise.engine.scaling import Scaler
from equipoise.engine.search_pass import Search
from equipoise.engine.sharpness_pass import SecondLook
from equipoise.engine.update import Held, Update, mark_used
from equipoise.errors import CombinationError, NonFiniteError
from equipoise.linalg import finite_norm
from equipoise.line_search.base import LineSearch
from equipoise.replay import RandomState, Replay
from equipoise.report import StepReport
from equipoise.sharpness import TaskSharpness


class Step(Assembly):
    """One training step of several tasks: losses, weighting, aggregation, update.

    Args:
        model: a SharedTrunk, or with task names any module.
        losses: task name -> callable(output, target) that returns the mean over the samples; the
            step is then called with inputs and targets. Or a list of the T task names: the step is
            then called with a closure that returns the losses.
        optimizer: holds the model's parameters; any optimizer whose `step` needs no closure. None:
            somebody else makes the update; then only `backward` and `collect` can be called.
        weighting: how much each loss counts; a Weighting, or any callable from losses (T,) to
            weighted losses (T,). None: EW. Parameters of its own that `optimizer` does not hold
            are learned by a small optimizer of the Step's own; yours is left as it is.
        aggregator: how the task gradients become one direction; an Aggregator, any callable from
            rows (T, P), which it leaves as they are, to (P,), or one of TorchJD's aggregators or
            Gramian weightings. None: Sum; with FastBacktracking MGDA.
        sharpness: TaskSharpness, for gradients from perturbed points (F-MTL); the flat rows then
            have an aggregator of their own, a copy. None: from where the parameters are.
        line_search: Backtracking or FastBacktracking, which say how far to go; the optimizer is
            then plain SGD, whose learning rate serves the weighting's parameters alone. None: the
            optimizer says.
        shared: with task names, what is shared: a module, parameters, or patterns of parameter
            names ("backbone.*"). None: the parameters that two or more tasks have reached so far
            in the graphs of their losses. Every other parameter that a loss reaches, those inside
            losses too, follows the weighted losses that reach it.
        level: "parameters": the rows are gradients of the shared parameters. "features": of the
            features (MGDA-UB and its kin); the trunk then sees one backward. None: what the line
            search needs ("features" for FastBacktracking), or else "parameters".
        heads: "own": each task's own parameters follow the gradient of its own weighted loss.
            "weighted": times the aggregator's coefficient of the task, as one backward of the sum
            of coefficient times weighted loss would give it; a negative one lets a head climb.
        clip_norm: bound on the norm of the whole update direction, heads included; None: none.
        scaler: a torch.amp.GradScaler, for float16: losses are multiplied by its scale on their way
            back, rows and gradients divided by it again. A step that overflows is skipped: the
            scale falls, and nothing else changes. None: no scale.
        on_nonfinite: a loss or a gradient that is not finite "raise"s a NonFiniteError that names
            the task, or the step is left out ("skip"), which `StepReport.skipped` counts.
        missing: "sample": a target that is NaN in part, as a depth map with holes, is refused.
            "loss": the loss function sees the NaN. A target that is wholly NaN never counts.

    Raises:
        TaskError: `losses` misses a task, or names one that the model does not have.
        CombinationError: stages that make no sense together; both are named.
        ValueError: a parameter out of its range, or `shared` names nothing.

    Under torch.distributed each process gives its part of the batch; all make the joint step.
    Passes: trunk 1 forward; T backwards, or 1 at the feature level and for loss-only recipes
    (Sum, Mean); heads 1 forward and 1 backward; more where a stage says so. A closure is called
    once, T + 2 times with TaskSharpness ("joint": T + 1, "joint-mean": 3), and once more for each
    trial of Backtracking and for FAMO. Memory: T x P numbers, none for loss-only recipes.
    A tensor hook on a parameter sees each gradient that autograd makes of it; post-accumulate hooks
    are called once a step, with the final `.grad`.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> step = Step(net, ["price", "colour"], torch.optim.SGD(net.parameters(), lr=0.1),
        ...             aggregator=MGDA())
        >>> def losses():
        ...     price, colour = net(torch.randn(4, 3)).unbind(1)
        ...     return {"price": price.square().mean(), "colour": (colour - 1).square().mean()}
        >>> report = step(losses)
        >>> report.losses.shape
        torch.Size([2])
    """

    def __init__(
        self,
        model: nn.Module,
        losses: Mapping[str, Callable[[Any, Any], Tensor]] | Iterable[str],
        optimizer: torch.optim.Optimizer | None,
        weighting: Callable[..., Tensor] | None = None,
        aggregator: Callable[..., Tensor] | None = None,
        sharpness: TaskSharpness | None = None,
        line_search: LineSearch | None = None,
        *,
        shared: Shared | None = None,
        level: str | None = None,
        heads: str = "own",
        clip_norm: float | None = None,
        scaler: Scaler | None = None,
        missing: str = "sample",
        on_nonfinite: str = "raise",
    ) -> None:
        super().__init__(
            model, optimizer, shared, losses=losses, weighting=weighting, aggregator=aggregator,
            sharpness=sharpness, line_search=line_search, level=level, heads=heads,
            clip_norm=clip_norm, scaler=scaler, missing=missing, on_nonfinite=on_nonfinite,
        )  # fmt: skip

    def __call__(
        self,
        inputs: Any,
        targets: Mapping[str, Any] | None = None,
        masks: Mapping[str, Tensor] | None = None,
    ) -> StepReport:
        """Make one step, with what has been collected before.

        Args:
            inputs: whatever the trunk takes; or the closure, which is called without arguments and
                returns task name -> scalar loss, or -> (loss, number of samples) where processes
                or micro-batches hold unequal parts. It must give the same losses when it is called
                again: draws from torch's generators are repeated.
            targets: task name -> target. A task may be absent, here or from what the closure
                returns: its own parameters are then left alone. Samples whose target is NaN do not
                count for that task.
            masks: task name -> bool (B,), False for samples that do not count for that task.

        Raises:
            TaskError: what is wrong with which task. A step that raises has changed nothing:
                parameters, buffers, optimizer, stages and random generators are as before (only
                the gradients of the step before are gone). An error inside the optimizer, or in the
                look at the updated network for which FAMO asks, leaves what it has moved. What was
                collected stays if the forward pass fails, and is gone if it fails later.
            EquipoiseError: a parameter holds a gradient that no step has put there.
        """
        if self.optimizer is None:
            raise CombinationError("Step(optimizer=None) makes no update; call step.backward.")
        return self._make((inputs, targets, masks), updates=True)

    def backward(
        self,
        inputs: Any,
        targets: Mapping[str, Any] | None = None,
        masks: Mapping[str, Tensor] | None = None,
    ) -> StepReport:
        """Add the gradients of a step to `.grad`, and leave the update to somebody else.

        The stages' own states move, a learned weighting's parameters included. With a scaler the
        gradients are multiplied by its scale, for its owner to unscale, step and update as usual;
        if they overflow, an infinite gradient tells it so. `clip_norm` bounds what is added.
        Arguments and errors are those of a call of the step.

        Raises:
            CombinationError: a stage makes the update itself: a line search, FAMO.
        """
        stages = self._stages
        if self.line_search is not None or stages.weighting.needs_losses_after:
            who = type(self.line_search or self.weighting).__name__
            raise CombinationError(f"backward and {who}: {who} makes the update. Call step().")
        return self._make((inputs, targets, masks), updates=False)

    def collect(
        self,
        inputs: Any,
        targets: Mapping[str, Any] | None = None,
        masks: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Take in a micro-batch; the next step, or `backward`, treats all as one joint batch.

        Losses are weighted by their numbers of samples: those with a label, or what the closure
        gives with each loss, else 1. All processes make the same calls. An error in the backward
        passes forgets what was collected; where steps are skipped, one that is not finite lets the
        joint step be skipped. Arguments are those of a call of the step.

        Returns:
            (T,) losses of the micro-batch, NaN for an absent task; all NaN if it is not finite.

        Raises:
            CombinationError: the rows are gradients of features, all of which would be needed.

        Passes: 1 forward, T backwards; 1 forward where the coefficients are known beforehand, and
        one of each more in the step. Memory: T x P numbers, or none; the micro-batch itself where
        it is looked at again, which must be as it was then.
        """
        refuse_collecting(self._stages)
        replay = Replay(self._network.whole)
        losses = StepReport.nothing_done(self.tasks).losses
        undone = self._undone_on_error(self._network.parameters())
        with self._spoiled_by_infinity(), undone as before, replay.recording(None):
            look = self._evaluate((inputs, targets, masks), before)
            if not before.names or self._gathered.spoiled is not None:
                return losses
            look = look.look()
            losses = look.presence.spread(look.losses, torch.nan)
            gathered, self._gathered = self._gathered, Gathered()
            gathered.add(Part(look, replay), self._stages, self._buffer)
            self._gathered = gathered
        return losses

    # ------------------------------------------------------------------ the data path

    def _make(self, batch: Any, updates: bool) -> StepReport:
        """Make a step, or leave it out if it is not finite."""
        held = Held(self._network, self._learner.parameters, drops=updates)
        try:
            return self._follow(batch, updates, held)
        except BaseException as error:
            held.put_back()
            if not (isinstance(error, NonFiniteError) and self._scaling.skips):
                raise
            self._gathered = Gathered()
            self._scaling.skip(held.parameters, updates)
            return StepReport.nothing_done(self.tasks, self._scaling.skipped)

    def _follow(self, batch: Any, updates: bool, held: Held) -> StepReport:
        stages = self._stages
        with self._undone_on_error(held.parameters) as before:
            look = self._joint(self._evaluate(batch, before), before)
            if not before.names:
                held.put_back()
                return StepReport.nothing_done(self.tasks, self._scaling.skipped)
            if updates:
                held.forget()  # P numbers less while the rows are formed
            known = self._known(look)
            look = look.look(apart=known is None or bool((known != known[0]).any()))
            self._gathered = Gathered()
            weighted = factors_of(stages.weighting, look.losses, look.presence, self.optimizer)
            factors, learned = weighted.factors, weighted.learned
            rows = second = found = None

            if known is not None:
                result = Combination(known)
                shared, own = look.backward(known, factors)
            elif stages.level == "features":
                result, shared, raw = combine_features(look, stages, factors)
                own = scaled(raw, factors)
            else:
                rows = self._buffer(look)
                raw = moved = look.fill(rows)
                rows.weigh(factors)
                result, direction = combine(rows, stages.aggregator, look.losses, stages.descent)
                if stages.perturbation:
                    keep = self.line_search is not None
                    second = SecondLook(look, rows, raw, factors, stages.perturbation, keep)
                    direction, moved, result.flat = second.along(direction, stages.flat)
                shared = rows.per_parameter(direction)
                own = scaled(moved, factors)
            heads = own if stages.heads == "own" else scaled(own, result.coefficients)

            norm, of_heads = finite_norm(shared), finite_norm(itertools.chain(*heads))
            if norm is None or of_heads is None:
                raise self._not_finite(look, before.random)
            self._scaling.refuse_overflow(max(norm, of_heads), look.shared)
            moving = self.optimizer, self._learner, self._scaling
            update = Update(look, held, *moving, self.clip_norm)
            if not updates:
                update.add(shared, heads, learned)
            elif self.line_search is None:
                update.step(shared, heads, learned)
            else:
                clean = scaled(raw, factors) if second else own
                kind = LatentSearch if stages.level == "features" else Search
                buffer = partial(self._buffer, look)
                search = kind(look, stages, factors, clean, update, buffer, rows, second)
                found, result, norm = search.along(result, shared, heads, learned)
            report = StepReport.of(look, weighted, result, norm, found, self._scaling.skipped)
        if second:
            second.commit()
        if updates:
            mark_used(held.parameters)
        self._let_weighting_learn(look, report, before.random)
        return report

    def _not_finite(self, look: Evaluation, before: RandomState) -> NonFiniteError:
        """The error for a gradient that is not finite; names the task, which costs a replay."""
        if self._scaling.skips:  # nobody will read it
            return NonFiniteError(None, "a gradient is not finite.")
        return look.why_not_finite(before, partial(self._buffer, look))

    def _let_weighting_learn(
        self, look: Evaluation, report: StepReport, before: RandomState
    ) -> None:
        """Show the weighting what it declares to need of the step that was made."""
        method = self._stages.weighting.method
        if method is not None and (method.needs_gram or method.needs_losses_after):
            after = look.losses_now(before) if method.needs_losses_after else None
            method.observe(report.losses, look.presence.present, report.gram, after)
