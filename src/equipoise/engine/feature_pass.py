"""The direction from gradients of the features of a SharedTrunk."""

from __future__ import annotations

from torch import Tensor

from equipoise.engine.direction import Combination
from equipoise.engine.evaluation import Evaluation
from equipoise.engine.gradients import Gradients
from equipoise.engine.stages import Stages
from equipoise.engine.trunk_evaluation import TrunkEvaluation


def combine_features(
    look: Evaluation, stages: Stages, factors: Tensor
) -> tuple[Combination, Gradients, list[Gradients]]:
    """The direction from gradients of the features: one backward through all heads, one below.

    Returns:
        How it came about, the trunk's gradients, and those of the heads, of the raw losses.
    """
    assert isinstance(look, TrunkEvaluation)
    gradients, own = look.feature_gradients(factors)
    look.check_overlap(gradients, stages)
    result, latent = gradients.combine(stages.aggregator, look.losses, stages.descent)
    return result, look.through(latent, again=stages.verifying is not None), own
