"""What a step dispatches besides its passes does not grow with the number of parameters."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import all_tasks
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import equipoise as eq

TASKS = ("a", "b", "c")


class Operations(TorchDispatchMode):
    """Counts the operations in its body, but for views and numbers on the host (float64)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, _: Any, given: Any = (), named: Any = None) -> Any:
        found = function(*given, **(named or {}))
        results = [x for x in torch.utils._pytree.tree_leaves(found) if isinstance(x, Tensor)]
        view = any(r.alias_info and not r.alias_info.is_write for r in function._schema.returns)
        if not view and not any(x.dtype == torch.float64 for x in results):
            self.seen[function.overloadpacket.__name__] += 1
        return found


def network(depth: int) -> eq.SharedTrunk:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()) for _ in range(depth)]
    return eq.SharedTrunk(nn.Sequential(*layers), {task: nn.Linear(4, 1) for task in TASKS})


def operations(recipe: str, depth: int) -> Counter[str]:
    """Those of a step, without those of the forward and backward passes and of the optimizer."""
    model = network(depth)
    losses = all_tasks(model, F.mse_loss)
    step = eq.Recipe.parse(recipe).build(model, losses, 0.1, 9, optimizer=torch.optim.SGD, seed=0)
    batch = torch.randn(8, 4), {task: torch.randn(8, 1) for task in TASKS}
    for _ in range(2):
        step(*batch)
    with Operations() as counted:
        step(*batch)
    return counted.seen


PASSES = (
    "addmm", "mm", "t", "sum", "tanh", "tanh_backward", "native_batch_norm", "empty",
    "native_batch_norm_backward", "add_",  # of BatchNorm's counters, and of its backward pass
    "view", "detach", "expand",
)  # fmt: skip


@pytest.mark.parametrize("recipe", ["ew", "si", "mgda-ub", "cagrad", "si+upgrad", "f-mgda"])
def test_deeper_networks_cost_passes_alone(recipe: str) -> None:
    shallow, deep = operations(recipe, 2), operations(recipe, 6)
    more = {name: n - shallow[name] for name, n in deep.items() if n != shallow[name]}
    assert more["addmm"] > 0, "else nothing was counted"
    assert set(more) <= set(PASSES), more


def test_one_launch_a_list() -> None:
    seen = operations("cagrad", 6)
    assert seen["_foreach_copy_"] == len(TASKS), "a row each"
    assert seen["cat"] <= 2, "all buffers of a kind at once"
    assert seen["clone"] == seen["copy_"] == 0
    flat = operations("f-cagrad", 6)
    assert flat["clone"] == 0
