"""Arrays in numbered .npy files: what is there, and what is in them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from equipoise.lab.data.base import DataError


def numbered(folder: Path) -> set[str]:
    """The names of the arrays in a folder: 0.npy, 1.npy, ..."""
    with os.scandir(folder) as entries:
        return {e.name for e in entries if e.name.endswith(".npy") and e.name[:-4].isdecimal()}


def header(path: Path, again: str) -> tuple[int, ...]:
    """The shape of an array of numbers, whose file is as long as it has to be.

    Args:
        path: of the file.
        again: what to do about a file that is not whole, for messages.

    Raises:
        DataError: it is not there, is no array of numbers, or is cut off.
    """
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read(file)
            there = os.fstat(file.fileno()).st_size - file.tell()
    except FileNotFoundError:
        raise DataError(f"{path} is missing; {again}.") from None
    except (OSError, ValueError, EOFError) as error:
        raise damaged(path, f"is no .npy file ({_line(error)})", again) from error
    if dtype.kind not in "fiu":
        raise damaged(path, f"holds {dtype}, not numbers", again)
    needed = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if there != needed:
        raise damaged(path, f"has {there} bytes of data instead of {needed}", again)
    return shape


def load(path: Path, again: str) -> np.ndarray:
    """The array of finite numbers in a file.

    Raises:
        DataError: it cannot be read, or holds what is no number.
    """
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise damaged(path, f"cannot be read ({_line(error)})", again) from error
    if not np.isfinite(found).all():
        raise damaged(path, "holds numbers that are not finite", again)
    return found


def damaged(path: object, problem: str, again: str) -> DataError:
    """The error that names a file, what is wrong with it, and what to do."""
    return DataError(f"{path} {problem}; {again}.")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
