"""Data maps beside a store of all probabilities; their inner products beside those of the maps."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.grouping import StoredMaps, gram

from equipoise import EquipoiseError, TaskError
from equipoise.grouping import DataMaps, data_maps, full_maps

P = (0.2, 0.4, 0.9)


def of_one(checkpoints, ddof=0, epochs=3) -> DataMaps:
    maps = DataMaps(1, 1, checkpoints, ddof)
    for p in P[:epochs]:
        maps.update(torch.tensor([[p]]), torch.tensor([0]))
        maps.end_epoch()
    return maps


def test_known_answers() -> None:
    mu, sigma = of_one([1, 2, 3]).maps()[0, :, 0].T
    np.testing.assert_allclose(mu, [0.2, 0.3, 0.5], rtol=1e-6)
    np.testing.assert_allclose(sigma, [0, 0.1, 0.29439203], atol=1e-7)
    mu, sigma = of_one([1, 2, 3], ddof=1).maps()[0, :, 0].T
    np.testing.assert_allclose(sigma, [0, 0.14142136, 0.36055513], atol=1e-7)
    np.testing.assert_allclose(of_one([2]).current()[0, 0], [0.5, 0.29439203], atol=1e-7)


def fill(maps: DataMaps, stored: StoredMaps | None, seed: int, epochs: int, missing=0.0) -> None:
    """Batches with duplicates; some samples never come."""
    generator = np.random.default_rng(seed)
    for _ in range(epochs):
        for _ in range(3):
            index = generator.integers(0, maps.n_samples - 1, 7)
            p = generator.random((7, maps.n_tasks)).astype(np.float32)
            p[generator.random(p.shape) < missing] = math.nan
            for target in (maps, stored):
                if target is not None:
                    given = (torch.from_numpy(p), torch.from_numpy(index))
                    target.update(*(given if target is maps else (p, index)))
        for target in (maps, stored):
            if target is not None:
                target.end_epoch()


@pytest.mark.parametrize("missing", [0.0, 0.4])
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("seed", range(3))
def test_beside_a_store_of_all_probabilities(seed: int, ddof: int, missing: float) -> None:
    maps, stored = DataMaps(4, 9, [1, 3, 4], ddof), StoredMaps(4, 9, [1, 3, 4], ddof)
    fill(maps, stored, seed, 4, missing)
    expected = np.nan_to_num(stored.maps())  # ddof=1 of one value is NaN there, 0 here
    np.testing.assert_allclose(maps.maps(), expected, atol=2e-6)
    assert not maps.maps()[:, :, 8].any(), "the sample that never comes"
    if not missing:
        slow = gram(expected.reshape(4, -1), centred=True)
        np.testing.assert_allclose(maps.gram(), slow, rtol=1e-4, atol=1e-5)


def of_full(maps: DataMaps, centred: bool) -> np.ndarray:
    x = maps.maps().reshape(maps.n_tasks, -1).astype(np.longdouble)
    if centred:
        x = x - x.mean(0)
    return (x @ x.T).astype(float)


@pytest.mark.parametrize("block", [1, 1 << 20])
def test_streaming_equals_the_full_maps(monkeypatch, block: int) -> None:
    monkeypatch.setattr("equipoise.grouping.data_maps.BLOCK", block)
    maps = DataMaps(6, 50, [1, 2, 5])
    fill(maps, None, 0, 5)
    for centred in (True, False):
        expected = of_full(maps, centred)
        found = maps.gram(centred=centred).numpy()
        assert abs(found - expected).max() <= 1e-12 * abs(expected).max()


def test_distances_of_nearly_equal_tasks_lose_no_digits() -> None:
    """Maps that differ in the sixth digit: the raw inner products hold ten digits of the rest."""
    maps = DataMaps(2, 1000, [1])
    p = torch.rand(1000, 1, generator=torch.Generator().manual_seed(0)) * 0.5
    maps.update(torch.cat([p, p + 1e-6], 1), torch.arange(1000))
    maps.end_epoch()
    x = maps.maps().reshape(2, -1).astype(np.longdouble)
    expected = float(((x[0] - x[1]) ** 2).sum())
    k = maps.gram().numpy()
    assert k[0, 0] + k[1, 1] - 2 * k[0, 1] == pytest.approx(expected, rel=1e-12)


def test_a_missing_label_is_neutral() -> None:
    """Task 2 knows nothing of sample 1: there it counts as the mean of the other two."""
    maps = DataMaps(3, 2, [1])
    p = torch.tensor([[0.1, 0.3, 0.5], [0.2, 0.8, math.nan]])
    maps.update(p, torch.tensor([0, 1]))
    maps.end_epoch()
    filled = torch.tensor([[0.1, 0.3, 0.5], [0.2, 0.8, 0.5]], dtype=torch.float64)
    x = (filled - filled.mean(1, keepdim=True)).T
    torch.testing.assert_close(maps.gram(), x @ x.T, rtol=1e-6, atol=1e-7)
    assert maps.maps()[2, 0, 1].tolist() == [0, 0]


def test_a_sample_that_no_task_has_seen_changes_nothing() -> None:
    grams = []
    for n in (5, 9):
        maps = DataMaps(3, n, [1])
        maps.update(torch.rand(5, 3, generator=torch.Generator().manual_seed(1)), torch.arange(5))
        maps.end_epoch()
        grams.append(maps.gram())
    torch.testing.assert_close(*grams, rtol=1e-14, atol=0)


def test_opposite_labels_have_equal_maps() -> None:
    """Living and not-living: opposite labels, opposite logits."""
    from equipoise.grouping import find_groups, true_class_probability

    generator = torch.Generator().manual_seed(0)
    maps = DataMaps(4, 40, [1, 3])
    label = torch.randint(2, (40, 4), generator=generator).float()
    label[:, 1] = 1 - label[:, 0]
    for _ in range(3):
        logit = 3 * torch.randn(40, 4, generator=generator)
        logit[:, 1] = -logit[:, 0]
        maps.update(true_class_probability(logit, label), torch.arange(40))
        maps.end_epoch()
    assert np.array_equal(maps.maps()[0], maps.maps()[1])
    found = find_groups(maps.gram(), 2)
    assert torch.equal(found.memberships[0], found.memberships[1])


@settings(max_examples=30)
@given(st.data())
def test_batches_may_be_cut_anywhere(data) -> None:
    n = data.draw(st.integers(1, 30))
    index = torch.tensor(data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n)))
    p = torch.rand(n, 2, generator=torch.Generator().manual_seed(n))
    one, many = DataMaps(2, 5, [1]), DataMaps(2, 5, [1])
    one.update(p, index)
    for i in range(n):
        many.update(p[i : i + 1], index[i : i + 1])
    for name in ("mean", "squares", "count"):
        assert torch.equal(getattr(one, name), getattr(many, name))


# ------------------------------------------------------------------ state and files


@pytest.mark.parametrize("in_file", [False, True])
def test_goes_on_in_the_middle_of_an_epoch(tmp_path: Path, in_file: bool) -> None:
    def made(name: str) -> DataMaps:
        return DataMaps(3, 20, [1, 2, 4], path=tmp_path / name if in_file else None)

    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.rand(6, 3, generator=generator), torch.randint(20, (6,), generator=generator))
        for _ in range(16)
    ]

    def play(maps: DataMaps, steps: range) -> None:
        for i in steps:
            maps.update(*batches[i])
            if i % 4 == 3:
                maps.end_epoch()

    whole = made("whole.npy")
    play(whole, range(16))
    first = made("cut.npy")
    play(first, range(10))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    play(first, range(10, 16))  # what a killed process did after the state was saved
    second = made("cut.npy")
    second.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert second.epoch == 2
    play(second, range(10, 16))
    assert torch.equal(second.gram(), whole.gram())
    assert torch.equal(second.gram(centred=False), whole.gram(centred=False))
    assert np.array_equal(second.maps(), whole.maps())
    assert torch.equal(second.current(), whole.current())


def test_the_state_is_a_copy() -> None:
    maps = of_one([1, 2, 3], epochs=2)
    state = maps.state_dict()
    before = state["mean"].clone()
    maps.update(torch.tensor([[1.0]]), torch.tensor([0]))
    assert torch.equal(state["mean"], before)


def test_full_maps_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "maps.npy"
    maps, kept = DataMaps(2, 5, [1, 2], path=path), DataMaps(2, 5, [1, 2])
    assert maps.maps().shape == (2, 0, 5, 2)
    fill(maps, None, 0, 1)
    fill(kept, None, 0, 1)
    assert not path.exists() and maps.maps().shape == (2, 1, 5, 2)
    fill(maps, None, 1, 1)
    fill(kept, None, 1, 1)
    assert path.exists() and not list(tmp_path.glob("*.partial"))
    assert np.array_equal(np.load(path), kept.maps())
    assert np.array_equal(maps.maps(), kept.maps())
    with pytest.raises(ValueError, match="read-only"):
        kept.maps()[0] = 1
    other = DataMaps(2, 5, [1, 2], path=tmp_path / "elsewhere.npy")
    with pytest.raises(EquipoiseError, match=r"there is no .*elsewhere\.npy"):
        other.load_state_dict(maps.state_dict())
    with pytest.raises(EquipoiseError, match="went to a file"):
        DataMaps(2, 5, [1, 2]).load_state_dict(maps.state_dict())


@pytest.mark.parametrize("kept", [0, 5, 100, 140])
def test_a_file_that_was_cut_short_is_named(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "maps.npy"
    maps = DataMaps(2, 5, [1], path=path)
    fill(maps, None, 0, 1)
    path.write_bytes(path.read_bytes()[:kept])
    for read in (maps.maps, lambda: maps.load_state_dict(maps.state_dict())):
        with pytest.raises(
            EquipoiseError, match=r"maps\.npy is damaged .*record the maps again from"
        ):
            read()


def test_a_checkpoint_that_cannot_be_written_is_not_taken(tmp_path: Path, monkeypatch) -> None:
    """The disk is full in the second of five blocks; then there is room again."""
    monkeypatch.setattr("equipoise.grouping.data_maps.BLOCK", 8)
    maps, kept = (DataMaps(2, 5, [1], path=p) for p in (tmp_path / "maps.npy", None))
    fill(kept, None, 0, 1)
    real, blocks = DataMaps._values, []

    def full(self, block: slice):
        blocks.append(block)
        if len(blocks) == 2:
            raise OSError("No space left on device")
        return real(self, block)

    monkeypatch.setattr(DataMaps, "_values", full)
    with pytest.raises(OSError, match="No space"):
        fill(maps, None, 0, 1)
    assert maps.closed == 0 and not maps.centred.any()
    maps.end_epoch()
    assert torch.equal(maps.gram(), kept.gram()) and np.array_equal(maps.maps(), kept.maps())


def test_large_maps_are_not_kept(monkeypatch) -> None:
    monkeypatch.setattr(full_maps, "SMALL", 100)
    maps = DataMaps(2, 50, [1])
    fill(maps, None, 0, 1)
    with pytest.raises(EquipoiseError, match="clustering needs only gram"):
        maps.maps()
    assert maps.gram().shape == (2, 2)


# ------------------------------------------------------------------ errors


def test_errors_change_nothing() -> None:
    maps = DataMaps(2, 5, [2], tasks=("left", "right"))
    fill(maps, None, 0, 1)
    before = maps.state_dict()
    good = torch.rand(3, 2)
    wrong = [
        (ValueError, r"true_class_probability is \(3, 2\)", good, torch.arange(2)),
        (ValueError, r"give \(B, 2\)", good[:, :1], torch.arange(3)),
        (ValueError, "give whole numbers", good, torch.rand(3)),
        (ValueError, "index 5 is no sample", good, torch.tensor([0, 5, 1])),
        (ValueError, "index -1 is no sample", good, torch.tensor([0, -1, 1])),
        (TaskError, "'right'.*logit", good - torch.tensor([0.0, 1.5]), torch.arange(3)),
    ]
    for error, message, p, index in wrong:
        with pytest.raises(error, match=message):
            maps.update(p, index)
    after = maps.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in ("mean", "squares", "count"))
    maps.update(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))  # an empty batch is none


def test_a_task_without_any_sample() -> None:
    maps = DataMaps(2, 3, [1], tasks=("left", "right"))
    maps.update(torch.tensor([[0.5, math.nan]]), torch.tensor([0]))
    with pytest.raises(TaskError, match="'right': has seen no sample"):
        maps.end_epoch()
    assert maps.epoch == 0


@pytest.mark.parametrize("checkpoints", [[], [0, 1], [2, 2], [3, 1], 5, [1.5], "12"])
def test_impossible_checkpoints(checkpoints) -> None:
    with pytest.raises(ValueError, match="checkpoints"):
        DataMaps(2, 3, checkpoints)


def test_impossible_arguments(tmp_path: Path) -> None:
    for arguments in ({"n_tasks": 0}, {"n_samples": 0}, {"ddof": 2}, {"tasks": ("a",)}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            DataMaps(**{"n_tasks": 2, "n_samples": 3, "checkpoints": [1]} | arguments)
    with pytest.raises(ValueError, match="npy"):
        DataMaps(2, 3, [1], path=tmp_path / "maps.bin")
    with pytest.raises(EquipoiseError, match="no checkpoint has been taken"):
        DataMaps(2, 3, [1]).gram()


def test_a_state_of_something_else_is_refused() -> None:
    maps = of_one([1, 2, 3])
    for other, message in (
        (DataMaps(1, 1, [1, 2]), "checkpoints"),
        (DataMaps(1, 1, [1, 2, 3], ddof=1), "ddof"),
        (DataMaps(1, 2, [1, 2, 3]), "mean is"),
    ):
        with pytest.raises(EquipoiseError, match=message):
            other.load_state_dict(maps.state_dict())
        assert other.epoch == 0 and not other.mean.any()


def test_a_state_knows_its_tasks() -> None:
    state = DataMaps(2, 4, [1], tasks=("a", "b")).state_dict()
    with pytest.raises(EquipoiseError, match=r"state has tasks \['a', 'b'\], not \['b', 'a'\]"):
        DataMaps(2, 4, [1], tasks=("b", "a")).load_state_dict(state)


def test_memory_does_not_grow_with_the_checkpoints(monkeypatch) -> None:
    """12 bytes for each sample and task, and T x T sums."""
    monkeypatch.setattr(full_maps, "SMALL", 0)
    t, n = 3, 1000
    sizes = []
    for checkpoints in (2, 20):
        maps = DataMaps(t, n, range(1, checkpoints + 1))
        for _ in range(checkpoints):
            maps.update(torch.rand(n, t), torch.arange(n))
            maps.end_epoch()
        held = [x for x in vars(maps).values() if isinstance(x, torch.Tensor)]
        assert {id(x) for x in held} == {id(getattr(maps, name)) for name in data_maps.STATE}
        sizes.append(sum(x.numel() * x.element_size() for x in held))
        assert maps._full.kept is None
    assert sizes[0] == sizes[1] == 12 * t * n + 8 * (t * t + t + 1)
