"""The slow dense metrics themselves, at answers known by hand."""

import math

import numpy as np
import pytest
from reference import dense as slow


def test_segmentation() -> None:
    label = [np.array([[0, 0, 1], [1, -1, 2]])]
    predicted = [np.array([[0, 1, 1], [1, 5, 0]])]
    found = slow.segmentation(predicted, label, classes=13)
    # class 0: 1 of {pred 0: 2, true 0: 2} -> 1/3; class 1: 2 of 3; class 2: 0 of 1; others absent
    assert found["miou"] == pytest.approx((1 / 3 + 2 / 3 + 0) / 3)
    assert found["pixel_accuracy"] == pytest.approx(3 / 5)


def test_images_are_pooled() -> None:
    one, two = np.array([[0, 0, 0]]), np.array([[1]])
    found = slow.segmentation([one, two * 0], [one, two], classes=2)
    assert found["pixel_accuracy"] == 3 / 4 and found["miou"] == pytest.approx((3 / 4 + 0) / 2)


def test_depth() -> None:
    found = slow.depth([np.array([[3.0, 9.0, 1.0]])], [np.array([[2.0, 0.0, 4.0]])])
    assert found == pytest.approx({"abs_error": 2.0, "rel_error": (0.5 + 0.75) / 2})


def test_normals() -> None:
    truth = np.zeros((3, 1, 4))
    truth[2, 0, :3] = 1
    predicted = np.zeros((3, 1, 4))
    for k, degrees in enumerate((10, 20, 60)):
        predicted[:, 0, k] = 7 * np.array(
            [0, math.sin(math.radians(degrees)), math.cos(math.radians(degrees))]
        )
    found = slow.normals([predicted], [truth])
    assert found == pytest.approx(
        {"mean": 30, "median": 20, "11.25": 1 / 3, "22.5": 2 / 3, "30": 2 / 3}
    )
    assert slow.one_minus_cosine([predicted], [truth]) == pytest.approx(
        1 - sum(math.cos(math.radians(a)) for a in (10, 20, 60)) / 3
    )


def test_cross_entropy() -> None:
    logits = np.zeros((4, 1, 2))
    assert slow.cross_entropy([logits], [np.array([[3, -1]])]) == pytest.approx(math.log(4))


def test_delta_m_over_several_metrics_a_task() -> None:
    values = {"a": {"up": 0.5, "down": 10.0}, "b": {"down": 3.0}}
    baseline = {"a": {"up": 0.4, "down": 12.0}, "b": {"down": 2.0}}
    higher = {"a": {"up": True, "down": False}, "b": {"down": False}}
    # improvements 25, 16.667, -50 (A6)
    assert slow.delta_m(values, baseline, higher) == pytest.approx((25 + 50 / 3 - 50) / 3)
    over = slow.delta_m(values, baseline, higher, over="tasks")
    assert over == pytest.approx(((25 + 50 / 3) / 2 - 50) / 2)
    assert slow.delta_m(values, baseline, higher, "drop") == pytest.approx(
        -(25 + 50 / 3 - 50) / 300
    )
