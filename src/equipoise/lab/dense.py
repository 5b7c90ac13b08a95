"""Tasks with an answer for every pixel: segmentation, depth, surface normals.

Losses and measures are those of the scene-understanding tables (Liu et al., MTAN, CVPR 2019;
Navon et al., Nash-MTL, ICML 2022). Depth and normals are known where the sum over their channels
is not 0; other pixels count neither in the loss nor in a measure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from equipoise.lab.tasks import Measure, Meter, Task

Pooling = Literal["pixels", "batches"]
"""How errors become one number: the mean over all pixels, or over batches of the mean in each.

The second is what the code behind older tables does. There every batch counts the same, whatever
it has of known pixels, and its median is the mean of the medians. The numbers then depend on the
batch size, which was 2 on NYUv2.
"""
ANGLES = (11.25, 22.5, 30.0)  # degrees
MEDIAN = "median angle"
RIGHT_ANGLE = 90.0  # degrees; what an unrelated direction is off by, on average
BINS_PER_DEGREE = 1000
BINS = 180 * BINS_PER_DEGREE


@dataclass(frozen=True)
class Segmentation(Task):
    """One class for every pixel, measured by mIoU and pixel accuracy.

    Outputs are logits (B, C, H, W), targets classes (B, H, W) long. The intersection over union of
    a class is that of its pixels in all images together; a class that is neither predicted nor
    there does not count in the mean, nor do pixels that are to be ignored.

    Args:
        name: of the task.
        classes: their names, for reading.
        ignore: the label of a pixel that does not count.

    Raises:
        ValueError: fewer than two classes, or `ignore` is one of them.
    """

    name: str
    classes: tuple[str, ...]
    ignore: int = -1
    kind: ClassVar[str] = "segmentation"
    pixelwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if len(self.classes) < 2:
            raise ValueError(
                f"task {self.name!r}: there are {len(self.classes)} classes; give 2 or more."
            )
        if 0 <= self.ignore < len(self.classes):
            raise ValueError(
                f"task {self.name!r}: ignore is {self.ignore}, which is "
                f"{self.classes[self.ignore]!r}; give a number that is no class."
            )

    @property
    def outputs(self) -> int:
        """One channel of logits a class."""
        return len(self.classes)

    @property
    def measures(self) -> tuple[Measure, ...]:
        """Both are shares."""
        return (Measure("mIoU", True, share=True), Measure("pixel accuracy", True, share=True))

    @property
    def uninformed_loss(self) -> float:
        """ln C."""
        return math.log(len(self.classes))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy in nats, mean over the pixels that count; 0 if none does."""
        total = F.cross_entropy(output, target, ignore_index=self.ignore, reduction="sum")
        return total / (target != self.ignore).sum().clamp(min=1)

    def metric(self) -> MetricCollection:
        """Counts pixels, whatever the pooling of other tasks: older tables do so too."""
        n, ignore = len(self.classes), self.ignore
        return MetricCollection(
            {
                "mIoU": MulticlassJaccardIndex(n, average="macro", ignore_index=ignore),
                "pixel accuracy": MulticlassAccuracy(n, average="micro", ignore_index=ignore),
            },
            compute_groups=False,
        )

    def update(self, metric: Meter, output: Tensor, target: Tensor) -> None:
        """Count one batch."""
        metric.update(output.argmax(1), target)


@dataclass(frozen=True)
class Depth(Task):
    """A positive number for every pixel, measured by its absolute and relative error.

    Outputs and targets are (B, 1, H, W); a target of 0 is not known.

    Args:
        name: of the task.
        unit: of the numbers.
        scale: how far from their mean the numbers typically are, in `unit`.
        pooling: of the errors.
        relative_scale: the relative error of an answer that ignores the input, roughly.

    Raises:
        ValueError: a scale not above 0.
    """

    name: str
    unit: str = "m"
    scale: float = 1.0
    pooling: Pooling = "pixels"
    relative_scale: float = 1.0
    kind: ClassVar[str] = "depth"
    pixelwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("scale", "relative_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"task {self.name!r}: {name} is {getattr(self, name)}; give one above 0."
                )

    @property
    def outputs(self) -> int:
        """One channel."""
        return 1

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The relative error is a plain number, as in the tables."""
        return (
            Measure("abs error", False, self.unit, scale=self.scale),
            Measure("rel error", False, scale=self.relative_scale),
        )

    @property
    def uninformed_loss(self) -> float:
        """The typical distance from the mean."""
        return self.scale

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Absolute error in `unit`, mean over the pixels that are known; 0 if none is."""
        known = _known(target)
        return ((output - target).abs() * known).sum() / known.sum().clamp(min=1)

    def metric(self) -> Metric:
        """Sums in double precision."""
        return PixelErrors([measure.name for measure in self.measures], self.pooling)

    def update(self, metric: Meter, output: Tensor, target: Tensor) -> None:
        """Count the pixels that are known: |o - t| and |o - t| / t."""
        known = _known(target)
        output, target = output[known].double(), target[known].double()
        error = (output - target).abs()
        metric.update(torch.stack([error, error / target]))


