"""Messages name the true cause, and errors of the user's code say where they were raised."""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import differences, snapshot
from torch import Tensor, nn

import equipoise as eq
from equipoise.errors import raised_in


def batch() -> tuple[Tensor, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (12,), generator=g)
    return torch.randn(12, 8, generator=g), {"a": torch.randn(12, 1, generator=g), "b": labels}


def step_of(
    recipe: str = "ew",
    loss: Any = F.cross_entropy,
    trunk: nn.Module | None = None,
    head: nn.Module | None = None,
    penalised: bool = False,
) -> eq.Step:
    torch.manual_seed(0)
    model = eq.SharedTrunk(
        trunk or nn.Linear(8, 16), {"a": nn.Linear(16, 1), "b": head or nn.Linear(16, 3)}
    )
    weight = next(iter(model.trunk.parameters()))

    def other(output: Tensor, target: Tensor) -> Tensor:
        # With the penalty the whole graph is differentiated.
        return F.mse_loss(output, target) + penalised * weight.square().sum()

    return eq.Recipe.parse(recipe).build(model, {"a": other, "b": loss}, 0.1, 9)


def closure_step(step: eq.Step, x: Tensor, y: dict[str, Tensor]) -> eq.StepReport:
    def losses() -> dict[str, Tensor]:
        outputs = step.model(x)
        return {t: step.losses[t](outputs[t], y[t]) for t in y}

    optimizer = torch.optim.SGD(step.model.parameters(), lr=0.1)
    return eq.Step(step.model, list(step.tasks), optimizer)(losses)


# ------------------------------------------------------------------------- labels that do not count


def own(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, ignore_index=255)


class OwnModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ignore_index = 9

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target, ignore_index=self.ignore_index)


@pytest.mark.parametrize(
    ("loss", "label"),
    [
        (F.cross_entropy, -100),
        (lambda output, target: F.nll_loss(F.log_softmax(output, 1), target), -100),
        (nn.CrossEntropyLoss(), -100),
        (nn.CrossEntropyLoss(ignore_index=7), 7),
        (partial(F.cross_entropy, ignore_index=255), 255),
        (partial(F.cross_entropy, label_smoothing=0.1), -100),
        (own, 255),
        (OwnModule(), 9),
    ],
)
@pytest.mark.parametrize("penalised", [False, True])
def test_labels_that_are_all_ignored(loss: Any, label: int, penalised: bool) -> None:
    x, y = batch()
    step = step_of("cagrad", loss, penalised=penalised)
    step(x, y)
    step.model.zero_grad()
    before = snapshot(step)
    words = rf"task 'b': loss is nan: its labels are all {label}.*out of targets for this batch"
    with pytest.raises(eq.NonFiniteError, match=words):
        step(x, {**y, "b": torch.full((12,), label)})
    with pytest.raises(eq.NonFiniteError, match=words):  # or all that the mask leaves
        some = y["b"].clone()
        some[3:] = label
        step(x, {**y, "b": some}, {"b": torch.arange(12) >= 3})
    assert differences(before, snapshot(step)) == []
    assert step(x, {"a": y["a"]}).losses.isnan().tolist() == [False, True]  # what it advises


def test_another_cause_is_not_blamed_on_labels() -> None:
    x, y = batch()
    with pytest.raises(eq.NonFiniteError, match="task 'a': loss is nan. Lower the learning rate"):
        step_of()(x * torch.nan, y)
    step = step_of(loss=lambda o, t: F.cross_entropy(o, t) * torch.inf)
    with pytest.raises(eq.NonFiniteError, match="task 'b': loss is inf. Lower the learning rate"):
        step(x, y)


def test_a_hole_that_the_loss_does_not_leave_out() -> None:
    x, y = batch()
    step = step_of()
    step.missing = "loss"
    y["a"] = y["a"].expand(12, 2).clone()
    y["a"][0, 0] = torch.nan
    step.losses["a"] = lambda output, target: F.mse_loss(output.expand(12, 2), target)
    with pytest.raises(eq.NonFiniteError, match="task 'a'.*its target holds NaN"):
        step(x, y)


