"""The page: complete, alone, escaped, the same each time; and folders that are not whole."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest

from equipoise.errors import EquipoiseError
from equipoise.lab import figures, report
from equipoise.lab.files import write_json, write_rows
from equipoise.lab.folders import read
from equipoise.lab.table import summarise

EPOCHS = 4


def make_run(
    out: Path,
    recipe: str,
    seed: int,
    tasks: tuple[str, ...] = ("left", "right"),
    epochs: int = EPOCHS,
) -> Path:
    """A run folder as training leaves it; tasks called "size" are regressions."""
    rng = np.random.default_rng([seed, len(recipe)])
    folder = out / "runs" / f"{re.sub('[^a-z0-9.-]', '_', recipe)}-seed{seed}"
    folder.mkdir(parents=True)
    config = {"recipe": recipe, "data": "digits", "data_root": None, "model": "lenet",
              "epochs": epochs, "batch_size": 32, "lr": 0.001, "seed": seed, "device": "cpu",
              "precision": "32-true", "threads": 1}  # fmt: skip
    metric = {task: "mae" if task == "size" else "accuracy" for task in tasks}
    rows = []
    for epoch in range(1, epochs + 1):
        row: dict[str, Any] = {"epoch": epoch, "seconds": 1.0, "lr": 0.001}
        for task in tasks:
            row[f"loss/train/{task}"] = row[f"loss/val/{task}"] = 2.0 / epoch
            row[f"{metric[task]}/val/{task}"] = 1 - 0.5 / epoch + 0.1 * rng.random()
            row[f"weight/{task}"] = 1.0 + (0.1 * rng.random() if recipe == "rlw" else 0.0)
            row[f"coefficient/{task}"] = None if recipe == "stl" else 1.0
        row |= {"conflict/steps": None, "conflict/probe": 50.0, "score": 0.5}
        rows.append(row)
    last = {task: {metric[task]: rows[-1][f"{metric[task]}/val/{task}"]} for task in tasks}
    write_json(folder / "config.json", config)
    write_rows(folder / "metrics.csv", rows)
    packages = {"torch": "2.13.0", "equipoise": "0.1.0"}
    write_json(folder / "environment.json", {"platform": "Linux", "cpus": 2, "packages": packages})
    write_json(
        folder / "result.json",
        {
            "recipe": recipe, "seed": seed, "data": "digits", "model": "lenet", "epochs": epochs,
            "best_epoch": dict.fromkeys(tasks, 3) if recipe == "stl" else 3,
            "tasks": [
                {"name": task, "kind": "regression" if task == "size" else "classification",
                 "measures": [{"name": metric[task], "higher_is_better": task != "size",
                               "unit": "", "share": task != "size"}]}
                for task in tasks
            ],
            "val": last, "test": last, "train_seconds": float(epochs), "finished": "",
            "parameters": 2000 if recipe == "stl" else 1000,
        },
    )  # fmt: skip
    return folder


class Checker(HTMLParser):
    """Collects text and attributes, and sees whether every element is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("comparison")
    for recipe in ("ew", "rlw", "stl"):
        for seed in (0, 1):
            make_run(out, recipe, seed)
    return out


@pytest.fixture(scope="module")
def page(comparison: Path) -> str:
    path = report.write(comparison, sorted((comparison / "runs").iterdir()))
    assert path == comparison / "report.html"
    return path.read_text("utf-8")


@pytest.fixture
def run(comparison: Path, tmp_path: Path) -> Path:
    """A copy of a whole run, for damaging."""
    return Path(shutil.copytree(comparison / "runs" / "ew-seed0", tmp_path / "run"))


def test_the_page_stands_alone(page: str) -> None:
    found = Checker(page)
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(found.tags)
    for name, value in found.attributes:
        if name in ("href", "xlink:href", "src"):
            assert value.startswith("#"), value
    addresses = set(re.findall(r"https?://[^\"' )<]+", page))
    assert addresses <= {"http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"}
    assert "@import" not in page
    assert set(re.findall(r"url\([^)]*\)", page)) == set(re.findall(r"url\(#\w+\)", page))


