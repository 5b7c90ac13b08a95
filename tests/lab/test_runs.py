"""One run: what it writes, how it resumes, what it selects by."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from equipoise import SharedTrunk
from equipoise.lab import evaluation, runs
from equipoise.lab.config import ConfigError, RunConfig
from equipoise.lab.data import DATASETS
from equipoise.lab.data.digits import digits_attributes, multidigits
from equipoise.lab.runs import Run, epoch_seed, train
from equipoise.lab.tasks import Task


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Two small data sets under names of their own."""
    sizes = (96, 64, 64)
    monkeypatch.setitem(DATASETS, "tiny", lambda root, seed: multidigits(seed=seed, sizes=sizes))
    monkeypatch.setitem(
        DATASETS,
        "gaps",
        lambda root, seed: digits_attributes(seed=seed, sizes=sizes, missing=0.5),
    )


def config(recipe="ew", **values) -> RunConfig:
    given = {"data": "tiny", "epochs": 4, "batch_size": 32, "device": "cpu", **values}
    return RunConfig.of(recipe=recipe, **given)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def numbers(folder: Path) -> tuple:
    """Everything that a run wrote but its times."""
    result = json.loads((folder / "result.json").read_text())
    for key in ("train_seconds", "finished"):
        del result[key]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows(folder)], result


class Killed(BaseException):
    """Not an Exception, like KeyboardInterrupt."""


def kill_after(epochs: float):
    def progress(done, report):
        if done >= epochs:
            raise Killed

    return progress


def test_the_run_folder(tmp_path):
    result = train(config("igbv1+cagrad"), tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "config.json", "environment.json", "metrics.csv", "checkpoint.ckpt", "result.json",
    }  # fmt: skip
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    assert result["recipe"] == "igbv1+cagrad"
    assert result["best_epoch"] in (1, 2, 3, 4)
    assert set(result["test"]) == set(result["val"]) == {"left", "right"}
    table = rows(tmp_path / "run")
    assert [row["epoch"] for row in table] == ["1", "2", "3", "4"]
    for column in (
        "loss/train/left", "loss/val/right", "accuracy/val/left", "weight/left",
        "coefficient/right", "conflict/steps", "conflict/probe", "score", "lr", "seconds",
    ):  # fmt: skip
        assert all(float(row[column]) >= 0 for row in table), column
    assert float(table[-1]["loss/train/left"]) < float(table[0]["loss/train/left"])
    assert result["train_seconds"] == pytest.approx(sum(float(row["seconds"]) for row in table))
    best = max(table, key=lambda row: float(row["score"]))
    assert result["best_epoch"] == int(best["epoch"])
    assert result["val"]["left"]["accuracy"] == float(best["accuracy/val/left"])


def test_a_recipe_without_rows_leaves_their_cell_empty(tmp_path):
    train(config("ew", epochs=1), tmp_path)
    (row,) = rows(tmp_path)
    assert row["conflict/steps"] == ""
    assert 0 <= float(row["conflict/probe"]) <= 100


def test_conflicts_that_nobody_asks_for_are_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("equipoise.lab.runs.conflict", None)  # a call would be an error
    train(config("ew", epochs=1, probes=0), tmp_path)
    (row,) = rows(tmp_path)
    assert row["conflict/probe"] == ""


def test_the_seed_decides_the_numbers_and_nothing_else_does(tmp_path):
    torch.manual_seed(1)
    train(config(seed=3), tmp_path / "a")
    torch.manual_seed(2)
    train(config(seed=3), tmp_path / "b")
    train(config(seed=4), tmp_path / "c")
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")
    assert numbers(tmp_path / "a")[0] != numbers(tmp_path / "c")[0]


