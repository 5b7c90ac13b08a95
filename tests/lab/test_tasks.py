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
    return metric.compute().item()


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
    assert ODD.score(0.9) == 0.9
    assert SLANT.score(0.0) == 1.0
    assert SLANT.score(5.0) == 0.0
    assert SLANT.score(4.0) < SLANT.score(3.0)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("depth", "ranking", 1, "mae", False), "ranking"),
        (("depth", "regression", 2, "mae", False), "outputs is 2"),
        (("depth", "binary", 2, "accuracy", True), "outputs is 2"),
        (("depth", "classification", 1, "accuracy", True), "outputs is 1"),
        (("depth", "regression", 1, "mae", False, "m", None, 0.0, 0.0), "scale is 0.0"),
        (("depth", "regression", 1, "mae", False, "m", None, 0.0, NAN), "scale is nan"),
    ],
)
def test_impossible_tasks_are_refused_by_name(arguments, names):
    with pytest.raises(ValueError, match=names) as error:
        Task(*arguments)
    assert "'depth'" in str(error.value)