def test_the_page_says_how_the_numbers_were_made(page: str) -> None:
    text = " ".join(Checker(page).text.split())
    for part in (
        "lenet on digits",
        "3 recipes were trained with the seeds 0, 1: 4 epochs, batches of 32, Adam with learning "
        "rate 0.001, precision 32-true.",
        "measured on the validation split",
        "measured on the test split, once",
        "stl: for each task its own",
        "The network has 1,000 parameters; stl, with one network a task, 2,000.",
        "positive is better (the sign of F-MTL)",
        "T: training time, in units of that of ew",
        "Machine: cpu, Linux, 2 CPUs; equipoise 0.1.0, torch 2.13.0.",
        "mean ± sample standard deviation",
        "weights λ of the weighting are all 1 all the time for ew",
    ):
        assert part in text, part


def test_a_schedule_and_published_numbers_are_said(comparison: Path) -> None:
    runs = [read(run) for run in sorted((comparison / "runs").iterdir())]
    summary = summarise([run.summary for run in runs]).summary
    assert "schedule" not in " ".join(report.how(summary, runs))
    assert "best mean score there was chosen" in " ".join(report.how(summary, runs))
    halved = [replace(run, config={**run.config, "schedule": "halve"}) for run in runs]
    assert "learning rate 0.001, schedule halve, pre" in " ".join(report.how(summary, halved))
    baseline = {"source": "someone", "values": {}}
    judged = [replace(run, result={**run.result, "baseline": baseline}) for run in runs]
    assert "best Δm there, against published single-task numbers, was" in " ".join(
        report.how(summary, judged)
    )


def test_the_page_holds_the_table(page: str, comparison: Path) -> None:
    table = summarise([read(run).summary for run in sorted((comparison / "runs").iterdir())])
    text = Checker(page).text
    for column in table.columns():
        for cell, best in zip(column.cells, column.best, strict=True):
            assert cell in text
            assert not best or f"<strong>{cell}</strong>" in page


def test_every_picture_is_there_and_described(page: str) -> None:
    labels = re.findall(r'role="img" aria-label="([^"]*)"', page)
    assert labels == [
        "Test metric of task left against that of task right",
        "Validation accuracy of task left over the epochs",
        "Validation accuracy of task right over the epochs",
        "Training loss of task left over the epochs",
        "Training loss of task right over the epochs",
        "weights λ of the weighting of rlw over the epochs",
        "Percent of conflicting pairs of tasks over the epochs",
    ]


def test_light_and_dark(page: str) -> None:
    assert "prefers-color-scheme: dark" in page and "@media print" in page
    assert "currentColor" in page and figures.INK not in page
    assert "viewport" in page


def test_the_same_runs_give_the_same_page(page: str, comparison: Path) -> None:
    runs = [read(run) for run in sorted((comparison / "runs").iterdir())]
    assert report.page(runs) == page


def test_the_sign_on_request(comparison: Path) -> None:
    runs = [read(comparison / "runs" / f"{recipe}-seed0") for recipe in ("ew", "stl")]
    assert "negative is better (the sign of IGB)" in report.page(runs, sign="drop")


def test_hostile_names_are_text(tmp_path: Path) -> None:
    tasks = ("<script>alert(1)</script>", '$x_1$ & "y"', "size")
    recipe = '"><img src=x onerror=alert(1)>'
    runs = [read(make_run(tmp_path, recipe, 0, tasks)), read(make_run(tmp_path, "rlw", 0, tasks))]
    page = report.page(runs)
    found = Checker(page)
    assert not {"script", "img"} & set(found.tags)
    assert not any(name.startswith("on") for name, _ in found.attributes)
    for text in (*tasks, recipe):
        assert text in found.text
    # In the pictures too, where a "$" would start a formula.
    assert found.text.count(tasks[1]) > 3


