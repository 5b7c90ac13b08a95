"""Names, arguments and defaults that scripts outside rely on; more arguments may follow."""

from __future__ import annotations

import importlib
import importlib.resources
import inspect
from types import ModuleType
from typing import Any

import pytest

import equipoise

REQUIRED = inspect.Parameter.empty
ANY = object()  # a default whose value is not promised

# Where, the arguments in their order, and their defaults.
SIGNATURES: dict[str, dict[str, Any]] = {
    "equipoise.SharedTrunk": {"trunk": REQUIRED, "heads": REQUIRED},
    "equipoise.Step": {
        "model": REQUIRED,
        "losses": REQUIRED,
        "optimizer": REQUIRED,
        "weighting": ANY,
        "aggregator": ANY,
        "level": None,
    },
    "equipoise.Step.__call__": {"inputs": REQUIRED, "targets": None, "masks": None},
    "equipoise.backward": {
        "losses": REQUIRED,
        "shared": REQUIRED,
        "aggregator": REQUIRED,
        "features": None,
    },
    "equipoise.Recipe.parse": {"text": REQUIRED},
    "equipoise.Recipe.build": {
        "model": REQUIRED,
        "losses": REQUIRED,
        "lr": REQUIRED,
        "steps_per_epoch": REQUIRED,
        "optimizer": None,
        "seed": None,
    },
    "equipoise.register": {"token": REQUIRED, "factory": None, "axis": None},
    "equipoise.testing.check_aggregator": {"make": REQUIRED},
    "equipoise.testing.check_weighting": {"make": REQUIRED},
    "equipoise.testing.aggregator_checks": {"make": REQUIRED},
    "equipoise.testing.weighting_checks": {"make": REQUIRED},
    "equipoise.aggregation.Sum": {},
    "equipoise.aggregation.Mean": {},
    "equipoise.aggregation.MGDA": {"normalize": None, "zero": "keep"},
    "equipoise.aggregation.PCGrad": {"reduction": "sum", "generator": None},
    "equipoise.aggregation.CAGrad": {"c": 0.4, "rescale": 1},
    "equipoise.aggregation.IMTLG": {},
    "equipoise.aggregation.MaxNorm": {},
    "equipoise.aggregation.DBMTL": {"n_tasks": REQUIRED, "beta": 0.9, "decay": 0.0},
    "equipoise.weighting.EW": {},
    "equipoise.weighting.SI": {"cap": None},
    "equipoise.weighting.RLW": {"generator": None, "normalize_to": None},
    "equipoise.weighting.DWA": {"steps_per_epoch": REQUIRED, "temperature": 2.0},
    "equipoise.weighting.UW": {"n_tasks": REQUIRED},
    "equipoise.weighting.IGBv1": {"steps_per_epoch": REQUIRED, "cap": None},
    "equipoise.weighting.IMTLL": {"n_tasks": REQUIRED, "lr": None},
    "equipoise.weighting.GLS": {},
    "equipoise.weighting.FAMO": {"lr": 0.025, "gamma": 1e-3, "min_losses": 0.0},
    "equipoise.weighting.STCH": {
        "mu": 1.0,
        "preference": None,
        "ideal": 0.0,
        "warmup_epochs": None,
        "steps_per_epoch": None,
    },
    "equipoise.weighting.GradNorm": {"alpha": 1.5, "lr": 0.025},
    "equipoise.weighting.Weighting.observe": {
        "losses": REQUIRED,
        "present": REQUIRED,
        "gram": None,
        "after": None,
    },
    "equipoise.weighting.Fixed": {"weights": REQUIRED, "inside": None},
    "equipoise.grouping.DataMaps": {
        "n_tasks": REQUIRED,
        "n_samples": REQUIRED,
        "checkpoints": REQUIRED,
        "ddof": 0,
    },
    "equipoise.grouping.DataMaps.update": {"true_class_probability": REQUIRED, "index": REQUIRED},
    "equipoise.grouping.find_groups": {
        "gram_or_vectors": REQUIRED,
        "n_groups": REQUIRED,
        "fuzziness": 2.0,
        "seed": 0,
    },
    "equipoise.grouping.memberships": {"distances": REQUIRED, "fuzziness": 2.0},
    "equipoise.grouping.Specialists": {
        "models": REQUIRED,
        "memberships": REQUIRED,
        "kinds": None,
        "combine": "probabilities",
    },
    "equipoise.diagnostics.delta_m": {
        "values": REQUIRED,
        "baseline": REQUIRED,
        "higher_is_better": REQUIRED,
        "sign": "improvement",
    },
    "equipoise.diagnostics.conflict_share": {"gram": REQUIRED},
    "equipoise.diagnostics.noise_robustness": {
        "model": REQUIRED,
        "batches": REQUIRED,
        "measures": REQUIRED,
        "radii": REQUIRED,
        "draws": 10,
        "generator": None,
    },
    "equipoise.diagnostics.predictive_entropy": {"logits": REQUIRED},
    "equipoise.diagnostics.entropies": {"model": REQUIRED, "batches": REQUIRED, "tasks": None},
    "equipoise.diagnostics.calibration": {
        "model": REQUIRED,
        "batches": REQUIRED,
        "bins": 10,
        "tasks": None,
    },
    "equipoise.diagnostics.loss_surface": {
        "model": REQUIRED,
        "batches": REQUIRED,
        "losses": REQUIRED,
        "span": 1.0,
        "points": 21,
        "generator": None,
        "directions": None,
    },
    "equipoise.diagnostics.sharpness_curve": {
        "model": REQUIRED,
        "batches": REQUIRED,
        "losses": REQUIRED,
        "radii": REQUIRED,
        "perturbation": None,
        "where": "both",
    },
}

