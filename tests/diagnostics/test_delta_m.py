"""Delta_m: known answers of both conventions, laws that hold for all numbers, clear refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equipoise.diagnostics import delta_m
from equipoise.errors import EquipoiseError

VALUES, BASELINE, HIGHER = [0.5, 10.0], [0.4, 12.0], [True, False]

numbers = st.floats(1e-3, 1e3)
metrics = st.lists(st.tuples(numbers, numbers, st.booleans()), min_size=1, max_size=12)


def columns(rows: list[tuple[float, float, bool]]) -> tuple[list[float], list[float], list[bool]]:
    values, baseline, higher = zip(*rows, strict=True)
    return list(values), list(baseline), list(higher)


def test_improvement_of_the_flat_regions_paper() -> None:
    assert delta_m(VALUES, BASELINE, HIGHER) == pytest.approx((25 + 50 / 3) / 2, abs=1e-12)
    assert delta_m([0.5], [0.4], [True]) == pytest.approx(25, abs=1e-12)
    assert delta_m([10.0], [12.0], [False]) == pytest.approx(50 / 3, abs=1e-12)


def test_drop_of_the_gap_balancing_paper() -> None:
    assert delta_m(VALUES, BASELINE, HIGHER, sign="drop") == pytest.approx(-0.2083333, abs=1e-7)


@pytest.mark.parametrize("convert", [tuple, np.array, torch.tensor, lambda x: map_by_name(x)])
def test_any_container_gives_the_same(convert) -> None:
    found = delta_m(convert(VALUES), convert(BASELINE), convert(HIGHER))
    assert type(found) is float
    assert found == pytest.approx(20.8333333, abs=1e-5)  # float32 too


def map_by_name(entries: list) -> dict:
    return dict(zip(("accuracy", "error"), entries, strict=True))


def test_mappings_are_matched_by_name_not_by_order() -> None:
    values = {"error": torch.tensor(10.0), "accuracy": np.float64(0.5)}
    assert delta_m(values, map_by_name(BASELINE), map_by_name(HIGHER)) == pytest.approx(20.8333333)


@given(metrics)
def test_the_conventions_are_each_other_turned_around(rows) -> None:
    improvement, drop = delta_m(*columns(rows)), delta_m(*columns(rows), sign="drop")
    assert drop == pytest.approx(-improvement / 100, rel=1e-12, abs=1e-15)


@given(metrics, st.floats(1e-3, 1e3))
def test_units_do_not_matter(rows, factor) -> None:
    values, baseline, higher = columns(rows)
    scaled = delta_m([factor * v for v in values], [factor * s for s in baseline], higher)
    assert scaled == pytest.approx(delta_m(values, baseline, higher), rel=1e-6, abs=1e-6)


@given(metrics, st.randoms(use_true_random=False))
def test_order_does_not_matter(rows, random) -> None:
    shuffled = random.sample(rows, len(rows))
    expected = delta_m(*columns(rows))
    assert delta_m(*columns(shuffled)) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(metrics)
def test_the_baseline_itself_is_zero_and_turning_a_direction_turns_the_sign(rows) -> None:
    values, baseline, higher = columns(rows)
    assert delta_m(baseline, baseline, higher) == 0
    assert math.copysign(1, delta_m(baseline, baseline, higher, sign="drop")) == 1  # no "-0.0"
    turned = delta_m(values, baseline, [not h for h in higher])
    assert turned == pytest.approx(-delta_m(values, baseline, higher), rel=1e-12, abs=1e-12)


@given(metrics, st.floats(1.01, 2))
def test_better_is_positive(rows, factor) -> None:
    _, baseline, higher = columns(rows)
    better = [s * factor if h else s / factor for s, h in zip(baseline, higher, strict=True)]
    assert delta_m(better, baseline, higher) > 0 > delta_m(better, baseline, higher, sign="drop")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], [1.0, 2.0], [True, True]), "values 1, baseline 2, higher_is_better 2"),
        (([1.0, 2.0], [1.0, 2.0], [True]), "higher_is_better 1"),
        (([], [], []), "no metric"),
        (([1.0, 1.0], [1.0, 0.0], [True, True]), "baseline[1] is 0"),
        (({"mae": 1.0}, {"mae": 0.0}, {"mae": False}), "baseline['mae'] is 0"),
        (([1.0, math.nan], [1.0, 1.0], [True, True]), "values[1] is nan"),
        (([1.0], [math.inf], [True]), "baseline[0] is inf"),
        (({"a": 1.0}, {"b": 1.0}, {"a": True}), "values has 'a', but baseline has not"),
        (({"a": 1.0}, {"a": 1.0}, {"a": True, "b": True}), "higher_is_better has 'b', but values"),
        (({"a": 1.0}, [1.0], [True]), "all mappings by name, or none"),
    ],
)
def test_what_is_refused(arguments, message) -> None:
    with pytest.raises(EquipoiseError) as caught:
        delta_m(*arguments)
    assert message in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_an_unknown_sign_names_the_known() -> None:
    with pytest.raises(ValueError) as caught:
        delta_m(VALUES, BASELINE, HIGHER, sign="gain")
    assert str(caught.value) == "sign is 'gain'; give 'improvement' or 'drop'."
