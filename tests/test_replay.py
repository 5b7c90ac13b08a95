"""Replay: the same masks again, buffers where they were, random draws as if nothing happened."""

from copy import deepcopy

import pytest
import torch
from helpers import differences
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from equipoise import Replay, frozen_buffers
from equipoise.replay import RandomState, unchanged_on_error


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "trunk": nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)),
            "one": nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 2)),
            "two": nn.Sequential(nn.Linear(6, 2), nn.Dropout(0.5)),
        }
    )


class MovingAverage(nn.Module):
    """Holds its mean either by writing into the buffer or by putting a new one in its place."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        new = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        if self.in_place:
            self.mean.copy_(new)
        else:
            self.mean = new
        return x - new


BUFFERED = {
    "batchnorm": lambda: nn.BatchNorm1d(4),
    "cumulative batchnorm": lambda: nn.BatchNorm1d(4, momentum=None),
    "spectral norm": lambda: spectral_norm(nn.Linear(4, 4)),
    "moving average": lambda: MovingAverage(in_place=True),
    "replaced buffer": lambda: MovingAverage(in_place=False),
}
MOVING = list(BUFFERED)


# ------------------------------------------------------------------------------------ masks


@pytest.mark.parametrize("order", [("trunk", "one", "two"), ("two", "trunk", "one", "two")])
def test_every_part_sees_its_own_masks_again_in_any_order(order: tuple[str, ...]) -> None:
    net, x = network(), torch.randn(8, 4)
    replay = Replay(net)
    inputs, first = {"trunk": x}, {}
    for part in ("trunk", "one", "two"):
        with replay.recording(part):
            first[part] = net[part](inputs.get(part, first.get("trunk")))
    for part in order:
        source = x if part == "trunk" else first["trunk"]
        assert not torch.equal(net[part](source), first[part])  # masks do matter here
        with replay.again(part):
            assert torch.equal(net[part](source), first[part])


def test_draws_go_on_as_if_nothing_had_been_replayed() -> None:
    net, x = network(), torch.randn(8, 4)
    torch.manual_seed(7)
    replay = Replay(net)
    with replay.recording("trunk"):
        net["trunk"](x)
    state = torch.get_rng_state()
    with replay.again("trunk"):
        net["trunk"](x)
        torch.randn(1000)
    assert torch.equal(torch.get_rng_state(), state)
    after = torch.rand(3)
    torch.manual_seed(7)
    network_without = deepcopy(net)
    network_without["trunk"](x)
    assert torch.equal(torch.rand(3), after)


def test_nested() -> None:
    net, x = network(), torch.randn(8, 4)
    replay = Replay(net)
    with replay.recording("trunk"):
        features = net["trunk"](x)
    with replay.recording("one"):
        one = net["one"](features)
    outside = torch.get_rng_state()
    buffers = deepcopy(dict(net.named_buffers()))
    with replay.again("trunk"):
        with replay.again("one"):
            assert torch.equal(net["one"](features), one)
        # Back within the outer replay, whose draws have not begun.
        assert torch.equal(net["trunk"](x), features)
    assert torch.equal(torch.get_rng_state(), outside)
    assert differences(buffers, dict(net.named_buffers())) == []


def test_an_exception_inside_leaves_all_as_before() -> None:
    net, x = network(), torch.randn(8, 4)
    replay = Replay(net)
    with replay.recording("trunk"):
        features = net["trunk"](x)
    state, buffers = torch.get_rng_state(), deepcopy(dict(net.named_buffers()))
    with pytest.raises(KeyboardInterrupt), replay.again("trunk"):
        net["trunk"](x)
        raise KeyboardInterrupt
    assert torch.equal(torch.get_rng_state(), state)
    assert differences(buffers, dict(net.named_buffers())) == []
    with replay.again("trunk"):
        assert torch.equal(net["trunk"](x), features)


def test_what_was_never_recorded() -> None:
    with pytest.raises(KeyError, match="recorded under 'head'"), Replay(network()).again("head"):
        pytest.fail("must not get here")


# ---------------------------------------------------------------------------------- buffers


@pytest.mark.parametrize("name", MOVING)
@pytest.mark.parametrize("raises", [False, True])
def test_buffers_have_their_old_values_afterwards(name: str, raises: bool) -> None:
    torch.manual_seed(0)
    module, x = BUFFERED[name](), torch.randn(8, 4) + 3
    module(x)
    before = deepcopy(dict(module.named_buffers()))
    try:
        with frozen_buffers(module):
            first = module(x)
            inside = deepcopy(dict(module.named_buffers()))
            with frozen_buffers(module):
                module(x)
            assert differences(inside, dict(module.named_buffers())) == []
            if raises:
                raise RuntimeError
    except RuntimeError:
        assert raises
    assert differences(before, inside) != []  # it does move while it runs
    assert differences(before, dict(module.named_buffers())) == []
    # And the next run goes on from there.
    assert torch.equal(module(x), first)


@pytest.mark.parametrize("name", MOVING)
def test_unchanged_on_error_puts_buffers_and_draws_back(name: str) -> None:
    torch.manual_seed(0)
    module, x = BUFFERED[name](), torch.randn(8, 4) + 3
    before, state = deepcopy(dict(module.named_buffers())), torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), unchanged_on_error(module, [], []):
        module(x)
        torch.rand(3)
        raise ZeroDivisionError
    assert differences(before, dict(module.named_buffers())) == []
    assert torch.equal(torch.get_rng_state(), state)
    with unchanged_on_error(module, [], []):
        module(x)
        torch.rand(3)
    assert differences(before, dict(module.named_buffers())) != []
    assert not torch.equal(torch.get_rng_state(), state)


def test_batchnorm_goes_on_normalising_by_the_batch() -> None:
    layer, x = nn.BatchNorm1d(4, affine=False), torch.randn(64, 4) * 5 + 3
    with frozen_buffers(layer):
        y = layer(x)
    assert torch.allclose(y.mean(0), torch.zeros(4), atol=1e-5)
    assert layer.training


@pytest.mark.parametrize("training", [True, False])
def test_a_graph_from_before_can_still_go_backward(training: bool) -> None:
    # In evaluation mode BatchNorm saves its running statistics for the backward pass.
    torch.manual_seed(0)
    layer, x = nn.BatchNorm1d(4).train(training), torch.randn(8, 4, requires_grad=True)
    layer(x).square().sum().backward()
    expected, x.grad = x.grad, None
    loss = layer(x).square().sum()
    with frozen_buffers(layer):
        layer(x)
    loss.backward()
    if not training:
        assert torch.equal(x.grad, expected)
    assert x.grad is not None


# ----------------------------------------------------------------------------- random state


def test_random_state_through_a_dict() -> None:
    torch.manual_seed(3)
    saved = RandomState([torch.device("cpu"), torch.device("meta")])
    assert saved.state_dict().keys() == {"cpu", "python", "numpy"}
    expected = torch.rand(2)
    torch.manual_seed(4)
    other = RandomState()
    other.load_state_dict(saved.state_dict())
    other.restore()
    assert torch.equal(torch.rand(2), expected)
