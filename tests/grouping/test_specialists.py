"""Specialists: trained by memberships, asked together, kept in one file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from reference import grouping as slow
from torch import nn
from torch.nn import functional as F

import equipoise as eq
from equipoise.grouping import Specialists, find_groups

TASKS = ("a", "b", "c")
W = torch.tensor([[0.7, 0.3], [0.0, 1.0], [0.4, 0.6]], dtype=torch.float64)


def network(seed: int = 0, width: int = 1) -> eq.SharedTrunk:
    torch.manual_seed(seed)
    trunk = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Dropout(0.2))
    return eq.SharedTrunk(trunk, {t: nn.Linear(6, width) for t in TASKS})


def batch() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(3))
    return x, {t: (x[:, k : k + 1] > 0).float() for k, t in enumerate(TASKS)}


LOSSES = dict.fromkeys(TASKS, F.binary_cross_entropy_with_logits)


@pytest.mark.parametrize("combine", ["probabilities", "logits"])
def test_the_ensemble_beside_the_formula(combine: str) -> None:
    together = Specialists([network(0), network(1)], W, combine=combine)
    x, _ = batch()
    logits = [[m.eval()(x)[t][:, 0].tolist() for t in TASKS] for m in together.models]
    expected = slow.ensemble(np.array(logits), W.numpy(), combine)
    p = together.probabilities(x)
    found = together.eval()(x)
    said = together.predict(x)
    for i, task in enumerate(TASKS):
        np.testing.assert_allclose(p[task][:, 0], expected[i], atol=1e-6)
        np.testing.assert_allclose(found[task].sigmoid()[:, 0].detach(), expected[i], atol=1e-6)
        assert said[task][:, 0].tolist() == (expected[i] > 0.5).astype(int).tolist()
    # Task b belongs to the second network alone.
    assert torch.equal(found["b"], together.models[1].eval()(x)["b"])


def test_probabilities_and_logits_differ() -> None:
    """sigmoid(4) = .982, sigmoid(-1) = .269: the mean of the logits says yes at .818."""
    models = []
    for bias in (4.0, -1.0):
        model = eq.SharedTrunk(nn.Identity(), {"t": nn.Linear(1, 1)})
        nn.init.zeros_(model.heads["t"].weight)
        nn.init.constant_(model.heads["t"].bias, bias)
        models.append(model)
    half = torch.tensor([[0.5, 0.5]])
    by = {c: Specialists(models, half, combine=c) for c in ("probabilities", "logits")}
    x = torch.zeros(1, 1)
    assert float(by["probabilities"].probabilities(x)["t"]) == pytest.approx(0.62547758, abs=1e-6)
    assert float(by["logits"].probabilities(x)["t"]) == pytest.approx(0.81757448, abs=1e-6)


def test_classes_numbers_and_extreme_logits() -> None:
    models = [network(s, 4) for s in (0, 1)]
    together = Specialists(models, W, kinds={"c": "regression"}).eval()
    x, _ = batch()
    one, two = (m(x) for m in models)
    p = together.probabilities(x)
    expected = 0.7 * one["a"].softmax(1) + 0.3 * two["a"].softmax(1)
    torch.testing.assert_close(p["a"], expected)
    torch.testing.assert_close(together(x)["a"].exp(), expected)
    torch.testing.assert_close(p["c"], 0.4 * one["c"] + 0.6 * two["c"])
    assert together.predict(x)["a"].tolist() == expected.argmax(1).tolist()
    loud = Specialists([network(0), network(1)], W).eval()
    assert all(bool(o.isfinite().all()) for o in loud(1e6 * x).values())


def test_one_input_is_a_batch_of_one() -> None:
    together = Specialists([network(0), network(1)], W)
    x, _ = batch()
    said = together.predict(x)
    one = together.predict_one(x[4])
    assert one == {t: int(said[t][4]) for t in TASKS}
    assert together.training, "the mode is as it was"


def test_training_by_memberships_is_the_weighted_sum() -> None:
    """One step of gradient descent on sum_i w_ij L_i (eq. 3)."""
    x, targets = batch()
    together = Specialists([network(0), network(0)], W).eval()
    steps = together.steps("ew", LOSSES, 0.1, 1, optimizer=torch.optim.SGD)
    for j, step in enumerate(steps):
        by_hand = network(0).eval()
        outputs = by_hand(x)
        losses = [LOSSES[t](outputs[t], targets[t]) for t in TASKS]
        total = sum(float(W[i, j]) * loss for i, loss in enumerate(losses))
        assert float(total.detach()) == pytest.approx(
            slow.specialist_loss([float(loss.detach()) for loss in losses], W.numpy(), j)
        )
        parameters = list(by_hand.parameters())
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        report = step(x, targets)
        np.testing.assert_allclose(report.weights, W[:, j])
        for p, g, trained in zip(parameters, gradients, step.model.parameters(), strict=True):
            torch.testing.assert_close(trained, p - 0.1 * (0 if g is None else g))
    head = dict(together.models[0].heads["b"].named_parameters())
    assert torch.equal(head["bias"], network(0).heads["b"].bias), "no part for membership 0"


def test_scaled_to_mean_one() -> None:
    together = Specialists([network(0), network(1)], W)
    steps = together.steps("ew", LOSSES, 0.1, 1, scale_to_mean_one=True)
    for j, step in enumerate(steps):
        np.testing.assert_allclose(step.weighting.factors, W[:, j] * 3 / W[:, j].sum())
        assert float(step.weighting.factors.mean()) == pytest.approx(1)


@pytest.mark.parametrize("recipe", ["igbv1+cagrad", "uw", "f-pcgrad", "mgda", "gradnorm", "rlw"])
def test_any_recipe_inside(recipe: str) -> None:
    x, targets = batch()
    together = Specialists([network(0), network(1)], W)
    before = {k: v.clone() for k, v in together.state_dict().items() if k[0] != "_"}
    for step in together.steps(recipe, LOSSES, 0.01, 2, seed=0):
        for _ in range(5):
            assert step(x, targets).accepted
    after = together.state_dict()
    changed = {k for k, v in before.items() if (v != after[k]).any()}
    assert any(k.startswith("networks.0.trunk") for k in changed)
    assert not any(k.startswith("networks.0.heads.b") for k in changed)


def test_from_maps_to_specialists_of_groups(tmp_path: Path) -> None:
    x = np.array([[0.0, 0], [5, 5], [0.1, 0]])
    groups = find_groups(x, 2, tasks=TASKS, method="hard")
    together = Specialists([network(0), network(1)], groups)
    assert torch.equal(together.memberships, groups.memberships)
    other = find_groups(x, 2, tasks=("c", "b", "a"))
    with pytest.raises(ValueError, match="groups of"):
        Specialists([network(0), network(1)], other)


def test_one_file(tmp_path: Path) -> None:
    x, _ = batch()
    together = Specialists([network(0), network(1)], W, {"c": "regression"}, "logits")
    path = tmp_path / "specialists.pt"
    together.save(path)
    torch.load(path, weights_only=True)
    again = Specialists.load(path, network)
    assert torch.equal(again.memberships, W) and again.combine == "logits"
    assert again.kinds == {"c": "regression"}
    for task, p in together.probabilities(x).items():
        assert torch.equal(again.probabilities(x)[task], p)
    assert [p.name for p in tmp_path.iterdir()] == ["specialists.pt"]
    with pytest.raises(eq.EquipoiseError, match="holds other networks than make_model's"):
        Specialists.load(path, lambda: network(width=2))
    with pytest.raises(ZeroDivisionError):  # no error of the file
        Specialists.load(path, lambda: 1 / 0)
    one = network()
    with pytest.raises(ValueError, match="one and the same"):
        Specialists.load(path, lambda: one)
    whole = path.read_bytes()
    for kept in (100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        with pytest.raises(eq.EquipoiseError, match="holds no specialists, or is damaged"):
            Specialists.load(path, network)
    path.write_bytes(b"something else")
    with pytest.raises(eq.EquipoiseError, match="holds no specialists, or is damaged"):
        Specialists.load(path, network)
    with pytest.raises(FileNotFoundError):
        Specialists.load(tmp_path / "nothing.pt", network)


def test_impossible_specialists() -> None:
    two = [network(0), network(1)]
    renamed = eq.SharedTrunk(nn.Linear(3, 6), {t: nn.Linear(6, 1) for t in "abd"})
    for models, w, more, message in (
        ([], W, {}, "0 models"),
        (two[:1], W, {}, "1 models"),
        ([two[0], renamed], W, {}, "different tasks"),
        (two, W * 0.5, {}, "sum to 1"),
        (two, -W, {}, "must not be negative"),
        (two, W, {"combine": "votes"}, "combine is 'votes'"),
    ):
        with pytest.raises(ValueError, match=message):
            Specialists(models, w, **more)
    with pytest.raises(eq.TaskError, match="'z'"):
        Specialists(two, W, {"z": "binary"})
    with pytest.raises(eq.EquipoiseError, match="stl"):
        Specialists(two, W).steps("stl", LOSSES, 0.1, 1)
    empty = torch.tensor([[1.0, 0], [1, 0], [1, 0]])
    with pytest.raises(eq.EquipoiseError, match="no task belongs to group 2"):
        Specialists(two, empty).steps("ew", LOSSES, 0.1, 1)


def test_predicting_leaves_each_module_in_its_mode() -> None:
    x, _ = batch()
    together = Specialists([network(0), network(1)], W)
    together.networks[0].eval()
    modes = [module.training for module in together.modules()]
    assert len(set(modes)) == 2
    together.predict(x)
    together.predict_one(x[0])
    assert [module.training for module in together.modules()] == modes


def test_a_state_with_other_memberships_is_refused() -> None:
    together = Specialists([network(0), network(1)], W)
    with pytest.raises(eq.EquipoiseError, match="the state has memberships"):
        together.set_extra_state({"memberships": W[:1]})
    assert torch.equal(together.memberships, W)
