"""Task: what one task predicts, how it is trained and how it is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanAbsoluteError, Metric
from torchmetrics.classification import BinaryAccuracy, MulticlassAccuracy


@dataclass(frozen=True)
class Task:
    """One task of a data set. `Task.classification`, `.binary` and `.regression` fill the fields.

    | kind           | output  | target                             | loss          | metric   |
    |----------------|---------|------------------------------------|---------------|----------|
    | classification | (B, C)  | (B,) long, 0 .. C - 1              | cross-entropy | accuracy |
    | binary         | (B, 1)  | (B,) float, 0 or 1                 | cross-entropy | accuracy |
    | regression     | (B, 1)  | (B,) float, (value - mean) / scale | squared error | MAE      |

    The output is what the task's head gives: C = `outputs` logits, one logit, or the estimate.
    A NaN in a float target is a missing label.

    Args:
        name: the name under which the head, the loss and the metric are found.
        kind: one of the three above.
        outputs: width of the head; 1 for binary and regression.
        metric_name: what `metric()` measures, as it is written in tables.
        higher_is_better: the direction of that metric.
        unit: the unit of the metric; empty for a plain number.
        classes: the names of the classes, for reading.
        mean: regression: the value, in `unit`, that a target of 0 stands for.
        scale: regression: the difference, in `unit`, that a target of 1 stands for.

    Raises:
        ValueError: an unknown kind, an impossible number of outputs, or a scale not above 0.
    """

    name: str
    kind: Literal["classification", "binary", "regression"]
    outputs: int
    metric_name: str
    higher_is_better: bool
    unit: str = ""
    classes: tuple[str, ...] | None = None
    mean: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("classification", "binary", "regression"):
            raise ValueError(
                f"task {self.name!r}: kind is {self.kind!r}; "
                "give 'classification', 'binary' or 'regression'."
            )
        if (self.outputs < 2) if self.kind == "classification" else (self.outputs != 1):
            needed = "at least 2 outputs" if self.kind == "classification" else "exactly 1 output"
            raise ValueError(
                f"task {self.name!r}: outputs is {self.outputs}; {self.kind} needs {needed}."
            )
        if not self.scale > 0:
            raise ValueError(
                f"task {self.name!r}: scale is {self.scale}; give a spread above 0, for example "
                "the standard deviation over the training set."
            )

    @classmethod
    def classification(cls, name: str, classes: tuple[str, ...]) -> Task:
        """One class out of `classes`, measured by accuracy."""
        return cls(name, "classification", len(classes), "accuracy", True, classes=classes)

    @classmethod
    def binary(cls, name: str, classes: tuple[str, str] = ("no", "yes")) -> Task:
        """Yes or no, measured by accuracy."""
        return cls(name, "binary", 1, "accuracy", True, classes=classes)

    @classmethod
    def regression(cls, name: str, unit: str, mean: float, scale: float) -> Task:
        """A quantity in `unit`, trained on (value - mean) / scale, measured by MAE in `unit`."""
        return cls(name, "regression", 1, "mae", False, unit=unit, mean=mean, scale=scale)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean loss over the batch: nats, or squared standard deviations for regression; scalar.

        Labels that are missing have to be left out before: a NaN target gives a NaN loss.
        """
        if self.kind == "classification":
            return F.cross_entropy(output, target)
        output = output.reshape(target.shape)
        if self.kind == "binary":
            return F.binary_cross_entropy_with_logits(output, target.to(output.dtype))
        return F.mse_loss(output, target)

    def metric(self) -> Metric:
        """A fresh metric that `update` feeds; `compute()` gives accuracy in [0, 1] or the MAE."""
        if self.kind == "classification":
            return MulticlassAccuracy(self.outputs, average="micro")
        return BinaryAccuracy() if self.kind == "binary" else MeanAbsoluteError()

    def update(self, metric: Metric, output: Tensor, target: Tensor) -> None:
        """Count one batch in `metric`, without the samples whose label is missing.

        Binary outputs count as "yes" where the logit is above 0, a probability above 1/2. They
        are decided here because torchmetrics takes logits that all lie in [0, 1] for probabilities.
        """
        if self.kind != "classification":
            output = output.reshape(target.shape)
            present = ~target.isnan()
            output, target = output[present], target[present]
        if not len(target):
            return
        if self.kind == "binary":
            output, target = output > 0, target.long()
        elif self.kind == "regression":
            output, target = (self.mean + self.scale * x.float() for x in (output, target))
        metric.update(output, target)

    def score(self, value: float) -> float:
        """The metric's value as a number that is higher when better, and comparable across kinds.

        Accuracy as it is; an MAE as 1 - MAE / scale, so that 1 is perfect in both.
        """
        return value if self.higher_is_better else 1 - value / self.scale
