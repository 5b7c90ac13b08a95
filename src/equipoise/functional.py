"""backward: aggregated gradients for a loop, a model or a graph of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from equipoise.engine.adapters import (
    AggregatorStage,
    WeightingStage,
    aggregator_stage,
    weighting_stage,
)
from equipoise.engine.boundary import through_trunk
from equipoise.engine.direction import Combination, FeatureGradients, combine
from equipoise.engine.factors import factors_of
from equipoise.engine.gradients import Gradients, added, divided, scaled
from equipoise.engine.graphs import below, is_compiled, reached_leaves, refuse_reentrant
from equipoise.engine.losses import refuse_infinite, scalar_losses
from equipoise.engine.passes import explained
from equipoise.engine.ranks import Ranks
from equipoise.engine.rows import Rows
from equipoise.engine.scaling import Scaler, Scaling, above_one, mark, scales_of
from equipoise.engine.targets import Presence
from equipoise.errors import (
    NOT_FINITE,
    TOO_LARGE,
    CombinationError,
    EquipoiseError,
    NonFiniteError,
    TaskError,
)
from equipoise.linalg import finite_norm
from equipoise.weighting import EW


def backward(
    losses: Mapping[str, Tensor] | Sequence[Tensor] | Tensor,
    shared: Iterable[nn.Parameter],
    aggregator: Callable[..., Tensor],
    features: Any = None,
    *,
    weighting: Callable[..., Tensor] | None = None,
    retain_graph: bool = False,
    scaler: Scaler | None = None,
) -> Combination:
    """Fill `.grad` as `sum(losses).backward()` would, but aggregate on the shared parameters.

    For a loop, a model or a graph of one's own; it is what a Step does without a second look, a
    line search or an update. Gradients are added to what `.grad` holds. Every other leaf that the
    losses reach (the heads' parameters) gets the gradient of the summed weighted losses. Under
    torch.distributed the losses are averaged over the processes, which should hold batches of equal
    size.

    Args:
        losses: T scalar losses: a dict by task name, a sequence, or one tensor of shape (T,).
        shared: the shared parameters.
        aggregator: an aggregator, or any callable from rows (T, P) to a direction (P,).
        features: what the shared part returned (a tensor, or nested dicts, lists and tuples), if
            all that the losses know of the shared parameters passes there. None may be computed
            from another. If given, the aggregator works at the feature level (as MGDA-UB does):
            its rows are the gradients of the features, and the shared part sees one backward
            instead of T.
        weighting: how much each loss counts, as in Step; its own parameters get a gradient, too.
            GradNorm learns in this call. None: EW.
        retain_graph: keep the graph for another backward.
        scaler: a torch.amp.GradScaler, for float16, with losses that are not scaled: they are on
            their way back, rows are formed without the scale, and `.grad` gets it again. If they
            overflow, an infinite gradient lets the scaler skip the update and lower its scale.
            Losses that `scaler.scale` has multiplied already are recognised, but only so that an
            overflow is no error: rows and losses then carry the scale. None: no scale.

    Returns:
        The Gram matrix (T, T) of the weighted losses' rows and the coefficients (T,).

    Raises:
        TaskError: a loss is not a scalar, not connected to a graph, or not finite; or with
            `features` it reaches a shared parameter without passing through them.
        NonFiniteError: a gradient is not finite. No `.grad` has changed in either case.
        EquipoiseError: no loss reaches the shared parameters, `features` is detached, or a graph
            has a part that is compiled (unless it comes before `features`) or checkpointed with
            use_reentrant=True.
        CombinationError: a callable without coefficients at the feature level, or a weighting that
            needs the losses after the update or the learning rate, which only a Step knows.

    Passes: T backwards; with `features` T through the heads and one through the shared part.
    Memory: T x P; with `features` T times their size.

    Example:
        >>> from equipoise import MGDA
        >>> trunk, heads = nn.Linear(3, 4), nn.Linear(4, 2)
        >>> left, right = heads(trunk(torch.randn(5, 3))).square().mean(0).unbind()
        >>> result = backward({"left": left, "right": right}, trunk.parameters(), MGDA())
        >>> result.coefficients.shape
        torch.Size([2])
    """
    ranks, scaling = Ranks(), Scaling(scaler, "raise")
    names, values = scalar_losses(losses)
    scaling.begin(lambda: values)
    weighs = weighting_stage(EW() if weighting is None else weighting)
    _refuse_what_only_a_step_knows(weighs)
    parameters = [p for p in shared if p.requires_grad]
    own = set(parameters)
    kinds: set[type] = set()
    leaves = reached_leaves(values, kinds=kinds)
    refuse_reentrant(kinds)
    others = [leaf for leaf in leaves if leaf not in own]
    if parameters and not own & leaves.keys():
        raise EquipoiseError(
            "no loss reaches any of the shared parameters; were the features detached?"
        )
    if features is None and (len(values) > 1 or retain_graph):
        _refuse_compiled(kinds)
    presence = Presence(names, [1.0] * len(names), ranks)
    everything, scales = (*parameters, *others, *weighs.learnable), scales_of(values)
    joint = ranks.sum(torch.stack([v.detach().to("cpu", torch.float64) for v in values]))
    joint /= ranks.size
    stage = aggregator_stage(aggregator)
    try:
        refuse_infinite(values)
        weighted = factors_of(weighs, joint, presence, None)
        values = [value / ranks.size for value in values]  # this process's part of the joint losses
        looking = _Graph(
            values, parameters, others, weighted.factors, ranks, retain_graph, scaling.now
        )
        if features is None:
            direction, rest, result = looking.by_rows(stage, joint)
        else:
            direction, rest, result = looking.by_features(stage, joint, features)
        norm = finite_norm([*direction, *rest])
        if norm is None:
            raise NonFiniteError(None, TOO_LARGE)
        scaling.refuse_overflow(norm, parameters)
    except NonFiniteError as error:
        if not (scaling.skips or above_one(scales)):
            raise (error.named(names) if isinstance(losses, Mapping) else error) from None
        mark(everything)
        return Combination(None)
    except TaskError as error:
        raise (error.named(names) if isinstance(losses, Mapping) else error) from None
    except RuntimeError as error:
        known = explained(error)
        if known is None:
            raise
        raise known from error
    found = scaling.scaled([*direction, *rest, *weighted.learned])
    for p, gradient in zip(everything, found, strict=True):
        if gradient is not None:
            p.grad = gradient if p.grad is None else added(p.grad, gradient)
    if weighs.method is not None and weighs.needs_gram:
        weighs.method.observe(joint, presence.present, result.gram)
    return result


def _refuse_what_only_a_step_knows(weighting: WeightingStage) -> None:
    method = weighting.method
    if method is not None and (method.needs_losses_after or method.needs_lr):
        what = "the losses after the update" if method.needs_losses_after else "the learning rate"
        who = weighting.name
        raise CombinationError(f"backward and {who}: {who} needs {what}. Use a Step.")


class _Graph:
    """T losses with their graph; what is asked of it are gradients.

    Args:
        losses: this process's part of the joint losses.
        parameters: the shared ones.
        others: all other leaves that the losses reach.
        factors: (T,) what multiplies each loss.
        ranks: the processes that train together.
        retain_graph: whether the graph is kept in the end.
        scale: what the losses are multiplied by on their way back.
    """

    def __init__(
        self,
        losses: list[Tensor],
        parameters: list[nn.Parameter],
        others: list[Tensor],
        factors: Tensor,
        ranks: Ranks,
        retain_graph: bool,
        scale: float,
    ) -> None:
        self.scale = scale
        self.losses, self.parameters, self.others = losses, parameters, others
        self.factors, self.ranks, self.retain_graph = factors, ranks, retain_graph

    def by_rows(
        self, aggregator: AggregatorStage, joint: Tensor
    ) -> tuple[Gradients, Gradients, Combination]:
        """One backward a task through everything."""
        rows = Rows(self.parameters, len(self.losses), self.ranks)
        rest: list[Gradients] = []
        for i in range(len(self.losses)):
            keep = self.retain_graph or i < len(self.losses) - 1
            found = divided(self._gradients(i, self.parameters, keep), self.scale)
            rows.add(found[: len(self.parameters)])
            rest.append(_finite(i, found[len(self.parameters) :]))
        rows.weigh(self.factors)
        aggregator.begin(torch.ones(len(self.losses), dtype=torch.bool, device="cpu"))
        result, direction = combine(rows, aggregator, joint)
        return rows.per_parameter(direction), self._summed(rest), result

    def by_features(
        self, aggregator: AggregatorStage, joint: Tensor, features: Any
    ) -> tuple[Gradients, Gradients, Combination]:
        """One backward a task down to the features, and one below."""
        if not aggregator.works_on_features:
            raise CombinationError(
                f"features and {aggregator.name}: features need an aggregator with "
                "coefficients(gram). Leave `features` out."
            )
        leaves = pytree.tree_leaves(features)
        outputs = [z for z in leaves if isinstance(z, Tensor) and z.requires_grad]
        if not outputs:
            raise EquipoiseError(
                "features holds no tensor that requires a gradient; give what the shared part "
                "returned, not detached."
            )
        self._refuse_ways_around(outputs)
        sent_back: list[Gradients] = []
        rest: list[Gradients] = []
        for i in range(len(self.losses)):
            found = self._gradients(i, outputs, True)
            sent_back.append(found[: len(outputs)])
            rest.append(_finite(i, divided(found[len(outputs) :], self.scale)))
        gradients = FeatureGradients(sent_back, outputs, self.factors, self.ranks, self.scale)
        aggregator.begin(torch.ones(len(self.losses), dtype=torch.bool, device="cpu"))
        result, together = gradients.combine(aggregator, joint)
        found = through_trunk(outputs, self.parameters, together, self.retain_graph)
        direction = divided(found, self.scale)
        return self.ranks.sum_gradients(direction, self.parameters), self._summed(rest), result

    def _gradients(self, i: int, first: Sequence[Tensor], keep: bool) -> Gradients:
        """Gradients of loss i by the tensors that are named, and by the other leaves."""
        of, loss = (*first, *self.others), self.losses[i]
        seed = None if self.scale == 1.0 else loss.new_tensor(self.scale)
        return list(torch.autograd.grad(loss, of, seed, retain_graph=keep, allow_unused=True))

    def _summed(self, rest: Sequence[Gradients]) -> Gradients:
        """The gradients of the summed weighted losses by the other leaves."""
        total: Gradients = [None] * len(self.others)
        for of_one in scaled(rest, self.factors):
            total = [
                new if old is None else old if new is None else added(old, new)
                for old, new in zip(total, of_one, strict=True)
            ]
        return self.ranks.sum_gradients(total, self.others)

    def _refuse_ways_around(self, outputs: Sequence[Tensor]) -> None:
        """Refuse features of which one is computed from another, and ways that avoid them all."""
        ends = {z.grad_fn for z in outputs if z.grad_fn is not None}
        children = [child for end in ends for child, _ in end.next_functions if child is not None]
        if ends & set(below(children)):
            raise EquipoiseError(
                "one of the features is computed from another, which would count twice; give only "
                "those that come first."
            )
        shared = set(self.parameters)
        kinds: set[type] = set()
        above = reached_leaves(self.losses, stop=ends, kinds=kinds)
        _refuse_compiled(kinds)
        for leaf, mask in above.items():
            if leaf in shared:
                raise TaskError(
                    (mask & -mask).bit_length() - 1,
                    f"loss reaches a shared parameter of shape {tuple(leaf.shape)} without passing "
                    "through `features`, so that part of its gradient would be lost. Leave "
                    "`features` out, or give every tensor that the heads see.",
                )


def _refuse_compiled(kinds: Iterable[type]) -> None:
    """Refuse more than one backward pass through a compiled part; features need one at least."""
    if is_compiled(kinds):
        raise EquipoiseError(
            "backward passes a compiled part of the graph more than once, which torch.compile does "
            "not allow. Use a Step, compile only what comes before `features`, or compile nothing."
        )


def _finite(i: int, gradients: Gradients) -> Gradients:
    """The gradients of task number i outside the shared part, unless one is not finite."""
    if finite_norm(gradients) is None:
        raise NonFiniteError(i, NOT_FINITE)
    return gradients
