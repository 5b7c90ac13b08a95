"""Buffers of modules: copied, compared and put back, whatever their layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from equipoise.linalg import copies

Buffers = list[tuple[nn.Module, str, Tensor | None, Tensor | None]]


def copy_of_buffers(module: nn.Module) -> Buffers:
    """Every buffer with a copy of its value: (owner, name, buffer, value)."""
    return _copied(
        [
            (owner, name, buffer)
            for owner in module.modules()
            if owner._buffers
            for name, buffer in owner._buffers.items()
        ]
    )


def copy_of_own(owner: nn.Module) -> Buffers:
    """As `copy_of_buffers`, without those of submodules."""
    return _copied([(owner, name, buffer) for name, buffer in owner._buffers.items()])


def _copied(buffers: Sequence[tuple[nn.Module, str, Tensor | None]]) -> Buffers:
    """With copies, together where they are dense; None where there is no value yet."""
    values: list[Tensor | None] = [None] * len(buffers)
    dense, places = [], []
    for i, (_, _, buffer) in enumerate(buffers):
        if buffer is None or is_lazy(buffer):
            continue
        if buffer.layout == torch.strided and not buffer.is_quantized:
            dense.append(i)
            places.append(memory(buffer))
        else:
            values[i] = buffer.clone()
    for i, value in zip(dense, copies(places), strict=True):
        values[i] = value
    return [(*kept, value) for kept, value in zip(buffers, values, strict=True)]


def differs(buffer: Tensor | None, value: Tensor | None) -> bool:
    """Whether a buffer has another value than it had when it was copied; reads from the device."""
    if buffer is None or value is None or is_lazy(buffer) or buffer.layout != torch.strided:
        return False
    return not torch.equal(memory(buffer), value)


def put_back(saved: Buffers) -> None:
    """Give each owner its buffer back, with the value that it had."""
    dense, values = [], []
    for owner, name, buffer, value in saved:
        if buffer is not None and value is not None:
            if value.layout == torch.strided and not value.is_quantized:
                # Through .data: a graph that holds the buffer must still be able to go backward.
                dense.append(memory(buffer.data))
                values.append(value)
            else:
                write(buffer, value)
        if name not in owner._buffers or owner._buffers[name] is not buffer:
            setattr(owner, name, buffer)
    if dense:
        torch._foreach_copy_(dense, values)


def memory(tensor: Tensor) -> Tensor:
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


def write(tensor: Tensor, value: Tensor) -> None:
    """Give a tensor a value that was copied from its memory."""
    # Through .data: a graph that holds the tensor must still be able to go backward.
    memory(tensor.data).copy_(value)
