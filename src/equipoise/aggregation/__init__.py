"""Aggregators: how task gradients become one direction."""

from equipoise.aggregation.base import Aggregator, GramAggregator
from equipoise.aggregation.cagrad import CAGrad
from equipoise.aggregation.imtl_g import IMTLG
from equipoise.aggregation.linear import Mean, Sum
from equipoise.aggregation.mgda import MGDA
from equipoise.aggregation.pcgrad import PCGrad

__all__ = ["IMTLG", "MGDA", "Aggregator", "CAGrad", "GramAggregator", "Mean", "PCGrad", "Sum"]
