"""The probability of the true class, and its counterpart for regression."""

from __future__ import annotations

import math

import pytest
import torch
from reference.grouping import true_probability
from scipy.stats import norm

from equipoise import TaskError
from equipoise.grouping import true_class_probability


def test_binary_beside_the_formula() -> None:
    logits = torch.tensor([[0.0, 2.0], [-3.0, 50.0], [1.5, -80.0]])
    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    found = true_class_probability(logits, labels)
    for b in range(3):
        for i in range(2):
            expected = true_probability(float(logits[b, i]), float(labels[b, i]))
            assert float(found[b, i]) == pytest.approx(expected, abs=1e-7)
    assert found.dtype == torch.float32


def test_opposite_labels_and_logits_are_equal_to_the_last_bit() -> None:
    logits = 20 * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    labels = (torch.rand(1000, generator=torch.Generator().manual_seed(1)) < 0.5).float()
    assert torch.equal(
        true_class_probability(logits, labels), true_class_probability(-logits, 1 - labels)
    )


def test_by_task_name() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = {
        "yes": torch.randn(5, 1, generator=generator),
        "class": torch.randn(5, 3, generator=generator),
        "flat": torch.randn(5, generator=generator),
        "number": torch.randn(5, 1, generator=generator),
        "unlabelled": torch.randn(5, 1, generator=generator),
    }
    targets = {
        "yes": torch.tensor([0.0, 1, 1, math.nan, 0]),
        "class": torch.tensor([0, 2, 1, -1, 1]),
        "flat": torch.tensor([True, False, True, False, True]),
        "number": torch.tensor([0.5, -1.0, math.nan, 2.0, 0.0]),
    }
    masks = {"flat": torch.tensor([True, True, True, True, False])}
    found = true_class_probability(
        outputs, targets, kinds={"number": "regression"}, scales={"number": 2.0}, masks=masks
    )
    assert found.shape == (5, 5)
    sign = 2 * targets["yes"] - 1
    expected = torch.sigmoid(sign * outputs["yes"][:, 0])
    torch.testing.assert_close(found[:, 0], expected, equal_nan=True)
    p = outputs["class"].softmax(1)
    torch.testing.assert_close(found[:, 1], p[range(5), [0, 2, 1, 0, 1]].where(
        targets["class"] >= 0, torch.nan), equal_nan=True)  # fmt: skip
    assert found[4, 2].isnan() and not found[:4, 2].isnan().any()
    residual = (targets["number"] - outputs["number"][:, 0]).abs().numpy() / 2
    torch.testing.assert_close(
        found[:, 3].double(), torch.from_numpy(2 * norm.sf(residual)).double(),
        equal_nan=True, rtol=1e-5, atol=1e-6,
    )  # fmt: skip
    assert found[:, 4].isnan().all()
    chosen = true_class_probability(outputs, targets, tasks=("class", "gone"))
    assert torch.equal(chosen[:, 0].isnan(), found[:, 1].isnan()) and chosen[:, 1].isnan().all()


def test_regression_is_bounded_and_falls_with_the_distance() -> None:
    o = torch.tensor([[0.0], [0.1], [-0.1], [1.0], [3.0], [100.0]])
    p = true_class_probability(o, torch.zeros(6, 1), kinds="regression")
    assert p[0] == 1 and p[1] == p[2] and p[5] == 0
    assert (p[[0, 1, 3, 4]].diff() < 0).all()
    assert float(p[3]) == pytest.approx(0.31731051, abs=1e-7)  # the usual one-sigma probability


def test_regression_at_chance_is_one_half() -> None:
    y = 3.0 + 2 * torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0))
    p = true_class_probability(torch.full_like(y, 3.0), y, kinds="regression", scales=2.0)
    assert float(p.mean()) == pytest.approx(0.5, abs=0.01)


