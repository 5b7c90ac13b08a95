"""Many runs: side by side, resumed, failed, killed."""

from __future__ import annotations

import json
import multiprocessing

import pytest

from equipoise.errors import TaskError
from equipoise.lab import comparison, runs
from equipoise.lab.comparison import Comparison, Failure, Job, run_folders, run_name
from equipoise.lab.config import ConfigError, RunConfig
from equipoise.lab.data import DATASETS
from equipoise.lab.data.digits import multidigits
from equipoise.lab.progress import Display, describe_losses


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A small data set, in this process only."""
    monkeypatch.setitem(
        DATASETS, "tiny", lambda root, seed: multidigits(seed=seed, sizes=(64, 64, 64))
    )


def configs(recipes, seeds=(0,), **values) -> list[RunConfig]:
    given = {"data": "tiny", "epochs": 2, "batch_size": 32, "device": "cpu", **values}
    return [RunConfig.of(recipe=r, seed=s, **given) for r in recipes for s in seeds]


def without_times(result):
    return {k: v for k, v in result.items() if k not in ("train_seconds", "finished")}


def test_outcomes_are_in_the_order_given(tmp_path):
    outcomes = Comparison(configs(["stl", "ew"], (1, 0)), tmp_path).run()
    assert [(o["recipe"], o["seed"]) for o in outcomes] == [
        ("stl", 1), ("stl", 0), ("ew", 1), ("ew", 0),
    ]  # fmt: skip
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert written["recipes"] == ["stl", "ew"]
    assert written["seeds"] == [1, 0]
    assert [path.name for path in run_folders(tmp_path)] == [
        "stl-seed1", "stl-seed0", "ew-seed1", "ew-seed0",
    ]  # fmt: skip


def test_called_again_it_makes_what_is_missing_only(tmp_path, monkeypatch):
    first = Comparison(configs(["ew"]), tmp_path).run()
    made = []
    train = runs.train
    monkeypatch.setattr(runs, "train", lambda c, *rest: made.append(c.recipe) or train(c, *rest))
    again = Comparison(configs(["si", "ew"]), tmp_path).run()
    assert made == ["si"]
    assert again[1] == first[0]


def test_a_failed_run_does_not_lose_the_others(tmp_path, monkeypatch):
    train = runs.train

    def failing(config, *rest):
        if config.recipe == "si":
            raise TaskError("left", "loss is -1.")
        if config.recipe == "uw":
            raise ZeroDivisionError("division by zero")
        return train(config, *rest)

    monkeypatch.setattr(runs, "train", failing)
    compared = Comparison(configs(["si", "ew", "uw"]), tmp_path)
    (tmp_path / "runs" / "si-seed0").mkdir(parents=True)
    outcomes = compared.run()
    assert outcomes[0] == Failure("task 'left': loss is -1.")
    assert outcomes[1]["recipe"] == "ew"
    assert outcomes[2] == Failure("ZeroDivisionError: division by zero")
    assert "loss is -1" in (tmp_path / "runs" / "si-seed0" / "error.txt").read_text()

    text = compared.save(outcomes, "improvement").text()
    assert text in (tmp_path / "table.txt").read_text()
    for name in ("table.txt", "table.md", "table.csv", "table.json"):
        assert (tmp_path / name).stat().st_size > 0
    assert all(recipe in text for recipe in ("si", "ew", "uw"))

    monkeypatch.setattr(runs, "train", train)
    assert not any(isinstance(o, Failure) for o in compared.run())
    assert not (tmp_path / "runs" / "si-seed0" / "error.txt").exists()


def test_runs_in_processes_end_as_in_this_one_and_survive_a_killed_worker(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    processes = {}

    class Worker(comparison.Worker):
        def give(self, job):
            processes.setdefault(job.name, self.process)
            super().give(job)

    class Killer(Display):
        def update(self, run, done, losses):
            super().update(run, done, losses)
            if run == "ew, seed 0":
                processes[run].kill()

    monkeypatch.setattr(comparison, "Worker", Worker)
    # Real data, for processes know the registered sets only; and not so few steps that a run is
    # over before the news of it arrives.
    data = "multidigits(sizes=(1000, 64, 64))"
    given = configs(["ew", "pcgrad", "si"], data=data, batch_size=50, epochs=5)
    compared = Comparison(given, tmp_path / "processes")
    outcomes = compared.run(2, Killer)
    assert isinstance(outcomes[0], Failure)
    assert "was killed by SIGKILL" in outcomes[0].message
    assert [o["recipe"] for o in outcomes[1:]] == ["pcgrad", "si"]
    assert not multiprocessing.active_children()

    again = compared.run()
    assert again[0]["recipe"] == "ew"
    assert again[1:] == outcomes[1:]
    (here,) = Comparison(given[1:2], tmp_path / "here").run()
    assert without_times(again[1]) == without_times(here)


def test_a_worker_ends_when_its_parent_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison.signal, "signal", lambda *_: None)
    parent, worker = multiprocessing.Pipe()
    parent.send(Job(configs(["ew"])[0], tmp_path / "run"))
    parent.close()
    comparison.work(worker)
    assert not (tmp_path / "run" / "result.json").exists()


def test_the_same_run_twice_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"ew, seed 0 is given twice"):
        Comparison(configs(["ew", "EW"]), tmp_path)


def test_another_configuration_in_the_same_folder_is_refused(tmp_path):
    Comparison(configs(["ew"], epochs=1), tmp_path).run()
    with pytest.raises(ConfigError, match="begun with epochs 1, not 2; choose another --out"):
        Comparison(configs(["si"]), tmp_path)


def test_run_names_are_good_file_names():
    (config,) = configs(["cagrad(c=0.5)"], (7,))
    assert run_name(config) == "cagrad_c_0.5_-seed7"


def test_folders_without_runs_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no folder .*nowhere"):
        run_folders(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="holds no run"):
        run_folders(tmp_path)


def test_losses_of_many_tasks_are_shown_as_their_mean():
    assert describe_losses({"left": 0.5, "right": 1}) == "left 0.500  right 1.000"
    many = {str(i): float(i) for i in range(4)} | {"absent": float("nan")}
    assert describe_losses(many) == "mean loss 1.500"
