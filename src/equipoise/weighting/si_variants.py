"""RLW and DWA on the scale-invariant objective."""

from __future__ import annotations

import torch

from equipoise.weighting.dwa import DWA
from equipoise.weighting.rlw import RLW
from equipoise.weighting.si import SI


class RLWSI(RLW, SI):
    """RLW on the scale-invariant objective: the sum of w_i ln L_i, w random (see RLW and SI).

    Args:
        generator: as of RLW.
        normalize_to: as of RLW.
        cap: upper bound of w_i / L_i; None: no bound.

    Raises:
        ValueError: a parameter is not positive.
        TaskError: at the call, a loss is negative.

    Passes: one trunk forward and one backward a step. State: the generator.
    """

    def __init__(
        self,
        generator: torch.Generator | None = None,
        normalize_to: float | None = None,
        cap: float | None = None,
    ) -> None:
        super().__init__(generator, normalize_to)
        self._set_cap(cap)


class DWASI(DWA, SI):
    """DWA on the scale-invariant objective: the sum of w_i ln L_i (see DWA and SI).

    The weights follow the losses themselves, as in DWA: the ratio of two epochs does not change
    when a loss is multiplied by a constant, where the ratio of their logarithms would.

    Args:
        steps_per_epoch: as of DWA.
        temperature: as of DWA.
        cap: upper bound of w_i / L_i; None: no bound.

    Raises:
        ValueError: a parameter is not positive.
        TaskError: at the call, a loss is negative.

    Passes: one trunk forward and one backward a step. State: 3 T numbers and a counter.
    """

    def __init__(
        self, steps_per_epoch: int, temperature: float = 2.0, cap: float | None = None
    ) -> None:
        super().__init__(steps_per_epoch, temperature)
        self._set_cap(cap)
