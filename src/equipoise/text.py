"""Texts of the form name(key=value, ...): what recipes, data sets and models are named by.

A value is a Python literal ("0.5", "(3000, 500)", "'a, b'"), true, false or none in any case, or
else a bare word ("l2").
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Mapping
from typing import Any

OPENING, CLOSING = "([{", ")]}"


def read(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the values in parentheses of "name" or "name(key=value, ...)".

    Raises:
        ValueError: the text has another form, or names a key twice.
    """
    name, inside = split(text)
    return name, arguments(name, inside)


def split(text: str) -> tuple[str, str]:
    """The name, and what stands between its parentheses ("" without parentheses).

    Raises:
        ValueError: the text has another form.
    """
    match = re.fullmatch(r"\s*([A-Za-z0-9-]+)\s*(?:\((.*)\))?\s*", text)
    if match is None:
        raise ValueError(f"cannot read {text!r}; write name or name(key=value, ...).")
    return match[1], match[2] or ""


def arguments(name: str, inside: str) -> dict[str, Any]:
    """The values of "key=value, ...", key by key; `name` is what messages call the whole.

    Raises:
        ValueError: something that is no key=value, a key that is given twice, brackets or quotes
            that do not match.
    """
    found: dict[str, Any] = {}
    for part in filter(None, _parts(name, inside)):
        key, equals, text = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise ValueError(f"write {name}({part}=...), a value for a name.")
        if key in found:
            raise ValueError(f"{key} is given twice.")
        found[key] = value(text)
    return found


def show(name: str, values: Mapping[str, Any]) -> str:
    """The canonical text, with the keys in alphabetical order; `read` gives the same back.

    Values are numbers, strings, true, false, none, and tuples of them.
    """
    if not values:
        return name
    return f"{name}({', '.join(f'{k}={show_value(v)}' for k, v in sorted(values.items()))})"


def value(text: str) -> Any:
    """A Python literal, true, false or none in any case, or else a bare word."""
    word = text.title() if text.lower() in ("true", "false", "none") else text
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the parser, about words that look like numbers
            return ast.literal_eval(word)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text


def show_value(thing: Any) -> str:
    """The canonical text of one value; a string without quotes where it can be read like that."""
    if not isinstance(thing, str):
        return repr(thing).lower() if thing is None or isinstance(thing, bool) else repr(thing)
    plain = value(thing) == thing and not re.search(r"[\s,'\"]", thing)
    balanced = not re.search(r"[()\[\]{}]", thing)
    return thing if thing and plain and balanced else repr(thing)


def _parts(name: str, inside: str) -> list[str]:
    """`inside` cut at the commas that stand in no brackets and no quotes."""
    parts, open_brackets, quote, escaped = [""], "", "", False
    for character in inside:
        if quote:
            quote = "" if character == quote and not escaped else quote
            escaped = character == "\\" and not escaped
        elif character in "'\"" and parts[-1].rstrip()[-1:] in {"", "=", ",", *OPENING}:
            quote = character  # anywhere else it is an apostrophe
        elif character in OPENING:
            open_brackets += CLOSING[OPENING.index(character)]
        elif character in CLOSING:
            if open_brackets[-1:] != character:
                raise ValueError(f"{name}({inside}): {character!r} closes nothing.")
            open_brackets = open_brackets[:-1]
        elif character == "," and not open_brackets:
            parts.append("")
            continue
        parts[-1] += character
    if quote or open_brackets:
        raise ValueError(f"{name}({inside}): {quote or open_brackets[-1]!r} is missing at the end.")
    return [part.strip() for part in parts]
