"""Which parameter is shared, and which belongs to which task, read off the graph of the losses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.engine.graphs import is_compiled, reached_leaves, reached_nodes
from equipoise.engine.ranks import Ranks
from equipoise.engine.unreached import refuse_unreached
from equipoise.errors import EquipoiseError, TaskError, nearest

Shared = nn.Module | Iterable[Tensor] | Iterable[str] | str
"""How a user says what is shared: a module, parameters, or patterns of their names."""


class Partition:
    """What each task reaches: found in the graphs of the losses, remembered from step to step.

    Args:
        module: the network, whose parameters have names.
        tasks: the T task names.
        optimizer: may hold parameters that are not in the network, as those of a loss.
        shared: what is shared; None: what two or more tasks have reached so far.
        own: task name -> parameters that are known to be reached by it. If given, what two or more
            tasks reach is shared besides `shared`.
        losses: task name -> loss, which may hold parameters; None: not known.

    Raises:
        ValueError: `shared` names no parameter of the network (names the nearest), or the tasks are
            no list of different names.
    """

    def __init__(
        self,
        module: nn.Module,
        tasks: Iterable[str],
        optimizer: torch.optim.Optimizer | None,
        shared: Shared | None,
        own: Mapping[str, Iterable[Tensor]] | None = None,
        losses: Any = None,
    ) -> None:
        self.tasks = _checked(tasks)
        self._module, self._optimizer, self._losses = module, optimizer, losses
        self.names: dict[Tensor, str] = {}
        self._name()
        chosen = None if shared is None else _chosen(module, shared, self.names)
        self.given = None if chosen is None else list(chosen)
        self._common_too = own is not None or shared is None
        # Bit i: task i reaches it.
        known = {} if own is None else own
        self._reached = {p: 1 << self.tasks.index(t) for t, some in known.items() for p in some}
        self._sort()

    # ------------------------------------------------------------------ what has been found

    def _sort(self) -> None:
        order = [p for p in self.names if p.requires_grad]
        reached = self._reached
        common = {p for p in order if self._common_too and reached.get(p, 0).bit_count() > 1}
        chosen = common.union(self.given or ())
        self.shared = [p for p in order if p in chosen]
        excluded = set(self.shared)
        own = [p for p in order if p in reached and p not in excluded]
        self._own = [[p for p in own if reached[p] >> i & 1] for i in range(len(self.tasks))]
        self._trained = self._trained_now()

    def own(self, task: str) -> list[Tensor]:
        """The parameters that follow this task's loss alone, or together with other tasks'."""
        return self._own[self.tasks.index(task)]

    def refuse_common(self, user: str, compiled: bool) -> None:
        """Refuse a parameter outside `shared` that several tasks reach, for the sake of a stage.

        Args:
            user: the stage.
            compiled: whether it may be a compiled part alone that makes it so.

        Raises:
            EquipoiseError: there is one; names it and the tasks.
        """
        excluded = set(self.shared)
        for p, mask in self._reached.items():
            if mask.bit_count() > 1 and p not in excluded and p.requires_grad:
                tasks = [repr(t) for i, t in enumerate(self.tasks) if mask >> i & 1]
                raise EquipoiseError(
                    f"parameter {self.names[p]!r} is reached by tasks {' and '.join(tasks)} but is "
                    f"not in `shared`, and {user} needs to know whose it is. "
                    + (
                        "Compile what is shared and each task's own part apart, or add it to "
                        "`shared`."
                        if compiled
                        else "Add it to `shared`, or leave `shared` out."
                    )
                )

    def reached(self) -> dict[Tensor, list[str]]:
        """The parameters that have been reached, each with the tasks that have reached it."""
        found = self._reached.items()
        return {p: [t for i, t in enumerate(self.tasks) if mask >> i & 1] for p, mask in found}

    # ------------------------------------------------------------------ finding

    def update(self, losses: Mapping[str, Tensor], ranks: Ranks) -> None:
        """Take note of what the graphs of this step's losses reach, on all processes.

        Args:
            losses: task name -> loss with its graph, of this process.
            ranks: the processes that train together.
        """
        leaves = reached_leaves(list(losses.values()))
        if any(leaf not in self.names for leaf in leaves):
            self._name()  # the network or the optimizer may hold more than before
            if self._optimizer is None:
                self._refuse_strangers(leaves, list(losses))
        found = self._reached.copy()
        for leaf, mask in leaves.items():
            if leaf in self.names:  # else it is an input, or of a network that nobody trains here
                found[leaf] = found.get(leaf, 0) | self._by_position(mask, losses)
        changed = found != self._reached or self._trained != self._trained_now()
        if not ranks.alone:
            changed = float(ranks.sum(torch.tensor(float(changed), device="cpu"))) > 0
            if changed:
                self._name()
                found = self._of_all(found, ranks)
        if changed:
            if self.given is None:
                _refuse_compiled(losses)
            self._reached = found
            self._sort()
            refuse_unreached(self.given, found, len(self.tasks))

    def _refuse_strangers(self, leaves: Mapping[Tensor, int], tasks: Sequence[str]) -> None:
        """Refuse parameters of which no optimizer says whether they are trained."""
        for leaf, mask in leaves.items():
            if isinstance(leaf, nn.Parameter) and leaf not in self.names:
                raise TaskError(
                    tasks[(mask & -mask).bit_length() - 1],
                    f"loss reaches a parameter of shape {tuple(leaf.shape)} outside the network, "
                    "whose gradient would be dropped. Give the Step the optimizer that holds it, "
                    "put it into the network, or freeze it with requires_grad_(False).",
                )

    def _name(self) -> None:
        """Name all parameters of the network, and those that only the optimizer holds."""
        for name, p in self._module.named_parameters():
            self.names.setdefault(p, name)
        for name, p in outside(self._module, self._optimizer, self._losses).items():
            self.names.setdefault(p, name)

    def _trained_now(self) -> list[bool]:
        return [p.requires_grad for p in self.names]

    def _by_position(self, mask: int, losses: Mapping[str, Tensor]) -> int:
        """Bits in the order of this step's losses, put where the tasks have them."""
        return sum(1 << self.tasks.index(t) for i, t in enumerate(losses) if mask >> i & 1)

    def _of_all(self, found: dict[Tensor, int], ranks: Ranks) -> dict[Tensor, int]:
        """What the tasks reach in any of the processes, which hold the same parameters."""
        n_tasks = len(self.tasks)
        bits = torch.tensor(
            [[float(found.get(p, 0) >> i & 1) for i in range(n_tasks)] for p in self.names],
            device="cpu",
        )
        masks = [
            sum(1 << i for i, count in enumerate(row) if count) for row in ranks.sum(bits).tolist()
        ]
        return {p: mask for p, mask in zip(self.names, masks, strict=True) if mask}

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Parameter name -> the names of the tasks that have reached it."""
        return {self.names[p]: tasks for p, tasks in self.reached().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            KeyError: a parameter or a task that is not here.
        """
        by_name = {name: p for p, name in self.names.items()}
        self.put_back(
            {
                by_name[name]: sum(1 << self.tasks.index(t) for t in tasks)
                for name, tasks in state.items()
            }
        )

    def found(self) -> dict[Tensor, int]:
        """What has been found, to be given to `put_back`; never changed in place."""
        return self._reached

    def put_back(self, found: dict[Tensor, int]) -> None:
        """Forget what was found since."""
        self._reached = found
        self._sort()


