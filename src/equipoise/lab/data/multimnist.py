"""MultiMNIST, MultiFashion and MultiFashion+MNIST, composed from the published single images.

The training images are split into those that training and those that validation pairs are made
of, the test images make the test pairs: no source image is in two splits.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from equipoise.lab.data import cache as kept
from equipoise.lab.data import idx
from equipoise.lab.data.base import Data, DataError, Split
from equipoise.lab.tasks import Task

Size = int | tuple[int, int]
Offset = tuple[int, int]
Overlap = Literal["max", "sum"]

PARTS = ("train", "val", "test")
HELD_OUT = 12  # every twelfth training image, class by class, is a validation image: 5000 of 60000
CHUNK = 4096  # pairs composed at once


class Geometry(NamedTuple):
    """Where the two images go; see `multimnist`."""

    canvas: Size
    left: Offset
    right: Offset
    overlap: Overlap
    resize: Size | None


def multimnist(
    root: str | Path | None = None,
    seed: int = 0,
    *,
    train: int = 120_000,
    val: int = 12_000,
    test: int = 20_000,
    canvas: Size = 36,
    left: Offset = (0, 0),
    right: Offset = (8, 8),
    overlap: Overlap = "max",
    resize: Size | None = None,
    cache: str | None = None,
) -> Data:
    """Two digits of MNIST on one canvas, and two tasks: which digit is "left", which is "right".

    Two images are drawn uniformly and independently, with replacement; one goes to the top-left,
    the other to the bottom-right. The sizes of training and test, and a canvas of 36 x 36, are
    those of the files of Lin et al. (Pareto multi-task learning, 2019), which F-MTL uses; a
    validation split these do not have. The pairs are drawn anew, so the images are not theirs.

    A smaller split is the beginning of a larger one. The first call keeps what it made in a file
    (see `cache`), which later calls map.

    Args:
        root: folder that holds MNIST/raw with the four published idx files, or MNIST, or raw.
        seed: of the held-out images and of the pairs. It is no run's seed: runs with different
            seeds see the same data unless it is changed here.
        train: pairs of training images.
        val: pairs of those training images, one in twelve, that are held out for it.
        test: pairs of test images.
        canvas: side of the canvas in pixels, or its (height, width).
        left: row and column of the first image's upper left corner.
        right: the same of the second image. `right=(6, 6), resize=28` is the geometry of Sener &
            Koltun (2018); `canvas=(28, 36), right=(0, 8)` moves the images sideways only, 4
            pixels to each side, as the thesis about fast line search does (with `train=60000,
            test=10000`).
        overlap: where both images are: "max", the larger of the two, or "sum", at most white.
        resize: side or (height, width) to which the canvas is brought at the end, each pixel
            that of the canvas at its centre; None: as it is.
        cache: folder for the file; "off": none. None: what the environment says in
            EQUIPOISE_CACHE, or else equipoise-cache below `root`, or if that cannot be written,
            equipoise in the user's cache folder.

    Returns:
        Inputs (N, 1, height, width) float32 in [0, 1]; targets (N,) long, the digits 0 to 9.

    Raises:
        DataError: files are missing or damaged.
        ValueError: a split without a sample, or an image that does not fit on the canvas.
    """
    geometry = Geometry(canvas, left, right, overlap, resize)
    pair = (idx.MNIST, idx.MNIST)
    return _build("multimnist", pair, root, seed, (train, val, test), geometry, cache)


def multifashion(
    root: str | Path | None = None,
    seed: int = 0,
    *,
    train: int = 120_000,
    val: int = 12_000,
    test: int = 20_000,
    canvas: Size = 36,
    left: Offset = (0, 0),
    right: Offset = (8, 8),
    overlap: Overlap = "max",
    resize: Size | None = None,
    cache: str | None = None,
) -> Data:
    """Two items of Fashion-MNIST on one canvas, and two tasks: which is "left", which "right".

    Everything else is as in `multimnist`; `root` holds FashionMNIST/raw, or is one of the two.
    """
    geometry = Geometry(canvas, left, right, overlap, resize)
    pair = (idx.FASHION, idx.FASHION)
    return _build("multifashion", pair, root, seed, (train, val, test), geometry, cache)


def multifashion_mnist(
    root: str | Path | None = None,
    seed: int = 0,
    *,
    train: int = 120_000,
    val: int = 12_000,
    test: int = 20_000,
    canvas: Size = 36,
    left: Offset = (0, 0),
    right: Offset = (8, 8),
    overlap: Overlap = "max",
    resize: Size | None = None,
    cache: str | None = None,
) -> Data:
    """An item of Fashion-MNIST and a digit of MNIST: "left" is the item, "right" the digit.

    Everything else is as in `multimnist`; `root` holds FashionMNIST/raw and MNIST/raw.
    """
    geometry = Geometry(canvas, left, right, overlap, resize)
    pair = (idx.FASHION, idx.MNIST)
    return _build("multifashion-mnist", pair, root, seed, (train, val, test), geometry, cache)


def _build(
    name: str,
    pair: tuple[idx.Source, idx.Source],
    root: str | Path | None,
    seed: int,
    sizes: tuple[int, int, int],
    geometry: Geometry,
    cache: str | None,
) -> Data:
    for part, size in zip(PARTS, sizes, strict=True):
        if size < 1:
            raise ValueError(f"{name}: {part} is {size}; give 1 or more.")
    files = {source: idx.find(source, root, name) for source in dict.fromkeys(pair)}
    sums = [
        kept.checksum(path) for parts in files.values() for two in parts.values() for path in two
    ]
    height, width = _both(geometry.resize or geometry.canvas)
    shapes = {
        f"{part} {what}": (size, 1, height, width) if what == "images" else (size, 2)
        for part, size in zip(PARTS, sizes, strict=True)
        for what in ("images", "labels")
    }

    def make() -> Iterator[np.ndarray]:
        sources = {source: split(source, found, seed, name) for source, found in files.items()}
        fits(geometry, [sources[source][0].images.shape[1:] for source in pair])
        kept.notices.warning("Composing %s, once ...", name)
        for part, size in enumerate(sizes):
            first, second = (sources[source][part] for source in pair)
            drawn = draw([len(first.labels), len(second.labels)], size, [seed, part])
            for chunk in np.split(drawn, range(CHUNK, size, CHUNK)):
                a, b = chunk.T
                yield compose(first.images[a], second.images[b], geometry)
            yield np.stack([first.labels[drawn[:, 0]], second.labels[drawn[:, 1]]], 1)

    parameters = {"seed": seed, "sizes": sizes, "held out": HELD_OUT, **geometry._asdict()}
    where = kept.folder(Path(root or "."), cache)
    path = None if where is None else where / kept.name(name, parameters, sums)
    arrays = kept.cached(path, shapes, make)
    splits = []
    for part in PARTS:
        labels = torch.from_numpy(arrays[f"{part} labels"]).long()
        targets = {"left": labels[:, 0].clone(), "right": labels[:, 1].clone()}
        splits.append(Split(torch.from_numpy(arrays[f"{part} images"]), targets))
    first, second = (source.title for source in pair)
    return Data(
        name,
        (
            Task.classification("left", pair[0].classes),
            Task.classification("right", pair[1].classes),
        ),
        *splits,
        input_shape=(1, height, width),
        description=f"two overlapping images, {first} at {geometry.left} and {second} at "
        f"{geometry.right} of a canvas of {' x '.join(map(str, _both(geometry.canvas)))}; "
        "two tasks: the class of each",
    )


def split(
    source: idx.Source, files: dict[str, tuple[Path, Path]], seed: int, wanted_by: str
) -> list[idx.Images]:
    """The images that training, validation and test pairs are made of.

    Raises:
        DataError: a file is damaged, or there are too few images.
    """
    images, labels = idx.labelled(source, files["train"])
    order = np.random.default_rng(seed).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    held_out = np.zeros(len(labels), bool)
    held_out[by_class[HELD_OUT - 1 :: HELD_OUT]] = True
    parts = [
        idx.Images(images[~held_out], labels[~held_out]),
        idx.Images(images[held_out], labels[held_out]),
        idx.labelled(source, files["test"]),
    ]
    for part, found in zip(PARTS, parts, strict=True):
        if not len(found.labels):
            raise DataError(
                f"{wanted_by}: {len(labels)} training and {len(parts[2].labels)} test images of "
                f"{source.title} leave none for the {part} split; get them from {source.url}."
            )
    return parts


def draw(numbers: list[int], size: int, seed: list[int]) -> np.ndarray:
    """(size, 2) places, uniform and independent below each of the two `numbers`."""
    return np.random.default_rng(seed).integers(numbers, size=(size, 2))


def fits(geometry: Geometry, frames: list[tuple[int, ...]]) -> None:
    """Raise ValueError where an image, each (height, width), does not fit on the canvas."""
    canvas = _both(geometry.canvas)
    if geometry.resize is not None and min(_both(geometry.resize)) < 1:
        raise ValueError(f"resize is {geometry.resize}; give sides of 1 pixel or more.")
    for side, corner, frame in zip(
        ("left", "right"), (geometry.left, geometry.right), frames, strict=True
    ):
        if any(not 0 <= c <= room - n for c, n, room in zip(corner, frame, canvas, strict=True)):
            raise ValueError(
                f"{side} is {corner}: an image of {frame[0]} x {frame[1]} pixels does not fit "
                f"there on a canvas of {canvas[0]} x {canvas[1]}; give a larger canvas or another "
                "corner."
            )


def compose(first: np.ndarray, second: np.ndarray, geometry: Geometry) -> np.ndarray:
    """The pictures of n pairs of images (n, h, w) uint8: (n, height, width) uint8."""
    layers = []
    for images, (row, column) in ((first, geometry.left), (second, geometry.right)):
        layer = np.zeros((len(images), *_both(geometry.canvas)), np.uint8)
        layer[:, row : row + images.shape[1], column : column + images.shape[2]] = images
        layers.append(layer)
    if geometry.overlap == "max":
        canvas = np.maximum(*layers)
    else:
        canvas = layers[0] + np.minimum(layers[1], 255 - layers[0])
    if geometry.resize is None:
        return canvas
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(int)
        for new, old in zip(_both(geometry.resize), canvas.shape[1:], strict=True)
    )
    return canvas[:, rows[:, None], columns]


def _both(size: Size) -> tuple[int, int]:
    """(height, width)."""
    return size if isinstance(size, tuple) else (size, size)
