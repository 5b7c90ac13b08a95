"""Specialists: one multi-task network for each group, and what they say together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from equipoise.errors import EquipoiseError, TaskError
from equipoise.files import replacing
from equipoise.grouping.groups import Groups
from equipoise.grouping.scores import KINDS, Kind
from equipoise.recipe import Recipe
from equipoise.replay import evaluating
from equipoise.step import Step
from equipoise.trunk import SharedTrunk, outputs_of

Combine = Literal["probabilities", "logits"]
FORMAT = 1


class Specialists(nn.Module):
    """A network for each group of tasks, and their ensemble (STG-MTL, section 3.4, eq. 3-4).

    Network j is trained on all tasks with the loss sum_i w_ij L_i; the output for task i is
    sum_j w_ij O_ij. A network of membership 0 for a task is not asked.

    Args:
        models: m networks with the same tasks, one for each group.
        memberships: Groups, or (T, m) with rows that sum to 1.
        kinds: task name -> "binary", "classification" or "regression", or one for all. A task
            without: binary if its head gives one number for a sample, else classification.
        combine: "probabilities": O are probabilities; "logits": O are logits, and what is summed
            becomes a probability afterwards, as STG-MTL's code has it. The estimates of a
            regression are summed either way.

    Raises:
        ValueError: not a network of its own for each group, other tasks, rows that do not sum to 1.

    Called, it gives for each task what a head would give: logits, whose sigmoid or softmax is the
    ensemble's probability, so all that measures a SharedTrunk's outputs measures these.
    """

    def __init__(
        self,
        models: Sequence[SharedTrunk],
        memberships: Groups | Tensor,
        kinds: Mapping[str, Kind] | Kind | None = None,
        combine: Combine = "probabilities",
    ) -> None:
        super().__init__()
        if isinstance(memberships, Groups):
            if models and memberships.tasks != models[0].tasks:
                raise ValueError(f"groups of {memberships.tasks}, models of {models[0].tasks}.")
            memberships = memberships.memberships
        w = torch.as_tensor(memberships, dtype=torch.float64).detach().cpu().clone()
        if combine not in get_args(Combine):
            raise ValueError(f"combine is {combine!r}; give 'probabilities' or 'logits'.")
        if not models or w.shape != (len(models[0].tasks), len(models)):
            raise ValueError(
                f"memberships are {tuple(w.shape)} for {len(models)} models; give (T, models)."
            )
        if len(set(map(id, models))) < len(models):
            raise ValueError("the models are one and the same; make a network for each group.")
        if any(model.tasks != models[0].tasks for model in models):
            raise ValueError("the models have different tasks, or in another order.")
        if not bool((w >= 0).all()) or float((w.sum(1) - 1).abs().max()) > 1e-6:
            raise ValueError("memberships must not be negative, and each row must sum to 1.")
        self.networks = nn.ModuleList(models)
        self.memberships = w  # no buffer: it stays float64 on the CPU wherever the networks go
        self.tasks = models[0].tasks
        self.combine = combine
        self.kinds: dict[str, str] = {}
        given = dict.fromkeys(self.tasks, kinds) if isinstance(kinds, str) else dict(kinds or {})
        for task, kind in given.items():
            if task not in self.tasks or kind not in KINDS:
                raise TaskError(task, f"kind {kind!r}: no such task, or none of {KINDS}.")
            self.kinds[task] = str(kind)

    @property
    def models(self) -> list[SharedTrunk]:
        """The m networks."""
        return cast(list[SharedTrunk], list(self.networks))

    def steps(
        self,
        recipe: Recipe | str,
        losses: Mapping[str, Callable[[Any, Any], Tensor]],
        lr: float,
        steps_per_epoch: int,
        *,
        scale_to_mean_one: bool = False,
        **more: Any,
    ) -> list[Step]:
        """A training step for each network, in which its memberships weigh the losses.

        They multiply what the recipe's weighting makes of the losses (see Fixed). A task that does
        not belong to a group at all takes no part in the training of its network. The networks have
        nothing in common, so they may be trained in any order, or side by side.

        Args:
            recipe: any but stl.
            losses: task name -> callable(output, target).
            lr: learning rate.
            steps_per_epoch: batches in one epoch.
            scale_to_mean_one: False: the memberships as they are, so a group of few tasks has a
                small loss (the paper); True: scaled to mean 1 over the tasks of each network.
            more: what Recipe.build takes besides; `seed` counts up from network to network.

        Raises:
            EquipoiseError: a group to which no task belongs, or the recipe stl.
        """
        recipe = Recipe.parse(recipe) if isinstance(recipe, str) else recipe
        if recipe.is_stl:
            raise EquipoiseError("stl trains tasks apart, and has no use for groups; use 'ew'.")
        built = []
        for j, model in enumerate(self.models):
            weights = self.memberships[:, j]
            if not bool(weights.any()):
                raise EquipoiseError(f"no task belongs to group {j + 1}; use fewer groups.")
            if scale_to_mean_one:
                weights = weights * len(weights) / weights.sum()
            own = more if more.get("seed") is None else more | {"seed": more["seed"] + j}
            built.append(
                recipe.build(model, losses, lr, steps_per_epoch, task_weights=weights, **own)
            )
        return built

    # ------------------------------------------------------------------ together

    def forward(self, inputs: Any) -> dict[str, Tensor]:
        """Task name -> logits of the ensemble in the shape of the head's, or estimates."""
        outputs: dict[str, list[tuple[float, Tensor]]] = {task: [] for task in self.tasks}
        for j, model in enumerate(self.models):
            weights = self.memberships[:, j].tolist()
            if not any(weights):
                continue
            output_of = outputs_of(model, inputs)
            for task, w in zip(self.tasks, weights, strict=True):
                if w:
                    outputs[task].append((w, output_of(task)))
        return {task: self._together(task, said) for task, said in outputs.items()}

    def _together(self, task: str, said: list[tuple[float, Tensor]]) -> Tensor:
        kind = self._kind(task, said[0][1])
        if len(said) == 1:
            return said[0][1]
        weights, outputs = zip(*said, strict=True)
        if kind == "regression" or self.combine == "logits":
            return sum((w * o for w, o in said), torch.zeros_like(outputs[0]))
        # In logarithms, so that the ensemble's logits stay finite.
        logs = torch.tensor(weights).log().tolist()
        pairs = list(zip(logs, outputs, strict=True))
        if kind == "classification":
            return torch.stack([w + F.log_softmax(o, 1) for w, o in pairs]).logsumexp(0)
        yes = torch.stack([w + F.logsigmoid(o) for w, o in pairs]).logsumexp(0)
        no = torch.stack([w + F.logsigmoid(-o) for w, o in pairs]).logsumexp(0)
        return yes - no

    def _kind(self, task: str, output: Tensor) -> str:
        one = output.dim() == 1 or output.shape[1] == 1
        return self.kinds.get(task, "binary" if one else "classification")

    @torch.no_grad()
    def probabilities(self, inputs: Any) -> dict[str, Tensor]:
        """Task name -> probability of yes, or of each class; a regression's estimate as it is."""
        with evaluating(self):
            outputs = self(inputs)
        return {task: self._probability(task, output) for task, output in outputs.items()}

    def _probability(self, task: str, output: Tensor) -> Tensor:
        kind = self._kind(task, output)
        if kind == "regression":
            return output
        return output.sigmoid() if kind == "binary" else output.softmax(1)

    def predict(self, inputs: Any) -> dict[str, Tensor]:
        """Task name -> what the ensemble says of each sample of a batch, in evaluation mode.

        Binary: 1 where the probability is above 1/2, else 0, in the shape of the head's output;
        classification: the number of the likeliest class; regression: the estimate.
        """
        found = {}
        for task, p in self.probabilities(inputs).items():
            kind = self._kind(task, p)
            found[task] = (
                (p > 0.5).long() if kind == "binary" else p if kind == "regression" else p.argmax(1)
            )
        return found

    def predict_one(self, sample: Any) -> dict[str, Any]:
        """Task name -> what the ensemble says of one input, without a batch dimension.

        Numbers for heads with one answer to a sample, tensors for others.
        """
        batch = pytree.tree_map(lambda x: x[None] if isinstance(x, Tensor) else x, sample)
        found = self.predict(batch)
        return {t: x[0].item() if x[0].numel() == 1 else x[0] for t, x in found.items()}

    # ------------------------------------------------------------------ files

    def get_extra_state(self) -> dict[str, Tensor]:
        """The memberships, for `state_dict`."""
        return {"memberships": self.memberships}

    def set_extra_state(self, state: Any) -> None:
        """Restore them from `state_dict`."""
        w = state["memberships"].cpu()
        if w.shape != self.memberships.shape:
            raise EquipoiseError(
                f"the state has memberships {tuple(w.shape)}, not {tuple(self.memberships.shape)}."
            )
        self.memberships = w

    def save(self, path: str | Path) -> None:
        """Write networks, memberships and all that prediction needs to one file, in one go."""
        content = {
            "format": FORMAT,
            "tasks": list(self.tasks),
            "kinds": self.kinds,
            "combine": self.combine,
            "state": self.state_dict(),
        }
        with replacing(path) as file:
            torch.save(content, file)

    @classmethod
    def load(
        cls,
        path: str | Path,
        make_model: Callable[[], SharedTrunk],
        device: torch.device | str = "cpu",
    ) -> Specialists:
        """What `save` wrote. Nothing in the file is executed.

        Args:
            path: the file.
            make_model: makes one network, of the same kind as those that were saved.
            device: where the networks come to lie.

        Raises:
            EquipoiseError: the file holds no specialists, or those of other networks.
        """
        device = torch.device(device)
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            w, tasks = content["state"]["_extra_state"]["memberships"], content["tasks"]
            if content["format"] != FORMAT:
                raise EquipoiseError(f"{path} has the format {content['format']}, not {FORMAT}.")
        except (EquipoiseError, FileNotFoundError, IsADirectoryError, PermissionError):
            raise
        except Exception as error:  # whatever torch makes of a file that is none of ours
            raise EquipoiseError(f"{path} holds no specialists, or is damaged.") from error
        models = [make_model() for _ in range(w.shape[1])]
        if list(models[0].tasks) != tasks:
            raise EquipoiseError(f"{path} has tasks {tasks}, not {list(models[0].tasks)}.")
        found = cls(models, w, content["kinds"], content["combine"])
        try:
            found.load_state_dict(content["state"])
        except RuntimeError as error:
            raise EquipoiseError(f"{path} holds other networks than make_model's.") from error
        return found.to(device)