def _refuse_compiled(losses: Mapping[str, Tensor]) -> None:
    """Raise TaskError where a compiled part hides which loss reaches which parameter in it."""
    names = list(losses)
    for node, mask in reached_nodes(list(losses.values())).items():
        if mask.bit_count() > 1 and is_compiled([type(node)]):
            raise TaskError(
                names[(mask & -mask).bit_length() - 1],
                "its graph has a compiled part, which does not show what each task reaches in it. "
                "Say what is shared by `shared=`.",
            )


def outside(
    module: nn.Module, optimizer: torch.optim.Optimizer | None, losses: Any = None
) -> dict[str, Tensor]:
    """The parameters that the optimizer holds and the network does not, as those of a loss.

    Args:
        module: the network.
        optimizer: None: somebody else has it, who may train all that a loss holds.
        losses: task name -> loss; anything else holds nothing.
    """
    inside = set(module.parameters())
    if optimizer is None:
        return {
            f"parameter {name!r} of the loss of {task!r}": p
            for task, loss in (losses.items() if isinstance(losses, Mapping) else ())
            if isinstance(loss, nn.Module)
            for name, p in loss.named_parameters()
            if p not in inside
        }
    return {
        f"optimizer parameter {i} of group {g}": p
        for g, group in enumerate(optimizer.param_groups)
        for i, p in enumerate(group["params"])
        if p not in inside
    }


def _checked(tasks: Iterable[str]) -> tuple[str, ...]:
    """The names of the tasks."""
    names = tuple(tasks)
    unlike = len(set(names)) == len(names) > 0 and all(isinstance(name, str) for name in names)
    if isinstance(tasks, str) or not unlike:
        raise ValueError(
            f"the tasks are {tasks!r}; give a list of different names, or a dict, name -> loss."
        )
    return names


def _chosen(module: nn.Module, shared: Shared, names: Mapping[Tensor, str]) -> set[Tensor]:
    """The parameters that `shared` means."""
    found: set[Tensor] = set()
    if isinstance(shared, nn.Module):
        found.update(shared.parameters())
    else:
        for part in [shared] if isinstance(shared, str) else list(shared):
            found |= _matching(module, part) if isinstance(part, str) else {part}
    if not found:
        raise ValueError("shared holds no parameter; leave it out to let the graph decide.")
    for p in found:
        if not isinstance(p, Tensor) or p not in names:
            what = f"shape {tuple(p.shape)}" if isinstance(p, Tensor) else type(p).__name__
            raise ValueError(
                f"shared holds something ({what}) that is a parameter neither of the network nor "
                "of the optimizer."
            )
    return found


def _matching(module: nn.Module, pattern: str) -> set[Tensor]:
    """Parameters whose name matches, or that belong to the submodule of that name."""
    named = dict(module.named_parameters())
    found: set[Tensor] = {
        p
        for name, p in named.items()
        if fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")
    }
    if not found:
        modules = [name for name, _ in module.named_modules() if name]
        raise ValueError(
            f"shared: no parameter is called {pattern!r}; {nearest(pattern, [*named, *modules])}"
        )
    return found
