"""The convolutional network of STG-MTL for small images."""

from __future__ import annotations

from torch import Tensor, nn

from equipoise.lab.data.base import Data
from equipoise.lab.models.fit import images, samplewise
from equipoise.trunk import SharedTrunk

MINIMUM = 8  # pixels: the smallest side that a 5 x 5 convolution and two poolings leave anything of


class CNN(nn.Module):
    """Images (B, channels, h, w) -> features (B, `features`).

    Table 2 of "STG-MTL: scalable task grouping for multi-task learning using data maps" (2023),
    appendix C: convolution 5 x 5 to `width` channels, pooling, two convolutions 3 x 3 to 2 `width`
    channels, pooling, one linear layer; BatchNorm after each convolution, a ReLU after each of the
    four. The first convolution is not padded, the two others are, and there is dropout before
    and behind the linear layer, as in the authors' code. With 3 channels of 32 x 32 pixels, and a
    linear layer to 100 outputs behind it, it has 472,612 parameters.

    Args:
        channels: of the images.
        height: of the images, in pixels.
        width_of_images: of the images, in pixels.
        width: channels of the first convolution.
        features: width of the linear layer.
        dropout: share of the numbers that are dropped, each of the two times.

    Raises:
        ValueError: an image with a side below 8 pixels, a width below 1 or a share not in [0, 1).
    """

    def __init__(
        self,
        channels: int,
        height: int,
        width_of_images: int,
        width: int = 32,
        features: int = 128,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        if min(height, width_of_images) < MINIMUM:
            raise ValueError(
                f"images of {height} x {width_of_images} pixels are too small for the CNN; "
                f"it needs {MINIMUM} x {MINIMUM} or more."
            )
        for name, value in (("width", width), ("features", features)):
            if value < 1:
                raise ValueError(f"{name} is {value}; give 1 or more.")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; give a share in [0, 1).")
        rows, columns = ((side - 4) // 2 // 2 for side in (height, width_of_images))
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 5),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(2 * width * rows * columns, features),
            nn.ReLU(),
            nn.Dropout(dropout),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, `features`) of images (B, channels, h, w)."""
        return self.layers(images)


def cnn(data: Data, *, width: int = 32, features: int = 128, dropout: float = 0.2) -> SharedTrunk:
    """The CNN of STG-MTL as the trunk, and for each task of `data` a head of one linear layer.

    Args:
        data: of images.
        width: see `CNN`.
        features: see `CNN`.
        dropout: see `CNN`.

    Raises:
        ValueError: inputs that are no images or too small ones, or an option that cannot be.
    """
    shape = images(data, "the CNN")
    samplewise(data, "the CNN")
    trunk = CNN(*shape, width, features, dropout)
    return SharedTrunk(trunk, {task.name: nn.Linear(features, task.outputs) for task in data.tasks})