def test_the_callers_random_numbers_and_threads_are_left_alone(tmp_path):
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    train(config(epochs=1, batch_size=96, threads=threads + 1), tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_the_order_of_an_epoch_depends_on_seed_and_epoch_only():
    seeds = {epoch_seed(seed, epoch) for seed in range(50) for epoch in range(50)}
    assert len(seeds) == 2500
    assert epoch_seed(3, 7) == epoch_seed(3, 7)


@pytest.mark.parametrize("recipe", ["ew", "rlw", "igbv1+pcgrad", "uw+cagrad", "stl"])
@pytest.mark.parametrize("epochs", [0.3, 2.5])
def test_a_run_killed_in_the_middle_ends_with_the_same_numbers(tmp_path, recipe, epochs):
    train(config(recipe), tmp_path / "whole")
    with pytest.raises(Killed):
        train(config(recipe), tmp_path / "killed", kill_after(epochs))
    assert not (tmp_path / "killed" / "result.json").exists()
    seen = []
    train(config(recipe), tmp_path / "killed", lambda done, report: seen.append(done))
    assert seen[0] == int(epochs) + 1 / 3
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")


@pytest.mark.parametrize("method", ["probe", "save", "result"])
def test_a_run_killed_outside_training_ends_with_the_same_numbers(tmp_path, monkeypatch, method):
    train(config(), tmp_path / "whole")
    with monkeypatch.context() as patch:

        def killed(*_):
            raise Killed

        patch.setattr(Run, method, killed)
        with pytest.raises(Killed):
            train(config(), tmp_path / "killed")
    train(config(), tmp_path / "killed")
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")


def test_what_a_killed_process_was_writing_is_cleared_away(tmp_path):
    draft = tmp_path / ".checkpoint.ckpt.1234.tmp"
    draft.write_bytes(b"half a checkpoint")
    train(config(epochs=1), tmp_path)
    assert not draft.exists()


def test_a_killed_process_ends_with_the_same_numbers(tmp_path):
    data = "multidigits(sizes=(800, 64, 64))"
    options = "--epochs 8 --batch-size 50 --device cpu --seed 5"
    command = [sys.executable, "-m", "equipoise", "train", "igbv1+pcgrad", *options.split()]
    command += ["--data", data, "--out", str(tmp_path / "killed")]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=_environment()
    )
    try:
        checkpoint = tmp_path / "killed" / "checkpoint.ckpt"
        end = time.monotonic() + 60
        while not checkpoint.exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert checkpoint.exists()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "result.json").exists()

    same = config("igbv1+pcgrad", data=data, epochs=8, batch_size=50, seed=5)
    seen = []
    train(same, tmp_path / "killed", lambda done, report: seen.append(done))
    assert len(seen) < 8 * 16
    train(same, tmp_path / "whole")
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")


def _environment() -> dict[str, str]:
    """So that the subprocess finds the package, installed or not."""
    source = str(Path(runs.__file__).parents[2])
    return {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}


