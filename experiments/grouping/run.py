"""STG-MTL on CIFAR-10, G1 and G2: all training runs.

    python -m experiments.grouping.run --data-root DIR --out runs/grouping
        [--parts full table] [--sets g2 g1] [--seeds 0 1 2] [--jobs 2]

Part `full` records data maps with the custom CNN of the paper on 20,000 images and clusters them
into 2 and 3 groups. Part `table` does the same with a CNN of half its width on 5,000 images, and
there also trains what the memberships are for: a specialist for each group, with soft and with
hard memberships, beside one network for all tasks (MTL) and one for each (STL).

DIR holds cifar-10-batches-py. Each run trains on one thread.

Killed and started again, it goes on where it was; finished runs are never repeated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from equipoise.lab.config import RunConfig
from equipoise.lab.grouping import Grouping, Plan, evenly
from experiments.common import options

EPOCHS = 15
SETS = ("g2", "g1")
PARTS: dict[str, dict[str, Any]] = {
    "full": {"data": "cifar10(tasks={}, train=20000, val=2000, test=10000)", "model": "cnn"},
    "table": {
        "data": "cifar10(tasks={}, train=5000, val=1000, test=5000)",
        "model": "cnn(width=16, features=64)",
    },
}
PLANS = tuple(
    Plan(n_groups, evenly(EPOCHS), method) for n_groups in (2, 3) for method in ("kmeans", "hard")
)
"""Of the part `full`, only the soft ones are carried out: the clusters are the same."""


def config(part: str, tasks: str, seed: int, data_root: str) -> RunConfig:
    """Of all networks that a part trains on a set of tasks with a seed."""
    settings = PARTS[part] | {"data": PARTS[part]["data"].format(tasks)}
    return RunConfig.of(
        recipe="ew", seed=seed, epochs=EPOCHS, batch_size=128, probes=0, threads=1,
        data_root=data_root, **settings,
    )  # fmt: skip


def folder(out: Path, part: str, tasks: str, seed: int) -> Path:
    """Where they lie."""
    return out / part / tasks / f"seed-{seed}"


def main() -> None:
    """Make all runs, seed by seed."""
    parser = options(__doc__, "grouping", "cifar-10-batches-py")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    arguments = parser.parse_args()
    for part in arguments.parts:
        for seed in arguments.seeds:
            for tasks in arguments.sets:
                trained = config(part, tasks, seed, arguments.data_root)
                where = folder(arguments.out, part, tasks, seed)
                for plan in PLANS:
                    if part == "full" and plan.method == "hard":
                        continue
                    grouping = Grouping(trained, plan, where)
                    groups, _ = grouping.groups()
                    print(f"\n{part}, {tasks}, seed {seed}, {plan.n_groups} groups:\n{groups}")
                    if part == "table":
                        if failures := grouping.train(groups, arguments.jobs):
                            raise SystemExit("\n".join(failures))
                        print(grouping.table(groups), flush=True)


if __name__ == "__main__":
    main()
