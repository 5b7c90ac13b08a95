"""`equipoise group`: killed at any moment it ends with the same memberships and the same table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from equipoise.grouping import Groups, Specialists
from equipoise.lab import cli, grouping_figures, models, runs
from equipoise.lab.config import ConfigError, RunConfig
from equipoise.lab.grouping import Grouping, MapsRun, Plan, evenly
from equipoise.lab.grouping_command import read

DATA = "digits-attributes(sizes=(96,32,32),missing=0.1)"
COMMON = {"data": DATA, "epochs": 3, "batch_size": 32, "lr": 0.01}
WRITTEN = ("memberships.json", "memberships.csv", "table.json", "table.csv", "table.txt")


def grouping(out: Path, plan: Plan | None = None, **more) -> Grouping:
    config = RunConfig.of(recipe="ew", **COMMON | more)
    return Grouping(config, plan or Plan(2, (1, 3)), out)


def whole(out: Path) -> dict[str, bytes]:
    made = grouping(out)
    found, _ = made.groups()
    assert made.train(found) == []
    made.table(found)
    return {name: (out / name).read_bytes() for name in WRITTEN}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    out = tmp_path_factory.mktemp("grouping") / "whole"
    return out, whole(out)


class Killed(BaseException):
    """What no handler of errors catches."""


@pytest.mark.parametrize("step", [5, 14])
def test_killed_in_training_it_ends_the_same(undisturbed, tmp_path, monkeypatch, step) -> None:
    """Steps 5 (of 9) records maps, 14 is a specialist's."""
    real, seen = runs.Run.train_epoch, []

    def dying(self, progress=None):
        def count(*told) -> None:
            seen.append(told)
            if len(seen) == step:
                raise Killed

        return real(self, count)

    monkeypatch.setattr(grouping_figures, "write", lambda *_: None)  # they take half of the time
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(runs.Run, "train_epoch", dying)
        whole(tmp_path / "out")
    assert (tmp_path / "out" / "memberships.json").exists() == (step > 9)
    assert whole(tmp_path / "out") == undisturbed[1]


def test_done_again_it_trains_nothing(undisturbed, monkeypatch) -> None:
    monkeypatch.setattr(grouping_figures, "write", lambda *_: None)
    out, written = undisturbed
    monkeypatch.setattr(runs.Run, "train_epoch", lambda *_: pytest.fail("trains again"))
    assert whole(out) == written


def test_what_is_written(undisturbed) -> None:
    out, _ = undisturbed
    groups = Groups.from_json(out / "memberships.json")
    assert groups.tasks == ("odd", "large", "prime", "loop", "straight", "slant")
    assert groups.memberships.shape == (6, 2)
    pictures = {path.name for path in (out / "pictures").iterdir()}
    assert pictures == {*(f"map-{t}.svg" for t in groups.tasks), "memberships.svg", "tree.svg"}
    table = json.loads((out / "table.json").read_text())
    assert table["columns"] == ["stg-mtl", "mtl", "stl"]
    assert [row[0] for row in table["rows"]][-2:] == ["slant: mae", "mean score"]
    assert np.isfinite([row[1:] for row in table["rows"]]).all()
    for j in (1, 2):
        config = json.loads((out / f"specialist-{j}" / "config.json").read_text())
        assert config["task_weights"] == groups.memberships[:, j - 1].tolist()

    def model():
        return models.build("lenet", grouping(out).data)

    loaded = Specialists.load(out / "specialists.pt", model)
    assert torch.equal(loaded.memberships, groups.memberships)
    assert set(loaded.predict_one(torch.zeros(1, 20, 20))) == set(groups.tasks)


def test_the_run_of_the_maps_is_the_mtl_baseline(undisturbed, tmp_path) -> None:
    out, _ = undisturbed
    plain = runs.train(RunConfig.of(recipe="ew", **COMMON), tmp_path / "plain")
    assert plain["test"] == runs.finished(out / "maps")["test"]


