"""Options of data sets and models: what is accepted, and the sentence for what is not."""

from pathlib import Path
from typing import Any, Literal

import pytest

from equipoise.lab import data, models, options
from equipoise.lab.data import DATASETS, DataError
from equipoise.lab.models import MODELS, ModelError
from equipoise.text import show, show_value


def build(
    root: Any,
    seed: int = 0,
    *,
    size: int | tuple[int, int] = 8,
    share: float = 0.5,
    way: Literal["near", "far"] = "near",
    flag: bool = False,
    limit: int | None = None,
    counts: tuple[int, int, int] = (1, 2, 3),
    folder: str | None = None,
):
    """Nothing."""


def undeclared(root, seed, anything=3):
    """Nothing."""


KNOWN = {"set": build, "Own-Set": undeclared}


def canonical(text):
    name, found = options.read(text, KNOWN, "thing", DataError)
    return show(name, found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("set", "set"),
        ("SET()", "set"),
        ("own-set", "Own-Set"),
        ("own-set(anything=x)", "Own-Set(anything=x)"),
        ("set(way=near, flag=false, limit=none, size=8, share=0.5)", "set"),
        ("set(size=9)", "set(size=9)"),
        ("set(size=(8, 9))", "set(size=(8, 9))"),
        ("set(size=[8, 9])", "set(size=(8, 9))"),
        ("set(share=1)", "set(share=1.0)"),
        ("set(way=FAR, flag=true)", None),
        ("set(way='far', flag=True)", "set(flag=true, way=far)"),
        ("set(limit=3, seed=2)", "set(limit=3, seed=2)"),
        ("set(counts=(1, 2, 4))", "set(counts=(1, 2, 4))"),
        ("set(counts=(1,2,3))", "set"),
        ("set(folder=/a b/c)", "set(folder='/a b/c')"),
    ],
)
def test_one_text_for_one_choice(text, expected):
    if expected is None:
        with pytest.raises(DataError, match="way is FAR; it takes near or far"):
            canonical(text)
        return
    assert canonical(text) == expected
    assert canonical(expected) == expected


TAKES = (
    "it takes: seed=0, size=8, share=0.5, way=near, flag=false, limit=none, counts=(1, 2, 3), "
    "folder=none."
)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("sett", "no thing 'sett'; did you mean 'set'?"),
        ("set(colour=3)", f"thing set: there is no option 'colour'; {TAKES}"),
        ("set(root=x)", f"thing set: there is no option 'root'; {TAKES}"),
        ("own-set(b=3)", "thing Own-Set: there is no option 'b'; it takes: anything=3."),
        ("set(size=x)", "thing set: size is x; it takes int or (int, int)."),
        ("set(size=8.0)", "thing set: size is 8.0; it takes int or (int, int)."),
        ("set(size=true)", "thing set: size is true; it takes int or (int, int)."),
        ("set(size=(1,))", "thing set: size is (1,); it takes int or (int, int)."),
        ("set(size=(1, 2.0))", "thing set: size is (1, 2.0); it takes int or (int, int)."),
        ("set(share=much)", "thing set: share is much; it takes float."),
        ("set(share=true)", "thing set: share is true; it takes float."),
        ("set(way=[3])", "thing set: way is [3]; it takes near or far."),
        ("set(flag=1)", "thing set: flag is 1; it takes bool."),
        ("set(limit='3')", "thing set: limit is '3'; it takes int or none."),
        ("set(counts=(1, 2))", "thing set: counts is (1, 2); it takes (int, int, int)."),
        ("set(folder=3)", "thing set: folder is 3; it takes str or none."),
        ("set(3)", "thing 'set(3)': write set(3=...), a value for a name."),
        ("set(size=1, size=2)", "thing 'set(size=1, size=2)': size is given twice."),
        ("set size", "thing 'set size': cannot read 'set size'; write name or "
                     "name(key=value, ...)."),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_sentence(text, sentence):
    with pytest.raises(DataError) as caught:
        canonical(text)
    assert str(caught.value) == sentence


@pytest.mark.parametrize("registry", [DATASETS, MODELS], ids=["data", "models"])
def test_every_option_has_a_type_and_its_default_fits_it(registry):
    for name, factory in registry.items():
        hints = options.get_type_hints(factory)
        for option, value in options.defaults(factory).items():
            assert options.fit(value, hints[option]) == value, f"{name}({option})"
            options.in_words(hints[option])


def test_data_and_models_have_errors_of_their_own():
    assert data.canonical("MultiMNIST( train=120000, val=5)") == "multimnist(val=5)"
    assert models.canonical("ResNet18(width=64, stem=small)") == "resnet18(stem=small)"
    with pytest.raises(DataError, match="data set multimnist: there is no option 'width'"):
        data.canonical("multimnist(width=3)")
    with pytest.raises(ModelError, match="model resnet18: there is no option 'train'"):
        models.canonical("resnet18(train=3)")


def test_options_in_the_text_reach_what_is_built():
    small = data.load("multidigits(sizes=(30, 20, 10), canvas=24, seed=1)")
    assert [len(split) for split in (small.train, small.val, small.test)] == [30, 20, 10]
    assert small.input_shape == (1, 24, 24)
    same = data.load("multidigits", sizes=(30, 20, 10), canvas=24, seed=1)
    other = data.load("multidigits(sizes=(30, 20, 10), canvas=24)")
    assert small.train.inputs.equal(same.train.inputs)
    assert not small.train.inputs.equal(other.train.inputs)
    model = models.build("resnet18(width=2, features=none)", small)
    assert model.heads["left"].in_features == 16


def test_the_documentation_names_every_option_with_its_default():
    page = (Path(__file__).resolve().parents[2] / "docs" / "lab.md").read_text("utf-8")
    rows = [
        [cell.strip() for cell in line.strip("| ").split("|")]
        for line in page.splitlines()
        if line.startswith("|")
    ]
    for registry in (DATASETS, MODELS):
        for name, factory in registry.items():
            assert any(f"`{name}`" in row[0] for row in rows), name
            for option, value in options.defaults(factory).items():
                shown = f"`{show_value(value)}`"
                assert any(
                    f"`{option}`" in names and shown in defaults
                    for row in rows
                    for names, defaults in zip(row, row[1:], strict=False)
                ), f"{name}: {option} = {shown}"
