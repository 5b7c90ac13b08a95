"""Which tasks take part in a step; what a batch must look like: missing labels, masks, losses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
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
        parts: T' numbers, the part of each one's labelled samples that this process holds.
        is_whole: whether this process holds all of them.
    """

    def __init__(self, tasks: Sequence[str], counts: Sequence[float], ranks: Ranks) -> None:
        self.tasks = tuple(tasks)
        self.counts = torch.tensor(counts, dtype=torch.float64, device="cpu")
        self._within(ranks.sum(self.counts.clone()))

    def _within(self, totals: Tensor) -> None:
        """Be a part of a batch with so many labelled samples (T,) in all."""
        self.totals, self.present = totals, totals > 0
        # In plain numbers, which cost less than tensors of a few.
        all_of = list(zip(self.tasks, self.counts.tolist(), totals.tolist(), strict=True))
        self.names = [task for task, _, total in all_of if total]
        self.parts: list[float] = [count / total for _, count, total in all_of if total]
        self.is_whole = all(part == 1.0 for part in self.parts)
        self._here = {task for task, count, _ in all_of if count}

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

    A task may be absent from `targets` altogether. Within a task, samples whose target is wholly
    NaN and samples that `masks` rules out do not count. A target may be a tensor, or nested dicts,
    lists and tuples of tensors; these are masked, but not searched for NaN.

    Args:
        tasks: all task names, in order.
        targets: task name -> target, samples first.
        masks: task name -> bool tensor (B,), True for samples that count; tasks may be left out.
        ranks: the processes that train together.
        left_out: positions of tasks whose labels do not count.
        missing: "sample": a target that is NaN in part is refused; "loss": the loss sees it.

    Raises:
        EquipoiseError: `targets` is empty, or the batch is.
        TaskError: an unknown name in `targets` or `masks`, a mask of the wrong kind or shape, or a
            target that is NaN in part.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        targets: Mapping[str, Any],
        masks: Mapping[str, Tensor] | None,
        ranks: Ranks,
        left_out: Iterable[int] = (),
        missing: str = "sample",
    ) -> None:
        self._left_out = {tasks[i] for i in left_out}
        self._missing = missing
        with ranks.agreeing():
            self._take(tuple(tasks), targets, {} if masks is None else masks)
            if ranks.alone and not any(samples(target) for target in targets.values()):
                raise EquipoiseError(
                    "the batch is empty: no target has a sample. Leave it out, for example by "
                    "drop_last=True in the DataLoader."
                )
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
        self._keep = {
            task: labelled(task, targets[task], masks.get(task), self._missing) for task in targets
        }

    def count(self, task: str) -> float:
        """How many labelled samples of a task this process holds."""
        if task not in self._targets or task in self._left_out:
            return 0.0
        keep = self._keep[task]
        return float(samples(self._targets[task]) if keep is None else keep.sum())

    def pair(self, task: str, output: Any) -> tuple[Any, Any]:
        """The output and the target of a task, for the samples that count.

        Raises:
            TaskError: the output holds a tensor that has not the samples first.
        """
        keep, target = self._keep[task], self._targets[task]
        return (output, target) if keep is None else chosen_samples(task, keep, output, target)

    def cause(self, task: str, function: Any) -> str | None:
        """Why the loss of a task may be NaN, if its labels say so."""
        if not self.here(task) or not isinstance(self._targets[task], Tensor):
            return None
        keep, target = self._keep[task], self._targets[task]
        labels = (target if keep is None else target[keep]).reshape(-1)
        advice = "leave the task out of targets for this batch."
        if labels.is_floating_point():
            holes = bool(labels.isnan().any())
            known = "its target holds NaN, which the loss function does not leave out. Mask these"
            return f"{known} samples, or leave NaN out in the function." if holes else None
        ignored = _ignored(function)
        for value in (-100, 255) if ignored is None else (ignored,):
            if len(labels) and bool((labels == value).all()):
                if ignored is None:
                    return f"its labels are all {value}; if the loss ignores these: {advice}"
                return f"its labels are all {value}, which the loss ignores; {advice}"
        return None


