"""Measures on any multi-task model: against single-task training, and of task against task."""

from equipoise.diagnostics.conflict import conflict_share
from equipoise.diagnostics.relative import MeasureError, Sign, delta_m

__all__ = ["MeasureError", "Sign", "conflict_share", "delta_m"]
