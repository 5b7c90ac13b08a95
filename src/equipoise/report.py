"""StepReport: what a step tells about itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equipoise.engine.direction import Combination
from equipoise.engine.evaluation import Evaluation
from equipoise.engine.factors import Factors
from equipoise.engine.search_pass import Found
from equipoise.engine.targets import Presence


@dataclass(frozen=True)
class StepReport:
    """What happened in one step. Vectors are float64 on the CPU, in the order of `tasks`.

    Attributes:
        tasks: the T task names.
        losses: (T,) losses of the (joint) batch before the update; NaN for an absent task.
        weights: (T,) the weighting's lambda, as its paper defines it; 0 for an absent task.
        factors: (T,) derivative of each weighted loss by its loss: what really multiplies the
            gradient of task i, for example lambda_i / L_i under SI and IGB; 0 if absent.
        coefficients: (T,) how the aggregator combined the gradients of the weighted losses; None
            for a callable that does not say; 0 for an absent task.
        gram: (T, T) inner products of the weighted losses' gradients, of the shared parameters or
            of the features; None where the step formed none; 0 for an absent task.
        flat_coefficients: (T,) how the flat rows of TaskSharpness were combined (with
            decompose=False: the rows at the perturbed points); None where there were none.
        flat_gram: (T, T) inner products of those rows; None where there were none.
        direction_norm: length of the update direction of the shared parameters, before clipping.
        step_size: step length found by a line search, 0 if it accepted none; None: the optimizer's
            learning rate.
        trials: number of trial steps of the line search.
        accepted: False if nothing was updated, as for a batch without any label.
        fallback: whether the direction would have let a loss grow, to first order, so that a
            line search took another: `coefficients` are then those of MGDA, unless flat regions or
            an optimizer had changed the direction, which went without them.
        verified: whether the step that a FastBacktracking accepted among the features held in the
            parameters; False: it did not, and the step is one of Backtracking. None: not looked at.
        slopes: (T,) what each weighted loss falls by for each unit of `step_size`, were it linear;
            None without a line search; 0 for an absent task.
        skipped: how many steps this Step has left out so far, because a loss or a gradient was not
            finite (`on_nonfinite="skip"`, or a scaler); `accepted` says whether this was one.
        trial_losses: (T,) losses of the accepted trial, in a FastBacktracking that does not verify
            those of the moved features; None if there is none; NaN for an absent task.
    """

    tasks: tuple[str, ...]
    losses: Tensor
    weights: Tensor
    factors: Tensor
    coefficients: Tensor | None
    gram: Tensor | None
    direction_norm: float
    flat_coefficients: Tensor | None = None
    flat_gram: Tensor | None = None
    step_size: float | None = None
    trials: int = 0
    accepted: bool = True
    fallback: bool = False
    verified: bool | None = None
    slopes: Tensor | None = None
    trial_losses: Tensor | None = None
    skipped: int = 0

    @property
    def cosines(self) -> Tensor | None:
        """(T, T) cosines between the task gradients; NaN where one of them is zero."""
        if self.gram is None:
            return None
        norms = self.gram.diagonal().sqrt()
        return self.gram / torch.outer(norms, norms)

    def scalars(self) -> dict[str, float]:
        """All numbers of the step by name, for any logger.

        "loss/left", "weight/left" and "coefficient/left" for each task that was present, then
        "direction_norm", "accepted", "skipped", and with a line search "step_size" and "trials".
        """
        found: dict[str, float] = {}
        for name, values in (
            ("loss", self.losses), ("weight", self.weights), ("coefficient", self.coefficients),
        ):  # fmt: skip
            if values is not None:
                there = zip(self.tasks, self.losses.tolist(), values.tolist(), strict=True)
                found |= {f"{name}/{t}": v for t, loss, v in there if not math.isnan(loss)}
        found["direction_norm"] = self.direction_norm
        found["accepted"], found["skipped"] = float(self.accepted), float(self.skipped)
        if self.step_size is not None:
            found["step_size"], found["trials"] = self.step_size, float(self.trials)
        return found

    @classmethod
    def nothing_done(cls, tasks: tuple[str, ...], skipped: int = 0) -> StepReport:
        """The report of a batch without any label, or of a step that was skipped."""
        zeros = torch.zeros(len(tasks), dtype=torch.float64, device="cpu")
        absent = zeros * torch.nan
        return cls(tasks, absent, zeros, zeros, zeros, None, 0.0, accepted=False, skipped=skipped)

    @classmethod
    def of(
        cls,
        look: Evaluation,
        weighted: Factors,
        result: Combination,
        norm: float,
        found: Found | None = None,
        skipped: int = 0,
    ) -> StepReport:
        """From the values (T',) of the present tasks to all T."""
        presence, losses = look.presence, look.losses
        (w, gram), (flat_w, flat_gram) = (_of_all(presence, part) for part in (result, result.flat))
        return cls(
            tasks=presence.tasks,
            losses=presence.spread(losses, torch.nan),
            weights=presence.spread(weighted.weights),
            factors=presence.spread(weighted.factors),
            coefficients=w,
            gram=gram,
            direction_norm=norm,
            flat_coefficients=flat_w,
            flat_gram=flat_gram,
            fallback=result.fallback,
            skipped=skipped,
            **({} if found is None else _of_search(presence, found)),
        )


def _of_search(presence: Presence, found: Found) -> dict[str, Any]:
    losses = found.losses
    return {
        "step_size": found.step_size,
        "trials": found.trials,
        "accepted": found.accepted,
        "verified": found.verified,
        "slopes": presence.spread(found.slopes),
        "trial_losses": None if losses is None else presence.spread(losses, torch.nan),
    }


def _of_all(presence: Presence, result: Combination | None) -> tuple[Tensor | None, Tensor | None]:
    """Coefficients (T,) and gram (T, T), with zeros for the tasks that are absent."""
    if result is None:
        return None, None
    present, w = presence.present, result.coefficients
    gram = None
    if result.gram is not None:
        gram = torch.zeros(len(present), len(present), dtype=torch.float64, device="cpu")
        gram[torch.outer(present, present)] = result.gram.to(torch.float64).flatten()
    return None if w is None else presence.spread(w), gram
