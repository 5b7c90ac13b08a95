"""Recipe: one line of text, "igbv1+cagrad(c=0.5)", to the stages of a Step and back.

This module and the registry are the only ones that know methods by name.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from equipoise import call
from equipoise.errors import CombinationError, RecipeError, nearest
from equipoise.registry import METHODS, REFUSED, TOKENS, Axis, Method, with_task_weights
from equipoise.sharpness import TaskSharpness
from equipoise.step import Step
from equipoise.trunk import SharedTrunk


@dataclass(frozen=True)
class Stage:
    """A method with the parameters that differ from its defaults."""

    method: Method
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return call.show(self.method.token, self.parameters)

    def __hash__(self) -> int:
        return hash(str(self))

    def build(self, **context: Any) -> Any:
        """The stage, with what it takes of the context."""
        wanted = inspect.signature(self.method.factory).parameters
        return self.method.build(
            **self.parameters, **{k: v for k, v in context.items() if k in wanted}
        )

    def heads(self) -> str:
        """What a Step with this aggregator takes for `heads`."""
        return self.method.heads(**self.parameters)

    def build_sharpness(self) -> TaskSharpness | None:
        """The sharpness that comes with an aggregator in flat regions."""
        return self.method.build_sharpness(**self.parameters)


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
        line_search: how far a step goes; None: as far as the optimizer says. Beside one that works
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
            CombinationError: two answers to one question, or anything beside stl.
        """
        stages: dict[Axis, Stage] = {}
        for part in _split(text):
            stage = _read(part, text)
            if stage.method.axis in stages:
                raise CombinationError(_both(stages[stage.method.axis], stage, text))
            stages[stage.method.axis] = stage
        if "baseline" in stages and len(stages) > 1:
            other = next(stage for axis, stage in stages.items() if axis != "baseline")
            raise CombinationError(
                f"recipe {text!r}: stl trains one network for each task, where {other} has "
                "nothing to balance; use one of the two."
            )
        search = stages.get("line search")
        aggregator = stages.get("aggregation", _usual_aggregator(search))
        if search is not None:
            aggregator = _beside_search(aggregator, search, text)
        usual = Stage(METHODS[aggregator.method.beside])
        return cls(stages.get("weighting", usual), aggregator, "baseline" in stages, search)

    def __str__(self) -> str:
        if self.is_stl:
            return "stl"
        parts = []
        if self.weighting != Stage(METHODS[self.aggregator.method.beside]):
            parts.append(str(self.weighting))
        if self.line_search is not None:
            parts.append(str(self.line_search))
        if self.aggregator != _usual_aggregator(self.line_search):
            text = str(self.aggregator)
            parts.append(text if self.line_search is None else text.replace("-ub", "", 1))
        return "+".join(parts) or str(Recipe().weighting)

    @property
    def plain(self) -> Recipe | None:
        """The same recipe without flat regions; None for one that has none."""
        method = self.aggregator.method
        if method.sharpness is None:
            return None
        base = METHODS[method.token.partition("-")[2]]
        ours = inspect.signature(TaskSharpness).parameters  # `every` is that of the flat part
        given = {
            name: value
            for name, value in self.aggregator.parameters.items()
            if name not in ours and value != base.parameters[name]
        }
        return replace(self, aggregator=Stage(base, given))

    @staticmethod
    def known() -> list[Method]:
        """All methods that recipes can name."""
        return list(METHODS.values())

    def build(
        self,
        model: SharedTrunk,
        losses: Mapping[str, Callable[[Any, Any], Tensor]],
        lr: float,
        steps_per_epoch: int,
        *,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
        seed: int | None = None,
        task_weights: Sequence[float] | Tensor | None = None,
    ) -> Step:
        """The Step of this recipe.

        Args:
            model: the network. For stl the Step trains `step.model`, a copy of it with one trunk
                for each task.
            losses: task name -> callable(output, target).
            lr: learning rate.
            steps_per_epoch: batches in one epoch.
            optimizer: makes the optimizer from (parameters, lr=lr). Beside a line search that makes
                its steps (`needs_sgd`) plain SGD takes the place of Adam, and `lr` serves the
                weighting's parameters alone.
            seed: of the stages' private generators; None: from torch's global generator.
            task_weights: (T,) constant factors of the weighted losses, see Fixed; None: none.

        Raises:
            CombinationError: stages that make no sense together.
            ValueError: a value out of its range.
        """
        if self.is_stl:
            model = model.separated()
        context: dict[str, Any] = {
            "steps_per_epoch": steps_per_epoch,
            "n_tasks": len(model.tasks),
        }
        stages = []
        for offset, stage in enumerate((self.weighting, self.aggregator)):
            if seed is not None:
                context["generator"] = torch.Generator().manual_seed(seed + offset)
            stages.append(stage.build(**context))
        if task_weights is not None:
            stages[0] = with_task_weights(stages[0], task_weights)
        search = None if self.line_search is None else self.line_search.build(**context)
        if self.needs_sgd and optimizer is torch.optim.Adam:
            optimizer = torch.optim.SGD
        return Step(
            model,
            losses,
            optimizer(model.parameters(), lr=lr),
            *stages,
            self.aggregator.build_sharpness(),
            search,
            level=self.aggregator.method.level,
            heads=self.aggregator.heads(),
        )

    @property
    def needs_sgd(self) -> bool:
        """Whether a line search makes the steps, for which the optimizer has to be plain SGD."""
        return self.line_search is not None and self.line_search.build().moves == "gradient"


