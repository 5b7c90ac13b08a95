"""CIFAR-10 and CIFAR-100 as binary tasks, read from the published "python version" files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from equipoise.lab.data import pickled
from equipoise.lab.data.base import Data, DataError, Split
from equipoise.lab.data.weights import balance
from equipoise.lab.tasks import Task
from equipoise.text import show_value

URL = "https://www.cs.toronto.edu/~kriz/cifar.html"
SHAPE = (3, 32, 32)
VAL = 5000

TaskSet = Literal["g1", "g2"]
Flip = Literal["task", "always"]
Weights = Literal["paper", "exact"]
Measure = Literal["f1", "accuracy"]

# Where a generator of `seed` is for: the numbers that the authors of STG-MTL seed theirs with.
SPLITTING, COINS, FLIPS = 13, 61, 67
TRAIN, TEST = 0, 1  # the published parts

ANIMALS = (2, 3, 4, 5, 6, 7)
VEHICLES = (0, 1, 8, 9)
ODD = (1, 3, 5, 7, 9)
UPSIDE_DOWN = "upside-down"


class Published(NamedTuple):
    """What one published set is made of.

    Args:
        name: for messages.
        folder: in which its files lie.
        parts: names of the training files, and of the test files.
        names: the file with the names.
        fine: the key of the labels, and that of their names.
        coarse: the same of the superclasses; None: there are none.
    """

    name: str
    folder: str
    parts: tuple[tuple[str, ...], tuple[str, ...]]
    names: str
    fine: tuple[str, str]
    coarse: tuple[str, str] | None


TEN = Published(
    "cifar10",
    "cifar-10-batches-py",
    (tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",)),
    "batches.meta",
    ("labels", "label_names"),
    None,
)
HUNDRED = Published(
    "cifar100",
    "cifar-100-python",
    (("train",), ("test",)),
    "meta",
    ("fine_labels", "fine_label_names"),
    ("coarse_labels", "coarse_label_names"),
)


class Part(NamedTuple):
    """n images of a published part: (n, 3, 32, 32) uint8; labels (n,), one row a key."""

    images: np.ndarray
    labels: dict[str, np.ndarray]


def cifar10(
    root: str | Path | None = None,
    seed: int = 0,
    *,
    tasks: TaskSet = "g1",
    train: int | None = None,
    val: int = VAL,
    test: int | None = None,
    pos_weight: Weights | None = "paper",
    flip: Flip = "task",
    metric: Measure = "f1",
) -> Data:
    """CIFAR-10 as 10 or 15 binary tasks (STG-MTL, section 4.1: G1 and G2).

    "g1" asks for each of the ten classes, is it this or another? "g2" adds five: `living` (an
    animal), `odd` (the label is odd), `upside-down` (half of the images are flipped top to bottom;
    is this one?), `not-living` (a vehicle), `random` (a fair coin for each image, which cannot be
    learned).

    The published training images are split here, class by class, into training and validation.
    A smaller split is a part of a larger one, and which images are flipped, and their coins, are
    theirs whatever the sizes. The authors' code seeds its draws with 13 (split), 61 (coins) and
    67 (flips); here `seed` and these numbers together seed three generators, so the draws
    are others.

    Args:
        root: folder that holds cifar-10-batches-py with the published files, or that folder.
        seed: of the split, the flips and the coins; no run's seed.
        tasks: "g1" or "g2".
        train: images to train on; None: all that are not held out for validation.
        val: published training images that are held out.
        test: published test images; None: all.
        pos_weight: how much a positive sample counts in the loss of its task. "paper": 10 for the
            classes and 1 for the five others; "exact": negative samples over positive samples of
            the training split; None: 1.
        flip: "task": images are flipped where `upside-down` is a task; "always": also in "g1",
            as the authors' code does.
        metric: "f1" of the positive class, or "accuracy".

    Returns:
        Inputs (N, 3, 32, 32) float32 in [0, 1]; targets (N,) float32, 0 or 1. `groups` names
        the animals and the vehicles among the classes.

    Raises:
        DataError: files are missing or damaged.
        ValueError: sizes that the set does not have.
    """
    return _build(
        TEN, root, seed, (train, val, test), pos_weight, metric, 10.0, tasks == "g2", flip
    )


def cifar100(
    root: str | Path | None = None,
    seed: int = 0,
    *,
    train: int | None = None,
    val: int = VAL,
    test: int | None = None,
    pos_weight: Weights | None = "paper",
    metric: Measure = "f1",
) -> Data:
    """CIFAR-100 as 100 binary tasks (STG-MTL, section 4.1: G3): is it this class or another?

    Sizes, split and `seed` are as in `cifar10`. The 20 superclasses are no tasks: they are the
    `groups` of the data, to judge a grouping by.

    Args:
        root: folder that holds cifar-100-python with the published files, or that folder.
        seed: of the split; no run's seed.
        train: images to train on; None: all that are not held out for validation.
        val: published training images that are held out.
        test: published test images; None: all.
        pos_weight: "paper": 99, which is also exact for the whole set; "exact": negative samples
            over positive samples of the training split; None: 1.
        metric: "f1" of the positive class, or "accuracy".

    Returns:
        Inputs (N, 3, 32, 32) float32 in [0, 1]; targets (N,) float32, 0 or 1.

    Raises:
        DataError: files are missing or damaged.
        ValueError: sizes that the set does not have.
    """
    return _build(HUNDRED, root, seed, (train, val, test), pos_weight, metric, 99.0, False, "task")


def _build(
    source: Published,
    root: str | Path | None,
    seed: int,
    sizes: tuple[int | None, int, int | None],
    weights: Weights | None,
    metric: Measure,
    weight: float,
    more: bool,
    flip: Flip,
) -> Data:
    for name, size in zip(("train", "val", "test"), sizes, strict=True):
        if size is not None and size < 1:
            raise ValueError(f"{source.name}: {name} is {size}; give 1 or more.")
    folder = find(source, root)
    names = _names(source, folder)
    parts = [read(source, folder, part, len(names[0])) for part in (TRAIN, TEST)]
    train, val, test = _chosen(source, [p.labels[source.fine[0]] for p in parts], sizes, seed)

    flips = more or flip == "always"
    splits = []
    for part, members in ((TRAIN, train), (TRAIN, val), (TEST, test)):
        images, labels = parts[part].images[members], parts[part].labels[source.fine[0]]
        flipped = np.random.default_rng([seed, FLIPS, part]).permutation(len(labels)) % 2 == 1
        coins = np.random.default_rng([seed, COINS, part]).integers(2, size=len(labels)) == 1
        if flips:
            upside_down = flipped[members]
            images[upside_down] = images[upside_down, :, ::-1]
        truth = {name: labels[members] == i for i, name in enumerate(names[0])}
        if more:
            truth |= {
                "living": np.isin(labels[members], ANIMALS),
                "odd": np.isin(labels[members], ODD),
                UPSIDE_DOWN: flipped[members],
                "not-living": np.isin(labels[members], VEHICLES),
                "random": coins[members],
            }
        targets = {name: torch.from_numpy(values).float() for name, values in truth.items()}
        splits.append(Split(torch.from_numpy(images), targets))

    given = {name: weight if weights and name in names[0] else 1.0 for name in splits[0].targets}
    if weights == "exact":
        given = {name: balance(name, target) for name, target in splits[0].targets.items()}
    return Data(
        source.name,
        tuple(Task.binary(name, pos_weight=w, metric=metric) for name, w in given.items()),
        *splits,
        input_shape=SHAPE,
        description=f"colour photographs, 32 x 32 pixels; {len(given)} binary tasks: which of "
        f"{len(names[0])} classes{', and five more' if more else ''}",
        groups=_groups(source, names, parts[TRAIN]),
    )


def find(source: Published, root: str | Path | None) -> Path:
    """The folder of the published files below `root`.

    Raises:
        DataError: one is not there; says where they are expected and how to get them.
    """
    files = [*(name for part in source.parts for name in part), source.names]
    get = f"get the python version from {URL} and unpack it"
    if root is None:
        raise DataError(
            f"{source.name} needs --data-root, a folder that holds {source.folder}; {get}."
        )
    below, itself = Path(root) / source.folder, Path(root)
    lacking = {
        folder: [name for name in files if not (folder / name).is_file()]
        for folder in (below, itself)
    }
    for folder, missing in lacking.items():
        if not missing:
            return folder
    for folder, missing in lacking.items():
        if folder == below and folder.is_dir() or len(missing) < len(files):
            raise DataError(f"{source.name}: {folder} has no {missing[0]}; {get}.")
    raise DataError(f"{source.name}: {itself} has no {source.folder}; {get}.")


def read(source: Published, folder: Path, part: int, classes: int) -> Part:
    """The images and labels of a published part, file after file.

    Raises:
        DataError: a file is damaged, or holds something else.
    """
    keys = [key for key, _ in filter(None, (source.fine, source.coarse))]
    images, labels = [], {key: [] for key in keys}
    for name in source.parts[part]:
        path = folder / name
        found = pickled.read(path, URL)
        pixels = found.get("data")
        if not isinstance(pixels, np.ndarray) or pixels.shape[1:] != (int(np.prod(SHAPE)),):
            raise pickled.damaged(path, "has no data of 3072 bytes an image", URL)
        images.append(pixels)
        for key in keys:
            most = classes if key == source.fine[0] else 20
            labels[key].append(_labels(path, found, key, len(pixels), most))
    pixels = np.concatenate(images).reshape(-1, *SHAPE)
    return Part(pixels, {key: np.concatenate(rows) for key, rows in labels.items()})


def _labels(path: Path, found: Mapping[str, Any], key: str, number: int, most: int) -> np.ndarray:
    rows = found.get(key)
    if not isinstance(rows, list) or any(type(row) is not int for row in rows):
        raise pickled.damaged(path, f"has no list of numbers under {key!r}", URL)
    if len(rows) != number:
        raise pickled.damaged(path, f"has {number} images, but {len(rows)} {key}", URL)
    if rows and not 0 <= min(rows) <= max(rows) < most:
        wrong = min(rows) if min(rows) < 0 else max(rows)
        raise pickled.damaged(path, f"has {wrong} among its {key}, which go to {most - 1}", URL)
    return np.array(rows, np.int64)


def _names(source: Published, folder: Path) -> list[list[str]]:
    """The names of the classes, and those of the superclasses where there are some."""
    path = folder / source.names
    found = pickled.read(path, URL)
    lists = []
    for (_, key), number in zip(
        filter(None, (source.fine, source.coarse)),
        (10,) if source.coarse is None else (100, 20),
        strict=True,
    ):
        names = found.get(key)
        if not isinstance(names, list) or len(set(map(pickled.text, names))) != number:
            raise pickled.damaged(path, f"has no {number} different names under {key!r}", URL)
        lists.append([pickled.text(name) for name in names])
    return lists


def _chosen(
    source: Published,
    labels: Sequence[np.ndarray],
    sizes: tuple[int | None, int, int | None],
    seed: int,
) -> list[np.ndarray]:
    """Which published images make training, validation (of TRAIN) and test.

    In an order that any beginning and any end of has the classes in their proportions:
    training takes the beginning, validation the end.
    """
    train, val, test = sizes
    orders = []
    for part, found in enumerate(labels):
        drawn = np.random.default_rng([seed, SPLITTING, part]).permutation(len(found))
        place = np.empty(len(found))
        for label in np.unique(found):
            members = drawn[found[drawn] == label]
            place[members] = (np.arange(len(members)) + 0.5) / len(members)
        orders.append(drawn[np.argsort(place[drawn], kind="stable")])
    ours, theirs = orders
    room = len(ours) - val
    wanted = room if train is None else train
    if wanted < 1 or wanted > room:
        raise ValueError(
            f"{source.name}: train is {show_value(train)} and val {val}, but there are "
            f"{len(ours)} training images; give sizes that fit."
        )
    tested = len(theirs) if test is None else test
    if not 1 <= tested <= len(theirs):
        raise ValueError(
            f"{source.name}: test is {show_value(test)}, but there are {len(theirs)} test "
            "images; give a number that fits."
        )
    return [ours[:wanted], ours[room:], theirs[:tested]]


def _groups(
    source: Published, names: Sequence[Sequence[str]], part: Part
) -> dict[str, tuple[str, ...]]:
    """The tasks that belong together: animals and vehicles, or the published superclasses."""
    fine = names[0]
    if source.coarse is None:
        return {
            "animals": tuple(fine[i] for i in ANIMALS),
            "vehicles": tuple(fine[i] for i in VEHICLES),
        }
    classes, above = (part.labels[key] for key, _ in (source.fine, source.coarse))
    pairs = sorted(set(zip(above.tolist(), classes.tolist(), strict=True)))
    return {
        name: tuple(fine[j] for i, j in pairs if i == number)
        for number, name in enumerate(names[1])
    }
