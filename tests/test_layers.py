"""Who may import whom, and how long a module may be.

The rules are functions from parsed sources to a list of complaints, so that each is also tested
here on small sources that break it: a rule that finds nothing anywhere proves nothing.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "equipoise"

STAGES = {"weighting", "aggregation", "sharpness", "line_search"}
# "" is the package's own __init__
MAY_COMBINE_STAGES = {"", "step", "assembly", "functional", "registry", "builtin"}
STAGE_FREE = {"buffers", "draws", "kept", "replay"}
CONTRACTS = {"aggregation.base", "weighting.base", "line_search.base", "sharpness"}
MAY_MOVE = {"engine.displaced", "buffers"}
CORE_IMPORTS = {"torch", "numpy", "scipy", "equipoise"}
# The modules of the core that may look for something else, and then inside a function only.
LAZY_IMPORTS = {
    "diagnostics.reliability": {"torchmetrics"},
    "weighting.sac": {"stable_baselines3", "gymnasium"},
}
MAY_IMPORT_LAB = {"lab", "__main__"}
DRIVERS = {"", "step", "assembly", "functional", "recipe", "registry", "engine", "trunk"}
ASSEMBLERS = {"", "step", "assembly", "functional", "recipe", "registry"}
AUTOGRAD = {"backward", "grad", "vjp", "jvp", "jacrev", "jacfwd"}
MAX_LINES_CORE, MAX_LINES_LAB = 300, 400

Sources = dict[str, str]  # module name below equipoise ("aggregation.mgda") -> text


def sources(package: Path = PACKAGE) -> Sources:
    """Every module of the package; the package's own __init__ is called ""."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        if parts[-1] == "__init__":
            # A package's __init__ keeps its name, so that relative imports resolve from it.
            parts = parts[:-1]
        found[".".join(parts)] = path.read_text(encoding="utf-8")
    return found


def part(module: str) -> str:
    """The first component: "aggregation.mgda" belongs to "aggregation"."""
    return module.split(".")[0]


def in_core(module: str) -> bool:
    return part(module) not in MAY_IMPORT_LAB


def imports(module: str, text: str, modules: Iterable[str] = ()) -> set[str]:
    """Absolute dotted names that a module imports, at its top or anywhere inside.

    `from package import name` counts as an import of `package.name`.
    """
    names = set()
    is_package = module == "" or any(m.startswith(module + ".") for m in modules)
    here = ["equipoise", *(module.split(".") if module else [])]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module.split(".") if node.module else []
            if node.level:
                up = node.level - 1 if is_package else node.level
                base = here[: len(here) - up] + base
            names |= {".".join([*base, alias.name]) for alias in node.names}
    return names


def own_imports(module: str, text: str, modules: Iterable[str]) -> set[str]:
    """The parts of equipoise that a module imports ("" for equipoise itself and its names)."""
    known = {part(m) for m in modules} | STAGES | STAGE_FREE | DRIVERS | {"lab"}
    found = set()
    for name in imports(module, text, modules):
        if part(name) == "equipoise":
            rest = name.split(".")[1:]
            found.add(rest[0] if rest and rest[0] in known else "")
    return found


def stages_are_siblings(all_sources: Sources) -> list[str]:
    complaints = []
    for module, text in all_sources.items():
        if part(module) not in STAGES:
            continue
        own = own_imports(module, text, all_sources)
        for other in sorted(own & (STAGES - {part(module)})):
            complaints.append(f"{module} imports its sibling {other}")
        for driver in sorted(own & DRIVERS):
            complaints.append(f"{module} imports {driver or 'equipoise'}, which drives the stages")
    return complaints


def stages_never_call_autograd(all_sources: Sources) -> list[str]:
    complaints = []
    for module, text in all_sources.items():
        if part(module) not in STAGES:
            continue
        for node in ast.walk(ast.parse(text)):
            # `x.backward(...)`, `torch.autograd.grad(...)`, `torch.func.vjp(...)`
            if isinstance(node, ast.Attribute) and node.attr == "autograd":
                complaints.append(f"{module}:{node.lineno} uses autograd")
            if isinstance(node, ast.Call):
                called = node.func
                name = called.attr if isinstance(called, ast.Attribute) else None
                name = called.id if isinstance(called, ast.Name) else name
                if name in AUTOGRAD:
                    complaints.append(f"{module}:{node.lineno} calls {name}")
        for name in sorted(imports(module, text, all_sources)):
            if name.startswith(("torch.autograd", "torch.func")):
                complaints.append(f"{module} imports {name}")
    return complaints


