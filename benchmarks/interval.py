"""What a step costs on average if coefficients are computed only each k-th step.

    python benchmarks/interval.py [--tasks 40] [--rounds 5] [--json FILE]

A round times 50 steps of plain SGD and then of each recipe, so that update_every=10 has its five
expensive steps among them; a round gives a ratio for each recipe.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from common import environment, quartiles, table, write
from step import plain_sgd, small_cnn

import equipoise as eq

STEPS = 50
KEPT = "update_every=10"
RECIPES = ("ew", f"cagrad({KEPT})", f"mgda({KEPT})", f"nash({KEPT})", "cagrad")


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", type=int, default=40, help="number of tasks")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds of 50 steps")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--json", default=None, help="write the rows here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    inputs = torch.randn(16, 3, 32, 32)
    targets = {f"task{i}": torch.randint(10, (16,)) for i in range(arguments.tasks)}
    losses = dict.fromkeys(targets, F.cross_entropy)
    runs = {"SGD": plain_sgd(small_cnn(arguments.tasks), inputs, targets)}
    for recipe in RECIPES:
        step = eq.Recipe.parse(recipe).build(
            small_cnn(arguments.tasks), losses, 1e-3, 100, optimizer=torch.optim.SGD, seed=0
        )
        runs[recipe] = lambda step=step: step(inputs, targets)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()  # warm up
    for _ in range(arguments.rounds):
        for name, run in runs.items():
            # Each round begins in another place of the interval, but holds STEPS / k full ones.
            start = time.perf_counter()
            for _ in range(STEPS):
                run()
            seconds[name].append((time.perf_counter() - start) / STEPS)
    rows = []
    for recipe in RECIPES:
        ratios = [a / b for a, b in zip(seconds[recipe], seconds["SGD"], strict=True)]
        low, middle, high = quartiles(ratios)
        rows.append(
            {
                "tasks": arguments.tasks,
                "recipe": recipe,
                "over SGD": round(middle, 2),
                "quartiles": f"{low:.2f} to {high:.2f}",
                "SGD ms": round(1e3 * quartiles(seconds["SGD"])[1], 2),
            }
        )
    print(table(rows))
    write(arguments.json, {"environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()
