"""From the text of a recipe to its stages, and why a text is refused."""

from __future__ import annotations

import re

from equipoise.errors import CombinationError, RecipeError, nearest
from equipoise.method import RENAMED, Method, Stage, any_context
from equipoise.registry import METHODS, REFUSED, TOKENS, among_features
from equipoise.text import arguments, split


def usual_aggregator(search: Stage | None) -> Stage:
    """The aggregator of a recipe that names none."""
    if search is None:
        return Stage(METHODS["sum"])
    method = METHODS[search.method.partner]
    return Stage((search.method.level == "features" and among_features(method)) or method)


def beside_search(aggregator: Stage, search: Stage, text: str) -> Stage:
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
    there = among_features(method)
    if there is None:
        raise CombinationError(
            f"recipe {text!r}: {search} works on the features, where {aggregator} cannot. Use bls."
        )
    return Stage(there, aggregator.parameters)


def parts(text: str) -> list[str]:
    """The parts between plus signs that stand outside parentheses."""
    return [part.strip() for part in re.split(r"\+(?![^(]*\))", text)]


def read(part: str, text: str) -> Stage:
    """The stage that one part of a recipe's text names.

    Raises:
        RecipeError: it cannot be read, or its method refuses a value.
    """
    try:
        token, inside = split(part)
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
        given = arguments(method.token, inside)
    except ValueError as error:
        raise RecipeError(f"recipe {text!r}: {error}") from None
    for name in given:
        if name not in known:
            raise RecipeError(f"recipe {text!r}: {_no_parameter(method, name)}")
    try:
        given = {name: method.check(name, value) for name, value in given.items()}
        stage = Stage(method, {k: v for k, v in given.items() if v != known[k]})
        stage.build(**any_context())
        stage.build_sharpness()
    except (ValueError, TypeError) as error:
        raise RecipeError(f"recipe {text!r}: {error}") from error
    return stage


def _no_parameter(method: Method, name: str) -> str:
    new = RENAMED.get(name)
    if new in method.parameters:
        example = "heads=weighted" if new == "heads" else f"{new}=..."
        return f"{method.token} has no parameter {name!r} any more; write {example}."
    takes = ", ".join(method.parameters) or "none"
    return f"{method.token} has no parameter {name!r}; it takes: {takes}."


def both(first: Stage, second: Stage, text: str) -> str:
    """Why two answers to one question are refused, and what may have been meant."""
    together = [f"{a.method.token}-{b.method.token}" for a, b in ((first, second), (second, first))]
    meant = next((f", or use {one}" for one in together if one in TOKENS), "")
    why = next((f" {REFUSED[one]}" for one in together if one in REFUSED), "")
    return (
        f"recipe {text!r}: {first} and {second} both answer the question of "
        f"{second.method.axis}; keep one{meant}.{why}"
    )


def refuse_senseless(aggregator: Stage, search: Stage | None, text: str) -> None:
    """What a Step would refuse by the names of classes is refused by those of the recipe.

    Raises:
        CombinationError: an aggregator that cannot work together with a line search, or in flat
            regions.
    """
    built = aggregator.build(**any_context())
    interval, degree = getattr(built, "interval", 1), getattr(built, "degree", 1)
    if search is not None and interval > 1:
        raise CombinationError(
            f"recipe {text!r}: {search} needs the gradients of each task in every step, "
            f"{aggregator} looks at them in one of {interval}. Leave update_every out."
        )
    sharpness = aggregator.build_sharpness()
    if sharpness is not None and sharpness.decompose and degree != 1:
        plain = aggregator.method.token.partition("-")[2]
        raise CombinationError(
            f"recipe {text!r}: the direction of {aggregator} is of degree {degree:g} in the "
            f"gradients, so its flat part would not be in proportion to rho. Use degree=1 where "
            f"{plain} has it, or a-{plain}."
        )


def _plain(token: str) -> str:
    return token.lower().replace("-", "")
