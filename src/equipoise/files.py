"""A file that is either the old one or the new one, whenever the process is killed."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: str | Path) -> Generator[BinaryIO]:
    """A file to write to, which takes the place of `path` when all went well, and only then.

    Raises:
        OSError: the folder does not exist or cannot be written.
    """
    path = Path(path)
    # In the same folder, for a rename is atomic within one file system only.
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
