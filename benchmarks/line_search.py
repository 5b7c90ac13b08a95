"""What a line search costs over plain SGD.

    python benchmarks/line_search.py [--rounds 15] [--steps 3] [--tasks N] [--json FILE]

Two baselines: summed SGD is one forward, one backward of the summed losses, `optimizer.step`;
per-task SGD one forward and a backward through the whole network for each task, as the thesis'
table has it. Every round times a few steps of each method, as in `benchmarks/step.py`, and gives a
ratio for each baseline; the table shows medians, and the quartiles of the first. `trials` is the
mean number of trial steps: each is a forward pass, of the heads for fbls, of all for bls.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import environment, quartiles, table, write
from step import PROBLEMS, plain_sgd

import equipoise as eq

RECIPES = ("ew", "mgda-ub", "fbls", "fbls(latent_scale=matched)", "fbls(verify=true)",
           "bls(objective=sum)", "bls+mgda")  # fmt: skip


def per_task_sgd(model: eq.SharedTrunk, inputs: torch.Tensor, targets: dict) -> Callable:
    """Plain SGD with a backward through the trunk for each task."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        outputs = model(inputs)
        losses = [F.cross_entropy(outputs[task], targets[task]) for task in model.tasks]
        for loss in losses:
            loss.backward(retain_graph=loss is not losses[-1])
        optimizer.step()

    return step


def measure(name: str, rounds: int, steps: int) -> list[dict]:
    """One row for each recipe on one problem."""
    build, n_tasks, shape = PROBLEMS[name]
    torch.manual_seed(0)
    inputs = torch.randn(shape)
    targets = {f"task{i}": torch.randint(10, shape[:1]) for i in range(n_tasks)}
    losses = dict.fromkeys(targets, F.cross_entropy)
    runs = {
        "sum": plain_sgd(build(n_tasks), inputs, targets),
        "per task": per_task_sgd(build(n_tasks), inputs, targets),
    }
    trials: dict[str, list[int]] = {recipe: [] for recipe in RECIPES}
    for recipe in RECIPES:
        step = eq.Recipe.parse(recipe).build(
            build(n_tasks), losses, 1e-3, 100, optimizer=torch.optim.SGD, seed=0
        )
        runs[recipe] = lambda step=step, seen=trials[recipe]: seen.append(
            step(inputs, targets).trials
        )
    seconds: dict[str, list[float]] = {run: [] for run in runs}
    for k in range(rounds + 2):
        for run, make in runs.items():
            start = time.perf_counter()
            for _ in range(steps):
                make()
            if k >= 2:  # two rounds to warm up
                seconds[run].append((time.perf_counter() - start) / steps)
    rows = []
    for recipe in RECIPES:
        over = {
            base: quartiles([a / b for a, b in zip(seconds[recipe], seconds[base], strict=True)])
            for base in ("sum", "per task")
        }
        low, middle, high = over["sum"]
        rows.append(
            {
                "problem": name,
                "recipe": recipe,
                "over summed SGD": round(middle, 3),
                "quartiles": f"{low:.3f} to {high:.3f}",
                "over per-task SGD": round(over["per task"][1], 3),
                "trials": round(sum(trials[recipe]) / len(trials[recipe]), 2),
                "summed SGD ms": round(1e3 * quartiles(seconds["sum"])[1], 2),
            }
        )
    return rows


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds")
    parser.add_argument("--steps", type=int, default=3, help="steps timed in a row")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--json", default=None, help="write the rows here")
    parser.add_argument("--tasks", type=int, default=None, help="only the problem with so many")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [
        row
        for name, (_, n_tasks, _) in PROBLEMS.items()
        if arguments.tasks in (None, n_tasks)
        for row in measure(name, arguments.rounds, arguments.steps)
    ]
    print(table(rows))
    write(arguments.json, {"environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()
