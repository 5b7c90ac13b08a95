"""What several tests of the core share: small networks, batches, snapshots, a slow reference."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import equipoise as eq

TWO = ("left", "right")
THREE = ("a", "b", "c")

# ------------------------------------------------------------------------------- networks


def linear_model(
    tasks: Sequence[str] = TWO, seed: int = 0, dtype: torch.dtype = torch.float64
) -> eq.SharedTrunk:
    """Give a smooth network without randomness and buffers: 5 inputs, 6 features, 1 output."""
    torch.manual_seed(seed)
    trunk = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh())
    heads = {t: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)) for t in tasks}
    return eq.SharedTrunk(trunk, heads).to(dtype)


def conv_model(
    tasks: Sequence[str] = TWO, seed: int = 0, dtype: torch.dtype = torch.float32
) -> eq.SharedTrunk:
    """Give a small convolutional network with BatchNorm and Dropout: (B, 1, 6, 6) to 3 classes."""
    torch.manual_seed(seed)
    trunk = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 12),
        nn.Dropout(0.1),
    )
    heads = {t: nn.Sequential(nn.ReLU(), nn.Dropout(0.1), nn.Linear(12, 3)) for t in tasks}
    return eq.SharedTrunk(trunk, heads).to(dtype)


class Counted(nn.Module):
    """Runs `module`, and counts how often forwards and backwards pass its end."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.forwards = self.backwards = 0

    def forward(self, x: Any) -> Any:
        self.forwards += 1
        return _CountBackward.apply(self.module(x), self)

    def counts(self) -> tuple[int, int]:
        """Give (forwards, backwards) since the last call."""
        seen = (self.forwards, self.backwards)
        self.forwards = self.backwards = 0
        return seen


class _CountBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counter: Counted) -> Tensor:
        ctx.counter = counter
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.counter.backwards += 1
        return gradient, None


# --------------------------------------------------------------------------------- batches

Batch = tuple[Tensor, dict[str, Tensor]]


def regression_batch(
    tasks: Sequence[str] = TWO, seed: int = 0, n: int = 8, dtype: torch.dtype = torch.float64
) -> Batch:
    """Give inputs (n, 5) and a target (n, 1) of its own scale for each task."""
    g = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, 5, generator=g, dtype=dtype)
    targets = {
        task: torch.randn(n, 1, generator=g, dtype=dtype) * (1 + k) for k, task in enumerate(tasks)
    }
    return inputs, targets


def class_batch(
    tasks: Sequence[str] = TWO, seed: int = 0, n: int = 8, dtype: torch.dtype = torch.float32
) -> Batch:
    """Give images (n, 1, 6, 6) and a class of 3 for each task."""
    g = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, 1, 6, 6, generator=g, dtype=dtype)
    return inputs, {task: torch.randint(3, (n,), generator=g) for task in tasks}


def all_tasks(model: eq.SharedTrunk, loss: Callable[[Any, Any], Tensor]) -> dict[str, Callable]:
    """Give every task of a model the same loss."""
    return dict.fromkeys(model.tasks, loss)


def sgd(model: nn.Module, lr: float = 0.1, **options: Any) -> torch.optim.Optimizer:
    """Give SGD over all parameters."""
    return torch.optim.SGD(model.parameters(), lr=lr, **options)


def regression_step(
    weighting: Any = None,
    aggregator: Any = None,
    tasks: Sequence[str] = TWO,
    momentum: float = 0.9,
    **options: Any,
) -> eq.Step:
    """Give a Step in float64 on `linear_model`, with SGD."""
    model = linear_model(tasks)
    optimizer = sgd(model, momentum=momentum)
    return eq.Step(model, all_tasks(model, F.mse_loss), optimizer, weighting, aggregator, **options)


