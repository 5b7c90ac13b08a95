"""MultiMNIST and its sisters, composed from idx files of the published format."""

import gzip
import logging
import shutil
import struct

import numpy as np
import pytest
import torch

from equipoise.lab.data import DataError, cache, load, multimnist

SIDE, CLASSES = 4, 10
COUNTS = {"train": 60, "t10k": 20}
SIZES = {"train": 300, "val": 80, "test": 100}
SMALL = {**SIZES, "canvas": 10, "left": (0, 0), "right": (5, 5)}
SMALLEST = {**SMALL, "train": 5, "val": 5, "test": 5}


def picture(source, part, index):
    """An image that says which one it is: no two are the same, no pixel is 0."""
    image = np.full((SIDE, SIDE), 7, np.uint8)
    image[0] = ("MNIST", "FashionMNIST").index(source) + 1, ("train", "t10k").index(part) + 1, 9, 9
    image[1:3, 1:3] = index + 1
    return image


def idx(array):
    """The published format."""
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.tobytes()


def write(folder, source, packed=True, dotted=False):
    """The four files of a set in `folder`."""
    folder.mkdir(parents=True)
    for part, count in COUNTS.items():
        images = np.stack([picture(source, part, i) for i in range(count)])
        labels = (np.arange(count) * 3 % CLASSES).astype(np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            path = folder / f"{part}-{name}-ubyte"
            if dotted:
                path = folder / path.name.replace("-idx", ".idx")
            if packed:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(idx(array)))
            else:
                path.write_bytes(idx(array))


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    """Nothing is kept but below `tmp_path`."""
    monkeypatch.delenv("EQUIPOISE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


@pytest.fixture
def root(tmp_path):
    write(tmp_path / "data" / "MNIST" / "raw", "MNIST", packed=True)
    write(tmp_path / "data" / "FashionMNIST" / "raw", "FashionMNIST", packed=False)
    return tmp_path / "data"


def splits(data):
    return {"train": data.train, "val": data.val, "test": data.test}


def which(images):
    """(source, part, index) of source images (N, 4, 4)."""
    return set(zip(*(images[:, r, c].tolist() for r, c in ((0, 0), (0, 1), (1, 1))), strict=True))


def same(first, second):
    return all(
        torch.equal(a.inputs, b.inputs)
        and all(torch.equal(a.targets[task], b.targets[task]) for task in a.targets)
        for a, b in zip(splits(first).values(), splits(second).values(), strict=True)
    )


@pytest.mark.parametrize(
    ("name", "left", "right"),
    [("multimnist", 1, 1), ("multifashion", 2, 2), ("multifashion-mnist", 2, 1)],
)
def test_every_pair_shows_the_images_that_its_labels_name(root, name, left, right):
    data = load(name, root, **SMALL)
    assert data.name == name
    assert data.input_shape == (1, 10, 10)
    fashion = "T-shirt/top", "Trouser"
    assert [task.classes[:2] == fashion for task in data.tasks] == [left == 2, right == 2]
    assert [(task.name, task.outputs) for task in data.tasks] == [("left", 10), ("right", 10)]
    used = {}
    for part, split in splits(data).items():
        assert split.inputs.shape == (SIZES[part], 1, 10, 10)
        assert split.inputs.dtype == torch.uint8
        images = split.inputs[:, 0]
        corners = {"left": images[:, :4, :4], "right": images[:, 5:9, 5:9]}
        rest = images.clone()
        rest[:, :4, :4] = rest[:, 5:9, 5:9] = 0
        assert not rest.any()
        for (task, found), source in zip(corners.items(), (left, right), strict=True):
            number = found[:, 1, 1].long() - 1
            assert split.targets[task].dtype == torch.long
            assert torch.equal(split.targets[task], number * 3 % CLASSES)
            assert {key[0] for key in which(found)} == {source}
            used.setdefault((part, source), set()).update(which(found))
    for source in {left, right}:
        train, val, test = (used[part, source] for part in SIZES)
        assert not train & val, "training and validation share an image"
        assert 50 <= len(train) <= 55 and len(val) == 5 and len(test) == 20
        assert {key[1] for key in train | val} == {1} and {key[1] for key in test} == {2}


def test_the_geometry_of_the_line_search_thesis_moves_images_four_pixels_sideways():
    """SPECS D.7: 28 x 28 images on a canvas of 28 x 36, the middle of which is column 18."""
    geometry = multimnist.Geometry((28, 36), (0, 0), (0, 8), "max", None)
    dots = np.zeros((2, 28, 28), np.uint8)
    dots[:, 3, 14] = 100, 200  # a point on the middle line, beside nothing
    dots[1, :, 0], dots[0, :, 27] = 50, 60
    picture = multimnist.compose(dots[:1], dots[1:], geometry)[0]
    assert picture.shape == (28, 36)
    assert picture[3, 18 - 4] == 100 and picture[3, 18 + 4] == 200
    assert (picture[4:, [8, 27]] == [50, 60]).all(), "superposed: the larger of the two"
    assert picture.astype(int).sum() == 100 + 200 + 28 * (50 + 60)


def test_pairs_are_drawn_uniformly_and_independently(root, monkeypatch):
    drawn = multimnist.draw([5, 3], 30_000, [0, 0])
    table = np.histogram2d(*drawn.T, bins=(5, 3))[0]
    assert table == pytest.approx(np.full((5, 3), 2000), abs=200)
    draw, seeds = multimnist.draw, []
    monkeypatch.setattr(
        multimnist, "draw", lambda *given: seeds.append(tuple(given[2])) or draw(*given)
    )
    for seed in (0, 1):
        load("multimnist(cache=off)", root, seed=seed, **SMALLEST)
    assert len(set(seeds)) == 6, "splits are drawn from generators of their own"


def test_validation_images_are_of_all_classes():
    labels = np.repeat(np.arange(10), 24)
    images = labels[:, None, None].astype(np.uint8)
    source = multimnist.idx.MNIST
    files = {"train": (images, labels), "test": (images, labels)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multimnist.idx, "labelled", lambda s, f: multimnist.idx.Images(*f))
        _, val, _ = multimnist.split(source, files, 0, "x")
        _, other, _ = multimnist.split(source, files, 1, "x")
    assert np.bincount(val.labels).tolist() == [2] * 10
    assert (val.images[:, 0, 0] == val.labels).all()
    assert len(other.labels) == 20


def test_another_seed_gives_other_pairs_and_other_held_out_images(root):
    zero, again, one = (load("multimnist", root, seed=seed, **SMALL) for seed in (0, 0, 1))
    assert same(zero, again)
    for a, b in zip(splits(zero).values(), splits(one).values(), strict=True):
        assert not torch.equal(a.inputs, b.inputs)
    held_out = [which(data.val.inputs[:, 0, :4, :4]) for data in (zero, one)]
    assert held_out[0] != held_out[1]


def test_a_smaller_split_is_the_beginning_of_a_larger_and_changes_no_other(root):
    small = load("multimnist(train=7, val=80, test=3)", root, canvas=10, right=(5, 5))
    large = load("multimnist", root, **SMALL)
    assert torch.equal(small.train.inputs, large.train.inputs[:7])
    assert torch.equal(small.test.inputs, large.test.inputs[:3])
    assert torch.equal(small.val.inputs, large.val.inputs)
    assert torch.equal(small.test.targets["right"], large.test.targets["right"][:3])


def test_the_default_is_the_geometry_of_36_pixels():
    images = np.random.default_rng(0).integers(1, 256, size=(2, 3, 28, 28), dtype=np.uint8)
    defaults = multimnist.multimnist.__kwdefaults__
    assert [defaults[part] for part in SIZES] == [120_000, 12_000, 20_000]
    geometry = multimnist.Geometry(
        *(defaults[key] for key in ("canvas", "left", "right", "overlap", "resize"))
    )
    composed = multimnist.compose(*images, geometry)
    assert composed.shape == (3, 36, 36)
    assert (composed[:, :8, :28] == images[0, :, :8]).all()
    assert (composed[:, 28:, 8:] == images[1, :, 20:]).all()
    both = np.maximum(images[0, :, 8:, 8:], images[1, :, :20, :20])
    assert (composed[:, 8:28, 8:28] == both).all()
    assert not composed[:, :8, 28:].any() and not composed[:, 28:, :8].any()


def test_other_geometries():
    first = np.full((1, 2, 2), 200, np.uint8)
    second = np.full((1, 2, 2), 100, np.uint8)
    # The canvas of Sener & Koltun in small; and one that is wider than it is high.
    make = multimnist.Geometry
    wide = multimnist.compose(first, second, make((2, 3), (0, 0), (0, 1), "sum", None))
    assert wide.tolist() == [[[200, 255, 100]] * 2]
    wide = multimnist.compose(first, second, make((2, 3), (0, 0), (0, 1), "max", None))
    assert wide.tolist() == [[[200, 200, 100]] * 2]
    resized = multimnist.compose(first, second, make(6, (0, 0), (4, 4), "max", (3, 2)))
    assert resized.tolist() == [[[200, 0], [0, 0], [0, 100]]]
    assert multimnist.compose(first, second, make(4, (0, 0), (2, 2), "max", 2)).shape == (1, 2, 2)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"canvas": 8}, r"right is \(5, 5\): an image of 4 x 4 .* canvas of 8 x 8; give a larger"),
        ({"canvas": (10, 8)}, r"right is \(5, 5\): .* 10 x 8"),
        ({"left": (-1, 0)}, r"left is \(-1, 0\)"),
        ({"left": (0, 7)}, r"left is \(0, 7\)"),
        ({"resize": 0}, "resize is 0; give sides of 1 pixel or more"),
        ({"val": 0}, "multimnist: val is 0; give 1 or more"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_no_file(root, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        load("multimnist", root, **{**SMALL, **options})
    assert not (root / "equipoise-cache").exists()


# --------------------------------------------------------------------------------- where from


def test_packed_and_unpacked_files_are_found_in_every_folder_form(root, tmp_path):
    expected = load("multimnist(cache=off)", root, **SMALLEST)
    write(tmp_path / "a" / "mnist", "MNIST", packed=False)
    write(tmp_path / "b", "MNIST", packed=True, dotted=True)
    for place in (root / "MNIST", root / "MNIST" / "raw", tmp_path / "a", tmp_path / "a" / "mnist",
                  tmp_path / "b", str(tmp_path / "b")):  # fmt: skip
        assert same(load("multimnist(cache=off)", place, **SMALLEST), expected), place


def test_the_files_of_one_set_are_not_taken_for_another(root):
    for place in ("FashionMNIST", "FashionMNIST/raw"):
        with pytest.raises(DataError, match="has no MNIST/raw"):
            load("multimnist", root / place)
    with pytest.raises(DataError, match="has no FashionMNIST/raw"):
        load("multifashion-mnist", root / "MNIST")
    assert load("multifashion(cache=off)", root / "FashionMNIST", **SMALLEST).name == "multifashion"


def damaged(change):
    """A change of one file, given its unpacked content."""

    def apply(path):
        if path.suffix == ".gz":
            path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()))))
        else:
            path.write_bytes(change(path.read_bytes()))

    return apply