# ---------------------------------------------------------------------------------- empty batches


@pytest.mark.parametrize("recipe", ["ew", "f-cagrad", "bls"])
def test_an_empty_batch(recipe: str) -> None:
    x, y = batch()
    step = step_of(recipe)
    before = snapshot(step)
    with pytest.raises(eq.EquipoiseError, match="the batch is empty"):
        step(x[:0], {t: v[:0] for t, v in y.items()})
    assert differences(before, snapshot(step)) == []
    with pytest.raises(eq.NonFiniteError, match="task 'a': loss is nan: .* batch .* empty"):
        closure_step(step, x[:0], {t: v[:0] for t, v in y.items()})


# ------------------------------------------------------------------------ errors of the user's


class Broken(nn.Module):
    def __init__(self, size: int, error: Exception, calls: int) -> None:
        super().__init__()
        self.layer = nn.Linear(16 if size == 3 else 8, size)
        self.error, self.calls = error, calls

    def forward(self, x: Tensor) -> Tensor:
        self.calls -= 1
        if self.calls < 0:
            raise self.error
        return self.layer(x)


def texts(error: BaseException) -> str:
    return "\n".join([str(error), *getattr(error, "__notes__", ())])


@pytest.mark.parametrize("place", ["trunk", "head", "loss"])
@pytest.mark.parametrize("calls", [0, 1, 2])
@pytest.mark.parametrize("penalised", [False, True])
def test_where_an_error_was_raised(place: str, calls: int, penalised: bool) -> None:
    error = ValueError("boom")
    given: dict[str, Any] = {}
    if place == "trunk":
        given["trunk"] = Broken(16, error, calls)
    elif place == "head":
        given["head"] = Broken(3, error, calls)
    else:
        broken = Broken(3, error, calls)
        given["loss"] = lambda o, t: F.cross_entropy(
            o + 0 * broken(o.new_zeros(12, 16)).detach(), t
        )
    step = step_of("f-cagrad", penalised=penalised, **given)
    before = snapshot(step)
    with pytest.raises(ValueError, match="boom") as caught:
        step(*batch())
    assert caught.value is error
    expected = "the trunk" if place == "trunk" else f"the {place} of task 'b'"
    assert texts(error).count("This was raised in") == 1
    assert f"This was raised in {expected}." in texts(error)
    frames = [entry.name for entry in caught.traceback]
    assert frames[-1] == "forward"
    assert differences(before, snapshot(step)) == []


@pytest.mark.parametrize("error", [KeyError(3), ZeroDivisionError("by zero"), StopIteration()])
def test_where_a_closure_raised(error: Exception) -> None:
    net = nn.Linear(2, 2)

    def losses() -> dict[str, Tensor]:
        raise error

    step = eq.Step(net, ["a"], torch.optim.SGD(net.parameters(), lr=0.1))
    # A StopIteration cannot leave a context manager as it is.
    with pytest.raises((type(error), RuntimeError)):
        step(losses)
    if sys.version_info >= (3, 11):
        assert "This was raised in the closure." in texts(error)


def test_what_is_raised_on_purpose_is_left_alone() -> None:
    def refuse(output: Tensor, target: Tensor) -> Tensor:
        raise eq.TaskError("b", "not today")

    with pytest.raises(eq.TaskError) as caught:
        step_of(loss=refuse)(*batch())
    assert texts(caught.value) == "task 'b': not today"


def test_interrupts_pass() -> None:
    with pytest.raises(KeyboardInterrupt) as caught, raised_in("the trunk"):
        raise KeyboardInterrupt
    assert texts(caught.value) == ""


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ValueError("boom"), "boom This was raised in x."),
        (lambda: ValueError("boom", 2), "('boom This was raised in x.', 2)"),
        (lambda: KeyError(2), "2"),
    ],
)
def test_before_python_3_11(
    make: Callable[[], Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 12))
    error = make()
    with pytest.raises(type(error)), raised_in("x"):
        raise error
    assert str(error) == said
