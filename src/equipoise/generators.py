"""Private random generators for stages that draw."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn


class GeneratorState(nn.Module):
    """Mixin for a stage that draws: its generator is part of its `state_dict`.

    The generator lives on the CPU, so that the draws do not depend on the device, and is private
    unless given, so that a stage never disturbs the draws of anything else.

    Args:
        generator: a CPU generator; None: a new one, seeded from torch's global generator.

    Raises:
        ValueError: the generator is not a CPU generator.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if generator is None:
            generator = torch.Generator()
            generator.manual_seed(int(torch.randint(2**62, (), device="cpu")))
        elif generator.device.type != "cpu":
            raise ValueError(f"generator is on {generator.device}; draws are made on the CPU.")
        self.generator = generator

    def get_extra_state(self) -> dict[str, Tensor]:
        """The generator's state, for `state_dict`."""
        return {"generator": self.generator.get_state()}

    def set_extra_state(self, state: Any) -> None:
        """Restore the generator from `state_dict`."""
        self.generator.set_state(state["generator"].cpu())


def twin(stage: Any) -> Any:
    """A copy of a stage that shares no state with it, and draws other numbers.

    Its generator starts from a number that the original's would draw, which does not move.
    """
    copy = deepcopy(stage)
    generator = generator_of(copy)
    if generator is not None:
        generator.manual_seed(int(torch.randint(2**62, (), generator=generator, device="cpu")))
    return copy


def generator_of(stage: Any) -> torch.Generator | None:
    """The private generator from which a stage draws; None if it has none."""
    generator = getattr(stage, "generator", None)
    return generator if isinstance(generator, torch.Generator) else None
