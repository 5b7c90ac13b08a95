"""Every method by the name that recipes give it. A method is added by a line in a table here."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from equipoise.aggregation import (
    DBMTL,
    EDM,
    IMTLG,
    MGDA,
    AlignedMTL,
    CAGrad,
    ConFIG,
    DualProj,
    Every,
    FairGrad,
    GradDrop,
    GradVac,
    GramAggregator,
    MaxNorm,
    Mean,
    NashMTL,
    PCGrad,
    SDMGrad,
    Sum,
    UPGrad,
)
from equipoise.engine.adapters import works_on_features
from equipoise.line_search import Backtracking, FastBacktracking, LineSearch
from equipoise.sharpness import TaskSharpness
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
    Fixed,
    GradNorm,
    IGBv1,
    IGBv2,
)

Axis = Literal["weighting", "aggregation", "line search", "baseline"]


@dataclass(frozen=True)
class Method:
    """One entry of the registry.

    Attributes:
        token: how recipes call it.
        axis: which question it answers.
        factory: the class; parameters in parentheses go to its constructor.
        level: the level at which an aggregator works.
        beside: the weighting that a recipe has if it names this aggregator and no weighting; the
            aggregator that it has if it names this line search and no aggregator.
        usual: parameters whose default here is another than the factory's.
        sharpness: for an aggregator in flat regions: what is fixed of its TaskSharpness; the
            parameters of both are then given together.
    """

    token: str
    axis: Axis
    factory: Callable[..., Any]
    level: str = "parameters"
    beside: str = "ew"
    usual: Mapping[str, Any] = field(default_factory=dict)
    sharpness: Mapping[str, Any] | None = None

    @property
    def summary(self) -> str:
        """The first line of the factory's docstring."""
        return (inspect.getdoc(self.factory) or "").partition("\n")[0]

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters that a recipe may set, with their defaults."""
        own = {**_defaults(self.factory), **self.usual}
        if self.sharpness is not None:  # its `every` holds the flat part
            return {**own, **self._sharpness_parameters}
        return {**own, **OF_COEFFICIENTS} if self._has_coefficients_to_keep else own

    @property
    def on_features(self) -> Method | None:
        """An aggregator's entry at the feature level; None if it cannot work there."""
        return self if self.level == "features" else METHODS.get(f"{self.token}-ub")

    @property
    def _sharpness_parameters(self) -> dict[str, Any]:
        if self.sharpness is None:
            return {}
        found = _defaults(TaskSharpness)
        return {name: value for name, value in found.items() if name not in self.sharpness}

    @property
    def _has_coefficients_to_keep(self) -> bool:
        """Whether coefficients come from Gram matrices, so that `every` can spare some of them."""
        return (
            isinstance(self.factory, type)
            and issubclass(self.factory, GramAggregator)
            and self.factory.known_coefficients is GramAggregator.known_coefficients
        )

    def build(self, **arguments: Any) -> Any:
        """The stage; an aggregator with `every` above 1 computes its coefficients that rarely."""
        own = {k: v for k, v in arguments.items() if k not in self._sharpness_parameters}
        own.pop("weights_on_all", None)  # is the Step's
        every = own.pop("every", 1)
        stage = self.factory(**{**self.usual, **own})
        return stage if every == 1 else Every(stage, every)

    def heads(self, **arguments: Any) -> str:
        """What a Step takes for `heads`."""
        return "weighted" if arguments.get("weights_on_all") else "own"

    def build_sharpness(self, **arguments: Any) -> TaskSharpness | None:
        """The TaskSharpness of an aggregator in flat regions; None for any other method."""
        if self.sharpness is None:
            return None
        own = {k: v for k, v in arguments.items() if k in self._sharpness_parameters}
        return TaskSharpness(**self.sharpness, **own)

    def check(self, name: str, value: Any) -> Any:
        """`value` as the parameter wants it (5 for a float is 5.0), or ValueError."""
        hints = {"every": int, "weights_on_all": bool, **get_type_hints(TaskSharpness.__init__)}
        hints |= get_type_hints(getattr(self.factory, "__init__", self.factory))
        hint = hints[name]
        if get_origin(hint) is Literal:
            return value  # the constructor knows which
        types = get_args(hint) or (hint,)
        if type(value) is int and float in types:
            value = float(value)
        if type(value) not in types or value in (math.inf, -math.inf):
            wanted = " or ".join("none" if t is type(None) else t.__name__ for t in types)
            raise ValueError(f"{name} is {value!r}; it takes {wanted}.")
        return value


