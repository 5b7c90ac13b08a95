"""Message passing for molecules: NNConv + GRU + Set2Set (Gilmer et al., ICML 2017)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from equipoise.lab.data.base import Data
from equipoise.lab.data.graphs import GraphBatch, Graphs
from equipoise.trunk import SharedTrunk


class EdgeConv(nn.Module):
    """Messages by a matrix that depends on the edge (NNConv; Gilmer et al., section 5).

        m_i = b + mean over edges j -> i of A(e_ij)^T h_j,   A(e) = W2 relu(W1 e + b1) + b2

    A(e) has d x d entries for each edge, which would be most of the memory and time of the network.
    It is linear in the K hidden units r of the edge network, so the sum over edges comes first:

        sum_j A(e_ij)^T h_j = sum_k A_k^T (sum_j r_k(e_ij) h_j)

    with one product a node instead of one matrix an edge. Where edges have G kinds and no other
    feature, r is the kind itself, and A_k the matrix of each kind.

    Args:
        width: d, of the nodes' states.
        edge_features: G.
        hidden: K, units of the edge network.
    """

    def __init__(self, width: int, edge_features: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Linear(edge_features, hidden)
        self.second = nn.Linear(hidden, width * width)
        self.bias = nn.Parameter(torch.zeros(width))

    def prepare(self, graphs: GraphBatch) -> tuple[Tensor, Tensor]:
        """What all the message passing on one batch has in common.

        Returns:
            (B, M K, M) coefficients r_k(e_ij) divided by the number of edges into i, in rows
            (i, k); and (K d, d) the matrices A_k below each other.
        """
        into = graphs.connected.sum(-1).clamp(min=1)[:, :, None, None]  # (B, M, 1, 1)
        if graphs.one_hot:
            kinds = torch.eye(graphs.edges.shape[2], device=graphs.edges.device)
            matrices = self.second(self.first(kinds).relu())
            coefficients = graphs.edges
        else:
            there = graphs.connected[:, :, None, :]
            hidden = (self.first.weight @ graphs.edges + self.first.bias[:, None]).relu() * there
            # The bias b2 is the matrix of one more unit, which is 1 on every edge.
            coefficients = torch.cat([hidden, there.to(hidden.dtype)], dim=2)
            matrices = torch.cat([self.second.weight.T, self.second.bias[None]])
        batch, nodes, _, _ = coefficients.shape
        width = len(self.bias)
        scaled = (coefficients / into).reshape(batch, -1, nodes)
        return scaled, matrices.reshape(-1, width)

    def forward(self, states: Tensor, prepared: tuple[Tensor, Tensor]) -> Tensor:
        """Messages (B, M, d) into all nodes, from their states (B, M, d)."""
        coefficients, matrices = prepared
        gathered = (coefficients @ states).reshape(*states.shape[:2], -1)  # (B, M, K d)
        return gathered @ matrices + self.bias


class Set2Set(nn.Module):
    """A set of any size as one vector, whatever the order (Vinyals et al., ICLR 2016, eq. 3-7).

    Each step an LSTM asks a question q, the answer r is the mean of the states weighted by
    softmax(q . h_i), and [q, r] is what the LSTM sees next.
    """

    def __init__(self, width: int, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.lstm = nn.LSTMCell(2 * width, width)

    def forward(self, states: Tensor, present: Tensor) -> Tensor:
        """(B, 2 d) from states (B, M, d) of the nodes that are `present` (B, M)."""
        question = states.new_zeros(len(states), states.shape[2])
        cell = question
        seen = torch.cat([question, question], dim=1)
        for _ in range(self.steps):
            question, cell = self.lstm(seen, (question, cell))
            match = (states @ question[:, :, None]).squeeze(2)
            share = match.masked_fill(~present, -torch.inf).softmax(1)
            answer = (share[:, None] @ states).squeeze(1)
            seen = torch.cat([question, answer], dim=1)
        return seen


class MPNN(nn.Module):
    """Graphs -> features (B, 2 dim): a linear layer, message passing with one GRU, Set2Set.

    Args:
        node_features: F.
        edge_features: G.
        dim: d, width of the nodes' states.
        hidden: units of the edge network.
        steps: rounds of message passing; all have the same weights.
        set2set: steps of the pooling.

    Raises:
        ValueError: a number below 1.
    """

    def __init__(
        self,
        node_features: int,
        edge_features: int,
        dim: int,
        hidden: int,
        steps: int,
        set2set: int,
    ) -> None:
        super().__init__()
        given = {"dim": dim, "hidden": hidden, "steps": steps, "set2set": set2set}
        for name, number in given.items():
            if number < 1:
                raise ValueError(f"mpnn: {name} is {number}; give 1 or more.")
        self.width = 2 * dim
        self.steps = steps
        self.embed = nn.Linear(node_features, dim)
        self.conv = EdgeConv(dim, edge_features, hidden)
        self.gru = nn.GRUCell(dim, dim)
        self.pool = Set2Set(dim, set2set)

    def forward(self, graphs: GraphBatch) -> Tensor:
        """Features (B, 2 dim)."""
        states = self.embed(graphs.nodes).relu()
        prepared = self.conv.prepare(graphs)
        for _ in range(self.steps):
            messages = self.conv(states, prepared).relu()
            states = self.gru(messages.flatten(0, 1), states.flatten(0, 1)).view_as(states)
        return self.pool(states, graphs.present)


def mpnn(
    data: Data, *, dim: int = 64, hidden: int = 128, steps: int = 3, set2set: int = 3
) -> SharedTrunk:
    """NNConv + GRU + Set2Set, and for each task of `data` a head of two linear layers.

    Args:
        data: of graphs.
        dim: see `MPNN`.
        hidden: see `MPNN`.
        steps: see `MPNN`.
        set2set: see `MPNN`.

    Raises:
        ValueError: inputs that are no graphs, or a number below 1.
    """
    graphs = data.train.inputs
    if not isinstance(graphs, Graphs):
        raise ValueError(
            f"mpnn takes graphs; {data.name} has inputs of shape {data.input_shape}. "
            "Give another --model, or --data qm9-lite."
        )
    trunk = MPNN(*graphs.widths, dim, hidden, steps, set2set)
    heads = {
        task.name: nn.Sequential(
            nn.Linear(trunk.width, dim), nn.ReLU(), nn.Linear(dim, task.outputs)
        )
        for task in data.tasks
    }
    return SharedTrunk(trunk, heads)
