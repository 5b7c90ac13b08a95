"""How much the positive samples of a binary task count."""

from __future__ import annotations

from torch import Tensor


def balance(task: str, target: Tensor) -> float:
    """Negative samples over positive samples, with which both count alike in the loss.

    Args:
        task: its name, for messages.
        target: (N,) 0 or 1, of the training split.

    Raises:
        ValueError: all samples are of one class.
    """
    positive = int(target.sum())
    if not 0 < positive < len(target):
        raise ValueError(
            f"task {task!r}: {positive} of the {len(target)} training samples are positive, so "
            "there is no exact weight; give more samples, or another pos_weight."
        )
    return (len(target) - positive) / positive
