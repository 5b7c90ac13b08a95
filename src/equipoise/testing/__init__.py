"""Checks that a user can run on a method of their own, and the inputs that they need."""

from equipoise.testing.aggregators import aggregator_checks, check_aggregator
from equipoise.testing.rows import kinds_of_rows, nearly_stationary_rows
from equipoise.testing.weightings import check_weighting, weighting_checks

__all__ = [
    "aggregator_checks",
    "check_aggregator",
    "check_weighting",
    "kinds_of_rows",
    "nearly_stationary_rows",
    "weighting_checks",
]
