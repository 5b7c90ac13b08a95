"""What moves the parameters of a weighting that learns."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from equipoise.engine.adapters import WeightingStage
from equipoise.engine.gradients import Gradients, summed
from equipoise.engine.scaling import Scaling
from equipoise.errors import CombinationError

ONLY_ON_THE_NETWORK = ("fused", "capturable", "foreach", "differentiable", "weight_decay")
"""Options of an optimizer that do not suit a few numbers on the CPU."""


class Learner:
    """Moves the parameters of a weighting; the user's optimizer is left as it is.

    Whatever was made from that optimizer before (schedulers, a loaded state) goes on to fit it.
    Where it already holds the parameters, it moves them itself. Else they have an optimizer of the
    same kind, without weight decay, of Adam's kind where that one is none of torch's, whose
    learning rate is the weighting's, or follows that of the user's first group.

    Args:
        weighting: whose parameters they are.
        optimizer: the user's; None: somebody else has it.

    Attributes:
        parameters: all of them; none if the weighting does not learn.
        own: those that the user's optimizer does not hold.
        optimizer: of these; None if there are none.

    Raises:
        CombinationError: neither the weighting nor an optimizer says the learning rate.
    """

    def __init__(self, weighting: WeightingStage, optimizer: torch.optim.Optimizer | None) -> None:
        self.parameters: list[Tensor] = list(weighting.learnable)
        self._leader = optimizer
        self._rate = None if weighting.method is None else weighting.method.lr
        held = set() if optimizer is None else set(held_by(optimizer))
        own = [p for p in self.parameters if p not in held]
        if own and optimizer is None and self._rate is None:
            raise CombinationError(
                f"{weighting.name} and no optimizer: nobody says with which learning rate its "
                "parameters learn. Give it an lr, or give the Step the optimizer."
            )
        self.own = set(own)
        self.optimizer = _of_kind(optimizer, own, self._lr()) if own else None

    def _lr(self) -> Any:
        if self._rate is not None or self._leader is None:
            return self._rate
        return self._leader.param_groups[0]["lr"]

    def give(self, scaling: Scaling, learned: Gradients, add: bool = False) -> None:
        """Put the gradients of the parameters where their optimizers look.

        Args:
            scaling: of gradients that the user's optimizer will see.
            learned: of `parameters`.
            add: whether these go on top of what is there.
        """
        for p, gradient in zip(self.parameters, learned, strict=True):
            if p in self.own:
                p.grad = gradient
            else:
                before = p.grad if add else None
                p.grad = summed([before], scaling.scaled([gradient]))[0]

    def step(self) -> None:
        """Move those that nobody else moves."""
        if self.optimizer is not None:
            if self._rate is None:
                for group in self.optimizer.param_groups:
                    group["lr"] = self._lr()
            self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state; empty if there is none."""
        return {} if self.optimizer is None else self.optimizer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            ValueError: there is no state for these parameters.
        """
        if self.optimizer is not None:
            if not state:
                raise ValueError("it holds nothing of how the weighting learns.")
            self.optimizer.load_state_dict(dict(state))


def _of_kind(
    optimizer: torch.optim.Optimizer | None, parameters: list[Tensor], lr: Any
) -> torch.optim.Optimizer:
    """An optimizer of the same kind, or Adam."""
    inner: Any = optimizer
    while isinstance(getattr(inner, "optimizer", None), torch.optim.Optimizer):
        inner = inner.optimizer  # wrappers, as of Accelerate and Lightning
    kind = type(inner)
    if kind not in KINDS:
        return torch.optim.Adam(parameters, lr=lr)
    takes = inspect.signature(kind.__init__).parameters
    options = {
        name: value
        for name, value in inner.defaults.items()
        if name in takes and name not in ONLY_ON_THE_NETWORK
    }
    options["lr"] = lr
    if "weight_decay" in takes:
        options["weight_decay"] = 0.0
    return kind(parameters, **options)


KINDS = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.RMSprop,
)
"""Those that move any dense parameter by its gradient alone."""


def held_by(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All parameters of an optimizer."""
    return [p for group in optimizer.param_groups for p in group["params"]]
