"""Recipes: text to stages and back."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import all_tasks, linear_model, regression_batch
from hypothesis import given
from hypothesis import strategies as st

import equipoise as eq
from equipoise.builtin import AGGREGATORS, WEIGHTINGS
from equipoise.engine.adapters import works_on_features
from equipoise.registry import METHODS

parse = eq.Recipe.parse

# ------------------------------------------------------------------------- texts of all kinds

PARAMETERS: dict[str, dict[str, st.SearchStrategy]] = {
    "si": {"cap": st.floats(0.1, 1e6)},
    "igbv1": {"cap": st.floats(0.1, 1e6)},
    "igbv2": {
        "reduction": st.sampled_from(["min", "mean"]),
        "lr_ratio": st.booleans(),
        "buffer_size": st.integers(1, 10**6),
        "sac_lr": st.floats(1e-9, 1),
    },
    "rlw-si": {"cap": st.floats(0.1, 1e6)},
    "dwa-si": {"temperature": st.floats(1e-3, 1e6)},
    "rlw": {"normalize_to": st.floats(0.1, 1e6)},
    "dwa": {"temperature": st.floats(1e-3, 1e6) | st.integers(1, 9)},
    "uw": {"lr": st.floats(1e-9, 10)},
    "mgda": {
        "normalize": st.sampled_from([None, "l2", "loss", "loss+"]),
        "zero": st.sampled_from(["keep", "drop"]),
    },
    "pcgrad": {"reduction": st.sampled_from(["sum", "mean"])},
    "cagrad": {"c": st.floats(0, 5) | st.integers(0, 3), "rescale": st.integers(0, 2)},
}


@st.composite
def stage(draw: st.DrawFn, axis: str) -> tuple[str, dict[str, Any]]:
    """Draw a token and parameters for it."""
    token = draw(st.sampled_from([m.token for m in METHODS.values() if m.axis == axis]))
    known = PARAMETERS.get(token.removesuffix("-ub"), {})
    names = draw(st.lists(st.sampled_from(sorted(known)), unique=True)) if known else []
    return token, {name: draw(known[name]) for name in names}


@st.composite
def spelling(draw: st.DrawFn, token: str, parameters: dict[str, Any]) -> str:
    """Draw a way to write a stage: any case, hyphens anywhere or nowhere, spaces, any order."""
    token = token.replace("-", "") if draw(st.booleans()) else token
    letters = [c.upper() if draw(st.booleans()) else c for c in token]
    if draw(st.booleans()):
        letters.insert(draw(st.integers(1, len(letters) - 1)), "-")
    written = []
    for name in draw(st.permutations(sorted(parameters))):
        value = parameters[name]
        space = " " * draw(st.integers(0, 2))
        written.append(f"{space}{name}{space}={space}{value}{space}")
    text = "".join(letters)
    return f"{text}({','.join(written)})" if written or draw(st.booleans()) else text


@given(st.data())
def test_any_spelling_is_the_same_recipe_and_its_text_reads_back(data: st.DataObject) -> None:
    chosen = {}
    if data.draw(st.booleans()):
        chosen["weighting"] = data.draw(stage("weighting"))
    if data.draw(st.booleans()) or not chosen:
        chosen["aggregation"] = data.draw(stage("aggregation"))

    def text() -> str:
        parts = [
            data.draw(spelling(*one)) for one in data.draw(st.permutations([*chosen.values()]))
        ]
        plus = data.draw(st.sampled_from(["+", " + ", "+ "]))
        return plus.join(parts)

    first, second = parse(text()), parse(text())
    assert first == second
    assert hash(first) == hash(second)
    assert str(first) == str(second)
    again = parse(str(first))
    assert again == first
    assert str(again) == str(first)
    for axis, (token, parameters) in chosen.items():
        kept = first.weighting if axis == "weighting" else first.aggregator
        assert kept.method.token == token
        built = kept.build(steps_per_epoch=3, n_tasks=2, generator=torch.Generator())
        for name, value in parameters.items():
            assert getattr(built, name) == value


@given(st.sampled_from(sorted(METHODS)), st.sampled_from(sorted(METHODS)))
def test_two_different_texts_are_different_recipes(first: str, second: str) -> None:
    defaults = {"ew": "ew", "sum": "ew"}
    same = defaults.get(first, first) == defaults.get(second, second)
    assert (parse(first) == parse(second)) == same
    assert (str(parse(first)) == str(parse(second))) == same


CANONICAL = {
    "EW": "ew",
    "sum": "ew",
    "ew+sum": "ew",
    "EW + MGDA": "mgda",
    "cagrad+ IGBv1": "igbv1+cagrad",
    "IGB-v1+C-A-Grad": "igbv1+cagrad",
    "MGDAUB": "mgda-ub",
    "mgda-UB": "mgda-ub",
    "imtl()": "imtl",
    "cagrad(c=0.4)": "cagrad",
    "cagrad(c=0.4,rescale=1)": "cagrad",
    "cagrad(rescale=2, c=.5)": "cagrad(c=0.5, rescale=2)",
    "cagrad(c=1)": "cagrad(c=1.0)",
    "cagrad(c=1e-1)": "cagrad(c=0.1)",
    "dwa(temperature=2)": "dwa",
    "si(cap=None)": "si",
    "mgda(normalize=NONE)": "mgda",
    "mgda(normalize=loss+)+si": "si+mgda(normalize=loss+)",
    "si+mgda(normalize=loss+)": "si+mgda(normalize=loss+)",
    "mgda(normalize='l2')": "mgda(normalize=l2)",
    'pcgrad(reduction="mean")': "pcgrad(reduction=mean)",
    "stl": "stl",
    "S-TL": "stl",
}


@pytest.mark.parametrize("text", CANONICAL)
def test_canonical_form(text: str) -> None:
    assert str(parse(text)) == CANONICAL[text]
    assert parse(CANONICAL[text]) == parse(text)


@pytest.mark.parametrize(
    ("one", "other"),
    [("si(cap=5)", "si(cap=5.0)"), ("cagrad(rescale=0)", "cagrad(rescale=false)"),
     ("rlw(normalize_to=1)", "rlw(normalize_to=1.0)")],
)  # fmt: skip
def test_equal_recipes_have_one_text_and_one_hash(one: str, other: str) -> None:
    try:
        first, second = parse(one), parse(other)
    except eq.RecipeError:
        return  # refusing one of them would be as good
    assert (first == second) == (str(first) == str(second)) == (hash(first) == hash(second))


def test_infinity_reads_back_or_is_refused() -> None:
    try:
        recipe = parse("dwa(temperature=1e999)")
    except eq.RecipeError:
        return
    assert parse(str(recipe)) == recipe


def test_a_value_that_is_accepted_works() -> None:
    model = linear_model()
    try:
        recipe = parse("cagrad(rescale=2.0)")
    except eq.RecipeError:
        return
    recipe.build(model, all_tasks(model, F.mse_loss), 0.1, 1)(*regression_batch())


# ------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cagard", "recipe 'cagard': unknown token 'cagard'; did you mean 'cagrad'"),
        ("ew+MGDB", "unknown token 'MGDB'; did you mean 'mgda'"),
        ("igbv9+cagrad", "unknown token 'igbv9'; did you mean 'igbv2' or 'igbv1'"),
        ("xyzzy", "unknown token 'xyzzy'; known are: aligned, .*, uw"),
        ("", "cannot read ''; write token or token"),
        ("ew+", "cannot read ''"),
        ("+ew", "cannot read ''"),
        ("ew++mgda", "cannot read ''"),
        ("ew mgda", "cannot read 'ew mgda'"),
        ("cagrad(c=0.5", r"cannot read 'cagrad\(c=0.5'"),
        ("cagrad c=0.5)", "cannot read"),
        ("cag_rad", "cannot read 'cag_rad'"),
        ("cagrad(d=1)", "cagrad has no parameter 'd'; it takes: c, rescale"),
        pytest.param(
            "ew(lr=1)",
            "ew has no parameter 'lr'; it takes: none",
        ),
        ("igbv2(n_tasks=3)", "igbv2 has no parameter 'n_tasks'; it takes: cap, reduction"),
        ("uw-si", "uw-si'?: UW on the scale-invariant objective falls without end"),
        ("igbv1(steps_per_epoch=3)", "igbv1 has no parameter 'steps_per_epoch'; it takes: cap"),
        ("uw(n_tasks=3)", "no parameter 'n_tasks'"),
        ("pcgrad(generator=None)", "no parameter 'generator'"),
        ("stl(c=1)", "stl has no parameter 'c'"),
        ("cagrad(0.5)", r"write cagrad\(0.5=...\), a value for a name"),
        ("cagrad(c=1,c=2)", "c is given twice"),
        ("cagrad(c=-1)", "c is -1.0; the radius must be at least 0"),
        ("cagrad(rescale=3)", "rescale is 3; known are 0, 1 and 2"),
        ("cagrad(c=much)", "recipe .*c=much"),
        ("si(cap=0)", "cap is 0.0; give a positive bound"),
        ("dwa(temperature=0)", "temperature is 0.0; it must be positive"),
        ("rlw(normalize_to=-1)", "normalize_to is -1"),
        ("uw(lr=0)", "lr is 0.0; it must be positive"),
        ("mgda(normalize=l3)", "normalize is 'l3'"),
        ("mgda-ub(zero=never)", "zero is 'never'"),
        ("pcgrad(reduction=max)", "reduction is 'max'"),
    ],
)
def test_what_cannot_be_read(text: str, words: str) -> None:
    with pytest.raises(eq.RecipeError, match=words) as caught:
        parse(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "one", "other"),
    [
        ("mgda+cagrad(c=0.5)", "mgda", "cagrad(c=0.5)"),
        ("mgda+mgda-ub", "mgda", "mgda-ub"),
        ("mgda+mgda", "mgda", "mgda"),
        ("ew+si", "ew", "si"),
        ("si(cap=2)+mgda+uw", "si(cap=2.0)", "uw"),
        ("stl+mgda", "stl", "mgda"),
        ("igbv1+stl", "stl", "igbv1"),
        ("stl+stl", "stl", "stl"),
        ("bls+fbls", "bls", "fbls"),
        ("stl+bls", "stl", "bls"),
        ("bls+mgda-ub", "bls", "mgda-ub"),
        ("fbls(verify=true)+f-mgda", "fbls(verify=true)", "f-mgda"),
        ("db-mtl+fbls", "fbls", "db-mtl"),
    ],
)
def test_senseless_combinations_name_both(text: str, one: str, other: str) -> None:
    with pytest.raises(eq.CombinationError) as caught:
        parse(text)
    rest = str(caught.value).removeprefix(f"recipe {text!r}: ")
    assert rest != str(caught.value)
    assert re.search(rf"(^|\W){re.escape(one)}(\W|$)", rest)
    assert re.search(rf"(^|\W){re.escape(other)}(\W|$)", rest)


# ----------------------------------------------------------------------------------- registry


def test_the_registry() -> None:
    assert eq.Recipe.known() == list(METHODS.values())
    axes = {"weighting", "aggregation", "line search", "baseline"}
    assert {m.axis for m in METHODS.values()} == axes
    for token, method in METHODS.items():
        assert method.token == token == token.lower()
        assert method.summary.endswith("."), token
        assert str(parse(token)) in (token, "ew")
    plain = [token.replace("-", "") for token in METHODS]
    assert len(set(plain)) == len(plain)
    for token in AGGREGATORS:
        assert METHODS[token].level == "parameters"
        assert (f"{token}-ub" in METHODS) == works_on_features(METHODS[token].factory)
        if f"{token}-ub" in METHODS:
            assert METHODS[f"{token}-ub"].level == "features"
            assert METHODS[f"{token}-ub"].factory is METHODS[token].factory


# -------------------------------------------------------------------------------------- build


def build(text: str, **options: Any) -> eq.Step:
    model = linear_model()
    given = {"lr": 0.25, "steps_per_epoch": 7} | options
    return parse(text).build(model, all_tasks(model, F.mse_loss), **given)


@pytest.mark.parametrize("token", [*WEIGHTINGS, *AGGREGATORS])
def test_build_makes_the_stages(token: str) -> None:
    step = build(token)
    factories = {"weighting": METHODS[METHODS[token].partner].factory, "aggregation": eq.Sum}
    factories[METHODS[token].axis] = METHODS[token].factory
    assert type(step.weighting) is factories["weighting"]
    assert type(step.aggregator) is factories["aggregation"]
    assert step.level == "parameters"


def test_build_passes_on_parameters_level_and_context() -> None:
    step = build("IGBv1(cap=3)+CAGrad-UB(c=0.7, rescale=2)")
    assert (step.weighting.cap, step.weighting.steps_per_epoch) == (3, 7)
    assert (step.aggregator.c, step.aggregator.rescale) == (0.7, 2)
    assert step.level == "features"
    assert isinstance(step.optimizer, torch.optim.Adam)
    assert step.optimizer.param_groups[0]["lr"] == 0.25
    assert len(build("uw").weighting.log_variances) == 2


def test_build_with_another_optimizer_and_frozen_parameters() -> None:
    def momentum(parameters: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=lr, momentum=0.5)

    model = linear_model()
    model.trunk[0].requires_grad_(False)
    losses = all_tasks(model, F.mse_loss)
    step = parse("mgda").build(model, losses, 0.25, 7, optimizer=momentum)
    assert step.model is model
    group = step.optimizer.param_groups[0]
    assert (group["lr"], group["momentum"]) == (0.25, 0.5)
    # The frozen ones too: they may be thawed later.
    assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters()}


def test_stl_trains_a_copy_that_shares_nothing() -> None:
    model = linear_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    recipe = parse("stl")
    assert recipe.is_stl
    assert not parse("ew").is_stl
    step = recipe.build(model, all_tasks(model, F.mse_loss), lr=0.1, steps_per_epoch=1)
    assert step.model is not model
    assert step.model.groups == (("left",), ("right",))
    report = step(*regression_batch())
    assert report.accepted
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_seed_makes_the_draws_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    parse("rlw+pcgrad")
    assert torch.equal(torch.get_rng_state(), state)
    model = linear_model()
    state = torch.get_rng_state()
    build_seeded: Callable = lambda seed: parse("rlw+pcgrad").build(  # noqa: E731
        model, all_tasks(model, F.mse_loss), 0.1, 1, seed=seed
    )
    first, same, other = build_seeded(4), build_seeded(4), build_seeded(5)
    assert torch.equal(torch.get_rng_state(), state)
    draws = [
        torch.rand(3, generator=g)
        for step in (first, same, other)
        for g in (step.weighting.generator, step.aggregator.generator)
    ]
    assert torch.equal(draws[0], draws[2])
    assert torch.equal(draws[1], draws[3])
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[4])


def test_without_a_seed_the_draws_follow_the_global_generator() -> None:
    def weights() -> torch.Tensor:
        step = build("rlw")
        return step(*regression_batch()).weights

    torch.manual_seed(1)
    first = weights()  # linear_model() seeds the global generator itself
    assert torch.equal(first, weights())


@pytest.mark.parametrize("steps", [0, -1, 1.5])
def test_steps_per_epoch_must_be_a_number_of_batches(steps: float) -> None:
    with pytest.raises(ValueError, match="steps_per_epoch"):
        build("igbv1", steps_per_epoch=steps)


# ------------------------------------------------------------------------ optimizer and tasks


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("mgda", torch.optim.Adam),
        ("bls+mgda", torch.optim.SGD),
        ("fbls", torch.optim.SGD),
        ("bls(direction=optimizer)+mgda", torch.optim.Adam),
    ],
)
def test_the_optimizer_is_what_the_line_search_needs(text: str, kind: type) -> None:
    assert type(build(text).optimizer) is kind
    assert type(build(text, optimizer=torch.optim.SGD).optimizer) is torch.optim.SGD


@pytest.mark.parametrize("text", ["bls+mgda", "fbls"])
def test_an_optimizer_that_is_asked_for_is_not_replaced(text: str) -> None:
    with pytest.raises(eq.CombinationError, match=f"recipe '{re.escape(text)}': .* and Adam"):
        build(text, optimizer=torch.optim.Adam)


def test_names_of_tasks_for_any_module() -> None:
    net = torch.nn.Linear(3, 3)
    step = parse("uw+f-cagrad").build(net, ["price", "colour", "size"], 0.1, 5)
    assert (step.model, step.tasks, step.line_search) == (net, ("price", "colour", "size"), None)
    assert isinstance(step.optimizer, torch.optim.Adam)
    assert step.weighting.n_tasks == 3
    assert isinstance(step.aggregator, eq.CAGrad) and step.sharpness.decompose
    x = torch.randn(4, 3)
    names = ("price", "colour")
    said = parse("igbv1+mgda").build(net, names, 0.1, 5, shared=[net.weight])
    report = said(lambda: dict(zip(names, net(x).square().mean(0), strict=False)))
    assert report.gram.shape == (2, 2)
    assert said._rows.buffer.shape == (2, 9)  # the bias is not among what is shared


def test_the_level_and_heads_are_those_of_the_recipe() -> None:
    found = [build(text) for text in ("mgda", "mgda-ub(heads=weighted)", "fbls")]
    assert [(step.level, step.heads) for step in found] == [
        ("parameters", "own"),
        ("features", "weighted"),
        ("features", "own"),
    ]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("stl", "stl"),
        ("si+mgda-ub", "mgda-ub"),
        ("fbls+sum", "fbls"),
        ("fbls(verify=true)", "fbls"),
    ],
)
def test_names_of_tasks_are_refused_where_trunk_and_heads_are_needed(text: str, what: str) -> None:
    with pytest.raises(eq.CombinationError) as caught:
        parse(text).build(linear_model(), ["left", "right"], 0.1, 1)
    assert str(caught.value).startswith(f"recipe {text!r} and names of tasks: {what}")
    assert "needs a SharedTrunk" in str(caught.value)


@pytest.mark.parametrize("names", ["price", [1, 2], [print], [], ["a", "a"]])
def test_tasks_that_are_no_names(names: Any) -> None:
    with pytest.raises(ValueError, match="give a list of different names, or a dict"):
        parse("ew").build(torch.nn.Linear(3, 2), names, 0.1, 1)


def test_stl_of_a_module_without_a_trunk_is_refused() -> None:
    with pytest.raises(eq.CombinationError, match="'stl' and a Linear: stl needs a SharedTrunk"):
        parse("stl").build(torch.nn.Linear(3, 2), {"price": F.mse_loss}, 0.1, 1)
