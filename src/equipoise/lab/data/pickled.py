"""Pickles of images, as the CIFAR sets are published, read without running what they say.

A pickle is a program. This reader knows only what those files are made of: dictionaries, lists,
texts, numbers and arrays of bytes. It calls nothing else, whatever a file asks for, and numpy never
sees what is in the file but as plain bytes.
"""

from __future__ import annotations

import pickle
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.lab.data.base import DataError


class _StandIn:
    """What a pickle may call instead of what it asks for; it cannot change it."""

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a state for what has none")


class _Type(_StandIn):
    """For numpy.dtype; only that of unsigned bytes can be made."""

    def __init__(self, code: object, *_: object) -> None:
        if code not in ("u1", b"u1"):
            raise pickle.UnpicklingError(f"an array of {text(code)} instead of bytes (u1)")

    def __setstate__(self, state: Any) -> None:
        """Nothing to do: bytes have no byte order, fields or alignment."""


class _Array(_StandIn):
    """For numpy.ndarray and what makes it: takes shape, order and bytes, and makes one of them."""

    array: np.ndarray | None = None

    def __init__(self, *_: object) -> None:
        """The arguments, an empty shape and the like, are what numpy begins with."""

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, content = state
        whole = isinstance(content, bytes) and all(type(n) is int and n >= 0 for n in shape)
        if not isinstance(kind, _Type) or not whole or len(content) != prod(shape):
            raise pickle.UnpicklingError("an array whose bytes do not fill its shape")
        self.array = np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran else "C")


class _Bytes(_StandIn):
    """For the function with which Python 3 writes bytes, as text, in the older formats."""

    def __new__(cls, characters: str, *_: object) -> Any:
        """Bytes, not one of these."""
        return characters.encode("latin1")


KNOWN: dict[tuple[str, str], type[_StandIn]] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _Bytes,
}


class _Reader(pickle.Unpickler):
    """Finds what is KNOWN, and refuses the rest by name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in KNOWN:
            raise pickle.UnpicklingError(f"{module}.{name}, which no published file holds")
        return KNOWN[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("a reference to something outside the file")


def read(path: Path, url: str) -> dict[str, Any]:
    """The dictionary in a pickle of texts, numbers and arrays of bytes.

    Args:
        path: of the file.
        url: where to get it again, for messages.

    Returns:
        Name -> value, with names as text whether the file has text or bytes; texts of the file
        stay bytes where Python 2 wrote them.

    Raises:
        DataError: the file cannot be read, is damaged, or holds something else.
    """
    try:
        with path.open("rb") as file:
            found = _Reader(file, encoding="bytes").load()
    except OSError as error:
        raise damaged(path, f"cannot be read ({error.strerror or error})", url) from error
    except pickle.UnpicklingError as error:
        raise damaged(path, f"cannot be read: it holds {error}", url) from error
    except Exception as error:  # a damaged pickle makes its reader fail in any way
        raise damaged(
            path, f"is damaged or no pickle ({error or type(error).__name__})", url
        ) from error
    if not isinstance(found, dict):
        raise damaged(path, f"holds a {type(found).__name__} instead of a dictionary", url)
    return {text(key): v.array if isinstance(v, _Array) else v for key, v in found.items()}


def text(given: Any) -> str:
    """A text of the file, whether it came as bytes or as text."""
    return given.decode("utf-8", "replace") if isinstance(given, bytes) else str(given)


def damaged(path: Path, problem: str, url: str) -> DataError:
    """The error that names a file, what is wrong with it, and where to get it again."""
    return DataError(f"{path} {problem}; get it again from {url}.")
