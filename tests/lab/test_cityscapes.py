"""Cityscapes in the community's arrays, read from small files of that form."""

import shutil

import numpy as np
import pytest
import torch

from equipoise.lab.data import DataError, load, loader
from equipoise.lab.models import build

H, W = 8, 16
NUMBERS = {"train": 20, "val": 5}


def scene(part, i):
    """An image that says which one it is, classes in columns, inverse depth that grows down."""
    image = np.full((H, W, 3), (i + 1) / 100 + 0.5 * (part == "val"), np.float32)
    image[:, :, 2] = np.arange(W) / W
    label = np.tile(np.arange(W) % 8 - 1.0, (H, 1)).astype(np.float32)
    depth = np.tile(np.arange(H)[:, None, None] / 100, (1, W, 1)).astype(np.float32)
    depth[0] = -0.01
    return {"image": image, "label_7": label, "depth": depth}


@pytest.fixture
def root(tmp_path):
    for part, number in NUMBERS.items():
        for i in range(number):
            for kind, array in scene(part, i).items():
                folder = tmp_path / "data" / part / kind
                folder.mkdir(parents=True, exist_ok=True)
                np.save(folder / f"{i}.npy", array)
    return tmp_path / "data"


def splits(data):
    return data.train, data.val, data.test


def numbers(split):
    """Which images of the files a split has."""
    images = torch.stack([split[i][0] for i in range(len(split))])
    return (images[:, 0, 0, 0] * 100).round().int().sub(1).tolist()


def test_images_answers_and_splits_are_those_of_the_files(root):
    data = load("cityscapes(augment=false)", root)
    assert [task.name for task in data.tasks] == ["segmentation", "depth"]
    assert data.tasks[0].classes[0] == "flat" and data.tasks[0].outputs == 7
    assert data.input_shape == (3, H, W)
    assert [len(split) for split in splits(data)] == [18, 2, 5]
    assert sorted(numbers(data.train) + numbers(data.val)) == list(range(20))
    assert numbers(data.test) == [50 + i for i in range(5)]
    for split, part in zip(splits(data), ("train", "train", "val"), strict=True):
        for place, i in enumerate(numbers(split)):
            expected = scene(part, i - 50 * (part == "val"))
            image, answers = split[place]
            assert image.dtype == answers["depth"].dtype == torch.float32
            assert torch.equal(image, torch.from_numpy(expected["image"]).permute(2, 0, 1))
            assert answers["segmentation"].dtype == torch.long
            assert np.array_equal(answers["segmentation"], expected["label_7"])
            assert np.array_equal(answers["depth"], expected["depth"].clip(0).transpose(2, 0, 1))
    images, answers = data.test[[0, 1, 2]]
    assert images.shape == (3, 3, H, W)
    assert answers["segmentation"].shape == (3, H, W) and answers["depth"].shape == (3, 1, H, W)


def test_sizes_and_seed_choose_the_images(root):
    data = load("cityscapes(augment=false)", root)
    few = load("cityscapes(augment=false, train=5, val=2, test=3)", root)
    assert [len(split) for split in splits(few)] == [5, 2, 3]
    assert numbers(few.val) == numbers(data.val)
    assert set(numbers(few.train)) < set(numbers(data.train))
    other = load("cityscapes(augment=false, seed=1)", root)
    assert numbers(other.val) != numbers(data.val)


def test_what_ignores_the_image_has_the_score_zero(root):
    """The scale of an error is that of the mean answer, on rows 1 to 7 of 0.01 a row."""
    segmentation, depth = load("cityscapes", root).tasks
    rows = np.arange(1, 8) / 100
    assert depth.scale == pytest.approx(np.abs(rows - 0.04).mean(), rel=1e-6)
    assert depth.relative_scale == pytest.approx((np.abs(rows - 0.04) / rows).mean(), rel=1e-6)
    meter = depth.metric()
    target = torch.from_numpy(scene("train", 0)["depth"].clip(0)).permute(2, 0, 1)[None]
    depth.update(meter, torch.full((1, 1, H, W), 0.04), target)
    assert depth.score({k: float(v) for k, v in meter.compute().items()}) == pytest.approx(
        0, abs=1e-5
    )
    assert segmentation.measures[0].name == "mIoU"


def test_training_images_are_varied_and_others_are_not(root):
    data, plain = load("cityscapes", root), load("cityscapes(augment=false)", root)

    def first(split, seed):
        return next(iter(loader(split, len(split), shuffle_seed=seed)))

    images, answers = first(data.train, 3)
    again, same = first(data.train, 3)
    before, straight = first(plain.train, 3)
    assert torch.equal(images, again) and torch.equal(answers["depth"], same["depth"])
    assert not torch.equal(images, before)
    # What is nearer looks larger: inverse depth grows by the scale, at most 1.5.
    ratio = (answers["depth"].amax((1, 2, 3)) / straight["depth"].amax((1, 2, 3))).tolist()
    assert max(ratio) > 1 and all(0.3 < r < 1.5 + 1e-6 for r in ratio)
    assert torch.equal(first(data.test, None)[0], first(plain.test, None)[0])
    mirrored = (images[:, 2, 0].diff(dim=1) < 0).any(1)
    assert 0 < mirrored.sum() < len(mirrored)


