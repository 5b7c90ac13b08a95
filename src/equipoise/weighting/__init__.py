"""Weightings: how much each task's loss counts."""

from equipoise.weighting.base import Weighting
from equipoise.weighting.dwa import DWA
from equipoise.weighting.ew import EW
from equipoise.weighting.igbv1 import IGBv1
from equipoise.weighting.rlw import RLW
from equipoise.weighting.si import SI
from equipoise.weighting.uw import UW

__all__ = ["DWA", "EW", "RLW", "SI", "UW", "IGBv1", "Weighting"]
