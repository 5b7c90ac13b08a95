"""Aggregators: how task gradients become one direction."""

from equipoise.aggregation.aligned import AlignedMTL
from equipoise.aggregation.base import Aggregator, GramAggregator
from equipoise.aggregation.cagrad import CAGrad
from equipoise.aggregation.config import ConFIG
from equipoise.aggregation.db_mtl import DBMTL
from equipoise.aggregation.dualproj import DualProj
from equipoise.aggregation.edm import EDM
from equipoise.aggregation.fairgrad import FairGrad
from equipoise.aggregation.graddrop import GradDrop
from equipoise.aggregation.gradvac import GradVac
from equipoise.aggregation.imtl_g import IMTLG
from equipoise.aggregation.interval import Every, every
from equipoise.aggregation.linear import Mean, Sum
from equipoise.aggregation.max_norm import MaxNorm
from equipoise.aggregation.mgda import MGDA
from equipoise.aggregation.nash import NashMTL
from equipoise.aggregation.pcgrad import PCGrad
from equipoise.aggregation.sdmgrad import SDMGrad
from equipoise.aggregation.upgrad import UPGrad

__all__ = [
    "DBMTL",
    "EDM",
    "IMTLG",
    "MGDA",
    "Aggregator",
    "AlignedMTL",
    "CAGrad",
    "ConFIG",
    "DualProj",
    "Every",
    "FairGrad",
    "GradDrop",
    "GradVac",
    "GramAggregator",
    "MaxNorm",
    "Mean",
    "NashMTL",
    "PCGrad",
    "SDMGrad",
    "Sum",
    "UPGrad",
    "every",
]
