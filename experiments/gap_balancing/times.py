"""What balancing gradients costs over balancing losses, for 3 and for 11 tasks of qm9-lite.

    python -m experiments.gap_balancing.times --data-root DIR [--rounds 9] [--json FILE]

The network and the batches of the part "molecules". In each round a few training steps of every
recipe are timed, by turns, so that a machine that slows down slows them all; a round gives a ratio
to ew for each recipe, and the table shows medians and quartiles. Evaluation is not counted. IGBv2
is timed while its agent learns and is used: its epochs are shortened to that end, with SAC's
gradient steps in every 50th step as published.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch

from equipoise.lab import data as datasets
from equipoise.lab.config import RunConfig, environment
from equipoise.lab.data import Data, Split
from equipoise.lab.files import write_text
from equipoise.lab.runs import Run, seeded
from experiments.common import table
from experiments.gap_balancing.run import GRADIENT_BALANCING, LOSS_BALANCING, MOLECULES, TOGETHER

NUMBERS = (3, 11)  # tasks
STEPS = 50  # timed in a row: SAC's gradient steps fall into every 50th
BEFORE = 60  # steps before the timing; the agent has begun to learn by then
BATCHES = 20  # different ones, kept in memory
SHORT = "steps_per_epoch"


def of_tasks(data: Data, number: int) -> Data:
    """The same data with the first tasks only."""
    tasks = data.tasks[:number]
    splits = {
        name: Split(split.inputs, {task.name: split.targets[task.name] for task in tasks})
        for name, split in (("train", data.train), ("val", data.val), ("test", data.test))
    }
    return replace(data, tasks=tasks, **splits)


def stepper(recipe: str, data: Data, root: str) -> Callable[[], None]:
    """A function that makes one training step."""
    config = RunConfig.of(recipe=recipe, **{**MOLECULES, "data_root": root})
    with seeded(config):
        run = Run(config, data)
        if SHORT in vars(run.step.weighting):
            run.step.weighting.steps_per_epoch = 10  # epoch 6 begins at step 50
        run.model.train()
        batches: Iterator = cycle(list(islice(run.batches(data.train, 0), BATCHES)))
    return lambda: run.step(*next(batches)) and None


def measure(number: int, root: str, rounds: int) -> list[dict]:
    """One row for each recipe."""
    data = of_tasks(datasets.load(MOLECULES["data"], root), number)
    recipes = [*LOSS_BALANCING, *GRADIENT_BALANCING, *TOGETHER, "stl"]
    steps = {recipe: stepper(recipe, data, root) for recipe in recipes}
    seconds: dict[str, list[float]] = {recipe: [] for recipe in recipes}
    for step in steps.values():
        for _ in range(BEFORE):
            step()
    for _ in range(rounds):
        for recipe, step in steps.items():
            start = time.perf_counter()
            for _ in range(STEPS):
                step()
            seconds[recipe].append(time.perf_counter() - start)
    rows = []
    for recipe in recipes:
        ratios = np.divide(seconds[recipe], seconds["ew"])
        low, middle, high = np.percentile(ratios, (25, 50, 75))
        rows.append(
            {
                "tasks": number,
                "recipe": recipe,
                "T": round(float(middle), 3),
                "quartiles": f"{low:.3f} to {high:.3f}",
                "ms a step": round(1e3 * float(np.median(seconds[recipe])) / STEPS, 1),
            }
        )
    return rows


def claims(rows: list[dict]) -> list[list[object]]:
    """How many times the loss-balancing methods' time the gradient-balancing ones take."""
    found = []
    for number in NUMBERS:
        time_of = {row["recipe"]: row["T"] for row in rows if row["tasks"] == number}
        for igb in ("igbv1", "igbv2"):
            over = {r: time_of[r] / time_of[igb] for r in GRADIENT_BALANCING}
            cells = [f"{value:.2f}" for value in over.values()]
            found.append([number, igb, f"{time_of[igb]:.3f}", *cells])
    return found


def main() -> None:
    """Measure, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-root", required=True, help="the folder with qm9")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for n in NUMBERS for row in measure(n, arguments.data_root, arguments.rounds)]
    tables = {
        "times": table(list(rows[0]), [list(row.values()) for row in rows]),
        "claims": table(
            ["tasks", "IGB", "its T", *(f"{r} / IGB" for r in GRADIENT_BALANCING)], claims(rows)
        ),
    }
    for text in tables.values():
        print(text)
    if arguments.json:
        lines = {title: text.splitlines() for title, text in tables.items()}
        where = environment(torch.device("cpu"))
        content = {"environment": where, "rows": rows, "tables": lines}
        write_text(arguments.json, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
