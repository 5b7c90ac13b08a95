"""The metrics of dense tasks (NYUv2, Cityscapes), pixel by pixel in plain Python.

Every function takes images as nested lists or arrays: predictions and truths of all images of a
set, which count together, pixel for pixel.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

IGNORED = -1  # a pixel without a class


def segmentation(
    predicted: Sequence[np.ndarray], label: Sequence[np.ndarray], classes: int
) -> dict[str, float]:
    """Return mIoU and pixel accuracy of class numbers (H, W) over all labelled pixels.

    A class that occurs neither in the prediction nor in the truth takes no part in the mean.
    """
    both, either = [0] * classes, [0] * classes
    right = pixels = 0
    for p, y in labelled(predicted, label):
        pixels += 1
        right += p == y
        for c in range(classes):
            both[c] += p == c and y == c
            either[c] += p == c or y == c
    shares = [both[c] / either[c] for c in range(classes) if either[c]]
    return {
        "miou": math.fsum(shares) / len(shares) if shares else math.nan,
        "pixel_accuracy": right / pixels if pixels else math.nan,
    }


def labelled(predicted, label):
    """Give (prediction, truth) of every pixel that has a class."""
    for image, truth in zip(predicted, label, strict=True):
        height, width = np.shape(truth)
        for r in range(height):
            for c in range(width):
                if int(truth[r][c]) != IGNORED:
                    yield int(image[r][c]), int(truth[r][c])


def depth(predicted: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> dict[str, float]:
    """Return the mean absolute and relative error of (H, W) where the truth is not 0."""
    absolute, relative = [], []
    for image, true in zip(predicted, truth, strict=True):
        height, width = np.shape(true)
        for r in range(height):
            for c in range(width):
                y = float(true[r][c])
                if y != 0:
                    error = abs(float(image[r][c]) - y)
                    absolute.append(error)
                    relative.append(error / y)
    if not absolute:
        return {"abs_error": math.nan, "rel_error": math.nan}
    return {
        "abs_error": math.fsum(absolute) / len(absolute),
        "rel_error": math.fsum(relative) / len(relative),
    }


def normals(predicted: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> dict[str, float]:
    """Return mean and median angle in degrees and shares below 11.25, 22.5, 30 of (3, H, W).

    A pixel whose true channels sum up to 0 does not count. The shares are fractions.
    """
    angles = []
    for image, true in zip(predicted, truth, strict=True):
        _, height, width = np.shape(true)
        for r in range(height):
            for c in range(width):
                y = [float(true[k][r][c]) for k in range(3)]
                if sum(y) != 0:
                    angles.append(angle([float(image[k][r][c]) for k in range(3)], y))
    if not angles:
        return dict.fromkeys(("mean", "median", "11.25", "22.5", "30"), math.nan)
    below = {str(t): sum(a < t for a in angles) / len(angles) for t in (11.25, 22.5, 30)}
    return {
        "mean": math.fsum(angles) / len(angles),
        "median": statistics.median(angles),
        **below,
    }


def angle(p: Sequence[float], y: Sequence[float]) -> float:
    """Return the angle between two vectors in degrees, of any lengths."""
    inner = math.fsum(a * b for a, b in zip(p, y, strict=True))
    lengths = math.hypot(*p) * math.hypot(*y)
    return math.degrees(math.acos(max(-1.0, min(1.0, inner / lengths)))) if lengths else 90.0


# --------------------------------------------------------------------------------- losses


def cross_entropy(logits: Sequence[np.ndarray], label: Sequence[np.ndarray]) -> float:
    """Return the mean of -ln softmax at the true class over the labelled pixels, (C, H, W)."""
    terms = []
    for image, truth in zip(logits, label, strict=True):
        height, width = np.shape(truth)
        for r in range(height):
            for c in range(width):
                if int(truth[r][c]) == IGNORED:
                    continue
                scores = [float(channel[r][c]) for channel in image]
                top = max(scores)
                total = math.fsum(math.exp(s - top) for s in scores)
                terms.append(top + math.log(total) - scores[int(truth[r][c])])
    return math.fsum(terms) / len(terms)


def one_minus_cosine(predicted: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> float:
    """Return 1 less the mean cosine over the pixels that have a true normal."""
    cosines = []
    for image, true in zip(predicted, truth, strict=True):
        _, height, width = np.shape(true)
        for r in range(height):
            for c in range(width):
                y = [float(true[k][r][c]) for k in range(3)]
                p = [float(image[k][r][c]) for k in range(3)]
                if sum(y) != 0:
                    inner = math.fsum(a * b for a, b in zip(p, y, strict=True))
                    cosines.append(inner / (math.hypot(*p) * math.hypot(*y)))
    return 1 - math.fsum(cosines) / len(cosines)


# -------------------------------------------------------------------------------- Delta_m

Metrics = Mapping[str, Mapping[str, float]]  # task -> metric -> value


def delta_m(
    values: Metrics,
    baseline: Metrics,
    higher_is_better: Mapping[str, Mapping[str, bool]],
    sign: str = "improvement",
    over: str = "metrics",
) -> float:
    """Return Delta_m of several metrics a task.

    "improvement": in percent, positive is better. "drop": a fraction, negative is better. Over
    "metrics": each metric counts alike; over "tasks": the mean of the tasks' own means.
    """
    tasks = []
    for task in values:
        own = []
        for metric, value in values[task].items():
            s = baseline[task][metric]
            better = 1 if higher_is_better[task][metric] else -1
            own.append(
                100 * better * (value - s) / s
                if sign == "improvement"
                else -better * (value - s) / s
            )
        tasks.append(own)
    if over == "tasks":
        return math.fsum(math.fsum(own) / len(own) for own in tasks) / len(tasks)
    every = [one for own in tasks for one in own]
    return math.fsum(every) / len(every)
