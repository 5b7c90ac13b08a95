"""Line searches: how far a step goes."""

from equipoise.line_search.backtracking import Backtracking
from equipoise.line_search.base import LineSearch
from equipoise.line_search.fast import FastBacktracking

__all__ = ["Backtracking", "FastBacktracking", "LineSearch"]
