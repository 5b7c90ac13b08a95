"""From the gradients of the tasks, of parameters or of features, to one direction."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from equipoise.boundary import (
    Gradients,
    entrywise_sum,
    feature_gram,
    signed_sums,
    weighted_sum,
)
from equipoise.errors import NOT_FINITE, EquipoiseError, NonFiniteError
from equipoise.linalg import inner, length, on_host
from equipoise.ranks import Ranks
from equipoise.rows import Rows


@dataclass
class Combination:
    """How task gradients became one direction.

    Attributes:
        coefficients: (T,) float64 on the CPU; None for a callable that does not say.
        gram: (T, T) float64 on the CPU; None where no inner products were needed.
        flat: the same of the second look, where there was one.
        products: (T,) float64 on the CPU, products of the tasks' gradients with the direction;
            None where no line search asked for them.
        fallback: whether the aggregator's own direction would have let a loss grow, and another
            took its place.
    """

    coefficients: Tensor | None
    gram: Tensor | None = None
    flat: Combination | None = None
    products: Tensor | None = None
    fallback: bool = False


class Descent(NamedTuple):
    """What a line search asks of a direction.

    Attributes:
        holds: products (T,) of the tasks' gradients with it -> whether it will do.
        instead: the aggregator whose direction is taken if not.
    """

    holds: Callable[[Tensor], bool]
    instead: Any


def coefficients(aggregator: Any, gram: Tensor, losses: Tensor, ranks: Ranks) -> Tensor:
    """The aggregator's coefficients (T,), the same to the last bit on all processes."""
    with_losses = (losses,) if getattr(aggregator, "needs_losses", False) else ()
    w = ranks.from_first(aggregator.coefficients(gram, *with_losses))
    if w.shape != gram.shape[:1] or not bool(torch.isfinite(w).all()):
        raise EquipoiseError(
            f"{type(aggregator).__name__}.coefficients returned {w.tolist()}; it must return one "
            f"finite number for each of the {len(gram)} tasks."
        )
    return w


def combine(
    rows: Rows, aggregator: Callable, losses: Tensor, descent: Descent | None = None
) -> tuple[Combination, Tensor]:
    """One direction (P,) from the filled rows; by coefficients where the aggregator has them.

    With `descent` one along which no loss grows, and the products with it.

    Raises:
        NonFiniteError: a row holds a NaN or an infinity.
        EquipoiseError: a callable returned something else than a finite direction.
    """
    # The network may run in half precision; what becomes of its gradients does not.
    with torch.autocast(rows.buffer.device.type, enabled=False):
        result, direction = _combine(rows, aggregator, losses)
        if descent is not None:
            result.products = products(rows, result.gram, direction)
            if not descent.holds(result.products):
                result, direction = _combine(rows, descent.instead, losses)
                result.products = products(rows, result.gram, direction)
                result.fallback = True
        return result, direction


def products(
    rows: Rows, gram: Tensor | None, direction: Tensor, of: Tensor | None = None
) -> Tensor:
    """(T,) products of rows with a direction (P,), float64 on the CPU.

    Args:
        rows: the buffer.
        gram: of the rows.
        direction: the direction.
        of: the rows themselves, if they are no longer in the buffer.
    """
    found = rows.products(direction, of)
    assert gram is not None
    return without_noise(found, gram, length([direction]), direction.dtype)


def without_noise(products: Tensor, gram: Tensor, norm: float, dtype: torch.dtype) -> Tensor:
    """Products (T,) with a direction of that norm; negative ones that are round-off become 0."""
    noise = 8 * torch.finfo(dtype).eps * norm * gram.diagonal().sqrt()
    return products.masked_fill((products < 0) & (products >= -noise), 0.0)


def _combine(rows: Rows, aggregator: Callable, losses: Tensor) -> tuple[Combination, Tensor]:
    gram = rows.gram().cpu()  # the one copy to the host
    if hasattr(aggregator, "coefficients"):
        w = coefficients(aggregator, gram, losses, rows.ranks)
        return Combination(w, gram), rows.combine(w)
    finite = torch.isfinite(gram.diagonal())
    if not bool(finite.all()):
        raise NonFiniteError(int((~finite).nonzero()[0]), NOT_FINITE)
    whole = rows.whole()
    direction = rows.ranks.from_first(aggregator(whole))
    if direction.shape != whole.shape[1:]:
        raise EquipoiseError(
            f"the aggregator returned shape {tuple(direction.shape)} for rows of shape "
            f"{tuple(whole.shape)}; it must return ({whole.shape[1]},)."
        )
    if not bool(torch.isfinite(direction).all()):
        raise EquipoiseError("the aggregator returned NaN or infinity for finite gradients.")
    if direction.untyped_storage().data_ptr() == rows.buffer.untyped_storage().data_ptr():
        direction = direction.clone()  # the rows may be filled again while it is in use
    return Combination(None, gram), direction


def combine_features(
    sent_back: Sequence[Gradients],
    outputs: Sequence[Tensor],
    aggregator: Any,
    losses: Tensor,
    ranks: Ranks,
    descent: Descent | None = None,
) -> tuple[Combination, Gradients]:
    """One gradient for each output of the trunk, from those that the T heads sent back.

    By coefficients (T,), or for an aggregator with `entry_weights` by the weights (T, F) that it
    makes of what the tasks ask of each feature, summed over the batch and counted positive where
    it makes the feature larger in size. With `descent` one along which no loss grows, and the
    products with it.
    """
    if outputs:
        gram = ranks.sum(feature_gram(sent_back)).cpu()
    else:
        gram = torch.zeros(len(losses), len(losses), dtype=torch.float64)
    result, together = _combine_features(sent_back, outputs, aggregator, losses, ranks, gram)
    if descent is not None:
        result.products = _feature_products(sent_back, result, together, ranks)
        if not descent.holds(result.products):
            result, together = _combine_features(
                sent_back, outputs, descent.instead, losses, ranks, gram
            )
            result.products = _feature_products(sent_back, result, together, ranks)
            result.fallback = True
    return result, together


def _feature_products(
    sent_back: Sequence[Gradients], result: Combination, together: Gradients, ranks: Ranks
) -> Tensor:
    gram, w = result.gram, result.coefficients
    assert gram is not None
    if w is None:
        each = [inner(own, together) for own in sent_back] or [torch.zeros(())] * len(gram)
        both = ranks.sum(on_host([*each, inner(together, together)]))
        found, square = both[:-1], float(both[-1])
    else:
        found = gram @ w.to(gram)
        square = max(float(w.to(gram) @ found), 0.0)
    dtype = next((g.dtype for g in together if g is not None), torch.float64)
    return without_noise(found, gram, math.sqrt(square), dtype)


def _combine_features(
    sent_back: Sequence[Gradients],
    outputs: Sequence[Tensor],
    aggregator: Any,
    losses: Tensor,
    ranks: Ranks,
    gram: Tensor,
) -> tuple[Combination, Gradients]:
    if hasattr(aggregator, "coefficients"):
        w = coefficients(aggregator, gram, losses, ranks)
        return Combination(w, gram), weighted_sum(sent_back, w[: len(sent_back)])
    sums = [ranks.sum(total) for total in signed_sums(sent_back, outputs)]
    weights = [aggregator.entry_weights(s.flatten(1)).view_as(s) for s in sums]
    return Combination(None, gram), entrywise_sum(sent_back, weights)


def works_on_features(aggregator: Any) -> bool:
    """Whether `combine_features` can ask this aggregator."""
    return hasattr(aggregator, "coefficients") or hasattr(aggregator, "entry_weights")
