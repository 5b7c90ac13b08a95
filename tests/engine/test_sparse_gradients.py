"""Sparse gradients: the same training as with dense ones, and sparse again for the optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import equipoise as eq

TASKS = ("click", "buy")
LOSSES = dict.fromkeys(TASKS, F.binary_cross_entropy_with_logits)
WORDS = 30


class Bag(nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, 6, sparse=sparse)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids).mean(1).tanh()


class SumOfBags(nn.Module):
    """nn.EmbeddingBag in the trunk, and the ids go on to heads with tables of their own."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(WORDS, 6, sparse=sparse, mode="sum")
        self.layer = nn.Linear(6, 6)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {"z": self.layer(self.table(ids)).tanh(), "ids": ids}


class OwnTable(nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(WORDS, 1, sparse=sparse), nn.Linear(6, 1)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        return self.last(features["z"]) + self.table(features["ids"]).mean(1)


def bag(sparse: bool) -> eq.SharedTrunk:
    return eq.SharedTrunk(Bag(sparse), {t: nn.Linear(6, 1) for t in TASKS})


def tables_everywhere(sparse: bool) -> eq.SharedTrunk:
    return eq.SharedTrunk(SumOfBags(sparse), {t: OwnTable(sparse) for t in TASKS})


def made(make: Any, sparse: bool) -> eq.SharedTrunk:
    torch.manual_seed(0)
    return make(sparse).double()


def batch(k: int) -> tuple[Tensor, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(k)
    ids = torch.randint(WORDS // 2, (8, 3), generator=g)
    return ids, {t: torch.rand(8, 1, generator=g, dtype=torch.float64) for t in TASKS}


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_same(some: list[Tensor], others: list[Tensor]) -> None:
    for a, b in zip(some, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


RECIPES = (
    "ew", "gls+cagrad", "mgda-ub", "graddrop", "uw+pcgrad", "f-cagrad", "f-cagrad(adaptive=True)",
    "f-cagrad(every=2)", "f-mgda(perturb=joint)", "bls+mgda", "bls(direction=optimizer)", "fbls",
    "famo",
)  # fmt: skip


@pytest.mark.parametrize("make", [bag, tables_everywhere])
@pytest.mark.parametrize("recipe", RECIPES)
def test_trained_as_with_dense_ones(recipe: str, make: Any) -> None:
    found = []
    for sparse in (True, False):
        model = made(make, sparse)
        step = eq.Recipe.parse(recipe).build(
            model, LOSSES, lr=0.1, steps_per_epoch=9, optimizer=torch.optim.SGD
        )
        before = values(model)
        for k in range(3):
            step(*batch(k))
        found.append(values(model))
        assert not torch.equal(before[0], found[-1][0])
    assert_same(*found)


def test_a_plain_sum_is_plain_pytorch() -> None:
    model, plain = made(tables_everywhere, True), made(tables_everywhere, True)
    step = eq.Step(model, LOSSES, torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for k in range(3):
        ids, y = batch(k)
        step(ids, y)
        optimizer.zero_grad()
        sum(LOSSES[t](o, y[t]) for t, o in plain(ids).items()).backward()
        optimizer.step()
        for own, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            assert own.grad.is_sparse == theirs.grad.is_sparse
    assert_same(values(model), values(plain))


@pytest.mark.parametrize("aggregator", [eq.Sum, eq.CAGrad])
@pytest.mark.parametrize("form", ["trunk", "closure"])
def test_sparse_adam_moves_the_rows_that_were_looked_up(form: str, aggregator: Any) -> None:
    model = made(bag, True)
    table = model.trunk.table.weight
    optimizers = torch.optim.SparseAdam([table]), torch.optim.SGD(model.heads.parameters(), lr=0.1)
    ids, y = batch(0)
    ids[0] = 7
    before = table.detach().clone()
    if form == "trunk":
        step = eq.Step(model, LOSSES, optimizers[0], aggregator=aggregator())
        step(ids, y)
    else:
        step = eq.Step(model, TASKS, optimizers[0], aggregator=aggregator())
        step(lambda: {t: LOSSES[t](o, y[t]) for t, o in model(ids).items()})
    assert table.grad.is_sparse
    there = torch.zeros(WORDS, dtype=torch.bool)
    there[ids] = True
    assert torch.equal((table != before).any(1), there)
    assert table.grad.coalesce().indices()[0].tolist() == there.nonzero()[:, 0].tolist()


def test_a_place_with_a_gradient_of_zero_remains_a_place() -> None:
    """SparseAdam moves by its momentum where a gradient is zero, but has a place."""
    model = made(bag, True)
    step = eq.Step(model, LOSSES, torch.optim.SGD(model.parameters(), lr=0.1), None, eq.CAGrad())
    model.trunk.table.weight.data[3] = 50.0  # tanh is flat there
    ids, y = batch(0)
    ids[:] = torch.where(ids == 3, 4, ids)
    ids[0] = 3
    step(ids, y)
    gradient = model.trunk.table.weight.grad.coalesce()
    assert 3 in gradient.indices()[0]
    assert not gradient.to_dense()[3].any()


@pytest.mark.parametrize("recipe", [None, "mgda"])
def test_clipping(recipe: str | None) -> None:
    found = []
    for sparse in (True, False):
        model = made(tables_everywhere, sparse)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        aggregator = None if recipe is None else eq.MGDA()
        step = eq.Step(model, LOSSES, optimizer, aggregator=aggregator, clip_norm=0.01)
        step(*batch(0))
        norms = [float(p.grad.to_dense().norm()) for p in model.parameters()]
        assert sum(n * n for n in norms) ** 0.5 == pytest.approx(0.01, rel=1e-3)
        found.append(values(model))
    assert_same(*found)


def test_backward_adds_up() -> None:
    found = []
    for sparse in (True, False):
        model = made(tables_everywhere, sparse)
        for k in range(2):  # the second one adds to the first
            ids, y = batch(k)
            losses = [LOSSES[t](o, y[t]) for t, o in model(ids).items()]
            eq.backward(losses, model.shared_parameters(), eq.CAGrad())
        assert model.trunk.table.weight.grad.is_sparse == sparse
        assert model.heads["buy"].table.weight.grad.is_sparse == sparse
        found.append([p.grad.to_dense() for p in model.parameters()])
    assert_same(*found)


def test_dense_where_one_task_asks_for_all() -> None:
    """A table that one task also multiplies by: its gradient is dense, as in plain PyTorch."""
    found = []
    for sparse in (True, False):
        torch.manual_seed(0)
        table = nn.Embedding(WORDS, 6, sparse=sparse).double()
        optimizer = torch.optim.SGD(table.parameters(), lr=0.1)
        step = eq.Step(table, TASKS, optimizer, aggregator=eq.MGDA())
        ids, y = batch(0)

        def losses(table: Any = table, ids: Tensor = ids) -> dict[str, Tensor]:
            return {
                "click": table(ids).square().mean(),
                "buy": (table(ids).sum(1) @ table.weight.T).square().mean(),
            }

        step(losses)
        assert not table.weight.grad.is_sparse
        found.append([table.weight.detach()])
    assert_same(*found)


def test_infinite_sparse_gradients_are_refused() -> None:
    model = made(bag, True)
    step = eq.Step(model, LOSSES, torch.optim.SGD(model.parameters(), lr=0.1))
    model.trunk.table.weight.register_hook(lambda g: g * float("inf"))
    before = values(model)
    with pytest.raises(eq.EquipoiseError, match="task 'click'"):
        step(*batch(0))
    assert_same(before, values(model))


@pytest.mark.parametrize("recipe", ["ew", "cagrad", "f-cagrad", "f-mgda(perturb=joint)"])
def test_loops_of_the_users(recipe: str) -> None:
    """Micro-batches that are gathered, and gradients that are added up by `backward`."""
    found = []
    for sparse in (True, False):
        model = made(tables_everywhere, sparse)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = eq.Recipe.parse(recipe).build(
            model, LOSSES, lr=0.1, steps_per_epoch=9, optimizer=lambda ps, lr, made=optimizer: made
        )
        step.collect(*batch(0))
        step(*batch(1))
        assert model.trunk.table.weight.grad.is_sparse == sparse
        optimizer.zero_grad()
        step.backward(*batch(2))
        step.backward(*batch(3))
        optimizer.step()
        assert model.heads["buy"].table.weight.grad.is_sparse == sparse
        found.append(values(model))
    assert_same(*found)


@pytest.mark.parametrize("recipe", ["ew", "cagrad", "f-cagrad"])
def test_a_scaler(recipe: str) -> None:
    found = []
    for sparse in (True, False):
        model = made(tables_everywhere, sparse).float()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        stages = {"aggregator": None if recipe == "ew" else eq.CAGrad()}
        if recipe == "f-cagrad":
            stages["sharpness"] = eq.TaskSharpness(0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        step = eq.Step(model, LOSSES, optimizer, scaler=scaler, clip_norm=0.05, **stages)
        for k in range(2):
            ids, y = batch(k)
            assert step(ids, {t: v.float() for t, v in y.items()}).accepted
        found.append(values(model))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
