"""Files are whole at any moment."""

from __future__ import annotations

import csv
import math
import stat

import pytest

from equipoise.lab.files import read_json, replacing, write_json, write_rows, write_text


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "table.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError, match="half way"), replacing(path) as file:
        file.write(b"ne")
        raise RuntimeError("half way")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_until_it_is_complete_the_old_file_is_there(tmp_path):
    path = tmp_path / "table.txt"
    write_text(path, "old")
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_the_callers_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "no" / "table.txt", "new")


def test_permissions_are_those_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    write_text(tmp_path / "ours", "x")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "ours")}
    assert len(modes) == 1


def test_numbers_come_back_with_all_their_digits(tmp_path):
    value = {"third": 1 / 3, "tiny": 5e-324, "name": "Größe", "none": None}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value

    write_rows(tmp_path / "x.csv", [value, {**value, "third": math.pi}])
    with (tmp_path / "x.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["third"]) for row in rows] == [1 / 3, math.pi]
    assert float(rows[0]["tiny"]) == 5e-324
    assert rows[0]["none"] == ""


def test_what_is_no_json_is_named(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match=r"x\.json cannot be read"):
        read_json(tmp_path / "x.json")
