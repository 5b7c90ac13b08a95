"""Each example runs as its reader would run it, and says what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def output_of(name: str, folder: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_has_a_test_and_is_short() -> None:
    tested = {"own_loop.py", "lightning_module.py", "two_processes.py"}
    assert {path.name for path in EXAMPLES} == tested
    for path in EXAMPLES:
        assert len(path.read_text(encoding="utf-8").splitlines()) < 80, path.name


def test_own_loop_learns_both_tasks(tmp_path: Path) -> None:
    found = re.findall(r"price ([\d.]+), colour ([\d.]+)", output_of("own_loop.py", tmp_path))
    prices, colours = ([float(value) for value in column] for column in zip(*found, strict=True))
    assert len(prices) == 5
    assert prices[-1] < 0.5 * prices[0]
    assert colours[-1] < 0.8 * colours[0]


def test_lightning_module_trains_two_epochs(tmp_path: Path) -> None:
    pytest.importorskip("pytorch_lightning")
    output = output_of("lightning_module.py", tmp_path)
    assert "after 2 epochs" in output
    losses = dict(re.findall(r"'loss/(\w+)': ([\d.]+)", output))
    assert set(losses) == {"price", "colour"}


def test_two_processes_equal_one(tmp_path: Path) -> None:
    output = output_of("two_processes.py", tmp_path)
    difference = float(re.search(r"largest difference ([\d.e+-]+)", output)[1])
    assert difference < 1e-12
