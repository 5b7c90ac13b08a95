"""`equipoise diagnose`: what it measures, writes, keeps and refuses; its page and the report's."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

from equipoise import diagnostics as measures
from equipoise.errors import EquipoiseError
from equipoise.lab import diagnose as diagnosing_one
from equipoise.lab import diagnosing, diagnosis, ood, report
from equipoise.lab.cli import main
from equipoise.lab.config import ConfigError, RunConfig
from equipoise.lab.data import DATASETS, load
from equipoise.lab.data.base import Data, DataError, Split
from equipoise.lab.data.digits import multidigits
from equipoise.lab.diagnose import Subject, density, diagnose, separation
from equipoise.lab.diagnose_settings import MEASURES, Settings
from equipoise.lab.evaluation import evaluate
from equipoise.lab.files import read_json, write_json
from equipoise.lab.networks import selected
from equipoise.lab.runs import train

DATA = "multidigits(sizes=(96, 32, 64))"
MIXED = "digits-attributes(missing=0.3, sizes=(96, 32, 64))"
QUICK = Settings(samples=40, radii="5%,50%,500%", draws=2, points=3, ood="inverted")
ARGUMENTS = ("--samples", "40", "--radii", "5%,50%,500%", "--draws", "2", "--points", "3",
             "--ood", "inverted", "--device", "cpu")  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of each kind, for reading."""
    out = tmp_path_factory.mktemp("runs")
    made = {}
    for name, recipe, data in (
        ("plain", "mean", DATA), ("flat", "f-mean", DATA), ("stl", "stl", DATA),
        ("mixed", "ew", MIXED),
    ):  # fmt: skip
        config = RunConfig.of(
            recipe=recipe, data=data, epochs=2, batch_size=32, lr=0.01, device="cpu"
        )
        made[name] = out / name
        train(config, made[name])
    return made