@pytest.mark.parametrize("change", ["label", "below", "two axes", "bytes"])
def test_other_spellings_of_the_same_files(root, change):
    whole = load("cityscapes(augment=false)", root)
    expected = [[split[i] for i in range(len(split))] for split in splits(whole)]
    place = root
    for part in NUMBERS:
        if change == "label":
            (root / part / "label_7").rename(root / part / "label")
        for path in (root / part / "depth").iterdir() if change == "two axes" else ():
            np.save(path, np.load(path)[..., 0])
        for path in (root / part / "image").iterdir() if change == "bytes" else ():
            np.save(path, (np.load(path) * 255).round().astype(np.uint8))
    if change == "below":
        place = root.parent / "elsewhere"
        place.mkdir()
        root.rename(place / "cityscapes")
    data = load("cityscapes(augment=false)", place)
    for split, samples in zip(splits(data), expected, strict=True):
        for i, sample in enumerate(samples):
            torch.testing.assert_close(split[i], sample, rtol=0, atol=0.51 / 255)


def test_a_network_learns_from_it(root):
    data = load("cityscapes", root)
    model = build("resnet50-pspnet(width=1)", data)
    inputs, targets = data.train[list(range(4))]
    outputs = model(inputs)
    losses = [task.loss(outputs[task.name], targets[task.name]) for task in data.tasks]
    assert all(loss.isfinite() for loss in losses)
    sum(losses).backward()


def put(part, kind, i, array):
    def apply(root):
        np.save(root / part / kind / f"{i}.npy", array)

    return apply


def write(part, kind, i, content):
    def apply(root):
        path = root / part / kind / f"{i}.npy"
        path.write_bytes(content(path.read_bytes()) if callable(content) else content)

    return apply


WRONG = np.full((H, W), 7.0)
FAULTS = {
    "no folder": (lambda r: shutil.rmtree(r / "val"), "there is no folder .*val/image"),
    "no kind": (lambda r: shutil.rmtree(r / "val" / "depth"), "there is no folder .*val/depth"),
    "nothing": (lambda r: [shutil.rmtree(r), r.mkdir()], "is not a folder that holds train/ and"),
    "empty": (lambda r: [shutil.rmtree(r / "val" / k) or (r / "val" / k).mkdir()
                         for k in ("image", "label_7", "depth")], "val/image has no 0.npy"),
    "gone": (lambda r: (r / "train" / "depth" / "3.npy").unlink(), "depth/3.npy is missing, of 20"),
    "first gone": (lambda r: (r / "train" / "image" / "0.npy").unlink(), "image/0.npy is missing"),
    "cut": (write("train", "image", 4, lambda b: b[:-9]), "image/4.npy has 1527 bytes .* of 1536"),
    "page": (write("val", "depth", 2, b"<html>"), "val/depth/2.npy is no .npy file"),
    "shape": (put("val", "label_7", 1, np.zeros((H, W - 1))), "label_7/1.npy has shape .8, 15"),
    "first shape": (put("train", "image", 0, np.zeros((H, W))), "image/0.npy has shape .8, 16"),
    "objects": (put("val", "depth", 0, np.array([None])), "depth/0.npy holds object, not numbers"),
}  # fmt: skip
LATER = {
    "class": (put("val", "label_7", 1, WRONG), "label_7/1.npy holds 7, not -1 to 6"),
    "low class": (put("val", "label_7", 1, -2 * WRONG), "label_7/1.npy holds -14, not -1 to 6"),
    "nan": (
        put("val", "depth", 3, WRONG * np.nan),
        "depth/3.npy holds numbers that are not finite",
    ),
}


@pytest.mark.parametrize("fault", [*FAULTS, *LATER])
def test_files_that_cannot_be_used_are_named_in_one_sentence(root, fault):
    break_it, sentence = {**FAULTS, **LATER}[fault]
    break_it(root)
    with pytest.raises(DataError, match=sentence) as caught:
        data = load("cityscapes", root)
        assert fault in LATER
        data.test[list(range(5))]
    text = str(caught.value)
    assert "https://" in text and "\n" not in text and text.endswith(".")


def test_the_original_files_have_a_name_of_their_own(root):
    shutil.rmtree(root)
    (root / "leftImg8bit").mkdir(parents=True)
    with pytest.raises(DataError, match="use --data cityscapes-release for the original files"):
        load("cityscapes", root)
    with pytest.raises(DataError, match="cityscapes needs --data-root, .*https://"):
        load("cityscapes")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("val=20", "val is 20, but there are 20 training images"),
        ("val=0", "val is 0"),
        ("train=19", "train is 19 and val 2, but there are 20 training images"),
        ("train=0", "train is 0"),
        ("test=6", "test is 6, but there are 5 test images"),
    ],
)
def test_sizes_that_cannot_be(root, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        load(f"cityscapes({options})", root)
