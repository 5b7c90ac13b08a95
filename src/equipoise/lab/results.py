"""result.json: what a finished run leaves of its numbers."""

from __future__ import annotations

from typing import Any, TypedDict

from equipoise.lab.evaluation import Values
from equipoise.lab.tasks import Task


class Result(TypedDict):
    """What result.json holds.

    `val` and `test` are those of the best epoch: by `delta_m` on `val` where the data set has
    published single-task numbers, else by `score`.
    """

    recipe: str
    seed: int
    data: str
    model: str
    sizes: dict[str, int]
    tasks: list[dict[str, Any]]
    baseline: dict[str, Any] | None
    epochs: int
    best_epoch: int | dict[str, int]
    val: Values
    test: Values
    train_seconds: float
    parameters: int
    finished: str


def described(task: Task) -> dict[str, Any]:
    """An entry of `tasks`."""
    return {
        "name": task.name,
        "kind": task.kind,
        "measures": [
            {
                "name": measure.name,
                "higher_is_better": measure.higher_is_better,
                "unit": measure.unit,
                "share": measure.share,
            }
            for measure in task.measures
        ],
    }


def upgraded(result: Any) -> Any:
    """A result as it is written now, also if a version up to 0.2 wrote it.

    They had one number a task in `val` and `test`, and described its measure in the task itself.
    What is neither is given back as it is: whoever reads it says what is wrong.
    """
    try:
        names = {task["name"]: task["metric"] for task in result["tasks"]}
        tasks = [
            {
                "name": task["name"],
                "kind": task["kind"],
                "measures": [
                    {
                        "name": task["metric"],
                        "higher_is_better": task["higher_is_better"],
                        "unit": task["unit"],
                        "share": task["metric"] == "accuracy",
                    }
                ],
            }
            for task in result["tasks"]
        ]
        values = {
            split: {name: {names[name]: value} for name, value in result[split].items()}
            for split in ("val", "test")
        }
    except (KeyError, TypeError, AttributeError):
        return result
    return {**result, "tasks": tasks, **values}
