"""The table: numbers by hand, every notation, what is missing, what is refused."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from typing import Any

import pytest

from equipoise.errors import EquipoiseError
from equipoise.lab.results import upgraded
from equipoise.lab.summary import Spread
from equipoise.lab.table import summarise

ACCURACY = {"name": "accuracy", "higher_is_better": True, "unit": "", "share": True}
MAE = {"name": "mae", "higher_is_better": False, "unit": "px", "share": False}
LEFT = {"name": "left", "kind": "classification", "measures": [ACCURACY]}
SIZE = {"name": "size", "kind": "regression", "measures": [MAE]}
TASKS = [LEFT, SIZE]


def result(recipe: str, seed: int, left: float, size: float, seconds: float, **more: Any) -> dict:
    return {
        "recipe": recipe, "seed": seed, "data": "digits", "model": "lenet", "tasks": TASKS,
        "epochs": 3, "best_epoch": 2, "val": {},
        "test": {"left": {"accuracy": left}, "size": {"mae": size}},
        "train_seconds": seconds, "parameters": 10, "finished": "", **more,
    }  # fmt: skip


@pytest.fixture
def results() -> list[dict]:
    return [
        result("ew", 0, 0.70, 2.2, 9.0),
        result("ew", 1, 0.80, 2.0, 11.0),
        result("mgda", 0, 0.50, 1.0, 14.0),
        result("mgda", 1, 0.62, 1.2, 16.0),
        result("stl", 0, 0.75, 2.0, 30.0),
        result("stl", 1, 0.85, 3.0, 10.0),
    ]


def cells(text: str, recipe: str) -> list[str]:
    """The cells of one line of the plain table."""
    line = next(line for line in text.splitlines() if line.split()[:1] == [recipe])
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_mean_and_sample_standard_deviation() -> None:
    spread = Spread((1.0, 2.0, 4.0))
    assert spread.mean == pytest.approx(7 / 3)
    assert spread.std == pytest.approx(math.sqrt(((4 / 3) ** 2 + (1 / 3) ** 2 + (5 / 3) ** 2) / 2))
    assert Spread((1.0,)).std is None


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((1.23456,), "1.235"),
        ((123.456,), "123.5"),
        ((12345.6,), "12346"),
        ((0.00123456,), "0.001235"),
        ((1.2e-7,), "1.200e-07"),
        ((3.2e9, 3.4e9), "3.300e+09 ± 1.4e+08"),
        ((0.0,), "0.000"),
        ((2.0, 2.2), "2.100 ± 0.141"),
        ((-5.0, 4.0), "-0.5000 ± 6.3640"),
    ],
)
def test_four_significant_digits(values: tuple[float, ...], text: str) -> None:
    assert Spread(values).format() == text


def test_no_negative_zero() -> None:
    assert Spread((-1e-9, -1e-9)).format(2) == "0.00 ± 0.00"
    assert Spread((-1e-9,)).format(2, plus=True) == "+0.00"


def test_numbers_by_hand(results: list[dict]) -> None:
    summary = summarise(results).summary
    ew, mgda, stl = summary.rows
    assert ew.metrics["left"]["accuracy"].mean == pytest.approx(0.75)
    assert ew.metrics["left"]["accuracy"].std == pytest.approx(statistics.stdev([0.7, 0.8]))
    # stl: 0.8 and 2.5, mean over its seeds; mgda: 0.5 and 1.0, then 0.62 and 1.2.
    first = (100 * (0.5 - 0.8) / 0.8 - 100 * (1.0 - 2.5) / 2.5) / 2
    second = (100 * (0.62 - 0.8) / 0.8 - 100 * (1.2 - 2.5) / 2.5) / 2
    assert mgda.delta_m is not None and stl.delta_m is not None
    assert mgda.delta_m.values == pytest.approx((first, second))
    assert stl.delta_m.mean == pytest.approx(0, abs=1e-12)
    assert [row.relative_time for row in summary.rows] == pytest.approx([1.0, 1.5, 2.0])


def test_both_signs_are_named(results: list[dict]) -> None:
    improvement, drop = summarise(results), summarise(results, sign="drop")
    for better, worse in zip(improvement.summary.rows, drop.summary.rows, strict=True):
        assert better.delta_m is not None and worse.delta_m is not None
        assert worse.delta_m.mean == pytest.approx(-better.delta_m.mean / 100, abs=1e-15)
    assert "in percent, positive is better (the sign of F-MTL)" in improvement.caption
    assert "as a fraction, negative is better (the sign of IGB)" in drop.caption
    assert cells(improvement.text(), "mgda")[3] == "+13.00 ± 2.47*"
    assert cells(drop.text(), "mgda")[3] == "-0.1300 ± 0.0247*"


def test_plain_text(results: list[dict]) -> None:
    text = summarise(results).text()
    assert cells(text, "ew")[:3] == ["ew", "75.00 ± 7.07", "2.100 ± 0.141"]
    assert cells(text, "ew")[4:] == ["1.00*", "2"]
    assert cells(text, "stl")[1] == "80.00 ± 7.07*"
    assert cells(text, "mgda")[2] == "1.100 ± 0.141*"
    assert "accuracy (%) ↑" in text and "mae (px) ↓" in text
    lines = text.splitlines()
    rows = [line for line in lines if line.split()[:1] in (["ew"], ["mgda"], ["stl"])]
    assert len({len(line) for line in rows}) == 1, "the columns are aligned"


def test_what_reads_the_same_is_marked_the_same() -> None:
    table = summarise([result("ew", 0, 0.70001, 1, 1), result("si", 0, 0.70002, 2, 1)])
    assert [column.best for column in table.columns()[1:3]] == [[True, True], [True, False]]


def test_a_single_row_is_not_called_the_best(results: list[dict]) -> None:
    table = summarise(results[:2])
    assert "*" not in table.text()
    assert not any(any(column.best) for column in table.columns())


def test_one_seed_has_no_spread(results: list[dict]) -> None:
    table = summarise(results[::2])
    assert "±" not in table.text()
    assert "seed 0 alone" in table.text()
    assert json.loads(table.json())["rows"][0]["test"]["left"]["accuracy"]["std"] is None


def test_without_stl_and_ew_a_dash_and_a_note(results: list[dict]) -> None:
    text = summarise(results[2:4]).text()
    assert cells(text, "mgda")[3:5] == ["–", "–"]
    assert "No Δm without a finished run of stl." in text
    assert "No T without a finished run of ew." in text


def test_failed_runs_are_shown_as_failed(results: list[dict]) -> None:
    failed = [
        {"recipe": "cagrad", "seed": 0, "failed": "task 'left': loss\n is nan."},
        {"recipe": "ew", "seed": 2},
    ]
    table = summarise(results + failed)
    text = table.text()
    assert cells(text, "cagrad") == ["cagrad", "failed", "–", "–", "–", "0 of 1"]
    assert cells(text, "ew")[-1] == "2 of 3"
    assert "cagrad, seed 0: task 'left': loss is nan." in text
    assert "ew, seed 2: not finished" in text
    assert table.summary.rows[0].metrics["left"]["accuracy"].mean == pytest.approx(0.75)


def test_nothing_but_failures() -> None:
    table = summarise([{"recipe": "ew", "seed": 0, "failed": "killed"}])
    assert "No run has finished" in table.text() and "ew, seed 0: killed" in table.text()
    assert "| ew | 0 of 1 |" in table.markdown()
    assert table.csv() and json.loads(table.json())["rows"][0]["delta_m"] is None


def test_a_task_without_test_labels_is_left_out(results: list[dict]) -> None:
    for bad in results[:2]:
        bad["test"] = {"left": bad["test"]["left"], "size": {"mae": float("nan")}}
    table = summarise(results)
    assert cells(table.text(), "ew")[2] == "–"
    row = table.summary.rows[0]
    assert row.delta_m is not None
    assert row.delta_m.mean == pytest.approx(100 * (0.75 - 0.8) / 0.8)
    assert "NaN" not in table.json()


def test_a_delta_over_fewer_tasks_is_said(results: list[dict]) -> None:
    results[0]["test"] = {"left": {"accuracy": 0.7}, "size": {"mae": float("nan")}}
    notes = " ".join(summarise(results).summary.notes)
    assert "ew has no test value of size" in notes


def test_a_baseline_of_zero_has_no_delta(results: list[dict]) -> None:
    for single in results[4:]:
        single["test"]["size"]["mae"] = 0.0
    text = summarise(results).text()
    assert cells(text, "mgda")[3] == "–"
    assert "Δm is not defined: baseline['size mae'] is 0" in text


def test_markdown(results: list[dict]) -> None:
    results[0]["recipe"] = results[1]["recipe"] = "a|b*c"
    lines = summarise(results).markdown().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + 3
    assert {line.replace("\\|", "").count("|") for line in table} == {7}
    assert r"a\|b\*c" in table[2]
    assert "**1.100 ± 0.141**" in table[3]


def test_csv_has_all_digits(results: list[dict]) -> None:
    results[0]["test"]["left"]["accuracy"] = 1 / 3
    results[1]["test"]["left"]["accuracy"] = 2 / 7
    rows = list(csv.DictReader(io.StringIO(summarise(results).csv())))
    assert [row["recipe"] for row in rows] == ["ew", "mgda", "stl"]
    assert float(rows[0]["accuracy/test/left/mean"]) == statistics.fmean([1 / 3, 2 / 7])
    assert float(rows[0]["accuracy/test/left/std"]) == statistics.stdev([1 / 3, 2 / 7])
    assert float(rows[1]["relative_time"]) == 1.5
    assert "delta_m/improvement/mean" in rows[0]


def test_json_holds_every_seed(results: list[dict]) -> None:
    found = json.loads(summarise(results, sign="drop").json())
    assert found["sign"] == "drop"
    assert found["rows"][1]["test"]["size"]["mae"]["values"] == [1.0, 1.2]
    assert found["rows"][1]["seeds"] == [0, 1]


def test_different_lengths_are_said(results: list[dict]) -> None:
    results[0]["epochs"] = 5
    assert "of different lengths: 3, 5 epochs" in summarise(results).text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.clear(), "there is no run"),
        (lambda r: r.append(r[0]), "ew with seed 0 is there twice"),
        (lambda r: r[3].update(data="faces"), "one data, but ew has digits and mgda has faces"),
        (lambda r: r[3].update(model="resnet"), "one model, but ew has lenet and mgda has resnet"),
        (
            lambda r: r[3].update(tasks=TASKS[:1]),
            r"ew has left \(accuracy\), size \(mae\) and mgda has left \(accuracy\).",
        ),
    ],
)
def test_what_is_refused(results: list[dict], change: Any, message: str) -> None:
    change(results)
    with pytest.raises(EquipoiseError, match=message):
        summarise(results)


def test_an_unknown_sign_is_refused(results: list[dict]) -> None:
    with pytest.raises(EquipoiseError, match="sign is 'gain'; give 'improvement' or 'drop'"):
        summarise(results, sign="gain")


def test_many_tasks_come_last_and_wide_tables_go_on_below() -> None:
    tasks = [{**LEFT, "name": f"attribute {i}"} for i in range(12)]
    test = {task["name"]: {"accuracy": 0.5 + 0.01 * i} for i, task in enumerate(tasks)}
    table = summarise(
        [result(recipe, 0, 0, 0, 1, tasks=tasks, test=test) for recipe in ("ew", "stl")]
        + [{"recipe": "mgda", "seed": 0}]
    )
    assert [c.heading[0] for c in table.columns()[:5]] == [
        "recipe", "Δm", "T", "seeds", "attribute 0",
    ]  # fmt: skip
    text = table.text()
    assert max(map(len, text.splitlines())) <= 100
    blocks = [part for part in text.split("\n\n") if part.lstrip().startswith(("recipe", "Δm"))]
    assert len(blocks) >= 2
    for part in blocks:
        assert [line.split()[0] for line in part.splitlines()[-3:]] == ["ew", "stl", "mgda"]
    assert text.count("attribute ") == 12
    assert cells(text, "mgda")[1] == "failed"


DENSE = [
    {"name": "segmentation", "kind": "segmentation", "measures": [
        {"name": "mIoU", "higher_is_better": True, "unit": "", "share": True},
        {"name": "pixel accuracy", "higher_is_better": True, "unit": "", "share": True}]},
    {"name": "depth", "kind": "depth", "measures": [
        {"name": "abs error", "higher_is_better": False, "unit": "m", "share": False}]},
]  # fmt: skip


def dense(recipe: str, iou: float, right: float, depth: float, **more: Any) -> dict:
    test = {"segmentation": {"mIoU": iou, "pixel accuracy": right}, "depth": {"abs error": depth}}
    return result(recipe, 0, 0, 0, 1, tasks=DENSE, test=test, **more)


@pytest.mark.parametrize(
    ("over", "delta", "words"),
    # mIoU 25 % better, pixel accuracy 10 % worse, depth 20 % better.
    [("metrics", (25 - 10 + 20) / 3, "over all 3 metrics"),
     ("tasks", (7.5 + 20) / 2, "over the means of the tasks")],
)  # fmt: skip
def test_several_metrics_of_a_task(over: Any, delta: float, words: str) -> None:
    runs = [dense("ew", 0.5, 0.54, 0.4), dense("stl", 0.4, 0.6, 0.5)]
    table = summarise(runs, over=over)
    found = table.summary.rows[0].delta_m
    assert found is not None and found.mean == pytest.approx(delta)
    assert words in " ".join(table.text().split())
    assert [column.heading for column in table.columns()[1:4]] == [
        ("segmentation", "mIoU (%) ↑"),
        ("segmentation", "pixel accuracy (%) ↑"),
        ("depth", "abs error (m) ↓"),
    ]
    (first, *_) = csv.DictReader(io.StringIO(table.csv()))
    assert float(first["pixel accuracy/test/segmentation/mean"]) == 0.54
    assert json.loads(table.json())["rows"][0]["test"]["segmentation"]["mIoU"]["values"] == [0.5]


def test_a_metric_without_a_number_is_named(results: list[dict]) -> None:
    table = summarise([dense("ew", 0.5, math.nan, 0.4), dense("stl", 0.4, 0.6, 0.5)])
    assert "ew has no test value of segmentation: pixel accuracy; its Δm" in table.text()
    found = table.summary.rows[0].delta_m
    assert found is not None and found.mean == pytest.approx((25 + 20) / 2)


def test_a_published_baseline_stands_in_for_runs_and_is_named() -> None:
    values = {"segmentation": {"mIoU": 0.4, "pixel accuracy": 0.6}, "depth": {"abs error": 0.5}}
    baseline = {"source": "an old table", "values": values}
    table = summarise([dense("ew", 0.5, 0.54, 0.4, baseline=baseline)])
    found = table.summary.rows[0].delta_m
    assert found is not None and found.mean == pytest.approx((25 - 10 + 20) / 3)
    assert "Δm is against numbers of an old table" in table.text()
    own = [dense("ew", 0.5, 0.54, 0.4, baseline=baseline), dense("stl", 0.5, 0.54, 0.4)]
    found = summarise(own).summary.rows[0].delta_m
    assert found is not None and found.mean == pytest.approx(0), "runs of one's own go first"
    assert "an old table" not in summarise(own).text()


def test_delta_over_something_else_is_refused(results: list[dict]) -> None:
    with pytest.raises(EquipoiseError, match="over 'seeds'; give 'metrics' or 'tasks'"):
        summarise(results, over="seeds")


def test_results_of_older_versions_are_read() -> None:
    """They had one number a task, and the measure in the task."""
    new = result("ew", 0, 0.7, 2.0, 1.0)
    old = {
        **new,
        "val": {"left": 0.8, "size": None},
        "test": {"left": 0.7, "size": 2.0},
        "tasks": [
            {"name": "left", "kind": "classification", "metric": "accuracy",
             "higher_is_better": True, "unit": ""},
            {"name": "size", "kind": "regression", "metric": "mae",
             "higher_is_better": False, "unit": "px"},
        ],
    }  # fmt: skip
    val = {"left": {"accuracy": 0.8}, "size": {"mae": None}}
    assert upgraded(old) == {**new, "val": val}
    assert upgraded(new) == new
    assert upgraded({"tasks": 3}) == {"tasks": 3}
