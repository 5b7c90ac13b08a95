"""ResNet-18 with a head for each task."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from equipoise.lab.data.base import Data
from equipoise.lab.models.fit import images, samplewise
from equipoise.trunk import SharedTrunk

Stem = Literal["standard", "small"]


class Block(nn.Module):
    """Two 3 x 3 convolutions and a way around them: ReLU(F(x) + shortcut(x)).

    He et al. (2016), eq. 1 and fig. 5 left. Where the shape changes the shortcut is a 1 x 1
    convolution (their option B), else the identity.
    """

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )
        self.relu = nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        """(B, channels, h, w) -> (B, width, ceil(h / stride), ceil(w / stride))."""
        return self.relu(self.residual(images) + self.shortcut(images))


class ResNet18(nn.Module):
    """Images (B, channels, h, w) -> features (B, `features`), or (B, 8 width) without that layer.

    He et al., "Deep residual learning for image recognition" (2016), table 1: a stem, eight
    blocks of width, 2 width, 4 width and 8 width channels, two each, the mean over the image. The
    convolutions are drawn with variance 2 / (k^2 width), He et al. (2015), eq. 14; BatchNorm
    starts as the identity.

    Args:
        channels: of the images.
        width: channels of the first blocks; 64 in the paper.
        stem: "standard", a 7 x 7 convolution and a 3 x 3 maximum, each with stride 2, as in the
            paper for images of 224 x 224; "small", one 3 x 3 convolution, which keeps the size
            and suits images of 32 x 32.
        features: width of a fully connected layer with a ReLU behind the mean; None: no such
            layer. 100 is what the authors of F-MTL use on MultiMNIST.

    Raises:
        ValueError: a width or a number of features below 1.
    """

    def __init__(
        self,
        channels: int,
        width: int = 64,
        stem: Stem = "standard",
        features: int | None = 100,
    ) -> None:
        super().__init__()
        for name, value in (("width", width), ("features", features)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; give 1 or more.")
        first = (
            [nn.Conv2d(channels, width, 7, 2, padding=3, bias=False)]
            if stem == "standard"
            else [nn.Conv2d(channels, width, 3, padding=1, bias=False)]
        )
        layers: list[nn.Module] = [*first, nn.BatchNorm2d(width), nn.ReLU()]
        if stem == "standard":
            layers.append(nn.MaxPool2d(3, 2, padding=1))
        here = width
        for wide, stride in ((width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2)):
            layers += [Block(here, wide, stride), Block(wide, wide, 1)]
            here = wide
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        if features is not None:
            layers += [nn.Linear(here, features), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.width = here if features is None else features
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, self.width) of images (B, channels, h, w)."""
        return self.layers(images)


def resnet18(
    data: Data,
    *,
    width: int = 64,
    stem: Stem = "standard",
    features: int | None = 100,
    head_bias: bool = True,
) -> SharedTrunk:
    """A ResNet-18 trunk of any width, and for each task of `data` a head of one linear layer.

    Args:
        data: of images.
        width: see `ResNet18`.
        stem: see `ResNet18`.
        features: see `ResNet18`.
        head_bias: whether the heads add a number of their own. STG-MTL goes without, and has
            11,227,712 parameters for 100 tasks with `features=None`.

    Raises:
        ValueError: inputs that are no images, or a width that cannot be.
    """
    channels, *_ = images(data, "ResNet-18")
    samplewise(data, "ResNet-18")
    trunk = ResNet18(channels, width, stem, features)
    heads = {task.name: nn.Linear(trunk.width, task.outputs, bias=head_bias) for task in data.tasks}
    return SharedTrunk(trunk, heads)
