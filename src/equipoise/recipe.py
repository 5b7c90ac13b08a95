"""Recipe: one line of text, "igbv1+cagrad(c=0.5)", to the stages of a Step and back.

This module and the registry are the only ones that know methods by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from equipoise import recipe_text
from equipoise.engine.partition import Shared
from equipoise.errors import CombinationError
from equipoise.method import Method, Stage, any_context, defaults
from equipoise.registry import METHODS, with_task_weights, without_flat_regions
from equipoise.sharpness import TaskSharpness
from equipoise.step import Step
from equipoise.trunk import SharedTrunk


@dataclass(frozen=True)
class Recipe:
    """Which method answers each question: at most one for each axis.

    `Recipe.parse("IGBv1+CAGrad(c=0.5)")` reads one; `str` gives the canonical form, which leaves
    out what is default and reads back to an equal recipe.

    Attributes:
        weighting: how much each loss counts; default ew, or what the aggregator's method says.
        aggregator: how gradients become one direction, and from which points: `f-` before it for
            task-based flat regions, `a-` for the naive way; default sum.
        is_stl: one network for each task instead, with neither of the two.
        line_search: how far a step goes; None: as far as the optimizer says. With one that works
            among the features an aggregator does so too, and is written without its `-ub`.
    """

    weighting: Stage = field(default_factory=lambda: Stage(METHODS["ew"]))
    aggregator: Stage = field(default_factory=lambda: Stage(METHODS["sum"]))
    is_stl: bool = False
    line_search: Stage | None = None

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """Read `token ("+" token)*`, in any order; case and hyphens do not matter.

        Raises:
            RecipeError: an unknown token (names the nearest known ones), an unknown parameter, a
                value that its method refuses.
            CombinationError: two answers to one question, or anything with stl.
        """
        stages: dict[str, Stage] = {}
        for part in recipe_text.parts(text):
            stage = recipe_text.read(part, text)
            if stage.method.axis in stages:
                raise CombinationError(recipe_text.both(stages[stage.method.axis], stage, text))
            stages[stage.method.axis] = stage
        if "baseline" in stages and len(stages) > 1:
            other = next(stage for axis, stage in stages.items() if axis != "baseline")
            raise CombinationError(
                f"recipe {text!r}: stl trains one network for each task, where {other} has "
                "nothing to balance; use one of the two."
            )
        search = stages.get("line search")
        aggregator = stages.get("aggregation", recipe_text.usual_aggregator(search))
        if search is not None:
            aggregator = recipe_text.beside_search(aggregator, search, text)
        recipe_text.refuse_senseless(aggregator, search, text)
        usual = Stage(METHODS[aggregator.method.partner])
        return cls(stages.get("weighting", usual), aggregator, "baseline" in stages, search)

    def __str__(self) -> str:
        if self.is_stl:
            return "stl"
        parts = []
        if self.weighting != Stage(METHODS[self.aggregator.method.partner]):
            parts.append(str(self.weighting))
        if self.line_search is not None:
            parts.append(str(self.line_search))
        if self.aggregator != recipe_text.usual_aggregator(self.line_search):
            written = self.aggregator
            if self.line_search is not None and written.method.level == "features":
                plain = METHODS[written.method.token.removesuffix("-ub")]
                written = replace(written, method=plain)
            parts.append(str(written))
        return "+".join(parts) or str(Recipe().weighting)

    @property
    def plain(self) -> Recipe | None:
        """The same recipe without flat regions; None for one that has none."""
        base = without_flat_regions(self.aggregator.method)
        if base is None:
            return None
        given = {
            name: value
            for name, value in self.aggregator.parameters.items()
            if name not in defaults(TaskSharpness) and value != base.parameters[name]
        }
        return replace(self, aggregator=Stage(base, given))

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Weighting, aggregator and, if there is one, line search."""
        found = (self.weighting, self.aggregator, self.line_search)
        return tuple(stage for stage in found if stage is not None)

    @staticmethod
    def known() -> list[Method]:
        """All methods that recipes can name."""
        return list(METHODS.values())

    def build(
        self,
        model: nn.Module,
        losses: Mapping[str, Callable[[Any, Any], Tensor]] | Sequence[str],
        lr: float,
        steps_per_epoch: int,
        *,
        shared: Shared | None = None,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        seed: int | None = None,
        task_weights: Sequence[float] | Tensor | None = None,
        **options: Any,
    ) -> Step:
        """The Step of this recipe.

        Args:
            model: the network, a SharedTrunk; with task names any module. For stl the Step
                trains `step.model`, a copy of it with one trunk for each task.
            losses: task name -> callable(output, target); or a list of task names, for a Step that
                is called with a closure.
            lr: learning rate.
            steps_per_epoch: batches in one epoch.
            shared: which parameters the tasks share, as of Step; None: as Step finds them.
            optimizer: makes the optimizer from (parameters, lr=lr). None: Adam; plain SGD with a
                line search that makes its own steps (`needs_sgd`), where `lr` serves the
                weighting's parameters alone.
            seed: of the stages' private generators; None: from torch's global generator.
            task_weights: (T,) constant factors of the weighted losses, see Fixed; None: none.
            options: further keyword arguments of Step, such as clip_norm, scaler, on_nonfinite.

        Raises:
            CombinationError: stages that make no sense together, or with this model.
            ValueError: a value out of its range.
        """
        if not isinstance(losses, Mapping):
            self._refuse_without_trunk()
        if self.is_stl:
            model = self._trunk(model).separated()
        context: dict[str, Any] = {"steps_per_epoch": steps_per_epoch, "n_tasks": len(losses)}
        stages = []
        for offset, stage in enumerate((self.weighting, self.aggregator)):
            if seed is not None:
                context["generator"] = torch.Generator().manual_seed(seed + offset)
            stages.append(stage.build(**context))
        if task_weights is not None:
            stages[0] = with_task_weights(stages[0], task_weights)
        search = None if self.line_search is None else self.line_search.build(**context)
        if optimizer is None:
            optimizer = torch.optim.SGD if self.needs_sgd else torch.optim.Adam
        try:
            return Step(
                model,
                losses,
                optimizer(model.parameters(), lr=lr),
                *stages,
                self.aggregator.build_sharpness(),
                search,
                shared=shared,
                level="features" if self.aggregator.method.level == "features" else None,
                heads=self.aggregator.heads(),
                **options,
            )
        except CombinationError as error:
            raise CombinationError(f"recipe {str(self)!r}: {error}") from error

    @property
    def needs_sgd(self) -> bool:
        """Whether a line search makes the steps, for which the optimizer has to be plain SGD."""
        search = self.line_search
        return search is not None and search.build(**any_context()).moves == "gradient"

    def _refuse_without_trunk(self) -> None:
        """Names of tasks belong to any network; some methods need to know its trunk and heads."""
        what = "stl" if self.is_stl else None
        for stage in (self.line_search, self.aggregator):
            if stage is not None and stage.method.level == "features":
                what = what or str(stage)
        if what is not None:
            raise CombinationError(
                f"recipe {str(self)!r} and names of tasks: {what} needs a SharedTrunk, and a loss "
                "function for each task."
            )

    def _trunk(self, model: nn.Module) -> SharedTrunk:
        if not isinstance(model, SharedTrunk):
            raise CombinationError(
                f"recipe {str(self)!r} and a {type(model).__name__}: stl needs a SharedTrunk."
            )
        return model
