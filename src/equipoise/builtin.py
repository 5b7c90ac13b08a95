"""The methods that come along, by the names that recipes give them; a method is a line in a table.

`registry` registers them, as it does those of anybody else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from equipoise.aggregation import (
    DBMTL,
    EDM,
    IMTLG,
    MGDA,
    AlignedMTL,
    CAGrad,
    ConFIG,
    DualProj,
    FairGrad,
    GradDrop,
    GradVac,
    MaxNorm,
    Mean,
    NashMTL,
    PCGrad,
    SDMGrad,
    Sum,
    UPGrad,
)
from equipoise.line_search import Backtracking, FastBacktracking, LineSearch
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
)

WEIGHTINGS: dict[str, Callable[..., Any]] = {
    "ew": EW,
    "si": SI,
    "rlw": RLW,
    "dwa": DWA,
    "uw": UW,
    "igbv1": IGBv1,
    "igbv2": IGBv2,
    "rlw-si": RLWSI,
    "dwa-si": DWASI,
    "imtl-l": IMTLL,
    "gls": GLS,
    "famo": FAMO,
    "stch": STCH,
    "gradnorm": GradNorm,
}
AGGREGATORS: dict[str, Callable[..., Any]] = {
    "sum": Sum,
    "mean": Mean,
    "mgda": MGDA,
    "pcgrad": PCGrad,
    "cagrad": CAGrad,
    "imtl": IMTLG,
    "nash": NashMTL,
    "edm": EDM,
    "graddrop": GradDrop,
    "gradvac": GradVac,
    "aligned": AlignedMTL,
    "upgrad": UPGrad,
    "dualproj": DualProj,
    "config": ConFIG,
    "fairgrad": FairGrad,
    "sdmgrad": SDMGrad,
    "max-norm": MaxNorm,
    "db-mtl": DBMTL,
}
LINE_SEARCHES: dict[str, tuple[type[LineSearch], str]] = {
    "bls": (Backtracking, "sum"),
    "fbls": (FastBacktracking, "mgda"),
}
"""Line searches, each with the aggregator that a recipe has if it names none."""
PARTNERS: dict[str, str] = {"db-mtl": "si"}
"""Aggregators of methods that also say how losses are weighted."""

REFUSED: dict[str, str] = {
    "uw-si": "UW on the scale-invariant objective falls without end wherever a loss is below 1: "
    "(exp(-s) ln L + s) / 2 goes to minus infinity with s. Use si, which is what UW comes to where "
    "its s is best."
}
"""What somebody may ask for that has no sense, with the reason."""

FLAT_DEFAULTS: dict[str, dict[str, Any]] = {
    "nash": {"max_norm": None, "degree": 1},
    "fairgrad": {"degree": 1},
}
"""Aggregators that do not grow with the gradients, in the form in which a flat part stays small."""
