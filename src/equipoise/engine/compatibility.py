"""What makes no sense together is refused when a Step is built, by the names of what was given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.engine.adapters import AggregatorStage
from equipoise.engine.learner import held_by
from equipoise.engine.network import Network
from equipoise.engine.stages import Stages
from equipoise.engine.wrappers import refuse_compiled
from equipoise.errors import CombinationError, TaskError, nearest
from equipoise.line_search.base import LineSearch
from equipoise.sharpness import TaskSharpness
from equipoise.trunk import SharedTrunk, bypassed

NO_FEATURES = (
    "needs features between a trunk and heads, which a closure does not show. Give the Step a "
    "SharedTrunk and a dict of losses"
)

NOTHING_SHARED = "separate trunks and {0}: there is no shared parameter. Leave {0} out."


def shared_trunk(model: nn.Module, losses: Mapping[str, Any], shared: Any) -> SharedTrunk:
    """The model, if it has one head for each of the losses.

    Raises:
        CombinationError: it is no SharedTrunk, or the user says what is shared besides.
        TaskError: a head without a loss, or a loss without a head.
    """
    refuse_compiled(model)
    if isinstance(getattr(model, "module", None), SharedTrunk):
        raise CombinationError(
            f"{type(model).__name__} around a SharedTrunk and a dict of losses: a Step calls the "
            "trunk and each head by itself. Give it the SharedTrunk, the wrapper's `.module`."
        )
    if not isinstance(model, SharedTrunk):
        raise CombinationError(
            f"{type(model).__name__} and a dict of losses: only a SharedTrunk says which output is "
            "whose. Give the list of task names, and call step(closure)."
        )
    if shared is not None:
        raise CombinationError(
            "SharedTrunk and shared: what is shared is the trunk. Leave `shared` out."
        )
    for task in (*losses, *model.tasks):
        if task not in model.tasks:
            raise TaskError(task, "has a loss but no head; " + nearest(task, model.tasks))
        if task not in losses:
            raise TaskError(task, "has a head but no loss; add it to `losses`.")
    return model


def refuse_senseless(
    stages: Stages,
    network: Network,
    optimizer: torch.optim.Optimizer | None,
    clip_norm: float | None,
    missing: str = "sample",
) -> None:
    """Check the parts of a step against each other; they are not used yet.

    Raises:
        CombinationError: two parts that cannot work together; names both.
        ValueError: a value out of its range.
    """
    if stages.level not in ("parameters", "features"):
        raise ValueError(f"level is {stages.level!r}; known are 'parameters' and 'features'.")
    if stages.heads not in ("own", "weighted"):
        raise ValueError(f"heads is {stages.heads!r}; known are 'own' and 'weighted'.")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm is {clip_norm}; it must be positive, or None.")
    if missing not in ("sample", "loss"):
        raise ValueError(f"missing is {missing!r}; known are 'sample' and 'loss'.")
    if missing != "sample" and not isinstance(network.losses, Mapping):
        raise CombinationError(
            f"missing={missing!r} and a closure: it handles its targets itself. Leave `missing` "
            "out."
        )
    _refuse_senseless_level(stages, network)
    _refuse_senseless_heads(stages)
    if stages.sharpness is not None:
        _refuse_senseless_sharpness(stages.sharpness, stages.aggregator)
    _refuse_nothing_shared(stages, network)
    method = stages.weighting.method
    if method is not None and method.n_tasks not in (None, len(network.tasks)):
        raise CombinationError(
            f"{stages.weighting.name}(n_tasks={method.n_tasks}) and a model with "
            f"{len(network.tasks)} tasks: give n_tasks={len(network.tasks)}."
        )
    if optimizer is None:
        _refuse_what_needs_the_update(stages)
        return
    held = set(held_by(optimizer))
    if not any(p in held for p in network.module.parameters()):
        raise ValueError(
            "the optimizer holds none of the model's parameters. Give it model.parameters()."
        )
    if stages.line_search is not None:
        _refuse_senseless_search(stages.line_search, stages.aggregator, optimizer, clip_norm)
        _refuse_parameters_left_out(stages.line_search, network.module, held)


def _refuse_what_needs_the_update(stages: Stages) -> None:
    """Without an optimizer there are only gradients."""
    who = None if stages.line_search is None else type(stages.line_search).__name__
    method = stages.weighting.method
    if method is not None and (method.needs_losses_after or method.needs_lr):
        who = who or stages.weighting.name
    if who is not None:
        raise CombinationError(
            f"{who} and no optimizer: {who} needs to know how the step is made. Give the Step "
            "the optimizer."
        )


def _refuse_senseless_level(stages: Stages, network: Network) -> None:
    search, given = stages.line_search, stages.given_level
    if search is not None and given is not None and given != search.level:
        other = "Backtracking" if given == "parameters" else "FastBacktracking"
        raise CombinationError(
            f"level={given!r} and {type(search).__name__}: this line search needs the gradients of "
            f"the {search.level}. Leave `level` out, or use {other}."
        )
    if stages.level == "parameters":
        return
    # What the user wrote: the line search where that is what asks for the features.
    who = stages.needs.features
    if stages.sharpness is not None:
        advice = "Leave `level` out" if search is None else "Use Backtracking"
        raise CombinationError(
            f"{who} and {type(stages.sharpness).__name__}: flat regions need each task's gradient "
            f"of the shared parameters, not of the features. {advice}."
        )
    if not network.has_features:
        advice = "" if search is None else ", or use Backtracking"
        raise CombinationError(f"{who} and a closure: {who} {NO_FEATURES}{advice}.")
    if isinstance(network.module, SharedTrunk):
        refuse_bypassed(network.module, who)
    if not stages.aggregator.works_on_features:
        raise CombinationError(
            f"{who} and {stages.aggregator.name}: features need an aggregator with "
            "coefficients(gram). "
            + ("Leave `level` out." if search is None else "Use Backtracking.")
        )


def refuse_bypassed(model: SharedTrunk, who: str | None) -> None:
    """Raise CombinationError for what the features cannot know of: `who` works on them."""
    what = bypassed(model)
    if who is not None and what is not None:
        raise CombinationError(
            f"{who} and {what}: {who} works on the features that trunk and heads pass on, and "
            "would leave out the rest of model(inputs). Move that into the trunk, or work at the "
            "parameters: level='parameters', or Backtracking."
        )


def _refuse_senseless_heads(stages: Stages) -> None:
    if stages.heads == "weighted" and stages.aggregator.coefficients is None:
        raise CombinationError(
            f"heads='weighted' and {stages.aggregator.name}: this aggregator has no coefficients "
            "to multiply the heads by. Use heads='own'."
        )
    if stages.heads == "weighted" and stages.sharpness is not None:
        raise CombinationError(
            f"heads='weighted' and {type(stages.sharpness).__name__}: a step has two sets of "
            "coefficients then, and heads learn where each task was perturbed. Use heads='own'."
        )


def _refuse_senseless_sharpness(sharp: TaskSharpness, aggregator: AggregatorStage) -> None:
    name = type(sharp).__name__
    if sharp.decompose and aggregator.degree != 1:
        raise CombinationError(
            f"{name} and {aggregator.name} of degree {aggregator.degree:g}: the flat part would "
            f"not be in proportion to rho. Give {aggregator.name} degree=1, or use "
            "decompose=False."
        )
    if aggregator.interval > 1:
        raise CombinationError(
            f"{name} and {aggregator.name}(k={aggregator.interval}): flat regions need the rows in "
            f"every step. Use {name}(every={aggregator.interval}) around the aggregator itself."
        )


def _refuse_nothing_shared(stages: Stages, network: Network) -> None:
    if not network.shares_nothing:
        return
    if stages.sharpness is not None:
        raise CombinationError(NOTHING_SHARED.format(type(stages.sharpness).__name__))
    if stages.line_search is not None:
        raise CombinationError(
            f"separate trunks and {type(stages.line_search).__name__}: networks that share nothing "
            "need a step size each. Leave the line search out."
        )
    if stages.known(1) is None:
        needs_gram = stages.weighting.needs_gram
        name = stages.weighting.name if needs_gram else stages.aggregator.name
        raise CombinationError(NOTHING_SHARED.format(name))


def _refuse_senseless_search(
    search: LineSearch,
    aggregator: AggregatorStage,
    optimizer: torch.optim.Optimizer,
    clip_norm: float | None,
) -> None:
    optimizer = getattr(optimizer, "optimizer", optimizer)  # what a wrapper holds
    name, kind = type(search).__name__, type(optimizer).__name__
    if aggregator.interval > 1:
        raise CombinationError(
            f"{name} and {aggregator.name}(k={aggregator.interval}): a line search needs the "
            "gradients of each task in every step. Leave the interval out."
        )
    if search.moves == "optimizer":
        return
    if clip_norm is not None:
        raise CombinationError(
            f"{name} and clip_norm={clip_norm}: the line search says how far the step goes. "
            "Leave clip_norm out, or lower `upper`."
        )
    advice = "Use torch.optim.SGD without options"
    if search.level == "parameters":
        advice += ', or direction="optimizer"'
    if not isinstance(optimizer, torch.optim.SGD):
        raise CombinationError(f"{name} and {kind}: {name} makes the steps of plain SGD. {advice}.")
    for group in optimizer.param_groups:
        for option in ("momentum", "weight_decay", "maximize"):
            if group.get(option):
                raise CombinationError(
                    f"{name} and {kind}({option}={group[option]}): {name} makes the steps of "
                    f"plain SGD. {advice}."
                )


def _refuse_parameters_left_out(search: LineSearch, module: nn.Module, held: set[Tensor]) -> None:
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter not in held:
            raise CombinationError(
                f"{type(search).__name__} and an optimizer without {name!r}: the line search moves "
                "all that requires a gradient. Give it to the optimizer, or freeze it with "
                "requires_grad_(False)."
            )
