"""What the measures of a model share: it is looked at over all batches, and stays as it was."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from equipoise.diagnostics.relative import MeasureError
from equipoise.engine.displaced import Displaced
from equipoise.engine.targets import chosen_samples, labelled, samples
from equipoise.errors import TaskError, nearest
from equipoise.replay import RandomState, devices_of, frozen_buffers
from equipoise.trunk import SharedTrunk, outputs_of

Batches = Iterable[tuple[Any, Mapping[str, Any]]]
Function = Callable[[Any, Any], Any]


class Evaluation:
    """A model in evaluation mode and its batches; made by `evaluation`.

    Attributes:
        parameters: those that are not frozen.
        device: where the model lies, and where batches are brought.
    """

    def __init__(self, model: SharedTrunk, batches: Batches) -> None:
        self.model = model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self._displaced = Displaced(self.parameters)
        self.device = next(iter((*model.parameters(), *model.buffers())), torch.empty(0)).device
        self._batches = batches
        self._draws = RandomState(devices_of(model))

    def means(self, functions: Mapping[str, Function]) -> Tensor:
        """What each function gives for its task, as the mean over all samples with a label.

        Args:
            functions: task name -> callable(output, target) -> mean over the samples it is given.

        Returns:
            (T,) float64 on the CPU in the order of `functions`; NaN for a task without a label.
        """
        values: dict[str, list[Tensor]] = {task: [] for task in functions}
        counts: dict[str, list[int]] = {task: [] for task in functions}
        with torch.no_grad():
            for task, output, target, count in self.labelled(functions):
                values[task].append(_scalar(task, functions[task](output, target)))
                counts[task].append(count)
        return torch.stack([_mean(values[task], counts[task]) for task in functions])

    def gradient(
        self, task: str, loss: Function, parameters: Sequence[Tensor]
    ) -> list[Tensor] | None:
        """The gradient of one task's mean loss over all samples with a label; None: it has none.

        Raises:
            TaskError: the loss is not connected to the network.
        """
        mean: list[Tensor] | None = None
        samples = 0
        with torch.enable_grad():
            for _, output, target, count in self.labelled([task]):
                value = _scalar(task, loss(output, target))
                if not value.requires_grad:
                    raise TaskError(task, "loss is not connected to the network; was it detached?")
                found = torch.autograd.grad(
                    value, parameters, allow_unused=True, materialize_grads=True
                )
                samples += count
                # A running mean, which does not overflow in half precision as a sum would.
                if mean is None:
                    mean = list(found)
                else:
                    mean = [
                        torch.lerp(old, new, count / samples)
                        for old, new in zip(mean, found, strict=True)
                    ]
        return mean

    def labelled(self, tasks: Iterable[str]) -> Iterator[tuple[str, Any, Any, int]]:
        """Task, output, target and number of samples, wherever a task has a label in a batch."""
        tasks = tuple(tasks)
        for inputs, targets in self._given():
            output_of = None
            for task in tasks:
                if task not in targets:
                    continue
                target = targets[task]
                keep = labelled(task, target, None, missing="loss")
                count = samples(target) if keep is None else int(keep.sum())
                if not count:
                    continue
                if output_of is None:
                    output_of = outputs_of(self.model, inputs)
                output = output_of(task)
                if keep is not None:
                    output, target = chosen_samples(task, keep, output, target)
                yield task, output, target, count

    def outputs(self, tasks: Iterable[str]) -> Iterator[tuple[str, Any]]:
        """Task and output for all samples, batch after batch, whether they have labels or not."""
        tasks = tuple(tasks)
        for inputs, _ in self._given():
            output_of = outputs_of(self.model, inputs)
            for task in tasks:
                yield task, output_of(task)

    def move(self, offsets: Iterable[tuple[nn.Parameter, Tensor | None]]) -> None:
        """Set parameters to their values plus an offset; None: to their values."""
        self._displaced.move(offsets)

    def put_back(self) -> None:
        """Give every parameter its value back, bit for bit."""
        self._displaced.back()

    def _given(self) -> Iterator[tuple[Any, Mapping[str, Any]]]:
        """The batches on the model's device; each pass begins from the same random state."""
        self._draws.restore()
        empty = True
        for batch in self._batches:
            empty = False
            inputs, targets = self._checked(batch)
            yield self._here(inputs), {task: self._here(y) for task, y in targets.items()}
        if empty:
            raise MeasureError(
                "batches gave no batch; give a list or a DataLoader, which can be gone through "
                "several times."
            )

    def _checked(self, batch: Any) -> tuple[Any, Mapping[str, Any]]:
        if not (isinstance(batch, tuple | list) and len(batch) == 2):
            raise MeasureError(
                f"a batch is a {type(batch).__name__}; give pairs (inputs, targets by task name)."
            )
        inputs, targets = batch
        if not isinstance(targets, Mapping):
            raise MeasureError(
                f"the targets of a batch are a {type(targets).__name__}; give a dict by task name."
            )
        for task in targets:
            if task not in self.model.tasks:
                problem = "has a target but the model has no such task; "
                raise TaskError(str(task), problem + nearest(str(task), self.model.tasks))
        return inputs, targets

    def _here(self, given: Any) -> Any:
        return pytree.tree_map(lambda x: x.to(self.device) if hasattr(x, "to") else x, given)


