"""How many machine instructions a step executes in two checkouts of the package.

    python benchmarks/instructions.py --old PATH/TO/OLD/src --new src [--json FILE]

Counted by valgrind's callgrind in one process a checkout, on models so small that what the engine
itself does dominates; the counts hardly differ from run to run, whatever else the machine does,
where times (`versions.py`) need hundreds of rounds for the same. An instruction is not a time, but
between two versions of the same Python code the ratios of both are close. Needs valgrind with its
headers and a C compiler, and some minutes a checkout.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import math
import re
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import environment, table, write
from versions import MANY, SMALL, Run, Worker, commit, common_recipes, serve, where

STEPS = 5
"""How many are counted; "every 5" looks at the gradients in one of five steps."""

REQUESTS = """
#include <valgrind/callgrind.h>
void start(void) { CALLGRIND_START_INSTRUMENTATION; }
void zero(void) { CALLGRIND_ZERO_STATS; }
void dump(void) { CALLGRIND_DUMP_STATS; }
"""


def work() -> None:
    """Be a worker, under callgrind."""
    torch.set_num_threads(1)
    runs: dict[tuple[str, str], Run] = {}
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "requests.c"), Path(folder, "requests.so")
        source.write_text(REQUESTS)
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
        requests = ctypes.CDLL(str(library))

    def build(recipe: str, model: str) -> None:
        runs[recipe, model] = Run(recipe, model)
        runs[recipe, model].warm_up()

    def start() -> None:
        requests.start()

    def count(recipe: str, model: str) -> None:
        run = runs[recipe, model]
        run.once()
        requests.zero()
        for _ in range(STEPS):
            run.once()
        requests.dump()

    serve({f.__name__: f for f in (build, start, count, where)})


def counts(path: Path, cases: list[tuple[str, str]]) -> list[float]:
    """Instructions of a step of each recipe on each model."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        under = (
            "valgrind", "-q", "--tool=callgrind", "--instr-atstart=no",
            f"--callgrind-out-file={out}",
        )  # fmt: skip
        with Worker(path, 0, __file__, under) as worker:
            for case in cases:
                worker("build", *case)
            worker("start")
            for k, case in enumerate(cases, start=1):
                worker("count", *case)
                dumped = Path(f"{out}.{k}")
                total = re.search(r"^totals: (\d+)", dumped.read_text(), re.MULTILINE)
                assert total is not None
                found.append(int(total[1]) / STEPS)
                dumped.unlink()
    return found


def main() -> None:
    """Count, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--old", type=Path, help="the src directory of the old checkout")
    parser.add_argument("--new", type=Path, default=Path("src"), help="that of the new one")
    parser.add_argument("--models", nargs="*", default=(SMALL, MANY), choices=(SMALL, MANY))
    parser.add_argument("--only", default="", help="regular expression that recipes must match")
    parser.add_argument("--json", default=None, help="write the rows here")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work()
        return
    if arguments.old is None:
        parser.error("--old is missing")
    paths = [arguments.old.resolve(), arguments.new.resolve()]
    recipes = common_recipes(paths, arguments.only)
    cases = [(recipe, model) for model in arguments.models for recipe in recipes]
    old, new = (counts(path, cases) for path in paths)
    rows: list[dict[str, Any]] = [
        {
            "model": model,
            "recipe": recipe,
            "old, 1000 instructions": round(a / 1000),
            "new, 1000 instructions": round(b / 1000),
            "difference": round((b - a) / 1000),
            "new / old": round(b / a, 4),
        }
        for (recipe, model), a, b in zip(cases, old, new, strict=True)
    ]
    print(table(rows))
    for model in arguments.models:
        logs = [math.log(row["new / old"]) for row in rows if row["model"] == model]
        print(f"{model}: mean of all recipes {math.exp(statistics.mean(logs)):.4f}")
    content = {
        "environment": {**environment(), "threads": 1},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commits": {"old": commit(paths[0]), "new": commit(paths[1])},
        "rows": rows,
    }
    write(arguments.json, content)


if __name__ == "__main__":
    main()
