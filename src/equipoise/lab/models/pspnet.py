"""ResNet-50 that keeps an eighth of the resolution, with a PSPNet decoder for each task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equipoise.errors import EquipoiseError
from equipoise.lab.data.base import Data
from equipoise.lab.models.fit import images, pixelwise
from equipoise.trunk import SharedTrunk

EXPANSION = 4  # a block of ResNet-50 gives out this many times the channels that it works with
STAGES = ((3, 1, 1), (4, 2, 1), (6, 1, 2), (3, 1, 4))  # blocks, stride, dilation
BINS = (1, 2, 3, 6)  # of the pyramid: cells along a side
CLASSIFIER = "fc."  # the part of a published file that is for ImageNet's classes
COUNTERS = "num_batches_tracked"  # which older files do not have
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, that the weights expect


class WeightsError(EquipoiseError, ValueError):
    """A file with weights that is not there, or does not fit."""


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions and a way around them; He et al. (2016), fig. 5 right.

    Args:
        channels: of the input.
        width: channels of the 3 x 3 convolution; a quarter of those of the output.
        stride: of the 3 x 3 convolution.
        dilation: of the 3 x 3 convolution.
    """

    def __init__(self, channels: int, width: int, stride: int, dilation: int) -> None:
        super().__init__()
        out = EXPANSION * width
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU()
        self.downsample = (
            nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
            if stride != 1 or channels != out
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) -> (B, 4 width, ceil(h / stride), ceil(w / stride))."""
        around = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.relu(self.bn3(self.conv3(x)) + around)


class DilatedResNet50(nn.Module):
    """Images (B, channels, h, w) in [0, 1] -> features (B, 32 width, ceil(h / 8), ceil(w / 8)).

    He et al., "Deep residual learning for image recognition" (2016), table 1, without the mean and
    the classifier; the last two stages widen their 3 x 3 convolutions (dilation 2 and 4; the first
    block of each that of the stage before) instead of halving the resolution, as in Zhao et al.,
    "Pyramid scene parsing network" (2017), section 3.2. Images of three channels are brought to
    the mean and spread of ImageNet's. Parameters have the names of torchvision's resnet50, so that
    its files fit.

    Args:
        channels: of the images.
        width: channels of the stem; 64 in the paper.

    Raises:
        ValueError: a width below 1.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int, width: int = 64) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width is {width}; give 1 or more.")
        mean, std = (MEAN, STD) if channels == 3 else ((0.0,), (1.0,))
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)
        self.conv1 = nn.Conv2d(channels, width, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        here, before = width, 1
        for i, (blocks, stride, dilation) in enumerate(STAGES):
            wide = width * 2**i
            layers = [Bottleneck(here, wide, stride, before)]
            here, before = EXPANSION * wide, dilation
            layers += [Bottleneck(here, wide, 1, dilation) for _ in range(blocks - 1)]
            self.add_module(f"layer{i + 1}", nn.Sequential(*layers))
        self.width = here
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, 32 width, ceil(h / 8), ceil(w / 8))."""
        x = (x - self.mean) / self.std
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for i in range(len(STAGES)):
            x = self.get_submodule(f"layer{i + 1}")(x)
        return x

    def load_published(self, path: str | Path) -> None:
        """Take the weights of a file in the form of torchvision's resnet50.

        The classifier of such a file is left out, and a file without the counters of BatchNorm
        will do. Nothing has changed if this raises.

        Raises:
            WeightsError: the file cannot be read, or its names or shapes are others.
        """
        found = _weights(path)
        mine = self.state_dict()
        given = {name: value for name, value in found.items() if not name.startswith(CLASSIFIER)}
        for name, value in given.items():
            if name not in mine:
                raise WeightsError(f"{path} has {name!r}, which ResNet-50 does not; {FORM}.")
            if value.shape != mine[name].shape:
                raise WeightsError(
                    f"{path} has {name!r} of shape {tuple(value.shape)} instead of "
                    f"{tuple(mine[name].shape)}; {FORM}, or another width."
                )
        for name in mine:
            if name not in given and not name.endswith(COUNTERS):
                raise WeightsError(f"{path} has no {name!r}; {FORM}.")
        self.load_state_dict({**mine, **given})


FORM = "give a state dict in the form of torchvision's resnet50"


def _weights(path: str | Path) -> Mapping[str, Tensor]:
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror or error}); {FORM}.") from error
    except Exception as error:  # a damaged file makes its reader fail in any way
        raise WeightsError(f"{path} is no file of weights, or is damaged; {FORM}.") from error
    if not isinstance(found, Mapping) or not all(isinstance(v, Tensor) for v in found.values()):
        raise WeightsError(f"{path} holds something else than tensors by name; {FORM}.")
    return found


class PyramidHead(nn.Module):
    """Features (B, channels, h, w) -> an answer for every pixel, (B, outputs, *size).

    Zhao et al. (2017), section 3.2 and fig. 3: the means over 1, 4, 9 and 36 cells, each brought to
    channels / 4 by a 1 x 1 convolution and enlarged again, beside the features; a 3 x 3 convolution
    to channels / 4, dropout, a 1 x 1 convolution, and bilinear enlargement. BatchNorm after each
    convolution but the last and that of the single cell, which in a batch of one image would have
    one number to normalise.

    Args:
        channels: of the features; a multiple of 4.
        outputs: channels of the answer.
        size: (height, width) of the answer.
    """

    def __init__(self, channels: int, outputs: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size
        quarter = channels // len(BINS)
        self.pyramid = nn.ModuleList(
            nn.Sequential(
                nn.AdaptiveAvgPool2d(bins),
                nn.Conv2d(channels, quarter, 1, bias=bins == 1),
                nn.Identity() if bins == 1 else nn.BatchNorm2d(quarter),
                nn.ReLU(),
            )
            for bins in BINS
        )
        self.answer = nn.Sequential(
            nn.Conv2d(2 * channels, quarter, 3, padding=1, bias=False),
            nn.BatchNorm2d(quarter),
            nn.ReLU(),
            nn.Dropout2d(0.1),
            nn.Conv2d(quarter, outputs, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        """(B, outputs, *size)."""
        small = [level(features) for level in self.pyramid]
        levels = [F.interpolate(x, features.shape[-2:], mode="bilinear") for x in small]
        answer = self.answer(torch.cat([features, *levels], 1))
        return F.interpolate(answer, self.size, mode="bilinear")


def resnet50_pspnet(data: Data, *, width: int = 64, weights: str | None = None) -> SharedTrunk:
    """A ResNet-50 trunk that keeps an eighth of the resolution, and a PSPNet decoder a task.

    Args:
        data: of images, whose tasks have an answer for every pixel.
        width: see `DilatedResNet50`.
        weights: a file with the trunk's weights to begin with, for example those trained on
            ImageNet: a state dict in the form of torchvision's resnet50. None: drawn.

    Raises:
        WeightsError: that file cannot be read, or does not fit.
        ValueError: inputs that are no images, a task without an answer for every pixel, or a
            width that cannot be.
    """
    channels, height, width_of_images = images(data, "PSPNet")
    pixelwise(data, "PSPNet")
    trunk = DilatedResNet50(channels, width)
    if weights is not None:
        trunk.load_published(weights)
    size = (height, width_of_images)
    heads = {task.name: PyramidHead(trunk.width, task.outputs, size) for task in data.tasks}
    return SharedTrunk(trunk, heads)
