"""What an aggregator costs on rows that are there, beside TorchJD's of the same method.

    python benchmarks/solvers.py [--rounds 15] [--columns 1000] [--json FILE]

Random normal rows in single precision, one thread; both libraries in turn, so that a machine that
slows down slows both. The columns: the median time of one call with its inner products and with
the combination of the rows, theirs over ours, and how far our answer is from meeting the
equations of the method, worst over the rounds. TorchJD needs its extras (cagrad, nash_mtl,
quadprog_projector); a method that it lacks, or that lacks its solver, has no second time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from common import environment, quartiles, table, write
from torch import Tensor

import equipoise as eq

try:
    import torchjd.aggregation as theirs
except ImportError:
    theirs = None


def min_norm_gap(gram: Tensor, w: Tensor) -> float:
    """How much the worst task falls short of <g_i, d> >= |d|^2, over |d|^2."""
    products = gram @ w
    return max(0.0, 1 - float(products.min() / (w @ products)))


def equal_angles_gap(gram: Tensor, w: Tensor) -> float:
    """As `min_norm_gap` for the cosines with d: the least against those that carry it."""
    norms = gram.diagonal().sqrt()
    cosines = gram @ w / norms
    shares = w * norms / (w * norms).sum()
    return max(0.0, 1 - float(cosines.min() / (shares @ cosines)))


def nash_gap(gram: Tensor, w: Tensor) -> float:
    """max |a_i (G a)_i - 1|."""
    return float((w * (gram @ w) - 1).abs().max())


def fair_gap(gram: Tensor, w: Tensor) -> float:
    """max |w_i^(1/2) (G w)_i - 1|, for alpha 2."""
    return float((w.sqrt() * (gram @ w) - 1).abs().max())


def projections_gap(gram: Tensor, w: Tensor) -> float:
    """The spread of the products with the unit gradients, over their mean."""
    products = gram @ w / gram.diagonal().sqrt()
    return float((products.max() - products.min()) / products.mean().abs())


def conflict_gap(gram: Tensor, w: Tensor) -> float:
    """The worst negative cosine with d."""
    products = gram @ w
    return max(0.0, -float((products / gram.diagonal().sqrt()).min() / (w @ products).sqrt()))


def cagrad_gap(gram: Tensor, w: Tensor, c: float = 0.4) -> float:
    """The gap between the worst case that d reaches and what its dual weights allow."""
    extra = w - 1 / len(w)
    mixture = extra / extra.sum()
    mean = gram.mean().sqrt()
    bound = mixture @ gram.mean(1) + c * mean * (mixture @ gram @ mixture).sqrt()
    return float(((bound - (gram @ w).min()) / mean**2).abs())


Make = Callable[[], Any]
METHODS: dict[str, tuple[Make, Callable[[Any], Any] | None, Callable[..., float] | None]] = {
    "Mean": (eq.Mean, lambda jd: jd.Mean(), None),
    "MGDA": (eq.MGDA, lambda jd: jd.MGDA(), min_norm_gap),
    "PCGrad": (eq.PCGrad, lambda jd: jd.PCGrad(), None),
    "CAGrad": (lambda: eq.CAGrad(c=0.4, rescale=0), lambda jd: jd.CAGrad(c=0.4), cagrad_gap),
    "IMTLG": (eq.IMTLG, lambda jd: jd.IMTLG(), projections_gap),
    "NashMTL": (
        lambda: eq.NashMTL(max_norm=None),
        # Its warm start from the call before is switched off by `reset`, see `measure`.
        lambda jd: jd.NashMTL,
        nash_gap,
    ),
    "EDM": (eq.EDM, None, equal_angles_gap),
    "AlignedMTL": (eq.AlignedMTL, lambda jd: jd.AlignedMTL(), None),
    "UPGrad": (eq.UPGrad, lambda jd: jd.UPGrad(), conflict_gap),
    "DualProj": (eq.DualProj, lambda jd: jd.DualProj(), conflict_gap),
    "ConFIG": (eq.ConFIG, lambda jd: jd.ConFIG(), projections_gap),
    "GradDrop": (eq.GradDrop, lambda jd: jd.GradDrop(), None),
    "GradVac": (eq.GradVac, lambda jd: jd.GradVac(), None),
    "FairGrad": (lambda: eq.FairGrad(2.0), None, fair_gap),
    "SDMGrad": (eq.SDMGrad, None, None),
}


def other(make: Callable[[Any], Any] | None, n_tasks: int) -> Any:
    """TorchJD's aggregator, or None if it has none or its solver is not installed."""
    if make is None or theirs is None:
        return None
    try:
        found = make(theirs)
        if isinstance(found, type):  # the one that needs the number of tasks
            found = found(n_tasks=n_tasks)
        found(torch.eye(n_tasks, n_tasks + 1))
    except (ImportError, AttributeError):
        return None
    return found


def seconds(call: Callable[[], Any], reset: Callable[[], Any] | None = None) -> float:
    """The time of one call."""
    if reset is not None:
        reset()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(name: str, n_tasks: int, columns: int, rounds: int) -> dict:
    """One line of the table."""
    make, make_theirs, gap = METHODS[name]
    ours, jd = make(), other(make_theirs, n_tasks)
    generator = torch.Generator().manual_seed(n_tasks)
    mine: list[float] = []
    his: list[float] = []
    worst = 0.0
    for k in range(rounds + 2):
        rows = torch.randn(n_tasks, columns, generator=generator)
        a = seconds(lambda rows=rows: ours(rows))
        b = None
        if jd is not None:
            b = seconds(lambda rows=rows: jd(rows), getattr(jd, "reset", None))
        if k >= 2:  # two rounds to warm up
            mine.append(a)
            his += [] if b is None else [b]
        if gap is not None:
            gram = rows.double() @ rows.double().T
            worst = max(worst, gap(gram, ours.coefficients(gram)))
    middle = quartiles(mine)[1]
    theirs_middle = quartiles(his)[1] if his else None
    return {
        "method": name,
        "T": n_tasks,
        "ours ms": round(1e3 * middle, 3),
        "TorchJD ms": "" if theirs_middle is None else round(1e3 * theirs_middle, 3),
        "TorchJD / ours": "" if theirs_middle is None else round(theirs_middle / middle, 2),
        "off by": "" if gap is None else f"{worst:.0e}",
    }


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds")
    parser.add_argument("--columns", type=int, default=1000, help="P, the length of the rows")
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 3, 10, 40, 100])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--json", default=None, help="write the rows here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [
        measure(name, n_tasks, arguments.columns, arguments.rounds)
        for name in arguments.methods
        for n_tasks in arguments.tasks
    ]
    print(table(rows))
    write(arguments.json, {"environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()
