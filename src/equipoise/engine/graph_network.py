"""Any module seen from a step; batches are closures that return the losses by task name."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from equipoise.engine.graph_evaluation import Graph, GraphEvaluation
from equipoise.engine.network import Network
from equipoise.engine.ranks import Ranks
from equipoise.errors import EquipoiseError


class GraphNetwork(Graph, Network):
    """Makes an evaluation of each closure. Arguments are those of `Graph`."""

    def evaluate(
        self, batch: Any, ranks: Ranks, left_out: frozenset[int], again: bool
    ) -> GraphEvaluation:
        """Call the closure.

        Raises:
            TaskError: a task that was not named when the Step was built, or a loss that is no
                scalar.
            EquipoiseError: not a closure, or it returned no dict of losses.
        """
        closure, targets, masks = batch
        if not callable(closure) or targets is not None or masks is not None:
            raise EquipoiseError(
                "a Step that was built with a list of task names takes step(closure), a callable "
                "that returns task name -> loss; for step(inputs, targets) give it a SharedTrunk "
                "and a dict of losses."
            )
        self.lazy.make(closure, ranks)
        return GraphEvaluation(self, closure, ranks, left_out, again)

    def parameters(self) -> Iterable[Tensor]:
        """All that are known."""
        return self.partition.names

    @contextmanager
    def unchanged_on_error(self) -> Generator[None]:
        """If the body raises, what was found in it is forgotten."""
        found, findings = self.partition.found(), self.findings
        try:
            with self.lazy.unchanged_on_error():
                yield
        except BaseException:
            self.partition.put_back(found)
            self.findings = findings
            raise

    def state_dict(self) -> dict[str, Any]:
        """What the tasks have reached."""
        return self.partition.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it over."""
        self.partition.load_state_dict(state)
