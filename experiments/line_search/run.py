"""Line searches against tuned steps, on MultiMNIST and CIFAR-10: all training runs.

    python -m experiments.line_search.run --data-root DIR --out runs/line_search
        [--sets multimnist cifar10] [--seeds 0 1 2] [--jobs 2]

On each set: SGD on the summed loss at the 8 steps logspace(-3, -1) of the thesis and at two longer
ones, MGDA-UB at the longest three of the eight, and the line searches, which are not tuned: BLS
with beta 0.1 to 0.4 (on CIFAR-10 0.1), FBLS as in the thesis, with the matched latent scale, and
verified. Everything else is as it is by default: the upper bound begins at 1 and is halved after
every 10 epochs. With the second seed and the third only SGD at these three and beyond, BLS with
beta 0.1 and FBLS, literal and matched, are trained.

MultiMNIST in the thesis' geometry (one digit 4 pixels to the left, the other 4 to the right) with
LeNet; CIFAR-10 as ten one-vs-rest tasks with the CNN of STG-MTL at a quarter of its width. DIR
holds MNIST/raw and cifar-10-batches-py.

Killed and started again, it goes on where it was; finished runs are never repeated.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from experiments.common import Part, options

STEPS = tuple(float(f"{step:.4g}") for step in np.logspace(-3, -1, 8))

BEYOND = (0.3162, 1.0)
"""Steps of SGD beyond the thesis' eight."""

LONG = STEPS[-3:]
"""The steps of MGDA-UB, and those of SGD with other seeds than the first."""

SETS: dict[str, dict[str, Any]] = {
    "multimnist": {
        "data": "multimnist(canvas=(28, 36), right=(0, 8), train=8000, val=2000, test=10000)",
        "model": "lenet",
        "epochs": 20,
        "batch_size": 256,
        "probes": 0,
    },
    "cifar10": {
        "data": "cifar10(tasks=g1, train=4000, val=1000, test=5000)",
        "model": "cnn(width=8, features=32)",
        "epochs": 12,
        "batch_size": 128,
        "probes": 0,
    },
}
BETAS = (0.1, 0.2, 0.3, 0.4)
FAST = {
    "FBLS, literal": "fbls+mgda",
    "FBLS, matched": "fbls(latent_scale=matched)+mgda",
    "FBLS, verified": "fbls(verify=true)+mgda",
    "FBLS, matched, adaptive": "fbls(latent_scale=matched, adapt=true)+mgda",
}


AGAIN = ("FBLS, literal", "FBLS, matched", "BLS, beta 0.1")
"""The searches with the other seeds."""


def searches(name: str) -> dict[str, str]:
    """Name -> recipe of every line search on a set; all but beta is as it is by default."""
    betas = BETAS if name == "multimnist" else BETAS[:1]
    plain = {f"BLS, beta {beta}": f"bls(beta={beta})+mgda" for beta in betas}
    return {**FAST, "BLS on the sum": "bls(objective=sum)", **plain}


def parts(name: str, first: bool) -> dict[str, Part]:
    """Folder -> the runs in it; those of one folder differ in recipe and seed alone.

    Args:
        name: of the set.
        first: whether it is for the first seed, with which everything is trained.
    """
    common = SETS[name]
    found = {}
    for step in (*(STEPS if first else LONG), *BEYOND):
        settings = {**common, "optimizer": "sgd", "lr": step}
        recipes = ("ew", "mgda-ub") if first and step in LONG else ("ew",)
        found[f"step-{step:g}"] = Part(recipes, settings)
    wanted = [recipe for label, recipe in searches(name).items() if first or label in AGAIN]
    return {**found, "searched": Part(wanted, common)}


def main() -> None:
    """Make all runs, seed by seed."""
    parser = options(__doc__, "line_search", "MNIST, cifar-10-batches-py")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    arguments = parser.parse_args()
    for name in arguments.sets:
        for seed in arguments.seeds:
            for folder, part in parts(name, seed == arguments.seeds[0]).items():
                where = arguments.out / name / folder
                part.train(where, [seed], arguments.jobs, data_root=arguments.data_root)


if __name__ == "__main__":
    main()
