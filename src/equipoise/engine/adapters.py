"""One stage as the engine sees it: ours, a plain callable, or a method of another library.

Only here does anything ask what a stage is; behind it all are alike.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from equipoise.aggregation.base import Aggregator, GramAggregator
from equipoise.engine.foreign import WantsAllTasks, keeping, of_torchjd
from equipoise.errors import CombinationError, EquipoiseError
from equipoise.weighting.base import Weighting


@runtime_checkable
class _HasCoefficients(Protocol):
    def coefficients(self, gram: Tensor, /) -> Tensor: ...


@runtime_checkable
class _HasEntryWeights(Protocol):
    def entry_weights(self, rows: Tensor, /) -> Tensor: ...


Coefficients = Callable[[Tensor, Tensor, torch.dtype], Tensor]
"""gram (T', T'), losses (T'), dtype of the rows -> coefficients (T')."""


def _nothing(present: Tensor) -> None:
    """Hear which tasks are present, and leave it at that."""


def _unknown(n_tasks: int) -> None:
    """No coefficients can be named beforehand."""


@dataclass(frozen=True)
class AggregatorStage:
    """An aggregator as the engine sees it.

    Attributes:
        given: what the user gave.
        name: of its class, for messages.
        coefficients: from a Gram matrix; None for what needs the rows themselves.
        entry_weights: from sums of the features' gradients; None for what has none.
        begin: is called with which tasks are present, before anything else of a step.
        known: number of tasks -> the coefficients, where they do not depend on gradients.
        degree: the direction is homogeneous of this degree in the rows.
        interval: it looks at the gradients in one of so many steps.
    """

    given: Callable[..., Tensor]
    name: str
    coefficients: Coefficients | None = None
    entry_weights: Callable[[Tensor], Tensor] | None = None
    begin: Callable[[Tensor], None] = _nothing
    known: Callable[[int], Tensor | None] = _unknown
    degree: float = 1
    interval: int = 1

    @property
    def works_on_features(self) -> bool:
        """Whether it can combine gradients of features."""
        return self.coefficients is not None or self.entry_weights is not None


def works_on_features(kind: Any) -> bool:
    """Whether the aggregators of a class, or one of them, can combine gradients of features."""
    return hasattr(kind, "coefficients") or hasattr(kind, "entry_weights")


def aggregator_stage(given: Callable[..., Tensor]) -> AggregatorStage:
    """Adapt an aggregator: ours, a callable from rows, or one of TorchJD's.

    Raises:
        CombinationError: something else.
    """
    refuse_other_kinds(given, "aggregator", "an Aggregator, or a callable from rows (T, P) to (P,)")
    name = type(given).__name__
    begin = WantsAllTasks(name) if keeping(given) else _nothing
    if isinstance(given, GramAggregator):
        return AggregatorStage(
            given, name, _OfGramAggregator(given), None, given.begin,
            given.known_coefficients, given.degree, given.interval,
        )  # fmt: skip
    of_gram = _gramian_weighting(given)
    if of_gram is not None:
        return AggregatorStage(given, name, _OfGram(of_gram), begin=begin)
    if isinstance(given, Aggregator):
        entry_weights = given.entry_weights if isinstance(given, _HasEntryWeights) else None
        return AggregatorStage(given, name, None, entry_weights, given.begin)
    if isinstance(given, _HasCoefficients):
        return AggregatorStage(given, name, _OfGram(given.coefficients), begin=begin)
    return AggregatorStage(given, name, begin=begin)


@dataclass(frozen=True)
class _OfGramAggregator:
    """Coefficients of one of ours; no function inside a function, so that copies are their own."""

    given: GramAggregator

    def __call__(self, gram: Tensor, losses: Tensor, dtype: torch.dtype) -> Tensor:
        known = losses if self.given.needs_losses else None
        return self.given.coefficients(gram, known, eps=torch.finfo(dtype).eps)


@dataclass(frozen=True)
class _OfGram:
    """Coefficients of what looks at the Gram matrix alone."""

    function: Callable[[Tensor], Tensor]

    def __call__(self, gram: Tensor, losses: Tensor, dtype: torch.dtype) -> Tensor:
        return self.function(gram)


def _gramian_weighting(given: Any) -> Callable[[Tensor], Tensor] | None:
    """What makes coefficients of a Gram matrix, in the way of TorchJD; None for anything else.

    There an aggregator holds it as `gramian_weighting`; alone it is a module whose forward pass
    takes `gramian`.
    """
    held = given._modules.get("gramian_weighting") if isinstance(given, nn.Module) else None
    if held is not None:
        return held
    takes = inspect.signature(given.forward).parameters if isinstance(given, nn.Module) else ()
    return given if "gramian" in takes else None


@dataclass(frozen=True)
class WeightingStage:
    """A weighting as the engine sees it.

    Attributes:
        given: what the user gave.
        name: of its class, for messages.
        method: the same, if it is a Weighting, which knows absent tasks and declares its needs.
        learnable: the parameters that it learns.
    """

    given: Callable[..., Tensor]
    name: str
    method: Weighting | None
    learnable: list[nn.Parameter]

    @property
    def left_out(self) -> frozenset[int]:
        """Positions of tasks that take no part in the training."""
        return frozenset() if self.method is None else self.method.left_out

    @property
    def needs_gram(self) -> bool:
        """Whether it learns from the inner products of the gradients."""
        return self.method is not None and self.method.needs_gram

    @property
    def needs_losses_after(self) -> bool:
        """Whether it learns from the losses after the update."""
        return self.method is not None and self.method.needs_losses_after


def weighting_stage(given: Callable[..., Tensor]) -> WeightingStage:
    """Adapt a weighting: one of ours, or a callable from losses to weighted losses.

    Raises:
        CombinationError: something else.
    """
    refuse_other_kinds(given, "weighting", "a Weighting, or a callable from losses (T,) to (T,)")
    parameters = given.parameters() if isinstance(given, nn.Module) else ()
    return WeightingStage(
        given,
        type(given).__name__,
        given if isinstance(given, Weighting) else None,
        [p for p in parameters if p.requires_grad],
    )


def checked(w: Tensor, n_tasks: int, name: str) -> Tensor:
    """The coefficients, if they are one finite number for each task.

    Raises:
        EquipoiseError: they are something else.
    """
    if w.shape != (n_tasks,) or not bool(torch.isfinite(w).all()):
        raise EquipoiseError(
            f"{name}.coefficients returned {w.tolist()}; it must return one finite number for each "
            f"of the {n_tasks} tasks."
        )
    return w


def refuse_other_kinds(given: Any, place: str, wanted: str) -> None:
    """Raise CombinationError for what cannot stand in the place of a weighting or an aggregator."""
    if isinstance(given, type):
        raise CombinationError(f"{place} is the class {given.__name__}; give {given.__name__}().")
    if of_torchjd(given, "Scalarizer"):
        raise CombinationError(
            f"{place} is TorchJD's {type(given).__name__}, which returns the sum of the losses "
            "alone; a Step needs each weighted loss. Use a weighting of Equipoise's own."
        )
    other = Aggregator if place == "weighting" else Weighting
    if not callable(given) or isinstance(given, other):
        raise CombinationError(f"{place} is a {type(given).__name__}; give {wanted}, or None.")
