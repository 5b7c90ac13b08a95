"""`equipoise group`: killed at any moment it ends with the same memberships and the same table."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from equipoise.errors import EquipoiseError
from equipoise.grouping import (
    DataMaps,
    Groups,
    LookaheadAffinity,
    Specialists,
    cluster,
    find_groups,
    full_maps,
)
from equipoise.lab import cli, grouping_figures, models, runs
from equipoise.lab.config import ConfigError, RunConfig
from equipoise.lab.data import loader
from equipoise.lab.data.base import Baseline
from equipoise.lab.evaluation import evaluate
from equipoise.lab.files import DamagedError, read_state
from equipoise.lab.grouping import Grouping, Plan, evenly
from equipoise.lab.grouping_command import read
from equipoise.lab.grouping_runs import LookaheadRun, MapsRun

DATA = "digits-attributes(sizes=(96,32,32),missing=0.1)"
PLAN = "kmeans-2"  # the folder of the plan that most of these tests carry out
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
    return {name: (out / PLAN / name).read_bytes() for name in WRITTEN}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    out = tmp_path_factory.mktemp("grouping") / "whole"
    return out, whole(out)


class Killed(BaseException):
    """What no handler of errors catches."""


@contextmanager
def killed_after_two_epochs(monkeypatch):
    """The body is killed once a run has saved its second epoch."""
    real = runs.Run.save

    def dying(self, folder):
        real(self, folder)
        if len(self.rows) == 2:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(runs.Run, "save", dying)
        yield


@pytest.mark.parametrize("step", [8, 14, 32])
def test_killed_in_training_it_ends_the_same(undisturbed, tmp_path, monkeypatch, step) -> None:
    """Step 8 (of 9) records maps, 14 is a specialist's, 32 one of the single tasks'."""
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
    assert (tmp_path / "out" / PLAN / "memberships.json").exists() == (step > 9)
    assert whole(tmp_path / "out") == undisturbed[1]


@pytest.mark.parametrize("what", ["choose", "evaluate"])
def test_killed_between_trainings_it_ends_the_same(
    undisturbed, tmp_path, monkeypatch, what
) -> None:
    """Once the maps are recorded, and in the middle of the table."""
    monkeypatch.setattr(grouping_figures, "write", lambda *_: None)
    shutil.copytree(undisturbed[0], tmp_path / "out")
    for name in WRITTEN:
        (tmp_path / "out" / PLAN / name).unlink()

    def dying(*_, **__):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(f"equipoise.lab.grouping.{what}", dying)
        whole(tmp_path / "out")
    assert whole(tmp_path / "out") == undisturbed[1]


def test_done_again_it_trains_nothing(undisturbed, monkeypatch) -> None:
    monkeypatch.setattr(grouping_figures, "write", lambda *_: None)
    out, written = undisturbed
    monkeypatch.setattr(runs.Run, "train_epoch", lambda *_: pytest.fail("trains again"))
    assert whole(out) == written


def test_what_is_written(undisturbed) -> None:
    out, _ = undisturbed
    folder = out / PLAN
    groups = Groups.from_json(folder / "memberships.json")
    assert groups.tasks == ("odd", "large", "prime", "loop", "straight", "slant")
    assert groups.memberships.shape == (6, 2)
    pictures = {path.name for path in (out / "maps" / "pictures").iterdir()}
    assert pictures == {*(f"map-{t}.svg" for t in groups.tasks), "tree.svg"}
    assert (folder / "memberships.svg").exists()
    table = json.loads((folder / "table.json").read_text())
    names = ["stg-mtl", "mtl", "stl"]
    assert table["columns"] == [*names, *(f"{name}, training" for name in names)]
    assert [row[0] for row in table["rows"]][-2:] == ["slant: mae", "mean score"]
    assert np.isfinite([row[1:] for row in table["rows"]]).all()
    for j in (1, 2):
        config = json.loads((folder / f"specialist-{j}" / "config.json").read_text())
        assert config["task_weights"] == groups.memberships[:, j - 1].tolist()

    def model():
        return models.build("lenet", grouping(out).data)

    loaded = Specialists.load(folder / "specialists.pt", model)
    assert torch.equal(loaded.memberships, groups.memberships)
    assert set(loaded.predict_one(torch.zeros(1, 20, 20))) == set(groups.tasks)
    made = grouping(out)
    for part in ("test", "train"):
        batches = loader(getattr(made.data, part), 32, shuffle_seed=None)
        _, measured = evaluate(loaded, made.data.tasks, batches, nullcontext)
        found = {"stg-mtl": measured}
        if part == "test":
            found |= {n: runs.finished(out / f)["test"] for n, f in (("mtl", "maps"), ("stl",) * 2)}
        for name, values in found.items():
            column = 1 + table["columns"].index(name if part == "test" else f"{name}, training")
            assert {row[0]: row[column] for row in table["rows"][:-1]} == {
                f"{task}: {measure}": value
                for task, measures in values.items()
                for measure, value in measures.items()
            }
            scores = [task.score(values[task.name]) for task in made.data.tasks]
            assert table["rows"][-1][column] == pytest.approx(np.mean(scores))


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


def test_several_plans_share_maps_and_single_tasks(undisturbed, tmp_path, monkeypatch) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed[0], out)
    monkeypatch.setattr(runs.Run, "train_epoch", lambda *_: pytest.fail("trains again"))
    for plan, name in (
        (Plan(3, (1, 3)), "kmeans-3"),
        (Plan(2, (1, 3), "hard", 1.5), "hard-2"),
        (Plan(2, (1, 3), "cmeans", 1.5), "cmeans-2-fuzziness-1.5"),
        (Plan(2, (1, 3), "points"), "points-2"),
    ):
        made = grouping(out, plan)
        found, _ = made.groups()
        assert made.folder(found) == out / name
        assert len(Groups.from_json(out / name / "memberships.json")) == plan.n_groups
        if plan.method == "cmeans":
            gram = made.source.gram()
            wanted = cluster(gram, 2, fuzziness=1.5, method="cmeans")
            assert torch.equal(found.memberships, wanted)
    assert {name: (out / PLAN / name).read_bytes() for name in WRITTEN} == undisturbed[1]
    logits = grouping(out, Plan(2, (1, 3), combine="logits"))
    logits.table(Groups.from_json(out / PLAN / "memberships.json"))
    kept = torch.load(out / PLAN / "specialists-logits.pt", weights_only=True)
    assert kept["combine"] == "logits"
    assert (out / PLAN / "table-logits.txt").exists() and (out / PLAN / "table.txt").exists()
    with pytest.raises(ConfigError, match="begun without full maps"):
        Grouping(RunConfig.of(recipe="ew", **COMMON), Plan(2, (1, 3)), out, full_maps=True)


def test_a_folder_is_of_one_training(undisturbed) -> None:
    out, _ = undisturbed
    with pytest.raises(ConfigError, match=r"begun with checkpoints \[1, 3\], not \[2, 3\]"):
        grouping(out, Plan(2, (2, 3)))
    with pytest.raises(ConfigError, match="begun with lr"):
        grouping(out, lr=0.02)


def test_full_maps_lie_in_a_file(undisturbed, tmp_path, monkeypatch) -> None:
    """Killed between the two checkpoints, the file ends as the maps that were kept in memory."""
    out = tmp_path / "out"
    with killed_after_two_epochs(monkeypatch):
        grouping(out, Plan(2, (1, 3), "points")).groups()
    assert (out / "maps" / "maps.npy.partial").exists()
    found, _ = grouping(out, Plan(2, (1, 3), "points")).groups()
    kept = read_state(undisturbed[0] / "maps" / "checkpoint.ckpt")["maps"]["kept"]
    assert np.array_equal(np.load(out / "maps" / "maps.npy"), kept)
    assert torch.allclose(found.memberships.sum(1), torch.ones(6, dtype=torch.float64))
    kmeans, _ = grouping(out).groups()
    assert torch.equal(
        kmeans.memberships,
        Groups.from_json(undisturbed[0] / PLAN / "memberships.json").memberships,
    )


@pytest.mark.parametrize(
    ("by", "recipe"), [("gradients", "pcgrad"), ("lookahead", "ew"), ("stl-maps", "ew")]
)
def test_other_ways_to_tell(tmp_path, monkeypatch, by, recipe) -> None:
    """Killed in its last epoch it goes on; the run is a baseline as if nothing were measured."""
    out, plan = tmp_path / "out", Plan(2, (1, 3), by=by)

    def made() -> Grouping:
        return Grouping(RunConfig.of(recipe=recipe, **COMMON), plan, out)

    with killed_after_two_epochs(monkeypatch):
        made().groups()
    grouping = made()
    found, _ = grouping.groups()
    folder = out / f"{by}-kmeans-2"
    assert Groups.from_json(folder / "memberships.json").tasks == found.tasks
    whole = Grouping(RunConfig.of(recipe=recipe, **COMMON), plan, tmp_path / "whole")
    whole.groups()
    assert torch.equal(whole.source.gram(), grouping.source.gram())
    pictures = {path.name for path in (out / by / "pictures").iterdir()}
    assert pictures >= {"tree.svg"} and ("affinity.svg" in pictures) == (by != "stl-maps")
    if by != "stl-maps":
        lines = (out / by / "affinity.csv").read_text().splitlines()
        assert [line.split(",")[0] for line in lines] == ["task", *found.tasks]

    told = "stl" if by == "stl-maps" else "mtl"
    assert grouping.baselines[told].folder == out / by
    alone = "stl" if by == "stl-maps" else recipe
    plain = runs.train(RunConfig.of(recipe=alone, **COMMON), tmp_path / "plain")
    assert plain["test"] == runs.finished(out / by)["test"]
    assert grouping.train(found) == []
    table = grouping.table(found)
    assert table.split()[:4] == ["task", "stg-mtl", *sorted(grouping.baselines)]


def test_ways_to_tell_that_cannot_be(tmp_path) -> None:
    with pytest.raises(ConfigError, match="recipe ew forms no inner products .* pcgrad"):
        grouping(tmp_path / "out", Plan(2, (1, 3), by="gradients"))
    with pytest.raises(ConfigError, match="the method points needs data maps; --by is lookahead"):
        grouping(tmp_path / "out", Plan(2, (1, 3), "points", by="lookahead"))
    with pytest.raises(ConfigError, match="stl trains tasks apart"):
        Grouping(RunConfig.of(recipe="stl", **COMMON), Plan(2, (1, 3)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_points_need_full_maps(undisturbed, tmp_path, monkeypatch) -> None:
    """Maps that are too large to be kept without being asked for."""
    monkeypatch.setattr(full_maps, "SMALL", 0)
    out = tmp_path / "out"
    (out / "maps").mkdir(parents=True)
    (out / "maps" / "recording.json").write_text('{"checkpoints": [1, 3], "full_maps": false}')
    with pytest.raises(ConfigError, match="begun without full maps; choose another --out"):
        grouping(out, Plan(2, (1, 3), "points"))


@pytest.mark.parametrize("damage", ["cut", "gone", "another"])
def test_a_damaged_checkpoint_is_named(undisturbed, tmp_path, damage) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed[0], out)
    path = out / "maps" / "checkpoint.ckpt"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "gone":
        path.unlink()
    else:
        shutil.copy(out / PLAN / "specialist-1" / "checkpoint.ckpt", path)
    with pytest.raises(EquipoiseError, match=r"/maps.*; remove i"):
        grouping(out).groups()
    (out / "maps" / "recording.json").write_text("{}")
    with pytest.raises(DamagedError, match=r"recording.json cannot be read"):
        grouping(out)


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
    numbers = {task.name: {m.name: 1.0 for m in task.measures} for task in run.data.tasks}
    run.data = replace(run.data, baseline=Baseline("somewhere", numbers))
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
    more = ("--train", "--no-stl", "--jobs", "2", "--groups", "2", "--combine", "logits")
    assert status(*more) == 0  # two specialists in two processes
    said = capsys.readouterr().out
    table = json.loads(Path(out, "hard-2", "table-logits.json").read_text())
    assert table["columns"] == ["stg-mtl", "mtl", "stg-mtl, training", "mtl, training"]
    assert "specialists-logits.pt" in said and f"{table['rows'][-1][1]:.4f}" in said
    with monkeypatch.context() as patch:
        real = runs.train
        patch.setattr(
            runs, "train", lambda c, f, *_: 1 / 0 if f.name == "specialist-2" else real(c, f, *_)
        )
        assert status("--train", "--no-stl", "--groups", "3") == 1
    assert "specialist 2: ZeroDivisionError" in capsys.readouterr().err
    (written,) = Path(out).glob("hard-2/memberships.json")
    groups = Groups.from_json(written)
    assert set(groups.memberships.flatten().tolist()) == {0, 1}
    for wrong in (
        ("--method", "best"), ("--fuzziness", "1"), ("--combine", "votes"), ("--groups", "0"),
        ("--by", "stars"), ("--by", "gradients"), ("--by", "lookahead", "--full-maps"),
        ("--by", "lookahead", "--checkpoints", "1"), ("--data", "digits(", "--tasks", "g1"),
        ("--tasks", "g2"), ("--checkpoints", "9"),
    ):  # fmt: skip
        assert status(*wrong) == 2, wrong
    assert "no option 'tasks'" in capsys.readouterr().err


def test_lookaheads_are_before_each_tenth_step(tmp_path, monkeypatch) -> None:
    looks, real = [], LookaheadAffinity.update
    monkeypatch.setattr(LookaheadAffinity, "update", lambda *args: looks.append(1) or real(*args))
    config = RunConfig.of(recipe="ew", **COMMON | {"batch_size": 8, "epochs": 2})
    with runs.seeded(config):
        run = LookaheadRun(config)
        run.train_epoch()  # 12 steps
        run.train_epoch()
    assert len(looks) == 4


def test_pictures_say_what_they_show() -> None:
    points = np.array([[0.9, 0.1], [0.4, 0.3], [0.0, 0.0]])
    drawn = grouping_figures.data_map(points, "odd, 3 epochs").axes[0]
    assert (drawn.get_xlabel(), drawn.get_ylabel()) == ("variability σ", "confidence μ")
    hexagons = drawn.collections[0]
    centres = hexagons.get_offsets()[hexagons.get_array() > 0]
    np.testing.assert_allclose(sorted(map(tuple, centres)), [(0.1, 0.9), (0.3, 0.4)], atol=0.02)
    names = ("a", "b", "c")
    gram = torch.tensor([[0.0], [1.0], [9.0]]).double() @ torch.tensor([[0.0, 1.0, 9.0]]).double()
    tree = grouping_figures.tree(gram, names).axes[0]
    assert [text.get_text() for text in tree.get_yticklabels()] in (
        ["a", "b", "c"],
        ["c", "a", "b"],
    )
    found = grouping_figures.memberships(find_groups(gram, 2, tasks=names)).axes[0]
    assert [text.get_text() for text in found.get_yticklabels()] == list(names)
    shown = [float(text.get_text()) for text in found.texts]
    wanted = find_groups(gram, 2, tasks=names).memberships.flatten()
    np.testing.assert_allclose(shown, wanted, atol=0.006)


def test_tasks_whose_names_are_alike_have_pictures_of_their_own(tmp_path) -> None:
    maps = DataMaps(3, 4, [1], tasks=("a b", "a_b", "c"))
    maps.update(torch.rand(4, 3), torch.arange(4))
    maps.end_epoch()
    grouping_figures.write(tmp_path, maps)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"map-a_b-1.svg", "map-a_b-2.svg", "map-c.svg", "tree.svg"}
