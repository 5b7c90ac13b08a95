"""The processes that train together under torch.distributed; alone, nothing to do.

Each process holds its part of the batch. Losses become those of the joint batch, gradients are
summed over the processes, and of the rows each process keeps one slice of the columns.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from equipoise.engine.layout import Layout
from equipoise.errors import EquipoiseError
from equipoise.linalg import real, shaped


class Ranks:
    """All processes of the default group, or this one alone if there is no group.

    Args:
        together: False: this process alone, whatever group there is.
    """

    def __init__(self, together: bool = True) -> None:
        together = together and dist.is_available() and dist.is_initialized()
        self.size: int = dist.get_world_size() if together else 1
        self.rank: int = dist.get_rank() if together else 0
        # What lies on the CPU travels on the GPU where the backend knows nothing else.
        on_gpu = self.size > 1 and dist.get_backend() == "nccl"
        self._wire = torch.device("cuda", torch.cuda.current_device()) if on_gpu else None

    @property
    def alone(self) -> bool:
        """Whether there is only this process."""
        return self.size == 1

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.alone:
            return tensor
        sent = tensor.to(self._wire) if self._wire else tensor
        dist.all_reduce(sent)
        return sent.to(tensor.device)

    def from_first(self, tensor: Tensor) -> Tensor:
        """What the first process has: for what must be equal to the last bit."""
        if self.alone:
            return tensor
        sent = (tensor.to(self._wire) if self._wire else tensor).contiguous()
        dist.broadcast(sent, 0)
        return sent.to(tensor.device)

    @contextmanager
    def agreeing(self) -> Generator[None]:
        """If the body fails in one process it fails in all, instead of leaving them waiting.

        Raises:
            EquipoiseError: the body has failed, but in another process.
        """
        if self.alone:
            yield
            return
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        failures = self.sum(torch.tensor(float(error is not None), device="cpu"))
        if error is not None:
            raise error
        if failures > 0:
            raise EquipoiseError("another process could not make this step; see its message.")

    def sum_gradients(
        self, gradients: Sequence[Tensor | None], like: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Gradients summed over the processes; None only where no process has one."""
        if self.alone or not like:
            return list(gradients)
        layout, parts = Layout(len(like)), []
        for k, (g, p) in enumerate(zip(gradients, like, strict=True)):
            if g is None:
                g = torch.zeros_like(p)
            else:
                layout.note(k, g)
            parts.append(real(g.to_dense() if g.is_sparse else g).reshape(-1))
        flags = parts[0].new_tensor(layout.flags())
        flat = self.sum(torch.cat([*parts, flags]))
        *pieces, flags = flat.split([part.numel() for part in (*parts, flags)])
        pieces = [shaped(piece, p) for piece, p in zip(pieces, like, strict=True)]
        return layout.gradients(like, pieces, flags.tolist(), self.sum)

    def scatter_sum(self, row: Tensor, out: Tensor) -> None:
        """Sum `row` over the processes and leave this process's slice of it in `out`."""
        # Newer torch has renamed it.
        reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
        reduce_scatter(out, row)

    def own_part(self, row: Tensor, columns: int) -> Tensor:
        """This process's slice of `columns` numbers of a row that is the same on all."""
        if self.alone:
            return row
        return row[self.rank * columns : (self.rank + 1) * columns]

    def gather(self, piece: Tensor) -> Tensor:
        """The slices of all processes, joined along the last dimension."""
        if self.alone:
            return piece
        pieces = [torch.empty_like(piece) for _ in range(self.size)]
        dist.all_gather(pieces, piece.contiguous())
        return torch.cat(pieces, dim=-1)

    def gather_rows(self, rows: Tensor) -> Tensor:
        """The rows of all processes one after the other; each may have another number of them."""
        if self.alone:
            return rows
        sizes = torch.zeros(self.size, dtype=torch.int64, device="cpu")
        sizes[self.rank] = len(rows)
        sizes = self.sum(sizes).tolist()
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        sent = padded.to(self._wire) if self._wire else padded
        pieces = [torch.empty_like(sent) for _ in sizes]
        dist.all_gather(pieces, sent)
        joined = torch.cat([piece[:size] for piece, size in zip(pieces, sizes, strict=True)])
        return joined.to(rows.device)

    def align(self, generators: Iterable[torch.Generator]) -> None:
        """Give private generators the state that they have on the first process."""
        for generator in () if self.alone else generators:
            generator.set_state(self.from_first(generator.get_state()))
