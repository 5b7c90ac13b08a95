"""The models, by name."""

from __future__ import annotations

from collections.abc import Callable

from equipoise.errors import EquipoiseError, nearest
from equipoise.lab.data.base import Data
from equipoise.lab.models.lenet import LeNet, lenet
from equipoise.trunk import SharedTrunk

__all__ = ["MODELS", "LeNet", "ModelError", "build"]

MODELS: dict[str, Callable[[Data], SharedTrunk]] = {"lenet": lenet}
"""Name -> what makes the model for a data set. A new model is one line here."""


class ModelError(EquipoiseError, ValueError):
    """A model that is not known."""


def build(name: str, data: Data) -> SharedTrunk:
    """The model `name` for `data`: a trunk for its inputs, one head for each of its tasks.

    The initial weights come from torch's global generator.

    Raises:
        ModelError: the name is not known.
        ValueError: the model does not take inputs of that shape.
    """
    if name not in MODELS:
        raise ModelError(f"no model {name!r}; {nearest(name, MODELS)}")
    return MODELS[name](data)
