"""The table of a comparison: what each recipe reached, and what it cost."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from textwrap import fill
from typing import Any

from equipoise.diagnostics import Sign
from equipoise.lab import summary as summaries
from equipoise.lab.summary import SINGLE_TASK, TIME_UNIT, Metric, Over, Spread, Summary

NONE = "–"  # where there is no number
FEW = 6  # metrics that stand before Δm
WIDTH = 100  # characters of a line of plain text
SIGNS: dict[str, str] = {
    "improvement": "in percent, positive is better (the sign of F-MTL)",
    "drop": "as a fraction, negative is better (the sign of IGB)",
}


@dataclass(frozen=True)
class Column:
    """One column as it is printed.

    Attributes:
        heading: two lines.
        cells: one text a row.
        best: for each row, whether it is the best of the column.
    """

    heading: tuple[str, str]
    cells: list[str]
    best: list[bool]


@dataclass(frozen=True)
class Table:
    """A `Summary` in the notations in which it is printed, shown and read by programs."""

    summary: Summary

    @property
    def title(self) -> str:
        """What was compared on what."""
        found = self.summary
        return f"{found.model} on {found.data}" if found.data else "No run has finished"

    @property
    def caption(self) -> str:
        """How to read the numbers."""
        numbers = [len(row.seeds) for row in self.summary.rows]
        if not any(numbers):
            return ""
        seeds = ", ".join(map(str, sorted({s for row in self.summary.rows for s in row.seeds})))
        spread = (
            f"mean ± sample standard deviation over the seeds {seeds}"
            if max(numbers) > 1
            else f"seed {seeds} alone, so the spread is not known"
        )
        return (
            f"Metrics on the test split: {spread}. "
            f"Δm: mean relative difference to {SINGLE_TASK}{self._over()} "
            f"{SIGNS[self.summary.sign]}. "
            f"T: training time, in units of that of {TIME_UNIT}."
        )

    def _over(self) -> str:
        if not self.summary.several:
            return ""
        all_of_them = f" over all {len(self.summary.metrics)} metrics"
        return all_of_them if self.summary.over == "metrics" else " over the means of the tasks"

    def columns(self) -> list[Column]:
        """What is printed: recipe, metrics, Δm, T, seeds; many metrics come after the others."""
        rows = self.summary.rows
        tasks = [self._metric(metric) for metric in self.summary.metrics]
        totals = [self._delta_m(), self._relative_time()] if tasks else []
        runs = [
            f"{len(row.seeds)} of {len(row.seeds) + len(row.failed)}" if row.failed
            else str(len(row.seeds))
            for row in rows
        ]  # fmt: skip
        totals.append(_plain("seeds", runs))
        numbers = [*tasks, *totals] if len(tasks) <= FEW else [*totals, *tasks]
        if tasks:
            numbers[0].cells[:] = [
                cell if row.seeds else "failed"
                for cell, row in zip(numbers[0].cells, rows, strict=True)
            ]
        return [_plain("recipe", [row.recipe for row in rows]), *numbers]

    def _metric(self, metric: Metric) -> Column:
        factor, decimals = (100.0, 2) if metric.percent else (1.0, None)
        spreads = [row.of(metric) for row in self.summary.rows]
        entries = [(s.times(factor).format(decimals), s.mean) if s else None for s in spreads]
        heading = (metric.task, f"{metric.label} {metric.better}")
        return _rated(heading, entries, metric.higher_is_better)

    def _delta_m(self) -> Column:
        improvement = self.summary.sign == "improvement"
        decimals, unit = (2, "(%) ↑") if improvement else (4, "↓")
        deltas = [row.delta_m for row in self.summary.rows]
        entries = [(d.format(decimals, plus=True), d.mean) if d else None for d in deltas]
        return _rated(("Δm", unit), entries, improvement)

    def _relative_time(self) -> Column:
        times = [row.relative_time for row in self.summary.rows]
        entries = [None if t is None else (f"{t:.2f}", t) for t in times]
        return _rated(("T", "↓"), entries, False)

    def text(self) -> str:
        """For a terminal or a log: aligned, the best of each column with a star.

        What is wider than `WIDTH` goes on below, with the recipes again.
        """
        names, *columns = [_block(column, i > 0) for i, column in enumerate(self.columns())]
        tables = [names]
        for column in columns:
            if tables[-1] is not names and len(tables[-1][0]) + 2 + len(column[0]) > WIDTH:
                tables.append(names)
            tables[-1] = [f"{left}  {c}" for left, c in zip(tables[-1], column, strict=True)]
        parts = ["\n".join(line.rstrip() for line in t if line.strip()) for t in tables]
        star = ["*: best of its column."] if any(any(c.best) for c in self.columns()) else []
        below = filter(None, [self.caption, *star, *self.summary.notes])
        return "\n\n".join([self.title, *parts, "\n".join(fill(line, WIDTH) for line in below)])

    def markdown(self) -> str:
        """A Markdown table; the best of each column is bold."""
        columns = self.columns()
        lines = [
            [_escaped(" ".join(filter(None, column.heading))) for column in columns],
            ["---" if i == 0 else "---:" for i in range(len(columns))],
        ]
        for n in range(len(self.summary.rows)):
            cells = [_escaped(column.cells[n]) for column in columns]
            lines.append(
                [f"**{c}**" if col.best[n] else c for c, col in zip(cells, columns, strict=True)]
            )
        body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        notes = "".join(
            f"\n{_escaped(note)}\n" for note in filter(None, (self.caption, *self.summary.notes))
        )
        return f"**{_escaped(self.title)}**\n\n{body}\n{notes}"

    def csv(self) -> str:
        """One line a recipe, one column a number, all digits; metrics in their own units."""
        lines = []
        for row in self.summary.rows:
            line: dict[str, Any] = {
                "recipe": row.recipe,
                "seeds": " ".join(map(str, row.seeds)),
                "failed_seeds": " ".join(map(str, row.failed)),
            }
            for metric in self.summary.metrics:
                key = f"{metric.name}/test/{metric.task}"
                line |= _pair(key, row.of(metric))
            line |= _pair(f"delta_m/{self.summary.sign}", row.delta_m)
            line |= _pair("train_seconds", row.seconds)
            lines.append({**line, "relative_time": row.relative_time})
        text = io.StringIO()
        writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        return text.getvalue()

    def json(self) -> str:
        """Everything, the value of each seed included, with all digits."""
        rows = [
            {
                "recipe": row.recipe,
                "seeds": list(row.seeds),
                "failed": {str(seed): why for seed, why in row.failed.items()},
                "test": {
                    task: {name: _numbers(spread) for name, spread in found.items()}
                    for task, found in row.metrics.items()
                },
                "delta_m": _numbers(row.delta_m),
                "train_seconds": _numbers(row.seconds),
                "relative_time": row.relative_time,
            }
            for row in self.summary.rows
        ]
        value = {
            "title": self.title,
            "metrics": [asdict(metric) for metric in self.summary.metrics],
            "sign": self.summary.sign,
            "over": self.summary.over,
            "caption": self.caption,
            "notes": list(self.summary.notes),
            "rows": rows,
        }
        return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _plain(heading: str, cells: list[str]) -> Column:
    return Column((heading, ""), cells, [False] * len(cells))


def _block(column: Column, right: bool) -> list[str]:
    """The lines of one column, all of one width."""
    room = " " if any(column.best) else ""  # for the star, so that the digits align
    cells = [
        cell + ("*" if best else room) for cell, best in zip(column.cells, column.best, strict=True)
    ]
    lines = [*(line + room for line in column.heading), *cells]
    width = max(map(len, lines))
    lines.insert(2, "-" * width)
    return [line.rjust(width) if right else line.ljust(width) for line in lines]


def _rated(
    heading: tuple[str, str],
    entries: Sequence[tuple[str, float] | None],
    higher_is_better: bool,
) -> Column:
    """A column of (text, value) in which the best is marked, if there is more than one number."""
    known = [entry for entry in entries if entry is not None]
    best: set[str] = set()
    if len(known) > 1:
        target = (max if higher_is_better else min)(value for _, value in known)
        # What reads the same is marked the same.
        best = {_mean(text) for text, value in known if value == target}
    texts = [entry[0] if entry else NONE for entry in entries]
    return Column(heading, texts, [_mean(text) in best for text in texts])


def _mean(text: str) -> str:
    return text.split(" ±")[0]


def summarise(
    results: Iterable[Mapping[str, Any]], sign: Sign = "improvement", over: Over = "metrics"
) -> Table:
    """The table of some runs; arguments and errors as `equipoise.lab.summary.summarise`."""
    return Table(summaries.summarise(results, sign, over))


def _numbers(spread: Spread | None) -> dict[str, Any] | None:
    if spread is None:
        return None
    return {"mean": spread.mean, "std": spread.std, "values": list(spread.values)}


def _pair(key: str, spread: Spread | None) -> dict[str, float | None]:
    mean, std = (None, None) if spread is None else (spread.mean, spread.std)
    return {f"{key}/mean": mean, f"{key}/std": std}


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]<>|])", r"\\\1", text)
