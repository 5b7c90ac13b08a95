"""A SharedTrunk seen from a step: the fast way, and any graph where losses reach beyond it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.buffers import Buffers, copy_of_buffers, put_back
from equipoise.draws import RandomState
from equipoise.engine.compatibility import refuse_bypassed
from equipoise.engine.direction import FeatureGradients
from equipoise.engine.evaluation import OneBatch
from equipoise.engine.graph_evaluation import GraphEvaluation
from equipoise.engine.graph_network import GraphNetwork
from equipoise.engine.graphs import reached_leaves
from equipoise.engine.lazy import LazyParameters
from equipoise.engine.network import Network
from equipoise.engine.partition import Partition
from equipoise.engine.passes import Findings
from equipoise.engine.ranks import Ranks
from equipoise.engine.stages import Needs, Stages
from equipoise.engine.targets import Targets
from equipoise.engine.trunk_evaluation import TrunkEvaluation
from equipoise.engine.trunk_looks import Losses
from equipoise.engine.unreached import WHY
from equipoise.errors import CombinationError, EquipoiseError, raised_in
from equipoise.kept import Attributes, search_again, whole_of
from equipoise.replay import devices_of
from equipoise.trunk import SeparateTrunks, SharedTrunk, bypassed, outputs_of

BUFFERS = "buffers of losses"
"""Where they are in the state of a network, with the names of parameters; none is called so."""


class TrunkNetwork(Network):
    """A SharedTrunk with a loss for each task; batches are inputs, targets and masks.

    Heads are differentiated on detached features. What a loss reaches besides its own head and the
    features (a parameter of its own, the trunk's weights, another head) would be lost; the first
    step with labels of a task looks for it. Where there is such a path, this and all later steps
    differentiate the whole graph instead, as they do for a closure; and so they do for a model
    whose forward is its own, or has hooks, which they call then.

    Args:
        model: the network.
        losses: task name -> callable(output, target); the mapping itself, not a copy.
        optimizer: may hold parameters of the losses.
        needs: what the stages want of it.

    Attributes:
        checked: the tasks whose losses are known to reach nothing else, each with its loss.
        reaching: those of them whose losses reach the features.
        warned: whether the user knows that no conflict can be seen among the features.
    """

    has_features = True
    shared = None

    def __init__(
        self,
        model: SharedTrunk,
        losses: Losses,
        optimizer: torch.optim.Optimizer | None,
        needs: Needs,
    ) -> None:
        self.module = self.model = model
        self.losses = losses
        self.optimizer = optimizer
        self.needs = needs
        self.tasks = model.tasks
        self.shares_nothing = isinstance(model.trunk, SeparateTrunks)
        self.checked: dict[str, Callable[..., Tensor]] = {}
        self.findings = Findings()
        self.reaching: frozenset[str] = frozenset()
        self.warned = False
        self.whole = whole_of(model, losses.values())
        self.lazy = LazyParameters(model)
        self._held: Buffers = []
        self._graph: GraphNetwork | None = None

    def evaluate(self, batch: Any, ranks: Ranks, left_out: frozenset[int], again: bool) -> OneBatch:
        """Take inputs, targets and masks.

        Raises:
            TaskError: a target or a mask that does not fit its task.
            EquipoiseError: a closure, or no target at all.
        """
        inputs, targets, masks = batch
        if targets is None:
            raise EquipoiseError(
                "the step got no targets. A Step with a dict of losses takes step(inputs, "
                "targets); to call step(closure), build it with the list of task names instead."
            )
        presence = Targets(self.tasks, targets, masks, ranks, left_out, self.missing)
        self.lazy.make(partial(self._all_outputs, inputs), ranks)
        if self._graph is None and bypassed(self.model):  # a hook may have come since
            refuse_bypassed(self.model, self.needs.features)
            self._graph = self._whole_graph()
        if self._graph is not None:
            return self._evaluate_graph(self._graph, inputs, presence, ranks, again)
        if all(self.checked.get(task) is self.losses[task] for task in presence.names):
            look = TrunkEvaluation(
                self.model, self.losses, inputs, presence, ranks, again, self.findings, self.whole
            )
        else:
            search_again(self.whole)  # the head of a new task may hold what moves
            look = _CheckedEvaluation(self, inputs, presence, ranks, again)
        look.held = self._held
        return look

    @torch.no_grad()
    def _all_outputs(self, inputs: Any) -> None:
        output_of = outputs_of(self.model, inputs)
        for task in self.tasks:
            output_of(task)

    def parameters(self) -> Iterable[Tensor]:
        """Those of trunk and heads, and what else was found."""
        return self.model.parameters() if self._graph is None else self._graph.parameters()

    def state_dict(self) -> dict[str, Any]:
        """What the tasks have reached, if the whole graph is differentiated; buffers of losses."""
        buffers = {
            f"{task}.{name}": value
            for task, loss in self.losses.items()
            if self.whole is not self.model and isinstance(loss, nn.Module)
            for name, value in loss.state_dict(keep_vars=True).items()
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
        }
        found = {} if self._graph is None else self._graph.state_dict()
        return {**found, BUFFERS: buffers} if buffers else found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it over."""
        self.checked, self.reaching, self._graph = {}, frozenset(), None
        state = dict(state)
        own = self.state_dict().get(BUFFERS, {})
        for name, value in state.pop(BUFFERS, {}).items():
            own[name].copy_(value)
        if state:
            self._graph = self._whole_graph()
            self._graph.load_state_dict(state)

    @contextmanager
    def unchanged_on_error(self) -> Generator[None]:
        """If the body raises, what was found in it is forgotten."""
        graph = self._graph
        before = self.checked, self.reaching, self.findings, graph
        attributes = None
        if self.whole is not self.model:
            attributes = Attributes(self.whole)
            _, *losses = self.whole.children()
            self._held = [held for loss in losses for held in copy_of_buffers(loss)]
        try:
            with (
                nullcontext() if graph is None else graph.unchanged_on_error(),
                self.lazy.unchanged_on_error(),
            ):
                yield
        except BaseException:
            if attributes is not None:
                put_back(self._held)
                attributes.put_back()
            self.checked, self.reaching, self.findings, self._graph = before
            raise

    # ------------------------------------------------------------------ paths beyond the heads

    def beyond(self, look: TrunkEvaluation) -> dict[Tensor, list[str]]:
        """The parameters that a loss reaches besides its own head, each with the tasks that do."""
        partition = Partition(self.model, self.tasks, self.optimizer, None, losses=self.losses)
        values = zip(look.presence.names, look.values, strict=True)
        partition.update({task: v for task, v in values if v is not None}, look.ranks)
        own = {p: [task] for task in self.tasks for p in self.model.head_parameters(task)}
        return {p: tasks for p, tasks in partition.reached().items() if tasks != own.get(p)}

    def by_graph(
        self, look: TrunkEvaluation, beyond: Mapping[Tensor, list[str]], again: bool
    ) -> GraphEvaluation:
        """The same batch, with the whole graph; and so from now on.

        Raises:
            CombinationError: a stage works on the features, where such a path does not pass.
        """
        if self.needs.features is not None:
            parameter, tasks = next(iter(beyond.items()))
            names = {p: f"parameter {name!r}" for name, p in self.model.named_parameters()}
            raise CombinationError(
                f"{self.needs.features} and the loss of task {tasks[0]!r}: the loss reaches "
                f"{names.get(parameter, 'a parameter of its own')} without passing through the "
                "features. Work at the parameters: level='parameters', or Backtracking."
            )
        self._graph = self._whole_graph()
        return self._evaluate_graph(self._graph, look.inputs, look.targets, look.ranks, again)

    def _whole_graph(self) -> GraphNetwork:
        """Shared are the trunk and what two or more tasks reach; a head is its task's own."""
        shared = list(self.model.trunk.parameters())
        heads = {task: self.model.head_parameters(task) for task in self.tasks}
        given = self.optimizer, shared or None, heads, self.losses
        partition = Partition(self.model, self.tasks, *given)
        return GraphNetwork(self.model, partition, self.needs, self.whole)

    def _evaluate_graph(
        self, graph: GraphNetwork, inputs: Any, targets: Targets, ranks: Ranks, again: bool
    ) -> GraphEvaluation:
        def losses() -> dict[str, tuple[Tensor, float]]:
            with raised_in("the trunk"):
                output_of = outputs_of(self.model, inputs)
            found = {}
            for task in targets.names:
                if targets.here(task):
                    with raised_in(f"the head of task {task!r}"):
                        output = output_of(task)
                    output, target = targets.pair(task, output)
                    with raised_in(f"the loss of task {task!r}"):
                        found[task] = self.losses[task](output, target), targets.count(task)
            return found

        def cause(task: str) -> str | None:
            return targets.cause(task, self.losses[task])

        graph.held = self._held
        return GraphEvaluation(graph, losses, ranks, frozenset(), again, cause)


class _CheckedEvaluation(TrunkEvaluation):
    """The first look at a task's labels, which also looks where its loss reaches."""

    def __init__(
        self, network: TrunkNetwork, inputs: Any, targets: Targets, ranks: Ranks, again: bool
    ) -> None:
        batch = inputs, targets, ranks
        super().__init__(network.model, network.losses, *batch, again, None, network.whole)
        self.network, self.again = network, again

    def look(self, apart: bool = True) -> OneBatch:
        """Make the forward pass; once more, with the whole graph, if a loss reaches beyond."""
        random, buffers = RandomState(devices_of(self.model)), copy_of_buffers(self.whole)
        try:
            super().look(apart)
        except BaseException:
            self.start.put_back()
            raise
        self.start.found(final=True)
        if not torch.is_grad_enabled():
            return self
        beyond = self.network.beyond(self)
        if not beyond:
            found = {task: self.network.losses[task] for task in self.presence.names}
            self.network.checked = self.network.checked | found
            self.network.findings = self.findings.and_those(self.network.findings)
            self._refuse_unreached()
            return self
        put_back(buffers)
        self.start.put_back()
        random.restore()
        graph = self.network.by_graph(self, beyond, self.again)
        graph.be_part_of(self.presence)
        graph.scale = self.scale
        return graph.look(apart)

    def _refuse_unreached(self) -> None:
        """Refuse a trunk that its own output, or every loss, leaves without a gradient."""
        outputs = self.features.outputs
        if not self.shared or not outputs:
            return
        if not reached_leaves(outputs).keys() & set(self.shared):
            raise EquipoiseError(f"no parameter of the trunk is reached from its output; {WHY}")
        network, inputs = self.network, set(self.features.inputs)
        found = [
            float(v is not None and bool(reached_leaves([v]).keys() & inputs)) for v in self.values
        ]
        found = self.ranks.sum(torch.tensor(found, device="cpu")).tolist()
        names = self.presence.names
        network.reaching |= {task for task, count in zip(names, found, strict=True) if count}
        if not network.reaching and len(network.checked) == len(network.tasks):
            raise EquipoiseError(f"no loss reaches the features of the trunk; {WHY}")

    def check_overlap(self, gradients: FeatureGradients, stages: Stages) -> None:
        """Warn once where the tasks ask for different features."""
        if len(self.own) < 2 or self.network.warned:
            return
        if not gradients.conflicts_show(stages.aggregator.entry_weights is not None):
            self.network.warned = True
            advice = "Backtracking" if stages.line_search else "level='parameters'"
            warnings.warn(
                f"{stages.needs.features}: no two tasks' gradients of the features overlap, "
                "because each head reads features of its own, or each sample has the label of one "
                f"task only; conflicts cannot be seen among them. Use {advice}.",
                stacklevel=5,
            )
