"""CIFAR-10 and CIFAR-100 as binary tasks, read from small files of the published form."""

import io
import os
import pickle
import shutil
import struct

import numpy as np
import pytest
import torch

from equipoise.lab.data import DataError, load, loader, pickled
from equipoise.lab.models import build

TEN = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
EACH, TESTED = 20, 30  # images in each of the five training files, and in the test file
SMALL = "cifar10(val=20)"


class Python2(pickle._Pickler):
    """Writes as Python 2 and its numpy did, which made the published files."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_bytes(self, obj):
        short = len(obj) < 256
        self.write(
            (b"U" + bytes([len(obj)]) if short else b"T" + struct.pack("<i", len(obj))) + obj
        )
        self.memoize(obj)

    def save_str(self, obj):
        self.save_bytes(obj.encode())

    dispatch[bytes] = save_bytes
    dispatch[str] = save_str

    def save_global(self, obj, name=None):
        module = "numpy.core.multiarray" if obj.__name__ == "_reconstruct" else "numpy"
        self.write(f"c{module}\n{obj.__name__}\n".encode())
        self.memoize(obj)

    dispatch[type(np.array([0]).__reduce__()[0])] = save_global
    dispatch[type] = save_global


def python2(content):
    file = io.BytesIO()
    Python2(file, protocol=2).dump(content)
    return file.getvalue()


def python3(content):
    return pickle.dumps(content, protocol=2)


def images(first, number):
    """(number, 3072): each says which one it is, and which side of it is up."""
    pixels = np.zeros((number, 3, 32, 32), np.uint8)
    pixels[:, 0, 10:20] = np.arange(first, first + number, dtype=np.uint8)[:, None, None]
    pixels[:, 1, :16] = 200
    pixels[:, 2, :, 3] = 77
    return pixels.reshape(number, 3072)


def label(i):
    return (7 * i) % 10


def write_ten(folder, dump=python2):
    folder.mkdir(parents=True)
    for part in range(6):
        name, number = (f"data_batch_{part + 1}", EACH) if part < 5 else ("test_batch", TESTED)
        content = {
            b"batch_label": f"batch {part + 1} of 5".encode(),
            b"labels": [label(EACH * part + i) for i in range(number)],
            b"data": images(EACH * part, number),
            b"filenames": [f"{i}.png".encode() for i in range(number)],
        }
        (folder / name).write_bytes(dump(content))
    meta = {
        b"num_cases_per_batch": EACH,
        b"label_names": [n.encode() for n in TEN],
        b"num_vis": 3072,
    }
    (folder / "batches.meta").write_bytes(dump(meta))


def write_hundred(folder, dump=python2):
    """200 training images, 100 test images; class i has the superclass i % 20."""
    folder.mkdir(parents=True)
    for name, number in (("train", 200), ("test", 100)):
        fine = [(3 * i) % 100 for i in range(number)]
        content = {
            b"filenames": [b"x.png"] * number,
            b"batch_label": b"training batch 1 of 1",
            b"fine_labels": fine,
            b"coarse_labels": [i % 20 for i in fine],
            b"data": images(0, number),
        }
        (folder / name).write_bytes(dump(content))
    meta = {
        b"fine_label_names": [f"thing_{i}".encode() for i in range(100)],
        b"coarse_label_names": [f"kind_{i}".encode() for i in range(20)],
    }
    (folder / "meta").write_bytes(dump(meta))


@pytest.fixture
def root(tmp_path):
    write_ten(tmp_path / "data" / "cifar-10-batches-py")
    return tmp_path / "data"


@pytest.fixture
def hundred(tmp_path):
    write_hundred(tmp_path / "data" / "cifar-100-python")
    return tmp_path / "data"


def splits(data):
    return data.train, data.val, data.test


def numbers(split):
    """Which images of the files a split has, in its order."""
    return split.inputs[:, 0, 15, 0].tolist()


def upside_down(split):
    return split.inputs[:, 1, 0, 0] == 0


def same(first, second):
    return all(
        torch.equal(a.inputs, b.inputs)
        and all(torch.equal(a.targets[task], b.targets[task]) for task in a.targets)
        for a, b in zip(splits(first), splits(second), strict=True)
    )


def test_g1_is_ten_tasks_one_against_the_rest(root):
    data = load(SMALL, root)
    assert [task.name for task in data.tasks] == TEN
    assert {task.kind for task in data.tasks} == {"binary"}
    assert data.input_shape == (3, 32, 32)
    for split, number in zip(splits(data), (80, 20, TESTED), strict=True):
        assert len(split) == number
        for place, i in enumerate(numbers(split)):
            truth = {task: split.targets[task][place].item() for task in TEN}
            assert truth == {task: float(j == label(i)) for j, task in enumerate(TEN)}
        assert not upside_down(split).any()
        inputs, targets = split[[0, 1]]
        assert inputs.dtype == torch.float32 and inputs.shape == (2, 3, 32, 32)
        assert inputs[0, 1, 0, 0].item() == pytest.approx(200 / 255)
        assert (inputs[0, 2, :, 3] == inputs[0, 2, 0, 3]).all()  # rows are rows
        assert all(target.dtype == torch.float32 for target in targets.values())
    assert set(data.groups) == {"animals", "vehicles"}
    assert set(data.groups["vehicles"]) == {"airplane", "automobile", "ship", "truck"}
    assert sorted(sum(data.groups.values(), ())) == sorted(TEN)


def test_splits_share_nothing_and_keep_the_classes_in_proportion(root):
    data = load(SMALL, root)
    train, val = numbers(data.train), numbers(data.val)
    assert sorted(train + val) == list(range(5 * EACH))
    assert numbers(data.test) != sorted(numbers(data.test))
    for split in splits(data):
        assert {int(target.sum()) for target in split.targets.values()} == {len(split) // 10}
    few = load("cifar10(train=30, val=10, test=20)", root)
    assert numbers(few.train) == train[:30]
    assert numbers(few.val) == val[-10:]
    assert numbers(few.test) == numbers(data.test)[:20]
    assert {int(target.sum()) for target in few.train.targets.values()} == {3}
    other = load("cifar10(val=20, seed=1)", root)
    assert numbers(other.train) != train


def test_g2_adds_five_tasks(root):
    data = load("cifar10(tasks=g2, val=20)", root)
    extra = ["living", "odd", "upside-down", "not-living", "random"]
    assert [task.name for task in data.tasks] == TEN + extra
    for split in splits(data):
        labels = torch.tensor([label(i) for i in numbers(split)])
        found = split.targets
        assert torch.equal(
            found["living"], torch.isin(labels, torch.tensor([2, 3, 4, 5, 6, 7])).float()
        )
        assert torch.equal(found["not-living"], 1 - found["living"])
        assert torch.equal(found["odd"], (labels % 2).float())
        assert torch.equal(found["upside-down"], upside_down(split).float())
        assert 0.2 < found["random"].mean() < 0.8
    both = torch.cat([data.train.targets["upside-down"], data.val.targets["upside-down"]])
    assert both.sum() == 5 * EACH / 2  # exactly half
    assert data.test.targets["upside-down"].sum() == TESTED / 2
    coins = torch.cat([data.train.targets["random"], data.val.targets["random"]])
    assert (coins != both).any() and (coins != 1 - both).any()


def test_flips_and_coins_belong_to_the_image_whatever_the_sizes(root):
    whole = load("cifar10(tasks=g2, val=20)", root)
    few = load("cifar10(tasks=g2, train=30, val=10, test=20)", root)
    for task in ("upside-down", "random"):
        assert torch.equal(few.train.targets[task], whole.train.targets[task][:30])
        assert torch.equal(few.test.targets[task], whole.test.targets[task][:20])
    other = load("cifar10(tasks=g2, val=20, seed=1)", root)
    of = [
        dict(zip(numbers(d.test), d.test.targets["random"].tolist(), strict=True))
        for d in (whole, other)
    ]
    assert of[0] != of[1]


def test_the_reference_flips_also_where_nobody_asks_for_it(root):
    always = load("cifar10(val=20, flip=always)", root)
    assert [task.name for task in always.tasks] == TEN
    flipped = load("cifar10(tasks=g2, val=20)", root)
    for a, b in zip(splits(always), splits(flipped), strict=True):
        assert torch.equal(a.inputs, b.inputs) and upside_down(a).any()


def test_images_are_turned_top_to_bottom_and_not_left_to_right(root):
    plain, flipped = load(SMALL, root), load("cifar10(val=20, flip=always)", root)
    turned = upside_down(flipped.train)
    assert torch.equal(flipped.train.inputs[turned], plain.train.inputs[turned].flip(2))
    assert torch.equal(flipped.train.inputs[~turned], plain.train.inputs[~turned])


def weights(data):
    return {task.name: task.pos_weight for task in data.tasks}


def test_positive_samples_count_as_in_the_paper_exactly_or_once(root, hundred):
    assert weights(load(SMALL, root)) == dict.fromkeys(TEN, 10.0)
    both = weights(load("cifar10(tasks=g2, val=20)", root))
    assert {both[name] for name in TEN} == {10.0}
    assert {both[name] for name in both if name not in TEN} == {1.0}
    exact = weights(load("cifar10(tasks=g2, val=20, pos_weight=exact)", root))
    assert {exact[name] for name in TEN} == {9.0}
    assert exact["living"] == pytest.approx(2 / 3) and exact["not-living"] == pytest.approx(1.5)
    assert set(weights(load("cifar10(val=20, pos_weight=none)", root)).values()) == {1.0}
    assert set(weights(load("cifar100(val=50)", hundred)).values()) == {99.0}
    with pytest.raises(ValueError, match="0 of the 5 training .* give more samples, or"):
        load("cifar10(train=5, val=20, pos_weight=exact)", root)


def test_the_loss_counts_positive_samples_by_their_weight(root):
    """SPECS F.C5: at logit 0, ln 2 for a negative sample and 10 ln 2 for a positive one."""
    task = load(SMALL, root).tasks[0]
    zero = torch.zeros(1, 1)
    assert task.loss(zero, torch.ones(1)).item() == pytest.approx(6.9314718)
    assert task.loss(zero, torch.zeros(1)).item() == pytest.approx(0.6931472)


def test_tasks_are_measured_by_f1_or_accuracy(root):
    for options, name in (("", "f1"), (", metric=accuracy", "accuracy")):
        for task in load(f"cifar10(val=20{options})", root).tasks:
            assert [measure.name for measure in task.measures] == [name]


def test_a_hundred_tasks_and_twenty_groups_to_judge_by(hundred):
    data = load("cifar100(val=50)", hundred)
    assert [task.name for task in data.tasks] == [f"thing_{i}" for i in range(100)]
    assert [len(split) for split in splits(data)] == [150, 50, 100]
    for split in splits(data):
        assert list(split.targets) == [task.name for task in data.tasks]
        rows = torch.stack(list(split.targets.values()))
        assert torch.equal(rows.sum(0), torch.ones(len(split)))
        assert rows.argmax(0).tolist() == [3 * i % 100 for i in numbers(split)]
    assert data.groups == {
        f"kind_{i}": tuple(f"thing_{j}" for j in range(i, 100, 20)) for i in range(20)
    }


def test_files_of_python_3_and_the_folder_itself_will_do(root, tmp_path):
    expected = load(SMALL, root)
    assert same(load(SMALL, root / "cifar-10-batches-py"), expected)
    write_ten(tmp_path / "again" / "cifar-10-batches-py", python3)
    assert same(load(SMALL, tmp_path / "again"), expected)


def test_making_data_moves_no_global_generator(root):
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    load("cifar10(tasks=g2, val=20)", root)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


def test_batches_say_which_samples_they_are_if_asked(root):
    data = load(SMALL, root)
    seen = []
    for inputs, targets, index in loader(data.train, 32, shuffle_seed=3, with_index=True):
        assert index.dtype == torch.long and index.shape == (len(inputs),)
        expected, labels = data.train[index]
        assert torch.equal(inputs, expected)
        assert all(torch.equal(targets[task], labels[task]) for task in TEN)
        seen += index.tolist()
    assert seen != sorted(seen) and sorted(seen) == list(range(80))
    plain = [inputs for inputs, _ in loader(data.train, 32, shuffle_seed=3)]
    asked = [batch[0] for batch in loader(data.train, 32, shuffle_seed=3, with_index=True)]
    assert all(map(torch.equal, plain, asked))


@pytest.mark.parametrize("task_set", ["g1", "g2"])
def test_the_network_of_the_paper_takes_it(root, task_set):
    data = load(f"cifar10(tasks={task_set}, val=20)", root)
    model = build("cnn(width=2, features=8)", data)
    inputs, targets = data.train[list(range(20))]
    outputs = model(inputs)
    assert {task: out.shape for task, out in outputs.items()} == dict.fromkeys(targets, (20, 1))
    sum(task.loss(outputs[task.name], targets[task.name]) for task in data.tasks).backward()
    assert all(p.grad is not None for p in model.parameters())


# ------------------------------------------------------------------ files that cannot be used


class Call:
    """Something that a pickle would call."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def put(name, content):
    def apply(folder):
        (folder / name).write_bytes(content(folder) if callable(content) else content)

    return apply