def _usual_aggregator(search: Stage | None) -> Stage:
    """The aggregator of a recipe that names none."""
    if search is None:
        return Stage(METHODS["sum"])
    method = METHODS[search.method.beside]
    return Stage((search.method.level == "features" and method.on_features) or method)


def _beside_search(aggregator: Stage, search: Stage, text: str) -> Stage:
    """The aggregator at the level at which a line search works.

    Raises:
        CombinationError: it cannot work there.
    """
    method = aggregator.method
    if search.method.level == "parameters":
        if method.level == "features":
            raise CombinationError(
                f"recipe {text!r}: {search} looks at the whole network, {aggregator} at the "
                f"features alone. Write {method.token.removesuffix('-ub')}, or fbls."
            )
        return aggregator
    if method.sharpness is not None:
        raise CombinationError(
            f"recipe {text!r}: {search} works on the features, {aggregator} needs the gradients "
            "of the parameters. Use bls."
        )
    there = method.on_features
    if there is None:
        raise CombinationError(
            f"recipe {text!r}: {search} works on the features, where {aggregator} cannot. Use bls."
        )
    return Stage(there, aggregator.parameters)


def _split(text: str) -> list[str]:
    """The parts between plus signs that stand outside parentheses."""
    return [part.strip() for part in re.split(r"\+(?![^(]*\))", text)]


def _read(part: str, text: str) -> Stage:
    try:
        token, inside = call.split(part)
    except ValueError:
        raise RecipeError(
            f"recipe {text!r}: cannot read {part!r}; write token or token(name=value, ...), and "
            "join them with +."
        ) from None
    by_plain_name = {_plain(known): method for known, method in TOKENS.items()}
    method = by_plain_name.get(_plain(token))
    if method is None:
        for refused, why in REFUSED.items():
            if _plain(token) == _plain(refused):
                raise RecipeError(f"recipe {text!r}: {why}")
        raise RecipeError(
            f"recipe {text!r}: unknown token {token!r}; {nearest(token, TOKENS, listed=METHODS)}"
        )
    known = method.parameters
    try:
        given = call.arguments(method.token, inside)
    except ValueError as error:
        raise RecipeError(f"recipe {text!r}: {error}") from None
    for name in given:
        if name not in known:
            takes = ", ".join(known) or "none"
            raise RecipeError(
                f"recipe {text!r}: {method.token} has no parameter {name!r}; it takes: {takes}."
            )
    try:
        given = {name: method.check(name, value) for name, value in given.items()}
        stage = Stage(method, {k: v for k, v in given.items() if v != known[k]})
        stage.build(steps_per_epoch=1, n_tasks=1, generator=torch.Generator())
        stage.build_sharpness()
    except ValueError as error:
        raise RecipeError(f"recipe {text!r}: {error}") from error
    return stage


def _both(first: Stage, second: Stage, text: str) -> str:
    """Why two answers to one question are refused, and what may have been meant."""
    together = [f"{a.method.token}-{b.method.token}" for a, b in ((first, second), (second, first))]
    meant = next((f", or use {one}" for one in together if one in TOKENS), "")
    why = next((f" {REFUSED[one]}" for one in together if one in REFUSED), "")
    return (
        f"recipe {text!r}: {first} and {second} both answer the question of "
        f"{second.method.axis}; keep one{meant}.{why}"
    )


def _plain(token: str) -> str:
    return token.lower().replace("-", "")
