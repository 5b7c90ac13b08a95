"""Learning-rate schedules of runs, and the judgement that plateau and selection go by."""

import csv
import json
import math

import pytest
import torch

from equipoise.lab import runs, schedules
from equipoise.lab.config import ConfigError, RunConfig
from equipoise.lab.data import DATASETS
from equipoise.lab.data.base import Baseline, Data, Split
from equipoise.lab.evaluation import improvement
from equipoise.lab.models import MODELS
from equipoise.lab.runs import Run, train
from equipoise.lab.schedules import Schedule, ScheduleError
from equipoise.lab.tasks import Task
from equipoise.trunk import SharedTrunk

LR = 0.01
SCALES = {"length": 2.0, "heat": 50.0}
SINGLE = Baseline("nobody", {"length": {"mae": 0.5}, "heat": {"mae": 10.0}})


def made(baseline):
    """Two regressions of random numbers."""
    draw = torch.Generator().manual_seed(0)
    splits = [
        Split(
            torch.randn(n, 3, generator=draw),
            {name: torch.randn(n, generator=draw) for name in SCALES},
        )
        for n in (48, 16, 16)
    ]
    tasks = tuple(Task.regression(name, "", 0.0, scale) for name, scale in SCALES.items())
    return Data("made", tasks, *splits, input_shape=(3,), description="made", baseline=baseline)


def linear(data):
    heads = {task.name: torch.nn.Linear(4, 1) for task in data.tasks}
    return SharedTrunk(torch.nn.Linear(3, 4), heads)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(DATASETS, "made", lambda root, seed: made(None))
    monkeypatch.setitem(DATASETS, "judged", lambda root, seed: made(SINGLE))
    monkeypatch.setitem(MODELS, "linear", linear)


@pytest.fixture
def plan(monkeypatch):
    """Let validation find these MAEs, epoch after epoch."""

    def set_values(length, heat):
        def measure(self, split):
            epoch = min(len(self.rows), len(length) - 1)
            values = {"length": {"mae": length[epoch]}, "heat": {"mae": heat[epoch]}}
            return dict.fromkeys(values, 1.0), values

        monkeypatch.setattr(Run, "measure", measure)

    return set_values


def config(recipe="ew", **values):
    given = {"data": "made", "model": "linear", "epochs": 5, "batch_size": 16, "lr": LR,
             "device": "cpu", **values}  # fmt: skip
    return RunConfig.of(recipe=recipe, **given)


def column(folder, name):
    with (folder / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file)]


class Killed(BaseException):
    pass


def kill_after(epochs):
    def progress(done, report):
        if done >= epochs:
            raise Killed

    return progress


def numbers(folder):
    result = json.loads((folder / "result.json").read_text())
    for key in ("train_seconds", "finished"):
        del result[key]
    with (folder / "metrics.csv").open(newline="") as file:
        table = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]
    state = torch.load(folder / "checkpoint.ckpt", weights_only=True)
    return result, table, state["schedule"]


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("none", [1, 1, 1, 1, 1]),
        ("halve(every=2)", [1, 1, 1 / 2, 1 / 2, 1 / 4]),
        ("halve(every=1, factor=0.1)", [1, 0.1, 0.01, 1e-3, 1e-4]),
        ("halve", [1, 1, 1, 1, 1]),
    ],
)
def test_rates_by_the_epoch(tmp_path, schedule, rates):
    train(config(schedule=schedule), tmp_path)
    assert column(tmp_path, "lr") == pytest.approx([LR * rate for rate in rates])


def test_plateau_goes_by_the_score_where_no_single_task_numbers_are_known(tmp_path, plan):
    # The score: mean of 1 - MAE / scale; here of 1 - heat / 100 - length / 4.
    length = [1, 0.8, 0.8, 0.9, 0.79996, 0.7, 0.7, 0.7, math.nan]
    heat = [40, 40, 40, 20, 40, 40, 40, 40, math.nan]
    scores = [0.35, 0.40, 0.40, 0.575, 0.40001, 0.425, 0.425, 0.425, math.nan]
    plan(length, heat)
    train(config(schedule="plateau(patience=1, factor=0.5)", epochs=9), tmp_path)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        found = [float(row["score"]) for row in csv.DictReader(file)]
    assert found == pytest.approx(scores, nan_ok=True)
    # Not better in epochs 3, 5, 6, 7, 8, 9; more than one of these in a row after 6 and 8.
    assert column(tmp_path, "lr") == pytest.approx([LR * f for f in (*[1] * 6, 0.5, 0.5, 0.25)])


def test_plateau_and_selection_go_by_delta_m_where_they_are_known(tmp_path, plan):
    length = [0.6, 0.4, 0.45, 0.45, 0.45, 0.45]
    heat = [8.0, 15.0, 11.0, 10.9999, 12.0, 9.0]
    drops = [0.0, 0.15, 0.0, -5e-6, 0.05, -0.1]
    scores = [0.77, 0.75, 0.7775, 0.777501, 0.7675, 0.7975]
    plan(length, heat)
    plateau = "plateau(patience=1, factor=0.5)"
    result = train(config(data="judged", schedule=plateau, epochs=5), tmp_path / "judged")
    assert column(tmp_path / "judged", "delta_m") == pytest.approx([-100 * d for d in drops[:5]])
    assert column(tmp_path / "judged", "score") == pytest.approx(scores[:5], abs=1e-6)
    # 2 and 3 are not better, nor is 4 by more than the threshold, nor 5.
    rates = [LR * f for f in (1, 1, 1, 0.5, 0.5)]
    assert column(tmp_path / "judged", "lr") == pytest.approx(rates)
    assert result["best_epoch"] == 4
    assert result["val"] == {"length": {"mae": 0.45}, "heat": {"mae": 10.9999}}

    plan([0.45, 0.6], [10.5, 8.0])  # -0.025 and 0, though the score goes up
    assert train(config(data="judged", epochs=2), tmp_path / "delta")["best_epoch"] == 1
    plan([1.5, 1.0], [8.0, 40.0])
    by_score = train(config(epochs=2), tmp_path / "score")
    by_delta = train(config(data="judged", epochs=2), tmp_path / "delta2")
    assert by_score["best_epoch"] == by_delta["best_epoch"] == 1
    alone = train(config("stl", data="judged", epochs=2), tmp_path / "stl")
    assert alone["best_epoch"] == {"length": 2, "heat": 1}


