"""Equipoise: balanced multi-task training for PyTorch."""

from importlib.metadata import version

from equipoise import aggregation, diagnostics, weighting
from equipoise.aggregation import (
    IMTLG,
    MGDA,
    Aggregator,
    CAGrad,
    GramAggregator,
    Mean,
    PCGrad,
    Sum,
)
from equipoise.errors import (
    CombinationError,
    EquipoiseError,
    NonFiniteError,
    RecipeError,
    TaskError,
)
from equipoise.gradients import backward
from equipoise.recipe import Recipe
from equipoise.replay import Replay, frozen_buffers
from equipoise.rows import Combination
from equipoise.step import Step
from equipoise.step_report import StepReport
from equipoise.trunk import SharedTrunk
from equipoise.weighting import DWA, EW, RLW, SI, UW, IGBv1, Weighting

__version__ = version("equipoise")

__all__ = [
    "DWA",
    "EW",
    "IMTLG",
    "MGDA",
    "RLW",
    "SI",
    "UW",
    "Aggregator",
    "CAGrad",
    "Combination",
    "CombinationError",
    "EquipoiseError",
    "GramAggregator",
    "IGBv1",
    "Mean",
    "NonFiniteError",
    "PCGrad",
    "Recipe",
    "RecipeError",
    "Replay",
    "SharedTrunk",
    "Step",
    "StepReport",
    "Sum",
    "TaskError",
    "Weighting",
    "aggregation",
    "backward",
    "diagnostics",
    "frozen_buffers",
    "weighting",
]
