"""SharedTrunk: a trunk, named heads, and which parameter belongs to whom."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

from torch import Tensor, nn

from equipoise.errors import CombinationError, EquipoiseError, TaskError


class SharedTrunk(nn.Module):
    """Hard parameter sharing: one trunk, and one head for each task.

    Args:
        trunk: any module. It may return a tensor or a (nested) dict, list or tuple of tensors.
        heads: task name -> module that receives exactly what the trunk returns. The order of
            the names is the order of the tasks everywhere: T entries, row i belongs to name i.

    Raises:
        ValueError: no heads, a head that is no module, or a name that a module cannot carry
            (empty, with a dot).
        TaskError: a head holds a parameter that the trunk or another head holds too.
    """

    def __init__(self, trunk: nn.Module, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        if not heads:
            raise ValueError("heads is empty; give one module for each task, by name.")
        self.trunk = trunk
        self.heads = nn.ModuleDict()
        for task, head in heads.items():
            if not isinstance(head, nn.Module):
                raise ValueError(
                    f"task {task!r}: its head is a {type(head).__name__}; give an nn.Module."
                )
            try:
                self.heads[task] = head
            except (KeyError, TypeError) as error:
                raise ValueError(
                    f"task {task!r}: {error.args[0]}; choose another task name."
                ) from error
        self.tasks: tuple[str, ...] = tuple(heads)
        self._refuse_common_parameters()

    def _refuse_common_parameters(self) -> None:
        owners = {id(p): f"the trunk ({name})" for name, p in self.trunk.named_parameters()}
        for task in self.tasks:
            for name, parameter in self.heads[task].named_parameters():
                if id(parameter) in owners:
                    raise TaskError(
                        task,
                        f"head parameter {name!r} is also held by {owners[id(parameter)]}; what "
                        "several tasks use belongs to the trunk, and to the trunk alone.",
                    )
            owners |= {
                id(p): f"head {task!r} ({name})" for name, p in self.heads[task].named_parameters()
            }

    def forward(self, inputs: Any) -> dict[str, Any]:
        """All outputs, task name -> what that task's head returns."""
        features = self.trunk(inputs)
        return {task: self.head(task, features) for task in self.tasks}

    def head(self, task: str, features: Any) -> Any:
        """The output of one task on `features`, as the trunk returned them."""
        if isinstance(self.trunk, SeparateTrunks):
            features = features[task]
        return self.heads[task](features)

    def shared_parameters(self) -> list[nn.Parameter]:
        """The P shared parameters: all of the trunk's, frozen ones included."""
        return list(self.trunk.parameters())

    def head_parameters(self, task: str) -> list[nn.Parameter]:
        """The parameters of one task's head, frozen ones included."""
        return list(self.heads[task].parameters())

    def separated(self) -> SharedTrunk:
        """A copy that shares nothing: one copy of the trunk for each task (the STL baseline).

        Raises:
            CombinationError: the network is more than its trunk and heads; the copy would not be.
        """
        if isinstance(self.trunk, SeparateTrunks):
            return deepcopy(self)
        what = bypassed(self)
        if what is None and type(self).head is not SharedTrunk.head:
            what = f"{type(self).__name__}.head"
        if what is None and {id(p) for p in self.parameters()} != self._known_parameters():
            what = f"a parameter of {type(self).__name__} outside trunk and heads"
        if what is not None:
            raise CombinationError(
                f"stl and {what}: separate networks are copies of the trunk and the heads alone. "
                "Move it into the trunk, or train a model of one task for each."
            )
        copy = deepcopy(self)
        return SharedTrunk(SeparateTrunks(copy.trunk, self.tasks), dict(copy.heads.items()))

    def _known_parameters(self) -> set[int]:
        of_heads = (p for task in self.tasks for p in self.heads[task].parameters())
        return {id(p) for p in (*self.trunk.parameters(), *of_heads)}

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The tasks in groups that share parameters: one group, or one for each task."""
        if isinstance(self.trunk, SeparateTrunks):
            return tuple((task,) for task in self.tasks)
        return (self.tasks,)

    def group_state(self, group: tuple[str, ...]) -> dict[str, Tensor]:
        """The entries of `state_dict()` on which the outputs of one of the `groups` depend."""
        prefixes = tuple(f"heads.{task}." for task in group)
        if isinstance(self.trunk, SeparateTrunks):
            prefixes += tuple(f"trunk.of.{task}." for task in group)
        else:
            prefixes += ("trunk.",)
        return {k: v for k, v in self.state_dict().items() if k.startswith(prefixes)}


def bypassed(model: SharedTrunk) -> str | None:
    """What `model(inputs)` does besides calling trunk and heads, in words; None: nothing."""
    kind = type(model)
    own = kind.forward is not SharedTrunk.forward or kind.__call__ is not nn.Module.__call__
    if own or "forward" in vars(model):
        return f"the forward method of {kind.__name__}"
    hooks = (
        model._forward_pre_hooks,
        model._forward_hooks,
        model._backward_pre_hooks,
        model._backward_hooks,
    )
    return f"a hook on the {kind.__name__} itself" if any(hooks) else None


def outputs_of(model: SharedTrunk, inputs: Any) -> Callable[[str], Any]:
    """What gives the output of each task; all that `model(inputs)` does is done.

    Raises:
        EquipoiseError: a forward of its own has returned no dict; or, as a TaskError when that
            output is asked for, none for a task.
    """
    if not bypassed(model):
        features = model.trunk(inputs)
        return lambda task: model.head(task, features)
    outputs, kind = model(inputs), type(model).__name__
    if not isinstance(outputs, Mapping):
        raise EquipoiseError(
            f"{kind}.forward returned a {type(outputs).__name__}; it must return a dict, task name "
            "-> output."
        )

    def output_of(task: str) -> Any:
        if task not in outputs:
            raise TaskError(
                task,
                f"{kind}.forward returned no output for it, only for {list(outputs)}; it must "
                "return one for each task.",
            )
        return outputs[task]

    return output_of


class SeparateTrunks(nn.Module):
    """One copy of `trunk` for each task; returns the features by task name."""

    def __init__(self, trunk: nn.Module, tasks: tuple[str, ...]) -> None:
        super().__init__()
        self.of = nn.ModuleDict({task: deepcopy(trunk) for task in tasks})

    def forward(self, inputs: Any) -> dict[str, Any]:
        """Task name -> features of that task's own trunk."""
        return {task: trunk(inputs) for task, trunk in self.of.items()}
