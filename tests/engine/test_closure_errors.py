"""What a closure may do wrong, by which name it is called, and that nothing has changed then."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import all_tasks, differences, linear_model, regression_batch, regression_step, sgd
from networks import Network, closure_of, network, step_on, values
from torch import Tensor

import equipoise as eq

STAGES: dict[str, Callable[[], tuple]] = {
    "igbv1+pcgrad": lambda: (eq.IGBv1(2), eq.PCGrad()),
    "uw": lambda: (eq.UW(3), None),
    "callable": lambda: (eq.RLW(), lambda rows: rows.sum(0)),
    "f-cagrad": lambda: (None, eq.CAGrad(), eq.TaskSharpness(0.1)),
    "f-joint-mean": lambda: (eq.UW(3), eq.MGDA(), eq.TaskSharpness(0.1, perturb="joint-mean")),
    "bls": lambda: (None, eq.MGDA(), None, eq.Backtracking(upper=16.0)),
}


class Break(Exception):
    """Raised by a closure of the user's own."""


class Fault(torch.autograd.Function):
    """Identity whose gradient is not finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * torch.nan


def for_b(new: Callable[[Tensor], Any]) -> Callable:
    """The same losses, that of b changed."""
    return lambda losses: {**losses, "b": new(losses["b"])}


def raising(error: BaseException) -> Callable:
    def fail(losses: Any) -> Any:
        raise error

    return fail


CASES: dict[str, tuple[Callable, type[BaseException], str]] = {
    "a list": (lambda losses: list(losses.values()), eq.EquipoiseError, "dict"),
    "a tensor": (lambda losses: sum(losses.values()), eq.EquipoiseError, "dict"),
    "nothing": (lambda losses: None, eq.EquipoiseError, "dict"),
    "unknown task": (
        lambda losses: {**losses, "bb": losses["b"]}, eq.TaskError, "task 'bb'.*did you mean 'b'"
    ),
    "not scalar": (for_b(lambda x: x[None]), eq.TaskError, r"task 'b': loss has shape \(1,\)"),
    "no tensor": (for_b(lambda x: x.item()), eq.TaskError, "task 'b': loss is a float"),
    "None": (for_b(lambda x: None), eq.TaskError, "task 'b': loss is a NoneType"),
    "three of them": (for_b(lambda x: (x, 1, 2)), eq.TaskError, "task 'b'"),
    "detached": (for_b(lambda x: x.detach()), eq.TaskError, "task 'b': loss is not connected"),
    "nan": (for_b(lambda x: x * torch.nan), eq.NonFiniteError, "task 'b': loss is nan"),
    "inf": (for_b(lambda x: x + torch.inf), eq.NonFiniteError, "task 'b': loss is inf"),
    "gradient": (for_b(Fault.apply), eq.NonFiniteError, "task 'b': gradient is not finite"),
    "own error": (raising(Break("the user's own")), Break, "the user's own"),
    "interrupt": (raising(KeyboardInterrupt("stop")), KeyboardInterrupt, "stop"),
}  # fmt: skip
# What may go wrong in a later look, after a clean one that was good.
LATER = {
    name: case
    for name, case in CASES.items()
    if name in ("a list", "not scalar", "detached", "own error", "interrupt")
} | {
    "a task less": (
        lambda losses: {t: x for t, x in losses.items() if t != "b"},
        eq.EquipoiseError,
        "'b'",
    ),
}


def prepared(name: str) -> tuple[Network, eq.Step]:
    """A step with history, on a network with BatchNorm and dropout."""
    net = network("noisy")
    torch.manual_seed(4)
    kind = torch.optim.SGD if name == "bls" else torch.optim.Adam
    step = step_on(net, *STAGES[name](), optimizer=kind, lr=0.01)
    step(closure_of(net, 0))
    return net, step


@cache
def undisturbed(name: str) -> tuple[eq.StepReport, dict]:
    """What the step after that says and leaves behind, where nothing goes wrong in between."""
    net, step = prepared(name)
    return step(closure_of(net, 6)), step.state_dict()


def broken(net: Network, spoil: Callable, at: int, k: int = 5) -> Callable:
    """The closure over batch k that is spoiled in call number `at`; 0: in all of them."""
    losses, calls = closure_of(net, k), [0]

    def closure() -> Any:
        calls[0] += 1
        found = losses()
        return spoil(found) if at in (0, calls[0]) else found

    return closure


def check(name: str, case: tuple, at: int) -> None:
    """The step fails as it should, changes nothing, and the next one is as if it had not been."""
    spoil, error, words = case
    good_report, good_state = undisturbed(name)
    net, step = prepared(name)
    before = step.state_dict()
    with pytest.raises(error, match=words) as caught:
        step(broken(net, spoil, at))
    if isinstance(caught.value, eq.TaskError):
        assert isinstance(caught.value.task, str)
    assert differences(before, step.state_dict()) == []
    for p in net.parameters():
        assert p.grad is None or p.grad.isfinite().all()
    assert differences(good_report, step(closure_of(net, 6))) == []
    assert differences(good_state, step.state_dict()) == []


FIRST = [
    (case, name)
    for case in CASES
    for name in STAGES
    if name in ("igbv1+pcgrad", "f-joint-mean", "bls") or case in ("nan", "gradient", "own error")
]


@pytest.mark.parametrize(("case", "name"), FIRST)
def test_the_first_call(case: str, name: str) -> None:
    check(name, CASES[case], at=0)


# Of the calls of f-cagrad, the first for the trunk of a has no need of the others' losses.
WHEN = [("f-cagrad", 3), ("f-cagrad", 5), ("f-joint-mean", 2), ("f-joint-mean", 3), ("bls", 2),
        ("bls", 3)]  # fmt: skip
WITHOUT_NEED = {("detached", "bls")}  # a trial needs no graph


@pytest.mark.parametrize(
    ("case", "name", "at"),
    [(case, *when) for case in LATER for when in WHEN if (case, when[0]) not in WITHOUT_NEED],
)
def test_a_later_call(case: str, name: str, at: int) -> None:
    check(name, LATER[case], at)


@pytest.mark.parametrize("at", [3, 5])  # the trunk of b, and all own parameters
@pytest.mark.parametrize("case", ["nan", "gradient"])
def test_not_finite_at_a_perturbed_point(case: str, at: int) -> None:
    check("f-cagrad", (CASES[case][0], eq.NonFiniteError, "task 'b': .*perturbed"), at)


@pytest.mark.parametrize("case", ["nan", "gradient", "own error"])
def test_a_first_step_that_fails_has_learned_nothing(case: str) -> None:
    net = network("noisy")
    step = step_on(net, None, eq.MGDA())
    before = step.state_dict()
    with pytest.raises(CASES[case][1]):
        step(broken(net, CASES[case][0], 0))
    assert differences(before, step.state_dict()) == []


@pytest.mark.parametrize("at", range(1, 5))
def test_weights_inside_a_loss_come_back(at: int) -> None:
    net = network("centres")
    before = values(net)
    step = step_on(net, None, eq.MGDA(), eq.TaskSharpness(0.1))
    with pytest.raises(Break):
        step(broken(net, CASES["own error"][0], at))
    assert differences(before, values(net)) == []


def test_an_error_in_the_call_after_the_update() -> None:
    net = network("noisy")
    step = step_on(net, eq.FAMO(), eq.MGDA(), optimizer=torch.optim.Adam)
    step(closure_of(net, 0))
    before = step.state_dict()
    with pytest.raises(Break):
        step(broken(net, CASES["own error"][0], 2))
    # As the docstring says: the step has been made, and FAMO has not learned from it.
    changed = differences(before, step.state_dict())
    assert any(path.startswith("/model") for path in changed)
    assert not [path for path in changed if "weighting" in path]
    assert step(closure_of(net, 1)).accepted


@pytest.mark.parametrize(
    ("spoil", "words"), [(lambda x: x * torch.nan, "loss is nan"), (Fault.apply, "gradient is not")]
)
def test_names_are_right_where_other_tasks_are_absent(spoil: Callable, words: str) -> None:
    net = network("noisy")
    step = step_on(net, None, eq.MGDA())
    losses = closure_of(net, 0, ("a",))
    with pytest.raises(eq.NonFiniteError, match=f"task 'c': {words}"):
        step(lambda: {t: spoil(v) if t == "c" else v for t, v in losses().items()})


def test_negative_losses_need_a_weighting_that_takes_them() -> None:
    net = network("actor-critic")
    step = step_on(net, eq.SI(), eq.MGDA())
    before = values(net)
    with pytest.raises(eq.TaskError, match="task '(policy|entropy)': loss is -"):
        step(closure_of(net))
    assert differences(before, values(net)) == []


# -------------------------------------------------------------------------- the other way to call


def test_a_batch_for_a_step_that_wants_a_closure() -> None:
    net, step = prepared("igbv1+pcgrad")
    before = step.state_dict()
    x = torch.zeros(2, 1, 6, 6, dtype=torch.float64)
    for arguments in ((x, {"a": torch.zeros(2)}), (x,)):
        with pytest.raises((eq.EquipoiseError, TypeError), match="closure"):
            step(*arguments)
    assert differences(before, step.state_dict()) == []


def test_a_closure_for_a_step_that_wants_a_batch() -> None:
    step = regression_step(None, eq.MGDA())
    before = step.state_dict()
    with pytest.raises((eq.EquipoiseError, TypeError), match="targets|closure"):
        step(lambda: {})
    assert differences(before, step.state_dict()) == []
    step(*regression_batch())


# ------------------------------------------------------------------------------- when it is built


@pytest.mark.parametrize(
    ("stages", "options", "words"),
    [
        ((None, eq.MGDA(), None, eq.FastBacktracking()), {}, "FastBacktracking.*SharedTrunk"),
        ((None, eq.MGDA()), {"level": "features"}, "features.*SharedTrunk"),
        ((eq.UW(5), eq.MGDA()), {}, "n_tasks=5"),
        ((None, eq.NashMTL(), eq.TaskSharpness()), {}, "TaskSharpness and NashMTL"),
        ((None, eq.GradDrop()), {"heads": "weighted"}, "GradDrop"),
    ],
)
def test_stages_that_do_not_fit(stages: tuple, options: dict, words: str) -> None:
    with pytest.raises((eq.CombinationError, ValueError), match=words):
        step_on(network("noisy"), *stages, **options)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("fbls+mgda", "(?i)fbls|FastBacktracking"),
        ("cagrad-ub", "(?i)cagrad-ub|features"),
        ("graddrop-ub", "(?i)graddrop-ub|features"),
        ("stl", "stl"),
    ],
)
def test_recipes_that_need_a_trunk(recipe: str, words: str) -> None:
    net = network("noisy")
    with pytest.raises((eq.CombinationError, ValueError), match=words) as caught:
        eq.Recipe.parse(recipe).build(net, list(net.tasks), 0.1, 2)
    assert "SharedTrunk" in str(caught.value)


def test_what_is_shared_is_no_question_for_trunk_and_losses() -> None:
    model = linear_model()
    with pytest.raises((eq.CombinationError, ValueError, TypeError), match="shared"):
        eq.Step(model, all_tasks(model, F.mse_loss), sgd(model), shared="heads.*")


@pytest.mark.parametrize("tasks", [[], ["a", "a"], ["a", 3]])
def test_names_of_tasks(tasks: list) -> None:
    net = network("cgc")
    with pytest.raises((eq.EquipoiseError, ValueError, TypeError)):
        eq.Step(net, tasks, sgd(net))
