"""Slow loss weightings in plain Python floats, written from the papers alone.

Every class keeps the list of all losses that it has seen, one list an epoch, and reads what it
needs from these lists. `call(losses)` is one training step; it returns the weights lambda and the
weighted losses, one number a task.
"""

from __future__ import annotations

import math

TINY = 1e-12  # a loss below this is solved: its logarithm stops here, its gradient is zero


def softmax(values: list[float]) -> list[float]:
    """Return exp(v_i) / sum_j exp(v_j)."""
    top = max(values)
    powers = [math.exp(value - top) for value in values]
    return [power / math.fsum(powers) for power in powers]


def log_loss(loss: float) -> float:
    """Return ln L, stopped at ln(1e-12), of the scale-invariant objective (IGB paper, eq. 2)."""
    if loss < 0:
        raise ValueError(f"a loss of {loss} has no logarithm")
    return math.log(max(loss, TINY))


class EW:
    """Equal weighting: sum_i L_i."""

    def call(self, losses: list[float]) -> tuple[list[float], list[float]]:
        """Return weights of one and the losses."""
        return [1.0 for _ in losses], list(losses)


class SI:
    """The scale-invariant objective: sum_i ln L_i (IGB paper, eq. 2 with lambda 1)."""

    def call(self, losses: list[float]) -> tuple[list[float], list[float]]:
        """Return weights of one and the logarithms."""
        return [1.0 for _ in losses], [log_loss(loss) for loss in losses]


class IGBv1:
    """lambda = T softmax(L / L_base), L_base the mean loss of the second epoch (eq. 3)."""

    def __init__(self, steps_per_epoch: int) -> None:
        self.steps_per_epoch = steps_per_epoch
        self.epochs: list[list[list[float]]] = [[]]

    def base(self) -> list[float]:
        """Return the mean of each task's losses over the batches of the second epoch."""
        batches = self.epochs[1]
        return [math.fsum(column) / len(batches) for column in zip(*batches, strict=True)]

    def call(self, losses: list[float]) -> tuple[list[float], list[float]]:
        """Return lambda and lambda_i ln L_i for one batch."""
        weights = [1.0 for _ in losses]
        if len(self.epochs) >= 3:
            ratios = [
                loss / base if base > TINY else 0.0
                for loss, base in zip(losses, self.base(), strict=True)
            ]
            weights = [len(losses) * share for share in softmax(ratios)]
        self.epochs[-1].append(list(losses))
        if len(self.epochs[-1]) == self.steps_per_epoch:
            self.epochs.append([])
        weighted = [w * log_loss(loss) for w, loss in zip(weights, losses, strict=True)]
        return weights, weighted


class DWA:
    """lambda = T softmax(w / temperature), w_i = L_i(e-1) / L_i(e-2) of epoch means.

    Liu, Johns and Davison (2019), eq. 7; lambda is 1 in the first two epochs.
    """

    def __init__(self, steps_per_epoch: int, temperature: float = 2.0) -> None:
        self.steps_per_epoch = steps_per_epoch
        self.temperature = temperature
        self.epochs: list[list[list[float]]] = [[]]

    def call(self, losses: list[float]) -> tuple[list[float], list[float]]:
        """Return lambda and lambda_i L_i for one batch."""
        weights = [1.0 for _ in losses]
        if len(self.epochs) >= 3:
            last, before = self._means(-2), self._means(-3)
            speeds = [a / b / self.temperature for a, b in zip(last, before, strict=True)]
            weights = [len(losses) * share for share in softmax(speeds)]
        self.epochs[-1].append(list(losses))
        if len(self.epochs[-1]) == self.steps_per_epoch:
            self.epochs.append([])
        return weights, [w * loss for w, loss in zip(weights, losses, strict=True)]

    def _means(self, epoch: int) -> list[float]:
        batches = self.epochs[epoch]
        return [math.fsum(column) / len(batches) for column in zip(*batches, strict=True)]


def uncertainty(losses: list[float], log_variances: list[float]) -> list[float]:
    """Return (exp(-s_i) L_i + s_i) / 2, s_i the log variance of task i (Kendall et al. 2018)."""
    return [0.5 * (math.exp(-s) * loss + s) for loss, s in zip(losses, log_variances, strict=True)]


def uncertainty_slopes(losses: list[float], log_variances: list[float]) -> list[float]:
    """Return the derivatives of `uncertainty` by the log variances."""
    return [0.5 * (1 - math.exp(-s) * loss) for loss, s in zip(losses, log_variances, strict=True)]


def random_weights(logits: list[float], normalize_to: float | None = None) -> list[float]:
    """Return normalize_to times softmax(xi) for given Gaussian draws xi (RLW, Lin et al. 2022)."""
    total = float(len(logits)) if normalize_to is None else normalize_to
    return [total * share for share in softmax(logits)]
