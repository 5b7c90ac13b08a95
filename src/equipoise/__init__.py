"""Equipoise: balanced multi-task training for PyTorch."""

from importlib.metadata import version

from equipoise import aggregation, diagnostics, weighting
from equipoise.aggregation import (
    DBMTL,
    IMTLG,
    MGDA,
    Aggregator,
    CAGrad,
    GramAggregator,
    MaxNorm,
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
from equipoise.weighting import (
    DWA,
    EW,
    FAMO,
    GLS,
    IMTLL,
    RLW,
    SI,
    STCH,
    UW,
    GradNorm,
    IGBv1,
    Weighting,
)

__version__ = version("equipoise")

__all__ = [
    "DBMTL",
    "DWA",
    "EW",
    "FAMO",
    "GLS",
    "IMTLG",
    "IMTLL",
    "MGDA",
    "RLW",
    "SI",
    "STCH",
    "UW",
    "Aggregator",
    "CAGrad",
    "Combination",
    "CombinationError",
    "EquipoiseError",
    "GradNorm",
    "GramAggregator",
    "IGBv1",
    "MaxNorm",
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
