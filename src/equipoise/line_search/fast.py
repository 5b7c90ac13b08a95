"""FastBacktracking: the line search that evaluates the heads alone."""

from __future__ import annotations

import math

from torch import Tensor

from equipoise.line_search.base import LatentLineSearch, Objective, Rule

SCALES = ("matched", "batch")


class FastBacktracking(LatentLineSearch):
    """FBLS: trial steps among the features, for which the heads alone are evaluated.

    Algorithm 4.2 of the thesis on fast line search for multi-task models, as corrected: with z
    the features of the batch, q_t the gradient of L_t by z and d_z what the aggregator makes of
    the q_t, eta starts at `upper` and shrinks until for every task t

        L_t(z - eta s d_z, phi_t - eta h_t) <= L_t - eta beta (|h_t|^2 + s q_t^T d_z)      (4.2)

    Then phi_t <- phi_t - eta h_t and theta <- theta - eta (dz/dtheta)^T d_z. Weighted losses, the
    fallback to the MGDA direction (of the q_t), and what happens below `floor` are as in
    `Backtracking`. If d_z = 0 the heads alone are searched.

    The thesis has s = 1. A step of the trunk moves the features by -eta J J^T d_z, not by -eta d_z
    (J = dz/dtheta), and the mean over a batch makes each sample's part of d_z small: with s = 1
    the latent part of the rule hardly ever refuses anything, and says little of what the step
    does. `latent_scale="matched"` corrects that to first order at no cost; `verify=True` makes
    sure.

    Args:
        beta: the share of the linear decrease that is asked for, between 0 and 1/2.
        shrink: by which a refused step size is multiplied.
        upper: the first step size, lr_ub.
        floor: the least step size that is tried.
        rule: which terms stand on the right: "full" (4.5), "head" `|h_t|^2` alone (4.3), "latent"
            s `<q_t, d_z>` alone (4.4).
        steps_per_epoch: batches in an epoch, by which the upper bound is halved; None: it is not.
        halve_every: epochs after which the upper bound is multiplied by `upper_shrink`; None:
            never.
        upper_shrink: that factor.
        objective: "each" or "sum", as in `Backtracking`.
        adapt: the upper bound follows the steps, as in `Backtracking`.
        latent_scale: s. 1: the thesis. "matched": |J^T d_z|^2 / |d_z|^2, the Rayleigh quotient of
            J J^T along d_z, so that the features move about as far as the step of the trunk will
            move them. "batch": the number of samples of the batch.
        verify: look at the whole network at the accepted step, once; if (4.1) fails for a task
            there, make the step of `Backtracking` instead, from the upper bound on.
            `report.verified` says which it was. All accepted steps then satisfy (4.1).

    Raises:
        ValueError: a value out of its range.

    Passes: trunk 1 forward and 1 backward, however many tasks; heads 1 forward, 1 backward and one
    forward for each trial. With `verify` one trunk forward more, and one derivative of the
    backward pass, which gives the T slopes `<g_t, J^T d_z>` at once; where a layer has none, T
    backwards. A step that fails it costs what one of `Backtracking` costs. Memory: the features
    T + 1 times, the heads once more. State: a count of steps, the adapted bound.
    """

    def __init__(
        self,
        beta: float = 0.1,
        shrink: float = 0.5,
        upper: float = 1.0,
        floor: float = 1e-10,
        rule: Rule = "full",
        steps_per_epoch: int | None = None,
        halve_every: int | None = 10,
        upper_shrink: float = 0.5,
        objective: Objective = "each",
        adapt: bool = False,
        latent_scale: float | str = 1.0,
        verify: bool = False,
    ) -> None:
        super().__init__(
            beta, shrink, upper, floor, rule, steps_per_epoch, halve_every, upper_shrink,
            objective, adapt,
        )  # fmt: skip
        if isinstance(latent_scale, str):
            known = latent_scale in SCALES
        else:
            known = 0 < latent_scale < math.inf
        if not known:
            raise ValueError(
                f"latent_scale is {latent_scale!r}; give a positive number, 'matched' or 'batch'."
            )
        self.latent_scale = latent_scale
        self.verify = verify

    def content_with(self, known: Tensor) -> bool:
        """As in `LineSearch`; what is verified is asked for each task."""
        return not self.verify and super().content_with(known)

    @property
    def needs_lengths(self) -> bool:
        """Whether `scale` wants the two lengths."""
        return self.latent_scale == "matched"

    def scale(self, squared_step: float, squared_direction: float, samples: int) -> float:
        """The latent scale s.

        Args:
            squared_step: |J^T d_z|^2.
            squared_direction: |d_z|^2; 0 if the trunk does not move, and any scale will do.
            samples: of the batch.
        """
        if self.latent_scale == "batch":
            return float(samples)
        if self.latent_scale == "matched":
            return squared_step / squared_direction if squared_direction > 0 else 1.0
        return float(self.latent_scale)