def test_global_settings_of_matplotlib_stay(comparison: Path) -> None:
    before = dict(matplotlib.rcParams)
    pyplot = "matplotlib.pyplot" in sys.modules
    report.page([read(comparison / "runs" / "ew-seed0")])
    assert dict(matplotlib.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == pyplot


def test_many_tasks_are_compared_one_by_one(tmp_path: Path) -> None:
    tasks = ("odd", "large", "size")
    runs = [read(make_run(tmp_path, recipe, 0, tasks)) for recipe in ("rlw", "ew")]
    page = report.page(runs)
    assert "Improvement of each recipe over ew, task by task" in page, "no stl: against ew"
    assert "improvement over ew (%) → better" in page
    assert "Lines are means over seeds" not in page and "faint" not in page


def test_one_task_and_one_run(tmp_path: Path) -> None:
    text = Checker(report.page([read(make_run(tmp_path, "ew", 0, ("left",)))])).text
    assert "1 recipe was trained" in text and "Task against task" not in text
    assert "Conflicting gradients" not in text


def test_unfinished_and_failed_runs_are_named(comparison: Path, tmp_path: Path) -> None:
    names = ["ew-seed0", "rlw-seed0", "rlw-seed1", "stl-seed0"]
    runs = [Path(shutil.copytree(comparison / "runs" / n, tmp_path / "runs" / n)) for n in names]
    (runs[1] / "result.json").unlink()
    for name in ("result.json", "metrics.csv", "environment.json"):
        (runs[2] / name).unlink()
    trace = "Traceback ...\nequipoise.errors.NonFiniteError: task 'left': loss is <nan>.\n"
    (runs[2] / "error.txt").write_text(trace)
    listed = [f"runs/{name}" for name in (*names, "mgda-seed0")]
    write_json(tmp_path / "comparison.json", {"runs": listed})
    # Only the finished are given; the others are found.
    text = Checker(report.write(tmp_path, [runs[0], runs[3]]).read_text("utf-8")).text
    assert "rlw, seed 0: not finished; 4 of 4 epochs are done" in text
    assert "rlw, seed 1: failed (task 'left': loss is <nan>.); 0 of 4 epochs are done" in text
    assert "mgda-seed0: not started" in text
    assert "0 of 2" in text
    rows = [line for line in text.split("\n") if line in ("ew", "rlw", "stl")]
    assert rows[:3] == ["ew", "rlw", "stl"], "in the order of the comparison"


def test_nothing_but_an_unfinished_run(run: Path) -> None:
    (run / "result.json").unlink()
    page = report.page([read(run)])
    assert "No run has finished" in page
    assert "Training loss of task left over the epochs" in page, "what there is, is shown"


def test_different_settings_are_shown(comparison: Path, run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    write_json(run / "config.json", {**config, "lr": 0.5})
    text = Checker(report.page([read(run), read(comparison / "runs" / "stl-seed0")])).text
    assert "Not the same in all runs" in text and "lr 0.5" in text
    assert "learning rate" not in text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "holds no run: it has no config.json"),
        ("config.json", "{", "config.json cannot be read"),
        ("config.json", "[]", "config.json cannot be read"),
        ("config.json", "{}", "config.json is damaged: it has no 'recipe'"),
        ("result.json", '{"recipe": "ew"', "result.json cannot be read"),
        ("result.json", "{}", "result.json is damaged: it has no 'best_epoch'"),
        ("environment.json", "?", "environment.json cannot be read"),
        ("metrics.csv", "epoch,score\n1,high\n", "metrics.csv is damaged"),
        ("metrics.csv", "epoch,score\n1\n", "metrics.csv is damaged"),
        ("metrics.csv", "score\n1\n", "metrics.csv is damaged: a row has no epoch"),
    ],
)
def test_damaged_runs(run: Path, name: str, content: str | None, message: str) -> None:
    (run / name).unlink()
    if content is not None:
        (run / name).write_text(content)
    with pytest.raises(EquipoiseError) as caught:
        read(run)
    assert message in str(caught.value)
    assert str(run) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("tasks", [{"name": "left"}]), ("test", {"left": {"accuracy": "high"}}), ("test", {"left": 3}),
     ("tasks", [{"name": "left", "kind": "", "measures": [{"name": "accuracy"}]}]),
     ("val", 3), ("parameters", None),
     ("sizes", {"train": 5, "val": 5}), ("sizes", {"train": 5, "val": 5, "test": "x"}),
     ("sizes", 3)],
)  # fmt: skip
def test_damaged_results(run: Path, key: str, value: Any) -> None:
    result = json.loads((run / "result.json").read_text())
    write_json(run / "result.json", {**result, key: value})
    with pytest.raises(EquipoiseError, match="result.json is damaged: "):
        read(run)


