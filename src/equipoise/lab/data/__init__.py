"""The data sets, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from equipoise.errors import nearest
from equipoise.lab.data.base import Data, DataError, Split, loader
from equipoise.lab.data.digits import digits_attributes, multidigits

__all__ = ["DATASETS", "Data", "DataError", "Split", "load", "loader"]

DATASETS: dict[str, Callable[..., Data]] = {
    "multidigits": multidigits,
    "digits-attributes": digits_attributes,
}
"""Name -> `build(root, seed, **options)`. A new set is one line here."""


def load(name: str, root: str | Path | None = None, seed: int = 0, **options: object) -> Data:
    """The data set `name`.

    Args:
        name: one of `DATASETS`.
        root: folder of the data set's files; bundled sets do without.
        seed: of whatever is random in making the data. It is separate from a run's seed, so that
            runs with several seeds measure the spread of training on the same data.
        options: further arguments of that data set, for example `missing=0.3`.

    Raises:
        DataError: the name is not known, or files are missing.
    """
    if name not in DATASETS:
        raise DataError(f"no data set {name!r}; {nearest(name, DATASETS)}")
    return DATASETS[name](root, seed, **options)
