"""What the lab says of line searches: columns, settings, pictures."""

import math
from typing import Any

import numpy as np
import pytest
import torch

import equipoise as eq
from equipoise.lab import figures, searches
from equipoise.lab.config import RunConfig


def report(size: float | None, trials: int = 1, **more: Any) -> eq.StepReport:
    nothing = torch.zeros(1)
    return eq.StepReport(
        ("t",), nothing, nothing, nothing, None, None, 0.0,
        step_size=size, trials=trials, accepted=size != 0, **more,
    )  # fmt: skip


def test_columns() -> None:
    assert searches.columns([report(None)]) == {}
    row = searches.columns(
        [
            report(1.0),
            report(0.25, 3, fallback=True),
            report(0.0, 34),
            report(0.5, 2, verified=True),
        ]
    )
    assert row == {
        "step/size": 0.5, "step/least": 0.25, "step/largest": 1.0, "step/trials": 10.0,
        "step/rejected": 25.0, "step/fallback": 25.0, "step/unverified": 0.0,
    }  # fmt: skip
    none = searches.columns([report(0.0, 34)])
    assert (none["step/size"], none["step/rejected"]) == (None, 100)


@pytest.mark.parametrize(
    ("recipe", "optimizer", "schedule"),
    [
        ("ew", "adam", "halve(every=2)"),
        ("fbls", "sgd", "none"),
        ("bls+mgda", "sgd", "none"),
        ("bls(direction=optimizer)", "adam", "halve(every=2)"),
    ],
)
def test_a_line_search_makes_plain_sgd_steps(recipe: str, optimizer: str, schedule: str) -> None:
    config = RunConfig.of(recipe=recipe, schedule="halve(every=2)")
    assert (config.optimizer, config.schedule) == (optimizer, schedule)
    assert RunConfig.of(recipe="ew", optimizer="sgd").optimizer == "sgd"


def test_the_section() -> None:
    def history(**columns: list[float]) -> dict[str, np.ndarray]:
        return {name.replace("_", "/"): np.array(values) for name, values in columns.items()}

    found = {
        "bls": [
            history(
                epoch=[1, 2],
                step_size=[1, math.nan],
                step_least=[0.5, math.nan],
                step_largest=[1, math.nan],
                step_trials=[2, 34],
                step_rejected=[0, 100],
                step_fallback=[0, 0],
                step_unverified=[math.nan, math.nan],
            )  # fmt: skip
        ],
        "ew": [history(epoch=[1, 2])],
    }
    look = figures.looks(list(found))
    (section,) = searches.section(found, look, list)
    assert len(section.pictures) == 3  # sizes, trials, steps without an accepted trial
    assert "Steps along another direction: none." in section.text
    assert "Latent" not in section.text
    assert list(searches.section({"ew": found["ew"]}, look, list)) == []


def test_fractions() -> None:
    sizes = (4.0, 1.0, 1 / 64, 2**-20)
    assert [searches.as_fraction(size) for size in sizes] == ["4", "1", "1/64", "2^-20"]
