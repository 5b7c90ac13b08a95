"""One batch through any network: a closure that gives the losses, and can be called again."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.buffers import Buffers
from equipoise.engine.evaluation import Moving, OneBatch
from equipoise.engine.gradients import Gradients
from equipoise.engine.lazy import LazyParameters
from equipoise.engine.losses import losses_of_closure
from equipoise.engine.partition import Partition
from equipoise.engine.passes import Findings, Passes, findings_of, noting_cuts
from equipoise.engine.ranks import Ranks
from equipoise.engine.rows import TakesRows
from equipoise.engine.stages import Needs
from equipoise.engine.targets import Presence
from equipoise.errors import EquipoiseError, TaskError, raised_in
from equipoise.kept import Search
from equipoise.replay import Replay, frozen_buffers

Closure = Callable[[], Mapping[str, Any]]


class Graph:
    """What is known of a network that is seen through closures.

    Args:
        module: the network.
        partition: which of its parameters are shared.
        needs: what the stages want of it.
        whole: as `kept.whole_of` gives it; None: the network.

    Attributes:
        held: as of Evaluation.
        search: for attributes that move.
    """

    def __init__(
        self, module: nn.Module, partition: Partition, needs: Needs, whole: nn.Module | None = None
    ) -> None:
        self.module = module
        self.whole = module if whole is None else whole
        self.held: Buffers = []
        self.lazy = LazyParameters(module)
        self.partition = partition
        self.tasks = self.losses = partition.tasks
        self.shared = partition.given
        self.needs = needs
        self.findings = Findings()
        self.search = Search(self.whole, self.tasks)


class GraphEvaluation(OneBatch):
    """The losses of one call of the closure; then backward passes, and further calls.

    Args:
        network: what is trained.
        closure: returns task name -> scalar loss, or -> (loss, number of samples).
        ranks: the processes that train together.
        left_out: positions of tasks whose losses do not count.
        again: whether there will be further calls, for which draws and buffers are recorded.
        cause: task name -> why its loss may be NaN; None: nothing is known.
    """

    def __init__(
        self,
        network: Graph,
        closure: Closure,
        ranks: Ranks,
        left_out: frozenset[int],
        again: bool,
        cause: Callable[[str], str | None] | None = None,
    ) -> None:
        self.network = network
        self._cause = cause
        self.closure = closure
        self.ranks = ranks
        self.left_out = {network.tasks[i] for i in left_out}
        self.findings = known = network.findings
        first = not known.tasks | self.left_out >= set(network.tasks)
        self.whole, self.held = network.whole, network.held
        self.start = network.search.begin()
        again = again or known.compiled or first
        self.replay = Replay(self.whole, self.start) if again else None
        with ranks.agreeing(), ExitStack() as recording:
            if self.replay is not None:
                recording.enter_context(self.replay.recording(None))
            cuts = recording.enter_context(noting_cuts(first))
            found = self._call()
        self.suspect = network.module if cuts else None
        network.search.end(self.start, found)
        counts = [found[task][1] if task in found else 0.0 for task in network.tasks]
        self.presence = Presence(network.tasks, counts, ranks)
        self._found = found

    @property
    def module(self) -> nn.Module:
        """The network."""
        return self.network.module

    def be_part_of(self, joint: Presence) -> None:
        """Take the positions and shares of a larger batch."""
        self.presence = self.presence.part_of(joint)
        self.own = [self.network.partition.own(task) for task in self.presence.names]

    def rest(self) -> None:
        """Let go of the losses."""
        self._found, self.values = {}, []

    def _call(self) -> dict[str, tuple[Tensor, float]]:
        """Task name -> loss and number of samples, checked."""
        # Networks that differentiate by their inputs need gradients always.
        with torch.enable_grad(), raised_in("the closure"):
            given = self.closure()
        return losses_of_closure(given, self.network.tasks, self.left_out)

    def _of_present(self, found: Mapping[str, tuple[Tensor, float]]) -> list[Tensor | None]:
        return [found[task][0] if task in found else None for task in self.presence.names]

    # ------------------------------------------------------------------ the first look

    def look(self, apart: bool = True) -> OneBatch:
        """Find out what is shared; the closure has been called already."""
        network, partition = self.network, self.network.partition
        self.values = self._of_present(self._found)
        self._found = {}
        self._examine()
        values = zip(self.presence.names, self.values, strict=True)
        partition.update({task: v for task, v in values if v is not None}, self.ranks)
        if network.needs.owners is not None:
            partition.refuse_common(network.needs.owners, self.findings.compiled)
        self.shared = partition.shared
        self.own = [partition.own(task) for task in self.presence.names]
        if not self.shared and len(self.own) > 1 and network.needs.rows is not None:
            raise EquipoiseError(
                f"no parameter is reached by two tasks, so that {network.needs.rows} has nothing "
                "to combine. Use Sum, or say by `shared` what is shared."
            )
        self.losses = self.joint(self.values)
        self.refuse_infinite_losses()
        return self

    def _examine(self) -> None:
        """Find out what the graphs of new tasks show."""
        names, known = self.presence.names, self.network.findings
        first = not known.tasks.issuperset(names)
        if first:
            new = findings_of(names, (), self.values, self.ranks, self.suspect)
            self.network.findings = new.and_those(known)
        self.findings = self.network.findings
        self.passes = Passes(self.network.module, self.findings, first)

    def repeated(self) -> GraphEvaluation:
        """Call the closure once more, as for a new batch."""
        network = self.network
        out = frozenset(network.tasks.index(task) for task in self.left_out)
        with frozen_buffers(self.whole):
            self.begin_again()
            again = GraphEvaluation(network, self.closure, self.ranks, out, False, self._cause)
        again.presence, again.scale = again.presence.part_of(self.presence), self.scale
        return again

    def cause(self, task: str) -> str | None:
        """What the labels say, where there are any; else what a closure may be wrong in."""
        if self._cause is not None:
            return self._cause(task)
        return (
            "leave the task out of what the closure returns where the batch or its labels are "
            "empty; else lower the learning rate, or leave this batch out."
        )

    # ------------------------------------------------------------------ backward

    def _gradients(
        self,
        values: Sequence[Tensor | None],
        weights: Sequence[float],
        of: Sequence[Tensor],
        retain_graph: bool = False,
    ) -> Gradients:
        """Gradients of the weighted sum of this process's losses: one backward pass."""
        ends, starts = self.weighted(values, weights)
        if not ends or not of:
            return [None] * len(of)
        with self.passes.one():
            found = torch.autograd.grad(ends, of, starts, retain_graph, allow_unused=True)
        return self.unscaled(list(found))

    def _once_more(self) -> list[Tensor | None]:
        """The losses, with a graph for one more backward pass after the first."""
        return self.losses_again(range(len(self.own))) if self.findings.compiled else self.values

    def fill(self, rows: TakesRows) -> list[Gradients]:
        """One backward for each task through the whole graph, which is freed."""
        rows.clear()
        found, cut, values = [], len(self.shared), self.values
        retains = not self.findings.compiled
        for k, own in enumerate(self.own):
            weights = [float(i == k) for i in range(len(self.own))]
            values = self._once_more() if k else self.values
            only = [v if i == k else None for i, v in enumerate(values)]
            keep = retains and any(v is not None for v in values[k + 1 :])
            gradients = self._gradients(only, weights, [*self.shared, *own], keep)
            rows.add(gradients[:cut])
            found.append(self.ranks.sum_gradients(gradients[cut:], own))
        self._free()
        return found

    def backward(self, coefficients: Tensor, factors: Tensor) -> tuple[Gradients, list[Gradients]]:
        """One backward for all losses; a second one where the coefficients differ."""
        owned = list(dict.fromkeys(itertools.chain(*self.own)))
        weights, cut = factors.tolist(), len(self.shared)
        common = float(coefficients[0])
        if bool((coefficients == common).all()):
            both = self._gradients(self.values, weights, [*self.shared, *owned])
            shared, own = both[:cut], both[cut:]
            if common != 1:
                shared = [None if g is None else g * common for g in shared]
        else:
            keep = bool(self.shared) and not self.findings.compiled
            own = self._gradients(self.values, weights, owned, keep)
            weights = (coefficients * factors).tolist()
            shared = self._gradients(self._once_more(), weights, self.shared)
        self._free()
        first = dict(zip(owned, self.ranks.sum_gradients(own, owned), strict=True))
        by_task = [[first.pop(p, None) for p in of_one] for of_one in self.own]
        return self.ranks.sum_gradients(shared, self.shared), by_task

    def _free(self) -> None:
        """Let go of the graph, for nobody asks for another backward of it."""
        self.values = [None if v is None else v.detach() for v in self.values]

    # ------------------------------------------------------------------ further looks

    def losses_again(self, tasks: Sequence[int]) -> list[Tensor | None]:
        """Call the closure once; the other tasks' losses are dropped."""
        assert self.replay is not None
        with self.ranks.agreeing(), self.replay.again(None):
            found = self._call()
            for task in self.network.tasks:
                if self.presence.here(task) != (task in found):
                    raise TaskError(
                        task,
                        "the closure returned a loss in one of its calls for this batch, and none "
                        "in another; it must return the same tasks each time.",
                    )
        values = self._of_present(found)
        return [values[k] for k in tasks]

    def own_again(
        self, tasks: Sequence[int], moving: Moving
    ) -> list[tuple[Tensor | None, Gradients]]:
        """Call the closure once, with the own parameters of all these tasks moved."""
        owned = [p for k in tasks for p in self.own[k]]
        values: list[Tensor | None] = [None] * len(self.own)
        with ExitStack() as moved:
            for k in tasks:
                moved.enter_context(moving(k))
            again = self.losses_again(tasks)
            for k, value in zip(tasks, again, strict=True):
                values[k] = value
            found = self._gradients(values, [1.0] * len(values), owned)
        gradients = iter(self.ranks.sum_gradients(found, owned))
        return [
            (None if v is None else v.detach(), [next(gradients) for _ in self.own[k]])
            for k, v in zip(tasks, again, strict=True)
        ]

    def trial_losses(self) -> Tensor:
        """Call the closure once."""
        torch.clear_autocast_cache()  # it holds half-precision copies of the parameters
        values = self.losses_again(range(len(self.own)))
        torch.clear_autocast_cache()
        return self.joint([None if v is None else v.detach() for v in values])
