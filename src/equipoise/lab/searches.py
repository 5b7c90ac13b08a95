"""What line searches did in a run: columns of metrics.csv, and their pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from equipoise.lab import figures
from equipoise.lab.pages import Section, picture
from equipoise.report import StepReport

SIZE, LEAST, LARGEST = "step/size", "step/least", "step/largest"
TRIALS, REJECTED = "step/trials", "step/rejected"
FALLBACK, UNVERIFIED = "step/fallback", "step/unverified"


def columns(reports: Sequence[StepReport]) -> dict[str, float | None]:
    """The columns of one epoch; none at all without a line search.

    The median, the least and the largest of the accepted step sizes (empty if there was none), the
    mean number of trials, and in percent of the steps: none accepted, another direction taken, and
    with `verify` latent steps that did not hold.
    """
    found = [report for report in reports if report.step_size is not None]
    if not found:
        return {}
    sizes = [report.step_size or 0.0 for report in found if report.accepted]
    held = [report.verified for report in found if report.verified is not None]
    return {
        SIZE: float(np.median(sizes)) if sizes else None,
        LEAST: min(sizes, default=None),
        LARGEST: max(sizes, default=None),
        TRIALS: float(np.mean([report.trials for report in found])),
        REJECTED: 100 * float(np.mean([not report.accepted for report in found])),
        FALLBACK: 100 * float(np.mean([report.fallback for report in found])),
        UNVERIFIED: 100 * float(np.mean(np.logical_not(held))) if held else None,
    }


def section(
    histories: figures.Histories, look: Mapping[str, figures.Look], key_of: Callable[..., Any]
) -> Iterator[Section]:
    """The pictures, if any run has searched: step sizes, trials, refused steps."""
    searched = {
        recipe: runs for recipe, runs in histories.items() if any(TRIALS in run for run in runs)
    }
    if not searched:
        return
    pictures = [
        picture(_sizes(searched, look), "Accepted step sizes over the epochs"),
        picture(
            figures.curves(searched, TRIALS, "Trials", "trials in a step, mean", look),
            "Trial steps of the line searches over the epochs",
        ),
    ]
    text = (
        "How far the line searches went: the median of an epoch's accepted steps, and as a band "
        "the least and the largest. The vertical axis is logarithmic."
    )
    for column, title in (
        (REJECTED, "Steps without an accepted trial"),
        (FALLBACK, "Steps along another direction"),
        (UNVERIFIED, "Latent steps that did not hold"),
    ):
        known = [run[column] for runs in searched.values() for run in runs if column in run]
        known = [values for values in known if np.isfinite(values).any()]
        if any(np.nan_to_num(values).any() for values in known):
            figure = figures.curves(searched, column, title, "percent of the steps", look)
            pictures.append(picture(figure, f"{title} over the epochs"))
        elif known:
            text += f" {title}: none."
    yield Section("Step sizes", text, pictures, key_of(searched))


def as_fraction(size: float) -> str:
    """A power of two in the way it is spoken of: 4, 1, 1/64, 2^-20."""
    if size >= 1:
        return f"{size:g}"
    return f"1/{1 / size:.0f}" if size > 1e-4 else f"2^{np.log2(size):.0f}"


def _sizes(histories: figures.Histories, look: Mapping[str, figures.Look]) -> Figure:
    with figures.canvas("Accepted step") as (figure, axes):
        for turn, (recipe, runs) in enumerate(histories.items()):
            found = [figures.over_epochs(runs, column) for column in (SIZE, LEAST, LARGEST)]
            if any(pair is None for pair in found):
                continue
            (epochs, middle), (_, low), (_, high) = (pair for pair in found if pair is not None)
            style = look[recipe]
            axes.plot(
                epochs,
                2 ** np.ma.masked_invalid(np.log2(middle)).mean(0),
                color=style.colour,
                ls=style.dashes,
                marker=style.marker,
                markevery=(turn % max(1, len(epochs) // 5), max(1, len(epochs) // 5)),
            )
            low, high = (np.ma.masked_invalid(values) for values in (low, high))
            axes.fill_between(epochs, low.min(0), high.max(0), color=style.colour, alpha=0.12, lw=0)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda size, _: as_fraction(size)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set(xlabel="epoch", ylabel="step size")
    return figure
