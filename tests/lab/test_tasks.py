"""Task: losses, metrics in original units, missing labels, scores."""

import math

import pytest
import torch

from equipoise.lab.tasks import Task

NAN = torch.nan
DIGIT = Task.classification("digit", ("zero", "one", "two"))
ODD = Task.binary("odd")
SLANT = Task.regression("slant", "deg", mean=-2.0, scale=5.0)


def value(task: Task, *batches: tuple[torch.Tensor, torch.Tensor]) -> float:
    metric = task.metric()
    for output, target in batches:
        task.update(metric, output, target)
    (found,) = metric.compute().values()
    return found.item()


def test_losses_by_hand():
    assert DIGIT.loss(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])).item() == pytest.approx(
        math.log(3)
    )
    assert ODD.loss(torch.zeros(4, 1), torch.tensor([0.0, 1, 1, 0])).item() == pytest.approx(
        math.log(2)
    )
    assert SLANT.loss(torch.tensor([[1.0], [0.0]]), torch.tensor([0.0, 3.0])).item() == 5.0


@pytest.mark.parametrize("task", [DIGIT, ODD, SLANT], ids=lambda task: task.kind)
def test_loss_is_a_scalar_in_the_precision_of_the_output(task):
    target = torch.tensor([0, 1, 1])
    target = target if task.kind == "classification" else target.float()
    output = torch.randn(3, task.outputs, dtype=torch.float64, requires_grad=True)
    loss = task.loss(output, target)
    loss.backward()
    assert loss.shape == () and loss.dtype == torch.float64
    assert output.grad is not None and output.grad.abs().sum() > 0


@pytest.mark.parametrize("task", [ODD, SLANT], ids=lambda task: task.kind)
def test_too_many_outputs_are_refused_rather_than_broadcast(task):
    with pytest.raises(RuntimeError):
        task.loss(torch.zeros(2, 2), torch.zeros(2))


def test_accuracy_is_micro_averaged_over_batches():
    first = torch.eye(3)[[0, 0, 0, 1]], torch.tensor([0, 0, 0, 2])
    last = torch.eye(3)[[2]], torch.tensor([2])
    assert value(DIGIT, first, last) == pytest.approx(4 / 5)


def test_binary_outputs_are_logits_even_when_they_look_like_probabilities():
    assert value(ODD, (torch.tensor([[0.1], [0.2], [0.9]]), torch.ones(3))) == 1.0
    assert value(ODD, (torch.tensor([[-3.0], [0.2], [-0.1]]), torch.ones(3))) == pytest.approx(
        1 / 3
    )


def test_mae_is_in_the_original_unit():
    assert value(SLANT, (torch.tensor([[1.0], [0.0]]), torch.tensor([0.0, 3.0]))) == 10.0


def test_missing_labels_do_not_count():
    output = torch.tensor([[1.0], [1.0], [-1.0]])
    assert value(ODD, (output, torch.tensor([1.0, NAN, 1.0]))) == 0.5
    assert value(SLANT, (output, torch.tensor([NAN, 1.0, 0.0]))) == 2.5
    for task in (ODD, SLANT):
        some = output[:1], torch.zeros(1)
        none = output, torch.full((3,), NAN)
        assert value(task, none, some) == value(task, some)


def test_score_is_higher_for_the_better_and_one_for_the_perfect():
    assert ODD.score({"accuracy": 0.9}) == 0.9
    assert SLANT.score({"mae": 0.0}) == 1.0
    assert SLANT.score({"mae": 5.0}) == 0.0
    assert SLANT.score({"mae": 4.0}) < SLANT.score({"mae": 3.0})
    assert math.isnan(SLANT.score({"mae": NAN}))


def test_positive_weight_by_hand():
    """F.C5: a logit of 0 costs ln 2, and ten times that for a positive."""
    task = Task.binary("one of ten", pos_weight=10.0)
    zero = torch.zeros(1, 1, dtype=torch.float64)
    assert task.loss(zero, torch.ones(1)).item() == pytest.approx(6.9314718, abs=1e-6)
    assert task.loss(zero, torch.zeros(1)).item() == pytest.approx(0.6931472, abs=1e-6)


def test_f1_by_hand():
    """F.C5: three hits, one false alarm, two misses; and no positive anywhere."""
    task = Task.binary("rare", metric="f1")
    said = torch.tensor([1.0, 1, 1, 1, -1, -1, -1]).unsqueeze(1)
    true = torch.tensor([1.0, 1, 1, 0, 1, 1, 0])
    assert value(task, (said, true)) == pytest.approx(2 / 3, abs=1e-6)
    assert value(task, (said[:4], true[:4]), (said[4:], true[4:])) == pytest.approx(2 / 3, abs=1e-6)
    assert value(task, (said[4:], torch.zeros(3))) == 0.0
    assert [m.name for m in task.measures] == ["f1"] and task.measures[0].share


def test_regression_has_other_losses_and_measures():
    output, target = torch.tensor([[1.0], [0.0]]), torch.tensor([0.0, 3.0])
    task = Task.regression("slant", "deg", -2.0, 5.0, metric="RMSE", loss="l1")
    assert task.loss(output, target).item() == 2.0
    assert value(task, (output, target)) == pytest.approx(5 * math.sqrt(5))
    assert task.measures[0].name == "RMSE"


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: Task.classification("depth", ("one",)), "there are 1 classes"),
        (lambda: Task.regression("depth", "m", 0.0, 0.0), "scale is 0.0"),
        (lambda: Task.regression("depth", "m", 0.0, NAN), "scale is nan"),
        (lambda: Task.regression("depth", "m", 0, 1, metric="r2"), "metric is 'r2'; .*mae or rmse"),
        (lambda: Task.regression("depth", "m", 0, 1, loss="l0"), "loss is 'l0'; give mse or l1"),
        (lambda: Task.binary("depth", pos_weight=0.0), "pos_weight is 0.0"),
        (lambda: Task.binary("depth", pos_weight=NAN), "pos_weight is nan"),
        (lambda: Task.binary("depth", metric="auc"), "metric is 'auc'; give accuracy or f1"),
    ],
)
def test_impossible_tasks_are_refused_by_name(make, names):
    with pytest.raises(ValueError, match=names) as error:
        make()
    assert "'depth'" in str(error.value)
