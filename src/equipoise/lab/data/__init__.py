"""The data sets, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from equipoise.lab import options
from equipoise.lab.data import celeba, cifar, cityscapes, cityscapes_release, multimnist, nyuv2
from equipoise.lab.data.base import Data, DataError, Split, loader
from equipoise.lab.data.digits import digits_attributes, multidigits
from equipoise.lab.data.qm9 import qm9
from equipoise.lab.data.qm9_lite import qm9_lite
from equipoise.text import show

__all__ = ["DATASETS", "Data", "DataError", "Split", "canonical", "load", "loader"]

DATASETS: dict[str, Callable[..., Data]] = {
    "multidigits": multidigits,
    "digits-attributes": digits_attributes,
    "multimnist": multimnist.multimnist,
    "multifashion": multimnist.multifashion,
    "multifashion-mnist": multimnist.multifashion_mnist,
    "celeba": celeba.celeba,
    "qm9": qm9,
    "qm9-lite": qm9_lite,
    "cifar10": cifar.cifar10,
    "cifar100": cifar.cifar100,
    "cityscapes": cityscapes.cityscapes,
    "cityscapes-release": cityscapes_release.cityscapes_release,
    "nyuv2": nyuv2.nyuv2,
}
"""Name -> `build(root, seed, **options)`. A new set is one line here."""


def canonical(text: str) -> str:
    """The canonical form of "name(option=value, ...)", which leaves out what is default.

    Raises:
        DataError: a name, an option or the type of a value is not known; says what is.
    """
    return show(*options.read(text, DATASETS, "data set", DataError))


def load(text: str, root: str | Path | None = None, **more: Any) -> Data:
    """The data set that `text` names.

    Args:
        text: one of `DATASETS`, with options in parentheses if need be:
            "multifashion(train=3000)". The option `seed` (default 0) decides what is random in
            making the data. It is separate from a run's seed, so that runs with several seeds
            measure the spread of training on the same data.
        root: folder of the data set's files; bundled sets do without.
        more: further options.

    Raises:
        DataError: what is wrong with the text (see `canonical`), or with the files.
        ValueError: an option has a value with which the set cannot be made.
    """
    name, given = options.read(text, DATASETS, "data set", DataError)
    return DATASETS[name](root, **{"seed": 0, **given, **more})
