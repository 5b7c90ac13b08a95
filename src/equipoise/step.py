"""Step: the data path of one training step, top to bottom."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.aggregation import MGDA, Sum
from equipoise.engine.compatibility import refuse_senseless
from equipoise.engine.direction import Combination, combine
from equipoise.engine.evaluation import Evaluation, Network
from equipoise.engine.factors import factors_of
from equipoise.engine.gradients import scaled
from equipoise.engine.latent_search_pass import LatentSearch
from equipoise.engine.partition import Shared
from equipoise.engine.ranks import Ranks
from equipoise.engine.rows import Rows
from equipoise.engine.saving import held_outside, load, saved, undone_on_error
from equipoise.engine.search_pass import Search
from equipoise.engine.sharpness_pass import SecondLook
from equipoise.engine.stages import Stages
from equipoise.engine.trunk_evaluation import combine_features
from equipoise.engine.trunk_network import network_of
from equipoise.engine.update import Update, adopt, held_by
from equipoise.errors import EquipoiseError
from equipoise.linalg import finite_norm
from equipoise.line_search.base import LatentLineSearch, LineSearch
from equipoise.replay import RandomState, replayed
from equipoise.report import StepReport
from equipoise.sharpness import TaskSharpness
from equipoise.weighting import EW


class Step:
    """One training step of several tasks: losses, weighting, aggregation, update.

    Args:
        model: a SharedTrunk, or with task names any module.
        losses: task name -> callable(output, target) that returns the mean over the samples; the
            step is then called with inputs and targets. Or a list of the T task names: the step is
            then called with a closure that returns the losses.
        optimizer: holds the model's parameters; any optimizer whose `step` needs no closure.
        weighting: how much each loss counts; a Weighting, or any callable from losses (T,) to
            weighted losses (T,). None: EW. Its parameters get an optimizer group of their own.
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

    tasks: tuple[str, ...]
    weighting: Callable[..., Tensor]
    aggregator: Callable[..., Tensor]
    sharpness: TaskSharpness | None
    line_search: LineSearch | None
    clip_norm: float | None
    _answers: dict[str, Any]
    _stages: Stages
    _network: Network
    _rows: Rows | None

    def __init__(
        self,
        model: nn.Module,
        losses: Mapping[str, Callable[[Any, Any], Tensor]] | Iterable[str],
        optimizer: torch.optim.Optimizer,
        weighting: Callable[..., Tensor] | None = None,
        aggregator: Callable[..., Tensor] | None = None,
        sharpness: TaskSharpness | None = None,
        line_search: LineSearch | None = None,
        *,
        shared: Shared | None = None,
        level: str | None = None,
        heads: str = "own",
        clip_norm: float | None = None,
        missing: str = "sample",
    ) -> None:
        self.model, self.optimizer, self._shared = model, optimizer, shared
        self._ranks, self._rows = Ranks(), None
        self._take(
            losses=losses, weighting=weighting, aggregator=aggregator, sharpness=sharpness,
            line_search=line_search, level=level, heads=heads, clip_norm=clip_norm, missing=missing,
        )  # fmt: skip

    def __call__(
        self,
        inputs: Any,
        targets: Mapping[str, Any] | None = None,
        masks: Mapping[str, Tensor] | None = None,
    ) -> StepReport:
        """Make one step.

        Args:
            inputs: whatever the trunk takes; or the closure, which is called without arguments and
                returns task name -> scalar loss, or -> (loss, number of samples) where processes
                hold unequal parts. It must give the same losses when it is called again: draws
                from torch's generators are repeated.
            targets: task name -> target. A task may be absent, here or from what the closure
                returns: its own parameters are then left alone. Samples whose target is NaN do not
                count for that task.
            masks: task name -> bool (B,), False for samples that do not count for that task.

        Raises:
            TaskError: what is wrong with which task. A step that raises has changed nothing:
                parameters, buffers, optimizer, stages and random generators are as before (only
                the gradients of the step before are gone); but an error in the look at the updated
                network for which FAMO asks leaves the step made.
        """
        stages, batch = self._stages, (inputs, targets, masks)
        devices = {p.device for p in held_by(self.optimizer)}
        copied, by_themselves = stages.changed
        undoing = [*by_themselves, self._network]
        with undone_on_error(self.model, devices, copied, undoing) as before:
            out = stages.weighting.left_out
            look = self._network.evaluate(batch, self._ranks, out, stages.looks_again)
            before.names = look.presence.names
            if not before.names:
                return StepReport.skipped(self.tasks)
            self._network.forget_gradients()  # P numbers less while the rows are formed
            known = self._known(look)
            look = look.look(apart=known is None or bool((known != known[0]).any()))
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

            norm = finite_norm(shared)
            if norm is None or finite_norm(itertools.chain(*heads)) is None:
                raise self._not_finite(look, before.random)
            update = Update(self.optimizer, self.clip_norm, look, stages.weighting.learnable)
            if self.line_search is None:
                update.step(shared, heads, learned)
            else:
                clean = scaled(raw, factors) if second else own
                kind = LatentSearch if stages.level == "features" else Search
                buffer = partial(self._buffer, look)
                search = kind(look, stages, factors, clean, update, buffer, rows, second)
                found, result, norm = search.along(result, shared, heads, learned)
            report = StepReport.of(look.presence, look.losses, weighted, result, norm, found)
        if second:
            second.commit()
        self._let_weighting_learn(look, report, before.random)
        return report

    @property
    def forms_gram(self) -> bool:
        """Whether its reports hold inner products of task gradients."""
        return self._stages.needs.rows is not None

    # ------------------------------------------------------------------ its parts

    def _known(self, look: Evaluation) -> Tensor | None:
        """The coefficients, where they can be named before there are gradients."""
        self._stages.begin(look.presence)
        known = self._stages.known(len(look.presence.names))
        return None if known is None else self._ranks.from_first(known)

    def _buffer(self, look: Evaluation) -> Rows:
        """The (T, P) buffer, made again only if the shared parameters have changed."""
        if self._rows is None or not self._rows.fit(look.shared):
            self._rows = None  # free the old one first
            self._rows = Rows(look.shared, len(self.tasks), self._ranks)
        return self._rows

    def _not_finite(self, look: Evaluation, before: RandomState) -> EquipoiseError:
        """The error for a gradient that is not finite: names the task, and costs a replay."""
        before.restore()  # the same dropout masks again
        again = look.repeated().look()
        return again.not_finite(self._buffer(again))

    def _let_weighting_learn(
        self, look: Evaluation, report: StepReport, before: RandomState
    ) -> None:
        """Show the weighting what it declares to need of the step that was made."""
        method = self._stages.weighting.method
        if method is not None and (method.needs_gram or method.needs_losses_after):
            after = None
            if method.needs_losses_after:
                with torch.no_grad(), replayed(self.model, before):
                    after = look.repeated().losses_or_nan()
            method.observe(report.losses, look.presence.present, report.gram, after)

    # ------------------------------------------------------------------ at the beginning

    def _take(self, losses: Any, clip_norm: float | None, missing: str, **stages: Any) -> None:
        """Take the answers to the four questions, if they go together."""
        latent = isinstance(stages["line_search"], LatentLineSearch)
        usual = {"weighting": EW(), "aggregator": MGDA() if latent else Sum()}
        stages |= {place: stage for place, stage in usual.items() if stages[place] is None}
        found, now = Stages.of(**stages, descending=MGDA()), self.__dict__
        if losses is now.get("losses"):
            network: Network = self._network  # which keeps what it knows
        else:
            network = network_of(self.model, losses, self.optimizer, self._shared, found.needs)
        refuse_senseless(found, network, self.optimizer, clip_norm, missing)
        found.agree(self._ranks)
        adopt(self.optimizer, found.weighting, now.get("_stages"))
        answers = {"losses": network.losses, "clip_norm": clip_norm, "missing": missing, **stages}
        now.update(answers, _answers=answers, level=found.level, tasks=network.tasks)
        now.update(_stages=found, _network=network, _shared=network.shared)
        network.needs, network.missing = found.needs, missing

    def __setattr__(self, name: str, value: Any) -> None:
        """Another answer to one of the questions is checked as when the Step was built."""
        if name in self.__dict__.get("_answers", ()):
            self._take(**{**self._answers, name: value})
        elif name in ("model", "optimizer", "shared") and "_answers" in self.__dict__:
            raise EquipoiseError(f"a Step keeps its {name}; build a new Step, and load the state.")
        else:
            super().__setattr__(name, value)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """A copy of all that the next step depends on.

        That is the model, the optimizer, the stages, the state of torch's global random
        generators, from which dropout draws, and with a closure what the tasks have reached.
        """
        return saved(self._stateful(), self._stages.names(), self.model)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken: the next step will be the same, bit for bit.

        Raises:
            EquipoiseError: the state belongs to a Step with other stages or another model;
                nothing has changed then.
        """
        load(state, self._stateful(), self._stages.names(), self.model)

    def _stateful(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            **held_outside(self.model, self.optimizer, self._stages.weighting.learnable),
            **self._stages.stateful,
            "network": self._network,
        }
