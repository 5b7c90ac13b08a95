"""Graphs as inputs, and the network for them, against slow versions molecule by molecule."""

from dataclasses import replace

import pytest
import torch

from equipoise.lab.data import Data, Split, load, loader
from equipoise.lab.data.graphs import GraphBatch, Graphs, padded, padded_pairs
from equipoise.lab.models import ModelError, build
from equipoise.lab.models.mpnn import MPNN, EdgeConv, Set2Set
from equipoise.lab.tasks import Task

SIZES = [1, 4, 2, 3, 4, 1, 3]
KINDS = 3


def some_graphs(positions=True, seed=0):
    """Graphs of up to four nodes with edges in both directions, and garbage in the padding."""
    draw = torch.Generator().manual_seed(seed)
    n, m = len(SIZES), max(SIZES)
    kinds = torch.randint(0, KINDS + 1, (n, m, m), generator=draw).tril(-1)
    kinds = (kinds + kinds.transpose(1, 2)).to(torch.uint8)
    nodes = torch.randn(n, m, 5, generator=draw)
    places = 2 * torch.randn(n, m, 3, generator=draw) if positions else None
    return Graphs(torch.tensor(SIZES), nodes, kinds, KINDS, places)


def edges_of(graphs, k):
    """(from, to, features) of one graph's edges, one by one."""
    size = int(graphs.sizes[k])
    for i in range(size):
        for j in range(size):
            kind = int(graphs.kinds[k, i, j])
            if i == j or (graphs.positions is None and not kind):
                continue
            features = [1.0 if kind == g + 1 else 0.0 for g in range(KINDS)]
            if graphs.positions is not None:
                features.append(float((graphs.positions[k, i] - graphs.positions[k, j]).norm()))
            yield j, i, torch.tensor(features)


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("index", [[3, 1, 1], torch.tensor([0, 5]), 2, [6, 0, 4, 2]])
def test_a_batch_holds_its_graphs_and_nothing_else(positions, index):
    graphs = some_graphs(positions)
    batch = graphs[index]
    chosen = torch.as_tensor(index).reshape(-1).tolist()
    largest = max(SIZES[k] for k in chosen)
    assert len(batch) == len(chosen)
    assert batch.nodes.shape == (len(chosen), largest, graphs.widths[0])
    assert batch.one_hot is not positions
    for b, k in enumerate(chosen):
        size = SIZES[k]
        assert batch.present[b].tolist() == [i < size for i in range(largest)]
        assert torch.equal(batch.nodes[b, :size], graphs.nodes[k, :size])
        assert not batch.nodes[b, size:].any()
        expected = torch.zeros(largest, graphs.widths[1], largest)
        connected = torch.zeros(largest, largest, dtype=torch.bool)
        for j, i, features in edges_of(graphs, k):
            expected[i, :, j] = features
            connected[i, j] = True
        torch.testing.assert_close(batch.edges[b], expected)
        assert torch.equal(batch.connected[b], connected)


def test_padding_from_concatenated_arrays():
    rows = padded([[1, 1], [2, 2], [3, 3]], [0, 1, 1, 3], 2)
    assert rows.tolist() == [[[1, 1], [0, 0]], [[0, 0], [0, 0]], [[2, 2], [3, 3]]]
    ends, values, pointers = [[0, 1], [0, 2], [1, 0]], [5, 6, 7], [0, 2, 3]
    both = padded_pairs(ends, values, pointers, 3)
    assert both[0].tolist() == [[0, 5, 6], [5, 0, 0], [6, 0, 0]]
    assert both[1].tolist() == [[0, 7, 0], [7, 0, 0], [0, 0, 0]]
    one_way = padded_pairs(ends, values, pointers, 3, both_ways=False)
    assert one_way[0].tolist() == [[0, 0, 0], [5, 0, 0], [6, 0, 0]]
    assert one_way[1].tolist() == [[0, 7, 0], [0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": torch.tensor([1, 2])}, "need sizes of shape"),
        ({"sizes": torch.tensor([0, *SIZES[1:]])}, "between 1 and 4 nodes"),
        ({"sizes": torch.tensor([5, *SIZES[1:]])}, "between 1 and 4 nodes"),
        ({"n_kinds": 2}, "edge of kind 3"),
        ({"positions": torch.zeros(7, 4, 2)}, "positions of shape"),
        ({"kinds": torch.zeros(7, 4, 3, dtype=torch.uint8)}, "kinds of shape"),
    ],
)
def test_arrays_that_do_not_fit(change, message):
    g = some_graphs()
    given = {"sizes": g.sizes, "nodes": g.nodes, "kinds": g.kinds, "n_kinds": KINDS,
             "positions": g.positions}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        Graphs(**{**given, **change})


def test_loaders_give_batches_of_graphs_on_a_device():
    graphs = some_graphs()
    split = Split(graphs, {"weight": torch.arange(7.0)})
    batches = list(loader(split, 3, shuffle_seed=1))
    assert [len(inputs) for inputs, _ in batches] == [3, 3, 1]
    seen = torch.cat([targets["weight"] for _, targets in batches]).long()
    assert sorted(seen.tolist()) == list(range(7)) != seen.tolist()
    inputs = batches[0][0]
    assert isinstance(inputs, GraphBatch)
    assert torch.equal(inputs.present.sum(1), graphs.sizes[seen[:3]])
    assert inputs.to("meta").edges.device.type == "meta"
    some = graphs.taken([4, 0])
    assert len(some) == 2 and torch.equal(some[1].nodes, graphs[0].nodes)