def test_another_configuration_in_the_same_folder_is_refused(tmp_path):
    with pytest.raises(Killed):
        train(config(), tmp_path, kill_after(1.5))
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(ConfigError, match=r"was begun with lr 0.003, not 0.01; choose another"):
        train(config(lr=0.01), tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_finished_run_is_read_and_not_repeated(tmp_path, monkeypatch):
    first = train(config(epochs=1), tmp_path)
    monkeypatch.setattr(runs, "Run", None)
    assert train(config(epochs=1), tmp_path) == first


class Planned(Run):
    """Its validation values are planned; the states that it had are remembered."""

    left = (0.5, 0.9, 0.1, 0.9)
    right = (0.5, 0.6, 0.7, 0.1)
    seen: dict

    def measure(self, split):
        state = {k: v.clone() for k, v in self.model.state_dict().items()}
        if split is self.data.val:
            epoch = len(self.rows)
            self.seen[epoch + 1] = state
            values = {"left": self.left[epoch], "right": self.right[epoch]}
        else:
            assert split is self.data.test
            assert "test" not in self.seen, "the test split is looked at once"
            self.seen["test"] = state
            values = {"left": 0.0, "right": 0.0}
        return {"left": 1.0, "right": 1.0}, {k: {"accuracy": v} for k, v in values.items()}


@pytest.fixture
def planned(monkeypatch):
    monkeypatch.setattr(runs, "Run", Planned)
    monkeypatch.setattr(Planned, "seen", {}, raising=False)
    return Planned


def equal(state, other, prefix="") -> bool:
    return all(torch.equal(v, other[k]) for k, v in state.items() if k.startswith(prefix))


def test_the_best_epoch_is_that_of_the_validation_score(tmp_path, planned):
    result = train(config(), tmp_path)
    assert result["best_epoch"] == 2  # the mean of both tasks, the earlier one of equals
    assert result["val"] == {"left": {"accuracy": 0.9}, "right": {"accuracy": 0.6}}
    assert equal(planned.seen["test"], planned.seen[2])
    assert not equal(planned.seen["test"], planned.seen[4])


def test_a_score_that_is_not_known_is_never_the_best(tmp_path, planned, monkeypatch):
    nan = float("nan")
    monkeypatch.setattr(planned, "left", (nan, 0.9, 0.1, nan))
    monkeypatch.setattr(planned, "right", (nan, nan, 0.3, nan))
    result = train(config(), tmp_path)
    assert result["best_epoch"] == 2  # by the task that is known
    assert rows(tmp_path)[1]["score"] == "0.9"


def test_each_network_of_the_baseline_has_its_own_best_epoch(tmp_path, planned):
    with pytest.raises(Killed):
        train(config("stl"), tmp_path, kill_after(2.5))  # selection survives a resume
    result = train(config("stl"), tmp_path)
    assert result["best_epoch"] == {"left": 2, "right": 3}
    assert result["val"] == {"left": {"accuracy": 0.9}, "right": {"accuracy": 0.7}}
    for task, epoch in (("left", 2), ("right", 3)):
        for prefix in (f"trunk.of.{task}.", f"heads.{task}."):
            assert any(key.startswith(prefix) for key in planned.seen["test"])
            assert equal(planned.seen["test"], planned.seen[epoch], prefix)


def test_missing_labels_do_not_count(tmp_path):
    run = Run(config(data="gaps"))
    losses, values = run.measure(run.data.val)
    run.model.eval()
    with torch.no_grad():
        outputs = run.model(run.data.val.inputs)
    for task in run.data.tasks:
        target = run.data.val.targets[task.name]
        known = ~target.isnan()
        assert 0 < int(known.sum()) < len(target)
        expected = task.loss(outputs[task.name][known], target[known]).item()
        assert losses[task.name] == pytest.approx(expected, rel=1e-5)
        assert all(value >= 0 for value in values[task.name].values())
    result = train(config("pcgrad", data="gaps", epochs=2), tmp_path)
    assert all(v >= 0 for values in result["test"].values() for v in values.values())


def opposite_tasks() -> tuple[SharedTrunk, list[Task]]:
    """A linear trunk at zero: the gradient of each task is -2 mean(target * input)."""
    tasks = [Task.regression(name, "", 0.0, 1.0) for name in ("a", "b", "c")]
    model = SharedTrunk(nn.Linear(2, 1, bias=False), {t.name: nn.Identity() for t in tasks})
    nn.init.zeros_(model.trunk.weight)
    return model, tasks


def test_conflict_counts_the_pairs_with_a_negative_product():
    model, tasks = opposite_tasks()
    inputs = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    # The gradients point along minus these targets: a against b, c across both.
    targets = {"a": [1.0, 0.0], "b": [-1.0, 0.0], "c": [0.0, 1.0]}
    batch = (inputs, {name: torch.tensor(values) for name, values in targets.items()})
    percent = evaluation.conflict(model, tasks, [batch], torch.enable_grad)
    assert percent == pytest.approx(100 / 3)
    unlabelled = (inputs, {**batch[1], "b": torch.full((2,), torch.nan)})
    assert evaluation.conflict(model, tasks, [unlabelled], torch.enable_grad) == 0
    assert model.trunk.weight.grad is None


def test_measuring_between_epochs_changes_nothing():
    torch.manual_seed(0)
    tasks = [Task.regression(name, "", 0.0, 1.0) for name in ("a", "b")]
    trunk = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    model = SharedTrunk(trunk, {t.name: nn.Linear(4, 1) for t in tasks})
    batch = (torch.randn(8, 3), {t.name: torch.randn(8) for t in tasks})
    state = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    evaluation.conflict(model, tasks, [batch], torch.enable_grad)
    evaluation.evaluate(model, tasks, [batch], torch.enable_grad)
    assert equal(model.state_dict(), state)
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"epochs": 0}, r"epochs is 0: input should be greater than or equal to 1\."),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"lr": 0.0}, r"lr is 0\.0: input should be greater than 0\."),
        ({"lr": float("nan")}, "lr is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"threads": 0}, "threads is 0"),
        ({"precision": "16"}, "precision is '16'"),
        ({"device": "gpu"}, "device 'gpu' is not known; give auto, cpu, cuda or cuda:1"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not there"),
        ({"recipe": "cagard"}, "cagrad"),
        ({"colour": "red"}, "colour is 'red'"),
    ],
)
def test_a_wrong_value_is_named_in_one_sentence(values, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        config(**values)
    assert "\n" not in str(caught.value)


def test_recipes_are_written_in_their_canonical_form():
    assert config("CAGrad+IGBv1") == config("igbv1+cagrad")


def test_the_device_is_settled_when_nothing_is_said():
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert RunConfig.of(recipe="ew").device == expected


def test_mixed_precision_trains(tmp_path):
    result = train(config("si+mgda", precision="bf16-mixed", epochs=2), tmp_path)
    table = rows(tmp_path)
    assert float(table[1]["loss/train/left"]) < float(table[0]["loss/train/left"])
    assert result["test"]["left"]["accuracy"] >= 0
