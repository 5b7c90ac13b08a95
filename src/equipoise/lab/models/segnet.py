"""SegNet with a light head for each task, and with an attention module for each task (MTAN)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equipoise.lab.data.base import Data
from equipoise.lab.models.fit import images, pixelwise
from equipoise.trunk import SharedTrunk

CHANNELS = (1, 2, 4, 8, 8)  # of the five stages, times `width`
DEPTH = (2, 2, 3, 3, 3)  # 3 x 3 convolutions of the stages
MINIMUM = 2 ** len(CHANNELS)  # pixels, of which five poolings leave one

Features = dict[str, list[Tensor]]
"""What SegNet computes on its way, see `SegNet.forward`."""


def convolution(channels: int, width: int) -> nn.Sequential:
    """3 x 3 convolution, BatchNorm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
    )


class SegNet(nn.Module):
    """Images (B, 3, H, W) -> features (B, `width`, H, W).

    Badrinarayanan et al., "SegNet" (TPAMI 2017): the thirteen convolutions of VGG-16 in five
    stages, each followed by a 2 x 2 maximum that remembers its places; then the mirror image of
    that, in which values go back to the places they came from. In the scene-understanding tables
    it is trained from scratch, with 64, 128, 256, 512 and 512 channels; there, and here, the first
    convolution of a decoder stage is the one that changes the number of channels.

    Args:
        channels: of the images.
        width: channels of the first stage; 64 in the paper, which makes 24.9 million parameters.

    Raises:
        ValueError: a width below 1.
    """

    def __init__(self, channels: int = 3, width: int = 64) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width is {width}; give 1 or more.")
        widths = [width * factor for factor in CHANNELS]
        stages = list(zip([channels, *widths[:-1]], widths, DEPTH, strict=True))
        self.encoder = nn.ModuleList(_Stage(before, here, depth) for before, here, depth in stages)
        stages[0] = (width, width, DEPTH[0])
        self.decoder = nn.ModuleList(_Stage(here, before, depth) for before, here, depth in stages)
        self.widths = widths
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """The last features."""
        return self.features(images)["decoder"][-1]

    def features(self, images: Tensor) -> Features:
        """All that an attention module looks at; the decoder's in its order, from deep to shallow.

        Returns:
            "first": the first features of each encoder stage; "encoder": its last, before pooling;
            "upsampled": what each decoder stage begins with; "decoder": what it ends with.
        """
        found: Features = {"first": [], "encoder": [], "upsampled": [], "decoder": []}
        x, places = images, []
        for stage in self.encoder:
            first, last = stage(x)
            x, place = F.max_pool2d(last, 2, return_indices=True)
            places.append((place, last.shape[-2:]))
            found["first"].append(first)
            found["encoder"].append(last)
        for stage in reversed(self.decoder):
            place, size = places.pop()
            upsampled = F.max_unpool2d(x, place, [2, 2], output_size=size)
            _, x = stage(upsampled)
            found["upsampled"].append(upsampled)
            found["decoder"].append(x)
        return found


