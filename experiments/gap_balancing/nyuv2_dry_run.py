"""One epoch of SegNet on made-up images in NYUv2's layout and size: what it takes.

    python experiments/gap_balancing/nyuv2_dry_run.py --images 16 --json FILE

Writes the files to a temporary folder and trains through the lab, as on the real set: `equipoise
train igbv1 --data nyuv2 --data-root FOLDER --model segnet --batch-size 2 --lr 1e-4 --epochs 500`.
Prints the images trained a second and the peak memory, and what that makes for 795 images.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from equipoise.lab.config import RunConfig, environment
from equipoise.lab.data.nyuv2 import CLASSES
from equipoise.lab.files import write_text
from equipoise.lab.folders import read
from equipoise.lab.runs import train

PUBLISHED = (795, 654)  # images


def scenes(number: int, size: tuple[int, int], seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Planes of random colour, class, depth and direction, and a part where nothing is known."""
    height, width = size
    generator = np.random.default_rng(seed)
    for _ in range(number):
        image = np.empty((height, width, 3), np.float32)
        label = np.empty((height, width), np.float32)
        depth = np.empty((height, width, 1), np.float32)
        normal = np.empty((height, width, 3), np.float32)
        for i in range(6):
            top, left = (0, 0) if i == 0 else (int(generator.integers(side)) for side in size)
            kind = int(generator.integers(len(CLASSES)))
            direction = generator.normal(size=3)
            image[top:, left:] = 0.5 + 0.4 * np.cos(kind * np.arange(1, 4))
            label[top:, left:] = kind
            depth[top:, left:] = generator.uniform(0.7, 9)
            normal[top:, left:] = direction / np.linalg.norm(direction)
        image += generator.normal(0, 0.05, image.shape).astype(np.float32)
        unknown = np.s_[: height // 8, : width // 8]
        label[unknown], depth[unknown], normal[unknown] = -1, 0, 0
        yield {"image": image.clip(0, 1), "label": label, "depth": depth, "normal": normal}


def write(root: Path, numbers: tuple[int, int], size: tuple[int, int]) -> None:
    """The set, as it lies on disk."""
    for part, number in zip(("train", "val"), numbers, strict=True):
        for i, scene in enumerate(scenes(number, size, seed=number)):
            for kind, array in scene.items():
                folder = root / part / kind
                folder.mkdir(parents=True, exist_ok=True)
                np.save(folder / f"{i}.npy", array)


def peak_memory(device: str) -> float:
    """MB: of the process, or of the GPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e6
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * (1 if sys.platform == "darwin" else 1024) / 1e6


def main() -> None:
    """Make the set, train, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", default="ew")
    parser.add_argument("--model", default="segnet")
    parser.add_argument("--images", type=int, default=16, help="to train on; the set has 795")
    parser.add_argument("--others", type=int, default=4, help="to select and test; the set has 654")
    parser.add_argument("--size", type=int, nargs=2, default=(288, 384), metavar="PIXELS")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root, run = Path(folder, "nyuv2"), Path(folder, "run")
        write(root, (given.images, given.others), tuple(given.size))
        config = RunConfig.of(
            recipe=given.recipe, model=given.model, data="nyuv2", data_root=str(root), epochs=1,
            batch_size=given.batch_size, lr=1e-4, device=given.device, threads=given.threads,
        )  # fmt: skip
        result = train(config, run)
        losses = {
            name: float(values[-1])
            for name, values in read(run).history.items()
            if name.startswith("loss/")
        }
    seconds = result["train_seconds"]
    found = {
        "recipe": config.recipe, "model": config.model, "batch_size": config.batch_size,
        "size": list(given.size), "images": result["sizes"], "parameters": result["parameters"],
        "train_seconds": seconds, "images_per_second": given.images / seconds,
        "hours_for_an_epoch_of_795": PUBLISHED[0] * seconds / given.images / 3600,
        "peak_memory_mb": peak_memory(config.device), "losses": losses, "test": result["test"],
        "environment": environment(torch.device(config.device)) | {"threads": given.threads},
    }  # fmt: skip
    print(
        f"{config.recipe}, {config.model}, {found['parameters']:,} parameters: "
        f"{found['images_per_second']:.3g} images a second, "
        f"{found['hours_for_an_epoch_of_795']:.2g} hours for an epoch of {PUBLISHED[0]}, "
        f"{found['peak_memory_mb']:.0f} MB at the peak."
    )
    if given.json:
        write_text(given.json, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