REPORT_FIELDS = {
    "tasks",
    "losses",
    "weights",
    "coefficients",
    "gram",
    "direction_norm",
    "step_size",
    "trials",
    "accepted",
}

AT_THE_TOP = {
    *("SharedTrunk", "Step", "StepReport", "backward", "Recipe"),
    *("EW", "SI", "RLW", "DWA", "UW", "IGBv1", "IMTLL", "GLS", "FAMO", "STCH", "GradNorm"),
    *("IGBv2", "RLWSI", "DWASI", "MissingExtraError"),
    *("Sum", "Mean", "MGDA", "PCGrad", "CAGrad", "IMTLG", "MaxNorm", "DBMTL"),
    *("EquipoiseError", "TaskError", "RecipeError", "CombinationError", "NonFiniteError"),
}


def resolve(path: str) -> Any:
    """The object behind a dotted path: the longest importable module, then attributes."""
    parts = path.split(".")
    for n in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        for name in parts[n:]:
            found = getattr(found, name)
        return found
    raise AssertionError(path)


@pytest.mark.parametrize("path", SIGNATURES)
def test_arguments_and_defaults(path: str) -> None:
    found = inspect.signature(resolve(path)).parameters
    expected = SIGNATURES[path]
    assert [name for name in found if name in expected] == list(expected)
    for name, default in expected.items():
        if default is not ANY:
            assert found[name].default == default, name
    required = {
        name
        for name, parameter in found.items()
        if parameter.default is REQUIRED
        and name != "self"
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    assert required == {name for name, default in expected.items() if default is REQUIRED}


def test_a_wrong_default_would_be_seen() -> None:
    assert inspect.signature(resolve("equipoise.CAGrad")).parameters["c"].default != 0.5


def test_stages_are_positional_in_this_order() -> None:
    parameters = inspect.signature(equipoise.Step).parameters
    positional = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional[:5] == ["model", "losses", "optimizer", "weighting", "aggregator"]
    assert parameters["level"].kind is inspect.Parameter.KEYWORD_ONLY


def test_names_at_the_top() -> None:
    assert set(equipoise.__all__) >= AT_THE_TOP
    for name in equipoise.__all__:
        assert hasattr(equipoise, name), name


@pytest.mark.parametrize("name", ["weighting", "aggregation", "grouping", "diagnostics"])
def test_modules_say_what_they_export(name: str) -> None:
    module = importlib.import_module(f"equipoise.{name}")
    assert module.__all__
    for public in module.__all__:
        thing = getattr(module, public)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert thing.__doc__, public


@pytest.mark.parametrize("module", ["weighting", "aggregation"])
def test_every_stage_is_at_the_top_too(module: str) -> None:
    found = importlib.import_module(f"equipoise.{module}")
    for name in found.__all__:
        # Bases are for those who write a method, and stay in their package.
        if "." not in name and not inspect.isabstract(getattr(found, name)):
            assert getattr(equipoise, name, None) is getattr(found, name), name


def test_every_public_name_has_a_docstring_of_its_own() -> None:
    for name in equipoise.__all__:
        thing = getattr(equipoise, name)
        if isinstance(thing, ModuleType):
            assert thing.__doc__, name
        elif inspect.isclass(thing):
            assert vars(thing).get("__doc__"), f"{name} inherits its docstring"
        elif callable(thing):
            assert thing.__doc__, name


def test_the_report_has_its_fields_and_is_frozen() -> None:
    fields = set(equipoise.StepReport.__dataclass_fields__)
    assert fields >= REPORT_FIELDS
    assert isinstance(equipoise.StepReport.cosines, property)
    assert equipoise.StepReport.__dataclass_params__.frozen


def test_the_package_is_typed() -> None:
    root = importlib.resources.files("equipoise")
    assert root.joinpath("py.typed").is_file()
