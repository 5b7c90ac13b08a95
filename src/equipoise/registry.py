"""Every method by the name that recipes give it. A method is added by `register`."""

from __future__ import annotations

import inspect
import re
from collections import ChainMap
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar, overload

from equipoise.aggregation import Aggregator, Every, GramAggregator, Sum
from equipoise.builtin import (
    AGGREGATORS,
    FLAT_DEFAULTS,
    LINE_SEARCHES,
    PARTNERS,
    REFUSED,
    WEIGHTINGS,
)
from equipoise.engine.adapters import works_on_features
from equipoise.errors import RecipeError
from equipoise.line_search import LineSearch
from equipoise.method import (
    FROM_CONTEXT,
    OF_COEFFICIENTS,
    Axis,
    Method,
    any_context,
    defaults,
    name_of,
    unwrapped,
)
from equipoise.sharpness import TaskSharpness
from equipoise.weighting import Fixed, Weighting

DECOMPOSED: dict[str, Any] = {"decompose": True}
NAIVE: dict[str, Any] = {"decompose": False, "every": 1}

METHODS: dict[str, Method] = {}
"""Every known method by its token."""

FLAT: dict[str, Method] = {}
"""Every aggregator in flat regions: f- as F-MTL has it, a- for the naive way of its ablation."""

TOKENS: Mapping[str, Method] = ChainMap(FLAT, METHODS)
"""All that a recipe can name."""

Factory = TypeVar("Factory", bound=Callable[..., Any])
_listeners: list[list[str]] = []


@overload
def register(token: str, factory: Factory, **options: Any) -> Factory: ...
@overload
def register(token: str, factory: None = None, **options: Any) -> Callable[[Factory], Factory]: ...
def register(
    token: str,
    factory: Any = None,
    *,
    axis: Axis | None = None,
    partner: str | None = None,
    flat: Mapping[str, Any] | None = None,
) -> Any:
    """Give a method of your own a name in recipes, tables and the command line.

    An aggregator gets `TOKEN-ub` as well where it works on features, and `f-TOKEN` and `a-TOKEN`.
    The shell takes a file of such definitions by `--methods my_methods.py`.

    Args:
        token: its name: lower-case letters, digits and hyphens.
        factory: a class of Weighting, Aggregator or LineSearch, or anything callable that makes a
            stage from keyword arguments, all with defaults; recipes set them, checked by their type
            hints. Those called `n_tasks`, `steps_per_epoch` and `generator` need no default: the
            training gives them. None: returns a decorator.
        axis: "weighting", "aggregation" or "line search"; None: by the class.
        partner: what a recipe has if it names this method alone: the weighting of an aggregator
            (None: ew), the aggregator of a line search (None: sum, and mgda for features).
        flat: parameters of an aggregator whose default in `f-TOKEN` is another.

    Returns:
        The factory. The same one, or a new definition of the same qualified name, may be registered
        again: it takes the place of the old one.

    Raises:
        RecipeError: a token that cannot be or is taken, a factory whose axis cannot be inferred, a
            parameter without a default.

    Example:
        >>> import equipoise as eq
        >>> @eq.register("halves")
        ... class Halves(eq.GramAggregator):
        ...     def __init__(self, share: float = 0.5):
        ...         super().__init__()
        ...         self.share = share
        ...
        ...     def weights(self, gram, losses):
        ...         return self.share * (gram.diagonal() >= 0)
        >>> print(eq.Recipe.parse("IGBv1+Halves(share=0.25)"))
        igbv1+halves(share=0.25)
    """
    if factory is None:
        return lambda given: register(token, given, axis=axis, partner=partner, flat=flat)
    try:
        entries = _entries(token, factory, axis, partner, dict(flat or {}))
        _refuse_taken(entries)
    except RecipeError as error:
        raise RecipeError(f"{token!r} cannot be registered: {error}") from None
    for gone in set(_names(token)) - {entry.token for entry in entries}:
        METHODS.pop(gone, None)
        FLAT.pop(gone, None)
    for entry in entries:
        (METHODS if entry.sharpness is None else FLAT)[entry.token] = entry
    for heard in _listeners:
        heard.extend(entry.token for entry in entries)
    return factory


@contextmanager
def listening() -> Generator[list[str]]:
    """The tokens of all that is registered meanwhile."""
    heard: list[str] = []
    _listeners.append(heard)
    try:
        yield heard
    finally:
        _listeners.remove(heard)


def among_features(method: Method) -> Method | None:
    """An aggregator's entry at the feature level; None if it cannot work there."""
    return method if method.level == "features" else METHODS.get(f"{method.token}-ub")


def without_flat_regions(method: Method) -> Method | None:
    """The plain entry of an aggregator in flat regions; None for any other method."""
    return None if method.sharpness is None else METHODS[method.token.partition("-")[2]]


# ------------------------------------------------------------------------ what register makes


