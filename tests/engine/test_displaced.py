"""Displaced: away, back bit for bit, or staying."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from equipoise.engine.displaced import Displaced


def parameters() -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=g)) for shape in ((2, 3), (4,), ())]


def offsets_of(some: list[nn.Parameter]) -> list[tuple[nn.Parameter, Tensor | None]]:
    return [(p, torch.full_like(p, float(k + 1))) for k, p in enumerate(some)]


@pytest.mark.parametrize("lazily", [False, True])
def test_to_start_plus_scale_times_offset(lazily: bool) -> None:
    some = parameters()
    starts = [p.detach().clone() for p in some]
    with Displaced(some) as displaced:
        for scale in (0.5, -2.0):  # each time from the start
            pairs = offsets_of(some)
            displaced.move(iter(pairs) if lazily else pairs, scale)
            for k, (p, start) in enumerate(zip(some, starts, strict=True)):
                assert torch.equal(p, start + scale * (k + 1))
    assert all(torch.equal(p, start) for p, start in zip(some, starts, strict=True))


@pytest.mark.parametrize("lazily", [False, True])
def test_only_the_named_ones_move_and_none_puts_back(lazily: bool) -> None:
    some = parameters()
    starts = [p.detach().clone() for p in some]
    displaced = Displaced(some)
    displaced.move(offsets_of(some))
    pairs = [(some[1], None), (some[2], torch.tensor(5.0))]
    displaced.move(iter(pairs) if lazily else pairs)
    assert torch.equal(some[0], starts[0] + 1)
    assert torch.equal(some[1], starts[1])
    assert torch.equal(some[2], starts[2] + 5)


def test_an_iterator_is_consumed_one_by_one() -> None:
    some, alive = parameters(), []

    def offsets() -> Iterator[tuple[nn.Parameter, Tensor]]:
        for p in some:
            alive.append(torch.equal(p, p.detach()))
            yield p, torch.ones_like(p)
            # By the time the next one is asked for, this one has been moved already.
            assert float((p - 1).abs().sum()) != float(p.abs().sum())

    Displaced(some).move(offsets())
    assert len(alive) == len(some)


def test_back_whatever_the_body_raises_also_after_stay() -> None:
    some = parameters()
    starts = [p.detach().clone() for p in some]
    displaced = Displaced(some)
    with pytest.raises(KeyboardInterrupt), displaced:
        displaced.move(offsets_of(some))
        displaced.stay()
        raise KeyboardInterrupt
    assert all(torch.equal(p, start) for p, start in zip(some, starts, strict=True))


def test_staying_leaves_them_and_makes_old_graphs_invalid() -> None:
    some = parameters()
    loss = sum(p.square().sum() for p in some)
    with Displaced(some) as displaced:
        displaced.move(offsets_of(some))
        displaced.stay()
    assert torch.equal(some[2], displaced.starts[2] + 3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_graph_is_as_good_as_before_once_they_are_back() -> None:
    some = parameters()
    loss = sum(p.square().sum() for p in some)
    with Displaced(some) as displaced:
        displaced.move(offsets_of(some))
    loss.backward()
    assert all(torch.equal(p.grad, 2 * p) for p in some)
    assert len(displaced.starts) == 3


def test_nothing_to_move() -> None:
    with Displaced([]) as displaced:
        displaced.move([])
        displaced.stay()
