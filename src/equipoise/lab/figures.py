"""The pictures of a comparison, as matplotlib figures, and their form in a page.

Every function makes one small picture that stays legible on a telephone; a page puts several side
by side. A recipe has the same colour and marker in all of them.
"""

from __future__ import annotations

import hashlib
import html
import io
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from equipoise.diagnostics import delta_m
from equipoise.lab.folders import History
from equipoise.lab.summary import SINGLE_TASK, Metric, Row, Summary

Histories = Mapping[str, Sequence[History]]
"""Recipe -> its runs."""

INK = "#010203"  # becomes the colour of the page's text, so that one picture suits light and dark
# Colours that stay apart for colour-blind eyes (after Okabe and Ito), with a contrast of 3 to 1
# against white and against nearly black.
COLOURS = ("#0072b2", "#d55e00", "#00916a", "#bf6a98", "#bd8000", "#3d97cc", "#7d62c4", "#8b8b2f")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", ":", "-.", "--")
FLAT = ("-", "-.")
"""Dashes of the recipes in flat regions that have the colour of a plain one, which has "--"."""
SHORT = 8  # epochs; curves of longer runs are drawn from the second fifth on
WIDTH, HEIGHT = 4.8, 3.0  # inches; the height without a key, which is the page's business
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a "$" in a task's name is a "$"
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.linewidth": 0.7,
    "axes.formatter.useoffset": False,
    "grid.color": INK,
    "grid.alpha": 0.13,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's fonts
}


@dataclass(frozen=True)
class Look:
    """How a recipe or a task is drawn, in every picture."""

    colour: str
    marker: str
    dashes: str = "-"


def looks(
    names: Sequence[str], first: int = 0, partners: Mapping[str, str] | None = None
) -> dict[str, Look]:
    """A look for each name; the single-task baseline is dashed, in the colour of text.

    Args:
        names: what is drawn.
        first: the number of the first colour.
        partners: name -> the name of its plain partner. The two have one colour, and the plain
            one is dashed; from a third with the same partner on each has a colour of its own.
    """
    partners = partners or {}
    families: dict[str, list[str]] = {}  # of one colour
    for name in names:
        if name == SINGLE_TASK:
            continue
        plain = partners.get(name, name)
        flat = [other for other in families.get(plain, ()) if other != plain]
        # More in one colour could not be told apart.
        own = plain not in names or (plain != name and len(flat) == len(FLAT))
        families.setdefault(name if own else plain, []).append(name)
    found = {SINGLE_TASK: Look(INK, "x", "--")} if SINGLE_TASK in names else {}
    for n, (first_name, family) in enumerate(families.items(), start=first):
        turn = n // len(COLOURS)  # the same colour again comes with other dashes and marker
        flat = [name for name in family if name != first_name]
        for k, name in enumerate([*flat, first_name]):
            dashes = DASHES[turn % 4] if not flat else "--" if name == first_name else FLAT[k]
            place = n + 3 * turn + k
            look = Look(COLOURS[n % len(COLOURS)], MARKERS[place % len(MARKERS)], dashes)
            while look in found.values():
                place += 1
                look = replace(look, marker=MARKERS[place % len(MARKERS)])
            found[name] = look
    return {name: found[name] for name in names}


def curves(
    histories: Histories,
    column: str,
    title: str,
    label: str,
    look: Mapping[str, Look],
    *,
    factor: float = 1.0,
    limits: tuple[float, float] | None = None,
) -> Figure:
    """One column over the epochs: a line for the mean over seeds, a band from least to greatest.

    In runs of more than `SHORT` epochs the vertical axis fits what comes after the first fifth of
    training, for what is before would flatten it; `limits` sets it instead.

    Args:
        histories: the runs of each recipe; runs without the column are left out.
        column: of metrics.csv.
        title: above the picture.
        label: of the vertical axis, with the unit.
        look: of each recipe.
        factor: the values are multiplied by it, 100 for percent.
        limits: of the vertical axis.
    """
    with canvas(title) as (figure, axes):
        late: list[np.ndarray] = []
        for i, (recipe, runs) in enumerate(histories.items()):
            found = over_epochs(runs, column)
            if found is not None:
                epochs, values = found[0], factor * found[1]
                start = epochs.max() / 5 if epochs.max() > SHORT else 0
                late.append(values[:, epochs > start])
                line(axes, epochs, values, look[recipe], i)
        if limits is not None:
            axes.set_ylim(*limits)
        elif late:
            together = np.concatenate([part.ravel() for part in late])
            together = together[np.isfinite(together)]
            if len(together) and np.ptp(together) > 0:
                margin = 0.06 * np.ptp(together)
                axes.set_ylim(together.min() - margin, together.max() + margin)
        _epoch_axis(axes, label)
    return figure


