"""How sure a model is of the truth: the number between 0 and 1 that data maps are made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from equipoise.engine.targets import labelled, refuse_unknown
from equipoise.errors import NonFiniteError, TaskError

Kind = Literal["binary", "classification", "regression"]
KINDS = ("binary", "classification", "regression")
NAN = "the output is NaN where there is a label; has the training diverged?"


def true_class_probability(
    outputs: Any,
    targets: Any,
    *,
    kinds: Mapping[str, Kind] | Kind | None = None,
    scales: Mapping[str, float] | float | None = None,
    masks: Mapping[str, Tensor] | None = None,
    tasks: Sequence[str] | None = None,
) -> Tensor:
    """The probability that outputs give to the true class (STG-MTL, arXiv 2307.03374, section 3.2).

    | kind           | output       | target                 | score                            |
    |----------------|--------------|------------------------|----------------------------------|
    | binary         | (B,), (B, 1) | (B,), (B, 1), 0 or 1   | 1 - abs(y - sigmoid(o))          |
    | classification | (B, C, ...)  | (B, ...) whole numbers | softmax(o) at the label          |
    | regression     | (B, ...)     | (B, ...)               | erfc(abs(y - o) / scale / sqrt2) |

    Regression, which the paper leaves to future work: the probability that a normal error of
    standard deviation `scale` is larger than the residual. It is 1 for an exact estimate, falls to
    0 with the distance, and where targets are normal with that deviation, it is 1/2 on average for
    the estimate that always says their mean: the chance level of a balanced binary task.

    A sample with several positions (pixels, components) has the mean over those with a label. A
    missing label has NaN: a NaN target, a negative class, a sample that its mask rules out.

    Args:
        outputs: task name -> what the head gives (a task may be absent); or one tensor for tensor
            `targets`, for example logits (B, T) of binary tasks in one head.
        targets: task name -> target; or one tensor.
        kinds: task name -> kind, or one for all. A task without: classification where the targets
            are whole numbers and the outputs have one dimension more, else binary.
        scales: regression: standard deviation of the targets over the training set, by task name
            or one for all; 1, for standardised targets, where nothing is said.
        masks: task name -> bool (B,), False for samples that do not count.
        tasks: names in the order of the columns; None: that of `outputs`.

    Returns:
        (B, T) float32 of the tasks, NaN for what has no label or no output; for tensors the scores
        in the shape of the samples: (B, T) for binary logits (B, T), else (B,).

    Raises:
        TaskError: a binary target that is neither 0 nor 1, a class that is no whole number, an
            output that is NaN where there is a label, shapes that do not go together, an unknown
            kind, a kind, scale or mask of a task that is not there.

    Cost: a few operations for all binary tasks together, a few for each other task; no gradients.
    """
    with torch.no_grad():
        if isinstance(outputs, Tensor):
            if isinstance(kinds, Mapping) or isinstance(scales, Mapping):
                raise TaskError("all", "one tensor has one kind and one scale, not some by name.")
            kind = _kind("all", outputs, targets, kinds)
            if kind == "binary" and outputs.shape == targets.shape:
                return _binary(outputs, targets, ["all"])
            return _score("all", kind, outputs, targets, scales)
        names = tuple(outputs) if tasks is None else tuple(tasks)
        refuse_unknown({"kind": kinds, "scale": scales, "mask": masks}, names)
        columns: dict[str, Tensor] = {}
        together: list[str] = []
        for task in names:
            if task not in targets or outputs.get(task) is None:
                continue
            kind = kinds if isinstance(kinds, str) else (kinds or {}).get(task)
            kind = _kind(task, outputs[task], targets[task], kind)
            scale = scales.get(task) if isinstance(scales, Mapping) else scales
            if kind == "binary" and outputs[task].numel() == len(outputs[task]):
                together.append(task)
            else:
                columns[task] = _score(task, kind, outputs[task], targets[task], scale)
        if together:
            columns |= _together(together, outputs, targets)
        for task, mask in (masks or {}).items():
            if task in columns:
                keep = labelled(task, targets[task], mask, missing="loss")
                if keep is not None:
                    columns[task] = columns[task].masked_fill(~keep, math.nan)
        return _beside_each_other(columns, names)


def _kind(task: str, output: Tensor, target: Tensor, kind: str | None) -> str:
    if kind is None:
        whole = not target.is_floating_point() and target.dtype != torch.bool
        return "classification" if whole and output.dim() == target.dim() + 1 and (
            output.dim() > 1 and output.shape[1] > 1
        ) else "binary"  # fmt: skip
    refuse_kind(task, kind)
    return kind


def refuse_kind(task: str, kind: Any) -> None:
    """A kind must be one of KINDS, or TaskError."""
    if kind not in KINDS:
        raise TaskError(task, f"kind is {kind!r}; give one of {', '.join(map(repr, KINDS))}.")


def _together(tasks: list[str], outputs: Any, targets: Any) -> dict[str, Tensor]:
    """All binary tasks with one logit for each sample, in as few operations as one task."""
    for task in tasks:
        if targets[task].numel() != len(outputs[task]):
            raise _misfit(task, outputs[task], targets[task])
    logits = torch.cat([outputs[task].reshape(-1, 1) for task in tasks], 1)
    labels = torch.cat([targets[task].reshape(-1, 1) for task in tasks], 1)
    return dict(zip(tasks, _binary(logits, labels.to(logits.device), tasks).unbind(1), strict=True))


def _binary(logits: Tensor, labels: Tensor, tasks: list[str]) -> Tensor:
    # sigmoid((2y - 1) o): opposite labels and logits then have the same score to the last bit.
    sign = 2 * labels.to(torch.float32) - 1
    wrong = ((sign.abs() != 1) | logits.isnan()) & ~sign.isnan()
    if bool(wrong.any()):
        column = int(wrong.nonzero()[0][-1]) if len(tasks) > 1 else 0
        value = float((sign[wrong][0] + 1) / 2)
        if value in (0, 1):
            raise NonFiniteError(tasks[column], NAN)
        raise TaskError(
            tasks[column],
            f"target {value:g} is neither 0 nor 1, as a binary task has it; say "
            "kinds={task: 'regression'} or 'classification' if it is no binary task.",
        )
    return torch.sigmoid(sign * logits.to(torch.float32))


def _score(task: str, kind: str, output: Tensor, target: Tensor, scale: float | None) -> Tensor:
    """(B,) score of one task, the mean over the positions that have a label."""
    target = target.to(output.device)
    if kind == "classification":
        fits = output.dim() > 1 and output.shape[:1] + output.shape[2:] == target.shape
        if not fits:
            raise _misfit(task, output, target)
        if target.is_floating_point():  # for the sake of NaN, where there is no label
            whole = target.nan_to_num(nan=-1.0)
            if bool((whole != whole.round()).any()):
                raise _misfit(task, output, target)
            target = whole.long()
        known = target >= 0
        if bool((target >= output.shape[1]).any()):
            raise TaskError(
                task, f"target {int(target.max())} is no class: the head has {output.shape[1]}."
            )
        log = torch.log_softmax(output.to(torch.float32), 1)
        score = log.gather(1, target.long().clamp_min(0).unsqueeze(1)).squeeze(1).exp()
    else:
        if output.numel() != target.numel() or len(output) != len(target):
            raise _misfit(task, output, target)
        output, target = _flat(output), _flat(target)
        known = ~target.isnan() if target.is_floating_point() else torch.ones_like(target).bool()
        if kind == "binary":
            score = _binary(output, target, [task])
        else:
            scale = 1.0 if scale is None else scale
            if not scale > 0:
                raise TaskError(task, f"scale is {scale}; give a standard deviation above 0.")
            residual = (target - output).to(torch.float32).abs() / (scale * math.sqrt(2))
            score = torch.erfc(residual)
    if bool((score.isnan() & known).any()):
        raise NonFiniteError(task, NAN)
    score, known = _flat(score), _flat(known)
    return torch.where(known, score, 0.0).sum(1) / known.sum(1)  # 0 / 0: no label at all


def _flat(x: Tensor) -> Tensor:
    """(B, positions), also of an empty batch."""
    return x.reshape(len(x), math.prod(x.shape[1:]))


def _misfit(task: str, output: Tensor, target: Tensor) -> TaskError:
    return TaskError(
        task,
        f"output {tuple(output.shape)} and {target.dtype} target {tuple(target.shape)} do not go "
        "together; see true_class_probability for the shapes, or name the kind.",
    )


def _beside_each_other(columns: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    if not columns:
        raise TaskError(names[0] if names else "?", "no task has both an output and a target.")
    absent = torch.full_like(next(iter(columns.values())), math.nan)
    for task, column in columns.items():
        if len(column) != len(absent):
            raise TaskError(task, f"has {len(column)} samples where others have {len(absent)}.")
    return torch.stack([columns.get(task, absent).to(absent.device) for task in names], 1)
