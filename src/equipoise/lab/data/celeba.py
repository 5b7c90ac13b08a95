"""CelebA: photographs of faces, 40 binary attributes, read from the published files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from equipoise.lab.data import cache as kept
from equipoise.lab.data.base import Data, DataError, Split
from equipoise.lab.data.weights import balance
from equipoise.lab.tasks import Task

URL = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
NAMES = (  # with the published folders in which they may lie
    ("img_align_celeba", "Img"),
    ("list_attr_celeba.txt", "Anno"),
    ("list_eval_partition.txt", "Eval"),
)
NESTED = ("", "celeba", "CelebA")  # folders below the root that may hold everything
PARTS = ("train", "val", "test")  # in the partition file: 0, 1, 2
TRUTH = {"-1": 0, "1": 1}
CHUNK = 512  # images decoded at once


class Files(NamedTuple):
    """Where the published files are."""

    images: Path
    attributes: Path
    partition: Path


def celeba(
    root: str | Path | None = None,
    seed: int = 0,
    *,
    size: int | tuple[int, int] = 64,
    crop: int | tuple[int, int] | None = None,
    train: int | None = None,
    val: int | None = None,
    test: int | None = None,
    pos_weight: Literal["exact"] | None = None,
    metric: Literal["accuracy", "f1"] = "accuracy",
    cache: str | None = None,
) -> Data:
    """Faces, and 40 binary tasks: the attributes of CelebA (Liu et al., ICCV 2015).

    The aligned and cropped photographs of 178 x 218 pixels, in the published partition: 162770
    for training, 19867 for validation, 19962 for test.

    The first call decodes and shrinks every image once, and keeps the bytes in a file (see
    `cache`; 2.5 GB at the default size) that is mapped and not read into memory. Decoding takes
    about a millisecond a photograph, which is minutes an epoch, and in 100 epochs each one would
    be decoded a hundred times.

    Args:
        root: folder that holds img_align_celeba/ with the photographs, list_attr_celeba.txt and
            list_eval_partition.txt, or a folder celeba/ with the three. The published folders
            Img/, Anno/ and Eval/ in between may be there or not.
        seed: of the choice of images where a split is limited; no run's seed.
        size: side to which the images are brought, or (height, width), by a bilinear filter over
            all the pixels that a new one covers.
        crop: side, or (height, width), of the part around the centre that is kept before; None:
            the whole image, which a square `size` makes wider than it was.
        train: as many images of the training split, drawn at random, a smaller number being a
            part of a larger; None: all.
        val: the same of the validation split.
        test: the same of the test split.
        pos_weight: how much a positive sample counts in the loss of its task. "exact": negative
            samples over positive samples of the training split, as G4 of STG-MTL has it (arXiv
            2307.03374); None: 1.
        metric: "accuracy", or "f1" of the positive class.
        cache: folder for the file; "off": none, images are decoded when they are needed. None:
            what the environment says in EQUIPOISE_CACHE, or else equipoise-cache below `root`,
            or if that cannot be written, equipoise in the user's cache folder.

    Returns:
        Inputs (N, 3, height, width) float32 in [0, 1]; targets (N,) float32, 0 or 1.

    Raises:
        DataError: files are missing or damaged.
        ValueError: a split without an image, or a size or a crop that cannot be.
    """
    limits = (train, val, test)
    for part, limit in zip(PARTS, limits, strict=True):
        if limit is not None and limit < 1:
            raise ValueError(f"celeba: {part} is {limit}; give 1 or more, or none for all.")
    for option, value in (("size", size), ("crop", crop)):
        if value is not None and min(_both(value)) < 1:
            raise ValueError(f"celeba: {option} is {value}; give 1 pixel or more.")
    files = find(root)
    names, truth = attributes(files.attributes)
    parts = partition(files.partition, truth, files.attributes)
    chosen = [
        _limited(found, limit, [seed, i])
        for i, (found, limit) in enumerate(zip(parts, limits, strict=True))
    ]
    sizes = present(files.images, [image for images in chosen for image in images])
    height, width = _both(size)
    shapes = {
        part: (len(images), 3, height, width) for part, images in zip(PARTS, chosen, strict=True)
    }
    read = [Photographs(files.images, images, (height, width), crop) for images in chosen]

    where = kept.folder(files.images.parent, cache)
    # Not the bytes of the photographs, to hash which would take a minute at every start.
    sources = (*map(kept.checksum, files[1:]), sizes)
    parameters = {"size": (height, width), "crop": crop}
    path = None if where is None else where / kept.name("celeba", parameters, sources)

    def make() -> Iterator[np.ndarray]:
        number = sum(map(len, chosen))
        kept.notices.warning("Decoding %d photographs of CelebA into %s, once ...", number, path)
        with ThreadPoolExecutor() as pool:
            for photographs in read:
                yield from photographs.chunks(pool)

    arrays = kept.stored(path, shapes, make)
    splits = []
    for part, images, photographs in zip(PARTS, chosen, read, strict=True):
        labels = torch.frombuffer(bytearray(b"".join(truth[i] for i in images)), dtype=torch.uint8)
        columns = labels.reshape(len(images), len(names)).float().T.contiguous()
        inputs = photographs if arrays is None else torch.from_numpy(arrays[part])
        splits.append(Split(inputs, dict(zip(names, columns, strict=True))))
    given = {
        name: 1.0 if pos_weight is None else balance(name, target)
        for name, target in splits[0].targets.items()
    }
    return Data(
        "celeba",
        tuple(Task.binary(name, pos_weight=w, metric=metric) for name, w in given.items()),
        *splits,
        input_shape=(3, height, width),
        description=f"photographs of faces, {height} x {width} pixels; {len(names)} binary tasks",
    )


class Photographs:
    """N images that are decoded when they are asked for: uint8 (3, height, width) each.

    Args:
        folder: where they are.
        names: of the files.
        size: (height, width) to which they are brought.
        crop: what is kept of the middle before, side or (height, width); None: everything.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        size: tuple[int, int],
        crop: int | tuple[int, int] | None = None,
    ) -> None:
        self.folder, self.names, self.size, self.crop = folder, names, size, crop

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Tensor | Sequence[int] | int) -> Tensor:
        """The images (B, 3, height, width) at several indices, or (3, height, width) at an int."""
        places = torch.as_tensor(index)
        if places.ndim == 0:
            return torch.from_numpy(self.decode(self.names[int(places)]))
        decoded = [self.decode(self.names[i]) for i in places.tolist()]
        return torch.from_numpy(np.stack(decoded))

    def chunks(self, pool: ThreadPoolExecutor) -> Iterator[np.ndarray]:
        """All images in order, up to CHUNK at once, decoded side by side."""
        names = iter(self.names)
        while chunk := list(islice(names, CHUNK)):
            yield np.stack(list(pool.map(self.decode, chunk)))

    def decode(self, name: str) -> np.ndarray:
        """One image (3, height, width).

        Raises:
            DataError: the file is no image, or is damaged.
            ValueError: the image is smaller than the crop.
        """
        from PIL import Image  # here, for `equipoise list` can do without

        path = self.folder / name
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            why = getattr(error, "strerror", None) or error  # without the path once more
            raise _damaged(path, f"cannot be read ({why})") from error
        if self.crop is not None:
            height, width = _both(self.crop)
            top, left = (image.height - height) // 2, (image.width - width) // 2
            if min(top, left) < 0:
                raise ValueError(
                    f"crop is {self.crop}, but {path} has {image.height} x {image.width} pixels; "
                    "give a smaller crop."
                )
            # Not resize(box=...), whose filter looks over the edges of the box.
            image = image.crop((left, top, left + width, top + height))
        height, width = self.size
        resized = image.resize((width, height), Image.Resampling.BILINEAR)
        return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))