def columns(
    runs: Sequence[History],
    found: Mapping[str, str],
    title: str,
    label: str,
    look: Mapping[str, Look],
    limits: tuple[float, float],
) -> Figure:
    """Several columns of one recipe over the epochs.

    Args:
        runs: one a seed.
        found: name -> column; each is there in at least one run.
        title: above the picture.
        label: of the vertical axis.
        look: of each name.
        limits: of the vertical axis.
    """
    with canvas(title) as (figure, axes):
        for i, (name, column) in enumerate(found.items()):
            pair = over_epochs(runs, column)
            if pair is not None:
                line(axes, *pair, look[name], i)
        axes.set_ylim(*limits)
        _epoch_axis(axes, label)
    return figure


def task_curves(
    runs: Sequence[History], kind: str, tasks: Sequence[str], title: str, look: Mapping[str, Look]
) -> Figure | None:
    """The columns `kind`/task of one recipe over the epochs, a line a task.

    Args:
        runs: one a seed.
        kind: "weight" or "coefficient".
        tasks: their names.
        title: above the picture.
        look: of each task.

    Returns:
        The picture; None when there is nothing to see: no number, or the same for all tasks all
        the time.
    """
    found = {task: over_epochs(runs, f"{kind}/{task}") for task in tasks}
    known = {task: pair for task, pair in found.items() if pair is not None}
    if not known or constant(runs, kind, tasks) is not None:
        return None
    with canvas(title) as (figure, axes):
        for i, (task, (epochs, values)) in enumerate(known.items()):
            line(axes, epochs, values, look[task], i)
        _epoch_axis(axes, f"{kind}, mean of the epoch")
    return figure


def constant(runs: Sequence[History], kind: str, tasks: Sequence[str]) -> float | None:
    """The value that all columns `kind`/task have all the time; None if they have not."""
    parts = [run[f"{kind}/{t}"] for run in runs for t in tasks if f"{kind}/{t}" in run]
    values = np.concatenate(parts) if parts else np.empty(0)
    values = values[np.isfinite(values)]
    if not len(values) or np.ptp(values) > 1e-6 * np.abs(values).max():
        return None
    return float(values[0])


def plane(summary: Summary, x: Metric, y: Metric, look: Mapping[str, Look]) -> Figure:
    """Two tasks against each other on the test split: a marker a recipe, faint ones its seeds.

    Dashed lines go through the single-task baseline: what is beyond both of them is better than
    it in both tasks.
    """
    with canvas("") as (figure, axes):
        for row in summary.rows:
            found = [s.times(100 if m.percent else 1) for m in (x, y) if (s := row.of(m))]
            if len(found) < 2:
                continue
            xs, ys = found
            if row.recipe == SINGLE_TASK:
                axes.axvline(xs.mean, color=INK, lw=0.9, ls="--", alpha=0.6, zorder=1)
                axes.axhline(ys.mean, color=INK, lw=0.9, ls="--", alpha=0.6, zorder=1)
            _point(axes, xs.values, ys.values, xs.mean, ys.mean, look[row.recipe])
        arrows = [f"{m.task} {m.label} {'→' if m.higher_is_better else '←'} better" for m in (x, y)]
        axes.set(xlabel=arrows[0], ylabel=arrows[1])
        axes.margins(0.1)
    return figure


def tasks_against(summary: Summary, baseline: Row, look: Mapping[str, Look]) -> Figure | None:
    """Each metric a line: by how many percent each recipe is better there than `baseline`.

    Returns:
        The picture; None if no metric has a difference to the baseline that is defined.
    """
    references = {m: s.mean for m in summary.metrics if (s := baseline.of(m)) and s.mean != 0}
    metrics = list(references)
    if not metrics:
        return None
    rows = [row for row in summary.rows if row is not baseline and row.metrics]
    room = max(0.3, min(0.11 * len(rows), 16 / len(metrics)))  # inches for a metric
    with canvas("", height=0.8 + room * len(metrics)) as (figure, axes):
        axes.axvline(0, color=INK, lw=0.9, ls="--", alpha=0.6, zorder=1)
        for n, metric in enumerate(metrics):
            reference, higher = [references[metric]], [metric.higher_is_better]
            for i, row in enumerate(rows):
                if (found := row.of(metric)) is None:
                    continue
                better = [delta_m([value], reference, higher) for value in found.values]
                level = n + 0.8 * ((i + 0.5) / len(rows) - 0.5)
                mean = float(np.mean(better))
                _point(axes, better, [level] * len(better), mean, level, look[row.recipe], size=6)
        axes.set_yticks(range(len(metrics)), [summary.title(m) for m in metrics])
        axes.set_ylim(len(metrics) - 0.5, -0.5)
        axes.set_xlabel(f"improvement over {baseline.recipe} (%) → better")
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        for n in range(1, len(metrics)):
            axes.axhline(n - 0.5, color=INK, lw=0.6, alpha=0.13)
    return figure


