"""Small networks that are no trunk with heads: their losses, their batches, and who shares what.

Each one says by patterns over parameter names which parameters two or more of its tasks reach, and
which belong to one task alone. All are float64, and all hold a layer that no loss reaches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import equipoise as eq

SAMPLES = 6
Losses = dict[str, Tensor]


class Network(nn.Module):
    """What the tests ask of a network.

    Attributes:
        tasks: in order.
        shared: patterns of the parameters that two or more tasks reach.
        own: task -> patterns of the parameters that this task alone reaches.
        positive: whether all losses are above zero.
        outside: modules that only the optimizer knows, not `named_parameters()`.
    """

    tasks: tuple[str, ...] = ("a", "b")
    shared: tuple[str, ...] = ()
    own: dict[str, tuple[str, ...]] = {}
    positive = True

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 2)
        self.outside: tuple[nn.Module, ...] = ()  # a tuple hides them from nn.Module

    def batch(self, k: int) -> tuple:
        """Give the arguments of `losses` for batch number k."""
        x, *targets = draw(k, (SAMPLES, 5), *[(SAMPLES, 1)] * len(self.tasks))
        return x, *targets

    def losses(self, *batch: Any) -> Losses:
        """Give task -> loss, each time anew."""
        raise NotImplementedError

    def named(self) -> dict[str, nn.Parameter]:
        """Give all that the optimizer holds, by name."""
        found = dict(self.named_parameters())
        for k, module in enumerate(self.outside):
            found |= {f"outside.{k}.{name}": p for name, p in module.named_parameters()}
        return found

    def matching(self, patterns: Sequence[str]) -> dict[str, nn.Parameter]:
        """Give the parameters whose name fits one of the patterns."""
        return {n: p for n, p in self.named().items() if any(fnmatchcase(n, w) for w in patterns)}


def draw(k: int, *sizes: tuple[int, ...]) -> list[Tensor]:
    """Give normal numbers of these shapes, from the seed k."""
    g = torch.Generator().manual_seed(k)
    return [torch.randn(*size, generator=g, dtype=torch.float64) for size in sizes]


def classes(k: int, n: int, *size: int) -> Tensor:
    """Give whole numbers below n."""
    return torch.randint(n, size, generator=torch.Generator().manual_seed(100 + k))


def each(tasks: Sequence[str], make: Callable[[], nn.Module]) -> nn.ModuleDict:
    """Give a module for each task."""
    return nn.ModuleDict({task: make() for task in tasks})


def layer(inputs: int, outputs: int) -> nn.Module:
    """Give a smooth layer: no kink lets two nearly equal computations part."""
    return nn.Sequential(nn.Linear(inputs, outputs), nn.Tanh())


def by_task(tasks: Sequence[str], outputs: Any, targets: Sequence[Tensor]) -> Losses:
    """Give the squared error of each task."""
    return {t: F.mse_loss(outputs[t], y) for t, y in zip(tasks, targets, strict=True)}


# --------------------------------------------------------------------------- mixtures of experts


class MMoE(Network):
    """Multi-gate mixture of experts (Ma et al., KDD 2018): h_k(sum_i softmax(G_k x)_i f_i(x))."""

    tasks = ("a", "b", "c")
    shared = ("experts.*",)
    own = {t: (f"gates.{t}.*", f"towers.{t}.*") for t in tasks}

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(layer(5, 4) for _ in range(3))
        self.gates = each(self.tasks, lambda: nn.Linear(5, 3, bias=False))
        self.towers = each(self.tasks, lambda: nn.Linear(4, 1))

    def losses(self, x: Tensor, *targets: Tensor) -> Losses:
        experts = torch.stack([expert(x) for expert in self.experts], 1)
        outputs = {t: self.towers[t](mixed(self.gates[t](x), experts)) for t in self.tasks}
        return by_task(self.tasks, outputs, targets)


def mixed(scores: Tensor, experts: Tensor) -> Tensor:
    """Give the experts (B, E, F) in the shares softmax(scores) (B, E)."""
    return (scores.softmax(1)[..., None] * experts).sum(1)


class CGC(Network):
    """Customized gate control (Tang et al., RecSys 2020): gates see own and common experts."""

    shared = ("common.*",)
    own = {t: (f"experts.{t}.*", f"gates.{t}.*", f"towers.{t}.*") for t in ("a", "b")}

    def __init__(self) -> None:
        super().__init__()
        self.common = nn.ModuleList(layer(5, 4) for _ in range(2))
        self.experts = each(self.tasks, lambda: layer(5, 4))
        self.gates = each(self.tasks, lambda: nn.Linear(5, 3))
        self.towers = each(self.tasks, lambda: nn.Linear(4, 1))

    def losses(self, x: Tensor, *targets: Tensor) -> Losses:
        common = [expert(x) for expert in self.common]
        outputs = {}
        for t in self.tasks:
            seen = torch.stack([self.experts[t](x), *common], 1)
            outputs[t] = self.towers[t](mixed(self.gates[t](x), seen))
        return by_task(self.tasks, outputs, targets)


class PLE(Network):
    """Progressive layered extraction (the same paper): CGC twice, with a shared gate in between.

    That gate sees all experts of the first level, so that both tasks reach them; a task's own gate
    there feeds what only that task looks at.
    """

    shared = ("first.*", "between.*", "second.common.*")
    own = {
        t: (f"gates.{t}.*", f"second.{t}.*", f"gates2.{t}.*", f"towers.{t}.*") for t in ("a", "b")
    }

    def __init__(self) -> None:
        super().__init__()
        names = (*self.tasks, "common")
        self.first = each(names, lambda: layer(5, 4))
        self.between = nn.Linear(5, 3)
        self.gates = each(self.tasks, lambda: nn.Linear(5, 2))
        self.second = each(names, lambda: layer(4, 3))
        self.gates2 = each(self.tasks, lambda: nn.Linear(4, 2))
        self.towers = each(self.tasks, lambda: nn.Linear(3, 1))

    def losses(self, x: Tensor, *targets: Tensor) -> Losses:
        first = {name: expert(x) for name, expert in self.first.items()}
        between = mixed(self.between(x), torch.stack(list(first.values()), 1))
        common = self.second["common"](between)
        outputs = {}
        for t in self.tasks:
            z = mixed(self.gates[t](x), torch.stack([first[t], first["common"]], 1))
            seen = torch.stack([self.second[t](z), common], 1)
            outputs[t] = self.towers[t](mixed(self.gates2[t](z), seen))
        return by_task(self.tasks, outputs, targets)


# ------------------------------------------------------------------------------ shared otherwise


class Cascade(Network):
    """Head b looks at what head a says, so that task b reaches head a too."""

    shared = ("trunk.*", "a.*")
    own = {"b": ("b.*",)}

    def __init__(self) -> None:
        super().__init__()
        self.trunk = layer(5, 6)
        self.a = nn.Linear(6, 1)
        self.b = nn.Sequential(layer(7, 3), nn.Linear(3, 1))

    def losses(self, x: Tensor, *targets: Tensor) -> Losses:
        z = self.trunk(x)
        a = self.a(z)
        return by_task(self.tasks, {"a": a, "b": self.b(torch.cat([z, a], 1))}, targets)


class TiedDecoder(Network):
    """An autoencoder whose decoder is the transposed encoder, and a regression on its code."""

    tasks = ("decode", "regress")
    shared = ("weight", "bias")
    own = {"decode": ("out_bias",), "regress": ("head.*",)}

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5) / 2)
        self.bias = nn.Parameter(torch.randn(4) / 2)
        self.out_bias = nn.Parameter(torch.randn(5) / 2)
        self.head = nn.Linear(4, 1)

    def batch(self, k: int) -> tuple:
        return tuple(draw(k, (SAMPLES, 5), (SAMPLES, 1)))

    def losses(self, x: Tensor, y: Tensor) -> Losses:
        code = (x @ self.weight.T + self.bias).tanh()
        decoded = code @ self.weight + self.out_bias
        return {"decode": F.mse_loss(decoded, x), "regress": F.mse_loss(self.head(code), y)}


class TiedEmbedding(Network):
    """Words by their embedding, the next word by the same one; and what the sentence is about."""

    tasks = ("next", "topic")
    shared = ("embedding.*", "body.*")
    own = {"next": ("bias",), "topic": ("head.*",)}

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.body = layer(4, 4)
        self.bias = nn.Parameter(torch.randn(7))
        self.head = nn.Linear(4, 3)

    def batch(self, k: int) -> tuple:
        return classes(k, 7, SAMPLES, 5), classes(k + 50, 3, SAMPLES)

    def losses(self, words: Tensor, topic: Tensor) -> Losses:
        counts = torch.arange(1, 5, dtype=torch.float64)[:, None]
        state = self.body(self.embedding(words[:, :-1]).cumsum(1) / counts)
        scores = state @ self.embedding.weight.T + self.bias
        return {
            "next": F.cross_entropy(scores.flatten(0, 1), words[:, 1:].flatten()),
            "topic": F.cross_entropy(self.head(state.mean(1)), topic),
        }


class CrossStitch(Network):
    """Two columns that exchange activations once (Misra et al., CVPR 2016)."""

    shared = ("first.*", "stitch")
    own = {t: (f"second.{t}.*",) for t in ("a", "b")}

    def __init__(self) -> None:
        super().__init__()
        self.first = each(self.tasks, lambda: layer(5, 4))
        self.stitch = nn.Parameter(torch.tensor([[0.9, 0.1], [0.2, 0.8]]))
        self.second = each(self.tasks, lambda: nn.Sequential(layer(4, 3), nn.Linear(3, 1)))

    def losses(self, x: Tensor, *targets: Tensor) -> Losses:
        columns = torch.stack([self.first[t](x) for t in self.tasks])
        stitched = torch.einsum("st,tbf->sbf", self.stitch, columns)
        outputs = {t: self.second[t](z) for t, z in zip(self.tasks, stitched, strict=True)}
        return by_task(self.tasks, outputs, targets)


class UNet(Network):
    """One encoder, two decoders, each with a skip connection at the full resolution."""

    tasks = ("depth", "edges")
    shared = ("fine.*", "coarse.*")
    own = {t: (f"up.{t}.*", f"out.{t}.*") for t in ("depth", "edges")}

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Conv2d(1, 2, 3, padding=1)
        self.coarse = nn.Conv2d(2, 3, 3, padding=1)
        self.up = each(self.tasks, lambda: nn.ConvTranspose2d(3, 2, 2, stride=2))
        self.out = each(self.tasks, lambda: nn.Conv2d(4, 1, 3, padding=1))

    def batch(self, k: int) -> tuple:
        return tuple(draw(k, *[(3, 1, 6, 6)] * 3))

    def losses(self, x: Tensor, depth: Tensor, edges: Tensor) -> Losses:
        fine = self.fine(x).tanh()
        coarse = self.coarse(F.avg_pool2d(fine, 2)).tanh()
        maps = {t: self.out[t](torch.cat([fine, self.up[t](coarse).tanh()], 1)) for t in self.tasks}
        return {
            "depth": F.mse_loss(maps["depth"], depth),
            "edges": F.binary_cross_entropy_with_logits(maps["edges"], (edges > 0).double()),
        }


class Skips(Network):
    """Heads at different depths, one with the inputs besides; two of three reach the middle."""

    tasks = ("shallow", "deep", "wide")
    shared = ("stem.*", "middle.*")
    own = {t: (f"heads.{t}.*",) for t in tasks}

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle = layer(5, 4), layer(4, 4)
        sizes = {"shallow": 4, "deep": 4, "wide": 9}
        self.heads = nn.ModuleDict({t: nn.Linear(n, 1) for t, n in sizes.items()})

    def losses(self, x: Tensor, *targets: Tensor) -> Losses:
        stem = self.stem(x)
        middle = stem + self.middle(stem)
        seen = {"shallow": stem, "deep": middle, "wide": torch.cat([middle, x], 1)}
        outputs = {t: self.heads[t](z) for t, z in seen.items()}
        return by_task(self.tasks, outputs, targets)


class OneHead(Network):
    """Two losses on one head, and a head with a loss of its own."""

    tasks = ("square", "absolute", "other")
    shared = ("trunk.*", "head.*")
    own = {"other": ("second.*",)}

    def __init__(self) -> None:
        super().__init__()
        self.trunk = layer(5, 4)
        self.head, self.second = nn.Linear(4, 2), nn.Linear(4, 1)

    def batch(self, k: int) -> tuple:
        return tuple(draw(k, (SAMPLES, 5), (SAMPLES, 2), (SAMPLES, 1)))

    def losses(self, x: Tensor, y: Tensor, other: Tensor) -> Losses:
        z = self.trunk(x)
        out = self.head(z)
        return {
            "square": F.mse_loss(out, y),
            "absolute": (out - y).abs().mean(),
            "other": F.mse_loss(self.second(z), other),
        }


# --------------------------------------------------------------------------- losses of other kinds


class PhysicsInformed(Network):
    """u'' + c u = sin x by data, residual and boundary (Raissi et al., JCP 2019); c is learned.

    The residual needs derivatives by the inputs, which are differentiated once more.
    """

    tasks = ("data", "residual", "boundary")
    shared = ("u.*",)
    own = {"residual": ("c",)}

    def __init__(self) -> None:
        super().__init__()
        self.u = nn.Sequential(layer(1, 6), layer(6, 5), nn.Linear(5, 1))
        self.c = nn.Parameter(torch.tensor(0.7))

    def batch(self, k: int) -> tuple:
        x, y, inner = draw(k, (SAMPLES, 1), (SAMPLES, 1), (SAMPLES, 1))
        return x, y, inner.requires_grad_()

    def losses(self, x: Tensor, y: Tensor, inner: Tensor) -> Losses:
        u = self.u(inner)
        (first,) = torch.autograd.grad(u.sum(), inner, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), inner, create_graph=True)
        ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        return {
            "data": F.mse_loss(self.u(x), y),
            "residual": (second + self.c * u - inner.sin()).square().mean(),
            "boundary": self.u(ends).square().mean(),
        }


class ActorCritic(Network):
    """A body, a policy and a value; the entropy bonus is a negative loss on the policy."""

    tasks = ("policy", "value", "entropy")
    shared = ("body.*", "actor.*")
    own = {"value": ("critic.*",)}
    positive = False

    def __init__(self) -> None:
        super().__init__()
        self.body = layer(5, 6)
        self.actor, self.critic = nn.Linear(6, 3), nn.Linear(6, 1)

    def batch(self, k: int) -> tuple:
        state, returns = draw(k, (SAMPLES, 5), (SAMPLES,))
        return state, returns, classes(k, 3, SAMPLES)

    def losses(self, state: Tensor, returns: Tensor, actions: Tensor) -> Losses:
        z = self.body(state)
        value, log_p = self.critic(z)[:, 0], self.actor(z).log_softmax(1)
        chosen = log_p.gather(1, actions[:, None])[:, 0]
        return {
            "policy": -(chosen * (returns - value.detach())).mean(),
            "value": F.mse_loss(value, returns),
            "entropy": (log_p.exp() * log_p).sum(1).mean(),
        }


class VAE(Network):
    """Reconstruction and divergence (Kingma and Welling, 2014); each call draws new noise."""

    tasks = ("reconstruction", "kl")
    shared = ("encoder.*", "mean.*", "log_variance.*")
    own = {"reconstruction": ("decoder.*",)}

    def __init__(self) -> None:
        super().__init__()
        self.encoder = layer(5, 4)
        self.mean, self.log_variance = nn.Linear(4, 2), nn.Linear(4, 2)
        self.decoder = nn.Sequential(layer(2, 4), nn.Linear(4, 5))

    def batch(self, k: int) -> tuple:
        return tuple(draw(k, (SAMPLES, 5)))

    def losses(self, x: Tensor) -> Losses:
        h = self.encoder(x)
        mean, log_variance = self.mean(h), self.log_variance(h)
        z = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        kl = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1) / 2
        return {"reconstruction": F.mse_loss(self.decoder(z), x), "kl": kl.mean()}


class PenaltyAsTask(Network):
    """Two regressions, and the length of the trunk's weights as a third task."""

    tasks = ("a", "b", "penalty")
    shared = ("trunk.*",)
    own = {t: (f"heads.{t}.*",) for t in ("a", "b")}

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(layer(5, 4), layer(4, 4))
        self.heads = each(("a", "b"), lambda: nn.Linear(4, 1))

    def batch(self, k: int) -> tuple:
        return tuple(draw(k, (SAMPLES, 5), (SAMPLES, 1), (SAMPLES, 1)))

    def losses(self, x: Tensor, a: Tensor, b: Tensor) -> Losses:
        z = self.trunk(x)
        losses = by_task(("a", "b"), {t: head(z) for t, head in self.heads.items()}, (a, b))
        weights = [p for name, p in self.trunk.named_parameters() if "weight" in name]
        return {**losses, "penalty": 0.1 * sum(w.square().sum() for w in weights)}


