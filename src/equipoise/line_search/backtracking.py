"""Backtracking: the line search that evaluates the whole network at every trial step."""

from __future__ import annotations

from typing import Literal, get_args

from equipoise.line_search.base import LineSearch, Objective, Rule

Moves = Literal["gradient", "optimizer"]


class Backtracking(LineSearch):
    """BLS: the longest step, of upper, upper/2, upper/4 and so on, that all tasks agree to.

    Algorithm 4.1 of the thesis on fast line search for multi-task models, as corrected: eta
    starts at `upper` and shrinks until for every task t

        L_t(theta - eta d, phi_t - eta h_t) <= L_t - eta beta (|h_t|^2 + g_t^T d)      (4.1)

    with g_t and h_t the gradients of the shared parameters and of the task's head, and d what the
    aggregator makes of the g_t. The parameters then become that trial. If eta would fall below
    `floor`, nothing is moved in this step: `report.accepted` is False and `step_size` 0. At the
    defaults that is after 34 trials.

    Losses that a weighting multiplies by f_t enter as f_t L_t, with f_t held for this step; their
    gradients are f_t g_t and f_t h_t. For f_t > 0 that is (4.1) for the raw loss along the
    weighted step, and under SI it is the stricter one: ln L then falls enough as well, for
    ln x <= x - 1. For equal weights it is the thesis' rule to the last bit.

    Where `<g_t, d>` < 0 for some t, the right-hand side would let that loss grow; the MGDA
    direction of the same gradients then takes the place of d, and `report.fallback` says so.

    Args:
        beta: the share of the linear decrease that is asked for, between 0 and 1/2.
        shrink: by which a refused step size is multiplied.
        upper: the first step size, lr_ub.
        floor: the least step size that is tried.
        rule: which terms stand on the right: "full" as above, "head" `|h_t|^2` alone, "latent"
            `<g_t, d>` alone. With "head" nothing falls back, and Sum needs one backward only.
        steps_per_epoch: batches in an epoch, by which the upper bound is halved; None: it is not.
        halve_every: epochs after which the upper bound is multiplied by `upper_shrink`; None:
            never. It never falls below `floor`.
        upper_shrink: that factor.
        objective: "each": (4.1) for every task. "sum": one inequality, for the sum of the
            weighted losses and of the right-hand sides; what Sum and Mean descend on. These then
            need one trunk backward instead of T.
        adapt: the upper bound follows the steps instead of the epochs: divided by `shrink` after
            a first trial that was accepted, and after two or more refused ones put to one trial
            above what was accepted.
        direction: "gradient": as above, the optimizer being plain SGD, whose learning rate is not
            used. "optimizer": from where the parameters are to where the optimizer would put them
            (Adam, say, with its own learning rate), of which eta is the fraction; the rule then
            has the true slopes along that way, `<g_t, p>` + `<h_t, p_t>`. If it leads upwards for
            some task, the step goes along the gradient direction. What a refused step did to the
            optimizer's state is taken back. Not in the thesis, which leaves it for later.

    Raises:
        ValueError: a value out of its range.

    Trials see the dropout masks of the step and leave buffers and random generators alone; a loss
    that is not finite is never accepted; losses are compared in float64, without slack.

    Passes: trunk and heads one forward for each trial, besides 1 forward and T backwards of the
    trunk. Memory: besides T x P the parameters once more, and with flat regions another T x P; with
    direction="optimizer" also the optimizer's state once more. State: a count of steps, the
    adapted bound.
    """

    level = "parameters"

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
        direction: Moves = "gradient",
    ) -> None:
        super().__init__(
            beta, shrink, upper, floor, rule, steps_per_epoch, halve_every, upper_shrink,
            objective, adapt,
        )  # fmt: skip
        if direction not in get_args(Moves):
            raise ValueError(
                f"direction is {direction!r}; known are {', '.join(map(repr, get_args(Moves)))}."
            )
        self.direction = self.moves = direction
