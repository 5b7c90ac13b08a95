"""What a step would go around: wrappers of the network, and optimizers that want to be called."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from equipoise.errors import CombinationError
from equipoise.trunk import SharedTrunk

WRAPPERS = {
    "DistributedDataParallel": "a Step sums losses and gradients over the processes itself. Give "
    "it the bare module, the wrapper's `.module`",
    "ReplicateModule": "a Step sums losses and gradients over the processes itself. Give it a "
    "module without replicate()",
    "DataParallel": "a Step works on one device a process. Give it the bare module, the wrapper's "
    "`.module`, and start one process for each device with torchrun",
    "FullyShardedDataParallel": "rows of task gradients need the parameters whole. Give it a "
    "module without FSDP; the processes keep a slice of the rows each",
    "FSDPModule": "rows of task gradients need the parameters whole. Give it a module without "
    "fully_shard(); the processes keep a slice of the rows each",
}
"""Classes of torch that reduce or spread gradients on their way, and what to do instead."""

COMPILED = (
    "torch.compile around a SharedTrunk and a dict of losses: a Step calls the trunk and each head "
    "by itself, which would not be compiled. Compile these instead: model.trunk.compile(), and "
    "head.compile() for each of model.heads.values()."
)
OF_AN_OPTIMIZER = ("param_groups", "state", "step", "zero_grad", "state_dict", "load_state_dict")


def refuse_wrappers(module: nn.Module) -> None:
    """Raise CombinationError for a wrapper whose work a step would not do, or would do twice."""
    for name, part in module.named_modules():
        for kind in type(part).__mro__:
            if kind.__name__ in WRAPPERS and kind.__module__.startswith("torch."):
                where = f" around {name!r}" if name else ""
                raise CombinationError(
                    f"Step and {kind.__name__}{where}: {WRAPPERS[kind.__name__]}."
                )
    for name, parameter in module.named_parameters():
        if is_spread(parameter):
            raise CombinationError(
                f"Step and parameter {name!r}, which is a DTensor, spread over processes: rows of "
                "task gradients need it whole. Give the Step a module without tensor parallelism "
                "or fully_shard(); the processes keep a slice of the rows each."
            )


def is_spread(parameter: Any) -> bool:
    """Whether a process holds a part of it only."""
    return any(kind.__name__ == "DTensor" for kind in type(parameter).__mro__)


def refuse_compiled(model: nn.Module) -> None:
    """Raise CombinationError for a SharedTrunk that is compiled as a whole."""
    inner = getattr(model, "_orig_mod", None)
    if isinstance(inner, SharedTrunk):
        raise CombinationError(COMPILED)
    if isinstance(model, SharedTrunk):
        in_place = getattr(model, "_compiled_call_impl", None) is not None
        if in_place or hasattr(model.forward, "_torchdynamo_orig_callable"):
            raise CombinationError(COMPILED)


def refuse_optimizer(optimizer: Any) -> None:
    """Raise CombinationError for what is no optimizer, or one whose `step` wants an argument.

    What has the parts of a torch.optim.Optimizer is one, as the wrapper of schedule-free is.
    """
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise CombinationError(
            "Step and LBFGS: LBFGS evaluates the loss itself. Use another optimizer."
        )
    missing = [part for part in OF_AN_OPTIMIZER if not hasattr(optimizer, part)]
    if isinstance(optimizer, type) or missing:
        other = isinstance(optimizer, type) or len(missing) > len(OF_AN_OPTIMIZER) / 2
        what = "" if other else f" without {missing[0]}"
        raise CombinationError(f"optimizer is a {name}{what}; give a torch.optim.Optimizer.")
    wanted = _arguments_of_step(optimizer)
    if wanted:
        raise CombinationError(
            f"Step and {name}: its step wants the argument {wanted[0]!r}; a Step calls step() when "
            "the gradients are there. Use an optimizer whose step needs none."
        )


def _arguments_of_step(optimizer: Any) -> list[str]:
    """The arguments without which `step` cannot be called."""
    # Of the class: a scheduler puts a wrapper into the instance, whose signature is another.
    of_class = getattr(type(optimizer), "step", None)
    step = optimizer.step if of_class is None else of_class
    try:
        arguments = list(inspect.signature(step).parameters.values())
    except (TypeError, ValueError):  # not written in Python
        return []
    if of_class is not None and inspect.isfunction(of_class):
        arguments = arguments[1:]
    named = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [a.name for a in arguments if a.default is a.empty and a.kind not in named]
