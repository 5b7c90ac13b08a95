"""Every registered method, and some of them together, on a real network.

A method enters these tests by being registered in `equipoise.registry`.
"""

import io
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import TWO, all_tasks, class_batch, conv_model, differences, parameters_of, snapshot

import equipoise as eq
from equipoise.registry import TOKENS

COMBINED = [
    "igbv1+cagrad",
    "uw+mgda",
    "rlw+pcgrad",
    "dwa+imtl-ub",
    "si+mgda(normalize=l2)",
    "mgda(normalize=loss+)",
    "mgda-ub(normalize=loss)",
    "rlw(normalize_to=1)+cagrad-ub(c=0.9)",
    "stch(warmup_epochs=1, mu=0.5)",
    "famo+pcgrad",
    "gradnorm(alpha=0.5)+sum-ub",
    "imtl-l+imtl",
    "ew+db-mtl(beta=0.5, decay=0.5)",
    "si+max-norm-ub",
    "igbv2+cagrad",
    "igbv2+f-nash",
    "igbv1+mgda(heads=weighted)",
    "bls+mgda",
    "bls+pcgrad",
    "bls(rule=head)",
    "bls(objective=sum, adapt=true)",
    "uw+bls+cagrad",
    "bls+graddrop",
    "rlw+bls+f-mgda",
    "bls(direction=optimizer)+imtl",
    "bls(direction=optimizer, objective=sum)",
    "uw+bls(direction=optimizer)+f-upgrad",
    "fbls+sum",
    "fbls(rule=latent)+edm",
    "famo+fbls(latent_scale=matched)+edm",
    "igbv1+fbls(verify=true)+pcgrad",
    "fbls(latent_scale=batch, objective=sum)+graddrop",
    "bls+imtl(heads=weighted)",
    "fbls(verify=true)+edm(heads=weighted)",
]
RECIPES = [*TOKENS, *COMBINED]
FIVE = ("v", "w", "x", "y", "z")

every_recipe = pytest.mark.parametrize("recipe", RECIPES)


def build(
    recipe: str, tasks: Sequence[str] = TWO, dtype: torch.dtype = torch.float32, seed: int = 0
) -> eq.Step:
    """Give a Step on the convolutional net; its epochs have two steps."""
    model = conv_model(tasks, seed, dtype)
    losses = all_tasks(model, F.cross_entropy)
    return eq.Recipe.parse(recipe).build(model, losses, lr=0.01, steps_per_epoch=2, seed=seed)


def check_report(report: eq.StepReport, tasks: Sequence[str], step: eq.Step) -> None:
    """Check shapes, dtypes and what holds for every method."""
    n = len(tasks)
    is_gram = isinstance(step.aggregator, eq.GramAggregator)
    search = step.line_search
    known = step.aggregator.known_coefficients(n) if is_gram else None
    forms_rows = (
        not is_gram
        or known is None
        or (search is not None and not search.content_with(known))
        or step.sharpness is not None
        or step.weighting.needs_gram
    )
    assert report.tasks == tuple(tasks)
    vectors = [report.losses, report.weights, report.factors]
    assert (report.coefficients is not None) == (is_gram or report.fallback)
    if report.coefficients is not None:
        vectors.append(report.coefficients)
    for vector in vectors:
        assert vector.shape == (n,)
        assert vector.dtype == torch.float64
        assert vector.device.type == "cpu"
        assert vector.isfinite().all()
        assert not vector.requires_grad
    assert (report.gram is not None) == forms_rows
    assert (report.flat_gram is not None) == (step.sharpness is not None)
    if report.gram is not None:
        for matrix in (report.gram, report.cosines):
            assert matrix.shape == (n, n)
            assert matrix.dtype == torch.float64
        assert torch.allclose(report.gram, report.gram.T)
        assert (report.gram.diagonal() > 0).all()
        assert report.cosines.abs().max() <= 1 + 1e-6
    assert isinstance(report.direction_norm, float)
    # Steps of length 1 and more may leave no feature of so small a network above zero.
    assert report.direction_norm > 0 or search is not None
    if search is None:
        assert (report.step_size, report.trials, report.accepted) == (None, 0, True)
        assert (report.slopes, report.trial_losses, report.fallback) == (None, None, False)
    else:
        assert report.trials >= 1
        assert report.accepted == (report.step_size > 0) == (report.trial_losses is not None)
        assert report.slopes.shape == (n,)
    assert (report.verified is not None) <= getattr(search, "verify", False)


