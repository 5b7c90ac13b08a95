"""Which tasks take part in a step; what a batch must look like: missing labels, masks, losses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from equipoise.engine.ranks import Ranks
from equipoise.errors import EquipoiseError, TaskError, nearest

AnyPresence = TypeVar("AnyPresence", bound="Presence")


class Presence:
    """Which of the T tasks take part in a step, and which part of each this process holds.

    Args:
        tasks: all task names, in order.
        counts: (T) how many labelled samples of each task this process holds.
        ranks: the processes that train together.

    Attributes:
        tasks: all T tasks.
        names: the T' tasks that have a label in some process, in order.
        present: (T,) bool, True for these.
        totals: (T,) float64, the labelled samples of each task in all processes.
        shares: (T',) float64, the part of each one's labelled samples that this process holds.
        parts: the same as plain numbers.
        is_whole: whether this process holds all of them.
    """

    def __init__(self, tasks: Sequence[str], counts: Sequence[float], ranks: Ranks) -> None:
        self.tasks = tuple(tasks)
        self.counts = torch.tensor(counts, dtype=torch.float64, device="cpu")
        self._within(ranks.sum(self.counts.clone()))

    def _within(self, totals: Tensor) -> None:
        """Be a part of a batch with so many labelled samples (T,) in all."""
        self.totals, self.present = totals, totals > 0
        self.names = [
            task for task, total in zip(self.tasks, totals.tolist(), strict=True) if total
        ]
        self.shares = (self.counts / totals)[self.present]
        self.parts: list[float] = self.shares.tolist()
        self.is_whole = all(part == 1.0 for part in self.parts)
        of_all = zip(self.tasks, self.counts.tolist(), strict=True)
        self._here = {task for task, count in of_all if count}

    def part_of(self: AnyPresence, joint: Presence) -> AnyPresence:
        """The same labels as a part of a larger batch: positions and shares are those of it."""
        found = copy(self)
        found._within(joint.totals)
        return found

    @classmethod
    def joint(cls, parts: Sequence[Presence]) -> Presence:
        """That of several batches together."""
        found = cls.__new__(Presence)
        found.tasks = parts[0].tasks
        found.counts = torch.stack([part.counts for part in parts]).sum(0)
        found._within(torch.stack([part.totals for part in parts]).sum(0))
        return found

    def here(self, task: str) -> bool:
        """Whether this process has a label of the task."""
        return task in self._here

    def spread(self, values: Tensor, absent: float = 0.0) -> Tensor:
        """Values (T',) of the present tasks as (T,) float64 on the CPU."""
        full = torch.full(self.present.shape, absent, dtype=torch.float64, device="cpu")
        full[self.present] = values.detach().to("cpu", torch.float64)
        return full


class Targets(Presence):
    """The targets of one batch, without the samples that have none.

    A task may be absent from `targets` altogether. Within a task, samples whose target holds a
    NaN and samples that `masks` rules out do not count.

    Args:
        tasks: all task names, in order.
        targets: task name -> target, samples first.
        masks: task name -> bool tensor (B,), True for samples that count; tasks may be left out.
        ranks: the processes that train together.
        left_out: positions of tasks whose labels do not count.

    Raises:
        EquipoiseError: `targets` is empty.
        TaskError: an unknown name in `targets` or `masks`, or a mask of the wrong kind or shape.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        targets: Mapping[str, Any],
        masks: Mapping[str, Tensor] | None,
        ranks: Ranks,
        left_out: Iterable[int] = (),
    ) -> None:
        self._left_out = {tasks[i] for i in left_out}
        with ranks.agreeing():
            self._take(tuple(tasks), targets, {} if masks is None else masks)
        super().__init__(tasks, [self.count(task) for task in tasks], ranks)

    def _take(
        self, tasks: tuple[str, ...], targets: Mapping[str, Any], masks: Mapping[str, Tensor]
    ) -> None:
        for given, what in ((targets, "target"), (masks, "mask")):
            if not isinstance(given, Mapping):
                raise EquipoiseError(
                    f"{what}s must be a dict by task name, not {type(given).__name__}."
                )
        refuse_unknown({"target": targets, "mask": masks}, tasks)
        if not targets:
            raise EquipoiseError("targets is empty; give at least one task's target.")
        self._targets = targets
        self._keep = {task: labelled(task, targets[task], masks.get(task)) for task in targets}

    def count(self, task: str) -> float:
        """How many labelled samples of a task this process holds."""
        if task not in self._targets or task in self._left_out:
            return 0.0
        keep = self._keep[task]
        if keep is not None:
            return float(keep.sum())
        target = self._targets[task]
        return float(len(target)) if isinstance(target, Tensor) and target.dim() else 1.0

    def pair(self, task: str, output: Any) -> tuple[Any, Any]:
        """The output and the target of a task, for the samples that count."""
        keep = self._keep[task]
        if keep is None:
            return output, self._targets[task]
        chosen = pytree.tree_map(lambda x: x[keep] if isinstance(x, Tensor) else x, output)
        return chosen, self._targets[task][keep]


def refuse_unknown(given: Mapping[str, Any], tasks: Iterable[str]) -> None:
    """Of what is given by task name ("mask" -> masks), each name must be that of a task."""
    tasks = tuple(tasks)
    for what, by_name in given.items():
        for name in by_name if isinstance(by_name, Mapping) else ():
            if name not in tasks:
                raise TaskError(
                    str(name),
                    f"has a {what} but the model has no such task; " + nearest(str(name), tasks),
                )


def labelled(task: str, target: Any, mask: Tensor | None) -> Tensor | None:
    """(B,) bool, True where a sample counts; None if all do."""
    if not isinstance(target, Tensor) or target.dim() == 0:
        if mask is not None:
            raise TaskError(task, "has a mask, but its target is no tensor with samples first.")
        return None
    keep = None
    if mask is not None:
        if getattr(mask, "dtype", None) != torch.bool or mask.shape != target.shape[:1]:
            kind = getattr(mask, "dtype", type(mask).__name__)
            raise TaskError(
                task,
                f"mask is {kind} of shape {tuple(getattr(mask, 'shape', ()))}; give a bool tensor "
                f"of shape ({len(target)},).",
            )
        keep = mask
    if target.is_floating_point():
        missing = torch.isnan(target)
        known = ~(missing.flatten(1).any(1) if missing.dim() > 1 else missing)
        keep = known if keep is None else keep & known
    return None if keep is None or bool(keep.all()) else keep


def check_loss(task: int | str, loss: Any) -> None:
    """A loss must be a scalar tensor, or TaskError."""
    if not isinstance(loss, Tensor):
        raise TaskError(task, f"loss is a {type(loss).__name__}; return a scalar tensor.")
    if loss.dim() != 0:
        raise TaskError(
            task, f"loss has shape {tuple(loss.shape)}; return a scalar, for example its mean."
        )
