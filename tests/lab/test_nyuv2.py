"""NYUv2: files of the true format, whole, damaged and missing; augmentation; the split."""

from __future__ import annotations

import csv
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from equipoise.lab.cli import main
from equipoise.lab.config import RunConfig
from equipoise.lab.data import DataError, load, loader, nyuv2
from equipoise.lab.data.pixels import Augmentation, ReadSplit
from equipoise.lab.files import read_json
from equipoise.lab.runs import train

SIZE = (32, 48)
NUMBERS = {"train": 5, "val": 10}


def scene(number: int, size: tuple[int, int] = SIZE) -> dict[str, np.ndarray]:
    """One image and its answers, as the published files have them; a corner is not known."""
    generator = np.random.default_rng(number)
    normal = generator.normal(size=(*size, 3))
    found = {
        "image": generator.random((*size, 3)).astype(np.float32),
        "label": generator.integers(0, 13, size).astype(np.float32),
        "depth": generator.uniform(0.5, 9, (*size, 1)).astype(np.float32),
        "normal": (normal / np.linalg.norm(normal, axis=-1, keepdims=True)).astype(np.float32),
    }
    found["label"][:8, :8], found["depth"][:8, :8], found["normal"][:8, :8] = -1, 0, 0
    return found


def write(root: Path, numbers: dict[str, int] = NUMBERS) -> Path:
    for part, number in numbers.items():
        for i in range(number):
            for kind, array in scene(i + 100 * (part == "val")).items():
                folder = root / part / kind
                folder.mkdir(parents=True, exist_ok=True)
                np.save(folder / f"{i}.npy", array)
    return root


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("nyuv2"))


@pytest.fixture
def root(files: Path, tmp_path: Path) -> Path:
    """A copy, for damaging."""
    return Path(shutil.copytree(files, tmp_path / "copy"))


# ---------------------------------------------------------------------- what is read


def test_images_and_answers_are_those_of_the_files(files: Path) -> None:
    data = load("nyuv2(augment=false)", files)
    assert data.input_shape == (3, *SIZE)
    assert [len(s) for s in (data.train, data.val, data.test)] == [5, 3, 7]  # 197 of 654
    images, answers = data.train[[3, 1]]
    assert images.dtype == torch.float32 and answers["segmentation"].dtype == torch.int64
    for row, number in enumerate((3, 1)):
        expected = scene(number)
        assert np.array_equal(images[row].movedim(0, -1), expected["image"])
        assert np.array_equal(answers["segmentation"][row], expected["label"])
        assert np.array_equal(answers["depth"][row].movedim(0, -1), expected["depth"])
        assert np.array_equal(answers["normals"][row].movedim(0, -1), expected["normal"])
    assert (answers["segmentation"][:, :8, :8] == -1).all()
    one, single = data.train[3]
    assert torch.equal(one, images[0]) and torch.equal(single["depth"], answers["depth"][0])
    outputs = {task.name: task.outputs for task in data.tasks}
    assert outputs == {"segmentation": 13, "depth": 1, "normals": 3}
    assert sum(len(task.measures) for task in data.tasks) == 9


def test_bytes_and_other_types_of_numbers_are_read(root: Path) -> None:
    for kind, dtype in (("image", np.uint8), ("label", np.int8), ("depth", np.float64)):
        path = root / "train" / kind / "0.npy"
        array = np.load(path)
        np.save(path, (255 * array if kind == "image" else array).astype(dtype))
    image, answers = load("nyuv2(augment=false)", root).train[0]
    assert image.dtype == torch.float32 and image.max() <= 1
    assert torch.equal(answers["segmentation"], torch.tensor(scene(0)["label"]).long())


def test_a_folder_above_will_do(root: Path, tmp_path: Path) -> None:
    root.rename(tmp_path / "nyuv2")
    assert len(load("nyuv2", tmp_path).train) == 5


# ---------------------------------------------------------------------- the split