IMAGES, LABELS = "train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"
FAULTS = {
    "three missing": (IMAGES, lambda p: leave(p.parent, LABELS),
                      "MNIST/raw has no train-images-idx3-ubyte; MNIST's"),
    "missing": (IMAGES, lambda p: p.unlink(), "MNIST/raw has no train-images-idx3-ubyte; MNIST's"),
    "empty": (IMAGES, lambda p: p.write_bytes(b""), "begins with nothing instead of 00000803"),
    "page": (IMAGES, lambda p: p.write_bytes(b"<html>"), "begins with 3c68746d instead of"),
    "gzip cut": (IMAGES, lambda p: p.write_bytes(p.read_bytes()[:-20]), "cannot be read"),
    "gzip broken": (IMAGES, lambda p: p.write_bytes(p.read_bytes()[:9] + b"x" * 90), "cannot be"),
    "short": (IMAGES, damaged(lambda c: c[:-1]), "has 975 bytes instead of 976"),
    "long": (LABELS, damaged(lambda c: c + b"\0"), "has 29 bytes instead of 28"),
    "header": (LABELS, damaged(lambda c: c[:6]), "ends within its header"),
    "huge": (LABELS, damaged(lambda c: c[:4] + b"\xff" * 4 + c[8:]), "instead of 4294967303"),
    "float": (IMAGES, damaged(lambda c: b"\0\0\x0d" + c[3:]), "begins with 00000d03 instead of"),
    "labels": (LABELS, damaged(lambda c: idx(np.zeros(19, np.uint8))), "20 images, but .* 19 lab"),
    "class": (LABELS, damaged(lambda c: c[:-1] + b"\x0a"), "label 10, but MNIST has .* 0 to 9"),
    "few": (IMAGES, lambda p: [write_few(p.parent)], "leave none for the val split"),
}  # fmt: skip


