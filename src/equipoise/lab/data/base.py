"""What a data set is to the lab: tasks, and three splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, overload

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

from equipoise.errors import EquipoiseError
from equipoise.lab.tasks import Task


class Inputs(Protocol):
    """What a split needs of its inputs.

    A tensor has it, and so have what reads them on demand, and `Graphs`.
    """

    def __len__(self) -> int:
        """N."""
        ...

    def __getitem__(self, index: Any, /) -> Any:
        """The inputs (B, ...) at several indices, or the one input (...) at an int.

        A tensor, or anything with a method `to(device)`.
        """
        ...


Batch = tuple[Any, dict[str, Tensor]]
"""What a model takes, and task name -> (B, ...) targets."""
IndexedBatch = tuple[Any, dict[str, Tensor], Tensor]
"""A batch, and (B,) the numbers of its samples in their split."""


class DataError(EquipoiseError, ValueError):
    """A data set that is not known, or whose files are not where they are expected."""


class Split(Dataset[Batch]):
    """N samples; several indices at once give a batch in one indexing operation.

    Args:
        inputs: (N, ...), a tensor or what gives a batch for indices. Bytes (uint8) stay bytes
            here, and are given out as float32 in [0, 1]: images take a quarter of the memory.
        targets: task name -> (N, ...).

    Raises:
        ValueError: targets that are not as many as the inputs.
    """

    def __init__(self, inputs: Inputs, targets: Mapping[str, Tensor]) -> None:
        for task, target in targets.items():
            if len(target) != len(inputs):
                raise ValueError(
                    f"task {task!r}: {len(target)} targets for {len(inputs)} inputs; give as many."
                )
        self.inputs = inputs
        self.targets = dict(targets)

    def __len__(self) -> int:
        return len(self.inputs)

    def seeded(self, shuffle_seed: int | None) -> Split:
        """The samples as a pass with that seed has them; a set that varies them overrides this."""
        return self

    def __getitem__(self, index: Tensor | Sequence[int] | int) -> Batch:
        """The batch (B, ...) at several indices, or the one sample (...) at an int."""
        targets = {task: target[index] for task, target in self.targets.items()}
        inputs = self.inputs[index]
        if isinstance(inputs, Tensor) and inputs.dtype == torch.uint8:
            inputs = inputs.float() / 255
        return inputs, targets


class Indexed(Dataset[IndexedBatch]):
    """The samples of `split`, each with its number in it."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: Tensor | Sequence[int] | int) -> IndexedBatch:
        """Inputs and targets as `split` gives them, and (B,) long, or () at an int: `index`."""
        return (*self.split[index], torch.as_tensor(index))


@dataclass(frozen=True)
class Baseline:
    """Published numbers of single-task training, for a Delta_m without such runs of one's own.

    Args:
        source: where they are from, in a few words that can stand in a sentence.
        values: task -> measure -> value, each in the unit of the measure.
    """

    source: str
    values: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Data:
    """A data set.

    Args:
        name: the name in the registry.
        tasks: in the order in which the splits' targets have them.
        train: the samples to train on.
        val: the samples by which a model is selected.
        test: the samples that are measured once, at the end.
        input_shape: shape of one input, (channels, height, width) for images; for graphs the
            numbers of features (of a node, of an edge).
        description: one sentence for `equipoise list` and the report page.
        groups: name -> tasks that belong together by what is known of the data, to judge a
            grouping by; nothing is trained with it. Empty where nothing is known.
        baseline: published numbers of single-task training, if there are any.
    """

    name: str
    tasks: tuple[Task, ...]
    train: Split
    val: Split
    test: Split
    input_shape: tuple[int, ...]
    description: str
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    baseline: Baseline | None = None


@overload
def loader(
    split: Split,
    batch_size: int,
    *,
    shuffle_seed: int | None,
    with_index: Literal[False] = False,
) -> DataLoader[Batch]: ...
@overload
def loader(
    split: Split, batch_size: int, *, shuffle_seed: int | None, with_index: Literal[True]
) -> DataLoader[IndexedBatch]: ...
def loader(
    split: Split, batch_size: int, *, shuffle_seed: int | None, with_index: bool = False
) -> DataLoader[Batch] | DataLoader[IndexedBatch]:
    """Batches of `split`, the last one smaller where the numbers do not divide.

    Random numbers come from a generator of the loader's own, so neither making nor using a
    loader moves torch's global generator.

    Args:
        split: the samples.
        batch_size: samples in a batch.
        shuffle_seed: None: in order. A number: shuffled anew in each pass, and loaders made with
            the same seed go through the same passes. An epoch that must be repeatable by itself
            (to resume a run there) takes a loader with a seed of its own. A set that varies its
            training samples does so in shuffled passes only, as the seed says.
        with_index: False: batches (inputs, targets). True: (inputs, targets, index), where
            index (B,) long says which samples of `split` they are, 0 to N - 1, whatever the order.
    """
    split = split.seeded(shuffle_seed)
    generator = torch.Generator().manual_seed(shuffle_seed or 0)
    order = (
        SequentialSampler(split)
        if shuffle_seed is None
        else RandomSampler(split, generator=generator)
    )
    batches = BatchSampler(order, batch_size, drop_last=False)
    samples: Dataset[Any] = Indexed(split) if with_index else split
    return DataLoader(samples, sampler=batches, batch_size=None, generator=generator)
