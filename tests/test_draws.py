"""Draws from `random` and numpy are repeated as torch's are, saved, and taken back on an error."""

import io
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import equipoise as eq
from equipoise import draws
from equipoise.draws import RandomState

SOURCES: dict[str, Callable[[], float]] = {
    "torch": lambda: float(torch.rand(())),
    "random": random.random,
    "numpy": np.random.rand,
    "numpy, one normal number of a pair": lambda: float(np.random.randn()),
    "random, one normal number of a pair": lambda: random.gauss(0, 1),
}
RECIPES = ("f-cagrad(rho=0.001)", "bls", "fbls(verify=true)", "famo")
each_source = pytest.mark.parametrize("source", SOURCES)


class Drawing(nn.Linear):
    """Multiplies its output by a number that it draws, from call `first` on."""

    def __init__(self, source: str, size: int = 6, first: int = 0) -> None:
        super().__init__(size, size)
        self.source, self.first, self.drawn = source, first, []

    def forward(self, x: Tensor) -> Tensor:
        self.drawn.append(SOURCES[self.source]() if len(self.drawn) >= self.first else 1.0)
        return super().forward(x) * self.drawn[-1]


def seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def step_of(recipe: str, trunk: nn.Module, closure: bool = False) -> eq.Step:
    heads = {"a": nn.Sequential(Drawing("random"), nn.Linear(6, 1)), "b": nn.Linear(6, 1)}
    model = eq.SharedTrunk(trunk, heads)
    losses = {"a": F.mse_loss, "b": F.l1_loss}
    given = list(losses) if closure else losses
    return eq.Recipe.parse(recipe).build(model, given, lr=1e-3, steps_per_epoch=9)


def batch() -> tuple[Tensor, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(12, 6, generator=g), {t: torch.randn(12, 1, generator=g) for t in "ab"}


def make(step: eq.Step, closure: bool = False) -> eq.StepReport:
    x, y = batch()
    if not closure:
        return step(x, y)

    def losses() -> dict[str, Tensor]:
        outputs = step.model(x)
        return {t: F.mse_loss(outputs[t], y[t]) for t in outputs}

    return step(losses)


def present() -> list[object]:
    return [
        torch.get_rng_state().tolist(),
        random.getstate(),
        str(np.random.get_state()),
        np.random.get_state()[1].tolist(),
    ]


@pytest.mark.parametrize("recipe", RECIPES)
@each_source
@pytest.mark.parametrize("closure", [False, True])
def test_all_looks_at_a_batch_draw_the_same(recipe: str, source: str, closure: bool) -> None:
    if closure and recipe.startswith("fbls"):
        pytest.skip("needs a trunk")
    seed()
    trunk = Drawing(source)
    step = step_of(recipe, trunk, closure)
    for _ in range(4):
        trunk.drawn.clear()
        make(step, closure)
        assert len(trunk.drawn) > 1 or recipe.startswith("fbls")
        assert len(set(trunk.drawn)) == 1
        head = step.model.heads["a"][0]
        assert len(set(head.drawn)) == 1
        head.drawn.clear()
        # And goes on as if it had been called once.
    after = present()
    seed()
    again = Drawing(source)
    step = step_of("ew", again, closure)
    for _ in range(4):
        make(step, closure)
    assert present() == after


def test_a_generator_of_ones_own_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/messages.md says: each look draws anew."""
    generator = torch.Generator().manual_seed(3)
    monkeypatch.setitem(SOURCES, "own", lambda: float(torch.rand((), generator=generator)))
    trunk = Drawing("own")
    make(step_of("f-cagrad(rho=0.001)", trunk))
    assert len(set(trunk.drawn)) == len(trunk.drawn) == 3


@pytest.mark.parametrize("source", ["random", "numpy"])
def test_a_network_that_starts_to_draw_later(source: str) -> None:
    seed()
    trunk = Drawing(source, first=7)
    step = step_of("f-cagrad", trunk)
    for _ in range(5):
        start = len(trunk.drawn)
        make(step)
        seen = trunk.drawn[start:]
        if start >= 7:
            assert len(set(seen)) == 1


@each_source
@pytest.mark.parametrize("recipe", ["ew", "cagrad", "f-cagrad"])
def test_a_step_that_raises_has_drawn_nothing(recipe: str, source: str) -> None:
    seed()
    step = step_of(recipe, Drawing(source))
    make(step)
    before = present()
    x, y = batch()
    for inputs, error in ((x * torch.nan, eq.NonFiniteError), (x[:, :3], RuntimeError)):
        with pytest.raises(error):
            step(inputs, y)
        assert present() == before


@each_source
def test_a_state_read_weights_only_continues_the_draws(source: str) -> None:
    seed()
    step = step_of("f-cagrad", Drawing(source))
    make(step)
    file = io.BytesIO()
    torch.save(step.state_dict(), file)
    expected = [draw() for draw in SOURCES.values()], make(step).losses
    file.seek(0)
    other = step_of("f-cagrad", Drawing(source))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert [draw() for draw in SOURCES.values()] == expected[0]
    assert torch.equal(make(other).losses, expected[1])


def test_a_state_that_knows_torch_alone_leaves_the_others() -> None:
    seed()
    step = step_of("ew", Drawing("numpy"))
    state = step.state_dict()
    del state["random"]["python"], state["random"]["numpy"]
    expected = present()[1:]
    torch.rand(3)
    step.load_state_dict(state)
    assert present()[1:] == expected
    assert torch.equal(torch.get_rng_state(), state["random"]["cpu"])


def test_what_was_not_drawn_from_is_left_alone() -> None:
    seed()
    state = RandomState()
    np.random.rand()
    state.forget_unused()
    assert state.python is None and state.numpy is not None
    expected = random.random()
    state.restore()
    assert random.random() != expected


@pytest.mark.parametrize("draw", [np.random.rand, np.random.randn, lambda: np.random.seed(3)])
@pytest.mark.parametrize("known", [False, True])
def test_numpys_state_is_never_an_old_one(draw: Callable[[], object], known: bool) -> None:
    np.random.seed(5)
    for _ in range(4):
        if known:
            draws.numpy_state()
        draw()
        found, expected = draws.numpy_state(), np.random.get_state(legacy=False)
        assert str(found) == str(expected)
        assert found["state"]["key"].tolist() == expected["state"]["key"].tolist()


def test_numpy_is_asked_once_if_nobody_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    np.random.seed(5)
    first = draws.numpy_state()

    def refuse(legacy: bool) -> None:
        pytest.fail("takes 40 us")

    monkeypatch.setattr(np.random, "get_state", refuse)
    assert draws.numpy_state() is first


def test_numpy_without_a_known_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(np.random, "get_bit_generator")  # as before numpy 1.24
    np.random.seed(5)
    state = RandomState()
    expected = np.random.rand(3).tolist()
    state.restore()
    assert np.random.rand(3).tolist() == expected


def test_the_state_of_python_is_what_python_says() -> None:
    choose = random.Random(0)
    for _ in range(300):
        choose.choice(
            [random.random, lambda: random.gauss(0, 1), lambda: random.seed(choose.random())]
        )()
        assert draws.python_state() == random.getstate()
