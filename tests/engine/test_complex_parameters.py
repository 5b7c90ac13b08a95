"""Complex parameters are trained as the pairs of real numbers that they are."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import equipoise as eq

TASKS = ("mass", "energy")


class Spectral(nn.Module):
    """A layer of a Fourier neural operator, its weight complex or a pair of real ones."""

    def __init__(self, width: int, modes: int, as_complex: bool) -> None:
        super().__init__()
        self.modes = modes
        self.bias = nn.Parameter(0.1 * torch.randn(3, dtype=torch.float64))  # an odd offset
        weight = 0.3 * torch.randn(width, modes, dtype=torch.complex128)
        if as_complex:
            self.weight = nn.Parameter(weight)
        else:
            self.real, self.imag = nn.Parameter(weight.real.clone()), nn.Parameter(weight.imag + 0)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if hasattr(self, "weight") else torch.complex(self.real, self.imag)
        spectrum = torch.fft.rfft(x, dim=-1)[..., : self.modes] * weight
        return torch.fft.irfft(spectrum, n=x.shape[-1], dim=-1).tanh() + self.bias.sum()


class Readout(nn.Module):
    def __init__(self, as_complex: bool) -> None:
        super().__init__()
        self.spectral, self.last = Spectral(2, 3, as_complex), nn.Linear(8, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.spectral(x)).mean(1)


def model(as_complex: bool) -> eq.SharedTrunk:
    torch.manual_seed(0)
    trunk = Spectral(2, 4, as_complex)
    return eq.SharedTrunk(trunk, {task: Readout(as_complex) for task in TASKS})


def batch(k: int) -> tuple[Tensor, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(k)
    x = torch.randn(5, 2, 8, generator=g, dtype=torch.float64)
    return x, {t: torch.randn(5, 1, generator=g, dtype=torch.float64) for t in TASKS}


def losses_of(net: nn.Module, x: Tensor, y: dict[str, Tensor]) -> dict[str, Tensor]:
    return {t: F.mse_loss(o, y[t]) for t, o in net(x).items()}


def numbers(net: nn.Module) -> dict[str, Tensor]:
    """Give all parameters as real ones, by the name of the complex one."""
    found: dict[str, Tensor] = {}
    for name, p in net.named_parameters():
        if p.is_complex():
            found[name] = torch.view_as_real(p.detach())
        elif name.endswith("real"):
            imag = net.get_parameter(name.removesuffix("real") + "imag")
            found[name.removesuffix("real") + "weight"] = torch.stack([p, imag], -1).detach()
        elif not name.endswith("imag"):
            found[name] = p.detach()
    return found


RECIPES = (
    "ew", "cagrad", "si+mgda-ub", "graddrop-ub", "uw+pcgrad", "f-cagrad", "f-cagrad(adaptive=True)",
    "f-mgda(perturb=joint,norm=joint)", "bls+mgda", "bls(direction=optimizer)", "fbls",
)  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
def test_as_pairs_of_real_ones(recipe: str) -> None:
    found = []
    for as_complex in (True, False):
        net = model(as_complex)
        step = eq.Recipe.parse(recipe).build(
            net, dict.fromkeys(TASKS, F.mse_loss), lr=0.05, steps_per_epoch=9,
            optimizer=torch.optim.SGD,
        )  # fmt: skip
        reports = [step(*batch(k)) for k in range(3)]
        found.append((numbers(net), reports[-1]))
    (theirs, last), (pairs, last_of_pairs) = found
    assert any("weight" in name for name in theirs)
    before = numbers(model(True))
    for name, value in theirs.items():
        assert not torch.equal(value, before[name]), name
        torch.testing.assert_close(value, pairs[name], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(last.losses, last_of_pairs.losses, rtol=1e-9, atol=0)
    if last.gram is not None:
        torch.testing.assert_close(last.gram, last_of_pairs.gram, rtol=1e-7, atol=1e-12)


def test_clipping_and_a_closure() -> None:
    found = []
    for as_complex in (True, False):
        net = model(as_complex)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        step = eq.Step(net, TASKS, optimizer, aggregator=eq.CAGrad(), clip_norm=0.05)
        for k in range(2):
            step(partial(losses_of, net, *batch(k)))
        found.append(numbers(net))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("features", [False, True])
def test_backward(features: bool) -> None:
    found = []
    for as_complex in (True, False):
        net = model(as_complex)
        x, y = batch(0)
        z = net.trunk(x)
        losses = {t: F.mse_loss(net.head(t, z), y[t]) for t in TASKS}
        result = eq.backward(
            losses, net.shared_parameters(), eq.CAGrad(), features=z if features else None
        )
        for p in net.parameters():
            p.data = p.grad  # read by `numbers`
        found.append((numbers(net), result.gram))
    torch.testing.assert_close(found[0][1], found[1][1])
    for name, value in found[0][0].items():
        torch.testing.assert_close(value, found[1][0][name])


def test_complex_features_and_half_precision_of_the_rows() -> None:
    torch.manual_seed(0)

    class ToComplex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return x.to(torch.complex64) @ self.weight

    class Magnitude(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(3, 1, dtype=torch.complex64)

        def forward(self, z: Tensor) -> Tensor:
            return self.last(z).abs()

    for recipe in ("mgda-ub", "graddrop-ub", "fbls", "imtl"):
        net = eq.SharedTrunk(ToComplex(), {t: Magnitude() for t in TASKS})
        step = eq.Recipe.parse(recipe).build(
            net, dict.fromkeys(TASKS, F.mse_loss), lr=0.02, steps_per_epoch=9,
            optimizer=torch.optim.SGD,
        )  # fmt: skip
        x, y = torch.randn(6, 4), {t: torch.rand(6, 1) for t in TASKS}
        first = step(x, y).losses.sum()
        for _ in range(30):
            last = step(x, y).losses.sum()
        assert last < first, recipe
        assert step.model.trunk.weight.grad.dtype == torch.complex64


@pytest.mark.parametrize("recipe", ["ew", "cagrad", "f-mgda(perturb=joint)"])
def test_loops_of_the_users(recipe: str) -> None:
    """Micro-batches that are gathered, and gradients that are added up by `backward`."""
    found = []
    for as_complex in (True, False):
        net = model(as_complex)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        losses = dict.fromkeys(TASKS, F.mse_loss)
        step = eq.Recipe.parse(recipe).build(
            net, losses, lr=0.05, steps_per_epoch=9, optimizer=lambda ps, lr, made=optimizer: made
        )
        step.collect(*batch(0))
        step(*batch(1))
        optimizer.zero_grad()
        step.backward(*batch(2))
        step.backward(*batch(3))
        optimizer.step()
        found.append(numbers(net))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-9, atol=1e-12)
