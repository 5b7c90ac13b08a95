"""Cityscapes: street scenes with 7 classes and inverse depth, read from the usual arrays."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from equipoise.lab.data import npy
from equipoise.lab.data.base import Baseline, Data, DataError
from equipoise.lab.data.pixels import Augmentation, ReadSplit, Sample
from equipoise.lab.dense import Depth, Pooling, Segmentation

ARRAYS = "https://github.com/lorenmt/mtan"
CLASSES = ("flat", "construction", "object", "nature", "sky", "human", "vehicle")
PARTS = ("train", "val")
NESTED = ("", "cityscapes", "cityscapes2", "Cityscapes")  # below the root, where the two may be
LABELS = ("label_7", "label")
VAL = 0.1  # share of the published training images that select a model
PROBED = 64  # training images by which an answer that ignores the image is judged

BASELINE = Baseline(
    "older tables (means of batches)",
    {
        "segmentation": {"mIoU": 0.7401, "pixel accuracy": 0.9316},
        "depth": {"abs error": 0.0125, "rel error": 27.77},
    },
)
"""Single-task SegNet-MTAN as the code behind the tables since CAGrad (Liu et al., NeurIPS 2021) has
it, for example experiments/cityscapes of the authors of Nash-MTL and FAMO."""


def cityscapes(
    root: str | Path | None = None,
    seed: int = 0,
    *,
    train: int | None = None,
    val: int | None = None,
    test: int | None = None,
    augment: bool = True,
    pooling: Pooling = "pixels",
) -> Data:
    """Street scenes (Cityscapes, CVPR 2016): 7 classes and inverse depth for every pixel.

    The arrays of 128 x 256 pixels that the community prepared: 2975 images for training, 500
    others, which are the test images here as in all tables. A tenth of the training images, drawn
    at random, select a model. Images are read when they are needed.

    Args:
        root: folder with train/ and val/, each with image/, label_7/ or label/, and depth/, in
            which are 0.npy, 1.npy, ...: image (H, W, 3), label (H, W) with -1 where nothing is
            known, depth (H, W) or (H, W, 1), which is inverse, with 0 or less where it is not
            known. H x W is taken from the first.
        seed: of the choice of the validation images, and of a part; no run's seed.
        train: images to train on; None: all that are not held out for validation.
        val: published training images that are held out; None: a tenth.
        test: test images; None: all.
        augment: scale, cut and mirror the training images, see
            `equipoise.lab.data.pixels.Augmentation`. What is nearer looks larger: inverse depth is
            multiplied by the scale.
        pooling: "pixels": the errors of depth are means over all pixels of all images; "batches":
            means over batches of their means, as in older tables.

    Returns:
        Inputs (N, 3, H, W) float32; targets "segmentation" (N, H, W) long and "depth"
        (N, 1, H, W) float32, 0 where it is not known.

    Raises:
        DataError: files are missing or damaged.
        ValueError: sizes that the set does not have.
    """
    folders = find(root)
    size, numbers = look(folders)
    train_places, val_places = held_out("cityscapes", numbers["train"], train, val, seed)
    test_places = some("cityscapes", "test", numbers["val"], test, [seed, 1])
    read = {part: Arrays(folders[part], size) for part in PARTS}
    depths = [read["train"].depth(place) for place in probed(train_places)]
    scale, relative = uninformed(np.concatenate([depth[depth > 0] for depth in depths]))
    return Data(
        "cityscapes",
        (
            Segmentation("segmentation", CLASSES),
            Depth("depth", "", scale, pooling, relative_scale=relative),
        ),
        ReadSplit(
            read["train"], train_places, Augmentation(nearer=("depth",)) if augment else None
        ),
        ReadSplit(read["train"], val_places),
        ReadSplit(read["val"], test_places),
        input_shape=(3, *size),
        description=f"street scenes, {size[0]} x {size[1]} pixels; 7 classes and inverse depth",
        baseline=BASELINE,
    )


Folders = dict[str, dict[str, Path]]
"""Part -> kind ("image", "label", "depth") -> where its arrays are."""


def find(root: str | Path | None) -> Folders:
    """The arrays below `root`.

    Raises:
        DataError: they are not there; says where they are expected and how to get them.
    """
    expected = "a folder that holds train/ and val/, each with image/, label_7/ and depth/"
    get = f"get the arrays that {ARRAYS} links to"
    if root is None:
        raise DataError(f"cityscapes needs --data-root, {expected}; {get}.")
    for base in (Path(root) / nested for nested in NESTED):
        if not any((base / part).is_dir() for part in PARTS):
            continue
        found: Folders = {}
        for part in PARTS:
            label = next((n for n in LABELS if (base / part / n).is_dir()), LABELS[0])
            names = {"image": "image", "label": label, "depth": "depth"}
            found[part] = {kind: base / part / name for kind, name in names.items()}
            for folder in found[part].values():
                if not folder.is_dir():
                    raise DataError(f"cityscapes: there is no folder {folder}; {get}.")
        return found
    if (Path(root) / "leftImg8bit").is_dir():
        get = f"use --data cityscapes-release for the original files that are there, or {get}"
    raise DataError(f"cityscapes: {root} is not {expected}; {get}.")


def look(folders: Folders) -> tuple[tuple[int, int], dict[str, int]]:
    """(H, W), and how many images there are in each part; all files are looked at.

    Raises:
        DataError: one is missing, cut off or of another shape; names it.
    """
    first = npy.header(folders["train"]["image"] / "0.npy", AGAIN)
    if len(first) != 3:
        raise _other_shape(folders["train"]["image"] / "0.npy", first, "(H, W, 3)")
    size = first[0], first[1]
    fitting = {
        "image": [(*size, 3)],
        "label": [size, (*size, 1)],
        "depth": [size, (*size, 1)],
    }
    numbers = {}
    for part in PARTS:
        names = {kind: npy.numbered(folder) for kind, folder in folders[part].items()}
        number = max(map(len, names.values()))
        if not number:
            raise DataError(f"{folders[part]['image']} has no 0.npy; {AGAIN}.")
        for kind, folder in folders[part].items():
            for path in (folder / f"{i}.npy" for i in range(number)):
                if path.name not in names[kind]:
                    raise DataError(f"{path} is missing, of {number}; {AGAIN}.")
                shape = npy.header(path, AGAIN)
                if shape not in fitting[kind]:
                    raise _other_shape(path, shape, " or ".join(map(str, fitting[kind])))
        numbers[part] = number
    return (size[0], size[1]), numbers


class Arrays:
    """Reads the images of one part.

    Args:
        folders: kind -> where its arrays are.
        size: (H, W).
    """

    def __init__(self, folders: Mapping[str, Path], size: tuple[int, int]) -> None:
        self.folders, self.size = folders, size

    def __call__(self, place: int) -> Sample:
        """One image and its answers.

        Raises:
            DataError: a file is damaged, or holds what cannot be.
        """
        image, label = (self.array(kind, place) for kind in ("image", "label"))
        pixels = np.ascontiguousarray(np.moveaxis(image, -1, 0), np.float32)
        classes = label.reshape(self.size)
        if classes.min() < -1 or classes.max() >= len(CLASSES):
            wrong = classes.min() if classes.min() < -1 else classes.max()
            path = self.folders["label"] / f"{place}.npy"
            raise npy.damaged(path, f"holds {wrong:g}, not -1 to {len(CLASSES) - 1}", AGAIN)
        return torch.from_numpy(pixels / 255 if image.dtype == np.uint8 else pixels), {
            "segmentation": torch.from_numpy(classes.astype(np.int64)),
            "depth": torch.from_numpy(self.depth(place)),
        }

    def depth(self, place: int) -> np.ndarray:
        """Inverse depth (1, H, W) float32, 0 where it is not known."""
        return self.array("depth", place).reshape(1, *self.size).astype(np.float32).clip(0)

    def array(self, kind: str, place: int) -> np.ndarray:
        """The array in a file.

        Raises:
            DataError: it cannot be read.
        """
        return npy.load(self.folders[kind] / f"{place}.npy", AGAIN)


def probed(places: list[int]) -> list[int]:
    """At most PROBED of the places, evenly spread."""
    return places[:: max(1, len(places) // PROBED)][:PROBED]


def uninformed(found: np.ndarray) -> tuple[float, float]:
    """Mean absolute and mean relative error of an answer that is the mean of all numbers.

    1 and 1 if there are none, or all are the same.
    """
    found = found.astype(np.float64)
    error = np.abs(found - found.mean()) if len(found) else found
    if not error.any():
        return 1.0, 1.0
    return float(error.mean()), float((error / found).mean())


def held_out(
    name: str, number: int, train: int | None, val: int | None, seed: int
) -> tuple[list[int], list[int]]:
    """Which of `number` training images train, and which select a model; a tenth if None.

    Raises:
        ValueError: there are not as many.
    """
    wanted = max(1, round(VAL * number)) if val is None else val
    if not 1 <= wanted < number:
        raise ValueError(
            f"{name}: val is {wanted}, but there are {number} training images; give 1 or more, "
            "and leave some to train on."
        )
    order = np.random.default_rng([seed, 0]).permutation(number)
    rest = order[wanted:]
    if train is not None and not 1 <= train <= len(rest):
        raise ValueError(
            f"{name}: train is {train} and val {wanted}, but there are {number} training images; "
            "give sizes that fit."
        )
    return sorted(rest[:train].tolist()), sorted(order[:wanted].tolist())


def some(name: str, part: str, number: int, limit: int | None, seed: list[int]) -> list[int]:
    """As many of `number` images as wanted; all if None.

    Raises:
        ValueError: there are not as many.
    """
    if limit is not None and not 1 <= limit <= number:
        raise ValueError(
            f"{name}: {part} is {limit}, but there are {number} {part} images; give a number that "
            "fits."
        )
    return sorted(np.random.default_rng(seed).permutation(number)[:limit].tolist())


AGAIN = f"get it again from where {ARRAYS} links to"


def _other_shape(path: Path, shape: tuple[int, ...], expected: str) -> DataError:
    return npy.damaged(path, f"has shape {shape} instead of {expected}", AGAIN)
