"""Methods of one's own: registered, read from recipes, built, trained; what is refused."""

from __future__ import annotations

import doctest
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import all_tasks, linear_model, regression_batch
from torch import Tensor

import equipoise as eq
from equipoise import registry
from equipoise.builtin import AGGREGATORS, LINE_SEARCHES, WEIGHTINGS
from equipoise.registry import FLAT, METHODS, TOKENS
from equipoise.testing import check_aggregator, check_weighting

parse = eq.Recipe.parse


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """What a test registers is gone after it."""
    methods, flat = dict(METHODS), dict(FLAT)
    yield
    for table, before in ((METHODS, methods), (FLAT, flat)):
        table.clear()
        table.update(before)


class Share(eq.GramAggregator):
    """A share of each task's gradient, the same for all tasks."""

    def __init__(self, share: float = 0.5, rule: Literal["all", "longest"] = "all") -> None:
        super().__init__()
        self.share = share
        self.rule = rule

    def weights(self, gram: Any, losses: Any) -> Any:
        lengths = np.diagonal(gram)
        return self.share * (lengths > 0 if self.rule == "all" else lengths == lengths.max())


class Entrywise(eq.Aggregator):
    """The median, entry by entry."""

    def forward(self, rows: Tensor) -> Tensor:
        return rows.quantile(0.5, dim=0)


class Drawn(eq.Weighting):
    """One task counts twice, drawn anew each step."""

    def __init__(self, n_tasks: int, generator: torch.Generator, often: int = 2) -> None:
        super().__init__()
        self.n_tasks = n_tasks
        self.generator = generator
        self.often = often

    def weigh(self, losses: Tensor, present: Tensor) -> Tensor:
        weights = torch.ones_like(losses)
        weights[torch.randint(len(losses), (), generator=self.generator)] = self.often
        return weights


class Halving(eq.LineSearch):
    """Backtracking by halves, from a bound of one's own."""

    def __init__(self, bound: float = 1.0) -> None:
        super().__init__(0.1, 0.5, bound, 1e-6, "full", None, None, 0.5, "each", False)


def build(text: str, **options: Any) -> eq.Step:
    model = linear_model()
    given = {"lr": 0.05, "steps_per_epoch": 7} | options
    return parse(text).build(model, all_tasks(model, F.mse_loss), **given)


def trains(text: str) -> eq.Step:
    """Build it, and see the losses fall."""
    step = build(text, seed=0)
    batch = regression_batch()
    first = step(*batch).losses.sum()
    for _ in range(20):
        last = step(*batch).losses.sum()
    assert last < first, text
    return step


# -------------------------------------------------------------------------- what it brings


def test_an_aggregator_comes_with_all_its_forms() -> None:
    assert eq.register("share", Share) is Share
    for text in ("share", "share-ub", "f-share", "a-share", "IGBv1+Share(share=0.25)",
                 "fbls+share", "bls+f-share", "share(update_every=2)", "share(heads=weighted)",
                 "f-share(share=0.25, rho=0.1, every=2)"):  # fmt: skip
        recipe = parse(text)
        assert parse(str(recipe)) == recipe
        trains(text)
    assert str(parse("Share( share = 1, RULE=all )".replace("RULE", "rule"))) == "share(share=1.0)"
    assert METHODS["share"] in eq.Recipe.known()
    assert METHODS["share"].summary == "A share of each task's gradient, the same for all tasks."
    assert parse("f-share(share=0.25)").plain == parse("share(share=0.25)")
    assert build("share(update_every=3)").aggregator.k == 3
    check_aggregator(METHODS["share"].factory)


def test_one_that_needs_the_rows_has_no_form_on_features_and_keeps_no_coefficients() -> None:
    eq.register("entrywise", Entrywise)
    assert "entrywise-ub" not in METHODS
    assert METHODS["entrywise"].parameters == {}
    for text in ("entrywise", "f-entrywise", "si+entrywise"):
        trains(text)
    with pytest.raises(eq.CombinationError, match="features, where entrywise cannot"):
        parse("fbls+entrywise")