class PenaltyInTask(PenaltyAsTask):
    """The penalty is part of task a: a path to the trunk that no feature carries."""

    tasks = ("a", "b")

    def losses(self, x: Tensor, a: Tensor, b: Tensor) -> Losses:
        losses = super().losses(x, a, b)
        return {"a": losses["a"] + losses["penalty"], "b": losses["b"]}


class Centres(Network):
    """A loss with weights that the network does not hold: distance to learned class centres."""

    tasks = ("centre", "scale")
    shared = ("trunk.*",)
    own = {"centre": ("outside.0.*",), "scale": ("head.*", "outside.1.*")}

    def __init__(self) -> None:
        super().__init__()
        self.trunk = layer(5, 4)
        self.head = nn.Linear(4, 1)
        self.outside = (nn.Embedding(3, 4), nn.Bilinear(1, 1, 1))

    def batch(self, k: int) -> tuple:
        x, y = draw(k, (SAMPLES, 5), (SAMPLES, 1))
        return x, y, classes(k, 3, SAMPLES)

    def losses(self, x: Tensor, y: Tensor, labels: Tensor) -> Losses:
        centres, scale = self.outside
        z = self.trunk(x)
        return {
            "centre": F.mse_loss(z, centres(labels)),
            "scale": scale(self.head(z), y).square().mean(),
        }