def changed(**values):
    """The second training file with other values under some keys; None: without."""

    def content(folder):
        found = {
            b"labels": [label(i) for i in range(EACH)],
            b"data": images(0, EACH),
        }
        for key, value in values.items():
            found[key.encode()] = value
        return python3({k: v for k, v in found.items() if v is not None})

    return put("data_batch_2", content)


FAULTS = {
    "no file": (lambda f: (f / "data_batch_3").unlink(), "has no data_batch_3; get the python ver"),
    "no names": (lambda f: (f / "batches.meta").unlink(), "has no batches.meta; get"),
    "nothing": (shutil.rmtree, "data has no cifar-10-batches-py; get"),
    "folder": (lambda f: [(f / "test_batch").unlink(), (f / "test_batch").mkdir()],
               "has no test_batch; get"),
    "empty": (put("data_batch_2", b""), "data_batch_2 is damaged or no pickle"),
    "page": (put("data_batch_2", b"<!DOCTYPE html><html>"), "data_batch_2 (is|cannot)"),
    "cut": (put("data_batch_2", lambda f: (f / "data_batch_2").read_bytes()[:-700]),
            "data_batch_2 (is damaged|cannot be read)"),
    "middle": (put("data_batch_2", lambda f: (f / "data_batch_2").read_bytes()[700:]),
               "data_batch_2 (is damaged|cannot be read)"),
    "list": (put("data_batch_2", python3([1, 2])), "holds a list instead of a dictionary"),
    "no data": (changed(data=None), "data_batch_2 has no data of 3072 bytes an image"),
    "data list": (changed(data=[1]), "has no data of 3072 bytes an image"),
    "narrow": (changed(data=images(0, EACH)[:, :3000]), "has no data of 3072 bytes an image"),
    "floats": (changed(data=images(0, EACH) / 255), "holds an array of f8 instead of bytes"),
    "no labels": (changed(labels=None), "has no list of numbers under 'labels'"),
    "few labels": (changed(labels=[1, 2]), "has 20 images, but 2 labels"),
    "high label": (changed(labels=[10] * EACH), "has 10 among its labels, which go to 9"),
    "low label": (changed(labels=[-1] * EACH), "has -1 among its labels"),
    "text label": (changed(labels=[b"cat"] * EACH), "has no list of numbers under 'labels'"),
    "names": (put("batches.meta", python3({b"label_names": [b"cat"] * 10})),
              "has no 10 different names under 'label_names'"),
    "few names": (put("batches.meta", python3({b"label_names": [b"cat", b"dog"]})),
                  "has no 10 different names"),
    "no name": (put("batches.meta", python3({})), "has no 10 different names"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_files_that_cannot_be_used_are_named_in_one_sentence(root, fault):
    break_it, sentence = FAULTS[fault]
    break_it(root / "cifar-10-batches-py")
    with pytest.raises(DataError, match=sentence) as caught:
        load(SMALL, root)
    text = str(caught.value)
    assert "https://" in text and "\n" not in text and text.endswith(".")


@pytest.mark.parametrize(
    "function", [os.mkdir, exec, eval, getattr, np.load, print, type, bytearray, pickle.loads]
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_cannot_call_anything(root, tmp_path, function, protocol):
    path, trace = root / "cifar-10-batches-py" / "data_batch_1", tmp_path / "trace"
    content = {b"data": Call(function, f"{trace}"), b"labels": []}
    path.write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(DataError, match=f"{function.__name__}, which no published file holds"):
        load(SMALL, root)
    assert not trace.exists()


def raw(*operations):
    return b"\x80\x02" + b"".join(operations) + b"."


@pytest.mark.parametrize(
    "content",
    [
        # an array far larger than its bytes, of negative sizes, of bytes that are a text
        raw(b"cnumpy.core.multiarray\n_reconstruct\n(tR(K\x01J\xff\xff\xff\x7f\x85",
            b"cnumpy\ndtype\nU\x02u1\x85R\x89U\x01xtb"),
        raw(b"cnumpy.core.multiarray\n_reconstruct\n(tR(K\x01J\xff\xff\xff\xff\x85",
            b"cnumpy\ndtype\nU\x02u1\x85R\x89U\x01xtb"),
        raw(b"cnumpy.core.multiarray\n_reconstruct\n(tR(K\x01K\x01\x85",
            b"cnumpy\ndtype\nU\x02u1\x85R\x89X\x01\x00\x00\x00xtb"),
        # of objects; with a state of another form; a reference to elsewhere; memory that is not
        raw(b"cnumpy\ndtype\nU\x02O8\x85R"),
        raw(b"cnumpy.core.multiarray\n_reconstruct\n(tRK\x01b"),
        raw(b"U\x01xQ"),
        raw(b"h\x05"),
        raw(b"cos\nsystem\nU\x02ls\x85R"),
        raw(b"c_codecs\nencode\nK\x01\x85R"),
        # a change of what stands for numpy, for the files that are read later
        raw(b"}", b"c_codecs\nencode\n(NX\x07\x00\x00\x00__new__K\x01tb"),
        raw(b"}", b"cnumpy\nndarray\nN}X\x05\x00\x00\x00arrayK\x01s\x86b0"),
        raw(b"}", b"c_codecs\nencode\nN}X\x07\x00\x00\x00__new__K\x01s\x86b0"),
        b"cposix\nsystem\n(S'ls'\ntR.",
    ],
)  # fmt: skip
def test_pickles_that_nobody_published_are_refused(tmp_path, content):
    path = tmp_path / "data_batch_1"
    path.write_bytes(content)
    with pytest.raises(DataError, match="data_batch_1 (is damaged|cannot be read|holds)"):
        pickled.read(path, "https://example.org")


def test_arrays_come_out_as_they_went_in(tmp_path):
    path = tmp_path / "file"
    for array in (
        np.arange(6, dtype=np.uint8).reshape(2, 3),
        np.asfortranarray(np.eye(3, 2, dtype=np.uint8)),
    ):
        for dump in (python2, python3):
            path.write_bytes(dump({"x": array, b"y": [b"text", 3]}))
            found = pickled.read(path, "https://example.org")
            assert np.array_equal(found["x"], array) and found["y"] == [b"text", 3]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("train=0", "train is 0; give 1 or more"),
        ("val=0", "val is 0"),
        ("train=90, val=20", "train is 90 and val 20, but there are 100 training images"),
        ("val=100", "train is none and val 100, but there are 100"),
        ("val=20, test=31", "test is 31, but there are 30 test images"),
    ],
)
def test_sizes_that_cannot_be(root, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        load(f"cifar10({options})", root)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_without_a_folder_it_is_said_what_is_needed(name):
    with pytest.raises(DataError, match=f"{name} needs --data-root, .*https://"):
        load(name)


def test_unknown_task_sets_name_the_known(root):
    with pytest.raises(DataError, match="tasks is g3; it takes g1 or g2"):
        load("cifar10(tasks=g3)", root)