class _Stage(nn.Module):
    """`depth` convolutions, the first of which goes from `channels` to `width`."""

    def __init__(self, channels: int, width: int, depth: int) -> None:
        super().__init__()
        self.first = convolution(channels, width)
        self.rest = nn.Sequential(*(convolution(width, width) for _ in range(depth - 1)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, channels, h, w) -> what the first and what the last gives, (B, width, h, w)."""
        first = self.first(x)
        return first, self.rest(first)


class Attention(nn.Module):
    """What one task takes of SegNet's features -> its own features (B, width, H, W).

    Liu, Johns & Davison, "End-to-end multi-task learning with attention" (MTAN, CVPR 2019). In
    each stage a mask in (0, 1), made by two 1 x 1 convolutions of what the stage begins with and
    of the task's features so far, multiplies what the stage ends with (eq. 1); a 3 x 3 convolution
    brings the product to the next stage's channels.

    Args:
        widths: channels of the stages.
        between: the 3 x 3 convolutions, if they belong to others too; None: its own.
    """

    def __init__(self, widths: list[int], between: Between | None = None) -> None:
        super().__init__()
        below = [widths[0], *widths[:-1]]  # channels that the decoder stages end with
        self.encoder_masks = nn.ModuleList(
            _mask(w if i == 0 else 2 * w, w) for i, w in enumerate(widths)
        )
        self.decoder_masks = nn.ModuleList(
            _mask(w + b, b) for w, b in zip(widths, below, strict=True)
        )
        # In a list, which registers nothing, when the parameters are not this module's.
        self._between = [between or Between(widths)]
        if between is None:
            self.between = self._between[0]

    def forward(self, features: Features) -> Tensor:
        """The task's features (B, width, H, W)."""
        between = self._between[0]
        stages = zip(
            self.encoder_masks, features["first"], features["encoder"], between.encoder, strict=True
        )
        x = None
        for mask, first, last, onward in stages:
            seen = first if x is None else torch.cat([first, x], 1)
            x = F.max_pool2d(onward(mask(seen) * last), 2)
        assert x is not None
        stages = zip(
            reversed(self.decoder_masks),
            features["upsampled"],
            features["decoder"],
            reversed(between.decoder),
            strict=True,
        )
        for mask, upsampled, last, onward in stages:
            larger = F.interpolate(x, upsampled.shape[-2:], mode="bilinear", align_corners=True)
            x = mask(torch.cat([upsampled, onward(larger)], 1)) * last
        return x


class Between(nn.Module):
    """The 3 x 3 convolutions of MTAN between one stage's mask and the next."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        below, above = [widths[0], *widths[:-1]], [*widths[1:], widths[-1]]
        self.encoder = nn.ModuleList(convolution(w, a) for w, a in zip(widths, above, strict=True))
        self.decoder = nn.ModuleList(convolution(w, b) for w, b in zip(widths, below, strict=True))


class AttendedTrunk(nn.Module):
    """SegNet and the attention of all tasks; returns task -> features (B, width, H, W)."""

    def __init__(self, segnet: SegNet, tasks: tuple[str, ...]) -> None:
        super().__init__()
        self.segnet = segnet
        self.between = Between(segnet.widths)
        self.attention = nn.ModuleDict(
            {task: Attention(segnet.widths, self.between) for task in tasks}
        )
        _initialise(self)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The features of each task."""
        features = self.segnet.features(images)
        return {task: attention(features) for task, attention in self.attention.items()}


class FeatureTrunk(nn.Module):
    """SegNet, giving all that attention modules look at."""

    def __init__(self, segnet: SegNet) -> None:
        super().__init__()
        self.segnet = segnet

    def forward(self, images: Tensor) -> Features:
        """See `SegNet.features`."""
        return self.segnet.features(images)


class OfTask(nn.Module):
    """The part of the features that belongs to one task."""

    def __init__(self, task: str) -> None:
        super().__init__()
        self.task = task

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """(B, width, H, W)."""
        return features[self.task]


def segnet(data: Data, *, width: int = 64) -> SharedTrunk:
    """A SegNet trunk, and for each task a head of a 3 x 3 and a 1 x 1 convolution.

    Args:
        data: of images with answers for every pixel.
        width: see `SegNet`.

    Raises:
        ValueError: inputs that are no images or too small, or a task of another kind.
    """
    channels = _check(data, "segnet")
    trunk = SegNet(channels, width)
    return SharedTrunk(trunk, {task.name: head(width, task.outputs) for task in data.tasks})


def segnet_mtan(
    data: Data, *, width: int = 64, attention: Literal["head", "trunk"] = "head"
) -> SharedTrunk:
    """SegNet with an attention module for each task (MTAN).

    Args:
        data: of images with answers for every pixel.
        width: see `SegNet`.
        attention: "head": a task's attention is part of its head, so that the T gradients are
            those of what the tasks share, SegNet alone. "trunk": as in the code behind the tables,
            where all but the last two convolutions counts as shared and the 3 x 3 convolutions
            between the stages are the same for all tasks; a task's gradient is then 0 in the
            attention of the others. The second has fewer parameters.

    Raises:
        ValueError: inputs that are no images or too small, or a task of another kind.
    """
    channels = _check(data, "segnet-mtan")
    names = tuple(task.name for task in data.tasks)
    base = SegNet(channels, width)
    trunk: nn.Module
    if attention == "trunk":
        trunk, firsts = AttendedTrunk(base, names), [OfTask(name) for name in names]
    else:
        trunk, firsts = FeatureTrunk(base), [Attention(base.widths) for _ in names]
    heads = {
        task.name: nn.Sequential(first, head(width, task.outputs))
        for task, first in zip(data.tasks, firsts, strict=True)
    }
    for module in heads.values():
        _initialise(module)
    return SharedTrunk(trunk, heads)


def head(width: int, outputs: int) -> nn.Sequential:
    """Two convolutions, 3 x 3 and 1 x 1, with nothing between them, as in the tables' code."""
    layers = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, outputs, 1))
    _initialise(layers)
    return layers


def _mask(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 1),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, width, 1),
        nn.BatchNorm2d(width),
        nn.Sigmoid(),
    )


def _initialise(module: nn.Module) -> None:
    """Glorot & Bengio (2010), eq. 16 with normal draws; biases 0."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.xavier_normal_(part.weight)
            nn.init.zeros_(part.bias)  # ty: ignore[invalid-argument-type]


def _check(data: Data, name: str) -> int:
    channels, height, width = images(data, name)
    pixelwise(data, name)
    if min(height, width) < MINIMUM:
        raise ValueError(
            f"images of {height} x {width} pixels are too small for {name}; "
            f"it needs {MINIMUM} x {MINIMUM} or more."
        )
    return channels
