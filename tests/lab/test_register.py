"""Methods from a file of the user's own, from the shell to the page, and in a killed run."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from equipoise.lab import own_methods, runs
from equipoise.lab.cli import main
from equipoise.lab.config import ConfigError, RunConfig
from equipoise.lab.files import read_json, write_json
from equipoise.registry import FLAT, METHODS
from equipoise.testing import check_aggregator, check_weighting

MINE = '''
"""Methods of my own."""

import numpy as np
import torch

import equipoise as eq


@eq.register("tempered")
class Tempered(eq.GramAggregator):
    """Gradients of unlike lengths, made more alike."""

    def __init__(self, power: float = 0.5) -> None:
        super().__init__()
        self.power = power

    def weights(self, gram, losses):
        lengths = np.sqrt(np.diagonal(gram))
        return np.where(lengths > 0, np.maximum(lengths, 1e-12) ** -self.power, 0.0)


@eq.register("ramp")
class Ramp(eq.Weighting):
    """Losses count more from step to step."""

    def __init__(self, most: float = 2.0) -> None:
        super().__init__()
        self.most = most
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def weigh(self, losses, present):
        self.steps += 1
        return torch.full_like(losses, min(1 + 0.1 * float(self.steps), self.most))


@eq.register("halving")
class Halving(eq.Backtracking):
    """Backtracking by halves."""

    def __init__(self, upper: float = 1.0) -> None:
        super().__init__(upper=upper, shrink=0.5)
'''
QUICK = ("--data", "multidigits(sizes=(64, 32, 32))", "--epochs", "2", "--batch-size", "32",
         "--device", "cpu", "--probes", "0")  # fmt: skip


@pytest.fixture(autouse=True)
def forgotten(monkeypatch, tmp_path) -> Iterator[None]:
    """An empty folder with a file of methods; what it registers is gone after the test."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    tables = (METHODS, FLAT, own_methods._brought, own_methods._read)
    before = [dict(table) for table in tables]
    modules = set(sys.modules)
    yield
    own_methods._installed.cache_clear()
    for table, was in zip(tables, before, strict=True):
        table.clear()
        table.update(was)
    for name in set(sys.modules) - modules:
        if not hasattr(sys.modules[name], "__file__") or str(tmp_path) in str(
            sys.modules[name].__file__
        ):
            del sys.modules[name]


def forget() -> None:
    """Be a process that has just been started."""
    for token in [t for t in METHODS if t.startswith(("tempered", "ramp", "halving"))]:
        del METHODS[token]
    for token in [t for t in FLAT if "tempered" in t]:
        del FLAT[token]
    own_methods._brought.clear()
    own_methods._read.clear()


