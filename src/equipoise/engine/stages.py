"""The four answers of a step, each adapted once, at the door."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from equipoise.engine.adapters import (
    AggregatorStage,
    WeightingStage,
    aggregator_stage,
    weighting_stage,
)
from equipoise.engine.foreign import stateful
from equipoise.engine.ranks import Ranks
from equipoise.engine.targets import Presence
from equipoise.errors import CombinationError
from equipoise.generators import generator_of, twin
from equipoise.line_search.base import LineSearch
from equipoise.replay import UndoesItself
from equipoise.sharpness import TaskSharpness


@runtime_checkable
class Stateful(Protocol):
    """Whatever can be saved and loaded."""

    def state_dict(self) -> Any:
        """What to save."""

    def load_state_dict(self, state: Any, /) -> Any:
        """Take it over."""


class Needs(NamedTuple):
    """What stages want of a network; each is the name of the one that does, None if none does.

    Attributes:
        rows: looks at the gradients of what is shared.
        owners: must know which one task a parameter belongs to that is not shared.
        features: works on the features.
    """

    rows: str | None
    owners: str | None
    features: str | None


class Descent(NamedTuple):
    """What a line search asks of a direction.

    Attributes:
        holds: products (T',) of the tasks' gradients with it -> whether it will do.
        instead: the aggregator whose direction is taken if not.
    """

    holds: Callable[[Tensor], bool]
    instead: AggregatorStage


@dataclass
class Stages:
    """The answers to the four questions, and the choices that come with them.

    Attributes:
        weighting: how much each loss counts.
        aggregator: how gradients become one direction.
        sharpness: from which points; None: from where the parameters are.
        line_search: how far; None: as far as the optimizer says.
        level: "parameters" or "features", of which rows are gradients.
        given_level: the same as the user said it; None: not at all.
        heads: "own" or "weighted".
        flat: the aggregator of the flat rows, with a state of its own; without sharpness the same.
        verifying: that of the parameters' rows, for a search among features that verifies.
        descent: what the line search asks of a direction.
    """

    weighting: WeightingStage
    aggregator: AggregatorStage
    sharpness: TaskSharpness | None
    line_search: LineSearch | None
    level: str
    given_level: str | None
    heads: str
    flat: AggregatorStage
    verifying: AggregatorStage | None = None
    descent: Descent | None = None
    held: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        weighting: Callable[..., Tensor],
        aggregator: Callable[..., Tensor],
        sharpness: TaskSharpness | None,
        line_search: LineSearch | None,
        level: str | None,
        heads: str,
        descending: Callable[..., Tensor],
    ) -> Stages:
        """Adapt what the user gave.

        Args:
            weighting: as Step takes it, and so the others.
            aggregator: likewise.
            sharpness: likewise.
            line_search: likewise.
            level: None: the one that the line search needs, or else "parameters".
            heads: likewise.
            descending: an aggregator whose direction lets no loss grow, for a line search.

        Raises:
            CombinationError: something is in the place of another kind of stage.
        """
        refuse_other_kinds(sharpness, line_search)
        usual = "parameters" if line_search is None else line_search.level
        stages = cls(
            weighting_stage(weighting),
            aggregator_stage(aggregator),
            sharpness,
            line_search,
            usual if level is None else level,
            level,
            heads,
            aggregator_stage(aggregator if sharpness is None else twin(aggregator)),
        )
        stages.held = {"weighting": weighting, "aggregator": aggregator}
        if sharpness is not None:
            stages.held |= {"sharpness": sharpness, "flat_aggregator": stages.flat.given}
        if line_search is not None:
            stages.held["line_search"] = line_search
            stages.descent = Descent(line_search.descends, aggregator_stage(descending))
            if line_search.verify:
                stages.verifying = aggregator_stage(twin(aggregator))
                stages.held["rows_aggregator"] = stages.verifying.given
        _ = stages.stateful  # refuses a state that cannot be saved
        return stages

    # ------------------------------------------------------------------ what a step asks

    @property
    def perturbation(self) -> TaskSharpness | None:
        """The sharpness, if it perturbs anything at all."""
        return self.sharpness if self.sharpness is not None and self.sharpness.active else None

    @property
    def looks_again(self) -> bool:
        """Whether a step looks at its batch more than once before the update."""
        return self.perturbation is not None or self.line_search is not None

    @property
    def needs(self) -> Needs:
        """What they want of a network."""
        known = None if self.weighting.needs_gram else self.known(2)
        asks = self.weighting.name if self.weighting.needs_gram else self.aggregator.name
        owners = [type(s).__name__ for s in (self.sharpness, self.line_search) if s is not None]
        owners += ["heads='weighted'"] if self.heads == "weighted" else []
        latent = "level='features'" if self.line_search is None else type(self.line_search).__name__
        return Needs(
            rows=asks if known is None else None,
            owners=owners[0] if owners else None,
            features=latent if self.level == "features" else None,
        )

    def begin(self, presence: Presence) -> None:
        """Tell the aggregators which tasks are present."""
        self.aggregator.begin(presence.present)
        if self.sharpness is not None:
            self.flat.begin(presence.present)
        if self.verifying is not None:
            self.verifying.begin(presence.present)

    def known(self, n_tasks: int) -> Tensor | None:
        """The coefficients, where they can be named before there are gradients.

        None as well where the weighting learns from the gradients' inner products, where each
        task's gradient says where its loss is looked at again, and where a line search judges
        each task.
        """
        if self.perturbation is not None or self.weighting.needs_gram:
            return None
        known = self.aggregator.known(n_tasks)
        if known is None or self.line_search is None or self.line_search.content_with(known):
            return known
        return None

    def agree(self, ranks: Ranks) -> None:
        """Let all processes draw the same numbers."""
        ranks.align(g for s in self.held.values() if (g := generator_of(s)) is not None)

    # ------------------------------------------------------------------ state

    @cached_property
    def stateful(self) -> dict[str, Stateful]:
        """The stages that have a state, by name."""
        found = {name: stateful(stage, name) for name, stage in self.held.items()}
        return {name: stage for name, stage in found.items() if isinstance(stage, Stateful)}

    @cached_property
    def changed(self) -> tuple[list[Stateful], list[UndoesItself]]:
        """The stages whose state a step changes on its way; the second go back by themselves.

        What sharpness holds may be large, and does not change before the step has been made.
        """
        found = [stage for stage in self.stateful.values() if stage is not self.sharpness]
        by_itself: list[UndoesItself] = [s for s in found if isinstance(s, UndoesItself)]
        return [s for s in found if not isinstance(s, UndoesItself)], by_itself

    def names(self) -> dict[str, str]:
        """Which stage is of which class."""
        return {name: type(stage).__name__ for name, stage in self.held.items()}


def refuse_other_kinds(sharpness: Any, line_search: Any) -> None:
    """Raise CombinationError for what is no sharpness, or no line search."""
    if sharpness is not None and not isinstance(sharpness, TaskSharpness):
        raise CombinationError(
            f"sharpness is a {type(sharpness).__name__}; give a TaskSharpness, or None for "
            "gradients taken here."
        )
    if line_search is not None and not isinstance(line_search, LineSearch):
        raise CombinationError(
            f"line_search is a {type(line_search).__name__}; give Backtracking or "
            "FastBacktracking, or None."
        )
