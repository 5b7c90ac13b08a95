"""From the gradients of the tasks, of parameters or of features, to one direction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from equipoise.engine.adapters import AggregatorStage, checked
from equipoise.engine.boundary import entrywise_sum, feature_gram, signed_sums, weighted_sum
from equipoise.engine.gradients import Gradients
from equipoise.engine.ranks import Ranks
from equipoise.engine.rows import Rows
from equipoise.engine.stages import Descent
from equipoise.errors import NOT_FINITE, EquipoiseError, NonFiniteError
from equipoise.linalg import inner, length, on_host


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


# ---------------------------------------------------------------------- from rows


def combine(
    rows: Rows, aggregator: AggregatorStage, losses: Tensor, descent: Descent | None = None
) -> tuple[Combination, Tensor]:
    """One direction (P,) from the filled rows; by coefficients where the aggregator has them.

    With `descent` one along which no loss grows, and the products with it.

    Raises:
        NonFiniteError: a row holds a NaN or an infinity.
        EquipoiseError: a callable returned something else than a finite direction.
    """
    # The network may run in half precision; what becomes of its gradients does not.
    with torch.autocast(rows.buffer.device.type, enabled=False):
        gram = finite(rows.gram())
        result, direction = _combine(rows, gram, aggregator, losses)
        if descent is not None:
            result.products = products(rows, gram, direction)
            if not descent.holds(result.products):
                result, direction = _combine(rows, gram, descent.instead, losses)
                result.products = products(rows, gram, direction)
                result.fallback = True
        return result, direction


def _combine(
    rows: Rows, gram: Tensor, aggregator: AggregatorStage, losses: Tensor
) -> tuple[Combination, Tensor]:
    if aggregator.coefficients is not None:
        w = _coefficients(aggregator, gram, losses, rows.buffer.dtype, rows.ranks)
        return Combination(w, gram), rows.combine(w)
    whole = rows.whole()
    direction = rows.ranks.from_first(aggregator.given(whole))
    if direction.shape != whole.shape[1:]:
        raise EquipoiseError(
            f"the aggregator returned shape {tuple(direction.shape)} for rows of shape "
            f"{tuple(whole.shape)}; it must return ({whole.shape[1]},)."
        )
    if not bool(torch.isfinite(direction).all()):
        raise EquipoiseError(
            "the aggregator returned NaN or infinity for finite gradients; look in it for a "
            "division by 0."
        )
    if direction.untyped_storage().data_ptr() == rows.buffer.untyped_storage().data_ptr():
        direction = direction.clone()  # the rows may be filled again while it is in use
    return Combination(None, gram), direction


def _coefficients(
    aggregator: AggregatorStage, gram: Tensor, losses: Tensor, dtype: torch.dtype, ranks: Ranks
) -> Tensor:
    """The aggregator's coefficients (T,), the same to the last bit on all processes."""
    assert aggregator.coefficients is not None
    w = ranks.from_first(aggregator.coefficients(gram, losses, dtype))
    return checked(w, len(gram), aggregator.name)


def finite(gram: Tensor) -> Tensor:
    """The Gram matrix; or NonFiniteError with the position of a gradient that is not finite."""
    if not math.isfinite(gram.trace()):
        good = torch.isfinite(gram.diagonal())
        raise NonFiniteError(int((~good).nonzero()[0]), NOT_FINITE)
    return gram


def products(rows: Rows, gram: Tensor, direction: Tensor, of: Tensor | None = None) -> Tensor:
    """(T,) products of rows with a direction (P,), float64 on the CPU.

    Args:
        rows: the buffer.
        gram: of the rows.
        direction: the direction.
        of: the rows themselves, if they are no longer in the buffer.
    """
    found = rows.products(direction, of)
    return without_noise(found, gram, length([direction]), direction.dtype)


def without_noise(products: Tensor, gram: Tensor, norm: float, dtype: torch.dtype) -> Tensor:
    """Products (T,) with a direction of that norm; negative ones that are round-off become 0."""
    noise = 8 * torch.finfo(dtype).eps * norm * gram.diagonal().sqrt()
    return products.masked_fill((products < 0) & (products >= -noise), 0.0)


# ---------------------------------------------------------------------- from features


