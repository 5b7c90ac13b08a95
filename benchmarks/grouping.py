"""What data maps and clustering cost: recording beside a training epoch, and a hundred tasks.

    python benchmarks/grouping.py [--rounds N] [--json FILE]

Recording: training steps of the custom CNN of STG-MTL at batch 128 with and without a Recorder,
interleaved batch by batch; and by itself, over an epoch of 50,000 with its checkpoint. Memory and
clustering: T = 100, N = 50,000, 10 checkpoints of generated probabilities, in a process of its own,
whose peak is what the system says, with the part of the imports apart. Seconds are of processor
time, on one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from common import environment, quartiles, table, write
from torch import nn

import equipoise as eq
from equipoise.grouping import DataMaps, Recorder, find_groups

BATCH = 128
SAMPLES = 50_000
STEPS = -(-SAMPLES // BATCH)


def recording(n_tasks: int, rounds: int) -> dict[str, object]:
    """Processor time of a step with and without recording, and of the recording alone."""
    from equipoise.lab.models.cnn import CNN  # not at the top: the lab is no part of the peak

    torch.manual_seed(0)
    heads = {f"task{i}": nn.Linear(128, 1) for i in range(n_tasks)}
    model = eq.SharedTrunk(CNN(3, 32, 32), heads)
    losses = dict.fromkeys(heads, F.binary_cross_entropy_with_logits)
    step = eq.Recipe.parse("ew").build(model, losses, 1e-3, rounds, seed=0)
    n = rounds * BATCH
    maps = DataMaps(n_tasks, n, [1])
    record = Recorder(model, maps)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for k in range(rounds):
        x = torch.randn(BATCH, 3, 32, 32)
        targets = {task: (torch.rand(BATCH, 1) < 0.1).float() for task in heads}
        index = torch.randperm(n)[:BATCH]
        for recorded in (False, True) if k % 2 else (True, False):
            start = time.process_time()
            with record(targets, index) if recorded else nullcontext():
                step(x, targets)
            seconds[recorded].append(time.process_time() - start)
    ratios = [b / a for a, b in zip(seconds[False][2:], seconds[True][2:], strict=True)]
    alone = _alone(record, model, targets, index)
    plain = statistics.median(seconds[False])
    low, middle, high = quartiles(ratios)
    return {
        "T": n_tasks,
        "step, ms": round(1e3 * plain, 1),
        "with recording, ratio": round(middle, 4),
        "quartiles": f"{low:.3f} to {high:.3f}",
        "recording alone, ms": round(1e3 * alone, 3),
        "of a step, %": round(100 * alone / plain, 2),
        "of an epoch with its checkpoint, %": round(
            100 * (STEPS * alone + _closing(n_tasks)) / (STEPS * plain), 2
        ),
    }


def _closing(n_tasks: int) -> float:
    """Seconds in which a checkpoint of 50,000 samples closes."""
    maps = DataMaps(n_tasks, SAMPLES, [1])
    maps.update(torch.rand(SAMPLES, n_tasks), torch.arange(SAMPLES))
    start = time.process_time()
    maps.end_epoch()
    return time.process_time() - start


def _alone(record: Recorder, model: eq.SharedTrunk, targets: dict, index: torch.Tensor) -> float:
    """Median seconds of all that recording adds, around heads that take no time to speak of."""
    features = torch.randn(BATCH, 128)
    times = []
    with torch.no_grad():
        for _ in range(50):
            start = time.process_time()
            for task in model.tasks:
                model.head(task, features)
            bare = time.process_time() - start
            start = time.process_time()
            with record(targets, index):
                for task in model.tasks:
                    model.head(task, features)
            times.append(time.process_time() - start - bare)
    return statistics.median(times)


def hundred_tasks(n_tasks: int, n_samples: int, n_checkpoints: int) -> dict[str, object]:
    """Peak memory of maps and clustering, seconds of processor time of each part."""
    before = _peak()
    generator = torch.Generator().manual_seed(0)
    maps = DataMaps(n_tasks, n_samples, range(1, n_checkpoints + 1))
    seconds = dict.fromkeys(("update", "end_epoch", "cluster"), 0.0)
    level = torch.linspace(0, 4, n_tasks) % 1
    for _ in range(n_checkpoints):
        for index in torch.randperm(n_samples, generator=generator).split(BATCH):
            p = (level + torch.rand(len(index), n_tasks, generator=generator)) / 2
            start = time.process_time()
            maps.update(p, index)
            seconds["update"] += time.process_time() - start
        start = time.process_time()
        maps.end_epoch()
        seconds["end_epoch"] += time.process_time() - start
    start = time.process_time()
    found = find_groups(maps.gram(), 20)
    seconds["cluster"] = time.process_time() - start
    peak = _peak()
    return {
        "T": n_tasks,
        "N": n_samples,
        "checkpoints": n_checkpoints,
        "peak, MB": round(peak / 1e6),
        "above imports, MB": round((peak - before) / 1e6),
        "all updates, CPU s": round(seconds["update"], 2),
        "all checkpoints, CPU s": round(seconds["end_epoch"], 2),
        "clustering, CPU s": round(seconds["cluster"], 2),
        "groups": len(found),
    }


def _peak() -> int:
    """Bytes of memory that this process has had at most (Linux).

    getrusage would count what the parent had when it started this process.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main() -> None:
    """Measure, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", default=None, help="write the rows here")
    parser.add_argument("--large", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.large:
        print(json.dumps(hundred_tasks(100, SAMPLES, 10)))
        return
    rows = [recording(n_tasks, arguments.rounds) for n_tasks in (10, 100)]
    print(table(rows), end="\n\n")
    command = [sys.executable, __file__, "--large"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    large = json.loads(done.stdout)
    print(table([large]))
    content = {"environment": environment(), "recording": rows, "hundred tasks": [large]}
    write(arguments.json, content)


if __name__ == "__main__":
    main()