def class_step(
    weighting: Any = None,
    aggregator: Any = None,
    tasks: Sequence[str] = TWO,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> eq.Step:
    """Give a Step on `conv_model`, with Adam: everything that a failing step could spoil."""
    model = conv_model(tasks, dtype=dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = all_tasks(model, F.cross_entropy)
    return eq.Step(model, losses, optimizer, weighting, aggregator, **options)


# ------------------------------------------------------------------------------- snapshots


def snapshot(step: eq.Step) -> dict[str, Any]:
    """Copy all that a step could change: also `.grad`, modes and the global random state."""
    parts: dict[str, Any] = {
        "model": step.model.state_dict(),
        "grad": {name: p.grad for name, p in step.model.named_parameters()},
        "optimizer": step.optimizer.state_dict(),
        "random": torch.get_rng_state(),
    }
    for name in ("weighting", "aggregator"):
        stage = getattr(step, name)
        if isinstance(stage, nn.Module):
            parts[name] = stage.state_dict()
            parts[name + ".grad"] = {n: p.grad for n, p in stage.named_parameters()}
    return deepcopy(parts)


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Name every place at which two nested structures differ by a single bit, or in dtype."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and _bytes(a).equal(_bytes(b))
        return [] if same else [path]
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        found = [f"{path}/{key}" for key in {*a} ^ {*b}]
        for key in a:
            if key in b:
                found += differences(a[key], b[key], f"{path}/{key}")
        return found
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return [path]
        return [d for i in range(len(a)) for d in differences(a[i], b[i], f"{path}/{i}")]
    if isinstance(a, eq.StepReport) and isinstance(b, eq.StepReport):
        return differences(vars(a), vars(b), path)
    if isinstance(a, float) and isinstance(b, float) and a != a and b != b:
        return []
    return [] if type(a) is type(b) and a == b else [path]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    """Copy the parameters by name."""
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def largest_difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Give the largest difference of any parameter, relative to the largest entry of it."""
    assert a.keys() == b.keys()
    return max(((a[k] - b[k]).abs().max() / b[k].abs().max().clamp_min(1e-300)).item() for k in a)


# ------------------------------------------------------------------------------- reference


def reference_step(
    model: eq.SharedTrunk,
    losses: Mapping[str, Callable],
    optimizer: torch.optim.Optimizer,
    weighting: Callable[[Tensor], Tensor],
    aggregator: Callable[[Tensor], Tensor],
    level: str,
    inputs: Any,
    targets: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Make one step by plain autograd: a full backward for each task through one undivided graph.

    All tasks must be present and the trunk must return one tensor. Gives what a report holds.
    """
    shared = [p for p in model.trunk.parameters() if p.requires_grad]
    features = model.trunk(inputs)
    found = [losses[t](model.heads[t](features), targets[t]) for t in model.tasks]
    values = torch.stack(found)
    weighted = weighting(values)
    needs_losses = getattr(aggregator, "needs_losses", False)
    extra = (values.detach(),) if needs_losses else ()

    rows = torch.stack([concatenated(one, shared) for one in weighted])
    looked_at = rows
    if level == "features":
        looked_at = torch.stack([concatenated(one, [features]) for one in weighted])
        w = aggregator.coefficients(looked_at @ looked_at.T, *extra)
        direction = sum(w[i].to(rows) * rows[i] for i in range(len(rows)))
    else:
        direction = aggregator(rows, *extra)

    optimizer.zero_grad()
    weighting_parameters: list = []
    if isinstance(weighting, nn.Module):
        weighting_parameters = list(weighting.parameters())
    own = [p for task in model.tasks for p in model.heads[task].parameters()]
    others = [*own, *weighting_parameters]
    gradients = torch.autograd.grad(weighted.sum(), others, allow_unused=True)
    for p, gradient in zip(others, gradients, strict=True):
        p.grad = gradient
    position = 0
    for p in shared:
        p.grad = direction[position : position + p.numel()].view_as(p).clone()
        position += p.numel()
    optimizer.step()
    return {
        "losses": values.detach(),
        "gram": (looked_at @ looked_at.T).detach(),
        "direction_norm": direction.norm().detach(),
    }


def concatenated(value: Tensor, of: Iterable[Tensor]) -> Tensor:
    """Give the gradient of a scalar as one vector, zeros where it does not reach."""
    of = list(of)
    parts = torch.autograd.grad(value, of, retain_graph=True, allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(x) if g is None else g).reshape(-1)
            for g, x in zip(parts, of, strict=True)
        ]
    )


