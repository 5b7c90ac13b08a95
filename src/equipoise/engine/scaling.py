"""What happens to a step whose losses or gradients are not finite; the scale of float16 losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from equipoise.engine.gradients import Gradients, added, divided
from equipoise.engine.stages import Stages
from equipoise.errors import CombinationError, NonFiniteError


class Scaler(Protocol):
    """What a step asks of a gradient scaler: that of torch.amp, or one of its kind."""

    def scale(self, outputs: Tensor, /) -> Tensor:
        """Multiply losses."""

    def is_enabled(self) -> bool:
        """Whether it scales at all."""

    def unscale_(self, optimizer: torch.optim.Optimizer, /) -> Any:
        """Divide the gradients that the optimizer holds."""

    def step(self, optimizer: torch.optim.Optimizer, /) -> Any:
        """Let the optimizer step, unless a gradient is not finite."""

    def update(self, new_scale: float | None = None, /) -> Any:
        """Raise the scale after many good steps, lower it after a bad one; or set it."""

    def state_dict(self) -> Any:
        """The scale and its history."""

    def load_state_dict(self, state: Any, /) -> Any:
        """Take it over."""


class Scaling:
    """The scale of the losses, and which steps are skipped.

    Args:
        scaler: a GradScaler; None, or one that is switched off: losses are not scaled.
        on_nonfinite: "raise" or "skip".

    Attributes:
        skipped: how many steps were skipped.
        now: the scale, read when a step begins.

    Raises:
        ValueError: `on_nonfinite` is something else.
        CombinationError: the scaler has no `scale`, `unscale_`, `step` and `update`.
    """

    def __init__(self, scaler: Scaler | None, on_nonfinite: str) -> None:
        if on_nonfinite not in ("raise", "skip"):
            raise ValueError(f"on_nonfinite is {on_nonfinite!r}; known are 'raise' and 'skip'.")
        needed = ("scale", "is_enabled", "unscale_", "step", "update")
        if scaler is not None and not all(callable(getattr(scaler, n, None)) for n in needed):
            raise CombinationError(
                f"scaler is a {type(scaler).__name__}; give a torch.amp.GradScaler, or None."
            )
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.on_nonfinite = on_nonfinite
        self.skipped = 0
        self.now = 1.0

    def begin(self, parameters: Callable[[], Iterable[Tensor]]) -> float:
        """Read what losses on the device of these are multiplied by in the coming step."""
        if self.scaler is not None:  # asked by `scale`, which lets a new scaler make its tensors
            device = next(iter(parameters())).device
            self.now = float(self.scaler.scale(torch.ones((), device=device)))
        return self.now

    @property
    def skips(self) -> bool:
        """Whether a step that is not finite is skipped, so that nobody asks which task it was.

        A scale that has fallen below 1 has nothing to do with it any more.
        """
        return self.on_nonfinite == "skip" or (self.scaler is not None and self.now >= 1)

    def scaled(self, gradients: Gradients) -> Gradients:
        """The gradients, new ones, times the scale."""
        return divided(gradients, 1 / self.now)

    def refuse_overflow(self, norm: float, parameters: Sequence[Tensor]) -> None:
        """Raise NonFiniteError if gradients of this norm overflow when they are scaled."""
        if self.scaler is None:
            return
        largest = min((torch.finfo(p.dtype).max for p in parameters), default=math.inf)
        if norm * self.now > largest:
            said = f"the gradients overflow at the scale {self.now:g}."
            raise NonFiniteError(None, f"{said} Divide the losses by a constant.")

    @contextmanager
    def begun_again_on_error(self) -> Generator[None]:
        """If the body raises, the scaler is as it was before it saw the gradients."""
        try:
            yield
        except BaseException:
            if self.scaler is not None:
                self.scaler.update(self.now)
            raise

    def skip(self, parameters: Iterable[Tensor], updates: bool) -> None:
        """Count a step that was skipped; the scaler sees a gradient that is infinite, and learns.

        Args:
            parameters: those of the network, one of which shows the gradient to the scaler's owner.
            updates: whether the step would have updated the scaler itself.
        """
        self.skipped += 1
        if self.scaler is None:
            return
        if not updates:
            mark(parameters)
            return
        # Not the user's optimizer, which the scaler of a fused one would let make its step.
        stand_in = torch.zeros((), device=next(iter(parameters)).device, requires_grad=True)
        mark([stand_in])
        optimizer = torch.optim.SGD([stand_in])
        self.scaler.unscale_(optimizer)
        self.scaler.step(optimizer)
        self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """The count, and the scaler's state; empty if there is neither."""
        state: dict[str, Any] = {"skipped": self.skipped} if self.skipped else {}
        return state if self.scaler is None else {**state, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.skipped = state.get("skipped", 0)
        if self.scaler is not None and "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])


def refuse_scaler(stages: Stages, module: nn.Module, scaler: Scaler | None) -> None:
    """Raise CombinationError for stages, or a network, that do not go with a scaler."""
    if scaler is None:
        return
    for name, p in module.named_parameters():
        if p.requires_grad and (p.is_complex() or p.dtype == torch.float16):
            advice = "Leave the scaler out" if p.is_complex() else "Keep it in float32"
            raise CombinationError(
                f"a scaler and parameter {name!r} of {p.dtype}: scalers divide real gradients of "
                f"float32 or more. {advice}, and run the network under torch.autocast."
            )
    if stages.line_search is not None:
        raise CombinationError(
            f"{type(stages.line_search).__name__} and a scaler: a line search compares losses, of "
            "which float16 has three digits. Use bfloat16 without a scaler, or no line search."
        )


def mark(parameters: Iterable[Tensor]) -> None:
    """Make a gradient of one of the parameters infinite, for a scaler to see."""
    p = next(p for p in parameters if p.requires_grad and p.is_floating_point())
    infinite = torch.full_like(p, math.inf)
    p.grad = infinite if p.grad is None else added(p.grad, infinite)


def scales_of(losses: Sequence[Tensor]) -> list[Tensor] | None:
    """What `GradScaler.scale` has multiplied the losses by: of each product the factor.

    None if one of them is no product with a single number that has no gradient. To be asked before
    the graphs are freed; nothing is read from a device.
    """
    scales = []
    for loss in losses:
        node: Any = loss.grad_fn
        product = type(node).__name__ == "MulBackward0"
        other = getattr(node, "_saved_other", None) if product else None
        if not isinstance(other, Tensor) or other.numel() != 1 or other.requires_grad:
            return None
        scales.append(other)
    return scales


def above_one(scales: Sequence[Tensor] | None) -> bool:
    """Whether these are the scale of a GradScaler, which may let an overflow pass."""
    numbers = {float(scale) for scale in scales or ()}
    return len(numbers) == 1 and numbers.pop() > 1
