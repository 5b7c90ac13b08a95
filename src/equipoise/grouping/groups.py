"""Groups: tasks by name, and how much each belongs to which group; to and from files."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equipoise.errors import EquipoiseError
from equipoise.files import replacing

TENSORS = ("labels", "memberships", "distances", "centres", "silhouettes")


@dataclass(frozen=True, eq=False)
class Groups:
    """T tasks in m groups. Tensors are float64 on the CPU, in the order of `tasks`.

    Attributes:
        tasks: the names.
        method: how the groups were found.
        labels: (T,) int64, the group of each task (the one to which it belongs most).
        memberships: (T, m) how much each task belongs to each group; rows sum to 1.
        distances: (T, m) from each task's vector to each centre.
        centres: (m, T) each centre as a weighted mean of the tasks' vectors; rows sum to 1.
        silhouettes: (T,) as `silhouette` has them; zeros if there is one group.
        inertia: sum of the squared distances of the tasks to the centre of their group.
    """

    tasks: tuple[str, ...]
    method: str
    labels: Tensor
    memberships: Tensor
    distances: Tensor
    centres: Tensor
    silhouettes: Tensor
    inertia: float

    def __len__(self) -> int:
        """The number of groups, m."""
        return self.memberships.shape[1]

    @property
    def members(self) -> tuple[tuple[str, ...], ...]:
        """The names in each group."""
        return tuple(
            tuple(
                t for t, label in zip(self.tasks, self.labels.tolist(), strict=True) if label == j
            )
            for j in range(len(self))
        )

    def __str__(self) -> str:
        """A line for each group."""
        return "\n".join(f"{j + 1}: {', '.join(names)}" for j, names in enumerate(self.members))

    def to_json(self, path: str | Path) -> None:
        """Write all fields, with all digits, in one go."""
        fields: dict[str, Any] = {"tasks": self.tasks, "method": self.method}
        fields |= {name: getattr(self, name).tolist() for name in TENSORS}
        fields["inertia"] = self.inertia
        with replacing(path) as file:
            file.write((json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode())

    @classmethod
    def from_json(cls, path: str | Path) -> Groups:
        """What `to_json` wrote, bit for bit.

        Raises:
            EquipoiseError: the file holds something else.
        """
        try:
            fields = json.loads(Path(path).read_text(encoding="utf-8"))
            tensors: dict[str, Tensor] = {
                name: torch.tensor(fields[name], dtype=torch.float64) for name in TENSORS
            }
            tensors["labels"] = tensors["labels"].long()
            tasks = tuple(fields["tasks"])
            shape = (len(tasks), tensors["memberships"].shape[-1])
            wanted = {"labels": shape[:1], "centres": shape[::-1], "silhouettes": shape[:1]}
            for name, tensor in tensors.items():
                if tensor.shape != (fits := wanted.get(name, shape)):
                    raise ValueError(f"{name} is {tuple(tensor.shape)}, not {fits}")
            if not all(isinstance(task, str) for task in fields["tasks"]) or isinstance(
                fields["tasks"], str
            ):
                raise ValueError("tasks are no list of names")
            labels = tensors["labels"]
            if not bool(((labels >= 0) & (labels < shape[1])).all()):
                raise ValueError(f"a label is no group: there are {shape[1]}")
            return cls(tasks, fields["method"], inertia=float(fields["inertia"]), **tensors)
        except (ValueError, KeyError, TypeError) as error:
            raise EquipoiseError(f"{path} holds no groups ({error}).") from error

    def to_csv(self, path: str | Path) -> None:
        """Write a line for each task: its name, its group (from 1 on), its memberships."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["task", "group", *(f"membership {j + 1}" for j in range(len(self)))])
        rows = zip(self.tasks, self.labels.tolist(), self.memberships.tolist(), strict=True)
        writer.writerows([task, label + 1, *row] for task, label, row in rows)
        with replacing(path) as file:
            file.write(text.getvalue().encode())