class Noisy(Network):
    """BatchNorm and dropout in the trunk and in the heads."""

    tasks = ("a", "b", "c")
    shared = ("trunk.*",)
    own = {t: (f"heads.{t}.*",) for t in tasks}

    def __init__(self) -> None:
        super().__init__()
        # No bias in front of BatchNorm: its gradient is round-off, of which Adam makes a step.
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 3, 3, bias=False),
            nn.BatchNorm2d(3),
            nn.Tanh(),
            nn.Dropout(0.2),
            nn.Flatten(),
            nn.Linear(48, 6),
        )
        self.heads = each(
            self.tasks,
            lambda: nn.Sequential(
                nn.Dropout(0.2), nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 3)
            ),
        )

    def batch(self, k: int) -> tuple:
        (x,) = draw(k, (SAMPLES, 1, 6, 6))
        return x, *(classes(k + 7 * i, 3, SAMPLES) for i in range(3))

    def losses(self, x: Tensor, *labels: Tensor) -> Losses:
        z = self.trunk(x)
        return {
            t: F.cross_entropy(self.heads[t](z), y) for t, y in zip(self.tasks, labels, strict=True)
        }


class Spectral(Network):
    """Spectral norm in trunk and heads: weights in parts, and buffers that each forward moves."""

    shared = ("trunk.*",)
    own = {t: (f"heads.{t}.*",) for t in ("a", "b")}

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(spectral_norm(nn.Linear(5, 6)), nn.Tanh())
        self.heads = each(
            self.tasks, lambda: nn.Sequential(spectral_norm(nn.Linear(6, 4)), nn.Linear(4, 1))
        )

    def losses(self, x: Tensor, *targets: Tensor) -> Losses:
        z = self.trunk(x)
        return by_task(self.tasks, {t: self.heads[t](z) for t in self.tasks}, targets)


