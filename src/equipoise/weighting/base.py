"""The contract of a weighting, and what several weightings need."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn


class _ResizingModule(nn.Module):
    """A module whose buffers take their size from the first call, or from what is loaded.

    The number of tasks is known only when the first losses arrive; a fresh instance must
    nevertheless be able to load the state of a used one.
    """

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name, buffer in self.named_buffers(recurse=False):
            saved = state_dict.get(prefix + name)
            if saved is not None and saved.shape != buffer.shape:
                setattr(self, name, buffer.new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class Weighting(_ResizingModule, ABC):
    """How much each task's loss counts: losses (T,) to weighted losses (T,).

    Element i of the result depends on loss i through the graph, and on the other losses only as
    numbers. It is called once a training step. State lives in buffers, what is learned in
    parameters; a Step has an optimizer of its own for them, with learning rate `lr`. In a Step
    it works on the CPU in float64: on T numbers that is faster than any device.

    Attributes:
        weights: the T weights of the last call, detached; 0 for an absent task.
        lr: learning rate of the weighting's own parameters; None: that of the optimizer.
        n_tasks: the number of tasks that it was built for; None: any.
        needs_gram: whether `observe` wants the inner products of the task gradients; a step then
            forms them, whatever its aggregator.
        needs_losses_after: whether `observe` wants the losses after the update, which cost one
            more forward pass.
        needs_lr: whether it wants to know the learning rate, by `begin`.
    """

    weights: Tensor
    lr: float | None = None
    n_tasks: int | None = None
    needs_gram: bool = False
    needs_losses_after: bool = False
    needs_lr: bool = False

    def begin(self, lr: float) -> None:
        """Hear the learning rate of the coming step, before the call.

        A Step calls it, with that of the optimizer's first group, if the need is declared; so does
        a loop of one's own.
        """

    @property
    def left_out(self) -> frozenset[int]:
        """Positions of the tasks that take no part in the training, as if they had no labels."""
        return frozenset()

    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        """The weighted losses.

        Args:
            losses: (T,) the losses of this batch.
            present: (T,) bool; False marks tasks without labels in this batch, whose loss is
                ignored whatever it holds. None: all tasks are present.

        Returns:
            (T,) weighted losses; 0 for absent tasks.

        Raises:
            ValueError: `losses` is not a vector.
        """
        if losses.dim() != 1:
            raise ValueError(f"losses must have shape (T,), not {tuple(losses.shape)}.")
        if present is None:
            present = torch.ones_like(losses, dtype=torch.bool)
        # An absent loss is NaN by habit; any number will do in its place.
        weighted = self.weighted(torch.where(present, losses, 1.0), present)
        self.weights = torch.where(present, self.weights, 0.0)
        return torch.where(present, weighted, 0.0)

    def weighted(self, losses: Tensor, present: Tensor) -> Tensor:
        """Weights times `objective`; sets `weights`. Override for another form."""
        self.weights = self.weigh(losses.detach(), present).to(losses.dtype)
        return self.weights * self.objective(losses)

    @abstractmethod
    def weigh(self, losses: Tensor, present: Tensor) -> Tensor:
        """The T weights from the detached losses; the place where state advances."""

    def objective(self, losses: Tensor) -> Tensor:
        """What is weighted: the losses themselves, unless a method says otherwise."""
        return losses

    def observe(
        self,
        losses: Tensor,
        present: Tensor,
        gram: Tensor | None = None,
        after: Tensor | None = None,
    ) -> None:
        """Learn from the step that was made with the weights of the last call.

        A Step calls it once the parameters are updated, if a need is declared; so does a loop of
        one's own.

        Args:
            losses: (T,) the losses of the last call; anything for an absent task.
            present: (T,) bool, as in the last call.
            gram: (T, T) inner products of the gradients of the weighted losses; anything for an
                absent task. For those who declare `needs_gram`.
            after: (T,) the losses of the same batch with the updated parameters; NaN where there
                is nothing to learn from. For those who declare `needs_losses_after`.

        Raises:
            ValueError: something that is needed is missing.
        """
        if (self.needs_gram and gram is None) or (self.needs_losses_after and after is None):
            what = "gram" if self.needs_gram and gram is None else "after"
            raise ValueError(f"{type(self).__name__} cannot learn without {what!r}.")
        device = self.weights.device
        self.learn(*(x if x is None else x.to(device) for x in (losses, present, gram, after)))

    def learn(self, losses: Any, present: Any, gram: Any, after: Any) -> None:
        """`observe`, on the device of the last call. Override with a declared need."""


class EpochMean(_ResizingModule):
    """Mean of each task's loss over the batches in which it was present."""

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(0, dtype=torch.float64, device="cpu"))
        self.register_buffer("count", torch.zeros(0, dtype=torch.int64, device="cpu"))

    def add(self, losses: Tensor, present: Tensor) -> None:
        """Count one batch."""
        if self.total.numel() == 0:
            self.reset(losses)
        self.total += torch.where(present, losses, 0.0)
        self.count += present

    def reset(self, losses: Tensor) -> None:
        """Forget everything; `losses` gives the number of tasks and the device."""
        self.total = torch.zeros_like(losses, dtype=torch.float64)
        self.count = torch.zeros_like(losses, dtype=torch.int64)

    def value(self) -> Tensor:
        """(T,) float64 means; NaN for a task that was never present."""
        return self.total / self.count


def softmax_over(scores: Tensor, present: Tensor) -> Tensor:
    """Softmax over the present tasks, scaled so that its sum is their number."""
    return torch.softmax(scores.masked_fill(~present, -torch.inf), 0) * present.sum()


def for_each_task(value: Tensor, losses: Tensor, name: str) -> Tensor:
    """One number for all tasks, or (T,), as (T,) in the precision of the losses; or ValueError."""
    if value.dim() and value.shape != losses.shape:
        raise ValueError(f"{name} has {value.numel()} entries, but there are {len(losses)} losses.")
    return value.to(losses.dtype).expand_as(losses)


def check_steps_per_epoch(steps_per_epoch: int | None) -> int:
    """A positive whole number of batches, or ValueError."""
    if steps_per_epoch is None or int(steps_per_epoch) != steps_per_epoch or steps_per_epoch < 1:
        raise ValueError(
            f"steps_per_epoch is {steps_per_epoch!r}; give the number of batches of one epoch, "
            "for example len(loader)."
        )
    return int(steps_per_epoch)
