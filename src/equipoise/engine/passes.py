"""Backward passes: how many a graph allows, and what they change besides giving gradients.

A compiled part allows one backward pass for each forward pass: its memory is used again on the way.
A part that is checkpointed (torch.utils.checkpoint) runs its forward pass again in each backward
pass, and with it moves its buffers again.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from equipoise.buffers import Buffers, copy_of_buffers, copy_of_own, differs, put_back
from equipoise.engine.graphs import (
    REENTRANT,
    is_compiled,
    kinds_below,
    reached_leaves,
    refuse_reentrant,
)
from equipoise.engine.ranks import Ranks
from equipoise.errors import EquipoiseError


@dataclass
class Findings:
    """What the first looks at the graphs of a network have shown.

    Attributes:
        tasks: whose graphs were looked at.
        compiled: whether any part is compiled.
        compiled_trunk: whether a part of the trunk is, where there is a trunk.
        moves_buffers: whether backward passes move buffers.
        silent: the layers whose buffers they move without a sign.
    """

    tasks: frozenset[str] = frozenset()
    compiled: bool = False
    compiled_trunk: bool = False
    moves_buffers: bool = False
    silent: set[nn.Module] = field(default_factory=set)

    def and_those(self, others: Findings) -> Findings:
        """These, after what earlier looks have shown is taken in."""
        self.tasks |= others.tasks
        self.compiled |= others.compiled
        self.compiled_trunk |= others.compiled_trunk
        self.moves_buffers |= others.moves_buffers
        self.silent |= others.silent
        return self


def findings_of(
    tasks: Iterable[str],
    trunk: Iterable[Tensor],
    losses: Iterable[Tensor | None],
    ranks: Ranks,
    suspect: nn.Module | None = None,
) -> Findings:
    """What the graphs of some tasks show.

    Args:
        tasks: the same in all processes.
        trunk: the outputs of the trunk, at which the graphs of the losses end; none: they do not.
        losses: of this process.
        ranks: the processes that train together.
        suspect: the network, if torch has warned that a checkpoint in it loses gradients.

    Raises:
        EquipoiseError: a part with parameters to train is checkpointed in the reentrant way.
    """
    with ranks.agreeing():
        outputs, known = list(trunk), [v for v in losses if v is not None]
        below_features, above = kinds_below(outputs), kinds_below(known)
        refuse_reentrant(below_features | above)
        if suspect is not None:
            reached = reached_leaves([*outputs, *known])
            if any(p.requires_grad and p not in reached for p in suspect.parameters()):
                raise EquipoiseError(REENTRANT)
    here = [is_compiled(below_features), is_compiled(above)]
    in_trunk, elsewhere = (
        ranks.sum(torch.tensor(here, dtype=torch.float64, device="cpu")) > 0
    ).tolist()
    return Findings(frozenset(tasks), in_trunk or elsewhere, in_trunk)


@contextmanager
def noting_cuts(watching: bool) -> Generator[list[str]]:
    """Note torch's warnings of reentrant checkpoints through which no gradient comes back.

    A checkpoint whose inputs require no gradient leaves nothing in the graph that would show it.
    """
    noted: list[str] = []
    if not watching:
        yield noted
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield noted
    for warning in caught:
        if "None of the inputs have requires_grad=True" in str(warning.message):
            noted.append(str(warning.message))
        else:  # whatever the user wants to be done with it
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )


class Passes:
    """The backward passes of one batch; together they move buffers as one backward pass would.

    Each starts from the buffers that the forward pass has left; in the end the buffers of a layer
    have the values that the first of them to move these has given them.

    Args:
        module: whose buffers.
        findings: of the network; is told what moves.
        first: whether that is still to be found out.
    """

    def __init__(self, module: nn.Module, findings: Findings, first: bool = False) -> None:
        self._module, self._findings, self._first = module, findings, first
        self._start: Buffers | None = None
        self._moved: dict[nn.Module, Buffers] = {}

    def one(self) -> AbstractContextManager[Any]:
        """For the body, which makes one backward pass."""
        watching = self._first or self._findings.moves_buffers
        return self._watched() if watching else nullcontext()

    @contextmanager
    def _watched(self) -> Generator[None]:
        if self._start is None:
            self._start = copy_of_buffers(self._module)
        elif self._moved:
            put_back(self._start)
        versions = [_version(buffer) for _, _, buffer, _ in self._start]
        yield
        signed, changed = set(), set()
        for (owner, name, buffer, value), version in zip(self._start, versions, strict=True):
            now = owner._buffers.get(name)
            if now is not buffer or _version(buffer) != version:
                signed.add(owner)
            # BatchNorm writes its statistics without a sign; looking costs a wait for the device.
            elif (self._first or owner in self._findings.silent) and differs(buffer, value):
                changed.add(owner)
        self._findings.silent |= changed - signed
        for owner in (signed | changed) - self._moved.keys():
            self._moved[owner] = copy_of_own(owner)
        for values in self._moved.values():
            put_back(values)
        self._findings.moves_buffers |= bool(self._moved)


def _version(buffer: Tensor | None) -> int:
    """Changes when the buffer is written to; buffers of inference mode do not say."""
    silent = buffer is None or is_lazy(buffer) or buffer.is_inference()
    return 0 if silent else buffer._version


def explained(error: RuntimeError) -> EquipoiseError | None:
    """What to do where autograd refuses what a network or a loss asks of it; None: not known."""
    for sign, explanation in EXPLANATIONS.items():
        if sign in str(error):
            return EquipoiseError(explanation)
    return None


ONCE_MORE = (
    "a compiled part of the network was differentiated once more than torch.compile allows: by a "
    "loss that takes gradients itself (leave what it differentiates uncompiled), or because it was "
    "compiled after the first step (build a new Step)."
)

EXPLANATIONS = {
    "backward through the graph a second time": (
        "a loss has a graph that was used before. Make the whole forward pass inside the closure, "
        "or inside trunk and heads, and do not call backward there."
    ),
    "donated buffers": ONCE_MORE,
    "does not currently support double backward": ONCE_MORE,
    "When use_reentrant=True": REENTRANT,
}
