"""The contract between a step and what it trains, which makes an evaluation of each batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from equipoise.engine.ranks import Ranks
from equipoise.engine.stages import Needs


class Network(ABC):
    """What is trained, seen from a step; makes an `Evaluation` of each batch.

    Attributes:
        tasks: the T task names.
        module: the network; parameters of losses are not in it.
        whole: the same, together with losses that are modules and may keep something in them.
        losses: what the user gave: a loss for each task, or the names of the tasks.
        shared: the parameters that the user said are shared; None: the user did not say.
        has_features: whether gradients of the features can be taken (`TrunkEvaluation`).
        shares_nothing: whether it is one network for each task, so that nothing is shared.
        needs: what the stages want of it.
        repeats: whether micro-batches were seen to give the same losses when looked at again.
        missing: what becomes of a target that is NaN in part, as of Step.
    """

    tasks: tuple[str, ...]
    module: nn.Module
    whole: nn.Module
    losses: Any
    shared: list[Tensor] | None
    needs: Needs
    missing: str = "sample"
    repeats: bool = False
    has_features: bool = False
    shares_nothing: bool = False

    @abstractmethod
    def evaluate(self, batch: Any, ranks: Ranks, left_out: frozenset[int], again: bool) -> Any:
        """Take a batch.

        Args:
            batch: what a step was called with.
            ranks: the processes that train together.
            left_out: positions of tasks that take no part, whatever the batch says.
            again: whether further looks will be asked for.
        """

    @abstractmethod
    def unchanged_on_error(self) -> AbstractContextManager[None]:
        """If the body raises, what the network has learned about its structure is as before."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What it has learned about the network's structure; empty if nothing."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""

    @abstractmethod
    def parameters(self) -> Iterable[Tensor]:
        """All parameters that a step may give a gradient to."""

    def name(self, parameter: Tensor) -> str:
        """What a message calls a parameter."""
        names = {p: f"parameter {name!r}" for name, p in self.module.named_parameters()}
        return names.get(parameter, "a parameter of a loss")