# ----------------------------------------------------------------------------- two processes

RANKED_TASKS = ("a", "b", "c")
PARTS = (slice(0, 5), slice(5, 7))  # of a joint batch of 7 samples
STEPS = 3


def smooth_callable(rows: Tensor) -> Tensor:
    """Aggregate without coefficients."""
    return rows.sum(0) * rows.abs().mean(0)


def ranked_step(recipe: str, seed: int = 0) -> eq.Step:
    """Give the Step of a recipe, or of the plain callable, in float64; SGD with momentum.

    A recipe after "closure " is that of a Step that is called with a closure; one after
    "collected " has two micro-batches in each process.
    """
    recipe = recipe.removeprefix("collected ")
    model = linear_model(RANKED_TASKS)
    losses: Any = all_tasks(model, F.mse_loss)
    if recipe.startswith("closure "):
        recipe, losses = recipe.removeprefix("closure "), list(RANKED_TASKS)

    def optimizer(parameters: Any, lr: float) -> torch.optim.Optimizer:
        if recipe != "callable" and eq.Recipe.parse(recipe).needs_sgd:
            return torch.optim.SGD(parameters, lr=lr)
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=0.01)

    if recipe == "callable":
        given = optimizer(model.parameters(), 0.1)
        return eq.Step(model, losses, given, None, smooth_callable)
    return eq.Recipe.parse(recipe).build(model, losses, 0.1, 1, optimizer=optimizer, seed=seed)


def ranked_batch(k: int, part: slice = slice(None)) -> tuple[Tensor, dict, dict]:
    """Give batch k, or one process's part of it.

    Task b has labels in the first part only, and is absent from the second part's targets; some
    samples of c are masked out, some of a are NaN. In the last batch c has no labels at all.
    """
    inputs, targets = regression_batch(RANKED_TASKS, seed=k, n=7)
    targets["a"][[1, 6]] = torch.nan
    targets["b"][5:] = torch.nan
    keep = torch.tensor([True, False, True, True, True, True, False])
    if k == STEPS - 1:
        targets["c"] = torch.full_like(targets["c"], torch.nan)
    given = {task: target[part] for task, target in targets.items()}
    if part == PARTS[1]:
        del given["b"]
    return inputs[part], given, {"c": keep[part]}


def ranked_call(
    step: eq.Step, batch: tuple[Tensor, dict, dict], collected: bool = False
) -> eq.StepReport:
    """Make the step of a batch, or of one process's part of it, in two micro-batches if so."""
    if collected:
        inputs, *by_task = batch
        for part in (slice(0, 1), slice(1, None)):
            targets, masks = ({task: x[part] for task, x in given.items()} for given in by_task)
            call = step.collect if part.start == 0 else step
            report = call(inputs[part], targets, masks)
        return report
    if isinstance(step.losses, dict):
        return step(*batch)
    inputs, targets, masks = batch

    def losses() -> dict[str, tuple[Tensor, int]]:
        outputs = step.model(inputs)
        found = {}
        for task, target in targets.items():
            keep = ~target.isnan().any(1) & masks.get(task, torch.tensor(True))
            if keep.any():
                found[task] = F.mse_loss(outputs[task][keep], target[keep]), int(keep.sum())
        return found

    return step(losses)


