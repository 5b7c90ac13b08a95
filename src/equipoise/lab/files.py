"""Files that are either the old ones or the new ones, whenever the process is killed."""

from __future__ import annotations

import csv
import io
import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from equipoise.errors import EquipoiseError
from equipoise.files import replacing


class DamagedError(EquipoiseError, ValueError):
    """A file of a run that cannot be read."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(f"{path} cannot be read; remove its folder to make the run again.")


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write or replace `path` in one go."""
    with replacing(path) as file:
        file.write(content)


def write_text(path: str | Path, text: str) -> None:
    """Write or replace `path` in one go, as UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """Write or replace `path` in one go; numbers keep all their digits."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """What `write_json` wrote.

    Raises:
        DamagedError: the file holds no JSON object; names it.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedError(path) from error
    if not isinstance(found, dict):
        raise DamagedError(path)
    return found


def read_state(path: str | Path) -> Any:
    """What `torch.save` wrote, on the CPU; nothing in it is executed.

    Raises:
        DamagedError: the file is not there, or holds nothing of the kind; names it.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise DamagedError(path) from error


def write_rows(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write or replace the table `path` (CSV, one header line); None becomes an empty cell.

    All rows have the keys of the first. Numbers keep all their digits.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