def only_drivers_combine_stages(all_sources: Sources) -> list[str]:
    complaints = []
    for module, text in all_sources.items():
        if not in_core(module) or module in MAY_COMBINE_STAGES:
            continue
        own = own_imports(module, text, all_sources)
        used = own & STAGES
        if part(module) == "engine":
            continue  # has a rule of its own
        if "" in own:
            complaints.append(f"{module} imports from the top, where all stages meet")
        if part(module) in STAGE_FREE and used:
            complaints.append(f"{module} imports the stage {', '.join(sorted(used))}")
        elif len(used | ({part(module)} & STAGES)) > 1:
            complaints.append(f"{module} combines {', '.join(sorted(used))}")
    return complaints


def the_engine_sees_contracts_only(all_sources: Sources) -> list[str]:
    """It takes the stages that it is given, and never what puts them together."""
    complaints = []
    for module, text in all_sources.items():
        if part(module) != "engine":
            continue
        for name in sorted(imported_modules(module, text, all_sources)):
            if part(name) in ASSEMBLERS:
                complaints.append(f"{module} imports {name or 'equipoise'}, which assembles steps")
            elif part(name) in STAGES and name not in CONTRACTS:
                complaints.append(f"{module} imports {name}, more than the contract of a stage")
    return complaints


def imported_modules(module: str, text: str, all_sources: Sources) -> set[str]:
    """The modules of the package that a module imports, for types too; a name's own module."""
    found = set()
    for name in imports(module, text, all_sources):
        if part(name) == "equipoise":
            rest = name.removeprefix("equipoise").removeprefix(".")
            while rest and rest not in all_sources:
                rest = rest.rpartition(".")[0]
            found.add(rest)
    return found - {module}


def there_is_no_circle(all_sources: Sources) -> list[str]:
    """No module imports, over others or for types, what imports it."""
    left = {m: imported_modules(m, text, all_sources) for m, text in all_sources.items()}
    # A package's __init__ gathers its modules, which may look at each other; it is no room.
    gathering = {m for m in left if any(other.startswith(m + ".") for other in left)} | {""}
    left = {m: found - gathering for m, found in left.items() if m not in gathering}
    while True:
        free = {m for m, found in left.items() if not found & left.keys()}
        if not free:
            return [f"{m} is in a circle, or imports one" for m in sorted(left)]
        left = {m: found for m, found in left.items() if m not in free}
        if not left:
            return []


def parameters_are_moved_in_one_place(all_sources: Sources) -> list[str]:
    """Whoever writes through `.data` moves something behind autograd's back."""
    return [
        f"{module}:{node.lineno} reaches for .data"
        for module, text in all_sources.items()
        if in_core(module) and module not in MAY_MOVE
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Attribute)
        and node.attr == "data"
        and not (isinstance(node.value, ast.Name) and node.value.id == "self")
    ]


def core_is_light(all_sources: Sources) -> list[str]:
    complaints = []
    allowed = CORE_IMPORTS | set(sys.stdlib_module_names)
    for module, text in all_sources.items():
        if in_core(module):
            found = {part(name) for name in imports(module, text, all_sources)} - allowed
            lazy = LAZY_IMPORTS.get(module, set()) - eager_imports(text)
            complaints += [f"{module} imports {name}" for name in sorted(found - lazy)]
    return complaints


