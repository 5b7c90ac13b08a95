"""qm9-lite: a ninth of QM9 as graphs of heavy atoms, read from one file."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from equipoise.lab.data.base import Data, DataError
from equipoise.lab.data.graphs import Graphs, padded, padded_pairs
from equipoise.lab.data.molecules import (
    MEV_PER_HARTREE,
    MEV_PER_KCAL_MOL,
    PARTS,
    TARGETS,
    Standardise,
    limited,
    molecules,
    refuse_sizes,
)

FILE = "qm9_subset.npz"
ELEMENTS = (6, 7, 8, 9)
ORDERS = (1.0, 1.5, 2.0, 3.0)
FACTORS = {  # (unit there, unit here) -> here = factor * there
    ("D", "D"): 1.0,
    ("a0^3", "a0³"): 1.0,
    ("a0^2", "a0²"): 1.0,
    ("cal/(mol K)", "cal/(mol K)"): 1.0,
    ("Ha", "meV"): MEV_PER_HARTREE,
    ("kcal/mol", "meV"): MEV_PER_KCAL_MOL,
}
Arrays = Mapping[str, np.ndarray]


def qm9_lite(
    root: str | Path | None = None,
    seed: int = 0,
    *,
    train: int | None = None,
    val: int | None = None,
    test: int | None = None,
    standardise: Standardise = "train",
) -> Data:
    """Molecules as graphs of heavy atoms and bonds, 11 regressions: a ninth of QM9, no 3-D.

    A node has 7 features: which of C, N, O, F it is, its hydrogens, its charge, whether it is
    aromatic. An edge has the order of the bond, one of four, and goes both ways.

    Args:
        root: folder that holds qm9/qm9_subset.npz, or the file itself.
        seed: of the choice of molecules where a split is limited; no run's seed.
        train: as many molecules of the training split, drawn at random, a smaller number being a
            part of a larger; None: all.
        val: the same of the validation split.
        test: the same of the test split.
        standardise: by the mean and the standard deviation of the training split, or of the whole
            file.

    Returns:
        Inputs `Graphs`; targets (N,) float32.

    Raises:
        DataError: the file is missing or damaged.
        ValueError: a split without a molecule, or so few that a target does not vary.
    """
    limits = (train, val, test)
    refuse_sizes("qm9-lite", limits)
    path = find(root)
    arrays = read(path)
    chosen = {}
    for i, part in enumerate(PARTS):
        found = limited(np.flatnonzero(arrays["split"] == i), limits[i], [seed, i])
        if not len(found):
            raise _damaged(path, f"has no molecule for the {part} split")
        chosen[part] = found
    graphs = _graphs(path, arrays)
    values = _values(path, arrays)
    return molecules(
        "qm9-lite",
        graphs,
        values,
        chosen,
        standardise,
        f"molecules of up to {graphs.nodes.shape[1]} heavy atoms, as graphs without 3-D; "
        f"{len(values)} regressions",
    )


def find(root: str | Path | None) -> Path:
    """The file below `root`.

    Raises:
        DataError: it is not there; says where it is expected.
    """
    if root is None:
        raise DataError(f"qm9-lite needs --data-root, a folder that holds qm9/{FILE}.")
    places = [Path(root) / "qm9" / FILE, Path(root) / FILE]
    for place in places:
        if place.is_file():
            return place
    raise DataError(f"qm9-lite: there is neither {places[0]} nor {places[1]}.")


def read(path: Path) -> Arrays:
    """The arrays of the file.

    Raises:
        DataError: it is no such file, or damaged; says what is wrong.
    """
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if name != "smiles"}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise _damaged(path, f"cannot be read ({error})") from error
    n = len(arrays.get("split", ()))
    for name, of_atoms in (
        ("y", False), ("y_atomization", False), ("target_names", False), ("target_units", False),
        ("atomization_names", False), ("atomization_units", False), ("split", False),
        ("atom_ptr", False), ("atom_Z", True), ("atom_nH", True), ("atom_charge", True),
        ("atom_aromatic", True), ("bond_ptr", False), ("bond_index", False), ("bond_order", False),
    ):  # fmt: skip
        if name not in arrays:
            raise _damaged(path, f"has no array {name!r}")
        if of_atoms and len(arrays[name]) != arrays["atom_ptr"][-1]:
            raise _damaged(path, f"has {len(arrays[name])} values in {name!r}, not one an atom")
    for name in ("y", "y_atomization"):
        if len(arrays[name]) != n:
            raise _damaged(path, f"has {len(arrays[name])} rows in {name!r} for {n} molecules")
    for name in ("atom_ptr", "bond_ptr"):
        if len(arrays[name]) != n + 1:
            raise _damaged(path, f"has {len(arrays[name])} numbers in {name!r}, not {n + 1}")
    if not len(arrays["bond_index"]) == len(arrays["bond_order"]) == arrays["bond_ptr"][-1]:
        raise _damaged(path, "has another number of bonds than bond_ptr says")
    return arrays


def _graphs(path: Path, arrays: Arrays) -> Graphs:
    sizes = np.diff(arrays["atom_ptr"])
    m = int(sizes.max())
    elements = arrays["atom_Z"][:, None] == np.array(ELEMENTS)
    order = arrays["bond_order"][:, None] == np.array(ORDERS, arrays["bond_order"].dtype)
    if not (elements.any(1).all() and order.any(1).all()):
        raise _damaged(path, "has an atom that is no C, N, O or F, or a bond of another order")
    owner = np.repeat(sizes, np.diff(arrays["bond_ptr"]))
    if (arrays["bond_index"] >= owner[:, None]).any():
        raise _damaged(path, "has a bond to an atom that its molecule does not have")
    others = [arrays[name][:, None] for name in ("atom_nH", "atom_charge", "atom_aromatic")]
    features = np.concatenate([elements, *others], axis=1).astype(np.int8)
    kinds = (order.argmax(1) + 1).astype(np.uint8)
    return Graphs(
        torch.from_numpy(sizes),
        padded(features, arrays["atom_ptr"], m),
        padded_pairs(arrays["bond_index"], kinds, arrays["bond_ptr"], m),
        len(ORDERS),
    )


def _values(path: Path, arrays: Arrays) -> dict[str, np.ndarray]:
    """Target -> (N,) values in the unit of `TARGETS`."""
    columns = {}
    for table, names, units in (
        ("y", "target_names", "target_units"),
        ("y_atomization", "atomization_names", "atomization_units"),
    ):
        for i, (name, unit) in enumerate(zip(arrays[names], arrays[units], strict=True)):
            columns[str(name)] = arrays[table][:, i], str(unit)
    values = {}
    for target in TARGETS:
        if target.name not in columns:
            raise _damaged(path, f"has no target {target.name!r}")
        column, unit = columns[target.name]
        if (unit, target.unit) not in FACTORS:
            raise _damaged(path, f"has {target.name!r} in {unit!r}")
        values[target.name] = FACTORS[unit, target.unit] * column
        if not np.isfinite(column).all():
            raise _damaged(path, f"has a {target.name!r} that is not finite")
    return values


def _damaged(path: Path, problem: str) -> DataError:
    return DataError(f"{path} {problem}; get it again.")
