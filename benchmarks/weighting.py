"""What balancing losses costs over an epoch of equal weights.

    python benchmarks/weighting.py [--rounds 5] [--batches 50] [--threads 1] [--json FILE]

LeNet on batches of 256 images of 36 x 36, T = 2. An epoch has 50 batches, so that IGBv2 learns in
one of them (SAC "once every 50 batches"). The first --epochs epochs are not timed: in the fourth
its agent begins to learn, from the sixth on its policy is used. Then in each round one epoch of
each recipe is timed, the recipes by turns, a few batches at a time and in an order that rotates, so
that a machine that slows down slows them all; a round gives a ratio to ew for each recipe, and the
table shows their median and quartiles.

IGBv2 is measured at the beginning, when the buffer is nearly empty, and with a full buffer (a small
one, which is full by then), when the published schedule makes twice as many gradient steps on twice
as many transitions: 50 on 256.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import environment, quartiles, table, write
from step import PROBLEMS

import equipoise as eq

RECIPES = {
    "EW": "ew",
    "SI": "si",
    "RLW": "rlw",
    "DWA": "dwa",
    "UW": "uw",
    "IGBv1": "igbv1",
    "IGBv2": "igbv2",
    "IGBv2, full buffer": "igbv2(buffer_size=50)",
    "IMTL-L": "imtl-l",
    "FAMO": "famo",
    "MGDA": "mgda",
}
PROBLEM = "LeNet, T=2, batch 256"
CHUNK = 5
"""Batches in a row of one recipe."""


def build(recipe: str, batches: int) -> eq.Step:
    """The step of a recipe on a network of its own."""
    make, n_tasks, _ = PROBLEMS[PROBLEM]
    torch.manual_seed(0)
    model = make(n_tasks)
    losses = dict.fromkeys(model.tasks, F.cross_entropy)
    return eq.Recipe.parse(recipe).build(model, losses, 1e-3, batches, seed=0)


def measure(
    recipes: dict[str, str], epochs: int, rounds: int, batches: int, clock: Callable[[], float]
) -> list[dict]:
    """One row for each recipe."""
    _, n_tasks, shape = PROBLEMS[PROBLEM]
    torch.manual_seed(0)
    inputs = torch.randn(shape)
    targets = {f"task{i}": torch.randint(10, shape[:1]) for i in range(n_tasks)}
    steps = {name: build(recipe, batches) for name, recipe in recipes.items()}
    # What happens in the epochs before is told to the weightings alone: it takes a second.
    for step in steps.values():
        for c in range(epochs * batches):
            present = torch.ones(n_tasks, dtype=torch.bool)
            losses = 2.3 - 0.001 * c + 0.1 * torch.rand(n_tasks, dtype=torch.float64)
            if step.weighting.needs_lr:
                step.weighting.begin(1e-3)
            step.weighting(losses, present)
        step(inputs, targets)
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        spent = dict.fromkeys(steps, 0.0)
        for start in range(0, batches, CHUNK):
            turn = start // CHUNK % len(steps)
            for name in (*names[turn:], *names[:turn]):
                step = steps[name]
                begin = clock()
                for _ in range(min(CHUNK, batches - start)):
                    step(inputs, targets)
                spent[name] += clock() - begin
        for name, time_of_one in spent.items():
            seconds[name].append(time_of_one)
    rows = []
    for name, recipe in recipes.items():
        ratios = [a / b for a, b in zip(seconds[name], seconds["EW"], strict=True)]
        low, middle, high = quartiles(ratios)
        rows.append(
            {
                "method": name,
                "recipe": recipe,
                "over EW": round(middle, 3),
                "quartiles": f"{low:.3f} to {high:.3f}",
                "epoch s": round(quartiles(seconds[name])[1], 3),
            }
        )
    return rows


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=7, help="epochs before the first timed one")
    parser.add_argument("--rounds", type=int, default=5, help="epochs timed")
    parser.add_argument("--batches", type=int, default=50, help="batches in an epoch")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--json", default=None, help="write the rows here")
    parser.add_argument("--only", nargs="+", default=[], choices=RECIPES, help="these, beside EW")
    parser.add_argument(
        "--cpu-time", action="store_true", help="for a busy machine: the process's own seconds"
    )
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds must be at least 2: quartiles are shown")
    torch.set_num_threads(arguments.threads)
    wanted = {k: v for k, v in RECIPES.items() if k in ("EW", *(arguments.only or RECIPES))}
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    rows = measure(wanted, arguments.epochs, arguments.rounds, arguments.batches, clock)
    print(f"{PROBLEM}, {arguments.batches} batches an epoch, from epoch {arguments.epochs + 1} on")
    print(table(rows))
    settings = {k: v for k, v in vars(arguments).items() if k != "json"}
    write(arguments.json, {"environment": environment(), "settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
