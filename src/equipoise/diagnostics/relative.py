"""Delta_m: how much better or worse than single-task training, as one number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from equipoise.errors import EquipoiseError

Sign = Literal["improvement", "drop"]
"""The two conventions of `delta_m`: positive is better, or negative is better."""


class MeasureError(EquipoiseError, ValueError):
    """A measure that is not defined for what it was given."""


def delta_m(
    values: Mapping[str, Any] | Sequence[Any],
    baseline: Mapping[str, Any] | Sequence[Any],
    higher_is_better: Mapping[str, bool] | Sequence[bool],
    sign: Sign = "improvement",
) -> float:
    """Mean relative difference of the metrics M_k to those of a baseline S_k.

    With l_k = 1 where lower is better and 0 otherwise:

    - ``"improvement"``: the mean of 100 (-1)^l_k (M_k - S_k) / S_k, in percent; positive is better
      (Phan et al., arXiv 2211.13723, section 5.2).
    - ``"drop"``: the mean of (-1)^(1 - l_k) (M_k - S_k) / S_k, a fraction; negative is better
      (Dai et al., arXiv 2307.15429, eq. 5). It is -1/100 of the other.

    Both papers mean positive metrics: a negative S_k turns the sign of its term around.

    Args:
        values: the metrics M, (K,) numbers in any order that the other two share (a list, an
            array, a tensor), or a mapping by name.
        baseline: the metrics S of the baseline, usually single-task training.
        higher_is_better: the direction of each metric.
        sign: the convention.

    Returns:
        The mean over the K metrics, in percent or as a fraction.

    Raises:
        MeasureError: the three do not name the same metrics or are not of one length, there is no
            metric, a number is not finite, a baseline is 0, or `sign` is not known.

    Example:
        >>> round(delta_m([0.5, 10], [0.4, 12], [True, False]), 4)
        20.8333
    """
    if sign not in get_args(Sign):
        raise MeasureError(f"sign is {sign!r}; give 'improvement' or 'drop'.")
    names = _names(values, baseline, higher_is_better)
    total = 0.0
    for name in names:
        value = _number(values[name], "values", name)
        reference = _number(baseline[name], "baseline", name)
        if reference == 0:
            raise MeasureError(f"baseline[{name!r}] is 0; a relative difference to 0 is undefined.")
        change = (value - reference) / reference
        total += change if higher_is_better[name] else -change
    mean = total / len(names)
    return 100 * mean if sign == "improvement" else 0.0 - mean


def _names(values: Any, baseline: Any, higher_is_better: Any) -> list[Any]:
    """The keys, or the positions, of the metrics; the same in all three."""
    given = {"values": values, "baseline": baseline, "higher_is_better": higher_is_better}
    mappings = [isinstance(x, Mapping) for x in given.values()]
    if any(mappings) and not all(mappings):
        raise MeasureError(f"{', '.join(given)} must be all mappings by name, or none of them.")
    if all(mappings):
        for what, entries in given.items():
            if different := set(entries) ^ set(values):
                name = min(different, key=str)
                here, there = (what, "values") if name in entries else ("values", what)
                raise MeasureError(f"{here} has {name!r}, but {there} has not.")
    lengths = {what: len(entries) for what, entries in given.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{what} {n}" for what, n in lengths.items())
        raise MeasureError(f"one entry for each metric is needed in all three: {listed}.")
    if not len(values):
        raise MeasureError("there is no metric to compare.")
    return list(values) if all(mappings) else list(range(len(values)))


def _number(entry: Any, what: str, name: Any) -> float:
    number = float(entry)
    if not math.isfinite(number):
        raise MeasureError(f"{what}[{name!r}] is {number}; a finite number is needed.")
    return number
