"""Clusters from inner products beside the vectors themselves: scikit-learn, and all partitions."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import grouping as slow
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, silhouette_samples

from equipoise import EquipoiseError
from equipoise.grouping import (
    Choice,
    Groups,
    affinity_gram,
    choose,
    cluster,
    find_groups,
    linkage,
    memberships,
    silhouette,
)
from equipoise.grouping.kmeans import lloyd
from equipoise.grouping.vectors import centred_gram, coordinates, pairwise

KNOWN = [
    ((1, 2), 2, (0.8, 0.2)),
    ((1, 2, 4), 2, (0.76190476, 0.19047619, 0.04761905)),
    ((1, 2), 1.5, (16 / 17, 1 / 17)),
    ((1, 2), 3, (2 / 3, 1 / 3)),
    ((0, 3), 2, (1, 0)),
    ((0, 0, 1), 2, (0.5, 0.5, 0)),
    ((1000, 2000), 1.07, (1, 0)),
    ((1e-200, 2e-200), 1.001, (1, 0)),
    ((1e200, 1e200), 1.0001, (0.5, 0.5)),
    ((3,), 2, (1,)),
]


@pytest.mark.parametrize(("distances", "fuzziness", "expected"), KNOWN)
def test_known_memberships(distances, fuzziness: float, expected) -> None:
    found = memberships(torch.tensor([distances], dtype=torch.float64), fuzziness)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found[0], expected, atol=1e-8)


DISTANCES = st.lists(
    st.lists(st.one_of(st.just(0.0), st.floats(1e-150, 1e150)), min_size=3, max_size=3),
    min_size=1,
    max_size=4,
)


@settings(max_examples=30)
@given(DISTANCES, st.floats(1.01, 50))
def test_memberships_beside_60_digits(distances, fuzziness: float) -> None:
    d = np.array(distances)
    found = memberships(d, fuzziness).numpy()
    np.testing.assert_allclose(found, slow.memberships(d, fuzziness), atol=1e-9, rtol=1e-7)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-12)
    np.testing.assert_allclose(memberships(d * 2.0**20, fuzziness), found, atol=1e-9)


def test_impossible_memberships() -> None:
    for fuzziness in (1, 0.5, float("nan")):
        with pytest.raises(ValueError, match="must be above 1"):
            memberships([[1.0, 2.0]], fuzziness)
    for wrong in ([[1.0, -2.0]], [[1.0, float("nan")]], [[1.0, float("inf")]]):
        with pytest.raises(ValueError, match="finite and not negative"):
            memberships(wrong)


def blobs(seed: int, n_tasks=14, groups=3, size=400, spread=0.6) -> np.ndarray:
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(groups, size))
    which = generator.integers(0, groups, n_tasks)
    return centres[which] + spread * generator.normal(size=(n_tasks, size))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("m", [2, 3, 5])
def test_labels_are_those_of_scikit_learn_on_the_vectors(seed: int, m: int) -> None:
    x = blobs(seed, groups=m)
    theirs = KMeans(m, n_init=20, random_state=0).fit(x)
    ours = find_groups(torch.from_numpy(x @ x.T), m)
    assert adjusted_rand_score(theirs.labels_, ours.labels) == 1
    assert ours.inertia == pytest.approx(theirs.inertia_, rel=1e-9)
    # The distances to the centres, and so the memberships, as well.
    order = [theirs.labels_[ours.labels.tolist().index(j)] for j in range(m)]
    expected = theirs.transform(x)[:, order]
    alone = np.bincount(ours.labels, minlength=m)[ours.labels] == 1
    expected[alone, ours.labels.numpy()[alone]] = 0
    np.testing.assert_allclose(ours.distances, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(ours.memberships, slow.memberships(expected), atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_no_worse_than_scikit_learn_where_there_are_no_groups(seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(30, 200))
    theirs = KMeans(4, n_init=10, random_state=0).fit(x)
    assert find_groups(x, 4).inertia <= theirs.inertia_ * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_from_the_same_centres_the_same_descent(seed: int) -> None:
    """One start, on vectors without groups: local optima too are those of scikit-learn."""
    x = np.random.default_rng(seed).normal(size=(30, 60))
    points = coordinates(centred_gram(x, "vectors"))
    start = np.random.default_rng(seed).choice(30, 4, replace=False)
    theirs = KMeans(4, init=x[start], n_init=1, tol=0).fit(x)
    assert np.array_equal(lloyd(points, points[start]).labels, theirs.labels_)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("m", [1, 2, 3, 6, 7])
def test_the_best_of_all_partitions(seed: int, m: int) -> None:
    x = np.random.default_rng(seed).normal(size=(7, 3))
    labels, least, _ = slow.best_groups(x, m)
    found = find_groups(x, m)
    assert found.inertia == pytest.approx(least, rel=1e-9, abs=1e-12)
    assert found.labels.tolist() == labels
    np.testing.assert_allclose(found.memberships, slow.soft_groups(x, labels, m), atol=1e-9)


def test_gram_and_vectors_give_the_same() -> None:
    x = blobs(0)
    by_vectors, by_gram = cluster(x, 3), cluster(x @ x.T, 3)
    torch.testing.assert_close(by_vectors, by_gram, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(cluster(torch.from_numpy(x), 3), by_vectors, rtol=0, atol=0)
    moved = cluster(x + 5.0, 3)
    torch.testing.assert_close(moved, by_vectors, rtol=1e-9, atol=1e-12)
    scaled = cluster(x * 1e-6, 3)
    torch.testing.assert_close(scaled, by_vectors, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(cluster(x.reshape(14, 2, 100, 2), 3), by_vectors, rtol=0, atol=0)


def test_square_vectors_can_be_told_from_inner_products() -> None:
    x = np.eye(4)
    assert find_groups(x, 4, given="vectors").distances[0, 1] == pytest.approx(2**0.5)
    with pytest.raises(EquipoiseError, match="symmetric"):
        find_groups(np.arange(16.0).reshape(4, 4), 2, given="gram")


def test_a_task_alone_belongs_to_its_group_entirely() -> None:
    x = np.array([[0.0, 0], [0, 1], [9, 9], [9.5, 9], [50, -50]])
    found = find_groups(x @ x.T, 3)
    assert found.labels.tolist() == [0, 0, 1, 1, 2]
    assert found.memberships[4].tolist() == [0, 0, 1]
    assert (found.memberships[:4, 2] > 0).all()
    assert str(found) == "1: 0, 1\n2: 2, 3\n3: 4"


def test_equal_tasks_are_on_their_centre() -> None:
    x = np.array([[0.3, 0.1], [0.3, 0.1], [5, 5], [6, 5]])
    found = find_groups(x @ x.T, 2)
    assert found.distances[:2, 0].tolist() == [0, 0]
    assert found.memberships[:2].tolist() == [[1, 0], [1, 0]]
    with pytest.raises(EquipoiseError, match="of which 3 are different"):
        find_groups(x @ x.T, 4)


def test_hard_memberships_have_a_column_for_each_group() -> None:
    x = blobs(1)
    hard, soft = find_groups(x, 3, method="hard"), find_groups(x, 3)
    assert hard.memberships.dtype == torch.float64 and hard.memberships.shape == (14, 3)
    assert torch.equal(hard.memberships, torch.eye(3, dtype=torch.float64)[soft.labels])


def test_permuting_tasks_permutes_memberships() -> None:
    x = blobs(2)
    order = np.random.default_rng(0).permutation(14)
    a, b = find_groups(x, 3), find_groups(x[order], 3)
    columns = [int(b.labels[list(order).index(a.labels.tolist().index(j))]) for j in range(3)]
    found = b.memberships[:, columns]
    torch.testing.assert_close(found, a.memberships[order], rtol=1e-8, atol=1e-9)


def test_the_seed_decides() -> None:
    x = np.random.default_rng(0).normal(size=(40, 80))
    assert torch.equal(cluster(x, 4, seed=3), cluster(x, 4, seed=3))
    found = {find_groups(x, 6, seed=s, n_init=1).inertia for s in range(5)}
    assert len(found) > 1, "one start on noise ends in different places"
    state = np.random.get_state()[1].tolist()
    cluster(x, 4)
    assert np.random.get_state()[1].tolist() == state


@pytest.mark.parametrize("fuzziness", [1.3, 2.0])
def test_fuzzy_c_means_beside_the_slow_one(fuzziness: float) -> None:
    x = blobs(3, n_tasks=9, size=5, spread=0.3)
    start = find_groups(x, 3)
    centres = slow.centres_of(x, start.labels.tolist(), 3)
    expected, ends = slow.fuzzy_c_means(x, centres, fuzziness, eps=1e-20)
    found = find_groups(x, 3, fuzziness=fuzziness, method="cmeans", tolerance=1e-20)
    np.testing.assert_allclose(found.memberships, expected, atol=1e-7)
    np.testing.assert_allclose(found.centres.numpy() @ x, ends, atol=1e-7)
    np.testing.assert_allclose(found.centres.sum(1), 1)


def test_fuzzy_c_means_says_if_it_was_cut_short() -> None:
    with pytest.warns(UserWarning, match="still moves after 1 iterations"):
        find_groups(blobs(4), 3, method="cmeans", max_iter=1, tolerance=0.0)


def test_points() -> None:
    """Task 0 sits in one corner of the map, task 1 in the other, task 2 half and half."""
    generator = np.random.default_rng(0)
    low, high = (c + 0.02 * generator.random((3, 2, 40, 2)) for c in (0.1, 0.8))
    maps = low.copy()
    maps[1] = high[1]
    maps[2, :, ::2] = high[2, :, ::2]
    found = find_groups(maps.astype(np.float32), 2, method="points")
    assert found.memberships.tolist() == [[1, 0], [0, 1], [0.5, 0.5]]
    assert found.labels.tolist()[:2] == [0, 1]
    maps[1, :, :10] = 0  # not seen: left out, or they would lie in the low region
    assert cluster(maps, 2, method="points").tolist() == found.memberships.tolist()
    with pytest.raises(EquipoiseError, match="does not hold the points"):
        cluster(np.eye(4), 2, method="points")


def test_points_of_many_samples_beside_scikit_learn(monkeypatch) -> None:
    monkeypatch.setattr("equipoise.grouping.points.SAMPLE", 300)
    maps = np.random.default_rng(1).beta([[[2, 1]]], [[[1, 4]]], (4, 500, 2))
    found = cluster(maps, 3, method="points").numpy()
    theirs = KMeans(3, n_init=20, random_state=0, tol=0, max_iter=1000).fit(maps.reshape(-1, 2))
    order = np.argsort(theirs.cluster_centers_[:, 0])
    labels = np.argsort(order)[theirs.labels_].reshape(4, 500)
    np.testing.assert_allclose(found, slow.point_shares(labels, 3), atol=0.02)


# ------------------------------------------------------------------ how many groups


@pytest.mark.parametrize("seed", range(4))
def test_silhouettes_are_those_of_scikit_learn_on_the_vectors(seed: int) -> None:
    x = blobs(seed, spread=1.5)
    labels = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 3])  # task 13 is alone
    found = silhouette(x @ x.T, labels)
    np.testing.assert_allclose(found, silhouette_samples(x, labels), atol=1e-9)
    assert found[13] == 0
    assert float(found.mean()) == pytest.approx(slow.silhouette(x, labels.tolist()))


def test_silhouettes_need_two_groups() -> None:
    with pytest.raises(ValueError, match="one group only"):
        silhouette(np.eye(3), [0, 0, 0])
    with pytest.raises(ValueError, match="give \\(3,\\)"):
        silhouette(np.eye(3), [0, 1])


def test_the_number_of_groups_is_found() -> None:
    choice = choose(blobs(5, groups=4, spread=0.2))
    assert choice.best == 4
    assert list(choice.silhouettes) == list(range(2, 11))
    assert (np.diff(list(choice.inertias.values())) < 0).all()
    assert choose(blobs(5), [2, 3]).inertias.keys() == {2, 3}
    for numbers in ([1], [14], []):
        with pytest.raises(ValueError, match="a choice of 2 to 13"):
            choose(blobs(5), numbers)


def test_equal_tasks_limit_the_choice() -> None:
    pairs = np.array([[0.0], [0.0], [1.0], [1.0]])
    assert list(choose(pairs).silhouettes) == [2] and choose(pairs).best == 2
    assert choose(np.ones((4, 2))).best == 1
    with pytest.raises(EquipoiseError, match="at most 2"):
        choose(pairs, [3])


def test_of_equally_good_numbers_the_smallest_is_chosen() -> None:
    assert Choice({2: 0.5, 3: 0.7, 4: 0.7}, {}).best == 3


def test_the_tree_joins_near_tasks_first() -> None:
    x = np.array([[0.0], [1.0], [10.0], [13.0]])
    tree = linkage(x @ x.T, "single")
    np.testing.assert_allclose(tree[:, 2], [1, 3, 9], atol=1e-6)
    assert tree[:, 3].tolist() == [2, 2, 4]


# ------------------------------------------------------------------ affinities, files, errors


def test_cosines_have_the_distances_of_unit_gradients() -> None:
    g = np.random.default_rng(0).normal(size=(6, 20))
    u = g / np.linalg.norm(g, axis=1, keepdims=True)
    k = affinity_gram(u @ u.T).numpy()
    d = np.diag(k)[:, None] + np.diag(k) - 2 * k
    np.testing.assert_allclose(d, 2 * (1 - u @ u.T), atol=1e-12)
    torch.testing.assert_close(cluster(k, 2), cluster(u, 2), rtol=1e-7, atol=1e-9)


def test_any_affinities_become_inner_products() -> None:
    a = np.random.default_rng(0).normal(size=(7, 7))
    k = affinity_gram(torch.from_numpy(a)).numpy()
    assert np.linalg.eigvalsh(k)[0] > -1e-12
    s = (a + a.T) / 2
    d = np.diag(k)[:, None] + np.diag(k) - 2 * k
    off = ~np.eye(7, dtype=bool)
    shift = (d + 2 * s)[off]
    np.testing.assert_allclose(shift, shift[0], atol=1e-12)  # 2 (a - S) and one constant more
    assert (d[off] > -1e-12).all()
    with pytest.raises(EquipoiseError, match="no inner products"):
        cluster(s + 3 * np.eye(7) * (s.diagonal() < 0) - 9 * s * off, 2, given="gram")
    for wrong in (a[:3], np.full((2, 2), np.nan)):
        with pytest.raises(EquipoiseError, match="affinities are|must be finite"):
            affinity_gram(wrong)


def test_affine_groups_are_found_by_affinity() -> None:
    a = np.full((6, 6), -0.2)
    a[:3, :3] = a[3:, 3:] = 0.4
    assert find_groups(affinity_gram(a), 2).labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_files(tmp_path: Path) -> None:
    found = find_groups(blobs(0), 3, tasks=[f"task {i}, ä" for i in range(14)])
    found.to_json(tmp_path / "g.json")
    again = Groups.from_json(tmp_path / "g.json")
    for name in ("labels", "memberships", "distances", "centres", "silhouettes"):
        assert torch.equal(getattr(found, name), getattr(again, name)), name
    assert again.tasks == found.tasks and again.inertia == found.inertia
    found.to_csv(tmp_path / "g.csv")
    lines = (tmp_path / "g.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "task,group,membership 1,membership 2,membership 3"
    assert lines[1].startswith('"task 0, ä",1,')
    assert [float(v) for v in lines[1].split(",")[3:]] == found.memberships[0].tolist()
    assert sum(len(names) for names in found.members) == 14 and len(found) == 3
    fields = json.loads((tmp_path / "g.json").read_text())
    fields["silhouettes"].pop()
    (tmp_path / "g.json").write_text(json.dumps(fields))
    with pytest.raises(EquipoiseError, match=r"holds no groups \(silhouettes is"):
        Groups.from_json(tmp_path / "g.json")
    (tmp_path / "g.json").write_text(json.dumps({"tasks": ["a"]}))
    with pytest.raises(EquipoiseError, match="holds no groups"):
        Groups.from_json(tmp_path / "g.json")


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "method is 'soft'", {"method": "soft"}),
        (ValueError, "n_groups is 0", {"n_groups": 0}),
        (ValueError, "n_groups is 1.5", {"n_groups": 1.5}),
        (ValueError, "n_groups is 2.0", {"n_groups": 2.0}),
        (ValueError, "n_groups is '2'", {"n_groups": "2"}),
        (ValueError, "n_init is 0", {"n_init": 0}),
        (ValueError, "fuzziness is 1", {"fuzziness": 1.0}),
        (ValueError, "tasks has 1 names for 3 tasks", {"tasks": ["a"]}),
        (ValueError, "given is 'distances'", {"given": "distances"}),
        (EquipoiseError, "at most 3", {"n_groups": 4}),
        (EquipoiseError, r"shape \(3,\)", {"gram_or_vectors": np.ones(3)}),
        (EquipoiseError, "NaN or infinity", {"gram_or_vectors": np.full((3, 2), np.nan)}),
    ],
)
def test_impossible_arguments(error, message: str, arguments: dict) -> None:
    with pytest.raises(error, match=message):
        find_groups(**{"gram_or_vectors": np.eye(3), "n_groups": 2} | arguments)


def test_no_warning_on_maps_that_cannot_be_written_to() -> None:
    x = blobs(0)
    x.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cluster(x, 2)


def test_how_much_tasks_help_themselves_may_count_or_not() -> None:
    """Lookaheads of two pairs: with the diagonal all tasks are nearly equally far apart."""
    a = np.full((4, 4), -1e-4)
    a[0, 1] = a[1, 0] = a[2, 3] = a[3, 2] = 4e-4
    a[np.arange(4), np.arange(4)] = 1.6e-3
    with_it, without = (pairwise(affinity_gram(a, diagonal=d).numpy()) for d in (True, False))
    assert with_it[0, 1] > 0.8 * with_it[0, 2]
    assert without[0, 1] == 0 and without[0, 2] == pytest.approx(np.sqrt(2 * 5e-4))


def test_what_cannot_be_chosen() -> None:
    with pytest.raises(ValueError, match="has no silhouettes"):
        choose(np.ones((4, 3, 2)), method="points")
    with pytest.raises(ValueError, match="2 tasks leave no choice"):
        choose(np.eye(2))
