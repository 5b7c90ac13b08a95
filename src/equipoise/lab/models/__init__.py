"""The models, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from equipoise.errors import EquipoiseError
from equipoise.lab import options
from equipoise.lab.data.base import Data
from equipoise.lab.models.cnn import CNN, cnn
from equipoise.lab.models.lenet import LeNet, lenet
from equipoise.lab.models.mpnn import MPNN, mpnn
from equipoise.lab.models.pspnet import DilatedResNet50, resnet50_pspnet
from equipoise.lab.models.resnet import ResNet18, resnet18
from equipoise.lab.models.segnet import SegNet, segnet, segnet_mtan
from equipoise.text import show
from equipoise.trunk import SharedTrunk

__all__ = [
    "CNN", "MODELS", "MPNN", "DilatedResNet50", "LeNet", "ModelError", "ResNet18", "SegNet",
    "build", "canonical",
]  # fmt: skip

MODELS: dict[str, Callable[..., SharedTrunk]] = {
    "lenet": lenet,
    "cnn": cnn,
    "resnet18": resnet18,
    "resnet50-pspnet": resnet50_pspnet,
    "mpnn": mpnn,
    "segnet": segnet,
    "segnet-mtan": segnet_mtan,
}
"""Name -> `build(data, **options)`: the model for a data set. A new model is one line here."""


class ModelError(EquipoiseError, ValueError):
    """A model that is not known."""


def canonical(text: str) -> str:
    """The canonical form of "name(option=value, ...)", which leaves out what is default.

    Raises:
        ModelError: a name, an option or the type of a value is not known; says what is.
    """
    return show(*options.read(text, MODELS, "model", ModelError))


def build(text: str, data: Data, **more: Any) -> SharedTrunk:
    """The model that `text` names for `data`: a trunk for its inputs, a head for each of its tasks.

    The initial weights come from torch's global generator.

    Args:
        text: one of `MODELS`, with options in parentheses if need be: "resnet18(width=8)".
        data: says what goes in and what comes out.
        more: further options.

    Raises:
        ModelError: what is wrong with the text, see `canonical`.
        ValueError: the model does not take inputs of that shape, or an option has a value with
            which it cannot be made.
    """
    name, given = options.read(text, MODELS, "model", ModelError)
    return MODELS[name](data, **{**given, **more})