def find(root: str | Path | None) -> Files:
    """The published files below `root`.

    Raises:
        DataError: some are not there; says where they are expected and how to get them.
    """
    get = f"get the aligned and cropped images and the two lists from {URL}"
    expected = "a folder that holds {}/, {} and {}".format(*(name for name, _ in NAMES))
    if root is None:
        raise DataError(f"celeba needs --data-root, {expected}; {get}.")
    lacking = ""
    for base in (Path(root) / nested for nested in NESTED):
        places = [[base / between / name for between in ("", middle)] for name, middle in NAMES]
        found = [next(filter(Path.exists, candidates), None) for candidates in places]
        if None not in found:
            return Files(*found)  # ty: ignore[invalid-argument-type]
        if any(found) and not lacking:
            missing = next(places[i] for i, path in enumerate(found) if path is None)
            packed = (path.with_name(f"{path.name}.zip") for path in missing)
            unpack = next((f"; unpack {path}" for path in packed if path.exists()), "")
            lacking = f"{base} has no {missing[0].name}{unpack}"
    raise DataError(f"celeba: {lacking or f'{root} is not {expected}'}; {get}.")


def attributes(path: Path) -> tuple[list[str], dict[str, bytes]]:
    """The names of the attributes, and for each image their truth, a byte 0 or 1 each.

    The file: the number of images, a line with the names, and for each image a line with its
    name and -1 or 1 for each attribute.

    Raises:
        DataError: the file has another form; names the line.
    """
    lines = _lines(path)
    names = lines[1].split() if len(lines) > 1 else []
    if not names or not lines[0].strip().isdigit():
        raise _damaged(path, "does not begin with a number and a line of names")
    truth = {}
    for number, line in enumerate(lines[2:], 3):
        image, *values = line.split()
        try:
            truth[image] = bytes([TRUTH[value] for value in values])
        except KeyError as error:
            raise _damaged(path, f"line {number} has {error}, not -1 or 1") from None
        if len(values) != len(names):
            raise _damaged(
                path, f"line {number} has {len(values)} values for {len(names)} attributes"
            )
    if len(truth) != int(lines[0]):
        raise _damaged(path, f"has {len(truth)} images instead of {int(lines[0])}")
    return names, truth


