"""Peak memory of a step above plain SGD, in units of T x P numbers, ours and TorchJD's.

    python benchmarks/memory.py [--json FILE]

The network has so many shared parameters and so small a batch that what a method stores for the
task gradients outweighs everything else. Memory is what torch's allocator hands out while the
network is built and makes two steps, as torch's profiler counts it, each in a process of its own;
so the result does not depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import allocated, environment, table, write
from step import TORCHJD, jd, plain_sgd, torchjd_step
from torch import nn

import equipoise as eq
from equipoise.registry import METHODS

WIDTH, DEPTH = 512, 12  # square layers: about 3 million shared parameters
OURS = {"EW": "ew"} | {
    method.factory.__name__: token
    for token, method in METHODS.items()
    if method.axis == "aggregation" and method.level == "parameters"
}
FLAT = {
    "F-MGDA": "f-mgda",
    "F-MGDA joint": "f-mgda(perturb=joint)",
    "F-MGDA joint-mean": "f-mgda(perturb=joint-mean)",
    "F-MGDA SAMO": "f-mgda(perturb=samo)",
    "F-MGDA adaptive": "f-mgda(adaptive=true)",
    "F-MGDA every=5": "f-mgda(every=5)",
    "naive MGDA": "a-mgda",
}
"""Flat regions; the last column compares them with MGDA."""


def network(n_tasks: int) -> eq.SharedTrunk:
    """Large layers and small heads."""
    trunk = nn.Sequential(
        *(layer for _ in range(DEPTH) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU()))
    )
    return eq.SharedTrunk(trunk, {f"task{i}": nn.Linear(WIDTH, 2) for i in range(n_tasks)})


def peak(name: str, n_tasks: int) -> int:
    """Bytes that are held at most while a network is built and makes two steps by `name`."""

    def life() -> None:
        model = network(n_tasks)
        inputs = torch.randn(8, WIDTH)
        targets = {task: torch.randint(2, (8,)) for task in model.tasks}
        step = _step(name, model, inputs, targets)
        step()
        step()

    torch.manual_seed(0)
    return allocated(life)[1]


def _step(name: str, model: eq.SharedTrunk, inputs: torch.Tensor, targets: dict) -> Callable:
    library, _, method = name.partition(":")
    if library == "SGD":
        return plain_sgd(model, inputs, targets)
    if library.startswith("TorchJD"):
        chunk = None if library == "TorchJD default" else 1
        return torchjd_step(model, inputs, targets, method, chunk)
    losses = dict.fromkeys(targets, F.cross_entropy)
    recipe = eq.Recipe.parse((OURS | FLAT)[method])
    step = recipe.build(model, losses, 1e-3, 100, optimizer=torch.optim.SGD, seed=0)
    return lambda: step(inputs, targets)


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--one", nargs=2, metavar=("NAME", "T"), help=argparse.SUPPRESS)
    parser.add_argument("--json", default=None, help="write the rows here")
    arguments = parser.parse_args()
    if arguments.one:
        print(peak(arguments.one[0], int(arguments.one[1])))
        return
    rows = []
    for n_tasks in (2, 10):
        model = network(n_tasks)
        unit = n_tasks * 4 * sum(p.numel() for p in model.shared_parameters())
        names = [f"equipoise:{method}" for method in (*OURS, *FLAT)]
        if jd is not None:
            names += [f"TorchJD {k}:{m}" for m in TORCHJD.values() for k in ("default", "chunk 1")]
        base = _measured("SGD", n_tasks)
        plain = _measured("equipoise:MGDA", n_tasks) - base
        for name in names:
            above = _measured(name, n_tasks) - base
            rows.append(
                {
                    "T": n_tasks,
                    "library": name.partition(":")[0],
                    "method": name.partition(":")[2],
                    "above SGD, MB": round(above / 1e6, 1),
                    "in T x P numbers": round(above / unit, 3),
                    "above MGDA, in P": (
                        round((above - plain) / unit * n_tasks, 3)
                        if name.partition(":")[2] in FLAT
                        else "-"
                    ),
                }
            )
    print(table(rows))
    write(arguments.json, {"environment": environment(), "rows": rows})


def _measured(name: str, n_tasks: int) -> int:
    command = [sys.executable, __file__, "--one", name, str(n_tasks)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
