"""What modules keep from batch to batch: buffers, and tensors in plain attributes.

A recurrent network may hold its state as `self.h = h.detach()`. Which attributes move is found out
once for each network, by a comparison of all of them before and after a first forward pass; where
none does, later batches do not look for them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

# ----------------------------------------------------------------------------------- buffers

Buffers = list[tuple[nn.Module, str, Tensor | None, Tensor | None]]


def copy_of_buffers(module: nn.Module) -> Buffers:
    """Every buffer with a copy of its value: (owner, name, buffer, value)."""
    owners = [owner for owner in module.modules() if owner._buffers]
    return [saved for owner in owners for saved in copy_of_own(owner)]


def copy_of_own(owner: nn.Module) -> Buffers:
    """As `copy_of_buffers`, without those of submodules."""
    return [(owner, name, buffer, _copied(buffer)) for name, buffer in owner._buffers.items()]


def differs(buffer: Tensor | None, value: Tensor | None) -> bool:
    """Whether a buffer has another value than it had when it was copied; reads from the device."""
    if buffer is None or value is None or is_lazy(buffer) or buffer.layout != torch.strided:
        return False
    return not torch.equal(_memory(buffer), value)


def put_back(saved: Buffers) -> None:
    """Give each owner its buffer back, with the value that it had."""
    for owner, name, buffer, value in saved:
        if buffer is not None and value is not None:
            _write(buffer, value)
        if name not in owner._buffers or owner._buffers[name] is not buffer:
            setattr(owner, name, buffer)


def _copied(buffer: Tensor | None) -> Tensor | None:
    """A copy; None where there is no value yet."""
    return None if buffer is None or is_lazy(buffer) else _memory(buffer).clone()


def _memory(tensor: Tensor) -> Tensor:
    """A view of a tensor in which no two elements lie at the same place."""
    if tensor.layout != torch.strided or tensor.is_contiguous():
        return tensor
    sizes, strides = tensor.shape, tensor.stride()
    if 0 in strides:  # made by `expand`
        tensor = tensor[tuple(slice(0, 1) if s == 0 else slice(None) for s in strides)]
        sizes, strides = tensor.shape, tensor.stride()
    end = 1
    for stride, size in sorted(zip(strides, sizes, strict=True)):
        if size > 1 and stride < end:  # windows that overlap, made by `unfold`
            span = 1 + sum(s * (n - 1) for s, n in zip(strides, sizes, strict=True))
            return tensor.as_strided((span,), (1,))
        end += stride * (size - 1)
    return tensor


def _write(tensor: Tensor, value: Tensor) -> None:
    # Through .data: a graph that holds the tensor must still be able to go backward.
    _memory(tensor.data).copy_(value)


# ------------------------------------------------------------------------- plain attributes

_ABSENT: Any = object()
_INTERNAL = frozenset(nn.Module().__dict__)
_known: WeakKeyDictionary[nn.Module, list[tuple[ref[nn.Module], str]]] = WeakKeyDictionary()


class Attributes:
    """The tensors that a network holds in plain attributes, as they are now.

    Only those that are known to move, once `found` was called for the network. Parameters do not
    count, nor do tensors inside of other objects than tuples, lists, deques and dicts. A list that
    grows is a log, and goes on growing.

    Args:
        module: the network.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        known = _known.get(module)
        self._all: dict[nn.Module, dict[str, Any]] | None = None
        self._values: list[tuple[nn.Module, str, _Value]] = []
        if known is None:
            self._all = {owner: dict(owner.__dict__) for owner in module.modules()}
            self._values = [(owner, name, _Value(value)) for owner, name, value in _held(module)]
        elif known:
            owners = ((owner(), name) for owner, name in known)
            self._values = [
                (owner, name, _Value(owner.__dict__.get(name, _ABSENT)))
                for owner, name in owners
                if owner is not None
            ]

    def __bool__(self) -> bool:
        return bool(self._values) or self._all is not None

    def found(self, final: bool) -> None:
        """The network has made its forward pass: from now on it is about what has moved in it.

        Args:
            final: whether it is known from now on which attributes move; False: the next batch
                looks for more.
        """
        if self._all is None:
            return
        before = {(owner, name): value for owner, name, value in self._values}
        moved = {
            (owner, name): value
            for (owner, name), value in before.items()
            if not value.same(owner.__dict__.get(name, _ABSENT))
        }
        moved |= {(o, n): _Value(old) for o, n, old in self._new(self._all)}
        self._values = [(*key, value) for key, value in moved.items()]
        self._all = None
        for root in (self.module, *self.module.children()) if final else ():
            inside = set(root.modules())
            _known[root] = [(ref(owner), name) for owner, name in moved if owner in inside]

    def put_back(self, within: nn.Module | None = None) -> None:
        """Give the owners their attributes back; with `within` only those inside that module."""
        if not self:
            return
        owners = None if within is None else set(within.modules())
        for owner, name, old in () if self._all is None else self._new(self._all):
            _give(owner, name, old)
        for owner, name, value in self._values:
            if owners is None or owner in owners:
                _give(owner, name, value.restored())

    def _new(self, known: dict[nn.Module, dict[str, Any]]) -> Iterable[tuple[nn.Module, str, Any]]:
        """Attributes that hold a tensor now and did not, each with what it was before."""
        for owner, name, value in _held(self.module):
            if owner in known and _holds(value, empty=False):
                old = known[owner].get(name, _ABSENT)
                if not _holds(old):
                    yield owner, name, old