@pytest.fixture
def equipoise(monkeypatch, capsys):
    """Calls the command: (exit status, standard output, standard error)."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["equipoise", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return call


def test_list_shows_them(equipoise):
    status, out, err = equipoise("list", "--methods", "mine.py")
    assert (status, err) == (0, "")
    assert "tempered, tempered-ub" in out and "made more alike." in " ".join(out.split())
    assert "ramp" in out and "halving" in out


def test_compare_in_processes_makes_a_table_and_a_page(equipoise, tmp_path):
    recipes = ("ramp+tempered(power=1)", "f-tempered", "halving+tempered", "ew")
    command = ("compare", *recipes, *QUICK, "--methods", "mine.py", "--jobs", "2", "--out", "c")
    status, out, err = equipoise(*command)
    assert status == 0, err
    names = ("ramp+tempered(power=1.0)", "f-tempered", "halving+tempered", "ew")
    page = (tmp_path / "c" / "report.html").read_text()
    for name in names:
        assert name in out and name in page
    # Line searches make plain SGD steps; the page knows that this is one.
    assert "line searches along plain SGD steps" in page
    folder = tmp_path / "c" / "runs" / "f-tempered-seed0"
    assert read_json(folder / "config.json")["methods"] == [str(tmp_path / "mine.py")]
    # A run whose recipe needs nothing of the file is the same with it and without.
    assert read_json(tmp_path / "c" / "runs" / "ew-seed0" / "config.json")["methods"] == []
    assert equipoise(*command)[:2] == (0, out)

    forget()
    status, out, _ = equipoise("diagnose", folder, "--only", "conflict")
    assert status == 0
    forget()
    assert equipoise("report", "c")[0] == 0
    assert "line searches along plain SGD" in (tmp_path / "c" / "report.html").read_text()

    forget()
    (tmp_path / "mine.py").rename(tmp_path / "moved.py")
    assert equipoise("report", "c")[0] == 0
    status, _, err = equipoise("diagnose", folder, "--only", "entropy")
    assert status == 2
    assert err == f"equipoise: --methods {tmp_path}/mine.py: there is no such file.\n"
    status, _, err = equipoise("diagnose", folder, "--only", "entropy", "--methods", "moved.py")
    assert status == 0, err


def test_group_takes_them(equipoise):
    status, out, err = equipoise(
        "group", "--recipe", "tempered", "--methods", "mine.py", "--data",
        "digits-attributes", "--epochs", "1", "--checkpoints", "1", "--groups", "2",
        "--device", "cpu",
    )  # fmt: skip
    assert status == 0, err


def test_a_killed_run_goes_on_with_them(tmp_path):
    config = RunConfig.of(
        recipe="ramp(most=1.5)+tempered", data="multidigits(sizes=(64, 32, 32))", epochs=3,
        batch_size=32, device="cpu", probes=0, methods=["mine.py"],
    )  # fmt: skip
    whole = runs.train(config, tmp_path / "whole")

    class Killed(Exception):
        pass

    def kill(epochs: float, _: object) -> None:
        if epochs > 2:
            raise Killed

    with pytest.raises(Killed):
        runs.train(config, tmp_path / "killed", kill)
    forget()
    there = read_json(tmp_path / "killed" / "config.json")
    resumed = runs.train(RunConfig.of(**there), tmp_path / "killed")
    assert resumed["test"] == whole["test"]

    forget()  # a worker gets the configuration as it is, without its checks
    received = pickle.loads(pickle.dumps(config))
    assert str(received.read_recipe()) == config.recipe


def test_old_configurations_load_and_go_on(tmp_path):
    config = RunConfig.of(recipe="ew", data="multidigits(sizes=(64, 32, 32))", epochs=1)
    old = config.model_dump(mode="json")
    del old["methods"]
    assert RunConfig.of(**old) == config
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run" / "config.json", old)
    runs.refuse_another_run(config, tmp_path / "run")


def test_conformance_of_what_a_file_registers():
    own_methods.load(["mine.py"])
    check_aggregator(METHODS["tempered"].factory)
    check_weighting(METHODS["ramp"].factory)


def test_a_module_beside_the_file_and_a_module_by_name(equipoise, tmp_path, monkeypatch):
    (tmp_path / "layers_of_mine.py").write_text("SHARE = 0.25\n")
    (tmp_path / "two.py").write_text(
        "import equipoise as eq\nfrom layers_of_mine import SHARE\n"
        "eq.register('quarter', lambda: lambda rows: SHARE * rows.sum(0), axis='aggregation')\n"
    )
    status, out, err = equipoise("list", "--methods", "two.py", "--methods", "mine.py")
    assert status == 0, err
    assert "quarter" in out and "tempered" in out
    assert str(tmp_path) not in sys.path
    (tmp_path / "by_name.py").write_text(MINE.replace('register("', 'register("my-'))
    monkeypatch.syspath_prepend(str(tmp_path))
    config = RunConfig.of(recipe="my-tempered+ramp", methods=["by_name", "mine.py"])
    assert config.methods == ("by_name", str(tmp_path / "mine.py"))
    config = RunConfig.of(recipe="my-tempered", methods=["by_name", "mine.py", "by_name"])
    assert config.methods == ("by_name",)


def test_a_changed_file_is_read_again(tmp_path):
    own_methods.load(["mine.py"])
    first = METHODS["tempered"].factory
    own_methods.load(["mine.py"])
    assert METHODS["tempered"].factory is first
    (tmp_path / "mine.py").write_text(MINE.replace("power: float = 0.5", "power: float = 0.25"))
    own_methods.load(["mine.py"])
    assert METHODS["tempered"].parameters["power"] == 0.25


@pytest.mark.parametrize("command", ["train tempered", "compare ew", "list", "group", "report .",
                                     "diagnose ."])  # fmt: skip
@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "--methods bad.py: there is no such file."),
        ("import nothing_of_the_kind\n",
         "--methods bad.py, line 1: ModuleNotFoundError: No module named 'nothing_of_the_kind'"),
        ("x = 1\n\ny = x / 0\n", "--methods bad.py, line 3: ZeroDivisionError: division by zero"),
        ("def f(:\n", "--methods bad.py, line 1: SyntaxError: "),
        ("import sys\nsys.exit(3)\n", "--methods bad.py, line 2: SystemExit: 3"),
        ("x = 1\n", "--methods bad.py registers no method; call equipoise.register in it."),
        ("import equipoise as eq\n\neq.register('cagrad', type('Mine', (eq.Sum,), {}))\n",
         "--methods bad.py, line 3: 'cagrad' cannot be registered: cagrad is the name of equi"),
    ],
)  # fmt: skip
def test_wrong_use_ends_with_2_and_one_sentence(equipoise, tmp_path, command, text, sentence):
    if text is not None:
        (tmp_path / "bad.py").write_text(text)
    status, out, err = equipoise(*command.split(), "--methods", "bad.py")
    assert status == 2
    assert out == ""
    assert err.startswith(f"equipoise: {sentence}"), err
    assert err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_module_that_is_not_there_may_be_a_file(equipoise):
    status, _, err = equipoise("list", "--methods", "mine")
    assert status == 2
    assert err == (
        "equipoise: --methods mine: there is no module mine; write the path of a file with its "
        "ending, my_methods.py.\n"
    )


def test_a_recipe_of_an_unknown_method_still_says_so(equipoise):
    status, _, err = equipoise("train", "temperred", *QUICK, "--methods", "mine.py")
    assert status == 2
    assert "unknown token 'temperred'; did you mean 'tempered'" in err


# ----------------------------------------------------------------------- installed packages


def installed(monkeypatch, *values: str) -> None:
    """Let packages be installed that name these entry points."""
    points = [EntryPoint("mine", value, own_methods.GROUP) for value in values]
    monkeypatch.setattr(own_methods, "entry_points", lambda group: points)
    own_methods._installed.cache_clear()


def test_installed_packages_bring_modules_and_functions(equipoise, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "package_of_mine.py").write_text(MINE)
    (tmp_path / "other_of_mine.py").write_text(
        "import equipoise as eq\n\n\ndef enter():\n"
        "    eq.register('plain', lambda: eq.Sum(), axis='aggregation')\n"
    )
    installed(monkeypatch, "package_of_mine", "other_of_mine:enter")
    status, out, err = equipoise("list")
    assert status == 0, err
    assert "tempered" in out and "plain" in out
    config = RunConfig.of(recipe="tempered")
    assert config.methods == ()  # the installation has it
    # Named at the command line as well, it is the same methods.
    assert RunConfig.of(recipe="tempered", methods=["package_of_mine"]).recipe == "tempered"


def test_an_installed_package_that_fails_is_named(equipoise, monkeypatch):
    installed(monkeypatch, "module_that_is_gone")
    status, _, err = equipoise("list")
    assert status == 2
    assert err == (
        "equipoise: the methods (module_that_is_gone): ModuleNotFoundError: No module named "
        "'module_that_is_gone'\n"
    )
    with pytest.raises(ConfigError, match="module_that_is_gone"):
        RunConfig.of(recipe="ew")