def leave(folder, name):
    for path in folder.iterdir():
        if path.name != name:
            path.unlink()


def write_few(folder):
    shutil.rmtree(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(COUNTS, "train", 11)
        write(folder, "MNIST")


@pytest.mark.parametrize("fault", FAULTS)
def test_files_that_cannot_be_used_are_named_in_one_sentence(root, fault):
    name, break_it, sentence = FAULTS[fault]
    break_it(root / "MNIST" / "raw" / name)
    with pytest.raises(DataError, match=sentence) as caught:
        load("multimnist", root, **SMALLEST)
    text = str(caught.value)
    assert "MNIST" in text and "https://" in text and "\n" not in text and text.endswith(".")
    assert not (root / "equipoise-cache").exists()


def test_without_a_folder_it_is_said_what_is_needed():
    with pytest.raises(DataError, match=r"needs --data-root.* MNIST/raw.*\.gz.*https://"):
        load("multimnist")
    with pytest.raises(DataError, match="Fashion-MNIST's four files"):
        load("multifashion-mnist")


# -------------------------------------------------------------------------------- what is kept


def overwrite(path, content):
    """Another file of that name; the old one may still be mapped."""
    path.unlink()
    path.write_bytes(content)


def files(folder):
    return sorted(folder.iterdir()) if folder.exists() else []


def test_the_second_time_nothing_is_composed(root, monkeypatch, caplog):
    first = load("multimnist", root, **SMALL)
    assert "Composing multimnist" in caplog.text
    (kept,) = files(root / "equipoise-cache")
    assert kept.stat().st_size < 480 * 102 + 1000
    monkeypatch.setattr(multimnist, "compose", None)
    monkeypatch.setattr(multimnist.idx, "labelled", None)
    caplog.clear()
    assert same(load("multimnist", root, **SMALL), first)
    assert caplog.text == ""


@pytest.mark.parametrize("change", [
    {"seed": 1}, {"train": 301}, {"val": 81}, {"canvas": 11}, {"left": (0, 1)}, {"right": (5, 6)},
    {"overlap": "sum"}, {"resize": 10},
], ids=str)  # fmt: skip
def test_every_option_that_changes_the_pictures_has_a_file_of_its_own(root, change):
    load("multimnist", root, **SMALL)
    changed = load("multimnist", root, **{**SMALL, **change})
    assert len(files(root / "equipoise-cache")) == 2
    assert same(changed, load("multimnist", root, cache="off", **{**SMALL, **change}))


def test_other_source_files_have_a_file_of_their_own(root):
    before = load("multimnist", root, **SMALL)
    path = root / "MNIST" / "raw" / "t10k-images-idx3-ubyte.gz"
    damaged(lambda c: c[:16] + bytes(reversed(c[16:])))(path)
    assert not same(load("multimnist", root, **SMALL), before)
    load("multifashion", root, **SMALL)
    assert len(files(root / "equipoise-cache")) == 3


@pytest.mark.parametrize("place", [0, 50, 3000, -40, -1])
def test_a_damaged_file_is_made_again_and_that_is_said(root, caplog, place):
    first = load("multimnist", root, **SMALL)
    (kept,) = files(root / "equipoise-cache")
    whole = kept.read_bytes()
    broken = bytearray(whole)
    broken[place] ^= 1
    overwrite(kept, broken)
    caplog.clear()
    assert same(load("multimnist", root, **SMALL), first)
    assert f"{kept} is made again: it" in caplog.text
    assert kept.read_bytes() == whole


@pytest.mark.parametrize("cut", [0, 10, 5000, -1])
def test_a_truncated_file_is_made_again(root, caplog, cut):
    first = load("multimnist", root, **SMALL)
    (kept,) = files(root / "equipoise-cache")
    whole = kept.read_bytes()
    overwrite(kept, whole[:cut])
    assert same(load("multimnist", root, **SMALL), first)
    assert "is made again" in caplog.text
    overwrite(kept, whole + b"more")
    assert same(load("multimnist", root, **SMALL), first)
    assert kept.read_bytes() == whole


def test_where_it_is_kept(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    home, own = tmp_path / "home" / "equipoise", tmp_path / "own" / "deep"
    load("multimnist", root, cache=str(own), **SMALLEST)
    assert len(files(own)) == 1
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "said"))
    load("multimnist", root, **SMALLEST)
    assert len(files(tmp_path / "said")) == 1
    load("multimnist(cache=off)", root, **SMALLEST)
    monkeypatch.setenv("EQUIPOISE_CACHE", "off")
    load("multimnist", root, **SMALLEST)
    assert not (root / "equipoise-cache").exists() and not home.exists()
    assert not (tmp_path / "off").exists()
    monkeypatch.delenv("EQUIPOISE_CACHE")
    root.chmod(0o555)  # for root, too, who could write there all the same
    try:
        load("multimnist", root, **SMALLEST)
    finally:
        root.chmod(0o755)
    assert not (root / "equipoise-cache").exists()
    assert len(files(home)) == 1
    load("multimnist", root, **SMALLEST)
    assert len(files(root / "equipoise-cache")) == 1
    root.chmod(0o555)  # but what was made to be written to is
    try:
        load("multimnist(seed=1)", root, **SMALLEST)
    finally:
        root.chmod(0o755)
    assert len(files(root / "equipoise-cache")) == 2