def over_epochs(runs: Sequence[History], column: str) -> tuple[np.ndarray, np.ndarray] | None:
    """(E,) epochs and (seeds, E) values, NaN where a run has none; None if no run has any."""
    known = [run for run in runs if column in run and np.isfinite(run[column]).any()]
    if not known:
        return None
    epochs = np.unique(np.concatenate([run["epoch"] for run in known]))
    values = np.full((len(known), len(epochs)), np.nan)
    for row, run in zip(values, known, strict=True):
        row[np.searchsorted(epochs, run["epoch"])] = run[column]
    return epochs, values


def svg(figure: Figure, description: str) -> str:
    """The figure as an element to stand in a page, in the text colour of the page around it.

    Args:
        figure: any of the above.
        description: for those who do not see the picture; any text.
    """
    salt = hashlib.sha256(description.encode()).hexdigest()  # the same page for the same runs
    text = io.StringIO()
    style: Any = {**STYLE, "svg.hashsalt": salt}
    with matplotlib.rc_context(style):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    drawing = text.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r'<g id="[^"]*"', "<g", drawing)  # would be there twice in a page
    drawing = re.sub(rf"((?:fill|stroke): ?){INK}", r"\1currentColor", drawing)
    drawing = re.sub(r' (?:d|x|y)="[^"]*"', _rounded, drawing)
    box = re.search(r'viewBox="[^"]*"', drawing)
    label = html.escape(description, quote=True)
    head = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" role="img" aria-label="{label}" '
    body = drawing[drawing.index(">") + 1 :]
    return f"{head}{box[0] if box else ''}>{body}"


def _rounded(attribute: re.Match[str]) -> str:
    """Coordinates to a hundredth of a point, which is finer than any screen."""
    return re.sub(r"(\.\d\d)\d+", r"\1", attribute[0])


def key(look: Look) -> str:
    """A sample of a line with its marker, to stand in a page beside the name."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(0.42, 0.16))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set(xlim=(-1, 1), ylim=(-1, 1))
        axes.plot([-1, 1], [0, 0], color=look.colour, ls=look.dashes)
        axes.plot([0], [0], color=look.colour, marker=look.marker)
    return svg(figure, "").replace('role="img" aria-label=""', 'aria-hidden="true" class="key"')


@contextmanager
def canvas(title: str, height: float = HEIGHT) -> Generator[tuple[Figure, Axes], None, None]:
    """An empty picture in the house style, which holds while the body draws."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        if title:
            axes.set_title(title)
        yield figure, axes


def line(
    axes: Axes, at: np.ndarray, values: np.ndarray, look: Look, turn: int, markers: int = 5
) -> None:
    """The mean of `values` (n, points) `at` (points,), with a band from least to greatest.

    Args:
        axes: to draw in.
        at: horizontal positions.
        values: rows that go together, NaN where there is none.
        look: of the line.
        turn: the number of the line, so that not all markers lie on top of each other.
        markers: about how many there are.
    """
    known = np.ma.masked_invalid(values)
    every = max(1, len(at) // markers)
    axes.plot(
        at,
        known.mean(0),
        color=look.colour,
        ls=look.dashes,
        marker=look.marker,
        markevery=(turn % every, every),
    )
    if len(values) > 1:
        low, high = known.min(0), known.max(0)
        axes.fill_between(at, low, high, color=look.colour, alpha=0.12, lw=0)


def _point(axes: Axes, xs: Any, ys: Any, x: float, y: float, look: Look, size: float = 7.5) -> None:
    axes.plot(
        xs, ys, ls="", marker=look.marker, ms=0.6 * size, color=look.colour, alpha=0.45, mew=0.8
    )
    axes.plot([x], [y], ls="", marker=look.marker, ms=size, color=look.colour, zorder=3)


def _epoch_axis(axes: Axes, label: str) -> None:
    axes.set(xlabel="epoch", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
