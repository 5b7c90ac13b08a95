"""Equipoise: balanced multi-task training for PyTorch."""

from importlib.metadata import version

from equipoise import aggregation, diagnostics, line_search, sharpness, weighting
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
from equipoise.combine import Combination
from equipoise.errors import (
    CombinationError,
    EquipoiseError,
    MissingExtraError,
    NonFiniteError,
    RecipeError,
    TaskError,
)
from equipoise.gradients import backward
from equipoise.line_search import Backtracking, FastBacktracking, LineSearch
from equipoise.recipe import Recipe
from equipoise.replay import Replay, frozen_buffers
from equipoise.sharpness import TaskSharpness
from equipoise.step import Step
from equipoise.step_report import StepReport
from equipoise.trunk import SharedTrunk
from equipoise.weighting import (
    DWA,
    DWASI,
    EW,
    FAMO,
    GLS,
    IMTLL,
    RLW,
    RLWSI,
    SI,
    STCH,
    UW,
    GradNorm,
    IGBv1,
    IGBv2,
    Weighting,
)

__version__ = version("equipoise")

__all__ = [
    "DBMTL",
    "DWA",
    "DWASI",
    "EDM",
    "EW",
    "FAMO",
    "GLS",
    "IMTLG",
    "IMTLL",
    "MGDA",
    "RLW",
    "RLWSI",
    "SI",
    "STCH",
    "UW",
    "Aggregator",
    "AlignedMTL",
    "Backtracking",
    "CAGrad",
    "Combination",
    "CombinationError",
    "ConFIG",
    "DualProj",
    "EquipoiseError",
    "Every",
    "FairGrad",
    "FastBacktracking",
    "GradDrop",
    "GradNorm",
    "GradVac",
    "GramAggregator",
    "IGBv1",
    "IGBv2",
    "LineSearch",
    "MaxNorm",
    "Mean",
    "MissingExtraError",
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
    "line_search",
    "sharpness",
    "weighting",
]
