"""Weightings: how much each task's loss counts."""

from equipoise.weighting.base import Weighting
from equipoise.weighting.dwa import DWA
from equipoise.weighting.ew import EW
from equipoise.weighting.famo import FAMO
from equipoise.weighting.fixed import Fixed
from equipoise.weighting.gls import GLS
from equipoise.weighting.gradnorm import GradNorm
from equipoise.weighting.igbv1 import IGBv1
from equipoise.weighting.igbv2 import IGBv2
from equipoise.weighting.imtl_l import IMTLL
from equipoise.weighting.rlw import RLW
from equipoise.weighting.si import SI
from equipoise.weighting.si_variants import DWASI, RLWSI
from equipoise.weighting.stch import STCH
from equipoise.weighting.uw import UW

__all__ = [
    "DWA",
    "DWASI",
    "EW",
    "FAMO",
    "GLS",
    "IMTLL",
    "RLW",
    "RLWSI",
    "SI",
    "STCH",
    "UW",
    "Fixed",
    "GradNorm",
    "IGBv1",
    "IGBv2",
    "Weighting",
]
