"""Two processes with unequal parts of a batch make the step of the joint batch."""

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import (
    PARTS_OF_EQUAL_SIZE,
    STEPS,
    _ranked_backward,
    differences,
    largest_difference,
    parameters_of,
    ranked_batch,
    ranked_call,
    ranked_step,
    recorded,
    run_rank,
)

from equipoise.engine.ranks import Ranks

RECIPES = [
    "ew",
    "mean",
    "si",
    "igbv1",
    "dwa",
    "uw",
    "rlw",
    "igbv2+mgda(heads=weighted)",
    "mgda",
    "pcgrad",
    "imtl",
    "cagrad-ub",
    "mgda-ub(normalize=loss+)",
    "igbv1+cagrad",
    "uw+mgda-ub",
    "graddrop",
    "graddrop-ub",
    "nash",
    "mgda(update_every=2)",
    "f-mgda",
    "rlw+f-pcgrad(rho=0.5)",
    "a-upgrad(rho=0.5)",
    "f-graddrop",
    "f-cagrad(rho=0.5, perturb=joint, norm=joint)",
    "f-upgrad(rho=0.5, every=2)",
    "f-imtl(rho=0.5, perturb=joint-mean, adaptive=true)",
    "f-aligned(rho=0.5, perturb=samo)",
    "bls",
    "uw+bls+cagrad",
    "bls(direction=optimizer, rule=latent)+imtl",
    "rlw+bls+f-pcgrad(rho=0.5)",
    "fbls(latent_scale=batch)+graddrop",
    "fbls(latent_scale=matched, objective=sum)+sum",
    "igbv1+fbls(verify=true)+edm",
    "callable",
    "closure ew",
    "collected ew",
    "collected uw+f-cagrad(rho=0.5)",
    "closure igbv1+f-cagrad",
    "closure uw+graddrop",
    "closure famo+bls+mgda",
]
LIMIT = 120
"""Seconds after which two processes that wait for each other are given up."""

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo"
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two processes found."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    context = mp.spawn(run_rank, (str(folder), RECIPES), nprocs=2, join=False)
    deadline = time.monotonic() + LIMIT
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, "the processes wait for each other"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def joint() -> dict[str, dict[str, Any]]:
    """The same steps in one process, on the joint batch."""
    found = {}
    for recipe in RECIPES:
        step = ranked_step(recipe)
        reports = [ranked_call(step, ranked_batch(k)) for k in range(STEPS)]
        found[recipe] = {"step": step, "reports": reports}
    return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_same_parameters_as_one_process(recipe: str, ranks: list, joint: dict) -> None:
    step = joint[recipe]["step"]
    expected = parameters_of(step.model)
    assert differences(expected, parameters_of(ranked_step(recipe).model)) != []
    for rank in ranks:
        assert largest_difference(rank[recipe]["parameters"], expected) < 1e-6
    if recipe == "uw+mgda-ub":
        for rank in ranks:
            assert torch.allclose(
                rank[recipe]["state"]["log_variances"], step.weighting.log_variances, rtol=1e-5
            )


@pytest.mark.parametrize("recipe", RECIPES)
def test_both_processes_have_the_same_bits(recipe: str, ranks: list) -> None:
    assert differences(ranks[0][recipe], ranks[1][recipe]) == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_same_reports_as_one_process(recipe: str, ranks: list, joint: dict) -> None:
    for got, expected in zip(ranks[0][recipe]["reports"], joint[recipe]["reports"], strict=True):
        assert torch.allclose(got["losses"], expected.losses, rtol=1e-6, equal_nan=True)
        assert torch.allclose(got["weights"], expected.weights, rtol=1e-6)
        assert got["norm"] == pytest.approx(expected.direction_norm, rel=1e-5)
        search = (expected.step_size, expected.trials, expected.fallback, expected.verified)
        assert got["search"] == search
        if expected.slopes is not None:
            assert torch.allclose(got["slopes"], expected.slopes, rtol=1e-5)
        for name, wanted in (("gram", expected.gram), ("flat_gram", expected.flat_gram)):
            assert (got[name] is None) == (wanted is None)
            if wanted is not None:
                assert (got[name] - wanted).norm() <= 1e-5 * wanted.norm()
    assert joint[recipe]["reports"][-1].losses.isnan().tolist() == [False, False, True]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_process_keeps_its_part_of_the_columns(recipe: str, ranks: list, joint: dict) -> None:
    step = joint[recipe]["step"]
    if step._rows is None:
        assert [rank[recipe]["columns"] for rank in ranks] == [None, None]
        return
    p = sum(x.numel() for x in step.model.shared_parameters())
    for rank in ranks:
        assert rank[recipe]["columns"] <= math.ceil(p / 2)


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["loss", "gradient", "loss at the moved point"])
def test_what_goes_wrong_in_one_process_is_an_error_in_both(kind: int, ranks: list) -> None:
    for rank in ranks:
        error, message, changed = rank["errors"][kind]
        assert error == "NonFiniteError"
        assert message.startswith("task 'b': ")
        assert changed == []


def test_the_functional_form_on_batches_of_equal_size(ranks: list) -> None:
    whole = slice(PARTS_OF_EQUAL_SIZE[0].start, PARTS_OF_EQUAL_SIZE[1].stop)
    expected = _ranked_backward(whole)
    for rank in ranks:
        assert largest_difference(rank["functional"], expected) < 1e-9


def test_alone_there_is_nothing_to_do() -> None:
    ranks = Ranks()
    assert ranks.alone
    assert ranks.size == 1
    x = torch.randn(3)
    assert ranks.sum(x) is x
    assert ranks.from_first(x) is x
    assert ranks.gather(x) is x
    assert ranks.sum_gradients([x, None], [x, x]) == [x, None]


def test_data_maps_are_those_of_the_joint_batch(ranks: list) -> None:
    """Parts of 5 and 2 samples, a task without a label in one of them; one process looks at all."""
    expected = recorded()
    for rank in ranks:
        state = rank["maps"]
        assert torch.equal(state["count"], expected["count"])
        for name in ("mean", "squares", "centred"):
            assert torch.allclose(state[name], expected[name], rtol=1e-5, atol=1e-6), name
        assert differences(state, ranks[0]["maps"]) == []


def test_a_batch_that_one_process_cannot_record_is_recorded_by_none(ranks: list) -> None:
    assert "another process could not" in ranks[0]["maps error"]
    assert "no head of the model was called" in ranks[1]["maps error"]
