"""TorchJD's aggregators in a Step and in backward(), and their engine as an oracle for ours."""

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    THREE,
    TWO,
    class_batch,
    class_step,
    differences,
    largest_difference,
    linear_model,
    parameters_of,
    regression_batch,
    regression_step,
    snapshot,
)
from torch import Tensor, nn

import equipoise as eq

theirs = pytest.importorskip("torchjd.aggregation")
autojac = pytest.importorskip("torchjd.autojac")

OTHERS = {
    "AlignedMTL": theirs.AlignedMTL,
    "MGDA": theirs.MGDA,
    "IMTLG": theirs.IMTLG,
    "ConFIG": theirs.ConFIG,  # needs the rows themselves, as do the next two
    "TrimmedMean": lambda: theirs.TrimmedMean(0),
    "GradDrop": theirs.GradDrop,
    "Mean": theirs.Mean,
}
BY_GRAM = ("AlignedMTL", "MGDA", "IMTLG")


def their_gradients(aggregator: nn.Module, tasks: tuple[str, ...]) -> dict[str, Tensor]:
    """Give the gradients that TorchJD's own engine leaves."""
    model = linear_model(tasks)
    inputs, targets = regression_batch(tasks)
    features = model.trunk(inputs)
    losses = [F.mse_loss(model.heads[t](features), targets[t]) for t in tasks]
    autojac.mtl_backward(losses, features=features)
    autojac.jac_to_grad(list(model.trunk.parameters()), aggregator)
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", [n for n in OTHERS if n != "GradDrop"])
@pytest.mark.parametrize("form", ["Step", "backward"])
def test_same_gradients_as_their_engine(name: str, form: str) -> None:
    if form == "Step":
        step = regression_step(None, OTHERS[name](), THREE)
        report = step(*regression_batch(THREE))
        assert (report.coefficients is not None) == (name in BY_GRAM)
        assert report.gram.shape == (3, 3)
        model = step.model
    else:
        model = linear_model(THREE)
        inputs, targets = regression_batch(THREE)
        outputs = model(inputs)
        losses = {t: F.mse_loss(outputs[t], targets[t]) for t in THREE}
        eq.backward(losses, model.trunk.parameters(), OTHERS[name]())
    expected = their_gradients(OTHERS[name](), THREE)
    got = {name: p.grad for name, p in model.named_parameters()}
    assert largest_difference(got, expected) < 1e-6


@pytest.mark.parametrize(
    ("ours", "other"),
    [(eq.MGDA, theirs.MGDA), (eq.IMTLG, theirs.IMTLG), (eq.PCGrad, theirs.PCGrad),
     (eq.Sum, theirs.Sum), (eq.Mean, theirs.Mean)],
)  # fmt: skip
@pytest.mark.parametrize("weighting", [eq.EW, eq.SI])
def test_where_the_definition_is_the_same_training_is_the_same(
    ours: type, other: type, weighting: type
) -> None:
    # Two tasks: PCGrad has nothing to draw, their MGDA converges in one iteration.
    first = regression_step(weighting(), ours(), TWO)
    second = regression_step(weighting(), other(), TWO)
    for k in range(5):
        first(*regression_batch(TWO, seed=k))
        second(*regression_batch(TWO, seed=k))
    assert largest_difference(parameters_of(first.model), parameters_of(second.model)) < 1e-6


@pytest.mark.parametrize("name", OTHERS)
def test_a_whole_training_with_dropout_absent_tasks_and_state(name: str) -> None:
    def build() -> eq.Step:
        return class_step(eq.IGBv1(2), OTHERS[name](), THREE)

    step = build()
    for k in range(4):
        inputs, targets = class_batch(THREE, seed=k)
        if k == 2:
            del targets["b"]
        assert step(inputs, targets).accepted
    state = step.state_dict()
    report = step(*class_batch(THREE, seed=9))
    fresh = build()
    fresh.load_state_dict(state)
    assert differences(report, fresh(*class_batch(THREE, seed=9))) == []
    assert differences(snapshot(step), snapshot(fresh)) == []


@pytest.mark.parametrize("name", OTHERS)
def test_an_error_changes_nothing(name: str) -> None:
    step = class_step(eq.RLW(), OTHERS[name](), THREE)
    step(*class_batch(THREE))
    before = snapshot(step)
    step.losses["c"] = lambda output, target: F.cross_entropy(output, target) * torch.nan
    with pytest.raises(eq.NonFiniteError, match="task 'c'"):
        step(*class_batch(THREE))
    after = snapshot(step)
    assert [d for d in differences(before, after) if "grad" not in d] == []


@pytest.mark.parametrize("name", BY_GRAM)
def test_their_gramian_weightings_are_coefficients(name: str) -> None:
    weighting = {
        "AlignedMTL": theirs.AlignedMTLWeighting,
        "MGDA": theirs.MGDAWeighting,
        "IMTLG": theirs.IMTLGWeighting,
    }[name]
    reports = []
    for aggregator in (OTHERS[name](), weighting()):
        for level in ("parameters", "features"):
            step = regression_step(eq.SI(), aggregator, THREE, level=level)
            reports.append(step(*regression_batch(THREE)))
    for of_aggregator, of_weighting in zip(reports[:2], reports[2:], strict=True):
        assert differences(of_aggregator, of_weighting) == []
    assert reports[0].coefficients.shape == (3,)
    assert torch.allclose(reports[0].coefficients, weighting()(reports[0].gram))


def test_what_needs_the_rows_is_refused_at_the_feature_level() -> None:
    with pytest.raises(eq.CombinationError, match="level='features' and ConFIG"):
        regression_step(None, theirs.ConFIG(), level="features")
    model = linear_model()
    features = model.trunk(regression_batch()[0])
    losses = [head(features).sum() for head in model.heads.values()]
    with pytest.raises(eq.CombinationError, match="ConFIG"):
        eq.backward(losses, model.trunk.parameters(), theirs.ConFIG(), features)
