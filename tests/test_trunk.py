"""SharedTrunk: names, ownership, groups, and copies that share nothing."""

import pytest
import torch
from helpers import linear_model
from torch import nn

import equipoise as eq


def test_the_order_of_the_heads_is_the_order_of_the_tasks() -> None:
    model = eq.SharedTrunk(nn.Linear(2, 3), {t: nn.Linear(3, 1) for t in ("z", "a", "m")})
    assert model.tasks == ("z", "a", "m")
    assert list(model(torch.randn(4, 2))) == ["z", "a", "m"]


def test_forward_is_each_head_on_the_features() -> None:
    model = linear_model()
    inputs = torch.randn(4, 5, dtype=torch.float64)
    for task, output in model(inputs).items():
        assert torch.equal(output, model.heads[task](model.trunk(inputs)))


def test_who_owns_what_frozen_parameters_included() -> None:
    model = linear_model()
    model.trunk[0].requires_grad_(False)
    model.heads["left"].requires_grad_(False)
    assert [id(p) for p in model.shared_parameters()] == [id(p) for p in model.trunk.parameters()]
    for task in model.tasks:
        own = [id(p) for p in model.heads[task].parameters()]
        assert [id(p) for p in model.head_parameters(task)] == own


def test_no_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="heads is empty"):
        eq.SharedTrunk(nn.Linear(2, 3), {})


@pytest.mark.parametrize("name", ["", "a.b", "keys", 3])
def test_names_that_a_module_cannot_carry_are_refused(name: object) -> None:
    with pytest.raises(ValueError, match="choose another task name") as caught:
        eq.SharedTrunk(nn.Linear(2, 3), {name: nn.Linear(3, 1)})
    assert repr(name) in str(caught.value)


def test_a_parameter_of_trunk_and_head_is_refused() -> None:
    trunk, head = nn.Linear(3, 3), nn.Linear(3, 3)
    head.weight = trunk.weight
    with pytest.raises(eq.TaskError, match=r"task 'b': .*'weight'.*the trunk \(weight\)"):
        eq.SharedTrunk(trunk, {"a": nn.Linear(3, 3), "b": head})


def test_a_parameter_of_two_heads_is_refused() -> None:
    first, second = nn.Linear(3, 1), nn.Linear(3, 1)
    second.bias = first.bias
    with pytest.raises(eq.TaskError, match=r"task 'b': .*'bias'.*head 'a' \(bias\)"):
        eq.SharedTrunk(nn.Linear(2, 3), {"a": first, "b": second})
    with pytest.raises(eq.TaskError, match="task 'b'"):
        eq.SharedTrunk(nn.Linear(2, 3), {"a": first, "b": first})


def test_a_parameter_used_twice_within_the_trunk_or_a_head_is_fine() -> None:
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    model = eq.SharedTrunk(tied, {"a": nn.Linear(3, 1)})
    assert len(model.shared_parameters()) == 3


def test_separated_shares_nothing_and_computes_the_same() -> None:
    model = linear_model(("left", "right"))
    copy = model.separated()
    inputs = torch.randn(4, 5, dtype=torch.float64)
    for task, output in model(inputs).items():
        assert torch.equal(copy(inputs)[task], output)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in copy.parameters()}
    with torch.no_grad():
        for p in copy.trunk.of["left"].parameters():
            p.zero_()
    assert torch.equal(copy(inputs)["right"], model(inputs)["right"])
    assert not torch.equal(copy(inputs)["left"], model(inputs)["left"])


def test_separated_twice_is_a_copy() -> None:
    once = linear_model().separated()
    twice = once.separated()
    assert twice.state_dict().keys() == once.state_dict().keys()
    assert not {id(p) for p in once.parameters()} & {id(p) for p in twice.parameters()}


def test_groups_and_their_state() -> None:
    model = linear_model(("left", "left2"))
    assert model.groups == (("left", "left2"),)
    assert model.group_state(model.groups[0]).keys() == model.state_dict().keys()
    copy = model.separated()
    assert copy.groups == (("left",), ("left2",))
    first, second = (copy.group_state(group) for group in copy.groups)
    assert not first.keys() & second.keys()
    assert first.keys() | second.keys() == copy.state_dict().keys()
    # Loading a group's state changes the outputs of that group alone.
    inputs = torch.randn(4, 5, dtype=torch.float64)
    before = copy(inputs)
    copy.load_state_dict({k: torch.zeros_like(v) for k, v in first.items()}, strict=False)
    assert torch.equal(copy(inputs)["left2"], before["left2"])
    assert torch.equal(copy(inputs)["left"], torch.zeros_like(before["left"]))