@contextmanager
def evaluation(model: SharedTrunk, batches: Batches) -> Generator[Evaluation]:
    """The body looks at `model` in evaluation mode; afterwards nothing shows that it did.

    Training modes, parameters, buffers, and the global random states of torch, numpy and Python
    are as before, bit for bit, also when the body raises.

    Raises:
        MeasureError: `batches` is an iterator, which is used up after one pass.
    """
    if isinstance(batches, Iterator):
        raise MeasureError(
            f"batches is a {type(batches).__name__}, which is used up after one pass; give a list "
            "or a DataLoader."
        )
    modes = {module: module.training for module in model.modules()}
    draws = RandomState(devices_of(model))
    looking = Evaluation(model, batches)
    try:
        with frozen_buffers(model):
            model.eval()
            yield looking
    finally:
        looking.put_back()
        for module, mode in modes.items():
            module.training = mode
        draws.restore()


def chosen(model: SharedTrunk, tasks: Iterable[str] | None, what: str) -> tuple[str, ...]:
    """The tasks of `model` that are named, in the model's order; None: all of them.

    Raises:
        TaskError: a name that the model does not know.
        MeasureError: no name at all.
    """
    if tasks is None:
        return model.tasks
    named = {tasks} if isinstance(tasks, str) else set(tasks)
    for task in named:
        if task not in model.tasks:
            problem = f"is named in {what}, but the model has no such task; "
            raise TaskError(str(task), problem + nearest(str(task), model.tasks))
    if not named:
        raise MeasureError(f"{what} is empty; name at least one task.")
    return tuple(task for task in model.tasks if task in named)


def ascending(radii: Iterable[float]) -> Tensor:
    """(R,) float64 radii.

    Raises:
        MeasureError: none, a negative or infinite one, or not in ascending order.
    """
    found = torch.tensor([float(radius) for radius in radii], dtype=torch.float64)
    good = bool(((found >= 0) & found.isfinite()).all()) and bool((found.diff() > 0).all())
    if not len(found) or not good:
        raise MeasureError(
            f"radii are {found.tolist()}; give finite numbers from 0 up, in ascending order."
        )
    return found


def private(generator: torch.Generator | None) -> torch.Generator:
    """The given CPU generator, or one of our own that begins at the same place every time.

    Raises:
        MeasureError: it is not a CPU generator.
    """
    if generator is None:
        return torch.Generator().manual_seed(0)
    if generator.device.type != "cpu":
        raise MeasureError(f"generator is on {generator.device}; draws are made on the CPU.")
    return generator


def at_least(number: int, least: int, what: str) -> None:
    """Refuse what is no whole number of at least `least`."""
    if not isinstance(number, int) or number < least:
        raise MeasureError(f"{what} is {number!r}; give a whole number of at least {least}.")


def _scalar(task: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        value = torch.tensor(float(value), dtype=torch.float64)
    if value.dim():
        raise TaskError(
            task,
            f"its callable gave shape {tuple(value.shape)}; return a scalar, the mean over the "
            "samples.",
        )
    return value


def _mean(values: list[Tensor], counts: list[int]) -> Tensor:
    if not values:
        return torch.tensor(torch.nan, dtype=torch.float64)
    weights = torch.tensor(counts, dtype=torch.float64)
    return torch.stack(values).to("cpu").double() @ weights / weights.sum()
