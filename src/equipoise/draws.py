"""The global random generators that a forward pass may draw from: torch's, Python's and numpy's.

Generators of a network's own are not known here, and are not repeated.
"""

from __future__ import annotations

import ctypes
import math
import random
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

PythonState = tuple[Any, ...]
NumpyState = dict[str, Any]


class RandomState:
    """The state of the global generators: torch's on the CPU and the named devices, and the others.

    Args:
        devices: devices a model runs on; CPU needs no mention, repeated ones count once.
        python: whether that of Python counts.
        numpy: whether that of numpy counts.

    Attributes:
        python: the state of the module `random`; None: it is left alone.
        numpy: that of `numpy.random`; None: it is left alone.
    """

    def __init__(
        self, devices: Iterable[torch.device] = (), python: bool = True, numpy: bool = True
    ) -> None:
        self.cpu = torch.get_rng_state()
        self.devices = {
            device: torch.get_device_module(device).get_rng_state(device)
            for device in set(devices)
            if device.type not in ("cpu", "meta")
        }
        self.python: PythonState | None = python_state() if python else None
        self.numpy: NumpyState | None = numpy_state() if numpy else None

    def now(self, devices: Iterable[torch.device] = ()) -> RandomState:
        """The present state of the same generators, and of those of further devices."""
        return RandomState(
            {*devices, *self.devices}, self.python is not None, self.numpy is not None
        )

    def forget_unused(self) -> None:
        """Leave the generators of Python and numpy alone if nothing was drawn from them since."""
        if self.python is not None and python_state() == self.python:
            self.python = None
        if self.numpy is not None and _same(numpy_state(), self.numpy):
            self.numpy = None

    def restore(self) -> None:
        """Set the generators back to the recorded state."""
        torch.set_rng_state(self.cpu)
        for device, state in self.devices.items():
            torch.get_device_module(device).set_rng_state(state, device)
        if self.python is not None and python_state() != self.python:
            random.setstate(self.python)
        if self.numpy is not None:
            _set_numpy(self.numpy)

    def state_dict(self) -> dict[str, Tensor]:
        """Device name -> state; and as float64, which holds each exactly, "python" and "numpy"."""
        found = {"cpu": self.cpu, **{str(d): state for d, state in self.devices.items()}}
        if self.python is not None:
            version, numbers, gauss = self.python
            last = math.nan if gauss is None else gauss
            found["python"] = torch.tensor(
                [version, *numbers, last], dtype=torch.float64, device="cpu"
            )
        if self.numpy is not None and self.numpy["bit_generator"] == "MT19937":
            state, known = self.numpy["state"], (self.numpy["has_gauss"], self.numpy["gauss"])
            numbers = [*state["key"].tolist(), state["pos"], *known]
            found["numpy"] = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        return found

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave, for the generators that exist here and there."""
        self.cpu = state["cpu"].cpu()
        self.devices = {d: state.get(str(d), own).cpu() for d, own in self.devices.items()}
        if "python" in state:
            version, *numbers, gauss = state["python"].tolist()
            last = None if math.isnan(gauss) else gauss
            self.python = int(version), tuple(map(int, numbers)), last
        if "numpy" in state:
            *key, position, has_gauss, gauss = state["numpy"].tolist()
            twister = {"key": np.array(key, dtype=np.uint32), "pos": int(position)}
            self.numpy = {
                "bit_generator": "MT19937",
                "state": twister,
                "has_gauss": int(has_gauss),
                "gauss": gauss,
            }


# ----------------------------------------------------------------------------- Python's, cheaply

_SIZE = 4 * 625  # of the Mersenne Twister in memory: 624 numbers and a position
_last_of_python: tuple[bytes, PythonState] | None = None


def python_state() -> PythonState:
    """The state of Python's global generator.

    Python takes 8 us to hand it out and 10 us to compare two. It is asked only if the generator's
    memory has changed since it was asked last, which was found to hold what Python says.
    """
    global _last_of_python
    generator: Any = getattr(random.getstate, "__self__", None)
    if type(generator) is not random.Random or sys.implementation.name != "cpython":
        return random.getstate()
    found = ctypes.string_at(id(generator) + object.__basicsize__, _SIZE)
    if _last_of_python is not None and _last_of_python[0] == found:
        state = _last_of_python[1]
        return state if state[2] == generator.gauss_next else (*state[:2], generator.gauss_next)
    state = random.getstate()
    *words, position = state[1]
    expected = b"".join(int(word).to_bytes(4, sys.byteorder) for word in (position, *words))
    _last_of_python = (found, state) if found == expected else None
    return state


# ------------------------------------------------------------------------------ numpy's, cheaply

_last: tuple[Any, bytes, NumpyState] | None = None


def numpy_state() -> NumpyState:
    """The state of numpy's global generator; it is not to be changed.

    numpy takes 40 us to hand it out. It is asked only if the generator's memory, which is read in
    less than 1 us, has changed since it was asked last. The memory does not show whether a second
    normal number is kept ("has_gauss"): where one was, numpy is asked again.
    """
    global _last
    found = _memory()
    if found is not None and _last is not None and _last[:2] == found:
        return _last[2]
    state: Any = np.random.get_state(legacy=False)
    _last = _to_be_kept(found, state)
    return state


def _memory() -> tuple[Any, bytes] | None:
    """The generator behind numpy's global functions, and its memory; None if it is not known."""
    get = getattr(np.random, "get_bit_generator", None)  # numpy 1.24
    generator = None if get is None else get()
    if type(generator) is not np.random.MT19937:
        return None
    return generator, ctypes.string_at(generator.ctypes.state_address, _SIZE)


def _to_be_kept(
    found: tuple[Any, bytes] | None, state: NumpyState
) -> tuple[Any, bytes, NumpyState] | None:
    if found is None or state["has_gauss"]:
        return None
    words = state["state"]["key"].astype(np.uint32).tobytes()
    expected = words + int(state["state"]["pos"]).to_bytes(4, sys.byteorder)
    return (*found, state) if found[1] == expected else None


def _set_numpy(state: NumpyState) -> None:
    global _last
    if not _same(numpy_state(), state):
        np.random.set_state(state)
        _last = None


def _same(one: NumpyState, other: NumpyState) -> bool:
    if one is other:
        return True
    if one["bit_generator"] != "MT19937" or other["bit_generator"] != "MT19937":
        return False
    names = ("has_gauss", "gauss")
    same = one["state"]["pos"] == other["state"]["pos"] and all(one[n] == other[n] for n in names)
    return same and bool(np.array_equal(one["state"]["key"], other["state"]["key"]))
