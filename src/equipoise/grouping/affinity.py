"""Other measures of which tasks help each other: gradient cosines, and TAG's lookahead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.engine.compatibility import refuse_bypassed
from equipoise.engine.displaced import Displaced
from equipoise.engine.ranks import Ranks
from equipoise.engine.targets import Targets
from equipoise.engine.trunk_evaluation import TrunkEvaluation
from equipoise.errors import EquipoiseError, NonFiniteError, TaskError
from equipoise.kept import whole_of
from equipoise.replay import devices_of, frozen_buffers, unchanged_on_error
from equipoise.report import StepReport
from equipoise.trunk import SharedTrunk


class _PairMean(nn.Module):
    """The mean over steps of a (T, T) matrix, each pair over the steps that know it."""

    total: Tensor
    count: Tensor

    def __init__(self, tasks: tuple[str, ...]) -> None:
        super().__init__()
        self.tasks = tasks
        self.register_buffer("total", torch.zeros(len(tasks), len(tasks), dtype=torch.float64))
        self.register_buffer("count", torch.zeros(len(tasks), len(tasks), dtype=torch.int64))

    def _add(self, values: Tensor) -> None:
        known = ~values.isnan()
        self.total += torch.where(known, values, 0.0)
        self.count += known

    def matrix(self) -> Tensor:
        """(T, T) float64 mean affinities so far; `affinity_gram` prepares them for `cluster`.

        Raises:
            EquipoiseError: two tasks have never been measured together; names them.
        """
        never = (self.count == 0).nonzero()
        if len(never):
            first, second = (self.tasks[i] for i in never[0].tolist())
            raise EquipoiseError(
                f"tasks {first!r} and {second!r} have never been measured together; update with "
                "batches in which both have labels, and losses that are not 0."
            )
        return self.total / self.count


class GradientAffinity(_PairMean):
    """Mean cosine between the task gradients, from what gradient recipes compute anyway.

    Each step's `report` has the inner products of the gradients of the shared parameters (at
    `level="features"`: of the features), of which constant factors and weights do not change the
    cosines. A step without them, or a gradient that is zero, counts for no pair.

    Args:
        tasks: names of the T tasks.

    State: 2 T^2 numbers, in `state_dict`.
    """

    def __init__(self, tasks: tuple[str, ...]) -> None:
        super().__init__(tuple(tasks))

    def update(self, report: StepReport) -> None:
        """Count one step.

        Raises:
            EquipoiseError: the step has formed no inner products, or is one of other tasks.
        """
        if report.tasks != self.tasks:
            raise EquipoiseError(f"the report is of tasks {report.tasks}, not {self.tasks}.")
        if report.cosines is None:
            raise EquipoiseError(
                "the step formed no inner products of gradients, as loss-only recipes do not; use "
                "a gradient recipe, for example 'pcgrad' or 'mgda-ub'."
            )
        self._add(report.cosines.clamp(-1, 1))


class LookaheadAffinity(_PairMean):
    """TAG's inter-task affinity (Fifty et al., NeurIPS 2021, arXiv 2109.04617, section 4.1).

    Z[i, j] = 1 - L_j(theta - lr g_i, phi_j) / L_j(theta, phi_j), averaged over steps: by which part
    the loss of task j falls when the trunk alone follows the gradient g_i of task i. All looks are
    at the same batch, with the same dropout masks; parameters, buffers and random generators are
    afterwards as before. Above 0, task i helps task j.

    Args:
        model: a SharedTrunk.
        losses: task name -> callable(output, target) -> mean over the samples.
        lr: the length of the lookahead step.

    Passes, for T tasks: trunk T + 1 forwards and T backwards, each head T + 1 forwards and one
    backward; so look at each tenth batch or so, as the paper proposes. Memory: a copy of the
    trunk and one gradient. State: 2 T^2 numbers, in `state_dict`.

    Raises:
        ValueError: `lr` is not positive.
        TaskError: a task without a loss.
        CombinationError: a model whose forward is its own, or has hooks.
    """

    def __init__(
        self, model: SharedTrunk, losses: Mapping[str, Callable[[Any, Any], Tensor]], lr: float
    ) -> None:
        super().__init__(model.tasks)
        refuse_bypassed(model, "LookaheadAffinity")
        if not lr > 0:
            raise ValueError(f"lr is {lr}; it must be positive.")
        for task in model.tasks:
            if task not in losses:
                raise TaskError(task, "has a head but no loss; add it to `losses`.")
        self._model = (model,)  # no submodule: the state is the affinities alone
        self.losses, self.lr = dict(losses), lr

    def update(
        self, inputs: Any, targets: Mapping[str, Any], masks: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Look at one batch.

        Args:
            inputs: what the trunk takes.
            targets: as a step gets them; absent tasks count for no pair.
            masks: likewise.

        Returns:
            (T, T) float64, Z of this batch; NaN for absent tasks, and where L_j is 0.

        Raises:
            TaskError: what is wrong with which task; nothing has changed then.
        """
        model = self._model[0]
        ranks = Ranks()
        presence = Targets(model.tasks, targets, masks, ranks, missing="loss")
        found = torch.full_like(self.total, torch.nan, device="cpu")
        whole = whole_of(model, self.losses.values())
        with unchanged_on_error(whole, devices_of(model)) as random, frozen_buffers(whole):
            if presence.names:
                batch = inputs, presence, ranks
                look = TrunkEvaluation(model, self.losses, *batch, again=True, whole=whole)
                found[torch.outer(presence.present, presence.present)] = self._look(look).flatten()
            random.restore()
        self._add(found.to(self.total.device))
        return found

    def _look(self, look: TrunkEvaluation) -> Tensor:
        """(T', T') of the present tasks."""
        names = look.presence.names
        with torch.enable_grad():
            look.look()
            look.heads_backward(torch.ones(len(names)))
        after = torch.empty(len(names), len(names), dtype=torch.float64)
        with Displaced(look.shared) as trunk:
            for i in range(len(names)):
                own = look.row(i, retain_graph=True)
                gradient = look.ranks.sum_gradients(own, look.shared)
                trunk.move(list(zip(look.shared, gradient, strict=True)), -self.lr)
                after[i] = look.trial_losses()
                trunk.back()  # the next task's backward goes through these parameters
        for j, task in enumerate(names):
            if not bool(after[:, j].isfinite().all()):
                raise NonFiniteError(
                    task, f"loss is not finite after a lookahead with lr={self.lr}; lower it."
                )
        return torch.where(look.losses != 0, 1 - after / look.losses, torch.nan)
