"""The method that CONTRIBUTING.md adds is a real one, and one line is all that it needs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

REGISTER = """
import equipoise
from unit_mean import UnitMean

equipoise.register("unit-mean", UnitMean)  # as the line in the table does
"""

EVERYWHERE = """
import sys
sys.path.insert(0, "docs")
import register_unit_mean
import gen_pages
from equipoise import Recipe

assert "`unit-mean`" in gen_pages.methods_table("aggregation")
print(Recipe.parse("IGBv1+UnitMean-UB(update_every=5)"), Recipe.parse("F-UnitMean(rho=0.1)"))

import pytest
options = ("-p", "no:cacheprovider", "-k", "unit-mean", "-v")
sys.exit(pytest.main([*options, "tests/conformance"]))
"""


def example() -> str:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^( *)```python\n(.*?)^ *```$", text, flags=re.DOTALL | re.MULTILINE)
    return next(textwrap.dedent(block) for _, block in blocks if "class UnitMean" in block)


def test_the_example_is_short() -> None:
    assert len(example().splitlines()) < 60


def test_one_line_of_registry_brings_it_everywhere(tmp_path: Path) -> None:
    (tmp_path / "unit_mean.py").write_text(f'"""A method."""\n{example()}', encoding="utf-8")
    (tmp_path / "register_unit_mean.py").write_text(REGISTER, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT / 'src'}"}

    command = (sys.executable, "-c", EVERYWHERE)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    first, _, rest = done.stdout.partition("\n")
    assert first == "igbv1+unit-mean-ub(update_every=5) f-unit-mean(rho=0.1)"
    passed = re.search(r"(\d+) passed", rest)
    assert passed
    assert int(passed[1]) > 30