def test_several_positions_have_their_mean() -> None:
    logits = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[[0, 1], [-1, 2]], [[-1, -1], [-1, -1]]])
    found = true_class_probability({"seg": logits}, {"seg": labels})
    p = logits[0].softmax(0)
    expected = (p[0, 0, 0] + p[1, 0, 1] + p[2, 1, 1]) / 3
    assert float(found[0, 0]) == pytest.approx(float(expected))
    assert found[1, 0].isnan()


def test_half_precision() -> None:
    found = true_class_probability(
        torch.tensor([[12.0]], dtype=torch.bfloat16), torch.tensor([[1.0]])
    )
    assert found.dtype == torch.float32 and float(found) == pytest.approx(1 - 6.144e-6, abs=1e-7)


@pytest.mark.parametrize(
    ("output", "target", "kind", "message"),
    [
        (torch.zeros(2, 1), torch.tensor([0.5, 1.0]), None, "target 0.5 is neither 0 nor 1"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), None, "target 3 is no class"),
        (torch.zeros(2, 3), torch.tensor([0.0, 1.0]), None, "do not go together"),
        (torch.zeros(2, 1), torch.zeros(3), None, "do not go together"),
        (torch.zeros(2, 1), torch.zeros(3), "regression", "do not go together"),
        (torch.zeros(2, 3), torch.tensor([0.5, 1]), "classification", "do not go together"),
        (torch.tensor([0.0, torch.nan]), torch.zeros(2), "binary", "output is NaN where there is"),
        (torch.tensor([0.0, torch.nan]), torch.zeros(2), "regression", "output is NaN where there"),
        (torch.full((2, 3), torch.nan), torch.tensor([-1, 1]), "classification", "output is NaN"),
        (torch.zeros(2, 1), torch.zeros(2), "ordinal", "give one of 'binary'"),
    ],
)
def test_what_does_not_go_together(output, target, kind, message) -> None:
    kinds = {"t": kind} if kind else None
    with pytest.raises(TaskError, match=f"task 't': .*{message}"):
        true_class_probability({"t": output}, {"t": target}, kinds=kinds)


def test_the_task_with_the_wrong_label_is_named() -> None:
    outputs = {"a": torch.zeros(2, 1), "b": torch.zeros(2, 1)}
    with pytest.raises(TaskError, match="task 'b': target 2"):
        true_class_probability(outputs, {"a": torch.zeros(2), "b": torch.tensor([0.0, 2.0])})
    with pytest.raises(TaskError, match="no task has both"):
        true_class_probability(outputs, {})
    with pytest.raises(TaskError, match="scale is 0"):
        true_class_probability(outputs, outputs, kinds="regression", scales=0.0)


def test_a_scale_may_be_what_std_returns() -> None:
    o, t = torch.zeros(50), torch.linspace(-20, 20, 50)
    wanted = true_class_probability(o, t, kinds="regression", scales=float(t.std()))
    for scale in (t.std(), t.std().numpy()):
        got = true_class_probability(o, t, kinds="regression", scales=scale)
        torch.testing.assert_close(got, wanted)
    with pytest.raises(TaskError, match="one kind and one scale"):
        true_class_probability(o, t, kinds="regression", scales={"d": 2.0})


def test_class_labels_may_be_numbers_with_nan() -> None:
    o = torch.randn(3, 4)
    got = true_class_probability({"c": o}, {"c": torch.tensor([1.0, math.nan, 3.0])},
                                 kinds={"c": "classification"})  # fmt: skip
    wanted = o.softmax(1)[[0, 2], [1, 3]]
    torch.testing.assert_close(got[[0, 2], 0], wanted)
    assert got[1].isnan()


def test_an_empty_batch_has_no_scores() -> None:
    for kind in ("binary", "regression"):
        got = true_class_probability({"a": torch.zeros(0, 2)}, {"a": torch.zeros(0, 2)}, kinds=kind)
        assert got.shape == (0, 1)
