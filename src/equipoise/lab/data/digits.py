"""Two data sets made of scikit-learn's bundled handwritten digits; nothing is downloaded.

The source is `sklearn.datasets.load_digits`: 1797 real 8 x 8 images with 17 grey levels. They are
split into training, validation and test images first, class by class; every sample is composed of
images of its own split, so no source image is in two splits. Writers are not known in this set,
and may be in several.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from equipoise.lab.data.base import Data, Split
from equipoise.lab.tasks import Task

Interpolation = Literal["nearest", "bilinear"]
Sizes = tuple[int, int, int]

SHARES = (0.6, 0.15, 0.25)  # of the source images: training, validation, test
ATTRIBUTES = {
    "odd": (1, 3, 5, 7, 9),
    "large": (5, 6, 7, 8, 9),
    "prime": (2, 3, 5, 7),
    "loop": (0, 6, 8, 9),
    "straight": (1, 4, 7),
}


def multidigits(
    root: object = None,
    seed: int = 0,
    *,
    sizes: Sizes = (4000, 1000, 2000),
    canvas: int = 20,
    scale: int = 2,
    interpolation: Interpolation = "nearest",
) -> Data:
    """Two digits on one canvas, and two tasks: which digit is "left", which is "right".

    As MultiMNIST does it (Sabour et al. 2017; Sener & Koltun 2018): two images drawn uniformly and
    independently, one at the top-left, one at the bottom-right, the pixel-wise maximum where they
    overlap. The default, 16 on 20 pixels, has about the proportions of MultiMNIST's 28 on 36.

    Args:
        root: not used; the digits come with scikit-learn.
        seed: of the split and of the pairs. It is no run's seed: runs with different seeds see
            the same data unless it is changed here.
        sizes: pairs in training, validation and test.
        canvas: height and width of the canvas, in pixels.
        scale: factor by which the 8 x 8 images are enlarged.
        interpolation: "nearest" keeps the grey levels of the source, "bilinear" smooths.

    Returns:
        Inputs (N, 1, canvas, canvas) float32 in [0, 1]; targets (N,) long, the digits 0 to 9.

    Raises:
        ValueError: the enlarged digit does not fit on the canvas.
    """
    splits = []
    for part, (images, labels, _) in enumerate(sources(seed, scale, interpolation)):
        rng = np.random.default_rng([seed, part])
        left, right = torch.from_numpy(rng.integers(len(images), size=(2, sizes[part])))
        end = canvas - images.shape[-1]
        pairs = torch.maximum(
            place(images[left], canvas, (0, 0)), place(images[right], canvas, (end, end))
        )
        splits.append(Split(pairs.unsqueeze(1), {"left": labels[left], "right": labels[right]}))
    digits = tuple("0123456789")
    return Data(
        "multidigits",
        (Task.classification("left", digits), Task.classification("right", digits)),
        *splits,
        input_shape=(1, canvas, canvas),
        description="two overlapping real digits on one canvas, as in MultiMNIST; "
        "two tasks: the left and the right digit",
    )


def digits_attributes(
    root: object = None,
    seed: int = 0,
    *,
    sizes: Sizes = (4000, 1000, 2000),
    canvas: int = 20,
    scale: int = 2,
    interpolation: Interpolation = "nearest",
    missing: float = 0.0,
) -> Data:
    """One digit at a random place: five binary tasks, and its slant in degrees.

    The binary tasks are `ATTRIBUTES`: is the digit odd, large (5 or more), prime, written with a
    loop (0, 6, 8, 9), written with straight strokes (1, 4, 7)? The regression task "slant" is
    measured on each source image (see `slant`).

    Args:
        root: not used; the digits come with scikit-learn.
        seed: of the split, the draws, the places and the missing labels; no run's seed.
        sizes: samples in training, validation and test.
        canvas: height and width of the canvas, in pixels.
        scale: factor by which the 8 x 8 images are enlarged.
        interpolation: "nearest" keeps the grey levels of the source, "bilinear" smooths.
        missing: probability, in [0, 1), with which each label of training and validation is
            taken away (NaN), independently. The test labels stay complete.

    Returns:
        Inputs (N, 1, canvas, canvas) float32 in [0, 1]; targets (N,) float32: 0 or 1, and the slant
        standardised by its mean and standard deviation over the training source images.

    Raises:
        ValueError: the enlarged digit does not fit on the canvas, or `missing` is out of range.
    """
    if not 0 <= missing < 1:
        raise ValueError(f"missing is {missing}; give a share of the labels in [0, 1).")
    parts = sources(seed, scale, interpolation)
    slants = slant(parts[0].grey)
    task = Task.regression("slant", "deg", slants.mean().item(), slants.std().item())
    splits = []
    for part, (images, labels, grey) in enumerate(parts):
        rng = np.random.default_rng([seed, part])
        drawn = torch.from_numpy(rng.integers(len(images), size=sizes[part]))
        room = canvas - images.shape[-1] + 1
        corners = torch.from_numpy(rng.integers(max(room, 1), size=(sizes[part], 2)))
        targets = {
            name: torch.isin(labels[drawn], torch.tensor(digits)).float()
            for name, digits in ATTRIBUTES.items()
        }
        targets[task.name] = (slant(grey[drawn]) - task.mean) / task.scale
        if part < 2:
            for target in targets.values():
                target[torch.from_numpy(rng.random(len(target)) < missing)] = torch.nan
        splits.append(Split(place(images[drawn], canvas, corners).unsqueeze(1), targets))
    return Data(
        "digits-attributes",
        (*(Task.binary(name) for name in ATTRIBUTES), task),
        *splits,
        input_shape=(1, canvas, canvas),
        description="one real digit at a random place; five binary tasks "
        f"({', '.join(ATTRIBUTES)}) and one regression task (slant, in degrees)",
    )


class Source(NamedTuple):
    """The n source images of one split.

    images (n, s, s) float32 in [0, 1], enlarged; labels (n,) long; grey (n, 8, 8) float32, the
    images as scikit-learn has them, 0 to 16.
    """

    images: Tensor
    labels: Tensor
    grey: Tensor


def sources(seed: int, scale: int, interpolation: Interpolation) -> list[Source]:
    """Training, validation and test images in the proportions `SHARES`, split class by class."""
    # Here, not above: importing scikit-learn takes most of a second.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    train, rest = train_test_split(
        np.arange(len(digits.target)),
        train_size=SHARES[0],
        stratify=digits.target,
        random_state=seed,
    )
    val, test = train_test_split(
        rest,
        train_size=SHARES[1] / (SHARES[1] + SHARES[2]),
        stratify=digits.target[rest],
        random_state=seed,
    )
    grey = torch.from_numpy(digits.images).float()
    labels = torch.from_numpy(digits.target).long()
    images = F.interpolate(grey.unsqueeze(1) / 16, scale_factor=scale, mode=interpolation)
    images = images.squeeze(1)
    return [Source(images[part], labels[part], grey[part]) for part in (train, val, test)]


def place(images: Tensor, canvas: int, corners: Tensor | Sequence[int]) -> Tensor:
    """Put images (N, h, w) on black canvases (N, canvas, canvas).

    Args:
        images: the images.
        canvas: height and width of the canvas, in pixels.
        corners: (N, 2), or (2,) for all: row and column of each image's top-left pixel.

    Raises:
        ValueError: an image does not fit on the canvas.
    """
    n, height, width = images.shape
    if max(height, width) > canvas:
        raise ValueError(
            f"a digit of {height} x {width} pixels does not fit on a canvas of {canvas} x "
            f"{canvas}; give a larger canvas or a smaller scale."
        )
    row, column = torch.as_tensor(corners).expand(n, 2).unbind(1)
    placed = images.new_zeros(n, canvas, canvas)
    placed[
        torch.arange(n)[:, None, None],
        (row[:, None] + torch.arange(height))[:, :, None],
        (column[:, None] + torch.arange(width))[:, None, :],
    ] = images
    return placed


def slant(grey: Tensor) -> Tensor:
    """How far each image (N, h, w) leans to the right of upright, in degrees: (N,).

    The angle of the line through the ink's centre that gives the horizontal position as a function
    of the height, by least squares weighted with the grey values: tan(slant) = mu_xy / mu_yy with
    x to the right and y upward, mu the ink's central second moments.
    """
    height, width = grey.shape[1:]
    y = torch.arange(height, 0, -1, dtype=grey.dtype)[:, None]
    x = torch.arange(width, dtype=grey.dtype)
    ink = grey / grey.sum((1, 2), keepdim=True)
    y = y - (ink * y).sum((1, 2), keepdim=True)
    x = x - (ink * x).sum((1, 2), keepdim=True)
    return torch.rad2deg(torch.atan2((ink * x * y).sum((1, 2)), (ink * y * y).sum((1, 2))))
