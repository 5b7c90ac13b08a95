"""Improvable gap balancing on qm9-lite and MultiFashion+MNIST: all training runs.

    python -m experiments.gap_balancing.run --data-root DIR --out runs/gap_balancing
        [--parts molecules images ablation] [--seeds 0 1 2] [--jobs 2]

- molecules: the group of methods of the IGB paper's tables on 11 targets of small molecules.
- images: its loss-balancing group, with the variants on ln L, on two tasks.
- ablation: what IGBv2 consists of, on the images: its reward without the minimum over tasks,
  without the ratio of learning rates, other sizes of the buffer, a smaller box of logits. The
  learning rate is halved on the way, or the ratio would be 1 throughout.

Seed by seed, so that a table can be made of what there is. Killed and started again, it goes on
where it was; finished runs are never repeated.
"""

from __future__ import annotations

from experiments.common import Part, options

LOSS_BALANCING = ("ew", "si", "rlw", "dwa", "uw", "igbv1", "igbv2")
GRADIENT_BALANCING = ("mgda", "pcgrad", "cagrad", "imtl", "nash")
CALM = "igbv2(bound=0.8)"
TOGETHER = ("igbv1+nash", "igbv2+cagrad")

MOLECULES = {
    "data": "qm9-lite(train=8000, val=1000)",
    "model": "mpnn(dim=16)",
    "epochs": 20,
    "batch_size": 120,
    "lr": 3e-3,
    "schedule": "plateau",
}
IMAGES = {
    "data": "multifashion-mnist(train=6000, val=2000, test=10000)",
    "model": "lenet",
    "epochs": 24,
    "batch_size": 60,
    "lr": 1e-3,
}
HALVED = {**IMAGES, "schedule": "halve(every=8)"}

PARTS = {
    "molecules": Part(("stl", *LOSS_BALANCING, CALM, *GRADIENT_BALANCING, *TOGETHER), MOLECULES),
    "images": Part(("stl", *LOSS_BALANCING, CALM, "rlw-si", "dwa-si"), IMAGES),
    "ablation": Part(
        (
            "stl",
            "si",
            "igbv1",
            "igbv2",
            "igbv2(reduction=mean)",
            "igbv2(lr_ratio=false)",
            "igbv2(buffer_size=5000)",
            "igbv2(buffer_size=50000)",
            "igbv2(buffer_size=1000000)",
            CALM,
        ),
        HALVED,
    ),
}


def main() -> None:
    """Make all runs."""
    parser = options(__doc__, "gap_balancing", "qm9, MNIST, FashionMNIST")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args()
    for name in arguments.parts:
        PARTS[name].train(
            arguments.out / name, arguments.seeds, arguments.jobs, data_root=arguments.data_root
        )


if __name__ == "__main__":
    main()
