"""What is measured on a network between epochs; nothing here trains, draws or selects."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from equipoise.diagnostics import conflict_share, delta_m
from equipoise.engine.rows import gram_of
from equipoise.lab.data.base import Baseline, Batch
from equipoise.lab.tasks import Task
from equipoise.trunk import SharedTrunk

Values = dict[str, dict[str, float]]
"""Task name -> name of the measure -> its value."""
Autocast = Callable[[], AbstractContextManager]


@torch.no_grad()
def evaluate(
    model: SharedTrunk, tasks: Sequence[Task], batches: Iterable[Batch], autocast: Autocast
) -> tuple[dict[str, float], Values]:
    """Mean loss and the measures over all labelled samples of `batches`.

    Returns:
        Task name -> mean loss (over batches by their size, where a loss is a mean over pixels),
        and task name -> measure -> value in its unit; NaN for a task without a single label.
    """
    device = next(model.parameters()).device
    metrics = {task.name: task.metric().to(device) for task in tasks}
    total = dict.fromkeys(metrics, 0.0)
    count = dict.fromkeys(metrics, 0)
    model.eval()
    for inputs, targets in batches:
        with autocast():
            outputs = model(inputs)
        for task in tasks:
            output, target = labelled(outputs[task.name].float(), targets[task.name])
            if len(target):
                total[task.name] += float(task.loss(output, target)) * len(target)
                count[task.name] += len(target)
                task.update(metrics[task.name], output, target)
    losses = {name: total[name] / n if n else float("nan") for name, n in count.items()}
    values = {
        task.name: {name: float(value) for name, value in metrics[task.name].compute().items()}
        if count[task.name]
        else {measure.name: float("nan") for measure in task.measures}
        for task in tasks
    }
    return losses, values


def improvement(tasks: Sequence[Task], values: Values, baseline: Baseline) -> float:
    """Delta_m of `values` against a baseline, in percent, positive is better.

    Over the measures of `tasks` that are known in both; NaN if there are none.
    """
    here, there, higher = [], [], []
    for task in tasks:
        published = baseline.values.get(task.name, {})
        for measure in task.measures:
            value = values[task.name][measure.name]
            if measure.name in published and math.isfinite(value):
                here.append(value)
                there.append(published[measure.name])
                higher.append(measure.higher_is_better)
    return delta_m(here, there, higher) if here else math.nan


def conflict(
    model: SharedTrunk, tasks: Sequence[Task], batches: Iterable[Batch], autocast: Autocast
) -> float:
    """Percent of task pairs whose gradients conflict, mean over `batches`.

    The same measure for every recipe, also for those that form no task gradients: plain losses,
    shared parameters, evaluation mode (so that nothing is drawn and no buffer moves). A task
    without a label in a batch conflicts with none there.
    """
    shared = [p for p in model.shared_parameters() if p.requires_grad]
    grams = []
    model.eval()
    for inputs, targets in batches:
        with autocast():
            outputs = model(inputs)
            pairs = [labelled(outputs[task.name], targets[task.name]) for task in tasks]
            losses = [
                task.loss(output, target) if len(target) else output.sum()
                for task, (output, target) in zip(tasks, pairs, strict=True)
            ]
        grams.append(gram_of(losses, shared))
    return mean_conflict(grams)


def mean_conflict(grams: Sequence[Tensor]) -> float:
    """Percent of conflicting task pairs, mean over inner products (T, T)."""
    return float(torch.as_tensor(conflict_share(torch.stack(list(grams)))).mean())


def labelled(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Output and target of the samples whose target is not missing (NaN)."""
    missing = target.isnan().reshape(len(target), -1).any(1)
    return output[~missing], target[~missing]
