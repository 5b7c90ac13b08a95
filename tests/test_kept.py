"""What modules keep from batch to batch: any kind of buffer, and tensors in plain attributes."""

import gc
import weakref
from collections import deque
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import differences
from torch import Tensor, nn

import equipoise as eq
from equipoise import diagnostics, grouping, kept
from equipoise.buffers import copy_of_buffers, put_back
from equipoise.kept import Attributes

LOSSES = {"a": F.mse_loss, "b": F.l1_loss}
RECIPES = ("ew", "cagrad", "f-cagrad", "bls", "fbls(verify=true)", "famo")
LOOKING = RECIPES[2:]


def batch(seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(12, 8, generator=g), {t: torch.randn(12, 1, generator=g) for t in LOSSES}


def model_with(trunk: nn.Module, head: nn.Module | None = None) -> eq.SharedTrunk:
    return eq.SharedTrunk(trunk, {"a": head or nn.Linear(8, 1), "b": nn.Linear(8, 1)})


def step_of(recipe: str, model: eq.SharedTrunk, closure: bool = False, losses: Any = None) -> Any:
    """A function that makes one step on a batch."""
    losses = losses or LOSSES
    given = list(losses) if closure else losses
    step = eq.Recipe.parse(recipe).build(model, given, lr=1e-3, steps_per_epoch=9)

    def make(x: Tensor, y: dict[str, Tensor]) -> eq.StepReport:
        def values() -> dict[str, Tensor]:
            outputs = model(x)
            return {t: losses[t](outputs[t], y[t]) for t in losses}

        return step(values) if closure else step(x, y)

    return make


# -------------------------------------------------------------------------- kinds of buffers


class Buffered(nn.Linear):
    """Adds its buffer, and with `moves` changes it in each call."""

    def __init__(self, buffer: Tensor | None, moves: bool = False) -> None:
        super().__init__(8, 8)
        self.register_buffer("held", buffer)
        self.register_buffer("nothing", None)
        self.moves = moves

    def forward(self, x: Tensor) -> Tensor:
        if self.moves and self.held is not None:
            self.held.mul_(2)
        if self.moves and self.held is None:
            self.held = x.detach().mean(0)
        return super().forward(x) + self.held


KINDS: dict[str, Callable[[], Tensor]] = {
    "expanded": lambda: torch.ones(1).expand(8),
    "expanded matrix": lambda: torch.arange(8.0).expand(12, 8),
    "overlapping windows": lambda: torch.arange(19.0).unfold(0, 8, 1),
    "each other column": lambda: torch.arange(16.0)[::2],
    "transposed": lambda: torch.arange(96.0).reshape(8, 12).t(),
    "part of a tensor": lambda: torch.arange(30.0)[4:12],
    "a number": lambda: torch.tensor(3.0),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_buffer_of_any_layout(kind: str, recipe: str) -> None:
    trunk = Buffered(KINDS[kind]())
    before, stride = trunk.held.clone(), trunk.held.stride()
    step_of(recipe, model_with(trunk))(*batch())
    assert torch.equal(trunk.held, before)
    assert trunk.held.stride() == stride


@pytest.mark.parametrize("kind", KINDS)
def test_each_layout_is_put_back(kind: str) -> None:
    buffer = KINDS[kind]()
    module, other = Buffered(buffer), nn.Module()
    other.register_buffer("same", buffer)
    both, before = nn.ModuleList([module, other]), buffer.clone()
    saved = copy_of_buffers(both)
    one = buffer[(0,) * buffer.dim()]
    one.fill_(7.0)
    assert not torch.equal(buffer, before)
    put_back(saved)
    assert torch.equal(module.held, before)
    assert module.held is other.same


def test_a_buffer_that_was_none_is_none_again() -> None:
    trunk = Buffered(None, moves=True)
    x, y = batch()
    with pytest.raises(eq.NonFiniteError):
        step_of("ew", model_with(trunk))(x * torch.nan, y)
    assert trunk.held is None
    with eq.frozen_buffers(trunk):
        trunk(x)
        assert trunk.held is not None
    assert trunk.held is None


def test_diagnostics_and_affinity_with_an_expanded_buffer() -> None:
    model = model_with(Buffered(torch.ones(1).expand(8)))
    assert diagnostics.sharpness_curve(model, [batch()], LOSSES, [0, 0.1]).values.isfinite().all()
    affinity = grouping.LookaheadAffinity(model, LOSSES, 0.1)
    assert affinity.update(*batch()).isfinite().all()


# ------------------------------------------------------------------------- buffers of losses


class Scaled(nn.Module):
    """A loss that divides by a moving mean of itself, in a buffer or in an attribute."""

    def __init__(self, in_buffer: bool) -> None:
        super().__init__()
        if in_buffer:
            self.register_buffer("mean", torch.ones(()))
        else:
            self.mean = torch.ones(())
        self.seen: list[float] = []

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.seen.append(float(self.mean))
        loss = F.mse_loss(output, target)
        self.mean.mul_(0.5).add_(loss.detach(), alpha=0.5)
        return loss / self.mean


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("in_buffer", [True, False])
def test_what_a_loss_keeps_moves_once_a_step(recipe: str, in_buffer: bool) -> None:
    torch.manual_seed(0)
    loss, model = Scaled(in_buffer), model_with(nn.Linear(8, 8))
    make = step_of(recipe, model, losses={**LOSSES, "a": loss})
    for k in range(3):
        loss.seen.clear()
        before, x = float(loss.mean), batch(k)
        raw = F.mse_loss(model(x[0])["a"], x[1]["a"]).item()
        make(*x)
        assert set(loss.seen) == {before}
        assert float(loss.mean) == pytest.approx(0.5 * before + 0.5 * raw)
    before = float(loss.mean)
    with pytest.raises(eq.NonFiniteError):
        make(batch()[0] * torch.nan, batch()[1])
    assert float(loss.mean) == before


@pytest.mark.parametrize("penalised", [False, True])
def test_buffers_of_losses_are_saved(penalised: bool) -> None:
    torch.manual_seed(0)

    def build() -> tuple[Scaled, eq.Step]:
        loss, model = Scaled(in_buffer=True), model_with(nn.Linear(8, 8))
        weight = model.trunk.weight

        def other(output: Tensor, target: Tensor) -> Tensor:
            return F.l1_loss(output, target) + penalised * weight.square().sum()

        losses = {"a": loss, "b": other}
        return loss, eq.Step(model, losses, torch.optim.Adam(model.parameters()))

    loss, step = build()
    step(*batch())
    state, mean = step.state_dict(), float(loss.mean)
    expected = step(*batch(1)).losses
    loss, step = build()
    step.load_state_dict(state)
    assert float(loss.mean) == mean
    assert torch.equal(step(*batch(1)).losses, expected)


def test_a_loss_of_torchs_is_no_part_of_the_state() -> None:
    model = model_with(nn.Linear(8, 8))
    losses = {"a": nn.BCEWithLogitsLoss(pos_weight=torch.ones(1)), "b": nn.MSELoss()}
    assert kept.whole_of(model, losses.values()) is model


# -------------------------------------------------------------------------- plain attributes


class Recurrent(nn.Module):
    """Goes on where the batch before has ended; remembers where each call has begun."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.cell = way, nn.GRUCell(8, 8)
        self.seen: list[Tensor] = []
        zeros = torch.zeros(12, 8)
        self.h: Any = {
            "replaced": None, "tuple": None, "in place": zeros, "made, then in place": None,
            "list": [zeros], "dict": {}, "deque": deque([zeros], maxlen=1), "nested": ([zeros], {}),
            "through data": zeros,
        }[way]  # fmt: skip

    def state(self) -> Tensor:
        h = self.h
        if isinstance(h, tuple):
            h = h[0]
        if isinstance(h, list | deque):
            h = h[0]
        if isinstance(h, dict):
            h = h.get("h")
        return torch.zeros(12, 8) if h is None else h.clone()

    def forward(self, x: Tensor) -> Tensor:
        start = self.state()
        self.seen = [*self.seen, start]
        out = self.cell(x, start)
        new = out.detach()
        if self.way in ("in place", "through data") or (
            self.way == "made, then in place" and self.h is not None
        ):
            target = self.h.data if self.way == "through data" else self.h
            target.copy_(new)
        elif self.way == "list":
            self.h[0] = new
        elif self.way == "dict":
            self.h["h"] = new
        elif self.way == "deque":
            self.h.append(new)
        elif self.way == "nested":
            self.h[0][0] = new
        elif self.way == "tuple":
            self.h = (new, new + 1)
        else:
            self.h = new.clone()
        self.features = out  # a cache that nobody needs
        return out


WAYS = (
    "replaced", "tuple", "in place", "made, then in place", "list", "dict", "deque", "nested",
    "through data",
)  # fmt: skip


def _recording(record: list[Tensor]) -> type:
    """A Recurrent whose calls are remembered in `record`, which is no attribute."""

    class Recording(Recurrent):
        @property
        def seen(self) -> list[Tensor]:
            return record

        @seen.setter
        def seen(self, values: list[Tensor]) -> None:
            record[:] = values

    return Recording


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("recipe", LOOKING)
@pytest.mark.parametrize("place", ["trunk", "head", "closure"])
def test_every_look_starts_from_the_same_state(way: str, recipe: str, place: str) -> None:
    if place == "closure" and recipe.startswith("fbls"):
        pytest.skip("needs a trunk")
    torch.manual_seed(0)
    record: list[Tensor] = []
    part = _recording(record)(way)
    head = nn.Sequential(part, nn.Linear(8, 1))
    model = model_with(nn.Linear(8, 8), head) if place == "head" else model_with(part)
    make = step_of(recipe, model, place == "closure")
    looks = 0
    for k in range(3):
        record.clear()
        x, y = batch(k)
        start = part.state()
        expected = part.cell(model.trunk(x) if place == "head" else x, start).detach()
        make(x, y)
        looks = max(looks, len(record))
        assert all(torch.equal(seen, start) for seen in record)
        assert torch.equal(part.state(), expected)  # one step further, by the clean parameters
    assert looks > 1
    before = part.state()
    with pytest.raises(eq.NonFiniteError):
        make(x * torch.nan, y)
    assert torch.equal(part.state(), before)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("recipe", ["ew", "f-cagrad"])
def test_a_first_step_that_raises_leaves_no_state(way: str, recipe: str) -> None:
    part = Recurrent(way)
    before, kind, names = part.state(), type(part.h), set(part.__dict__)
    make = step_of(recipe, model_with(part))
    x, y = batch()
    with pytest.raises(eq.NonFiniteError):
        make(x * torch.nan, y)
    assert torch.equal(part.state(), before)
    assert type(part.h) is kind
    assert set(part.__dict__) == names  # no `features` yet


def test_the_state_of_a_head_whose_labels_come_later() -> None:
    record: list[Tensor] = []
    part = _recording(record)("replaced")
    make = step_of("f-cagrad", model_with(nn.Linear(8, 8), nn.Sequential(part, nn.Linear(8, 1))))
    x, y = batch()
    make(x, {"b": y["b"]})
    assert record == []
    for _ in range(2):
        record.clear()
        start = part.state()
        make(x, y)
        assert len(record) > 1
        assert all(torch.equal(seen, start) for seen in record)


def test_a_task_that_never_comes_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    searches, search = [], kept._held
    monkeypatch.setattr(kept, "_held", lambda module: searches.append(1) or search(module))
    model, x = model_with(nn.Linear(8, 8), nn.Sequential(Recurrent("replaced"))), batch()[0]
    step = eq.Step(model, ["a", "b"], torch.optim.SGD(model.parameters(), lr=0.1))

    def make(tasks: str) -> int:
        searches.clear()
        step(lambda: {t: model(x)[t].mean() for t in tasks})
        return len(searches)

    counts = [make("b") for _ in range(22)]
    assert counts[0] == counts[19] > 0
    assert counts[20:] == [0, 0]
    assert make("ab") == 0
    assert make("ab") > 0  # one step late
    assert make("ab") == 0


def test_frozen_buffers_keeps_the_state_of_any_network() -> None:
    part, (x, _) = Recurrent("replaced"), batch()
    part(x)
    before = part.state()
    with eq.frozen_buffers(part):
        part(x)
        assert not torch.equal(part.state(), before)
    assert torch.equal(part.state(), before)


def test_an_alias_of_a_parameter_does_not_undo_a_perturbation() -> None:
    def flat(alias: bool) -> Tensor:
        torch.manual_seed(0)
        trunk = nn.Linear(8, 8)
        if alias:
            trunk.alias = trunk.weight.data
        make = step_of("f-cagrad(rho=0.1)", model_with(trunk))
        return make(*batch()).flat_gram

    assert torch.equal(flat(alias=True), flat(alias=False))


class Remembering(nn.Linear):
    """Logs what it has seen, and counts."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.log: list[Tensor] = []
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.log.append(x)
        return super().forward(x)


def test_logs_and_numbers_are_no_state() -> None:
    part = Remembering()
    step_of("f-cagrad", model_with(part))(*batch())
    assert part.calls == len(part.log) > 1


def test_a_cache_keeps_no_graph_and_no_network_alive() -> None:
    part = Recurrent("replaced")
    model = model_with(part)
    make = step_of("f-cagrad", model)
    make(*batch())
    make(*batch(1))
    assert part.features.grad_fn is None
    watched = weakref.ref(part)
    assert model in kept._known
    del part, model, make
    gc.collect()
    assert watched() is None


def test_later_steps_do_not_search(monkeypatch: pytest.MonkeyPatch) -> None:
    for closure in (False, True):
        make = step_of("f-cagrad", model_with(nn.Linear(8, 8)), closure)
        make(*batch())
        with monkeypatch.context() as patch:
            patch.setattr(kept, "_held", lambda module: pytest.fail("searches all attributes"))
            make(*batch(1))


@pytest.mark.parametrize("recipe", ["ew", "f-cagrad"])
def test_weight_norm_of_the_old_kind_is_a_cache(recipe: str) -> None:
    def train(search: bool, patch: pytest.MonkeyPatch) -> dict[str, Tensor]:
        torch.manual_seed(0)
        with pytest.warns(FutureWarning):
            trunk = torch.nn.utils.weight_norm(nn.Linear(8, 8))
        if not search:
            patch.setattr(kept, "_held", lambda module: [])
        model = model_with(trunk)
        make = step_of(recipe, model)
        for k in range(3):
            make(*batch(k))
        return {n: p.detach().clone() for n, p in model.named_parameters()}

    with pytest.MonkeyPatch.context() as patch:
        assert differences(train(True, patch), train(False, patch)) == []


def test_attributes_before_and_after_a_search() -> None:
    module = nn.Linear(2, 2)
    module.moving, module.still = torch.zeros(2), torch.ones(2)
    start = Attributes(module)
    module.moving += 1
    module.new = torch.ones(1)
    start.found(final=True)
    start.put_back()
    assert module.moving.tolist() == [0, 0]
    assert not hasattr(module, "new")
    later = Attributes(module)
    module.still, module.moving = torch.zeros(2), None
    later.put_back()  # knows by now what moves
    assert module.moving.tolist() == [0, 0]
    assert module.still.tolist() == [0, 0]
    assert deepcopy(module) not in kept._known
