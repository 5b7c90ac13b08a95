"""The options of data sets and models: the arguments of what builds them, given in parentheses."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from equipoise.errors import EquipoiseError, nearest
from equipoise.text import read as read_call
from equipoise.text import show_value

FROM_CONTEXT = ("root", "data", "optimizer")
"""Arguments from elsewhere: --data-root, the data set of a model, the optimizer of a schedule."""

Registry = Mapping[str, Callable[..., Any]]


def defaults(factory: Callable[..., Any]) -> dict[str, Any]:
    """The options of what `factory` builds, with their default values."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(factory).parameters.items()
        if name not in FROM_CONTEXT and parameter.default is not parameter.empty
    }


def written(factory: Callable[..., Any]) -> str:
    """The options with their default values, as one would give them."""
    return ", ".join(f"{k}={show_value(v)}" for k, v in defaults(factory).items()) or "none"


def read(
    text: str, registry: Registry, what: str, error: Callable[[str], EquipoiseError]
) -> tuple[str, dict[str, Any]]:
    """The name in `registry` and the options of "name" or "name(option=value, ...)".

    Args:
        text: what the user gave; the case of the name does not matter.
        registry: name -> what builds it.
        what: how messages call such a thing.
        error: the exception.

    Returns:
        The name, and those options that differ from their defaults.

    Raises:
        EquipoiseError: of the type `error`; the text cannot be read, or a name, an option or the
            type of a value is not known. Says what is.
    """
    try:
        given, options = read_call(text)
    except ValueError as problem:
        raise error(f"{what} {text!r}: {problem}") from None
    by_plain_name = {known.lower(): known for known in registry}
    name = by_plain_name.get(given.lower())
    if name is None:
        raise error(f"no {what} {given!r}; {nearest(given, registry)}")
    try:
        return name, chosen(registry[name], options)
    except ValueError as problem:
        raise error(f"{what} {name}: {problem}") from None


def chosen(factory: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The `options` that differ from the defaults, each of the type that it should have.

    Raises:
        ValueError: an unknown option (names what there is), or a value of another type.
    """
    known = defaults(factory)
    for name in options:
        if name not in known:
            raise ValueError(f"there is no option {name!r}; it takes: {written(factory)}.")
    hints = get_type_hints(factory)
    fitted = {}
    for name, value in options.items():
        hint = hints.get(name, Any)
        try:
            fitted[name] = fit(value, hint)
        except TypeError:
            raise ValueError(f"{name} is {show_value(value)}; it takes {in_words(hint)}.") from None
    return {name: value for name, value in fitted.items() if value != known[name]}


def fit(value: Any, hint: Any) -> Any:
    """`value` as `hint` wants it: 5 for a float is 5.0, a list for a tuple becomes one.

    Raises:
        TypeError: it cannot be.
    """
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        for one in get_args(hint):
            try:
                return fit(value, one)
            except TypeError:
                continue
    elif origin is Literal:
        if value in get_args(hint):
            return value
    elif origin is tuple:
        wanted = get_args(hint)
        if isinstance(value, tuple | list) and len(value) == len(wanted):
            return tuple(fit(v, h) for v, h in zip(value, wanted, strict=True))
    elif hint is Any or type(value) is hint or (value is None and hint is NoneType):
        return value
    elif hint is float and type(value) is int:
        return float(value)
    raise TypeError


def in_words(hint: Any) -> str:
    """What a value of that type looks like, for a message."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return " or ".join(map(in_words, get_args(hint)))
    if origin is Literal:
        return " or ".join(map(show_value, get_args(hint)))
    if origin is tuple:
        return f"({', '.join(map(in_words, get_args(hint)))})"
    return "none" if hint is NoneType else hint.__name__
