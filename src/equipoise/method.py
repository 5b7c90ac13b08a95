"""A method by its token, and a method with its parameters chosen: what recipes are made of."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from equipoise.sharpness import TaskSharpness
from equipoise.text import show

Axis = Literal["weighting", "aggregation", "line search", "baseline"]

OF_COEFFICIENTS: dict[str, Any] = {"update_every": 1, "heads": "own"}
"""What a recipe can say of any aggregator whose coefficients come from Gram matrices."""

FROM_CONTEXT = ("generator", "steps_per_epoch", "n_tasks")
"""Constructor arguments that come from the training, not from the recipe."""

RENAMED = {
    "every": "update_every",
    "normalise_to": "normalize_to",
    "weights_on_all": "heads",
}
"""Parameters that had another name up to version 0.1."""


@dataclass(frozen=True)
class Method:
    """One entry of the registry.

    Attributes:
        token: how recipes call it.
        axis: which question it answers.
        factory: the class, or what makes the stage; parameters in parentheses go to it.
        level: the level at which an aggregator works.
        partner: the weighting that a recipe has if it names this aggregator and no weighting; the
            aggregator that it has if it names this line search and no aggregator.
        usual: parameters whose default here is another than the factory's.
        sharpness: for an aggregator in flat regions: what is fixed of its TaskSharpness; the
            parameters of both are then given together.
        keep: for an aggregator whose coefficients come from Gram matrices: makes of it, and of k,
            one that computes them in each k-th step. None: it has none to keep.
    """

    token: str
    axis: Axis
    factory: Callable[..., Any]
    level: str = "parameters"
    partner: str = "ew"
    usual: Mapping[str, Any] = field(default_factory=dict)
    sharpness: Mapping[str, Any] | None = None
    keep: Callable[[Any, int], Any] | None = None

    @property
    def summary(self) -> str:
        """The first line of the factory's own docstring."""
        plain = unwrapped(self.factory)
        text = vars(plain).get("__doc__") if isinstance(plain, type) else plain.__doc__
        return (text or f"{name_of(plain)}, which has no docstring.").strip().partition("\n")[0]

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters that a recipe may set, with their defaults."""
        own = {**defaults(self.factory), **self.usual}
        if self.sharpness is not None:
            return {**own, **self._sharpness_parameters}
        return own if self.keep is None else {**own, **OF_COEFFICIENTS}

    @property
    def _sharpness_parameters(self) -> dict[str, Any]:
        if self.sharpness is None:
            return {}
        found = defaults(TaskSharpness)
        return {name: value for name, value in found.items() if name not in self.sharpness}

    def build(self, **arguments: Any) -> Any:
        """The stage; with `update_every` above 1 it computes its coefficients that rarely."""
        own = {k: v for k, v in arguments.items() if k not in self._sharpness_parameters}
        k = 1
        if self.keep is not None:
            k = own.pop("update_every", 1)
            own.pop("heads", None)  # is the Step's
        stage = self.factory(**{**self.usual, **own})
        return stage if self.keep is None or k == 1 else self.keep(stage, k)

    def build_sharpness(self, **arguments: Any) -> TaskSharpness | None:
        """The TaskSharpness of an aggregator in flat regions; None for any other method."""
        if self.sharpness is None:
            return None
        own = {k: v for k, v in arguments.items() if k in self._sharpness_parameters}
        return TaskSharpness(**self.sharpness, **own)

    def check(self, name: str, value: Any) -> Any:
        """`value` as the parameter's type hint wants it (5 for a float is 5.0), or ValueError.

        A parameter without a hint takes what the text gives.
        """
        of_recipes = {"update_every": int, "heads": Literal["own", "weighted"]}
        known = of_recipes if self.keep is not None else hints(TaskSharpness)
        hint = {**known, **hints(self.factory)}.get(name, Any)
        members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        if type(value) is int and float in members and int not in members:
            value = float(value)
        infinite = isinstance(value, float) and math.isinf(value)
        if infinite or not any(_fits(value, member) for member in members):
            wanted = " or ".join(_in_words(member) for member in members)
            raise ValueError(f"{name} is {value!r}; it takes {wanted}.")
        return value


@dataclass(frozen=True)
class Stage:
    """A method with the parameters that differ from its defaults."""

    method: Method
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return show(self.method.token, self.parameters)

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
        return self.parameters.get("heads", "own") if self.method.keep is not None else "own"

    def build_sharpness(self) -> TaskSharpness | None:
        """The sharpness that comes with an aggregator in flat regions."""
        return self.method.build_sharpness(**self.parameters)


def any_context() -> dict[str, Any]:
    """A context to make a stage in that is only looked at."""
    return {"steps_per_epoch": 1, "n_tasks": 1, "generator": torch.Generator()}


def defaults(factory: Callable[..., Any]) -> dict[str, Any]:
    """What a recipe may give to a factory, with the defaults."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(factory).parameters.items()
        if name not in FROM_CONTEXT
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }


def hints(factory: Callable[..., Any]) -> dict[str, Any]:
    """The type hints of a factory's parameters; none where they name what is not there."""
    plain = unwrapped(factory)
    try:
        return get_type_hints(plain.__init__ if isinstance(plain, type) else plain)
    except (NameError, TypeError, AttributeError):
        return {}


def unwrapped(factory: Any) -> Any:
    """The function or class inside functools.partial."""
    return unwrapped(factory.func) if isinstance(factory, functools.partial) else factory


def name_of(factory: Any) -> str:
    """How a message calls it."""
    plain = unwrapped(factory)
    return getattr(plain, "__qualname__", type(plain).__name__)


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if hint is Any:  # from Python 3.11 on a class
        return True
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in get_args(hint))
    if isinstance(origin, type):  # list[float], Sequence[int]: a word is neither
        return isinstance(value, origin) and not isinstance(value, str)
    return type(value) is hint if isinstance(hint, type) else True


def _in_words(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    return "none" if hint is NoneType else getattr(hint, "__name__", str(hint))