def run_rank(rank: int, folder: str, recipes: Sequence[str]) -> None:
    """Train as one of two processes, recipe after recipe, and write down what happened."""
    import datetime

    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    found: dict[str, Any] = {}
    for recipe in recipes:
        step = ranked_step(recipe, seed=rank)  # private generators start as on the first process
        collected = recipe.startswith("collected ")
        reports = [ranked_call(step, ranked_batch(k, PARTS[rank]), collected) for k in range(STEPS)]
        found[recipe] = {
            "parameters": parameters_of(step.model),
            "reports": [
                {"losses": r.losses, "weights": r.weights, "coefficients": r.coefficients,
                 "gram": r.gram, "flat_gram": r.flat_gram, "norm": r.direction_norm,
                 "search": (r.step_size, r.trials, r.fallback, r.verified), "slopes": r.slopes}
                for r in reports
            ],
            "columns": None if step._rows is None else step._rows.buffer.shape[1],
            "state": step.weighting.state_dict() if isinstance(step.weighting, nn.Module) else {},
        }  # fmt: skip
    found["errors"] = [_ranked_error(rank, kind) for kind in ("loss", "gradient", "later")]
    found["maps"] = recorded(PARTS[rank], alone_in_looking=rank == 0)
    found["maps error"] = _recording_error(rank)
    found["functional"] = _ranked_backward(PARTS_OF_EQUAL_SIZE[rank])
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


PARTS_OF_EQUAL_SIZE = (slice(0, 4), slice(4, 8))


def _ranked_error(rank: int, kind: str) -> tuple[str, str, list[str]]:
    """Let the loss of b go wrong in the second process only."""
    step = ranked_step("rlw+f-mgda" if kind == "later" else "rlw+mgda")
    inputs, targets, masks = ranked_batch(0, PARTS[rank])
    targets["b"] = torch.zeros(len(inputs), 1, dtype=torch.float64)
    if rank == 1 and kind == "loss":
        step.losses["b"] = lambda output, target: F.mse_loss(output, target) * torch.nan
    if rank == 1 and kind == "gradient":
        step.losses["b"] = lambda output, target: (output - output.detach()).abs().sqrt().sum()
    if rank == 1 and kind == "later":
        calls = itertools.count(1)
        step.losses["b"] = lambda output, target: (
            F.mse_loss(output, target) * (1 if next(calls) == 1 else torch.nan)
        )
    before = snapshot(step)
    try:
        step(inputs, targets, masks)
    except eq.EquipoiseError as error:
        changed = [d for d in differences(before, snapshot(step)) if "grad" not in d]
        return type(error).__name__, str(error), changed
    return "none", "", []


def recorded(part: slice = slice(None), alone_in_looking: bool = True) -> dict[str, Any]:
    """Give the state of maps of the ranked batches, after an epoch in training and a look."""
    from equipoise.grouping import DataMaps, Recorder

    step = ranked_step("ew")
    maps = DataMaps(3, 7, [1, 2])
    record = Recorder(step.model, maps, "regression")
    for k in range(STEPS):
        inputs, targets, masks = ranked_batch(k, part)
        with record(targets, torch.arange(7)[part], masks):
            step(inputs, targets, masks)
    maps.end_epoch()
    inputs, targets, _ = ranked_batch(0)
    batches = [(inputs, targets, torch.arange(7))]
    record.look(batches if alone_in_looking else [])
    maps.end_epoch()
    return maps.state_dict()


def _recording_error(rank: int) -> str:
    """Let the second process train on nothing."""
    from equipoise.grouping import DataMaps, Recorder

    model = linear_model(RANKED_TASKS)
    record = Recorder(model, DataMaps(3, 7, [1]), "regression")
    inputs, targets, masks = ranked_batch(0, PARTS[rank])
    try:
        with record(targets, torch.arange(7)[PARTS[rank]], masks):
            if rank == 0:
                model(inputs)
    except eq.EquipoiseError as error:
        return str(error)
    return "none"


def _ranked_backward(part: slice) -> dict[str, Tensor]:
    """Give the gradients of the functional form on a part of a batch."""
    model = linear_model(RANKED_TASKS)
    inputs, targets = regression_batch(RANKED_TASKS)
    outputs = model(inputs[part])
    losses = {t: F.mse_loss(outputs[t], targets[t][part]) for t in model.tasks}
    eq.backward(losses, model.trunk.parameters(), eq.MGDA())
    return {name: p.grad.clone() for name, p in model.named_parameters()}
