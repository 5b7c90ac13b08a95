"""Speed and peak memory of a step in two checkouts of the package, recipe by recipe.

    python benchmarks/versions.py --old PATH/TO/OLD/src --new src [--rounds 24] [--json FILE]

Each checkout runs in a worker process of its own, which imports equipoise from that path, builds
the Step of every recipe that both can read, and times steps on command; only one works at a time.
A round visits all recipes in random order and runs four blocks of each, old, new, new, old or the
other way round. Before a block the Step goes back to the state in which it was saved, so that all
blocks of a recipe make the same steps, with the same draws and as many trials of a line search.
The ratio of a round is that of the seconds of both sides; the table shows the median ratio, its
quartiles and a bootstrap interval of the median.

The main figure is CPU time, which suffers less from neighbours than wall time does. It still
suffers: compare a checkout with itself to see by how much. What lies where in memory can make one
process faster than its twin; so the workers are started anew a few times (`--starts`).

Memory is the most that torch's allocator has handed out at once in one step, after three others,
as its profiler counts it; it does not depend on the machine.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import allocated, environment, quartiles, table, write
from torch import nn

SPELLINGS = {
    # name here: what a checkout may call it, first match counts
    "cagrad, every 5": ("cagrad(update_every=5)", "cagrad(every=5)"),
    "f-cagrad, every 5": ("f-cagrad(flat_every=5)", "f-cagrad(every=5)"),
}
MORE = (
    "si+cagrad",
    "uw+mgda",
    "igbv1+pcgrad",
    "igbv2+cagrad",
    "famo+pcgrad",
    "gradnorm+sum",
    "bls+mgda",
    "bls(direction=optimizer)+imtl",
    "fbls(verify=true)+pcgrad",
    "f-mgda",
    "f-cagrad",
    "f-mgda(perturb=joint)",
    "f-mgda(perturb=joint-mean)",
    "f-imtl(perturb=samo)",
    "si+f-mgda",
    *SPELLINGS,
)
"""Beside every method alone."""
CALLABLE = "lambda rows: rows.sum(0)"
"""No recipe: a callable from rows, given to Step itself."""

LENET, SMALL, MANY, DEEP = "LeNet, T=2, batch 256", "MLP, T=2", "MLP, T=10", "MLP, T=6"
SPEED = (LENET, SMALL, MANY)
"""The models on which steps are timed; on the small ones what the engine itself does dominates."""
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
"""For glibc, in both workers. Else it is an accident of what lies where in a process whether the
heap's end goes back to the system in each step and is faulted in again, at a quarter of the time.
"""
BLOCK_SECONDS = 0.06
WARM_UP = 3


# ---------------------------------------------------------------------- the worker


def problem(name: str) -> tuple[Any, torch.Tensor, dict[str, torch.Tensor]]:
    """A network with its inputs and targets, the same in every process."""
    from memory import WIDTH, network
    from step import lenet

    import equipoise as eq

    torch.manual_seed(0)
    n_tasks = int(name.partition("T=")[2].partition(",")[0])
    if name == LENET:
        model, shape = lenet(n_tasks), (256, 1, 36, 36)
    elif name == DEEP:
        model, shape = network(n_tasks), (8, WIDTH)
    else:
        trunk = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        model = eq.SharedTrunk(trunk, {f"task{i}": nn.Linear(32, 2) for i in range(n_tasks)})
        shape = (32, 20)
    inputs = torch.randn(shape)
    return model, inputs, {task: torch.randint(2, shape[:1]) for task in model.tasks}


class Run:
    """A recipe on a model, that goes on from a saved state whenever it is asked to."""

    def __init__(self, recipe: str, name: str) -> None:
        import equipoise as eq

        model, self.inputs, self.targets = problem(name)
        losses = dict.fromkeys(self.targets, F.cross_entropy)
        if recipe == CALLABLE:
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
            step = eq.Step(model, losses, optimizer, aggregator=lambda rows: rows.sum(0))
        else:
            parsed = eq.Recipe.parse(spelling(recipe))
            kind = torch.optim.SGD if parsed.needs_sgd else torch.optim.Adam
            step = parsed.build(model, losses, 1e-3, 100, optimizer=kind, seed=0)
        self.step = step

    def warm_up(self) -> None:
        """Make the first steps."""
        for _ in range(WARM_UP):
            self.once()

    def save(self) -> None:
        """Remember the state to which `block` returns."""
        self.state = self.step.state_dict()

    def once(self) -> Any:
        """Make one step."""
        return self.step(self.inputs, self.targets)

    def block(self, steps: int) -> dict[str, Any]:
        """Time so many steps; and say what they came to."""
        self.step.load_state_dict(self.state)
        self.once()  # what is in no cache after other recipes
        gc.collect()
        trials, wall, cpu = 0, time.perf_counter(), time.process_time()
        for _ in range(steps):
            report = self.once()
            trials += report.trials
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        return {"cpu": cpu, "wall": wall, "trials": trials, "loss": float(report.losses.sum())}


def spelling(recipe: str) -> str:
    """What this checkout calls a recipe."""
    import equipoise as eq

    names = SPELLINGS.get(recipe, (recipe,))
    for name in names:
        try:
            eq.Recipe.parse(name)
        except eq.EquipoiseError:
            continue
        return name
    raise LookupError(recipe)


def readable() -> list[str]:
    """The recipes that this checkout can read."""
    from equipoise.registry import METHODS

    found = []
    for recipe in dict.fromkeys((*METHODS, *MORE)):
        try:
            spelling(recipe)
        except LookupError:
            continue
        found.append(recipe)
    return [*found, CALLABLE]


def peak(recipe: str) -> dict[str, int]:
    """Bytes held before a step, and held at most during it."""
    runs: list[Run] = []

    def before() -> None:
        runs.append(Run(recipe, DEEP))
        runs[0].warm_up()
        gc.collect()

    gc.collect()
    held, _ = allocated(before)
    gc.disable()
    _, above = allocated(runs[0].once)
    gc.enable()
    return {"held": held, "peak": held + above}


def work() -> None:
    """Be a worker."""
    torch.set_num_threads(1)
    runs: dict[tuple[str, str], Run] = {}

    def build(recipe: str, model: str) -> float:
        run = runs[recipe, model] = Run(recipe, model)
        run.warm_up()
        run.save()
        run.block(1)
        gc.collect()
        gc.freeze()  # so that collecting before a block costs little
        return run.block(5)["cpu"] / 5

    def block(recipe: str, model: str, steps: int) -> dict[str, Any]:
        return runs[recipe, model].block(steps)

    serve({f.__name__: f for f in (build, block, where, readable, peak)})


def where() -> str:
    """The path from which equipoise comes."""
    import equipoise

    return str(Path(equipoise.__file__).resolve().parents[1])


def serve(commands: dict[str, Callable]) -> None:
    """Answer one command a line, in JSON, until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is no answer
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        try:
            answer = {"is": commands[command](*arguments)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


# ---------------------------------------------------------------------- the parent


class Worker:
    """A process that has imported one checkout.

    Args:
        path: its src directory.
        hash_seed: of Python, for the process.
        script: what is run, with --worker.
        under: a command under which it is run.
    """

    def __init__(
        self, path: Path, hash_seed: int = 0, script: str = __file__, under: Sequence[str] = ()
    ) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": str(path),
            "OMP_NUM_THREADS": "1",
            "PYTHONHASHSEED": str(hash_seed),
            **KEEP_MEMORY,
        }
        self._process = subprocess.Popen(
            [*under, sys.executable, script, "--worker"],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        found = self("where")
        if found != str(path):
            raise SystemExit(f"equipoise comes from {found}, not from {path}")

    def __call__(self, *command: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(command), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline() or '{"error": "it ended"}')
        if "error" in answer:
            raise RuntimeError(f"{command}: {answer['error']}")
        return answer["is"]

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def times(
    paths: list[Path], cases: list[tuple[str, str]], rounds: int, starts: int, seed: int
) -> dict[tuple[str, str], list[list[dict]]]:
    """For each case and round the four blocks, two of the old checkout first."""
    rng = random.Random(seed)
    found: dict[tuple[str, str], list[list[dict]]] = {case: [] for case in cases}
    steps: dict[tuple[str, str], int] = {}
    for start in range(starts):
        hash_seed = rng.randrange(2**32)
        with Worker(paths[0], hash_seed) as old, Worker(paths[1], hash_seed) as new:
            for case in cases:
                seconds = max(old("build", *case), new("build", *case))
                count = max(1, math.ceil(BLOCK_SECONDS / seconds))
                # "every 5" looks at the gradients in one of five steps
                steps.setdefault(case, -(-count // 5) * 5 if "every" in case[0] else count)
            for k in range(start, rounds, starts):
                for recipe, model in rng.sample(cases, len(cases)):
                    blocks: dict[Worker, list[dict]] = {old: [], new: []}
                    a, b = rng.sample((old, new), 2)
                    for worker in (a, b, b, a):
                        count = steps[recipe, model]
                        blocks[worker].append(worker("block", recipe, model, count))
                    found[recipe, model].append([*blocks[old], *blocks[new]])
                print(f"start {start + 1}, round {k + 1} of {rounds}", file=sys.stderr)
    return found


def row_of(case: tuple[str, str], rounds: list[list[dict]]) -> dict[str, Any]:
    """The ratios of one recipe on one model."""
    ratios = {
        clock: [
            (c[clock] + d[clock]) / (a[clock] + b[clock])  # new over old
            for a, b, c, d in rounds
        ]
        for clock in ("cpu", "wall")
    }
    low, middle, high = quartiles(ratios["cpu"])
    rng = random.Random(0)
    medians = sorted(
        statistics.median(rng.choices(ratios["cpu"], k=len(rounds))) for _ in range(1000)
    )
    fastest = [min(block["cpu"] for blocks in rounds for block in part(blocks)) for part in _SIDES]
    same = all(a["trials"] == c["trials"] for a, _, c, _ in rounds)
    apart = max(abs(a["loss"] - c["loss"]) / abs(a["loss"]) for a, _, c, _ in rounds)
    return {
        "model": case[1],
        "recipe": case[0],
        "new / old, CPU": round(middle, 4),
        "quartiles": f"{low:.3f} to {high:.3f}",
        "95% of median": f"{medians[25]:.3f} to {medians[974]:.3f}",
        "of the fastest": round(fastest[1] / fastest[0], 4),
        "wall": round(statistics.median(ratios["wall"]), 4),
        "old ms a block": round(1e3 * fastest[0], 1),
        "same work": "yes" if same and apart < 1e-4 else f"no: loss {apart:.0e} apart",
    }


_SIDES: tuple[Callable[[list], list], ...] = (lambda blocks: blocks[:2], lambda blocks: blocks[2:])


def memory(paths: list[Path], recipes: list[str]) -> list[dict]:
    """Peak memory of both checkouts, one row for each recipe."""
    rows = []
    with Worker(paths[0]) as old, Worker(paths[1]) as new:
        for recipe in recipes:
            a, b = old("peak", recipe), new("peak", recipe)
            rows.append(
                {
                    "recipe": recipe,
                    "old held, MB": round(a["held"] / 1e6, 2),
                    "new held, MB": round(b["held"] / 1e6, 2),
                    "old peak, MB": round(a["peak"] / 1e6, 2),
                    "new peak, MB": round(b["peak"] / 1e6, 2),
                    "new / old": round(b["peak"] / a["peak"], 4),
                }
            )
    return rows


def common_recipes(paths: list[Path], pattern: str) -> list[str]:
    """The recipes that match and that both checkouts can read."""
    with Worker(paths[0]) as old, Worker(paths[1]) as new:
        known = set(old("readable"))
        return [r for r in new("readable") if r in known and re.search(pattern, r)]


def commit(path: Path) -> str:
    """The commit of a checkout, with a star if there are changes beside it."""
    git = ["git", "-C", str(path)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    dirty = subprocess.run([*git, "status", "--porcelain", "."], capture_output=True).stdout
    return head.strip() + ("*" if dirty else "")


def main() -> None:
    """Measure, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--old", type=Path, help="the src directory of the old checkout")
    parser.add_argument("--new", type=Path, default=Path("src"), help="that of the new one")
    parser.add_argument("--rounds", type=int, default=24, help="rounds of four blocks")
    parser.add_argument("--starts", type=int, default=4, help="how often workers start anew")
    parser.add_argument("--models", nargs="*", default=SPEED, choices=SPEED, metavar="MODEL")
    parser.add_argument("--only", default="", help="regular expression that recipes must match")
    parser.add_argument("--no-memory", action="store_true", help="only speed")
    parser.add_argument("--no-speed", action="store_true", help="only memory")
    parser.add_argument("--seed", type=int, default=0, help="of the order")
    parser.add_argument("--json", default=None, help="write the rows here")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work()
        return
    if arguments.old is None:
        parser.error("--old is missing")
    paths = [arguments.old.resolve(), arguments.new.resolve()]
    began = time.time()
    recipes = common_recipes(paths, arguments.only)
    content: dict[str, Any] = {
        "environment": {**environment(), "threads": 1},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commits": {"old": commit(paths[0]), "new": commit(paths[1])},
        "rounds": arguments.rounds,
    }
    if not arguments.no_speed:
        cases = [(recipe, model) for model in arguments.models for recipe in recipes]
        starts = min(arguments.starts, arguments.rounds)
        found = times(paths, cases, arguments.rounds, starts, arguments.seed)
        content["speed"] = [row_of(case, rounds) for case, rounds in found.items()]
        print(table(content["speed"]), end="\n\n")
        for model in arguments.models:
            logs = [
                math.log(row["new / old, CPU"]) for row in content["speed"] if row["model"] == model
            ]
            print(f"{model}: mean of all recipes {math.exp(statistics.mean(logs)):.4f}")
        print()
    if not arguments.no_memory:
        content["memory"] = memory(paths, recipes)
        print(table(content["memory"]), end="\n\n")
    content["minutes"] = round((time.time() - began) / 60, 1)
    print(f"{content['minutes']} minutes")
    write(arguments.json, content)


if __name__ == "__main__":
    main()
