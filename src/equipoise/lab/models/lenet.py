"""LeNet for two tasks and more, as Sener & Koltun (2018) use it on MultiMNIST."""

from __future__ import annotations

from torch import Tensor, nn

from equipoise.lab.data.base import Data
from equipoise.lab.models.fit import images, samplewise
from equipoise.trunk import SharedTrunk

FEATURES = 50
MINIMUM = 16  # pixels: the smallest side that two 5 x 5 convolutions with pooling leave anything of


class LeNet(nn.Module):
    """Images (B, channels, height, width) -> features (B, 50).

    Convolution 5 x 5 to 10 channels, pooling, convolution 5 x 5 to 20 channels, pooling, one
    linear layer; a ReLU after each. Without the dropout of the authors' code, so that training and
    evaluation differ in nothing but the data.

    Raises:
        ValueError: an image with a side below 16 pixels.
    """

    def __init__(self, channels: int, height: int, width: int) -> None:
        super().__init__()
        if min(height, width) < MINIMUM:
            raise ValueError(
                f"images of {height} x {width} pixels are too small for LeNet; "
                f"it needs {MINIMUM} x {MINIMUM} or more."
            )
        rows, columns = (((side - 4) // 2 - 4) // 2 for side in (height, width))
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 10, 5),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(10, 20, 5),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(20 * rows * columns, FEATURES),
            nn.ReLU(),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, 50) of images (B, channels, height, width)."""
        return self.layers(images)


def lenet(data: Data) -> SharedTrunk:
    """A LeNet trunk, and for each task of `data` a head of two linear layers.

    The heads are those of Sener & Koltun: 50 hidden units of its own let a task use the shared
    features in a way that is not linear, at 3000 parameters.

    Raises:
        ValueError: inputs that are no images, or too small ones.
    """
    shape = images(data, "LeNet")
    samplewise(data, "LeNet")
    heads = {
        task.name: nn.Sequential(
            nn.Linear(FEATURES, FEATURES), nn.ReLU(), nn.Linear(FEATURES, task.outputs)
        )
        for task in data.tasks
    }
    return SharedTrunk(LeNet(*shape), heads)
