"""The command as a user meets it: what it prints, what it writes, how it ends."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from equipoise import __version__
from equipoise.errors import TaskError
from equipoise.lab import runs
from equipoise.lab.cli import main, parse_seeds
from equipoise.lab.config import ConfigError
from equipoise.lab.data import DATASETS
from equipoise.lab.data.digits import multidigits
from equipoise.lab.files import read_json

QUICK = ("--data", "tiny", "--epochs", "1", "--batch-size", "32", "--device", "cpu")


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    """A small data set, and an empty folder to work in."""
    monkeypatch.setitem(
        DATASETS, "tiny", lambda root, seed: multidigits(seed=seed, sizes=(64, 64, 64))
    )
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def equipoise(monkeypatch, capsys):
    """Calls the command: (exit status, standard output, standard error)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["equipoise", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return call


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("compare ew cagard", "cagrad"),
        ("compare ew --data multidigit", "multidigits"),
        ("compare ew --model lenett", "lenet"),
        ("compare ew --data tiny(size=3)", "data set tiny: there is no option 'size'; it takes: "),
        ("compare ew --data multidigits(canvas=x)", "canvas is x; it takes int."),
        ("compare ew --data multidigits(canvas=12)", "does not fit on a canvas of 12 x 12"),
        ("compare ew --data multidigits(canvas=12", "cannot read 'multidigits(canvas=12'"),
        ("train ew --data multimnist", "multimnist needs --data-root"),
        ("train ew --data multifashion --data-root .", "has no FashionMNIST/raw"),
        ("train ew --data cifar10", "cifar10 needs --data-root, a folder that holds cifar-10-ba"),
        ("train ew --data cifar100 --data-root .", "has no cifar-100-python; get the python ver"),
        ("train ew --data cifar10(tasks=g3)", "tasks is g3; it takes g1 or g2."),
        ("train ew --data cityscapes --data-root .", ". is not a folder that holds train/ and "),
        ("train ew --data cityscapes-release --data-root .", "a folder that holds leftImg8bit/"),
        ("train ew --model cnn(dropout=1)", "dropout is 1.0; give a share in [0, 1)."),
        ("train ew --model resnet50-pspnet", "task 'left': PSPNet gives an answer for every pix"),
        ("train ew --model resnet18(stem=big)", "stem is big; it takes standard or small."),
        ("train ew --model resnet18(width=0)", "width is 0; give 1 or more."),
        ("compare ew ew", "ew, seed 0 is given twice"),
        ("compare ew --seeds 0,1,0", "seed 0 is given twice"),
        ("compare ew --seeds 0-2,1", "seed 1 is given twice"),
        ("compare ew --seeds 0 --seeds 1", "--seeds is given 2 times; write --seeds 0,1"),
        ("compare ew --seeds 3-1", "'3-1' cannot be read"),
        ("compare ew --seeds one", "'one' cannot be read"),
        ("compare ew --epochs 0", "epochs is 0"),
        ("compare ew --lr 0", "lr is 0.0"),
        ("compare ew --batch-size 0", "batch_size is 0"),
        ("train ew --data-root nowhere", "there is no folder nowhere; give another --data-root."),
        ("compare ew --jobs 0", "--jobs"),
        ("compare ew --device cuda:99", "device 'cuda:99' is not there"),
        ("compare ew --precision 8", "precision is '8'"),
        ("compare ew --sign up", "--sign"),
        ("compare ew --colour red", "--colour"),
        ("compare ew si+rlw", "si"),
        ("compare cagrad(c=-1)", "c"),
        ("compare", "RECIPE"),
        ("compare ew --out file", "cannot write to file (File exists); choose another --out."),
        ("compare ew --out file/below", "cannot write to file/below (Not a directory)"),
        ("train ew --out file", "cannot write to file"),
        ("train cagard", "cagrad"),
        ("train ew --seed -1", "seed is -1"),
        ("report nowhere", "there is no folder nowhere."),
        ("report .", "holds no run, and no comparison with one"),
        ("trian ew", "trian"),
    ],
)
def test_wrong_use_ends_with_2_and_one_sentence(
    equipoise, tmp_path, monkeypatch, command, sentence
):
    monkeypatch.setattr(runs, "train", None)  # nothing may come so far
    (tmp_path / "file").write_text("in the way")
    status, out, err = equipoise(*command.split())
    assert status == 2
    assert out == ""
    assert err.startswith("equipoise: ")
    assert err.count("\n") == 1, err
    assert sentence in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_compare_prints_and_writes_one_table(equipoise, tmp_path):
    status, out, err = equipoise("compare", "ew", "MGDA", "stl", *QUICK, "--seeds", "0,1")
    assert status == 0
    folder = tmp_path / "runs" / "compare-tiny"
    table = (folder / "table.txt").read_text()
    assert table.strip() in out
    assert all(word in table for word in ("ew", "mgda", "stl", "left", "right"))
    assert "runs/compare-tiny/report.html" in out
    assert (folder / "report.html").exists()
    # Nobody watches: one line for each run, and nothing else.
    lines = err.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        f"{recipe}, seed {seed}" for recipe in ("ew", "mgda", "stl") for seed in (0, 1)
    ]

    again = equipoise("compare", "ew", "MGDA", "stl", *QUICK, "--seeds", "0-1")
    assert again == (0, out, "")

    status, out, _ = equipoise("report", folder, "--sign", "drop", "--out", "page")
    assert status == 0
    assert "page/report.html" in out
    assert (tmp_path / "page" / "report.html").exists()


