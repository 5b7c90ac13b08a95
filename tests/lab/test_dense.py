"""Tasks with an answer for every pixel: losses and measures against numbers made by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torchmetrics import MeanAbsoluteError, MeanAbsolutePercentageError

from equipoise.lab.dense import Depth, Normals, Segmentation

CLASSES = ("floor", "wall", "chair", "lamp")
ROOM = Segmentation("room", CLASSES)
FAR = Depth("far")
UP = Normals("up")
DOUBLE = torch.float64


def logits(classes: list) -> torch.Tensor:
    """Logits (B, 4, H, W) whose greatest are these classes (B, H, W)."""
    return 3 * torch.nn.functional.one_hot(torch.tensor(classes), 4).movedim(-1, 1).double()


def turned(*degrees: float) -> torch.Tensor:
    """Directions (1, 3, 1, n), turned away from (0, 0, 1) by so much."""
    angles = torch.tensor(degrees, dtype=DOUBLE).deg2rad()
    return torch.stack([angles.sin(), 0 * angles, angles.cos()])[None, :, None]


def measured(task, *batches) -> dict[str, float]:
    metric = task.metric()
    for output, target in batches:
        task.update(metric, output, target)
    return {name: float(value) for name, value in metric.compute().items()}


# ---------------------------------------------------------------------- segmentation


def test_cross_entropy_leaves_ignored_pixels_out():
    target = torch.tensor([[[0, 1], [-1, 3]]])
    output = torch.zeros(1, 4, 2, 2, dtype=DOUBLE)
    output[0, 2, 1, 0] = 100.0  # at the pixel that does not count
    assert ROOM.loss(output, target).item() == pytest.approx(math.log(4))
    output[0, 0, 0, 0] = 2.0
    first = -math.log(math.exp(2) / (math.exp(2) + 3))
    assert ROOM.loss(output, target).item() == pytest.approx((first + 2 * math.log(4)) / 3)


def test_miou_and_pixel_accuracy_by_hand():
    said = [[[0, 0, 1, 1, 0, 2]]]
    true = torch.tensor([[[0, 1, 1, 1, 0, -1]]])
    found = measured(ROOM, (logits(said), true))
    # floor 2 of 3, wall 2 of 3; chair is said at an ignored pixel only, lamp is nowhere.
    assert found == {"mIoU": pytest.approx(2 / 3), "pixel accuracy": pytest.approx(4 / 5)}


def test_a_class_that_is_only_predicted_or_only_there_counts_as_zero():
    found = measured(ROOM, (logits([[[0, 0, 2]]]), torch.tensor([[[0, 0, 3]]])))
    assert found["mIoU"] == pytest.approx((1 + 0 + 0) / 3)


def test_pixels_of_all_batches_are_counted_together():
    first = logits([[[0, 0]]]), torch.tensor([[[0, 1]]])
    last = logits([[[1, 1, 1, 1]]]), torch.tensor([[[1, 1, 1, -1]]])
    found = measured(ROOM, first, last)
    # floor 1 of 2, wall 3 of 4.
    assert found == {"mIoU": pytest.approx(5 / 8), "pixel accuracy": pytest.approx(4 / 5)}


# ---------------------------------------------------------------------- depth


def test_depth_by_hand_without_the_unknown():
    target = torch.tensor([[[[2.0, 4.0], [0.0, 1.0]]]])
    output = torch.tensor([[[[1.0, 5.0], [9.0, 1.0]]]])
    assert FAR.loss(output, target).item() == pytest.approx(2 / 3)
    found = measured(FAR, (output, target))
    assert found["abs error"] == pytest.approx(2 / 3)
    assert found["rel error"] == pytest.approx((1 / 2 + 1 / 4) / 3)


def test_depth_is_what_torchmetrics_has():
    generator = torch.Generator().manual_seed(0)
    output, target = 5 * torch.rand(2, 3, 1, 8, 9, generator=generator, dtype=DOUBLE)
    found = measured(FAR, (output[:1], target[:1]), (output[1:], target[1:]))
    assert found["abs error"] == pytest.approx(float(MeanAbsoluteError()(output, target)))
    percent = MeanAbsolutePercentageError()(output, target)
    assert found["rel error"] == pytest.approx(float(percent), rel=1e-5)


def test_the_mean_of_batches_is_another_number_and_asked_for_by_name():
    # Errors 1, 1, 1 in one batch and 5 in the other.
    first = torch.zeros(1, 1, 1, 3), torch.ones(1, 1, 1, 3)
    last = torch.tensor([[[[7.0, 0.0]]]]), torch.tensor([[[[2.0, 0.0]]]])
    assert measured(FAR, first, last)["abs error"] == pytest.approx(8 / 4)
    older = Depth("far", pooling="batches")
    found = measured(older, first, last)
    assert found["abs error"] == pytest.approx((1 + 5) / 2)
    assert found["rel error"] == pytest.approx((1 + 5 / 2) / 2)
    unknown = torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1, 2)
    assert measured(older, first, unknown, last) == found, "nothing known is no batch"


# ---------------------------------------------------------------------- normals

NAMES = ["mean angle", "median angle", "within 11.25 deg", "within 22.5 deg", "within 30 deg"]


def test_normals_by_hand():
    degrees = (0.0, 10.0, 20.0, 25.0, 60.0)
    target = turned(*[0.0] * 5)
    output = turned(*degrees)
    cosines = [math.cos(math.radians(d)) for d in degrees]
    assert UP.loss(output, target).item() == pytest.approx(1 - sum(cosines) / 5)
    found = measured(UP, (output, target))
    assert list(found) == NAMES
    assert found["mean angle"] == pytest.approx(23.0)
    assert found["median angle"] == pytest.approx(20.0, abs=1e-3)
    assert [found[name] for name in NAMES[2:]] == pytest.approx([2 / 5, 3 / 5, 4 / 5])


def test_only_the_direction_counts_and_only_where_it_is_known():
    target = turned(0.0, 0.0)
    target[..., 1] = 0.0
    output = 7 * turned(30.0, 120.0)
    assert UP.loss(output, target).item() == pytest.approx(1 - math.cos(math.pi / 6))
    assert measured(UP, (output, target))["mean angle"] == pytest.approx(30.0)
    none = torch.zeros_like(target)
    assert measured(UP, (output, target)) == measured(UP, (output, target), (output, none))


def test_no_direction_is_as_wrong_as_an_unrelated_one():
    found = measured(UP, (torch.zeros(1, 3, 1, 1), turned(0.0).float()))
    assert found["mean angle"] == 90.0 and found["within 30 deg"] == 0.0


def test_the_limit_itself_is_not_within():
    at = torch.tensor([30.0 - 1e-6, 30.0 + 1e-6])
    found = measured(UP, (turned(*at.tolist()), turned(0.0, 0.0)))
    assert found["within 30 deg"] == 0.5


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_the_median_over_all_pixels_has_the_stated_resolution(n):
    generator = torch.Generator().manual_seed(n)
    degrees = 180 * torch.rand(n, generator=generator, dtype=DOUBLE)
    batches = [(turned(*part.tolist()), turned(*[0.0] * len(part))) for part in degrees.split(300)]
    found = measured(UP, *batches)["median angle"]
    expected = float(degrees.sort().values[[(n - 1) // 2, n // 2]].mean())
    assert found == pytest.approx(expected, abs=1e-3)


def test_angles_at_both_ends_are_exact():
    found = measured(UP, (turned(0.0, 180.0), turned(0.0, 0.0)))
    assert found["mean angle"] == pytest.approx(90.0, abs=1e-6)
    assert found["median angle"] == pytest.approx(90.0, abs=1e-3)


def test_the_median_of_batches_is_the_mean_of_their_medians():
    older = Normals("up", pooling="batches")
    first = turned(10.0, 20.0, 60.0), turned(0.0, 0.0, 0.0)
    last = turned(30.0, 40.0), turned(0.0, 0.0)
    found = measured(older, first, last)
    assert found["median angle"] == pytest.approx((20 + 35) / 2)
    assert found["mean angle"] == pytest.approx((30 + 35) / 2)
    assert found["within 11.25 deg"] == pytest.approx((1 / 3 + 0) / 2)
    assert measured(UP, first, last)["median angle"] == pytest.approx(30, abs=1e-3)


# ---------------------------------------------------------------------- all of them


@pytest.mark.parametrize("task", [ROOM, FAR, UP], ids=lambda task: task.kind)
def test_a_batch_in_which_nothing_is_known_trains_nothing(task):
    channels = task.outputs
    output = torch.randn(2, channels, 4, 5, requires_grad=True)
    target = torch.zeros(2, channels, 4, 5) if task is not ROOM else torch.full((2, 4, 5), -1)
    loss = task.loss(output, target)
    loss.backward()
    assert loss.item() == 0.0 and output.grad is not None and not output.grad.any()


@pytest.mark.parametrize("pooling", ["pixels", "batches"])
@pytest.mark.parametrize("make", [lambda p: Depth("d", pooling=p), lambda p: Normals("n", p)])
def test_nothing_known_at_all_is_not_a_number(make, pooling):
    task = make(pooling)
    none = torch.zeros(1, task.outputs, 2, 2)
    found = measured(task, (none, none))
    assert list(found) == [measure.name for measure in task.measures]
    assert all(map(math.isnan, found.values()))


@pytest.mark.parametrize("task", [ROOM, FAR, UP], ids=lambda task: task.kind)
def test_the_gradient_is_that_of_the_loss(task):
    torch.manual_seed(0)
    output = torch.randn(1, task.outputs, 2, 3, dtype=DOUBLE, requires_grad=True)
    target = torch.tensor([[[0, 1, -1], [3, 2, 0]]])
    if task is not ROOM:
        target = torch.rand(1, task.outputs, 2, 3, dtype=DOUBLE)
        target[..., 1] = 0
    assert torch.autograd.gradcheck(lambda x: task.loss(x, target), (output,))


@pytest.mark.parametrize("task", [ROOM, FAR, UP], ids=lambda task: task.kind)
def test_scores_are_one_for_the_perfect_and_the_names_fit(task):
    perfect = {m.name: 1.0 if m.higher_is_better else 0.0 for m in task.measures}
    assert task.score(perfect) == pytest.approx(1.0)
    worse = {**perfect, task.measures[0].name: 0.5}
    assert task.score(worse) < 1.0
    assert task.pixelwise and task.n_classes == 0 and task.uninformed_loss > 0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Segmentation("room", ("one",)), "there are 1 classes"),
        (lambda: Segmentation("room", CLASSES, ignore=2), "ignore is 2, which is 'chair'"),
        (lambda: Depth("room", scale=0.0), "scale is 0.0"),
    ],
)
def test_impossible_tasks_are_refused_by_name(make, words):
    with pytest.raises(ValueError, match=f"'room'.*{words}"):
        make()