def _entries(
    token: str, factory: Any, axis: Axis | None, partner: str | None, flat: dict[str, Any]
) -> list[Method]:
    """The entry of a token, and those that come with it."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", token):
        raise RecipeError("a token is made of lower-case letters, digits and single hyphens.")
    if token.startswith(("f-", "a-")) or token.endswith("-ub"):
        raise RecipeError("f-, a- and -ub are added to the tokens of aggregators; leave them out.")
    axis = _axis(factory, axis)
    _refuse_parameters(factory, axis)
    if unknown := set(flat) - (set(defaults(factory)) if axis == "aggregation" else set()):
        raise RecipeError(f"flat sets {min(unknown)!r}, no parameter of an aggregator.")
    stage = _look(factory, axis)
    kind = stage if isinstance(stage, type) else type(stage)
    if axis != "aggregation":
        level = getattr(stage, "level", "parameters") if axis == "line search" else "parameters"
        usual = ("mgda" if level == "features" else "sum") if axis == "line search" else "ew"
        return [Method(token, axis, factory, level, _partner(partner, axis, usual))]
    keeps = (
        issubclass(kind, GramAggregator)
        and kind.known_coefficients is GramAggregator.known_coefficients
    )
    partner = _partner(partner, axis, "ew")
    plain = Method(token, axis, factory, partner=partner, keep=Every if keeps else None)
    entries = [plain]
    if works_on_features(stage):  # others need the rows of the parameters themselves
        entries.append(replace(plain, token=f"{token}-ub", level="features"))
    f = replace(plain, token=f"f-{token}", usual=flat, sharpness=DECOMPOSED, keep=None)
    return [*entries, f, replace(f, token=f"a-{token}", usual={}, sharpness=NAIVE)]


def _axis(factory: Any, said: Axis | None) -> Axis:
    plain = unwrapped(factory)
    if not callable(factory):
        raise RecipeError(f"{factory!r} is not callable; give a class or a function.")
    bases: dict[type, Axis] = {
        Weighting: "weighting", Aggregator: "aggregation", LineSearch: "line search",
    }  # fmt: skip
    is_class = isinstance(plain, type)
    own = [axis for base, axis in bases.items() if is_class and issubclass(plain, base)]
    known = list(bases.values())
    if said is None and not own:
        raise RecipeError(
            f"{name_of(factory)} is no class of Weighting, Aggregator or LineSearch; say which "
            f"question it answers: axis={' or '.join(map(repr, known))}."
        )
    if said is not None and said not in known:
        raise RecipeError(f"axis is {said!r}; known are {', '.join(map(repr, known))}.")
    if said is not None and own and said not in own:
        raise RecipeError(f"axis is {said!r}, but {name_of(factory)} answers {own[0]}.")
    return said or own[0]


def _refuse_parameters(factory: Any, axis: Axis) -> None:
    name = name_of(factory)
    try:
        parameters = inspect.signature(factory).parameters
    except ValueError:
        raise RecipeError(f"parameters of {name} cannot be read; wrap it in a function.") from None
    for key, parameter in parameters.items():
        by_position = parameter.kind == parameter.POSITIONAL_ONLY
        many = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        given = many or key in FROM_CONTEXT or parameter.default is not parameter.empty
        if by_position or not given:
            raise RecipeError(
                f"parameter {key!r} of {name} has no default that a keyword could replace; give it "
                f"one, or register a function that makes {name} (only {', '.join(FROM_CONTEXT)} "
                "come from the training)."
            )
        elsewhere = {**OF_COEFFICIENTS, **defaults(TaskSharpness)}
        if axis == "aggregation" and key in elsewhere:
            raise RecipeError(
                f"{name} has a parameter {key!r}, which recipes use for any aggregator; rename it."
            )


def _look(factory: Any, axis: Axis) -> Any:
    """The class, or else a stage made for a look at it."""
    plain = unwrapped(factory)
    if isinstance(plain, type):
        return plain
    wanted = inspect.signature(factory).parameters
    stage = factory(**{k: v for k, v in any_context().items() if k in wanted})
    if not (isinstance(stage, LineSearch) if axis == "line search" else callable(stage)):
        raise RecipeError(f"{name_of(factory)} makes {stage!r}, which is no {axis}.")
    return stage


def _partner(token: str | None, axis: Axis, usual: str) -> str:
    wanted = {"aggregation": "weighting", "line search": "aggregation"}.get(axis)
    if token is None:
        return usual
    if token not in METHODS or METHODS[token].axis != wanted:
        raise RecipeError(f"partner is {token!r}, which is no registered {wanted or 'partner'}.")
    return token


def _names(token: str) -> tuple[str, ...]:
    """All that a token may bring."""
    return token, f"{token}-ub", f"f-{token}", f"a-{token}"


def _refuse_taken(entries: list[Method]) -> None:
    taken = {known.replace("-", ""): known for known in (*REFUSED, *TOKENS)}
    for entry in entries:
        there = taken.get(entry.token.replace("-", ""))
        if there is None:
            continue
        if there in REFUSED:
            raise RecipeError(f"{there} makes no sense: {REFUSED[there]}")
        old = TOKENS[there].factory
        if there != entry.token or not _same(old, entry.factory):
            known = f"{unwrapped(old).__module__}.{name_of(old)}"
            raise RecipeError(f"{there} is the name of {known}; take another.")


def _same(old: Any, new: Any) -> bool:
    """Whether the new factory is the old one, or a new definition of it."""
    old, new = unwrapped(old), unwrapped(new)
    return old is new or (getattr(old, "__module__", 0), name_of(old)) == (
        getattr(new, "__module__", 1),
        name_of(new),
    )


def single_task() -> Sum:
    """Single-task learning: one network for each task, the baseline of Delta_m."""
    return Sum()


def with_task_weights(weighting: Any, weights: Any) -> Fixed:
    """A weighting with constant factors (T,) on top."""
    return Fixed(weights, weighting)


for _token, _factory in WEIGHTINGS.items():
    register(_token, _factory)
for _token, _factory in AGGREGATORS.items():
    register(_token, _factory, partner=PARTNERS.get(_token), flat=FLAT_DEFAULTS.get(_token))
for _token, (_factory, _aggregator) in LINE_SEARCHES.items():
    register(_token, _factory, partner=_aggregator)
METHODS["stl"] = Method("stl", "baseline", single_task)