def test_validation_and_test_share_the_other_images(files: Path) -> None:
    data = load("nyuv2", files)
    assert sorted([*data.val.places, *data.test.places]) == list(range(10))
    assert load("nyuv2", files).val.places == data.val.places
    assert load("nyuv2(seed=1)", files).val.places != data.val.places


def test_everyone_has_the_published_sizes_and_the_same_images() -> None:
    chosen = nyuv2.held_out(654, 0)
    assert len(chosen) == 197 and len(set(chosen)) == 197
    assert chosen[:5] == EXPECTED and chosen == sorted(chosen)


EXPECTED: list[int] = [3, 7, 8, 13, 17]


def test_the_split_is_written_down(root: Path, tmp_path: Path) -> None:
    data = load("nyuv2(seed=3)", root)
    path = root / "equipoise-cache" / "nyuv2-split-10-seed3.json"
    lists = {"val": list(data.val.places), "test": list(data.test.places)}
    assert read_json(path) == lists
    path.write_text("{")
    load("nyuv2(seed=3)", root)
    assert read_json(path) == lists, "a damaged list is written again"
    load("nyuv2", root, cache=str(tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere" / "nyuv2-split-10-seed0.json").exists()
    shutil.rmtree(root / "equipoise-cache")
    load("nyuv2(cache=off)", root)
    assert not (root / "equipoise-cache").exists()


def test_too_few_images_to_split(root: Path) -> None:
    for kind in nyuv2.KINDS:
        for i in range(1, 10):
            (root / "val" / kind / f"{i}.npy").unlink()
    with pytest.raises(DataError, match="val/ has 1 image; 2 or more are needed"):
        load("nyuv2", root)


# ---------------------------------------------------------------------- augmentation


class Drawn:
    """Gives planned random numbers: scale, top, left, mirrored."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = list(numbers)

    def integers(self, end: int) -> int:
        assert 0 <= self.numbers[0] < end
        return self.numbers.pop(0)


def ramp() -> Any:
    """Each pixel knows its row and column."""
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(12.0), indexing="ij")
    image = torch.stack([rows, columns, rows + columns])
    answers = {
        "segmentation": (rows + columns).long(),
        "depth": 1 + (rows * columns)[None],
        "normals": torch.stack([columns, rows, 1 + rows]),
    }
    return image, answers


VARY = Augmentation(depths=("depth",), normals=("normals",))


def test_the_whole_image_as_it_is() -> None:
    given, varied = ramp(), VARY(ramp(), Drawn(0, 0, 0, 0))  # ty: ignore[invalid-argument-type]
    assert torch.equal(given[0], varied[0])
    assert all(torch.equal(given[1][name], varied[1][name]) for name in given[1])


def test_a_mirror_turns_the_horizontal_component_around() -> None:
    image, answers = ramp()
    mirrored, varied = VARY(ramp(), Drawn(0, 0, 0, 1))  # ty: ignore[invalid-argument-type]
    assert torch.equal(mirrored, image.flip(-1))
    for name in ("segmentation", "depth"):
        assert torch.equal(varied[name], answers[name].flip(-1))
    normals = answers["normals"].flip(-1)
    assert torch.equal(varied["normals"], torch.stack([-normals[0], normals[1], normals[2]]))


def test_a_part_is_enlarged_and_its_depth_divided() -> None:
    image, answers = ramp()
    # Scale 1.5: 4 of 6 rows from 2 on, 8 of 12 columns from 3 on.
    larger, varied = VARY(ramp(), Drawn(2, 2, 3, 0))  # ty: ignore[invalid-argument-type]
    rows, columns = 2 + torch.arange(6) * 4 // 6, 3 + torch.arange(12) * 8 // 12
    nearest = (..., rows[:, None], columns)
    assert torch.equal(varied["segmentation"], answers["segmentation"][nearest])
    assert torch.equal(varied["depth"], answers["depth"][nearest] / 1.5)
    assert torch.equal(varied["normals"], answers["normals"][nearest])
    # Bilinear, corners on corners: a ramp stays one.
    assert larger[0, :, 0] == pytest.approx(torch.linspace(2, 5, 6).tolist(), abs=1e-5)
    assert larger[1, 0] == pytest.approx(torch.linspace(3, 10, 12).tolist(), abs=1e-5)
    assert larger.shape == image.shape


def test_what_is_not_known_stays_unknown_and_lengths_stay(files: Path) -> None:
    split = load("nyuv2", files).train.seeded(7)
    _, answers = split[list(range(5))]
    lengths = answers["normals"].norm(dim=1)
    assert ((lengths - 1).abs() < 1e-5).logical_or(lengths == 0).all()
    unknown = answers["segmentation"] == -1
    assert torch.equal(unknown, answers["depth"][:, 0] == 0) and torch.equal(unknown, lengths == 0)


def test_all_scales_places_and_both_mirrors_come_up() -> None:
    split = ReadSplit(lambda _: ramp(), range(400), VARY).seeded(0)
    parts, mirrors = set(), 0
    for i in range(400):
        columns, rows, _ = split[i][1]["normals"]
        ends = (rows.min(), rows.max(), columns.abs().min(), columns.abs().max())
        parts.add(tuple(map(int, ends)))
        mirrors += int(columns.sum() < 0)
    # 6 x 12 in 1 place, 5 x 10 in 2 x 3, and 4 x 8 in 3 x 5.
    assert len(parts) == 1 + 6 + 15
    assert 160 < mirrors < 240


def test_random_numbers_depend_on_seed_and_image_alone(files: Path) -> None:
    train = load("nyuv2", files).train
    state = torch.get_rng_state()
    one, other = train.seeded(1), train.seeded(2)
    together, _ = one[[0, 1, 2, 3, 4]]
    assert torch.equal(together[3], one[3][0]) and torch.equal(together[[4, 2]], one[[4, 2]][0])
    assert not torch.equal(together, other[[0, 1, 2, 3, 4]][0])
    assert torch.equal(torch.get_rng_state(), state)


def test_only_shuffled_passes_are_varied(files: Path) -> None:
    data = load("nyuv2", files)
    plain = {i: scene(i)["image"] for i in range(5)}
    (images, _), *_ = loader(data.train, 5, shuffle_seed=None)
    assert all(np.array_equal(images[i].movedim(0, -1), plain[i]) for i in range(5))
    (varied, _), *_ = loader(data.train, 5, shuffle_seed=3)
    (again, _), *_ = loader(data.train, 5, shuffle_seed=3)
    assert torch.equal(varied, again)
    known = [any(np.array_equal(x.movedim(0, -1), y) for y in plain.values()) for x in varied]
    assert sum(known) < 3  # one in six comes out as it was
    for split in (data.val, data.test):
        (one, _), *_ = loader(split, 2, shuffle_seed=3)
        assert any(
            np.array_equal(one[0].movedim(0, -1), scene(100 + place)["image"])
            for place in split.places
        )


# ---------------------------------------------------------------------- what is refused


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def resave(change: Any) -> Any:
    return lambda path: np.save(path, change(np.load(path)))


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("train/depth/2.npy", Path.unlink, "train/depth/2.npy is missing, of 5"),
        ("val/image/9.npy", Path.unlink, "val/image/9.npy is missing, of 10"),
        ("train/image/0.npy", Path.unlink, "train/image/0.npy is missing"),
        ("train/label/1.npy", cut, "train/label/1.npy has .* bytes of data instead of 6144"),
        ("val/normal/3.npy", lambda p: p.write_bytes(b""), "val/normal/3.npy is no .npy file"),
        ("val/normal/3.npy", lambda p: p.write_text("<html>"), "val/normal/3.npy is no .npy file"),
        ("train/image/4.npy", resave(lambda x: x[1:]),
         r"image/4.npy has shape \(31, 48, 3\) instead of \(32, 48, 3\)"),
        ("train/image/0.npy", resave(lambda x: x[0, 0]),
         r"image/0.npy has shape \(3,\) instead of \(H, W, 3\)"),
        ("train/depth/0.npy", resave(lambda x: x[..., 0]),
         r"depth/0.npy has shape \(32, 48\) instead of \(32, 48, 1\)"),
        ("train/label/0.npy", resave(lambda x: x.astype("U1")), "label/0.npy holds <U1, not numb"),
        ("val/label/0.npy", resave(lambda x: np.array([{}])), "label/0.npy holds object, not numb"),
    ],
)  # fmt: skip
def test_damage_is_seen_before_training(root: Path, name: str, damage: Any, words: str) -> None:
    damage(root / name)
    with pytest.raises(DataError, match=words) as error:
        load("nyuv2", root)
    assert "get it again from where https://" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("train/label/0.npy", 13, "label/0.npy holds 13, not -1 to 12"),
        ("train/label/0.npy", -2, "label/0.npy holds -2, not -1 to 12"),
        ("train/depth/0.npy", np.nan, "depth/0.npy holds numbers that are not finite"),
        ("train/depth/0.npy", -1, "depth/0.npy holds -1, a negative depth"),
    ],
)
def test_numbers_that_cannot_be(root: Path, name: str, value: float, words: str) -> None:
    array = np.load(root / name)
    array[20, 20] = value
    np.save(root / name, array)
    with pytest.raises(DataError, match=words):
        load("nyuv2", root).train[0]


def test_a_file_that_vanishes_is_named(root: Path) -> None:
    data = load("nyuv2", root)
    (root / "train/normal/3.npy").unlink()
    with pytest.raises(DataError, match=r"normal/3.npy cannot be read"):
        data.train[3]


def test_where_files_are_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nyuv2 needs --data-root, a folder that holds train/"):
        load("nyuv2")
    with pytest.raises(DataError, match="is not a folder that holds train/ and val/.*https://"):
        load("nyuv2", tmp_path)
    write(tmp_path, {"train": 1})
    with pytest.raises(DataError, match="there is no folder .*val/image; get"):
        load("nyuv2", tmp_path)
    for kind in nyuv2.KINDS:
        (tmp_path / "val" / kind).mkdir(parents=True)
    with pytest.raises(DataError, match=r"val/image has no 0.npy"):
        load("nyuv2", tmp_path)


def test_the_command_says_in_one_sentence_what_is_wrong(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    cut(root / "val/depth/7.npy")
    command = ["train", "ew", "--data", "nyuv2", "--data-root", str(root), "--model", "segnet"]
    monkeypatch.setattr(sys, "argv", ["equipoise", *command])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


# ---------------------------------------------------------------------- the parquet mirror


class Rows(list):
    """What the package `datasets` gives, as far as it is used."""

    column_names = ("image", "segmentation", "depth", "normal")


def mirrored(part: str) -> Rows:
    rows = Rows()
    for i in range(NUMBERS[part]):
        found = scene(i + 100 * (part == "val"))
        rows.append(
            {
                "segmentation": found.pop("label").astype(np.int64),
                **{kind: np.moveaxis(array, -1, 0) for kind, array in found.items()},
            }
        )
    return rows


@pytest.fixture
def parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty files, and a stand-in for the package that would read them."""
    (tmp_path / "data").mkdir()
    for part in NUMBERS:
        (tmp_path / "data" / f"{part}-00000-of-00001.parquet").touch()

    def load_dataset(kind: str, data_files: dict[str, list[str]]) -> Any:
        assert kind == "parquet" and set(data_files) == set(NUMBERS)
        tables = {part: mirrored(part) for part in data_files}
        return SimpleNamespace(with_format=lambda form: {"numpy": tables}[form])

    package = SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", package)
    return tmp_path


def test_the_mirror_is_the_same_set(parquet: Path, files: Path) -> None:
    one, other = load("nyuv2", parquet), load("nyuv2", files)
    assert one.input_shape == other.input_shape
    for mine, its in ((one.train, other.train), (one.val, other.val), (one.test, other.test)):
        (images, answers), (expected, same) = mine.seeded(5)[[0, 1]], its.seeded(5)[[0, 1]]
        assert torch.equal(images, expected)
        assert all(torch.equal(answers[name], same[name]) for name in same)


def test_the_mirror_without_the_package(parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="which the package `datasets` reads; pip install datasets"):
        load("nyuv2", parquet)


def test_a_mirror_that_is_damaged(parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rows, "column_names", ("image", "depth", "normal"))
    with pytest.raises(DataError, match="have no column 'label'"):
        load("nyuv2", parquet)
    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", lambda *a, **k: 1 / 0)
    with pytest.raises(DataError, match="cannot be read .*division by zero"):
        load("nyuv2", parquet)
    (parquet / "data" / "val-00000-of-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"has no val-\*.parquet"):
        load("nyuv2", parquet)


@pytest.mark.filterwarnings("ignore")  # theirs, and of the packages below
def test_the_mirror_through_the_package_itself(
    tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    features = datasets.Features(
        {"image": datasets.Array3D((3, *SIZE), "float32"),
         "segmentation": datasets.Array2D(SIZE, "int64"),
         "depth": datasets.Array3D((1, *SIZE), "float32"),
         "normal": datasets.Array3D((3, *SIZE), "float32")}
    )  # fmt: skip
    parquet = pytest.importorskip("pyarrow.parquet")
    for part in NUMBERS:
        path = tmp_path / "data" / f"{part}-00000-of-00001.parquet"
        arrow = str(tmp_path / f"{part}.arrow")
        writer = datasets.arrow_writer.ArrowWriter(path=arrow, features=features)
        for row in mirrored(part):
            writer.write(features.encode_example(row))
        writer.finalize()
        parquet.write_table(datasets.table.MemoryMappedTable.from_file(arrow).table, path)
    one, other = load("nyuv2", tmp_path), load("nyuv2", files)
    for index in range(5):
        (image, answers), (expected, same) = one.train[index], other.train[index]
        assert torch.equal(image, expected)
        assert all(torch.equal(answers[name], same[name]) for name in same)


# ---------------------------------------------------------------------- a run


class Killed(BaseException):
    """Like KeyboardInterrupt."""


def run(files: Path, recipe: str, folder: Path, **more: Any) -> Any:
    config = RunConfig.of(
        recipe=recipe, data="nyuv2", data_root=str(files), model="segnet(width=1)", epochs=2,
        batch_size=2, device="cpu",
    )  # fmt: skip
    return train(config, folder, **more)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k != "seconds"} for row in found]


def test_a_run_and_a_killed_run_end_with_the_same_nine_numbers(files: Path, tmp_path: Path) -> None:
    result = run(files, "igbv1+cagrad", tmp_path / "whole")
    found = {f"{t} {m}": v for t, values in result["test"].items() for m, v in values.items()}
    assert len(found) == 9 and all(value >= 0 for value in found.values())
    baseline = result["baseline"]
    assert baseline is not None and "nash-mtl" in baseline["source"]
    assert {t: list(v) for t, v in baseline["values"].items()} == {
        t: list(v) for t, v in result["test"].items()
    }

    def kill(done: float, report: Any) -> None:
        if done > 1.5:
            raise Killed

    with pytest.raises(Killed):
        run(files, "igbv1+cagrad", tmp_path / "killed", progress=kill)
    again = run(files, "igbv1+cagrad", tmp_path / "killed")
    assert again["test"] == result["test"]
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    columns = rows(tmp_path / "whole")[0]
    assert {"mIoU/val/segmentation", "within 11.25 deg/val/normals"} <= set(columns)
