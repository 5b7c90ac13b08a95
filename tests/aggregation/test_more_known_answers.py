"""Answers by hand for the further aggregators, asked of the library and of the references."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from reference import aggregation_more as reference

from equipoise.aggregation import (
    EDM,
    AlignedMTL,
    ConFIG,
    DualProj,
    FairGrad,
    GradDrop,
    GradVac,
    NashMTL,
    SDMGrad,
    UPGrad,
)

Rows = list[list[float]]
PAPER = [[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]  # also the example of TorchJD's documentation
ORTHOGONAL = [[3.0, 0.0], [0.0, 4.0]]
CONFLICT = [[1.0, 0.0], [-1.0, 1.0]]
HALF = math.sqrt(0.5)

METHODS: dict[str, tuple[Callable[[], torch.nn.Module], Callable[[np.ndarray], np.ndarray]]] = {
    "nash": (NashMTL, reference.nash),
    "nash exact": (lambda: NashMTL(None), lambda rows: reference.nash(rows, None)),
    "edm": (EDM, reference.edm),
    "aligned": (AlignedMTL, reference.aligned),
    "aligned median": (lambda: AlignedMTL("median"), lambda r: reference.aligned(r, "median")),
    "aligned rmse": (lambda: AlignedMTL("rmse"), lambda r: reference.aligned(r, "rmse")),
    "upgrad": (UPGrad, reference.upgrad),
    "dualproj": (DualProj, reference.dualproj),
    "config": (ConFIG, reference.config),
    "fairgrad 1": (FairGrad, lambda rows: reference.fair_weights(rows) @ rows),
    "fairgrad 2": (lambda: FairGrad(2.0), lambda rows: reference.fair_weights(rows, 2.0) @ rows),
    "sdmgrad 0": (lambda: SDMGrad(0.0), lambda rows: reference.sdmgrad(rows, 0.0)),
    "sdmgrad": (SDMGrad, reference.sdmgrad),
}


@pytest.mark.parametrize("which", ["library", "reference"])
@pytest.mark.parametrize(
    ("method", "rows", "expected"),
    [
        ("nash exact", PAPER, [0.07658429, 0.99853264, 0.99853264]),
        ("nash", PAPER, [0.05415327, 0.7060692, 0.7060692]),
        ("nash exact", ORTHOGONAL, [1, 1]),
        ("nash", ORTHOGONAL, [HALF, HALF]),
        # a = (1.84775907, 1.30656296)
        ("nash exact", CONFLICT, [1.84775907 - 1.30656296, 1.30656296]),
        ("edm", PAPER, [0.07669683, 1, 1]),
        ("edm", ORTHOGONAL, [12 / 7, 12 / 7]),
        ("edm", CONFLICT, [0.17157288, 0.41421356]),
        ("edm", [[2.0, 0.0], [6.0, 0.0]], [3, 0]),  # 2 * 2 * 6 / (2 + 6)
        ("edm", [[2.0, 0.0], [3.0, 0.0], [6.0, 0.0]], [3, 0]),  # 3 / (1/2 + 1/3 + 1/6)
        ("aligned", PAPER, [0.21327875, 0.96733298, 0.96733298]),
        ("aligned", ORTHOGONAL, [1.5, 1.5]),
        ("aligned median", ORTHOGONAL, [1.5, 1.5]),
        ("aligned rmse", ORTHOGONAL, [math.sqrt(12.5) / 2] * 2),
        # Three axes of lengths 1, 2, 3: the squares have median 4 and mean 14/3.
        ("aligned", [[1.0, 0, 0], [0, 2, 0], [0, 0, 3]], [1 / 3] * 3),
        ("aligned median", [[1.0, 0, 0], [0, 2, 0], [0, 0, 3]], [2 / 3] * 3),
        ("aligned rmse", [[1.0, 0, 0], [0, 2, 0], [0, 0, 3]], [math.sqrt(14 / 3) / 3] * 3),
        ("upgrad", PAPER, [0.29239766, 1.9005848, 1.9005848]),
        ("upgrad", ORTHOGONAL, [1.5, 2]),
        ("upgrad", CONFLICT, [0.25, 0.75]),
        # The mean (1, 1, 1): <g_1, m> = -2 gives m + 2/18 g_1.
        ("dualproj", PAPER, [1 - 8 / 18, 1 + 2 / 18, 1 + 2 / 18]),
        ("dualproj", ORTHOGONAL, [1.5, 2]),
        ("dualproj", CONFLICT, [0, 0.5]),
        # Equal products with the unit axes: along (1, 1), 7 / sqrt(2) long.
        ("config", ORTHOGONAL, [3.5, 3.5]),
        # x = (1, 1 + sqrt(2)), |x|^2 = 4 + 2 sqrt(2), summed products 1 + sqrt(2).
        ("config", CONFLICT, [0.35355339, 0.85355339]),
        ("fairgrad 1", PAPER, [0.07658429, 0.99853264, 0.99853264]),
        # n^2 w = w^(-1/2): w = n^(-4/3)
        ("fairgrad 2", ORTHOGONAL, [3 ** (-1 / 3), 4 ** (-1 / 3)]),
        ("sdmgrad 0", PAPER, [0, 1, 1]),
        # The moved ones differ by (10, 0, 0) as before, so 0 lies between: (0, 1.3, 1.3).
        ("sdmgrad", PAPER, [0, 1.3, 1.3]),
        ("sdmgrad", CONFLICT, [0.26, 0.52]),
    ],
)
def test_by_hand(method: str, rows: Rows, expected: list[float], which: str) -> None:
    library, oracle = METHODS[method]
    given = np.array(rows, dtype=float)
    found = library()(torch.from_numpy(given)).numpy() if which == "library" else oracle(given)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("aggregator", "rows", "expected"),
    [
        (NashMTL(None), PAPER, [0.59146115, 0.40707148]),
        (NashMTL(None), ORTHOGONAL, [1 / 3, 1 / 4]),
        (NashMTL(None), CONFLICT, [1.84775907, 1.30656296]),
        (EDM(), PAPER, [0.59233032, 0.40766968]),
        (EDM(), ORTHOGONAL, [4 / 7, 3 / 7]),
        (EDM(), CONFLICT, [0.58578644, 0.41421356]),
        (AlignedMTL(), PAPER, [0.55907192, 0.40826107]),
        (UPGrad(), PAPER, [1.11111111, 0.78947368]),
        (UPGrad(), CONFLICT, [1, 0.75]),
    ],
)
def test_weights_by_hand(aggregator: torch.nn.Module, rows: Rows, expected: list[float]) -> None:
    jacobian = torch.tensor(rows, dtype=torch.float64)
    found = aggregator.coefficients(jacobian @ jacobian.T).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


# -------------------------------------------------------------------------------- unanimity, edges


@pytest.mark.parametrize(
    ("aggregator", "factor"),
    [
        (NashMTL(None), math.sqrt(4) / 5),
        (NashMTL(), 1 / 5),
        (NashMTL(max_norm=1.5), 1.5 / 5),
        (NashMTL(None, degree=1), 4),
        (EDM(), 1),
        (AlignedMTL(), 1),
        (UPGrad(), 1),
        (DualProj(), 1),
        (ConFIG(), 4),
        (GradDrop(), 4),
        (GradDrop(leak=0.3), 4),
        (GradVac(), 4),
        (SDMGrad(), 1.3),
        (FairGrad(), math.sqrt(4) / 5),
        (FairGrad(2.0), 4 ** (1 / 3) * 5 ** (-4 / 3)),
    ],
)
def test_unanimity(aggregator: torch.nn.Module, factor: float) -> None:
    rows = torch.tensor([[3.0, 0.0, 4.0]], dtype=torch.float64).repeat(4, 1)
    np.testing.assert_allclose(aggregator(rows), factor * rows[0], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("aggregator", [NashMTL(), UPGrad(), DualProj(), ConFIG(), FairGrad()])
def test_a_zero_gradient_is_left_out(aggregator: torch.nn.Module) -> None:
    two = torch.tensor(CONFLICT, dtype=torch.float64)
    three = torch.cat([two[:1], torch.zeros(1, 2, dtype=torch.float64), two[1:]])
    share = 2 / 3 if isinstance(aggregator, UPGrad | DualProj) else 1  # those are means
    np.testing.assert_allclose(aggregator(three), share * aggregator(two), rtol=1e-9, atol=1e-12)


def test_edm_keeps_or_drops_a_zero_gradient() -> None:
    rows = torch.tensor([*ORTHOGONAL, [0.0, 0.0]], dtype=torch.float64)
    assert not EDM()(rows).any()
    np.testing.assert_allclose(EDM(zero="drop")(rows), [12 / 7, 12 / 7], rtol=1e-9)


@pytest.mark.parametrize(
    "aggregator", [NashMTL(), EDM(), UPGrad(), DualProj(), ConFIG(), FairGrad(), GradVac()]
)
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_opposite_gradients_stand_still(aggregator: torch.nn.Module, factor: float) -> None:
    rows = torch.tensor([[1.0, 2.0], [-factor, -2 * factor]], dtype=torch.float64)
    assert aggregator(rows).norm() < 1e-12


def test_aligned_moves_along_the_longer_of_two_opposite_gradients() -> None:
    rows = torch.tensor([[1.0, 2.0], [-3.0, -6.0]], dtype=torch.float64)
    direction = AlignedMTL()(rows)
    assert direction @ rows[1] > 1
    np.testing.assert_allclose(direction, reference.aligned(rows.numpy()), atol=1e-9)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: NashMTL(max_norm=0.0), "max_norm is 0.0; it must be positive, or None"),
        (lambda: NashMTL(degree=2), "degree is 2; known are 0 and 1"),
        (lambda: NashMTL(degree=1), "degree=1 and max_norm=1.0: .* Use max_norm=None"),
        (lambda: EDM(zero="skip"), "zero is 'skip'; known are 'keep' and 'drop'"),
        (lambda: AlignedMTL(scale="max"), "scale is 'max'; known are"),
        (lambda: FairGrad(alpha=0), "alpha is 0; it must be positive"),
        (lambda: SDMGrad(lam=-1), "lam is -1; it must be at least 0"),
        (lambda: GradDrop(leak=1.5), "leak is 1.5; it must lie between 0 and 1"),
        (lambda: GradVac(beta=-0.1), "beta is -0.1; it must lie between 0 and 1"),
    ],
)
def test_values_out_of_range_are_refused(make: Callable, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


# ------------------------------------------------------------------------------------ random ones


def test_graddrop_keeps_a_sign_with_its_probability() -> None:
    graddrop = GradDrop(generator=torch.Generator().manual_seed(0))
    rows = torch.tensor(PAPER, dtype=torch.float64)
    found = torch.stack([graddrop(rows) for _ in range(4000)])
    assert set(found[:, 0].tolist()) == {6.0, -4.0}
    # 0.6 within five standard deviations of 4000 draws
    assert (found[:, 0] == 6).double().mean().item() == pytest.approx(0.6, abs=0.04)
    assert (found[:, 1:] == 2).all()


def test_graddrop_with_full_leak_is_the_sum() -> None:
    rows = torch.tensor(PAPER, dtype=torch.float64)
    np.testing.assert_allclose(GradDrop(leak=1.0)(rows), rows.sum(0), rtol=1e-12)


def test_gradvac_of_two_by_hand() -> None:
    # Targets 0, as PCGrad: g_1 becomes (1/2, 1/2), g_2 becomes (0, 1).
    gradvac = GradVac(beta=0.5)
    rows = torch.tensor(CONFLICT, dtype=torch.float64)
    np.testing.assert_allclose(gradvac(rows), [0.5, 1.5], atol=1e-12)
    # The cosine was -1/sqrt(2): half of it is the next target.
    target = -HALF / 2
    np.testing.assert_allclose(gradvac.targets, [[0, target], [target, 0]], atol=1e-12)
    # Turned to that target, p_1 = g_1 + t g_2 has the target as its cosine with g_2.
    direction = gradvac(rows).numpy()
    turn = (target * HALF + HALF * math.sqrt(1 - target**2)) / math.sqrt(1 - target**2)
    first = np.array([1, 0]) + turn / math.sqrt(2) * np.array([-1, 1])
    second = np.array([-1, 1]) + turn * math.sqrt(2) * np.array([1, 0])
    assert first @ [-1, 1] / math.sqrt(2) / np.linalg.norm(first) == pytest.approx(target)
    np.testing.assert_allclose(direction, first + second, atol=1e-12)


def test_gradvac_keeps_the_targets_of_absent_tasks() -> None:
    gradvac = GradVac(beta=0.5)
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(rng.normal(size=(3, 5)))
    gradvac.begin(torch.tensor([True, True, True]))
    gradvac(rows)
    before = gradvac.targets.copy()
    gradvac.begin(torch.tensor([True, False, True]))
    gradvac(rows[[0, 2]])
    changed = gradvac.targets != before
    assert changed[0, 2]
    assert changed[2, 0]
    assert changed.sum() == 2
    with pytest.raises(ValueError, match="announced 2 tasks, the gradients are of 3"):
        gradvac(rows)