def test_wrong_folders(tmp_path: Path, run: Path) -> None:
    with pytest.raises(EquipoiseError, match="there is no folder"):
        report.write(tmp_path / "none", [run])
    with pytest.raises(EquipoiseError, match="there is no folder"):
        report.write(tmp_path, [tmp_path / "none"])
    with pytest.raises(EquipoiseError, match="there is no run to report"):
        report.write(tmp_path, [])


def test_a_page_that_cannot_be_written_leaves_no_draft(tmp_path: Path, run: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(EquipoiseError, match="cannot write"):
        report.write(tmp_path, [run])
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "run"}


def test_runs_of_different_lengths_share_an_axis() -> None:
    runs = [
        {"epoch": np.array([1.0, 2.0, 3.0]), "x": np.array([1.0, 2.0, np.nan])},
        {"epoch": np.array([1.0]), "x": np.array([5.0])},
        {"epoch": np.array([1.0])},
    ]
    found = figures.over_epochs(runs, "x")
    assert found is not None
    np.testing.assert_array_equal(found[0], [1, 2, 3])
    np.testing.assert_array_equal(found[1], [[1, 2, np.nan], [5, np.nan, np.nan]])
    assert figures.over_epochs(runs, "y") is None


def test_the_mean_and_the_band_are_those_of_the_seeds() -> None:
    runs = [{"epoch": np.array([1.0, 2.0]), "x": np.array(v)} for v in ([1.0, 2.0], [3.0, 6.0])]
    figure = figures.curves({"ew": runs}, "x", "", "x", figures.looks(["ew"]), factor=10)
    (axes,) = figure.axes
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [20, 40])
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert set(band) == {10, 20, 30, 60}


def test_long_runs_are_framed_by_their_later_part() -> None:
    values = np.array([0.0, *np.linspace(0.90, 0.95, 19)])
    run = {"epoch": np.arange(1.0, 21.0), "x": values}
    figure = figures.curves({"ew": [run]}, "x", "", "x", figures.looks(["ew"]))
    low, high = figure.axes[0].get_ylim()
    assert 0.85 < low < 0.92 and 0.95 < high < 1


def test_looks_tell_names_apart() -> None:
    names = [f"recipe {i}" for i in range(20)]
    looks = figures.looks([*names, "stl"])
    assert len(set(looks.values())) == 21
    assert len({looks[name].colour for name in names[:8]}) == 8
    assert looks["stl"] == figures.looks(["stl", "ew"])["stl"]


@pytest.mark.parametrize("colour", figures.COLOURS)
@pytest.mark.parametrize("paper", ["#ffffff", "#14171a"])
def test_colours_can_be_seen_on_both_papers(colour: str, paper: str) -> None:
    """Contrast of 3 to 1, what WCAG 2.1 (1.4.11) asks of graphics."""

    def luminance(code: str) -> float:
        parts = np.array([int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted((luminance(colour), luminance(paper)))
    assert (high + 0.05) / (low + 0.05) >= 3
