"""What makes no sense together with a line search is refused when a Step is built."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from equipoise.combinations import held_by
from equipoise.errors import CombinationError
from equipoise.line_search import LineSearch
from equipoise.trunk import SeparateTrunks

if TYPE_CHECKING:
    from equipoise.step import Step


def refuse_senseless_search(step: Step) -> None:
    """Check a line search against the other parts of a Step.

    Raises:
        CombinationError: it cannot work together with one of them; names both.
    """
    search, model = step.line_search, step.model
    if search is None:
        return
    name, aggregator = type(search).__name__, type(step.aggregator).__name__
    if not isinstance(search, LineSearch):
        raise CombinationError(
            f"line_search is a {name}; give Backtracking or FastBacktracking, or None."
        )
    if step.level != search.level:
        other = "Backtracking" if step.level == "parameters" else "FastBacktracking"
        raise CombinationError(
            f"level={step.level!r} and {name}: it needs the gradients of the {search.level}. Use "
            f"level={search.level!r}, or {other}."
        )
    if isinstance(model.trunk, SeparateTrunks):
        raise CombinationError(
            f"separate trunks and {name}: networks that share nothing need a step size each."
        )
    interval = getattr(step.aggregator, "interval", 1)
    if interval > 1:
        raise CombinationError(
            f"{name} and {aggregator}(k={interval}): a line search needs the "
            "gradients of each task in every step. Leave the interval out."
        )
    if search.moves == "gradient":
        _refuse_other_optimizers(step, name, search)
    held = {id(p) for p in held_by(step.optimizer)}
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in held:
            raise CombinationError(
                f"{name} and an optimizer without {parameter_name!r}: the line search moves all "
                "that requires a gradient. Give it to the optimizer, or freeze it with "
                "requires_grad_(False)."
            )


def _refuse_other_optimizers(step: Step, name: str, search: LineSearch) -> None:
    optimizer = step.optimizer
    kind = type(optimizer).__name__
    if step.clip_norm is not None:
        raise CombinationError(
            f"{name} and clip_norm={step.clip_norm}: the line search says how far the step goes. "
            "Leave clip_norm out, or lower `upper`."
        )
    mend = "Use torch.optim.SGD without options"
    if search.level == "parameters":
        mend += ', or direction="optimizer"'
    if not isinstance(optimizer, torch.optim.SGD):
        raise CombinationError(f"{name} and {kind}: its steps are those of plain SGD. {mend}.")
    for group in optimizer.param_groups:
        for option in ("momentum", "weight_decay", "maximize"):
            if group.get(option):
                raise CombinationError(
                    f"{name} and {kind}({option}={group[option]}): its steps are those of plain "
                    f"SGD. {mend}."
                )
