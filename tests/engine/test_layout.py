"""Where gradients lie, agreed on by several processes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from equipoise.engine.layout import Layout
from equipoise.engine.ranks import Ranks


def sparse(*places: int, rows: int = 4) -> Tensor:
    index = torch.tensor([places])
    return torch.sparse_coo_tensor(
        index, torch.ones(len(places), 2), (rows, 2), check_invariants=False
    )


def joint(*of_each: list[Tensor | None], parameters: list[Tensor]) -> list[list[Tensor | None]]:
    """Give what each of several processes makes of the sum of their gradients."""
    layouts = [Layout(len(parameters)) for _ in of_each]
    pieces = [torch.zeros_like(p) for p in parameters]
    for layout, gradients in zip(layouts, of_each, strict=True):
        for k, g in enumerate(gradients):
            if g is not None:
                layout.note(k, g)
                pieces[k] = pieces[k] + g.to_dense()
    flags = torch.tensor([layout.flags() for layout in layouts]).sum(0).tolist()
    masks: list[Tensor] = []

    def first(mask: Tensor) -> Tensor:
        masks.append(mask)
        return mask

    for layout in layouts:  # hear what each says, then let each have the sum
        layout.gradients(parameters, pieces, flags, first)
    half = len(masks) // len(layouts)
    sums = [sum(masks[i::half]) for i in range(half)] if half else []
    found = []
    for layout in layouts:
        said = iter(sums)
        found.append(
            layout.gradients(parameters, pieces, flags, lambda mask, said=said: next(said))
        )
    return found


def places(gradient: Tensor | None) -> list[int]:
    assert gradient is not None
    assert gradient.is_sparse
    return gradient.coalesce().indices()[0].tolist()


def test_all_processes_have_all_places() -> None:
    p = torch.zeros(4, 2)
    for first, second, wanted in (
        ([sparse(0, 2)], [sparse(2, 3)], [0, 2, 3]),
        ([sparse(1)], [None], [1]),
        ([None], [sparse(3, 3)], [3]),
    ):
        for found in joint(first, second, parameters=[p]):
            assert places(found[0]) == wanted


def test_a_place_without_a_number_counts() -> None:
    p = torch.zeros(4, 2)
    for found in joint([sparse(1) * 0], [sparse(2)], parameters=[p]):
        assert places(found[0]) == [1, 2]


def test_dense_wherever_one_process_has_it_dense() -> None:
    p, q = torch.zeros(4, 2), torch.zeros(3)
    for found in joint([sparse(1), None], [torch.ones(4, 2), None], parameters=[p, q]):
        assert found[0] is not None
        assert not found[0].is_sparse
        assert found[1] is None


class Twice(Ranks):
    """Two processes that hold the same."""

    alone = False  # type: ignore[assignment]

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor * 2


def test_sums_over_processes_of_every_kind() -> None:
    like = [
        nn.Parameter(torch.zeros(3)),
        nn.Parameter(torch.zeros(4, 2)),
        nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64)),
        nn.Parameter(torch.zeros(2, dtype=torch.bfloat16)),
        nn.Parameter(torch.zeros(1)),
    ]
    complex_one = torch.complex(torch.ones(2, 2), torch.arange(4.0).view(2, 2)).conj()
    given = [torch.ones(3), sparse(1, 3), complex_one, torch.ones(2, dtype=torch.bfloat16), None]
    for found, g, p in zip(Twice().sum_gradients(given, like), given, like, strict=True):
        if g is None:
            assert found is None
            continue
        assert found is not None
        assert (found.dtype, found.is_sparse) == (p.dtype, g.is_sparse)
        torch.testing.assert_close(found.to_dense(), (2 * g).to_dense().resolve_conj())
    for first in (2, 3):  # whichever leads
        found = Twice().sum_gradients(given[first:], like[first:])[0]
        assert found is not None
        torch.testing.assert_close(found, (2 * given[first]).resolve_conj())
