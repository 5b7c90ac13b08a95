"""Equipoise: balanced multi-task training for PyTorch."""

from importlib.metadata import version

from equipoise import aggregation, diagnostics, grouping, sharpness, weighting
from equipoise.aggregation import (
    DBMTL,
    EDM,
    IMTLG,
    MGDA,
    Aggregator,
    AlignedMTL,
    CAGrad,
    ConFIG,
    DualProj,
    Every,
    FairGrad,
    GradDrop,
    GradVac,
    GramAggregator,
    MaxNorm,
    Mean,
    NashMTL,
    PCGrad,
    SDMGrad,
    Sum,
    UPGrad,
    every,
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
from equipoise.sharpness import TaskSharpness
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
    Fixed,
    GradNorm,
    IGBv1,
    Weighting,
)

__version__ = version("equipoise")

__all__ = [
    "DBMTL",
    "DWA",
    "EDM",
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
    "AlignedMTL",
    "CAGrad",
    "Combination",
    "CombinationError",
    "ConFIG",
    "DualProj",
    "EquipoiseError",
    "Every",
    "FairGrad",
    "Fixed",
    "GradDrop",
    "GradNorm",
    "GradVac",
    "GramAggregator",
    "IGBv1",
    "MaxNorm",
    "Mean",
    "NashMTL",
    "NonFiniteError",
    "PCGrad",
    "Recipe",
    "RecipeError",
    "Replay",
    "SDMGrad",
    "SharedTrunk",
    "Step",
    "StepReport",
    "Sum",
    "TaskError",
    "TaskSharpness",
    "UPGrad",
    "Weighting",
    "aggregation",
    "backward",
    "diagnostics",
    "every",
    "frozen_buffers",
    "grouping",
    "sharpness",
    "weighting",
]
