"""What the numbers of a run depend on: its configuration and its environment."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from equipoise.errors import EquipoiseError
from equipoise.lab import data as datasets
from equipoise.lab import models, own_methods, schedules
from equipoise.recipe import Recipe

PACKAGES = ("equipoise", "torch", "numpy", "scipy", "lightning-fabric", "torchmetrics", "pillow")


class ConfigError(EquipoiseError, ValueError):
    """A run that cannot be as it was asked for; one sentence that says what to change."""


class RunConfig(BaseModel):
    """One run: one recipe, one seed. The same configuration gives the same numbers.

    Build it with `RunConfig.of`, which reports a wrong value as a `ConfigError`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    recipe: str
    """Written in the canonical form, whatever was given: "CAGrad+IGBv1" becomes "igbv1+cagrad"."""
    methods: tuple[str, ...] = ()
    """Where the recipe's methods of one's own come from: files by absolute paths, and modules."""
    data: str = "multidigits"
    """With options, if any: "multifashion(train=3000)"; in the canonical form, as `model` too."""
    data_root: str | None = None
    """Folder with the files of the data set; None for a set that comes along."""
    model: str = "lenet"
    epochs: int = Field(15, ge=1)
    batch_size: int = Field(64, ge=1)
    lr: float = Field(3e-3, gt=0, allow_inf_nan=False)
    """Learning rate of the optimizer."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """SGD is plain SGD, without momentum. Line searches that make their own steps always have it,
    and no schedule: they do not use the learning rate."""
    schedule: str = "none"
    """How it changes from epoch to epoch: "halve(every=100)"; in the canonical form."""
    seed: int = Field(0, ge=0, lt=2**63)
    device: str = "auto"
    """"cpu", "cuda" or "cuda:1"; "auto" becomes the one that is there."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    task_weights: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] | None = None
    """Constant factors of the weighted losses, one for each task: those of a specialist."""
    probes: int = Field(16, ge=0)
    """Batches on which conflicts between the tasks are measured after each epoch, at the price of
    one trunk backward a task each; 0: they are not."""
    threads: int = Field(1, ge=1)
    """CPU threads of torch. Part of the configuration, for sums depend on it in the last digit."""

    @model_validator(mode="before")
    @classmethod
    def _load(cls, values: Any) -> Any:
        return {**values, "methods": own_methods.load(values.get("methods"))}

    @field_validator("methods")
    @classmethod
    def _used(cls, methods: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        recipe = info.data.get("recipe")  # not there if it could not be read
        return methods if recipe is None else own_methods.used(recipe, methods)

    @field_validator("recipe")
    @classmethod
    def _canonical(cls, recipe: str) -> str:
        return str(Recipe.parse(recipe))

    @field_validator("data")
    @classmethod
    def _canonical_data(cls, data: str) -> str:
        return datasets.canonical(data)

    @field_validator("model")
    @classmethod
    def _canonical_model(cls, model: str) -> str:
        return models.canonical(model)

    @field_validator("schedule")
    @classmethod
    def _canonical_schedule(cls, schedule: str, info: ValidationInfo) -> str:
        canonical = schedules.canonical(schedule)
        return "none" if _makes_its_own_steps(info) else canonical

    @field_validator("optimizer")
    @classmethod
    def _of_the_recipe(cls, optimizer: str, info: ValidationInfo) -> str:
        return "sgd" if _makes_its_own_steps(info) else optimizer

    @field_validator("data_root")
    @classmethod
    def _exists(cls, data_root: str | None) -> str | None:
        if data_root is not None and not Path(data_root).is_dir():
            raise ValueError(f"there is no folder {data_root}; give another --data-root.")
        return data_root

    @field_validator("device")
    @classmethod
    def _available(cls, device: str) -> str:
        if device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
            raise ValueError(f"device {device!r} is not known; give auto, cpu, cuda or cuda:1.")
        if device != "cpu" and (torch.device(device).index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"device {device!r} is not there; torch sees {torch.cuda.device_count()} CUDA "
                "devices. Give --device cpu."
            )
        return device

    def read_recipe(self) -> Recipe:
        """The recipe, in a process that does not know its methods yet too."""
        own_methods.load(self.methods)
        return Recipe.parse(self.recipe)

    @classmethod
    def of(cls, **values: Any) -> RunConfig:
        """A configuration from its fields.

        Raises:
            ConfigError: a value is not possible; names it.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            raise ConfigError(_sentence(error)) from None


def _makes_its_own_steps(info: ValidationInfo) -> bool:
    recipe = info.data.get("recipe")  # not there if it could not be read
    return recipe is not None and Recipe.parse(recipe).needs_sgd


def refuse_difference(there: Mapping[str, Any], here: Mapping[str, Any], folder: object) -> None:
    """What lies in `folder` can only be gone on with under the configuration that began it.

    A field that an older version did not know has its default value there.

    Raises:
        ConfigError: names the first field that differs, with both values.
    """
    fields = RunConfig.model_construct().model_dump(mode="json", exclude={"recipe"})
    there = {key: there.get(key, fields.get(key)) for key in (*here, *there)}
    for key in (*here, *(key for key in there if key not in here)):
        if there.get(key) != here.get(key):
            raise ConfigError(
                f"{folder} was begun with {key} {there.get(key)!r}, not {here.get(key)!r}; "
                "choose another --out, or remove that folder."
            )


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers of a run may depend on besides its configuration."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cuda": torch.version.cuda,
        "packages": {package: _version(package) for package in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if cause is not None:  # one of our own sentences
        return str(cause)
    name = ".".join(map(str, first["loc"]))
    text = first["msg"]
    return f"{name} is {first['input']!r}: {text[:1].lower()}{text[1:]}."