def partition(path: Path, truth: dict[str, bytes], other: Path) -> list[list[str]]:
    """The images of training, validation and test, in the order of the file.

    The file: for each image a line with its name and 0, 1 or 2.

    Raises:
        DataError: the file has another form, or lists other images than `truth`, which comes
            from the file `other`.
    """
    parts: dict[str, list[str]] = {"0": [], "1": [], "2": []}
    for number, line in enumerate(_lines(path), 1):
        fields = line.split()
        if len(fields) != 2 or fields[1] not in parts:
            raise _damaged(path, f"line {number} is no name with 0, 1 or 2")
        if fields[0] not in truth:
            raise _damaged(path, f"line {number} names {fields[0]}, which {other} does not")
        parts[fields[1]].append(fields[0])
    listed = [image for part in parts.values() for image in part]
    if len(set(listed)) != len(listed) or len(listed) != len(truth):
        raise _damaged(path, f"has {len(set(listed))} of the {len(truth)} images of {other}")
    for name, part in zip(PARTS, parts.values(), strict=True):
        if not part:
            raise _damaged(path, f"has no image for the {name} split")
    return list(parts.values())


def present(folder: Path, names: Sequence[str]) -> str:
    """A hash of the names and sizes of the files, which all have to be there.

    Raises:
        DataError: some are not; names the first.
    """
    with os.scandir(folder) as entries:
        sizes = {entry.name: entry.stat().st_size for entry in entries}
    missing = [name for name in names if name not in sizes]
    if missing:
        raise DataError(
            f"{folder} lacks {len(missing)} of {len(names)} images, {missing[0]} for one; get them "
            f"from {URL}."
        )
    text = "\n".join(f"{name} {sizes[name]}" for name in names)
    return hashlib.sha256(text.encode()).hexdigest()


def _limited(names: list[str], limit: int | None, seed: list[int]) -> list[str]:
    """As many of the names, drawn without replacement, in their order."""
    if limit is None or limit >= len(names):
        return names
    return [names[i] for i in sorted(np.random.default_rng(seed).permutation(len(names))[:limit])]


def _lines(path: Path) -> list[str]:
    """The lines that hold something."""
    try:
        return [line for line in path.read_text("ascii").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(path, f"cannot be read ({error})") from error


def _damaged(path: Path, problem: str) -> DataError:
    return DataError(f"{path} {problem}; get it again from {URL}.")


def _both(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width)."""
    return size if isinstance(size, tuple) else (size, size)