def search_again(module: nn.Module) -> None:
    """Look for attributes that move at the next batch, as if the network were new."""
    for root in (module, *module.children()):
        _known.pop(root, None)


class Search:
    """Looks for the attributes of a network that move, for as long as parts of it may be new.

    Args:
        module: the network.
        tasks: the names of those that have parts of their own.
    """

    def __init__(self, module: nn.Module, tasks: Iterable[str]) -> None:
        self._module = module
        self._unseen = set(tasks)
        self._left = 20  # steps in which it searches, unless all tasks are seen before

    def begin(self) -> Attributes:
        """What the network holds before the forward pass of a batch."""
        if self._left > 0:
            search_again(self._module)
        return Attributes(self._module)

    def end(self, start: Attributes, seen: Iterable[str]) -> None:
        """The forward pass was made.

        Args:
            start: what `begin` gave.
            seen: the tasks that took part.
        """
        searched, before = self._left > 0, len(self._unseen)
        self._unseen -= {*seen} if self._unseen else set()
        new = len(self._unseen) < before
        if searched:
            self._left = self._left - 1 if self._unseen else 0
        elif new:
            self._left = 1  # one step late, rather than to search in all steps
        start.found(final=self._left == 0)


def _give(owner: nn.Module, name: str, value: Any) -> None:
    # Not by setattr, which a module may have overridden.
    if value is _ABSENT:
        owner.__dict__.pop(name, None)
    elif owner.__dict__.get(name, _ABSENT) is not value:
        owner.__dict__[name] = value


def _held(module: nn.Module) -> Iterable[tuple[nn.Module, str, Any]]:
    """Plain attributes that hold tensors, or containers that may be filled with some."""
    for owner in module.modules():
        for name, value in list(owner.__dict__.items()):
            if name not in _INTERNAL and _holds(value):
                yield owner, name, value


def _holds(value: Any, empty: bool = True) -> bool:
    """Whether a value is a tensor or holds one; `empty`: or may be filled with some."""
    if isinstance(value, Tensor):
        plain = value.layout == torch.strided and not (value.is_quantized or value.is_nested)
        return plain and not isinstance(value, nn.Parameter)
    if isinstance(value, list | deque | dict) and not value:
        return empty
    if isinstance(value, tuple | list | deque):
        return any(_holds(v, empty) for v in value)
    return type(value) is dict and any(_holds(v, empty) for v in value.values())


class _Value:
    """The value of an attribute, copied so far that it can be given back."""

    __slots__ = ("copy", "parts", "value")

    def __init__(self, value: Any) -> None:
        self.value, self.copy, self.parts = value, None, None
        if isinstance(value, Tensor):
            if value.grad_fn is not None:
                self.value = value.detach()  # of a batch that is over: do not keep its graph
            elif _holds(value) and not (value.requires_grad or value.is_inference()):
                self.copy = _memory(value).clone()
        elif isinstance(value, tuple | list | deque):
            self.parts = [_Value(v) for v in value]
        elif type(value) is dict:
            self.parts = {key: _Value(v) for key, v in value.items()}

    def same(self, now: Any) -> bool:
        """Whether `now` is what it was, to the last bit."""
        value = self.value
        if not (_holds(value, empty=False) or _holds(now, empty=False)):
            return True  # no tensor, before or now
        if now is not value:
            return False
        if isinstance(value, Tensor):
            return self.copy is None or _equal(self.copy, _memory(now))
        if isinstance(self.parts, list):
            grows = len(now) > len(self.parts) and isinstance(now, list)  # a log
            return (grows or len(now) == len(self.parts)) and all(
                part.same(n) for part, n in zip(self.parts, now, strict=False)
            )
        if isinstance(self.parts, dict):
            return now.keys() == self.parts.keys() and all(
                part.same(now[key]) for key, part in self.parts.items()
            )
        return True

    def restored(self) -> Any:
        """The value as it was."""
        value = self.value
        if self.copy is not None:
            _write(value, self.copy)
        elif isinstance(self.parts, list):
            parts = [part.restored() for part in self.parts]
            if isinstance(value, deque):
                value.clear()
                value.extend(parts)
            elif isinstance(value, list):
                value[:] = parts
            elif any(a is not b for a, b in zip(parts, value, strict=True)):
                return type(value)(parts) if type(value) is tuple else value
        elif isinstance(self.parts, dict):
            value.clear()
            value.update({key: part.restored() for key, part in self.parts.items()})
        return value


def _equal(one: Tensor, other: Tensor) -> bool:
    same = one == other
    return bool((same | (one != one) & (other != other)).all())


def whole_of(model: nn.Module, losses: Iterable[Any]) -> nn.Module:
    """The network, together with the losses that are modules and may keep something in them."""
    kept = [
        loss
        for loss in losses
        if isinstance(loss, nn.Module)
        and any(type(part).__module__ != "torch.nn.modules.loss" for part in loss.modules())
    ]
    return nn.ModuleList([model, *kept]) if kept else model
