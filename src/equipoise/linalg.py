"""Inner products and norms of gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 20
"""Numbers that are held in double precision at a time."""
UNSEEN = 1e-4
"""Round-off of a direction, over its length, that is not worth a second pass over the rows."""


def gram_matrix(rows: Tensor) -> Tensor:
    """All inner products of the rows.

    Products of single-precision rows overflow at 1e19 and vanish at 1e-23, and a TF32 setting
    of the user's would cost half the digits; so the products are formed in float64, a slice of
    columns at a time.

    Args:
        rows: (T, P) of any floating dtype.

    Returns:
        (T, T) float64 (float32 where the device knows no float64) on the device of `rows`.
    """
    rows = rows.detach()
    dtype = torch.float32 if rows.device.type == "mps" else torch.float64
    if rows.numel() <= CHUNK:
        piece = rows.to(dtype)
        return piece @ piece.T
    gram = torch.zeros(len(rows), len(rows), dtype=dtype, device=rows.device)
    for piece in rows.split(max(1, CHUNK // max(1, len(rows))), dim=1):
        piece = piece.to(dtype)
        gram.addmm_(piece, piece.T)
    return gram


def combine_rows(rows: Tensor, coefficients: Tensor, gram: Tensor) -> Tensor:
    """The direction rows^T w, precise even where large coefficients cancel.

    In the precision of the rows the sum has an error of about eps sqrt(T) sum |w_i| n_i, with n_i
    the lengths of the rows. Where that exceeds 1e-4 of the length of the direction, which the
    Gram matrix tells beforehand, the sum is formed in float64, a slice of columns at a time.

    Args:
        rows: (T, P) of any floating dtype, on any device.
        coefficients: (T,) the w.
        gram: (T, T) inner products of the rows; best on the CPU, where reading it costs no wait.

    Returns:
        (P,) of the dtype and on the device of `rows`.
    """
    w = coefficients.detach().to("cpu", torch.float64).numpy()
    products = gram.detach().to("cpu", torch.float64).numpy()
    size = float(np.abs(w) @ np.sqrt(products.diagonal().clip(0)))
    length = math.sqrt(max(float(w @ products @ w), 0.0))
    error = torch.finfo(rows.dtype).eps * math.sqrt(len(w)) * size
    exact = rows.dtype == torch.float64 or rows.device.type == "mps"  # which knows no float64
    if exact or error <= UNSEEN * length:
        return coefficients.to(rows) @ rows
    factors = coefficients.to(rows.device, torch.float64)
    direction = torch.empty_like(rows[0])
    step = max(1, CHUNK // max(1, len(rows)))
    for start in range(0, rows.shape[1], step):
        piece = slice(start, start + step)
        direction[piece] = factors @ rows[:, piece].to(torch.float64)
    return direction


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """A copy of each dense tensor, detached and of its shape: one launch a dtype and device."""
    found = list(tensors)
    groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for i, tensor in enumerate(tensors):
        groups.setdefault((tensor.dtype, tensor.device), []).append(i)
    for group in groups.values():
        flat = torch.cat([tensors[i].detach().reshape(-1) for i in group])
        pieces = flat.split([tensors[i].numel() for i in group])
        for i, piece in zip(group, pieces, strict=True):
            found[i] = piece.view(tensors[i].shape)
    return found


def real(tensor: Tensor) -> Tensor:
    """The same numbers as real ones: a view (..., 2) of a complex tensor, others as they are.

    Parameters that are complex are trained as the pairs of real numbers that they are: products of
    gradients are `Re <g_i, g_j>`.
    """
    if not tensor.is_complex():
        return tensor
    tensor = tensor.to_dense() if tensor.is_sparse else tensor
    return torch.view_as_real(tensor.resolve_conj())


def shaped(numbers: Tensor, like: Tensor) -> Tensor:
    """Real numbers in the shape of a tensor: a view, but a copy for one that is complex."""
    if not like.is_complex():
        return numbers.view_as(like)
    return torch.view_as_complex(numbers.reshape(*like.shape, 2).clone())


def entries(gradient: Tensor) -> Tensor:
    """The numbers of a gradient, of a sparse one those that it holds."""
    return real(gradient.coalesce().values() if gradient.is_sparse else gradient)


def finite_norm(gradients: Iterable[Tensor | None]) -> float | None:
    """The Euclidean norm of all gradients together; None if an entry is NaN or infinite.

    One pass, unless the norm of finite entries overflows.
    """
    found = [entries(g) for g in gradients if g is not None]
    norm = float(torch.nn.utils.get_total_norm(found)) if found else 0.0
    finite = math.isfinite(norm) or all(bool(g.isfinite().all()) for g in found)
    return norm if finite else None


def inner_products(rows: Tensor, vector: Tensor) -> Tensor:
    """(T,) products of the rows (T, P) with a vector (P,), formed as in `gram_matrix`."""
    dtype = torch.float32 if rows.device.type == "mps" else torch.float64
    found = torch.zeros(len(rows), dtype=dtype, device=rows.device)
    step = max(1, CHUNK // max(1, len(rows)))
    for start in range(0, rows.shape[1], step):
        piece = slice(start, start + step)
        found.addmv_(rows[:, piece].detach().to(dtype), vector[piece].detach().to(dtype))
    return found


def inner(a: Iterable[Tensor | None], b: Iterable[Tensor | None]) -> Tensor:
    """The product of two vectors given in pieces, None for zeros: a scalar formed in float64."""
    found = []
    for x, y in zip(a, b, strict=True):
        if x is not None and y is not None:
            x, y = _aligned(x, y)
            found.append(inner_products(x.reshape(1, -1), y.reshape(-1)))
    if not found:
        return torch.zeros((), dtype=torch.float64, device="cpu")
    return torch.cat(found).sum()


def _aligned(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers of two gradients of one parameter that meet in their product."""
    if y.is_sparse:
        x, y = y, x.to_dense() if x.is_sparse else x
    if x.is_sparse:
        x = x.coalesce()
        x, y = x.values(), y[tuple(x.indices())]
    return real(x), real(y)


def on_host(scalars: Sequence[Tensor]) -> Tensor:
    """Scalars as one float64 vector on the CPU, in one copy where they lie together."""
    if len({scalar.device for scalar in scalars}) > 1:
        scalars = [scalar.cpu() for scalar in scalars]
    return torch.stack(list(scalars)).to("cpu", torch.float64)


def length(pieces: Iterable[Tensor]) -> float:
    """The Euclidean norm of all pieces together, summed in float64, a slice at a time."""
    squares = [gram_matrix(entries(piece).reshape(1, -1)).reshape(()) for piece in pieces]
    return math.sqrt(float(torch.stack(squares).sum())) if squares else 0.0
