"""Images with an answer for every pixel, read when they are needed, and varied while training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from equipoise.lab.data.base import Batch, Split

Sample = tuple[Tensor, dict[str, Tensor]]
"""An image (3, H, W) and the answers, each (H, W) or (channels, H, W)."""
Read = Callable[[int], Sample]


@dataclass(frozen=True)
class Augmentation:
    """A part of the image, enlarged to its size, and perhaps its mirror image.

    As in the scene-understanding tables: a scale of 1, 1.2 or 1.5, the place of the part and
    whether it is mirrored are drawn uniformly. What is nearer looks larger, so depth is divided by
    the scale; in a mirror the horizontal component of a normal, the first, turns around. The image
    is enlarged bilinearly, the answers by the nearest pixel, normals too: a mean of a known and an
    unknown direction, or of two directions across an edge, is the direction of no surface.

    Args:
        depths: answers to be divided by the scale.
        normals: answers whose first component changes its sign.
        nearer: answers to be multiplied by the scale, because they grow with what is nearer:
            inverse depth, disparity.
        offsets: answers whose first two components are distances down and to the right, in
            pixels: multiplied by the scale, and the second changes its sign.
        scales: one of these.
    """

    depths: tuple[str, ...] = ()
    normals: tuple[str, ...] = ()
    nearer: tuple[str, ...] = ()
    offsets: tuple[str, ...] = ()
    scales: tuple[float, ...] = (1.0, 1.2, 1.5)

    def __call__(self, sample: Sample, generator: np.random.Generator) -> Sample:
        """Vary one sample; what was given stays as it was."""
        image, answers = sample
        height, width = image.shape[1:]
        scale = self.scales[int(generator.integers(len(self.scales)))]
        rows, columns = int(height / scale), int(width / scale)
        top = int(generator.integers(height - rows + 1))
        left = int(generator.integers(width - columns + 1))
        mirrored = bool(generator.integers(2))

        def part(x: Tensor, smooth: bool = False) -> Tensor:
            cut = x[..., top : top + rows, left : left + columns]
            if cut.shape != x.shape:
                cut = _enlarged(cut, (height, width), smooth)
            return cut.flip(-1) if mirrored else cut

        varied = {name: part(answer) for name, answer in answers.items()}
        for name in self.depths:
            varied[name] = varied[name] / scale
        for name in self.nearer:
            varied[name] = varied[name] * scale
        for name in self.offsets:
            down, right, *rest = varied[name]
            varied[name] = torch.stack(
                [down * scale, right * (-scale if mirrored else scale), *rest]
            )
        if mirrored:
            for name in self.normals:
                first, rest = varied[name][:1], varied[name][1:]
                varied[name] = torch.cat([-first, rest])
        return part(image, smooth=True), varied


class ReadSplit(Split):
    """Samples that are read one by one, when a batch needs them.

    Args:
        read: gives the sample at a place.
        places: of the N samples.
        augmentation: varies the samples of a shuffled pass, with random numbers that depend on
            the seed of the pass and the place alone: not on the batch, nor on what was read before.
    """

    def __init__(
        self, read: Read, places: Sequence[int], augmentation: Augmentation | None = None
    ) -> None:
        self.read, self.places, self.augmentation = read, tuple(places), augmentation
        self.seed: int | None = None

    def __len__(self) -> int:
        return len(self.places)

    def seeded(self, shuffle_seed: int | None) -> ReadSplit:
        """The same samples, as they are in the pass with that seed."""
        if self.augmentation is None or shuffle_seed is None:
            return self
        varied = ReadSplit(self.read, self.places, self.augmentation)
        varied.seed = shuffle_seed
        return varied

    def __getitem__(self, index: Tensor | Sequence[int] | int) -> Batch:
        """The batch (B, ...) at several indices, or the one sample (...) at an int."""
        where = torch.as_tensor(index)
        if where.ndim == 0:
            return self._sample(self.places[int(where)])
        samples = [self._sample(self.places[i]) for i in where.tolist()]
        answers: Mapping[str, Tensor] = samples[0][1]
        return (
            torch.stack([image for image, _ in samples]),
            {name: torch.stack([found[name] for _, found in samples]) for name in answers},
        )

    def _sample(self, place: int) -> Sample:
        sample = self.read(place)
        if self.augmentation is None or self.seed is None:
            return sample
        return self.augmentation(sample, np.random.default_rng([self.seed, place]))


def _enlarged(x: Tensor, size: tuple[int, int], smooth: bool) -> Tensor:
    """(..., h, w) brought to (..., *size); integers by the nearest only."""
    if smooth:
        return F.interpolate(x[None], size, mode="bilinear", align_corners=True)[0]
    rows, columns = (
        torch.arange(new) * old // new for new, old in zip(size, x.shape[-2:], strict=True)
    )
    return x[..., rows[:, None], columns]