def test_a_weighting_has_what_the_training_knows() -> None:
    @eq.register("drawn")
    class Mine(Drawn):
        """One task counts twice."""

    step = trains("drawn(often=3)+mgda")
    assert type(step.weighting) is Mine
    assert (step.weighting.n_tasks, step.weighting.often) == (2, 3)
    first, same = build("drawn", seed=4), build("drawn", seed=4)
    for k in range(5):
        batch = regression_batch(seed=k)
        assert torch.equal(first(*batch).weights, same(*batch).weights)
    with pytest.raises(AssertionError, match="saved state"):  # it does not keep its generator
        check_weighting(Mine)


def test_a_line_search() -> None:
    eq.register("halving", Halving, partner="mgda")
    recipe = parse("halving(bound=0.5)")
    assert recipe.needs_sgd
    assert str(recipe) == "halving(bound=0.5)"
    step = trains("halving(bound=0.5)")
    assert isinstance(step.line_search, Halving)
    assert isinstance(step.aggregator, eq.MGDA)
    assert str(parse("sum+halving")) == "halving+sum"


def test_a_token_that_looks_as_if_it_worked_on_features() -> None:
    eq.register("my-ubiquity", Share)
    for text in ("fbls+my-ubiquity", "fbls+my-ubiquity(share=0.1)", "my-ubiquity-ub"):
        assert str(parse(text)) == text
        assert build(text).level == "features"


def test_anything_that_makes_a_stage() -> None:
    def of_torch(scale: float = 1.0) -> Callable[[Tensor], Tensor]:
        """The sum, from a function."""
        return lambda rows: scale * rows.sum(0)

    eq.register("of-torch", of_torch, axis="aggregation")
    eq.register("cagrad-half", functools.partial(eq.CAGrad, c=0.5), axis="aggregation")
    eq.register("logs", lambda: torch.log, axis="weighting")
    assert METHODS["of-torch"].summary == "The sum, from a function."
    assert trains("of-torch(scale=0.5)").aggregator(torch.ones(2, 3)).tolist() == [1.0] * 3
    assert trains("cagrad-half").aggregator.c == 0.5
    assert trains("cagrad-half-ub(c=0.1)").aggregator.c == 0.1
    assert build("cagrad-half(update_every=4)").aggregator.k == 4
    trains("logs+f-of-torch")
    assert "lambda" in METHODS["logs"].summary


def test_what_stands_beside_and_what_is_usual_in_flat_regions() -> None:
    eq.register("share", Share, partner="si", flat={"share": 0.1})
    assert isinstance(build("share").weighting, eq.SI)
    assert str(parse("si+share")) == "share"
    assert build("f-share").aggregator.share == 0.1
    assert build("a-share").aggregator.share == 0.5
    assert str(parse("f-share(share=0.1)")) == "f-share"


def test_built_in_methods_go_through_the_same_function() -> None:
    known = {*WEIGHTINGS, *AGGREGATORS, *LINE_SEARCHES, "stl"}
    assert {t for t in METHODS if not t.endswith("-ub")} == known
    assert list(TOKENS) == [*METHODS, *FLAT]
    assert set(FLAT) == {f"{form}-{token}" for form in "fa" for token in AGGREGATORS}


