"""QM9: 130 831 molecules with 3-D coordinates, by way of torch_geometric."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from equipoise.lab.data import cache as kept
from equipoise.lab.data.base import Baseline, Data, DataError
from equipoise.lab.data.graphs import Graphs, padded, padded_pairs
from equipoise.lab.data.molecules import (
    PARTS,
    TARGETS,
    Standardise,
    molecules,
    refuse_sizes,
)

FOLDERS = ("QM9", "qm9", "")  # below the root, each with raw/ in it
PROCESSED = "https://data.pyg.org/datasets/qm9_v3.zip"
RAW = "https://deepchemdata.s3-us-west-1.amazonaws.com/datasets/molnet_publish/qm9.zip"
DAMAGED = (
    zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, ValueError, LookupError, EOFError,
    TypeError, AttributeError,
)  # fmt: skip
"""What torch_geometric raises on files that are cut off, or not what it takes them for."""
KINDS = 4  # single, double, triple, aromatic
PUBLISHED = Baseline(
    "the code of Nash-MTL (Navon et al., ICML 2022), on a split and a training of its own",
    {
        name: {"mae": value}
        for name, value in {
            "mu": 0.0671, "alpha": 0.1814, "homo": 60.576, "lumo": 53.915, "r2": 0.5027,
            "zpve": 4.539, "u0_atom": 58.838, "u298_atom": 64.244, "h298_atom": 63.852,
            "g298_atom": 66.223, "cv": 0.07212,
        }.items()
    },
)  # fmt: skip
"""Single-task MAE in the units of TARGETS, from experiments/quantum_chemistry/utils.py of the
repository nash-mtl (MIT); rounded, the single-task row of the tables since Nash-MTL."""


def qm9(
    root: str | Path | None = None,
    seed: int = 0,
    *,
    train: int | None = 110_000,
    val: int = 10_000,
    test: int = 10_000,
    graph: Literal["complete", "bonds"] = "complete",
    standardise: Standardise = "train",
    cache: str | None = None,
) -> Data:
    """Molecules with 3-D coordinates as complete graphs, 11 regressions: QM9 (Ramakrishnan 2014).

    A node has the 11 features of torch_geometric: which of H, C, N, O, F it is, its number,
    whether it is aromatic, its hybridisation, its hydrogens. An edge has the kind of the bond, one
    of four or none, and the distance in Angstrom.

    torch_geometric gets the files if they are not there, and processes them once.

    Args:
        root: folder that holds QM9/raw/ or raw/; if neither is there, QM9 is made in it.
        seed: of the split, which is drawn by a hash, so that everyone gets the same one, and
            written down in `cache`; no run's seed.
        train: molecules to train on, a smaller number being a part of a larger; None: all that
            validation and test leave.
        val: molecules of the validation split.
        test: molecules of the test split.
        graph: "complete": an edge between any two atoms; "bonds": bonds alone, without distances.
        standardise: by the mean and the standard deviation of the training split, or of the whole
            set, as in the older tables.
        cache: folder for the split; "off": it is not written down. None: what the environment
            says in EQUIPOISE_CACHE, or else equipoise-cache beside raw/, or if that cannot be
            written, equipoise in the user's cache folder.

    Returns:
        Inputs `Graphs`; targets (N,) float32.

    Raises:
        DataError: torch_geometric or the files are missing, or they are damaged.
        ValueError: more molecules than there are, or a split without one.
    """
    refuse_sizes("qm9", (train, val, test))
    base = find(root)
    found, slices = read(base)
    number = len(found["y"])
    wanted = (train or 1) + val + test
    if wanted > number:
        raise ValueError(
            f"qm9: {number} molecules cannot be split into {train or 1} + {val} + {test}; give "
            "smaller numbers for train, val and test."
        )
    order = shuffled(found["idx"].tolist(), seed)
    cuts = {"test": order[:test], "val": order[test : test + val], "train": order[test + val :]}
    cuts["train"] = cuts["train"][:train]
    chosen = {part: np.sort(cuts[part]) for part in PARTS}
    numbers = "-".join(str(len(chosen[part])) for part in PARTS)
    where = kept.folder(base, cache)
    if where is not None:
        lists = {part: found["idx"][chosen[part]].tolist() for part in PARTS}
        kept.write_down(where / f"qm9-split-{numbers}-seed{seed}.json", lists)
    # Electronvolts there, the published millielectronvolts here.
    factors = {target.name: 1000.0 if target.unit == "meV" else 1.0 for target in TARGETS}
    values = {t.name: factors[t.name] * found["y"][:, t.number].double().numpy() for t in TARGETS}
    published = PUBLISHED if graph == "complete" else None
    return molecules(
        "qm9",
        _graphs(found, slices, complete=graph == "complete"),
        values,
        chosen,
        standardise,
        f"molecules as {'complete graphs with distances' if published else 'graphs of bonds'}; "
        f"{len(TARGETS)} regressions",
        published,
    )


def find(root: str | Path | None) -> Path:
    """The folder in which raw/ is, or will be.

    Raises:
        DataError: no root.
    """
    if root is None:
        raise DataError("qm9 needs --data-root, a folder that holds QM9/raw/, or in which it may.")
    bases = [Path(root) / folder for folder in FOLDERS]
    return next((base for base in bases if (base / "raw").is_dir()), bases[0])


def read(base: Path) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """The concatenated arrays of torch_geometric's QM9, and where each molecule has its part.

    Raises:
        DataError: torch_geometric is not installed, or the files are missing or damaged; says
            which are expected where.
    """
    try:
        from torch_geometric.datasets import QM9
    except ImportError as error:
        raise DataError(
            f'qm9 needs torch_geometric; pip install "equipoise[graph]" ({error}).'
        ) from None
    needed = (
        f"gdb9.sdf, gdb9.sdf.csv (from {RAW}) and uncharacterized.txt in {base / 'raw'}"
        if find_spec("rdkit")
        else f"qm9_v3.pt (from {PROCESSED}) in {base / 'raw'}"
    )
    try:
        dataset = QM9(str(base))
    except (OSError, *DAMAGED) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None)
        what = "the files cannot be had"
        if any((base / "raw").glob("*")):
            what = f"what is in {base / 'raw'} is damaged or not complete"
        raise DataError(
            f"qm9: {what} ({reason or type(error).__name__}); place {needed}."
        ) from error
    collated, slices = dataset._data, dataset.slices
    assert collated is not None and slices is not None
    return collated.to_dict(), slices


def shuffled(numbers: list[int], seed: int) -> np.ndarray:
    """The places of molecules with these numbers, in an order that a hash of each decides."""
    keys = [hashlib.sha256(f"qm9 {seed} {number}".encode()).digest() for number in numbers]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)


def _graphs(found: Mapping[str, Any], slices: Mapping[str, Tensor], complete: bool) -> Graphs:
    sizes = slices["x"].diff()
    m = int(sizes.max())
    kinds = (found["edge_attr"].argmax(1) + 1).to(torch.uint8)
    return Graphs(
        sizes,
        padded(found["x"].to(torch.int8), slices["x"], m),
        # Both directions are there already.
        padded_pairs(found["edge_index"].T, kinds, slices["edge_index"], m, both_ways=False),
        KINDS,
        padded(found["pos"].float(), slices["pos"], m) if complete else None,
    )