def _ignored(function: Any) -> int | None:
    """The label that a loss ignores."""
    if isinstance(function, partial):
        known = function.keywords.get("ignore_index")
        return _ignored(function.func) if known is None else known
    if function in (F.cross_entropy, F.nll_loss):
        return -100
    known = getattr(function, "ignore_index", None)
    return known if isinstance(known, int) else None


def samples(target: Any) -> int:
    """B, the first dimension of all tensors of a target; 1 where they have none in common."""
    if isinstance(target, Tensor):
        return len(target) if target.dim() else 1
    found = {x.shape[:1] for x in pytree.tree_leaves(target) if isinstance(x, Tensor)}
    return found.pop()[0] if len(found) == 1 and torch.Size([]) not in found else 1


def chosen_samples(task: str, keep: Tensor, output: Any, target: Any) -> tuple[Any, Any]:
    """The output and the target, for the samples that count.

    Numbers (tensors without a dimension) and parameters remain as they are.

    Args:
        task: the task's name.
        keep: (B,) bool.
        output: what the head returned.
        target: with samples first in each of its tensors.

    Raises:
        TaskError: the output holds a tensor that has not the samples first.
    """

    def choose(x: Any) -> Any:
        if not isinstance(x, Tensor) or isinstance(x, nn.Parameter) or x.dim() == 0:
            return x
        if len(x) != len(keep):
            raise TaskError(
                task,
                f"output holds a tensor of shape {tuple(x.shape)}, from which the samples without "
                f"a label cannot be left out: it does not have the {len(keep)} samples first. "
                "Return it with the samples first, or let the loss function hold it.",
            )
        return x[keep]

    return pytree.tree_map(choose, output), pytree.tree_map(
        lambda x: x[keep] if isinstance(x, Tensor) else x, target
    )


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


def labelled(task: str, target: Any, mask: Tensor | None, missing: str = "sample") -> Tensor | None:
    """(B,) bool, True where a sample counts; None if all do.

    Args:
        task: the task's name.
        target: samples first. A tensor of floats is searched for samples that are wholly NaN.
        mask: (B,) bool, True for samples that count; None: all do.
        missing: "sample": a sample that counts and is NaN in part is refused; "loss": it counts.

    Raises:
        TaskError: a mask of the wrong kind or shape, or a target that is NaN in part.
    """
    keep = None if mask is None else _checked_mask(task, target, mask)
    known = None
    if isinstance(target, Tensor) and target.dim() and target.is_floating_point():
        known = _known(task, target, keep, missing)
    if known is not None:
        keep = known if keep is None else keep & known
    return None if keep is None or bool(keep.all()) else keep


def _checked_mask(task: str, target: Any, mask: Any) -> Tensor:
    shapes = {x.shape[:1] for x in pytree.tree_leaves(target) if isinstance(x, Tensor)}
    if len(shapes) != 1 or torch.Size([]) in shapes:
        raise TaskError(
            task,
            "has a mask, but its target is not a tensor, or a dict or tuple of tensors, with the "
            "same number of samples first.",
        )
    n = shapes.pop()[0]
    if getattr(mask, "dtype", None) != torch.bool or mask.shape != (n,):
        kind = getattr(mask, "dtype", type(mask).__name__)
        raise TaskError(
            task,
            f"mask is {kind} of shape {tuple(getattr(mask, 'shape', ()))}; give a bool tensor "
            f"of shape ({n},).",
        )
    return mask


def _known(task: str, target: Tensor, keep: Tensor | None, missing: str) -> Tensor | None:
    """(B,) bool, False where a target is wholly NaN; None if there is no NaN at all."""
    nan = torch.isnan(target)
    if not bool(nan.any()):
        return None
    if nan.dim() == 1:
        return ~nan
    nan = nan.flatten(1)
    known = ~nan.all(1)
    if missing == "sample":
        part = nan.any(1) & known
        part = part if keep is None else part & keep
        count = int(part.sum())
        if count:
            raise TaskError(
                task,
                f"target is NaN in part for {count} of {len(target)} samples. Say missing='loss' "
                "if the loss function leaves NaN out by itself, or mask these samples.",
            )
    return known
