"""Aggregators: how task gradients become one direction."""

from equipoise.aggregation.base import Aggregator, GramAggregator
from equipoise.aggregation.cagrad import CAGrad
from equipoise.aggregation.db_mtl import DBMTL
from equipoise.aggregation.imtl_g import IMTLG
from equipoise.aggregation.linear import Mean, Sum
from equipoise.aggregation.max_norm import MaxNorm
from equipoise.aggregation.mgda import MGDA
from equipoise.aggregation.pcgrad import PCGrad

__all__ = [
    "DBMTL",
    "IMTLG",
    "MGDA",
    "Aggregator",
    "CAGrad",
    "GramAggregator",
    "MaxNorm",
    "Mean",
    "PCGrad",
    "Sum",
]
