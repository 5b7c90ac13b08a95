"""A slow training step for losses that come from a closure over any network, by plain autograd.

Every gradient comes from a call of the closure of its own. Parameters are perturbed by adding and
restored from copies. Aggregation: rows (T, P) in, (P,) out; weighting: losses (T,) in, weighted
losses (T,) out. Task-based flat regions as in Algorithm 1 of arXiv 2211.13723.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Vectors = list[Tensor | None]
TINY = 1e-12  # a gradient that short has no direction


@dataclass
class Found:
    """What a step saw; vectors and matrices are of the present tasks, in their order."""

    tasks: list[str]
    losses: Tensor  # (T',)
    factors: Tensor  # (T',)
    rows: Tensor  # (T', P) gradients of the weighted losses by the shared parameters
    own: dict[str, Vectors]  # the same by each task's own parameters, where they are now
    sam: Tensor | None  # (T', P) as `rows`, from the perturbed points
    direction: Tensor  # (P,)

    @property
    def gram(self) -> Tensor:
        return self.rows @ self.rows.T


def reference_step(
    losses_of: Callable[[], Mapping[str, Tensor]],
    parameters: Iterable[nn.Parameter],
    shared: Sequence[nn.Parameter],
    own: Mapping[str, Sequence[nn.Parameter]],
    aggregate: Callable[[Tensor], Tensor],
    weighting: Callable[[Tensor], Tensor] = lambda losses: losses * 1,
    *,
    several: Sequence[nn.Parameter] = (),
    modules: Sequence[nn.Module] = (),
    aggregate_flat: Callable[[Tensor], Tensor] | None = None,
    rho: float = 0.0,
    rho_task: float | None = None,
    perturb: str = "separate",
    norm: str = "group",
    adaptive: bool = False,
    decompose: bool = True,
    mix: float = 0.5,
) -> Found:
    """Give every parameter the gradient that an optimizer should see, or None.

    `parameters` are all that the optimizer holds; `own` of each task; `several`: neither shared
    nor of one task. `modules` have the buffers that only the first call may move.
    """
    parameters = list(parameters)
    rho_task = rho if rho_task is None else rho_task
    looks = Looks(losses_of, modules)
    losses = looks.first()
    tasks, values = list(losses), torch.stack(list(losses.values())).detach()
    factors, learned = weighed(weighting, values)

    def gradient(task: str, of: Sequence[nn.Parameter]) -> Vectors:
        """Of the weighted loss, where the parameters are now."""
        if not of:
            return []
        factor = factors[tasks.index(task)]
        found = torch.autograd.grad(looks.again()[task], list(of), allow_unused=True)
        return [None if g is None else factor * g for g in found]

    clean = {t: gradient(t, shared) for t in tasks}
    clean_own = {t: gradient(t, own.get(t, ())) for t in tasks}
    rows = torch.stack([joined(shared, clean[t]) for t in tasks])
    now_own, sam = clean_own, None
    extra = (values,) if getattr(aggregate, "needs_losses", False) else ()

    if rho > 0 or rho_task > 0:
        now_own, sam_rows = {}, []
        mean = pieces(shared, rows.mean(0))
        for t in tasks:
            up: Vectors = {
                "separate": clean[t],
                "joint": clean[t],
                "joint-mean": mean,
                "samo": pieces(shared, mix * rows.mean(0) + (1 - mix) * joined(shared, clean[t])),
            }[perturb]
            of_task = list(own.get(t, ()))
            trunk_long = length(shared, up, adaptive)
            own_long = length(of_task, clean_own[t], adaptive)
            if norm == "joint":
                trunk_long = own_long = math.hypot(trunk_long, own_long)
            on_trunk = offsets(shared, up, rho, trunk_long, adaptive)
            on_own = offsets(of_task, clean_own[t], rho_task, own_long, adaptive)
            if perturb == "joint":
                with moved([*shared, *of_task], [*on_trunk, *on_own]):
                    both = gradient(t, [*shared, *of_task])
                    row, now_own[t] = both[: len(shared)], both[len(shared) :]
            else:
                with moved(shared, on_trunk):
                    row = gradient(t, shared)
                with moved(of_task, on_own):
                    now_own[t] = gradient(t, of_task)
            sam_rows.append(joined(shared, row))
        sam = torch.stack(sam_rows)

    if sam is None or (rho == 0 and perturb != "joint"):
        direction = aggregate(rows, *extra)
    elif not decompose:
        direction = aggregate(sam, *extra)
    else:
        second = deepcopy(aggregate) if aggregate_flat is None else aggregate_flat
        direction = aggregate(rows, *extra) + second(sam - rows, *extra)

    for p in parameters:
        p.grad = None
    for k, (p, piece) in enumerate(zip(shared, pieces(shared, direction), strict=True)):
        p.grad = piece.clone() if any(clean[t][k] is not None for t in tasks) else None
    for t in tasks:
        for p, g in zip(own.get(t, ()), now_own[t], strict=True):
            p.grad = g
    for p, g in zip(several, summed(gradient(t, several) for t in tasks), strict=True):
        p.grad = g
    for p, g in learned:
        p.grad = g
    return Found(tasks, values, factors, rows, now_own, sam, direction)


class Looks:
    """Calls a closure again and again, always with the draws and buffers of its first call."""

    def __init__(
        self, losses_of: Callable[[], Mapping[str, Tensor]], modules: Sequence[nn.Module]
    ) -> None:
        self.losses_of = losses_of
        self.modules = modules

    def first(self) -> Mapping[str, Tensor]:
        self.random, self.buffers = torch.get_rng_state(), self.copies()
        return self.losses_of()

    def again(self) -> Mapping[str, Tensor]:
        random, buffers = torch.get_rng_state(), self.copies()
        self.put_back(self.buffers)
        torch.set_rng_state(self.random)
        losses = self.losses_of()
        self.put_back(buffers)
        torch.set_rng_state(random)
        return losses

    def copies(self) -> list[dict[str, Tensor]]:
        return [{n: b.clone() for n, b in m.named_buffers()} for m in self.modules]

    def put_back(self, copies: list[dict[str, Tensor]]) -> None:
        for module, values in zip(self.modules, copies, strict=True):
            for name, buffer in module.named_buffers():
                buffer.data.copy_(values[name])  # past autograd, whose graph may hold it


def weighed(
    weighting: Callable[[Tensor], Tensor], values: Tensor
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Give the factor of each loss, and what the weighting itself learns."""
    values = values.clone().requires_grad_()
    learned = list(weighting.parameters()) if isinstance(weighting, nn.Module) else []
    factors, *found = torch.autograd.grad(weighting(values).sum(), (values, *learned))
    return factors, list(zip(learned, found, strict=True))


