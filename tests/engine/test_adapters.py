"""What the engine sees of a stage, whatever the stage is."""

import pytest
import torch
from torch import Tensor, nn

import equipoise as eq
from equipoise.engine.adapters import aggregator_stage, checked, weighting_stage, works_on_features


class OwnCoefficients:
    """Neither a module nor a subclass of ours."""

    def coefficients(self, gram: Tensor) -> Tensor:
        return torch.arange(1.0, len(gram) + 1, dtype=torch.float64)

    def __call__(self, rows: Tensor) -> Tensor:
        return rows.sum(0)


class Gramian(nn.Module):
    """In the way of TorchJD's weightings."""

    def forward(self, gramian: Tensor, /) -> Tensor:
        return gramian.diagonal().rsqrt()


class Holder(nn.Module):
    """In the way of TorchJD's aggregators that work on a Gram matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.gramian_weighting = Gramian()

    def forward(self, rows: Tensor) -> Tensor:
        raise AssertionError("the coefficients are there")


GRAM = torch.tensor([[4.0, 1.0], [1.0, 9.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (OwnCoefficients(), [1.0, 2.0]),
        (Gramian(), [1 / 2, 1 / 3]),
        (Holder(), [1 / 2, 1 / 3]),
        (eq.Mean(), [1 / 2, 1 / 2]),
    ],
)
def test_coefficients(given: object, expected: list[float]) -> None:
    stage = aggregator_stage(given)
    w = stage.coefficients(GRAM, torch.ones(2), torch.float32)
    assert torch.allclose(w.double(), torch.tensor(expected, dtype=torch.float64))
    assert stage.works_on_features
    assert stage.name == type(given).__name__


@pytest.mark.parametrize("given", [lambda rows: rows.sum(0), eq.DBMTL(2), nn.Flatten()])
def test_what_needs_the_rows(given: object) -> None:
    stage = aggregator_stage(given)
    assert stage.coefficients is None
    assert not stage.works_on_features
    assert stage.known(2) is None
    assert (stage.degree, stage.interval) == (1, 1)
    stage.begin(torch.ones(2, dtype=torch.bool))


def test_entries_are_weighed_at_the_features() -> None:
    stage = aggregator_stage(eq.GradDrop())
    assert stage.coefficients is None and stage.entry_weights is not None
    assert stage.works_on_features and works_on_features(eq.GradDrop)
    assert works_on_features(eq.MGDA) and not works_on_features(eq.DBMTL)


def test_declarations_are_taken_over() -> None:
    stage = aggregator_stage(eq.Every(eq.NashMTL(), 3))
    assert (stage.degree, stage.interval) == (0, 3)
    assert torch.equal(aggregator_stage(eq.Sum()).known(3), torch.ones(3, dtype=torch.float64))


def test_losses_reach_whoever_wants_them() -> None:
    by_loss = aggregator_stage(eq.MGDA(normalize="loss"))
    losses = torch.tensor([1.0, 100.0], dtype=torch.float64)
    w = by_loss.coefficients(GRAM, losses, torch.float64)
    assert torch.allclose(w, eq.MGDA(normalize="loss").coefficients(GRAM, losses))


@pytest.mark.parametrize("w", [torch.ones(3), torch.tensor([1.0, torch.nan]), torch.ones(1, 2)])
def test_coefficients_that_are_none(w: Tensor) -> None:
    with pytest.raises(eq.EquipoiseError, match=r"Own\.coefficients returned .* 2 tasks"):
        checked(w, 2, "Own")


def test_weightings() -> None:
    ours = weighting_stage(eq.UW(2))
    assert ours.method is ours.given
    assert [p.shape for p in ours.learnable] == [(2,)]
    assert not ours.needs_gram and not ours.needs_losses_after
    assert weighting_stage(eq.GradNorm()).needs_gram
    assert weighting_stage(eq.FAMO()).needs_losses_after
    assert weighting_stage(eq.Fixed([1.0, 0.0])).left_out == {1}
    plain = weighting_stage(lambda losses: 2 * losses)
    assert plain.method is None and plain.learnable == []
    assert (plain.left_out, plain.needs_gram, plain.needs_losses_after) == (set(), False, False)
