"""Lazy modules get their shapes before the first batch is looked at."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from equipoise.buffers import Buffers, copy_of_buffers, put_back
from equipoise.draws import RandomState
from equipoise.engine.ranks import Ranks
from equipoise.errors import raised_in
from equipoise.kept import Attributes
from equipoise.replay import devices_of, evaluating


class LazyParameters:
    """The parameters and buffers of a network that have no shape yet, as those of LazyLinear.

    Args:
        module: the network.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._all_made = False
        self._buffers: Buffers = []

    def make(self, call: Callable[[], Any], ranks: Ranks) -> None:
        """Give them shapes by one call in evaluation mode, which nothing else notices.

        Afterwards random generators and all other buffers are as before. Parameters are those that
        the first process drew.

        Args:
            call: evaluates the network on a batch.
            ranks: the processes that train together.
        """
        if self._all_made:
            return
        lazy = self._lazy()
        if lazy:
            with ranks.agreeing():
                self._call(call)
            with torch.no_grad():
                for tensor in lazy:
                    if not (ranks.alone or is_lazy(tensor)):
                        tensor.copy_(ranks.from_first(tensor.detach()))
            self._buffers = copy_of_buffers(self._module)
        self._all_made = not self._lazy()

    def _lazy(self) -> list[Tensor]:
        return [t for t in (*self._module.parameters(), *self._module.buffers()) if is_lazy(t)]

    def _call(self, call: Callable[[], Any]) -> None:
        module = self._module
        random, buffers = RandomState(devices_of(module)), copy_of_buffers(module)
        attributes = Attributes(module)
        try:
            with evaluating(module), raised_in("the call that gives lazy modules their shapes"):
                call()
        finally:
            torch.clear_autocast_cache()  # it holds copies that were made without a graph
            put_back(buffers)
            attributes.put_back()
            random.restore()

    @contextmanager
    def unchanged_on_error(self) -> Generator[None]:
        """If the body raises, buffers that it has made are as they were made; shapes stay."""
        try:
            yield
        except BaseException:
            put_back(self._buffers)
            raise
        finally:
            self._buffers = []
