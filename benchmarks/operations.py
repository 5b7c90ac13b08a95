"""How many operations a step dispatches, over those of the bare passes that it has to make.

    python benchmarks/operations.py [--recipes ew cagrad ...] [--tasks 10] [--json FILE] [--where]

Counted by a torch dispatch mode on a ResNet-18 of width 4 with T heads, Adam with list-wise
kernels: operations whose results are no views and not float64 (a few numbers on the host). A
launch on a GPU is an operation here, so that the ratio says what a step waits for there beside its
passes. The numbers do not depend on the machine.

The bare passes are written by hand, with nothing else: a loss-only recipe has one forward and one
backward pass of the summed losses; a recipe on gradients one forward and T backward passes (at the
feature level one of the trunk and T of the heads); F- T times one more forward and backward pass
and one of all heads; then zeroing and the optimizer. A line search is compared with a step of SGD.
With --where the operations are listed by name, with how many more there are than in the bare
passes.
"""

from __future__ import annotations

import argparse
import datetime
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import environment, table, write
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import equipoise as eq
from equipoise.lab.models.resnet import ResNet18

RECIPES = (
    "ew", "si", "uw", "igbv1", "mgda-ub", "cagrad-ub", "mgda", "pcgrad", "cagrad", "imtl", "nash",
    "upgrad", "si+cagrad", "graddrop", "f-cagrad", "si+f-mgda", "f-mgda(perturb=joint-mean)",
    "fbls", "bls+mgda",
)  # fmt: skip
WARM_UP = 2


class Counting(TorchDispatchMode):
    """Counts the operations in its body by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        """Note the operation, and let it be made."""
        found = function(*arguments, **(options or {}))
        results = found if isinstance(found, (tuple, list)) else (found,)
        tensors = [x for x in results if isinstance(x, Tensor)]
        given = (*arguments, *(options or {}).values())
        flat = [x for y in given for x in (y if isinstance(y, (tuple, list)) else (y,))]
        tensors = tensors or [x for x in flat if isinstance(x, Tensor)]
        is_view = any(
            r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns
        )
        if tensors and not is_view and any(x.dtype != torch.float64 for x in tensors):
            self.seen[function.overloadpacket.__name__] += 1
        return found


def counted(call: Callable[[], object]) -> Counter[str]:
    """The operations of a call, after some that warm it up."""
    for _ in range(WARM_UP):
        call()
    with Counting() as counting:
        call()
    return counting.seen


def network(n_tasks: int) -> eq.SharedTrunk:
    """ResNet-18 of width 4, with linear heads for two classes."""
    torch.manual_seed(0)
    heads = {f"task{i}": nn.Linear(32, 2) for i in range(n_tasks)}
    return eq.SharedTrunk(ResNet18(3, width=4, features=None), heads)


def batch(model: eq.SharedTrunk) -> tuple[Tensor, dict[str, Tensor]]:
    """Eight images of 32 x 32, and their labels."""
    torch.manual_seed(1)
    return torch.randn(8, 3, 32, 32), {task: torch.randint(2, (8,)) for task in model.tasks}


def kind_of(recipe: eq.Recipe) -> str:
    """Which passes the recipe has to make."""
    if recipe.line_search is not None:
        return "search"
    method = recipe.aggregator.method
    if method.token.startswith("f-"):
        return "flat"
    if method.level == "features":
        return "features"
    model = network(2)
    step = recipe.build(model, dict.fromkeys(model.tasks, F.cross_entropy), 0.1, 9)
    return "loss-only" if step(*batch(model)).gram is None else "gradients"


def bare(kind: str, n_tasks: int, joint: bool = False) -> Callable[[], None]:
    """The passes of a kind of recipe, by hand."""
    model = network(n_tasks)
    inputs, targets = batch(model)
    if kind == "search":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, foreach=True)
    trunk = list(model.trunk.parameters())
    heads = list(model.heads.parameters())

    def losses_on(features: list[Tensor]) -> list[Tensor]:
        each = zip(features, model.tasks, strict=True)
        return [F.cross_entropy(model.heads[t](z), targets[t]) for z, t in each]

    def step() -> None:
        optimizer.zero_grad()
        z = model.trunk(inputs)
        if kind in ("loss-only", "search"):
            torch.stack(losses_on([z] * n_tasks)).sum().backward()
            optimizer.step()
            return
        copies = [z.detach().requires_grad_() for _ in range(n_tasks)]
        found = torch.autograd.grad(losses_on(copies), [*copies, *heads])
        back, own = found[:n_tasks], found[n_tasks:]
        if kind == "features":
            shared = torch.autograd.grad(z, trunk, torch.stack(back).sum(0))
        else:
            for g in back:
                shared = torch.autograd.grad(z, trunk, g, retain_graph=True)
        if kind == "flat":
            again = model.trunk(inputs) if joint else None
            for i, task in enumerate(model.tasks):
                z_i = model.trunk(inputs) if again is None else again
                loss = F.cross_entropy(model.heads[task](z_i), targets[task])
                shared = torch.autograd.grad(loss, trunk, retain_graph=joint and i + 1 < n_tasks)
            own = torch.autograd.grad(losses_on([c.detach() for c in copies]), heads)
        for p, g in zip((*trunk, *heads), (*shared, *own), strict=True):
            p.grad = g
        optimizer.step()

    return step


def of_recipe(text: str, n_tasks: int) -> Callable[[], object]:
    """The step of a recipe."""
    recipe, model = eq.Recipe.parse(text), network(n_tasks)
    inputs, targets = batch(model)

    def optimizer(parameters: Any, lr: float) -> torch.optim.Optimizer:
        if recipe.needs_sgd:
            return torch.optim.SGD(parameters, lr=lr)
        return torch.optim.Adam(parameters, lr=lr, foreach=True)

    losses = dict.fromkeys(model.tasks, F.cross_entropy)
    step = recipe.build(model, losses, 1e-3, 100, optimizer=optimizer, seed=0)
    return lambda: step(inputs, targets)


def main() -> None:
    """Count, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--where", action="store_true", help="list the operations by name")
    given = parser.parse_args()
    rows = []
    for text in given.recipes:
        recipe = eq.Recipe.parse(text)
        kind = kind_of(recipe)
        joint = recipe.aggregator.parameters.get("perturb") in ("joint", "joint-mean")
        ours = counted(of_recipe(text, given.tasks))
        theirs = counted(bare(kind, given.tasks, joint))
        ratio = ours.total() / theirs.total()
        rows.append(
            {"recipe": text, "passes": kind, "operations": ours.total(), "bare": theirs.total(),
             "ratio": round(ratio, 3)}
        )  # fmt: skip
        if given.where:
            more = {name: n - theirs[name] for name, n in ours.items() if n != theirs[name]}
            print(text, dict(sorted(more.items(), key=lambda pair: -pair[1])))
    print(table(rows))
    if given.json:
        found = {"date": str(datetime.date.today()), "machine": environment(), "tasks": given.tasks}
        write(given.json, {**found, "rows": rows})


if __name__ == "__main__":
    main()
