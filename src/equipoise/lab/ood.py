"""What lies out of the domain of a data set: another data set, or its own images spoilt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache

import torch
from torch import Tensor

from equipoise.lab import data as datasets
from equipoise.lab import options
from equipoise.lab.config import ConfigError, RunConfig
from equipoise.lab.data.base import Batch, Data, DataError, loader
from equipoise.text import show

NOTHING = "none"
PARTNERS = {"multimnist": "multifashion", "multifashion": "multimnist"}
"""Data set -> the one that is usually taken, in the same geometry."""


def inverted(inputs: Tensor, seed: int) -> Tensor:
    """The images with black and white exchanged: 1 - x."""
    return 1 - inputs


def shuffled(inputs: Tensor, seed: int) -> Tensor:
    """The pixels of every image in one random order, which `seed` decides: no shape is left."""
    flat = inputs.flatten(2)
    generator = torch.Generator().manual_seed(seed)
    return flat[:, :, torch.randperm(flat.shape[2], generator=generator)].view_as(inputs)


SPOILT: dict[str, Callable[[Tensor, int], Tensor]] = {"inverted": inverted, "shuffled": shuffled}
"""Name -> what becomes of images (B, channels, height, width) in [0, 1] of the test split."""


def canonical(text: str) -> str | None:
    """The canonical form of what a user gives; None for "none".

    Raises:
        DataError: it is no data set and no way of spoiling one; says what there is.
    """
    word = text.strip().lower()
    if word == NOTHING or word in SPOILT:
        return None if word == NOTHING else word
    try:
        return datasets.canonical(text)
    except DataError as error:
        others = ", ".join((*SPOILT, NOTHING))
        raise DataError(f"--ood: {str(error).rstrip('.')}; or give one of {others}.") from None


def usual(config: RunConfig) -> str | None:
    """The partner of a run's data set, if it has one and its files are there; else None.

    With the options of the run's set, but of training and validation a single sample, which
    nobody looks at.
    """
    return _partner(config.data, config.data_root)


@lru_cache  # looking for files and composing takes seconds
def _partner(text: str, root: str | None) -> str | None:
    name, given = options.read(text, datasets.DATASETS, "data set", DataError)
    if name not in PARTNERS:
        return None
    partner = datasets.canonical(show(PARTNERS[name], {**given, "train": 1, "val": 1}))
    try:
        datasets.load(partner, root)
    except DataError:
        return None
    return partner


def batches(name: str, data: Data, root: str | None, batch_size: int, seed: int) -> Iterable[Batch]:
    """The test split of what lies out of the domain of `data`, without targets.

    Args:
        name: in the canonical form.
        data: the data set of the run.
        root: folder of the files of both.
        batch_size: samples in a batch.
        seed: of what is random in spoiling.

    Raises:
        ConfigError: its inputs have another shape than those of `data`, or cannot be spoilt.
        DataError: its files are not there.
    """
    if name in SPOILT:
        if len(data.input_shape) != 3:
            raise ConfigError(
                f"--ood {name} is for images; the inputs of {data.name} have shape "
                f"{data.input_shape}. Give another data set."
            )
        return Changed(loader(data.test, batch_size, shuffle_seed=None), SPOILT[name], seed)
    other = datasets.load(name, root)
    if other.input_shape != data.input_shape:
        raise ConfigError(
            f"--ood {name} has inputs of shape {other.input_shape}, but {data.name} has "
            f"{data.input_shape}; give options that make them the same."
        )
    return loader(other.test, batch_size, shuffle_seed=None)


class Changed:
    """Batches whose inputs are changed."""

    def __init__(
        self, given: Iterable[Batch], change: Callable[[Tensor, int], Tensor], seed: int
    ) -> None:
        self._given = given
        self._change = change
        self._seed = seed

    def __iter__(self) -> Iterator[Batch]:
        for inputs, _ in self._given:
            yield self._change(inputs, self._seed), {}
