"""Task: what one task predicts, how it is trained and how it is measured."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanAbsoluteError, MeanSquaredError, Metric, MetricCollection
from torchmetrics.classification import BinaryAccuracy, BinaryF1Score, MulticlassAccuracy

Meter = Metric | MetricCollection
"""What `Task.metric` gives: fed by `Task.update`; `compute()` maps the measures' names to values"""


@dataclass(frozen=True)
class Measure:
    """One number by which a task is judged.

    Args:
        name: as it is written in tables, and in result.json.
        higher_is_better: the direction.
        unit: of the value; empty for a plain number or a share.
        share: the value is a share in [0, 1], which tables write as a percentage.
        scale: where lower is better, the value of an answer that ignores the input, roughly. A
            score needs it to bring errors in different units together.
    """

    name: str
    higher_is_better: bool
    unit: str = ""
    share: bool = False
    scale: float = 1.0

    def score(self, value: float) -> float:
        """The value as a number that is 1 for the perfect: itself, or 1 - value / scale."""
        return value if self.higher_is_better else 1 - value / self.scale


@dataclass(frozen=True)
class Task(ABC):
    """One task of a data set. A kind of task is a subclass; the usual ones have a factory here.

    | factory        | output | target                             | loss          | measure      |
    |----------------|--------|------------------------------------|---------------|--------------|
    | classification | (B, C) | (B,) long, 0 .. C - 1              | cross-entropy | accuracy     |
    | binary         | (B, 1) | (B,) float, 0 or 1                 | cross-entropy | accuracy, F1 |
    | regression     | (B, 1) | (B,) float, (value - mean) / scale | L2 or L1      | MAE          |

    Tasks with an answer for every pixel are in `equipoise.lab.dense`. The output is what the
    task's head gives. A NaN in a float target is a missing label, and its sample does not count.

    Attributes:
        name: under which the head, the loss and the measures are found.
        kind: of what kind the task is, for readers of result.json.
        pixelwise: whether there is an answer for every pixel, rather than one for a sample.
        outputs: width of the head: numbers for a sample, or channels for a pixel.
        measures: by which it is judged, in the order of the tables; their names differ.
        n_classes: the number of classes of which a sample is one; 0 where the output is no
            distribution over classes (B, C), so that there is no entropy and no calibration.
        uninformed_loss: the loss of an answer that ignores the input, roughly.
    """

    name: str
    kind: ClassVar[str]
    pixelwise: ClassVar[bool] = False

    @property
    @abstractmethod
    def outputs(self) -> int:
        """Width of the head."""

    @property
    @abstractmethod
    def measures(self) -> tuple[Measure, ...]:
        """By which the task is judged."""

    @property
    def n_classes(self) -> int:
        """The number of classes of a sample; 0: its output is no distribution."""
        return 0

    @property
    def uninformed_loss(self) -> float:
        """The loss of an answer that ignores the input; 1 if targets are standardised."""
        return 1.0

    @abstractmethod
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean loss over the batch, a scalar. Missing labels have to be left out before."""

    @abstractmethod
    def metric(self) -> Meter:
        """A fresh meter; `compute()` gives the measures by name, each in its unit."""

    def update(self, metric: Meter, output: Tensor, target: Tensor) -> None:
        """Count one batch in `metric`, without the samples whose label is missing."""
        metric.update(output, target)

    def score(self, values: Mapping[str, float]) -> float:
        """The measures as one number that is higher when better, and comparable across kinds.

        The mean of the measures' scores: shares as they are, an error as 1 - error / scale, so
        that 1 is perfect in all. NaN if one of them is not known.
        """
        scores = [measure.score(values[measure.name]) for measure in self.measures]
        return math.fsum(scores) / len(scores)

    @staticmethod
    def classification(name: str, classes: tuple[str, ...]) -> Classification:
        """One class out of `classes`, measured by accuracy."""
        return Classification(name, classes)

    @staticmethod
    def binary(
        name: str,
        classes: tuple[str, str] = ("no", "yes"),
        *,
        pos_weight: float = 1.0,
        metric: Literal["accuracy", "f1"] = "accuracy",
    ) -> Binary:
        """Yes or no; see `Binary`."""
        return Binary(name, classes, pos_weight, metric)

    @staticmethod
    def regression(
        name: str,
        unit: str,
        mean: float,
        scale: float,
        *,
        metric: str = "mae",
        loss: Literal["mse", "l1"] = "mse",
    ) -> Regression:
        """A quantity in `unit`, trained on (value - mean) / scale; see `Regression`."""
        return Regression(name, unit, mean, scale, metric, loss)


@dataclass(frozen=True)
class Classification(Task):
    """One class out of several.

    Args:
        name: of the task.
        classes: their names, for reading.

    Raises:
        ValueError: fewer than two classes.
    """

    classes: tuple[str, ...]
    kind: ClassVar[str] = "classification"

    def __post_init__(self) -> None:
        if len(self.classes) < 2:
            raise ValueError(
                f"task {self.name!r}: there are {len(self.classes)} classes; give 2 or more."
            )

    @property
    def outputs(self) -> int:
        """One logit a class."""
        return len(self.classes)

    @property
    def n_classes(self) -> int:
        """The number of classes."""
        return len(self.classes)

    @property
    def measures(self) -> tuple[Measure, ...]:
        """Accuracy."""
        return (Measure("accuracy", True, share=True),)

    @property
    def uninformed_loss(self) -> float:
        """ln C."""
        return math.log(len(self.classes))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy in nats of logits (B, C) and classes (B,)."""
        return F.cross_entropy(output, target)

    def metric(self) -> MetricCollection:
        """Counts right answers over all samples."""
        return MetricCollection({"accuracy": MulticlassAccuracy(self.outputs, average="micro")})


