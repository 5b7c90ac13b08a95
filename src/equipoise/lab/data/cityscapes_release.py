"""Cityscapes as it was released: classes, instances and disparity, read from the original files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from equipoise.lab.data import cache as kept
from equipoise.lab.data.base import Data, DataError
from equipoise.lab.data.cityscapes import held_out, probed, some, uninformed
from equipoise.lab.data.pixels import Augmentation, ReadSplit, Sample
from equipoise.lab.dense import Depth, Pooling, Segmentation
from equipoise.lab.offsets import Offsets, offsets

URL = "https://www.cityscapes-dataset.com"
GET = f"get leftImg8bit, gtFine and disparity from {URL}"
PARTS = ("train", "val")
KINDS = {  # folder, and the end of a file's name
    "image": ("leftImg8bit", "leftImg8bit.png"),
    "label": ("gtFine", "gtFine_labelIds.png"),
    "instance": ("gtFine", "gtFine_instanceIds.png"),
    "disparity": ("disparity", "disparity.png"),
}
NESTED = ("", "cityscapes", "Cityscapes")
IGNORE = -1
INSTANCES = 1000  # from here on, a number in instanceIds is that of one thing
CHUNK = 64  # images decoded at once

# The classes that are evaluated: number in labelIds, name, category.
CLASSES = (
    (7, "road", "flat"), (8, "sidewalk", "flat"), (11, "building", "construction"),
    (12, "wall", "construction"), (13, "fence", "construction"), (17, "pole", "object"),
    (19, "traffic light", "object"), (20, "traffic sign", "object"),
    (21, "vegetation", "nature"), (22, "terrain", "nature"), (23, "sky", "sky"),
    (24, "person", "human"), (25, "rider", "human"), (26, "car", "vehicle"),
    (27, "truck", "vehicle"), (28, "bus", "vehicle"), (31, "train", "vehicle"),
    (32, "motorcycle", "vehicle"), (33, "bicycle", "vehicle"),
)  # fmt: skip

Scene = dict[str, Path]
"""Kind -> the file."""


def cityscapes_release(
    root: str | Path | None = None,
    seed: int = 0,
    *,
    size: tuple[int, int] = (128, 256),
    classes: Literal[19, 7] = 19,
    train: int | None = None,
    val: int | None = None,
    test: int | None = None,
    augment: bool = True,
    pooling: Pooling = "pixels",
    cache: str | None = None,
) -> Data:
    """Street scenes (Cityscapes, CVPR 2016): classes, centres of instances, and disparity.

    The three tasks of Kendall et al. (CVPR 2018), on which the thesis about fast line search
    measures: "segmentation", "instances", the way from each pixel to the centre of the thing it is
    part of (see `equipoise.lab.offsets.Offsets`), and "disparity". The published test images have
    no answers; as everywhere the 500 of val/ are the test images here, and a tenth of the 2975 of
    train/, drawn at random, select a model.

    The first call shrinks every image once, and keeps the bytes in a file (see `cache`; 0.9 GB at
    the default size) that is mapped and not read into memory.

    Args:
        root: folder that holds leftImg8bit/, gtFine/ and disparity/, each with train/ and val/, or
            a folder cityscapes/ with them.
        seed: of the choice of the validation images, and of a part; no run's seed.
        size: (height, width) to which the 1024 x 2048 pixels are brought: images by a bilinear
            filter over all the pixels that a new one covers, answers by the pixel at the centre.
        classes: 19, those that are evaluated, or 7, their categories.
        train: images to train on; None: all that are not held out for validation.
        val: published training images that are held out; None: a tenth.
        test: test images; None: all.
        augment: scale, cut and mirror the training images, see
            `equipoise.lab.data.pixels.Augmentation`.
        pooling: "pixels": errors are means over all pixels of all images; "batches": means over
            batches of their means.
        cache: folder for the file; "off": none, images are decoded when they are needed. None:
            what the environment says in EQUIPOISE_CACHE, or else equipoise-cache below `root`,
            or if that cannot be written, equipoise in the user's cache folder.

    Returns:
        Inputs (N, 3, H, W) float32 in [0, 1]; targets "segmentation" (N, H, W) long, -1 where
        nothing is known, "instances" (N, 3, H, W) float32, see `Offsets`, and "disparity"
        (N, 1, H, W) float32, in pixels of the images as they are given out, 0 where it is not
        known.

    Raises:
        DataError: files are missing or damaged.
        ValueError: sizes that the set does not have.
    """
    if min(size) < 1:
        raise ValueError(f"cityscapes-release: size is {size}; give 1 pixel or more.")
    name = "cityscapes-release"
    base = find(root)
    scenes = {part: listed(base, part) for part in PARTS}
    ours, selecting = held_out(name, len(scenes["train"]), train, val, seed)
    chosen = {
        "train": (scenes["train"], ours),
        "val": (scenes["train"], selecting),
        "test": (
            scenes["val"],
            some(name, "test", len(scenes["val"]), test, [seed, 1]),
        ),
    }
    readers = {
        part: Scenes([of[place] for place in places], size) for part, (of, places) in chosen.items()
    }
    shrink = size[1] / readers["train"].frame[1]
    sources = _shrunk(readers, base, cache)
    read = {part: Reader(source, classes, shrink) for part, source in sources.items()}
    probes = [read["train"](i)[1] for i in probed(list(range(len(ours))))]
    disparity, relative = uninformed(
        np.concatenate([found["disparity"][found["disparity"] > 0].numpy() for found in probes])
    )
    ways = torch.cat([found["instances"][:2, found["instances"][2] > 0] for found in probes], 1)
    reach = float(ways.abs().sum(0).mean()) if ways.abs().sum() > 0 else 1.0
    variation = Augmentation(nearer=("disparity",), offsets=("instances",)) if augment else None
    return Data(
        name,
        (
            Segmentation("segmentation", names(classes)),
            Offsets("instances", reach, pooling),
            Depth("disparity", "px", disparity, pooling, relative_scale=relative),
        ),
        *(
            ReadSplit(read[part], range(len(places)), variation if part == "train" else None)
            for part, (_, places) in chosen.items()
        ),
        input_shape=(3, *size),
        description=f"street scenes, {size[0]} x {size[1]} pixels; {classes} classes, centres of "
        "instances, and disparity",
    )


def names(classes: int) -> tuple[str, ...]:
    """The names of the classes or of the categories, in the order of their numbers here."""
    if classes == len(CLASSES):
        return tuple(name for _, name, _ in CLASSES)
    return tuple(dict.fromkeys(category for _, _, category in CLASSES))


def mapped(classes: int) -> np.ndarray:
    """(256,) int64: number in labelIds -> number of the class or category here, or IGNORE."""
    table = np.full(256, IGNORE, np.int64)
    known = names(classes)
    for number, name, category in CLASSES:
        table[number] = known.index(name if classes == len(CLASSES) else category)
    return table


def find(root: str | Path | None) -> Path:
    """The folder below `root` that holds the three.

    Raises:
        DataError: it is not there; says where it is expected and how to get it.
    """
    expected = "a folder that holds leftImg8bit/, gtFine/ and disparity/"
    if root is None:
        raise DataError(f"cityscapes-release needs --data-root, {expected}; {GET}.")
    for base in (Path(root) / nested for nested in NESTED):
        if (base / "leftImg8bit").is_dir():
            for folder, _ in KINDS.values():
                for part in PARTS:
                    if not (base / folder / part).is_dir():
                        raise DataError(
                            f"cityscapes-release: there is no folder {base / folder / part}; {GET}."
                        )
            return base
    raise DataError(f"cityscapes-release: {root} is not {expected}; {GET}.")


def listed(base: Path, part: str) -> list[Scene]:
    """The scenes of a part, city by city.

    Raises:
        DataError: there are none, or one lacks a file; names it.
    """
    folder, ending = KINDS["image"]
    scenes = []
    for image in sorted((base / folder / part).glob(f"*/*_{ending}")):
        city, stem = image.parent.name, image.name[: -len(ending)]
        scene = {kind: base / f / part / city / f"{stem}{e}" for kind, (f, e) in KINDS.items()}
        for path in scene.values():
            if not path.is_file():
                raise DataError(f"cityscapes-release: {path} is missing; {GET}.")
        scenes.append(scene)
    if not scenes:
        raise DataError(
            f"cityscapes-release: {base / folder / part} has no images (CITY/*_{ending}); {GET}."
        )
    return scenes


class Raw(NamedTuple):
    """One scene as it is kept, all uint8: image (3, H, W), label (H, W), the others (H, W, 2).

    Two bytes are one number, the lower byte first.
    """

    image: np.ndarray
    label: np.ndarray
    instance: np.ndarray
    disparity: np.ndarray


class Scenes:
    """Scenes that are decoded when they are asked for.

    Args:
        scenes: their files.
        size: (height, width) to which they are brought.
    """

    def __init__(self, scenes: Sequence[Scene], size: tuple[int, int]) -> None:
        self.scenes, self.size = scenes, size
        self.frame = self.picture(0, "image").shape[:2]

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, place: int) -> Raw:
        """One scene."""
        return Raw(*(self.shrunk(place, kind) for kind in KINDS))

    def shrunk(self, place: int, kind: str) -> np.ndarray:
        """One picture of a scene, in the form of `Raw`.

        Raises:
            DataError: the file is no such picture, or is damaged.
        """
        from PIL import Image  # here, for `equipoise list` can do without

        found = self.picture(place, kind)
        height, width = self.size
        if kind == "image":
            image = Image.fromarray(found).resize((width, height), Image.Resampling.BILINEAR)
            return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
        rows, columns = (
            ((np.arange(new) + 0.5) * old / new).astype(int)
            for new, old in zip(self.size, found.shape, strict=True)
        )
        small = found[rows[:, None], columns]
        if kind == "label":
            return small.astype(np.uint8)
        return np.ascontiguousarray(small, "<u2").view(np.uint8).reshape(height, width, 2)

    def picture(self, place: int, kind: str) -> np.ndarray:
        """A file's pixels: (h, w, 3) for the image, else (h, w).

        Raises:
            DataError: the file is no such picture, is damaged, or has another size than the image.
        """
        from PIL import Image

        path = self.scenes[place][kind]
        try:
            with Image.open(path) as file:
                colours = kind == "image"
                found = np.asarray(file.convert("RGB") if colours else file)
        except (OSError, SyntaxError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise _damaged(path, f"cannot be read ({why})") from error
        if found.ndim != (3 if colours else 2):
            raise _damaged(path, "has colours instead of numbers")
        if not colours and (found.min() < 0 or found.max() > (255 if kind == "label" else 65535)):
            raise _damaged(path, f"holds numbers from {found.min()} to {found.max()}")
        if hasattr(self, "frame") and found.shape[:2] != self.frame:
            raise _damaged(path, f"has {found.shape[:2]} pixels instead of {self.frame}")
        return found


def _shrunk(
    readers: dict[str, Scenes], base: Path, cache: str | None
) -> dict[str, Callable[[int], Raw]]:
    """What gives the scenes of each part: the kept file, or where there can be none, the files."""
    height, width = readers["train"].size
    tails = {"image": (3, height, width), "label": (height, width)}
    shapes = {
        f"{part} {kind}": (len(scenes), *tails.get(kind, (height, width, 2)))
        for part, scenes in readers.items()
        for kind in KINDS
    }
    where = kept.folder(base, cache)
    # Not the bytes of the pictures, to hash which would take minutes at every start.
    lines = (
        f"{part} {path.relative_to(base)} {path.stat().st_size}"
        for part, scenes in readers.items()
        for scene in scenes.scenes
        for path in scene.values()
    )
    sizes = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    path = (
        None
        if where is None
        else where / kept.name("cityscapes", {"size": [height, width]}, [sizes])
    )

    def make() -> Iterator[np.ndarray]:
        kept.notices.warning(
            "Shrinking %d scenes of Cityscapes into %s, once ...",
            sum(map(len, readers.values())),
            path,
        )
        with ThreadPoolExecutor() as pool:
            for scenes in readers.values():
                for kind in KINDS:
                    for first in range(0, len(scenes), CHUNK):
                        places = range(first, min(first + CHUNK, len(scenes)))
                        yield from pool.map(lambda i, s=scenes, k=kind: s.shrunk(i, k), places)

    arrays = kept.stored(path, shapes, make)
    if arrays is None:
        return {part: scenes.__getitem__ for part, scenes in readers.items()}

    return {part: _Kept([arrays[f"{part} {kind}"] for kind in KINDS]).scene for part in readers}


class _Kept(NamedTuple):
    """The scenes of one part, as one array a kind."""

    columns: list[np.ndarray]

    def scene(self, place: int) -> Raw:
        return Raw(*(column[place] for column in self.columns))


class Reader:
    """Scenes as samples.

    Args:
        source: gives the scene at a place.
        classes: 19 or 7.
        shrink: how many pixels wide one original pixel is.
    """

    def __init__(self, source: Callable[[int], Raw], classes: int, shrink: float) -> None:
        self.source, self.shrink = source, shrink
        self.table = mapped(classes)

    def __call__(self, place: int) -> Sample:
        """One image and its answers."""
        raw = self.source(place)
        instance, stored = (_numbers(two) for two in (raw.instance, raw.disparity))
        # Published: 0 is unknown, another p means (p - 1) / 256 pixels.
        disparity = np.maximum(stored - 1, 0) / 256 * self.shrink
        things = torch.from_numpy(np.where(instance >= INSTANCES, instance, 0))
        return torch.from_numpy(raw.image.astype(np.float32) / 255), {
            "segmentation": torch.from_numpy(self.table[raw.label]),
            "instances": offsets(things),
            "disparity": torch.from_numpy(disparity[None].astype(np.float32)),
        }


def _numbers(two: np.ndarray) -> np.ndarray:
    """(H, W) int64 of (H, W, 2) bytes."""
    return two[..., 0].astype(np.int64) + 256 * two[..., 1].astype(np.int64)


def _damaged(path: Path, problem: str) -> DataError:
    return DataError(f"{path} {problem}; get it again from {URL}.")
