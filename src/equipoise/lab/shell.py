"""What all commands say and try in the same way."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from equipoise.lab.config import ConfigError


def writable(folder: Path, advice: str = "choose another --out") -> None:
    """Make `folder` and try to write there.

    Args:
        folder: where.
        advice: what the user can do if not.

    Raises:
        ConfigError: nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(f"cannot write to {folder} ({error.strerror}); {advice}.") from None


def complain(message: str) -> None:
    """One line on standard error."""
    print(f"equipoise: {message}", file=sys.stderr)