@dataclass(frozen=True)
class Normals(Task):
    """A direction for every pixel, measured by the angle between it and the true one.

    Outputs (B, 3, H, W) need not have length 1, only their direction counts. Targets are
    (B, 3, H, W); where the sum over the three is 0 they are not known.

    Args:
        name: of the task.
        pooling: of the angles. The median over all pixels is right to 0.001 degrees: angles are
            counted in bins of that width, so that no more than 1.4 MB is kept of any number.
    """

    name: str
    pooling: Pooling = "pixels"
    kind: ClassVar[str] = "normals"
    pixelwise: ClassVar[bool] = True

    @property
    def outputs(self) -> int:
        """Three channels."""
        return 3

    @property
    def measures(self) -> tuple[Measure, ...]:
        """Mean and median angle in degrees, and the shares of pixels with less than three."""
        return (
            Measure("mean angle", False, "deg", scale=RIGHT_ANGLE),
            Measure(MEDIAN, False, "deg", scale=RIGHT_ANGLE),
            *(Measure(f"within {angle:g} deg", True, share=True) for angle in ANGLES),
        )

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """1 - cosine, mean over the pixels that are known; 0 if none is."""
        known = _known(target)[:, 0]
        cosine = F.cosine_similarity(output, target, dim=1)
        return ((1 - cosine) * known).sum() / known.sum().clamp(min=1)

    def metric(self) -> Metric:
        """Sums in double precision, and a histogram for the median."""
        names = [measure.name for measure in self.measures if measure.name != MEDIAN]
        return PixelErrors(names, self.pooling, median=True)

    def update(self, metric: Meter, output: Tensor, target: Tensor) -> None:
        """Count the pixels that are known."""
        known = _known(target)[:, 0]
        one, other = (x.movedim(1, -1)[known].double() for x in (output, target))
        # Not the arc cosine, which near 0 loses half of the digits.
        across = torch.linalg.cross(one, other, dim=-1).norm(dim=-1)
        angle = torch.atan2(across, (one * other).sum(-1)).rad2deg()
        angle[one.norm(dim=-1) == 0] = RIGHT_ANGLE  # no direction at all
        within = [(angle < limit).double() for limit in ANGLES]
        metric.update(torch.stack([angle, *within]))


class PixelErrors(Metric):
    """Means of what was measured at each pixel, by name.

    Args:
        names: of the K quantities.
        pooling: "pixels" or "batches".
        median: also give "median angle" of the first one, which is in [0, 180].
    """

    full_state_update = False
    sums: Tensor
    weight: Tensor
    bins: Tensor

    def __init__(self, names: list[str], pooling: Pooling, median: bool = False) -> None:
        super().__init__()
        self.names = [names[0], MEDIAN, *names[1:]] if median else list(names)
        self.pooling, self.median = pooling, median
        zeros = torch.zeros(len(self.names), dtype=torch.float64)
        self.add_state("sums", zeros, dist_reduce_fx="sum")
        self.add_state("weight", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        counted = BINS if median and pooling == "pixels" else 0
        self.add_state("bins", torch.zeros(counted, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Count (K, n) values of n pixels; nothing if n is 0."""
        n = values.shape[1]
        if not n:
            return
        if self.median:  # of a batch; where pixels are pooled the bins replace it
            ordered = values[0].sort().values
            middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
            values = torch.cat([values[:1], middle.expand(1, n), values[1:]])
        if len(self.bins):
            places = (values[0] * BINS_PER_DEGREE).long().clamp(0, BINS - 1)
            self.bins += torch.bincount(places, minlength=BINS)
        if self.pooling == "batches":
            self.sums += values.mean(1)
            self.weight += 1
        else:
            self.sums += values.sum(1)
            self.weight += n

    def compute(self) -> dict[str, Tensor]:
        """Name -> mean; NaN if no pixel was known."""
        means = dict(zip(self.names, self.sums / self.weight, strict=True))
        if len(self.bins):
            means[MEDIAN] = self._binned_median()
        return means

    def _binned_median(self) -> Tensor:
        """Mean of the two middle values (one twice, if the number is odd), each a bin's centre."""
        total = int(self.bins.sum())
        if not total:
            return self.sums.new_tensor(torch.nan)
        below = self.bins.cumsum(0)
        ranks = below.new_tensor([(total + 1) // 2, total // 2 + 1])
        return ((torch.searchsorted(below, ranks) + 0.5) / BINS_PER_DEGREE).double().mean()


def _known(target: Tensor) -> Tensor:
    """(B, 1, H, W) where the target is known."""
    return target.sum(1, keepdim=True) != 0