# ----------------------------------------------------------------------- types of parameters


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("share(share=much)", "share is 'much'; it takes float"),
        ("share(share=1e999)", "share is inf; it takes float"),
        ("share(rule=some)", "rule is 'some'; it takes 'all' or 'longest'"),
        ("share(rule=1)", "rule is 1; it takes 'all' or 'longest'"),
        ("share(often=2)", "share has no parameter 'often'; it takes: share, rule, update_every"),
        ("share(heads=both)", "heads is 'both'; it takes 'own' or 'weighted'"),
        ("share(update_every=0)", "k is 0; it must be a whole number of at least 1"),
        ("f-share(heads=own)", "f-share has no parameter 'heads'"),
        ("loose(a=3, b=oops)", "b is 'oops', of all things"),
        ("numbers(of=1)", "of is 1; it takes "),
        ("numbers(of=word)", "of is 'word'; it takes "),
    ],
)
def test_values_are_checked_by_the_type_hints(text: str, words: str) -> None:
    class Loose(eq.Weighting):
        """Without hints, a parameter takes what the text gives."""

        def __init__(self, a=1, *, b=(1, 2)) -> None:
            super().__init__()
            if b == "oops":
                raise TypeError(f"b is {b!r}, of all things.")

        def weigh(self, losses: Tensor, present: Tensor) -> Tensor:
            return torch.ones_like(losses)

    class Numbers(Loose):
        """A list of numbers."""

        def __init__(self, of: list[float] | None = None) -> None:
            super().__init__()

    eq.register("share", Share)
    eq.register("loose", Loose)
    eq.register("numbers", Numbers)
    for fine in ("loose(a=word, b=(3, 4))", "loose(a=[1, 2])", "loose(b=none)",
                 "numbers(of=[1, 2])", "numbers(of=none)"):  # fmt: skip
        recipe = parse(fine)
        assert parse(str(recipe)) == recipe
        build(fine)
    with pytest.raises(eq.RecipeError) as caught:
        parse(text)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mgda(every=5)", "mgda has no parameter 'every' any more; write update_every="),
        ("igbv1+mgda(weights_on_all=true)", "'weights_on_all' any more; write heads=weighted"),
        ("rlw(normalise_to=1)", "rlw has no parameter 'normalise_to' any more; write normalize_to"),
        ("rlw-si(normalise_to=1)", "rlw-si has no parameter 'normalise_to' any more"),
        ("graddrop(every=5)", "graddrop has no parameter 'every'; it takes: leak"),
        ("sum(weights_on_all=true)", "sum has no parameter 'weights_on_all'; it takes: none"),
    ],
)
def test_old_names_say_the_new_ones(text: str, words: str) -> None:
    with pytest.raises(eq.RecipeError) as caught:
        parse(text)
    assert words in str(caught.value)


# ------------------------------------------------------------------------------ what is refused


class Needy(Share):
    """Wants what nobody gives."""

    def __init__(self, radius: float) -> None:
        super().__init__(radius)


class Positional(Share):
    """Cannot be given a parameter by its name."""

    def __init__(self, share: float = 1.0, /) -> None:
        super().__init__(share)


class Rho(Share):
    """Has a parameter that means something else in flat regions."""

    def __init__(self, rho: float = 1.0) -> None:
        super().__init__(rho)


class Undecided:
    """Could be anything."""


