"""Instance segmentation by regression: each pixel says where the centre of its instance is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from equipoise.lab.dense import PixelErrors, Pooling
from equipoise.lab.tasks import Measure, Meter, Task


@dataclass(frozen=True)
class Offsets(Task):
    """For every pixel of an instance the way to its centre, measured by the error in pixels.

    Kendall, Gal & Cipolla, "Multi-task learning using uncertainty to weigh losses for scene
    geometry and semantics" (CVPR 2018): pixels that point to one centre are one
    instance. Outputs are (B, 2, H, W), rows down and columns to the right, in pixels; targets
    (B, 3, H, W), the same two and 1 where there is an instance, 0 elsewhere. Pixels without an
    instance count neither in the loss nor in the measure.

    Args:
        name: of the task.
        scale: how long the way typically is, in pixels.
        pooling: of the errors.

    Raises:
        ValueError: a scale not above 0.
    """

    name: str
    scale: float = 1.0
    pooling: Pooling = "pixels"
    kind: ClassVar[str] = "offsets"
    pixelwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ValueError(f"task {self.name!r}: scale is {self.scale}; give one above 0.")

    @property
    def outputs(self) -> int:
        """Two channels."""
        return 2

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The length of what is missing, |down| + |right|."""
        return (Measure("offset error", False, "px", scale=self.scale),)

    @property
    def uninformed_loss(self) -> float:
        """That of pointing nowhere."""
        return self.scale

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """|down| + |right| of the error, mean over the pixels of instances; 0 if there are none."""
        known = target[:, 2]
        error = (output - target[:, :2]).abs().sum(1)
        return (error * known).sum() / known.sum().clamp(min=1)

    def metric(self) -> Metric:
        """Sums in double precision."""
        return PixelErrors([measure.name for measure in self.measures], self.pooling)

    def update(self, metric: Meter, output: Tensor, target: Tensor) -> None:
        """Count the pixels of instances."""
        error = (output.double() - target[:, :2].double()).abs().sum(1)
        metric.update(error[target[:, 2] > 0][None])


def offsets(instances: Tensor) -> Tensor:
    """The way from each pixel to the centre of its instance.

    Args:
        instances: (H, W) long, 0 where there is none, else the number of the instance.

    Returns:
        (3, H, W) float32: rows down, columns to the right, and 1; 0, 0 and 0 where there is no
        instance. The centre is the mean of an instance's pixels.
    """
    height, width = instances.shape
    numbers, which = instances.flatten().unique(return_inverse=True)
    size = torch.bincount(which, minlength=len(numbers)).double()
    places = [
        torch.arange(height).repeat_interleave(width).double(),
        torch.arange(width).repeat(height).double(),
    ]
    known = (instances.flatten() != 0).double()
    ways = [
        (torch.bincount(which, place, minlength=len(numbers)) / size)[which] - place
        for place in places
    ]
    return torch.stack([*(way * known for way in ways), known]).float().reshape(3, height, width)
