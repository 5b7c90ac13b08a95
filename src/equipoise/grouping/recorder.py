"""Recorder: data maps from the training's own forward passes, or from passes of their own."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from equipoise.engine.ranks import Ranks
from equipoise.engine.targets import labelled, refuse_unknown
from equipoise.errors import EquipoiseError
from equipoise.grouping.data_maps import DataMaps
from equipoise.grouping.scores import Kind, refuse_kind, true_class_probability
from equipoise.replay import RandomState, devices_of, evaluating, frozen_buffers
from equipoise.trunk import SharedTrunk


class Recorder:
    """Writes into data maps what the heads of a model give in training.

    It listens to the first output of each head: with dropout on, and before the batch has changed
    the weights, as STG-MTL's code does. A step with flat regions or trials looks at
    the heads several times; the first time counts.

    Under torch.distributed each process calls it with its part of the batch, and the maps of all
    hold the joint batch.

    Args:
        model: the network that is trained.
        maps: where to.
        kinds: as in `true_class_probability`.
        scales: as in `true_class_probability`.

    Raises:
        ValueError: the maps are for another number of tasks, or name them otherwise.
        TaskError: an unknown kind, or a kind or scale of a task that is not there.

    Example:
        >>> record = Recorder(model, maps)
        >>> for inputs, targets, index in loader:
        ...     with record(targets, index):
        ...         step(inputs, targets)
        >>> maps.end_epoch()
    """

    def __init__(
        self,
        model: SharedTrunk,
        maps: DataMaps,
        kinds: Mapping[str, Kind] | Kind | None = None,
        scales: Mapping[str, float] | float | None = None,
    ) -> None:
        if maps.n_tasks != len(model.tasks):
            raise ValueError(f"maps for {maps.n_tasks} tasks, a model with {len(model.tasks)}.")
        if isinstance(maps.tasks[0], str) and maps.tasks != model.tasks:
            raise ValueError(f"maps of tasks {maps.tasks}, a model with {model.tasks}.")
        refuse_unknown({"kind": kinds, "scale": scales}, model.tasks)
        given = {"all": kinds} if isinstance(kinds, str) else kinds or {}
        for task, kind in given.items():
            refuse_kind(task, kind)
        self.model, self.maps = model, maps
        self.kinds, self.scales = kinds, scales
        self.ranks = Ranks()

    @contextmanager
    def __call__(
        self,
        targets: Mapping[str, Any],
        index: Tensor,
        masks: Mapping[str, Tensor] | None = None,
    ) -> Generator[None]:
        """The body trains on one batch, which is recorded once it has ended without an error.

        Args:
            targets: of the batch, by task name.
            index: (B,) which samples it holds.
            masks: as the step gets them.

        Raises:
            EquipoiseError: no head was called, though there are labels.
            TaskError, ValueError: what `true_class_probability` or `DataMaps.update` refuses.
        """
        refuse_unknown({"target": targets, "mask": masks}, self.model.tasks)
        outputs: dict[str, Tensor] = {}

        def listen(task: str) -> Any:
            def first(module: nn.Module, inputs: Any, output: Any) -> None:
                if task not in outputs:
                    outputs[task] = output.detach()

            return first

        hooks = [head.register_forward_hook(listen(t)) for t, head in self.model.heads.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        with self.ranks.agreeing():
            if not outputs and self._labelled(targets, masks or {}):
                raise EquipoiseError(
                    "no head of the model was called; train on a batch in the body."
                )
            scores = self._scores(outputs, targets, index, masks)
        self._count(scores, index)

    def _labelled(self, targets: Mapping[str, Any], masks: Mapping[str, Tensor]) -> bool:
        """Whether any sample has a label; a step does nothing where none has."""
        keep = (labelled(task, targets[task], masks.get(task), "loss") for task in targets)
        return any(kept is None or bool(kept.any()) for kept in keep)

    def _scores(self, outputs: Any, targets: Any, index: Tensor, masks: Any = None) -> Tensor:
        """(B, T), NaN without a label."""
        if not any(task in targets for task in outputs):
            return torch.full((len(index), self.maps.n_tasks), torch.nan)
        return true_class_probability(
            outputs,
            targets,
            kinds=self.kinds,
            scales=self.scales,
            masks=masks,
            tasks=self.model.tasks,
        )

    def _count(self, scores: Tensor, index: Tensor) -> None:
        """Put the scores of all processes into the maps of each."""
        device = self.maps.mean.device
        index = torch.as_tensor(index).to(device)
        gathered = self.ranks.gather_rows(scores.to(device)), self.ranks.gather_rows(index)
        self.maps.update(*gathered)

    def look(self, batches: Iterable[tuple[Any, Mapping[str, Any], Tensor]]) -> None:
        """A pass of its own over all samples, in evaluation mode, instead of recording in training.

        The model, its modes and buffers, and torch's random generators are afterwards as before.
        The scores count once all batches have been seen: N x T numbers more while it looks.

        Args:
            batches: triples (inputs, targets by task name, indices).
        """
        random = RandomState(devices_of(self.model))
        device = next(iter(self.model.parameters())).device
        nothing = torch.zeros(0, self.maps.n_tasks), torch.zeros(0, dtype=torch.int64)
        seen = [nothing]
        try:
            with (
                self.ranks.agreeing(),
                torch.no_grad(),
                evaluating(self.model),
                frozen_buffers(self.model),
            ):
                for batch in batches:
                    inputs, targets, index = pytree.tree_map(
                        lambda x: x.to(device) if isinstance(x, Tensor) else x, tuple(batch)
                    )
                    refuse_unknown({"target": targets}, self.model.tasks)
                    scores = self._scores(self.model(inputs), targets, index)
                    seen.append((scores.cpu(), torch.as_tensor(index).cpu()))
        finally:
            random.restore()
        self._count(*(torch.cat(parts) for parts in zip(*seen, strict=True)))
