"""What a Step is made of: checked together when it is built, exchanged, saved and loaded."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.aggregation import MGDA, Sum
from equipoise.engine.compatibility import refuse_senseless, shared_trunk
from equipoise.engine.evaluation import Evaluation, OneBatch
from equipoise.engine.gathered import Gathered
from equipoise.engine.graph_network import GraphNetwork
from equipoise.engine.learner import Learner
from equipoise.engine.micro_batches import MicroBatches
from equipoise.engine.network import Network
from equipoise.engine.partition import Partition, Shared
from equipoise.engine.ranks import Ranks
from equipoise.engine.rows import Rows
from equipoise.engine.saving import Before, held_outside, load, saved, undone_on_error
from equipoise.engine.scaling import Scaling, refuse_scaler
from equipoise.engine.stages import Needs, Stages
from equipoise.engine.trunk_network import TrunkNetwork
from equipoise.engine.wrappers import refuse_optimizer, refuse_wrappers
from equipoise.errors import EquipoiseError, NonFiniteError
from equipoise.line_search.base import LatentLineSearch, LineSearch
from equipoise.sharpness import TaskSharpness
from equipoise.weighting import EW


class Assembly:
    """The parts of a Step, and whatever outlives a step.

    Args:
        model: as Step takes it, and so the others.
        optimizer: likewise.
        shared: likewise.
        answers: the other arguments of Step, by name; each can be exchanged later.
    """

    optimizer: torch.optim.Optimizer | Any
    tasks: tuple[str, ...]
    losses: Any
    weighting: Callable[..., Tensor]
    aggregator: Callable[..., Tensor]
    sharpness: TaskSharpness | None
    line_search: LineSearch | None
    clip_norm: float | None
    _answers: dict[str, Any]
    _stages: Stages
    _network: Network
    _learner: Learner
    _scaling: Scaling
    _rows: Rows | None

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        shared: Any,
        **answers: Any,
    ) -> None:
        self.model, self.optimizer, self._shared = model, optimizer, shared
        self._ranks, self._rows = Ranks(), None
        self._gathered = Gathered()
        self._take(**answers)

    def _take(
        self,
        losses: Any,
        clip_norm: float | None,
        scaler: Any,
        missing: str,
        on_nonfinite: str,
        **stages: Any,
    ) -> None:
        """Take the answers, if they go together."""
        latent = isinstance(stages["line_search"], LatentLineSearch)
        usual = {"weighting": EW(), "aggregator": MGDA() if latent else Sum()}
        stages |= {place: stage for place, stage in usual.items() if stages[place] is None}
        found, now = Stages.of(**stages, descending=MGDA()), self.__dict__
        if self._gathered:
            raise EquipoiseError(
                "micro-batches have been collected with the stages as they are; make the step, or "
                "call step.backward, before you exchange a stage."
            )
        if losses is now.get("losses"):
            network: Network = self._network  # which keeps what it knows
        else:
            network = network_of(self.model, losses, self.optimizer, self._shared, found.needs)
        refuse_senseless(found, network, self.optimizer, clip_norm, missing)
        scaling = Scaling(scaler, on_nonfinite)
        refuse_scaler(found, self.model, scaling.scaler)
        if "_scaling" in now:
            scaling.skipped = self._scaling.skipped
        learner = now.get("_learner")
        if learner is None or learner.parameters != found.weighting.learnable:
            learner = Learner(found.weighting, self.optimizer)
        found.agree(self._ranks)
        answers = {
            "losses": network.losses, "clip_norm": clip_norm, "scaler": scaler,
            "missing": missing, "on_nonfinite": on_nonfinite, **stages,
        }  # fmt: skip
        now.update(answers, _answers=answers, level=found.level, tasks=network.tasks)
        now.update(_stages=found, _network=network, _shared=network.shared)
        now.update(_learner=learner, _scaling=scaling)
        network.needs, network.missing = found.needs, missing

    def __setattr__(self, name: str, value: Any) -> None:
        """Another answer to one of the questions is checked as when the Step was built."""
        if name in self.__dict__.get("_answers", ()):
            self._take(**{**self._answers, name: value})
        elif name in ("model", "optimizer", "shared") and "_answers" in self.__dict__:
            raise EquipoiseError(f"a Step keeps its {name}; build a new Step, and load the state.")
        else:
            super().__setattr__(name, value)

    @property
    def forms_gram(self) -> bool:
        """Whether its reports hold inner products of task gradients."""
        return self._stages.needs.rows is not None

    # ------------------------------------------------------------------ what a step asks of them

    def _undone_on_error(self, parameters: Iterable[Tensor]) -> AbstractContextManager[Before]:
        """If the body raises, all that it has changed is as before; but for these parameters."""
        devices = {p.device for p in parameters}
        copied, by_themselves = self._stages.changed
        return undone_on_error(self.model, devices, copied, [*by_themselves, self._network])

    def _evaluate(self, batch: Any, before: Before) -> OneBatch:
        """The batch, before its first look."""
        stages = self._stages
        out = stages.weighting.left_out
        look = self._network.evaluate(batch, self._ranks, out, stages.looks_again)
        look.scale = self._scaling.begin(self._network.parameters)
        before.names = look.presence.names
        return look

    def _joint(self, last: OneBatch, before: Before) -> Evaluation:
        """The last batch together with what has been collected."""
        if not self._gathered:
            return last
        if self._gathered.spoiled is not None:
            raise self._gathered.spoiled
        look = MicroBatches(self._gathered, last)
        if self._gathered.parts and not self._network.repeats:
            look.refuse_changed()
            self._network.repeats = True
        look.scale, before.names = last.scale, look.presence.names
        return look

    @contextmanager
    def _spoiled_by_infinity(self) -> Generator[None]:
        """A micro-batch that is not finite is no error where the step will be skipped for it."""
        try:
            yield
        except NonFiniteError as error:
            if not self._scaling.skips:
                raise
            self._gathered = Gathered(spoiled=error)

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

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """A copy of all that the next step depends on.

        That is the model, the optimizer, the stages, the state of the global random generators
        (torch's, from which dropout draws, Python's and numpy's), the scaler, and with a closure
        what the tasks have reached.

        Raises:
            EquipoiseError: micro-batches have been collected, which are no part of a state.
        """
        if self._gathered:
            raise EquipoiseError(
                "micro-batches have been collected and would be lost; save the state after the "
                "step that they belong to."
            )
        return saved(self._stateful(), self._stages.names(), self.model)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken: the next step will be the same, bit for bit.

        What has been collected is forgotten.

        Raises:
            EquipoiseError: the state belongs to a Step with other stages or another model;
                nothing has changed then.
        """
        load(state, self._stateful(), self._stages.names(), self.model)
        self._gathered = Gathered()

    def _stateful(self) -> dict[str, Any]:
        optimizer = {} if self.optimizer is None else {"optimizer": self.optimizer}
        return {
            "model": self.model,
            **optimizer,
            **held_outside(
                self.model, self.optimizer, self._network.losses, self._stages.weighting.learnable
            ),
            **self._stages.stateful,
            "network": self._network,
            "learner": self._learner,
            "scaling": self._scaling,
        }


def network_of(
    model: nn.Module,
    losses: Mapping[str, Callable[..., Tensor]] | Iterable[str],
    optimizer: torch.optim.Optimizer | None,
    shared: Shared | None,
    needs: Needs,
) -> Network:
    """How a step sees what it trains: as a SharedTrunk, or through a closure.

    Raises:
        CombinationError: a wrapper around the network, or an optimizer, that a step cannot serve.
    """
    refuse_wrappers(model)
    if optimizer is not None:
        refuse_optimizer(optimizer)
    if isinstance(losses, Mapping):
        return TrunkNetwork(shared_trunk(model, losses, shared), dict(losses), optimizer, needs)
    return GraphNetwork(model, Partition(model, losses, optimizer, shared), needs)