def eager_imports(text: str) -> set[str]:
    """First components of the names that a module imports when it is itself imported."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [ast.Pass()]
    return {part(name) for name in imports("", ast.unparse(tree))}


def only_the_lab_imports_the_lab(all_sources: Sources) -> list[str]:
    return [
        f"{module or '__init__'} imports lab"
        for module, text in all_sources.items()
        if in_core(module) and "lab" in own_imports(module, text, all_sources)
    ]


def no_method_name_is_compared(all_sources: Sources, tokens: set[str]) -> list[str]:
    """No `==`, `in`, `match` or `startswith` against a method's name outside recipe.py."""
    complaints = []
    for module, text in all_sources.items():
        if module == "recipe":
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Compare):
                places = [node.left, *node.comparators]
            elif isinstance(node, ast.MatchValue):
                places = [node.value]
            elif (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in {"startswith", "endswith"}
            ):
                places = list(node.args)
            else:
                continue
            for place in places:
                for literal in ast.walk(place):
                    if isinstance(literal, ast.Constant) and literal.value in tokens:
                        complaints.append(f"{module}:{node.lineno} compares {literal.value!r}")
    return complaints


def modules_are_short(all_sources: Sources) -> list[str]:
    complaints = []
    for module, text in all_sources.items():
        lines = len(text.splitlines())
        most = MAX_LINES_CORE if in_core(module) else MAX_LINES_LAB
        if lines > most:
            complaints.append(f"{module or '__init__'} has {lines} lines, more than {most}")
    return complaints


def registered_tokens() -> set[str]:
    from equipoise.registry import METHODS

    # "sum" and "mean" are also reductions of a tensor; a comparison with them is no branch on a
    # method.
    return set(METHODS) - {"sum", "mean"}


def compares_no_registered_name(all_sources: Sources) -> list[str]:
    return no_method_name_is_compared(all_sources, registered_tokens())


RULES: list[Callable[[Sources], list[str]]] = [
    stages_are_siblings,
    stages_never_call_autograd,
    only_drivers_combine_stages,
    the_engine_sees_contracts_only,
    there_is_no_circle,
    parameters_are_moved_in_one_place,
    core_is_light,
    only_the_lab_imports_the_lab,
    compares_no_registered_name,
    modules_are_short,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule: Callable[[Sources], list[str]]) -> None:
    assert rule(sources()) == []


def test_the_rules_see_the_whole_package() -> None:
    found = sources()
    parts = {part(module) for module in found}
    assert {"", *STAGE_FREE, *MAY_COMBINE_STAGES, "weighting", "aggregation"} <= parts
    assert {"aggregation.mgda", "lab.cli"} <= set(found)
    assert {"weighting", "aggregation"} <= own_imports("assembly", found["assembly"], found)
    assert len(registered_tokens()) >= 10
    for module, names in LAZY_IMPORTS.items():
        used = {part(name) for name in imports(module, found[module], found)}
        assert names <= used, "an exception that nobody needs any more"


