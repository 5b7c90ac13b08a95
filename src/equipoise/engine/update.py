"""Where gradients go in the end: to the parameters, and to the optimizer that looks there."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from equipoise.engine.evaluation import Evaluation
from equipoise.engine.gradients import Gradients, added, by_parameter, clip, give, part
from equipoise.engine.learner import Learner
from equipoise.engine.network import Network
from equipoise.engine.scaling import Scaling
from equipoise.errors import CombinationError, EquipoiseError
from equipoise.linalg import entries


class Held:
    """The gradients that parameters had before a step, out of the way of its backward passes.

    Args:
        network: whose parameters they are.
        learned: those of the weighting.
        drops: whether the step takes the place of what was there; else it adds to it.

    Attributes:
        parameters: all that the step may give a gradient to.
        gradients: id of a parameter -> what was in `.grad`.

    Raises:
        EquipoiseError: as of `take`.
    """

    def __init__(self, network: Network, learned: Iterable[Tensor], drops: bool) -> None:
        self._network, self._drops = network, drops
        self.parameters: list[Tensor] = []
        self.gradients: dict[int, Tensor] = {}
        self._known: set[int] = set()  # ids, which cost less than tensors
        self.take((*network.parameters(), *learned))

    def take(self, parameters: Iterable[Tensor]) -> None:
        """Take those of further parameters, as of a loss that was found to have some.

        Raises:
            EquipoiseError: one would be dropped that no step has used, or that has been added to
                since; names its parameter. All are back then.
        """
        new: list[tuple[Tensor, Tensor]] = []
        for p in parameters:
            if id(p) not in self._known:
                self._known.add(id(p))
                self.parameters.append(p)
                gradient = p.grad
                if gradient is not None:
                    self.gradients[id(p)], p.grad = gradient, None
                    new.append((p, gradient))
        for p, gradient in new if self._drops else ():
            used = getattr(gradient, USED, None) == gradient._version
            if not used and bool(entries(gradient).any()):
                self.put_back()
                raise EquipoiseError(
                    f"{self._network.name(p)} holds a gradient from before this step, which would "
                    "be dropped. Call optimizer.zero_grad() first; or let step.backward() add to "
                    "it, or step.collect() gather micro-batches."
                )

    def put_back(self) -> None:
        """Let the parameters have them again."""
        for p in self.parameters:
            p.grad = self.gradients.get(id(p))

    def forget(self) -> None:
        """Free the memory."""
        self.gradients = {}


USED = "used_by_equipoise"
"""Name of the attribute by which a gradient says that a step has made its update with it."""


def mark_used(parameters: Iterable[Tensor]) -> None:
    """Take note that the gradients which are there now have done their work."""
    for p in parameters:
        gradient = p.grad
        if gradient is not None:
            setattr(gradient, USED, gradient._version)


@dataclass(frozen=True)
class Update:
    """The parameters of a step, and what moves them.

    Attributes:
        look: whose parameters, shared and own, are updated.
        held: what the parameters had in `.grad` before.
        optimizer: makes the update; None: nobody here.
        learner: moves the parameters of the weighting.
        scaling: the scale of the gradients.
        clip_norm: bound on the norm of the whole direction; None: none.
    """

    look: Evaluation
    held: Held
    optimizer: torch.optim.Optimizer | None
    learner: Learner
    scaling: Scaling
    clip_norm: float | None

    def __post_init__(self) -> None:
        """The look may have found parameters of losses.

        Raises:
            EquipoiseError: the gradient of one would be dropped.
        """
        self.held.take((*self.look.shared, *itertools.chain(*self.look.own)))

    def give(self, shared: Gradients, own: Sequence[Gradients], learned: Gradients) -> None:
        """Put the gradients where an optimizer looks, and call the hooks that wait for them."""
        parameters, gradients = self._all(shared, own)
        for p, gradient in zip(parameters, self.scaling.scaled(gradients), strict=True):
            p.grad = gradient
        self.learner.give(self.scaling, learned)
        for p in parameters:
            call_hooks(p)

    def step(self, shared: Gradients, own: Sequence[Gradients], learned: Gradients) -> None:
        """Let the optimizer make its step, and the weighting's parameters theirs."""
        optimizer, scaler = self.optimizer, self.scaling.scaler
        assert optimizer is not None
        self.give(shared, own, learned)
        with self.scaling.begun_again_on_error(), naming_the_closure(optimizer):
            if scaler is not None:
                scaler.unscale_(optimizer)
            self._clip()
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
        self.learner.step()
        torch.clear_autocast_cache()  # it holds half-precision copies of the old parameters

    def learn(self, learned: Gradients) -> None:
        """Step the weighting's parameters alone; the optimizer makes a step without gradients."""
        nothing: Gradients = [None] * len(self.look.shared)
        self.step(nothing, [[None] * len(own) for own in self.look.own], learned)

    def add(self, shared: Gradients, own: Sequence[Gradients], learned: Gradients) -> None:
        """Add the gradients to what was there, for somebody else's optimizer."""
        parameters, gradients = self._all(shared, own)
        if self.clip_norm is not None:
            give(parameters, gradients)
            self._clip()
            gradients = [p.grad for p in parameters]
        self.held.put_back()  # also where nothing is added
        for p, gradient in zip(parameters, self.scaling.scaled(gradients), strict=True):
            if gradient is not None:
                p.grad = gradient if p.grad is None else added(p.grad, gradient)
        self.learner.give(self.scaling, learned, add=True)
        for p in parameters:
            call_hooks(p)
        self.learner.step()
        mark_used(self.learner.own)

    def _all(self, shared: Gradients, own: Sequence[Gradients]) -> tuple[list[Tensor], Gradients]:
        return by_parameter([self.look.shared, *self.look.own], [shared, *own])

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """All that make a step."""
        return [o for o in (self.optimizer, self.learner.optimizer) if o is not None]

    def _clip(self) -> None:
        if self.clip_norm is not None:
            moved = dict.fromkeys((*self.look.shared, *itertools.chain(*self.look.own)))
            part(moved)
            clip(moved, self.clip_norm)


def call_hooks(parameter: Tensor) -> None:
    """Call the user's post-accumulate-grad hooks: autograd does not, for no pass accumulates."""
    hooks = getattr(parameter, "_post_accumulate_grad_hooks", None)
    if hooks and parameter.grad is not None:
        for hook in list(hooks.values()):
            hook(parameter)


@contextmanager
def naming_the_closure(optimizer: torch.optim.Optimizer) -> Generator[None]:
    """Say it in one sentence if an optimizer turns out to want a closure."""
    try:
        yield
    except (AssertionError, TypeError) as error:
        if "closure" not in str(error):
            raise
        raise CombinationError(
            f"Step and {type(optimizer).__name__}: its step evaluates the loss itself, by a "
            "closure. Use an optimizer that needs none."
        ) from error
