"""The task gradients of the shared parameters, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from equipoise.engine.columns import Columns
from equipoise.engine.gradients import Gradients, add_gradients
from equipoise.engine.layout import Layout
from equipoise.engine.ranks import Ranks
from equipoise.errors import EquipoiseError
from equipoise.linalg import combine_rows, gram_matrix, inner_products, real


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

    Rows are dense and real: a complex number is two columns, and a parameter all of whose gradients
    are sparse gets a sparse one of every direction.

    Args:
        parameters: the shared parameters; P counts their numbers.
        n_tasks: T.
        ranks: the processes that train together.

    Attributes:
        factors: (filled,) what the rows in the buffer are still to be multiplied by; None: ones.
        multiplied: (filled,) what they have been multiplied by; None: ones.

    Raises:
        EquipoiseError: the parameters lie on several devices, or are spread over processes.
    """

    def __init__(self, parameters: Sequence[Tensor], n_tasks: int, ranks: Ranks) -> None:
        self.parameters = list(parameters)
        self.columns = Columns(parameters)
        self.ranks = ranks
        columns = -(-self.columns.total // ranks.size)
        dtype, device = self.columns.dtype, self.columns.device
        self.buffer = torch.empty(n_tasks, columns, dtype=dtype, device=device)
        self._whole = None if ranks.alone else self.buffer.new_zeros(columns * ranks.size)
        whole_rows = self.buffer if self._whole is None else [self._whole] * n_tasks
        self._views = [self.columns.split(row) for row in whole_rows]
        self.clear()

    def __reduce__(self) -> tuple:
        """Copies and pickles are empty buffers: the views of a pickled one would be no views."""
        return Rows, (self.parameters, len(self.buffer), self.ranks)

    def fit(self, parameters: Sequence[Tensor]) -> bool:
        """Whether this buffer serves for these parameters, as they are now."""
        return self.columns.fit(parameters)

    def clear(self) -> None:
        """Forget which rows were filled and which parameters they reached."""
        self._filled = 0
        self.factors: Tensor | None = None
        self.multiplied: Tensor | None = None
        self._gram: Tensor | None = None  # of what is in the buffer, once it was asked for
        self._version = self.buffer._version
        self._layout = Layout(len(self.parameters))

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Fill the next row; None counts as zeros."""
        cleared, filled, dense = [], [], []
        for k, (view, gradient) in enumerate(
            zip(self._views[self._filled], gradients, strict=True)
        ):
            if gradient is not None:
                self._layout.note(k, gradient)
            if gradient is None or gradient.is_sparse:
                cleared.append(view)
            else:
                filled.append(view)
                dense.append(real(gradient))
        if cleared:
            torch._foreach_zero_(cleared)
            self._add_sparse(self._filled, gradients, 1.0)
        if filled:
            torch._foreach_copy_(filled, dense)
        if self._whole is not None:
            self.ranks.scatter_sum(self._whole, self.buffer[self._filled])
        self._filled += 1
        self._version = self.buffer._version

    def _add_sparse(self, k: int, gradients: Sequence[Tensor | None], factor: float) -> None:
        for view, gradient in zip(self._views[k], gradients, strict=True):
            if gradient is not None and gradient.is_sparse:
                view.add_(real(gradient), alpha=factor)

    # ------------------------------------------------------------------ sums of several batches

    def begin_sums(self) -> None:
        """From now on each row of the T is a sum, so far of nothing."""
        self.clear()
        self.buffer.zero_()

    def add_to(self, k: int, gradients: Sequence[Tensor | None], factor: float) -> None:
        """Add gradients, times a factor, to row k of all T; None counts as zeros."""
        if self._whole is not None:
            self._whole.zero_()
        grown, dense = [], []
        for i, (view, gradient) in enumerate(zip(self._views[k], gradients, strict=True)):
            if gradient is not None:
                self._layout.note(i, gradient)
                if not gradient.is_sparse:
                    grown.append(view)
                    dense.append(real(gradient))
        if grown:
            torch._foreach_add_(grown, dense, alpha=factor)
        self._add_sparse(k, gradients, factor)
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
        return self.ranks.gather(self.buffer[k])[: self.columns.total]

    def mean(self) -> Tensor:
        """(P,) the mean of the filled rows on every process."""
        if self.factors is None:
            return self.ranks.gather(self.filled.mean(0))[: self.columns.total]
        return self.combine(torch.full_like(self.factors, 1 / self._filled))[: self.columns.total]

    def pieces(self, vector: Tensor) -> list[Tensor]:
        """The parts of a vector (P,), shaped as the parameters; views where these are real."""
        return self.columns.pieces(vector)

    def stay(self, k: int, minus_old: bool) -> None:
        """As `renew` with the gradient that row k already is."""
        if minus_old:
            self.buffer[k].zero_()
            self._gram = None

    def renew(self, k: int, minus_old: bool) -> None:
        """Row k becomes what `receive` brings from now on; less the old row, if so."""
        row, self._gram = self.buffer[k], None
        _ = row.neg_() if minus_old else row.zero_()

    def receive(
        self,
        k: int,
        loss: Tensor | None,
        seed: Tensor | None,
        also: Sequence[Tensor] = (),
        retain_graph: bool = False,
        scale: float = 1.0,
    ) -> Gradients:
        """Row k grows by the gradient of a loss, divided by `scale`: one backward pass.

        The gradients go from the graph to the row one parameter after the other: no second list
        of them is ever held, unless a parameter has hooks of the user's on what arrives in
        `.grad`, which wait for the final one. What `.grad` holds is there again afterwards.

        Args:
            k: which row.
            loss: a scalar with a graph; None: zeros, for this process has no sample.
            seed: what multiplies the loss.
            also: other parameters.
            retain_graph: whether the graph is kept.
            scale: by what the row's part is divided.

        Returns:
            The gradients of `also`, of this process, not divided.
        """
        if self._whole is not None:
            self._whole.zero_()
        inputs, found = [*self.parameters, *also], [None] * len(also)
        if loss is not None and inputs:
            found = add_gradients(self._views[k], loss, seed, inputs, retain_graph, 1 / scale)
        if self._whole is not None:
            self.buffer[k].add_(self._scattered())
        return found

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
        return self.columns.joined(pieces)

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
        return self.ranks.gather(self.filled)[:, : self.columns.total]

    def per_parameter(self, direction: Tensor) -> Gradients:
        """The pieces of a direction, shaped as the parameters; None where no row reached."""
        flags = torch.tensor(self._layout.flags(), dtype=torch.float64, device="cpu")
        pieces = self.pieces(direction)
        summed = self.ranks.sum(flags).tolist()
        return self._layout.gradients(self.parameters, pieces, summed, self.ranks.sum)


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
