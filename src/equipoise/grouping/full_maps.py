"""Where the full maps of all checkpoints are kept, if at all: a file, or memory while small."""

from __future__ import annotations

import math
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from equipoise.errors import EquipoiseError

SMALL = 64 << 20
"""Bytes of full maps that are kept in memory without being asked for."""


class FullMaps:
    """An array of maps that is filled checkpoint by checkpoint.

    Args:
        shape: (T, checkpoints, N, 2).
        path: the .npy file; None: memory, if it is small.
    """

    def __init__(self, shape: tuple[int, int, int, int], path: str | Path | None) -> None:
        self.shape = shape
        self.path = None if path is None else Path(path)
        if self.path is not None and self.path.suffix != ".npy":
            raise ValueError(f"path is {self.path}; give the name of a .npy file.")
        self.bytes = 4 * math.prod(shape)
        small = self.path is None and self.bytes <= SMALL
        self.kept: np.ndarray | None = np.zeros(shape, np.float32) if small else None

    @property
    def partial(self) -> Path:
        """The file before the last checkpoint."""
        assert self.path is not None
        return self.path.with_name(self.path.name + ".partial")

    @contextmanager
    def writing(self, checkpoint: int) -> Generator[np.ndarray | None]:
        """(T, N, 2) to be filled for one checkpoint; None: nothing is kept.

        After the last checkpoint the file gets its name.
        """
        if self.path is None:
            yield None if self.kept is None else self.kept[:, checkpoint]
            return
        if checkpoint == 0:
            # Only the first may make the file anew; later ones would lose what is in it.
            self.path.parent.mkdir(parents=True, exist_ok=True)
            np.lib.format.open_memmap(self.partial, "w+", np.float32, self.shape).flush()
        elif not self.partial.exists() and self.path.exists():  # killed after it was completed
            os.replace(self.path, self.partial)
        opened = self._open(self.partial, "r+")
        yield opened[:, checkpoint]
        opened.flush()
        if checkpoint + 1 == self.shape[1]:
            os.replace(self.partial, self.path)

    def read(self, closed: int) -> np.ndarray:
        """(T, closed, N, 2), read-only."""
        if self.kept is not None:
            found = self.kept[:, :closed].view()
            found.flags.writeable = False
            return found
        if self.path is None:
            raise EquipoiseError(
                f"the full maps take {self.bytes >> 20} MiB, and were not kept. Give DataMaps a "
                "`path` for them; clustering needs only gram()."
            )
        if not closed:
            return np.zeros((self.shape[0], 0, *self.shape[2:]), np.float32)
        return self._open(self._file(), "r")[:, :closed]

    def resume(self, closed: int, kept: Tensor | None) -> None:
        """Take over what a state says was kept.

        Raises:
            EquipoiseError: the file of the maps is not there, or is of another shape.
        """
        if self.kept is not None and kept is not None:
            if kept.shape != self.kept[:, :closed].shape:
                raise EquipoiseError(f"the state has full maps {tuple(kept.shape)}.")
            self.kept[:, :closed] = kept.numpy()
        elif self.kept is not None and closed:
            raise EquipoiseError(
                "the state has no full maps; they went to a file. Give DataMaps its `path`."
            )
        elif self.path is not None and closed:
            self._open(self._file(), "r")

    def _file(self) -> Path:
        assert self.path is not None
        return self.partial if self.partial.exists() else self.path

    def _open(self, file: Path, mode: Literal["r", "r+"]) -> np.memmap:
        if not file.exists():
            raise EquipoiseError(
                f"there is no {file}, where the full maps of earlier epochs were; put it back, or "
                "record the maps again from the start."
            )
        try:
            found = np.lib.format.open_memmap(file, mode)
        except ValueError as error:  # numpy's word for a file that is cut short or none of its own
            raise EquipoiseError(
                f"{file} is damaged ({error}); record the maps again from the start."
            ) from error
        if found.shape != self.shape or found.dtype != np.float32:
            raise EquipoiseError(f"{file} holds maps of shape {found.shape}, not {self.shape}.")
        return found
