"""Missing labels: absent tasks, NaN targets, masks."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    THREE,
    all_tasks,
    differences,
    largest_difference,
    linear_model,
    parameters_of,
    regression_batch,
    regression_step,
    sgd,
    snapshot,
)
from torch import Tensor, nn

import equipoise as eq
from equipoise.engine.ranks import Ranks
from equipoise.engine.targets import Targets

AGGREGATORS = {
    "sum": (eq.Sum, {}),
    "mean": (eq.Mean, {}),
    "mgda": (eq.MGDA, {}),
    "mgda-ub": (eq.MGDA, {"level": "features"}),
    "callable": (lambda: lambda rows: rows.sum(0), {}),
}


def labels(targets: dict, masks: dict | None = None, tasks: tuple[str, ...] = THREE) -> Targets:
    return Targets(tasks, targets, masks, Ranks())


# ------------------------------------------------------------------------------ who is there


def test_present_names_and_shares() -> None:
    found = labels({"c": torch.zeros(4), "a": torch.tensor([torch.nan, 1.0])})
    assert found.names == ["a", "c"]
    assert found.present.tolist() == [True, False, True]
    assert found.parts == [1.0, 1.0]
    assert [found.here(task) for task in THREE] == [True, False, True]


@pytest.mark.parametrize(
    ("target", "mask", "kept"),
    [
        (torch.tensor([0.0, torch.nan, 2.0]), None, [0, 2]),
        (torch.tensor([0.0, 1.0, 2.0]), torch.tensor([True, True, False]), [0, 1]),
        (torch.tensor([torch.nan, 1.0, 2.0]), torch.tensor([True, True, False]), [1]),
        (torch.tensor([0, 1, 2]), torch.tensor([False, True, True]), [1, 2]),
        (torch.tensor([[0.0, 1.0], [torch.nan, torch.nan], [1.0, 1.0]]), None, [0, 2]),
        # What is NaN in part does not matter where the mask rules it out.
        (
            torch.tensor([[0.0, 1.0], [0.0, torch.nan], [1.0, 1.0]]),
            torch.tensor([True, False, True]),
            [0, 2],
        ),
        (torch.tensor([0.0, 1.0, torch.inf]), None, [0, 1, 2]),
        (torch.tensor([0.0, 1.0, 2.0]), torch.tensor([True, True, True]), [0, 1, 2]),
    ],
)
def test_the_samples_that_count(target: Tensor, mask: Tensor | None, kept: list[int]) -> None:
    output = {"mean": torch.arange(3.0), "note": "as it is"}
    found = labels({"a": target}, None if mask is None else {"a": mask})
    chosen, chosen_target = found.pair("a", output)
    assert chosen["mean"].tolist() == kept
    assert chosen["note"] == "as it is"
    assert torch.equal(chosen_target, target[kept])


def test_targets_that_are_no_tensors_count_whole() -> None:
    found = labels({"a": ["any", "thing"], "b": torch.tensor(3.0)})
    assert found.names == ["a", "b"]
    assert found.pair("a", torch.zeros(2))[1] == ["any", "thing"]


@pytest.mark.parametrize("targets", [{}, {"a": torch.tensor([torch.nan])}])
def test_nothing_there(targets: dict) -> None:
    if targets:
        assert labels(targets).names == []
    else:
        with pytest.raises(eq.EquipoiseError, match="targets is empty"):
            labels(targets)


def test_a_batch_of_no_samples_is_refused() -> None:
    with pytest.raises(eq.EquipoiseError, match="the batch is empty"):
        labels({"a": torch.zeros(0, 1), "b": torch.zeros(0, dtype=torch.long)})
    # One task alone may have no sample here.
    assert labels({"a": torch.zeros(0, 1), "b": torch.zeros(2)}).names == ["b"]


# ------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("what", ["target", "mask"])
def test_unknown_names_are_refused_with_the_nearest(what: str) -> None:
    targets = {"depth": torch.zeros(2)}
    masks = None
    if what == "mask":
        masks = {"dept": torch.ones(2, dtype=torch.bool)}
    else:
        targets = {"dept": torch.zeros(2)}
    words = f"task 'dept': has a {what} but .* did you mean 'depth'"
    with pytest.raises(eq.TaskError, match=words):
        labels(targets, masks, ("depth", "normals"))


@pytest.mark.parametrize(
    "mask",
    [torch.ones(3), torch.ones(3, dtype=torch.int64), torch.ones(2, dtype=torch.bool),
     torch.ones(3, 1, dtype=torch.bool), torch.tensor(True)],
)  # fmt: skip
def test_masks_of_the_wrong_kind_or_shape_are_refused(mask: Tensor) -> None:
    with pytest.raises(eq.TaskError, match=r"task 'b': mask is torch\.\w+ of shape .*\(3,\)") as e:
        labels({"b": torch.zeros(3)}, {"b": mask})
    assert str(mask.dtype) in str(e.value)
    assert str(tuple(mask.shape)) in str(e.value)


def test_a_mask_for_a_target_without_samples_is_refused() -> None:
    with pytest.raises(eq.TaskError, match="task 'a': has a mask, but"):
        labels({"a": ["x"]}, {"a": torch.ones(1, dtype=torch.bool)})


@pytest.mark.parametrize("what", ["targets", "masks"])
def test_targets_and_masks_are_dicts(what: str) -> None:
    step = regression_step()
    inputs, targets = regression_batch()
    wrong = {"targets": targets, "masks": None} | {what: [torch.zeros(8)]}
    before = snapshot(step)
    with pytest.raises(eq.EquipoiseError, match=f"{what} must be a dict by task name, not list"):
        step(inputs, **wrong)
    assert differences(before, snapshot(step)) == []


# ------------------------------------------------------------------------------- in the step


@pytest.mark.parametrize("name", AGGREGATORS)
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_an_absent_task_leaves_its_head_alone(name: str, kind: str) -> None:
    aggregator, options = AGGREGATORS[name]
    model = linear_model(THREE)
    if kind == "sgd":
        optimizer = sgd(model, momentum=0.9, weight_decay=0.1)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    step = eq.Step(model, all_tasks(model, F.mse_loss), optimizer, None, aggregator(), **options)
    inputs, targets = regression_batch(THREE)
    for _ in range(2):  # let momentum and Adam state build up
        step(inputs, targets)
    head = parameters_of(model.heads["b"])
    own = {id(p) for p in model.heads["b"].parameters()}
    state = {k: v for k, v in optimizer.state.items() if id(k) in own}
    saved = [{n: v.clone() for n, v in one.items()} for one in state.values()]
    others = parameters_of(model)

    report = step(inputs, {"c": targets["c"], "a": targets["a"]})

    assert differences(head, parameters_of(model.heads["b"])) == []
    assert differences(saved, list(state.values())) == []
    assert all(p.grad is None for p in model.heads["b"].parameters())
    moved = differences(others, parameters_of(model))
    assert len(moved) == len(others) - len(head)
    assert report.losses.isnan().tolist() == [False, True, False]
    assert report.weights.tolist() == [1, 0, 1]
    assert report.factors.tolist() == [1, 0, 1]
    if name == "callable":
        assert report.coefficients is None
    else:
        assert report.coefficients[1] == 0
        assert report.coefficients[0] > 0
    if report.gram is not None:
        assert torch.equal(report.gram[1], torch.zeros(3, dtype=torch.float64))
        assert torch.equal(report.gram[:, 1], torch.zeros(3, dtype=torch.float64))
        assert report.cosines[0, 0].item() == pytest.approx(1)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_an_absent_task_is_as_if_the_model_had_none(name: str) -> None:
    aggregator, options = AGGREGATORS[name]
    inputs, targets = regression_batch(THREE)
    del targets["b"]
    whole = regression_step(None, aggregator(), THREE, **options)
    part = regression_step(None, aggregator(), ("a", "c"), **options)
    part.model.load_state_dict(whole.model.state_dict(), strict=False)
    for _ in range(3):
        with_b, without = whole(inputs, targets), part(inputs, targets)
        assert with_b.direction_norm == pytest.approx(without.direction_norm, rel=1e-12)
    del whole.model.heads["b"]
    assert largest_difference(parameters_of(whole.model), parameters_of(part.model)) < 1e-12


@pytest.mark.parametrize("name", AGGREGATORS)
@pytest.mark.parametrize("how", ["nan", "mask", "both"])
def test_the_mean_is_over_the_samples_that_count(name: str, how: str) -> None:
    aggregator, options = AGGREGATORS[name]
    inputs, targets = regression_batch(n=9)
    keep = torch.tensor([True, False, True, True, False, True, False, True, True])
    first, second = keep.clone(), keep.clone()
    if how != "mask":
        targets["left"][~keep] = torch.nan
        first[:] = True
    if how == "both":
        first[0], second[0] = False, True
    masks = {} if how == "nan" else {"left": first}
    expected_keep = keep & first

    def filtered_loss(output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(output[expected_keep], target[expected_keep])

    step = regression_step(None, aggregator(), **options)
    report = step(inputs, targets, masks)
    reference = regression_step(None, aggregator(), **options)
    reference.losses["left"] = filtered_loss
    same = reference(inputs, {k: v.nan_to_num(0.0) for k, v in targets.items()})
    assert torch.allclose(report.losses, same.losses, rtol=1e-12)
    assert largest_difference(parameters_of(step.model), parameters_of(reference.model)) < 1e-10


@pytest.mark.parametrize("shape", ["scalar", "per pixel"])
def test_classes_with_masks_give_the_step_of_the_filtered_batch(shape: str) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(6, 5, dtype=torch.float64)
    classes = torch.tensor([0, 2, 1, 9, 0, 9])  # 9 is no class: must never reach the loss
    keep = classes != 9

    class Pixels(nn.Module):
        def forward(self, scores: Tensor) -> Tensor:
            return scores.reshape(len(scores), 3, 2)

    def build() -> eq.Step:
        torch.manual_seed(1)
        pixels = nn.Sequential(nn.Linear(4, 6), Pixels())
        head = nn.Linear(4, 3) if shape == "scalar" else pixels
        model = eq.SharedTrunk(nn.Linear(5, 4), {"a": head}).double()
        return eq.Step(model, {"a": F.cross_entropy}, sgd(model), None, eq.MGDA())

    targets = classes if shape == "scalar" else classes[:, None].expand(6, 2)
    masked, filtered = build(), build()
    first = masked(inputs, {"a": targets}, {"a": keep})
    second = filtered(inputs[keep], {"a": targets[keep]})
    assert torch.allclose(first.losses, second.losses, rtol=1e-12)
    assert largest_difference(parameters_of(masked.model), parameters_of(filtered.model)) < 1e-12


@pytest.mark.parametrize("how", ["nan", "mask", "one absent"])
def test_a_batch_without_any_label_changes_nothing(how: str) -> None:
    step = regression_step(eq.IGBv1(1), eq.PCGrad())
    inputs, targets = regression_batch()
    step(inputs, targets)
    before = snapshot(step)
    masks = None
    if how == "mask":
        masks = {t: torch.zeros(8, dtype=torch.bool) for t in targets}
    else:
        targets = {t: torch.full_like(v, torch.nan) for t, v in targets.items()}
    if how == "one absent":
        del targets["left"]
    report = step(inputs, targets, masks)
    assert report.accepted is False
    assert report.losses.isnan().all()
    for zero in (report.weights, report.factors, report.coefficients):
        assert torch.equal(zero, torch.zeros(2, dtype=torch.float64))
    assert report.direction_norm == 0
    assert report.gram is None
    assert differences(before, snapshot(step)) == []


@pytest.mark.parametrize(
    "weighting", [eq.SI, lambda: eq.IGBv1(1), lambda: eq.DWA(1), lambda: eq.UW(3), eq.RLW]
)
def test_weightings_with_a_task_now_and_then(weighting: type) -> None:
    step = regression_step(weighting(), eq.MGDA(), THREE)
    inputs, targets = regression_batch(THREE)
    for absent in ("a", None, "b", "a", None, "c"):
        given = {task: v for task, v in targets.items() if task != absent}
        report = step(inputs, given)
        for i, task in enumerate(THREE):
            assert (report.weights[i] == 0) == (task == absent)
            assert report.losses[i].isnan() == (task == absent)
        if isinstance(step.weighting, eq.RLW | eq.DWA | eq.IGBv1):
            assert report.weights.sum().item() == pytest.approx(len(given))
    assert all(p.isfinite().all() for p in step.model.parameters())


# --------------------------------------------------------------------------- holes in a target


def depth_step(missing: str, loss: Any, recipe: str = "cagrad") -> eq.Step:
    torch.manual_seed(0)
    model = eq.SharedTrunk(
        nn.Conv2d(3, 8, 3, padding=1), {"depth": nn.Conv2d(8, 1, 1), "seg": nn.Conv2d(8, 4, 1)}
    )
    step = eq.Recipe.parse(recipe).build(model, {"depth": loss, "seg": F.cross_entropy}, 0.1, 9)
    step.missing = missing
    return step


def images() -> tuple[Tensor, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    depth = torch.rand(4, 1, 8, 8, generator=g)
    depth[:, :, 0, 0] = torch.nan  # one hole of the sensor in each image
    labels = torch.randint(4, (4, 8, 8), generator=g)
    return torch.randn(4, 3, 8, 8, generator=g), {"depth": depth, "seg": labels}


def l1(output: Tensor, target: Tensor) -> Tensor:
    known = ~target.isnan()
    return (output[known] - target[known]).abs().mean()


def test_a_target_with_holes_is_refused() -> None:
    step, (x, y) = depth_step("sample", l1), images()
    before = snapshot(step)
    words = "task 'depth': target is NaN in part for 4 of 4 samples. Say missing='loss'"
    with pytest.raises(eq.TaskError, match=words):
        step(x, y)
    y["depth"][1:] = 0.5
    with pytest.raises(eq.TaskError, match="for 1 of 4 samples"):
        step(x, y)
    assert differences(before, snapshot(step)) == []
    report = step(x, y, {"depth": torch.tensor([False, True, True, True])})
    assert report.losses.isfinite().all()


@pytest.mark.parametrize("recipe", ["cagrad", "f-cagrad", "bls"])
def test_the_loss_sees_the_holes(recipe: str) -> None:
    step, (x, y) = depth_step("loss", l1, recipe), images()
    before = parameters_of(step.model.heads["depth"])
    with torch.no_grad():
        expected = l1(step.model(x)["depth"], y["depth"])
    assert step(x, y).losses[0] == pytest.approx(expected.item(), rel=1e-6)
    assert differences(before, parameters_of(step.model.heads["depth"])) != []


def test_a_sample_without_any_depth_is_left_out_all_the_same() -> None:
    seen: list[Tensor] = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        seen.append(target)
        return l1(output, target)

    x, y = images()
    y["depth"][2] = torch.nan
    depth_step("loss", loss)(x, y)
    assert torch.equal(seen[0].isnan(), y["depth"][[0, 1, 3]].isnan())


@pytest.mark.parametrize("value", ["Loss", None])
def test_missing_has_two_values(value: Any) -> None:
    model = linear_model()
    losses = dict.fromkeys(model.tasks, F.mse_loss)
    with pytest.raises(ValueError, match="known are 'sample' and 'loss'"):
        eq.Step(model, losses, sgd(model), missing=value)


def test_missing_and_a_closure() -> None:
    model = linear_model()
    with pytest.raises(eq.CombinationError, match="missing='loss' and a closure"):
        eq.Step(model, list(model.tasks), sgd(model), missing="loss")
    step = eq.Step(model, list(model.tasks), sgd(model))
    with pytest.raises(eq.CombinationError, match="missing='loss' and a closure"):
        step.missing = "loss"
    assert step.missing == "sample"


# ------------------------------------------------------------------- outputs and nested targets


class Several(nn.Module):
    """Returns with its scores numbers, parameters and what is no tensor."""

    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.layer, self.t = nn.Linear(16, 3), nn.Parameter(torch.ones(()))
        self.classes = nn.Parameter(torch.ones(3))
        self.extra = extra

    def forward(self, z: Tensor) -> dict[str, Any]:
        several = {"scores": self.layer(z), "t": self.t, "classes": self.classes, "name": "b"}
        return {**several, "number": z.mean().detach(), "extra": self.extra}


def loss_of_several(output: dict[str, Any], target: Any) -> Tensor:
    return F.cross_entropy(output["scores"] * output["classes"] / output["t"], target)


@pytest.mark.parametrize("recipe", ["cagrad", "f-cagrad", "bls", "famo"])
def test_a_mask_and_an_output_of_several_parts(recipe: str) -> None:
    x, y, keep = torch.randn(12, 8), torch.randint(3, (12,)), torch.arange(12) < 6
    found = []
    for masked in (True, False):
        torch.manual_seed(0)
        model = eq.SharedTrunk(nn.Linear(8, 16), {"a": Several(None), "b": Several(None)})
        losses = dict.fromkeys("ab", loss_of_several)
        step = eq.Recipe.parse(recipe).build(model, losses, 0.1, 9)
        if masked:
            step(x, {"a": y, "b": y}, {"a": keep, "b": keep})
        else:
            step(x[keep], {"a": y[keep], "b": y[keep]})
        found.append(parameters_of(model))
    assert largest_difference(*found) < 1e-6


@pytest.mark.parametrize("extra", [torch.ones(3), [torch.ones(1, 12)], (torch.ones(0),)])
@pytest.mark.parametrize("how", ["mask", "nan"])
def test_an_output_without_samples_first_is_refused(extra: Any, how: str) -> None:
    model = eq.SharedTrunk(nn.Linear(8, 16), {"a": Several(extra)})

    def loss(output: dict[str, Any], target: Tensor) -> Tensor:
        return F.mse_loss(output["scores"], target)

    step = eq.Step(model, {"a": loss}, sgd(model))
    x, y, masks = torch.randn(12, 8), torch.randn(12, 3), None
    step(x, {"a": y})
    if how == "mask":
        masks = {"a": torch.arange(12) < 6}
    else:
        y[:6] = torch.nan
    step.model.zero_grad()
    before = snapshot(step)
    words = r"task 'a': output holds a tensor of shape \(.*\), .*the 12 samples first"
    with pytest.raises(eq.TaskError, match=words):
        step(x, {"a": y}, masks)
    assert differences(before, snapshot(step)) == []


@pytest.mark.parametrize("kind", ["dict", "tuple"])
def test_a_mask_and_a_target_of_several_tensors(kind: str) -> None:
    value, weight, keep = torch.randn(4, 1), torch.rand(4), torch.tensor([1, 0, 0, 1]).bool()
    target = {"value": value, "weight": weight} if kind == "dict" else (value, weight)
    found = labels({"a": target}, {"a": keep})
    output, chosen = found.pair("a", torch.arange(4))
    assert output.tolist() == [0, 3]
    first, second = chosen.values() if kind == "dict" else chosen
    assert torch.equal(first, value[keep])
    assert torch.equal(second, weight[keep])
    assert found.count("a") == 2
    assert labels({"a": target}).count("a") == 4


@pytest.mark.parametrize(
    "target", [(torch.zeros(4), torch.zeros(3)), "text", [1, 2], torch.ones(())]
)
def test_a_mask_and_a_target_without_common_samples(target: Any) -> None:
    with pytest.raises(eq.TaskError, match="has a mask, but its target is not a tensor"):
        labels({"a": target}, {"a": torch.ones(4, dtype=torch.bool)})
    assert labels({"a": target}).count("a") == 1