def length(parameters: Sequence[Tensor], gradients: Vectors, adaptive: bool) -> float:
    """Give the norm of g, or of |w| g."""
    total = 0.0
    for p, g in zip(parameters, gradients, strict=True):
        if g is not None:
            total += float(((p.detach().abs() * g if adaptive else g) ** 2).sum())
    return math.sqrt(total)


def offsets(
    parameters: Sequence[Tensor], gradients: Vectors, rho: float, long: float, adaptive: bool
) -> Vectors:
    """Give rho g / |g|, or rho w^2 g / ||w| g|; None for what stays."""
    if long <= TINY:
        return [None] * len(parameters)
    return [
        None if g is None else rho * (p.detach() ** 2 * g if adaptive else g) / long
        for p, g in zip(parameters, gradients, strict=True)
    ]


@contextmanager
def moved(parameters: Sequence[Tensor], by: Vectors) -> Generator[None]:
    """Add the offsets in the body; afterwards the parameters are what they were."""
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, offset in zip(parameters, by, strict=True):
            if offset is not None:
                p += offset
    yield
    with torch.no_grad():
        for p, value in zip(parameters, before, strict=True):
            p.copy_(value)


def joined(parameters: Sequence[Tensor], gradients: Vectors) -> Tensor:
    """Give one vector, zeros where nothing reaches."""
    parts = [torch.zeros(0, dtype=torch.float64)]
    for p, g in zip(parameters, gradients, strict=True):
        parts.append((torch.zeros_like(p) if g is None else g).detach().reshape(-1))
    return torch.cat(parts)


def pieces(parameters: Sequence[Tensor], vector: Tensor) -> list[Any]:
    """Cut a vector into the shapes of the parameters."""
    found = vector.split([p.numel() for p in parameters])
    return [piece.view_as(p) for p, piece in zip(parameters, found, strict=True)]


def summed(each: Iterable[Vectors]) -> Vectors:
    """Add up, parameter by parameter; None where nothing reaches."""
    each = list(each)
    known = [[g for g in of_one if g is not None] for of_one in zip(*each, strict=True)]
    return [sum(found[1:], found[0]) if found else None for found in known]
