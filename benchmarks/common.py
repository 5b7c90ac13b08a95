"""What the benchmarks share: the machine, a table, a file."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def environment() -> dict[str, object]:
    """The machine and the versions, to be written beside every number."""
    return {
        "processor": _processor(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def allocated(function: Callable[[], object]) -> tuple[int, int]:
    """What a call leaves behind, and holds at most, in bytes of CPU tensors.

    Counted by torch's profiler, as the allocator hands memory out, so that the result does not
    depend on the machine. It knows tensors that were made in such a call, this one or another.

    Returns:
        Bytes that are held after the call, and at most during it, above those held before it.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    held = highest = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU:
            held += event.nbytes()
            highest = max(highest, held)
    return held, highest


def table(rows: list[dict]) -> str:
    """The rows as an aligned text table."""
    names = list(rows[0])
    cells = [names, *([str(row[name]) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def write(path: str | None, content: dict) -> None:
    """Write JSON if a path is given."""
    if path is not None:
        Path(path).write_text(json.dumps(content, indent=2) + "\n")
