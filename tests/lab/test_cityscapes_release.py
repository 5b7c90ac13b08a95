"""Cityscapes as it was released, read from small files of the published form."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from equipoise.lab.data import DataError, cityscapes_release, load
from equipoise.lab.models import build
from equipoise.lab.offsets import Offsets, offsets

H, W = 8, 16  # pixels of the files
FULL = f"cityscapes-release(size=({H}, {W}), augment=false)"
HALF = "cityscapes-release(size=(4, 8), augment=false)"
CITIES = {"train": {"aachen": 6, "bochum": 4}, "val": {"ulm": 3}}
ROAD, SKY, CAR, PARKING = 7, 23, 26, 9  # numbers in labelIds


def pictures(number):
    """One scene: a road, sky above, two cars, a group of cars, a place that is not evaluated."""
    image = np.zeros((H, W, 3), np.uint8)
    image[..., 0] = 10 * number + 5
    image[..., 1] = 8 * np.arange(W)
    label = np.full((H, W), ROAD, np.uint8)
    label[:2] = SKY
    label[7, :3] = PARKING
    instance = label.astype(np.uint16)
    for place, value in ((np.s_[3:6, 2:6], 26000), (np.s_[4:6, 10:12], 26001), (np.s_[6, 8:], CAR)):
        label[place] = CAR
        instance[place] = value
    disparity = np.tile(256 * np.arange(H, dtype=np.uint16)[:, None] + 1, (1, W))  # row r: r pixels
    disparity[7] = 0
    return {"image": image, "label": label, "instance": instance, "disparity": disparity}


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.delenv("EQUIPOISE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


@pytest.fixture
def root(tmp_path):
    """The published folders, with ten and three scenes."""
    number = 0
    for part, cities in CITIES.items():
        for city, many in cities.items():
            for i in range(many):
                for kind, array in pictures(number).items():
                    folder, ending = cityscapes_release.KINDS[kind]
                    path = (
                        tmp_path / "data" / folder / part / city / f"{city}_{i:06}_000019_{ending}"
                    )
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(array).save(path)
                number += 1
    return tmp_path / "data"


def splits(data):
    return data.train, data.val, data.test


def numbers(split):
    images = torch.stack([split[i][0] for i in range(len(split))])
    return ((images[:, 0, 0, 0] * 255 - 5) / 10).round().int().tolist()


def same(first, second):
    for a, b in zip(splits(first), splits(second), strict=True):
        for i in range(len(a)):
            (x, s), (y, t) = a[i], b[i]
            if not (torch.equal(x, y) and all(torch.equal(s[task], t[task]) for task in s)):
                return False
    return True


@pytest.mark.parametrize("cache", ["off", None])
def test_images_and_answers_are_those_of_the_files(root, cache):
    data = load(FULL, root, cache=cache)
    assert [task.name for task in data.tasks] == ["segmentation", "instances", "disparity"]
    assert data.tasks[0].outputs == 19 and data.input_shape == (3, H, W)
    assert [len(split) for split in splits(data)] == [9, 1, 3]
    assert sorted(numbers(data.train) + numbers(data.val)) == list(range(10))
    assert numbers(data.test) == [10, 11, 12]
    for split in splits(data):
        for place, i in enumerate(numbers(split)):
            expected = pictures(i)
            image, answers = split[place]
            colours = torch.from_numpy(expected["image"]).permute(2, 0, 1) / 255
            assert torch.equal(image, colours)
            classes = answers["segmentation"]
            assert classes.dtype == torch.long and classes.shape == (H, W)
            names = {(7, 0): -1, (0, 0): 10, (6, 0): 0, (4, 3): 13, (6, 9): 13}
            assert {place: int(classes[place]) for place in names} == names
            assert torch.equal(answers["disparity"][0, :7], torch.arange(7.0)[:, None].expand(7, W))
            assert (answers["disparity"][0, 7] == 0).all()
            ways = answers["instances"]
            known = ways[2] == 1
            assert torch.equal(known, torch.from_numpy(expected["instance"] >= 1000))
            assert known.sum() == 12 + 4 and ways[:, ~known].abs().max() == 0
            assert ways[:, 3, 2].tolist() == [1, 1.5, 1]  # to row 4, column 3.5
            assert ways[:, 5, 11].tolist() == [-0.5, -0.5, 1]  # to row 4.5, column 10.5


def test_smaller_images_have_smaller_disparities_and_ways(root):
    data = load(HALF, root, cache="off")
    image, answers = data.test[0]
    assert image.shape == (3, 4, 8) and data.input_shape == (3, 4, 8)
    assert answers["segmentation"].shape == (4, 8)
    # The pixel at the centre: rows 1, 3, 5, 7; a pixel is two of the original ones wide.
    assert answers["disparity"][0, :, 0].tolist() == [0.5, 1.5, 2.5, 0]
    assert answers["instances"][2].nonzero().tolist() == [[1, 1], [1, 2], [2, 1], [2, 2], [2, 5]]
    assert answers["instances"][:2, 1, 1].tolist() == [0.5, 0.5]
    assert answers["instances"][:2, 2, 5].tolist() == [0, 0]
    assert image[1, 0].diff().min() > 0  # all pixels that a new one covers, in order


def test_seven_categories_are_those_of_the_nineteen_classes(root):
    names = cityscapes_release.names(7)
    assert names == ("flat", "construction", "object", "nature", "sky", "human", "vehicle")
    data = load("cityscapes-release(size=(8, 16), augment=false, classes=7)", root)
    found = data.test[0][1]["segmentation"]
    expected = {(0, 0): "sky", (6, 0): "flat", (4, 3): "vehicle"}
    assert {place: names[found[place]] for place in expected} == expected
    assert found[7, 0] == -1
    table = cityscapes_release.mapped(19)
    assert sorted(table[table >= 0]) == list(range(19)) and table[33] == 18 and table[0] == -1
    assert (np.bincount(cityscapes_release.mapped(7) + 1)[1:] == [2, 3, 3, 2, 1, 2, 6]).all()


def test_the_second_time_nothing_is_decoded(root, monkeypatch, caplog):
    first = load(HALF, root)
    assert "Shrinking 13 scenes of Cityscapes" in caplog.text
    (kept,) = (root / "equipoise-cache").iterdir()
    assert 13 * 4 * 8 * 8 < kept.stat().st_size < 13 * 4 * 8 * 8 + 1000
    caplog.clear()
    monkeypatch.setattr(cityscapes_release.Scenes, "shrunk", None)
    assert same(load(HALF, root), first)
    again = load("cityscapes-release(size=(4, 8), augment=false, classes=7)", root)
    assert again.tasks[0].outputs == 7 and caplog.text == ""


def test_other_sizes_and_other_files_have_a_file_of_their_own(root):
    load(HALF, root)
    load("cityscapes-release(size=(2, 4))", root)
    load("cityscapes-release(size=(4, 8), seed=1)", root)
    path = next((root / "leftImg8bit" / "val" / "ulm").iterdir())
    Image.fromarray(np.random.default_rng(0).integers(255, size=(H, W, 3), dtype=np.uint8)).save(
        path
    )
    changed = load(HALF, root)
    assert len(list((root / "equipoise-cache").iterdir())) == 4
    assert same(changed, load(HALF, root, cache="off"))


def test_sizes_choose_scenes(root):
    data = load("cityscapes-release(size=(4, 8), augment=false, train=3, val=2, test=1)", root)
    assert [len(split) for split in splits(data)] == [3, 2, 1]
    assert not set(numbers(data.train)) & set(numbers(data.val))
    with pytest.raises(ValueError, match="cityscapes-release: test is 4, but there are 3"):
        load("cityscapes-release(test=4)", root)
    with pytest.raises(ValueError, match=r"size is \(0, 8\); give 1 pixel or more"):
        load("cityscapes-release(size=(0, 8))", root)


def test_the_errors_of_an_answer_that_ignores_the_image_are_the_scales(root):
    _, ways, disparity = load(FULL, root).tasks
    rows = np.repeat(np.arange(1, 7), W)
    assert disparity.scale == pytest.approx(np.abs(rows - rows.mean()).mean())
    # 12 pixels of 3 x 4 and 4 of 2 x 2, |down| + |right|
    assert ways.scale == pytest.approx((12 * (2 / 3 + 1) + 4 * 1) / 16)


@pytest.mark.parametrize("scale", [1.0, 1.5])
@pytest.mark.parametrize("mirrored", [False, True])
def test_variation_turns_and_stretches_what_it_must(root, scale, mirrored):
    from equipoise.lab.data.pixels import Augmentation

    instances = torch.zeros(12, 12, dtype=torch.long)
    instances[4:8, 2:6] = 1001
    things = offsets(instances)
    sample = torch.rand(3, 12, 12), {"a": things, "d": torch.ones(1, 12, 12)}

    class Draws:
        """Scale, row, column, mirrored: the part in the middle."""

        def __init__(self):
            self.given = iter([0, (12 - int(12 / scale)) // 2, 0, int(mirrored)])

        def integers(self, _):
            return next(self.given)

    vary = Augmentation(scales=(scale,), nearer=("d",), offsets=("a",))
    _, found = vary(sample, Draws())
    assert torch.equal(found["d"], torch.full((1, 12, 12), scale))
    # A pixel and the way from it still lead to one point, up to the rounding of pixels.
    known = found["a"][2] == 1
    rows, columns = known.nonzero().T
    to = torch.stack([rows + found["a"][0, known], columns + found["a"][1, known]])
    assert (to - to.mean(1, keepdim=True)).abs().max() <= (scale - 1) * 1.5
    if mirrored and scale == 1:
        assert torch.equal(found["a"][1], -things[1].flip(-1))


def test_a_network_learns_from_it(root):
    data = load("cityscapes-release(size=(16, 32))", root)
    model = build("resnet50-pspnet(width=1)", data)
    inputs, targets = data.train[list(range(4))]
    outputs = model(inputs)
    assert outputs["instances"].shape == (4, 2, 16, 32)
    losses = [task.loss(outputs[task.name], targets[task.name]) for task in data.tasks]
    assert all(loss.isfinite() and loss > 0 for loss in losses)
    sum(losses).backward()


# ------------------------------------------------------------------ the task


def test_offsets_lead_to_the_mean_of_an_instance():
    instances = torch.tensor([[0, 5, 5], [7, 0, 5], [7, 7, 0]])
    found = offsets(instances)
    rows, columns = torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij")
    for number, centre in ((5, (1 / 3, 5 / 3)), (7, (5 / 3, 1 / 3))):
        here = instances == number
        torch.testing.assert_close(found[0][here] + rows[here], torch.full((3,), centre[0]))
        torch.testing.assert_close(found[1][here] + columns[here], torch.full((3,), centre[1]))
    assert torch.equal(found[2], (instances != 0).float())
    assert found[:, instances == 0].abs().max() == 0


def test_loss_and_error_are_means_over_instances_only():
    task = Offsets("x", scale=4.0)
    target = torch.zeros(2, 3, 2, 2)
    target[0, :, 0, 0] = torch.tensor([1.0, -2.0, 1.0])
    target[1, :, 1, 1] = torch.tensor([0.0, 0.0, 1.0])
    output = torch.zeros(2, 2, 2, 2)
    output[1, :, 1, 1] = torch.tensor([3.0, -4.0])
    output[0, :, 1, 1] = 100  # no instance there
    assert task.loss(output, target).item() == pytest.approx((3 + 7) / 2)
    assert task.loss(output, 0 * target).item() == 0
    meter = task.metric()
    task.update(meter, output[:1], target[:1])
    task.update(meter, output[1:], target[1:])
    task.update(meter, output, 0 * target)
    values = {name: float(value) for name, value in meter.compute().items()}
    assert values == {"offset error": 5.0}
    assert task.score(values) == pytest.approx(1 - 5 / 4)
    with pytest.raises(ValueError, match="'x': scale is 0; give one above 0"):
        Offsets("x", scale=0)


# ------------------------------------------------------------------ files that cannot be used


def file(root, kind, part="val", city="ulm", i=1):
    folder, ending = cityscapes_release.KINDS[kind]
    return root / folder / part / city / f"{city}_{i:06}_000019_{ending}"


def put(kind, array):
    return lambda root: Image.fromarray(array).save(file(root, kind))


FAULTS = {
    "no folder": (lambda r: shutil.rmtree(r / "disparity"), "there is no folder .*disparity/train"),
    "no part": (lambda r: shutil.rmtree(r / "gtFine" / "val"), "there is no folder .*gtFine/val"),
    "nothing": (lambda r: [shutil.rmtree(r), r.mkdir()], "is not a folder that holds leftImg8bit/"),
    "no images": (lambda r: shutil.rmtree(r / "leftImg8bit" / "val" / "ulm"), "val has no images"),
    "gone": (lambda r: file(r, "instance").unlink(), "ulm_000001_.*instanceIds.png is missing"),
    "cut": (lambda r: file(r, "image").write_bytes(file(r, "image").read_bytes()[:45]),
            "ulm_000001_000019_leftImg8bit.png cannot be read"),
    "page": (lambda r: file(r, "disparity").write_text("<html>"), "_disparity.png cannot be read"),
    "colours": (put("label", np.zeros((H, W, 3), np.uint8)), "labelIds.png has colours instead"),
    "size": (put("label", np.zeros((H, W - 1), np.uint8)), r"has \(8, 15\) pixels instead of"),
    "deep": (put("label", np.full((H, W), 26001, np.uint16)), "holds numbers from 26001 to 26001"),
}  # fmt: skip


@pytest.mark.parametrize("cache", ["off", None])
@pytest.mark.parametrize("fault", FAULTS)
def test_files_that_cannot_be_used_are_named_in_one_sentence(root, fault, cache):
    break_it, sentence = FAULTS[fault]
    break_it(root)
    with pytest.raises(DataError, match=sentence) as caught:
        load(HALF, root, cache=cache).test[[0, 1, 2]]
    text = str(caught.value)
    assert "https://" in text and "\n" not in text and text.endswith(".")
    kept = root / "equipoise-cache"
    assert not kept.exists() or not list(kept.iterdir())


def test_without_a_folder_it_is_said_what_is_needed():
    with pytest.raises(DataError, match="cityscapes-release needs --data-root, .*https://"):
        load("cityscapes-release")
