"""How much of a model's performance survives noise on its parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from equipoise.diagnostics.evaluation import (
    Batches,
    Evaluation,
    Function,
    ascending,
    at_least,
    chosen,
    evaluation,
    private,
)
from equipoise.diagnostics.relative import MeasureError
from equipoise.errors import TaskError, nearest
from equipoise.trunk import SharedTrunk


@dataclass(frozen=True, eq=False)
class NoiseRobustness:
    """Scores under noise of growing length. Tensors are float64 on the CPU.

    Attributes:
        tasks: the T task names.
        radii: (R,) lengths r of the noise, in the units of the parameters.
        relative_radii: (R,) r / |theta|, theta all trainable parameters.
        clean: (T,) scores without noise; NaN for a task without a label.
        values: (R, D, T) scores of the D draws.
    """

    tasks: tuple[str, ...]
    radii: Tensor
    relative_radii: Tensor
    clean: Tensor
    values: Tensor

    @property
    def mean(self) -> Tensor:
        """(R, T) mean over the draws."""
        return self.values.mean(1)

    @property
    def std(self) -> Tensor:
        """(R, T) standard deviation over the draws, divided by D - 1; NaN for one draw."""
        if self.values.shape[1] == 1:
            return torch.full_like(self.mean, torch.nan)
        return self.values.std(1)

    def radius(self, share: float = 0.5, *, chance: float | Mapping[str, float]) -> Tensor:
        """The radius up to which a task keeps `share` of its advantage over chance.

        Where the mean score, linear between the radii and from `clean` at 0, first falls below
        chance + share (clean - chance). Scores are higher when better.

        Args:
            share: of the advantage, in (0, 1].
            chance: the score of guessing: one for all tasks, or task name -> score.

        Returns:
            (T,) radii. The largest that was tried where the score never falls so low: more was
            not measured. NaN for a task that is no better than chance, or has no label.

        Raises:
            MeasureError: `share` outside of (0, 1].
            TaskError: no chance for a task, or one for a task that was not measured.
        """
        if not 0 < share <= 1:
            raise MeasureError(f"share is {share}; it must lie in (0, 1].")
        guesses = self._per_task(chance)
        radii = [0.0, *self.radii.tolist()]
        curves = torch.cat([self.clean[None], self.mean]).T.tolist()
        return torch.tensor(
            [
                _kept(radii, curve, guess + share * (curve[0] - guess))
                if curve[0] > guess
                else math.nan
                for curve, guess in zip(curves, guesses, strict=True)
            ],
            dtype=torch.float64,
        )

    def _per_task(self, chance: float | Mapping[str, float]) -> list[float]:
        if not isinstance(chance, Mapping):
            return [float(chance)] * len(self.tasks)
        for task in chance:
            if task not in self.tasks:
                problem = "has a chance, but no such task was measured; "
                raise TaskError(str(task), problem + nearest(str(task), self.tasks))
        for task in self.tasks:
            if task not in chance:
                raise TaskError(task, "has no chance; give the score of guessing for every task.")
        return [float(chance[task]) for task in self.tasks]


def noise_robustness(
    model: SharedTrunk,
    batches: Batches,
    measures: Mapping[str, Function],
    radii: Iterable[float],
    draws: int = 10,
    generator: torch.Generator | None = None,
) -> NoiseRobustness:
    """Scores of a model whose parameters are moved by noise of a given length.

    eps = r xi / |xi|, with xi from N(0, I) over all trainable parameters of trunk and heads
    together; buffers (running statistics) stay. Drawn by Phan et al. (arXiv 2211.13723, section
    5.3, figure 4) for r up to 1000. How large a radius is depends on the number and the length of
    the parameters, so compare models of one architecture, or by `relative_radii`.

    Draw k has the same direction xi at all radii, so that its scores follow one straight line
    from the model, and mean curves are smooth; the radii are not independent of one another.

    Args:
        model: in any mode; it is looked at in evaluation mode, and stays as it is.
        batches: pairs (inputs, targets by task name), gone through 1 + R D times; no iterator.
            Samples whose target is wholly NaN are left out of their task.
        measures: task name -> callable(output, target) -> mean over the samples it is given, for
            example `accuracy`; tasks may be left out.
        radii: R radii from 0 up, ascending.
        draws: the number D of directions.
        generator: a CPU generator for the directions; None: the same ones each time.

    Raises:
        TaskError: an unknown task, or a measure that is not a scalar.
        MeasureError: wrong radii or draws, no measure, no trainable parameter, an iterator, or
            no batch.

    Passes: 1 + R D forwards over the batches. Memory: twice the parameters.
    """
    at_least(draws, 1, "draws")
    lengths = ascending(radii)
    generator = private(generator)
    functions = {task: measures[task] for task in chosen(model, measures, "measures")}
    with evaluation(model, batches) as looking:
        size = _length(looking.parameters)
        if not looking.parameters:
            raise MeasureError("the model has no trainable parameter to put noise on.")
        clean = looking.means(functions)
        values = clean.repeat(len(lengths), draws, 1)
        for draw in range(draws):
            direction = _direction(looking, generator)
            for k, radius in enumerate(lengths.tolist()):
                if radius:
                    looking.move((p, radius * unit) for p, unit in direction.items())
                    values[k, draw] = looking.means(functions)
    return NoiseRobustness(
        tasks=tuple(functions),
        radii=lengths,
        relative_radii=lengths / size,
        clean=clean,
        values=values,
    )


def _direction(looking: Evaluation, generator: torch.Generator) -> dict[nn.Parameter, Tensor]:
    """xi / |xi| by parameter."""
    drawn = {
        # In double precision on the CPU: the same for every device and dtype.
        p: torch.randn(p.shape, generator=generator, dtype=torch.float64)
        for p in looking.parameters
    }
    length = _length(drawn.values())
    return {p: (xi / length).to(p.device, p.dtype) for p, xi in drawn.items()}


def _length(tensors: Iterable[Tensor]) -> float:
    """The Euclidean norm of all together, in double precision."""
    return math.sqrt(sum(float(x.detach().cpu().double().square().sum()) for x in tensors))


def _kept(radii: list[float], curve: list[float], level: float) -> float:
    """Where a curve that begins at or above `level` first falls below it; the end if never."""
    for k in range(1, len(radii)):
        high, low = curve[k - 1], curve[k]
        if low < level:
            return radii[k - 1] + (radii[k] - radii[k - 1]) * (high - level) / (high - low)
        if math.isnan(low):  # nothing is kept there, nor can be interpolated
            return radii[k - 1]
    return radii[-1]