def slow(model: MPNN, graphs: Graphs, k: int) -> torch.Tensor:
    """The features of one graph, edge by edge, with a matrix for each."""
    size = int(graphs.sizes[k])
    states = model.embed(graphs.nodes[k, :size]).relu()
    width = states.shape[1]
    conv = model.conv
    for _ in range(model.steps):
        messages = torch.zeros_like(states)
        counts = torch.zeros(size, 1)
        for j, i, features in edges_of(graphs, k):
            matrix = conv.second(conv.first(features).relu()).reshape(width, width)
            messages[i] = messages[i] + states[j] @ matrix
            counts[i] += 1
        messages = (messages / counts.clamp(min=1) + conv.bias).relu()
        states = model.gru(messages, states)
    question = cell = torch.zeros(1, width)
    seen = torch.zeros(1, 2 * width)
    for _ in range(model.pool.steps):
        question, cell = model.pool.lstm(seen, (question, cell))
        share = (states @ question[0]).softmax(0)
        seen = torch.cat([question, (share @ states)[None]], 1)
    return seen[0]


@pytest.mark.parametrize("positions", [False, True])
def test_the_network_is_message_passing_edge_by_edge(positions):
    torch.manual_seed(0)
    graphs = some_graphs(positions)
    model = MPNN(*graphs.widths, dim=6, hidden=7, steps=3, set2set=2)
    torch.nn.init.normal_(model.conv.bias)
    together = model(graphs[list(range(len(graphs)))])
    one_by_one = torch.stack([slow(model, graphs, k) for k in range(len(graphs))])
    torch.testing.assert_close(together, one_by_one)
    weights = torch.randn_like(together)
    parameters = list(model.parameters())
    fast = torch.autograd.grad((together * weights).sum(), parameters)
    plain = torch.autograd.grad((one_by_one * weights).sum(), parameters)
    for a, b in zip(fast, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("positions", [False, True])
def test_torch_geometric_agrees(positions):
    geometric = pytest.importorskip("torch_geometric.nn")
    torch.manual_seed(0)
    graphs = some_graphs(positions)
    batch = graphs[list(range(len(graphs)))]
    width, hidden = 6, 5
    conv, pool = EdgeConv(width, graphs.widths[1], hidden), Set2Set(width, 3)
    torch.nn.init.normal_(conv.bias)
    states = torch.randn(*batch.nodes.shape[:2], width)

    edge_network = torch.nn.Sequential(conv.first, torch.nn.ReLU(), conv.second)
    theirs = geometric.NNConv(width, width, edge_network, aggr="mean", root_weight=False)
    theirs.bias = conv.bias
    edges, features, first = [], [], 0
    for k, size in enumerate(SIZES):
        for j, i, one in edges_of(graphs, k):
            edges.append([first + j, first + i])
            features.append(one)
        first += size
    flat = states[batch.present]
    expected = theirs(flat, torch.tensor(edges).T, torch.stack(features))
    torch.testing.assert_close(conv(states, conv.prepare(batch))[batch.present], expected)

    their_pool = geometric.aggr.Set2Set(width, 3)
    their_pool.lstm.load_state_dict({f"{k}_l0": v for k, v in pool.lstm.state_dict().items()})
    owner = torch.repeat_interleave(torch.tensor(SIZES))
    torch.testing.assert_close(pool(states, batch.present), their_pool(flat, owner))


def test_neither_the_order_of_nodes_nor_the_company_matters():
    torch.manual_seed(0)
    graphs = some_graphs()
    model = MPNN(*graphs.widths, dim=4, hidden=5, steps=2, set2set=2)
    alone = torch.cat([model(graphs[k]) for k in range(len(graphs))])
    torch.testing.assert_close(model(graphs[torch.arange(len(graphs))]), alone)
    order = torch.tensor([2, 0, 3, 1])  # of graph 1, which has four nodes
    other = Graphs(
        graphs.sizes[1:2],
        graphs.nodes[1:2, order],
        graphs.kinds[1:2][:, order][:, :, order],
        KINDS,
        graphs.positions[1:2, order],
    )
    torch.testing.assert_close(model(other[0]), model(graphs[1]))


def a_set(graphs):
    split = Split(graphs, {"a": torch.zeros(7), "b": torch.zeros(7)})
    tasks = (Task.regression("a", "", 0.0, 1.0), Task.regression("b", "", 0.0, 1.0))
    return Data("made", tasks, split, split, split, graphs.widths, "made in the test")


def test_the_model_of_the_registry():
    data = a_set(some_graphs())
    model = build("mpnn(dim=4, hidden=3, steps=1, set2set=1)", data)
    inputs, targets = data.train[[0, 1, 2]]
    assert {k: v.shape for k, v in model(inputs).items()} == {"a": (3, 1), "b": (3, 1)}
    published = build("mpnn", data)
    assert published.trunk.width == 128
    assert published.trunk.conv.second.weight.shape == (64 * 64, 128)
    with pytest.raises(ValueError, match="steps is 0; give 1 or more"):
        build("mpnn(steps=0)", data)
    with pytest.raises(ModelError, match="no option 'width'"):
        build("mpnn(width=3)", data)
    with pytest.raises(ValueError, match=r"mpnn takes graphs; multidigits has inputs of shape"):
        build("mpnn", load("multidigits(sizes=(2, 2, 2))"))
    with pytest.raises(
        ValueError, match=r"LeNet takes images .* made has inputs of shape \(5, 4\)"
    ):
        build("lenet", data)


def test_a_graph_needs_no_edge():
    graphs = some_graphs(positions=False)
    bare = replace(graphs[[0, 5]])  # of one node each
    assert not bare.connected.any()
    model = MPNN(*graphs.widths, dim=4, hidden=3, steps=2, set2set=2)
    assert model(bare).isfinite().all()
