"""Flat regions on MultiMNIST, MultiFashion and MultiFashion+MNIST: all training runs.

    python -m experiments.flat_regions.run --data-root DIR --out runs/flat_regions
        [--seeds 0 1 2] [--choose-on 0 1 2] [--jobs 2] [--sets multifashion ...]

A narrow ResNet-18 that can overfit 3,000 training images, and LeNet, which cannot. On the seeds of
--choose-on every method is trained with every radius; the radius with the best mean validation
score is then trained with the other seeds. The naive ablation and the flat part that is held are
trained on the first two sets, the other forms of one method on the first.

Killed and started again, it goes on where it was; finished runs are never repeated.
"""

from __future__ import annotations

from collections.abc import Sequence

from equipoise.recipe import Recipe
from experiments.common import Experiment, mean, options

SETS = ("multifashion", "multimnist", "multifashion-mnist")
SIZES = "train=3000, val=2000, test=10000"
PLAIN = ("stl", "ew", "mgda", "pcgrad", "cagrad", "imtl")
FLAT = ("f-mgda", "f-pcgrad", "f-cagrad", "f-imtl")
NAIVE = "a-cagrad"
RADII = (0.05, 0.1, 0.2, 0.4)
VARIED = "f-pcgrad"
HELD = ("every=2", "every=5")
FORMS = (*HELD, "perturb=joint-mean")  # on the first set
NARROW = {"model": "resnet18(width=8)", "epochs": 24, "batch_size": 128, "lr": 1e-3}
LENET = {**NARROW, "model": "lenet"}


def recipe(method: str, rho: float, form: str = "") -> str:
    """The recipe of a method in flat regions."""
    text = f"{method}(rho={rho}, {form})" if form else f"{method}(rho={rho})"
    return str(Recipe.parse(text))


class Radii(Experiment):
    """One data set and one network, trained with several radii."""

    def best(self, method: str, seeds: Sequence[int]) -> float:
        """The radius with the best validation accuracy, mean over tasks and `seeds`."""
        scores = {
            rho: mean(mean(self.results[recipe(method, rho), s]["val"].values()) for s in seeds)
            for rho in RADII
        }
        return max(scores, key=lambda rho: scores[rho])


def main() -> None:
    """Make all runs."""
    parser = options(__doc__, "flat_regions", "MNIST, FashionMNIST")
    parser.add_argument("--choose-on", type=int, nargs="+", default=None, metavar="SEED")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    arguments = parser.parse_args()
    seeds, choosing = arguments.seeds, arguments.choose_on or arguments.seeds
    for data in arguments.sets:
        common = {"data": f"{data}({SIZES})", "data_root": arguments.data_root}
        run = Radii(arguments.out / data, arguments.jobs, **common, **NARROW)
        more = data in SETS[:2]
        flat = (*FLAT, NAIVE) if more else FLAT
        run.train([recipe(method, rho) for method in flat for rho in RADII], choosing)
        chosen = {method: run.best(method, choosing) for method in flat}
        recipes = [recipe(method, rho) for method, rho in chosen.items()]
        forms = FORMS if data == SETS[0] else HELD if more else ()
        recipes += [recipe(VARIED, chosen[VARIED], form) for form in forms]
        run.train([*PLAIN, *recipes], seeds)
        if data == "multifashion":
            out = arguments.out / f"{data}-lenet"
            lenet = Radii(out, arguments.jobs, **common, **LENET)
            lenet.train(["pcgrad", *(recipe("f-pcgrad", rho) for rho in RADII)], seeds)


if __name__ == "__main__":
    main()