def test_compare_without_a_baseline_still_gives_a_table(equipoise):
    status, out, _ = equipoise("compare", "si", *QUICK)
    assert status == 0
    assert "si" in out
    assert "stl" in out, "it says why there is no Delta_m"


def test_a_failed_run_ends_with_1_and_the_table_of_the_others(equipoise, monkeypatch):
    train = runs.train

    def failing(config, *rest):
        if config.recipe == "si":
            raise TaskError("left", "loss is -1.")
        return train(config, *rest)

    monkeypatch.setattr(runs, "train", failing)
    status, out, err = equipoise("compare", "si", "ew", *QUICK)
    assert status == 1
    assert "si, seed 0: failed: task 'left': loss is -1." in err
    assert "1 of 2 runs failed" in err
    assert "ew" in out

    status, out, err = equipoise("train", "si", *QUICK)
    assert status == 1
    assert "si, seed 0 failed: task 'left': loss is -1." in err


@pytest.mark.parametrize("command", ["train", "compare"])
def test_an_interrupted_command_says_how_to_go_on(equipoise, monkeypatch, command):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "train", interrupted)
    status, _, err = equipoise(command, "ew", *QUICK)
    assert status == 130
    assert err.strip().splitlines()[-1] == (
        "equipoise: interrupted; the same command goes on after the last finished epoch."
    )


def test_train_writes_a_run_that_report_reads(equipoise, tmp_path):
    status, out, err = equipoise("train", "igbv1+cagrad", *QUICK, "--seed", "3")
    assert status == 0
    folder = Path("runs", "tiny-igbv1_cagrad-seed3")
    assert (folder / "result.json").exists()
    assert out.splitlines()[0].startswith("igbv1+cagrad, seed 3: left accuracy")
    assert str(folder) in out
    status, _, err = equipoise("train", "igbv1+cagrad", *QUICK, "--seed", "3", "--lr", "0.1")
    assert status == 2
    assert f"{folder} was begun with" not in err or "lr 0.003, not 0.1" in err

    equipoise("train", "ew", *QUICK)
    status, out, _ = equipoise("report", folder, "runs/tiny-ew-seed0")
    assert status == 0
    assert (tmp_path / "runs" / "report.html").exists()


def test_list_shows_what_there_is(equipoise):
    status, out, _ = equipoise("list")
    assert status == 0
    for word in ("weighting", "aggregation", "baseline", "igbv1", "cagrad", "stl",
                 "multidigits", "digits-attributes", "lenet"):  # fmt: skip
        assert word in out
    out = " ".join(out.split())  # as wide as the terminal
    assert "(width=64, stem=standard, features=100, head_bias=true)" in out
    assert "canvas=20" in out and "missing=0.0" in out


def test_options_reach_the_run_and_are_written_down(equipoise, tmp_path):
    options = ("--data", "MultiDigits(sizes=(64, 32, 48), scale=2)", "--epochs", "1",
               "--model", "ResNet18( width=1, features=6)", "--device", "cpu")  # fmt: skip
    status, out, err = equipoise("compare", "ew", *options)
    assert status == 0, err
    folder = tmp_path / "runs" / "compare-multidigits_sizes__64__32__48__"
    result = read_json(folder / "runs" / "ew-seed0" / "result.json")
    assert result["data"] == "multidigits(sizes=(64, 32, 48))"
    assert result["model"] == "resnet18(features=6, width=1)"
    assert result["sizes"] == {"train": 64, "val": 32, "test": 48}
    assert result["parameters"] < 10_000
    assert "resnet18(features=6, width=1) on multidigits(sizes=(64, 32, 48))" in out
    page = (folder / "report.html").read_text()
    assert "64 training, 32 validation and 48 test samples" in page

    assert equipoise("compare", "ew", *options)[:2] == (0, out)
    assert equipoise("train", "ew", *options)[0] == 0
    assert (tmp_path / "runs" / "multidigits_sizes__64__32__48__-ew-seed0").is_dir()


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_without_a_command_the_help_is_shown(equipoise, arguments):
    status, out, err = equipoise(*arguments)
    assert status == 0
    assert all(command in out for command in ("train", "compare", "report", "list"))
    assert err == ""


def test_version(equipoise):
    status, out, err = equipoise("--version")
    assert (status, out, err) == (0, f"equipoise {__version__}\n", "")


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("0", [0]), ("2,0", [2, 0]), ("0-4", [0, 1, 2, 3, 4]), ("5, 1-2", [5, 1, 2])],
)
def test_seeds(text, seeds):
    assert parse_seeds([text]) == seeds


@pytest.mark.parametrize("text", ["", "1,", "-1", "1.5", "2-1", "0,0"])
def test_seeds_that_cannot_be(text):
    with pytest.raises(ConfigError):
        parse_seeds([text])