def _defaults(factory: Callable[..., Any]) -> dict[str, Any]:
    """What a recipe may give to a constructor, with the defaults."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(factory).parameters.items()
        if name not in FROM_CONTEXT and parameter.kind == parameter.POSITIONAL_OR_KEYWORD
    }


OF_COEFFICIENTS: dict[str, Any] = {"every": 1, "weights_on_all": False}
"""What can be said of any aggregator whose coefficients come from Gram matrices, in recipes."""

FROM_CONTEXT = ("generator", "steps_per_epoch", "n_tasks")
"""Constructor arguments that come from the training, not from the recipe."""

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
BESIDE: dict[str, str] = {"db-mtl": "si"}
"""Aggregators of methods that also say how losses are weighted."""

REFUSED: dict[str, str] = {
    "uw-si": "UW on the scale-invariant objective falls without end wherever a loss is below 1: "
    "(exp(-s) ln L + s) / 2 goes to minus infinity with s. Use si, which is what UW comes to where "
    "its s is best."
}
"""What somebody may ask for that has no sense, with the reason."""

DECOMPOSED = {"decompose": True}
NAIVE = {"decompose": False, "every": 1}
OF_DEGREE_ONE: dict[str, dict[str, Any]] = {
    "nash": {"max_norm": None, "degree": 1},
    "fairgrad": {"degree": 1},
}
"""Aggregators that do not grow with the gradients, in the form in which a flat part stays small."""


def single_task() -> Sum:
    """Single-task learning: one network for each task, the baseline of Delta_m."""
    return Sum()


def with_task_weights(weighting: Any, weights: Any) -> Fixed:
    """A weighting with constant factors (T,) on top."""
    return Fixed(weights, weighting)


def _methods() -> dict[str, Method]:
    methods = [Method(token, "weighting", factory) for token, factory in WEIGHTINGS.items()]
    for token, factory in AGGREGATORS.items():
        beside = BESIDE.get(token, "ew")
        methods.append(Method(token, "aggregation", factory, beside=beside))
        if works_on_features(factory):  # others need the rows of the parameters themselves
            methods.append(Method(f"{token}-ub", "aggregation", factory, "features", beside))
    for token, (factory, beside) in LINE_SEARCHES.items():
        methods.append(Method(token, "line search", factory, factory.level, beside))
    methods.append(Method("stl", "baseline", single_task))
    return {method.token: method for method in methods}


def _in_flat_regions(methods: Iterable[Method]) -> dict[str, Method]:
    found = {}
    for method in methods:
        if method.axis == "aggregation" and method.level == "parameters":
            usual = OF_DEGREE_ONE.get(method.token, {})
            f = replace(method, token=f"f-{method.token}", usual=usual, sharpness=DECOMPOSED)
            a = replace(method, token=f"a-{method.token}", sharpness=NAIVE)
            found |= {f.token: f, a.token: a}
    return found


METHODS: dict[str, Method] = _methods()
"""Every known method by its token."""

FLAT: dict[str, Method] = _in_flat_regions(METHODS.values())
"""Every aggregator in flat regions: f- as F-MTL has it, a- for the naive way of its ablation."""

TOKENS: dict[str, Method] = {**METHODS, **FLAT}
"""All that a recipe can name."""