NETWORKS: dict[str, type[Network]] = {
    "mmoe": MMoE,
    "cgc": CGC,
    "ple": PLE,
    "cascade": Cascade,
    "tied decoder": TiedDecoder,
    "tied embedding": TiedEmbedding,
    "cross-stitch": CrossStitch,
    "u-net": UNet,
    "skips": Skips,
    "one head": OneHead,
    "physics-informed": PhysicsInformed,
    "actor-critic": ActorCritic,
    "vae": VAE,
    "penalty as a task": PenaltyAsTask,
    "penalty in a task": PenaltyInTask,
    "centres": Centres,
    "noisy": Noisy,
    "spectral": Spectral,
}


# ------------------------------------------------------------------------------ what tests do


def network(name: str, seed: int = 0) -> Network:
    """Give a network with the parameters of that seed."""
    torch.manual_seed(seed)
    net = NETWORKS[name]().double()
    for module in net.outside:
        module.double()
    return net


def closure_of(net: Network, k: int = 0, without: Sequence[str] = ()) -> Callable[[], Losses]:
    """Give a closure over batch k, some tasks left out."""
    batch = net.batch(k)
    return lambda: {t: loss for t, loss in net.losses(*batch).items() if t not in without}


def step_on(
    net: Network,
    weighting: Any = None,
    aggregator: Any = None,
    sharpness: Any = None,
    line_search: Any = None,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    lr: float = 0.1,
    **options: Any,
) -> eq.Step:
    """Give a Step over all parameters of a network, those outside of it too."""
    held = optimizer(net.named().values(), lr=lr)
    return eq.Step(
        net, list(net.tasks), held, weighting, aggregator, sharpness, line_search, **options
    )


