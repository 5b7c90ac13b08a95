"""The task gradients of the shared parameters, row by row."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from equipoise.engine.gradients import Gradients
from equipoise.engine.ranks import Ranks
from equipoise.errors import EquipoiseError
from equipoise.linalg import combine_rows, gram_matrix, inner_products


class TakesRows(Protocol):
    """What an evaluation can fill."""

    def clear(self) -> None:
        """Forget what was filled."""

    def add(self, gradients: Sequence[Tensor | None], /) -> None:
        """Take the next row."""


class Rows:
    """The task gradients of the shared parameters: one (T, P) buffer, filled row by row.

    The buffer holds gradients of the raw losses. What multiplies the losses enters the inner
    products and the coefficients (f_i f_j G_ij, f_i c_i), so that it need not be known before the
    backward passes; `multiply` puts it into the buffer, for what looks at the rows themselves.

    Among several processes a row is summed over them as soon as it is filled, and each process
    keeps its slice of P / processes columns only.

    Args:
        parameters: the shared parameters; P counts their numbers.
        n_tasks: T.
        ranks: the processes that train together.

    Attributes:
        factors: (filled,) what the rows in the buffer are still to be multiplied by; None: ones.
        multiplied: (filled,) what they have been multiplied by; None: ones.

    Raises:
        EquipoiseError: the parameters lie on several devices.
    """

    def __init__(self, parameters: Sequence[Tensor], n_tasks: int, ranks: Ranks) -> None:
        devices = {p.device for p in parameters}
        if len(devices) > 1:
            raise EquipoiseError(
                f"the shared parameters lie on several devices ({sorted(map(str, devices))}); "
                "rows need them on one."
            )
        self.parameters = list(parameters)
        self.ranks = ranks
        self._sizes = [p.numel() for p in parameters]
        dtype = _row_dtype(parameters)
        columns = -(-sum(self._sizes) // ranks.size)
        device = devices.pop() if devices else None
        self.buffer = torch.empty(n_tasks, columns, dtype=dtype, device=device)
        self._whole = None if ranks.alone else self.buffer.new_zeros(columns * ranks.size)
        whole_rows = self.buffer if self._whole is None else [self._whole] * n_tasks
        self._views = [self._split(row) for row in whole_rows]
        self.clear()

    def _split(self, row: Tensor) -> list[Tensor]:
        pieces = row[: sum(self._sizes)].split(self._sizes)
        return [piece.view_as(p) for piece, p in zip(pieces, self.parameters, strict=True)]

    def __reduce__(self) -> tuple:
        """Copies and pickles are empty buffers: the views of a pickled one would be no views."""
        return Rows, (self.parameters, len(self.buffer), self.ranks)

    def fit(self, parameters: Sequence[Tensor]) -> bool:
        """Whether this buffer serves for these parameters, as they are now."""
        return (
            len(parameters) == len(self.parameters)
            and all(p is own for p, own in zip(parameters, self.parameters, strict=True))
            and all(p.device == self.buffer.device for p in parameters)
            and _row_dtype(parameters) == self.buffer.dtype
        )

    def clear(self) -> None:
        """Forget which rows were filled and which parameters they reached."""
        self._filled = 0
        self.factors: Tensor | None = None
        self.multiplied: Tensor | None = None
        self._gram: Tensor | None = None  # of what is in the buffer, once it was asked for
        self._version = self.buffer._version
        self._reached = [False] * len(self.parameters)

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Fill the next row; None counts as zeros."""
        for k, view in enumerate(self._views[self._filled]):
            gradient = gradients[k]
            if gradient is None:
                view.zero_()
            else:
                view.copy_(gradient)
                self._reached[k] = True
        if self._whole is not None:
            self.ranks.scatter_sum(self._whole, self.buffer[self._filled])
        self._filled += 1
        self._version = self.buffer._version

    # ------------------------------------------------------------------ sums of several batches

    def begin_sums(self) -> None:
        """From now on each row of the T is a sum, so far of nothing."""
        self.clear()
        self.buffer.zero_()

    def add_to(self, k: int, gradients: Sequence[Tensor | None], factor: float) -> None:
        """Add gradients, times a factor, to row k of all T; None counts as zeros."""
        if self._whole is not None:
            self._whole.zero_()
        for i, view in enumerate(self._views[k]):
            gradient = gradients[i]
            if gradient is not None:
                view.add_(gradient, alpha=factor)
                self._reached[i] = True
        if self._whole is not None:
            self.buffer[k].add_(self._scattered())

    def end_sums(self, which: Sequence[int], totals: Sequence[float]) -> None:
        """Let the rows be those of the sums at positions `which`, divided by these totals."""
        for k, (i, total) in enumerate(zip(which, totals, strict=True)):
            torch.div(self.buffer[i], total, out=self.buffer[k])
        self._filled = len(which)
        self._version = self.buffer._version

    # ------------------------------------------------------------------ what is asked of them

    def refuse_changes(self) -> None:
        """Refuse to go on with rows that somebody has written into since they were filled.

        Raises:
            EquipoiseError: an aggregator has.
        """
        if self.buffer._version != self._version:
            raise EquipoiseError(
                "the aggregator writes into the rows that it is given, but they are still needed; "
                "let it work on rows.clone()."
            )

    def full_row(self, k: int) -> Tensor:
        """(P,) row k on every process."""
        return self.ranks.gather(self.buffer[k])[: sum(self._sizes)]

    def mean(self) -> Tensor:
        """(P,) the mean of the filled rows on every process."""
        if self.factors is None:
            return self.ranks.gather(self.filled.mean(0))[: sum(self._sizes)]
        return self.combine(torch.full_like(self.factors, 1 / self._filled))[: sum(self._sizes)]

    def pieces(self, vector: Tensor) -> list[Tensor]:
        """Views of a vector (P,), shaped as the parameters."""
        return self._split(vector)

    def stay(self, k: int, minus_old: bool) -> None:
        """As `renewed` with the gradient that row k already is."""
        if minus_old:
            self.buffer[k].zero_()
            self._gram = None

    def renew(self, k: int, minus_old: bool) -> None:
        """Row k becomes what `receiving` brings from now on; less the old row, if so."""
        row, self._gram = self.buffer[k], None
        _ = row.neg_() if minus_old else row.zero_()

    @contextmanager
    def receiving(self, k: int, scale: float = 1.0) -> Generator[None]:
        """Row k grows by the gradient that `backward` brings in the body, divided by `scale`.

        The gradients go from the graph to the row one parameter after the other: no second list
        of them is ever held.
        """
        if self._whole is not None:
            self._whole.zero_()
        hooks = [
            parameter.register_post_accumulate_grad_hook(partial(_move, view, 1 / scale))
            for parameter, view in zip(self.parameters, self._views[k], strict=True)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        if self._whole is not None:
            self.buffer[k].add_(self._scattered())

    def _scattered(self) -> Tensor:
        """This process's slice of the sum over all processes of the row that each has filled."""
        assert self._whole is not None
        piece = torch.empty_like(self.buffer[0])
        self.ranks.scatter_sum(self._whole, piece)
        return piece

    @property
    def filled(self) -> Tensor:
        """(filled rows, columns of this process)."""
        return self.buffer[: self._filled]

    def weigh(self, factors: Tensor) -> None:
        """Multiply all rows by factors (filled,), float64 on the CPU, at no cost."""
        if any(factor != 1.0 for factor in factors.tolist()):
            self.factors = factors.detach()

    def multiply(self) -> None:
        """Let the buffer hold the rows as they are, times their factors."""
        if self.factors is not None:
            self.filled.mul_(self.factors.to(self.buffer)[:, None])
            self._gram = None
            self.multiplied, self.factors = self.factors, None
            self._version = self.buffer._version

    def gram(self) -> Tensor:
        """(filled, filled) inner products over all P columns, float64 on the CPU."""
        self._gram = gram = self.ranks.sum(gram_matrix(self.filled)).cpu()  # one copy to the host
        if self.factors is None:
            return gram
        return gram * self.factors * self.factors[:, None]

    def products(self, direction: Tensor, rows: Tensor | None = None) -> Tensor:
        """(filled,) products with a direction (P,), float64 on the CPU.

        Args:
            direction: the same on every process.
            rows: an earlier copy of `filled`; None: the rows as they are.
        """
        rows = self.filled if rows is None else rows
        own = self.ranks.own_part(direction, rows.shape[1])
        found = self.ranks.sum(inner_products(rows[:, : len(own)], own)).cpu()
        return found if self.factors is None else found * self.factors.to(found)

    def joined(self, pieces: Gradients) -> Tensor:
        """(P,) one vector from pieces shaped as the parameters; None is zeros."""
        vector = self.buffer.new_zeros(sum(self._sizes))
        for view, piece in zip(self._split(vector), pieces, strict=True):
            if piece is not None:
                view.copy_(piece)
        return vector

    def combine(self, coefficients: Tensor) -> Tensor:
        """(P,) sum of coefficient times row; precise where large ones cancel, after `gram`."""
        if self.factors is not None:
            coefficients = coefficients * self.factors
        if self._gram is None:
            return self.ranks.gather(coefficients.to(self.buffer) @ self.filled)
        return self.ranks.gather(combine_rows(self.filled, coefficients, self._gram))

    def whole(self) -> Tensor:
        """(filled, P) the rows in full on every process: for what needs more than products."""
        self.multiply()
        return self.ranks.gather(self.filled)[:, : sum(self._sizes)]

    def per_parameter(self, direction: Tensor) -> Gradients:
        """The pieces of a direction, shaped as the parameters; None where no row reached."""
        reached = self.ranks.sum(torch.tensor([float(known) for known in self._reached])).tolist()
        return [
            piece.to(p.dtype) if count > 0 else None
            for piece, p, count in zip(
                self._split(direction), self.parameters, reached, strict=True
            )
        ]


def _move(view: Tensor, factor: float, parameter: Tensor) -> None:
    """Take a gradient that has just come in over to where it belongs."""
    if parameter.grad is not None:
        view.add_(parameter.grad, alpha=factor)
        parameter.grad = None


def _row_dtype(parameters: Sequence[Tensor]) -> torch.dtype:
    """That of the parameters, but single precision for half-precision ones."""
    dtype = torch.float32
    for dtype_of_one in {p.dtype for p in parameters}:
        dtype = torch.promote_types(dtype, dtype_of_one)
    return dtype


def gram_of(losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """(T, T) inner products of the gradients of T losses, of this process, float64 on the CPU.

    Costs T backward passes and T x P numbers.

    Args:
        losses: scalars with a graph, which is kept.
        parameters: by which they are differentiated; zeros where a loss does not reach them.
    """
    rows = Rows(parameters, len(losses), Ranks(together=False))
    for loss in losses:
        rows.add(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True))
    return rows.gram()
