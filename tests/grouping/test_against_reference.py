"""Maps with missing labels, and clusters at any scale, beside slow versions that try everything."""

import numpy as np
import pytest
import torch
from reference import grouping as slow

from equipoise.grouping import DataMaps, cluster, find_groups

SEEDS = range(8)


def random_training(seed: int) -> tuple:
    """Give (T, N, checkpoints) and a list of epochs, each a list of (p, index).

    Samples come twice in a batch or never, labels are missing in every second training; each task
    sees sample 0 in the first batch.
    """
    rng = np.random.default_rng(seed)
    tasks, samples = int(rng.integers(1, 6)), int(rng.integers(1, 12))
    epochs = int(rng.integers(1, 6))
    number = int(rng.integers(1, epochs + 1))
    checkpoints = sorted(1 + rng.choice(epochs, size=number, replace=False))
    updates = []
    for epoch in range(epochs):
        updates.append([])
        for batch in range(int(rng.integers(1, 4))):
            size = int(rng.integers(1, samples + 3))
            index = rng.integers(samples, size=size)
            p = rng.uniform(size=(size, tasks)).astype(np.float32)
            if seed % 2:
                p[rng.uniform(size=p.shape) < 0.3] = np.nan
            if epoch == batch == 0:
                index[0], p[0] = 0, 0.5
            updates[-1].append((p, index))
    return tasks, samples, [int(c) for c in checkpoints], updates


def both(seed: int, ddof: int = 0) -> tuple[DataMaps, slow.StoredMaps]:
    tasks, samples, checkpoints, updates = random_training(seed)
    ours = DataMaps(tasks, samples, checkpoints, ddof)
    theirs = slow.StoredMaps(tasks, samples, checkpoints, ddof)
    for epoch in updates:
        for p, index in epoch:
            ours.update(torch.from_numpy(p), torch.from_numpy(index))
            theirs.update(p, index)
        ours.end_epoch()
        theirs.end_epoch()
    return ours, theirs


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("seed", SEEDS)
def test_maps_and_their_inner_products(seed: int, ddof: int) -> None:
    ours, theirs = both(seed, ddof)
    found, expected = np.asarray(ours.maps(), float), theirs.maps()
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=3e-7)
    # The inner products of the float32 maps themselves: nothing is lost in adding up.
    seen = np.where(expected.any(-1, keepdims=True), found, 0.0)
    known = np.array(
        [
            [[bool(theirs.values(t, s, e)) for s in range(theirs.shape[1])] for e in theirs.epochs]
            for t in range(theirs.shape[0])
        ]
    )
    mean = np.where(known[..., None], seen, 0).sum(0) / np.maximum(known.sum(0), 1)[..., None]
    filled = np.where(known[..., None], seen, mean).reshape(len(seen), -1)
    for centred in (True, False):
        wanted = slow.gram(filled, centred)
        size = np.abs(slow.gram(filled)).max()
        np.testing.assert_allclose(
            ours.gram(centred=centred).numpy(), wanted, rtol=1e-9, atol=1e-12 * size
        )
        exact = theirs.gram(centred)
        np.testing.assert_allclose(
            ours.gram(centred=centred).numpy(), exact, rtol=1e-5, atol=1e-5 * size
        )


def scattered(seed: int, n_groups: int) -> np.ndarray:
    """Give vectors of 2 to 8 tasks about some centres; every third time far from the origin."""
    rng = np.random.default_rng(seed)
    tasks = int(rng.integers(n_groups + 1, 9))
    centres = 3 * rng.normal(size=(n_groups, 6))
    x = rng.normal(size=(tasks, 6)) + centres[rng.integers(n_groups, size=tasks)]
    return 10.0 ** rng.integers(-6, 7) * (x + (1000 if seed % 3 == 0 else 0))


@pytest.mark.parametrize("n_groups", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", SEEDS)
def test_clusters_are_the_best_of_all(seed: int, n_groups: int) -> None:
    x = scattered(seed, n_groups)
    labels, least, _ = slow.best_groups(x, n_groups)
    for data in (torch.from_numpy(x), torch.from_numpy(x @ x.T)):
        far = seed % 3 == 0 and data.shape[1] == len(x)  # x x^T has lost digits
        groups = find_groups(data, n_groups, seed=seed)
        assert groups.labels.tolist() == labels
        assert groups.inertia == pytest.approx(least, rel=1e-5 if far else 1e-9)
        expected = slow.soft_groups(x, labels, n_groups)
        atol = 1e-5 if far else 1e-12
        np.testing.assert_allclose(
            cluster(data, n_groups, seed=seed).numpy(), expected, rtol=1e-5, atol=atol
        )
        hard = cluster(data, n_groups, seed=seed, method="hard").numpy()
        assert hard.tolist() == np.eye(n_groups)[labels].tolist()
        if n_groups > 1:
            assert groups.silhouettes.mean().item() == pytest.approx(
                slow.silhouette(x, labels), rel=1e-5 if far else 1e-9, abs=1e-9
            )