@dataclass(frozen=True)
class FeatureGradients:
    """What T heads sent back to the features.

    Attributes:
        sent_back: for each task a gradient for each output; empty if there is no output.
        outputs: the outputs of the trunk through which gradients reach it.
        factors: (T,) what multiplies each task's gradients.
        ranks: the processes that train together.
        scale: what `sent_back` has been multiplied by, so that it does not vanish.
    """

    sent_back: Sequence[Gradients]
    outputs: Sequence[Tensor]
    factors: Tensor
    ranks: Ranks
    scale: float = 1.0

    def gram(self) -> Tensor:
        """(T, T) inner products, float64 on the CPU."""
        n_tasks = len(self.factors)
        if not self.outputs:
            return torch.zeros(n_tasks, n_tasks, dtype=torch.float64, device="cpu")
        gram = self.ranks.sum(feature_gram(self.sent_back)).cpu()
        if self.scale != 1.0:
            gram = gram / self.scale**2
        if all(factor == 1.0 for factor in self.factors.tolist()):
            return gram
        return gram * torch.outer(self.factors, self.factors).to(gram)

    @property
    def dtype(self) -> torch.dtype:
        """That of the gradients."""
        return self.outputs[0].dtype if self.outputs else torch.float64

    def conflicts_show(self, samples_meet: bool) -> bool:
        """Whether two tasks ask for the same entry; also where fewer than two ask for anything.

        Args:
            samples_meet: whether what tasks ask is summed over the batch first.
        """
        asking = torch.zeros(len(self.factors) + 1, device="cpu")  # and last, how many outputs meet
        for column in zip(*self.sent_back, strict=True):
            asked = {k: g != 0 for k, g in enumerate(column) if g is not None}
            if samples_meet:
                asked = {k: a.any(0) if a.dim() else a for k, a in asked.items()}
            for k, a in asked.items():
                asking[k] += float(a.any())
            if asked:
                asking[-1] += float((torch.stack(list(asked.values())).sum(0) > 1).any())
        *tasks, meet = self.ranks.sum(asking).tolist()
        return meet > 0 or sum(count > 0 for count in tasks) < 2

    def weighted(self, w: Tensor) -> Gradients:
        """For each output the sum over tasks of w_k times the gradient of task k."""
        return weighted_sum(self.sent_back, (w * self.factors)[: len(self.sent_back)])

    def combine(
        self, aggregator: AggregatorStage, losses: Tensor, descent: Descent | None = None
    ) -> tuple[Combination, Gradients]:
        """One gradient for each output of the trunk.

        By coefficients (T,), or for an aggregator with `entry_weights` by the weights (T, F) that
        it makes of what the tasks ask of each feature, summed over the batch and counted positive
        where it makes the feature larger in size. With `descent` one along which no loss grows,
        and the products with it.

        Raises:
            NonFiniteError: a gradient is NaN or infinite.
        """
        gram = finite(self.gram())
        result, together = self._combine(gram, aggregator, losses)
        if descent is not None:
            result.products = self._products(result, together)
            if not descent.holds(result.products):
                result, together = self._combine(gram, descent.instead, losses)
                result.products = self._products(result, together)
                result.fallback = True
        return result, together

    def _combine(
        self, gram: Tensor, aggregator: AggregatorStage, losses: Tensor
    ) -> tuple[Combination, Gradients]:
        if aggregator.coefficients is not None:
            w = _coefficients(aggregator, gram, losses, self.dtype, self.ranks)
            return Combination(w, gram), self.weighted(w)
        assert aggregator.entry_weights is not None
        weights = []
        for total in signed_sums(self.sent_back, self.outputs):
            factors = self.factors.to(total).view(-1, *[1] * (total.dim() - 1))
            evidence = self.ranks.sum(total) * factors
            passes = aggregator.entry_weights(evidence.flatten(1)).view_as(evidence)
            weights.append(passes * factors)
        return Combination(None, gram), entrywise_sum(self.sent_back, weights)

    def _products(self, result: Combination, together: Gradients) -> Tensor:
        gram, w = result.gram, result.coefficients
        assert gram is not None
        if w is None:
            each = [inner(own, together) for own in self.sent_back]
            each = each or [torch.zeros((), device="cpu")] * len(gram)
            both = self.ranks.sum(on_host([*each, inner(together, together)]))
            found, square = both[:-1] * self.factors, float(both[-1])
        else:
            found = gram @ w.to(gram)
            square = max(float(w.to(gram) @ found), 0.0)
        return without_noise(found, gram, math.sqrt(square), self.dtype)
