"""CelebA, read from small files of the published form."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from equipoise.lab.data import DataError, celeba, load, loader
from equipoise.lab.models import build

NAMES = ["5_o_Clock_Shadow", "Bald", "Male", "Young"]
PARTITION = [0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2]
HEIGHT, WIDTH = 22, 18
QUICK = "celeba(size=8)"


def picture(i):
    """A face that says which one it is by its grey, and where its parts are by its colours."""
    image = np.full((HEIGHT, WIDTH, 3), 20 * i + 20, np.uint8)
    image[: HEIGHT // 2, :, 0] = 255
    image[:, : WIDTH // 2, 1] = 0
    return image


def truth(i):
    return [(i >> k) & 1 for k in range(len(NAMES))]


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.delenv("EQUIPOISE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


@pytest.fixture
def root(tmp_path):
    """The published folder, with eleven photographs."""
    root = tmp_path / "data"
    (root / "img_align_celeba").mkdir(parents=True)
    files = [f"{i + 1:06}.jpg" for i in range(len(PARTITION))]
    for i, name in enumerate(files):
        image = Image.fromarray(picture(i))
        image.save(root / "img_align_celeba" / name, quality=100, subsampling=0)
    rows = (
        f"{name} " + " ".join(f"{1 if t else -1:2}" for t in truth(i))
        for i, name in enumerate(files)
    )
    (root / "list_attr_celeba.txt").write_text(
        "\n".join([str(len(files)), " ".join(NAMES) + " ", *rows]) + "\n"
    )
    (root / "list_eval_partition.txt").write_text(
        "".join(f"{name} {part}\n" for name, part in zip(files, PARTITION, strict=True))
    )
    return root


def splits(data):
    return data.train, data.val, data.test


def everything(split):
    return split[list(range(len(split)))]


def same(first, second):
    for a, b in zip(splits(first), splits(second), strict=True):
        (x, s), (y, t) = everything(a), everything(b)
        if not (torch.equal(x, y) and all(torch.equal(s[task], t[task]) for task in NAMES)):
            return False
    return True


@pytest.mark.parametrize("cache", ["off", None])
def test_images_labels_and_splits_are_the_published_ones(root, cache):
    data = load(f"celeba(size=({HEIGHT}, {WIDTH}))", root, cache=cache)
    assert [task.name for task in data.tasks] == NAMES
    assert {task.kind for task in data.tasks} == {"binary"}
    assert data.input_shape == (3, HEIGHT, WIDTH)
    for part, split in enumerate(splits(data)):
        members = [i for i, p in enumerate(PARTITION) if p == part]
        assert len(split) == len(members)
        inputs, targets = everything(split)
        assert inputs.shape == (len(members), 3, HEIGHT, WIDTH) and inputs.dtype == torch.float32
        for place, i in enumerate(members):
            expected = torch.from_numpy(picture(i)).permute(2, 0, 1) / 255
            # JPEG rounds, most at the edges between colours
            assert (inputs[place] - expected).abs().median() < 0.02
            assert [targets[name][place].item() for name in NAMES] == truth(i)
            one, labels = split[place]
            assert torch.equal(one, inputs[place])
            assert labels["Bald"] == targets["Bald"][place]
        assert all(target.dtype == torch.float32 for target in targets.values())


def test_decoding_on_demand_gives_what_the_file_keeps(root):
    kept, lazy = load(QUICK, root), load(QUICK, root, cache="off")
    assert isinstance(kept.train.inputs, torch.Tensor)
    assert isinstance(lazy.train.inputs, celeba.Photographs)
    assert same(kept, lazy)
    passes = [
        torch.cat([inputs for inputs, _ in loader(data.train, 4, shuffle_seed=3)])
        for data in (kept, lazy)
    ]
    assert torch.equal(*passes)
    assert lazy.train[torch.tensor([1, 0])][0].shape == (2, 3, 8, 8)


def test_resizing_is_over_the_whole_image_or_the_middle(root):
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    image[:, WIDTH // 2 :] = 255
    image[:4] = image[-4:] = 128
    image[:, :2] = image[:, -2:] = 128
    Image.fromarray(image).save(root / "img_align_celeba" / "000001.png")
    folder = root / "img_align_celeba"
    whole = celeba.Photographs(folder, ["000001.png"], (HEIGHT, WIDTH))[0]
    assert torch.equal(whole, torch.from_numpy(image).permute(2, 0, 1))
    middle = celeba.Photographs(folder, ["000001.png"], (7, 7), (14, 14))[0]
    assert middle[:, :, :3].max() == 0 and middle[:, :, 4:].min() == 255
    half = celeba.Photographs(folder, ["000001.png"], (11, 9))[0][0]
    assert half[5, 2:4].max() == 0 and half[5, 5:7].min() == 255
    # Two old pixels in full and one on each side by half: not every second pixel.
    assert half[5, 4] == 128 and half[0, 0] == 128 and 0 < half[5, 1] < 64
    with pytest.raises(ValueError, match=r"crop is 20, but .*22 x 18 pixels; give a smaller crop"):
        load("celeba(crop=20)", root)


def test_grey_images_become_three_channels(root):
    path = root / "img_align_celeba" / "000001.jpg"
    Image.fromarray(picture(0)).convert("L").save(path)
    inputs, _ = load(QUICK, root).train[0]
    assert inputs.shape == (3, 8, 8)
    assert torch.equal(inputs[0], inputs[1])


def test_limits_take_a_part_of_each_split(root):
    whole = load(QUICK, root)
    few = load("celeba(size=8, train=4, val=2, test=1)", root)
    fewer = load("celeba(size=8, train=3, val=2, test=1)", root)
    other = load("celeba(size=8, train=4, val=2, test=1, seed=1)", root)
    assert [len(split) for split in splits(few)] == [4, 2, 1]
    assert [len(split) for split in splits(fewer)] == [3, 2, 1]

    def ids(split):
        inputs, targets = everything(split)
        return {
            (round(float(x[2, 4, 6]), 6), *(int(targets[name][i]) for name in NAMES))
            for i, x in enumerate(inputs)
        }

    assert ids(fewer.train) < ids(few.train) < ids(whole.train)
    assert ids(few.train) != ids(other.train) or ids(few.val) != ids(other.val)
    assert same(load("celeba(size=8, train=99)", root), whole)
    names = load("celeba(train=4, cache=off)", root).train.inputs.names
    assert names == sorted(names) and len(set(names)) == 4


@pytest.mark.parametrize("layout", ["celeba", "CelebA", "published"])
def test_the_files_are_found_where_they_are_published(root, tmp_path, layout):
    expected = load(QUICK, root, cache=str(tmp_path / "kept"))
    if layout == "published":
        for name, folder in celeba.NAMES:
            (root / folder).mkdir()
            (root / name).rename(root / folder / name)
        place = root
    else:
        place = tmp_path / "elsewhere"
        place.mkdir()
        root.rename(place / layout)
    assert same(load(QUICK, place, cache="off"), expected)


def change(name, old, new):
    """A replacement in a list."""

    def apply(root):
        path = root / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return apply


def cut_image(root):
    path = root / "img_align_celeba" / "000007.jpg"
    path.write_bytes(path.read_bytes()[:-200])


def pack(root):
    shutil.make_archive(str(root / "img_align_celeba"), "zip", root / "img_align_celeba")
    shutil.rmtree(root / "img_align_celeba")


ATTR, PART = "list_attr_celeba.txt", "list_eval_partition.txt"
FAULTS = {
    "no list": (lambda r: (r / ATTR).unlink(), "data has no list_attr_celeba.txt; get"),
    "no images": (lambda r: shutil.rmtree(r / "img_align_celeba"), "data has no img_align_celeba"),
    "packed": (pack, r"has no img_align_celeba; unpack .*img_align_celeba\.zip"),
    "nothing": (lambda r: [shutil.rmtree(r), r.mkdir()], "is not a folder that holds img_align"),
    "image gone": (lambda r: (r / "img_align_celeba" / "000003.jpg").unlink(),
                   "img_align_celeba lacks 1 of 11 images, 000003.jpg for one"),
    "image cut": (cut_image, r"000007\.jpg cannot be read"),
    "no image": (lambda r: (r / "img_align_celeba" / "000001.jpg").write_text("page"),
                 r"000001\.jpg cannot be read"),
    "count": (change(ATTR, "11\n", "12\n"), "list_attr_celeba.txt has 11 images instead of 12"),
    "twice": (change(ATTR, "000002.jpg", "000001.jpg"), "has 10 images instead of 11"),
    "no count": (change(ATTR, "11\n", ""), "does not begin with a number and a line of names"),
    "empty": (lambda r: (r / ATTR).write_text(""), "does not begin with a number"),
    "value": (change(ATTR, "000002.jpg  1", "000002.jpg  2"), "line 4 has '2', not -1 or 1"),
    "zero": (change(ATTR, "000001.jpg -1", "000001.jpg 0"), "line 3 has '0', not -1 or 1"),
    "short": (change(ATTR, "000002.jpg  1", "000002.jpg"), "line 4 has 3 values for 4 attrib"),
    "bytes": (lambda r: (r / ATTR).write_bytes(b"\xff\xfe\x00"), "cannot be read"),
    "part": (change(PART, "000004.jpg 0", "000004.jpg 3"), "line 4 is no name with 0, 1 or 2"),
    "part line": (change(PART, "000004.jpg 0", "000004.jpg"), "line 4 is no name with 0, 1 or 2"),
    "part name": (change(PART, "000004.jpg", "x.jpg"), "line 4 names x.jpg, which .* does not"),
    "part few": (change(PART, "000011.jpg 2\n", ""), "has 10 of the 11 images"),
    "part twice": (change(PART, "000011.jpg", "000010.jpg"), "has 10 of the 11 images"),
    "no test": (change(PART, "000010.jpg 2\n000011.jpg 2", "000010.jpg 1\n000011.jpg 1"),
                "has no image for the test split"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_files_that_cannot_be_used_are_named_in_one_sentence(root, fault):
    break_it, sentence = FAULTS[fault]
    break_it(root)
    with pytest.raises(DataError, match=sentence) as caught:
        load(QUICK, root)
    text = str(caught.value)
    assert "https://" in text and "\n" not in text and text.endswith(".")
    kept = root / "equipoise-cache"
    assert not kept.exists() or not list(kept.iterdir())


def test_without_a_folder_it_is_said_what_is_needed():
    with pytest.raises(DataError, match="celeba needs --data-root.*list_eval_partition.*https://"):
        load("celeba")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [("train=0", "train is 0"), ("size=0", "size is 0"), ("crop=(3, 0)", r"crop is \(3, 0\)")],
)
def test_options_that_cannot_be(root, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        load(f"celeba({options})", root)


def test_the_second_time_nothing_is_decoded(root, monkeypatch, caplog):
    first = load(QUICK, root)
    assert "Decoding 11 photographs of CelebA" in caplog.text
    (kept,) = (root / "equipoise-cache").iterdir()
    assert 11 * 3 * 64 < kept.stat().st_size < 11 * 3 * 64 + 500
    caplog.clear()
    monkeypatch.setattr(celeba.Photographs, "decode", None)
    assert same(load(QUICK, root), first)
    assert caplog.text == ""


def test_a_damaged_file_is_made_again_and_that_is_said(root, caplog):
    first = load(QUICK, root)
    (kept,) = (root / "equipoise-cache").iterdir()
    content = bytearray(kept.read_bytes())
    content[-100] ^= 1
    kept.unlink()
    kept.write_bytes(content)
    assert same(load(QUICK, root), first)
    assert "is made again: its checksum is wrong" in caplog.text


def test_other_options_and_other_photographs_have_a_file_of_their_own(root):
    for text in (QUICK, "celeba(size=9)", "celeba(size=8, crop=16)", "celeba(size=8, test=1)",
                 "celeba(size=8, test=1, seed=1)"):  # fmt: skip
        load(text, root)
    path = root / "img_align_celeba" / "000001.jpg"
    Image.fromarray(255 - picture(5)).save(path, quality=90)
    changed = load(QUICK, root)
    assert len(list((root / "equipoise-cache").iterdir())) == 6
    assert same(changed, load(QUICK, root, cache="off"))


def test_without_a_place_to_keep_them_images_are_decoded_on_demand(root, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    data = load(QUICK, root, cache=str(tmp_path / "file"))
    assert isinstance(data.train.inputs, celeba.Photographs)
    assert "cannot be kept" in caplog.text


def test_positive_samples_can_count_by_their_rarity_in_training(root):
    assert {task.pos_weight for task in load(QUICK, root).tasks} == {1.0}
    change(ATTR, "000001.jpg -1 -1 -1 -1", "000001.jpg -1 -1 -1 1")(root)  # one who is young
    data = load("celeba(size=8, pos_weight=exact, metric=f1)", root)
    train = [truth(i) for i, part in enumerate(PARTITION) if part == 0]
    train[0][3] = 1
    for k, task in enumerate(data.tasks):
        positive = sum(row[k] for row in train)
        assert task.pos_weight == pytest.approx((len(train) - positive) / positive)
        assert [measure.name for measure in task.measures] == ["f1"]


def test_an_attribute_that_nobody_has_in_training_has_no_weight(root):
    with pytest.raises(ValueError, match="'Young': 0 of the 6 training samples are positive"):
        load("celeba(size=8, pos_weight=exact)", root)


def test_a_network_for_forty_names(root):
    data = load(QUICK, root)
    outputs = build("resnet18(width=1)", data)(everything(data.train)[0])
    assert {task: out.shape for task, out in outputs.items()} == dict.fromkeys(NAMES, (6, 1))