@pytest.mark.parametrize(
    ("token", "factory", "options", "words"),
    [
        ("Share", Share, {}, "made of lower-case letters, digits and single hyphens"),
        ("2share", Share, {}, "made of lower-case letters"),
        ("my share", Share, {}, "made of lower-case letters"),
        ("my--share", Share, {}, "made of lower-case letters"),
        ("f-share", Share, {}, "f-, a- and -ub are added to the tokens of aggregators"),
        ("a-share", Share, {}, "f-, a- and -ub"),
        ("share-ub", Share, {}, "f-, a- and -ub"),
        ("cagrad", Share, {}, "cagrad is the name of equipoise.aggregation.cagrad.CAGrad"),
        ("ca-grad", Share, {}, "cagrad is the name of equipoise.aggregation.cagrad.CAGrad"),
        ("fcagrad", Share, {}, "f-cagrad is the name of"),
        ("ew", Share, {}, "ew is the name of equipoise.weighting.ew.EW"),
        ("stl", Share, {}, "stl is the name of equipoise.registry.single_task"),
        ("uw-si", Drawn, {}, "uw-si makes no sense: UW on the scale-invariant objective"),
        ("mine", Undecided, {}, "Undecided is no class of Weighting, Aggregator or LineSearch"),
        ("mine", lambda: eq.Sum(), {}, "say which question it answers: axis='weighting' or"),
        ("mine", Share, {"axis": "weighting"}, "axis is 'weighting', but Share answers aggrega"),
        ("mine", Share, {"axis": "baseline"}, "axis is 'baseline'; known are 'weighting', "),
        ("mine", 3, {"axis": "weighting"}, "3 is not callable"),
        ("mine", lambda: 3, {"axis": "weighting"}, "makes 3, which is no weighting"),
        ("mine", lambda: eq.Sum(), {"axis": "line search"}, "which is no line search"),
        ("mine", Needy, {}, "parameter 'radius' of Needy has no default"),
        ("mine", lambda rows: rows.sum(0), {"axis": "aggregation"}, "parameter 'rows' of"),
        ("mine", Positional, {}, "parameter 'share' of Positional has no default that a keyword"),
        ("mine", Rho, {}, "Rho has a parameter 'rho', which recipes use for any aggregator"),
        ("mine", Share, {"partner": "cagrad"}, "partner is 'cagrad', which is no registered w"),
        ("mine", Halving, {"partner": "si"}, "partner is 'si', which is no registered aggregation"),
        ("mine", Drawn, {"partner": "si"}, "partner is 'si', which is no registered partner"),
        ("mine", Share, {"flat": {"c": 1}}, "flat sets 'c', no parameter of an aggregator"),
        ("mine", Drawn, {"flat": {"often": 1}}, "flat sets 'often'"),
    ],
)  # fmt: skip
def test_what_cannot_be_registered(token: str, factory: Any, options: Any, words: str) -> None:
    before = dict(TOKENS)
    with pytest.raises(eq.RecipeError) as caught:
        eq.register(token, factory, **options)
    text = str(caught.value)
    assert text.startswith(f"{token!r} cannot be registered: ")
    assert words in text
    assert "\n" not in text
    assert dict(TOKENS) == before


def test_again_and_anew() -> None:
    eq.register("mine", Share)
    eq.register("mine", Share, partner="si")  # the same thing once more
    assert METHODS["mine"].partner == "si"

    def define(doc: str, base: type) -> type:
        members = {"__doc__": doc, "__module__": __name__, "__qualname__": "Cell"}
        return type("Cell", (base,), members)

    eq.register("cell", define("First.", Share))
    assert "cell-ub" in METHODS
    second = define("Second.", Entrywise)
    eq.register("cell", second)  # a notebook's cell, run again
    assert METHODS["cell"].factory is second
    assert METHODS["cell"].summary == "Second."
    assert "cell-ub" not in METHODS and "f-cell" in FLAT
    with pytest.raises(eq.RecipeError, match=r"cell is the name of .*\.Cell; take another"):
        eq.register("cell", Share)


def test_a_later_name_does_not_take_a_form_of_an_earlier_one() -> None:
    eq.register("shareub", Drawn)
    with pytest.raises(eq.RecipeError, match="shareub is the name of"):
        eq.register("share", Share)
    assert "share" not in METHODS and "f-share" not in FLAT


def test_the_examples_of_the_docstrings_run() -> None:
    assert doctest.testmod(registry).attempted > 0
    assert doctest.testmod(registry).failed == 0


# ---------------------------------------------------------- combinations, by the names given


class OfDegree0(Share):
    """A direction that does not grow with the gradients."""

    degree = 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "bls+mgda(update_every=5)",
            "bls needs the gradients of each task in every step, mgda",
        ),
        ("fbls+mine(update_every=2)", "fbls needs the gradients of each task in every step, mine"),
        ("f-mine", "the direction of f-mine is of degree 0"),
        ("f-nash(degree=0)", "f-nash(degree=0) is of degree 0"),
    ],
)
def test_senseless_combinations_are_refused_by_the_names_given(text: str, words: str) -> None:
    eq.register("mine", OfDegree0)
    with pytest.raises(eq.CombinationError) as caught:
        parse(text)
    assert str(caught.value).startswith(f"recipe {text!r}: ")
    assert words in str(caught.value)