@pytest.mark.parametrize(
    ("rule", "module", "text"),
    [
        (stages_are_siblings, "weighting.x", "from ..aggregation import MGDA"),
        (stages_are_siblings, "weighting.x", "import equipoise.aggregation.mgda"),
        (stages_are_siblings, "aggregation.x", "from .. import line_search"),
        (stages_are_siblings, "sharpness", "from equipoise import weighting"),
        (stages_are_siblings, "line_search", "from .weighting.base import Weighting"),
        (stages_are_siblings, "weighting.x", "def f():\n    from ..step import Step"),
        (stages_are_siblings, "weighting.x", "from equipoise import MGDA"),
        (only_drivers_combine_stages, "trunk", "from equipoise import MGDA, EW"),
        (stages_never_call_autograd, "aggregation.x", "import torch\ntorch.autograd.grad(1, 2)"),
        (stages_never_call_autograd, "weighting.x", "def f(loss):\n    loss.backward()"),
        (stages_never_call_autograd, "sharpness", "from torch.autograd import grad as g"),
        (stages_never_call_autograd, "weighting.x", "from torch import autograd as a"),
        (stages_never_call_autograd, "line_search", "from torch.func import vjp as v"),
        (the_engine_sees_contracts_only, "engine.x", "from ..step import Step"),
        (the_engine_sees_contracts_only, "engine.x", "from equipoise.aggregation import MGDA"),
        (the_engine_sees_contracts_only, "engine.x", "import equipoise.weighting.ew"),
        (
            the_engine_sees_contracts_only,
            "engine.x",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..recipe import Recipe",
        ),
        (there_is_no_circle, "aggregation.x", "from .y import a"),
        (
            there_is_no_circle,
            "aggregation.x",
            "if TYPE_CHECKING:\n    from equipoise.aggregation.y import a",
        ),
        (parameters_are_moved_in_one_place, "grouping.x", "p.data.copy_(q)"),
        (only_drivers_combine_stages, "replay", "from equipoise.weighting.base import Weighting"),
        (
            only_drivers_combine_stages,
            "trunk",
            "from .aggregation import Sum\nfrom .weighting import EW",
        ),
        (only_drivers_combine_stages, "aggregation.x", "from ..weighting import EW"),
        (core_is_light, "trunk", "import sklearn"),
        (core_is_light, "diagnostics.x", "def f():\n    from matplotlib import pyplot"),
        (core_is_light, "diagnostics.x", "def f():\n    import torchmetrics"),
        (core_is_light, "diagnostics.reliability", "import torchmetrics"),
        (core_is_light, "diagnostics.reliability", "if 1:\n    from torchmetrics import Metric"),
        (core_is_light, "diagnostics.reliability", "class A:\n    import torchmetrics as t"),
        (core_is_light, "diagnostics.reliability", "def f():\n    import sklearn"),
        (
            core_is_light,
            "diagnostics.reliability",
            "import torchmetrics.functional\ndef f():\n    import torchmetrics",
        ),
        (only_the_lab_imports_the_lab, "", "from .lab import cli"),
        (only_the_lab_imports_the_lab, "diagnostics.x", "from ..lab.data import load"),
        (only_the_lab_imports_the_lab, "step", "import equipoise.lab"),
        (modules_are_short, "trunk", "\n" * 301),
        (modules_are_short, "lab.cli", "\n" * 401),
    ],
)
def test_a_source_that_breaks_the_rule_is_found(
    rule: Callable[[Sources], list[str]], module: str, text: str
) -> None:
    context = {
        "": "",
        "aggregation": "",
        "aggregation.y": "from .x import b",
        "engine": "",
        "step": "",
        "recipe": "",
        "weighting": "",
        "weighting.ew": "",
        "diagnostics": "",
    }
    assert rule({**context, module: text})


@pytest.mark.parametrize(
    "text",
    [
        "if method == 'mgda': pass",
        "if method in ('ew', 'mgda'): pass",
        "match method:\n    case 'mgda': pass",
        "name.startswith('mgda')",
    ],
)
def test_a_compared_method_name_is_found(text: str) -> None:
    assert no_method_name_is_compared({"lab.x": text}, {"mgda"})
    assert not no_method_name_is_compared({"recipe": text}, {"mgda"})


def test_what_the_rules_allow() -> None:
    allowed = {
        "": "from .step import Step\nfrom .weighting import EW\nfrom .aggregation import Sum",
        "step": "from .weighting import EW\nfrom .aggregation import Sum\nfrom . import gradients",
        "aggregation": "from .mgda import MGDA",
        "aggregation.mgda": "import math\nimport numpy\nfrom scipy.optimize import nnls\n"
        "import torch\nfrom ..errors import TaskError\nfrom .base import GramAggregator",
        "weighting": "",
        "aggregation.base": "",
        "weighting.base": "",
        "sharpness": "",
        "functional": "import torch\ntorch.autograd.grad(1, 2)\nfrom .errors import TaskError",
        "engine.rows": "import torch\ntorch.autograd.grad(1, 2)\nfrom ..errors import TaskError",
        "engine.stages": "from equipoise.aggregation.base import Aggregator\n"
        "from ..weighting.base import Weighting\nfrom ..sharpness import TaskSharpness",
        "lab.cli": "import typer\nfrom ..recipe import METHODS\nfrom equipoise import Step\n"
        "from .data import load\nif kind == 'binary': recipes = ['mgda', 'ew']",
        "__main__": "from .lab.cli import main",
        "diagnostics.reliability": "import torch\ndef f():\n    from torchmetrics import Metric",
        "errors": "import difflib",
    }
    for rule in RULES:
        assert rule(allowed) == [], rule.__name__