@dataclass(frozen=True)
class Binary(Task):
    """Yes or no.

    Args:
        name: of the task.
        classes: the names of 0 and 1.
        pos_weight: how much a sample of class 1 counts in the loss; 10 suits one class against
            nine others (Sherif et al., arXiv 2307.03374).
        measure: "accuracy", or "f1", the F1 score of class 1, 0 where it is undefined.

    Raises:
        ValueError: a weight not above 0, or an unknown measure.
    """

    classes: tuple[str, str] = ("no", "yes")
    pos_weight: float = 1.0
    measure: Literal["accuracy", "f1"] = "accuracy"
    kind: ClassVar[str] = "binary"
    METERS: ClassVar[Mapping[str, Callable[[], Metric]]] = {
        "accuracy": BinaryAccuracy,
        "f1": BinaryF1Score,
    }

    def __post_init__(self) -> None:
        if not 0 < self.pos_weight < math.inf:
            raise ValueError(
                f"task {self.name!r}: pos_weight is {self.pos_weight}; give a number above 0."
            )
        _known(self.name, "metric", self.measure, self.METERS)

    @property
    def outputs(self) -> int:
        """One logit, that of class 1."""
        return 1

    @property
    def n_classes(self) -> int:
        """Two."""
        return 2

    @property
    def measures(self) -> tuple[Measure, ...]:
        """Accuracy or F1."""
        return (Measure(self.measure, True, share=True),)

    @property
    def uninformed_loss(self) -> float:
        """ln 2, where no class weighs more."""
        return math.log(2)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy in nats of logits (B, 1) and truths (B,), class 1 times `pos_weight`."""
        output = output.reshape(target.shape)
        weight = None if self.pos_weight == 1 else output.new_tensor(self.pos_weight)
        target = target.to(output.dtype)
        return F.binary_cross_entropy_with_logits(output, target, pos_weight=weight)

    def metric(self) -> MetricCollection:
        """Counts over all samples."""
        return MetricCollection({self.measure: self.METERS[self.measure]()})

    def update(self, metric: Meter, output: Tensor, target: Tensor) -> None:
        """Count one batch; "yes" is a logit above 0, a probability above 1/2.

        Decided here because torchmetrics takes logits that all lie in [0, 1] for probabilities.
        """
        output, target = _present(output, target)
        if len(target):
            metric.update(output > 0, target.long())


@dataclass(frozen=True)
class Regression(Task):
    """A quantity, trained on (value - mean) / scale.

    Args:
        name: of the task.
        unit: in which it is measured.
        mean: the value, in `unit`, that a target of 0 stands for.
        scale: the difference, in `unit`, that a target of 1 stands for.
        measure: "mae" or "rmse", in `unit`; written in tables as it is written here.
        training: the loss: "mse", squared error, or "l1", absolute error; of the standardised
            numbers.

    Raises:
        ValueError: a scale not above 0, or an unknown measure or loss.
    """

    unit: str
    mean: float
    scale: float
    measure: str = "mae"
    training: Literal["mse", "l1"] = "mse"
    kind: ClassVar[str] = "regression"
    METERS: ClassVar[Mapping[str, Callable[[], Metric]]] = {
        "mae": MeanAbsoluteError,
        "rmse": lambda: MeanSquaredError(squared=False),
    }
    LOSSES: ClassVar[Mapping[str, Callable[..., Tensor]]] = {"mse": F.mse_loss, "l1": F.l1_loss}

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ValueError(
                f"task {self.name!r}: scale is {self.scale}; give a spread above 0, for example "
                "the standard deviation over the training set."
            )
        _known(self.name, "metric", self.measure.lower(), self.METERS)
        _known(self.name, "loss", self.training, self.LOSSES)

    @property
    def outputs(self) -> int:
        """The estimate."""
        return 1

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The error, in the quantity's unit."""
        return (Measure(self.measure, False, self.unit, scale=self.scale),)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean squared, or absolute, error of estimates (B, 1) and targets (B,)."""
        return self.LOSSES[self.training](output.reshape(target.shape), target)

    def metric(self) -> MetricCollection:
        """The mean over all samples."""
        return MetricCollection({self.measure: self.METERS[self.measure.lower()]()})

    def update(self, metric: Meter, output: Tensor, target: Tensor) -> None:
        """Count one batch in the original unit."""
        output, target = _present(output, target)
        if len(target):
            metric.update(*(self.mean + self.scale * x.float() for x in (output, target)))


def _present(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and targets (n,) of the samples that have a label."""
    output = output.reshape(target.shape)
    present = ~target.isnan()
    return output[present], target[present]


def _known(task: str, what: str, value: str, names: Mapping[str, object]) -> None:
    if value not in names:
        raise ValueError(f"task {task!r}: {what} is {value!r}; give {' or '.join(names)}.")