def test_what_cannot_be_kept_is_made_all_the_same(root, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    data = load("multimnist", root, cache=str(tmp_path / "file"), **SMALL)
    assert same(data, load("multimnist", root, cache="off", **SMALL))
    assert "cannot be kept" in caplog.text
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_full_disk_leaves_no_half_file(root, monkeypatch, caplog):
    expected = load("multimnist", root, cache="off", **SMALL)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("equipoise.files.os.fsync", full)
        assert same(load("multimnist", root, **SMALL), expected)
    assert "No space left" in caplog.text
    assert files(root / "equipoise-cache") == []


def test_writing_to_what_was_mapped_does_not_change_the_file(root, caplog):
    load("multimnist", root, **SMALL)
    data = load("multimnist", root, **SMALL)
    data.train.inputs.fill_(3)
    assert not same(data, load("multimnist", root, **SMALL))
    assert "made again" not in caplog.text


def test_the_file_keeps_several_arrays_and_refuses_other_shapes(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    path = tmp_path / "arrays.bin"
    shapes = {"a": (2, 3), "none": (0, 4), "b": (5,)}
    a, b = np.arange(6, dtype=np.uint8), np.arange(5, dtype=np.uint8)
    cache.write(path, shapes, [a[:2], a[2:].reshape(2, 2), b])
    found = cache.read(path, shapes)
    assert found["a"].tolist() == [[0, 1, 2], [3, 4, 5]] and found["b"].tolist() == b.tolist()
    assert found["none"].shape == (0, 4)
    with pytest.raises(ValueError, match="begins with something else"):
        cache.read(path, {"a": (3, 2), "none": (0, 4), "b": (5,)})
    with pytest.raises(ValueError, match="10 bytes do not fill"):
        cache.write(path, shapes, [a, b[1:]])
    assert cache.read(path, shapes)["a"].tolist() == found["a"].tolist()
    assert [p.name for p in tmp_path.iterdir()] == ["arrays.bin"]
