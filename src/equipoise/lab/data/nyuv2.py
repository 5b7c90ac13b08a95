"""NYUv2: indoor scenes with segmentation, depth and surface normals, read from the usual arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from equipoise.lab.data import cache as kept
from equipoise.lab.data import npy
from equipoise.lab.data.base import Baseline, Data, DataError
from equipoise.lab.data.pixels import Augmentation, Read, ReadSplit, Sample
from equipoise.lab.dense import Depth, Normals, Pooling, Segmentation

ARRAYS = "https://github.com/lorenmt/mtan"
MIRROR = "https://huggingface.co/datasets/tanganke/nyuv2"
CLASSES = (
    "bed", "books", "ceiling", "chair", "floor", "furniture", "objects", "picture", "sofa",
    "table", "tv", "wall", "window",
)  # fmt: skip
PARTS = ("train", "val")  # of the files; validation and test images are both taken from "val"
NESTED = ("", "nyuv2", "NYUv2")  # folders below the root that may hold the two
KINDS = {"image": 3, "label": 0, "depth": 1, "normal": 3}  # channels, the last axis; 0: no axis
HELD_OUT, ALL = 197, 654  # of the published "val" images those that select a model

BASELINE = Baseline(
    "older tables (constants of the nash-mtl repository, experiments/nyuv2/utils.py, from CAGrad; "
    "means of batches)",
    {
        "segmentation": {"mIoU": 0.3830, "pixel accuracy": 0.6376},
        "depth": {"abs error": 0.6754, "rel error": 0.2780},
        "normals": {
            "mean angle": 25.01,
            "median angle": 19.21,
            "within 11.25 deg": 0.3014,
            "within 22.5 deg": 0.5720,
            "within 30 deg": 0.6915,
        },
    },
)
"""Single-task SegNet-MTAN as all tables since CAGrad (Liu et al., NeurIPS 2021) have it."""


def nyuv2(
    root: str | Path | None = None,
    seed: int = 0,
    *,
    augment: bool = True,
    pooling: Pooling = "pixels",
    cache: str | None = None,
) -> Data:
    """Indoor scenes (NYUv2): 13 classes, depth and surface normals for every pixel.

    The arrays that the community prepared of NYU Depth V2 (Silberman et al., ECCV 2012): 795
    images for training, 654 others. Of these 197 are drawn to select a model and the other 457
    to test it, as in Dai et al. (arXiv 2307.15429). Images are read when they are needed.

    Args:
        root: folder with train/ and val/, each with image/, label/, depth/ and normal/, in which
            are 0.npy, 1.npy, ...: image (H, W, 3), label (H, W) with -1 where nothing is known,
            depth (H, W, 1) in metres, normal (H, W, 3); H x W is 288 x 384 in the published files,
            and is taken from the first. Or folder of the parquet mirror, with train-*.parquet
            and val-*.parquet in it or in data/, which needs the package `datasets`.
        seed: of the choice of the validation images. The choice depends on it and on the number
            of images alone, and is written down, see `cache`.
        augment: scale, cut and mirror the training images, see
            `equipoise.lab.data.pixels.Augmentation`.
        pooling: "pixels": errors of depth and normals are means over all pixels of all images;
            "batches": means over batches of their means, as in older tables.
        cache: folder for the list of validation and test images; "off": it is not written. None:
            what the environment says in EQUIPOISE_CACHE, or else equipoise-cache below `root`, or
            if that cannot be written, equipoise in the user's cache folder.

    Returns:
        Inputs (N, 3, H, W) float32; targets "segmentation" (N, H, W) long, "depth" (N, 1, H, W)
        and "normals" (N, 3, H, W) float32, 0 where nothing is known.

    Raises:
        DataError: files are missing or damaged, or `datasets` is not installed for the mirror.
    """
    found = find(root)
    if found.parquet:
        readers, size = mirror(found)
    else:
        readers, size = arrays(found.folder)
    (train, number), (other, others) = (readers[part] for part in PARTS)
    chosen = held_out(others, seed)
    rest = [place for place in range(others) if place not in set(chosen)]
    where = kept.folder(found.folder, cache)
    path = None if where is None else where / f"nyuv2-split-{others}-seed{seed}.json"
    kept.write_down(path, {"val": chosen, "test": rest})
    variation = Augmentation(depths=("depth",), normals=("normals",)) if augment else None
    return Data(
        "nyuv2",
        (
            Segmentation("segmentation", CLASSES),
            Depth("depth", pooling=pooling),
            Normals("normals", pooling=pooling),
        ),
        ReadSplit(train, range(number), variation),
        ReadSplit(other, chosen),
        ReadSplit(other, rest),
        input_shape=(3, *size),
        description=f"indoor scenes, {size[0]} x {size[1]} pixels; 13 classes, depth and normals",
        baseline=BASELINE,
    )


class Found(NamedTuple):
    """Which form of the set is where."""

    folder: Path
    parquet: dict[str, list[str]]


def find(root: str | Path | None) -> Found:
    """The arrays or the mirror below `root`.

    Raises:
        DataError: neither is there; says where they are expected and how to get them.
    """
    get = f"get the arrays that {ARRAYS} links to, or the parquet files of {MIRROR}"
    expected = "a folder that holds train/ and val/, each with image/, label/, depth/ and normal/"
    if root is None:
        raise DataError(f"nyuv2 needs --data-root, {expected}; {get}.")
    for base in (Path(root) / nested for nested in NESTED):
        if any((base / part).is_dir() for part in PARTS):
            for folder in (base / part / kind for part in PARTS for kind in KINDS):
                if not folder.is_dir():
                    raise DataError(f"nyuv2: there is no folder {folder}; {get}.")
            return Found(base, {})
        for within in (base / "data", base):
            files = {part: sorted(map(str, within.glob(f"{part}-*.parquet"))) for part in PARTS}
            if any(files.values()):
                for part, there in files.items():
                    if not there:
                        raise DataError(f"nyuv2: {within} has no {part}-*.parquet; {get}.")
                return Found(base, files)
    raise DataError(f"nyuv2: {root} is not {expected}; {get}.")


Readers = dict[str, tuple[Read, int]]
"""Part -> what reads an image, and the number of images."""


def arrays(folder: Path) -> tuple[Readers, tuple[int, int]]:
    """The .npy files, all of which are looked at; their content is read later.

    Raises:
        DataError: one is missing, cut off or of another shape; names it.
    """
    path = folder / "train" / "image" / "0.npy"
    first = npy.header(path, _again())
    if len(first) != 3:
        raise _damaged(path, f"has shape {first} instead of (H, W, 3)")
    size: tuple[int, int] = first[0], first[1]
    readers: Readers = {}
    for part in PARTS:
        names = {kind: npy.numbered(folder / part / kind) for kind in KINDS}
        number = max(map(len, names.values()))
        if not number:
            raise DataError(f"nyuv2: {folder / part / 'image'} has no 0.npy; {_again()}.")
        for kind, there in names.items():
            for i in range(number):
                path = folder / part / kind / f"{i}.npy"
                if f"{i}.npy" not in there:
                    raise DataError(f"nyuv2: {path} is missing, of {number}; {_again()}.")
                _refuse_other_shape(path, npy.header(path, _again()), kind, size)
        readers[part] = Arrays(folder / part), number
    return readers, size


class Arrays:
    """Reads the images of one part."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, place: int) -> Sample:
        """One image and its answers.

        Raises:
            DataError: a file is damaged, or holds what cannot be.
        """
        found = {}
        for kind in KINDS:
            path = self.folder / kind / f"{place}.npy"
            try:
                found[kind] = np.load(path, allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise _damaged(path, f"cannot be read ({error})") from error
        return sample(found, lambda kind: str(self.folder / kind / f"{place}.npy"))


def sample(found: Mapping[str, np.ndarray], called: Any) -> Sample:
    """Image and answers as tensors, channels first.

    Args:
        found: kind -> array, channels last.
        called: says what a message calls the array of a kind.

    Raises:
        DataError: a number that cannot be.
    """
    tensors = {}
    for kind, array in found.items():
        if not np.isfinite(array).all():
            raise _damaged(called(kind), "holds numbers that are not finite")
        kept_as = np.int64 if kind == "label" else np.float32
        divisor = 255 if array.dtype == np.uint8 and kind == "image" else 1
        channels_first = array if kind == "label" else np.moveaxis(array, -1, 0)
        copied = np.array(channels_first, kept_as, order="C")
        tensors[kind] = torch.from_numpy(copied / divisor if divisor > 1 else copied).contiguous()
    labels: Tensor = tensors["label"]
    if labels.min() < -1 or labels.max() >= len(CLASSES):
        wrong = labels.min() if labels.min() < -1 else labels.max()
        raise _damaged(called("label"), f"holds {int(wrong)}, not -1 to {len(CLASSES) - 1}")
    if tensors["depth"].min() < 0:
        raise _damaged(called("depth"), f"holds {tensors['depth'].min():.3g}, a negative depth")
    return tensors["image"], {
        "segmentation": labels,
        "depth": tensors["depth"],
        "normals": tensors["normal"],
    }


def mirror(found: Found) -> tuple[Readers, tuple[int, int]]:
    """The parquet files, through `datasets`, which keeps a copy of them in its own cache.

    Raises:
        DataError: `datasets` is not installed, or a file or a column is damaged.
    """
    try:
        datasets = import_module("datasets")
    except ImportError:
        raise DataError(
            f"nyuv2: {found.folder} holds parquet files, which the package `datasets` reads; "
            "pip install datasets, or use the .npy arrays."
        ) from None
    try:
        tables = datasets.load_dataset("parquet", data_files=found.parquet).with_format("numpy")
    except Exception as error:  # of many kinds, and from several packages below
        raise DataError(
            f"nyuv2: the parquet files of {found.folder} cannot be read ({_line(error)}); get "
            f"them again from {MIRROR}."
        ) from error
    size = None
    readers: Readers = {}
    for part, table in tables.items():
        label = "segmentation" if "segmentation" in table.column_names else "label"
        columns = {"image": "image", "label": label, "depth": "depth", "normal": "normal"}
        for column in columns.values():
            if column not in table.column_names:
                raise DataError(
                    f"nyuv2: the {part} files of {found.folder} have no column {column!r}; "
                    f"get them again from {MIRROR}."
                )
        if not len(table):
            raise DataError(f"nyuv2: the {part} files of {found.folder} are empty.")
        reader = Rows(table, columns, f"{part} in {found.folder}", size)
        size = reader.size
        readers[part] = reader, len(table)
    assert size is not None, "load_dataset gives the parts that it was asked for"
    return readers, size


class Rows:
    """Reads the images of one part of the mirror, whose channels are the first axis.

    Args:
        table: as `datasets` has it, with numpy's format.
        columns: kind -> name.
        called: what messages call it.
        size: (H, W) of the images; None: that of the first.
    """

    def __init__(
        self,
        table: Any,
        columns: Mapping[str, str],
        called: str,
        size: tuple[int, int] | None = None,
    ) -> None:
        self.table, self.columns, self.called = table, columns, called
        height, width = np.shape(table[0][columns["image"]])[-2:]
        self.size = size or (height, width)

    def __call__(self, place: int) -> Sample:
        """One image and its answers."""
        row = self.table[place]
        found = {}
        for kind, column in self.columns.items():
            array = np.asarray(row[column])
            found[kind] = array if kind == "label" else np.moveaxis(array, 0, -1)
            where = f"row {place}, column {column}, of {self.called}"
            _refuse_other_shape(where, found[kind].shape, kind, self.size)
        return sample(
            found, lambda kind: f"row {place}, column {self.columns[kind]}, of {self.called}"
        )


def held_out(number: int, seed: int) -> list[int]:
    """Which of `number` images select a model: 197 of 654, and as large a share of others.

    Drawn by a hash, so that one seed gives everyone the same images, whatever is installed.
    """
    share = max(1, round(number * HELD_OUT / ALL))
    if share >= number:
        raise DataError(f"nyuv2: val/ has {number} image; 2 or more are needed.")
    order = sorted(
        range(number), key=lambda i: hashlib.sha256(f"nyuv2 {seed} {i}".encode()).digest()
    )
    return sorted(order[:share])


def _refuse_other_shape(
    path: object, shape: tuple[int, ...], kind: str, size: tuple[int, int]
) -> None:
    channels = KINDS[kind]
    expected = (*size, channels) if channels else size
    if tuple(shape) != expected:
        raise _damaged(path, f"has shape {tuple(shape)} instead of {expected}")


def _damaged(path: object, problem: str) -> DataError:
    return DataError(f"nyuv2: {path} {problem}; {_again()}.")


def _again() -> str:
    return f"get it again from where {ARRAYS} links to"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
