"""Each example runs, costs at most five lines, and with a plain sum does what the plain loop does.

`plain/` holds the same programs with a plain loss, as their reader had them before.
"""

from __future__ import annotations

import ast
import importlib
import re
import runpy
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import equipoise as eq

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = {path.name for path in (ROOT / "examples").glob("*.py")}
PLAIN = Path(__file__).parent / "plain"
NEEDS = {
    "lightning_module.py": "pytorch_lightning",
    "transformers_trainer.py": "transformers",
    "accelerate_loop.py": "accelerate",
    "peft_lora.py": "peft",
    "timm_backbone.py": "timm",
    "optimizers.py": "schedulefree",
}
LEARNED = {
    # The number to watch, and what it falls to (times its first value, where it is printed often).
    "own_loop.py": (r"colour ([\d.]+)", 0.8),
    "float16.py": (r"colour ([\d.]+)", 0.8),
    "peft_lora.py": (r"score ([\d.]+)", 0.8),
    "timm_backbone.py": (r"classes ([\d.]+)", 0.9),
}

# Warnings of the frameworks are theirs; ours stay errors.
pytestmark = pytest.mark.filterwarnings("ignore", "error:::equipoise")


@pytest.fixture
def needed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Skips where a package is missing. timm is used without torchvision, whose build on PyPI
    does not import with a CPU-only torch; a backbone needs nothing of it."""

    def need(name: str) -> None:
        if name == "timm_backbone.py" and "timm" not in sys.modules:
            for part in ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional",
                         ".datasets"):  # fmt: skip
                monkeypatch.setitem(sys.modules, f"torchvision{part}", mock.MagicMock())
        if name in NEEDS:
            pytest.importorskip(NEEDS[name], reason=f"needs pip install --no-deps {NEEDS[name]}")

    return need


def code_of(path: Path) -> int:
    """Lines of code: no empty ones, no comments, no docstrings."""
    text = path.read_text(encoding="utf-8")
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            left_out |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(map(str.strip, text.splitlines()), 1)
    return sum(bool(s) and not s.startswith("#") and k not in left_out for k, s in lines)


def output_of(path: Path, capsys: pytest.CaptureFixture) -> str:
    capsys.readouterr()
    runpy.run_path(str(path), run_name="__main__")
    lines = capsys.readouterr().out.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("{"))  # the Trainer's own


def test_every_example_is_short_and_has_its_plain_loop() -> None:
    assert {path.name for path in PLAIN.glob("*.py")} == EXAMPLES - {"two_processes.py"}
    for name in EXAMPLES:
        text = (ROOT / "examples" / name).read_text(encoding="utf-8")
        assert len(text.splitlines()) < 80, name
        assert f"python examples/{name}" in text


def test_lines_are_counted_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        '"""A.\n\nB.\n"""\n\n# c\nx = [\n    1,\n]\n\n\ndef f():\n    """D."""\n'
    )
    assert code_of(tmp_path / "a.py") == 4


@pytest.mark.parametrize("name", sorted(EXAMPLES - {"two_processes.py"}))
def test_it_costs_at_most_five_lines(name: str) -> None:
    assert "equipoise" not in (PLAIN / name).read_text(encoding="utf-8")
    assert code_of(ROOT / "examples" / name) - code_of(PLAIN / name) <= 5


@pytest.mark.parametrize("name", sorted(EXAMPLES - {"two_processes.py"}))
def test_it_runs_and_as_a_plain_sum_prints_what_the_plain_loop_prints(
    name: str,
    needed: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    needed(name)
    output = output_of(ROOT / "examples" / name, capsys)
    expected = output_of(PLAIN / name, capsys)
    assert output.count("\n") == expected.count("\n") > 0
    assert output != expected
    if name in LEARNED:
        pattern, share = LEARNED[name]
        values = [float(value) for value in re.findall(pattern, output)]
        assert values[-1] < share * values[0]

    def as_sum(model: Any, losses: Any, optimizer: Any, *_: Any, **options: Any) -> eq.Step:
        kept = {key: options[key] for key in options.keys() & {"shared", "scaler"}}
        return Step(model, losses, optimizer, **kept)

    Step = eq.Step  # noqa: N806
    monkeypatch.setattr(eq, "Step", as_sum)
    numbers = re.compile(r"\d+\.\d+")
    found = output_of(ROOT / "examples" / name, capsys)
    assert numbers.sub("", found) == numbers.sub("", expected)
    assert [*map(float, numbers.findall(found))] == pytest.approx(
        [*map(float, numbers.findall(expected))], abs=2e-3
    )


def test_two_processes_equal_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    # Imported, not run as a file: the processes that it starts have to find `work` by name.
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    importlib.import_module("two_processes").main()
    found = re.search(r"largest difference ([\d.e+-]+)", capsys.readouterr().out)
    assert float(found[1]) < 1e-12
