"""The tables of the gap-balancing experiment, from its run folders.

    python -m experiments.gap_balancing.table runs/gap_balancing --csv FILE --json FILE

Prints Markdown, writes one line a run as CSV and the tables as JSON. A part that has not been
trained is left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from equipoise.lab.summary import Row, Summary, summarise
from experiments.common import Runs, interval, results, save, spread, table, written
from experiments.gap_balancing.run import PARTS


class Compared:
    """The finished runs of one part.

    Args:
        folder: its comparison folder.
        name: of the part.
    """

    def __init__(self, folder: Path, name: str) -> None:
        found = results(folder)
        order = PARTS[name].canonical
        found.sort(key=lambda result: (order.index(result["recipe"]), result["seed"]))
        self.summary: Summary = summarise(found)
        self.rows: dict[str, Row] = {row.recipe: row for row in self.summary.rows}
        self.results = found

    def delta(self, recipe: str) -> tuple[float, ...]:
        """Delta_m in percent, seed by seed; positive is better."""
        row = self.rows.get(recipe)
        return row.delta_m.values if row and row.delta_m else ()

    def difference(self, one: str, other: str) -> str:
        """Delta_m of one recipe minus that of another, paired by seed, with its interval."""
        a, b = (
            dict(zip(self.rows[r].seeds, self.delta(r), strict=True)) if r in self.rows else {}
            for r in (one, other)
        )
        both = [a[seed] - b[seed] for seed in a if seed in b]
        return written(interval(both)) if both else "-"

    def measured(self) -> Runs:
        """One line a run: every metric of every task, Delta_m, seconds."""
        runs: Runs = {}
        for row in self.summary.rows:
            for i, seed in enumerate(row.seeds):
                found = {
                    f"test {m.task} {m.name}": values.values[i]
                    for m in self.summary.metrics
                    if (values := row.of(m))
                }
                if row.delta_m:
                    found["delta_m"] = row.delta_m.values[i]
                if row.seconds:
                    found["seconds"] = row.seconds.values[i]
                runs[row.recipe, seed] = found
        return runs


def deltas(part: Compared, beside: Sequence[str]) -> str:
    """Every recipe: Delta_m, and its differences to some of them."""
    rows = []
    for row in part.summary.rows:
        ours = [part.difference(row.recipe, other) for other in beside]
        rows.append([row.recipe, spread(part.delta(row.recipe)), *ours, len(row.seeds)])
    return table(["recipe", "Δm (%)", *(f"minus {r} [95 %]" for r in beside), "seeds"], rows)


def metrics(part: Compared) -> str:
    """Every metric of every task."""
    head = ["recipe", *(f"{m.task} {m.label} {m.better}" for m in part.summary.metrics)]
    rows = []
    for row in part.summary.rows:
        cells = []
        for m in part.summary.metrics:
            values = row.of(m)
            factor = 100.0 if m.percent else 1.0
            cells.append("-" if values is None else values.times(factor).format())
        rows.append([row.recipe, *cells])
    return table(head, rows)


def main() -> None:
    """Print the tables, write the files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--csv", type=Path, default=None)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    parts = {
        name: Compared(arguments.folder / name, name)
        for name in PARTS
        if results(arguments.folder / name)
    }
    beside = {"molecules": ("ew", "si", "igbv1"), "images": ("ew", "si"), "ablation": ("igbv2",)}
    tables = {name: deltas(part, beside[name]) for name, part in parts.items()}
    tables |= {f"{name}-metrics": metrics(part) for name, part in parts.items()}
    runs = {name: part.measured() for name, part in parts.items()}
    save(tables, runs, arguments.csv, arguments.json)


if __name__ == "__main__":
    main()
