"""Graphs as inputs: many small ones of different sizes, padded to one size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class GraphBatch:
    """B graphs on one device, each padded to the M nodes of the largest of them.

    Padded, a batch is a few dense products, with no sum over indices: molecules have about the
    same size, so little is wasted, and on a GPU nothing depends on the order of additions.

    Attributes:
        nodes: (B, M, F) features; zeros where a graph has fewer nodes.
        present: (B, M) bool, True where there is a node.
        edges: (B, M, G, M) features of the edge from j to i at [:, i, :, j]; zeros without one.
        connected: (B, M, M) bool, True at [:, i, j] where there is an edge from j to i.
        one_hot: whether the G features of an edge say which of G kinds it is, and nothing else.
    """

    nodes: Tensor
    present: Tensor
    edges: Tensor
    connected: Tensor
    one_hot: bool

    def __len__(self) -> int:
        """B."""
        return len(self.nodes)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> GraphBatch:
        """The same on a device."""
        tensors = ("nodes", "present", "edges", "connected")
        moved = {k: getattr(self, k).to(device, non_blocking=non_blocking) for k in tensors}
        return replace(self, **moved)


class Graphs:
    """N graphs, of which any several make a `GraphBatch` without a loop over them.

    Args:
        sizes: (N,) numbers of nodes, 1 or more.
        nodes: (N, M, F) features, whatever stands in the padding.
        kinds: (N, M, M) uint8: at [i, j] the kind of the edge from j to i, 1 .. n_kinds, or 0
            for none. An edge that has no direction stands there twice.
        n_kinds: how many kinds of edges there are.
        positions: (N, M, 3) places of the nodes. With them each graph is complete, every node
            having an edge to every other, and an edge has the distance as one more feature; a pair
            that has no kind has the distance alone. None: edges are where there is a kind.

    Raises:
        ValueError: arrays that do not fit each other, or a graph without a node.
    """

    def __init__(
        self,
        sizes: Tensor,
        nodes: Tensor,
        kinds: Tensor,
        n_kinds: int,
        positions: Tensor | None = None,
    ) -> None:
        n, m = nodes.shape[:2]
        if sizes.shape != (n,) or kinds.shape != (n, m, m):
            raise ValueError(
                f"{n} graphs of up to {m} nodes need sizes of shape ({n},) and kinds of shape "
                f"({n}, {m}, {m}), not {tuple(sizes.shape)} and {tuple(kinds.shape)}."
            )
        if positions is not None and positions.shape != (n, m, 3):
            raise ValueError(
                f"{n} graphs of up to {m} nodes need positions of shape ({n}, {m}, 3), not "
                f"{tuple(positions.shape)}."
            )
        if n and not (sizes.min() >= 1 and sizes.max() <= m):
            raise ValueError(f"each graph needs between 1 and {m} nodes.")
        if n and int(kinds.max()) > n_kinds:
            raise ValueError(f"there is an edge of kind {int(kinds.max())}; give 1 .. {n_kinds}.")
        self.sizes, self.nodes, self.kinds = sizes.long(), nodes, kinds
        self.n_kinds, self.positions = n_kinds, positions

    @property
    def widths(self) -> tuple[int, int]:
        """(F, G): the numbers of features of a node and of an edge."""
        return self.nodes.shape[2], self.n_kinds + (self.positions is not None)

    def taken(self, index: Any) -> Graphs:
        """Some of them."""
        index = torch.as_tensor(index)
        positions = None if self.positions is None else self.positions[index]
        return Graphs(
            self.sizes[index], self.nodes[index], self.kinds[index], self.n_kinds, positions
        )

    def __len__(self) -> int:
        """N."""
        return len(self.sizes)

    def __getitem__(self, index: Tensor | Sequence[int] | int) -> GraphBatch:
        """The batch of several graphs; an int gives a batch of one."""
        chosen = torch.as_tensor(index).reshape(-1)
        sizes = self.sizes[chosen]
        m = int(sizes.max()) if len(sizes) else 0
        place = torch.arange(m)
        present = place < sizes[:, None]
        pairs = present[:, :, None] & present[:, None, :]
        nodes = self.nodes[chosen, :m].float() * present[:, :, None]
        kinds = self.kinds[chosen, :m, :m] * pairs
        # [:, i, kind, j], where the message passing wants it: next to the sender's features.
        of_kind = torch.arange(1, self.n_kinds + 1, dtype=kinds.dtype)[:, None]
        edges = (kinds[:, :, None, :] == of_kind).float()
        if self.positions is None:
            return GraphBatch(nodes, present, edges, kinds > 0, one_hot=True)
        at = self.positions[chosen, :m]
        connected = pairs & (place[:, None] != place)
        distance = (at[:, :, None] - at[:, None]).norm(dim=-1) * connected
        edges = torch.cat([edges, distance[:, :, None, :]], dim=2)
        return GraphBatch(nodes, present, edges, connected, one_hot=False)


def padded(flat: Any, pointers: Any, width: int) -> Tensor:
    """(N, width, ...) rows from concatenated ones: graph k has `flat[pointers[k]:pointers[k+1]]`.

    The padding is zero.
    """
    flat, pointers = torch.as_tensor(flat), torch.as_tensor(pointers)
    sizes = pointers.diff()
    there = torch.arange(width) < sizes[:, None]
    rows = flat.new_zeros((len(sizes), width, *flat.shape[1:]))
    rows[there] = flat
    return rows


def padded_pairs(
    ends: Any, values: Any, pointers: Any, width: int, both_ways: bool = True
) -> Tensor:
    """(N, width, width): graph k has at [i, j] the value of its edge from j to i, or 0.

    Args:
        ends: (E, 2) nodes of each edge (from, to), counted within its graph.
        values: (E,) what is written.
        pointers: (N + 1,) graph k has the edges `pointers[k]` up to `pointers[k + 1]`.
        width: largest number of nodes.
        both_ways: whether an edge is written in both directions.
    """
    ends, values, pointers = map(torch.as_tensor, (ends, values, pointers))
    graph = torch.repeat_interleave(pointers.diff())
    start, end = ends.long().T
    pairs = values.new_zeros((len(pointers) - 1, width, width))
    pairs[graph, end, start] = values
    if both_ways:
        pairs[graph, start, end] = values
    return pairs
