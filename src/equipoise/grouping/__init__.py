"""Grouping: which tasks should share a network, and networks for the groups (STG-MTL)."""

from equipoise.grouping.affinity import GradientAffinity, LookaheadAffinity
from equipoise.grouping.choice import Choice, choose
from equipoise.grouping.clustering import cluster, find_groups, memberships
from equipoise.grouping.data_maps import DataMaps
from equipoise.grouping.groups import Groups
from equipoise.grouping.recorder import Recorder
from equipoise.grouping.scores import true_class_probability
from equipoise.grouping.silhouettes import linkage, silhouette
from equipoise.grouping.specialists import Specialists
from equipoise.grouping.vectors import affinity_gram

__all__ = [
    "Choice",
    "DataMaps",
    "GradientAffinity",
    "Groups",
    "LookaheadAffinity",
    "Recorder",
    "Specialists",
    "affinity_gram",
    "choose",
    "cluster",
    "find_groups",
    "linkage",
    "memberships",
    "silhouette",
    "true_class_probability",
]
