"""Arrays that take long to make, kept in one file that is known to be whole when it is read.

The file: one line of JSON with the shapes, the arrays' bytes one after the other, and the SHA-256
of all that.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path

import numpy as np

from equipoise.lab.files import DamagedError, read_json, replacing, write_text

Shapes = Mapping[str, tuple[int, ...]]
Arrays = dict[str, np.ndarray]

OFF = "off"
CHUNK = 1 << 22  # bytes read at once
FORMAT = "equipoise arrays 1"

notices = logging.getLogger("equipoise.lab.data")
"""Where one is told of what takes long, or did not go as expected. On standard error by default."""


def cached(path: Path | None, shapes: Shapes, make: Callable[[], Iterable[np.ndarray]]) -> Arrays:
    """The uint8 arrays at `path`, as `stored` gives them, or in memory where that gives none."""
    arrays = stored(path, shapes, make)
    if arrays is not None:
        return arrays
    flat, end = np.empty(sum(map(_size, shapes.values())), np.uint8), 0
    for piece in make():
        flat[end : end + piece.size] = piece.ravel()
        end += piece.size
    return _arrays(flat, shapes)


def stored(
    path: Path | None, shapes: Shapes, make: Callable[[], Iterable[np.ndarray]]
) -> Arrays | None:
    """The uint8 arrays at `path`; made and written there if they are not, or are damaged.

    Arrays from the file are mapped, not read: processes share one copy, and what is not used
    takes no memory.

    Args:
        path: of the file; None: nothing is kept.
        shapes: name -> shape.
        make: gives the bytes of the arrays, in the order of `shapes`, in pieces of any shape.

    Returns:
        The arrays, or None where no file can be kept; why not is said in a notice.
    """
    if path is None:
        return None
    try:
        return read(path, shapes)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        notices.warning("%s is made again: %s.", path, error)
    pieces = iter(make())
    first = list(islice(pieces, 1))  # what is wrong shows now, before a folder is made
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, shapes, chain(first, pieces))
        return read(path, shapes)
    except OSError as error:
        notices.warning("%s cannot be kept (%s); going on without it.", path, error)
        return None


def read(path: Path, shapes: Shapes) -> Arrays:
    """The arrays of a file that `write` wrote.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is damaged, or holds arrays of other shapes.
    """
    line = _line(shapes)
    size = sum(map(_size, shapes.values()))
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if file.read(len(line)) != line:
            raise ValueError("it begins with something else")
        digest.update(line)
        left = size
        while left and (piece := file.read(min(left, CHUNK))):
            digest.update(piece)
            left -= len(piece)
        if left or file.read() != digest.digest():
            raise ValueError("its checksum is wrong")
    if not size:
        return _arrays(np.empty(0, np.uint8), shapes)
    # "c": torch wants arrays that can be written to, and what is written goes nowhere.
    return _arrays(np.memmap(path, np.uint8, "c", len(line), (size,)), shapes)


def write(path: Path, shapes: Shapes, pieces: Iterable[np.ndarray]) -> None:
    """Write `path` in one go.

    Raises:
        OSError: it cannot be written.
        ValueError: the pieces are not as many bytes as the shapes say.
    """
    digest = hashlib.sha256()
    written = 0
    with replacing(path) as file:
        digest.update(_line(shapes))
        file.write(_line(shapes))
        for array in pieces:
            content = np.ascontiguousarray(array, np.uint8).data.cast("B")
            digest.update(content)
            file.write(content)
            written += len(content)
        if written != sum(map(_size, shapes.values())):
            raise ValueError(f"{written} bytes do not fill arrays of {dict(shapes)}.")
        file.write(digest.digest())


def folder(root: Path, wanted: str | None) -> Path | None:
    """Where to keep what was made of the files in `root`; None: nowhere.

    `wanted`, or the environment's EQUIPOISE_CACHE, if one is given ("off": nowhere); or else
    `root`/equipoise-cache if it can be written, and the user's own cache folder if not.
    """
    wanted = wanted or os.environ.get("EQUIPOISE_CACHE")
    if wanted:
        return None if wanted.lower() == OFF else Path(wanted).expanduser()
    beside = root / "equipoise-cache"
    if _may_write(beside if beside.exists() else root):
        return beside
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "equipoise"


def name(stem: str, parameters: Mapping[str, object], sources: Iterable[str]) -> str:
    """The file name: `stem`, and a hash of the parameters and of the sources' checksums."""
    text = json.dumps([FORMAT, parameters, *sources], sort_keys=True)
    return f"{stem}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.bin"


def write_down(path: Path | None, lists: Mapping[str, Sequence[int]]) -> None:
    """Keep lists, those of a split for instance, in a JSON file for whoever wants the same ones.

    Nothing reads it here; that it cannot be written is said in a notice. None: nowhere.
    """
    if path is None:
        return
    wanted = {name: [int(i) for i in entries] for name, entries in lists.items()}
    try:
        if path.exists() and read_json(path) == wanted:
            return
    except (DamagedError, OSError):
        pass  # written again
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(wanted) + "\n")
    except OSError as error:
        notices.warning("%s cannot be kept (%s); going on without it.", path, error)


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def _may_write(folder: Path) -> bool:
    """Whether `folder` can be written, and is meant to be: root can write what is read-only."""
    try:
        if not folder.stat().st_mode & 0o222:
            return False
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _line(shapes: Shapes) -> bytes:
    return json.dumps({"format": FORMAT, "shapes": shapes}).encode() + b"\n"


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _arrays(flat: np.ndarray, shapes: Shapes) -> Arrays:
    found, start = {}, 0
    for key, shape in shapes.items():
        found[key] = flat[start : start + _size(shape)].reshape(shape)
        start += _size(shape)
    return found