@every_recipe
@pytest.mark.parametrize(
    ("tasks", "dtype"),
    [(("only",), torch.float32), (TWO, torch.float64), (FIVE, torch.float32)],
    ids=["T=1", "T=2 in float64", "T=5"],
)
def test_training_steps(recipe: str, tasks: Sequence[str], dtype: torch.dtype) -> None:
    step = build(recipe, tasks, dtype)
    model = step.model
    before = parameters_of(model)
    for k in range(6):  # three epochs: beyond the warm-up of DWA and IGB
        report = step(*class_batch(tasks, seed=k, dtype=dtype))
        check_report(report, tasks, step)
    moved = {path.strip("/") for path in differences(before, parameters_of(model))}
    # A bias before BatchNorm has a gradient of round-off alone, which only Adam makes a step of.
    idle = set() if step.line_search is None else {"trunk.0.bias"}
    assert before.keys() - idle <= moved <= before.keys()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == parameter.grad.dtype == dtype, name
        assert parameter.isfinite().all(), name
    for name, buffer in model.named_buffers():
        assert buffer.dtype == (torch.int64 if name.endswith("tracked") else dtype)
        if name.endswith("tracked"):
            assert buffer == 6  # one forward a step


@every_recipe
def test_losses_fall(recipe: str) -> None:
    step = build(recipe)
    batch = class_batch(n=16)
    first = step(*batch).losses.sum()
    for _ in range(30):
        if step(*batch).losses.sum() < 0.8 * first:
            return
    pytest.fail("30 steps on one batch took less than a fifth off its losses")


@every_recipe
@pytest.mark.parametrize(
    ("steps", "dtype"), [(1, torch.float64), (5, torch.float32)], ids=["1 in float64", "5"]
)
def test_continues_bit_for_bit_in_a_fresh_step(recipe: str, steps: int, dtype: torch.dtype) -> None:
    step = build(recipe, TWO, dtype)
    for k in range(steps):
        step(*class_batch(seed=k, dtype=dtype))
    file = io.BytesIO()
    torch.save(step.state_dict(), file)
    reports = [step(*class_batch(seed=50 + k, dtype=dtype)) for k in range(3)]
    file.seek(0)

    fresh = build(recipe, TWO, dtype, seed=77)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    again = [fresh(*class_batch(seed=50 + k, dtype=dtype)) for k in range(3)]
    assert differences(reports, again) == []
    assert differences(snapshot(step), snapshot(fresh)) == []


@every_recipe
def test_the_seed_decides_all_draws(recipe: str) -> None:
    def run() -> list:
        step = build(recipe, FIVE, seed=3)
        return [step(*class_batch(FIVE, seed=k)) for k in range(3)]

    assert differences(run(), run()) == []


@every_recipe
def test_absent_tasks(recipe: str) -> None:
    step = build(recipe, FIVE)
    for k in range(5):
        step(*class_batch(FIVE, seed=k))
    for k, absent in enumerate([("v",), ("w", "z"), ("v", "w", "x", "y")]):
        check_absent(step, absent, *class_batch(FIVE, seed=9 + k))


def check_absent(step: eq.Step, absent: Sequence[str], inputs: Any, targets: Any) -> None:
    """Check a batch without labels of some tasks, and the next one, which has all again."""
    heads = {task: parameters_of(step.model.heads[task]) for task in FIVE}
    report = step(inputs, {task: v for task, v in targets.items() if task not in absent})
    for i, task in enumerate(FIVE):
        gone = task in absent
        moved = differences(heads[task], parameters_of(step.model.heads[task]))
        assert bool(moved) != gone, task
        assert bool(report.losses[i].isnan()) == gone
        assert bool(report.weights[i] == 0) == gone
        assert bool(report.factors[i] == 0) == gone
        if gone and report.coefficients is not None:
            assert report.coefficients[i] == 0
    # The next batch has all of them again.
    check_report(step(inputs, targets), FIVE, step)


@every_recipe
def test_an_error_changes_nothing(recipe: str) -> None:
    step = build(recipe)
    for k in range(5):
        step(*class_batch(seed=k))
    inputs, targets = class_batch(seed=9)

    def kept() -> dict:
        return {k: v for k, v in snapshot(step).items() if "grad" not in k}

    before, good = kept(), step.losses["right"]
    step.losses["right"] = lambda output, target: good(output, target) * torch.nan
    with pytest.raises(eq.NonFiniteError, match="task 'right': loss is nan"):
        step(inputs, targets)
    assert differences(before, kept()) == []
    step.losses["right"] = lambda output, target: good(output.sqrt().nan_to_num() * 0, target)
    with pytest.raises(eq.NonFiniteError, match="task 'right': gradient is not finite"):
        step(inputs, targets)
    assert differences(before, kept()) == []
