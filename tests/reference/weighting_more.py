"""More slow loss weightings, written from the papers alone: plain numbers, one formula a line.

Sums of exponentials are taken in 60 decimal digits, as the formulas stand.
"""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

TINY = 1e-12  # a loss up to this is solved: its logarithm stops here, its gradient is zero


class Adam:
    """Kingma and Ba (2015), algorithm 1, on a list of numbers."""

    def __init__(self, lr: float, decay: float = 0.0) -> None:
        self.lr, self.decay, self.steps = lr, decay, 0
        self.first: list[float] = []
        self.second: list[float] = []

    def step(self, values: list[float], slopes: list[float]) -> list[float]:
        """Return the values after one step, with the decay added to the slopes."""
        slopes = [g + self.decay * v for g, v in zip(slopes, values, strict=True)]
        if not self.first:
            self.first, self.second = [0.0] * len(values), [0.0] * len(values)
        self.steps += 1
        self.first = [0.9 * m + 0.1 * g for m, g in zip(self.first, slopes, strict=True)]
        self.second = [0.999 * v + 0.001 * g * g for v, g in zip(self.second, slopes, strict=True)]
        means = [m / (1 - 0.9**self.steps) for m in self.first]
        squares = [v / (1 - 0.999**self.steps) for v in self.second]
        return [
            value - self.lr * mean / (math.sqrt(square) + 1e-8)
            for value, mean, square in zip(values, means, squares, strict=True)
        ]


def impartial(losses: list[float], scales: list[float]) -> list[float]:
    """Return exp(s_i) L_i - s_i (IMTL-L, Liu et al. 2021)."""
    return [math.exp(s) * loss - s for loss, s in zip(losses, scales, strict=True)]


def impartial_slopes(losses: list[float], scales: list[float]) -> list[float]:
    """Return the derivatives of `impartial` by the scales."""
    return [math.exp(s) * loss - 1 for loss, s in zip(losses, scales, strict=True)]


def geometric(losses: list[float]) -> float:
    """Return (L_1 ... L_T)^(1/T) (Chennupati et al. 2019)."""
    with localcontext() as context:
        context.prec = 60
        product = math.prod(Decimal(loss) for loss in losses)
        return float(product ** (Decimal(1) / len(losses)))


def geometric_slopes(losses: list[float]) -> list[float]:
    """Return the derivatives of `geometric`: d/dL_i L_i^(1/T) times the other factors."""
    slopes = []
    for i, loss in enumerate(losses):
        with localcontext() as context:
            context.prec = 60
            power = Decimal(1) / len(losses)
            others = math.prod(Decimal(x) ** power for k, x in enumerate(losses) if k != i)
            slopes.append(float(others * power * Decimal(loss) ** (power - 1)))
    return slopes


def smooth_maximum(
    losses: list[float], preference: list[float], ideal: list[float], mu: float
) -> tuple[float, list[float]]:
    """Return mu ln sum_i exp(p_i (L_i - z_i) / mu) and its slopes (Lin et al. 2024)."""
    with localcontext() as context:
        context.prec = 60
        context.Emax = 10**12
        powers = [
            (Decimal(p) * (Decimal(loss) - Decimal(z)) / Decimal(mu)).exp()
            for p, loss, z in zip(preference, losses, ideal, strict=True)
        ]
        value = Decimal(mu) * sum(powers).ln()
        slopes = [
            Decimal(p) * power / sum(powers) for p, power in zip(preference, powers, strict=True)
        ]
        return float(value), [float(slope) for slope in slopes]


def softmax(values: list[float]) -> list[float]:
    """Return exp(v_i) / sum_j exp(v_j)."""
    powers = [math.exp(value - max(values)) for value in values]
    return [power / math.fsum(powers) for power in powers]


class FAMO:
    """Liu et al. (2023), algorithm 1, with Adam for the logits as published."""

    def __init__(self, tasks: int, lr: float, gamma: float, bounds: list[float]) -> None:
        self.logits = [0.0] * tasks
        self.adam = Adam(lr, gamma)
        self.bounds = bounds

    def factors(self, losses: list[float]) -> list[float]:
        """Return c z_i / (L_i - b_i)."""
        z = softmax(self.logits)
        gaps = [loss - bound for loss, bound in zip(losses, self.bounds, strict=True)]
        c = 1 / math.fsum(share / gap for share, gap in zip(z, gaps, strict=True))
        return [c * share / gap for share, gap in zip(z, gaps, strict=True)]

    def update(self, losses: list[float], after: list[float]) -> None:
        """Take one step with the losses before and after the update of the network."""
        z = softmax(self.logits)
        fell = [
            math.log(old - b) - math.log(new - b)
            for old, new, b in zip(losses, after, self.bounds, strict=True)
        ]
        tasks = range(len(z))
        jacobian = [[z[i] * ((i == k) - z[k]) for k in tasks] for i in tasks]
        slopes = [math.fsum(jacobian[i][k] * fell[i] for i in tasks) for k in tasks]
        self.logits = self.adam.step(self.logits, slopes)


class GradNorm:
    """Chen et al. (2018), algorithm 1; `gradients` are those of the bare losses."""

    def __init__(self, tasks: int, alpha: float, lr: float, smallest: float = 1e-3) -> None:
        self.weights = [1.0] * tasks
        self.first: list[float] | None = None
        self.alpha, self.adam, self.smallest = alpha, Adam(lr), smallest

    def update(self, losses: list[float], gradients: list[list[float]]) -> None:
        """Take one step of the weights."""
        tasks = len(losses)
        if self.first is None:
            self.first = list(losses)
        bare = [math.sqrt(math.fsum(x * x for x in gradient)) for gradient in gradients]
        norms = [w * n for w, n in zip(self.weights, bare, strict=True)]
        ratios = [loss / first for loss, first in zip(losses, self.first, strict=True)]
        rates = [ratio / (math.fsum(ratios) / tasks) for ratio in ratios]
        wanted = [math.fsum(norms) / tasks * rate**self.alpha for rate in rates]
        slopes = [
            math.copysign(n, norm - target) if norm != target else 0.0
            for n, norm, target in zip(bare, norms, wanted, strict=True)
        ]
        moved = [max(w, self.smallest) for w in self.adam.step(self.weights, slopes)]
        self.weights = [tasks * w / math.fsum(moved) for w in moved]


class DualBalancing:
    """Lin et al. (2023), algorithm 1, from the gradients of the log losses on."""

    def __init__(self, beta: float, decay: float = 0.0) -> None:
        self.beta, self.decay, self.step = beta, decay, 0
        self.averages: list[list[float]] | None = None

    def call(self, gradients: list[list[float]]) -> list[float]:
        """Return the direction."""
        self.step += 1
        stays = self.beta / self.step**self.decay
        if self.averages is None:
            self.averages = [[0.0] * len(g) for g in gradients]
        self.averages = [
            [stays * old + (1 - stays) * new for old, new in zip(a, g, strict=True)]
            for a, g in zip(self.averages, gradients, strict=True)
        ]
        norms = [math.sqrt(math.fsum(x * x for x in a)) for a in self.averages]
        return [
            math.fsum(
                max(norms) / norm * x for norm, x in zip(norms, column, strict=True) if norm > 0
            )
            for column in zip(*self.averages, strict=True)
        ]