def test_side_by_side(tmp_path, monkeypatch) -> None:
    """Two specialists and the single tasks go to the workers, as the runs of a comparison do."""
    monkeypatch.setattr(grouping_figures, "write", lambda *_: None)
    from equipoise.lab import grouping as module

    used = []
    monkeypatch.setattr(module, "in_processes", lambda todo, *_: used.append(len(todo)) or [])
    made = grouping(tmp_path / "out")
    found, _ = made.groups()
    made.train(found, 2)
    assert used == [3]


def test_a_folder_is_of_one_grouping(undisturbed) -> None:
    out, _ = undisturbed
    with pytest.raises(ConfigError, match="begun with n_groups 2, not 3"):
        grouping(out, Plan(3, (1, 3)))
    with pytest.raises(ConfigError, match="begun with lr"):
        grouping(out, lr=0.02)


def test_impossible_plans(tmp_path) -> None:
    with pytest.raises(ConfigError, match="last checkpoint is after epoch 4"):
        grouping(tmp_path, Plan(2, (2, 4)))
    with pytest.raises(ConfigError, match="groups is 7; give 1 to 6"):
        grouping(tmp_path, Plan(7, (3,)))
    for text in ("", "1;2", "3,2", "0,1", "1,1"):
        with pytest.raises(ConfigError, match="cannot be read"):
            read(text)
    assert read("5,10") == (5, 10) and read(None) == ()


def test_checkpoints_are_evenly_spread() -> None:
    assert evenly(3) == (1, 2, 3)
    assert evenly(50) == (5, 10, 15, 20, 25, 30, 35, 40, 45, 50)
    assert evenly(15) == (2, 3, 5, 6, 8, 9, 11, 12, 14, 15)


def test_recording_is_of_all_samples_but_those_without_a_label() -> None:
    config = RunConfig.of(recipe="ew", **COMMON)
    with runs.seeded(config):
        run = MapsRun(config, checkpoints=[1])
        run.train_epoch()
    labelled = torch.stack([~y.isnan() for y in run.data.train.targets.values()], 1)
    assert torch.equal(run.maps.count, labelled.int())


def test_a_specialist_is_selected_by_the_tasks_it_is_for() -> None:
    assert runs.mean([1.0, 3.0]) == 2
    assert runs.mean([1.0, 3.0], [3.0, 1.0]) == 1.5
    assert runs.mean([1.0, float("nan"), 3.0], [3.0, 5.0, 1.0]) == 1.5
    config = RunConfig.of(recipe="ew", **COMMON, task_weights=(1, 0, 0, 0, 0, 3))
    with runs.seeded(config):
        run = runs.Run(config)
    values = {t.name: {m.name: 0.5 for m in t.measures} for t in run.data.tasks}
    values["large"] = {"accuracy": 0.9}  # plays no part
    slant = next(t for t in run.data.tasks if t.name == "slant").score(values["slant"])
    assert run.judge(values, run.model.tasks) == pytest.approx((0.5 + 3 * slant) / 4)


def test_the_command(tmp_path, monkeypatch, capsys) -> None:
    out = str(tmp_path / "out")
    command = ["equipoise", "group", "--data", DATA, "--epochs", "1", "--batch-size", "48",
               "--method", "hard", "--out", out]  # fmt: skip

    def status(*more: str) -> int:
        monkeypatch.setattr(sys, "argv", [*command, *more])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code

    assert status() == 0
    said = capsys.readouterr().out
    assert "Silhouettes by the number of groups" in said and "1: " in said
    groups = Groups.from_json(Path(out, "memberships.json"))
    assert set(groups.memberships.flatten().tolist()) == {0, 1}
    for wrong in (
        ("--method", "best"), ("--fuzziness", "1"), ("--combine", "votes"), ("--groups", "0"),
        ("--tasks", "g2"), ("--checkpoints", "9"),
    ):  # fmt: skip
        assert status(*wrong) == 2, wrong
    assert "no option 'tasks'" in capsys.readouterr().err