@pytest.fixture(scope="module")
def measured(trained: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """All measures of all of them; `trained` has their files from then on."""
    found = {}
    for name, folder in trained.items():
        found[name] = diagnose(folder, QUICK, device="cpu")
        diagnosing.diagnose_page.write(folder)
    return found


@pytest.fixture
def run(trained: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the flat run without any measure."""
    ignored = shutil.ignore_patterns("diagnostics.*")
    return Path(shutil.copytree(trained["flat"], tmp_path / "run", ignore=ignored))


@pytest.fixture
def equipoise(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["equipoise", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return (ended.value.code, *capsys.readouterr())

    return call


# ---------------------------------------------------------------------- what is measured


def test_everything_is_there_for_two_classifications(measured: Any, trained: Any) -> None:
    found = measured["flat"]
    assert read_json(trained["flat"] / "diagnostics.json") == found
    assert tuple(found["measures"]) == MEASURES
    assert found["run"]["recipe"] == "f-mean" and found["run"]["seed"] == 0
    assert {t["kind"] for t in found["tasks"].values()} == {"classification"}
    for name, measure in found["measures"].items():
        assert measure["seconds"] >= 0
        if name != "conflict":
            assert set(measure["tasks"]) == {"left", "right"} and measure["left_out"] == {}
    robust = found["measures"]["robustness"]["tasks"]["left"]
    assert robust["measure"] == "accuracy"
    assert robust["relative_radii"] == pytest.approx([0.05, 0.5, 5])
    length = robust["length"]
    assert robust["radii"] == pytest.approx([0.05 * length, 0.5 * length, 5 * length])
    assert [len(row) for row in robust["values"]] == [2, 2, 2]
    entropy = found["measures"]["entropy"]
    assert entropy["ood"] == "inverted"
    assert sum(entropy["tasks"]["left"]["in"]["counts"]) == 64, "the whole test split"
    assert sum(entropy["tasks"]["left"]["out"]["counts"]) == 64
    assert entropy["tasks"]["left"]["most"] == pytest.approx(math.log(10))
    assert found["measures"]["surface"]["coordinates"] == [-0.5, 0, 0.5]
    assert len(found["measures"]["sharpness"]["tasks"]["right"]["increase"]) == 7


def test_the_selected_network_is_measured(measured: Any, trained: Any) -> None:
    """Accuracy, loss and conflict are those that training itself has written down."""
    for name in ("plain", "flat", "stl"):
        folder, found = trained[name], measured[name]["measures"]
        test = read_json(folder / "result.json")["test"]
        for task, values in test.items():
            value = values["accuracy"]
            assert found["calibration"]["tasks"][task]["accuracy"] == pytest.approx(value)
    best = read_json(trained["flat"] / "result.json")["best_epoch"]
    history = report.read(trained["flat"]).history
    assert (
        measured["flat"]["measures"]["conflict"]["selected"] == history["conflict/probe"][best - 1]
    )


def test_the_same_samples_for_every_measure_and_run(measured: Any, trained: Any) -> None:
    """Middle of the surface, start of the sharpness: one loss, of the 40 samples drawn for all."""
    config = RunConfig.of(**read_json(trained["flat"] / "config.json"))
    data = load(config.data)
    model = selected(config, data, trained["flat"])
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:40].sort().values
    losses, accuracies = evaluate(model, data.tasks, [data.test[order]], torch.no_grad)
    found = measured["flat"]["measures"]
    for task in ("left", "right"):
        assert found["surface"]["tasks"][task][1][1] == pytest.approx(losses[task], rel=1e-5)
        assert found["sharpness"]["tasks"][task]["loss"] == pytest.approx(losses[task], rel=1e-5)
        clean = found["robustness"]["tasks"][task]["clean"]
        assert clean == pytest.approx(accuracies[task]["accuracy"])


def test_chance_is_one_answer_for_all(measured: Any, trained: Any) -> None:
    data = load(DATA)
    for task in ("left", "right"):
        common = data.test.targets[task].mode().values
        share = float((data.test.targets[task] == common).float().mean())
        assert measured["flat"]["tasks"][task]["chance"] == pytest.approx(share)


def test_half_radius(measured: Any) -> None:
    for name in ("flat", "mixed"):
        for task, found in measured[name]["measures"]["robustness"]["tasks"].items():
            chance, clean = measured[name]["tasks"][task]["chance"], found["clean"]
            sign = 1 if found["measure"] == "accuracy" else -1
            if sign * clean <= sign * chance:
                assert found["half_radius"] is None
                continue
            level = (clean + chance) / 2
            means = [clean, *(sum(row) / 2 for row in found["values"])]
            below = [k for k, mean in enumerate(means) if sign * mean < sign * level]
            radii = [0.0, *found["radii"]]
            assert found["half_reached"] == bool(below)
            if below:
                assert radii[below[0] - 1] <= found["half_radius"] <= radii[below[0]]
            else:
                assert found["half_radius"] == pytest.approx(radii[-1])
            relative = found["half_relative_radius"] * found["length"]
            assert relative == pytest.approx(found["half_radius"])


def test_single_task_networks_are_moved_by_themselves(measured: Any, trained: Any) -> None:
    found = measured["stl"]["measures"]
    assert set(found["conflict"]["left_out"]) == {"left", "right"}
    assert "selected" not in found["conflict"]
    state = selected(
        RunConfig.of(**read_json(trained["stl"] / "config.json")), load(DATA), trained["stl"]
    ).named_parameters()
    square = dict.fromkeys(("left", "right"), 0.0)
    for name, p in state:
        task = next(part for part in name.split(".") if part in square)
        square[task] += float(p.detach().double().square().sum())
    for task, value in square.items():
        robust = found["robustness"]["tasks"][task]
        assert robust["length"] == pytest.approx(math.sqrt(value))
    assert len(found["surface"]["tasks"]) == 2 and len(found["sharpness"]["tasks"]) == 2


def test_regression_has_losses_and_no_probabilities(measured: Any) -> None:
    found = measured["mixed"]["measures"]
    for name in ("entropy", "calibration"):
        assert found[name]["left_out"] == {"slant": "regression gives no probabilities"}
        assert "slant" not in found[name]["tasks"] and len(found[name]["tasks"]) == 5
    robust = found["robustness"]["tasks"]
    assert robust["slant"]["measure"] == "loss" and robust["odd"]["measure"] == "accuracy"
    assert all(value > 0 for row in robust["slant"]["values"] for value in row)
    assert measured["mixed"]["tasks"]["slant"]["chance"] == 1
    assert found["entropy"]["tasks"]["odd"]["most"] == pytest.approx(math.log(2))
    assert "slant" in found["surface"]["tasks"] and "slant" in found["sharpness"]["tasks"]


def test_the_same_numbers_again_and_the_same_directions_for_all(
    run: Path, measured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(5)  # of no influence
    drawn = []
    noise = measures.noise_robustness

    def noted(*given: Any) -> Any:
        drawn.append(given[-1].initial_seed())
        return noise(*given)

    monkeypatch.setattr(measures, "noise_robustness", noted)
    found = diagnose(run, QUICK, device="cpu")
    for name in MEASURES:
        first, second = (dict(x["measures"][name]) for x in (found, measured["flat"]))
        assert {**first, "seconds": 0} == {**second, "seconds": 0}
    write_json(run / "config.json", {**read_json(run / "config.json"), "seed": 7})
    diagnose(run, QUICK, device="cpu", again=True)
    assert drawn == [0, 0], "whatever the seed of the run"


def test_nothing_of_the_run_is_changed(run: Path) -> None:
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    diagnose(run, Settings(only=("calibration", "sharpness"), samples=20), device="cpu")
    after = {path.name: path.read_bytes() for path in run.iterdir()}
    assert set(after) - set(before) == {"diagnostics.json"}
    assert all(after[name] == content for name, content in before.items())


def test_density_and_separation() -> None:
    most = math.log(10)
    found = density(torch.tensor([0.0, 0.0, most], dtype=torch.float64), most)
    assert found["counts"][0] == 2 and found["counts"][-1] == 1 and found["counts"].sum() == 3
    inside = torch.tensor([1.0, 2.0, 3.0])
    assert separation(inside, torch.tensor([4.0, 5.0])) == 1
    assert separation(inside, torch.tensor([0.0])) == 0
    assert separation(inside, torch.tensor([2.0])) == 0.5, "a tie counts half"
    pairs = [(a > b) + 0.5 * (a == b) for a in (0.0, 1.0, 2.5) for b in (1.0, 2.0, 3.0)]
    assert separation(inside, torch.tensor([0.0, 1.0, 2.5])) == pytest.approx(sum(pairs) / 9)


# ---------------------------------------------------------------------- going on, and again


def test_a_killed_call_goes_on_with_what_is_missing(
    run: Path, measured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, asked = Subject.measure, []

    def killed(self: Subject, name: Any) -> dict[str, Any]:
        if name == "calibration":
            raise KeyboardInterrupt
        return measure(self, name)

    monkeypatch.setattr(Subject, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        diagnose(run, QUICK, device="cpu")
    there = read_json(run / "diagnostics.json")
    assert tuple(there["measures"]) == MEASURES[:3]

    def counted(self: Subject, name: Any) -> dict[str, Any]:
        asked.append(name)
        return measure(self, name)

    monkeypatch.setattr(Subject, "measure", counted)
    found = diagnose(run, QUICK, device="cpu")
    assert tuple(asked) == MEASURES[3:]
    for name in MEASURES[:3]:
        assert found["measures"][name] == there["measures"][name], "not measured twice"
    for name in MEASURES:
        ours, theirs = found["measures"][name], measured["flat"]["measures"][name]
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    diagnose(run, QUICK, device="cpu")
    assert len(asked) == 3, "nothing is missing"
    diagnose(run, Settings(("calibration",)), device="cpu", again=True)
    assert asked[3:] == ["calibration"]


def test_other_settings_are_not_mixed(run: Path) -> None:
    one = Settings(("surface",), samples=20, points=3)
    diagnose(run, one, device="cpu")
    for other, sentence in (
        (Settings(("surface",), samples=30, points=3), "surface with samples 20, not 30"),
        (Settings(("surface",), samples=20, points=5), "surface with points 3, not 5"),
        (Settings(("surface",), samples=20, points=3, span=1), "surface with span 0.5, not 1"),
    ):
        with pytest.raises(ConfigError, match=f"{sentence}; give --again"):
            diagnose(run, other, device="cpu")
    diagnose(run, Settings(("calibration",), points=5), device="cpu")  # it has no points
    found = diagnose(run, Settings(("surface",), 20, points=5), device="cpu", again=True)
    assert len(found["measures"]["surface"]["coordinates"]) == 5
    assert "calibration" in found["measures"], "the others stay"


def test_a_run_that_was_made_anew_is_measured_anew(run: Path) -> None:
    diagnose(run, Settings(("calibration",)), device="cpu")
    write_json(run / "result.json", {**read_json(run / "result.json"), "finished": "later"})
    assert diagnosis.read(run, read_json(run / "result.json")) is None
    assert list(diagnose(run, Settings(("conflict",)), device="cpu")["measures"]) == ["conflict"]


def test_progress_rises_to_one(run: Path) -> None:
    seen: list[tuple[float, str]] = []
    diagnose(run, QUICK, device="cpu", progress=lambda *now: seen.append(now))
    shares = [share for share, _ in seen]
    assert shares == sorted(shares) and 0.9 < shares[-1] <= 1
    assert list(dict.fromkeys(name for _, name in seen)) == list(MEASURES)


# ---------------------------------------------------------------------- out of the domain


def test_what_is_spoilt() -> None:
    images = torch.rand(3, 2, 4, 4)
    assert torch.equal(ood.inverted(images, 0), 1 - images)
    mixed = ood.shuffled(images, 0)
    assert not torch.equal(mixed, images) and torch.equal(mixed, ood.shuffled(images, 0))
    assert torch.equal(mixed.flatten(2).sort().values, images.flatten(2).sort().values)
    order = torch.arange(16.0).expand(3, 2, 16).reshape(3, 2, 4, 4)
    first, *others = ood.shuffled(order, 0).flatten(0, 1)
    assert all(torch.equal(first, other) for other in others), "one order for all"


def test_the_usual_partner(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig.of(recipe="ew", data="multifashion(test=50, train=30, val=2)")
    ood._partner.cache_clear()
    assert ood.usual(config) is None, "its files are not there"
    given: dict[str, Any] = {}

    def partner(
        root: object = None, seed: int = 0, *, train: int = 9, val: int = 9, test: int = 9
    ) -> Data:
        given.update(train=train, val=val, test=test)
        return multidigits(seed=seed, sizes=(8, 8, 8))

    monkeypatch.setitem(DATASETS, "multimnist", partner)
    ood._partner.cache_clear()
    assert ood.usual(config) == "multimnist(test=50, train=1, val=1)"
    assert given == {"train": 1, "val": 1, "test": 50}
    ood._partner.cache_clear()
    assert ood.usual(RunConfig.of(recipe="ew", data=DATA)) is None


def test_inputs_of_another_shape() -> None:
    data = load(DATA)
    with pytest.raises(ConfigError, match=r"inputs of shape \(1, 24, 24\), but multidigits has"):
        ood.batches("multidigits(canvas=24)", data, None, 8, 0)
    flat = Split(torch.rand(4, 5), {"left": torch.zeros(4).long()})
    vectors = Data("vectors", data.tasks[:1], flat, flat, flat, (5,), "")
    with pytest.raises(ConfigError, match="shuffled is for images"):
        ood.batches("shuffled", vectors, None, 8, 0)


# ---------------------------------------------------------------------- the command


def test_the_command_measures_and_writes(equipoise: Any, run: Path) -> None:
    status, out, err = equipoise("diagnose", run, *ARGUMENTS)
    assert status == 0, err
    assert f"{run / 'diagnostics.html'}" in out
    assert err.startswith(f"{run}: conflict, robustness, entropy, calibration, surface, sharpness")
    assert err.count("\n") == 1, "nobody watches: one line for each run"
    assert "<svg" in (run / "diagnostics.html").read_text("utf-8")


def test_a_comparison_stands_for_its_finished_runs(equipoise: Any, run: Path) -> None:
    folder = run.parent / "several"
    for name in ("one", "two", "begun"):
        shutil.copytree(run, folder / "runs" / name)
    (folder / "runs" / "begun" / "result.json").unlink()
    names = [f"runs/{name}" for name in ("one", "two", "begun", "none")]
    write_json(folder / "comparison.json", {"runs": names})
    status, out, err = equipoise("diagnose", folder, "--only", "calibration", "--only",
                                 "conflict", "--jobs", "2", "--device", "cpu")  # fmt: skip
    assert status == 0, err
    assert sorted(line.split(":")[0] for line in err.splitlines()) == [
        str(folder / "runs" / name) for name in ("one", "two")
    ]
    assert f"equipoise report {folder}" in out
    for name in ("one", "two"):
        found = read_json(folder / "runs" / name / "diagnostics.json")
        assert list(found["measures"]) == ["calibration", "conflict"]
    assert not (folder / "runs" / "begun" / "diagnostics.json").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("nowhere", "there is no folder nowhere."),
        (".", "holds no run, and no comparison with one"),
        ("begun", "begun holds a run that is not finished; finish it first."),
        ("bare", "bare has no checkpoint.ckpt; without it there is no network."),
        ("run --only entropies", "no measure 'entropies'; did you mean 'entropy'?"),
        ("run --ood multimist", "--ood: no data set 'multimist'; did you mean 'multimnist'"),
        ("run --ood multimnist", "multimnist needs --data-root"),
        ("run --ood multidigits(canvas=24)", "inputs of shape (1, 24, 24), but multidigits has"),
        ("run --samples -1", "samples is -1; give 1 or more."),
        ("run --draws 0", "draws is 0; give 1 or more."),
        ("run --points 4", "points is 4; give an odd number"),
        ("run --points 1", "points is 1; give 3 or more."),
        ("run --span 0", "span is 0.0; give a finite number above 0."),
        ("run --radii 1,5%", "radii '1,5%' cannot be read"),
        ("run --radii 2,1", "radii '2,1' cannot be read"),
        ("run --radii 0,1", "radii '0,1' cannot be read"),
        ("run --radii many", "radii 'many' cannot be read"),
        ("run --device cuda:99", "device 'cuda:99' is not there"),
        ("run --data-root nowhere", "there is no folder nowhere"),
        ("run --jobs 0", "--jobs"),
        ("damaged", "damaged/diagnostics.json cannot be read"),
    ],
)
def test_wrong_use_ends_with_2_and_one_sentence(
    equipoise: Any, run: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, sentence: str
) -> None:
    monkeypatch.chdir(run.parent)
    for name in ("begun", "bare", "damaged"):
        shutil.copytree(run, name)
    Path("begun/result.json").unlink()
    Path("bare/checkpoint.ckpt").unlink()
    Path("damaged/diagnostics.json").write_text("{")
    monkeypatch.setattr(diagnosing, "diagnose", None)  # nothing may come so far
    before = sorted(Path().rglob("*"))
    status, out, err = equipoise("diagnose", *arguments.split())
    assert (status, out) == (2, "")
    assert err.startswith("equipoise: ") and err.count("\n") == 1, err
    assert sentence in err
    assert sorted(Path().rglob("*")) == before


def test_wrong_use_of_settings_that_are_there(equipoise: Any, run: Path) -> None:
    first = ("diagnose", run, "--only", "sharpness", "--device", "cpu", "--samples")
    assert equipoise(*first, "20")[0] == 0
    status, _, err = equipoise(*first, "30")
    assert status == 2 and "holds sharpness with samples 20, not 30" in err
    assert equipoise(*first, "30", "--again")[0] == 0


def test_a_run_that_cannot_be_measured_ends_with_1(equipoise: Any, run: Path) -> None:
    bad = Path(shutil.copytree(run, run.parent / "bad"))
    (bad / "checkpoint.ckpt").write_bytes(b"?")
    status, _, err = equipoise("diagnose", bad, run, "--only", "calibration", "--device", "cpu")
    assert status == 1
    assert f"{bad}: failed: {bad / 'checkpoint.ckpt'} cannot be read" in err
    assert f"{run}: calibration measured" in err, "the others are measured all the same"
    assert "1 of 2 runs could not be measured." in err


def test_an_interrupted_command_says_how_to_go_on(
    equipoise: Any, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(diagnosing, "diagnose", interrupted)
    status, _, err = equipoise("diagnose", run, "--device", "cpu")
    assert status == 130
    assert err == (
        "equipoise: interrupted; the same command goes on with the measures that are missing.\n"
    )


# ---------------------------------------------------------------------- the pages


def labels(page: str) -> list[str]:
    return re.findall(r'role="img" aria-label="([^"]*)"', page)


def test_the_page_of_a_run(trained: Any, measured: Any) -> None:
    page = (trained["flat"] / "diagnostics.html").read_text("utf-8")
    assert labels(page) == [
        "Percent of conflicting pairs of tasks over the epochs",
        "accuracy (%) against |noise| / |θ| (%)",
        "accuracy (%) against |noise|, in units of θ",
        "Density of the entropy of task left",
        "Density of the entropy of task right",
        "Contours of the loss of task left around the network",
        "Contours of the loss of task right around the network",
        "Rise of the losses by radius",
    ]
    for words in ("f-mean, seed 0: lenet on multidigits", "the same 40 samples", "flat parts",
                  "Out of it: inverted", "AUROC", "ECE", "Brier", "half radius"):  # fmt: skip
        assert words in page, words
    value = measured["flat"]["measures"]["calibration"]["tasks"]["left"]["ece"]
    assert f"<td>{100 * value:.2f}</td>" in page
    assert "mathdefault" not in page and "#010203" not in page
    assert not re.search(r"<script|<link|https?://(?!www\.w3\.org)", page)
    assert "prefers-color-scheme: dark" in page


def test_the_page_names_what_is_left_out(trained: Any, measured: Any) -> None:
    page = (trained["mixed"] / "diagnostics.html").read_text("utf-8")
    assert "Without entropy: slant (regression gives no probabilities)." in page
    assert "loss against |noise| / |θ| (%)" in labels(page)
    single = (trained["stl"] / "diagnostics.html").read_text("utf-8")
    assert "Without conflict: left, right (its network is its own)." in single
    assert "a network of its own, which is moved by itself" in single
    assert "Conflicting gradients" not in single


def test_the_report_puts_them_together(trained: Any, measured: Any) -> None:
    page = report.page([report.read(trained[name]) for name in ("plain", "flat", "stl")])
    found = labels(page)
    for label in (
        "Percent of conflicting pairs of tasks over the epochs",
        "Percent of conflicting pairs in the steps over the epochs",
        "Percent of conflicting flat parts over the epochs",
        "accuracy (%) under noise: mean over tasks", "accuracy (%) under noise: left",
        "accuracy (%) under noise by absolute length",
        "Density of the entropy of left, in the domain",
        "Density of the entropy of left, out of the domain",
        "Rise of the loss of right by radius",
    ):  # fmt: skip
        assert label in found, label
    assert "f-mean – mean" in page and "(one seed)" in page
    calibration = measured["plain"]["measures"]["calibration"]["tasks"]
    mean = sum(task["ece"] for task in calibration.values()) / 2
    assert f"<td>{100 * mean:.2f}</td>" in page


def test_the_report_without_any_diagnostics_has_no_word_of_them(run: Path) -> None:
    page = report.page([report.read(run)])
    assert "Robustness" not in page and "Calibration" not in page


def test_what_was_measured_otherwise_is_named(run: Path, trained: Any, measured: Any) -> None:
    write_json(run / "config.json", {**read_json(run / "config.json"), "seed": 1})
    write_json(run / "result.json", {**read_json(run / "result.json"), "seed": 1})
    diagnose(run, Settings(("sharpness",), samples=20), device="cpu")
    runs = [report.read(folder) for folder in (trained["flat"], trained["plain"], run)]
    page = report.page(runs)
    assert "Measured with other settings, and not shown: f-mean, seed 1." in page


@pytest.mark.parametrize("content", ["{", "{}", '{"run": {}}', "[]", "3"])
def test_damaged_diagnostics_are_named(run: Path, content: str) -> None:
    (run / "diagnostics.json").write_text(content)
    with pytest.raises(EquipoiseError, match=r"diagnostics.json (is damaged|cannot be read)"):
        diagnosis.read(run, read_json(run / "result.json"))


def test_damage_inside_is_named(run: Path) -> None:
    diagnose(run, QUICK, device="cpu")
    found = read_json(run / "diagnostics.json")
    del found["measures"]["robustness"]["tasks"]["left"]["radii"]
    write_json(run / "diagnostics.json", found)
    with pytest.raises(EquipoiseError, match="is damaged: it has no 'radii'"):
        diagnosis.read(run, read_json(run / "result.json"))


def test_json_is_strict(measured: Any, trained: Any) -> None:
    for folder in trained.values():
        text = (folder / "diagnostics.json").read_text("utf-8")
        json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert diagnosing_one.plain({"a": torch.tensor([1.0, math.nan]), 2: (math.inf, True)}) == {
        "a": [1.0, None], "2": [None, True],
    }  # fmt: skip


def test_an_unknown_set_is_wrong_wherever_it_is_asked() -> None:
    assert ood.canonical(" None ") is None and ood.canonical("Inverted") == "inverted"
    assert ood.canonical("MultiDigits(canvas=20)") == "multidigits"
    with pytest.raises(DataError, match="or give one of inverted, shuffled, none"):
        ood.canonical("noise")


def test_the_interval_is_students() -> None:
    """By hand: differences 1, 2, 3 have mean 2, deviation 1, and t(0.975, 2) = 4.303."""
    from equipoise.lab.paired import Difference

    found = Difference("f-mean", "mean", (0, 1, 2), (1.0, 2.0, 3.0))
    assert found.mean == 2
    assert found.margin == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    low, high = stats.ttest_1samp(found.values, 0).confidence_interval(0.95)
    assert (high - low) / 2 == pytest.approx(found.margin)
    assert Difference("f-mean", "mean", (0,), (1.0,)).margin is None
