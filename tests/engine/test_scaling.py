"""float16: the scale of the losses, and steps that are not finite."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import TWO, all_tasks, conv_model, differences, parameters_of, snapshot
from torch import Tensor, nn

import equipoise as eq

RECIPES = ["ew", "mgda-ub", "si+cagrad", "uw+f-mgda", "f-cagrad(perturb=joint-mean)", "famo"]


def network(dtype: torch.dtype = torch.float32) -> eq.SharedTrunk:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.BatchNorm1d(16), nn.Dropout(0.1))
    return eq.SharedTrunk(trunk, {task: nn.Linear(16, 1) for task in TWO}).to(dtype)


def batch(k: int = 0, size: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(k)
    inputs = torch.randn(12, 8, generator=generator)
    return inputs, {task: size * torch.randn(12, 1, generator=generator) for task in TWO}


def build(
    text: str, model: eq.SharedTrunk, loss: Callable = F.mse_loss, **options: object
) -> eq.Step:
    losses = all_tasks(model, loss)
    return eq.Recipe.parse(text).build(model, losses, lr=0.01, steps_per_epoch=9, seed=0, **options)


def half(step: eq.Step, *given: object, call: str = "__call__") -> eq.StepReport:
    with torch.autocast("cpu", dtype=torch.float16):
        return getattr(step, call)(*given)


def scaler(scale: float = 2.0**16, **options: object) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, **options)


@pytest.mark.parametrize("text", RECIPES)
def test_a_scale_changes_nothing_but_the_precision(text: str) -> None:
    torch.manual_seed(0)
    scaled = build(text, network(torch.float64), scaler=scaler(1024.0, growth_interval=2))
    plain = build(text, network(torch.float64))
    for k in range(4):
        inputs, targets = batch(k)
        given = inputs.double(), {task: y.double() for task, y in targets.items()}
        torch.manual_seed(k)
        ours = scaled(*given)
        torch.manual_seed(k)
        theirs = plain(*given)
        assert ours.direction_norm == pytest.approx(theirs.direction_norm, rel=1e-10)
        if theirs.gram is not None:
            assert torch.allclose(ours.gram, theirs.gram, rtol=1e-9)
    pairs = zip(scaled.model.parameters(), plain.model.parameters(), strict=True)
    assert max(float((p - q).detach().abs().max()) for p, q in pairs) < 1e-10
    assert scaled.scaler.get_scale() == 4096, "two growths: each step has been counted"


@pytest.mark.parametrize("text", RECIPES)
def test_a_scale_of_2_to_the_40_recovers_by_itself(text: str) -> None:
    step = build(text, network(), scaler=scaler(2.0**40))
    before = snapshot(step)
    report = half(step, *batch())
    assert (report.accepted, report.skipped) == (False, 1)
    assert step.scaler.get_scale() == 2.0**39
    changed = [d for d in differences(before, snapshot(step)) if "scaling" not in d]
    assert [d for d in changed if "grad" not in d] == [], "nothing but the scale"
    for _ in range(40):
        report = half(step, *batch())
        if report.accepted:
            break
    assert report.accepted
    assert report.skipped == round(40 - math.log2(step.scaler.get_scale()))
    assert differences(before, snapshot(step)) != []


@pytest.mark.parametrize("text", ["cagrad", "mgda-ub", "si+cagrad"])
def test_grams_of_tiny_losses(text: str) -> None:
    def tiny(output: Tensor, target: Tensor) -> Tensor:
        return 1e-6 * F.mse_loss(output.float(), target)

    model, exact = network().eval(), network().eval()
    grams = []
    for net, options in ((model, {"scaler": scaler()}), (exact, {})):
        step = build(text, net, tiny, **options)
        report = half(step, *batch()) if options else step(*batch())
        assert report.losses.max() < 1e-5
        grams.append(report.gram)
    assert (grams[0] - grams[1]).norm() < 0.02 * grams[1].norm()
    without = half(build(text, network().eval(), tiny), *batch()).gram
    assert (without - grams[1]).norm() > 0.02 * grams[1].norm(), "the scale is what it takes"


@pytest.mark.parametrize("text", ["ew", "cagrad", "uw+f-mgda"])
def test_a_scaler_of_somebody_else(text: str) -> None:
    """Its owner unscales, steps and updates; an overflow is seen and halves the scale."""
    torch.manual_seed(0)
    ours, theirs = build(text, network(), scaler=scaler(2.0**40)), network()
    owner = ours.scaler
    other = build(text, theirs, scaler=scaler(2.0**40))
    for k in range(30):
        ours.optimizer.zero_grad()
        torch.manual_seed(k)
        half(ours, *batch(k), call="backward")
        owner.unscale_(ours.optimizer)
        owner.step(ours.optimizer)
        owner.update()
        torch.manual_seed(k)
        half(other, *batch(k))
    assert owner.get_scale() == other.scaler.get_scale() < 2.0**40
    pairs = zip(ours.model.parameters(), theirs.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


def test_a_scale_below_1_is_not_to_blame() -> None:
    step = build("cagrad", network(), scaler=scaler(1.0))
    step.losses["right"] = lambda output, target: F.mse_loss(output, target) * torch.nan
    assert not step(*batch()).accepted
    with pytest.raises(eq.NonFiniteError, match="'right'"):
        step(*batch())


def test_the_scale_is_part_of_the_state() -> None:
    step, fresh = (build("cagrad", network(), scaler=scaler(s)) for s in (2.0**40, 8.0))
    half(step, *batch())
    fresh.load_state_dict(step.state_dict())
    assert fresh.scaler.get_scale() == 2.0**39
    assert half(fresh, *batch()).skipped == 2
    off = build("ew", network(), scaler=scaler(enabled=False))
    assert off(*batch()).accepted


def test_what_does_not_go_with_a_scaler() -> None:
    for text in ("bls", "fbls"):
        with pytest.raises(eq.CombinationError, match="Backtracking and a scaler"):
            build(text, network(), scaler=scaler())
    with pytest.raises(eq.CombinationError, match="scaler is a int"):
        build("ew", network(), scaler=3)


@pytest.mark.parametrize("where", ["optimizer", "hook"])
def test_a_step_after_one_that_raised(where: str) -> None:
    def raising(*_: object) -> None:
        raise ZeroDivisionError

    step = build("uw+cagrad", network(), scaler=scaler(64.0), clip_norm=0.1)
    weight = step.model.trunk[0].weight
    if where == "optimizer":
        handle = step.optimizer.register_step_pre_hook(raising)
    else:
        handle = weight.register_post_accumulate_grad_hook(raising)
    state = step.state_dict()
    with pytest.raises(ZeroDivisionError):
        step(*batch())
    assert differences(state, step.state_dict()) == []
    handle.remove()
    assert step(*batch()).accepted
    assert step.scaler.get_scale() == 64


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize(
    "kind",
    [
        lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
        lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, fused=True),
        lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    ],
)
def test_an_overflow_leaves_the_optimizer_alone(kind: Callable, closure: bool) -> None:
    model = network()
    losses = list(TWO) if closure else all_tasks(model, F.mse_loss)
    shared = {"shared": model.trunk} if closure else {}
    optimizer = kind(model.parameters())
    step = eq.Step(model, losses, optimizer, eq.UW(2), eq.CAGrad(), scaler=scaler(64.0), **shared)
    calls: list[object] = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    inputs, targets = batch()

    def make(size: float) -> eq.StepReport:
        own = {task: size * y for task, y in targets.items()}
        if not closure:
            return step(inputs, own)
        return step(lambda: {t: F.mse_loss(z, own[t]) for t, z in model(inputs).items()})

    for k in (1, 2):  # before the optimizer's first step, and after it
        state = step.state_dict()
        assert not make(math.inf).accepted
        changed = differences(state, step.state_dict())
        assert [d for d in changed if not d.startswith("/scaling")] == []
        assert step.scaler.get_scale() == 64 / 2**k
        assert make(1.0).accepted
        assert len(calls) == k


def test_parameters_that_a_scaler_does_not_know() -> None:
    for dtype, words in ((torch.complex64, "Leave the scaler out"), (torch.float16, "float32")):
        model = network()
        model.trunk[0].extra = nn.Parameter(torch.zeros(2, dtype=dtype))
        with pytest.raises(eq.CombinationError, match=f"'trunk.0.extra' of torch.*{words}"):
            build("ew", model, scaler=scaler())
        build("ew", model, scaler=scaler(enabled=False))
        model.trunk[0].extra.requires_grad_(False)
        build("ew", model, scaler=scaler())


# ------------------------------------------------------------------------------- eq.backward


@pytest.mark.parametrize("known", [True, False])
def test_backward_of_one_line_lets_the_scale_fall(known: bool) -> None:
    model, grad_scaler = network().eval(), scaler(2.0**40)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    inputs, targets = batch()
    before = parameters_of(model)
    for _ in range(40):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            out = model(inputs)
            losses = {task: F.mse_loss(out[task].float(), targets[task]) for task in TWO}
        if known:
            found = eq.backward(losses, model.trunk.parameters(), eq.CAGrad(), scaler=grad_scaler)
        else:  # the user has scaled them, and says nothing
            scaled = {task: grad_scaler.scale(loss) for task, loss in losses.items()}
            found = eq.backward(scaled, model.trunk.parameters(), eq.CAGrad())
        grad_scaler.step(optimizer)
        grad_scaler.update()
        if found.coefficients is not None:
            break
    assert 2.0**8 < grad_scaler.get_scale() < 2.0**40
    assert differences(before, parameters_of(model)) != []


def test_a_factor_of_the_users_hides_no_overflow() -> None:
    model = network().eval()
    inputs, targets = batch()
    out = model(inputs)["left"]
    bad = (out - out.detach()).abs().sqrt().sum()
    for loss in (2.0 * bad + 1, bad * torch.tensor(0.5)):
        with pytest.raises(eq.NonFiniteError):
            eq.backward(
                [loss, F.mse_loss(out, targets["left"])], model.trunk.parameters(), eq.Sum()
            )


# --------------------------------------------------------------------------------- on_nonfinite


@pytest.mark.parametrize("text", [*RECIPES, "bls+mgda", "fbls", "igbv2+cagrad"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_left_out(text: str, what: str) -> None:
    def sometimes(output: Tensor, target: Tensor) -> Tensor:
        loss = F.mse_loss(output, target)
        if target.max() < 50:
            return loss
        return (
            loss * torch.nan
            if what == "loss"
            else (output - output.detach()).abs().sqrt().sum() + 1
        )

    step = build(text, network(), on_nonfinite="skip")
    step.losses["right"] = sometimes
    assert step(*batch()).accepted or text.endswith("bls")
    before = snapshot(step)
    for k in (1, 2):
        report = step(*batch(k, size=100.0))
        assert (report.accepted, report.skipped) == (False, k)
        assert report.losses.isnan().all()
        changed = [d for d in differences(before, snapshot(step)) if "grad" not in d]
        assert [d for d in changed if "scaling" not in d] == []
    assert step(*batch(3)).skipped == 2
    fresh = build(text, network(), on_nonfinite="skip")
    fresh.load_state_dict(step.state_dict())
    assert fresh(*batch(4)).skipped == 2
    strict = build(text, network())
    strict.losses["right"] = sometimes
    with pytest.raises(eq.NonFiniteError, match="'right'"):
        strict(*batch(1, size=100.0))


def test_micro_batches_of_a_skipped_step_are_forgotten() -> None:
    step, plain = (build("cagrad", network().eval(), on_nonfinite="skip") for _ in range(2))
    inputs, targets = batch()
    step.collect(inputs, targets)
    assert step(inputs, {"left": targets["left"] * math.inf}).skipped == 1
    step(inputs, targets)
    plain(inputs, targets)
    assert differences(parameters_of(step.model), parameters_of(plain.model)) == []


@pytest.mark.parametrize("text", ["ew", "cagrad", "uw+f-mgda"])
@pytest.mark.parametrize("scale", [None, 64.0])
def test_one_bad_micro_batch_lets_the_step_be_skipped(text: str, scale: float | None) -> None:
    options = {"on_nonfinite": "skip"} if scale is None else {"scaler": scaler(scale)}
    step, plain = (build(text, network().eval(), **options) for _ in range(2))
    inputs, targets = batch()
    bad = {task: y * math.inf for task, y in targets.items()}
    before = snapshot(step)
    assert step.collect(inputs, targets).isfinite().all()
    assert step.collect(inputs, bad).isnan().all()
    assert step.collect(inputs, targets).isnan().all(), "nothing will become of it"
    with pytest.raises(eq.EquipoiseError, match="have been collected"):
        step.state_dict()
    report = step(inputs, targets)
    assert (report.accepted, report.skipped) == (False, 1)
    assert [d for d in differences(before, snapshot(step)) if "grad" not in d] == []
    assert scale is None or step.scaler.get_scale() == scale / 2, "once"
    if scale is not None:
        plain.scaler.update(scale / 2)
    for made in (step, plain):
        made.collect(inputs, targets)
        assert made(inputs, targets).accepted
    assert differences(parameters_of(step.model), parameters_of(plain.model)) == []
    strict = build(text, network())
    with pytest.raises(eq.NonFiniteError, match="'left': loss is inf"):
        strict.collect(inputs, bad)


def test_an_unknown_answer() -> None:
    with pytest.raises(ValueError, match="'raise' and 'skip'"):
        build("ew", network(), on_nonfinite="ignore")


def test_backward_that_is_skipped_adds_nothing() -> None:
    step = build("cagrad", conv_model(), on_nonfinite="skip")
    step.losses["left"] = lambda output, target: output.sum() * torch.nan
    inputs = torch.randn(4, 1, 6, 6)
    labels = {task: torch.zeros(4, 3) for task in TWO}
    for p in step.model.parameters():
        p.grad = torch.ones_like(p)
    assert not step.backward(inputs, labels).accepted
    assert all((p.grad == 1).all() for p in step.model.parameters())
