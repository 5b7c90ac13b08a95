"""DataMaps: how sure a network was of each training sample, task by task, over the epochs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from equipoise.errors import EquipoiseError, TaskError
from equipoise.grouping.full_maps import FullMaps

BLOCK = 1 << 18
"""Numbers that are held in double precision at a time."""

STATE = ("mean", "squares", "count", "centred", "along", "level")


class DataMaps:
    """Data maps of many tasks in one training (STG-MTL, arXiv 2307.03374, section 3.2).

    For task i and training sample q, p(e) is the probability of the true class in epoch e. A map
    holds mu, its mean over the epochs, and sigma, its standard deviation: confidence and
    variability. It is taken at checkpoints, each over all epochs from the first on. The vector of
    a task is all its maps one after the other; clustering needs only the inner products of these
    vectors, which are added up when a checkpoint closes.

    Args:
        n_tasks: T.
        n_samples: N; samples are known by their index, 0 .. N - 1.
        checkpoints: numbers of finished epochs, increasing, at which maps are taken.
        ddof: sigma divides by the number of epochs minus this; 0 is the definition of dataset
            cartography, 1 what STG-MTL's code does. Where nothing would be left, sigma is 0.
        path: a .npy file for the full maps; None: they are kept while they are small (see `maps`).
        tasks: names of the tasks, for errors; None: their positions.
        device: where running values lie; the CPU, unless given.

    Raises:
        ValueError: a number out of its range.

    A sample that a task has not seen, for want of a label, has mu = sigma = 0 in `maps`. It is
    left out of the inner products: there the task counts as the mean of the tasks that have seen
    it, and a sample that no task has seen counts for none.

    In several processes each wants the probabilities and indices of all, as `Recorder` gives them.

    Memory: 12 N T bytes whatever the number of checkpoints, and the full maps where they are kept.
    """

    def __init__(
        self,
        n_tasks: int,
        n_samples: int,
        checkpoints: Sequence[int],
        ddof: int = 0,
        *,
        path: str | Path | None = None,
        tasks: Sequence[str] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value in (("n_tasks", n_tasks), ("n_samples", n_samples)):
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{name} is {value!r}; give a whole number from 1 on.")
        self.checkpoints = _checked(checkpoints)
        if ddof not in (0, 1):
            raise ValueError(f"ddof is {ddof}; give 0 or 1.")
        if tasks is not None and len(tasks) != n_tasks:
            raise ValueError(f"tasks has {len(tasks)} names, but n_tasks is {n_tasks}.")
        self.n_tasks, self.n_samples, self.ddof = n_tasks, n_samples, ddof
        self.tasks: tuple[int | str, ...] = tuple(range(n_tasks) if tasks is None else tasks)
        self.epoch = 0
        shape = (n_samples, n_tasks)  # what a batch touches of a sample lies together
        self.mean = torch.zeros(shape, device=device)
        self.squares = torch.zeros(shape, device=device)
        self.count = torch.zeros(shape, dtype=torch.int32, device=device)
        self.centred = torch.zeros(n_tasks, n_tasks, dtype=torch.float64)
        self.along = torch.zeros(n_tasks, dtype=torch.float64)
        self.level = torch.zeros((), dtype=torch.float64)
        self._full = FullMaps((n_tasks, len(self.checkpoints), n_samples, 2), path)

    # ------------------------------------------------------------------ recording

    def update(self, true_class_probability: Tensor, index: Tensor) -> None:
        """Count one batch, by Welford's formulas in float32.

        Args:
            true_class_probability: (B, T) in [0, 1]; NaN where a task has no label.
            index: (B,) whole numbers, which samples they are; one that comes twice counts twice.

        Raises:
            ValueError: shapes that do not fit, an index that no sample has.
            TaskError: a value outside [0, 1].
        """
        index = torch.as_tensor(index).to(self.mean.device)
        p = torch.as_tensor(true_class_probability).detach().to(self.mean)
        if index.dim() != 1 or p.shape != (len(index), self.n_tasks):
            raise ValueError(
                f"true_class_probability is {tuple(p.shape)} and index {tuple(index.shape)}; give "
                f"(B, {self.n_tasks}) and (B,)."
            )
        if index.is_floating_point() or index.dtype == torch.bool:
            raise ValueError(f"index is {index.dtype}; give whole numbers.")
        if not len(index):
            return
        index = index.long()
        ordered, order = index.sort(stable=True)
        first, last = int(ordered[0]), int(ordered[-1])
        if first < 0 or last >= self.n_samples:
            wrong = first if first < 0 else last
            raise ValueError(f"index {wrong} is no sample: there are {self.n_samples}, from 0 on.")
        wrong = (p < 0) | (p > 1)
        if bool(wrong.any()):
            b, i = wrong.nonzero()[0].tolist()
            raise TaskError(
                self.tasks[i], f"probability {float(p[b, i]):g} is outside [0, 1]; was it a logit?"
            )
        repeated = ordered[1:] == ordered[:-1]
        if not bool(repeated.any()):
            self._count(index, p)
            return
        # The k-th time that a sample comes is counted in round k.
        where = torch.arange(len(index), device=index.device)
        start = torch.where(torch.cat([repeated.new_zeros(1), repeated]), 0, where)
        turn = where - start.cummax(0).values
        for k in range(int(turn.max()) + 1):
            chosen = order[turn == k]
            self._count(index[chosen], p[chosen])

    def _count(self, index: Tensor, p: Tensor) -> None:
        """One value for each of several samples, none of them twice."""
        known = ~p.isnan()
        count = self.count[index] + known
        mean = self.mean[index]
        delta = torch.where(known, p - mean, 0.0)
        mean += delta / count.clamp_min(1)
        self.squares[index] += torch.where(known, delta * (p - mean), 0.0)
        self.mean[index] = mean
        self.count[index] = count

    def end_epoch(self) -> None:
        """One epoch is over; at a checkpoint its maps are taken.

        Raises:
            TaskError: a task has seen no sample by its first checkpoint.
        """
        if self.epoch + 1 in self.checkpoints:
            seen = (self.count > 0).any(0)
            if not bool(seen.all()):
                i = int((~seen).nonzero()[0])
                raise TaskError(
                    self.tasks[i], "has seen no sample by this checkpoint; call update in training."
                )
            self._close()
        self.epoch += 1

    def _close(self) -> None:
        """Take this checkpoint's maps, a block of samples at a time; all of them or none."""
        size = max(1, BLOCK // (4 * self.n_tasks))
        sums = self.centred.clone(), self.along.clone(), self.level.clone()
        with self._full.writing(self.checkpoints.index(self.epoch + 1)) as full:
            for start in range(0, self.n_samples, size):
                block = slice(start, start + size)
                values, seen = self._values(block)
                if full is not None:
                    full[:, block] = values.transpose(0, 1).cpu().numpy()
                _add(sums, values.cpu().to(torch.float64), seen.cpu().unsqueeze(-1))
        self.centred, self.along, self.level = sums

    def _values(self, block: slice) -> tuple[Tensor, Tensor]:
        """(b, T, 2) mu and sigma of some samples as they are now; (b, T) which have been seen."""
        count = self.count[block]
        degrees = count - self.ddof
        sigma = torch.where(degrees > 0, self.squares[block] / degrees.clamp_min(1), 0.0).sqrt()
        return torch.stack([self.mean[block], sigma], -1), count > 0

    # ------------------------------------------------------------------ what was recorded

    @property
    def closed(self) -> int:
        """The number of checkpoints that have been taken."""
        return sum(checkpoint <= self.epoch for checkpoint in self.checkpoints)

    def gram(self, *, centred: bool = True) -> Tensor:
        """(T, T) float64 inner products of the task vectors, over the checkpoints taken so far.

        Args:
            centred: of the vectors minus their mean over the tasks, by which no distance changes;
                this is what clustering wants. False: of the vectors themselves.

        Raises:
            EquipoiseError: no checkpoint has been taken yet.
        """
        if not self.closed:
            raise EquipoiseError(
                f"no checkpoint has been taken: {self.epoch} epochs are over, the first comes "
                f"after {self.checkpoints[0]}. Call end_epoch after each epoch."
            )
        if centred:
            return self.centred.clone()
        return self.centred + self.along + self.along[:, None] + self.level

    def current(self) -> Tensor:
        """(T, N, 2) float32 mu and sigma over the epochs so far; 0 where nothing was seen."""
        return self._values(slice(None))[0].transpose(0, 1)

    def maps(self) -> np.ndarray:
        """The full maps of the checkpoints taken so far: (T, checkpoints, N, 2) float32.

        With `path` they lie in that file, complete from the last checkpoint on (before, in one
        named .partial), and what is returned is mapped into memory, read-only. Without, they are
        kept as long as they take up to 64 MiB, all checkpoints together.

        Raises:
            EquipoiseError: they were not kept.
        """
        return self._full.read(self.closed)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """A copy of all that what follows depends on; the full maps in `path` stay there."""
        state: dict[str, Any] = {name: getattr(self, name).clone() for name in STATE}
        kept = self._full.kept
        return state | {
            "epoch": self.epoch,
            "tasks": list(self.tasks),
            "checkpoints": list(self.checkpoints),
            "ddof": self.ddof,
            "kept": None if kept is None else torch.from_numpy(kept[:, : self.closed].copy()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, in the middle of an epoch if need be.

        Raises:
            EquipoiseError: the state is of other tasks, samples, checkpoints, or `ddof`; nothing
                has changed then.
        """
        for what in ("tasks", "checkpoints", "ddof"):
            mine = getattr(self, what)
            mine = list(mine) if isinstance(mine, tuple) else mine
            if state.get(what, mine) != mine:
                raise EquipoiseError(f"the state has {what} {state.get(what)}, not {mine}.")
        for name in STATE:
            if state[name].shape != getattr(self, name).shape:
                raise EquipoiseError(
                    f"the state's {name} is {tuple(state[name].shape)}, not "
                    f"{tuple(getattr(self, name).shape)}: it is of other tasks or samples."
                )
        closed = sum(checkpoint <= state["epoch"] for checkpoint in self.checkpoints)
        self._full.resume(closed, state["kept"])
        for name in STATE:
            getattr(self, name).copy_(state[name])
        self.epoch = int(state["epoch"])


def _add(sums: tuple[Tensor, Tensor, Tensor], values: Tensor, known: Tensor) -> None:
    """Add the inner products of (b, T, 2) values, where they are known."""
    centred, along, total = sums
    # Centred over tasks first: distances between tasks then lose no digits.
    level = values.sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp_min(1)
    vectors = torch.where(known, values - level, 0.0).transpose(0, 1).flatten(1)
    level = level.flatten()
    centred.addmm_(vectors, vectors.T)
    along += vectors @ level
    total += level @ level


def _checked(checkpoints: Sequence[int]) -> tuple[int, ...]:
    found = tuple(checkpoints) if isinstance(checkpoints, Iterable) else ()
    whole = all(isinstance(c, Integral) for c in found)
    if not found or not whole or not all(a < b for a, b in zip((0, *found), found, strict=False)):
        raise ValueError(
            f"checkpoints is {checkpoints!r}; give increasing numbers of finished epochs, for "
            "example (5, 10, 20)."
        )
    return tuple(int(c) for c in found)