def test_delta_m_on_validation_leaves_out_what_is_not_known():
    tasks = made(None).tasks
    values = {"length": {"mae": 0.25}, "heat": {"mae": 15.0}}
    assert improvement(tasks, values, SINGLE) == pytest.approx(0.0)
    assert improvement(tasks[:1], values, SINGLE) == pytest.approx(50.0)
    assert improvement(tasks, {**values, "heat": {"mae": math.nan}}, SINGLE) == pytest.approx(50.0)
    half = Baseline("", {"heat": {"mae": 10.0, "other": 1.0}})
    assert improvement(tasks, values, half) == pytest.approx(-50.0)
    assert math.isnan(improvement(tasks[:1], values, half))


@pytest.mark.parametrize(
    ("recipe", "schedule", "epochs"),
    [
        ("ew", "plateau(patience=1, factor=0.5)", 2.5),
        ("uw", "plateau(patience=1, factor=0.5)", 3.9),
        ("stl", "plateau(patience=1, factor=0.5)", 3.5),
        ("igbv1", "halve(every=2)", 1.5),
        ("uw", "halve(every=2)", 2.5),
    ],
)
def test_a_killed_run_ends_with_the_same_numbers(tmp_path, plan, recipe, schedule, epochs):
    plan([1, 0.9, 1, 1, 1, 1], [40.0] * 6)  # the counter stands at 1 after epoch 3
    given = config(recipe, schedule=schedule)
    train(given, tmp_path / "whole")
    with pytest.raises(Killed):
        train(given, tmp_path / "killed", kill_after(epochs))
    train(given, tmp_path / "killed")
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    assert min(column(tmp_path / "whole", "lr")) < LR


def test_learned_weightings_follow():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(parameters, (0.1, 0.025), strict=True)]
    optimizer = torch.optim.SGD(groups)
    schedule = Schedule("halve(every=1)", optimizer)
    optimizer.step()
    schedule.step(0.0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.0125]


def test_plateau_stops_at_its_minimum():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = Schedule("plateau(patience=0, factor=0.1, minimum=0.005)", optimizer)
    rates = []
    for _ in range(4):
        schedule.step(1.0)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1, 0.01, 0.005, 0.005])


def test_a_run_that_an_older_version_began_goes_on(tmp_path):
    train(config(), tmp_path / "whole")
    with pytest.raises(Killed):
        train(config(), tmp_path / "old", kill_after(2.5))
    path = tmp_path / "old" / "config.json"
    written = json.loads(path.read_text())
    del written["schedule"]
    path.write_text(json.dumps(written))
    state = torch.load(tmp_path / "old" / "checkpoint.ckpt", weights_only=True)
    del state["schedule"]
    torch.save(state, tmp_path / "old" / "checkpoint.ckpt")
    with pytest.raises(ConfigError, match=r"was begun with schedule 'none', not 'halve'"):
        train(config(schedule="halve"), tmp_path / "old")
    train(config(), tmp_path / "old")
    assert numbers(tmp_path / "old") == numbers(tmp_path / "whole")


def test_texts_have_a_canonical_form():
    assert config(schedule="Halve( every = 100 )").schedule == "halve"
    assert config(schedule="plateau(patience=3,factor=0.7)").schedule == "plateau(patience=3)"
    assert schedules.canonical("NONE") == "none"


@pytest.mark.parametrize(
    ("schedule", "sentence"),
    [
        ("havle", "no schedule 'havle'; did you mean 'halve'"),
        ("halve(each=3)", "schedule halve: there is no option 'each'; it takes: every=100, fac"),
        ("halve(every=2.5)", "every is 2.5; it takes int."),
        ("plateau(patience", "schedule 'plateau(patience': cannot read"),
    ],
)
def test_a_text_that_cannot_be_read(schedule, sentence):
    with pytest.raises(ConfigError) as raised:
        config(schedule=schedule)
    assert sentence in str(raised.value)


@pytest.mark.parametrize(
    ("schedule", "sentence"),
    [
        ("halve(every=0)", "schedule halve: every is 0; give 1 epoch or more."),
        ("halve(factor=1)", r"schedule halve: factor is 1\.0; give a number between 0 and 1"),
        ("plateau(factor=0)", r"schedule plateau: factor is 0\.0; give"),
        ("plateau(patience=-1)", "schedule plateau: patience is -1; give 0 epochs or more."),
        ("plateau(minimum=0.1)", r"minimum is 0\.1 and the learning rate 0\.01; give a"),
    ],
)
def test_a_value_that_cannot_be(schedule, sentence):
    with pytest.raises(ValueError, match=sentence):
        runs.Run(config(schedule=schedule))
    with pytest.raises(ScheduleError, match="no schedule"):
        schedules.canonical("cosine")
