"""Every message that docs/messages.md quotes is one of the sources', word for word."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "messages.md").read_text(encoding="utf-8")
ANY = "\0"
"""Where a value stands in a message of the sources."""
TABLE = re.compile(r"^\| message \| what to do \|\n\| --- \| --- \|\n((?:\|.*\n)+)", re.MULTILINE)
ROW = re.compile(r"^\| (`+) ?(.+?) ?\1 \|", re.MULTILINE)
TASK = "task ...: "


def constants_of(trees: list[ast.Module]) -> dict[str, str]:
    """The texts that have a name, which f-strings may hold."""
    return {
        node.targets[0].id: text
        for tree in trees
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and (text := read(node.value, {})) is not None
    }


def texts(trees: list[ast.Module]) -> set[str]:
    """String constants and f-strings of sources, joined where they are added; no docstrings."""
    constants, found = constants_of(trees), set()
    for tree in trees:
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        found |= {
            text
            for node in ast.walk(tree)
            if id(node) not in docstrings and (text := read(node, constants)) is not None
        }
    return {re.sub(r"\{\d\}", ANY, text) for text in found if " " in text}


def read(node: ast.AST, constants: dict[str, str]) -> str | None:
    """The text of an expression with `ANY` for its values; None: it is no text."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        parts = (read(part, constants) for part in node.values)
        return "".join(ANY if part is None else part for part in parts)
    if isinstance(node, ast.FormattedValue):
        return constants.get(node.value.id) if isinstance(node.value, ast.Name) else None
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = read(node.left, constants), read(node.right, constants)
        if left is None and right is None:
            return None
        return (ANY if left is None else left) + (ANY if right is None else right)
    return None


@pytest.fixture(scope="module")
def sources() -> str:
    """All texts of the library without the lab, one after the other."""
    paths = (ROOT / "src" / "equipoise").rglob("*.py")
    core = [path.read_text(encoding="utf-8") for path in paths if "lab" not in path.parts]
    found = texts([ast.parse(source) for source in core])
    return "\n".join(text.replace("\n", " ") for text in sorted(found))


def quoted(page: str) -> list[str]:
    """The messages at the beginning of the rows of their tables."""
    tables = TABLE.findall(page)
    return [text for table in tables for _, text in ROW.findall(table)]


def exists(message: str, sources: str) -> bool:
    """Whether a text has the fixed parts of a message, in order, from its first word to its last.

    Three dots stand for anything, and values of the sources only for three dots. A TaskError puts
    the name of the task before its text.
    """
    enough = len(re.findall("[a-z]", message)) > 7
    found = (_pattern(text).search(sources) for text in (message, message.removeprefix(TASK)))
    return enough and any(found)


def _pattern(message: str) -> re.Pattern[str]:
    fixed = [re.escape(part) for part in message.split("...")]
    return re.compile(f"^{'.*'.join(fixed)}$", re.MULTILINE)


def test_the_page_quotes_what_is_said(sources: str) -> None:
    rows = quoted(PAGE)
    assert len(rows) > 100
    assert [row for row in rows if not exists(row, sources)] == []
    assert len(rows) == len(set(rows))


def test_errors_of_a_task_begin_with_its_name(sources: str) -> None:
    assert f"task {ANY}: {ANY}" in sources.split("\n")


GOOD = "task ...: target is NaN in part for ... samples. Say missing='loss' if the loss function"


@pytest.mark.parametrize(
    ("row", "good"),
    [
        ("targets is empty; give at least one task's target.", True),
        ("targets is empty; ...", True),
        ("targets is empty; give", False),
        ("is empty; give at least one task's target.", False),
        ("targets is empty; give one task's target.", False),
        (f"{GOOD} ...", True),
        (f"{GOOD.replace('in part', 'partly')} ...", False),
        ("task ...: target is NaN in part for 3 of 4 samples. ...", False),
        ("no loss reaches the features of the trunk; ...", True),
        ("......... .... ... . . ....", False),
    ],
)
def test_a_wrong_row_is_found(row: str, good: bool, sources: str) -> None:
    page = f"text\n\n| message | what to do |\n| --- | --- |\n| `{row}` | Nothing. |\n"
    assert quoted(page) == [row]
    assert exists(row, sources) is good


def test_rows_with_backticks_are_read() -> None:
    table = "| `` Leave `level` out. `` | x |\n| no message | y |\n"
    assert quoted(f"| message | what to do |\n| --- | --- |\n{table}") == ["Leave `level` out."]
    assert quoted(f"| class | what to do |\n| --- | --- |\n{table}") == []


def test_what_counts_as_a_text() -> None:
    source = '''
WHY = "because of " "this."
def f(x):
    """No message at all."""
    raise E(f"it is {x}; " + g(x), f"not here; {WHY}", "for {0} and {0}", "word")
'''
    expected = {"because of this.", f"it is {ANY}; {ANY}", f"it is {ANY}; "}
    expected |= {"not here; because of this.", f"for {ANY} and {ANY}"}
    assert expected <= texts([ast.parse(source)])
    assert not any("No message" in text or text == "word" for text in texts([ast.parse(source)]))


SHOWN = re.compile(r"`([\w/]+\.py)::(test_\w+)`")


def test_the_tests_that_the_page_names_exist() -> None:
    named = SHOWN.findall(PAGE)
    assert len(named) > 60
    missing = [
        f"{file}::{test}"
        for file, test in named
        if not (ROOT / "tests" / file).exists()
        or f"def {test}(" not in (ROOT / "tests" / file).read_text(encoding="utf-8")
    ]
    assert missing == []