def gradients(net: Network) -> dict[str, Tensor | None]:
    """Give a copy of what the optimizer sees, by name."""
    return {n: None if p.grad is None else p.grad.clone() for n, p in net.named().items()}


def values(net: Network) -> dict[str, Tensor]:
    """Give a copy of all that the optimizer holds, by name."""
    return {n: p.detach().clone() for n, p in net.named().items()}


def apart(a: dict[str, Tensor | None], b: dict[str, Tensor | None]) -> float:
    """Give the largest difference, relative to the largest entry of the same tensor.

    A tensor that is small beside the others has lost digits already: its entries count as if the
    largest were a thousandth of the largest of all.
    """
    assert {k for k, v in a.items() if v is None} == {k for k, v in b.items() if v is None}
    largest = {k: float(v.abs().max()) for k, v in b.items() if v is not None}
    least = max(largest.values()) / 1000
    gaps = (float((a[k] - b[k]).abs().max()) / max(size, least) for k, size in largest.items())
    return max(gaps)


def shared_and_own(net: Network) -> tuple[list[nn.Parameter], dict[str, list[nn.Parameter]]]:
    """Give the parameters of the network in the two roles that it expects."""
    own = {t: list(net.matching(net.own.get(t, ())).values()) for t in net.tasks}
    return list(net.matching(net.shared).values()), own
