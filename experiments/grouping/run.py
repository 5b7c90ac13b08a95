"""STG-MTL on CIFAR-10, G1 and G2: all training runs.

    python -m experiments.grouping.run --data-root DIR --out runs/grouping
        [--parts full paper table] [--sets g2 g1] [--seeds 0 1 2] [--jobs 2]

Part `full`: data maps of the paper's custom CNN on 20,000 images, 15 epochs, into 2 and 3 groups.
Part `paper`: the same as long as in the paper, 50 epochs on all images; G2 with the first seed.
Part `table`: a CNN of half its width on 5,000 images, 15 epochs; for 2 and 3 groups also what the
memberships are for, a specialist for each group with soft and with hard memberships, beside one
network for all tasks (MTL) and one for each (STL); and the groups that gradient cosines (under
PCGrad, among the features) and TAG's lookaheads find.

DIR holds cifar-10-batches-py. Each run trains on one thread.

Killed and started again, it goes on where it was; finished runs are never repeated.
"""

from __future__ import annotations

from pathlib import Path

from equipoise.lab.config import RunConfig
from equipoise.lab.grouping import By, Grouping, Plan, evenly
from experiments.common import options

SETS = ("g2", "g1")
PARTS = {
    "full": ("cifar10(tasks={}, train=20000, val=2000, test=10000)", "cnn", 15),
    "paper": ("cifar10(tasks={})", "cnn", 50),
    "table": (
        "cifar10(tasks={}, train=5000, val=1000, test=5000)", "cnn(width=16, features=64)", 15,
    ),
}  # fmt: skip
"""Name -> data, model, epochs."""

NUMBERS = (2, 3)
"""Of groups."""

RECIPES: dict[By, str] = {"maps": "ew", "gradients": "pcgrad-ub", "lookahead": "ew"}
"""What tells the groups -> the recipe of the training that it is measured in."""


def grouping(
    out: Path, part: str, tasks: str, seed: int, data_root: str, n_groups: int,
    method: str = "kmeans", by: By = "maps",
) -> Grouping:  # fmt: skip
    """One grouping; all of the same part, tasks and seed share a folder."""
    data, model, epochs = PARTS[part]
    config = RunConfig.of(
        recipe=RECIPES[by], data=data.format(tasks), data_root=data_root, model=model,
        epochs=epochs, batch_size=128, seed=seed, threads=1, probes=0,
    )  # fmt: skip
    plan = Plan(n_groups, evenly(epochs), method, by=by)
    return Grouping(config, plan, out / part / tasks / f"seed-{seed}")


def wanted(part: str, tasks: str, first: bool) -> list[tuple[int, str, By]]:
    """Number of groups, method, and what tells them, of all groupings of a part."""
    if part == "table":
        trained = [(n, method, "maps") for n in NUMBERS for method in ("kmeans", "hard")]
        return trained + [(n, "kmeans", by) for by in ("gradients", "lookahead") for n in NUMBERS]
    if part == "paper" and not (first and tasks == "g2"):
        return []
    return [(n, "kmeans", "maps") for n in NUMBERS]


def main() -> None:
    """Make all runs, seed by seed."""
    parser = options(__doc__, "grouping", "cifar-10-batches-py")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    arguments = parser.parse_args()
    for part in arguments.parts:
        for seed in arguments.seeds:
            for tasks in arguments.sets:
                for n_groups, method, by in wanted(part, tasks, seed == arguments.seeds[0]):
                    where = part, tasks, seed, arguments.data_root
                    made = grouping(arguments.out, *where, n_groups, method, by)
                    groups, _ = made.groups()
                    print(f"\n{part}, {tasks}, seed {seed}, {by}, {method}:\n{groups}", flush=True)
                    if part == "table" and by == "maps":
                        if failures := made.train(groups, arguments.jobs):
                            raise SystemExit("\n".join(failures))
                        print(made.table(groups), flush=True)


if __name__ == "__main__":
    main()
