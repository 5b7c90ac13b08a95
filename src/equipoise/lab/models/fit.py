"""Whether a data set suits a model; what does not is refused before anything is trained."""

from __future__ import annotations

from equipoise.lab.data.base import Data


def images(data: Data, model: str) -> tuple[int, int, int]:
    """(channels, height, width) of the inputs.

    Raises:
        ValueError: they are no images.
    """
    if len(data.input_shape) != 3:
        raise ValueError(
            f"{model} takes images (channels, height, width); {data.name} has inputs of shape "
            f"{data.input_shape}."
        )
    channels, height, width = data.input_shape
    return channels, height, width


def pixelwise(data: Data, model: str) -> None:
    """All tasks want an answer for every pixel.

    Raises:
        ValueError: one does not; names it.
    """
    for task in data.tasks:
        if not task.pixelwise:
            raise ValueError(
                f"task {task.name!r}: {model} gives an answer for every pixel, and {data.name} "
                "wants one for an image; give --model lenet or resnet18."
            )


def samplewise(data: Data, model: str) -> None:
    """All tasks want one answer for a sample.

    Raises:
        ValueError: one wants an answer for every pixel; names it.
    """
    for task in data.tasks:
        if task.pixelwise:
            raise ValueError(
                f"task {task.name!r}: {model} gives one answer for an image, and {data.name} wants "
                "one for every pixel; give --model segnet."
            )
