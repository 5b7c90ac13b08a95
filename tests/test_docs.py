"""The documentation says what is there, and what it shows runs."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest

import equipoise

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
BLOCK = re.compile(r"^( *)```python\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


def python_of(text: str) -> list[str]:
    """The python blocks of a page, in order; blocks that only include a file are left out."""
    blocks = [textwrap.dedent(code) for _, code in BLOCK.findall(text)]
    return [code for code in blocks if "--8<--" not in code]


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


RUNNABLE = [path for path in PAGES if python_of(path.read_text(encoding="utf-8"))]


@pytest.fixture(scope="module")
def gen_pages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gen_pages", ROOT / "docs" / "gen_pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_blocks_are_found() -> None:
    text = "a\n\n```python\nx = 1\n```\n\n1. b\n\n    ```python\n    y = 2\n    ```\n"
    assert python_of(text + '```python\n--8<-- "f.py"\n```\n') == ["x = 1\n", "y = 2\n"]
    named = {label(path) for path in RUNNABLE}
    assert {"README.md", "CONTRIBUTING.md", "docs/index.md", "docs/start.md"} <= named
    assert "docs/concepts.md" in named


RUN_ALL = """
import json, runpy, sys, traceback
errors = {}
for page in sys.argv[1:]:
    try:
        runpy.run_path(page, run_name="__main__")
    except BaseException:
        errors[page] = traceback.format_exc()
print()
print(json.dumps(errors))
"""


@pytest.fixture(scope="module")
def page_errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The pages that do not run, with their tracebacks; one process imports torch once for all."""
    folder = tmp_path_factory.mktemp("pages")
    programs = {}
    for path in RUNNABLE:
        program = folder / (label(path).replace("/", "-") + ".py")
        program.write_text("\n".join(python_of(path.read_text("utf-8"))), encoding="utf-8")
        programs[str(program)] = label(path)
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", RUN_ALL, *programs],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.splitlines()[-1])
    return {programs[program]: error for program, error in errors.items()}


@pytest.mark.parametrize("page", [label(path) for path in RUNNABLE])
def test_what_a_page_shows_runs(page: str, page_errors: dict[str, str]) -> None:
    """The blocks of one page, one after the other, as a reader would type them."""
    assert page_errors.get(page, "") == ""


@pytest.mark.parametrize("path", [ROOT / "docs/start.md"], ids=label)
def test_the_printed_direction_is_the_true_one(path: Path) -> None:
    import torch

    text = path.read_text(encoding="utf-8")
    shown = re.search(r"rows = (torch\.tensor\(.*\))\nprint\(eq\.MGDA\(\)\(rows\)\)  # (.*)", text)
    rows, direction = (
        eval(part, {"torch": torch, "tensor": torch.tensor}) for part in shown.groups()
    )
    torch.testing.assert_close(equipoise.MGDA()(rows), direction, rtol=1e-6, atol=1e-6)


def documented(gen_pages: ModuleType) -> set[int]:
    """The objects that the reference pages document, by identity."""
    found = set()
    for page in (ROOT / "docs" / "reference").glob("*.md"):
        text = gen_pages.expand(page.read_text(encoding="utf-8"))
        for path in re.findall(r"^::: (\S+)$", text, re.MULTILINE):
            module, _, name = path.rpartition(".")
            found.add(id(getattr(importlib.import_module(module), name)))
    return found


def test_every_public_name_is_in_the_reference(gen_pages: ModuleType) -> None:
    known = documented(gen_pages)
    missing = [
        name
        for name in equipoise.__all__
        if not isinstance(getattr(equipoise, name), ModuleType | str)
        and id(getattr(equipoise, name)) not in known
    ]
    assert missing == []


def test_the_method_pages_list_the_registry(gen_pages: ModuleType) -> None:
    from equipoise.registry import METHODS

    page = gen_pages.expand((ROOT / "docs" / "methods.md").read_text(encoding="utf-8"))
    assert "<!-- methods" not in page
    cells = re.findall(r"^\| (`.*?`) \|", page, re.MULTILINE)
    plain, flat = [], []
    for token in re.findall("`(.*?)`", " ".join(cells)):
        (flat if token.startswith("f-") else plain).append(token)
    assert sorted(plain) == sorted(METHODS)
    assert flat
    for recipe in flat:
        assert str(equipoise.Recipe.parse(recipe)).startswith("f-cagrad")


def test_each_method_has_a_whole_sentence_for_a_summary() -> None:
    from equipoise.registry import METHODS

    cut = [method.token for method in METHODS.values() if not method.summary.endswith(".")]
    assert cut == []


def test_no_docstring_is_taken_for_html() -> None:
    """ "<g_i, d>" is a tag to Markdown and vanishes from the page; in backticks it stays."""
    eaten = []
    for name in equipoise.__all__:
        thing = getattr(equipoise, name)
        members = vars(thing).values() if isinstance(thing, type) else []
        for documented_thing in (thing, *members):
            text = getattr(documented_thing, "__doc__", None) or ""
            if re.search(r"<[A-Za-z/]", re.sub(r"`[^`]*`", "", text)):
                eaten.append(f"{name}: {text.splitlines()[0]}")
    assert eaten == []


def test_a_mark_for_an_unknown_axis_is_an_error(gen_pages: ModuleType) -> None:
    with pytest.raises(ValueError, match="no registered method has the axis 'colour'"):
        gen_pages.expand("<!-- methods: colour -->")


def test_links_between_files_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(
            r"\]\(([^)#:\s]+)(?:#[\w-]*)?\)", page.read_text(encoding="utf-8")
        ):
            base = ROOT if page.name in {"README.md", "CONTRIBUTING.md"} else page.parent
            assert (base / target).exists(), f"{label(page)} links to {target}"


def test_the_version_is_the_same_everywhere() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    version = re.search(r'^version = "(.+?)"', pyproject, re.MULTILINE)[1]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_a_table_of_results_is_taken_as_it_was_measured(gen_pages: ModuleType) -> None:
    page = gen_pages.expand("Before.\n\n<!-- result: flat-regions accuracy -->\n\nAfter.")
    measured = json.loads((ROOT / "docs/results/flat-regions.json").read_text(encoding="utf-8"))
    assert "\n".join(measured["tables"]["accuracy"]) in page
    assert "\n| --- | --- |" in page  # a table, line by line
    with pytest.raises(KeyError):
        gen_pages.expand("<!-- result: flat-regions colour -->")
    rows = gen_pages.result("step rows").splitlines()
    first = json.loads((ROOT / "docs/results/step.json").read_text(encoding="utf-8"))["rows"][0]
    assert rows[0] == f"| {' | '.join(first)} |" and str(first["over SGD"]) in rows[2]


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda p: p.name)
def test_every_measured_table_of_a_page_is_one(gen_pages: ModuleType, page: Path) -> None:
    for mark in gen_pages.MARK.finditer(page.read_text(encoding="utf-8")):
        if mark[1] == "result":
            lines = gen_pages.result(mark[2]).splitlines()
            assert len(lines) > 2 and all(re.fullmatch(r"\|.*\||", line) for line in lines), mark[0]
