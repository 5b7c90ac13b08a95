"""The slow grouping itself, at answers known by hand."""

import math

import numpy as np
import pytest
from reference import grouping as slow


def test_memberships_of_the_specification() -> None:
    for d, fuzziness, expected in (  # C1
        ((1, 2), 2, (0.8, 0.2)),
        ((1, 2, 4), 2, (0.76190476, 0.19047619, 0.04761905)),
        ((1, 2), 1.5, (16 / 17, 1 / 17)),
        ((1, 2), 3, (2 / 3, 1 / 3)),
        ((0, 3), 2, (1, 0)),
        ((0, 0, 1), 2, (0.5, 0.5, 0)),
        ((1000, 2000), 1.07, (1, 0)),
        ((1e-200, 2e-200), 1.001, (1, 0)),
    ):
        np.testing.assert_allclose(
            slow.memberships(np.array([d]), fuzziness)[0], expected, atol=1e-8
        )


def test_maps_of_the_specification() -> None:
    maps = slow.StoredMaps(1, 2, [1, 2, 3])
    for p in (0.2, 0.4, 0.9):  # C3
        maps.update(np.array([[p]]), np.array([0]))
        maps.end_epoch()
    mu, sigma = maps.maps()[0, :, 0].T
    np.testing.assert_allclose(mu, [0.2, 0.3, 0.5], rtol=1e-12)
    np.testing.assert_allclose(sigma, [0, 0.1, 0.29439203], atol=1e-8)
    assert not maps.maps()[0, :, 1].any(), "a sample that was never seen"
    assert slow.mean_and_deviation([0.2, 0.4, 0.9], 1)[1] == pytest.approx(0.36055513, abs=1e-8)
    assert slow.mean_and_deviation([0.2, 0.4], 1)[1] == pytest.approx(0.14142136, abs=1e-8)


def test_duplicates_count_and_missing_labels_do_not() -> None:
    maps = slow.StoredMaps(2, 1, [1])
    maps.update(np.array([[0.2, math.nan], [0.4, 0.5]]), np.array([0, 0]))
    np.testing.assert_allclose(maps.maps()[:, 0, 0], [[0.3, 0.1], [0.5, 0.0]], atol=1e-15)


def test_gram() -> None:
    x = np.array([[1.0, 2.0], [3.0, 5.0]])
    assert slow.gram(x).tolist() == [[5, 13], [13, 34]]
    assert slow.gram(x, centred=True).tolist() == [[3.25, -3.25], [-3.25, 3.25]]


def test_there_are_as_many_groupings_as_stirling_says() -> None:
    for n, m, number in ((4, 2, 7), (5, 3, 25), (6, 3, 90), (3, 3, 1), (3, 1, 1)):
        assert len(list(slow.partitions(n, m))) == number


def test_best_groups() -> None:
    x = np.array([[0.0], [1.0], [10.0], [11.0], [50.0]])
    labels, least, second = slow.best_groups(x, 3)
    assert labels == [0, 0, 1, 1, 2] and least == pytest.approx(1) and second > least
    assert slow.settled(x, labels) and not slow.settled(x, [0, 0, 0, 1, 2])
    w = slow.soft_groups(x, labels, 3)
    assert w[4].tolist() == [0, 0, 1]
    assert w[0] == pytest.approx(
        np.array([1 / 0.5**2, 1 / 10.5**2, 1 / 50**2]) / (4 + 10.5**-2 + 50**-2)
    )


def test_fuzzy_c_means_stands_still_at_the_symmetric_answer() -> None:
    x = np.array([[-1.0], [1.0]])
    w, centres = slow.fuzzy_c_means(x, np.array([[-0.9], [0.9]]), eps=1e-24)
    # Once a centre is on a point, the point belongs to it alone.
    np.testing.assert_allclose(np.abs(centres), 1, atol=1e-6)
    np.testing.assert_allclose(w, np.eye(2), atol=1e-6)


def test_silhouette() -> None:
    x = np.array([[0.0], [1.0], [4.0]])
    # 0: a = 1, b = 4; 1: a = 1, b = 3; 4 is alone
    assert slow.silhouette(x, [0, 0, 1]) == pytest.approx((3 / 4 + 2 / 3 + 0) / 3)


def test_ensemble_and_f1() -> None:
    logits = np.array([[[2.0]], [[-3.0]]])
    w = np.array([[0.75, 0.25]])
    p = 0.75 / (1 + math.exp(-2)) + 0.25 / (1 + math.exp(3))
    assert slow.ensemble(logits, w)[0, 0] == pytest.approx(p)
    assert slow.ensemble(logits, w, "logits")[0, 0] == pytest.approx(1 / (1 + math.exp(-0.75)))
    yes = [1, 1, 1, 1, 0, 0]
    assert slow.f1(yes, [1, 1, 1, 0, 1, 1]) == pytest.approx(2 / 3)  # C5
    assert slow.f1([0, 0], [0, 0]) == 0
    assert slow.specialist_loss([2.0, 3.0], np.array([[0.8, 0.2], [0.1, 0.9]]), 1) == pytest.approx(
        3.1
    )
    assert slow.true_probability(0.0, 1) == 0.5
    assert slow.true_probability(math.log(3), 0) == pytest.approx(0.25)
    assert slow.true_probability(math.log(3), 1) == pytest.approx(0.75)
