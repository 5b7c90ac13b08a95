"""Pictures and tables of flatness: pairs in one colour, curves, contours, differences."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from equipoise.lab import diagnosis, figures, flat_figures, flat_report, paired
from equipoise.lab.diagnose_page import half, noise_curve
from equipoise.lab.summary import summarise
from equipoise.recipe import Recipe

LOOK = figures.looks(["a", "b"])


# ---------------------------------------------------------------------- pairs


@pytest.mark.parametrize(
    ("recipe", "plain"),
    [
        ("f-cagrad(c=0.5, every=5, rho=0.1)", "cagrad(c=0.5)"),
        ("a-cagrad", "cagrad"),
        ("f-sum", "ew"),
        ("si+f-nash", "si+nash"),
        ("f-max-norm", "max-norm"),
        ("f-db-mtl", "db-mtl"),
        ("f-mgda(adaptive=true, normalize=l2)", "mgda(normalize=l2)"),
        ("cagrad(update_every=3)", None),
        ("stl", None),
    ],
)
def test_the_plain_partner(recipe: str, plain: str | None) -> None:
    found = Recipe.parse(recipe).plain
    assert found == (None if plain is None else Recipe.parse(plain))
    assert paired.partners([recipe]) == ({} if plain is None else {recipe: plain})


def test_a_recipe_that_cannot_be_read_has_no_partner() -> None:
    assert paired.partners(['"><img>', "f-nothing"]) == {}


def test_a_pair_has_one_colour_and_the_plain_one_is_dashed() -> None:
    names = ["pcgrad", "f-pcgrad", "a-pcgrad", "f-pcgrad(rho=0.2)", "ew", "f-mgda", "stl"]
    look = figures.looks(names, partners=paired.partners(names))
    assert list(look) == names, "in the order given"
    assert look["pcgrad"].colour == look["f-pcgrad"].colour == look["a-pcgrad"].colour
    dashes = [look[name].dashes for name in ("pcgrad", "f-pcgrad", "a-pcgrad")]
    assert dashes == ["--", "-", "-."]
    others = [look[name] for name in names[3:6]]
    assert len({one.colour for one in (look["pcgrad"], *others)}) == 4
    assert all(one.dashes == "-" for one in others), "no partner is there, or one too many"
    assert len(set(look.values())) == len(names)


def test_partners_come_in_any_order_and_number() -> None:
    tokens = ("sum", "mean", "mgda", "pcgrad", "cagrad", "imtl", "nash", "edm", "upgrad", "aligned")
    names = [f"{start}{token}" for start in ("f-", "") for token in tokens[1:]]
    look = figures.looks(names, partners=paired.partners(names))
    assert len(set(look.values())) == len(names)
    for token in tokens[1:]:
        assert look[token].colour == look[f"f-{token}"].colour
        assert (look[token].dashes, look[f"f-{token}"].dashes) == ("--", "-")


def test_without_partners_looks_are_as_ever() -> None:
    names = ["ew", "f-mean", "mean"]
    assert figures.looks(names, partners={}) == figures.looks(names)
    assert [one.dashes for one in figures.looks(names).values()] == ["-"] * 3


# ---------------------------------------------------------------------- differences


def result(recipe: str, seed: int, left: float, size: float = 1.0) -> dict:
    metrics = {"left": "accuracy", "right": "accuracy", "size": "mae"}
    tasks = [
        {"name": name, "kind": "", "measures": [
            {"name": measure, "higher_is_better": True, "unit": "", "share": True}]}
        for name, measure in metrics.items()
    ]  # fmt: skip
    values = {"left": left, "right": 0.5, "size": size}
    return {"recipe": recipe, "seed": seed, "data": "d", "model": "m", "epochs": 1,
            "test": {name: {metrics[name]: value} for name, value in values.items()},
            "tasks": tasks, "train_seconds": 1.0}  # fmt: skip


def test_differences_are_paired_by_seed_and_of_accuracy_alone() -> None:
    values = {
        "mean": {0: 0.5, 1: 0.7, 2: 0.1},
        "f-mean": {1: 0.74, 0: 0.52, 3: 0.9},
        "ew": {0: 0.2},
    }
    results = [result(r, seed, v) for r, seeds in values.items() for seed, v in seeds.items()]
    (section,) = paired.section(summarise(results))
    assert section.table is not None
    (row,) = section.table.rows
    assert row[0] == "f-mean – mean"
    # 4 and 2 points in "left", half of it in the mean of two tasks; t(0.975, 1) = 12.706.
    assert row[1] == "+1.50 [-4.85, +7.85]"
    assert row[2] == "+3.00 [-9.71, +15.71]"
    assert row[3] == "+0.00 [+0.00, +0.00]"
    assert row[4:] == ["+2.00, +1.00", "1, 0"]
    assert [name for name, _ in section.table.headings][1:4] == ["mean accuracy", "left", "right"]


def test_no_pair_no_table() -> None:
    assert not list(paired.section(summarise([result("ew", 0, 0.5), result("f-mean", 0, 0.5)])))
    apart = [result("mean", 0, 0.5), result("f-mean", 1, 0.5)]
    assert not list(paired.section(summarise(apart))), "no seed that both have"


# ---------------------------------------------------------------------- curves


def noise(radii: list[float], length: float = 10.0, values: float = 0.5) -> diagnosis.Noise:
    at = np.array(radii)
    scores = np.full((len(at), 2), values) * [[0.9, 1.1]]
    return diagnosis.Noise("accuracy", at, at / length, 0.8, scores, 2.0, 0.2, True)


def test_curves_begin_at_the_network_itself() -> None:
    at, values = noise_curve(noise([1, 2]), relative=True, factor=100)
    np.testing.assert_allclose(at, [0, 10, 20])
    np.testing.assert_allclose(values, [[80, 45, 45], [80, 55, 55]])
    at, _ = noise_curve(noise([1, 2]), relative=False)
    np.testing.assert_allclose(at, [0, 1, 2])


def test_half_radii_say_when_they_were_not_reached() -> None:
    found = noise([1, 2])
    assert half(found, 2.0) == "2" and half(found, float("nan")) == "–"
    never = diagnosis.Noise(**{**found.__dict__, "reached": False})
    assert half(never, 2.0) == "> 2" and half(never, float("nan")) == "–"


def one(robustness: dict[str, diagnosis.Noise]) -> diagnosis.Diagnosis:
    nothing = np.empty(0)
    return diagnosis.Diagnosis("a", 0, {}, {}, {}, None, robustness, None, {}, {}, nothing, {},
                               nothing, {})  # fmt: skip


def test_runs_of_unlike_lengths_are_compared_where_all_were_measured() -> None:
    runs = [one({"x": noise([1, 2, 4])}), one({"x": noise([2, 4, 8], values=0.25)})]
    at, values = flat_report.mean_curve(runs, ["x"], relative=False)
    assert at[0] == 0 and at[1] == 1 and at[-1] == 4 and len(values) == 2
    np.testing.assert_allclose(values[:, 0], 0.8)
    np.testing.assert_allclose(values[:, -1], [0.5, 0.25])
    assert values[1][1] == pytest.approx((0.8 + 0.25) / 2), "linear from the network itself"
    same, _ = flat_report.mean_curve(runs[:1], ["x"], relative=False)
    np.testing.assert_allclose(same, [0, 1, 2, 4])


def test_tasks_count_alike() -> None:
    run = one({"x": noise([1, 2], values=0.2), "y": noise([1, 2], values=0.4)})
    _, values = flat_report.mean_curve([run], ["x", "y"], relative=True, factor=100)
    np.testing.assert_allclose(values, [[80, 30, 30]])


def test_the_picture_of_noise() -> None:
    at = np.array([0.0, 1.0, 10.0, 100.0])
    curves = {"a": (at, np.array([[90.0, 80, 50, 10], [70, 60, 30, 10]]))}
    figure = flat_figures.under_noise(
        curves, "left", "radius (%)", "accuracy (%)", LOOK, levels=[10]
    )
    (axes,) = figure.axes
    chance, line = axes.lines
    assert set(chance.get_ydata()) == {10}
    np.testing.assert_allclose(line.get_ydata(), [80, 70, 40, 10])
    assert set(axes.collections[0].get_paths()[0].vertices[:, 1]) == {90, 80, 70, 60, 50, 30, 10}
    assert [tick.get_text() for tick in axes.get_xticklabels()] == [
        "0", "1", "2", "5", "10", "20", "50", "100",
    ]  # fmt: skip
    assert axes.get_xlim()[0] == 0 and axes.get_xlabel() == "radius (%)"


def test_the_picture_of_entropies() -> None:
    found = {"a": np.array([[8.0, 0.0], [4.0, 2.0]]), "b": np.array([[1.0, 1.0]])}
    axes = flat_figures.densities(found, 2.0, "left", LOOK, top=20).axes[0]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [6, 1])
    np.testing.assert_allclose(axes.lines[0].get_xdata(), [0.5, 1.5])
    assert axes.get_xlim() == (0, 2) and axes.get_ylim() == (0, 26)
    assert "nat" in axes.get_xlabel() and "nat" in axes.get_ylabel()


def test_the_picture_of_sharpness_leaves_out_what_falls() -> None:
    curves = {"a": (np.array([0.1, 1.0, 2.0]), np.array([[-1.0, 1.0, 100.0]]))}
    figure = flat_figures.rises(curves, "", LOOK)
    (axes,) = figure.axes
    assert np.ma.getmaskarray(axes.lines[0].get_ydata()).tolist() == [True, False, False]
    assert axes.get_xscale() == axes.get_yscale() == "log"
    page = figures.svg(figure, "")
    assert "mathdefault" not in page, "text stays text"
    assert re.search(r">100<", page)


# ---------------------------------------------------------------------- surfaces


def bowl(scale: float, least: float = 0.5) -> np.ndarray:
    at = np.linspace(-1, 1, 9)
    return least + scale * (np.subtract.outer(at, [0.25]) ** 2 + at**2)


def test_all_tasks_have_the_same_levels_and_colours() -> None:
    surfaces = [bowl(10), bowl(0.1)]
    levels = flat_figures.levels_for(surfaces)
    assert 5 <= len(levels) <= 12 and levels == sorted(levels)
    assert levels[0] >= 0.5 and levels[-1] <= 10 + 12
    drawn = [
        flat_figures.contours(np.linspace(-1, 1, 9), values, levels, "t").axes[0]
        for values in surfaces
    ]
    for axes in drawn:
        assert axes.get_aspect() == 1 and axes.get_xlabel() and axes.get_ylabel()
    ranges = {axes.collections[0].norm.vmax for axes in drawn if axes.collections}
    assert ranges == {levels[-1]}
    (labels,) = [[text.get_text() for text in axes.texts] for axes in drawn[:1]]
    assert labels and set(labels) <= {f"{level:g}" for level in levels}


def test_the_first_direction_goes_to_the_right_and_the_minimum_is_marked() -> None:
    at = np.linspace(-1, 1, 9)
    axes = flat_figures.contours(at, bowl(1), flat_figures.levels_for([bowl(1)]), "").axes[0]
    network, least = axes.lines
    assert (network.get_marker(), least.get_marker()) == ("+", "x")
    assert (list(network.get_xdata()), list(network.get_ydata())) == ([0], [0])
    assert (list(least.get_xdata()), list(least.get_ydata())) == ([0.25], [0])


@pytest.mark.parametrize(
    ("low", "high"), [(0.01, 5000), (0.5, 0.6), (2.0, 2.0001), (-1.0, 3.0), (0.0, 1.0), (1e-9, 1e9)]
)
def test_levels_for_any_range(low: float, high: float) -> None:
    levels = flat_figures.levels_for([np.linspace(low, high, 50).reshape(5, 10)])
    assert 1 <= len(levels) <= 20 and levels == sorted(set(levels))
    assert low - 1e-3 * abs(low) <= levels[0] and levels[-1] <= high * 1.001


def test_surfaces_that_are_level_or_not_finite() -> None:
    assert flat_figures.levels_for([np.ones((3, 3))]) == []
    assert flat_figures.levels_for([np.full((3, 3), np.nan)]) == []
    values = bowl(1)
    values[0, 0] = np.inf
    values[1, 1] = np.nan
    levels = flat_figures.levels_for([values])
    axes = flat_figures.contours(np.linspace(-1, 1, 9), values, levels, "").axes[0]
    assert list(axes.lines[1].get_xdata()) == [0.25]
    nothing = flat_figures.contours(np.linspace(-1, 1, 9), values * np.nan, levels, "").axes[0]
    assert len(nothing.lines) == 1, "no least loss"


def test_round_numbers() -> None:
    assert flat_figures.nice(0.01, 1) == [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1]
    assert flat_figures.nice(3, 4) == [] and flat_figures.nice(0, 1) == []


def test_global_settings_of_matplotlib_stay(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    flat_figures.contours(np.linspace(-1, 1, 9), bowl(1), [1.0, 2.0], "")
    flat_figures.densities({"a": np.ones((1, 4))}, 1.0, "", LOOK)
    assert dict(matplotlib.rcParams) == before
